"""The public operation: check what the user passed, choose an implementation, call it."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import jax
import numpy as np
from jax.typing import ArrayLike

from rbf_jax.ops import cudnn, reference, validate, xla
from rbf_jax.ops.call import Inputs, Masking, Options
from rbf_jax.ops.gpu.mosaic import passes as mosaic
from rbf_jax.ops.gpu.triton import passes as triton
from rbf_jax.ops.parallel import mesh as sharded
from rbf_jax.ops.unnormalized import unnormalize
from rbf_jax.ops.vjp import Passes

_logger = logging.getLogger("rbf_jax")

Implementation = Literal["reference", "xla", "cudnn", "triton", "mosaic"]


class _Backend(NamedTuple):
    attend: Callable[[Inputs, Masking, Options], tuple[jax.Array, jax.Array | None]]
    # Why this call cannot be done, or None where it can.
    unsupported: Callable[[Inputs, Masking, Options], str | None]
    # What is put together anew where a mesh splits the call.
    passes: Passes | None = None

    def for_mesh(self, inputs: Inputs, options: Options):
        """``attend``, each device of the mesh that is set doing its part."""
        if self.passes is None or (split := sharded.split_of(inputs, options)) is None:
            return self.attend
        return functools.partial(sharded.attend, self.passes, split)


def _supports_everything(*_) -> None:
    return None


_BACKENDS: dict[str, _Backend] = {
    "triton": _Backend(triton.attend, triton.unsupported, triton.PASSES),
    "mosaic": _Backend(mosaic.attend, mosaic.unsupported, mosaic.PASSES),
    "cudnn": _Backend(cudnn.attend, cudnn.unsupported),
    "xla": _Backend(xla.attend, _supports_everything, xla.PASSES),
    "reference": _Backend(reference.attend, _supports_everything),
}


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
    origin_sink: bool = ...,
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
    origin_sink: bool = ...,
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
    origin_sink=False,
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
    reverse (jvp of grad, a Hessian-vector product) works with "xla" too. jax.export takes "xla"
    (with constant lengths) and "reference"; the custom calls of the others are none that JAX
    promises to keep, so name "xla" for what is to be exported, or allow the call by name
    (``jax.export.DisabledSafetyCheck``).

    Args:
      query: (B, T, N, H) or (T, N, H); float32, bfloat16, float16 or float64.
      key: (B, S, K, H) or (S, K, H), K divides N, of the same dtype.
      value: same shape and dtype as ``key``.
      mask: bool, broadcastable to (B, N, T, S); True = attend.
      gamma: γ > 0, scalar or (N,), differentiable. Default 1/√H. Not checked where it is traced.
      key_norm_weight: λ, scalar or (N,), differentiable.
      is_causal: query i attends to keys j ≤ i, also where T ≠ S.
      local_window_size: int w or (left, right): query i attends to i − left ≤ j ≤ i + right.
      query_seq_lengths: int (B,); rows at or beyond it give 0.
      key_value_seq_lengths: int (B,); keys at or beyond it are not attended to.
      query_segment_ids: int (B, T); a query attends to the keys of its own segment only.
      key_value_segment_ids: int (B, S); given together with ``query_segment_ids``.
      alibi_slopes: (N,), not negative: adds −slope·|i − j| to the logits. Constants: their gradient
        is 0.
      origin_sink: adds a virtual key at the origin with value 0, that is exp(0) to the
        denominator of every row.
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
      ``normalize=False`` it is that of the weights' exponents, less by γ‖q‖².

    Raises:
      ValueError: an argument has a wrong shape, dtype or value, or has no effect beside another.
      NotImplementedError: the implementation asked for by name cannot do this call.
    """
    inputs, masking, unbatched = validate.arrays(
        query,
        key,
        value,
        mask,
        gamma=gamma,
        key_norm_weight=key_norm_weight,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        alibi_slopes=alibi_slopes,
    )
    if not validate.boolean("normalize", normalize) and origin_sink:
        raise ValueError("origin_sink=True has no effect with normalize=False; leave it at False.")
    query_length, key_length = inputs.query.shape[1], inputs.key.shape[1]
    options = Options(
        is_causal=validate.boolean("is_causal", is_causal),
        window=validate.window(local_window_size, max(query_length, key_length)),
        origin_sink=validate.boolean("origin_sink", origin_sink),
        return_residual=validate.boolean("return_residual", return_residual) or not normalize,
        shared_key_norm_weight=np.ndim(key_norm_weight) == 0,
        static_gamma=validate.static_number(
            1 / math.sqrt(inputs.query.shape[-1]) if gamma is None else gamma
        ),
        static_key_norm_weight=validate.static_number(key_norm_weight),
    )
    out, logsumexp = _choose(implementation, inputs, masking, options)(inputs, masking, options)
    if not normalize:
        out, logsumexp = unnormalize(inputs.query, inputs.gamma, out, logsumexp)
    if unbatched:
        out, logsumexp = out[0], None if logsumexp is None else logsumexp[0]
    return (out, logsumexp) if return_residual else out


def _choose(implementation: str | None, inputs: Inputs, masking: Masking, options: Options):
    """Returns the ``attend`` of the implementation asked for, or of the best that can."""
    if implementation is None:
        return _best(inputs, masking, options)
    if not isinstance(implementation, str) or implementation not in _BACKENDS:
        raise ValueError(
            f"implementation={implementation!r} must be None or one of {sorted(_BACKENDS)}."
        )
    reason = _BACKENDS[implementation].unsupported(inputs, masking, options)
    if reason is not None:
        able = [
            repr(name)
            for name, backend in _BACKENDS.items()
            if backend.unsupported(inputs, masking, options) is None
        ]
        raise NotImplementedError(
            f"implementation={implementation!r} {reason}; {' and '.join(able)} can do this call."
        )
    return _BACKENDS[implementation].for_mesh(inputs, options)


def _best(inputs: Inputs, masking: Masking, options: Options):
    """The first of Mosaic, Triton and cuDNN that supports the call, else XLA, which supports all.

    Mosaic is asked at sizes at which it was measured to be faster than Triton. Without key norms
    this is the dot product for which cuDNN is made, so that then comes first.
    """
    refused = []
    lengths = sharded.lengths_at_once(inputs, options)
    names = ["mosaic"] if mosaic.is_faster_than_triton(inputs, *lengths) else []
    names += ["triton", "cudnn"]
    if options.static_key_norm_weight == 0:
        names.sort(key="cudnn".__ne__)
    for name in names:
        reason = _BACKENDS[name].unsupported(inputs, masking, options)
        if reason is None:
            _log_choice(f"takes {name!r} where the program is compiled for CUDA, else 'xla'")
            on_cuda = _BACKENDS[name].for_mesh(inputs, options)
            return functools.partial(_where_cuda, on_cuda)
        refused.append(f"{name!r} {reason}")
    _log_choice(f"takes 'xla': {'; '.join(refused)}")
    return _BACKENDS["xla"].for_mesh(inputs, options)


def _where_cuda(on_cuda, inputs: Inputs, masking: Masking, options: Options):
    """The program may yet be placed on the CPU (jax.default_device), where CUDA is not."""

    def output(attend):
        def call(inputs, masking):
            out, logsumexp = attend(inputs, masking, options)
            return (out, logsumexp) if options.return_residual else (out, None)

        return call

    elsewhere = _BACKENDS["xla"].for_mesh(inputs, options)
    return jax.lax.platform_dependent(
        inputs, masking, cuda=output(on_cuda), default=output(elsewhere)
    )


@functools.cache
def _log_choice(choice: str) -> None:
    _logger.info("rbf_attention: implementation=None %s.", choice)
