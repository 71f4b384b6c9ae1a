"""Inputs made against the bound of the Triton kernels' forward pass, and its gate.

Keys so far that all weights underflow unless they are measured from the largest, one near key among
far ones, norms from 1e-4 to 1e4, equal keys, λ that gives no bound or a useless one, a sink far
below the bound, values whose sums overflow.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import numpy as np

from tests.harness import cases


@dataclasses.dataclass(frozen=True)
class Adversarial(cases.Case):
    """A case that says of how many tiles of 16 queries and 16 keys the gate must be taken.

    `change` makes other queries and keys of the drawn ones; `weight` is λ, `values` what the drawn
    values are multiplied by.
    """

    T: int = 48
    S: int = 48
    B: int = 1
    gate: Literal["all", "some", "none"] = "all"
    change: Callable | None = None
    weight: float | None = None
    values: float = 1.0

    @cases.on_cpu
    def arrays(self, dtype, seed=0):
        query, key, *rest = super().arrays(dtype, seed)
        if self.change is not None:
            query, key = (x.astype(dtype) for x in self.change(query, key))
        if self.weight is not None:
            rest[2] = np.float32(self.weight)
        rest[0] = rest[0] * jnp.asarray(self.values, dtype)
        return query, key, *rest


def one_near(index, query, key):
    """A key at the origin among keys that are far from every query."""
    return query, key.at[:, index].set(0)


def some_far(query, key):
    return query.at[:, 16:, :, 0].add(-60), key


def opposite(query, key):
    """The nearest key of each query is twice its norm away."""
    return query, -query


def equal(at, query, key):
    return query, jnp.full_like(key, at)


def equal_both(query, key):
    one = key[:, :1]
    return jnp.broadcast_to(one, query.shape), jnp.broadcast_to(one, key.shape)


def sphere(radius, query, key):
    """Queries of one norm but for rounding, each with a key nearby: the bound is almost met."""
    wide, noise = query.astype(jnp.float32), key.astype(jnp.float32)
    query = radius * wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)
    return query, query + 0.3 * noise


def case(name, gate, change=None, weight=None, **rest):
    fields = {f.name for f in dataclasses.fields(Adversarial)}
    own = {key: rest.pop(key) for key in list(rest) if key in fields}
    options = tuple(sorted(rest.items()))
    return Adversarial(name, gate=gate, change=change, weight=weight, options=options, **own)


def fully_masked_rows(B, N, T, S):
    mask = np.ones((1, 1, T, S), bool)
    mask[:, :, 20] = False
    return mask


near = functools.partial
CASES = [
    case("ordinary", "none"),
    case("far_keys", "all", offset=60.0),
    case("some_far", "some", some_far),
    case("one_near_key", "none", near(one_near, 37), offset=60.0),
    case("one_near_key_causal", "some", near(one_near, 10), offset=60.0, is_causal=True),
    case("norms_1e-4", "none", norm=1e-4),
    case("norms_1e-2", "none", norm=1e-2),
    case("norms_10", "all", norm=10.0),
    case("norms_1e2", "all", norm=1e2),
    case("norms_1e4", "all", norm=1e4 / 4),
    case("equal_near", "none", near(equal, 0.5)),
    case("equal_further", "none", near(equal, 3.0)),
    case("equal_far", "all", near(equal, 16.0)),
    case("equal_keys_and_queries", "none", equal_both),
    case("opposite", "all", opposite, norm=5.0),
    case("sphere_below_the_largest_reference", "none", near(sphere, 140.0)),
    case("sphere_above_the_largest_reference", "all", near(sphere, 180.0)),
    case("dot_product", "all", weight=0.0),
    case("negative_weight", "all", weight=-0.5),
    case("tiny_weight", "all", weight=1e-6),
    case("small_weight", "all", weight=1e-2),
    case("weight_per_head", "some", per_head=True, N=4, K=2),
    case("sink", "none", origin_sink=True),
    case("sink_far_below_the_bound", "all", near(equal, 16.0), origin_sink=True, norm=10.0),
    case("sink_beside_near_keys", "none", near(sphere, 100.0), origin_sink=True),
    case("huge_values", "all", values=1e30),
    case("large_values", "none", values=1e12),
    case("small_values_of_keys_further", "none", near(equal, 3.0), values=1e-15),
    case("row_masked", "some", mask=fully_masked_rows),
    case("queries_beyond", "none", query_seq_lengths=lambda *_: np.array([20])),
    case("no_keys", "all", key_value_seq_lengths=lambda *_: np.array([0])),
    case("window_far", "some", some_far, local_window_size=(20, 9)),
    case("window_far_slopes", "some", some_far, alibi_slopes=lambda *_: np.array([0.0, 0.5])),
]
