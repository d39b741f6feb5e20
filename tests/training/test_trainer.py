"""What reaches TRL of rollouts, rewards, advantages and keys; what a run logs, writes and resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from jsonl_files import rows_of
from peft import LoraConfig
from rain import ROWS, RainEngine, one_batch
from safetensors.torch import load_file
from trl import GRPOTrainer

from zerosearch.checkpoints import checkpoint_to_resume
from zerosearch.data import row_number
from zerosearch.engines import SearchError
from zerosearch.errors import UserError
from zerosearch.noise import NoiseSchedule
from zerosearch.prompts import PAPER
from zerosearch.rollout.trajectory import Trajectory
from zerosearch.training.micro_batches import policy_mask
from zerosearch.training.rewards import f1_reward
from zerosearch.training.runs import append_trajectories
from zerosearch.training.trainer import SearchTrainer, with_prompts

MakeTrainer = Callable[..., SearchTrainer]


# Two groups of four: means 1.5 and 1, deviations 1.29099 and 2; of the batch, 1.25 and 1.58114.
REWARDS = [0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 4.0]
CENTERED = [-1.5, -0.5, 0.5, 1.5, -1.0, -1.0, -1.0, 3.0]


def known_rewards(**kwargs: Any) -> list[float]:
    return REWARDS


def bonus_of_the_first(**kwargs: Any) -> list[float]:
    return [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, REWARDS),
        ({"baseline": "group"}, CENTERED),
        ({"baseline": "batch"}, [-1.25, -0.25, 0.75, 1.75, -1.25, -1.25, -1.25, 2.75]),
        ({"algorithm": "rloo"}, [-2.0, -0.66667, 0.66667, 2.0, -1.33333, -1.33333, -1.33333, 4.0]),
        ({"algorithm": "grpo"}, [-1.16190, -0.38730, 0.38730, 1.16190, -0.5, -0.5, -0.5, 1.5]),
        ({"algorithm": "grpo", "scale_rewards": "none"}, CENTERED),
        (
            {"algorithm": "grpo", "scale_rewards": "batch"},
            [-0.94868, -0.31623, 0.31623, 0.94868, -0.63246, -0.63246, -0.63246, 1.89737],
        ),
        ({"reward_weights": [2.0, 1.0]}, [1.0, 2.0, 4.0, 6.0, 0.0, 0.0, 0.0, 8.0]),
    ],
)
def test_advantages_by_algorithm_and_its_settings(
    settings: dict[str, Any], expected: list[float], make_trainer: MakeTrainer
) -> None:
    functions = [known_rewards, bonus_of_the_first][: len(settings.get("reward_weights", [1.0]))]
    trainer = make_trainer(arguments={"reward_funcs": functions}, **settings)
    assert one_batch(trainer)["advantages"].tolist() == pytest.approx(expected, abs=1e-3)
    assert list(trainer._logs["advantages"]) == pytest.approx(expected, abs=1e-3), "TRL's table shows them, too"


def test_a_rank_learns_from_its_own_rewards(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(arguments={"reward_funcs": known_rewards})
    stock = GRPOTrainer._calculate_rewards
    # As the second of two ranks sees it: the rewards of both, the first rank's before its own.
    both = lambda *args: torch.cat([torch.full((8, 1), 9.0), stock(*args)])  # noqa: E731
    monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", both)
    monkeypatch.setattr(type(trainer.accelerator), "process_index", property(lambda self: 1))
    assert one_batch(trainer)["advantages"].tolist() == REWARDS


def test_an_advantage_function_sees_rewards_trajectories_and_group(make_trainer: MakeTrainer) -> None:
    seen: list[Any] = []

    def advantages(rewards: torch.Tensor, trajectories: list[Any], group: int, **kwargs: Any) -> torch.Tensor:
        seen.extend([rewards, trajectories, group, kwargs])
        return torch.arange(8.0)

    batch = one_batch(make_trainer(arguments={"advantages": advantages}))
    assert batch["advantages"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    rewards, trajectories, group, by_name = seen
    assert (rewards.shape, len(trajectories), group) == ((8,), 8, 4)
    assert all(trajectory.turns and trajectory.outcome for trajectory in trajectories)
    assert by_name.keys() == {"id", "dataset", "question", "golden_answers", "log_likelihoods"}
    assert by_name["question"] == ["Who wrote 0?"] * 4 + ["Who wrote 1?"] * 4


def test_an_advantage_a_turn_holds_for_the_tokens_of_the_turn(make_trainer: MakeTrainer) -> None:
    kept: list[Any] = []

    def by_turn(rewards: torch.Tensor, trajectories: list[Any], group: int, **_: Any) -> list[list[float]]:
        kept.extend(trajectories)
        return [[1.0 + turn for turn in range(len(trajectory.turns))] for trajectory in trajectories]

    trainer = make_trainer(arguments={"advantages": by_turn})
    batch = one_batch(trainer)
    assert batch["advantages"].shape == batch["completion_ids"].shape
    assert max(len(trajectory.turns) for trajectory in kept) > 1
    for row, trajectory in enumerate(kept):
        expected: list[float] = []
        for number, turn in enumerate(trajectory.turns, start=1):
            expected += [float(number)] * turn.num_tokens + [0.0] * turn.num_observation_tokens
        assert batch["advantages"][row, : len(expected)].tolist() == expected
        assert batch["advantages"][row, len(expected) :].abs().sum() == 0
    trainer._compute_loss(trainer.model, batch).backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in trainer.model.parameters()), "it can be learned from"


def test_wrong_advantages_and_noise_are_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UserError, match=r"returned 3 rows, and there are 8 trajectories"):
        one_batch(make_trainer(arguments={"advantages": lambda *_, **__: [1.0] * 3}))
    with pytest.raises(UserError, match=r"returned 9999 numbers for a trajectory of \d+ turns and \d+ tokens"):
        one_batch(make_trainer(arguments={"advantages": lambda *_, **__: [[1.0] * 9999] * 8}))
    with pytest.raises(UserError, match=r"the noise function returned 1\.5 at step 1"):
        one_batch(make_trainer(arguments={"noise": lambda *_: 1.5}))
    with pytest.raises(UserError, match="ppo has the advantages of its critic"):
        make_trainer(algorithm="ppo", arguments={"advantages": lambda *_: [1.0] * 8})


def test_noise_is_a_function_of_step_steps_and_log(make_trainer: MakeTrainer) -> None:
    calls: list[tuple[int, int, int]] = []

    def noise(step: int, total: int, history: Any) -> float:
        calls.append((step, total, len(history)))
        return 0.25 * step

    engine = RainEngine()
    make_trainer(engine, arguments={"noise": noise}).train()
    assert {(1, 2, 0), (2, 2, 1)} == set(calls), "the log of the first step is there in the second"
    assert {request.p_noise for request in engine.requests} == {0.25, 0.5}


def test_rewards_receive_the_trajectories(make_trainer: MakeTrainer) -> None:
    def fewer_searches(answer: list[Any], trajectories: list[Any], **kwargs: Any) -> list[float]:
        assert all(own.answer == text for own, text in zip(trajectories, answer, strict=True))
        documents = {document for own in trajectories for turn in own.turns for document in turn.documents}
        assert documents == {"It rains.", "Emma rain."}
        return [-float(own.searches) for own in trajectories]

    trainer = make_trainer(arguments={"reward_funcs": fewer_searches})
    batch = one_batch(trainer)
    assert sorted(set(batch["advantages"].tolist()))[0] < 0


def test_the_agent_says_how_the_policy_is_asked_and_documents_are_shown(make_trainer: MakeTrainer) -> None:
    agent = replace(
        PAPER.policy, template="Q: {question}", write_observation=lambda documents: f"[{len(documents)} documents]"
    )
    bare = datasets.Dataset.from_list([{name: row[name] for name in row if name != "prompt"} for row in ROWS])
    trainer = make_trainer(arguments={"agent": agent, "train_dataset": bare})
    assert trainer.train_dataset[0]["prompt"] == [{"role": "user", "content": "Q: Who wrote 0?"}]
    batch = one_batch(trainer)
    texts = trainer._tokenizer.batch_decode(batch["completion_ids"])
    assert any("[2 documents]" in text for text in texts) and not any("<information>" in text for text in texts)


def test_a_streamed_dataset_gets_prompts_as_well() -> None:
    streamed = datasets.Dataset.from_list([{"question": "Who wrote Emma?"}]).to_iterable_dataset()
    (row,) = with_prompts({"held-out": streamed}, PAPER.policy)["held-out"]
    assert row == {"question": "Who wrote Emma?", "prompt": PAPER.policy.messages("Who wrote Emma?")}


def test_the_order_of_an_epoch_comes_from_seed_and_epoch_alone(make_trainer: MakeTrainer) -> None:
    sampler = make_trainer()._get_train_sampler()
    orders = []
    for epoch in (0, 1, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[3] != orders[1] == orders[2]


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_trains_no_step_more(make_trainer: MakeTrainer, tmp_path: Path) -> None:
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
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(max_steps=3)
    original, calls = SearchTrainer._keys, []

    def fail_in_the_second_step(self: SearchTrainer, rows: Any, ahead: int) -> Any:
        calls.append(rows)
        if len(calls) == 2:
            raise ZeroDivisionError("a defect")
        return original(self, rows, ahead)

    monkeypatch.setattr(SearchTrainer, "_keys", fail_in_the_second_step)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        trainer.train()
    checkpoint = tmp_path / "policy/checkpoint-1"
    assert checkpoint_to_resume("true", str(tmp_path / "policy")) == str(checkpoint)
    append_trajectories(tmp_path / "policy", [{"step": 1}, {"step": 2}])
    make_trainer(max_steps=1).train(resume_from_checkpoint=str(checkpoint))
    left = (tmp_path / "policy/trajectories.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in left} == {1}, "the second step will be rolled out again"


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_failed_search_is_counted_and_teaches_nothing(algorithm: str, make_trainer: MakeTrainer) -> None:
    engine = RainEngine(fails=lambda request: request.key[3] == 1)  # the second trajectory of each group
    trainer = make_trainer(engine, algorithm=algorithm, max_failed_search_share=1.0)
    batch = one_batch(trainer)
    outcomes = [row["outcome"] for row in trainer._handed.rows]
    failed = torch.tensor([outcome == "failed_search" for outcome in outcomes])
    assert 0 < failed.sum() <= 2
    assert (batch["tool_mask"][failed] * batch["completion_mask"][failed]).sum() == 0
    assert (batch["advantages"][failed] == 0).all()
    assert trainer._metrics["train"]["search/failed_search"] == [failed.sum().item() / 8]
    rewards = torch.tensor(
        [f1_reward([r["answer"]], [r["golden_answers"]], [r["outcome"]])[0] or 0.0 for r in trainer._handed.rows]
    )
    assert trainer._metrics["train"]["reward"] == [pytest.approx(rewards[~failed].mean().item())]


def test_too_many_failed_searches_stop_the_run_and_name_the_engine(make_trainer: MakeTrainer) -> None:
    engine = RainEngine(fails=lambda request: request.key[1] == 2)  # from step 2 on
    trainer = make_trainer(engine, max_steps=4)
    with pytest.raises(
        SearchError, match=r"of step 2 lost a search.*\(10%\) allows: the engine rain at http://rain is gone"
    ):
        trainer.train()
    assert (Path(trainer.args.output_dir) / "checkpoint-1" / "trainer_state.json").exists()


@pytest.mark.slow
def test_training_logs_and_writes_what_the_report_reads(make_trainer: MakeTrainer) -> None:
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
    records = rows_of(output / "trajectories.jsonl")
    assert [record["step"] for record in records] == [1, 1, 1, 2, 2, 2]
    assert len({record["id"] for record in records[:3]}) > 1, "spread over the questions of the step"
    assert "<|im_start|>user\nWho wrote" in records[0]["segments"][0]["text"]
    sent = 2 * len(engine.requests)  # each reply says that it took one retry
    assert json.loads((output / "engine_queries.json").read_text()) == {"rain": sent}
    assert {request.key[:2] for request in engine.requests} == {(42, 1), (42, 2)}


LORA = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "arguments"), [("ppo", {}), ("reinforce", LORA)])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(
    algorithm: str, arguments: dict[str, Any], make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def weights_after(output: str, **settings: Any) -> tuple[list[torch.Tensor], list[Any]]:
        settings = {"output_dir": str(tmp_path / output), "max_steps": 3, "save_strategy": "steps", **settings}
        trainer = make_trainer(None, arguments, algorithm=algorithm, critic_learning_rate=1e-3, **settings)
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


@pytest.mark.slow
def test_ppo_does_not_resume_without_its_critic(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(save_strategy="steps", save_steps=1, max_steps=1).train()
    with pytest.raises(UserError, match="checkpoint-1 holds no critic: it is no checkpoint of algorithm ppo"):
        make_trainer(algorithm="ppo").train(resume_from_checkpoint=str(tmp_path / "policy" / "checkpoint-1"))


def test_keys_do_not_depend_on_the_number_of_ranks(make_trainer: MakeTrainer) -> None:
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


def test_ppo_trains_policy_and_critic(make_trainer: MakeTrainer) -> None:
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


def test_observations_that_are_learned_from_get_no_importance_correction(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(mask_observations=False)
    rollouts: list[dict[str, Any]] = []
    roll_out = trainer.rollout_func
    trainer.rollout_func = lambda *args: rollouts.append(roll_out(*args)) or rollouts[-1]
    one_batch(trainer)
    (rollout,) = rollouts
    for logprobs, mask, trajectory in zip(
        rollout["logprobs"], rollout["env_mask"], rollout["trajectories"], strict=True
    ):
        assert mask == [1] * len(mask)
        assert [p is None for p in logprobs] == [own == 0 for own in trajectory.env_mask]
        assert all(p < 0 for p in logprobs if p is not None)


def test_the_critic_learns_each_window_by_its_share_of_the_tokens(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "steps_per_generation": 4}
    trainer = make_trainer(algorithm="ppo", **sizes)
    trainer.model.train()
    trainer.state.max_steps = 2
    learned: list[tuple[int, float]] = []
    monkeypatch.setattr(
        trainer.critic, "learn", lambda window, tokens: learned.append((len(window), float(tokens))) or 0.0
    )
    trainer._prepare_inputs([dict(ROWS[place // 4]) for place in range(8)])
    tokens = sum(policy_mask(batch).sum().item() for batch in trainer._buffered_inputs)
    assert learned == [(1, tokens / 4)] * 4, "each of four updates is a mean over a quarter of the tokens"


def test_an_evaluation_in_training_is_greedy_free_of_noise_and_has_an_engine_of_its_own(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    engine, other = RainEngine(), RainEngine()
    other.name = "storm"
    advantages = lambda *_, **__: pytest.fail("an evaluation needs no advantages")  # noqa: E731
    rows = [{**row, "golden_answers": ["nobody"]} if n % 2 else row for n, row in enumerate(ROWS[:5])]
    arguments = {"eval_dataset": datasets.Dataset.from_list(rows), "eval_engine": other, "advantages": advantages}
    settings = {"per_device_eval_batch_size": 4, "noise_start": 0.75, "noise_end": 0.75, "seed": 1}
    trainer = make_trainer(engine, arguments, **settings)
    found = trainer.evaluate()
    assert found["eval_search/p_noise"] == 0.0 and not engine.requests
    assert {request.p_noise for request in other.requests} == {0.0}
    assert trainer.state.log_history[-1]["eval_em"] == found["eval_em"], "logged as TRL logs"
    again = make_trainer(engine, arguments, **settings | {"seed": 2}).evaluate()
    names = ["eval_em", "eval_f1", "eval_search/policy_tokens"]
    assert [found[name] for name in names] == [again[name] for name in names], "no seed decides: it is greedy"
    sent = 2 * len(other.requests)  # each reply says that it took one retry
    assert json.loads((tmp_path / "policy/evaluation_queries.json").read_text()) == {"storm": sent}
    assert not (tmp_path / "policy/engine_queries.json").exists()


def test_the_scores_of_an_evaluation_are_means_over_questions(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["Emma", "rain", "rain", None, "Emma", None])  # of six questions: four, then two in a last batch
    outcomes = iter(["answered"] * 3 + ["turns_exhausted", "answered", "failed_search"])

    def roll_out(rows: Any, *_: Any, **__: Any) -> list[Trajectory]:
        return [
            Trajectory([1], 0.0, [2, 3], [1, 1], [-1.0, -1.0], answer=next(answers), outcome=next(outcomes))
            for _ in rows
        ]

    monkeypatch.setattr("zerosearch.training.overlap.run_rollouts", roll_out)
    rows = [{**row, "golden_answers": ["Emma"]} for row in ROWS[:6]]
    arguments = {"eval_dataset": datasets.Dataset.from_list(rows)}
    trainer = make_trainer(None, arguments, per_device_eval_batch_size=4, max_failed_search_share=1.0)
    assert trainer.evaluate()["eval_em"] == 2 / 5, "of the five questions whose searches came back"


def test_further_trajectories_of_a_greedy_evaluation_are_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UserError, match="num_generations_eval is 4: an evaluation in training is greedy"):
        make_trainer(num_generations_eval=4)
