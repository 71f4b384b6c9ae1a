"""The command lines of the GPU suite and of its figure."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments.benchmarks import gpu_suite, report
from experiments.benchmarks.options import command_line, json_file, lengths, positive
from rbf_jax.data.files import write_text


def main(argv: Sequence[str]) -> int:
    """Runs the suite, or draws; returns the exit status."""
    options = _parse(argv)
    if options.draw is not None:
        return _draw(options)
    if jax.default_backend() != "gpu":
        kind = jax.devices()[0].platform
        return _fail(f"--suite=gpu needs an NVIDIA GPU, but JAX sees only: {kind}.")
    settings = gpu_suite.Settings(
        lengths=tuple(options.lengths),
        head_dims=tuple(options.head_dims),
        rounds=options.rounds,
        seconds=options.seconds,
        memory_lengths=tuple(options.memory_lengths) if options.memory else (),
        group=options.group,
        dtype=options.dtype,
        without=tuple(options.without),
    )
    command = command_line("bench_attention", argv)
    measure(settings, command, Path(options.out))
    return 0


def measure(settings: gpu_suite.Settings, command: str, out: Path) -> None:
    """Runs the suite; `out` and the table beside it are written after every cell."""

    def say(line: str) -> None:
        print(line, flush=True)

    for content in gpu_suite.run(settings, command, say):
        write_text(out, json.dumps(content, indent=1) + "\n")
        write_text(out.with_suffix(".md"), report.markdown(content))
    say(f"written to {out} and {out.with_suffix('.md').name} beside it")


def _draw(options: argparse.Namespace) -> int:
    # matplotlib is needed only here.
    from rbf_jax.analysis.attention_profile import profile_figure
    from rbf_jax.analysis.report import save_figure

    try:
        content = json.loads(Path(options.draw).read_text())
        figure = profile_figure(content, options.head_dims[0], options.causal)
    except (OSError, KeyError, ValueError) as error:
        return _fail(f"{options.draw}: {type(error).__name__}: {error}")
    stem = Path(options.figure)
    saved = save_figure(figure, stem.parent, stem.name, ("png", "svg"))
    print(f"drawn to {' and '.join(map(str, saved))}")
    return 0


def _fail(message: str) -> int:
    print(f"bench_attention: {message}", file=sys.stderr)
    return 2


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    settings = gpu_suite.Settings()
    parser = argparse.ArgumentParser(
        prog="bench_attention --suite=gpu", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--suite", choices=("gpu",), default="gpu")
    parser.add_argument("--lengths", type=lengths, default=list(settings.lengths))
    parser.add_argument(
        "--head_dims", type=lengths, default=list(settings.head_dims), help="--draw takes the first"
    )
    parser.add_argument("--group", type=positive, default=settings.group, help="N/K")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default=settings.dtype)
    parser.add_argument(
        "--without", action="append", default=[], help="a contender, by its name in the tables"
    )
    parser.add_argument("--rounds", type=positive, default=settings.rounds)
    parser.add_argument(
        "--seconds",
        type=positive,
        default=int(settings.seconds),
        help="after these no further cell is begun; the memory table comes after the cells",
    )
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory_lengths", type=lengths, default=list(settings.memory_lengths))
    parser.add_argument("--out", type=json_file, default="runs/bench_attention_gpu.json")
    parser.add_argument("--draw", help="draw the figure of this JSON file, and measure nothing")
    parser.add_argument(
        "--figure", default="docs/figures/attention_profile", help="for --draw; without suffix"
    )
    parser.add_argument(
        "--causal", action=argparse.BooleanOptionalAction, default=True, help="for --draw"
    )
    return parser.parse_args(argv[1:])
