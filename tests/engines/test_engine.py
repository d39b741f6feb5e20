"""A search request carries what its engine needs to be fair and repeatable."""

from __future__ import annotations

import pytest

from zerosearch.engines import SearchRequest, SearchResult, engine_identity


@pytest.mark.parametrize("p_noise", [-0.1, 1.1, float("nan")])
def test_noise_outside_0_to_1_is_refused(p_noise: float) -> None:
    with pytest.raises(ValueError, match="a probability lies in"):
        SearchRequest("q", "Q?", ("a",), p_noise=p_noise, key=(0,))


def test_a_coin_needs_a_key_and_certainty_does_not() -> None:
    with pytest.raises(ValueError, match="p_noise needs a key"):
        SearchRequest("q", "Q?", ("a",), p_noise=0.5)
    assert SearchRequest("q", "Q?", ("a",), p_noise=1.0).p_noise == 1.0


class Unnamed:
    """An engine of somebody's own, with nothing but what the protocol asks for."""

    name = "own"
    max_concurrency = 1

    async def search(self, request: SearchRequest) -> SearchResult:
        return SearchResult((request.query,))

    async def aclose(self) -> None: ...


class Described(Unnamed):
    def identity(self) -> dict[str, object]:
        return {"engine": "own", "edition": 2}


def test_an_engine_is_known_by_its_identity_or_else_its_name() -> None:
    assert engine_identity(Unnamed()) == {"engine": "own"}
    assert engine_identity(Described()) == {"engine": "own", "edition": 2}
