"""A dense index: passages as vectors of a sentence-transformers model, searched by FAISS.

Flat is exact and takes 4 bytes a dimension and passage. A compressed index, such as "SQ8" or "IVF4096,PQ64", takes
less and finds less: its recall against flat is measured when it is built, and kept in the manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from zerosearch.engines.corpus import DATA, Found, PassageFile, built_index, index_identity, read_corpus
from zerosearch.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

BLOCK_PASSAGES = 8192  # passages in memory at once while they are encoded
TRAINING_VECTORS = 200_000  # a compressed index learns its codes from so many at most
RECALL_QUERIES = 500
RECALL_DEPTH = 5  # documents a search (Section 4)
SEED = 0  # of the passages that recall is measured with


@dataclass(frozen=True)
class DenseSettings:
    """How passages become vectors, and how these are kept. The defaults are those of Search-R1's E5.

    `factory` is FAISS's name for an index; `num_probes` counts the cells that a query looks into, where it has cells.
    """

    model: str = "intfloat/e5-base-v2"
    factory: str = "Flat"
    num_probes: int = 32
    query_prefix: str = "query: "
    passage_prefix: str = "passage: "
    max_tokens: int = 256


class DenseIndex:
    """Vectors of every passage of a corpus. `manifest` says what it was built from, and its recall against flat.

    `faiss_index` is an existing index with the vectors of the corpus in its order, such as Search-R1's e5_Flat.index:
    it is used as it is, and `index_dir` keeps only where each passage starts.
    Raises `UserError` for a missing package, model or corpus, and for a factory that FAISS does not know.
    """

    def __init__(
        self,
        corpus: str | Path,
        index_dir: str | Path,
        settings: DenseSettings | None = None,
        *,
        faiss_index: str | Path | None = None,
        batch_size: int = 64,
    ) -> None:
        for package in ("faiss", "sentence_transformers"):
            if find_spec(package) is None:
                raise UserError(
                    f"a dense index needs {package}, which is not installed: pip install 'zerosearch[dense]'"
                )
        self.settings, self.batch_size = settings or DenseSettings(), batch_size
        corpus, folder = Path(corpus), Path(index_dir)
        self.model = _load_model(self.settings)
        dimensions = self.model.get_embedding_dimension() or 0
        described = {"kind": "dense", **vars(self.settings)}
        del described["num_probes"]  # which belongs to a search: other probes need no other index
        if faiss_index is None:
            _empty_index(self.settings, dimensions)  # a wrong factory is refused before hours of encoding
        else:
            described["faiss_index"] = str(Path(faiss_index).resolve())
        build = self._build if faiss_index is None else _starts
        self.manifest = built_index(corpus, folder, described, lambda data: build(corpus, data))
        path = folder / DATA / "index.faiss" if faiss_index is None else Path(faiss_index)
        self.index = _read(path)
        _set_probes(self.index, self.settings.num_probes)
        self.passages = PassageFile(corpus, self.manifest["corpus_bytes"])
        self.starts = np.load(folder / DATA / "starts.npy")  # (passages,)
        if self.index.ntotal != len(self.starts):
            raise UserError(f"{path} holds {self.index.ntotal:,} vectors, {corpus} {len(self.starts):,} passages")
        if self.index.d != dimensions:
            raise UserError(f"{path} holds vectors of {self.index.d} numbers, the model makes {dimensions}")

    def identity(self) -> dict[str, Any]:
        """Return what its results depend on."""
        return {**index_identity(self.manifest), "num_probes": self.settings.num_probes}

    @property
    def recall(self) -> float | None:
        """Return the recall against flat with these probes; `None` if it was not measured with as many."""
        return self.manifest.get("recall_against_flat", {}).get(str(_set_probes(self.index, self.settings.num_probes)))

    def search(self, queries: Sequence[str], count: int) -> list[Found]:
        """Return the `count` passages nearest to each query with their inner products, best first."""
        if not queries:
            return []
        vectors = self._encode([self.settings.query_prefix + query for query in queries])
        scores, numbers = self.index.search(vectors, min(count, len(self.starts)))
        return [
            [(int(self.starts[number]), float(score)) for number, score in zip(*found, strict=True) if number >= 0]
            for found in zip(numbers, scores, strict=True)
        ]

    def _encode(self, texts: list[str]) -> np.ndarray:
        """Return vectors of length 1; (texts, dimensions)."""
        vectors = self.model.encode(
            texts, batch_size=self.batch_size, normalize_embeddings=True, show_progress_bar=False
        )
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def _build(self, corpus: Path, folder: Path) -> dict[str, Any]:
        """Write the index into `folder` and return what its manifest says."""
        starts: list[int] = []
        with (folder / "vectors.tmp").open("wb") as file:
            for block_starts, block in self._encoded(corpus):
                starts += block_starts
                block.tofile(file)
        if not starts:
            raise UserError(f"the corpus {corpus} holds no texts")
        vectors = np.memmap(folder / "vectors.tmp", np.float32, "r").reshape(len(starts), -1)
        facts = self._write_index(vectors, folder)
        (folder / "vectors.tmp").unlink()
        return facts | _save_starts(starts, folder)

    def _encoded(self, corpus: Path) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield where passages start and their vectors, block by block. A row without a text is left out."""
        passages = ((start, passage) for start, passage in read_corpus(corpus) if passage.text)
        with tqdm(desc="encoding", unit=" passages") as bar:
            while block := list(islice(passages, BLOCK_PASSAGES)):
                # As Search-R1's index has them: the row's contents, title in quotes.
                contents = (f'"{one.title}"\n{one.text}' if one.title else one.text for _, one in block)
                texts = [self.settings.passage_prefix + content for content in contents]
                yield [start for start, _ in block], self._encode(texts)
                bar.update(len(block))

    def _write_index(self, vectors: np.ndarray, folder: Path) -> dict[str, Any]:
        """Write the FAISS index of vectors (passages, dimensions); return its size and its recall against flat."""
        import faiss

        index = _empty_index(self.settings, vectors.shape[1])
        if not index.is_trained:
            step = -(-len(vectors) // TRAINING_VECTORS)
            try:
                index.train(np.ascontiguousarray(vectors[::step]))
            except RuntimeError as error:
                learning = f"FAISS cannot learn {self.settings.factory} from {len(vectors):,}"
                raise UserError(f"{learning}: {_last_line(error)}") from None
        for first in range(0, len(vectors), BLOCK_PASSAGES):
            index.add(np.ascontiguousarray(vectors[first : first + BLOCK_PASSAGES]))
        try:
            faiss.write_index(index, str(folder / "index.faiss"))
        except RuntimeError as error:  # a full disk
            raise OSError(_last_line(error)) from error
        cells = _cells(index)
        most = 1 if cells is None else int(cells.nlist)
        probes = {_set_probes(index, wanted) for wanted in (*(2**power for power in range(most.bit_length())), most)}
        probes.add(_set_probes(index, self.settings.num_probes))
        recalls = {}
        for num_probes in sorted(probes):
            _set_probes(index, num_probes)
            recalls[str(num_probes)] = recall_against_flat(index, vectors)
        size_mib = (folder / "index.faiss").stat().st_size / 2**20
        logger.info("dense index %s: %.1f MiB, recall by probes %s", self.settings.factory, size_mib, recalls)
        return {"index_mib": round(size_mib, 2), "recall_against_flat": recalls, "recall_depth": RECALL_DEPTH}


def recall_against_flat(index: Any, vectors: np.ndarray, depth: int = RECALL_DEPTH) -> float:
    """Return the share of the `depth` nearest passages, by exact search, that `index` finds among its `depth` best.

    Asked with vectors of passages of the corpus, each moved a little, as there are no queries yet.
    """
    import faiss

    rng = np.random.default_rng(SEED)
    chosen = np.sort(rng.choice(len(vectors), min(RECALL_QUERIES, len(vectors)), replace=False))
    queries = vectors[chosen] + rng.normal(0, 0.3 / np.sqrt(vectors.shape[1]), (len(chosen), vectors.shape[1]))
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    depth = min(depth, len(vectors))
    _, exact = faiss.knn(queries, vectors, depth, metric=faiss.METRIC_INNER_PRODUCT)
    _, found = index.search(queries, depth)
    hits = sum(len(set(best) & set(approximate)) for best, approximate in zip(exact, found, strict=True))
    return hits / exact.size


def _empty_index(settings: DenseSettings, dimensions: int) -> Any:
    import faiss

    try:
        return faiss.index_factory(dimensions, settings.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        refusal = f"FAISS makes no index {settings.factory!r} of {dimensions} dimensions"
        raise UserError(f"{refusal}: {_last_line(error)}") from None


def _starts(corpus: Path, folder: Path) -> dict[str, Any]:
    """Write where each passage starts, for an existing FAISS index, which has a vector for every row."""
    return _save_starts([start for start, _ in read_corpus(corpus)], folder)


def _save_starts(starts: list[int], folder: Path) -> dict[str, Any]:
    np.save(folder / "starts.npy", np.array(starts, dtype=np.int64))
    return {"num_passages": len(starts)}


def _cells(index: Any) -> Any:
    """Return the part of an index that has cells, or `None`."""
    import faiss

    try:
        return faiss.extract_index_ivf(index)
    except RuntimeError:
        return None


def _set_probes(index: Any, num_probes: int) -> int:
    """Let a query look into `num_probes` cells, or as many as there are; return how many. 1 for an index without."""
    cells = _cells(index)
    if cells is None:
        return 1
    cells.nprobe = min(num_probes, cells.nlist)
    return int(cells.nprobe)


def _read(path: Path) -> Any:
    """Open an index where it lies: it is mapped, not loaded, as far as its kind admits that."""
    import faiss

    if not path.is_file():
        raise UserError(f"there is no FAISS index {path}")
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        raise UserError(f"FAISS cannot read the index {path}: {_last_line(error)}") from None


def _last_line(error: RuntimeError) -> str:
    """Return what FAISS says, without its trace."""
    return str(error).splitlines()[-1][-200:]


def _load_model(settings: DenseSettings) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(settings.model)
    except (OSError, ValueError) as error:
        message = f"the model {settings.model!r} is no folder here and cannot be loaded from the Hub: {error}"
        raise UserError(message[:500]) from error
    model.max_seq_length = min(settings.max_tokens, model.max_seq_length or settings.max_tokens)
    return model
