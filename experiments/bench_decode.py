"""Time of a decoding step's attention, beside cuDNN's dot product and a copy of the cache.

    python -m experiments.bench_decode [--lengths=8192,…] [--batches=1,…] [--out=FILE.json]
    python -m experiments.bench_decode --sweep [--out=FILE.json]

A step of one new token reads all keys and values once: at best it takes as long as memory takes.
So each time stands beside that of a copy which moves as many bytes, and as a speed in bytes of keys
and values per second. All take turns round by round on the same random arrays; a time is the median
over the rounds, by the GPU's own clock where there is one (experiments/benchmarks/clock.py).
Caches over --memory_limit are left out. After the cells one is measured again with rows half full.
FILE.md, written beside FILE.json, is the table.

--sweep times the kernel with other tiles, then the best tiles with other numbers of splits, and
prints the best; about a minute.

Hardware: an NVIDIA GPU; elsewhere the XLA path alone is measured, which is good for a look at the
program: --lengths=64 --batches=1,2 --head_dim=16. Exit status: 0 measured; 2 wrong command.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks import decode_cells as cells
from experiments.benchmarks import decode_sweep
from experiments.benchmarks.clock import Clock
from experiments.benchmarks.decode_cells import COPY, CUDNN, TRITON, XLA, Cell
from experiments.benchmarks.options import command_line, json_file, lengths, positive
from rbf_jax import environment
from rbf_jax.data.files import write_text
from rbf_jax.ops.gpu.triton import launch

# The dense pass makes float32 copies of keys and values.
_XLA_BYTES = 2**28


def contenders(cell: Cell) -> dict[str, Any]:
    """What runs here and is worth its time, by name."""
    found: dict[str, Any] = {}
    on_gpu = launch.unavailable() is None
    if on_gpu:
        found |= {TRITON: cells.rbf(cell, "triton"), CUDNN: cells.dot_product(cell)}
    if not on_gpu or cell.cache_bytes <= _XLA_BYTES:
        found[XLA] = cells.rbf(cell, "xla")
    return {**found, COPY: cells.copy}


def measure(cell: Cell, clock: Clock, rounds: int) -> list[dict[str, Any]]:
    """A row for each contender; one that fails has an error instead of a time."""
    arrays = cell.arrays()
    steps = {name: (step, arrays, None) for name, step in contenders(cell).items()}
    times, calls, problems = cells.time_in_turns(steps, clock, rounds, 20.0)
    rows: dict[str, dict[str, Any]] = {
        name: {**dataclasses.asdict(cell), "implementation": name} for name in steps
    }
    for name, problem in problems.items():
        rows[name]["error"] = problem
    for name, timings in times.items():
        seconds = statistics.median(t.device for t in timings) / 1e3
        moved = 2 * calls[name].run().nbytes if name == COPY else cell.filled_bytes
        rows[name] |= {
            "microseconds": 1e6 * seconds,
            "queued_microseconds": 1e3 * statistics.median(t.wall for t in timings),
            "terabytes_per_second": 1e-12 * moved / seconds,
            "kernels": {k: 1e3 * ms for k, ms in timings[-1].kernels.items()},
        }
    if TRITON in calls and XLA in calls:
        rows[TRITON]["difference"] = cells.largest_difference(calls[TRITON], calls[XLA])
    return list(rows.values())


def markdown(content: Mapping[str, Any]) -> str:
    """The table, a line for each cell."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines = [
        "# A decoding step's attention\n",
        f"`{content['command']}`\n",
        f"{content['device']}, {content['date']}; {versions}. One new token, H "
        f"{content['settings']['head_dim']}, bfloat16, random normal inputs; median of "
        f"{content['settings']['rounds']} rounds in which all take turns. Clock: "
        f"{content['clock']['meaning']}. TB/s: bytes of keys and values over time; of the copy, "
        "bytes read and written.\n",
        "| N | K | B | S | filled | RBF triton, µs | TB/s | of the copy's | cuDNN dot product, µs "
        "| over RBF triton | RBF xla, µs | copy, TB/s |",
        "|" + "---:|" * 12,
    ]
    by_cell: dict[Cell, dict[str, Any]] = {}
    names = [field.name for field in dataclasses.fields(Cell)]
    for row in content["results"]:
        cell = Cell(**{name: row[name] for name in names})
        by_cell.setdefault(cell, {})[row["implementation"]] = row
    lines += [_line(cell, rows) for cell, rows in by_cell.items()]
    errors = [
        f"* {row['implementation']}, N {row['heads']} K {row['kv_heads']} B {row['batch']} S "
        f"{row['length']}: {row['error']}"
        for row in content["results"]
        if "error" in row
    ]
    return "\n".join([*lines, *(["\nNot measured:\n"] if errors else []), *errors]) + "\n"


def _line(cell: Cell, rows: Mapping[str, Mapping[str, Any]]) -> str:
    def number(name: str, key: str) -> float | None:
        return rows.get(name, {}).get(key)

    def ratio(a: float | None, b: float | None) -> str:
        return "" if a is None or b is None else f"{a / b:.2f}"

    def text(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    time, speed = number(TRITON, "microseconds"), number(TRITON, "terabytes_per_second")
    dot, copied = number(CUDNN, "microseconds"), number(COPY, "terabytes_per_second")
    texts = [
        *map(str, (cell.heads, cell.kv_heads, cell.batch)),
        *(f"{n:,}" for n in (cell.length, cell.filled)),
        *(text(time, 1), text(speed, 2), ratio(speed, copied)),
        *(text(dot, 1), ratio(dot, time)),
        *(text(number(XLA, "microseconds"), 1), text(copied, 3)),
    ]
    return f"| {' | '.join(texts)} |"


def all_cells(options: argparse.Namespace) -> list[Cell]:
    """Those that are asked for and not too large; the last one again, half full."""
    found = [
        Cell(batch, length, heads, kv_heads, options.head_dim, length)
        for heads, kv_heads in options.heads
        for length in options.lengths
        for batch in options.batches
    ]
    found = [cell for cell in found if cell.cache_bytes <= options.memory_limit * 2**30]
    middle = found[len(found) // 4 : len(found) // 4 + 1]
    return found + [dataclasses.replace(cell, filled=max(1, cell.length // 2)) for cell in middle]


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    options = _parse(argv)
    problem = launch.unavailable()
    if options.sweep and problem is not None:
        print(f"bench_decode: --sweep {problem}.", file=sys.stderr)
        return 2
    clock, out = Clock(), Path(options.out)
    content: dict[str, Any] = {
        "command": command_line("bench_decode", argv),
        **environment.describe(),
        "clock": clock.describe(),
        "settings": {"head_dim": options.head_dim, "rounds": options.rounds},
        "results": [],
    }

    def say(line: str) -> None:
        print(line, flush=True)

    if options.sweep:
        content["results"] = decode_sweep.sweep(clock, options.rounds, say)
        write_text(out, json.dumps(content, indent=1) + "\n")
        say(f"written to {out}")
        return 0
    for cell in all_cells(options):
        rows = measure(cell, clock, options.rounds)
        gc.collect()  # The next cell's arrays need the memory.
        content["results"] += rows
        write_text(out, json.dumps(content, indent=1) + "\n")
        write_text(out.with_suffix(".md"), markdown(content))
        say(_line(cell, {row["implementation"]: row for row in rows}))
    say(f"\n{markdown(content)}\nwritten to {out} and {out.with_suffix('.md').name} beside it")
    return 0


def _heads(text: str) -> list[tuple[int, int]]:
    pairs = [tuple(map(positive, part.split("/"))) for part in text.split(",")]
    if any(len(pair) != 2 or pair[0] % pair[1] for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} must be N/K,… with K a divisor of N")
    return [(pair[0], pair[1]) for pair in pairs]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_decode",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--lengths", type=lengths, default="8192,32768,131072", help="S")
    parser.add_argument("--batches", type=lengths, default="1,4,16,64", help="B")
    parser.add_argument("--heads", type=_heads, default="16/16,32/8", help="N/K")
    parser.add_argument("--head_dim", type=positive, default=128)
    parser.add_argument("--memory_limit", type=positive, default=40, help="GiB of a cache")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--sweep", action="store_true", help="time tiles and splits instead")
    parser.add_argument("--out", type=json_file, default="runs/bench_decode.json")
    return parser.parse_args(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv))
