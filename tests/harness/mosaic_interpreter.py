"""Pallas's interpreter of Mosaic GPU kernels, made to run those of this project on the CPU.

The interpreter (of jax 0.10.2) simulates warpgroups as threads, barriers, TMA loads and wgmma, and
raises where a barrier is passed twice or never. What it lacks is added here: accumulators that
start from a value (`pl.run_state`), loads by `plgpu.load`, wgmma of an operand in registers or of a
transposed one, stores that are cut off at the end of an array or add to it, arrays that a kernel
changes, and keeping the compiled program of a kernel for all its warpgroups and blocks. Loads
beyond the end of an array give zeros, as TMA's.
"""

import contextlib
import functools
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import callback
from jax._src.pallas import primitives as pallas_primitives
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic.interpret import utils as interpret_utils
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives as gpu_primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, params
from jax._src.state import discharge, indexing
from jax._src.state import primitives as state_primitives
from jax._src.state import types as state_types

from rbf_jax.ops.gpu import program
from rbf_jax.ops.parallel import custom_partitioning

_REPLACED = {
    gpu_primitives.load_p: state_primitives.get_p,
    discharge.run_state_p: pallas_primitives.run_scoped_p,
}


_LOCK = threading.Lock()
_is_gmem = gpu_callbacks.is_gmem_memory_space


class _Interpreter(jaxpr_interpret.JaxprInterpreter):
    def interpret(self, jaxpr, token, *args):
        def known(eqn):
            if eqn.primitive is gpu_core.layout_cast_p:
                return eqn.replace(primitive=jax.lax.copy_p, params={})
            return eqn.replace(primitive=_REPLACED.get(eqn.primitive, eqn.primitive))

        return super().interpret(jaxpr.replace(eqns=[known(x) for x in jaxpr.eqns]), token, *args)

    def _interpret_run_scoped_p(self, eqn, token, get_invals):
        if "which_linear" not in eqn.params:
            return super()._interpret_run_scoped_p(eqn, token, get_invals)
        where = {
            "device_id": jnp.int32(self.device_info.device_id),
            "grid_point_coords": self.grid_point_coords,
            "thread_id": self.thread_id,
        }
        arguments, accumulators = [], []
        for value, out in zip(get_invals(), eqn.outvars, strict=True):
            if isinstance(out.aval, state_types.AbstractRef):
                arguments.append(value)
                continue
            token, request = gpu_callbacks.call_make_allocation_request_array(
                token=token,
                device_id=where["device_id"],
                memory_space_id=gpu_callbacks.get_memory_space_idx(gpu_core.MemorySpace.REGS),
                thread_id=self.thread_id,
                initial_ref_count=1,
            )
            token, key = gpu_callbacks.call_allocate_buffer(
                token=token, allocation_request_as_array=request, value=value, **where
            )
            arguments.append(key)
            accumulators.append(key)
        token, _ = self.interpret(eqn.params["jaxpr"], token, *arguments)
        outs = []
        for argument, out in zip(arguments, eqn.outvars, strict=True):
            if isinstance(out.aval, state_types.AbstractRef):
                outs.append(argument)
                continue
            token, value = gpu_callbacks.call_get(
                token=token,
                result_shape_and_dtype=out.aval,
                allocation_key_as_array=argument,
                transforms=(),
                **where,
            )
            token = gpu_callbacks.call_deallocate_buffer(
                token=token, allocation_key_as_array=argument, **where
            )
            outs.append(value)
        return token, outs

    def _interpret_wgmma_ref_p(self, eqn, token, get_invals):
        acc, a, b, *leaves = get_invals()
        trees = [eqn.params[f"{x}_transforms_tree"] for x in ("acc", "a", "b")]
        trees = [jax.tree.structure([]) if x is None else x for x in trees]
        transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
        a_is_ref = isinstance(eqn.invars[1].aval, state_types.AbstractRef)
        wgmma = functools.partial(_wgmma, a_is_ref)
        operands = (self.thread_id, acc, a, b, transforms)
        shape = gpu_callbacks.TOKEN_SHAPE_DTYPE
        return callback.io_callback(wgmma, shape, token, *operands), []

    def _interpret_copy_smem_to_gmem_p(self, eqn, token, src, dst, *flat, **parameters):
        trees = [parameters[f"{x}_transforms_treedef"] for x in ("src", "dst")]
        transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), flat)
        store = functools.partial(_store, parameters["reduction_op"])
        shape = gpu_callbacks.TOKEN_SHAPE_DTYPE
        return callback.io_callback(store, shape, token, self.thread_id, src, dst, transforms), []


def _read(key, transforms, thread_id) -> np.ndarray:
    """The contents of a buffer after indexing and transposing it."""
    memory = gpu_callbacks._get_shared_memory()
    indexers = [x for x in transforms if isinstance(x, indexing.NDIndexer)]
    content, *_ = memory.get_buffer_content(
        gpu_callbacks.HostAllocationKey.from_array(key),
        interpret_utils.to_range(jax.tree.map(int, indexers)),
        memory.get_global_thread_id(0, int(thread_id)),
    )
    transposed = any(isinstance(x, state_types.TransposeTransform) for x in transforms)
    return content.T if transposed else content


def _write(key, where, value, thread_id) -> None:
    memory = gpu_callbacks._get_shared_memory()
    thread = memory.get_global_thread_id(0, int(thread_id))
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    memory.store_buffer_content(key, where, value, thread)


def _wgmma(a_is_ref, token, thread_id, acc, a, b, transforms):
    acc_transforms, a_transforms, b_transforms = transforms
    a = _read(a, a_transforms, thread_id) if a_is_ref else np.asarray(a)
    b = _read(b, b_transforms, thread_id)
    with np.errstate(all="ignore"):
        product = a.astype(np.float32) @ b.astype(np.float32)
        _write(acc, (), _read(acc, acc_transforms, thread_id) + product, thread_id)
    return token


def _store(reduction, token, thread_id, src, dst, transforms):
    """What is beyond the end of the array is left out."""
    src_transforms, dst_transforms = transforms
    value = _read(src, src_transforms, thread_id)
    memory = gpu_callbacks._get_shared_memory()
    key = gpu_callbacks.HostAllocationKey.from_array(dst)
    indexers = [x for x in dst_transforms if isinstance(x, indexing.NDIndexer)]
    where = interpret_utils.to_range(jax.tree.map(int, indexers))
    where += (slice(None),) * (len(memory.mem[key].shape) - len(where))
    kept, cut = [], []
    for index, size in zip(where, memory.mem[key].shape, strict=True):
        if isinstance(index, slice):
            start = index.start or 0
            stop = size if index.stop is None else min(index.stop, size)
            kept.append(slice(start, stop))
            cut.append(slice(0, max(stop - start, 0)))
            if start >= size:
                return token
        else:
            kept.append(index)
    value = value[tuple(cut)]
    if reduction is None:
        _write(dst, tuple(kept), value, thread_id)
        return token
    if reduction != "add":
        raise NotImplementedError(f"reduction_op={reduction!r} must be 'add'.")
    with _LOCK:  # the copy engine adds each number at once
        memory.mem[key].content[tuple(kept)] += value
    return token


@functools.lru_cache(maxsize=8)
def _compiled(jaxpr, num_consts, shapes):
    def run(*arguments):
        jax.core.eval_jaxpr(jaxpr, arguments[:num_consts], *arguments[num_consts:])

    lowered = jax.jit(run).lower(*[jax.ShapeDtypeStruct(*x) for x in shapes])
    return lowered.compile({"xla_backend_optimization_level": 0})


def _run_jaxpr(jaxpr, consts, *arguments):
    arguments = [np.asarray(x) for x in (*consts, *arguments)]
    with _LOCK:
        run = _compiled(jaxpr, len(consts), tuple((x.shape, x.dtype) for x in arguments))
    run(*arguments)


@contextlib.contextmanager
def interpreted():
    """Kernels of programs that are traced and run within it are interpreted."""
    given = params.InterpretGPUParams(
        detect_races=False, out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
    )
    with (
        params.force_gpu_interpret_mode(given),
        mock.patch.object(jaxpr_interpret, "JaxprInterpreter", _Interpreter),
        mock.patch.object(thread_map, "_run_jaxpr", _run_jaxpr),
        # Arrays that a kernel is given as refs, since it changes them, name no memory.
        mock.patch.object(
            gpu_callbacks, "is_gmem_memory_space", lambda x: x is None or _is_gmem(x)
        ),
        # The interpreter's callbacks are ordered, which custom_partitioning does not allow.
        mock.patch.object(
            custom_partitioning, "by_batch_and_heads", lambda call, _, __, *given: call(*given)
        ),
    ):
        program.compiled.clear_cache()
        try:
            yield
        finally:
            program.compiled.clear_cache()
