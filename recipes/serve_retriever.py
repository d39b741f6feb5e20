"""Serve a corpus to policies: Search-R1's POST /retrieve, and the one of the paper's code, over BM25 or a dense index.

    python recipes/serve_retriever.py --corpus wiki-18.jsonl --index_dir outputs/wiki-18-bm25
    python recipes/serve_retriever.py --corpus wiki-18.jsonl --index_dir outputs/wiki-18-e5 --kind dense \
        --factory IVF16384,PQ64

Search in it with `--engine retriever`, or with a client of Search-R1's. The index is built on the first start and kept
in `index_dir`. A compressed dense index says how much it finds of what an exact one would. Ctrl-C or SIGTERM ends it.
"""

from __future__ import annotations

import logging
import signal
from dataclasses import dataclass, field
from typing import Literal

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.engines.bm25 import BM25Index
from zerosearch.engines.corpus import PassageIndex
from zerosearch.engines.dense import DenseIndex, DenseOptions
from zerosearch.engines.retriever_server import RetrieverServer, listen, web_server
from zerosearch.errors import UserError


@dataclass
class RetrieverArguments:
    """What to serve and where."""

    corpus: str = field(metadata={"help": "Passages, JSONL in wiki-18's format."})
    index_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that keeps the index. Default, for bm25 only: made anew at each start."},
    )
    kind: Literal["bm25", "dense"] = field(default="bm25", metadata={"help": "The index."})
    topk: int = field(default=3, metadata={"min": 1, "help": "Documents for a request that does not say how many."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 admits other machines."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; the paper's code asks on 6002."})


def open_index(arguments: RetrieverArguments, options: DenseOptions) -> PassageIndex:
    """Return the index, built first unless it is there."""
    if arguments.kind == "bm25":
        return BM25Index(arguments.corpus, arguments.index_dir)
    if arguments.index_dir is None:
        raise UserError("--kind dense needs --index_dir, the folder that keeps the index")
    index = DenseIndex(arguments.corpus, arguments.index_dir, options)
    if index.recall is not None and options.factory != "Flat":
        size_mib, depth = index.manifest["index_mib"], index.manifest["recall_depth"]
        print(f"{options.factory}: {size_mib:,} MiB, finds {index.recall:.1%} of what flat finds first ({depth})")
    return index


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Open or build the index and serve it until a signal comes."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    arguments, options = parse(RetrieverArguments, DenseOptions, argv=argv)
    index = open_index(arguments, options)
    server, listener = RetrieverServer(index, arguments.topk), listen(arguments.host, arguments.port)
    address = f"http://{arguments.host}:{listener.getsockname()[1]}/retrieve"
    print(f"retriever ready at {address}: {index.manifest['num_passages']:,} passages (Ctrl-C ends it)", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn, which handles them, raises them again once it has ended
    web_server(server).run([listener])


if __name__ == "__main__":
    main()
