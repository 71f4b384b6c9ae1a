"""Letting XLA split an opaque call over devices: by batch and heads, wherever the arrays are.

A custom call to a kernel is a black box to XLA's partitioner, which would gather its operands on
every device. `jax.experimental.custom_partitioning` tells it that batch elements and heads have
nothing to do with each other, whatever the mesh is and its axes are called.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_SPLIT = re.compile("[^bnk]")  # axes that are never split


def unsupported() -> str | None:
    """Returns why no call can be split here, as the rest of a sentence, or None if it can.

    In a shard_map over some axes of a mesh `custom_partitioning` does not know the others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rest = [name for name in mesh.axis_names if name not in mesh.manual_axes]
    if not mesh.manual_axes or not rest:
        return None
    return f"needs a shard_map over all axes of the mesh, and this one leaves out {', '.join(rest)}"


def by_batch_and_heads(
    function: Callable,
    argument_axes: Sequence[str],
    result_axes: Sequence[str],
    *arguments: Any,
) -> Any:
    """Returns ``function(*arguments)``, each device computing its batch elements and heads.

    Heads are split only where the key/value heads can be: the gradient of a key is a sum over the
    query heads that share it.

    Args:
      function: of arrays; may be called on a part of the batch and of the heads.
      argument_axes: a letter for each axis of each array, as in `call.AXES`. "b", "n" and "k" are
        split, the others never. Axes of size 1 are not split either.
      result_axes: likewise, of the results.
      *arguments: pytrees of arrays; the first array has batch and query heads.
    """
    leaves = jax.tree.leaves(arguments)
    roles = [_split_roles(x, letters) for x, letters in zip(leaves, argument_axes)]
    result_roles = [_SPLIT.sub(".", letters) for letters in result_axes]
    num_heads = math.gcd(
        *(
            size
            for x, letters in zip(leaves, argument_axes)
            for size, letter in zip(x.shape, letters)
            if letter == "k" or (letter == "n" and size > 1)
        )
    )

    def shardings(mesh: Mesh, arguments: Any, all_roles: Sequence[str]) -> list[NamedSharding]:
        """As the first array lies on the mesh."""
        spec = jax.tree.leaves(arguments)[0].sharding.spec
        axes = dict(zip(roles[0], (*spec, *[None] * len(roles[0]))))
        heads = axes.get("n")
        names = (heads,) if isinstance(heads, str) else heads or ()
        if num_heads % math.prod(mesh.shape[name] for name in names):
            heads = None
        axes |= {"n": heads, "k": heads, ".": None, "b": axes.get("b")}
        return [NamedSharding(mesh, P(*(axes[x] for x in letters))) for letters in all_roles]

    def like(tree: Any, leaves: list) -> Any:
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    def partition(mesh, given, made):
        result_shardings = like(made, shardings(mesh, given, result_roles))
        return mesh, function, result_shardings, like(given, shardings(mesh, given, roles))

    def infer(mesh, given, made):
        return like(made, shardings(mesh, given, result_roles))

    rule, whole = _rule(roles, result_roles)
    split = custom_partitioning(function)
    split.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=rule,
        need_replication_factors=whole,
    )
    call = jax.custom_jvp(split)
    call.defjvp(_no_forward_mode)
    return call(*arguments)


def _no_forward_mode(primals, tangents):
    raise NotImplementedError(
        "The kernels of 'triton' and 'mosaic' have no forward-mode derivatives (jvp), nor "
        "derivatives of their gradients; 'xla' has the jvp of gradients, 'reference' has all."
    )


def _split_roles(array: jax.Array, letters: str) -> str:
    letters = _SPLIT.sub(".", letters)
    return "".join("." if size == 1 else x for size, x in zip(array.shape, letters))


def _rule(
    argument_roles: Sequence[str], result_roles: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """The roles in Shardy's notation, and the names of the axes that must stay whole."""
    whole: list[str] = []

    def name(letter: str) -> str:
        if letter != ".":
            return letter
        whole.append(f"w{len(whole)}")
        return whole[-1]

    sides = [
        ", ".join(" ".join(map(name, letters)) for letters in side)
        for side in (argument_roles, result_roles)
    ]
    return " -> ".join(sides), tuple(whole)
