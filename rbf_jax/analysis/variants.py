"""Which configurations a figure is made of, and what they are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rbf_jax.sweeps import space


@dataclasses.dataclass(frozen=True)
class Variant:
    """A configuration that is trained with all seeds.

    Attributes:
      name: what differs from the base, "kind=dot,positions=rope"; "base" where nothing does.
      changes: value by dotted key of the configuration, where it differs.
      lengths: multiples of the context length to evaluate at in the end.
    """

    name: str
    changes: Mapping[str, Any]
    lengths: tuple[int, ...] = ()


def variants(figure: Any, base: Mapping[str, Any]) -> list[Variant]:
    """Returns the variants of a figure's configuration, each once, in its order.

    Args:
      figure: of configs/figures: a space in the grammar of sweeps, and the multiples of the context
        length to evaluate at.
      base: the configuration that all start from.

    Raises:
      ValueError: the space is malformed.
    """
    flat = space.flat(base)
    found: dict[str, Variant] = {}
    for part in space.parse(figure["space"]):
        for point in part.points():
            changes = {k: v for k, v in point.values.items() if flat.get(k, None) != v}
            name = name_of(changes)
            found.setdefault(name, Variant(name, changes, tuple(figure["lengths"])))
    return list(found.values())


def union(all_variants: Sequence[Variant]) -> list[Variant]:
    """Each variant once, with all lengths that are asked of it."""
    found: dict[str, Variant] = {}
    for variant in all_variants:
        lengths = max(variant.lengths, found.get(variant.name, variant).lengths)
        found[variant.name] = dataclasses.replace(variant, lengths=lengths)
    return list(found.values())


def name_of(changes: Mapping[str, Any]) -> str:
    """What changes, as a file name."""

    def text(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    parts = [f"{key.rpartition('.')[2]}={text(changes[key])}" for key in sorted(changes)]
    return ",".join(parts) or "base"
