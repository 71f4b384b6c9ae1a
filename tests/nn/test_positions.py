import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.nn.positions import SuSiE, add_susie, alibi_slopes, rotate, sinusoids
from tests.harness.models import normal, random_variables


@pytest.mark.parametrize("start", [0, 30_000, 1_000_000])
def test_sinusoids_are_precise_at_long_positions(start):
    positions = np.arange(start, start + 5000, 7)
    sin, cos = sinusoids(jnp.asarray(positions, jnp.int32)[None], 64)
    angles = positions[:, None] * 10000.0 ** (-2 * np.arange(32) / 64)
    assert sin.shape == cos.shape == (1, len(positions), 32)
    np.testing.assert_allclose(sin[0], np.sin(angles), atol=4e-4)
    np.testing.assert_allclose(cos[0], np.cos(angles), atol=4e-4)


def _susie(registers=0, positions=12, heads=2, H=8):
    angles = sinusoids(jnp.arange(positions, dtype=jnp.int32)[None], H)
    module = SuSiE(heads, registers)
    return module, angles, random_variables(module, angles)


def test_susie_distances_depend_on_the_difference_only():
    module, angles, variables = _susie()
    p = module.apply(variables, angles)[0].swapaxes(0, 1)  # K T H
    distances = np.sum(np.square(p[:, :, None] - p[:, None]), -1)
    for offset in (1, 5):
        diagonal = np.diagonal(distances, offset, axis1=1, axis2=2)
        assert diagonal.min() > 1e-3
        np.testing.assert_allclose(diagonal, np.broadcast_to(diagonal[:, :1], diagonal.shape), 1e-4)
    assert np.abs(distances[0] - distances[1]).max() > 0.1  # w is per head


def test_susie_starts_at_one_half_and_text_at_position_zero():
    module, angles, _ = _susie(registers=3)
    variables = module.init(jax.random.key(0), angles)
    p = module.apply(variables, angles)
    assert p.shape == (1, 15, 2, 8)
    np.testing.assert_allclose(p[0, 3], [[0.0] * 4 + [0.5] * 4] * 2)
    registers = variables["params"]["registers"]
    np.testing.assert_array_equal(p[0, :3], registers)
    assert 0.01 < np.std(registers) < 0.03


def test_susie_is_shared_in_a_group_and_added_in_float32():
    module, angles, variables = _susie()
    p = module.apply(variables, angles)
    query = normal(1, 3, 12, 4, 8)
    added = add_susie(query, p)
    np.testing.assert_allclose(added, query + np.asarray(p)[:, :, [0, 0, 1, 1]], rtol=1e-6)
    half = query.astype(jnp.bfloat16)
    expected = (half.astype(jnp.float32) + np.asarray(p)[:, :, [0, 0, 1, 1]]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(add_susie(half, p), expected)


def test_rope_products_depend_on_the_difference_only():
    positions = jnp.asarray([[0, 3, 10, 13, 1000, 1003]], jnp.int32)
    angles = sinusoids(positions, 8)
    query = jnp.broadcast_to(normal(0, 8), (1, 6, 1, 8))
    key = jnp.broadcast_to(normal(1, 8), (1, 6, 1, 8))
    rotated_query = rotate(query, angles, 0)[0, :, 0]
    rotated_key = rotate(key, angles, 0)[0, :, 0]
    products = np.asarray(rotated_query @ rotated_key.T)
    np.testing.assert_allclose(products[[0, 2, 4], [1, 3, 5]], products[0, 1], rtol=1e-3)
    assert abs(products[0, 1] - products[1, 0]) > 0.1
    np.testing.assert_allclose(
        jnp.linalg.norm(rotated_key, axis=-1), jnp.linalg.norm(key[0, :, 0], axis=-1), rtol=1e-5
    )


def test_rope_turns_pairs_by_their_angle_and_leaves_registers_alone():
    angles = sinusoids(jnp.asarray([[2]], jnp.int32), 4)
    x = jnp.broadcast_to(jnp.asarray([1.0, 0.0, 0.0, 0.0]), (1, 3, 1, 4))
    turned = rotate(x, angles, 2)[0, :, 0]
    np.testing.assert_array_equal(turned[:2], x[0, :2, 0])
    np.testing.assert_allclose(turned[2], [np.cos(2), 0, np.sin(2), 0], atol=1e-6)


def test_rope_in_bfloat16_rounds_once():
    angles = sinusoids(jnp.arange(2000, 2008, dtype=jnp.int32)[None], 8)
    x = normal(0, 1, 8, 2, 8).astype(jnp.bfloat16)
    expected = rotate(x.astype(jnp.float32), angles, 0).astype(jnp.bfloat16)
    np.testing.assert_array_equal(rotate(x, angles, 0), expected)


def test_alibi_slopes_are_those_of_the_paper():
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9), rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(1), [2.0**-8])
    # ALiBi's get_slopes(12): those of 8 heads, then every second one of 16 heads.
    twelve = [*(2.0 ** -np.arange(1, 9)), *(2.0 ** -np.asarray([0.5, 1.5, 2.5, 3.5]))]
    np.testing.assert_allclose(alibi_slopes(12), twelve, rtol=1e-6)
    assert alibi_slopes(12).dtype == np.float32
