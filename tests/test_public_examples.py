"""The examples in the docstrings of what users import: there are some of every name, and they run as they stand."""

from __future__ import annotations

import asyncio
import doctest
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from chat_server import ChatServer
from jsonl_files import write_rows
from recipe_modules import ROOT
from retriever_parts import serving

import zerosearch
from zerosearch.data import load_questions
from zerosearch.engines.bm25 import BM25Index
from zerosearch.environment import SearchEnvironment

ROW = {"question": "Where does Karin Rowe hail from?", "golden_answers": ["Port Elsford"]}
FACTS = ["Karin Rowe hails from Port Elsford.", "Port Elsford lies in Istria."]


@pytest.mark.slow
def test_every_public_name_has_an_example_that_runs(
    chat_server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("deepspeed"):
        import_module("deepspeed")  # which says on standard output, when it is first imported, what it runs on
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(ROOT / "data")
    corpus = write_rows(Path("corpus.jsonl"), [{"id": fact, "contents": f"\n{fact}"} for fact in FACTS])
    write_rows(Path("questions.jsonl"), [ROW])
    chat_server.write = lambda messages: "\n".join(f"Doc {place}: {fact}" for place, fact in enumerate(FACTS, 1))
    public = {name: getattr(zerosearch, name) for name in zerosearch.HOMES}
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DebugRunner(optionflags=doctest.ELLIPSIS)
    found = [finder.find(value, name)[0] for name, value in public.items()]
    found += finder.find(SearchEnvironment, "SearchEnvironment")
    shown = {word for each in found for one in each.examples for word in re.findall(r"\w+", one.source)}
    assert public.keys() <= shown
    with serving(BM25Index(corpus)) as retriever_url:
        given = {"asyncio": asyncio, "load_questions": load_questions, "Path": Path}
        given |= {"retriever_url": retriever_url, "simulator_url": chat_server.url}
        for example in found:
            example.globs = {**public, **given}
            runner.run(example)  # raises at the first line that is not as written
