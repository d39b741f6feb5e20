"""Turns of a transformers model end where they should, ids and log-probabilities are its own; models load by name."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from generation_parts import PROMPTS, largest_difference, load, roll_out, sample, save_adapter
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from zerosearch.errors import UserError
from zerosearch.generation import SampledTurn, Sampling, TurnRequest
from zerosearch.generation.loading import (
    check_checkpoint,
    check_tokenizer,
    load_generator,
    load_model,
    load_tokenizer,
    longest_context,
    model_config,
    whole_model,
)
from zerosearch.generation.transformers_engine import TransformersGenerator, TurnEnd, draw
from zerosearch.generation.vllm_colocated import VLLMGenerator
from zerosearch.protocol import STOP_STRINGS


@pytest.fixture(scope="module")
def generator(tiny_policy_dir: Path) -> TransformersGenerator:
    return load(tiny_policy_dir)


@pytest.fixture(scope="module")
def adapter(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `grpo.py --use_peft true` saves, of the tiny policy."""
    return save_adapter(tiny_policy_dir, tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize(
    ("pieces", "ends"),
    [
        (["<answer>", " x ", "</answer>"], True),
        (["<answer>", " x ", "</ans", "wer", ">\n\n"], True),
        (["<answer>", " x ", "</answer>. And"], True),
        (["<", "/", "s", "e", "a", "r", "c", "h", ">"], True),
        (["</search", " >"], False),
        (["<search>", " a > b"], False),
        (["</search>", " and more"], False),  # the turn has ended before
    ],
)
def test_a_turn_ends_when_a_stop_string_is_complete(pieces: list[str], ends: bool) -> None:
    class Pieces:
        def decode(self, ids: list[int], **kwargs: bool) -> str:
            return "".join(pieces[place] for place in ids)

    turn_end = TurnEnd(Pieces(), STOP_STRINGS)  # type: ignore[arg-type]
    assert [turn_end.reached(range(place + 1)) for place in range(len(pieces))][-1] is ends


def test_draw_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([0.5, 0.0, 0.3, 0.2]).log().repeat(6, 1)
    uniform = torch.tensor([0.0, 0.499, 0.501, 0.799, 0.801, 1.0], dtype=torch.float64)  # 1.0: as if by rounding
    ids, logprobs = draw(logits, uniform, Sampling())
    assert ids.tolist() == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.5, 0.5, 0.3, 0.3, 0.2, 0.2]))


def test_draw_at_temperature_0_takes_the_likeliest_and_tells_its_own_probability() -> None:
    ids, logprobs = draw(torch.tensor([[0.2, 0.7, 0.1]]).log(), torch.tensor([0.99]), Sampling(temperature=0.0))
    assert ids.tolist() == [1]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.7]))


def test_temperature_and_top_p_shape_the_distribution_and_its_log_probabilities() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    _, logprobs = draw(logits, torch.tensor([0.0]), Sampling(temperature=0.5))
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.25 / 0.38]))  # .25 / (.25 + .09 + .04)
    ids, logprobs = draw(logits, torch.tensor([0.99]), Sampling(top_p=0.6))
    assert ids.tolist() == [1], "0.5 alone does not reach 0.6, 0.5 + 0.3 does: the third is out"
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.3 / 0.8]))


def test_sampling_that_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match=r"temperature is -1: it must be 0 \(greedy\) or more"):
        Sampling(temperature=-1)
    with pytest.raises(UserError, match=r"top_p is 0: it must lie in \(0, 1\]"):
        Sampling(top_p=0)


def test_greedy_turns_are_those_of_generate(generator: TransformersGenerator, tiny_policy_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir, dtype=torch.float32)
    contexts = [generator.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    turns = sample(generator, [TurnRequest(n, ids, 60, 0) for n, ids in enumerate(contexts)], temperature=0.0)
    for n, ids in enumerate(contexts):
        whole = model.generate(
            torch.tensor([ids]),
            max_new_tokens=60,
            do_sample=False,
            stop_strings=["</search>", "</answer>"],
            tokenizer=generator.tokenizer,
        )
        assert turns[n].token_ids == whole[0, len(ids) :].tolist()


def test_log_probabilities_are_those_of_a_forward_pass_after_several_turns(
    generator: TransformersGenerator, tiny_policy_dir: Path
) -> None:
    trajectories = roll_out(generator)
    assert max(len(trajectory.turns) for trajectory in trajectories) == 4
    assert sum(trajectory.searches for trajectory in trajectories) > 10
    assert largest_difference(tiny_policy_dir, trajectories) < 1e-4


def test_what_else_is_in_the_batch_changes_nothing(generator: TransformersGenerator) -> None:
    context = generator.tokenizer(PROMPTS[0])["input_ids"]
    requests = [TurnRequest(n, context * (n % 3 + 1), 40, seed=n) for n in range(12)]
    together = sample(generator, requests)
    alone = {n: sample(generator, [request])[n] for n, request in enumerate(requests)}
    assert {n: turn.token_ids for n, turn in together.items()} == {n: turn.token_ids for n, turn in alone.items()}
    assert len({tuple(turn.token_ids) for turn in together.values()}) > 6, "other seeds, other turns"


@pytest.mark.slow
def test_how_many_trajectories_are_under_way_changes_nothing(generator: TransformersGenerator) -> None:
    few, many = roll_out(generator, max_live=3), roll_out(generator)
    assert [trajectory.completion_ids for trajectory in few] == [trajectory.completion_ids for trajectory in many]


def test_turns_end_by_stop_string_end_of_sequence_or_length(generator: TransformersGenerator) -> None:
    context = generator.tokenizer(PROMPTS[0])["input_ids"]
    turns = sample(generator, [TurnRequest(n, context, 25, seed=n) for n in range(200)])
    by_finish: dict[str, list[SampledTurn]] = {}
    for turn in turns.values():
        by_finish.setdefault(turn.finish, []).append(turn)
        assert len(turn.logprobs) == len(turn.token_ids) <= 25
    assert set(by_finish) == {"stop", "eos", "length"}
    eos = generator.tokenizer.eos_token_id
    assert all(turn.token_ids[-1] == eos for turn in by_finish["eos"])
    assert all(len(turn.token_ids) == 25 for turn in by_finish["length"])
    texts = [generator.tokenizer.decode(turn.token_ids) for turn in by_finish["stop"]]
    assert all("</search>" in text[-12:] or "</answer>" in text[-12:] for text in texts)
    assert any(text.endswith("</search>\n") for text in texts), "a closing tag that ends inside a token"


def test_the_model_comes_back_in_the_mode_it_was_in(tiny_policy_dir: Path) -> None:
    generator = load(tiny_policy_dir)
    with generator.load() as model:
        model.train()
        roll_out(generator, count=1)
        assert model.training


def test_a_model_that_does_not_attend_to_everything_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    )
    model = Qwen2ForCausalLM(config)
    generator = TransformersGenerator(lambda: nullcontext(model), tiny_tokenizer, [0], 64)
    with pytest.raises(UserError, match="full attention in every layer"), generator.session(Sampling()):
        pass


@pytest.mark.slow
def test_an_adapter_is_loaded_merged_into_its_base(adapter: Path, tiny_policy_dir: Path) -> None:
    generator = load_generator(str(adapter), "transformers", 10_000)
    assert generator.max_context_tokens == 2048, "what its base takes"
    trajectories = roll_out(generator)
    plain = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    with_adapter = PeftModel.from_pretrained(plain, adapter)
    ids = torch.tensor([trajectories[0].prompt_ids])
    with torch.no_grad():
        expected = with_adapter(ids).logits
        assert torch.allclose(load_model(str(adapter))(ids).logits, expected, atol=1e-4)
    assert largest_difference(adapter, trajectories) < 1e-4 < largest_difference(tiny_policy_dir, trajectories)


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(adapter: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == load_tokenizer(str(adapter)).get_vocab()


def test_an_adapter_becomes_a_whole_model_once(adapter: Path, tiny_policy_dir: Path, tmp_path: Path) -> None:
    assert whole_model(str(tiny_policy_dir), tmp_path) == str(tiny_policy_dir)
    merged = Path(whole_model(str(adapter), tmp_path))
    assert list(tmp_path.iterdir()) == [merged], "nothing half-written stays"
    written = (merged / "model.safetensors").stat().st_mtime_ns
    assert Path(whole_model(str(adapter), tmp_path)) == merged
    assert (merged / "model.safetensors").stat().st_mtime_ns == written
    expected, found = load_model(str(adapter)).state_dict(), load_model(str(merged)).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert load_tokenizer(str(merged)).chat_template


def test_a_sequence_ends_where_either_the_tokenizer_or_the_generation_config_ends_it(
    tiny_policy_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_policy_dir, tmp_path, dirs_exist_ok=True)
    tokenizer = load_tokenizer(str(tmp_path))
    rain = tokenizer.convert_tokens_to_ids("rain")
    GenerationConfig(eos_token_id=rain).save_pretrained(tmp_path)
    context = tokenizer(PROMPTS[0])["input_ids"]
    generator = load_generator(str(tmp_path), "transformers", 512)
    turns = sample(generator, [TurnRequest(n, context, 40, seed=n) for n in range(60)])
    assert {turn.token_ids[-1] for turn in turns.values() if turn.finish == "eos"} == {rain, tokenizer.eos_token_id}


def test_weights_that_are_missing_are_one_sentence(tiny_policy_dir: Path, adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_policy_dir, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"the weights of .*model' cannot be loaded: .*no file named model"):
        load_generator(str(folder), "transformers", 512)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"cannot be loaded: .*model-00001-of-00002\.safetensors"):
        load_generator(str(folder), "transformers", 512)
    (tmp_path / "adapter").mkdir()
    shutil.copy(adapter / "adapter_config.json", tmp_path / "adapter")
    with pytest.raises(UserError, match=r"the weights of .*adapter' cannot be loaded"):
        load_generator(str(tmp_path / "adapter"), "transformers", 512)


def test_a_model_without_a_longest_context_takes_what_is_asked_for() -> None:
    assert longest_context(BloomConfig(), 3000) == 3000
    assert longest_context(Qwen2Config(max_position_embeddings=2048), 3000) == 2048
    assert longest_context(Qwen2Config(max_position_embeddings=2048), 1000) == 1000


def test_a_model_without_positions_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=32, n_layer=1, n_head=2))
    generator = TransformersGenerator(lambda: nullcontext(model), tiny_tokenizer, [0], 64)
    with pytest.raises(UserError, match="needs position_ids, which BloomForCausalLM lacks; use vLLM"):
        generator.session(Sampling()).__enter__()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "fails: TemplateSyntaxError"),
        ("{{ raise_exception('no users') }}", "fails: TemplateError no users"),
        ("{{ messages[0].nothing.more }}", "fails: UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "fails: SecurityError"),
        ("{% for place in range(10 ** 9) %}{% endfor %}", "fails: OverflowError"),
        ("", "leaves out what the user says"),
        ("{{ messages[0]['content'][0]['text'] }}", "leaves out what the user says"),
    ],
)
def test_a_chat_template_that_cannot_ask_is_refused(
    template: str, message: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"the chat template of mine {message}"):
        check_tokenizer(tokenizer, "mine")


def test_a_tokenizer_without_an_end_and_a_configuration_of_another_form_are_refused(
    tiny_policy_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_policy_dir, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="model names no end of sequence"):
        load_tokenizer(str(folder))
    for content in ("[]", '{"model_type": "llama", "hidden_size": "x"}'):
        (folder / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"the configuration of .*model cannot be read"):
            load_tokenizer(str(folder))


def test_sizes_that_are_no_numbers_above_0_are_refused(tiny_policy_dir: Path, adapter: Path, tmp_path: Path) -> None:
    for source, file, size in (
        (tiny_policy_dir, "config.json", {"max_position_embeddings": -5}),
        (tiny_policy_dir, "config.json", {"vocab_size": 0}),
        (adapter, "adapter_config.json", {"r": "eight"}),
        (adapter, "adapter_config.json", {"lora_alpha": -1}),
    ):
        folder = shutil.copytree(source, tmp_path / "model", dirs_exist_ok=True)
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | size))
        ((name, value),) = size.items()
        with pytest.raises(UserError, match=f"model gives {name} as {value!r}: it must be a number above 0"):
            model_config(str(folder))
        shutil.rmtree(folder)


def test_a_checkpoint_of_another_kind_or_cut_short_is_refused(tiny_policy_dir: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_policy_dir, tmp_path / "checkpoint-4")
    torch.save({}, checkpoint / "optimizer.pt")
    check_checkpoint(str(checkpoint), is_adapter=False)
    check_checkpoint(None, is_adapter=True)
    with pytest.raises(UserError, match="checkpoint-4 is of another tuning"):
        check_checkpoint(str(checkpoint), is_adapter=True)
    for name, message in (("optimizer.pt", r"optimizer\.pt is cut short"), ("model.safetensors", "cannot be read")):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=message):
            check_checkpoint(str(checkpoint), is_adapter=False)
        (checkpoint / name).write_bytes(content)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match="checkpoint-4 holds no weights"):
        check_checkpoint(str(checkpoint), is_adapter=False)


class SleepyEngine:
    """TRL's owner of a colocated vLLM, its LLM and its engine in one, that writes down what it is told."""

    def __init__(self, weights_sleeping: bool) -> None:
        self.enable_sleep_mode = True
        self._llm_weights_sleeping = weights_sleeping
        self.llm = self.llm_engine = self
        self.model_config = SimpleNamespace(max_model_len=100)
        self.told: list[str] = []

    def sync_weights(self) -> None:
        self.told.append("sync weights")

    def wake_up(self, tags: list[str]) -> None:
        self.told.append(f"wake up {tags}")

    def sleep(self, level: int) -> None:
        self.told.append(f"sleep {level}")

    def add_request(self, number: str, *_: object, **__: object) -> None:
        self.told.append(f"turn {number}")
        output = SimpleNamespace(token_ids=[], logprobs=[], finish_reason="stop", stop_reason=None)
        self.under_way = [SimpleNamespace(request_id=number, finished=True, outputs=[output])]

    def step(self) -> list[SimpleNamespace]:
        return self.under_way

    def abort_request(self, numbers: list[str]) -> None:
        assert numbers == []


@pytest.mark.parametrize("weights_sleeping", [False, True])
def test_a_sleeping_engine_wakes_once_and_sleeps_once_a_rollout(
    weights_sleeping: bool, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = SleepyEngine(weights_sleeping)
    generator = VLLMGenerator(engine, tiny_tokenizer, engine)  # type: ignore[arg-type]
    with generator.session(Sampling()):
        for turn in range(2):
            generator.submit(TurnRequest(0, [1], 8, seed=turn))
            assert [sampled.finish for sampled in generator.step()] == ["eos"]
    # TRL syncs before a rollout if a step was made; else the weights that went to sleep with the last one are gone.
    synced = ["sync weights"] if weights_sleeping else []
    assert engine.told == [*synced, "wake up ['kv_cache']", "turn 0", "turn 1", "sleep 2"], "no sync between turns"
    assert engine._llm_weights_sleeping


def test_on_a_gpu_an_engine_takes_of_what_others_leave(tiny_policy_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def engine(make: object, dtype: str, max_model_len: int, **options: object) -> SimpleNamespace:
        asked.update(options)
        return SimpleNamespace(llm_engine=SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len)))

    vllm = ModuleType("vllm")
    vllm.__spec__, vllm.LLM = ModuleSpec("vllm", None), object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr("zerosearch.generation.loading.local_engine", engine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30 << 30, 80 << 30))
    load_generator(str(tiny_policy_dir), "vllm", 64)
    assert asked["gpu_memory_utilization"] == pytest.approx(0.9 * 30 / 80)
