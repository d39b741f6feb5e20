"""Serve searches to policies by Search-R1's POST /retrieve: a corpus over BM25 or a dense index, or a simulator.

    python recipes/serve_retriever.py --corpus wiki-18.jsonl --index_dir outputs/wiki-18-bm25
    python recipes/serve_retriever.py --corpus wiki-18.jsonl --index_dir outputs/wiki-18-e5 --engine dense \
        --factory IVF16384,PQ64
    python recipes/serve_retriever.py --engine simulated --questions train.jsonl

Search in it with `--engine retriever`, with a client of Search-R1's or verl's, or of the paper's code. An index is
built on the first start and kept in `index_dir`; a compressed dense one says how much it finds of what an exact one
would. Behind `simulated` a language model writes the documents (recipes/serve_simulator.py), noisier with each query
as in the curriculum: see zerosearch.engines.simulated_retriever for what a request may tell it. Ctrl-C or SIGTERM
ends it.
"""

from __future__ import annotations

import logging
import signal
from dataclasses import dataclass, field
from typing import Literal

from fastapi import FastAPI

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.data import load_questions
from zerosearch.engines.bm25 import BM25Index
from zerosearch.engines.corpus import PassageIndex
from zerosearch.engines.dense import DenseIndex, DenseOptions
from zerosearch.engines.options import SimulatorOptions
from zerosearch.engines.retriever_server import RetrieverServer, listen, web_server
from zerosearch.engines.simulated_retriever import QueryNoise, SimulatedRetriever
from zerosearch.errors import UserError
from zerosearch.noise import NoiseSchedule
from zerosearch.prompts import PROMPT_SETS, PromptSetName


@dataclass
class RetrieverArguments:
    """What to serve and where."""

    engine: Literal["bm25", "dense", "simulated"] = field(default="bm25", metadata={"help": "What answers."})
    corpus: str | None = field(default=None, metadata={"help": "For bm25, dense: JSONL in wiki-18's format."})
    index_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that keeps the index. Default, for bm25 only: made anew at each start."},
    )
    topk: int = field(default=3, metadata={"min": 1, "help": "Documents for a request that does not say how many."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 admits other machines."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; the paper's code asks on 6002."})


@dataclass
class SimulatedArguments(SimulatorOptions):
    """How a simulator answers clients that send nothing but queries."""

    prompt: PromptSetName = field(default="paper", metadata={"help": "For simulated: the prompt set it is asked in."})
    questions: str | None = field(
        default=None,
        metadata={"help": "For simulated: the questions trained on, a .jsonl or .parquet file or a Hub id."},
    )
    questions_split: str = field(default="train", metadata={"help": "Split of questions on the Hub."})
    noise_start: float = field(default=0.0, metadata={"help": "For simulated: p_s of Eq. 1, at the first query."})
    noise_end: float = field(default=0.5, metadata={"help": "For simulated: p_e of Eq. 1, from noise_queries on."})
    noise_base: float = field(default=4.0, metadata={"help": "For simulated: b of Eq. 1; 1 is a straight line."})
    noise_queries: int = field(
        default=64_000,  # of a run of the paper: 64 questions, 5 trajectories, 200 steps, one query each (Table 8)
        metadata={"min": 1, "help": "For simulated: queries until the noise has reached noise_end."},
    )
    seed: int = field(default=0, metadata={"min": 0, "help": "For simulated: seed of noise and sampling."})


def open_index(arguments: RetrieverArguments, options: DenseOptions) -> PassageIndex:
    """Return the index, built first unless it is there."""
    if arguments.corpus is None:
        raise UserError(f"--engine {arguments.engine} needs --corpus, a JSONL file of passages")
    if arguments.engine == "bm25":
        return BM25Index(arguments.corpus, arguments.index_dir)
    if arguments.index_dir is None:
        raise UserError("--engine dense needs --index_dir, the folder that keeps the index")
    index = DenseIndex(arguments.corpus, arguments.index_dir, options)
    if index.recall is not None and options.factory != "Flat":
        size_mib, depth = index.manifest["index_mib"], index.manifest["recall_depth"]
        print(f"{options.factory}: {size_mib:,} MiB, finds {index.recall:.1%} of what flat finds first ({depth})")
    return index


def open_simulator(arguments: RetrieverArguments, options: SimulatedArguments) -> tuple[FastAPI, str]:
    """Return the web application of the simulator, once it has answered, and what it is."""
    prompts = PROMPT_SETS[options.prompt]
    noise = QueryNoise(
        NoiseSchedule(options.noise_start, options.noise_end, options.noise_base), options.noise_queries
    )
    rows = load_questions(options.questions, options.questions_split).to_list() if options.questions else []
    engine = options.make_simulator(prompts.simulator, num_documents=5)  # what its prompt asks for
    engine.check()
    server = SimulatedRetriever(
        engine, noise, rows, prompts.simulator_from_query, options.seed, default_count=arguments.topk
    )
    return server.application, f"{engine.model} writes, for {len(rows):,} questions"


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Open or build the index, or find the simulator, and serve it until a signal comes."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    arguments, dense, simulator = parse(RetrieverArguments, DenseOptions, SimulatedArguments, argv=argv)
    if arguments.engine == "simulated":
        application, what = open_simulator(arguments, simulator)
    else:
        index = open_index(arguments, dense)
        application = RetrieverServer(index, arguments.topk).application
        what = f"{index.manifest['num_passages']:,} passages"
    listener = listen(arguments.host, arguments.port)
    address = f"http://{arguments.host}:{listener.getsockname()[1]}/retrieve"
    print(f"retriever ready at {address}: {what} (Ctrl-C ends it)", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn, which handles them, raises them again once it has ended
    web_server(application).run([listener])


if __name__ == "__main__":
    main()
