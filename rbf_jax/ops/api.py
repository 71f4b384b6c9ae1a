"""The public operation: checks what the user passed and hands the call on to an implementation."""

from __future__ import annotations

import math
from typing import Any, Literal, cast, overload

import jax
from jax.typing import ArrayLike

from rbf_jax.ops import dispatch, validate
from rbf_jax.ops.call import Rules
from rbf_jax.ops.logits import undo_normalization

Implementation = dispatch.Name


@overload
def rbf_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    mask: ArrayLike | None = ...,
    *,
    gamma: ArrayLike | None = ...,
    key_norm_weight: ArrayLike = ...,
    is_causal: bool = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    query_segment_ids: ArrayLike | None = ...,
    key_value_segment_ids: ArrayLike | None = ...,
    alibi_slopes: ArrayLike | None = ...,
    num_global_keys: int = ...,
    origin_sink: bool = ...,
    sink_logits: ArrayLike | None = ...,
    scale: Any = ...,
    bias: Any = ...,
    dropout_rate: Any = ...,
    deterministic: Any = ...,
    normalize: bool = ...,
    implementation: Implementation | None = ...,
    return_residual: Literal[False] = ...,
) -> jax.Array: ...


@overload
def rbf_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    mask: ArrayLike | None = ...,
    *,
    gamma: ArrayLike | None = ...,
    key_norm_weight: ArrayLike = ...,
    is_causal: bool = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    query_segment_ids: ArrayLike | None = ...,
    key_value_segment_ids: ArrayLike | None = ...,
    alibi_slopes: ArrayLike | None = ...,
    num_global_keys: int = ...,
    origin_sink: bool = ...,
    sink_logits: ArrayLike | None = ...,
    scale: Any = ...,
    bias: Any = ...,
    dropout_rate: Any = ...,
    deterministic: Any = ...,
    normalize: bool = ...,
    implementation: Implementation | None = ...,
    return_residual: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def rbf_attention(
    query,
    key,
    value,
    mask=None,
    *,
    gamma=None,
    key_norm_weight=1.0,
    is_causal=False,
    local_window_size=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
    alibi_slopes=None,
    num_global_keys=0,
    origin_sink=False,
    sink_logits=None,
    scale=None,
    bias=None,
    dropout_rate=0.0,
    deterministic=False,
    normalize=True,
    implementation=None,
    return_residual=False,
):
    r"""Distance-based attention, softmax_j(−γ‖q_i − k_j‖²) v_j.

    Computed as softmax_j(2γ q_i·k_j − λγ‖k_j‖²) v_j: softmax ignores −γ‖q_i‖², the same for all j.
    λ = 1 is RBF attention; λ = 0 is dot-product attention with scale 2γ.
    Names, layout and masking conventions are those of ``jax.nn.dot_product_attention``.
    Works under jit, grad, vmap, remat and shard_map. Arrays sharded by batch or heads are not
    gathered (by a mesh of explicit axes: the batch). Inside ``jax.set_mesh``, mesh axes named
    "data", "fsdp", "tensor" and "seq" split batch, heads and sequence (docs/scaling.md).
    Forward-mode derivatives (jvp) and reverse mode twice (grad of grad) need
    ``implementation="reference"``: the others define a custom_vjp and raise there; forward over
    reverse (jvp of grad, a Hessian-vector product) works with "xla" too. Only "xla" (with constant
    lengths) and "reference" use operations with jax.export's guarantees: name one of them before
    exporting, or allow the custom call by name (``jax.export.DisabledSafetyCheck``).

    Args:
      query: (B, T, N, H) or (T, N, H); float32, bfloat16, float16 or float64.
      key: (B, S, K, H) or (S, K, H), K divides N, of the same dtype.
      value: same shape and dtype as ``key``.
      mask: bool, broadcastable to (B, N, T, S); True = attend.
      gamma: γ > 0, scalar or (N,), differentiable. Default 1/√H. Not checked where it is traced.
      key_norm_weight: λ, scalar or (N,), differentiable. Any finite number: λ > 1 penalises large
        keys more than RBF attention does, λ < 0 favours them.
      is_causal: query i attends to keys j ≤ i, also where T ≠ S.
      local_window_size: int w or (left, right): query i attends to i − left ≤ j ≤ i + right. With
        right = 0 that includes causality, with `is_causal` right is 0.
      query_seq_lengths: int (B,); rows at or beyond it give 0.
      key_value_seq_lengths: int (B,); keys at or beyond it are not attended to.
      query_segment_ids: int (B, T); a query attends to the keys of its own segment only.
      key_value_segment_ids: int (B, S); given together with ``query_segment_ids``.
      alibi_slopes: (N,), not negative: adds −slope·|i − j| to the logits. Constants: their gradient
        is 0.
      num_global_keys: the first keys, registers as a rule, that every query attends to whatever
        windows, segment ids and ALiBi say. Lengths and the mask still count, and so does causality,
        that of a window (left, 0) too.
      origin_sink: adds a virtual key at the origin with value 0, that is exp(0) to the
        denominator of every row: `sink_logits` of 0.
      sink_logits: scalar or (N,), differentiable: the logit of a virtual key with value 0, which
        adds its exponential to the denominator of every row.
      scale: not supported; the error says what stands in for it.
      bias: not supported; the error says what stands in for it.
      dropout_rate: not supported, unless 0 or `deterministic`. Named here because Flax's linen
        layers drop arguments that their `attention_fn` does not name.
      deterministic: no dropout.
      normalize: False leaves out softmax's denominator: Σ_j exp(−γ‖q_i − k_j‖²) v_j, with λ
        Σ_j exp(2γ q_i·k_j − λγ‖k_j‖² − γ‖q_i‖²) v_j, ALiBi added to the exponents.
      implementation: None takes the best that supports the call, of those measured; "reference",
        "xla", "cudnn", "triton" or "mosaic" is that one or an error, never another.
      return_residual: also return the logsumexp.

    Returns:
      The output, shape and dtype of ``query``; rows that may attend to nothing are 0, with
      gradient 0. With ``return_residual`` a pair of it and the logsumexp of the logits
      2γ q·k − λγ‖k‖² (ALiBi and sink included), (B, T, N) or (T, N), float32 (float64 for
      float64 inputs), −inf for rows that may attend to nothing; differentiable. With
      ``normalize=False`` it is that of the weights' exponents, γ‖q‖² subtracted.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value, or has no effect beside another.
      NotImplementedError: the implementation asked for by name cannot do this call; or a bias or
        dropout is asked for.
    """
    validate.refuse_dot_product_arguments(scale, bias)
    advice = " The attention_fn for layers of Flax is rbf_jax.nn.rbf_attention_fn."
    validate.refuse_dropout(dropout_rate, deterministic, advice)
    normalize = validate.boolean("normalize", normalize)
    sink_logits = validate.sink(origin_sink, sink_logits, normalize)
    inputs, masking, unbatched = validate.arrays(
        query,
        key,
        value,
        mask,
        gamma=gamma,
        key_norm_weight=key_norm_weight,
        sink_logits=sink_logits,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        alibi_slopes=alibi_slopes,
    )
    T, S, H = inputs.query.shape[1], inputs.key.shape[1], inputs.query.shape[-1]
    is_causal = validate.boolean("is_causal", is_causal)
    left, right = validate.window(local_window_size, is_causal, max(T, S))
    num_global_keys = validate.global_keys(num_global_keys, S)
    exempt_from = left is not None, right, masking.query_segments is not None
    if not any(exempt_from) and masking.alibi_slopes is None:
        num_global_keys = 0  # causality alone, which they keep
    rules = Rules(
        left=left,
        right=right,
        num_global_keys=num_global_keys,
        sink=sink_logits is not None,
        return_residual=validate.boolean("return_residual", return_residual) or not normalize,
        static_gamma=validate.static_number(1 / math.sqrt(H) if gamma is None else gamma),
        static_key_norm_weight=validate.static_number(key_norm_weight),
    )
    out, logsumexp = dispatch.attend(implementation, inputs, masking, rules)
    if not normalize:
        logsumexp = cast(jax.Array, logsumexp)  # the rules ask for it
        out, logsumexp = undo_normalization(inputs.query, inputs.gamma, out, logsumexp)
    if unbatched:
        out, logsumexp = out[0], None if logsumexp is None else logsumexp[0]
    return (out, logsumexp) if return_residual else out
