"""Where arrays live: the mesh, and which axes of it split parameters and batches.

The mesh always has four axes. Rows of a batch are split over "data" and "fsdp", tokens of a row
over "seq"; parameters over "fsdp", which gathers them where they are used, and "tensor", which
computes with the parts. jit and the compiler do the rest: the model does not know.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rbf_jax.ops.parallel.mesh import BATCH_AXES, SEQUENCE_AXIS
from rbf_jax.ops.parallel.mesh import NAMES as AXES

Batch = Mapping[str, Any]

# Rows over the devices, every parameter on each of them: what pmap did.
DATA_PARALLEL = {"data": -1, "fsdp": 1, "tensor": 1, "seq": 1}
BATCH_SPEC = P(BATCH_AXES, SEQUENCE_AXIS)

# The end of a parameter's path, and which axis splits each of its dimensions. The first rule that
# fits counts; what none fits is whole on every device: norms, biases, registers, SuSiE, γ, λ,
# logits of sinks.
PARAMETER_RULES = (
    (r"embedding/embedding|head", P("tensor", "fsdp")),  # (V, D)
    (r"position_embedding/embedding", P(None, "fsdp")),  # (T, D)
    (r"attention/(query|key|value)/kernel", P("fsdp", "tensor", None)),  # (D, N or K, H)
    (r"attention/out/kernel", P("tensor", None, "fsdp")),  # (N, H, D)
    (r"mlp/in/kernel", P("fsdp", "tensor")),  # (D, mlp_ratio·D)
    (r"mlp/out/kernel", P("tensor", "fsdp")),  # (mlp_ratio·D, D)
)


def axis_sizes(wanted: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """Returns the size of each axis, -1 filled with the devices that the others leave.

    Args:
      wanted: the section `mesh` of configs/base.py.
      num_devices: of the mesh.

    Raises:
      ValueError: the sizes do not make up the devices.
    """
    sizes = {axis: wanted[axis] for axis in AXES}
    text = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh is {text}; each axis must be at least 1, or -1 to fill.")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh is {text}; only one axis may be -1.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    if math.prod(sizes.values()) != num_devices:
        requirement = "must divide" if free else "must be"
        raise ValueError(
            f"mesh is {text}; the product, {fixed}, {requirement} the number of devices, "
            f"{num_devices}."
        )
    return sizes


def make_mesh(
    wanted: Mapping[str, int] = DATA_PARALLEL, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns the mesh of `devices`, by default all.

    Args:
      wanted: the section `mesh` of configs/base.py.
      devices: of the mesh.

    Raises:
      ValueError: the sizes do not make up the devices, or a process would have no rows that it
        shares with either all or none of the devices of another.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(wanted, len(devices))
    # Auto: the compiler spreads the shardings of arguments through the step by itself.
    mesh = jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )
    for process in {device.process_index for device in mesh.devices.flat}:
        data_share(mesh, process)
    return mesh


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Returns how an array of the training state is split.

    Args:
      path: names joined by "/"; only its end counts, so the optimizer's moments follow their
        parameters.
      shape: an axis that does not divide a dimension leaves it whole. An array with another number
        of dimensions than the rule is no such parameter, but, say, a factored moment.
      mesh: of `make_mesh`.
    """
    for pattern, spec in PARAMETER_RULES:
        if re.search(rf"(^|/)({pattern})$", path) and len(spec) == len(shape):
            fits = (
                axis is not None and size % mesh.shape[axis] == 0 for axis, size in zip(spec, shape)
            )
            return P(*(axis if fit else None for axis, fit in zip(spec, fits)))
    return P()


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Returns the sharding of each array of the training state.

    Args:
      mesh: of `make_mesh`.
      state: pytree of arrays or ShapeDtypeStructs.
    """

    def sharding(path: jax.tree_util.KeyPath, array: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, parameter_spec(name, array.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, state)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of (B, T) arrays: each device holds its share of rows and tokens."""
    return NamedSharding(mesh, BATCH_SPEC)


@functools.lru_cache
def data_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Returns which share of each batch's rows a process reads, and of how many shares.

    Processes that hold different tokens of the same rows, or different parts of the model, read
    the same share.

    Args:
      mesh: of `make_mesh`.
      process: its index; None for this process.

    Raises:
      ValueError: some processes share a part of their rows only.
    """
    process = jax.process_index() if process is None else process
    rows = mesh.devices.reshape(math.prod(mesh.shape[axis] for axis in BATCH_AXES), -1)
    held: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        for owner in {device.process_index for device in row}:
            held.setdefault(owner, []).append(number)
    mine = held[process]
    index, count = mine[0] // len(mine), len(rows) // len(mine)
    even = all(len(numbers) == len(mine) for numbers in held.values())
    if not even or mine != list(range(index * len(mine), (index + 1) * len(mine))):
        text = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise ValueError(
            f"mesh is {text}; tensor × seq must divide the devices of a process, or be a multiple "
            "of them, so that processes share rows wholly or not at all."
        )
    return index, count


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """Puts this process's share of a batch on its devices.

    Args:
      batch: arrays (B / shares, T), the rows of `data_share`.
      mesh: of `make_mesh`.

    Returns:
      Arrays (B, T).
    """
    sharding = batch_sharding(mesh)
    index, count = data_share(mesh)

    def place(array: np.ndarray) -> jax.Array:
        shape = (count * array.shape[0], *array.shape[1:])

        def part(slices: Any) -> np.ndarray:
            start, stop, _ = slices[0].indices(shape[0])
            first = index * array.shape[0]
            return array[(slice(start - first, stop - first), *slices[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: place(array) for name, array in batch.items()}


def keep_rows_split(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """For `flax.linen.intercept_methods`: what modules return stays split by rows.

    Left to itself, the compiler may rather gather the rows than parameters that "fsdp" splits. It
    needs the mesh of `on_mesh`; without one nothing is split.
    """
    del context
    sizes = jax.sharding.get_abstract_mesh().shape
    shares = math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)

    def keep(x: Any) -> Any:
        if shares == 1 or not isinstance(x, jax.Array) or x.ndim < 3 or x.shape[0] % shares:
            return x
        return jax.lax.with_sharding_constraint(
            x, P(BATCH_AXES, *(P.UNCONSTRAINED,) * (x.ndim - 1))
        )

    return jax.tree.map(keep, next_function(*args, **kwargs))


def gather_outer(params: Any) -> Any:
    """Returns the parameters with those outside the blocks whole along "fsdp": the head, which the
    loss uses chunk by chunk, is then gathered once. It needs the mesh of `on_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params

    def gather(path: jax.tree_util.KeyPath, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("block_"):
            return x
        spec = parameter_spec(name, x.shape, mesh)
        return jax.lax.with_sharding_constraint(x, P(*(a if a != "fsdp" else None for a in spec)))

    return jax.tree_util.tree_map_with_path(gather, params)


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, which then finds the mesh when it is traced, as attention does.

    Args:
      mesh: of `make_mesh`.
      function: jitted, or to be traced at once.
    """

    def call(*args: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*args)

    return call
