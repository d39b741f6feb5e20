"""Two ranks under DeepSpeed ZeRO-3: policy, reference and critic sharded, the same updates as one process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ZERO3 = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/zero3_cpu.yaml"))
ZERO3 = (*ZERO3, "--main_process_port", "29517")
WORDS = "Emma Jane Austen rain novel born who where".split()

pytestmark = pytest.mark.slow


def train(output: Path, policy: Path, data: Path, launcher: tuple[str, ...], **settings: Any) -> None:
    settings = {
        "model_name_or_path": policy,
        "dataset": data / "qa.jsonl",
        "engine": "bm25",
        "corpus": data / "corpus.jsonl",
        "output_dir": output,
        "algorithm": "ppo",
        "critic_learning_rate": 1e-4,
        "critic_warmup_steps": 0,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_turns": 2,
        "max_turn_tokens": 24,
        "max_observation_tokens": 128,
        "max_trajectory_tokens": 1536,
        "learning_rate": 1e-4,
        "gradient_checkpointing": "false",
        "logging_steps": 1,
        "report_to": "none",
        **settings,
    }
    pairs = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    run([*launcher, str(ROOT / "recipes/grpo.py"), *pairs])


def run(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def log_of(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def test_ppo_is_sharded_and_makes_the_update_of_one_process(tiny_policy_dir: Path, tmp_path: Path) -> None:
    questions = [{"id": str(n), "question": f"Who wrote {n}?", "golden_answers": WORDS} for n in range(12)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    passages = [{"id": str(n), "contents": f'"{word}"\n{word} is in the rain.'} for n, word in enumerate(WORDS)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, tiny_policy_dir, tmp_path, (), gradient_accumulation_steps=4, max_steps=1)
    train(two, tiny_policy_dir, tmp_path, ZERO3, gradient_accumulation_steps=2, max_steps=1)

    first, other = log_of(one)[0], log_of(two)[0]
    for name in ("reward", "search/policy_tokens", "critic/squared_error", "grad_norm"):
        assert other[name] == pytest.approx(first[name], rel=1e-3), name
    start = load_file(tiny_policy_dir / "model.safetensors")
    alone, sharded = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name, weight in alone.items():
        # Adam's first step moves each weight by the learning rate; a gradient of about 0 may go either way.
        moved = (weight - start[name]).abs() > 0.5e-4
        apart = (weight - sharded[name]).abs() > 0.5e-4
        assert moved.float().mean() > 0.3, name
        assert apart.float().mean() < 0.01, name

    # Of the critic, each rank keeps half: its optimizer state holds half of the parameters, in 32 bits.
    critic = torch.load(one / "checkpoint-1/critic/critic.pt")["model"]
    size = sum(weight.numel() for weight in critic.values())
    found = sorted((two / "checkpoint-1/critic").glob("*/*optim_states.pt"))
    assert len(found) == 2
    for path in found:
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]
        share = sum(group.numel() for group in state["fp32_flat_groups"])
        assert size / 2 <= share < 0.55 * size

    # And the run goes on from there, the critic with it.
    train(
        two,
        tiny_policy_dir,
        tmp_path,
        ZERO3,
        gradient_accumulation_steps=2,
        max_steps=2,
        resume_from_checkpoint="true",
    )
    assert [entry["step"] for entry in log_of(two)[:2]] == [1, 2]


# What `zero3_ranks.py` runs on one process and, under ZeRO-3, on two, with a vLLM engine in each; and what is sharded.
CASES = {case: {"policy", "reference"} for case in ("reinforce", "rloo", "grpo")}
CASES |= {"ppo": {"policy", "reference", "critic"}, "lora": {"policy", "critic"}, "qlora": {"policy"}}
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # by vLLM
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def one_and_two(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return what all cases led to on one process, and what on two ranks."""
    pytest.importorskip("vllm")
    pytest.importorskip("deepspeed")
    output = tmp_path_factory.mktemp("zero3-ranks")
    for name, launcher in (("one", ()), ("two", ZERO3)):
        run([*launcher, str(ROOT / "tests/zero3_ranks.py"), str(tiny_policy_dir), str(output / name), *CASES])
    return output / "one", output / "two"


def records(folder: Path) -> list[dict[str, Any]]:
    """Return what each rank of a run wrote down."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("?.json"))]


@every_case
def test_every_model_is_sharded_beside_a_vllm_on_each_rank(one_and_two: tuple[Path, Path], case: str) -> None:
    ranks = records(one_and_two[1] / case)
    assert [rank["generator"] for rank in ranks] == ["VLLMGenerator", "VLLMGenerator"]
    for held in (held for rank in ranks for held in rank["held"]):
        assert held.keys() == CASES[case]
        for name, elements in held.items():
            assert elements["whole"] == 0, name
            assert elements["share"] == pytest.approx(elements["all"] / 2, rel=1e-3), name


@every_case
def test_one_process_with_a_vllm_is_reached_from_this_machine_alone(one_and_two: tuple[Path, Path], case: str) -> None:
    assert [rank["listens"] for rank in records(one_and_two[0] / case)] == [[]]


@every_case
def test_two_ranks_log_what_one_does(one_and_two: tuple[Path, Path], case: str) -> None:
    (alone,), (first, _) = (records(run / case) for run in one_and_two)
    names = ["loss", "policy_loss", "grad_norm", "reward", "num_tokens", "search/policy_tokens", "search/searches"]
    if "critic" in CASES[case]:
        names += ["critic/value", "critic/squared_error", "critic/loss", "kl"]
    for expected, found in zip(alone["log"][:2], first["log"][:2], strict=True):
        assert [found[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-4, abs=1e-6)
        assert expected["grad_norm"] > 0.01
        assert found["sampling/sampling_logp_difference/max"] < 1e-3, "vLLM samples from the policy"
    assert alone["log"][1]["kl"] > 1e-5, "the policy has left the reference"


@every_case
def test_two_ranks_learn_the_weights_of_one(one_and_two: tuple[Path, Path], case: str) -> None:
    one, two = (run / case for run in one_and_two)
    trained = set(records(one)[0]["trained"])
    for name in ("first-policy", "second-policy", *(["second-critic"] if "critic" in CASES[case] else [])):
        start = load_file(one / f"start-{name.partition('-')[2]}-0.safetensors")
        alone = load_file(one / f"{name}-0.safetensors")
        sharded, same = (load_file(path) for path in sorted(two.glob(f"{name}-?.safetensors")))
        for part, weight in alone.items():
            assert torch.equal(sharded[part], same[part]), part
            moved, apart = (weight - start[part]).norm(), (weight - sharded[part]).norm()
            # What an adapter's first factor moves by in its first step is as small as the rounding of some weights.
            rounding = torch.finfo(weight.dtype).eps * weight.norm()
            assert apart <= 1e-3 * moved + rounding, (name, part)
            if name != "first-policy":  # the first factor of an adapter waits for the second
                assert (moved > 0) == (name == "second-critic" or part in trained), (name, part)


@every_case
def test_vllm_generates_with_the_weights_of_the_step_before(one_and_two: tuple[Path, Path], case: str) -> None:
    for path in sorted((one_and_two[0] / case).glob("vllm-?.*")) + sorted((one_and_two[1] / case).glob("vllm-?.*")):
        policy = merged(load_file(path.with_name(path.name.replace("vllm", "first-policy"))))
        in_vllm = load_file(path)
        assert len(in_vllm) == 15
        for name, weight in in_vllm.items():
            layer = name.split(".")[-2]
            parts = [policy[name.replace(layer, part)] for part in STACKED.get(layer, (layer,))]
            expected = torch.cat(parts)
            # vLLM pads the vocabulary.
            assert torch.allclose(weight[: len(expected)], expected, rtol=1e-5, atol=1e-7), name


def merged(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a policy's weights with their adapters, of rank 4 and alpha 8, added."""
    whole = {name: weight for name, weight in weights.items() if "lora" not in name}
    for name in whole:
        if ".base_layer." in name:
            first, second = (weights[name.replace("base_layer", f"lora_{side}.default")] for side in "AB")
            whole[name] = whole[name] + 2.0 * second @ first
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight for name, weight in whole.items()
    }


@every_case
def test_two_ranks_save_what_one_does(one_and_two: tuple[Path, Path], case: str) -> None:
    one, two = (next((run / case / "saved").glob("*.safetensors")) for run in one_and_two)
    alone, sharded = load_file(one), load_file(two)
    assert alone.keys() == sharded.keys()
    trained = load_file(two.parents[1] / "second-policy-0.safetensors")
    for name, weight in sharded.items():
        whole = trained[name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")]
        assert torch.equal(weight, whole), name
