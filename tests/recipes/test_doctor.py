"""The doctor of a run: what fits and what does not, one suggestion each, and memory as it is then measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jsonl_files import write_rows
from recipe_modules import Refusal, as_flags, load_recipe
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from zerosearch.errors import UserError
from zerosearch.training.memory import GIB

QUESTIONS = [{"id": str(n), "question": f"Who wrote {n}?", "golden_answers": [f"gold {n}"]} for n in range(12)]
WIDE = {"per_device_train_batch_size": 48, "gradient_accumulation_steps": 1}
ROOT = Path(__file__).parents[2]
LAUNCHES = ROOT / "recipes/accelerate"


@pytest.fixture
def settings(tiny_policy_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": tiny_policy_dir,
        "dataset": write_rows(tmp_path / "qa.jsonl", QUESTIONS),
        "engine": "bm25",
        "output_dir": tmp_path / "policy",
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_steps": 10,
        "max_turn_tokens": 24,
        "max_observation_tokens": 64,
        "max_trajectory_tokens": 1536,
    }


def examined(settings: dict[str, Any], capsys: pytest.CaptureFixture[str], *, fits: bool = True) -> str:
    """Return what the doctor prints."""
    if fits:
        load_recipe("doctor").main(as_flags(settings))
    else:
        with pytest.raises(SystemExit) as caught:
            load_recipe("doctor").main(as_flags(settings))
        assert caught.value.code == 1
    return capsys.readouterr().out


def test_a_run_that_fits(settings: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    printed = examined(settings, capsys)
    rows = {row[0]: row[1] for line in printed.splitlines() if len(row := re.split(r" {2,}", line, maxsplit=1)) == 2}
    assert rows["trajectories a step"] == "8 x 2 x 1 = 16"
    assert rows["questions a step, steps, epochs"] == "4, 10, 3.33"
    assert rows["searches, at most"] == "320 by bm25"
    assert rows["the same at Google"] == "2.93 USD"
    assert rows["questions cut before an answer"] == "0 of 12, with full turns"
    assert rows["end of a sequence"] == "<|endoftext|>"
    assert printed.endswith("verdict: fits\n")
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize(
    ("changes", "problem", "suggestion"),
    [
        ({"max_trajectory_tokens": 500}, "12 questions leave no room for a search and an answer", "max_trajectory_"),
        ({"gradient_accumulation_steps": 8}, "a step takes 16 questions, and there are 12", "accumulation_steps 6"),
        (
            {"gpu_memory_gb": 1.62, "gradient_checkpointing": False, **WIDE},
            "memory: ",
            "--gradient_checkpointing true",
        ),
        ({"gpu_memory_gb": 1}, "memory: ", "more devices"),
        (
            {"gpu_memory_gb": 40, "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.05},
            "vLLM's share of the device has no room",
            "--vllm_gpu_memory_utilization 0.10",
        ),
    ],
)
def test_what_does_not_fit_comes_with_a_suggestion(
    changes: dict[str, Any],
    problem: str,
    suggestion: str,
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = examined(settings | changes, capsys, fits=False)
    (found,) = [line for line in printed.splitlines() if line.startswith(f"- {problem}")]
    assert suggestion in found.partition("Suggestion: ")[2]


def test_devices_come_from_the_launch_configuration(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"launch": LAUNCHES / "zero3.yaml", "gpu_memory_gb": 80, "gradient_accumulation_steps": 1}
    printed = examined(settings, capsys)
    assert "8 x 1 x 4 = 32" in printed and "memory on each of 4 device(s)" in printed


@pytest.fixture
def one_gpu(settings: dict[str, Any], tiny_policy_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of Qwen2.5-3B's runs on one GPU, by its shape alone and on small data."""
    shape = {"hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "vocab_size": 151_936}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True}
    Qwen2Config(**shape, **heads, max_position_embeddings=32_768, dtype="bfloat16").save_pretrained(tmp_path / "qwen")
    AutoTokenizer.from_pretrained(tiny_policy_dir).save_pretrained(tmp_path / "qwen")  # its prompts are longer
    own = {"model_name_or_path": tmp_path / "qwen", "dataset": settings["dataset"], "dataset_limit": 12}
    return {"config": ROOT / "recipes/configs/qwen2.5-3b-one-gpu.yaml", "gradient_accumulation_steps": 15, **own}


def test_qwen_3b_trains_by_lora_on_one_gpu_of_24_gb_with_the_simulator_in_its_engine(
    one_gpu: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    one_gpu |= {"config": ROOT / "recipes/configs/qwen2.5-3b-one-gpu-lora.yaml", "gpu_memory_gb": 24}
    printed = examined(one_gpu, capsys)
    assert printed.endswith("verdict: fits\n") and "by simulated, in the policy's engine\n" in printed
    assert re.search(r"vLLM's base in the host's memory, asleep +5\.86\n", printed)
    apart = one_gpu | {"simulator": "served", "others_gb": 8}
    assert "memory: 27." in examined(apart, capsys, fits=False)


def test_qwen_3b_trains_on_one_gpu_of_80_gb_beside_a_simulator_but_not_with_a_reference_model(
    one_gpu: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    one_gpu |= {"gradient_accumulation_steps": 30, "gpu_memory_gb": 80, "others_gb": 10}
    assert examined(one_gpu, capsys).endswith("verdict: fits\n")
    assert "verdict: fits closely" in examined(one_gpu | {"beta": 0.001}, capsys)
    assert "memory: " in examined(one_gpu | {"gpu_memory_gb": 24}, capsys, fits=False)


def test_a_template_that_ends_turns_with_a_token_that_ends_nothing_is_told(
    settings: dict[str, Any], tiny_policy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "ends a turn with <|im_end|>, which ends no sequence" in examined(settings, capsys)
    LlamaForCausalLM.from_pretrained(tiny_policy_dir).save_pretrained(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_dir)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "chat")
    printed = examined(settings | {"model_name_or_path": tmp_path / "chat"}, capsys)
    assert "ends a turn with <|im_end|>\n" in printed and "end of a sequence" in printed


def test_flags_are_those_of_the_recipe_and_a_mistake_gets_one_sentence(
    refusal: Refusal, settings: dict[str, Any], tmp_path: Path
) -> None:
    assert "unknown flag --max_turn" in refusal("doctor", ["--dataset", "x", "--max_turn", "3"])
    assert "is no launch configuration" in refusal("doctor", ["--dataset", "x", "--launch", "nowhere.yaml"])
    (tmp_path / "empty.yaml").touch()
    launch = str(tmp_path / "empty.yaml")
    assert "empty.yaml is no launch configuration" in refusal("doctor", ["--dataset", "x", "--launch", launch])
    Path(launch).write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 0\n")
    assert "num_processes: 0; it must say how many" in refusal("doctor", ["--dataset", "x", "--launch", launch])
    merged = {"gpu_memory_gb": 80, "use_vllm": True, "sync_adapter": True}  # the whole policy, no adapter
    assert "sync_adapter true needs a LoRA adapter" in refusal("doctor", as_flags(settings | merged))


def test_the_probe_gets_the_flags_of_the_recipe_alone() -> None:
    flags = ["--gpu_memory_gb", "80", "--config", "x.yaml", "--probe=true", "--max_turns", "3"]
    without_own = load_recipe("doctor").without_own
    assert without_own(flags) == ["--config", "x.yaml", "--max_turns", "3"]
    assert without_own(["--probe", "--config", "x.yaml", "--probe"]) == ["--config", "x.yaml"]


def test_a_probe_that_is_killed_for_its_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    doctor = load_recipe("doctor")
    killed = subprocess.CompletedProcess([], returncode=-9, stdout="", stderr="")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: killed)
    with pytest.raises(UserError, match="the probe failed with exit status -9"):
        doctor.probed(SimpleNamespace(launch=None, eval_strategy="no"), [])


def measured(settings: dict[str, Any]) -> tuple[float, float, float]:
    """Return what the doctor says that a run holds of its own, its libraries, and the largest process, in GiB.

    Of its own: without the fragments of glibc's heap, which are not to be relied on; with this threshold there are
    none. The process is the doctor's own, and what this one has held must not count as the libraries'.
    """
    assert len(b"a" * 2 * GIB) == 2 * GIB
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "recipes/doctor.py", *as_flags(settings | {"probe": True})]
    printed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout

    def first_number(name: str) -> float:
        return float(re.findall(rf"^{name}.*?  +([\d.]+)", printed, re.MULTILINE)[0])

    libraries = first_number("Python and its libraries")
    held = first_number("sum, and what") - libraries - first_number("fragments of the heap")
    return held, libraries, first_number("largest process, GiB")


@pytest.mark.slow
def test_predicted_memory_is_near_what_a_run_holds(
    settings: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerFast, corpus: Path, tmp_path: Path
) -> None:
    """Compare what a run holds more than one of a small policy; a tiny one's process is smaller than the doctor's own,
    which Linux counts for the process that it starts.
    """
    for name, size, layers in (("small", 128, 2), ("random", 512, 8)):
        config = LlamaConfig(
            vocab_size=16_384,
            hidden_size=size,
            intermediate_size=3 * size,
            num_hidden_layers=layers,
            num_attention_heads=size // 64,
            eos_token_id=tiny_tokenizer.eos_token_id,
            pad_token_id=tiny_tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    settings |= {"dtype": "float32", "corpus": corpus, "gradient_checkpointing": False, "num_generations": 2}
    settings |= {"per_device_train_batch_size": 2, "max_turns": 1}
    settings |= {"max_observation_tokens": 160}  # as long as the hint that they get
    small, libraries, small_used = measured(settings | {"model_name_or_path": tmp_path / "small"})
    assert libraries < 1.5
    for adapter in ({}, {"use_peft": True, "lora_target_modules": "all-linear"}):
        predicted, _, used = measured(settings | {"model_name_or_path": tmp_path / "random", **adapter})
        assert predicted - small == pytest.approx(used - small_used, rel=0.15)
