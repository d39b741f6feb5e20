"""The engine flags: they fit beside those of every recipe, and a mistake gets one sentence."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from trl import GRPOConfig, ModelConfig, SFTConfig, TrlParser

from zerosearch.engines.bm25 import BM25Engine
from zerosearch.engines.options import EngineOptions, make_engine
from zerosearch.errors import UserError
from zerosearch.rollout import RolloutSettings

pytest_plugins = ("recipe_modules",)  # fixtures


def parsed(*flags: str) -> EngineOptions:
    return TrlParser(EngineOptions).parse_args_and_config([*flags])[0]


def test_no_flag_is_one_of_anothers() -> None:
    others = {field.name for kind in (GRPOConfig, ModelConfig, SFTConfig, RolloutSettings) for field in fields(kind)}
    assert not others & {field.name for field in fields(EngineOptions)}


def test_every_flag_says_what_it_is_for() -> None:
    assert all(field.metadata["help"].endswith(".") for field in fields(EngineOptions))


def test_bm25_by_its_flags(corpus: Path) -> None:
    engine = make_engine(parsed("--engine", "bm25", "--corpus", str(corpus), "--num_documents", "2"), "")
    assert isinstance(engine, BM25Engine)
    assert len(engine.lookup("Hampshire")) == 2


MISTAKES = {
    "no such engine": ({"engine": "altavista"}, "engine is 'altavista': it must be one of simulated, bm25"),
    "no corpus": ({"engine": "bm25"}, "--engine bm25 needs --corpus"),
    "no documents": ({"num_documents": 0}, "num_documents is 0: it must be at least 1"),
    "no simulator": ({"simulator_url": "http://127.0.0.1:9/v1"}, "no simulator answers at http://127.0.0.1:9/v1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(mistake: str) -> None:
    values, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        make_engine(EngineOptions(**values), "")
