"""Trains a model, or goes on with a run that was stopped.

    python -m experiments.train --config=configs/NAME.py[:VARIANT] [--run=DIR] [--config.KEY=VALUE]

The run folder is runs/NAME or runs/NAME_VARIANT unless --run names another; all keys and what they
mean are in configs/base.py. The same command again goes on with a run that was stopped or killed,
which then ends, bit for bit, as if it never had been (on GPUs that takes
XLA_FLAGS=--xla_gpu_deterministic_ops=true), and says so if it has finished. A folder belongs to one
configuration: any other, be it with more steps, takes another --run.

Exit status: 0 finished; 1 diverged; 2 wrong command, configuration or data; 128 + N stopped by
signal N after saving (143 for SIGTERM, 130 for Ctrl-C).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from experiments import config_files


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    try:
        config, run_dir = config_files.parse(argv)
    except ValueError as error:
        return _fail(str(error), 2)
    # Behind the command line: these imports take seconds.
    from rbf_jax.training import SetupError, TrainingDiverged, TrainingStopped, train

    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("rbf_jax").setLevel(logging.INFO)
    try:
        summary = train(config, run_dir)
    except SetupError as error:
        return _fail(str(error), 2)
    except TrainingDiverged as error:
        return _fail(str(error), 1)
    except TrainingStopped as error:
        return _fail(str(error), 128 + error.signal)
    print(
        f"{run_dir}: {summary['steps']} steps, validation loss {summary['valid_loss']:.4f}, "
        f"{summary['valid_bits_per_byte']:.4f} bits per byte, "
        f"{summary['tokens_per_second']:,.0f} tokens/s"
    )
    return 0


def _fail(message: str, status: int) -> int:
    print(f"train: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
