"""Time and memory of attention, forward and forward + backward, beside jax.nn's dot product.

    python -m experiments.bench_attention [--lengths=512,1024,…] [--out=FILE.json]
    python -m experiments.bench_attention --dtype=bfloat16        on an NVIDIA GPU: beside cuDNN
    python -m experiments.bench_attention --suite=gpu [--lengths=…] [--head_dims=…] [--out=FILE]
    python -m experiments.bench_attention --draw=FILE.json [--figure=STEM]

The suite "gpu" measures all implementations by device time, beside cuDNN's dot product and
PyTorch's FlexAttention, with a memory table up to T = 262,144: experiments/benchmarks. --draw makes
its figure, STEM.png and STEM.svg, and needs no GPU. What follows is about the other one, quick.

FILE.md, written beside FILE.json, is docs/speed.md's short table of forward + backward.

All implementations run in one process, interleaved round by round on the same inputs, so that a
machine that slows down slows all of them. A time is the median over the rounds, memory what the
compiled program says it needs for temporaries. Where a program needs more than --memory_limit, its
memory is printed and it is not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.benchmarks import gpu_command
from experiments.benchmarks.contenders import forward_and_backward, memory
from experiments.benchmarks.options import command_line, json_file, lengths, positive
from rbf_jax import environment, rbf_attention
from rbf_jax.data.files import write_text

PASSES = {"forward": "fwd", "forward+backward": "fwd+bwd"}


@dataclasses.dataclass(frozen=True)
class Result:
    """One cell: milliseconds (None: not run) and bytes of temporaries."""

    implementation: str
    length: int
    direction: str
    milliseconds: float | None
    temporary_bytes: int


def implementations(is_causal: bool, dtype: jnp.dtype) -> dict[str, Callable]:
    """Returns what is measured: the baseline dot product, the best RBF, another RBF to compare."""
    dot = functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)
    rbf = functools.partial(rbf_attention, is_causal=is_causal)
    if jax.default_backend() == "gpu" and dtype.itemsize == 2:
        return {
            "dot, jax.nn cudnn": functools.partial(dot, implementation="cudnn"),
            "rbf": functools.partial(rbf, implementation=None),
            "rbf xla": functools.partial(rbf, implementation="xla"),
        }
    return {
        "dot, jax.nn xla": functools.partial(dot, implementation="xla"),
        "rbf xla": functools.partial(rbf, implementation="xla"),
        "rbf reference": functools.partial(rbf, implementation="reference"),
    }


def measure(length: int, options: argparse.Namespace) -> list[Result]:
    """Compiles and times every implementation at one length, T = S."""
    shape = options.batch, length, options.heads, options.head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, shape, options.dtype) for key in keys]
    programs = {}
    for name, attend in implementations(options.causal, options.dtype).items():
        for direction in PASSES:
            backward = direction == "forward+backward"
            function = forward_and_backward(attend) if backward else attend
            arguments = arrays if backward else arrays[:3]
            programs[name, direction] = jax.jit(function).lower(*arguments).compile(), arguments

    temporaries = {
        key: memory(program).temp_size_in_bytes for key, (program, _) in programs.items()
    }
    runnable = {
        key: program
        for key, program in programs.items()
        if temporaries[key] <= options.memory_limit * 2**30
    }
    times: dict[Any, list[float]] = {key: [] for key in programs}
    for program, arguments in runnable.values():
        jax.block_until_ready(program(*arguments))  # warm-up
    for _ in range(options.rounds):
        for key, (program, arguments) in runnable.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            times[key].append(1e3 * (time.perf_counter() - start))
    return [
        Result(
            name,
            length,
            direction,
            statistics.median(t) if t else None,
            temporaries[name, direction],
        )
        for (name, direction), t in times.items()
    ]


def table(results: Sequence[Result], title: str) -> Table:
    """A row per length and implementation, with ratios to the baseline of the same length."""
    by_cell = {(r.implementation, r.length, r.direction): r for r in results}
    first = results[0].implementation
    grid = Table(title=title)
    grid.add_column("T", justify="right")
    grid.add_column("implementation", no_wrap=True)
    for short in PASSES.values():
        for column in (f"{short}\nms", "of\ndot", f"{short}\nMiB"):
            grid.add_column(column, justify="right", no_wrap=True)
    previous = None
    for length, name in dict.fromkeys((r.length, r.implementation) for r in results):
        if previous not in (None, length):
            grid.add_section()
        previous = length
        cells = []
        for direction in PASSES:
            result = by_cell[name, length, direction]
            baseline = by_cell[first, length, direction].milliseconds
            ours = result.milliseconds
            cells.append("-" if ours is None else f"{ours:.1f}")
            cells.append("" if ours is None or baseline is None else f"{ours / baseline:.2f}")
            cells.append(f"{result.temporary_bytes / 2**20:.0f}")
        grid.add_row(f"{length}", name, *cells)
    return grid


def markdown(results: Sequence[Result]) -> str:
    """The short table: forward + backward, the baseline and the first RBF implementation."""
    baseline, ours = list(dict.fromkeys(r.implementation for r in results))[:2]
    cells = {(r.implementation, r.length): r for r in results if r.direction == "forward+backward"}
    lines = [
        "| T = S | dot product, ms | RBF, ms | ratio | dot product, MiB | RBF, MiB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for length in dict.fromkeys(r.length for r in results):
        dot, rbf = cells[baseline, length], cells[ours, length]
        times = [r.milliseconds for r in (dot, rbf)]
        texts = [
            "not run" if time is None else f"{time:,.0f}" if time >= 10 else f"{time:.2g}"
            for time in times
        ]
        ratio = ""
        if dot.milliseconds is not None and rbf.milliseconds is not None:
            ratio = f"{rbf.milliseconds / dot.milliseconds:.2f}"
        memory = [f"{r.temporary_bytes / 2**20:,.0f}" for r in (dot, rbf)]
        lines.append("| " + " | ".join([f"{length:,}", *texts, ratio, *memory]) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    suite = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_suite(suite)
    chosen, _ = suite.parse_known_args(argv[1:])
    if chosen.draw is not None or chosen.suite == "gpu":
        return gpu_command.main(argv)
    options = _parse(argv)
    results: list[Result] = []
    console = Console()
    settings = {
        "batch": options.batch,
        "heads": options.heads,
        "head_dim": options.head_dim,
        "dtype": options.dtype.name,
        "causal": options.causal,
        "rounds": options.rounds,
    }
    about = {
        "command": command_line("bench_attention", argv),
        **environment.describe(),
        **settings,
    }
    out = Path(options.out)
    for length in track(options.lengths, description="lengths", console=console):
        results += measure(length, options)
        # After each length: a later one may run out of memory.
        content = {**about, "results": [dataclasses.asdict(result) for result in results]}
        write_text(out, json.dumps(content, indent=1) + "\n")
        write_text(out.with_suffix(".md"), markdown(results))
    described = ", ".join(f"{name} {value}" for name, value in settings.items())
    console.print(table(results, f"{described}\n{about['device']}, {about['date']}"))
    console.print(f"written to {out} and {out.with_suffix('.md').name} beside it")
    return 0


def _add_suite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite",
        choices=("quick", "gpu"),
        default="quick",
        help='"gpu" has options of its own: --suite=gpu --help',
    )
    parser.add_argument("--draw", help="draw the figure of this JSON file of --suite=gpu")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_attention", description=__doc__.partition("\n")[0])
    _add_suite(parser)
    default = lengths("512,1024,2048,4096,8192,32768")
    parser.add_argument("--lengths", type=lengths, default=default)
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--heads", type=positive, default=8)
    parser.add_argument("--head_dim", type=positive, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument(
        "--memory_limit",
        type=_gibibytes,
        default=6.0,
        help="GiB of temporaries (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=json_file,
        default="runs/bench_attention.json",
        help="JSON file to write (default: %(default)s)",
    )
    options = parser.parse_args(argv[1:])
    options.dtype = jnp.dtype(options.dtype)
    return options


def _gibibytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of GiB, 0 or more")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv))
