"""Times the decoding kernel with other tiles and other numbers of splits."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from experiments.benchmarks import decode_cells as cells
from experiments.benchmarks.clock import Clock
from experiments.benchmarks.decode_cells import Cell
from rbf_jax.ops.decode.triton import Sizes, choose_sizes
from rbf_jax.ops.gpu import device
from rbf_jax.ops.gpu.triton.config import Tiles

# Short, long, many rows, groups.
CELLS = (
    Cell(1, 8192, 16, 16, 128, 8192),
    Cell(1, 32768, 16, 16, 128, 32768),
    Cell(16, 8192, 16, 16, 128, 8192),
    Cell(16, 8192, 32, 8, 128, 8192),
)
# Keys, warps, stages. The first are those in use.
TILES = (
    (64, 2, 3),
    (64, 4, 3),
    (64, 4, 4),
    (32, 4, 4),
    (32, 2, 4),
    (32, 1, 4),
    (128, 8, 3),
)
# Programs to a multiprocessor.
PROGRAMS = (2, 4, 6, 9, 12)

Times = dict[tuple[Cell, Sizes], float]


def sweep(clock: Clock, rounds: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Returns a row for each cell and sizes: microseconds, or why there are none."""
    arrays = {cell: cell.arrays() for cell in CELLS}
    rows: list[dict[str, Any]] = []

    def run(candidates: Mapping[Cell, Sequence[Sizes]]) -> Times:
        steps = {
            (cell, sizes): (cells.rbf(cell, "triton"), arrays[cell], sizes)
            for cell, all_sizes in candidates.items()
            for sizes in all_sizes
        }
        timings, _, problems = cells.time_in_turns(steps, clock, rounds, 5.0)
        times = {
            key: 1e3 * statistics.median(timing.device for timing in several)
            for key, several in timings.items()
        }
        for (cell, sizes), microseconds in times.items():
            rows.append({**_row(cell, sizes), "microseconds": microseconds})
            speed = 1e-6 * cell.filled_bytes / microseconds
            say(f"{_name(cell)} {_sizes(sizes)}: {microseconds:8.2f} µs {speed:.3f} TB/s")
        for (cell, sizes), problem in problems.items():
            rows.append({**_row(cell, sizes), "error": problem})
            say(f"{_name(cell)} {_sizes(sizes)}: {problem}")
        return times

    def with_tiles(cell: Cell) -> list[Sizes]:
        splits = default(cell).num_splits
        return [Sizes(Tiles(16, keys, warps, stages), splits) for keys, warps, stages in TILES]

    times = run({cell: with_tiles(cell) for cell in CELLS})
    tiles = _best_of_all(times)
    say(f"best tiles in all: {_sizes(Sizes(tiles, 1))}")

    def with_splits(cell: Cell) -> list[Sizes]:
        return [Sizes(tiles, n) for n in splits_of(cell) if (cell, Sizes(tiles, n)) not in times]

    times |= run({cell: with_splits(cell) for cell in CELLS})
    for cell in CELLS:
        own = {sizes: t for (where, sizes), t in times.items() if where == cell}
        best, usual = min(own, key=own.__getitem__), own.get(default(cell), math.nan)
        say(f"best of {_name(cell)}: {_sizes(best)} {own[best]:.2f} µs; by default {usual:.2f} µs")
    return rows


def default(cell: Cell) -> Sizes:
    """What the kernel takes by itself."""
    return choose_sizes(
        heads=cell.batch * cell.kv_heads,
        rows=cell.heads // cell.kv_heads,
        visible=cell.length,
        head_dim=cell.head_dim,
        dtype=jnp.dtype("bfloat16"),
        target=device.target(),
    )


def splits_of(cell: Cell) -> list[int]:
    """Numbers of splits that make so many programs to a multiprocessor."""
    heads, processors = cell.batch * cell.kv_heads, device.target().num_multiprocessors
    found = {max(1, min(128, round(n * processors / heads))) for n in PROGRAMS}
    return sorted(found | {default(cell).num_splits})


def _best_of_all(times: Times) -> Tiles:
    """The tiles whose times are least by geometric mean, of those that ran in every cell."""
    logs: dict[Tiles, list[float]] = {}
    for (_, sizes), microseconds in times.items():
        logs.setdefault(sizes.tiles, []).append(math.log(microseconds))
    everywhere = {tiles: sum(x) for tiles, x in logs.items() if len(x) == len(CELLS)}
    return min(everywhere, key=everywhere.__getitem__)


def _row(cell: Cell, sizes: Sizes) -> dict[str, Any]:
    tiles = sizes.tiles
    return {
        **dataclasses.asdict(cell),
        "block_k": tiles.block_k,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "num_splits": sizes.num_splits,
    }


def _name(cell: Cell) -> str:
    return f"N {cell.heads} K {cell.kv_heads} B {cell.batch} S {cell.length}"


def _sizes(sizes: Sizes) -> str:
    tiles = sizes.tiles
    return (
        f"{tiles.block_k} keys, {tiles.num_warps} warps, {tiles.num_stages} stages, "
        f"{sizes.num_splits} splits"
    )
