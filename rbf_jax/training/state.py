"""Everything that a training step changes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rbf_jax.nn import CausalLM
from rbf_jax.training.sharding import state_shardings


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds beside the position in the data.

    Attributes:
      step: int32 (), steps done.
      params: of the model, float32.
      opt_state: of the optimizer.
      bad_step: int32 (), the first step whose loss or gradient was not finite; 0 for none.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    bad_step: jax.Array


def create_state(
    model: CausalLM, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh
) -> TrainState:
    """Returns the state before the first step, placed on the mesh.

    Args:
      model: the language model.
      optimizer: of `make_optimizer`.
      seed: of the parameters.
      mesh: of `make_mesh`.
    """

    create = create_state_of(model, optimizer)
    shardings = state_shardings(mesh, state_shapes(model, optimizer))
    # A NumPy number, which is the same in all processes.
    return jax.jit(create, out_shardings=shardings)(np.uint32(seed))


def create_state_of(
    model: CausalLM, optimizer: optax.GradientTransformation
) -> Callable[[Any], TrainState]:
    """Returns the pure function seed uint32 () → state before the first step.

    Args:
      model: the language model.
      optimizer: of `make_optimizer`.
    """
    return functools.partial(_create, model, optimizer)


def with_params(state: TrainState, params: Any) -> TrainState:
    """Returns the state with other parameters, placed as those that it has.

    Args:
      state: before the first step.
      params: pytree of NumPy arrays, each of the shape of the parameter that it replaces.
    """

    def place(old: jax.Array, new: np.ndarray) -> jax.Array:
        new = new.astype(old.dtype)
        return jax.make_array_from_callback(old.shape, old.sharding, lambda index: new[index])

    return dataclasses.replace(state, params=jax.tree.map(place, state.params, params))


def state_shapes(model: CausalLM, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state's shapes and dtypes; nothing is computed.

    Args:
      model: the language model.
      optimizer: of `make_optimizer`.
    """
    return jax.eval_shape(create_state_of(model, optimizer), np.uint32(0))


def _create(
    model: CausalLM, optimizer: optax.GradientTransformation, seed: np.uint32
) -> TrainState:
    # Shapes do not depend on the tokens.
    params = model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), zero)


class Fingerprint(NamedTuple):
    """What tells a state from one with a single other bit.

    Attributes:
      params: uint32 (), digest of the parameters.
      rest: uint32 (), digest of everything else.
      finite: bool (), whether all floating-point values are finite.
    """

    params: jax.Array
    rest: jax.Array
    finite: jax.Array


@jax.jit
def fingerprint(state: TrainState) -> Fingerprint:
    """Returns the fingerprint of a state, computed where its arrays are, whatever the sharding."""
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return Fingerprint(
        params=digest(state.params),
        rest=digest(dataclasses.replace(state, params=())),
        finite=jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats])),
    )


def digest(tree: Any) -> jax.Array:
    """Returns uint32 () that changes with any single changed value.

    Each value's bits are weighted by an odd number that depends on its place, and added modulo
    2**32. Integer sums do not depend on their order, so the result is exact.

    Args:
      tree: pytree of arrays of numbers, of at most 32 bits each.
    """
    total = jnp.zeros((), jnp.uint32)
    for position, leaf in enumerate(jax.tree.leaves(tree)):
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        # Counted dimension by dimension: flattened, arrays that are split would be gathered.
        place = jnp.full(bits.shape, position * 0x9E3779B1 % 2**32, jnp.uint32)
        for axis in range(bits.ndim):
            stride = math.prod(bits.shape[axis + 1 :]) % 2**32
            place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
        total += jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
    return total
