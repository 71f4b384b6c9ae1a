"""Times the operation of two checkouts of this project in one process, cell by cell.

    python -m experiments.benchmarks.two_checkouts --before=DIR [--implementations=triton,mosaic]
        [--head_dims=64,128] [--lengths=512,4096,16384] [--out=FILE.json]

At B·T = 16,384 and N·H = 2,048, bfloat16, causal and full, forward and forward + backward. Each
program repeats its call in a loop with a barrier, so that host launches do not count; the programs
of both checkouts take turns round by round on the same random arrays, and a time is the median over
the rounds. `before` is the checkout in DIR, `after` the one that this program is in.

Hardware: a GPU that nothing else runs on. Exit status: 0 measured; 2 wrong command.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.benchmarks.contenders import Cell
from experiments.benchmarks.options import command_line, json_file, lengths
from rbf_jax import environment
from rbf_jax.data.files import write_text

TOKENS, WIDTH, ROUNDS, MILLISECONDS = 16384, 2048, 9, 40.0


def operation(checkout: Path) -> Callable:
    """Imports `rbf_attention` of a checkout, apart from any that is imported already."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "rbf_jax"]:
        del sys.modules[name]
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module("rbf_jax").rbf_attention
    finally:
        sys.path.remove(str(checkout))


def lowered(attend: Callable, arrays: Sequence[jax.Array], backward: bool, repeats: int):
    """Lowers so many calls in sequence; all that the operation imports is imported here."""

    def once(q, k, v, dout):
        if not backward:
            return (attend(q, k, v),)
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    def loop(*arrays):
        def body(_, carry):
            arrays, _ = carry
            return jax.lax.optimization_barrier((arrays, once(*arrays)))

        results = jax.tree.map(jnp.zeros_like, jax.eval_shape(once, *arrays))
        return jax.lax.fori_loop(0, repeats, body, (arrays, results))[1]

    return jax.jit(loop).lower(*arrays)


def cells(options: argparse.Namespace):
    """Yields (implementation, H, T, causal, backward)."""
    return itertools.product(
        options.implementations, options.head_dims, options.lengths, (True, False), (False, True)
    )


def prepare(attend: Callable, options: argparse.Namespace) -> dict:
    """Returns the compiled program of each cell and how often it repeats its call."""
    programs = {}
    for name, H, T, causal, backward in cells(options):
        call = functools.partial(attend, is_causal=causal, implementation=name)
        milliseconds = 0.05 + size(H, T, causal).operations(backward) / 4e11
        repeats = max(2, min(100, int(MILLISECONDS / milliseconds)))
        program = lowered(call, make_arrays(H, T), backward, repeats)
        programs[name, H, T, causal, backward] = program, repeats
    with ThreadPoolExecutor() as pool:
        compiling = {
            cell: (pool.submit(program.compile), repeats)
            for cell, (program, repeats) in programs.items()
        }
    return {cell: (program.result(), repeats) for cell, (program, repeats) in compiling.items()}


def size(H: int, T: int, causal: bool = True) -> Cell:
    """The size of the attention of a cell."""
    return Cell(TOKENS // T, T, WIDTH // H, H, causal)


@functools.lru_cache(maxsize=1)
def make_arrays(H: int, T: int) -> list[jax.Array]:
    """Random q, k, v and cotangent."""
    return size(H, T).arrays()


def measure(before, after, arrays) -> tuple[float, float]:
    """Medians of the two programs in milliseconds per call."""
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS + 1):
        for (run, repeats), found in zip((before, after), times):
            start = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            found.append(1e3 * (time.perf_counter() - start) / repeats)
    first, second = (statistics.median(found[1:]) for found in times)
    return first, second


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="two_checkouts", description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--implementations", type=lambda x: x.split(","), default="triton,mosaic")
    parser.add_argument("--head_dims", type=lengths, default=[64, 128])
    parser.add_argument("--lengths", type=lengths, default=[512, 4096, 16384])
    parser.add_argument("--out", type=json_file, default="runs/two_checkouts.json")
    options = parser.parse_args(argv[1:])
    if isinstance(options.implementations, str):
        options.implementations = options.implementations.split(",")
    here = Path(__file__).parents[2]
    prepared = [prepare(operation(path.resolve()), options) for path in (options.before, here)]
    rows = []
    for cell in cells(options):
        name, H, T, causal, backward = cell
        before, after = measure(prepared[0][cell], prepared[1][cell], make_arrays(H, T))
        what = f"{name:7s} H {H:3d} T {T:6,d} {'causal' if causal else 'full  '} "
        what += "f+b" if backward else "fwd"
        print(f"{what} {before:8.3f} {after:8.3f} ms {after / before - 1:+.1%}", flush=True)
        rows.append(
            {
                **dict(zip(("implementation", "head_dim", "length", "causal", "backward"), cell)),
                "before": before,
                "after": after,
            }
        )
    content = {"command": command_line("benchmarks.two_checkouts", argv), **environment.describe()}
    write_text(Path(options.out), json.dumps({**content, "cells": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
