"""What stands between text and ids, on byte-level BPE tokenizers whose merges run across tags and line breaks."""

from __future__ import annotations

import random

import pytest
from conftest import TEXT
from rollout_parts import ScriptedEngine, ScriptedGenerator, questions, wandering_policy
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from zerosearch.generation import SampledTurn, TurnRequest
from zerosearch.generation.tokenization import decoded_text, fit_observation, plain_text, text_token_ids
from zerosearch.generation.transformers_engine import TurnEnd
from zerosearch.rollout.loop import RolloutSettings, run_rollouts

# How GPT-2, Qwen2.5 and Llama-3 cut a text before they merge: the last two let ">" run into the line breaks behind it.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PIECES = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "qwen2": WORDS + r"|\p{N}" + SIGNS,
    "llama3": WORDS + r"|\p{N}{1,3}" + SIGNS,
    "whole": r"[\s\S]+",
}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module", params=PIECES)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES[request.param]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=8,
    )
    tokenizer.train_from_iterator([TEXT] * 3 + ["</search>\n\n</answer>\n</search>\n"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIALS[0],
        pad_token=SPECIALS[0],
        additional_special_tokens=SPECIALS[1:],
        clean_up_tokenization_spaces=False,
        name_or_path=request.param,
    )


def straddles(tokenizer: PreTrainedTokenizerFast) -> bool:
    return any(">\n" in tokenizer.decode([token_id]) for token_id in range(len(tokenizer)))


class RandomCuts(ScriptedGenerator):
    """Writes its text in tokens cut at random, as a policy that samples may; the tag's end may lie inside the last."""

    def write(self, request: TurnRequest) -> SampledTurn:
        turn = len(self.requests[request.trajectory]) - 1
        rng = random.Random(f"{request.trajectory} {turn}")
        text = self.policy(request.trajectory, turn) + rng.choice(["", "\n", "\n\n", " and"])
        ids: list[int] = []
        while text:
            piece = text[: rng.randint(1, 12)]
            ids += text_token_ids(self.tokenizer, piece)
            text = text[len(piece) :]
        end = TurnEnd(self.tokenizer)
        length = next((n for n in range(1, len(ids) + 1) if end.reached(ids[:n])), len(ids))
        return SampledTurn(request.trajectory, ids[:length], [-0.5] * length, "stop")


def test_ids_are_those_sampled_and_those_of_each_observation_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    generator = RandomCuts(tokenizer, wandering_policy(2))
    sampled: dict[tuple[int, int], list[int]] = {}
    write = generator.write

    def remember(request: TurnRequest) -> SampledTurn:
        turn = write(request)
        sampled[request.trajectory, len(generator.requests[request.trajectory]) - 1] = turn.token_ids
        return turn

    generator.write = remember  # type: ignore[method-assign]
    engine = ScriptedEngine(lambda request: [f"About {request.query}.\n\n</search>\n", "<|im_end|>"])
    trajectories = run_rollouts(questions(80), generator, engine, RolloutSettings(max_turns=3))
    re_encoded = 0
    for number, trajectory in enumerate(trajectories):
        expected: list[int] = []
        for place, turn in enumerate(trajectory.turns):
            expected += sampled[number, place]
            expected += text_token_ids(tokenizer, turn.observation) if turn.observation else []
        if trajectory.outcome == "answered":
            expected.append(tokenizer.eos_token_id)
        assert trajectory.completion_ids == expected
        assert [turn.kind for turn in trajectory.turns][-1:] != ["search"] or trajectory.outcome == "turns_exhausted"
        assert set(tokenizer.all_special_ids).isdisjoint(trajectory.completion_ids[:-1])
        re_encoded += text_token_ids(tokenizer, decoded_text(tokenizer, expected)) != expected
    assert re_encoded > 60, "to decode and encode again would train on other ids"


def test_a_tag_whose_end_merges_with_the_line_break_ends_the_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    if not straddles(tokenizer):
        assert tokenizer.name_or_path == "gpt2", "of these, it alone cuts between > and a line break"
        return
    ids = text_token_ids(tokenizer, "<search> Emma </search>\n\n")
    assert tokenizer.decode(ids[-1:]).rstrip("\n").endswith(">") and tokenizer.decode(ids[-1:]).endswith("\n")
    end = TurnEnd(tokenizer)
    assert [end.reached(ids[: place + 1]) for place in range(len(ids))] == [False] * (len(ids) - 1) + [True]


@pytest.mark.parametrize("text", ["a\n\nb  c ", " <|im_end|>", "naïve 東京 🙂", "</information>\n\n<information>"])
def test_text_comes_back_to_the_letter_and_holds_no_special_token(
    text: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = text_token_ids(tokenizer, text)
    assert decoded_text(tokenizer, ids) == text
    assert set(tokenizer.all_special_ids).isdisjoint(ids)
    assert not any(special in plain_text(text, tokenizer) for special in SPECIALS)


def test_ids_are_those_of_the_tokenizer_whatever_it_was_asked_before(tokenizer: PreTrainedTokenizerFast) -> None:
    text = f"{TEXT} 東京 🙂 <|im_end|>\n\n" * 3

    def by_the_tokenizer() -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    for asked_before in ({"truncation": True, "max_length": 7}, {"padding": "max_length", "max_length": 4000}, {}):
        tokenizer(text, **asked_before)
        assert text_token_ids(tokenizer, text) == by_the_tokenizer()
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in tokenizer(text)["input_ids"], "nothing stays behind"


def test_a_tokenizer_without_a_fast_backend_does_as_well() -> None:
    tokenizer = ByT5Tokenizer()
    assert decoded_text(tokenizer, text_token_ids(tokenizer, "<pad> a</s>\n")) == "<pad> a</s>\n"
    assert set(tokenizer.all_special_ids).isdisjoint(text_token_ids(tokenizer, "<pad> a</s>\n"))


def test_an_observation_keeps_its_tags_at_any_budget(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = ["Emma 東京 🙂 " * 9, "It rains.", "x" * 80]

    def encode(text: str) -> list[int]:
        return text_token_ids(tokenizer, text)

    shortest = len(fit_observation(["", "", ""], 10_000, encode)[1])
    lengths = []
    for budget in range(shortest, shortest + 90, 7):
        text, ids, is_cut = fit_observation(documents, budget, encode)
        assert ids == encode(text) and len(ids) <= budget and is_cut
        assert text.startswith("\n\n<information>Doc 1: ") and text.endswith("</information>\n\n")
        lengths.append(len(ids))
    assert lengths == sorted(lengths) and lengths[-1] - lengths[0] > 60
