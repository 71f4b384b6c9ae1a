"""Runs the Triton kernels without a GPU, by Triton's interpreter; to be imported before Triton.

A process that has imported this runs `implementation="triton"` on the CPU: the kernel launches are
calls of the interpreter on NumPy arrays, through `jax.pure_callback`. What surrounds them, and the
kernels' source, are those of the GPU. Outputs start as NaN, so that an unwritten element shows.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from triton.runtime import interpreter

from rbf_jax.ops import nvidia
from rbf_jax.ops.triton import attention, launch

_NAMES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
    "bool": "i1",
    **{f"int{n}": f"i{n}" for n in (8, 16, 32, 64)},
    **{f"uint{n}": f"u{n}" for n in (8, 16, 32, 64)},
}

# Of every launch since this was last cleared: the kernel's name and its outputs.
launches: list[tuple[str, list[np.ndarray]]] = []


class _Memory:
    """A NumPy array, with what the interpreter asks of a tensor on the CPU."""

    def __init__(self, array):
        self.array, self.dtype = array, _NAMES[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def _itself(self, *_, **__):
        return self

    untyped_storage = cpu = new_empty = set_ = copy_ = _itself
    storage_offset = size = stride = _itself


def _cast(self, src, dst_type, cast=interpreter.InterpreterBuilder.cast_impl):
    """The interpreter's own cast to bfloat16 truncates; a GPU rounds to the nearest."""
    if src.dtype.scalar.name == "fp32" and dst_type.scalar.name == "bf16":
        data = src.data.astype(jnp.bfloat16).view(np.uint16)
        return interpreter.TensorHandle(data, dst_type.scalar)
    return cast(self, src, dst_type)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """The interpreter's own multiplies bfloat16 as integers, and adds in an order of BLAS's choice.

    A tensor core adds alike for a·b and its transpose; so does float64, rounded once.
    """

    def widened(x):
        bfloat16 = x.get_element_ty().name == "bf16"
        return (x.data.view(jnp.bfloat16) if bfloat16 else x.data).astype(np.float64)

    data = np.matmul(widened(a), widened(b)).astype(np.float32) + d.data
    return interpreter.TensorHandle(data, d.dtype.scalar)


def _patch_tensor(tensor, scope, patch=interpreter._patch_lang_tensor):
    """Scalars are arrays of one element there, which NumPy ≥ 2.4 does not take for an index."""
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _run(kernel, inputs, outputs, *, programs, constants, tiles, aliases=None):
    is_array = [not isinstance(x, int) for x in inputs]

    def call(*arrays):
        arrays = [np.array(x) for x in arrays]
        outs = []
        for i, shape in enumerate(outputs):
            old = next((a for a, o in (aliases or {}).items() if o == i), None)
            empty = np.nan if np.dtype(shape.dtype).kind not in "iub" else -1
            outs.append(np.full(shape.shape, empty, shape.dtype) if old is None else arrays[old])
        left = iter(arrays)
        arguments = [next(left) if array else x for x, array in zip(inputs, is_array)]
        memory = [x if isinstance(x, int) else _Memory(x) for x in [*arguments, *outs]]
        with np.errstate(all="ignore"):  # log2(0) is no more than that on a GPU
            kernel[(programs,)](*memory, **constants, MAX_REGISTERS=None)
        launches.append((kernel.__name__, outs))
        return tuple(outs)

    arrays = [x for x, array in zip(inputs, is_array) if array]
    return list(jax.pure_callback(call, tuple(outputs), *arrays))


interpreter.InterpreterBuilder.create_dot = _dot
interpreter.InterpreterBuilder.cast_impl = _cast
interpreter._patch_lang_tensor = _patch_tensor
launch.run = _run
launch.unavailable = lambda: None
nvidia.target = lambda: nvidia.Target("Triton's interpreter", 90)
attention._GATE_PROGRAMS = 2
