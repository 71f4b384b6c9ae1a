"""One call of the operation, as every implementation receives it: arrays and static rules.

To add an option: give it a field of `Rules` or `Masking` here (and its axes in `AXES`), check it in
validate.py, and name it in the `supports` of each implementation that has it. The others refuse it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Inputs(NamedTuple):
    """The differentiable arrays, and the key norms if they exist already.

    Attributes:
      query: (B, T, N, H).
      key: (B, S, K, H), K divides N; in a cache (B, K, S, H).
      value: as key.
      gamma: (N,), bandwidth γ per query head, accumulation dtype.
      key_norm_weight: (N,), λ per query head, accumulation dtype.
      sink_logits: (N,), accumulation dtype, or None: the logit of a virtual key with value 0.
      key_norms: `squared_norms` of the keys, (B, S, K), in a cache (B, K, S); None: to be computed.
        The gradient of the keys includes what they contribute in either case.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    gamma: jax.Array
    key_norm_weight: jax.Array
    sink_logits: jax.Array | None = None
    key_norms: jax.Array | None = None

    def squared_key_norms(self) -> jax.Array:
        """‖k‖², accumulation dtype."""
        return squared_norms(self.key) if self.key_norms is None else self.key_norms


class Masking(NamedTuple):
    """Arrays that say who may attend to whom; never differentiated. ``None`` means no rule.

    Attributes:
      mask: bool, (B or 1, N or 1, T or 1, S or 1), True = attend.
      query_lengths: int32 (B,), 0 to T; rows at or beyond the length attend to nothing.
      key_lengths: int32 (B,), 0 to S; keys at or beyond the length are not attended to. In a cache:
        the tokens that each row has seen, registers not counted.
      query_segments: integer (B, T); a query attends only to keys of its own segment.
      key_segments: integer (B, S).
      alibi_slopes: accumulation dtype, (N,); adds −slope·|i − j| to the logits.
      query_offset: int32 (B,); query i is at position i + offset for causality, windows and ALiBi,
        keys are at their index. Lengths, segments and the mask go by index.
    """

    mask: jax.Array | None = None
    query_lengths: jax.Array | None = None
    key_lengths: jax.Array | None = None
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    alibi_slopes: jax.Array | None = None
    query_offset: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Rules:
    """The static side of a call, hashable: what programs and kernels are compiled for.

    Attributes:
      left: query i attends to keys j ≥ i − left; None: no such rule.
      right: query i attends to keys j ≤ i + right; None: no such rule. Causality is right = 0.
      num_global_keys: the first keys, which every query attends to whatever window, segments and
        ALiBi say; right = 0 still hides keys that come after the query.
      sink: `Inputs.sink_logits` are given.
      return_residual: the caller wants the logsumexp.
      static_gamma: γ if it is one number known while tracing, else None. ``Inputs.gamma`` holds γ
        in either case, so that an implementation may ignore this field.
      static_key_norm_weight: λ likewise.
      arrays: names of the `Masking` arrays that are given, by `for_kernels`.
    """

    left: int | None = None
    right: int | None = None
    num_global_keys: int = 0
    sink: bool = False
    return_residual: bool = False
    static_gamma: float | None = None
    static_key_norm_weight: float | None = None
    arrays: tuple[str, ...] = ()

    @property
    def causal(self) -> bool:
        """Whether no query attends to a key after it."""
        return self.right == 0

    @property
    def has_alibi(self) -> bool:
        """Whether there are ALiBi slopes."""
        return "alibi_slopes" in self.arrays

    @property
    def has_query_lengths(self) -> bool:
        """Whether the queries have lengths."""
        return "query_lengths" in self.arrays

    @property
    def has_key_lengths(self) -> bool:
        """Whether the keys have lengths."""
        return "key_lengths" in self.arrays

    @property
    def has_segments(self) -> bool:
        """Whether there are segment ids."""
        return "query_segments" in self.arrays

    @property
    def has_mask(self) -> bool:
        """Whether there is a general mask."""
        return "mask" in self.arrays

    @property
    def has_offset(self) -> bool:
        """Whether positions of queries are not their indices."""
        return "query_offset" in self.arrays

    @property
    def pairwise(self) -> bool:
        """Whether positions and lengths alone do not say who may attend to whom."""
        return self.has_segments or self.has_mask

    def for_kernels(self, masking: Masking) -> Rules:
        """Returns what compiled programs and kernels depend on, so that they are found again.

        Of λ they need to know only whether it may be positive: there is no bound otherwise.
        """
        weight = self.static_key_norm_weight
        return dataclasses.replace(
            self,
            return_residual=False,
            static_gamma=None,
            static_key_norm_weight=0.0 if weight is not None and weight <= 0 else None,
            arrays=tuple(name for name, array in masking._asdict().items() if array is not None),
        )


_FACTS = frozenset({"static_gamma", "static_key_norm_weight", "arrays"})
# The argument of `rbf_attention` behind a field, where the names differ.
_ARGUMENTS = {
    "left": "local_window_size",
    "right": "is_causal or local_window_size",
    "sink": "sink_logits or origin_sink",
    "query_lengths": "query_seq_lengths",
    "key_lengths": "key_value_seq_lengths",
    "query_segments": "query_segment_ids",
    "key_segments": "key_value_segment_ids",
    "return_residual": "return_residual or normalize=False",
}

# The axes of every array by name: b batch, t queries, s keys, n query heads, k key/value heads,
# "." any other. Axes of size 1 stand for all.
AXES = {
    **dict.fromkeys(("query", "out", "dout"), "btn."),
    **dict.fromkeys(("key", "value"), "bsk."),
    "key_norms": "bsk",
    **dict.fromkeys(("gamma", "key_norm_weight", "sink_logits", "alibi_slopes"), "n"),
    **dict.fromkeys(("query_lengths", "key_lengths", "query_offset"), "b"),
    "query_segments": "bt",
    "key_segments": "bs",
    "mask": "bnts",
    "logsumexp": "btn",
    "dlogsumexp": "btn",
}
# A cache has a head's keys in one piece.
CACHE_AXES = AXES | dict.fromkeys(("key", "value"), "bks.") | {"key_norms": "bks"}


def unsupported(rules: Rules, masking: Masking, supported: frozenset[str]) -> str | None:
    """Returns which options in use are not in `supported`, as the rest of a sentence, or None."""
    used = [
        field.name
        for field in dataclasses.fields(rules)
        if field.name not in _FACTS and getattr(rules, field.name) != field.default
    ]
    used += [name for name, array in masking._asdict().items() if array is not None]
    missing = [_ARGUMENTS.get(name, name) for name in used if name not in supported]
    return f"does not support {', '.join(missing)}" if missing else None


def accumulation_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of logits, norms, sums and logsumexp: float32, or float64 for float64 inputs."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def squared_norms(key: jax.Array) -> jax.Array:
    """‖k‖² over the last axis, in the accumulation dtype."""
    return jnp.sum(jnp.square(key.astype(accumulation_dtype(key.dtype))), axis=-1)
