"""BM25 on real questions and growing corpora: does it find the answer, how fast, for how much memory?

    python recipes/bench/bm25.py --corpus wiki_passages.jsonl --questions qa_multihop.jsonl

The question itself is the query, and an answer counts as found if one of the five documents contains it (normalised
as for exact match). Corpora larger than the given one are the given one and passages of random words: its words, drawn
by their frequency, in passages of its lengths. Without files, TinyWorld's are used. Each corpus is indexed and
searched in a process of its own, whose memory is read from the kernel: `peak_mib` is the largest resident set while
building, mapped pages included; `search_mib` is what is the process's own while it searches.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.data import load_questions, read_passages
from zerosearch.engines.bm25 import BM25Engine
from zerosearch.errors import UserError
from zerosearch.files import claim_output_dir, write_json, write_jsonl
from zerosearch.metrics import holds_answer
from zerosearch.tinyworld.world import World, question_rows

WORD = re.compile(r"\w+")
ROUNDS = 3  # times that all questions are searched


@dataclass
class BenchArguments:
    """Which corpus and questions, and how far to grow."""

    corpus: str | None = field(default=None, metadata={"help": "Passages, JSONL in wiki-18's format."})
    questions: str | None = field(default=None, metadata={"help": "Questions with golden_answers, JSONL."})
    sizes: list[int] = field(
        default_factory=lambda: [0, 100_000, 1_000_000], metadata={"help": "Passages in all; 0: as it is."}
    )
    output: str = field(default="outputs/bench/bm25.json", metadata={"help": "Where to write."})

    def __post_init__(self) -> None:
        if (self.corpus is None) != (self.questions is None):
            raise UserError("--corpus and --questions go together: name both, or none for TinyWorld's")


def tinyworld_files(directory: Path) -> tuple[Path, Path]:
    """Write TinyWorld's evaluation corpus and 300 questions."""
    world = World.draw(0, 400, held_out=True)
    corpus, questions = directory / "corpus.jsonl", directory / "questions.jsonl"
    write_jsonl(corpus, world.passages())
    write_jsonl(questions, question_rows(world, 300, 0))
    return corpus, questions


def random_passages(corpus: Path, count: int, seed: int = 0) -> Iterator[str]:
    """Yield texts of the corpus' words, drawn by their frequency, as long as its passages."""
    texts = [WORD.findall(f"{passage.title} {passage.text}") for passage in read_passages(corpus)]
    frequency = Counter(word for words in texts for word in words)
    words, lengths = np.array(list(frequency)), [len(text) for text in texts]
    shares = np.cumsum(list(frequency.values())) / frequency.total()
    rng, chance = np.random.default_rng(seed), random.Random(seed)
    for _ in range(count):
        drawn = words[np.searchsorted(shares, rng.random(chance.choice(lengths)), side="right")]
        yield " ".join(drawn.tolist())


def write_corpus(corpus: Path, size: int, path: Path) -> None:
    """Write the corpus, filled up to `size` passages."""
    rows = corpus.read_bytes().rstrip(b"\n").split(b"\n")
    missing = size - len(rows)
    with path.open("wb") as file:
        file.writelines(row + b"\n" for row in rows)
        texts = random_passages(corpus, max(missing, 0))
        for number, text in enumerate(tqdm(texts, total=missing, desc=f"writing {size:,} passages")):
            title, _, rest = text.partition(" ")
            row = {"id": f"random-{number}", "contents": f'"{title}"\n{rest or title}'}
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def memory_mib(name: str) -> float:
    """Return a figure of this process from the kernel, in MiB; not a number where there is no such kernel."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), float("nan"))


def measure(corpus: Path, questions: Path, folder: Path) -> dict[str, Any]:
    """Index a corpus and search it for every question, in a process that did nothing before."""
    rows = load_questions(str(questions)).to_list()
    start = time.perf_counter()
    engine = BM25Engine(corpus, index_dir=folder)
    build_s, peak_mib = time.perf_counter() - start, memory_mib("VmHWM")
    latencies, found = [], 0
    for round_number in range(ROUNDS):
        for row in rows:
            start = time.perf_counter()
            documents = engine.lookup(row["question"])
            latencies.append(time.perf_counter() - start)
            if round_number == 0:
                found += any(holds_answer(document, row["golden_answers"]) for document in documents)
    by_round = [len(rows) / sum(latencies[place * len(rows) :][: len(rows)]) for place in range(ROUNDS)]
    return {
        "passages": engine.index.manifest["num_passages"],
        "questions": len(rows),
        "answer_in_top5": found / len(rows),
        "queries_per_s": float(np.median(by_round)),
        "queries_per_s_rounds": by_round,
        "latency_ms": {f"p{p}": float(np.percentile(latencies, p)) * 1000 for p in (50, 95)},
        "build_s": build_s,
        "peak_mib": peak_mib,
        "search_mib": memory_mib("RssAnon"),
        "index_mib": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20,
        "corpus_mib": corpus.stat().st_size / 2**20,
    }


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Measure each size and write and print what was found."""
    (arguments,) = parse(BenchArguments, argv=argv)
    output = Path(arguments.output)
    claim_output_dir(output.parent, overwrite=True)
    results = []
    with TemporaryDirectory() as directory:
        if arguments.corpus is None:
            corpus, questions = tinyworld_files(Path(directory))
        else:
            corpus, questions = Path(arguments.corpus), Path(arguments.questions)
        for size in arguments.sizes:
            grown = Path(directory) / "grown.jsonl"
            write_corpus(corpus, size, grown)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                result = process.submit(measure, grown, questions, Path(directory) / "index").result()
            results.append(result)
            print(
                f"{result['passages']:>9,} passages  answer in top 5 {result['answer_in_top5']:.3f}  "
                f"{result['queries_per_s']:>8,.0f} queries/s (p95 {result['latency_ms']['p95']:.1f} ms)  "
                f"built in {result['build_s']:.1f} s, peak {result['peak_mib']:,.0f} MiB, "
                f"then {result['search_mib']:,.0f} MiB of its own"
            )
    machine = f"{platform.processor() or platform.machine()}, {multiprocessing.cpu_count()} cores"
    write_json(output, {"corpus": arguments.corpus or "TinyWorld", "sizes": results, "machine": machine})
    print(output)


if __name__ == "__main__":
    main()
