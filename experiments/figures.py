"""Draws the figures of docs/results.md, and trains what they need and nobody has trained yet.

    python -m experiments.figures --figure=NAME|all [--scale=smoke|small|paper] [--out=DIR]
                                  [--base.KEY=VALUE] [--kept] [--alone] [--records=DIR]

--figure is one of those below, several with commas, or "all". --scale says how large the models are
and on what they are trained (configs/figures/scales.py); --base.KEY changes that configuration,
whose keys are those of configs/base.py. What is trained for a figure is in configs/figures.

A variant is trained with all its seeds at once (rbf_jax/training/ensemble.py), in DIR/runs/VARIANT;
its record, DIR/records/VARIANT.jsonl.xz, is all that is drawn from. A record of the same
configuration in --records (docs/measurements/experiments/SCALE) is as good. Interrupted or killed,
the same command goes on. --kept trains nothing and draws from --records alone, whatever data it was
made with. --alone compiles all variants and makes all batches before the first is trained: slower,
and takes more memory, but seconds of training mean something, and are drawn. Writes DIR/NAME.png,
NAME.svg and NAME.json (the numbers), and DIR/report.md; DIR is runs/figures/SCALE.

Hardware: --scale=smoke and small: a CPU; paper: a GPU.

Exit status: 0 all drawn, with --kept from the records that there are; 1 a variant failed, and what
could be drawn was; 2 wrong command; 143 or 130 stopped by a signal.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from configs.figures import scales
from experiments import config_files
from experiments.benchmarks.options import command_line


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    for name in ("rbf_jax", "experiments"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        return _run(*parse(argv))
    except (ValueError, OSError) as error:
        return _fail(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on.", 130)
    except ImportError as error:
        return _fail(f"{error}: pip install 'rbf-jax[train]'", 2)


def parse(argv: Sequence[str]) -> tuple[Any, str, flags.FlagValues]:
    """Reads the command line; returns the configuration to start from, the scale, and the flags.

    Raises:
      ValueError: in one line, what is wrong.
    """
    first = flags.FlagValues()
    flags.DEFINE_string("scale", "small", "smoke, small or paper", flag_values=first)
    try:
        rest = first(list(argv), known_only=True)
    except flags.Error as error:
        raise ValueError(str(error)) from error
    start = scales.get_config(first.scale)
    values = flags.FlagValues()
    kept = str(Path("docs/measurements/experiments") / first.scale)
    flags.DEFINE_string("figure", None, "name of a figure, or all", flag_values=values)
    flags.DEFINE_string("out", f"runs/figures/{first.scale}", "folder", flag_values=values)
    flags.DEFINE_string("records", kept, "folder of records", flag_values=values)
    flags.DEFINE_bool("kept", False, "train nothing", flag_values=values)
    flags.DEFINE_bool("alone", False, "compile all before training", flag_values=values)
    flags.DEFINE_bool("members", True, "make a run folder of each seed", flag_values=values)
    flags.DEFINE_integer("compile_workers", 0, "threads; 0: half the cores", flag_values=values)
    base, rest = config_files.override(start, "base", rest, values)
    config_files.require_no_more(rest)
    if values.figure is None:
        raise ValueError("--figure is missing; give the name of a figure, or all.")
    return base, first.scale, values


def _run(base: Any, scale: str, options: flags.FlagValues) -> int:
    # Behind the command line: these imports take seconds.
    from experiments.figure_runs import Experiment
    from rbf_jax.analysis import claims, variants
    from rbf_jax.training import TrainingStopped

    figures = claims.named(options.figure)
    plain = base.to_dict()
    needed = {
        claim.name: variants.variants(_trained(claim.trained, scale), plain)
        if claim.trained
        else []
        for claim in figures
    }
    seeds = tuple(range(scales.SEEDS[scale]))
    out, kept = Path(options.out), Path(options.records)
    experiment = Experiment(base, seeds, out, kept)
    every = variants.union([v for some in needed.values() for v in some])
    failed: dict[str, str] = {}
    if not options.kept:
        missing = [v for v in every if experiment.find(v) is None]
        workers = options.compile_workers or max(1, (os.cpu_count() or 2) // 2)
        try:
            failed = experiment.train(
                missing,
                compile_workers=workers,
                keep_members=options.members,
                alone=options.alone,
            )
        except TrainingStopped as error:
            return _fail(str(error), 128 + error.signal)
    find = experiment.find_kept if options.kept else experiment.find
    found = {v.name: record for v in every if (record := find(v)) is not None}
    command = command_line("figures", sys.argv)
    undrawn = claims.write(figures, needed, found, failed, out, command)
    for name, reason in failed.items():
        print(f"figures: {name} failed: {reason}", file=sys.stderr)
    print(f"written to {out / 'report.md'}")
    absent = [v.name for v in every if v.name not in found]
    if absent and not failed:
        print(f"figures: no record of {', '.join(absent)}", file=sys.stderr)
    for name in undrawn:
        print(f"figures: {name} was not drawn, see the report", file=sys.stderr)
    return 1 if undrawn or (absent and not options.kept) else 0


def _trained(name: str, scale: str) -> dict[str, Any]:
    """What configs/figures/NAME.py asks for."""
    return importlib.import_module(f"configs.figures.{name}").get_config(scale).to_dict()


def _fail(message: str, status: int) -> int:
    print(f"figures: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
