"""A dense index: passages as vectors of a sentence-transformers model, searched by FAISS.

Flat is exact and takes 4 bytes a dimension and passage. A compressed index, such as "SQ8" or "IVF4096,PQ64", takes
less and finds less: its recall against flat is measured when it is built, and kept in the manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from zerosearch.engines.corpus import Found, PassageIndex, UnchangedFile, read_corpus
from zerosearch.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

BLOCK_PASSAGES = 1024  # passages in memory at once while they are encoded; the bar moves with each block
TRAINING_VECTORS = 200_000  # a compressed index learns its codes from so many at most
RECALL_QUERIES, RECALL_DEPTH = 500, 5  # the depth is that of a search (Section 4)
RECALL_PROBES = [2**power for power in range(15)]  # to measure recall with, as far as there are cells
SEED = 0  # of the passages that recall is measured with


@dataclass(frozen=True)
class DenseOptions:
    """How passages become vectors, and how these are kept. The defaults are those of Search-R1's E5."""

    model: str = field(default="intfloat/e5-base-v2", metadata={"help": "For dense: a sentence-transformers model."})
    factory: str = field(
        default="Flat", metadata={"help": "For dense: FAISS's name of the index: Flat, SQ8, IVF4096,PQ64 ..."}
    )
    num_probes: int = field(default=32, metadata={"min": 1, "help": "For dense, IVF: cells that a query looks into."})
    query_prefix: str = field(default="query: ", metadata={"help": "For dense: what the model wants before a query."})
    passage_prefix: str = field(default="passage: ", metadata={"help": "For dense: the same, before a passage."})
    max_tokens: int = field(
        default=256, metadata={"min": 1, "help": "For dense: tokens that the model reads of each."}
    )
    faiss_index: str | None = field(
        default=None, metadata={"help": "For dense: an index that exists, such as Search-R1's e5_Flat.index."}
    )
    batch_size: int = field(default=64, metadata={"min": 1, "help": "For dense: texts that the model reads at once."})


class DenseIndex(PassageIndex):
    """Vectors of every passage of a corpus, mapped into memory as far as FAISS admits it for the kind of index.

    `faiss_index` is an existing index with the vectors of the corpus in its order: it is used as it is, and
    `index_dir` keeps only where each passage starts.
    Raises `UserError` for a missing package, model or corpus, and for a factory that FAISS does not know.
    """

    def __init__(self, corpus: str | Path, index_dir: str | Path, options: DenseOptions | None = None) -> None:
        for package in ("faiss", "sentence_transformers"):
            if find_spec(package) is None:
                message = f"a dense index needs {package}, which is not installed: pip install 'zerosearch[dense]'"
                raise UserError(message)
        self.options = options or DenseOptions()
        self.model = _load_model(self.options)
        dimensions = self.model.get_embedding_dimension() or 0
        settings = {"kind": "dense", **vars(self.options)}
        for belongs_to_search in ("num_probes", "batch_size"):
            del settings[belongs_to_search]
        path = self.options.faiss_index
        if path is None:
            del settings["faiss_index"]
            self._new_index(dimensions)  # a wrong factory is refused before hours of encoding
        elif not Path(path).is_file():  # before the corpus is read
            raise UserError(f"there is no FAISS index {path}")
        else:
            settings["faiss_index"] = str(Path(path).resolve())
        super().__init__(corpus, index_dir, settings)
        try:
            self.starts = np.load(self.data / "starts.npy")  # (passages,)
        except (ValueError, EOFError) as error:
            raise self.damaged(error) from error
        self.index = self._read(Path(path or self.data / "index.faiss"))
        self.num_probes = _set_probes(self.index, self.options.num_probes)
        if (self.index.ntotal, self.index.d) != (len(self.starts), dimensions):
            there = f"{self.index.ntotal:,} vectors of {self.index.d} numbers"
            wanted = f"the corpus has {len(self.starts):,} passages, the model makes {dimensions} numbers"
            raise UserError(f"{path or self.data} holds {there}; {wanted}")

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "num_probes": self.options.num_probes}

    @property
    def recall(self) -> float | None:
        """Return the recall against flat with these probes; `None` if it was not measured with as many."""
        return self.manifest.get("recall_against_flat", {}).get(str(self.num_probes))

    def find(self, queries: Sequence[str], count: int) -> list[Found]:
        """Return the `count` passages nearest to each query with their inner products, best first."""
        if not queries:
            return []
        vectors = self._encode([self.options.query_prefix + query for query in queries])
        self.check()
        scores, numbers = self.index.search(vectors, min(count, len(self.starts)))
        return [
            [(int(self.starts[number]), float(score)) for number, score in zip(*found, strict=True) if number >= 0]
            for found in zip(numbers, scores, strict=True)
        ]

    def build(self) -> dict[str, Any]:
        """Write the index, or for an existing one where each passage starts: it has a vector for every row."""
        if self.options.faiss_index is not None:
            return self._save_starts([start for start, _ in read_corpus(self.corpus)])
        starts: list[int] = []
        raw = self.data / "vectors.tmp"
        with raw.open("wb") as file:
            for block_starts, block in self._encoded_blocks():
                starts += block_starts
                block.tofile(file)
        if not starts:
            raise UserError(f"the corpus {self.corpus} holds no texts")
        facts = self._write_index(np.memmap(raw, np.float32, "r").reshape(len(starts), -1))
        raw.unlink()
        return facts | self._save_starts(starts)

    def _encode(self, texts: list[str]) -> np.ndarray:
        """Return vectors of length 1; (texts, dimensions)."""
        vectors = self.model.encode(
            texts, batch_size=self.options.batch_size, normalize_embeddings=True, show_progress_bar=False
        )
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def _encoded_blocks(self) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield where passages start and their vectors, block by block. A row without a text is left out."""
        passages = ((start, passage) for start, passage in read_corpus(self.corpus) if passage.text)
        with tqdm(desc="encoding", unit=" passages") as bar:
            while block := list(islice(passages, BLOCK_PASSAGES)):
                # As Search-R1's index has them: the row's contents, title in quotes.
                contents = (f'"{one.title}"\n{one.text}' if one.title else one.text for _, one in block)
                yield [start for start, _ in block], self._encode([self.options.passage_prefix + c for c in contents])
                bar.update(len(block))

    def _save_starts(self, starts: list[int]) -> dict[str, Any]:
        np.save(self.data / "starts.npy", np.array(starts, dtype=np.int64))
        return {"num_passages": len(starts)}

    def _new_index(self, dimensions: int) -> Any:
        import faiss

        factory = self.options.factory
        try:
            return faiss.index_factory(dimensions, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            message = f"FAISS makes no index {factory!r} of {dimensions} dimensions: {_last_line(error)}"
            raise UserError(message) from None

    def _write_index(self, vectors: np.ndarray) -> dict[str, Any]:
        """Write the FAISS index of vectors (passages, dimensions); return its size and its recall against flat."""
        import faiss

        index = self._new_index(vectors.shape[1])
        if not index.is_trained:
            step = -(-len(vectors) // TRAINING_VECTORS)
            try:
                index.train(np.ascontiguousarray(vectors[::step]))
            except RuntimeError as error:
                learning = f"FAISS cannot learn {self.options.factory} from {len(vectors):,}"
                raise UserError(f"{learning}: {_last_line(error)}") from None
        for first in range(0, len(vectors), BLOCK_PASSAGES):
            index.add(np.ascontiguousarray(vectors[first : first + BLOCK_PASSAGES]))
        path = self.data / "index.faiss"
        try:
            faiss.write_index(index, str(path))
        except RuntimeError as error:  # a full disk
            raise OSError(_last_line(error)) from error
        recalls = recall_against_flat(index, vectors, [*RECALL_PROBES, self.options.num_probes])
        size_mib = path.stat().st_size / 2**20
        logger.info("dense index %s: %.1f MiB, recall by probes %s", self.options.factory, size_mib, recalls)
        return {"index_mib": round(size_mib, 2), "recall_against_flat": recalls, "recall_depth": RECALL_DEPTH}

    def _read(self, path: Path) -> Any:
        import faiss

        self._index_files.append(UnchangedFile(path))
        try:
            return faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            raise UserError(
                f"FAISS cannot read the index {path} ({_last_line(error)}); remove it, and make it again"
            ) from error


def recall_against_flat(
    index: Any, vectors: np.ndarray, probes: Sequence[int] = (1,), depth: int = RECALL_DEPTH
) -> dict[str, float]:
    """Return, by number of probes, the share of the `depth` nearest passages that `index` finds among its best.

    Asked with vectors of passages of the corpus, each moved a little, as there are no queries yet. An index without
    cells counts as one probe.
    """
    import faiss

    rng = np.random.default_rng(SEED)
    chosen = np.sort(rng.choice(len(vectors), min(RECALL_QUERIES, len(vectors)), replace=False))
    queries = vectors[chosen] + rng.normal(0, 0.3 / np.sqrt(vectors.shape[1]), (len(chosen), vectors.shape[1]))
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    depth = min(depth, len(vectors))
    _, exact = faiss.knn(queries, vectors, depth, metric=faiss.METRIC_INNER_PRODUCT)
    recalls = {}
    for num_probes in sorted({_set_probes(index, wanted) for wanted in probes}):
        _set_probes(index, num_probes)
        _, found = index.search(queries, depth)
        hits = sum(len(set(best) & set(approximate)) for best, approximate in zip(exact, found, strict=True))
        recalls[str(num_probes)] = hits / exact.size
    return recalls


def _set_probes(index: Any, num_probes: int) -> int:
    """Let a query look into `num_probes` cells, or as many as there are; return how many. 1 for an index without."""
    import faiss

    cells = faiss.try_extract_index_ivf(index)
    if cells is None:
        return 1
    cells.nprobe = min(num_probes, cells.nlist)
    return int(cells.nprobe)


def _last_line(error: RuntimeError) -> str:
    """Return what FAISS says, without its trace."""
    return str(error).splitlines()[-1][-200:]


def _load_model(options: DenseOptions) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(options.model)
    except (OSError, ValueError) as error:
        message = f"the model {options.model!r} is no folder here and cannot be loaded from the Hub: {error}"
        raise UserError(message[:500]) from error
    model.max_seq_length = min(options.max_tokens, model.max_seq_length or options.max_tokens)
    return model
