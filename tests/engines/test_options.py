"""The engine flags: they fit beside those of every recipe, and a mistake gets one sentence."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from pathlib import Path

import pytest
from retriever_parts import serving
from trl import GRPOConfig, ModelConfig, SFTConfig

from zerosearch.command_line import parse
from zerosearch.engines import SearchError, SearchRequest, SearchResult
from zerosearch.engines.bm25 import BM25Engine, BM25Index
from zerosearch.engines.cache import CachedEngine
from zerosearch.engines.google import GoogleEngine
from zerosearch.engines.options import EngineOptions, make_engine
from zerosearch.engines.search_api import SearchAPIEngine
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.errors import UserError
from zerosearch.rollout.loop import RolloutSettings


def parsed(*flags: str) -> EngineOptions:
    return parse(EngineOptions, argv=flags)[0]


def test_no_flag_is_one_of_anothers() -> None:
    others = {field.name for kind in (GRPOConfig, ModelConfig, SFTConfig, RolloutSettings) for field in fields(kind)}
    assert not others & {field.name for field in fields(EngineOptions)}


def test_every_flag_says_what_it_is_for() -> None:
    assert all(field.metadata["help"].endswith(".") for field in fields(EngineOptions))


def test_bm25_by_its_flags_with_a_kept_index_a_cache_and_the_price_of_the_machine(
    corpus: Path, tmp_path: Path
) -> None:
    flags = ("--engine", "bm25", "--corpus", str(corpus), "--index_dir", str(tmp_path / "index"))
    more = ("--num_documents", "2", "--engine_usd_per_hour", "1.5", "--search_cache", str(tmp_path / "c.sqlite"))
    engine = make_engine(parsed(*flags, *more), "")
    assert isinstance(engine, CachedEngine) and isinstance(engine.engine, BM25Engine)
    assert (tmp_path / "index/zerosearch.json").is_file() and engine.account.usd_per_hour == 1.5
    result = asyncio.run(engine.search(SearchRequest("Hampshire", "Q?", ("a",))))
    assert len(result.documents) == 2 and engine.account.queries == 1


def test_google_by_its_flags(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    flags = ("--google_provider", "serper", "--google_max_usd", "2.5", "--google_queries_per_s", "50")
    options = parsed("--engine", "google", "--google_key_file", str(tmp_path / "key"), *flags)
    engine = make_engine(options, "")
    assert isinstance(engine, GoogleEngine)
    assert (engine.provider, engine.account.max_usd, engine.num_documents) == ("serper", 2.5, 5)
    assert engine.api.url == "https://google.serper.dev/search"
    assert "secret" not in repr(options)


def test_a_described_service_by_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAVILY_API_KEY", "tvly")
    options = parsed("--engine", "api", "--api", "recipes/engines/tavily.yaml", "--num_documents", "3")
    engine = make_engine(options, "")
    assert isinstance(engine, SearchAPIEngine)
    assert (engine.name, engine.key, engine.num_documents) == ("tavily", "tvly", 3)


def test_a_retriever_by_its_flags(corpus: Path) -> None:
    with serving(BM25Index(corpus)) as address:
        flags = ("--engine", "retriever", "--retriever_url", address, "--retriever_protocol", "zerosearch")
        engine = make_engine(parsed(*flags), "")
        result = asyncio.run(engine.search(SearchRequest("village", "Q?", ("a",))))
    assert result.documents[0].startswith("Jane Austen was born")


def test_cached_answers_of_a_simulator_need_no_server(tmp_path: Path) -> None:
    cache = str(tmp_path / "c.sqlite")
    request = SearchRequest("Emma author", "Who wrote Emma?", ("Jane Austen",), key=(0, 0, 0, 0, 0))

    class Written(SimulatedEngine):
        """A simulator as if it had been asked already: its model is known, and it writes without a server."""

        async def search(self, request: SearchRequest) -> SearchResult:
            return SearchResult(("Emma is by Jane Austen.",), noisy=False)

    recording = CachedEngine(cache, Written(model="3B", template="ask"))
    asyncio.run(recording.search(request))
    flags = ("--search_cache", cache, "--search_cache_only", "--simulator_url", "http://127.0.0.1:9/v1")
    engine = make_engine(parsed(*flags), "ask")
    assert isinstance(engine, CachedEngine) and engine.identity()["model"] == "3B"
    assert asyncio.run(engine.search(request)).documents == ("Emma is by Jane Austen.",)
    with pytest.raises(UserError, match="name the model of simulated"):
        make_engine(parsed(*flags), "another prompt")


def test_cached_answers_of_google_need_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SERPAPI_API_KEY", "SER_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    CachedEngine(tmp_path / "c.sqlite", GoogleEngine("key"))
    flags = ("--engine", "google", "--search_cache", str(tmp_path / "c.sqlite"), "--search_cache_only")
    engine = make_engine(parsed(*flags), "")
    with pytest.raises(SearchError, match="holds no answer of google"):
        asyncio.run(engine.search(SearchRequest("Emma", "Q?", ("a",))))


MISTAKES = {
    "no corpus": (["--engine", "bm25"], "--engine bm25 needs --corpus"),
    "no documents": (["--num_documents", "0"], "num_documents is 0: it must be at least 1"),
    "no simulator": (["--simulator_url", "http://127.0.0.1:9/v1"], "no simulator answers at http://127.0.0.1:9/v1"),
    "no retriever": (
        ["--engine", "retriever", "--retriever_url", "http://127.0.0.1:9/retrieve"],
        "no retriever answers at http://127.0.0.1:9/retrieve",
    ),
    "no key": (["--engine", "google"], "serpapi needs a key: set SERPAPI_API_KEY, or pass --google_key_file"),
    "no description": (["--engine", "api"], "--engine api needs --api, a YAML file that describes the service"),
    "no file": (["--engine", "api", "--api", "none.yaml"], "none.yaml does not describe a search service: FileNotF"),
    "no rate": (["--google_queries_per_s", "0"], "google_queries_per_s is 0.0: it must be above 0"),
    "negative money": (["--google_max_usd", "-1"], "google_max_usd is -1.0: it must be at least 0"),
    "nothing to answer from": (["--search_cache_only"], "--search_cache_only needs --search_cache"),
    "no cache": (
        ["--engine", "google", "--search_cache", "/no/such.sqlite", "--search_cache_only"],
        "there is no cache /no/such.sqlite",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SERPAPI_API_KEY", "SER_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    flags, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        make_engine(parsed(*flags), "")


def test_an_engine_of_another_name_is_not_taken_for_a_simulator() -> None:
    with pytest.raises(UserError, match="engine is 'bing': it must be one of simulated, bm25"):
        make_engine(EngineOptions(engine="bing"), "")  # type: ignore[arg-type]
