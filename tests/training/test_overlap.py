"""Rollouts one step ahead: which weights sample which step, what a resumed run trains on, and what fails when.

The policy's server is a fake (`policy_server`).
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from http_servers import free_ports
from jsonl_files import rows_of
from peft import LoraConfig
from policy_server import PolicyServer
from rain import ROWS, RainEngine
from torch.utils.data import BatchSampler
from transformers import PreTrainedTokenizerFast, TrainerCallback

from zerosearch.engines import SearchError, SearchRequest, SearchResult
from zerosearch.errors import UserError
from zerosearch.generation import GenerationError
from zerosearch.rollout.trajectory import Trajectory, Turn
from zerosearch.training import sentinel
from zerosearch.training.overlap import NEXT_STEP
from zerosearch.training.sentinel import train_watched
from zerosearch.training.trainer import SearchTrainer

pytestmark = pytest.mark.slow  # TRL imports vLLM for its server mode
MakeTrainer = Callable[..., SearchTrainer]
ROOT = Path(__file__).parents[2]


class Sent:
    """The account of an engine: what it was sent and not yet asked for."""

    def __init__(self, engine: str) -> None:
        self.engine, self.sent = engine, 0

    def newly_sent(self) -> int:
        sent, self.sent = self.sent, 0
        return sent


class WatchedEngine(RainEngine):
    """Notes for each step how often the server had got weights when it was searched for."""

    def __init__(self, server: PolicyServer, seconds: float = 0.02, **options: Any) -> None:
        super().__init__(**options)
        self.server, self.seconds, self.account = server, seconds, Sent(self.name)
        self.searched: dict[int, set[int]] = {}

    async def search(self, request: SearchRequest) -> SearchResult:
        self.server.turns += 1  # the trajectory is in flight while it waits for its search
        self.account.sent += 1
        self.searched.setdefault(request.key[1], set()).add(self.server.pushes)
        try:
            await asyncio.sleep(self.seconds)
            return await super().search(request)
        finally:
            self.server.turns -= 1


@pytest.fixture
def server(tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[PolicyServer]:
    pytest.importorskip("vllm")
    with PolicyServer(tokenizer=tiny_tokenizer).running() as running:
        yield running


def lora() -> dict[str, Any]:
    return {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}


def overlapped(make_trainer: MakeTrainer, engine: WatchedEngine, **settings: Any) -> SearchTrainer:
    """Return a trainer whose epochs, of twelve questions, have three steps of two micro-batches."""
    arguments = settings.pop("arguments", None)
    where = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": engine.server.url}
    steps = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 5, "overlap_steps": 1}
    return make_trainer(engine, arguments, **{**where, **steps, **settings})


def logged(trainer: SearchTrainer, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if "reward" in entry]


@pytest.mark.parametrize("max_lora_rank", [0, 8])
def test_each_step_but_the_first_is_sampled_with_the_weights_of_the_step_before(
    max_lora_rank: int, server: PolicyServer, make_trainer: MakeTrainer
) -> None:
    server.max_lora_rank = max_lora_rank
    arguments, first = (lora(), 2) if max_lora_rank else ({}, 1)  # an adapter comes after its base
    engine = WatchedEngine(server)
    trainer = overlapped(make_trainer, engine, arguments=arguments, logged_trajectories=16)
    trainer.train()
    expected = {1: {first}, 2: {first}, 3: {first + 1}, 4: {first + 2}, 5: {first + 3}}
    assert engine.searched == expected, "and nothing for a sixth step"
    assert len(server.adapters) == bool(max_lora_rank)
    assert logged(trainer, "sampling/staleness") == [(0,), (1,), (1,), (1,), (1,)]
    assert min(logged(trainer, "sampling/importance_sampling_ratio/max")) > (0.0,)
    output = trainer.args.output_dir
    assert json.loads(Path(output, "engine_queries.json").read_text()) == {"rain": len(engine.requests)}

    one_by_one = overlapped(
        make_trainer,
        WatchedEngine(server),
        arguments=arguments,
        overlap_steps=0,
        logged_trajectories=16,
        output_dir=f"{output}-0",
    )
    one_by_one.train()
    assert "sampling/staleness" not in one_by_one.state.log_history[0]
    steps, others = (
        [(row["step"], row["id"], row["p_noise"]) for row in rows_of(Path(one.args.output_dir, "trajectories.jsonl"))]
        for one in (trainer, one_by_one)
    )
    assert steps == others and len({question for _, question, _ in steps}) == 12, "the same questions, over two epochs"


@pytest.mark.parametrize("step", [1, 3])  # within an epoch; at its end
def test_a_resumed_run_trains_on_what_was_sampled_ahead(
    step: int, server: PolicyServer, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    engine = WatchedEngine(server)
    straight = overlapped(make_trainer, engine, save_strategy="steps", save_steps=1)
    straight.train()
    sent = json.loads((tmp_path / "policy/engine_queries.json").read_text())
    assert sent == {"rain": len(engine.requests)}, "what was sent before a checkpoint is counted once"
    checkpoint = tmp_path / f"policy/checkpoint-{step}"
    assert not (tmp_path / "policy/checkpoint-5" / NEXT_STEP).exists()

    again = WatchedEngine(server)
    resumed = overlapped(make_trainer, again, output_dir=tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert sorted(again.searched) == [*range(step + 2, 6)]
    names = ("step", "loss", "kl", "reward", "sampling/staleness", "search/p_noise")
    assert logged(resumed, *names) == logged(straight, *names)
    pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    with pytest.raises(UserError, match=f"are not those of step {step + 1}: resume with the seed and the dataset"):
        overlapped(make_trainer, again, seed=7).train(resume_from_checkpoint=str(checkpoint))


def test_an_evaluation_has_the_weights_of_now_and_queries_of_its_own(
    server: PolicyServer, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    engine = WatchedEngine(server)
    evaluated = WatchedEngine(server)
    evaluated.account = engine.account  # one service
    held_out = {"eval_dataset": datasets.Dataset.from_list(ROWS[:8]), "eval_engine": evaluated}
    settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
    trainer = overlapped(make_trainer, engine, arguments=held_out, **settings)
    trainer.train()
    assert evaluated.searched == {3: {3}, 5: {5}, 6: {6}}, "after steps 2, 4 and 5"
    assert engine.searched == {1: {1}, 2: {1}, 3: {2}, 4: {3}, 5: {4}}
    assert logged(trainer, "sampling/staleness") == [(0,), (1,), (1,), (1,), (1,)]
    counts = [
        json.loads((tmp_path / "policy" / name).read_text())
        for name in ("engine_queries.json", "evaluation_queries.json")
    ]
    assert counts == [{"rain": len(engine.requests)}, {"rain": len(evaluated.requests)}]


def test_a_rollout_that_fails_fails_the_step_that_would_train_on_it(
    server: PolicyServer, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    server.refused = {2}  # the turns of step 3, while step 2 is trained
    trainer = overlapped(make_trainer, WatchedEngine(server), save_strategy="steps", save_steps=1)
    with pytest.raises(GenerationError, match=r"step 3 could not be rolled out: .* out of memory"):
        trainer.train()
    assert trainer.state.global_step == 2
    checkpoint = tmp_path / "policy/checkpoint-2"
    assert (tmp_path / "policy/checkpoint-1" / NEXT_STEP).exists() and not (checkpoint / NEXT_STEP).exists()

    engine = WatchedEngine(server, fails=lambda request: request.key[1] == 4)
    server.refused, server.pushes = set(), 0
    resumed = overlapped(make_trainer, engine)
    with pytest.raises(SearchError, match="of step 4 lost a search"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed, "sampling/staleness") == [(0,), (1,), (0,)], "step 3 begins anew"
    assert engine.searched == {3: {1}, 4: {1}}
    assert (tmp_path / "policy/checkpoint-3/trainer_state.json").exists()
    assert not (tmp_path / "policy/checkpoint-3" / NEXT_STEP).exists()


@pytest.mark.parametrize(("overlap_steps", "step", "max_lora_rank"), [(0, 2, 0), (1, 3, 0), (1, 3, 8)])
def test_weights_that_the_server_does_not_take_fail_the_step_that_they_would_sample(
    overlap_steps: int, step: int, max_lora_rank: int, server: PolicyServer, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    server.max_lora_rank = max_lora_rank
    arguments, server.takes_pushes = (lora(), 2) if max_lora_rank else ({}, 1)
    trainer = overlapped(make_trainer, WatchedEngine(server), arguments=arguments, overlap_steps=overlap_steps)
    with pytest.raises(GenerationError, match=rf"step {step} could not .* did not take the policy's weights.*no room"):
        trainer.train()
    assert (tmp_path / f"policy/checkpoint-{step - 1}/trainer_state.json").exists()


def test_a_server_that_was_started_again_fails_the_next_step(server: PolicyServer, make_trainer: MakeTrainer) -> None:
    class Restart(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            server.adapters.clear()  # and its base is what it has read

    server.max_lora_rank = 8
    arguments = {**lora(), "callbacks": [Restart()]}
    trainer = overlapped(make_trainer, WatchedEngine(server), arguments=arguments, overlap_steps=0)
    with pytest.raises(GenerationError, match=r"step 2 could not .* did not take the policy.*no such adapter"):
        trainer.train()


@pytest.mark.parametrize(("sync_adapter", "max_lora_rank"), [(False, 8), (None, 0), (None, 1)])
def test_an_adapter_is_merged_for_a_server_that_does_not_load_it(
    sync_adapter: bool | None, max_lora_rank: int, server: PolicyServer, make_trainer: MakeTrainer
) -> None:
    server.max_lora_rank = max_lora_rank
    trainer = overlapped(make_trainer, WatchedEngine(server), arguments=lora(), sync_adapter=sync_adapter)
    assert trainer.generator.adapter is None
    trainer.vllm_generation.sync_weights()
    assert server.pushes == 1 and not server.adapters
    client = trainer.vllm_generation.vllm_client
    client.directory = None  # as with a GPU
    assert client.reads_files(), "on this machine"
    client.base_url = "http://policy.example:8000"
    assert not client.reads_files()


def test_a_server_that_does_not_load_the_adapter_that_is_asked_for_is_refused(
    server: PolicyServer, make_trainer: MakeTrainer
) -> None:
    command = "VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 .* --enable-lora --max-lora-rank 8 "
    with pytest.raises(UserError, match=f"a vLLM server that loads adapters of rank 8; start it with: {command}"):
        overlapped(make_trainer, WatchedEngine(server), arguments=lora(), sync_adapter=True)


def test_a_rollback_goes_to_a_checkpoint_whose_policy_showed_no_sign(
    server: PolicyServer, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signs(log: list[dict[str, float]]) -> list[dict[str, str]]:
        bad = {"kl": "9 (best 0)", "reward": "0 (best 1)"}
        return [bad if one["step"] >= 4 and one["learning_rate"] == 1e-3 else {} for one in log]

    monkeypatch.setattr(sentinel, "signs_of_collapse", signs)
    monkeypatch.setattr(sentinel, "PATIENCE", 1)
    engine = WatchedEngine(server)
    trainer = overlapped(make_trainer, engine, on_collapse="rollback", save_strategy="steps", save_steps=1)
    train_watched(trainer, None)
    # Step 4, sampled ahead, shows what the policy of checkpoint-2 did.
    assert logged(trainer, "step", "learning_rate") == [(1, 1e-3), (2, 5e-4), (3, 5e-4), (4, 5e-4), (5, 5e-4)]
    assert logged(trainer, "sampling/staleness") == [(0,), (1,), (1,), (1,), (1,)]


def test_a_run_that_is_left_begins_nothing_more(server: PolicyServer, make_trainer: MakeTrainer) -> None:
    calls: list[int] = []

    def fail_in_the_second_step(**kwargs: Any) -> list[float]:
        calls.append(len(kwargs["prompts"]))
        if len(calls) == 2:
            raise ZeroDivisionError("a defect")
        return [0.5] * 16

    engine = WatchedEngine(server, seconds=0.5)
    trainer = overlapped(make_trainer, engine, arguments={"reward_funcs": fail_in_the_second_step})
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.rollouts.settle()
    assert trainer.rollouts.ahead is not None and trainer.rollouts.ahead.failure is None
    assert any(one.outcome is None for one in trainer.rollouts.ahead.trajectories), "left where they were"
    trainer._metrics["train"].clear()
    trainer.train()
    assert logged(trainer, "sampling/staleness") == [(0,), (1,), (1,), (1,), (1,)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_knows_its_rows_of_the_next_step(rank: int, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(per_device_train_batch_size=8, gradient_accumulation_steps=2)  # on one rank: 16 a step
    rows = trainer.train_dataset
    for step in range(1, 7):
        sampler = trainer._get_train_sampler()
        sampler.set_epoch(step // 3)
        share = list(BatchSamplerShard(BatchSampler(sampler, 8, drop_last=False), 2, rank))  # as accelerate's loader
        trainer.accelerator = SimpleNamespace(num_processes=2, process_index=rank)
        trainer.state.global_step = step - 1
        expected = share[step % 3 * trainer.args.steps_per_generation]
        assert trainer.rollouts._next_rows() == [rows[index] for index in expected]


SCRIPT = """
import json, os, sys
from pathlib import Path
from peft import LoraConfig
from rain import RainEngine, rain_trainer
from zero3_ranks import shard_small_parameters

policy, output, url, checkpoint = sys.argv[1:]
ranks = int(os.environ.get("WORLD_SIZE", 1))
lora = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}
if output.endswith("lora"):
    shard_small_parameters()
trainer = rain_trainer(
    policy, output, RainEngine(), lora if output.endswith("lora") else None,
    use_vllm=True, vllm_mode="server", vllm_server_base_url=url, overlap_steps=1,
    per_device_train_batch_size=8 // ranks, gradient_accumulation_steps=2, max_steps=4, save_strategy="steps",
    save_steps=2,
)
trainer.train(resume_from_checkpoint=checkpoint or None)
if trainer.accelerator.is_main_process:
    Path(output, "log.json").write_text(json.dumps(trainer.state.log_history))
"""
ZERO3 = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/zero3_cpu.yaml"))


def test_two_ranks_sample_ahead_as_one_does(server: PolicyServer, tiny_policy_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    server.reads_weights = False  # those of two ranks are rounded otherwise
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    ranks = (*ZERO3, "--main_process_port", str(free_ports()))
    logs = []
    runs = (("one", (), ""), ("two", ranks, ""), ("again", ranks, "two/checkpoint-2"), ("lora", ranks, ""))
    for name, launcher, resumed in runs:
        server.pushes = 2 if resumed else 0
        if name == "lora":
            server.pushes, server.max_lora_rank = -1, 8  # its base comes first
        command = [*launcher, script, tiny_policy_dir, tmp_path / name, server.url, resumed and tmp_path / resumed]
        done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        log = json.loads((tmp_path / name / "log.json").read_text())
        logs.append([(one["step"], one["reward"], one["sampling/staleness"]) for one in log if "reward" in one])
        sent = json.loads((tmp_path / name / "engine_queries.json").read_text())["rain"]
        assert resumed or sent == 2 * sum(16 * one["search/searches"] for one in log if "reward" in one)
    assert logs[0] == logs[1] == logs[2] == logs[3]
    assert server.pushes == 4 and len(server.adapters) == 1
    assert [staleness for *_, staleness in logs[0]] == [0, 1, 1, 1]
    kept = [rows_of(tmp_path / name / "checkpoint-2" / NEXT_STEP) for name in ("one", "two")]
    assert [[one["key"], one["trajectory"]["completion_ids"]] for one in kept[0]] == [
        [one["key"], one["trajectory"]["completion_ids"]] for one in kept[1]
    ]


def test_a_streamed_dataset_is_refused(server: PolicyServer, make_trainer: MakeTrainer) -> None:
    streamed = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(UserError, match="asks the dataset for rows ahead"):
        overlapped(make_trainer, WatchedEngine(server), arguments={"train_dataset": streamed})


def test_a_trajectory_comes_back_from_json(tmp_path: Path) -> None:
    turn = Turn("a", "search", "b", 1, documents=("c", "d"), noisy=True, latency_s=0.1)
    lookup = Turn("", "search", "q", 0, documents=("e",))
    whole = Trajectory([1], 0.5, [2], [1], [-1 / 3], [turn], "x", "answered", "", lookup, 3)
    for one in (whole, Trajectory([1], 0.0)):
        assert Trajectory.from_dict(json.loads(json.dumps(asdict(one)))) == one
