"""Cross-entropy that never holds the logits of the whole vocabulary at once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Matrix products of other widths are slower on GPUs.
_TILE = 128


def logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Float32 logits (..., V) of hidden states (..., D); the head (V, D) is cast to their dtype."""
    return _products(hidden, head, jnp.float32)


def _products(hidden: jax.Array, head: jax.Array, dtype: jnp.dtype) -> jax.Array:
    head = head.astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=dtype)


def token_losses(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    chunk: int,
    dtype: jnp.dtype | str = jnp.float32,
) -> jax.Array:
    """Negative log-likelihood of each target, with at most `chunk` logits of a token at a time.

    The backward pass is given the logsumexp and computes the logits again, chunk by chunk; their
    gradient is rounded to the dtype of the hidden states before it is multiplied.

    Args:
      hidden: (B, T, D), in the compute dtype.
      head: (V, D) float32.
      targets: integer (B, T).
      chunk: entries of the vocabulary.
      dtype: of the logits as they are stored between the matrix product and the softmax, which is
        computed in float32.

    Returns:
      (B, T) float32, nats.
    """
    return _token_losses(hidden, head, targets, chunk, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _token_losses(hidden, head, targets, chunk, dtype):
    return _forward(hidden, head, targets, chunk, dtype)[0]


def _forward(hidden, head, targets, chunk, dtype):
    def add(sums, part):
        logsumexp, picked = sums
        z = _part_logits(hidden, part, head.shape[0], dtype)
        picked += jnp.sum(z, axis=-1, where=_is_target(part, targets))
        return (jnp.logaddexp(logsumexp, jax.nn.logsumexp(z, axis=-1)), picked), None

    start = jnp.full(targets.shape, -jnp.inf, jnp.float32), jnp.zeros(targets.shape, jnp.float32)
    (logsumexp, picked), _ = jax.lax.scan(add, start, _parts(head, chunk))
    return logsumexp - picked, (hidden, head, targets, logsumexp)


def _backward(chunk, dtype, residuals, dnll):
    hidden, head, targets, logsumexp = residuals
    V, D = head.shape

    def add(dhidden, part):
        z = _part_logits(hidden, part, V, dtype)
        p = jnp.exp(z - logsumexp[..., None])
        dz = (jnp.where(_is_target(part, targets), p - 1, p) * dnll[..., None]).astype(hidden.dtype)
        products = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        dhidden += products("btv,vd->btd", dz, part[1].astype(hidden.dtype))
        return dhidden, products("btv,btd->vd", dz, hidden)

    start = jnp.zeros(hidden.shape, jnp.float32)
    dhidden, dparts = jax.lax.scan(add, start, _parts(head, chunk))
    dhead = dparts.swapaxes(0, 1).reshape(-1, D)[:V]
    return dhidden.astype(hidden.dtype), dhead.astype(head.dtype), None


_token_losses.defvjp(_forward, _backward)


def _parts(head: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Splits the head into n parts of at most `chunk` entries: their ids (n, V/n), and (n, V/n, D).

    Part i takes every n-th entry from i on, not a run of them: where the vocabulary is spread over
    devices, each then has its share in every part. Ids of V and more are padding.
    """
    V, D = head.shape
    if V > chunk >= _TILE:
        chunk -= chunk % _TILE
    n = -(-V // chunk)
    size = -(-V // n)
    if n > 1 and chunk >= _TILE:
        size += -size % _TILE
    parts = jnp.pad(head, [(0, n * size - V), (0, 0)]).reshape(size, n, D).swapaxes(0, 1)
    return jnp.arange(n * size, dtype=jnp.int32).reshape(size, n).T, parts


def _part_logits(hidden, part, V, dtype) -> jax.Array:
    """(B, T, V/n) float32, −∞ where there is padding."""
    ids, head = part
    return jnp.where(ids < V, _products(hidden, head, dtype).astype(jnp.float32), -jnp.inf)


def _is_target(part, targets) -> jax.Array:
    """(B, T, V/n) bool."""
    return part[0] == targets[..., None]
