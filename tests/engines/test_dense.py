"""Dense indices over a tiny sentence-transformers model with random weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonl_files import rows_of
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from zerosearch.engines.dense import DenseIndex, DenseOptions, recall_against_flat
from zerosearch.errors import UserError

faiss = pytest.importorskip("faiss", reason="faiss is not installed: pip install 'zerosearch[dense]'")
sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

WORDS = "emma jane austen novel rain village county england born lies south wrote".split()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a shared core take minutes for what takes one a second."""
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


@pytest.fixture(scope="module")
def model_dir(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model of E5's form: BERT, mean pooling, vectors of length 1."""
    directory = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    BertModel(config).save_pretrained(directory / "bert")
    tiny_tokenizer.save_pretrained(directory / "bert")
    modules = sentence_transformers.sentence_transformer.modules
    parts = [
        modules.Transformer(str(directory / "bert")),
        modules.Pooling(32, pooling_mode="mean"),
        modules.Normalize(),
    ]
    sentence_transformers.SentenceTransformer(modules=parts).save(str(directory / "model"))
    return directory / "model"


@pytest.fixture(scope="module")
def passages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a corpus of 600 passages, all different."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("dense") / "corpus.jsonl"
    with path.open("w") as file:
        for number in range(600):
            words = " ".join(rng.choice(WORDS, 6))
            file.write(json.dumps({"id": str(number), "contents": f'"T{number}"\n{number} {words}'}) + "\n")
    return path


def settings(model_dir: Path, **changes: Any) -> DenseOptions:
    return DenseOptions(model=str(model_dir), max_tokens=64, **changes)


@pytest.fixture(scope="module")
def flat(model_dir: Path, passages: Path, tmp_path_factory: pytest.TempPathFactory) -> DenseIndex:
    return DenseIndex(passages, tmp_path_factory.mktemp("flat") / "index", settings(model_dir))


def vectors_of(texts: list[str], model_dir: Path) -> np.ndarray:
    """Encode by the model itself, and set to length 1."""
    model = sentence_transformers.SentenceTransformer(str(model_dir))
    model.max_seq_length = 64
    vectors = model.encode(texts, batch_size=16)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_flat_is_exact_and_uses_e5_s_prefixes(flat: DenseIndex, model_dir: Path, passages: Path) -> None:
    rows = rows_of(passages)
    table = vectors_of([f"passage: {row['contents']}" for row in rows], model_dir)
    queries = ["emma novel", "rain in england", "who wrote it"]
    scores = vectors_of([f"query: {query}" for query in queries], model_dir) @ table.T
    for found, exact in zip(flat.find(queries, 5), scores, strict=True):
        assert [score for _, score in found] == pytest.approx(np.sort(exact)[::-1][:5].tolist(), abs=1e-5)
        numbers = [rows.index(flat.row(start)) for start, _ in found]
        assert [exact[number] for number in numbers] == pytest.approx([score for _, score in found], abs=1e-5)
    assert flat.recall == 1.0


def test_a_passage_finds_itself(model_dir: Path, passages: Path, tmp_path: Path) -> None:
    index = DenseIndex(passages, tmp_path / "index", settings(model_dir, query_prefix="passage: "))
    contents = [json.loads(line)["contents"] for line in passages.open()]
    found = index.find([contents[3], contents[400]], 1)
    assert [index.row(start)["id"] for ((start, _),) in found] == ["3", "400"]


@pytest.mark.slow
@pytest.mark.parametrize(("factory", "at_least"), [("SQ8", 0.9), ("IVF8,PQ8x4", 0.05)])
def test_compressed_says_what_it_finds(
    factory: str, at_least: float, flat: DenseIndex, model_dir: Path, passages: Path, tmp_path: Path
) -> None:
    index = DenseIndex(passages, tmp_path / "index", settings(model_dir, factory=factory, num_probes=8))
    assert index.manifest["index_mib"] < flat.manifest["index_mib"]
    recall = index.recall
    assert recall is not None and at_least < recall < 1.0
    # Against flat itself, with other queries: the same within what a few hundred queries tell.
    queries = [" ".join(np.random.default_rng(seed).choice(WORDS, 5)) for seed in range(100)]
    exact, found = flat.find(queries, 5), index.find(queries, 5)
    shared = [len({n for n, _ in a} & {n for n, _ in b}) / 5 for a, b in zip(exact, found, strict=True)]
    assert sum(shared) / 100 == pytest.approx(recall, abs=0.25)


def test_recall_counts_what_is_missing() -> None:
    vectors = np.eye(64, dtype=np.float32)[np.arange(256) % 64] + np.random.default_rng(0).normal(0, 0.1, (256, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    whole = faiss.IndexFlatIP(64)
    whole.add(vectors)
    assert recall_against_flat(whole, vectors) == {"1": 1.0}
    half = faiss.IndexFlatIP(64)
    half.add(vectors[:128])  # knows two of the four passages of each kind
    assert recall_against_flat(half, vectors, depth=4) == {"1": pytest.approx(0.5, abs=0.02)}


def test_fewer_probes_find_less_and_need_no_other_index(model_dir: Path, passages: Path, tmp_path: Path) -> None:
    made, recalls = [], []
    for probes in (1, 4, 16, 3):
        index = DenseIndex(passages, tmp_path / "index", settings(model_dir, factory="IVF16,Flat", num_probes=probes))
        assert faiss.extract_index_ivf(index.index).nprobe == index.identity()["num_probes"] == probes
        made.append((tmp_path / "index/data/index.faiss").stat().st_mtime_ns)
        recalls.append(index.recall)
    assert len(set(made)) == 1
    assert recalls[0] is not None and recalls[1] is not None
    assert recalls[0] < recalls[1] < recalls[2] == 1.0
    assert recalls[3] is None, "three probes were not measured"


def test_an_index_is_kept_and_another_setting_makes_another(model_dir: Path, passages: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    first = DenseIndex(passages, folder, settings(model_dir))
    made = (folder / "data/index.faiss").stat().st_mtime_ns
    again = DenseIndex(passages, folder, settings(model_dir))
    assert (folder / "data/index.faiss").stat().st_mtime_ns == made
    assert again.find(["emma"], 3) == first.find(["emma"], 3)
    DenseIndex(passages, folder, settings(model_dir, factory="SQ8"))
    assert (folder / "data/index.faiss").stat().st_mtime_ns != made
    assert not list(folder.rglob("*.tmp"))


def test_an_index_that_exists_is_used_as_it_is(
    flat: DenseIndex, model_dir: Path, passages: Path, tmp_path: Path
) -> None:
    table = np.stack([flat.index.reconstruct(number) for number in range(600)])
    theirs = faiss.IndexFlatIP(32)
    theirs.add(table)
    faiss.write_index(theirs, str(tmp_path / "e5_Flat.index"))
    theirs_too = settings(model_dir, faiss_index=str(tmp_path / "e5_Flat.index"))
    index = DenseIndex(passages, tmp_path / "index", theirs_too)
    assert index.find(["emma novel"], 5) == flat.find(["emma novel"], 5)
    assert not (tmp_path / "index/data/index.faiss").exists()

    other = faiss.IndexFlatIP(32)
    other.add(table[:10])
    faiss.write_index(other, str(tmp_path / "ten.index"))
    (tmp_path / "odd.index").write_bytes(b"IxFI" + bytes(range(200)))
    for name, message in (
        ("ten.index", r"ten.index holds 10 vectors of 32 numbers; the corpus has 600 passages"),
        ("none.index", "there is no FAISS index"),
        ("odd.index", "FAISS cannot read the index"),
    ):
        with pytest.raises(UserError, match=message):
            DenseIndex(passages, tmp_path / name[:4], settings(model_dir, faiss_index=str(tmp_path / name)))
    assert not (tmp_path / "none").exists()  # refused before the corpus is read


def test_an_index_that_is_cut_while_it_is_mapped_fails_the_search_and_not_the_process(
    model_dir: Path, passages: Path, tmp_path: Path
) -> None:
    mapped = settings(model_dir, factory="IVF8,Flat")  # FAISS loads a flat one
    index = DenseIndex(passages, tmp_path / "index", mapped)
    os.truncate(tmp_path / "index/data/index.faiss", 100)
    with pytest.raises(UserError, match=r"index\.faiss has changed since it was opened; start again to index it"):
        index.find(["emma"], 5)
    assert len(DenseIndex(passages, tmp_path / "index", mapped).find(["emma"], 5)[0]) == 5


@pytest.mark.parametrize("name", ["index.faiss", "starts.npy"])
def test_damage_that_keeps_size_and_time_is_one_sentence(
    name: str, model_dir: Path, passages: Path, tmp_path: Path
) -> None:
    path = tmp_path / "index/data" / name
    DenseIndex(passages, tmp_path / "index", settings(model_dir))
    status, content = path.stat(), bytearray(path.read_bytes())
    content[:16] = b"x" * 16
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=r"the index in .*/index is damaged|FAISS cannot read the index .* remove it"):
        DenseIndex(passages, tmp_path / "index", settings(model_dir))


def test_mistakes_get_one_sentence(model_dir: Path, passages: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    with pytest.raises(UserError, match="FAISS makes no index 'Flatt' of 32 dimensions"):
        DenseIndex(passages, folder, settings(model_dir, factory="Flatt"))
    with pytest.raises(UserError, match="FAISS cannot learn IVF4096,PQ8 from 600"):
        DenseIndex(passages, folder, settings(model_dir, factory="IVF4096,PQ8"))
    with pytest.raises(UserError, match="the model '/no/such/model' is no folder here"):
        DenseIndex(passages, folder, DenseOptions(model="/no/such/model"))
    assert not (folder / "data").exists()
