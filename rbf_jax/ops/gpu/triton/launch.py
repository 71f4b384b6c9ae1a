"""Calls a Triton kernel on JAX arrays: the only place that knows jax_triton.

jax_triton 0.3: arguments by position, outputs after inputs; a Python int is a 32-bit (or, where it
must be, 64-bit) scalar; all else is a constant of the kernel.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import extend as jex
from jax.interpreters import mlir, xla

from rbf_jax.ops.gpu import device as nvidia
from rbf_jax.ops.gpu.triton.config import Tiles
from rbf_jax.ops.manual_axes import vary_like
from rbf_jax.ops.parallel import custom_partitioning

_LARGEST_HEAD_DIM = 256


def unavailable() -> str | None:
    """Returns why no kernel can be run here, as the rest of a sentence, or None if one can."""
    reason = nvidia.unavailable()
    if reason is not None:
        return reason
    capability = nvidia.target().compute_capability
    if capability < 80:
        return f"needs compute capability 8.0 or later, and this GPU has {capability / 10}"
    try:
        _jax_triton()
    except ImportError as error:
        return f"needs the package jax-triton (the extra 'cuda' of rbf-jax): {error}"
    return None


def unsupported(query: jax.Array) -> str | None:
    """Returns why no kernel can take such queries (..., H), or None if one can."""
    reason = unavailable() or custom_partitioning.unsupported()
    if reason is not None:
        return reason
    if query.dtype == jnp.float64:
        return "supports float32, bfloat16 and float16, not float64"
    if query.shape[-1] > _LARGEST_HEAD_DIM:
        return f"supports head dimensions up to {_LARGEST_HEAD_DIM}, not {query.shape[-1]}"
    return None


def run(
    kernel,
    inputs: Sequence[jax.Array | int],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    programs: int,
    constants: Mapping,
    tiles: Tiles,
    aliases: Mapping[int, int] | None = None,
) -> list[jax.Array]:
    """Runs `programs` programs of a kernel.

    Args:
      kernel: a `triton.jit` function; its parameters are the inputs, the outputs, the constants.
      inputs: arrays and integers, in the order of the parameters.
      outputs: shapes and dtypes; what a program does not write is undefined.
      programs: the size of the one-dimensional grid.
      constants: the kernel's `tl.constexpr` parameters by name, hashable.
      tiles: how many warps a program has, and stages its loops.
      aliases: from the position of an array among the array inputs to that of the output that
        takes its memory over.

    Returns:
      The outputs. Inside shard_map they vary over the axes that any input varies over.
    """
    arrays = [x for x in inputs if not isinstance(x, int)]
    library = _jax_triton().triton_lib
    outs = _primitive().bind(
        *arrays,
        fn=kernel,
        scalar_args=tuple(
            (i, library.get_triton_type(x), x) for i, x in enumerate(inputs) if isinstance(x, int)
        ),
        out_shapes=tuple(outputs),
        grid=(programs,),
        name=kernel.__name__,
        custom_call_target_name="triton_kernel_call",
        compute_capability=nvidia.target().compute_capability,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        num_ctas=1,
        enable_fp_fusion=True,
        input_output_aliases=tuple((aliases or {}).items()),
        zeroed_outputs=(),
        debug=False,
        serialized_metadata=b"",
        MAX_REGISTERS=tiles.max_registers,
        **constants,
    )
    return vary_like(outs, arrays)


@functools.cache
def _primitive():
    """What `jax_triton.triton_call` binds, but for MAX_REGISTERS, which that does not pass on.

    The kernels have a constant of this name, since jax_triton keeps compiled kernels by their
    constants.
    """
    library = _jax_triton().triton_lib
    primitive = jex.core.Primitive("rbf_triton_call")
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(library.triton_kernel_call_abstract_eval)

    def lower(context, *arrays, MAX_REGISTERS, **parameters):
        def backend(device, compute_capability):
            backend = library.get_cuda_backend(device, compute_capability)
            parse = backend.parse_options
            backend.parse_options = lambda given: parse({**given, "maxnreg": MAX_REGISTERS})
            return backend

        parameters["MAX_REGISTERS"] = MAX_REGISTERS
        return library.triton_kernel_call_lowering(backend, context, *arrays, **parameters)

    mlir.register_lowering(primitive, lower, platform="cuda")
    return primitive


@functools.cache
def _jax_triton():
    """Imports jax_triton, which sets an environment variable of Triton's: undoes that."""
    name = "TRITON_CACHE_DIR"
    before = os.environ.get(name)
    try:
        return importlib.import_module("jax_triton")
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
