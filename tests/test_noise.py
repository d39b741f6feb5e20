"""Eq. 1 at given steps, and the coin that rank, order and resume cannot move."""

from __future__ import annotations

import math

import pytest

from zerosearch.errors import UserError
from zerosearch.noise import NoiseSchedule, keyed_uniform


@pytest.mark.parametrize(
    ("step", "p_noise"), [(1, 0.0011), (50, 0.0678), (101, 0.1655), (150, 0.2975), (202, 0.4955), (203, 0.5)]
)
def test_the_papers_schedule_from_0_to_a_half_in_203_steps(step: int, p_noise: float) -> None:
    assert NoiseSchedule(0.0, 0.5).p_noise(step, 203) == pytest.approx(p_noise, abs=5e-5)


def test_a_schedule_starts_anywhere_and_may_fall() -> None:
    # Half way, 4**0.5 = 2 makes a third of the distance.
    assert NoiseSchedule(0.25, 0.5).p_noise(100, 200) == pytest.approx(0.25 + 0.25 / 3)
    assert NoiseSchedule(0.75, 0.0).p_noise(100, 200) == pytest.approx(0.5)


def test_equal_ends_make_it_constant() -> None:
    assert [NoiseSchedule(0.5, 0.5).p_noise(step, 10) for step in (1, 5, 10)] == [0.5, 0.5, 0.5]


def test_base_1_is_a_straight_line() -> None:
    assert NoiseSchedule(0.0, 1.0, base=1.0).p_noise(3, 4) == 0.75
    assert NoiseSchedule(0.0, 1.0, base=1.0001).p_noise(3, 4) == pytest.approx(0.75, abs=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-0.1, 0.5), "noise start is -0.1: a probability lies in"),
        ((0.0, 1.5), "noise end is 1.5"),
        ((math.nan, 0.5), "noise start is nan"),
        ((0.0, math.inf), "noise end is inf"),
        *[((0.0, 0.5, base), "noise base is") for base in (0.5, -4.0, math.nan, math.inf)],
    ],
)
def test_values_outside_their_range_are_refused(values: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NoiseSchedule(*values)


@pytest.mark.parametrize("step", [0, 204, -1])
def test_a_step_outside_the_run_is_a_defect(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} is outside 1 to 203"):
        NoiseSchedule(0.0, 0.5).p_noise(step, 203)


# Golden values: another Python, machine or process must toss the same coins.
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ((0, 1, 2, 3, 4), 0.3164986664010898),
        ((0, 1, 2, 3, 5), 0.3278087897849027),
        ((0, 1, 2, 34, 5), 0.3826469491330403),
        ((-1,), 0.12242465709327277),
        ((2**70, 7), 0.3476820507548515),
    ],
)
def test_keyed_uniform_is_stable(key: tuple[int, ...], value: float) -> None:
    assert keyed_uniform(*key) == value


def test_keyed_uniform_tells_keys_apart_that_join_alike() -> None:
    assert len({keyed_uniform(1, 23), keyed_uniform(12, 3), keyed_uniform(123), keyed_uniform(1, 2, 3)}) == 4


def test_keyed_uniform_fills_the_unit_interval_evenly() -> None:
    values = [keyed_uniform(0, step, row) for step in range(40) for row in range(50)]
    assert all(0.0 <= value < 1.0 for value in values)
    for tenth in range(10):
        share = sum(tenth / 10 <= value < (tenth + 1) / 10 for value in values) / len(values)
        assert share == pytest.approx(0.1, abs=0.02)


def test_keyed_uniform_refuses_a_key_that_is_no_integer() -> None:
    with pytest.raises(TypeError):
        keyed_uniform(0, 1.5)  # type: ignore[arg-type]
