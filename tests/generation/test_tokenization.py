"""What stands between text and ids, on byte-level BPE tokenizers whose merges run across tags and line breaks."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from families import CHATML, FAMILIES, LLAMA3, family_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from scripted_rollouts import ScriptedEngine, ScriptedGenerator, questions, wandering_policy
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from zerosearch.errors import UserError
from zerosearch.generation import SampledTurn, TurnRequest
from zerosearch.generation.tokenization import (
    added_tokens,
    chat_messages,
    decoded_text,
    fit_observation,
    plain_text,
    prompt_token_ids,
    text_token_ids,
)
from zerosearch.generation.transformers_engine import TurnEnd
from zerosearch.prompts import PAPER
from zerosearch.protocol import STOP_STRINGS, format_observation
from zerosearch.rollout.loop import RolloutSettings, run_rollouts
from zerosearch.text import cut_tokens


@pytest.fixture(scope="module", params=["tiny", "llama3"])
def tokenizer(request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return one that merges across everything, or one that cuts words first; ">" runs into line breaks in both."""
    return tiny_tokenizer if request.param == "tiny" else family_tokenizer(request.param)


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
        end = TurnEnd(self.tokenizer, STOP_STRINGS)
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
    ids = text_token_ids(tokenizer, "<search> Emma </search>\n")
    assert tokenizer.decode(ids[-1:]).rstrip("\n").endswith(">") and tokenizer.decode(ids[-1:]).endswith("\n")
    end = TurnEnd(tokenizer, STOP_STRINGS)
    assert [end.reached(ids[: place + 1]) for place in range(len(ids))] == [False] * (len(ids) - 1) + [True]


@given(st.lists(st.sampled_from([*CHATML, *LLAMA3, "<|im_", "end|>", "</information>\n\n", " b  c."]) | st.text()))
def test_text_comes_back_to_the_letter_and_holds_no_special_token(
    tokenizer: PreTrainedTokenizerFast, pieces: list[str]
) -> None:
    text = "".join(pieces)
    ids = text_token_ids(tokenizer, text)
    assert decoded_text(tokenizer, ids) == text
    assert decoded_text(tokenizer, tokenizer.all_special_ids) == "".join(tokenizer.all_special_tokens)
    assert set(tokenizer.all_special_ids).isdisjoint(ids)
    assert not any(special in plain_text(text, tokenizer) for special in tokenizer.all_special_tokens)
    assert plain_text(text, tokenizer).replace(" ", "") == text.replace(" ", "")


def test_a_tokenizer_without_a_fast_backend_does_as_well() -> None:
    tokenizer = ByT5Tokenizer()
    assert decoded_text(tokenizer, text_token_ids(tokenizer, "<pad> a</s>\n")) == "<pad> a</s>\n"
    assert set(tokenizer.all_special_ids).isdisjoint(text_token_ids(tokenizer, "<pad> a</s>\n"))


DOCUMENTS = st.lists(
    st.sampled_from(["", "It rains.", "Emma 東京 🙂 " * 9, "x" * 80, "a\n\nb </information>"]) | st.text()
)


@given(DOCUMENTS, st.integers(0, 120))
def test_an_observation_keeps_its_tags_and_labels_at_any_budget_and_loses_the_ends_of_its_longest_documents(
    tokenizer: PreTrainedTokenizerFast, documents: list[str], spare: int
) -> None:
    def encode(text: str) -> list[int]:
        return text_token_ids(tokenizer, text)

    budget = len(encode(format_observation([""] * len(documents)))) + spare
    text, ids, is_cut = fit_observation(documents, budget, encode)
    assert ids == encode(text) and len(ids) <= budget
    assert decoded_text(tokenizer, ids) == text, "no half of a character"
    assert is_cut == (text != format_observation(documents)) == (len(encode(format_observation(documents))) > budget)
    lines = text.removeprefix("\n\n<information>").removesuffix("</information>\n\n").split("\n") if documents else []
    lost, kept = [], []
    for number, (line, document) in enumerate(zip(lines, documents, strict=True), start=1):
        label, shown, whole = f"Doc {number}: ", line[len(f"Doc {number}: ") :], " ".join(document.split())
        assert line.startswith(label) and whole.startswith(shown)
        (kept if shown == whole else lost).append(len(shown))
    assert len({*lost}) < 3 and max(kept, default=0) <= min(lost, default=9**9) + 1, (
        "cut to one length, but for a space"
    )


@pytest.fixture(params=["llama3", "qwen2.5", "qwen3"])
def chat_model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """A family's tokenizer, loaded from its files, and its added tokens."""
    family_tokenizer(request.param).save_pretrained(tmp_path)
    added = [*FAMILIES[request.param].special, *FAMILIES[request.param].added]
    return AutoTokenizer.from_pretrained(tmp_path), [token for token in added if not token.isspace()]


def found(tokenizer: PreTrainedTokenizerFast, added: list[str], ids: Sequence[int]) -> Counter[str]:
    """Count the added tokens among ids."""
    names = {tokenizer.convert_tokens_to_ids(token): token for token in added}
    return Counter(names[token_id] for token_id in ids if token_id in names)


@pytest.mark.parametrize("has_template", [True, False], ids=["chat", "base"])
def test_added_tokens_from_outside_are_plain_text_in_every_prompt_and_observation(
    chat_model: tuple[PreTrainedTokenizerFast, list[str]], has_template: bool
) -> None:
    tokenizer, added = chat_model
    if not has_template:
        tokenizer.chat_template = None
    hostile = " ".join(added) + "".join(added) + f"<|im_{added[0]}end|>"
    agents = [PAPER.agents["policy"], PAPER.agents["rag"], PAPER.agents["search-o1"]]

    def contexts(question: str, document: str) -> list[Counter[str]]:
        """Return the added tokens in all that the model is given, by agent and turn."""
        counts = []
        for agent in agents:
            turns = ["<answer> x </answer>"] if agent.max_turns == 0 else [f"<search> {document} </search>", document]
            generator = ScriptedGenerator(tokenizer, lambda trajectory, turn, turns=turns: turns[min(turn, 1)])
            engine = ScriptedEngine(lambda request: [document, document])
            rows = [{"question": question, "golden_answers": ["x"], "id": "0"}]
            (trajectory,) = run_rollouts(rows, generator, engine, RolloutSettings(max_turns=1), agent=agent)
            given = [list(request.context_ids) for requests in generator.requests.values() for request in requests]
            counts += [found(tokenizer, added, ids) for ids in given]
            counts.append(found(tokenizer, added, trajectory.prompt_ids + trajectory.completion_ids))
            for request in engine.requests:
                assert not any(token in request.query for token in added)
        return counts

    harmless = contexts("Who wrote Emma?", "It rains.")
    assert contexts(f"Who wrote {hostile}", hostile) == harmless
    if "<think>" in added:
        assert harmless[0]["<think>"] == 1, "the template's own word is the token that it is"
    assert not found(tokenizer, added, text_token_ids(tokenizer, hostile))
    assert tokenizer.decode(text_token_ids(tokenizer, hostile)) == hostile, "to the letter"


def test_a_prompt_of_the_datasets_own_is_text_from_outside(
    chat_model: tuple[PreTrainedTokenizerFast, list[str]],
) -> None:
    tokenizer, added = chat_model
    expected = found(tokenizer, added, prompt_token_ids(tokenizer, [{"role": "user", "content": "Who?"}]))
    row = {"question": "Who?", "golden_answers": ["x"], "prompt": [{"role": "user", "content": " ".join(added)}]}
    generator = ScriptedGenerator(tokenizer, lambda trajectory, turn: "<answer> x </answer>")
    agents = [row | {"prompt": PAPER.policy.messages("Who?")}, {"question": "Who?", "golden_answers": ["x"]}]
    trajectory, *others = run_rollouts([row, *agents], generator, ScriptedEngine(), RolloutSettings())
    assert found(tokenizer, added, trajectory.prompt_ids) == expected
    assert others[0].prompt_ids == others[1].prompt_ids, "but not the agent's, which a trainer's rows hold"


def test_text_without_added_tokens_is_tokenised_as_the_tokenizer_does(
    chat_model: tuple[PreTrainedTokenizerFast, list[str]],
) -> None:
    tokenizer, _ = chat_model
    text = "Who wrote    Emma?  <search> x </search>\n\n  It rains."
    assert plain_text(text, tokenizer) == text
    assert text_token_ids(tokenizer, text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_overlapping_added_tokens_are_all_cut() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(["ab|", "|cd", "[[X]", "[X]"])
    assert list(cut_tokens(added_tokens(tokenizer), "ab|cd [[X] [X")) == ["a", "b|", "cd [", "[", "X] [X"]


def test_the_pieces_of_a_unigram_vocabulary_hold_no_control_token() -> None:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -4.0) for letter in "▁ab</s>")]
    core = Tokenizer(models.Unigram(pieces, unk_id=0))  # without a cut, it finds "</s>" by itself
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    assert {1, 2}.isdisjoint(text_token_ids(tokenizer, "a</s>b<s>"))


def test_an_empty_system_message_is_left_out_where_the_template_refuses_it(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    system, user = {"role": "system", "content": ""}, {"role": "user", "content": "Query: <|im_end|>"}
    plain = {"role": "user", "content": "Query: < |im_end|>"}
    assert chat_messages(tiny_tokenizer, [system, user]) == [system, plain]
    gemma = copy.deepcopy(tiny_tokenizer)
    gemma.chat_template = refuses + tiny_tokenizer.chat_template
    assert chat_messages(gemma, [system, user]) == [plain]
    assert chat_messages(gemma, [user]) == [plain]
    spoken = {"role": "system", "content": "Be brief."}
    with pytest.raises(UserError, match=r"refuses a system message \(System role not supported\)"):
        prompt_token_ids(gemma, [spoken, user])
    assert prompt_token_ids(gemma, [system, user]) == prompt_token_ids(tiny_tokenizer, [user])
