"""vmap of a kernel call: the axis it adds is folded into the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def folding_vmap(function):
    """Returns `function(full, shared)` with a rule for vmap.

    All arrays of the trees `full` and `shared`, and of what it returns, have the batch as their
    first axis; those of `shared` may have size 1 there, for all of the batch.
    """

    @jax.custom_batching.custom_vmap
    def call(full, shared):
        return function(full, shared)

    @call.def_vmap
    def rule(axis_size, in_batched, full, shared):
        full_batched, shared_batched = in_batched
        x, batched = jax.tree.leaves(full)[0], jax.tree.leaves(full_batched)[0]
        batch_size = x.shape[1 if batched else 0]

        def fold(x, batched):
            if not batched:
                x = jnp.broadcast_to(x, (axis_size, *x.shape))
            x = jnp.broadcast_to(x, (axis_size, batch_size, *x.shape[2:]))
            return x.reshape(axis_size * batch_size, *x.shape[2:])

        def fold_shared(x, batched):
            return x if not batched and x.shape[0] == 1 else fold(x, batched)

        out = call(
            jax.tree.map(fold, full, full_batched),
            jax.tree.map(fold_shared, shared, shared_batched),
        )
        out = jax.tree.map(lambda x: x.reshape(axis_size, batch_size, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return call
