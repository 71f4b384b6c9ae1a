"""The folder of a run: whose it is, and who works in it.

config.json  tokenizer.json  metrics.jsonl  checkpoints/  tensorboard/  summary.json
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rbf_jax.data.files import make_folder, write_text
from rbf_jax.training import config as configs

logger = logging.getLogger(__name__)


class RunFolder:
    """Paths of a run folder, and its small files."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.summary = self.path / "summary.json"
        self._lock = self.path / ".lock"

    @contextlib.contextmanager
    def claimed(self, config: ConfigDict) -> Iterator[None]:
        """Makes the folder this configuration's own while the block runs.

        A folder of another configuration in which nothing was trained yet is taken over.

        Raises:
          ValueError: the folder belongs to another configuration, is no run folder, or another
            process is training in it.
          OSError: the folder cannot be made.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run folder {self.path} is not a folder.")
        if self.path.is_dir() and any(self.path.iterdir()) and not self._is_run_folder():
            raise ValueError(
                f"run folder {self.path} is not empty and holds no run: no config.json is in it."
            )
        make_folder(self.path)
        with self._lock.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Gone with the process.
            except BlockingIOError as error:
                raise ValueError(f"another process is training in {self.path}.") from error
            self._settle_config(config)
            yield

    def read_config(self) -> ConfigDict:
        """Returns the run's configuration.

        Raises:
          ValueError: there is none, or it cannot be read.
        """
        if not self.config.is_file():
            raise ValueError(f"{self.path} is not a run folder: no config.json is in it.")
        try:
            return configs.from_json(self.config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.config} cannot be read: {error}") from error

    def require_config(self, config: ConfigDict) -> None:
        """Raises ValueError unless the folder holds this configuration."""
        if changes := configs.differences(self.read_config().to_dict(), config.to_dict()):
            raise ValueError(
                f"{self.path} is used with two configurations at once. Different: "
                f"{'; '.join(changes)}"
            )

    def read_summary(self) -> dict[str, Any] | None:
        """Returns summary.json, or None while the run has not finished."""
        if not self.summary.is_file():
            return None
        return json.loads(self.summary.read_text(encoding="utf-8"))

    def _is_run_folder(self) -> bool:
        # A program killed between making the lock and writing the configuration leaves the lock.
        return self.config.is_file() or [*self.path.iterdir()] == [self._lock]

    def _settle_config(self, config: ConfigDict) -> None:
        if self.config.is_file():
            old = self.read_config()
            changes = configs.differences(old.to_dict(), config.to_dict())
            if not changes:
                return
            others = [change for change in changes if not configs.is_placement(change)]
            if not others:
                logger.info("%s goes on with %s.", self.path, "; ".join(changes))
            elif self.metrics.exists() or self.checkpoints.exists():
                raise ValueError(
                    f"{self.path} holds a run of another configuration; choose another, or "
                    f"delete this one. Different: {'; '.join(others)}"
                )
            else:
                logger.info(
                    "%s: nothing was trained yet; it takes the new configuration.", self.path
                )
                self.tokenizer.unlink(missing_ok=True)
        write_text(self.config, configs.to_json(config))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file beside and renames it."""
    write_text(path, json.dumps(content, indent=2) + "\n")
