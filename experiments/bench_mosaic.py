"""Times the forward Mosaic GPU kernel with different tiles, beside cuDNN and Triton.

    python -m experiments.bench_mosaic [--head_dims=64,128,256] [--lengths=8192]
        [--dtype=bfloat16] [--out=FILE.json]

At B·T = 16,384 and N·H = 2,048, causal and full. All programs of a cell take turns, round by round,
on the same random arrays. A time is the median over the rounds, by the GPU's own clock where there
is one (experiments/benchmarks/clock.py). A line gives the time, TFLOP/s, and cuDNN's time for the
dot product over it. Tiles whose results differ from those of "xla" are reported and not timed. The
file holds the medians and is written after each cell. The best tiles belong into
`rbf_jax.ops.gpu.mosaic.config.choose`.

Hardware: a GPU of compute capability 9.0 that nothing else runs on. Exit status: 0 measured; 2
wrong command or no such GPU.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.clock import Call, Clock, one_line
from experiments.benchmarks.contenders import Cell, dot_product, rbf
from experiments.benchmarks.options import command_line, json_file, lengths
from rbf_jax import environment
from rbf_jax.data.files import write_text
from rbf_jax.ops.gpu import device
from rbf_jax.ops.gpu.mosaic.config import (
    BLOCK_Q,
    HEAD_DIMS,
    SHARED_MEMORY,
    ForwardTiles,
    use_tiles,
)
from rbf_jax.ops.gpu.triton import launch

TOKENS, WIDTH, ROUNDS, QUEUE_MILLISECONDS = 16384, 2048, 7, 30.0
_LARGEST_DIFFERENCE = 2e-2  # in units of the largest output
# block_k, stages, tiles_per_cta
_SIZES = [
    *itertools.product((128, 256), (2,), (1, 2, 4, 8)),
    *itertools.product((64,), (2,), (1, 4)),
]


def candidates(head_dim: int) -> Iterator[ForwardTiles]:
    """Yields tiles that fit the shared memory, and whose accumulators may fit the registers."""
    from rbf_jax.ops.gpu.mosaic import common, forward

    query: Any = jax.ShapeDtypeStruct((head_dim,), jnp.bfloat16)
    for sizes in _SIZES:
        tiles = ForwardTiles(*sizes)
        memory = common.shared_memory(forward.memory_of(query, tiles))
        accumulators = BLOCK_Q * (head_dim + tiles.block_k * 3 // 2) // 128
        if memory <= SHARED_MEMORY and accumulators <= tiles.registers[0] + 32:
            yield tiles


def measure(cell: Cell, clock: Clock, say: Callable[[str], None]) -> dict[str, float]:
    """Compiles, compares and times all programs of a cell; returns medians in ms, fastest first."""
    q, k, v = cell.arrays()[:3]
    contenders: dict[str, Any] = {
        "cuDNN dot product": jax.jit(dot_product(cell, "cudnn")),
        "RBF triton": jax.jit(rbf(cell, "triton")),
    }
    for tiles in candidates(cell.head_dim):
        contenders[str(tiles)] = _with_tiles(cell, tiles)
    want = jax.jit(rbf(cell, "xla"))(q[:1], k[:1], v[:1]).astype(jnp.float32)
    programs: dict[str, Callable] = {}
    times: dict[str, list[float]] = {}
    lowered = {name: contender.lower(q, k, v) for name, contender in contenders.items()}
    with ThreadPoolExecutor() as pool:
        compiling = {name: pool.submit(program.compile) for name, program in lowered.items()}
    for name, program in compiling.items():
        try:
            programs[name] = program.result()
            got = jax.block_until_ready(programs[name](q, k, v))[:1].astype(jnp.float32)
        except Exception as error:  # The others go on.
            say(f"{name}: {one_line(error)}")
            continue
        difference = float(jnp.abs(got - want).max() / jnp.abs(want).max())
        if name != "cuDNN dot product" and not difference < _LARGEST_DIFFERENCE:
            say(f"{name}: wrong by {difference:.2g} of the largest output")
            continue
        times[name] = []
    for _ in range(ROUNDS):
        for name, found in times.items():
            call = Call(functools.partial(programs[name], q, k, v), jax.block_until_ready)
            found.append(clock.measure(call, clock.times_for(call, QUEUE_MILLISECONDS)).device)
    medians = {name: statistics.median(found) for name, found in times.items()}
    medians = dict(sorted(medians.items(), key=lambda item: item[1]))
    for name, ms in medians.items():
        speed = 1e-9 * cell.operations(backward=False) / ms
        ratio = medians.get("cuDNN dot product", float("nan")) / ms
        say(f"{ms:8.3f} ms {speed:5.0f} TFLOP/s {ratio:5.2f} {name}")
    return medians


def _with_tiles(cell: Cell, tiles: ForwardTiles) -> Any:
    attend = rbf(cell, "mosaic")

    def call(q, k, v):
        with use_tiles(tiles):
            return attend(q, k, v)

    return jax.jit(call)


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="bench_mosaic", description=__doc__.partition("\n")[0])
    parser.add_argument("--head_dims", type=lengths, default=list(HEAD_DIMS))
    parser.add_argument("--lengths", type=lengths, default=[8192])
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--out", type=json_file, default="runs/bench_mosaic.json")
    options = parser.parse_args(argv[1:])
    problem = launch.unavailable()
    if problem is None and device.target().compute_capability != 90:
        problem = "needs compute capability 9.0"
    if problem is not None:
        print(f"bench_mosaic {problem}.", file=sys.stderr)
        return 2
    clock = Clock()
    content: dict[str, Any] = {
        "command": command_line("bench_mosaic", argv),
        **environment.describe(),
        "dtype": options.dtype,
        "cells": [],
    }
    for H, T, causal in itertools.product(options.head_dims, options.lengths, (False, True)):
        print(f"H {H} T {T} {'causal' if causal else 'full'} {options.dtype}, by {clock.name}")
        cell = Cell(max(1, TOKENS // T), T, max(1, WIDTH // H), H, causal, dtype=options.dtype)
        medians = measure(cell, clock, lambda line: print(line, flush=True))
        content["cells"].append(
            {"head_dim": H, "length": T, "causal": causal, "milliseconds": medians}
        )
        write_text(Path(options.out), json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
