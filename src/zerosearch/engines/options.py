"""The engine of a run, chosen on the command line: the flags that recipes share, and the engine they ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from zerosearch.engines import SearchEngine
from zerosearch.engines.bm25 import BM25Engine
from zerosearch.engines.cache import CachedEngine
from zerosearch.engines.colocated_simulator import ColocatedSimulator
from zerosearch.engines.google import GoogleEngine, GoogleProvider, read_key
from zerosearch.engines.retriever import RetrieverEngine, RetrieverProtocol
from zerosearch.engines.search_api import SearchAPIEngine, read_api
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.errors import UserError
from zerosearch.prompts import SimulatorTemplate

EngineKind = Literal["simulated", "bm25", "retriever", "google", "api"]
SimulatorPlace = Literal["served", "colocated"]


@dataclass
class SimulatorOptions:
    """Which simulator, and how it is asked."""

    simulator_url: str = field(
        default="http://127.0.0.1:6001/v1",
        metadata={"help": "For simulated: its address; several, with commas between them, share the searches."},
    )
    simulator_model: str | None = field(
        default=None,
        metadata={"help": "For simulated: the model to ask for, or a colocated adapter. Default: the one served."},
    )
    simulator_max_tokens: int = field(
        default=600, metadata={"help": "For simulated: longest reply, in tokens.", "min": 1}
    )
    simulator_ask_leaks_again: bool = field(
        default=False, metadata={"help": "For simulated: ask once more for noisy documents that hold a golden answer."}
    )

    def simulator_class(self) -> type[SimulatedEngine]:
        """Return the kind of engine that asks the simulator."""
        return SimulatedEngine

    def make_simulator(self, template: SimulatorTemplate, num_documents: int) -> SimulatedEngine:
        """Return the simulator, asked in the words of `template` (zerosearch.prompts) for so many documents."""
        return self.simulator_class()(
            self.simulator_url,
            self.simulator_model,
            template,
            max_tokens=self.simulator_max_tokens,
            ask_leaks_again=self.simulator_ask_leaks_again,
            num_documents=num_documents,
        )


@dataclass
class EngineOptions(SimulatorOptions):
    """Which search engine, and what it needs. A recipe's parser takes this class beside its own.

    Raises `UserError` for a value that cannot work.
    """

    engine: EngineKind = field(default="simulated", metadata={"help": "The search engine."})
    num_documents: int = field(default=5, metadata={"help": "Documents a search (Section 4).", "min": 1})

    corpus: str | None = field(default=None, metadata={"help": "For bm25: passages, JSONL in wiki-18's format."})
    index_dir: str | None = field(
        default=None, metadata={"help": "For bm25: folder that keeps the index. Default: made anew for every run."}
    )

    retriever_url: str = field(
        default="http://127.0.0.1:8000/retrieve",
        metadata={"help": "For retriever: its address (recipes/serve_retriever.py serves there)."},
    )
    retriever_protocol: RetrieverProtocol = field(
        default="search-r1",
        metadata={"help": "For retriever: search-r1 (queries, topk), or zerosearch (query, top_k; the paper's code)."},
    )

    google_provider: GoogleProvider = field(default="serpapi", metadata={"help": "For google: who sells the results."})
    google_key_file: str | None = field(
        default=None,
        metadata={"help": "For google: file with the key. Default: the variable SERPAPI_API_KEY or SERPER_API_KEY."},
    )
    google_url: str | None = field(default=None, metadata={"help": "For google: another address, such as a gateway."})
    google_queries_per_s: float = field(
        default=5.0, metadata={"help": "For google: queries a second at most.", "above": 0}
    )
    google_max_queries: int | None = field(
        default=None, metadata={"help": "For google: stop after so many queries.", "min": 0}
    )
    google_max_usd: float | None = field(
        default=None, metadata={"help": "For google: stop before it costs more.", "min": 0}
    )
    google_usd_per_query: float | None = field(
        default=None, metadata={"help": "For google: the price in your plan. Default: the provider's list.", "min": 0}
    )

    api: str | None = field(
        default=None, metadata={"help": "For api: the YAML file that describes the service, as in recipes/engines."}
    )

    search_cache: str | None = field(
        default=None, metadata={"help": "SQLite file that keeps what the engine answers: nothing is asked twice."}
    )
    search_cache_only: bool = field(
        default=False, metadata={"help": "Answer from the cache alone; what it does not hold is an error."}
    )
    engine_usd_per_hour: float = field(
        default=0.0, metadata={"help": "What the machine behind the engine costs an hour.", "min": 0}
    )

    def __post_init__(self) -> None:
        if self.search_cache_only and self.search_cache is None:
            raise UserError("--search_cache_only needs --search_cache, the file to answer from")


@dataclass
class TrainingEngineOptions(EngineOptions):
    """Which search engine a policy is trained with: its simulator may live in the policy's own vLLM engine."""

    simulator: SimulatorPlace = field(
        default="served",
        metadata={
            "help": "For simulated: served at its address; or colocated, in the vLLM engine of a policy with LoRA, as "
            "an adapter over the same base."
        },
    )

    def simulator_class(self) -> type[SimulatedEngine]:
        return ColocatedSimulator if self.simulator == "colocated" else SimulatedEngine


def make_engine(options: EngineOptions, simulator_template: SimulatorTemplate) -> SearchEngine:
    """Return the engine that the options ask for, ready to search.

    `simulator_template` is what a simulator is asked (zerosearch.prompts).
    Raises `UserError`, one sentence with the remedy, for a flag that is missing or an engine that does not answer.
    """
    engine: Any
    if options.engine == "bm25":
        if options.corpus is None:
            raise UserError("--engine bm25 needs --corpus, a JSONL file of passages")
        engine = BM25Engine(options.corpus, options.num_documents, options.index_dir)
    elif options.engine == "retriever":
        engine = RetrieverEngine(options.retriever_url, options.retriever_protocol, options.num_documents)
    elif options.engine == "google":
        engine = GoogleEngine(
            "" if options.search_cache_only else read_key(options.google_provider, options.google_key_file),
            options.google_provider,
            options.num_documents,
            queries_per_s=options.google_queries_per_s,
            max_queries=options.google_max_queries,
            max_usd=options.google_max_usd,
            usd_per_query=options.google_usd_per_query,
            url=options.google_url,
        )
    elif options.engine == "api":
        if options.api is None:
            raise UserError("--engine api needs --api, a YAML file that describes the service (recipes/engines)")
        api = read_api(options.api)
        engine = SearchAPIEngine(api, "" if options.search_cache_only else api.key(), options.num_documents)
    elif options.engine == "simulated":
        engine = options.make_simulator(simulator_template, options.num_documents)
    else:
        raise UserError(f"engine is {options.engine!r}: it must be one of {', '.join(get_args(EngineKind))}")
    engine.account.usd_per_hour = options.engine_usd_per_hour
    if options.engine in ("simulated", "retriever") and not options.search_cache_only:
        engine.check()
    if options.search_cache is None:
        return engine
    return CachedEngine(options.search_cache, engine, options.search_cache_only)
