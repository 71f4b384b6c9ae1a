"""`train`: one run, from a configuration to a summary."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rbf_jax import environment
from rbf_jax.training.config import validate
from rbf_jax.training.distributed import is_first, together
from rbf_jax.training.evaluation import bits_per_byte
from rbf_jax.training.metrics import require_packages
from rbf_jax.training.run_folder import RunFolder, write_json
from rbf_jax.training.sharding import make_mesh
from rbf_jax.training.signals import StopRequest
from rbf_jax.training.trainer import Trainer

logger = logging.getLogger(__name__)


class SetupError(Exception):
    """Training cannot begin; the message tells the user why."""


def train(
    config: ConfigDict,
    run_dir: str | Path,
    *,
    on_evaluation: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Trains, or goes on with, the run in `run_dir`.

    A run that was killed goes on from its newest good checkpoint and ends with the parameters and
    metrics, bit for bit, of one that never stopped (same machine, number of devices and versions).

    Args:
      config: with the keys and types of configs/base.py.
      run_dir: the run's folder; made if it does not exist.
      on_evaluation: called with step and validation loss after each evaluation; what it raises ends
        the run once its checkpoint is on the disk, and is raised from here.

    Returns:
      The content of summary.json; that of a run that has finished already is read.

    Raises:
      SetupError: configuration, data or folder do not allow to train.
      TrainingStopped: a signal came, and the state was saved.
      TrainingDiverged: loss, gradients or parameters are not finite.
    """
    folder = RunFolder(run_dir)
    with StopRequest() as stop, contextlib.ExitStack() as stack:
        with _setup_errors():
            validate(config, jax.device_count())
            mesh = make_mesh(config.mesh)
            with together():
                require_packages(config.logging)
                if is_first():
                    stack.enter_context(folder.claimed(config))
            with together():
                # Other processes may see another folder, or were given another configuration.
                folder.require_config(config)
                finished = folder.read_summary()
            if finished is not None:
                logger.info("The run in %s has finished already.", folder.path)
                return finished
            trainer = Trainer(config, folder, mesh, on_evaluation)
        with contextlib.closing(trainer):
            trainer.run(stop)
        summary = _summary(trainer)
        with together():
            if is_first():
                write_json(folder.summary, summary)
    return summary


@contextlib.contextmanager
def _setup_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        raise SetupError(" ".join(str(error).split())) from error


def _summary(trainer: Trainer) -> dict[str, Any]:
    config, losses = trainer.config, trainer.valid_losses
    tokens = trainer.step * config.train.batch_size * config.data.context_length
    final, best = losses[trainer.step], min(losses, key=lambda step: (losses[step], step))
    return {
        "steps": trainer.step,
        "parameters": trainer.num_parameters,
        # Positions of all batches, padding included.
        "train_tokens": tokens,
        "valid_loss": final,
        "valid_bits_per_byte": bits_per_byte(final, trainer.data.bytes_per_token["valid"]),
        "best_valid_loss": losses[best],
        "best_step": best,
        "tokens_per_second": tokens / trainer.seconds,
        "seconds": trainer.seconds,
        **environment.describe(),
    }
