"""Means over few seeds, and what can be said of differences."""

import dataclasses

import numpy as np
import pytest

from configs.figures import scales
from rbf_jax.analysis import paired
from tests.harness.synthetic_records import make_record

CONFIG = scales.get_config("smoke").to_dict()


def test_interval_is_students():
    found = paired.estimate(np.array([1.0, 2.0, 3.0, 6.0]))
    # Standard error 1.0801, and 3.1824 is t's 97.5 % point of 3 degrees of freedom.
    assert (found.mean, found.n, found.missing) == (3.0, 4, 0)
    assert (found.low, found.high) == pytest.approx((3 - 3.43737, 3 + 3.43737), abs=1e-4)
    assert not found.is_clear
    assert paired.estimate(np.array([1.0, 1.1, 1.2])).is_clear


def test_diverged_seeds_are_counted_and_left_out():
    found = paired.estimate(np.array([1.0, np.nan, 2.0, np.inf]))
    assert (found.mean, found.n, found.missing) == (1.5, 2, 2)
    assert "2 diverged" in str(found)
    none = paired.estimate(np.array([np.nan]))
    assert none.n == 0
    assert str(none) == "diverged"


def test_one_seed_says_nothing_of_others():
    found = paired.estimate(np.array([1.0]))
    assert (found.low, found.high) == (-np.inf, np.inf)
    assert not found.is_clear


def test_pairing_takes_out_what_seeds_have_in_common():
    low, high = make_record("low", CONFIG), make_record("high", CONFIG, offset=0.05)
    found = paired.difference(high, low)
    # Seeds differ by 0.3 nats; their differences are all the same.
    assert (found.mean, found.low, found.high) == pytest.approx((0.05,) * 3)
    assert found.is_clear
    other = dataclasses.replace(low, seeds=(0, 1, 2, 4))
    with pytest.raises(ValueError, match="paired by seed"):
        paired.difference(high, other)


def test_best_loss_is_of_any_step_and_final_of_the_last():
    record = make_record("up", CONFIG)
    record.valid["loss"][-1] += 1
    assert (paired.loss(record) > paired.loss(record, "best") + 0.9).all()
    lost = make_record("lost", CONFIG, diverged=(1,))
    assert np.isnan(paired.loss(lost)[1])
    assert np.isfinite(paired.loss(lost, "best")).all()


def test_steps_saved():
    slow, fast = make_record("slow", CONFIG), make_record("fast", CONFIG, offset=-0.1)
    saved = paired.steps_saved(fast, slow)
    # 3 exp(-step / 40) = 3 exp(-200 / 40) + 0.1 at step 128.5, between evaluations at 120 and 140.
    assert 60 <= saved.mean <= 80
    assert paired.steps_saved(slow, fast).mean == -saved.mean
    assert paired.steps_saved(slow, slow).mean == 0
    lost = make_record("lost", CONFIG, diverged=(1,))
    assert paired.steps_saved(lost, slow).missing == 1
    assert paired.steps_saved(slow, lost).missing == 1


def test_a_curve_that_ends_flat_saves_nothing_by_a_hair():
    flat, lower = make_record("flat", CONFIG), make_record("lower", CONFIG)
    for record, hair in ((flat, 0.0), (lower, 1e-4)):
        record.valid["loss"][-4:] = record.valid["loss"][-4] - hair
    assert 0 <= paired.steps_saved(lower, flat).mean < 0.1


def test_spikes():
    record = make_record("spike", CONFIG)
    record.train["loss"][100, 2] += 3
    record.train["loss"][150:153, 0] += 3
    assert paired.spikes(record).tolist() == [3, 0, 1, 0]
    assert np.isnan(paired.spikes(make_record("lost", CONFIG, diverged=(3,)))[3])


def test_largest_gradient_norm_is_of_the_first_fifth():
    record = make_record("norms", CONFIG)
    record.train["grad_norm"][39, 1] = 50
    record.train["grad_norm"][40, 0] = 50
    found = paired.largest_gradient_norm(record)
    assert (found[1], found[0] < 2) == (50, True)
