import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbf_jax.data import rows


@settings(max_examples=100)
@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_best_fit_fits_and_leaves_little(lengths):
    lengths = np.array(lengths)
    assigned = rows.best_fit(lengths, 16)
    load = np.bincount(assigned, weights=lengths)
    assert (load > 0).all()
    assert (load <= 16).all()
    # Best fit never opens a row for what would have fitted into another.
    lightest = np.sort(load)[:2]
    assert len(load) == 1 or lightest.sum() > 16


def test_best_fit_is_nearly_full_on_many_short_documents():
    lengths = np.random.default_rng(0).integers(1, 200, 5000)
    assigned = rows.best_fit(lengths, 256)
    assert lengths.sum() / ((assigned.max() + 1) * 256) > 0.98


def test_part_of_the_rows_is_a_fair_sample():
    lengths = np.concatenate([np.full(500, 16), np.full(500, 3)])
    assigned = rows.best_fit(lengths, 16)
    # 500 full rows and 100 rows of five: whatever part is taken, it holds both.
    long_rows = np.unique(assigned[:500])
    for part in (60, 120, 300):
        assert abs((long_rows < part).sum() / part - 5 / 6) < 0.05


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65])
def test_split_covers_a_document_once(length):
    starts, lengths = rows._split(np.array([7, 500]), np.array([length, 32]), 32)
    covered = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths)])
    np.testing.assert_array_equal(covered[:length], 7 + np.arange(length))
    np.testing.assert_array_equal(covered[length:], 500 + np.arange(32))
    assert lengths.max() <= 32
