"""A search engine that knows one thing, questions that the tiny policy can answer, and a trainer of it on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

from zerosearch.engines import SearchEngine, SearchError, SearchRequest, SearchResult
from zerosearch.training.rewards import f1_reward
from zerosearch.training.trainer import SearchConfig, SearchTrainer

ROWS = [
    {
        "id": str(n),
        "dataset": "rain",
        "prompt": [{"role": "user", "content": f"Who wrote {n}?"}],
        "question": f"Who wrote {n}?",
        "golden_answers": "Emma Jane Austen rain novel born who where".split(),  # all that the tiny policy can say
    }
    for n in range(12)
]


class RainEngine:
    """Answers every query; fails for those that `fails` picks."""

    name, max_concurrency = "rain", 16

    def __init__(self, fails: Callable[[SearchRequest], bool] = lambda request: False) -> None:
        self.fails = fails
        self.requests: list[SearchRequest] = []

    async def search(self, request: SearchRequest) -> SearchResult:
        self.requests.append(request)
        if self.fails(request):
            raise SearchError("the engine rain at http://rain is gone; restart it")
        return SearchResult(("It rains.", "Emma rain."), noisy=request.p_noise > 0.5, retries=1)

    async def aclose(self) -> None:
        pass


def rain_trainer(
    model: Path, output_dir: Path, engine: SearchEngine, arguments: dict[str, Any] | None = None, **settings: Any
) -> SearchTrainer:
    """Return a trainer of a small run; `settings` are those of its config that differ, `arguments` the trainer's."""
    config = SearchConfig(
        **{
            "output_dir": str(output_dir),
            "num_generations": 4,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "max_steps": 2,
            "max_turns": 2,
            "max_turn_tokens": 24,
            "max_observation_tokens": 64,
            "max_trajectory_tokens": 400,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **settings,
        }
    )
    return SearchTrainer(
        model=str(model),
        args=config,
        engine=engine,
        **{"reward_funcs": f1_reward, "train_dataset": datasets.Dataset.from_list(ROWS), **(arguments or {})},
    )


def one_batch(trainer: SearchTrainer, num_rows: int = 8) -> dict[str, Any]:
    """Roll out and score the first rows, `num_generations` times each, as a training step does.

    The rows, with what the rollout added to them, are in `trainer._handed.rows`.
    """
    trainer.model.train()
    trainer.state.max_steps = 2
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    rows = [dict(ROWS[place // trainer.args.num_generations]) for place in range(num_rows)]
    return trainer._generate_and_score_completions(rows)
