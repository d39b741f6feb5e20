"""A search request carries what its engine needs to be fair and repeatable."""

from __future__ import annotations

import pytest

from zerosearch.engines import SearchRequest


@pytest.mark.parametrize("p_noise", [-0.1, 1.1, float("nan")])
def test_noise_outside_0_to_1_is_refused(p_noise: float) -> None:
    with pytest.raises(ValueError, match="a probability lies in"):
        SearchRequest("q", "Q?", ("a",), p_noise=p_noise, key=(0,))


def test_a_coin_needs_a_key_and_certainty_does_not() -> None:
    with pytest.raises(ValueError, match="p_noise needs a key"):
        SearchRequest("q", "Q?", ("a",), p_noise=0.5)
    assert SearchRequest("q", "Q?", ("a",), p_noise=1.0).p_noise == 1.0
