"""Masks, advantages and keys as they reach TRL's loss; the log; and that TRL is still the TRL this was built on."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import trl
from peft import LoraConfig
from rain import ROWS, RainEngine, rain_trainer
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

from zerosearch.checkpoints import checkpoint_to_resume
from zerosearch.engines import SearchError
from zerosearch.errors import UserError
from zerosearch.noise import NoiseSchedule
from zerosearch.prompts import PAPER
from zerosearch.training.micro_batches import sort_micro_batches
from zerosearch.training.rewards import f1_reward
from zerosearch.training.trainer import SearchConfig, SearchTrainer, row_number

ALGORITHMS = ("reinforce", "rloo", "grpo", "ppo")


@pytest.fixture
def make_trainer(tiny_policy_dir: Path, tmp_path: Path) -> Callable[..., SearchTrainer]:
    def make(
        engine: RainEngine | None = None, arguments: dict[str, Any] | None = None, **settings: Any
    ) -> SearchTrainer:
        output_dir = Path(settings.pop("output_dir", tmp_path / "policy"))
        settings = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, **settings}
        return rain_trainer(tiny_policy_dir, output_dir, engine or RainEngine(), arguments, **settings)

    return make


def one_batch(trainer: SearchTrainer, num_rows: int = 8) -> dict[str, Any]:
    """Roll out and score the first rows, `num_generations` times each, as a training step does."""
    trainer.model.train()
    trainer.state.max_steps = 2
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    group = trainer.args.num_generations
    rows = [dict(ROWS[place // group]) for place in range(num_rows)]
    trainer._first_rows = rows
    return trainer._generate_and_score_completions(rows)


def loss_gradient(trainer: SearchTrainer, batch: dict[str, Any], logps: torch.Tensor) -> torch.Tensor:
    """Return the gradient (B, T) of TRL's loss with respect to given policy log-probabilities (B, T)."""
    logps = logps.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logps, torch.zeros_like(logps), None)
    trainer._compute_loss(trainer.model, batch).backward()
    return logps.grad


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_loss_has_no_gradient_at_what_the_environment_wrote(
    algorithm: str, make_trainer: Callable[..., SearchTrainer]
) -> None:
    trainer = make_trainer(algorithm=algorithm, beta=0.1)
    batch = one_batch(trainer)
    batch["advantages"] = torch.ones(8)
    own = batch["tool_mask"].bool() & batch["completion_mask"].bool()
    assert (batch["completion_mask"].bool() & ~own).sum() > 0, "there are observations in the batch"
    gradient = loss_gradient(trainer, batch, torch.full(own.shape, -1.0))
    assert (gradient[own] != 0).all()
    assert (gradient[~own] == 0).all()


def test_without_masking_observations_are_learned_too(make_trainer: Callable[..., SearchTrainer]) -> None:
    trainer = make_trainer(mask_observations=False, beta=0.1)
    batch = one_batch(trainer)
    batch["advantages"] = torch.ones(8)
    filled = batch["completion_mask"].bool()
    gradient = loss_gradient(trainer, batch, torch.full(filled.shape, -1.0))
    assert (gradient[filled] != 0).all()
    assert (gradient[~filled] == 0).all()


def test_the_kl_term_pulls_towards_the_reference(make_trainer: Callable[..., SearchTrainer]) -> None:
    trainer = make_trainer(beta=0.1)
    batch = one_batch(trainer)
    batch["advantages"] = torch.zeros(8)
    own = batch["tool_mask"].bool() & batch["completion_mask"].bool()
    reference = batch["ref_per_token_logps"]
    below = loss_gradient(trainer, batch, reference - 0.5)
    above = loss_gradient(trainer, batch, reference + 0.5)
    at = loss_gradient(trainer, batch, reference)
    # Descent goes against the gradient: up where the policy is below the reference, down where it is above.
    assert (below[own] < 0).all() and (above[own] > 0).all() and (at[own] == 0).all()
    # k3: the derivative of beta (e^d - d - 1), d = reference - policy, over the number of tokens; Section 6f's sign.
    torch.testing.assert_close(
        below[own] * own.sum(), torch.full((int(own.sum()),), 0.1 * (1 - 1.6487)), rtol=1e-3, atol=0
    )


def test_the_loss_on_a_masked_batch_is_stock_trls(
    make_trainer: Callable[..., SearchTrainer], tiny_policy_dir: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(algorithm="grpo", beta=0.1, entropy_coef=0.01)
    batch = one_batch(trainer)
    batch["advantages"] = torch.linspace(-1, 1, 8)
    config = GRPOConfig(
        output_dir=str(tmp_path / "stock"),
        beta=0.1,
        entropy_coef=0.01,
        use_bias_correction_kl=False,
        num_generations=4,
        per_device_train_batch_size=8,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    questions = datasets.Dataset.from_list(ROWS)
    stock = GRPOTrainer(model=str(tiny_policy_dir), reward_funcs=f1_reward, args=config, train_dataset=questions)
    stock.model.train()
    stock.current_gradient_accumulation_steps = 1
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from the reference
        for ours, theirs in zip(trainer.model.parameters(), stock.model.parameters(), strict=True):
            ours += 0.02 * torch.randn(ours.shape, generator=generator)
            theirs.copy_(ours)
    losses = [one._compute_loss(one.model, batch) for one in (trainer, stock)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert trainer._metrics["train"]["kl"] == pytest.approx(stock._metrics["train"]["kl"], rel=1e-4)
    assert stock._metrics["train"]["kl"][-1] > 0.01
    for ours, theirs in zip(trainer.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_reinforce_weights_each_policy_token_by_the_raw_return(make_trainer: Callable[..., SearchTrainer]) -> None:
    trainer = make_trainer(algorithm="reinforce", beta=0.0, max_turns=4, per_device_train_batch_size=32)
    batch = one_batch(trainer, num_rows=32)
    answers = [row["answer"] for row in trainer._first_rows]
    expected = [f1_reward([answer], [ROWS[0]["golden_answers"]], ["answered"])[0] for answer in answers]
    assert batch["advantages"].tolist() == pytest.approx(expected)
    assert sum(expected) > 0, "some trajectory of the tiny policy is rewarded"
    own = batch["tool_mask"].bool() & batch["completion_mask"].bool()
    gradient = loss_gradient(trainer, batch, torch.full(own.shape, -1.0))
    torch.testing.assert_close(gradient, -(batch["advantages"][:, None] * own) / own.sum())
    assert list(trainer._logs["advantages"]) == pytest.approx(expected), "TRL's table shows them, too"


def test_an_advantage_function_sees_rewards_trajectories_and_group(make_trainer: Callable[..., SearchTrainer]) -> None:
    seen: list[Any] = []

    def advantages(rewards: torch.Tensor, trajectories: list[Any], group: int) -> torch.Tensor:
        seen.extend([rewards, trajectories, group])
        return torch.arange(8.0)

    batch = one_batch(make_trainer(arguments={"advantages": advantages}))
    assert batch["advantages"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    rewards, trajectories, group = seen
    assert (rewards.shape, len(trajectories), group) == ((8,), 8, 4)
    assert all(trajectory.turns and trajectory.outcome for trajectory in trajectories)


def test_an_advantage_a_turn_holds_for_the_tokens_of_the_turn(make_trainer: Callable[..., SearchTrainer]) -> None:
    kept: list[Any] = []

    def by_turn(rewards: torch.Tensor, trajectories: list[Any], group: int) -> list[list[float]]:
        kept.extend(trajectories)
        return [[1.0 + turn for turn in range(len(trajectory.turns))] for trajectory in trajectories]

    batch = one_batch(make_trainer(arguments={"advantages": by_turn}))
    assert batch["advantages"].shape == batch["completion_ids"].shape
    assert max(len(trajectory.turns) for trajectory in kept) > 1
    for row, trajectory in enumerate(kept):
        expected: list[float] = []
        for number, turn in enumerate(trajectory.turns, start=1):
            expected += [float(number)] * turn.num_tokens + [0.0] * turn.num_observation_tokens
        assert batch["advantages"][row, : len(expected)].tolist() == expected
        assert batch["advantages"][row, len(expected) :].abs().sum() == 0


def test_a_step_with_advantages_a_token_learns(make_trainer: Callable[..., SearchTrainer]) -> None:
    def by_token(rewards: torch.Tensor, trajectories: list[Any], group: int) -> list[list[float]]:
        return [[0.5] * len(trajectory.completion_ids) for trajectory in trajectories]

    trainer = make_trainer(arguments={"advantages": by_token}, max_steps=1)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))


def test_wrong_advantages_and_noise_are_refused(make_trainer: Callable[..., SearchTrainer]) -> None:
    with pytest.raises(UserError, match=r"returned 3 rows, and there are 8 trajectories"):
        one_batch(make_trainer(arguments={"advantages": lambda *_: [1.0] * 3}))
    with pytest.raises(UserError, match=r"returned 9999 numbers for a trajectory of \d+ turns and \d+ tokens"):
        one_batch(make_trainer(arguments={"advantages": lambda *_: [[1.0] * 9999] * 8}))
    with pytest.raises(UserError, match=r"the noise function returned 1\.5 at step 1"):
        one_batch(make_trainer(arguments={"noise": lambda *_: 1.5}))
    with pytest.raises(UserError, match="ppo has the advantages of its critic"):
        make_trainer(algorithm="ppo", arguments={"advantages": lambda *_: [1.0] * 8})


def test_noise_is_a_function_of_step_steps_and_log(make_trainer: Callable[..., SearchTrainer]) -> None:
    calls: list[tuple[int, int, int]] = []

    def noise(step: int, total: int, history: Any) -> float:
        calls.append((step, total, len(history)))
        return 0.25 * step

    engine = RainEngine()
    make_trainer(engine, arguments={"noise": noise}).train()
    assert {(1, 2, 0), (2, 2, 1)} == set(calls), "the log of the first step is there in the second"
    assert {request.p_noise for request in engine.requests} == {0.25, 0.5}


def test_rewards_receive_the_trajectories(make_trainer: Callable[..., SearchTrainer], tiny_policy_dir: Path) -> None:
    def fewer_searches(answer: list[Any], trajectories: list[Any], **kwargs: Any) -> list[float]:
        assert all(own.answer == text for own, text in zip(trajectories, answer, strict=True))
        documents = {document for own in trajectories for turn in own.turns for document in turn.documents}
        assert documents == {"It rains.", "Emma rain."}
        return [-float(own.searches) for own in trajectories]

    trainer = make_trainer()
    trainer.reward_funcs = [fewer_searches]
    batch = one_batch(trainer)
    assert sorted(set(batch["advantages"].tolist()))[0] < 0


def test_the_agent_says_how_the_policy_is_asked_and_documents_are_shown(
    make_trainer: Callable[..., SearchTrainer],
) -> None:
    agent = replace(
        PAPER.policy, template="Q: {question}", write_observation=lambda documents: f"[{len(documents)} documents]"
    )
    bare = datasets.Dataset.from_list([{name: row[name] for name in row if name != "prompt"} for row in ROWS])
    trainer = make_trainer(arguments={"agent": agent, "train_dataset": bare})
    assert trainer.train_dataset[0]["prompt"] == [{"role": "user", "content": "Q: Who wrote 0?"}]
    batch = one_batch(trainer)
    texts = trainer._tokenizer.batch_decode(batch["completion_ids"])
    assert any("[2 documents]" in text for text in texts) and not any("<information>" in text for text in texts)


def test_the_order_of_an_epoch_comes_from_seed_and_epoch_alone(make_trainer: Callable[..., SearchTrainer]) -> None:
    sampler = make_trainer()._get_train_sampler()
    orders = []
    for epoch in (0, 1, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[3] != orders[1] == orders[2]


def test_a_finished_run_that_is_resumed_trains_no_step_more(
    make_trainer: Callable[..., SearchTrainer], tmp_path: Path
) -> None:
    make_trainer(save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "policy/checkpoint-2"
    engine = RainEngine()
    resumed = make_trainer(engine, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert (resumed.state.global_step, engine.requests) == (2, [])
    saved = load_file(checkpoint / "model.safetensors")
    state = resumed.model.state_dict()
    assert all(torch.equal(saved[name], state[name]) for name in saved)


def test_any_exception_of_a_rollout_leaves_a_checkpoint(
    make_trainer: Callable[..., SearchTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(max_steps=3)
    original, calls = SearchTrainer._keys, []

    def fail_in_the_second_step(self: SearchTrainer, rows: Any) -> Any:
        calls.append(rows)
        if len(calls) == 2:
            raise ZeroDivisionError("a defect")
        return original(self, rows)

    monkeypatch.setattr(SearchTrainer, "_keys", fail_in_the_second_step)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        trainer.train()
    assert checkpoint_to_resume("true", str(tmp_path / "policy")) == str(tmp_path / "policy/checkpoint-1")


def test_grpo_is_what_trl_computes(
    make_trainer: Callable[..., SearchTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(algorithm="grpo", max_turns=4, per_device_train_batch_size=32)
    theirs = {}
    stock = GRPOTrainer._generate_and_score_completions

    def spy(self: GRPOTrainer, inputs: Any) -> Any:
        batch = stock(self, inputs)
        theirs["advantages"] = batch["advantages"].clone()
        return batch

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", spy)
    batch = one_batch(trainer, num_rows=32)
    assert batch["advantages"].abs().sum() > 0
    torch.testing.assert_close(batch["advantages"], theirs["advantages"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_failed_search_is_counted_and_teaches_nothing(
    algorithm: str, make_trainer: Callable[..., SearchTrainer]
) -> None:
    engine = RainEngine(fails=lambda request: request.key[3] == 1)  # the second trajectory of each group
    trainer = make_trainer(engine, algorithm=algorithm, max_failed_search_share=1.0)
    batch = one_batch(trainer)
    outcomes = [row["outcome"] for row in trainer._first_rows]
    failed = torch.tensor([outcome == "failed_search" for outcome in outcomes])
    assert 0 < failed.sum() <= 2
    assert (batch["tool_mask"][failed] * batch["completion_mask"][failed]).sum() == 0
    assert (batch["advantages"][failed] == 0).all()
    assert trainer._metrics["train"]["search/failed_search"] == [failed.sum().item() / 8]
    rewards = torch.tensor(
        [f1_reward([r["answer"]], [r["golden_answers"]], [r["outcome"]])[0] or 0.0 for r in trainer._first_rows]
    )
    assert trainer._metrics["train"]["reward"] == [pytest.approx(rewards[~failed].mean().item())]


def test_too_many_failed_searches_stop_the_run_and_name_the_engine(make_trainer: Callable[..., SearchTrainer]) -> None:
    engine = RainEngine(fails=lambda request: request.key[1] == 2)  # from step 2 on
    trainer = make_trainer(engine, max_steps=4)
    with pytest.raises(
        SearchError, match=r"of step 2 lost a search.*\(10%\) allows: the engine rain at http://rain is gone"
    ):
        trainer.train()
    assert (Path(trainer.args.output_dir) / "checkpoint-1" / "trainer_state.json").exists()


def test_training_logs_and_writes_what_the_report_reads(make_trainer: Callable[..., SearchTrainer]) -> None:
    engine = RainEngine()
    trainer = make_trainer(engine, gradient_accumulation_steps=2, logged_trajectories=3, noise_end=0.4)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))
    first, second, _ = trainer.state.log_history
    searching = "searches turns policy_tokens observation_tokens invalid_actions answered turns_exhausted truncated"
    searching += " failed_search p_noise noisy_share retries latency_median_s latency_p95_s"
    times = "rollout_s generating_s waiting_s idle_s step_s"
    names = [f"search/{name}" for name in searching.split()] + [f"time/{name}" for name in times.split()]
    for name in [*names, "reward", "kl", "loss", "entropy", "rewards/f1_reward/mean"]:
        assert isinstance(first[name], float | int), name
    schedule = NoiseSchedule(0.0, 0.4)
    assert [first["search/p_noise"], second["search/p_noise"]] == [schedule.p_noise(step, 2) for step in (1, 2)]
    assert first["search/answered"] + first["search/turns_exhausted"] + first["search/truncated"] == pytest.approx(1)
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-6
    assert first["time/rollout_s"] < first["time/step_s"]
    output = Path(trainer.args.output_dir)
    records = [json.loads(line) for line in (output / "trajectories.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 1, 1, 2, 2, 2]
    assert len({record["id"] for record in records[:3]}) > 1, "spread over the questions of the step"
    assert "<|im_start|>user\nWho wrote" in records[0]["segments"][0]["text"]
    sent = 2 * len(engine.requests)  # each reply says that it took one retry
    assert json.loads((output / "engine_queries.json").read_text()) == {"rain": sent}
    assert {request.key[:2] for request in engine.requests} == {(42, 1), (42, 2)}


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(
    algorithm: str, make_trainer: Callable[..., SearchTrainer], tmp_path: Path
) -> None:
    def weights_after(output: str, **settings: Any) -> tuple[list[torch.Tensor], list[Any]]:
        settings = {"output_dir": str(tmp_path / output), "max_steps": 3, "save_strategy": "steps", **settings}
        trainer = make_trainer(algorithm=algorithm, critic_learning_rate=1e-3, **settings)
        trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
        log = [(entry["step"], entry["loss"], entry["kl"]) for entry in trainer.state.log_history if "loss" in entry]
        critic = [] if trainer.critic is None else [*trainer.critic.model.parameters()]
        return [*trainer.model.parameters(), *critic], log

    # Within an epoch, of which the twelve questions make six steps.
    straight, straight_log = weights_after("straight", save_steps=1)
    checkpoint = str(tmp_path / "straight" / "checkpoint-1")
    resumed, resumed_log = weights_after("resumed", resume_from_checkpoint=checkpoint)
    assert resumed_log == straight_log
    assert all(torch.equal(one, other) for one, other in zip(straight, resumed, strict=True))


def test_ppo_does_not_resume_without_its_critic(make_trainer: Callable[..., SearchTrainer], tmp_path: Path) -> None:
    make_trainer(save_strategy="steps", save_steps=1, max_steps=1).train()
    with pytest.raises(UserError, match="checkpoint-1 holds no critic: it is no checkpoint of algorithm ppo"):
        make_trainer(algorithm="ppo").train(resume_from_checkpoint=str(tmp_path / "policy" / "checkpoint-1"))


def test_keys_do_not_depend_on_the_number_of_ranks(make_trainer: Callable[..., SearchTrainer]) -> None:
    trainer = make_trainer()
    trainer.model.train()
    rows = [ROWS[place // 4] for place in range(8)]
    whole = trainer._keys(rows)
    assert whole == [(42, 1, row_number(rows[place]), place % 4) for place in range(8)]

    def on_rank(rank: int, share: list[dict[str, Any]]) -> list[tuple[int, ...]]:
        trainer.accelerator = SimpleNamespace(process_index=rank)
        return trainer._keys(share)

    assert [key for rank in range(4) for key in on_rank(rank, rows[2 * rank : 2 * rank + 2])] == whole
    assert len({row_number(row) for row in ROWS}) == len(ROWS)


def test_trimming_changes_no_log_probability(make_trainer: Callable[..., SearchTrainer]) -> None:
    trainer = make_trainer(RainEngine(fails=lambda request: request.key[3] == 1), max_failed_search_share=1.0)
    batch = one_batch(trainer)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    assert len(set(mask.sum(1).tolist())) > 3, "rows of several lengths"
    arguments = (trainer.model, ids, mask, batch["completion_ids"].shape[1])
    own = (batch["completion_mask"] * batch["tool_mask"]).bool()
    assert not own.any(1).all(), "a row without a token to learn from"
    with torch.no_grad():
        theirs = GRPOTrainer._get_per_token_logps_and_entropies(trainer, *arguments, compute_entropy=True)
        for batch_size in (None, 3, 1):
            ours = trainer._get_per_token_logps_and_entropies(*arguments, batch_size=batch_size, compute_entropy=True)
            for our, their in zip(ours[:2], theirs[:2], strict=True):
                assert our.shape == their.shape
                torch.testing.assert_close(our[own], their[own], rtol=1e-4, atol=1e-5)
                assert (our[~own] == 0).all()


def test_the_head_projects_policy_tokens_only(
    make_trainer: Callable[..., SearchTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(beta=0.1)
    projected = []
    stock = trl.trainer.utils._ChunkedLogProbFunction.apply

    def spy(hidden_states: torch.Tensor, *rest: Any) -> Any:
        projected.append(len(hidden_states))
        return stock(hidden_states, *rest)

    monkeypatch.setattr(trl.trainer.utils._ChunkedLogProbFunction, "apply", spy)
    batch = one_batch(trainer)
    trainer._compute_loss(trainer.model, batch)
    tokens = int((batch["completion_mask"] * batch["tool_mask"]).sum())
    assert 0 < tokens < batch["completion_mask"].sum()
    assert projected == [tokens, tokens], "once for the reference, once for the policy"


@pytest.mark.parametrize("settings", [{}, {"entropy_coef": 0.1}, {"loss_type": "grpo"}])
def test_micro_batches_of_like_length_have_the_same_sum_of_gradients(
    settings: dict[str, Any], make_trainer: Callable[..., SearchTrainer]
) -> None:
    trainer = make_trainer(gradient_accumulation_steps=2, per_device_train_batch_size=4, **settings)
    batch = one_batch(trainer)
    batch["advantages"] = torch.arange(8.0)  # so that it matters which row gets which
    halves = [
        {name: value[rows] if value.ndim else value for name, value in batch.items()}
        for rows in (slice(0, 4), slice(4, 8))
    ]
    by_length = sort_micro_batches(halves)
    lengths = [(half["prompt_mask"].sum(1) + half["completion_mask"].sum(1)).tolist() for half in by_length]
    assert max(lengths[0]) <= min(lengths[1])

    def gradients(micro_batches: list[dict[str, Any]]) -> list[torch.Tensor]:
        trainer.model.zero_grad()
        for micro_batch in micro_batches:
            trainer._compute_loss(trainer.model, micro_batch).backward()
        return [parameter.grad.clone() for parameter in trainer.model.parameters()]

    for one, other in zip(gradients(halves), gradients(by_length), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_generations_used_for_several_steps_stay_in_their_step(make_trainer: Callable[..., SearchTrainer]) -> None:
    trainer = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=2, steps_per_generation=4)
    trainer.model.train()
    trainer.state.max_steps = 2
    seen: list[list[int]] = []
    stock = GRPOTrainer._prepare_inputs

    def spy(self: GRPOTrainer, rows: Any) -> Any:
        inputs = stock(self, rows)
        seen.extend(one["completion_mask"].sum(1).tolist() for one in self._buffered_inputs)
        return inputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_prepare_inputs", spy)
        trainer._prepare_inputs([dict(ROWS[place // 4]) for place in range(8)])
    after = [one["completion_mask"].sum(1).tolist() for one in trainer._buffered_inputs]
    for step in (slice(0, 2), slice(2, 4)):
        assert sorted(chain(*after[step])) == sorted(chain(*seen[step]))
    assert after != seen, "rows have been sorted"


@pytest.mark.parametrize("quantized", [False, True])
def test_with_lora_the_reference_is_the_base_model(
    quantized: bool, make_trainer: Callable[..., SearchTrainer]
) -> None:
    arguments: dict[str, Any] = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}
    if quantized:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    trainer = make_trainer(arguments=arguments, beta=0.1, learning_rate=1e-2)
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    before = one_batch(trainer)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad == ("lora" in name)
        assert torch.equal(parameter, weights[name]) or "lora" in name
    assert any(not torch.equal(p, weights[n]) for n, p in trainer.model.named_parameters() if "lora_B" in n)
    assert trainer.ref_model is None
    first, second, *_ = trainer.state.log_history
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-6

    # What the trained model says with its adapters off is what it said before.
    model = trainer.accelerator.unwrap_model(trainer.model)
    trainer._handed.scored = before["completion_mask"] * before["tool_mask"]
    ids = torch.cat([before["prompt_ids"], before["completion_ids"]], 1)
    mask = torch.cat([before["prompt_mask"], before["completion_mask"]], 1)
    with torch.no_grad(), model.disable_adapter():
        base, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, trainer._handed.scored.shape[1])
    torch.testing.assert_close(base, before["ref_per_token_logps"], rtol=1e-4, atol=1e-4)


def test_ppo_charges_the_kl_in_its_reward_not_in_its_loss(make_trainer: Callable[..., SearchTrainer]) -> None:
    trainer = make_trainer(algorithm="ppo", beta=0.5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    batch = one_batch(trainer)
    own = (batch["completion_mask"] * batch["tool_mask"]).bool()
    # The critic starts at 0, so the last token's return is its reward: the trajectory's less beta (log p - log p_ref).
    assert (batch["values"] == 0).all()
    trainer._handed.scored = own
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, own.shape[1])
    penalty = 0.5 * (logps - batch["ref_per_token_logps"])
    assert penalty[own].abs().max() > 0.01
    for row, trajectory in enumerate(trainer._first_rows):
        places = own[row].nonzero().flatten()
        reward = f1_reward([trajectory["answer"]], [trajectory["golden_answers"]], [trajectory["outcome"]])[0]
        assert batch["returns"][row, places[-1]].item() == pytest.approx(reward - penalty[row, places[-1]].item())
        total = reward - penalty[row][own[row]].sum().item()
        assert batch["returns"][row, places[0]].item() == pytest.approx(total, abs=1e-4)
    assert batch["advantages"][own].mean().item() == pytest.approx(0, abs=1e-6)
    assert batch["advantages"][own].std().item() == pytest.approx(1, abs=1e-4)
    assert (batch["advantages"][~own] == 0).all()
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    assert (loss_gradient(trainer, batch, logps) == 0).all(), "no KL in the loss"
    assert trainer.beta == 0.5


def test_ppo_trains_policy_and_critic(make_trainer: Callable[..., SearchTrainer]) -> None:
    trainer = make_trainer(algorithm="ppo", gradient_accumulation_steps=2, critic_warmup_steps=4)
    policy = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    critic = [parameter.detach().clone() for parameter in trainer.critic.model.parameters()]
    trainer.train()
    assert any(not torch.equal(old, new) for old, new in zip(policy, trainer.model.parameters(), strict=True))
    assert any(not torch.equal(old, new) for old, new in zip(critic, trainer.critic.model.parameters(), strict=True))
    assert trainer.critic.updates == 2
    assert trainer.critic.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5 * 2 / 4), "the second of four steps"
    for entry in trainer.state.log_history[:2]:
        assert {"critic/loss", "critic/value", "critic/squared_error", "kl"} <= entry.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_end": 1.5}, "noise end is 1.5: a probability lies in"),
        ({"noise_start": -0.1}, "noise start is -0.1: a probability lies in"),
        ({"noise_base": 0.5}, "noise base is 0.5: it must be at least 1"),
        ({"algorithm": "dpo"}, "algorithm is 'dpo': it must be reinforce, rloo, grpo or ppo"),
        ({"baseline": "best"}, "baseline is 'best': it must be none, group or batch"),
        ({"baseline": "group", "algorithm": "grpo"}, "grpo has its own: baseline none, or reinforce, works"),
        ({"scale_rewards": "none"}, "reinforce scales no rewards by their group; scale_rewards group"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "rewards are added up first"),
        ({"beta": -0.1}, "beta is -0.1: it must be 0 or more"),
        ({"temperature": 0.0}, "temperature is 0.0: greedy turns are all alike.*temperature 1.0 works"),
        ({"sync_ref_model": True, "beta": 0.0}, "with beta 0 there is none; beta 0.001 works"),
        ({"algorithm": "ppo", "gae_lambda": 1.5}, r"gae_lambda is 1.5: it lies in \[0, 1\]; 1.0 works"),
        ({"algorithm": "ppo", "critic_learning_rate": 0.0}, "critic_learning_rate is 0.0: .* 1e-5 works"),
        ({"algorithm": "ppo", "value_clip": 0.0}, "value_clip is 0.0: it must be above 0; 0.5 works"),
        ({"algorithm": "ppo", "critic_warmup_steps": -1}, "critic_warmup_steps is -1: it must be 0 or more"),
        ({"algorithm": "ppo", "loss_type": "vespo"}, "loss_type is 'vespo': .* grpo, bnpo, dr_grpo, dapo work"),
        ({"algorithm": "ppo", "importance_sampling_level": "sequence"}, "importance_sampling_level token"),
        ({"algorithm": "ppo", "fsdp": "full_shard"}, "not sharded by FSDP; recipes/accelerate/zero3.yaml"),
        ({"num_generations": 1}, "at least 2 generations .* num_generations 5 works"),
        ({"num_generations": 6}, r"divisible by num_generations \(6\). per_device_train_batch_size 21 works"),
        ({"max_trajectory_tokens": 1500}, "2 turns of 500 tokens and 1 observation of 500 take 1500.*; 2012 works"),
        ({"max_turn_tokens": 0}, "max_turn_tokens is 0: it must be at least 1"),
        ({"max_failed_search_share": 2.0}, "max_failed_search_share is 2.0: a share lies in"),
        (
            {"use_vllm": True, "vllm_mode": "cloud"},
            "vllm_mode is 'cloud': it must be colocate or server|not installed",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        SearchConfig(output_dir=str(tmp_path), **settings)


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    config = SearchConfig(output_dir=str(tmp_path))
    assert config.generation_batch_size == 64 * 5
    assert (config.algorithm, config.beta, config.learning_rate, config.num_generations) == (
        "reinforce",
        0.001,
        1e-6,
        5,
    )
    assert (config.epsilon, config.max_grad_norm, config.num_iterations) == (0.2, 1.0, 1)
    assert (config.temperature, config.top_p, config.top_k, config.min_p) == (1.0, 1.0, 0, None)
    assert (config.mask_observations, config.noise_base) == (True, 4.0)
    assert config.vllm_importance_sampling_mode == "token_truncate"
    assert (config.max_completion_length, config.vllm_max_model_length) == (4096, 4096)


# What SearchTrainer overrides or reads of TRL beyond its public interface. When a pin moves and one of these fails,
# read the method again in the new TRL before changing the test.


def test_trl_is_the_version_this_was_built_on() -> None:
    assert trl.__version__.startswith("1.16."), "read the overrides of trainer.py against the new TRL, then move this"


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        ("_prepare_inputs", ["self", "generation_batch"]),
        ("log", ["self", "logs", "start_time"]),
    ],
)
def test_overridden_methods_have_the_parameters_they_had(method: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(GRPOTrainer, method)).parameters) == parameters


def test_log_probabilities_are_asked_for_as_they_were() -> None:
    parameters = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert parameters[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]


def test_trl_uses_rollout_func_and_its_mask_as_it_did() -> None:
    source = inspect.getsource(GRPOTrainer._generate)
    assert "output = self.rollout_func(prompts, self)" in source
    assert 'tool_mask = extra_fields.pop("env_mask", None)' in source
    assert source.index("self.vllm_generation.sync_weights()") < source.index("self.rollout_func(prompts, self)")


def test_trl_creates_its_vllm_engine_as_it_did() -> None:
    pytest.importorskip("vllm")
    from trl.generation.vllm_generation import VLLMGeneration

    source = inspect.getsource(VLLMGeneration)
    assert "self.llm = LLM(" in source and "max_model_len=self.max_model_length" in source
    assert "self._llm_weights_sleeping = True" in source and 'self.llm.wake_up(tags=["kv_cache"])' in source
