"""What forward + backward needs of memory as T grows, and where it needs more than there is.

B 1, N 8, H 64, bfloat16, causal. Programs are compiled for shapes, not run: that tells their
temporary bytes, also where they would not fit. Only RBF's kernels are run, at the longest T.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.clock import Call, Clock, one_line
from experiments.benchmarks.contenders import (
    BASELINE,
    MOSAIC,
    TRITON,
    Cell,
    dot_product,
    memory,
    rbf,
    start_compiling,
)

LENGTHS = tuple(1024 << i for i in range(9))
# What grows with T² is compiled one T after the other, up to where it runs out.
_QUADRATIC = {
    "RBF reference": functools.partial(rbf, implementation="reference"),
    "dot product, jax.nn xla": functools.partial(dot_product, implementation="xla"),
}
_LINEAR = {
    "RBF xla": functools.partial(rbf, implementation="xla"),
    BASELINE: functools.partial(dot_product, implementation="cudnn"),
    TRITON: functools.partial(rbf, implementation="triton"),
    MOSAIC: functools.partial(rbf, implementation="mosaic"),
}


def measure(lengths: Sequence[int], clock: Clock) -> Iterator[dict[str, Any]]:
    """Yields a row per implementation and T; an implementation ends where it runs out or fails."""
    cells = [Cell(1, length, 8, 64, True) for length in sorted(lengths)]
    for name, make in (_QUADRATIC | _LINEAR).items():
        if name in _LINEAR:
            programs = [_start(make, cell) for cell in cells]
        else:
            programs = [functools.partial(_compile, make, cell) for cell in cells]
        for cell, program in zip(cells, programs):
            row = _row(
                name, cell, program, clock, run=name in (TRITON, MOSAIC) and cell is cells[-1]
            )
            yield row
            if row["error"] is not None or row["runs_out"]:
                break


def _row(
    name: str, cell: Cell, compiled: Callable[[], jax.stages.Compiled], clock: Clock, run: bool
) -> dict[str, Any]:
    limit = bytes_limit()
    row: dict[str, Any] = {"implementation": name, "length": cell.length, "bytes_limit": limit}
    row["error"] = None
    try:
        program = compiled()
        row |= _needs(program, limit)
        if run:
            row["milliseconds"] = _run(program, cell, clock)
    except Exception as error:  # The others go on.
        row["error"] = one_line(error)
    return row


def _start(make: Callable[[Cell], Callable], cell: Cell) -> Callable[[], jax.stages.Compiled]:
    """Starts compiling; an error is raised where the program is asked for."""
    try:
        return start_compiling(make(cell), _shapes(cell), True).result
    except Exception:
        return functools.partial(_compile, make, cell)


def _compile(make: Callable[[Cell], Callable], cell: Cell) -> jax.stages.Compiled:
    return start_compiling(make(cell), _shapes(cell), True).result()


def bytes_limit() -> int | None:
    """What JAX may use of the device: 75 % of a GPU unless told otherwise."""
    statistics = jax.devices()[0].memory_stats()
    return statistics.get("bytes_limit") if statistics else None


def line(row: dict[str, Any]) -> str:
    """A row for a person to follow."""
    head = f"memory, T {row['length']}, {row['implementation']}: "
    if row["error"] is not None:
        return head + row["error"]
    run = f", {row['milliseconds']:.0f} ms" if "milliseconds" in row else ""
    out = ", more than there is" if row["runs_out"] else ""
    return head + f"{row['temporary_bytes'] / 2**20:,.1f} MiB{out}{run}"


def _shapes(cell: Cell) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(cell.shape, jnp.bfloat16)] * 4


def _needs(program: jax.stages.Compiled, limit: int | None) -> dict[str, Any]:
    analysis = memory(program)
    temporary, output = analysis.temp_size_in_bytes, analysis.output_size_in_bytes
    arguments = analysis.argument_size_in_bytes
    return {
        "temporary_bytes": temporary,
        "output_bytes": output,
        "argument_bytes": arguments,
        "runs_out": limit is not None and temporary + output + arguments > limit,
    }


def _run(program: jax.stages.Compiled, cell: Cell, clock: Clock) -> float:
    """Milliseconds of one call, whose results must be finite."""
    arrays = cell.arrays()
    results = jax.block_until_ready(program(*arrays))
    if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(results)):
        raise FloatingPointError("results are not finite")
    del results
    return clock.measure(Call(lambda: program(*arrays), jax.block_until_ready), 1).device
