"""Trains a model, or goes on with a run that was stopped.

    python -m experiments.train --config=configs/NAME.py[:VARIANT] [--run=DIR] [--config.KEY=VALUE]
        [--coordinator=HOST:PORT --num_processes=N --process_id=I] [--heartbeat_timeout=SECONDS]

The run folder is runs/NAME or runs/NAME_VARIANT unless --run names another; all keys and what they
mean are in configs/base.py. The same command again goes on with a run that was stopped or killed,
which then ends, bit for bit, as if it never had been (on GPUs that takes
XLA_FLAGS=--xla_gpu_deterministic_ops=true), and says so if it has finished. A folder belongs to one
configuration: any other, be it with more steps, takes another --run. Only where it is computed may
change: the devices, `mesh`, optimizer.accumulate_steps and model.remat.

All devices of the process take part; of several processes, all of theirs, in a run folder that all
can see. Under Slurm's `srun` processes find each other by themselves; elsewhere each is given the
coordinator, which is process 0, the number of processes and its own, as above or as
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. A signal to one stops all after the
same step. When one dies the others end within the heartbeat timeout, 60 seconds unless given.

Exit status: 0 finished; 1 diverged, or another process has gone; 2 wrong command, configuration or
data; 128 + N stopped by signal N after saving (143 for SIGTERM, 130 for Ctrl-C).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from experiments import config_files


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    cluster, rest = _cluster_flags().parse_known_args(argv)
    try:
        config, run_dir = config_files.parse(rest)
    except ValueError as error:
        return _fail(str(error), 2)
    # Behind the command line: these imports take seconds.
    from rbf_jax.training import SetupError, TrainingDiverged, TrainingStopped, distributed, train

    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    try:
        distributed.initialize(**vars(cluster))
    except (ValueError, RuntimeError) as error:
        return _fail(" ".join(str(error).split()), 2)
    if distributed.is_first():
        logging.getLogger("rbf_jax").setLevel(logging.INFO)
    try:
        summary = train(config, run_dir)
    except SetupError as error:
        return _fail(str(error), 2)
    except TrainingDiverged as error:
        return _fail(str(error), 1)
    except TrainingStopped as error:
        return _fail(str(error), 128 + error.signal)
    except (Exception, KeyboardInterrupt):
        if distributed.is_alone():
            raise
        _abandon()
    if distributed.is_first():
        print(
            f"{run_dir}: {summary['steps']} steps, validation loss {summary['valid_loss']:.4f}, "
            f"{summary['valid_bits_per_byte']:.4f} bits per byte, "
            f"{summary['tokens_per_second']:,.0f} tokens/s"
        )
    return 0


def _cluster_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("train", add_help=False, allow_abbrev=False)
    for name in ("coordinator", "num_processes", "process_id", "heartbeat_timeout"):
        parser.add_argument(f"--{name}")
    return parser


def _fail(message: str, status: int) -> int:
    print(f"train: {message}", file=sys.stderr)
    return status


def _abandon() -> NoReturn:
    """Ends this process of several at once: at a regular end it would wait for the others."""
    traceback.print_exc()
    _fail(
        "this process ends, and so do the others: either it failed by itself, as above, or another "
        "has gone, whose output then says why, unless it was killed; the same commands go on from "
        "the last checkpoint.",
        1,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
