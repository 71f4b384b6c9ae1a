"""Looks inside a trained model: what its attention heads do, as a report with pictures.

    python -m experiments.inspect --run=DIR [--checkpoint=last|best|STEP] [--rows=8] [--out=DIR]

Entropy, weight on registers, origin sink and first tokens, distance in tokens, γ and λ, and the
share of rows that need the kernel's gate, for each head; norms of keys and values, those of sinks
beside; attention maps. Over the first --rows rows of the validation split.

Writes report.md, numbers.json and figures/, each as PNG and SVG, into RUN/inspect or --out, also
while the run is going on. Half a minute on a CPU for a small model. Memory grows with rows × heads
× layers × T²: for long contexts take fewer rows.

Exit status: 0, or 2 with one line that says why it could not be done.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.benchmarks.options import positive
from experiments.evaluate import add_checkpoint


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="inspect", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="run folder")
    add_checkpoint(parser)
    parser.add_argument(
        "--rows",
        type=positive,
        default=8,
        metavar="N",
        help="rows of the validation split to look at (default: 8)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: RUN/inspect)")
    arguments = parser.parse_args(argv[1:])
    command = f"python -m experiments.inspect {shlex.join(argv[1:])}"
    try:
        paths = inspect(
            arguments.run,
            arguments.out or arguments.run / "inspect",
            arguments.checkpoint,
            arguments.rows,
            command,
        )
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        print(f"inspect: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


def inspect(run: Path, out: Path, checkpoint: int | str, num_rows: int, command: str) -> list[Path]:
    """Looks inside a run's model and writes the report.

    Args:
      run: the run's folder.
      out: the report's folder.
      checkpoint: "last", "best" or a step.
      num_rows: rows of the validation split to look at.
      command: what the report says wrote it.

    Returns:
      The files written, report.md first.

    Raises:
      ValueError: it is no run folder, or has no such checkpoint, or its data is not where it was.
      OSError: a file cannot be read, or the report cannot be written.
    """
    # Behind the command line: these imports take seconds.
    from rbf_jax.analysis import inspection_report
    from rbf_jax.analysis.models import inspect_run
    from rbf_jax.analysis.report import write_report
    from rbf_jax.environment import describe

    seen = inspect_run(run, checkpoint=checkpoint, num_rows=num_rows)
    where = describe()
    return write_report(
        out,
        inspection_report.title(seen),
        inspection_report.sections(seen, command, where),
        inspection_report.numbers(seen, command, where),
        vectors="svg",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
