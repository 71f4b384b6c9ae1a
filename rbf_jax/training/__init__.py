"""State, step, loop, optimizer, checkpoints, metrics: what turns a configuration into a run."""

from rbf_jax.training.checkpoint import CheckpointError
from rbf_jax.training.load import LoadedRun, evaluate_run, load_run
from rbf_jax.training.loop import SetupError, train
from rbf_jax.training.trainer import TrainingDiverged, TrainingStopped

__all__ = [
    "CheckpointError",
    "LoadedRun",
    "SetupError",
    "TrainingDiverged",
    "TrainingStopped",
    "evaluate_run",
    "load_run",
    "train",
]
