"""Evaluates a run: loss, bits per byte and perplexity of one of its checkpoints.

    python -m experiments.evaluate --run=DIR [--split=valid|train] [--checkpoint=last|best|STEP]

Looks at the whole split, prints a table and writes DIR/evaluation.json.

Exit status: 0, or 2 with one line that says why it could not be done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", required=True, metavar="DIR", help="run folder")
    parser.add_argument("--split", choices=("valid", "train"), default="valid")
    add_checkpoint(parser)
    arguments = parser.parse_args(argv[1:])
    try:
        # Behind the command line: these imports take seconds.
        from rbf_jax.training import evaluate_run

        result = evaluate_run(arguments.run, arguments.split, arguments.checkpoint)
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        print(f"evaluate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name, value in result.items():
        print(f"{name:<16}{value:.4f}" if isinstance(value, float) else f"{name:<16}{value}")
    return 0


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds --checkpoint: "last", "best" or an integer."""
    parser.add_argument(
        "--checkpoint",
        type=_checkpoint,
        default="last",
        metavar="last|best|STEP",
        help="best is by validation loss during training (default: last)",
    )


def _checkpoint(text: str) -> int | str:
    if text in ("last", "best"):
        return text
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} must be last, best or the number of a step")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
