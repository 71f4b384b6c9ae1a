"""Runs the Triton kernels without a GPU, by Triton's interpreter.

Within `interpreted()`, `implementation="triton"` runs on the CPU: kernel launches are calls of the
interpreter on NumPy arrays, through `jax.pure_callback`. What surrounds them, and the kernels'
source, are those of the GPU. Outputs start as NaN, so that an unwritten element shows.

`@triton.jit` decides at import whether a function is compiled or interpreted. Here it is always
compiled: the context replaces the compiled functions of this project and of Triton's language by
interpreted ones and puts them back, so that one process can do both.
"""

import contextlib
import functools
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import triton.experimental.gluon  # noqa: F401 (imported by a launch, and takes compiled functions)
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from rbf_jax.ops.decode import triton_kernels  # noqa: F401 (here and below: to be interpreted)
from rbf_jax.ops.gpu import device
from rbf_jax.ops.gpu.triton import backward, forward, launch, passes  # noqa: F401

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


@functools.cache
def _interpreted(function: JITFunction) -> interpreter.InterpretedFunction:
    return interpreter.InterpretedFunction(function.fn)


@contextlib.contextmanager
def _language():
    """Within it Triton's language computes on NumPy arrays.

    The interpreter does this again for every call of a function, which takes most of its time.
    """
    scope = interpreter._LangPatchScope()
    everywhere = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    language = interpreter._patch_lang(everywhere)
    # Scalars are arrays of one element, which NumPy ≥ 2.4 does not take for an index.
    scope.set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())
    scope.set_attr(interpreter, "_patch_lang", lambda _: interpreter._LangPatchScope())
    try:
        yield
    finally:
        scope.restore()
        language.restore()


@contextlib.contextmanager
def interpreted():
    """Kernels of programs that are traced and run within it are interpreted."""
    replaced = [
        (module, name, _interpreted(value))
        for path, module in list(sys.modules.items())
        if path.startswith(("triton.language", "rbf_jax.ops.gpu.triton.", "rbf_jax.ops.decode."))
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    ]
    replaced += [
        (interpreter.InterpreterBuilder, "create_dot", _dot),
        (interpreter.InterpreterBuilder, "cast_impl", _cast),
        (launch, "run", _run),
        (launch, "unavailable", lambda: None),
        # Programs are kept by it: none of them is taken for one that is compiled.
        (device, "target", lambda: device.Target("Triton's interpreter", 90)),
        (passes, "_GATE_PROGRAMS", 2),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_language())
        yield
