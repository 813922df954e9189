import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.randomness import permute, uniforms


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(count, seed, epoch):
    order = permute(seed, epoch, np.arange(count), count)
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


def test_permute_depends_on_the_place_alone():
    whole = permute(3, 7, np.arange(1000), 1000)
    some = np.array([999, 0, 500, 17])
    np.testing.assert_array_equal(permute(3, 7, some, 1000), whole[some])


def test_orders_differ_between_epochs_and_seeds_and_are_spread():
    orders = [permute(s, e, np.arange(4000), 4000) for s, e in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for i, a in enumerate(orders):
        # Places and indices of a random order do not correlate: sigma is 1 / sqrt(n) = 0.016.
        assert abs(np.corrcoef(a, np.arange(4000))[0, 1]) < 0.08
        for b in orders[:i]:
            assert (a == b).sum() < 12  # of random orders: Poisson with mean 1
    neighbours = np.abs(np.diff(orders[0]))
    assert neighbours.mean() == pytest.approx(4000 / 3, rel=0.05)


def test_permute_reaches_far():
    big = 10**12
    places = np.array([0, 1, big - 1, big // 2])
    out = permute(0, 0, places, big)
    assert len(set(out.tolist())) == 4
    assert out.min() >= 0
    assert out.max() < big


def test_uniforms_depend_on_seed_and_position_alone():
    whole = uniforms(5, np.arange(1000), 9)
    np.testing.assert_array_equal(uniforms(5, np.array([700, 3]), 9), whole[[700, 3]])
    assert not np.intersect1d(whole, uniforms(6, np.arange(1000), 9)).size


def test_uniforms_are_uniform_and_independent():
    u = uniforms(0, np.arange(20_000), 8)
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.histogram(u, bins=20, range=(0, 1))[0] / u.size * 20
    np.testing.assert_allclose(counts, 1, atol=0.05)
    correlations = np.corrcoef(u.T) - np.eye(8)
    assert np.abs(correlations).max() < 0.04  # sigma 0.007
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.04
