"""Where metrics go: metrics.jsonl always, TensorBoard and Weights & Biases if asked."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rbf_jax.data.files import write_text
from rbf_jax.training.run_folder import RunFolder

Values = Mapping[str, Any]


class Writer(Protocol):
    """Takes metrics; scalars, or lists of a number per head."""

    def write(self, step: int, split: str, values: Values) -> None:
        """Takes the metrics of one step and split."""

    def flush(self) -> None:
        """Returns when what was taken survives the end of the program."""

    def close(self) -> None:
        """Brings everything to where it belongs."""


class MetricsFile:
    """metrics.jsonl: one JSON object a line, ``{"step": 10, "split": "train", "loss": …}``.

    Each line is handed to the operating system before `write` returns, so a killed program loses
    none but perhaps a part of the last.

    Attributes:
      lines: all lines of the file, in order.
    """

    def __init__(self, path: Path, last_step: int):
        """Opens the file and drops all lines behind `last_step`, where the run goes on.

        Raises:
          ValueError: a line that is not the last is not a JSON object with a step.
        """
        self.lines = [line for line in read_lines(path) if line["step"] <= last_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, split: str, values: Values) -> None:
        """Appends one line."""
        line = {"step": step, "split": split, **values}
        self.lines.append(line)
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Returns when the lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_valid_losses(path: Path) -> dict[int, float]:
    """Returns the validation loss by step of a run's metrics.jsonl.

    Raises:
      ValueError: a line that is not the last is not a JSON object with a step.
    """
    return {line["step"]: line["loss"] for line in read_lines(path) if line["split"] == "valid"}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl, each with at least step and split; [] if none.

    Raises:
      ValueError: a line that is not the last is not a JSON object with a step.
    """
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            lines.append({"step": int(line["step"]), "split": str(line["split"]), **line})
        except (ValueError, KeyError, TypeError) as error:
            if number < len(texts):  # A killed program may leave a part of the last.
                raise ValueError(f"{path}, line {number} is no line of metrics: {error}") from error
    return lines


def require_packages(logging_config: Any) -> None:
    """Raises ImportError, saying what to do, if a writer that is asked for is not installed.

    Args:
      logging_config: the section `logging` of configs/base.py.
    """
    asked = {
        "tensorboardX": ("train", "logging.tensorboard", logging_config.tensorboard, "false"),
        "wandb": ("wandb", "logging.wandb_project", logging_config.wandb_project, ""),
    }
    for package, (extra, key, value, off) in asked.items():
        if value and importlib.util.find_spec(package) is None:
            raise ImportError(
                f"{key} is {value!r}, but {package} is not installed: "
                f"pip install 'rbf-jax[{extra}]', or --config.{key}={off}"
            )


def open_writers(config: Any, folder: RunFolder, last_step: int) -> list[Writer]:
    """Returns the writers that the section `logging` of the configuration asks for.

    Args:
      config: the whole configuration.
      folder: of the run.
      last_step: where the run goes on.
    """
    writers: list[Writer] = []
    if config.logging.tensorboard:
        writers.append(TensorBoard(folder.tensorboard, last_step))
    if config.logging.wandb_project:
        writers.append(
            WeightsAndBiases(config.logging.wandb_project, folder.path, config.to_dict())
        )
    return writers


class TensorBoard:
    """Event files for TensorBoard, through tensorboardX."""

    def __init__(self, folder: Path, last_step: int):
        """Opens the folder; what it holds of steps behind `last_step` is no longer shown."""
        # Not its SummaryWriter, whose flush leaves behind what another thread has yet to write.
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = event_file_writer.EventsWriter(str(folder / "events"))
        self._event, self._scalar = event_pb2.Event, summary.scalar
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(
            self._event(wall_time=time.time(), step=last_step + 1, session_log=start)
        )

    def write(self, step: int, split: str, values: Values) -> None:
        """Takes the metrics of one step and split."""
        for name, value in _scalars(values).items():
            summary = self._scalar(f"{split}/{name}", value)
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Writes what is left."""
        self._writer.flush()

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run on Weights & Biases; WANDB_MODE=offline keeps it in the run folder."""

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]):
        """Starts the run, or goes on with the one whose id the folder keeps."""
        import wandb

        kept_id = folder / "wandb_id"
        if not kept_id.exists():
            write_text(kept_id, uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            name=folder.name,
            dir=str(folder),
            id=kept_id.read_text(encoding="utf-8"),
            resume="allow",
            config=dict(config),
        )

    def write(self, step: int, split: str, values: Values) -> None:
        """Takes the metrics of one step and split."""
        scalars = {f"{split}/{name}": value for name, value in _scalars(values).items()}
        self._run.log(scalars, step=step)

    def flush(self) -> None:
        """Does nothing: wandb's own process keeps what it was given."""

    def close(self) -> None:
        """Uploads what is left."""
        self._run.finish()


def to_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns device scalars as floats and vectors as lists of floats."""
    return {name: np.asarray(value, np.float64).tolist() for name, value in values.items()}


def all_finite(values: Values) -> bool:
    """Whether every number is finite."""
    return all(math.isfinite(value) for value in _scalars(values).values())


def _scalars(values: Values) -> dict[str, float]:
    """Lists of a number per head become ``name/head_0``, …"""
    scalars: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            scalars |= {f"{name}/head_{head}": item for head, item in enumerate(value)}
        else:
            scalars[name] = value
    return scalars
