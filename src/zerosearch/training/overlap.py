"""The rollouts of a training run: each as its step begins, or one step ahead while the step before is trained.

With `overlap_steps 1`, for a policy whose vLLM server stands apart from the trainer:

    step k      weights k-1 are pushed | the trajectories of step k, sampled ahead, are trained
    meanwhile                          | those of step k+1 are sampled, with weights k-1
    step k+1    all of them have ended, weights k are pushed ...

So every step but the first trains on trajectories of weights that are one step old, which TRL's importance weights
correct token by token. Weights are pushed only once no trajectory is in flight: a step, a checkpoint and an evaluation
wait for that first. A checkpoint keeps the trajectories that were sampled ahead, so that a resumed run trains on the
same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from zerosearch.engines import SearchEngine
from zerosearch.errors import UserError
from zerosearch.files import read_jsonl, write_jsonl
from zerosearch.generation.vllm_server import wait_for_weights
from zerosearch.rollout.loop import run_rollouts
from zerosearch.rollout.trajectory import RolloutClock, Trajectory
from zerosearch.training.runs import QUERIES, count_queries, newly_sent

if TYPE_CHECKING:
    from zerosearch.training.trainer import SearchTrainer

NEXT_STEP = "next_step.jsonl"  # in a checkpoint: a line for each trajectory of all ranks


@dataclass
class Rollout:
    """The rollout of this rank's rows of a step, and what came of it.

    `weights_step` is the number of optimizer steps behind the weights that sample it, `failure` what ended it, and
    `sent` the queries that it sent, by engine.
    """

    weights_step: int
    engine: SearchEngine
    keys: list[tuple[int, ...]] = field(default_factory=list)
    work: Callable[[], list[Trajectory]] = list
    clock: RolloutClock = field(default_factory=RolloutClock)
    trajectories: list[Trajectory] = field(default_factory=list)
    failure: Exception | None = None
    sent: dict[str, int] = field(default_factory=dict)
    is_abandoned: Event = field(default_factory=Event)
    thread: Thread | None = None

    def run(self) -> None:
        """Roll out, unless that could not even be prepared."""
        if self.failure is None:
            try:
                self.trajectories = self.work()
            except Exception as error:  # raised in `log_rollout`, once every rank has saved its part of a checkpoint
                self.failure = error
        self.sent = newly_sent(self.engine, self.trajectories)

    def start(self) -> None:
        """Roll out in a thread, which a process that ends does not wait for."""
        self.thread = Thread(target=self.run, name="rollout", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Wait for the thread, if one was started."""
        if self.thread is not None:
            self.thread.join()


class Rollouts:
    """The rollouts of a trainer, of which `ahead` is the next step's."""

    def __init__(self, trainer: SearchTrainer) -> None:
        self.trainer = trainer
        self.ahead: Rollout | None = None

    def of_step(self, rows: Sequence[Mapping[str, Any]]) -> Rollout:
        """Return the rollout of this rank's rows of the step, or of an evaluation, that begins now.

        Raises `UserError` if others were sampled ahead, as after a resume with another seed or dataset.
        """
        trainer = self.trainer
        if not trainer.model.training or self.ahead is None:
            rollout = self._prepared(rows)
            rollout.run()
            return rollout
        rollout, self.ahead = self.ahead, None
        if not rollout.failure and rollout.keys != trainer._keys(rows):
            raise UserError(
                f"the trajectories that were sampled ahead are not those of step {trainer.state.global_step + 1}: "
                f"resume with the seed and the dataset of the run, or remove {NEXT_STEP} from the checkpoint"
            )
        return rollout

    def begin_next(self) -> None:
        """Begin the rollout of the next step, if there is one; it must be called once this step's weights are pushed.

        What fails in it fails the next step.
        """
        trainer = self.trainer
        if trainer.args.overlap_steps and trainer.state.global_step + 1 < trainer.state.max_steps:
            self.ahead = self._prepared(self._next_rows(), ahead=1)
            self.ahead.start()

    def settle(self) -> None:
        """Wait until no trajectory is in flight."""
        if self.ahead is not None:
            self.ahead.wait()

    def abandon(self) -> None:
        """Start no further turn and no further search: the run ends, and nobody will train on these."""
        if self.ahead is not None:
            self.ahead.is_abandoned.set()

    def forget(self) -> None:
        """Let go of what an earlier run has abandoned, once it has come to its end."""
        self.settle()
        self.ahead = None

    def save(self, checkpoint: Path) -> None:
        """Save what was sampled ahead, of all ranks, and count its queries; nothing if a rank's rollout failed."""
        self.settle()
        done = self.ahead if self.ahead is not None and self.ahead.failure is None else None
        records = (
            []
            if done is None
            else [
                {"key": key, "weights_step": done.weights_step, "trajectory": asdict(trajectory)}
                for key, trajectory in zip(done.keys, done.trajectories, strict=True)
            ]
        )
        ranks = gather_object([(records, done.sent if done else {})])
        path, is_main_process = checkpoint / NEXT_STEP, self.trainer.accelerator.is_main_process
        if is_main_process:
            path.unlink(missing_ok=True)  # of a rollout that was not to be trained on
        if done is None or not all(records for records, _ in ranks):
            return
        if is_main_process:
            checkpoint.mkdir(parents=True, exist_ok=True)
            write_jsonl(path, chain.from_iterable(records for records, _ in ranks))
            count_queries(Path(self.trainer.args.output_dir) / QUERIES, [sent for _, sent in ranks])
        done.sent = {}

    def load(self, checkpoint: Path) -> None:
        """Load this rank's share of what a checkpoint keeps of the next step."""
        trainer, path = self.trainer, checkpoint / NEXT_STEP
        if not trainer.args.overlap_steps or not path.exists():
            return
        records = [record for _, record in read_jsonl(path)]
        share = len(records) // trainer.accelerator.num_processes
        own = records[trainer.accelerator.process_index * share :][:share]
        self.ahead = Rollout(own[0]["weights_step"], trainer.engine, [tuple(record["key"]) for record in own])
        self.ahead.trajectories = [Trajectory.from_dict(record["trajectory"]) for record in own]

    def _prepared(self, rows: Sequence[Mapping[str, Any]], ahead: int = 0) -> Rollout:
        """Return the rollout of this rank's rows, not begun, once the server has the weights of now."""
        trainer = self.trainer
        rollout = Rollout(trainer.state.global_step, trainer.current_engine)
        settings = copy(trainer.args)
        if not trainer.model.training:
            settings.temperature = 0.0  # an evaluation is greedy
        try:
            if trainer.args.use_vllm and trainer.args.vllm_mode == "server":
                wait_for_weights(trainer.accelerator, trainer.vllm_generation)
            rollout.keys = trainer._keys(rows, ahead)
            rollout.work = partial(
                run_rollouts,
                rows,
                trainer.generator,
                rollout.engine,
                settings,
                p_noise=trainer._p_noise(ahead),
                keys=rollout.keys,
                clock=rollout.clock,
                agent=trainer.agent,
                may_go_on=lambda: not rollout.is_abandoned.is_set(),
            )
        except Exception as error:
            rollout.failure = error
        return rollout

    def _next_rows(self) -> list[dict[str, Any]]:
        """Return this rank's rows of the next step, of this epoch or the next, as TRL's loader will give them.

        The sampler repeats the rows of a step `steps_per_generation` times, and ranks take turns, a batch each.
        """
        trainer, args = self.trainer, self.trainer.args
        sampler: Any = trainer._get_train_sampler()
        repeated = args.generation_batch_size * args.steps_per_generation
        epoch, place = divmod(trainer.state.global_step + 1, len(sampler) // repeated)
        if trainer.shuffle_dataset:
            sampler.set_epoch(epoch)
        share = args.generation_batch_size // trainer.accelerator.num_processes
        start = place * repeated + trainer.accelerator.process_index * share
        dataset: Any = trainer.train_dataset
        return [dataset[index] for index in islice(sampler, start, start + share)]
