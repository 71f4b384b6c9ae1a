"""Meshes of the CPU devices, and what a compiled program sends from one device to another."""

import math
import re

import jax
from jax.sharding import AxisType, Mesh

_MOVES = re.compile(r"(all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def collectives(compiled):
    """How often each collective that moves arrays, and does not add them up, is in the program."""
    found = _MOVES.findall(compiled.as_text())
    return {name: found.count(name) for name in set(found)}


def mesh_of(**sizes: int) -> Mesh:
    """Returns a mesh of the first devices with axes of these sizes."""
    devices = jax.local_devices()[: math.prod(sizes.values())]
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)
