"""Two ranks under DeepSpeed ZeRO-3: policy, reference and critic sharded, the same updates as one process makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_modules import run_python
from safetensors.torch import load_file

ZERO3 = ("-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/zero3_cpu.yaml")
ZERO3 = (*ZERO3, "--main_process_port", "29517")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "DS_ACCELERATOR": "cpu"}
pytestmark = pytest.mark.slow


# What `zero3_ranks.py` runs on one process and, under ZeRO-3, on two, with a vLLM engine in each; and what is sharded.
CASES = {
    "grpo": {"policy", "reference"},
    "gathered": {"policy", "reference"},
    "ppo": {"policy", "reference", "critic"},
    "lora": {"policy", "critic"},
    "qlora": {"policy"},
}
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # by vLLM
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def one_and_two(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return what all cases led to on one process, and what on two ranks."""
    pytest.importorskip("vllm")
    pytest.importorskip("deepspeed")
    output = tmp_path_factory.mktemp("zero3-ranks")
    for name, launcher in (("one", ()), ("two", ZERO3)):
        run_python(*launcher, "tests/zero3_ranks.py", tiny_policy_dir, output / name, *CASES, **ENVIRONMENT)
    return output / "one", output / "two"


def records(folder: Path) -> list[dict[str, Any]]:
    """Return what each rank of a run wrote down."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("?.json"))]


@every_case
def test_every_model_is_sharded_beside_a_vllm_on_each_rank(one_and_two: tuple[Path, Path], case: str) -> None:
    ranks = records(one_and_two[1] / case)
    generator = "TransformersGenerator" if case == "gathered" else "VLLMGenerator"
    assert [rank["generator"] for rank in ranks] == [generator] * 2
    for held in (held for rank in ranks for held in rank["held"]):
        assert held.keys() == CASES[case]
        for name, elements in held.items():
            assert elements["whole"] == 0, name
            assert elements["share"] == pytest.approx(elements["all"] / 2, rel=1e-3), name


@every_case
def test_weights_are_pushed_once_a_step(one_and_two: tuple[Path, Path], case: str) -> None:
    pushes = 0 if case == "gathered" else 2
    assert [rank["pushes"] for run in one_and_two for rank in records(run / case)] == [pushes] * 3


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
        if case != "gathered":
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


@pytest.mark.parametrize("case", [case for case in CASES if case != "gathered"])
def test_vllm_generates_with_the_weights_of_the_step_before(one_and_two: tuple[Path, Path], case: str) -> None:
    paths = [path for run in one_and_two for path in sorted((run / case).glob("vllm-?.*"))]
    assert len(paths) == 3
    for path in paths:
        saved = load_file(path.with_name(path.name.replace("vllm", "first-policy")))
        policy = merged(saved, 0.0 if case == "lora" else 2.0)  # the engine holds that adapter apart
        in_vllm = load_file(path)
        assert len(in_vllm) == 15
        for name, weight in in_vllm.items():
            layer = name.split(".")[-2]
            parts = [policy[name.replace(layer, part)] for part in STACKED.get(layer, (layer,))]
            expected = torch.cat(parts)
            # vLLM pads the vocabulary.
            assert torch.allclose(weight[: len(expected)], expected, rtol=1e-5, atol=1e-7), name


def merged(weights: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Return a policy's weights with their adapters added; of rank 4 and alpha 8, their scale is 2."""
    whole = {name: weight for name, weight in weights.items() if "lora" not in name}
    for name in whole:
        if ".base_layer." in name:
            first, second = (weights[name.replace("base_layer", f"lora_{side}.default")] for side in "AB")
            whole[name] = whole[name] + scale * second @ first
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


@every_case
def test_a_sharded_run_resumes_as_if_it_had_gone_on(one_and_two: tuple[Path, Path], case: str) -> None:
    paths = sorted((one_and_two[1] / case).glob("resumed-*.safetensors"))
    assert len(paths) == (4 if "critic" in CASES[case] else 2)
    for path in paths:
        straight, resumed = load_file(path.with_name(path.name.replace("resumed", "second"))), load_file(path)
        for name, weight in straight.items():  # vLLM's log-probabilities vary with its batches in their last bits
            torch.testing.assert_close(resumed[name], weight, rtol=2e-7, atol=1e-7)


def test_each_rank_saves_its_half_of_the_critic(one_and_two: tuple[Path, Path]) -> None:
    weights = load_file(one_and_two[1] / "ppo/second-critic-0.safetensors")
    size = sum(weight.numel() for weight in weights.values())
    found = sorted((one_and_two[1] / "ppo/checkpoint-1/critic").glob("*/*optim_states.pt"))
    assert len(found) == 2
    for path in found:
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]
        share = sum(group.numel() for group in state["fp32_flat_groups"])
        assert size / 2 <= share < 0.55 * size
