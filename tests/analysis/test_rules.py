"""One threshold for both sides, and opposite claims get opposite verdicts."""

import itertools

import pytest

from rbf_jax.analysis.claims import rules
from rbf_jax.analysis.claims.rules import HOLDS, IN_PART, NOT, OPEN

PARTS = (True, False, None)


def estimate(low, high, n=4):
    return {"mean": (low + high) / 2, "low": low, "high": high, "n": n, "missing": 0}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.011, 0.02, True),
        (0.001, 0.02, None),  # Above 0, not above what counts.
        (0.001, 0.009, False),
        (-0.02, 0.009, False),
        (-0.02, 0.011, None),
        (float("-inf"), float("inf"), None),  # One seed.
        (float("nan"), float("nan"), None),
    ],
)
def test_an_interval_is_on_one_side_of_the_margin_or_open(low, high, expected):
    assert rules.rises(estimate(low, high), 0.01) is expected
    assert rules.falls(estimate(-high, -low), 0.01) is expected


def test_without_a_seed_there_is_nothing_to_judge():
    for rule in (rules.rises, rules.falls):
        with pytest.raises(LookupError, match="all seeds diverged"):
            rule(estimate(0.0, 0.0, n=0), 0.01)


def test_numbers_without_intervals_have_their_range():
    assert rules.exceeds([1.3, 1.5], 1.2) is True
    assert rules.exceeds([1.1, 1.5], 1.2) is None
    assert rules.exceeds([1.0, 1.1], 1.2) is False


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([True, True], HOLDS),
        ([False, False], NOT),
        ([True, False], IN_PART),
        ([True, False, None], IN_PART),
        ([True, None], OPEN),
        ([False, None], OPEN),
        ([None], OPEN),
    ],
)
def test_verdicts_of_parts(parts, expected):
    assert rules.verdict(parts) == expected


def test_the_opposite_claim_gets_the_opposite_verdict():
    opposite = {HOLDS: NOT, NOT: HOLDS, IN_PART: IN_PART, OPEN: OPEN}
    for parts in itertools.product(PARTS, repeat=3):
        assert rules.verdict(map(rules.no, parts)) == opposite[rules.verdict(parts)]


def test_a_verdict_stands_however_open_parts_come_out():
    for parts in itertools.product(PARTS, repeat=3):
        choices = itertools.product(*((True, False) if p is None else (p,) for p in parts))
        outcomes = {rules.verdict(choice) for choice in choices}
        assert rules.verdict(parts) == (outcomes.pop() if len(outcomes) == 1 else OPEN)


def test_both():
    assert rules.both([True, True]) is True
    assert rules.both([True, None]) is None
    assert rules.both([None, False]) is False
