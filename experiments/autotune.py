"""Finds the fastest tiles of each Triton kernel on this GPU and writes them into the tuned table.

    python -m experiments.autotune [--head_dims=64,128] [--dtypes=bfloat16] [--causal=both|yes|no]
        [--lengths=short,medium,long] [--passes=forward,queries,keys] [--seconds=600] [--out=FILE]

Needs an NVIDIA GPU with nothing else running on it. As many processes as there are cores compile
at the same time and take turns at timing (experiments/benchmarks/tile_timing.py), which gives the
device time of each kernel alone at B·T = 16,384 and N·H = 2,048. Entries of other GPUs, and those
that this run does not measure, stay in the file, which is written after every job: a run that is
killed, or whose time is over, keeps what it has. Jobs are done in the order of the options.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Before JAX starts: the processes share the GPU's memory, and this one needs next to none.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from experiments.benchmarks.clock import MEANING, one_line
from experiments.benchmarks.options import command_line, json_file, positive
from experiments.benchmarks.tile_timing import LENGTHS, Job, Outcome, Winner, do, start_worker
from rbf_jax import environment
from rbf_jax.data.files import write_text
from rbf_jax.ops.gpu import device
from rbf_jax.ops.gpu.triton import config as tiles
from rbf_jax.ops.gpu.triton import launch

_WORKER_BYTES = 4 * 2**30
_SAME = ("gpu", "pass", "head_dim", "dtype", "causal", "length")


def jobs(options: argparse.Namespace) -> list[Job]:
    """In the order in which they are begun."""
    lengths = tuple(length for length in LENGTHS if length in options.lengths)
    causal = {"both": (True, False), "yes": (True,), "no": (False,)}[options.causal]
    cells = itertools.product(options.dtypes, options.head_dims, causal, options.passes)
    return [Job(name, H, dtype, rule, lengths) for dtype, H, rule, name in cells]


def entry(job: Job, winner: Winner, gpu: device.Target) -> dict[str, Any]:
    """A line of the tuned table."""
    return {
        "gpu": gpu.name,
        "compute_capability": gpu.compute_capability,
        "pass": job.name,
        "head_dim": tiles.padded_head_dim(job.head_dim),
        "dtype": job.dtype,
        "causal": job.causal,
        "length": winner.length,
        "tiles": dataclasses.asdict(winner.tiles),
        "milliseconds": round(winner.milliseconds, 5),
        "runner_up_milliseconds": _rounded(winner.runner_up_milliseconds),
    }


def merge(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The new entries, and the old ones that none of them is about, in a fixed order."""
    entries = {tuple(e[key] for key in _SAME): e for e in (*old, *new)}
    order = list(LENGTHS)

    def place(e: Mapping[str, Any]):
        where = tiles.PASSES.index(e["pass"]), order.index(e["length"])
        return e["gpu"], e["dtype"], e["head_dim"], not e["causal"], where

    return sorted(entries.values(), key=place)


def outcomes(
    todo: Sequence[Job], seconds: float, gpu: device.Target, workers: int
) -> Iterator[tuple[Job, Outcome]]:
    """Does the jobs in worker processes; what is not reached in time comes without winners."""
    deadline = time.time() + seconds
    with tempfile.TemporaryDirectory() as folder:
        pool = concurrent.futures.ProcessPoolExecutor(
            workers,
            multiprocessing.get_context("spawn"),
            start_worker,
            (str(Path(folder) / "lock"), deadline, gpu.compute_capability),
        )
        with pool:
            futures = {pool.submit(do, job): job for job in todo}
            for future in concurrent.futures.as_completed(futures):
                try:
                    outcome = future.result()
                except Exception as error:  # The others go on.
                    outcome = Outcome(problems=[f"{futures[future]}: {one_line(error)}"])
                yield futures[future], outcome


def tune(options: argparse.Namespace, command: str, say: Callable[[str], None]) -> None:
    """Measures, and writes `options.out` after every job."""
    start, gpu, todo, out = time.time(), device.target(), jobs(options), Path(options.out)
    old = json.loads(out.read_text())["entries"] if out.exists() else []
    workers = max(1, min(len(todo), (os.cpu_count() or 2) - 1, _memory() // _WORKER_BYTES))
    say(f"{gpu.name}: {len(todo)} jobs, {workers} at a time")
    about = {"command": command, **environment.describe()}
    new: list[dict[str, Any]] = []
    left = list(todo)
    for job, outcome in outcomes(todo, options.seconds, gpu, workers):
        for line in outcome.problems:
            say(line)
        if not outcome.winners:
            continue
        left.remove(job)
        new += [entry(job, winner, gpu) for winner in outcome.winners]
        clock = None if outcome.clock is None else MEANING[outcome.clock]
        content = {**about, "clock": clock, "entries": merge(old, new)}
        write_text(out, json.dumps(content, indent=1) + "\n")
        times = "; ".join(_line(winner) for winner in outcome.winners)
        say(f"{time.time() - start:4.0f} s: {job}: {times}")
    for job in left:
        say(f"not measured: {job}")
    say(f"{len(new)} entries in {time.time() - start:.0f} s, written to {out}")


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    options = _parse(argv)
    problem = launch.unavailable()
    if problem is not None:
        print(f"autotune {problem}.", file=sys.stderr)
        return 2
    command = command_line("autotune", argv)
    tune(options, command, lambda line: print(line, flush=True))
    return 0


def _line(winner: Winner) -> str:
    second = winner.runner_up_milliseconds
    than = "" if second is None else f", the next {second:.3f}"
    fields = [str(value) for value in dataclasses.asdict(winner.tiles).values()]
    return f"{winner.length} ({','.join(fields)}) {winner.milliseconds:.3f} ms{than}"


def _rounded(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds, 5)


def _memory() -> int:
    """Bytes of the GPU that JAX would use."""
    import jax

    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit", _WORKER_BYTES)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="autotune",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--head_dims", type=_several(_head_dim), default="64,128,32,256")
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtypes", type=_several(_one_of(dtypes)), default=",".join(dtypes))
    parser.add_argument("--causal", choices=("both", "yes", "no"), default="both")
    for name, known in (("--lengths", tuple(LENGTHS)), ("--passes", tiles.PASSES)):
        parser.add_argument(name, type=_several(_one_of(known)), default=",".join(known))
    parser.add_argument(
        "--seconds", type=positive, default=600, help="after these nothing more is compiled"
    )
    table = Path(tiles.__file__).with_name("tuned.json")
    parser.add_argument("--out", type=json_file, default=str(table), help="merged into if there")
    return parser.parse_args(argv[1:])


def _several(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [read(part) for part in text.split(",")]


def _one_of(known: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} must be one of {', '.join(known)}")
        return text

    return read


def _head_dim(text: str) -> int:
    value = positive(text)
    if value > 256:
        raise argparse.ArgumentTypeError(f"{text!r} must be a head dimension up to 256")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv))
