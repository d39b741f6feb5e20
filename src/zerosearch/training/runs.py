"""What a training run logs and writes beside its weights: how a rollout went, trajectories, the searches it sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from zerosearch.engines import SearchEngine, SearchError
from zerosearch.engines.account import accounts_of, cost_table
from zerosearch.files import JsonlLog, read_json, read_jsonl, write_json, write_jsonl
from zerosearch.generation import GenerationError
from zerosearch.generation.tokenization import decoded_text
from zerosearch.rollout.statistics import TrajectoryFacts, answer_scores, rollout_metrics
from zerosearch.rollout.trajectory import Trajectory

if TYPE_CHECKING:
    from zerosearch.training.overlap import Rollout
    from zerosearch.training.trainer import SearchTrainer

TRAJECTORIES = "trajectories.jsonl"
QUERIES, EVALUATION_QUERIES = "engine_queries.json", "evaluation_queries.json"  # of training; of its evaluations
WRITTEN = (TRAJECTORIES, QUERIES, EVALUATION_QUERIES)  # in the output folder, beside what TRL writes


def log_rollout(trainer: SearchTrainer, rows: Sequence[Mapping[str, Any]], rollout: Rollout) -> None:
    """Log a rollout over all ranks, count its queries, write down a few trajectories, or the scores of an evaluation.

    Stops the run with a checkpoint if a rollout failed (raises what this rank's did, or `GenerationError`), or too
    many searches did (`SearchError`).
    """
    step, is_training = trainer.state.global_step + 1, trainer.model.training
    trajectories, failure = rollout.trajectories, rollout.failure
    own_facts = [TrajectoryFacts.of(trajectory) for trajectory in trajectories]
    ranks = gather_object([(own_facts, rollout.clock, failure and f"{failure}", rollout.sent)])
    if trainer.accelerator.is_main_process:
        path = Path(trainer.args.output_dir) / (QUERIES if is_training else EVALUATION_QUERIES)
        count_queries(path, [sent for *_, sent in ranks])
    failures = [rank_failure for _, _, rank_failure, _ in ranks if rank_failure is not None]
    if failures:
        trainer.save_progress()
        if failure is not None and not isinstance(failure, GenerationError):
            raise failure
        raise GenerationError(f"step {step} could not be rolled out: {failures[0]}")
    for column in ("answer", "outcome", "searches"):  # of TRL's table of completions, which trackers show
        trainer._log_completion_extra(column, [getattr(trajectory, column) for trajectory in trajectories])
    facts = [fact for rank_facts, *_ in ranks for fact in rank_facts]
    metrics = rollout_metrics(facts, [rank_clock for _, rank_clock, *_ in ranks])
    metrics["search/p_noise"] = trajectories[0].p_noise
    if trainer.args.overlap_steps and is_training:
        metrics["sampling/staleness"] = trainer.state.global_step - rollout.weights_step
    for name, value in metrics.items():
        trainer._metrics["train" if is_training else "eval"][name].append(value)
    failed = metrics["search/failed_search"]
    if failed > trainer.args.max_failed_search_share:
        trainer.save_progress()
        raise SearchError(
            f"{failed:.0%} of the trajectories of step {step} lost a search, more than max_failed_search_share "
            f"({trainer.args.max_failed_search_share:.0%}) allows: {next(fact.error for fact in facts if fact.error)}"
        )
    if is_training:
        record_trajectories(trainer, rows, trajectories)
        return
    scores = [answer_scores(one, row["golden_answers"]) for row, one in zip(rows, trajectories, strict=True)]
    # One by one, so that their means are over questions, not over batches.
    for score in trainer.accelerator.gather_for_metrics(scores, use_gather_object=True):
        for name, value in score.items():
            trainer._metrics["eval"][name].append(value)


def record_trajectories(
    trainer: SearchTrainer, rows: Sequence[Mapping[str, Any]], trajectories: list[Trajectory]
) -> None:
    """Write down a few trajectories of a step, spread over the rows of the first rank."""
    wanted = min(trainer.args.logged_trajectories, len(rows))
    if not trainer.accelerator.is_main_process or wanted < 1:
        return
    step, records = trainer.state.global_step + 1, []
    for place in range(0, len(rows), len(rows) // wanted)[:wanted]:
        prompt = decoded_text(trainer._tokenizer, trajectories[place].prompt_ids)
        records.append(trajectories[place].to_record(rows[place], prompt, step))
    append_trajectories(Path(trainer.args.output_dir), records)


def append_trajectories(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append the records of a step to the run's trajectories."""
    with closing(JsonlLog(folder / TRAJECTORIES)) as log:
        log.append(*records)


def forget_later_steps(folder: Path, step: int) -> None:
    """Keep the trajectories up to this step: what came later will be rolled out again."""
    path = folder / TRAJECTORIES
    if path.exists():
        records = (record for _, record in read_jsonl(path, skip_half_line=True))
        write_jsonl(path, takewhile(lambda record: record["step"] <= step, records))


def newly_sent(engine: SearchEngine, trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """Return what a rollout sent to its engine, retries included, or to each of those that it asks.

    An engine without an account has sent what its trajectories say.
    """
    sent = {account.engine: account.newly_sent() for account in accounts_of(engine)}
    counts = [trajectory.counts() for trajectory in trajectories]
    return sent or {engine.name: sum(count["searches"] + count["retries"] for count in counts)}


def count_queries(path: Path, ranks: Sequence[Mapping[str, int]]) -> None:
    """Add what each rank has sent, by engine, to the counts in a file."""
    queries = queries_in(path)
    for sent in ranks:
        for engine, count in sent.items():
            queries[engine] = queries.get(engine, 0) + count
    write_json(path, queries)


def queries_in(path: Path) -> dict[str, int]:
    """Return how many queries each engine got, by a file of `count_queries`."""
    return read_json(path) if path.exists() else {}


def costs(folder: Path, engine: SearchEngine, eval_engine: SearchEngine) -> str:
    """Return the table of the run's searches and their costs (Table 8); "" where none was made.

    Those of its evaluations stand apart, at the price of their calls alone.
    """
    sent = queries_in(folder / QUERIES)
    usd = {one.engine: one.usd_of(sent.get(one.engine, 0)) for one in accounts_of(engine)}
    evaluated = queries_in(folder / EVALUATION_QUERIES)
    prices = {one.engine: one.price_of(evaluated.get(one.engine, 0)) for one in accounts_of(eval_engine)}
    sent |= {f"{name}, evaluation": count for name, count in evaluated.items()}
    usd |= {f"{name}, evaluation": price for name, price in prices.items()}
    return cost_table(sent, usd) if sent else ""
