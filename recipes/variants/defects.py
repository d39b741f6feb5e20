"""What the released code does otherwise than the paper, one switch each: what does it cost? (recipes/README.md)

    python recipes/variants/defects.py wrong-kl-sign --config recipes/configs/tinyworld.yaml --output_dir outputs/kl

Two more are flags of the recipe: `--top_p 0.95`, and a warm-up over 95 % of the steps, `--warmup_steps 0.95`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zerosearch.engines import SearchEngine, SearchRequest, SearchResult
from zerosearch.engines.options import EngineOptions, make_engine
from zerosearch.errors import UserError
from zerosearch.generation import SampledTurn
from zerosearch.generation.tokenization import text_token_ids
from zerosearch.metrics import f1, normalize_answer
from zerosearch.prompts import PromptSet
from zerosearch.training.trainer import SearchTrainer

sys.path.append(str(Path(__file__).parents[1]))
import grpo

# The example of the paper's prompt; TinyWorld, whose prompt has none, has one of its countries for it.
EXAMPLE_ANSWERS = ("Beijing", "Zemblia")


class SwappedRows:
    """Ask for documents with the question and answers of the row that searched before this one."""

    def __init__(self, engine: SearchEngine) -> None:
        self.engine, self.engines = engine, (engine,)
        self.name, self.max_concurrency = engine.name, engine.max_concurrency
        self.last: tuple[str, tuple[str, ...]] | None = None
        self.before_last: tuple[str, tuple[str, ...]] | None = None

    async def search(self, request: SearchRequest) -> SearchResult:
        own = (request.question, request.golden_answers)
        if own != self.last:
            self.before_last, self.last = self.last, own
        question, answers = self.before_last or own
        return await self.engine.search(replace(request, question=question, golden_answers=answers))

    async def aclose(self) -> None:
        await self.engine.aclose()


def swapped_rows() -> None:
    def choose_engine(options: EngineOptions, prompts: PromptSet) -> SearchEngine:
        return SwappedRows(make_engine(options, prompts.simulator))

    grpo.choose_engine = choose_engine


class RewardsDivergence(SearchTrainer):
    """Subtract the KL where it should be added."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = -self.beta


def wrong_kl_sign() -> None:
    grpo.SearchTrainer = RewardsDivergence  # type: ignore[misc]


def containment_reward(
    answer: Sequence[str | None], golden_answers: Sequence[Sequence[str]], outcome: Sequence[str], **kwargs: Any
) -> list[float | None]:
    """Score 1 if the characters of a golden answer stand anywhere in the answer: what the code calls EM."""
    found: list[float | None] = []
    for text, golden, how in zip(answer, golden_answers, outcome, strict=True):
        held = any(normalize_answer(one) in normalize_answer(text or "") for one in golden)
        found.append(None if how == "failed_search" else float(held))
    return found


def containment() -> None:
    grpo.REWARDS = [containment_reward]


def example_reward(
    answer: Sequence[str | None], golden_answers: Sequence[Sequence[str]], outcome: Sequence[str], **kwargs: Any
) -> list[float | None]:
    """Score by F1, and no answer as the example of the prompt."""
    return [
        None if how == "failed_search" else max(f1(one, golden) for one in ((text,) if text else EXAMPLE_ANSWERS))
        for text, golden, how in zip(answer, golden_answers, outcome, strict=True)
    ]


def example_for_no_answer() -> None:
    grpo.REWARDS = [example_reward]


class Retokenised:
    """Decode what a generator sampled, without special tokens, and encode it again; log-probabilities are lost."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def step(self) -> list[SampledTurn]:
        turns = []
        for turn in self.generator.step():
            text = self.tokenizer.decode(turn.token_ids, skip_special_tokens=True)
            token_ids = text_token_ids(self.tokenizer, text)
            turns.append(replace(turn, token_ids=token_ids, logprobs=[0.0] * len(token_ids)))
            self.generator.release(turn.trajectory)  # keys and values of other ids
        return turns


class TrainsOnText(SearchTrainer):
    """Train on ids that were never sampled."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.generator = Retokenised(self.generator)


def retokenised() -> None:
    grpo.SearchTrainer = TrainsOnText  # type: ignore[misc]


DEFECTS: dict[str, Callable[[], None]] = {
    "swapped-rows": swapped_rows,
    "wrong-kl-sign": wrong_kl_sign,
    "containment": containment,
    "example-for-no-answer": example_for_no_answer,
    "retokenised": retokenised,
}


@grpo.exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Train with the defect that the first argument names."""
    if not argv or argv[0] not in DEFECTS:
        raise UserError(f"name a defect first: {', '.join(DEFECTS)}")
    DEFECTS[argv[0]]()
    grpo.main(list(argv[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
