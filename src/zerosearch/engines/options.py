"""The engine of a run, chosen on the command line: the flags that recipes share, and the engine they ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from zerosearch.engines import SearchEngine
from zerosearch.errors import UserError

EngineKind = Literal["simulated", "bm25"]


@dataclass
class EngineOptions:
    """Which search engine, and what it needs. A recipe's parser takes this class beside its own.

    Raises `UserError` for a value that cannot work.
    """

    engine: EngineKind = field(default="simulated", metadata={"help": "The search engine."})
    num_documents: int = field(default=5, metadata={"help": "Documents a search (Section 4)."})
    simulator_url: str = field(default="http://127.0.0.1:6001/v1", metadata={"help": "For simulated: its address."})
    simulator_model: str | None = field(
        default=None, metadata={"help": "For simulated: the model to ask for. Default: the first that is served."}
    )
    simulator_max_tokens: int = field(default=600, metadata={"help": "For simulated: longest reply, in tokens."})
    corpus: str | None = field(default=None, metadata={"help": "For bm25: passages, JSONL in wiki-18's format."})

    def __post_init__(self) -> None:
        if self.engine not in get_args(EngineKind):  # a config file is not checked by the parser
            raise UserError(f"engine is {self.engine!r}: it must be one of {', '.join(get_args(EngineKind))}")
        for name in ("num_documents", "simulator_max_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")


def make_engine(options: EngineOptions, simulator_template: str) -> SearchEngine:
    """Return the engine that the options ask for, ready to search.

    `simulator_template` is what a simulator is asked (zerosearch.prompts).
    Raises `UserError`, one sentence with the remedy, for a flag that is missing or an engine that does not answer.
    """
    if options.engine == "bm25":
        return _bm25(options)
    return _simulated(options, simulator_template)


def _bm25(options: EngineOptions) -> SearchEngine:
    from zerosearch.engines.bm25 import BM25Engine

    if options.corpus is None:
        raise UserError("--engine bm25 needs --corpus, a JSONL file of passages")
    return BM25Engine(Path(options.corpus), num_documents=options.num_documents)


def _simulated(options: EngineOptions, template: str) -> SearchEngine:
    from zerosearch.engines.simulated import SimulatedEngine

    engine = SimulatedEngine(
        options.simulator_url,
        options.simulator_model,
        template,
        max_tokens=options.simulator_max_tokens,
        num_documents=options.num_documents,
    )
    engine.check()
    return engine
