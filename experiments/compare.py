"""Lays two or more runs side by side: a report in Markdown with pictures, and the numbers.

    python -m experiments.compare --runs=DIR,DIR[,DIR...] --out=DIR

Takes finished runs and such as are still going on. Writes OUT/report.md, OUT/numbers.json and
OUT/figures/, each figure as PNG and PDF; some ten seconds on a CPU.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="compare", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", required=True, metavar="DIR,DIR[,DIR...]", help="run folders")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="report's folder")
    arguments = parser.parse_args(argv[1:])
    command = shlex.join([f"--runs={arguments.runs}", f"--out={arguments.out}"])
    try:
        rows, paths = compare_runs(
            arguments.runs.split(","), arguments.out, f"python -m experiments.compare {command}"
        )
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    table = Table(*rows[0])
    for column in table.columns[1:]:
        column.justify, column.overflow = "right", "fold"
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)
    for path in paths:
        print(path)
    return 0


def compare_runs(
    runs: Sequence[str | Path], out: Path, command: str
) -> tuple[list[list[str]], list[Path]]:
    """Compares run folders and writes the report.

    Args:
      runs: two or more run folders.
      out: the report's folder.
      command: what the report says wrote it.

    Returns:
      The table of results, header first, and the files written.

    Raises:
      ValueError: fewer than two folders, or a malformed file in one.
      OSError: a folder or a file in it is missing, or the report cannot be written.
    """
    # Behind the command line: these imports take seconds.
    from rbf_jax.analysis import comparison_report
    from rbf_jax.analysis.comparison import compare
    from rbf_jax.analysis.models import examine
    from rbf_jax.analysis.report import write_report
    from rbf_jax.analysis.runs import read_runs

    read = read_runs(runs)
    comparison = compare(read)
    paths = write_report(
        out,
        comparison_report.title(read),
        comparison_report.sections(read, comparison, examine(read), command),
        comparison_report.numbers(read, comparison),
    )
    return comparison_report.result_rows(read, comparison), paths


if __name__ == "__main__":
    sys.exit(main(sys.argv))
