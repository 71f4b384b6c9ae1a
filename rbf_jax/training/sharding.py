"""Where arrays live: a mesh of all devices, parameters everywhere, batches split by rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Batch = Mapping[str, Any]


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of `devices`, by default all, with the one axis "data"."""
    devices = jax.devices() if devices is None else devices
    # Auto: the compiler spreads the shardings of arguments through the step by itself.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Returns the sharding of each array of the training state: every device holds it whole.

    Args:
      mesh: of `make_mesh`.
      state: pytree of arrays or ShapeDtypeStructs.
    """
    return jax.tree.map(lambda _: replicated(mesh), state)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of (B, T) arrays: each device holds its share of the rows."""
    return NamedSharding(mesh, PartitionSpec("data"))


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """Puts this process's rows of a batch on its devices.

    Args:
      batch: arrays (rows of this process, T).
      mesh: of `make_mesh`.

    Returns:
      Arrays (B, T), B counting the rows of all processes.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
