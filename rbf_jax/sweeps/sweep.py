"""A sweep: what is to be trained, and the folder where it happens.

sweep.json  study.journal  trials/0000/ …  workers/  locks/  report/
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from rbf_jax.data.files import make_folder, write_text
from rbf_jax.sweeps import space

SAMPLERS = ("grid", "random", "tpe")
PRUNERS = ("none", "median", "halving")
_CHOICES = {
    "sampler": SAMPLERS,
    "pruner": PRUNERS,
    "objective": ("best", "final"),
    "executor": ("local", "slurm"),
}
_LEAST = {
    "seeds": 1,
    "trials": 0,
    "prune_after_trials": 0,
    "prune_after_evaluations": 0,
    "workers": 0,
    "max_deaths": 1,
}
# What may change between two calls of one sweep: how it is run, and how long it goes on.
_MAY_CHANGE = ("executor", "workers", "slurm", "max_deaths", "trials")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep file, read; all but the first two as in configs/sweeps/base.py.

    Attributes:
      base: the configuration that all trials start from, nested.
      parts: of the space.
    """

    base: Mapping[str, Any]
    parts: tuple[space.Part, ...]
    seeds: int = 1
    sampler: str = "grid"
    sampler_seed: int = 0
    trials: int = 0
    objective: str = "best"
    pruner: str = "none"
    prune_after_trials: int = 5
    prune_after_evaluations: int = 1
    executor: str = "local"
    workers: int = 0
    max_deaths: int = 3
    slurm: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")
        if self.is_grid and self.trials:
            raise ValueError(
                f"trials is {self.trials}; with sampler 'grid', which trains every point, it must "
                "be 0."
            )
        if not self.is_grid and not self.trials:
            raise ValueError(f"trials is 0; sampler {self.sampler!r} needs the number of points.")
        if not self.is_grid and len(self.parts) > 1:
            raise ValueError(
                f"space has {len(self.parts)} parts; sampler {self.sampler!r} needs one product of "
                "axes."
            )

    @property
    def is_grid(self) -> bool:
        """Whether all points are known before the first trial."""
        return self.sampler == "grid"

    def points(self) -> list[space.Point]:
        """The points of a grid, those that several parts share once."""
        unique: dict[str, space.Point] = {}
        for part in self.parts:
            for point in part.points():
                unique.setdefault(self.identity(point), point)
        return list(unique.values())

    @property
    def num_trials(self) -> int:
        """Trials in all: points times seeds."""
        return self.seeds * (len(self.points()) if self.is_grid else self.trials)

    def identity(self, point: space.Point) -> str:
        """The same text for points that make the same configuration."""
        return point.identity(space.flat(self.base))

    def config(self, values: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Returns the nested configuration of one trial."""
        config = json.loads(json.dumps(self.base))
        for key, value in {**values, "seed": seed}.items():
            *sections, name = key.split(".")
            section = config
            for part in sections:
                section = section[part]
            section[name] = value
        return config

    def to_json(self) -> str:
        """Returns what `from_json` reads."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["parts"] = space.to_plain(self.parts)
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Sweep:
        """Returns the sweep that `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "parts": space.parse(fields["parts"])})


class SweepFolder:
    """Paths of a sweep's folder, and its locks, which end with the process that holds them."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().absolute()
        self.sweep = self.path / "sweep.json"
        self.journal = self.path / "study.journal"
        self.workers = self.path / "workers"
        self.report = self.path / "report"

    def trial(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.path / "trials" / f"{number:04d}"

    def read(self) -> Sweep:
        """Returns the sweep of this folder.

        Raises:
          ValueError: there is none.
        """
        if not self.sweep.is_file():
            raise ValueError(f"{self.path} is not a sweep's folder: no sweep.json is in it.")
        return Sweep.from_json(self.sweep.read_text(encoding="utf-8"))

    def settle(self, sweep: Sweep) -> None:
        """Makes the folder this sweep's own.

        Raises:
          ValueError: it belongs to another one, or is in use for something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"sweep folder {self.path} is not a folder.")
        ours = not self.path.exists() or self.sweep.is_file()
        if not ours and any(entry.name != "locks" for entry in self.path.iterdir()):
            raise ValueError(
                f"{self.path} is not empty and holds no sweep; choose another --sweep."
            )
        with self.locked("sweep"):
            if self.sweep.is_file():
                old, new = (json.loads(s.to_json()) for s in (self.read(), sweep))
                different = [k for k in new if k not in _MAY_CHANGE and old.get(k) != new[k]]
                if different:
                    raise ValueError(
                        f"{self.path} holds another sweep; choose another --sweep, or delete it. "
                        f"Different: {', '.join(different)}"
                    )
            write_text(self.sweep, sweep.to_json())

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Holds a lock while the block runs; waits for it first."""
        with self._lock_file(name) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def try_lock(self, name: str) -> IO[str] | None:
        """Returns an open file that holds a lock until it is closed, or None if another has it."""
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(self._lock_file(name))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            stack.pop_all()
        return file

    def is_locked(self, name: str) -> bool:
        """Whether some process holds a lock."""
        if (file := self.try_lock(name)) is None:
            return True
        file.close()
        return False

    def holder(self, name: str) -> int | None:
        """The process of this machine that holds a lock, if it has said so by `sign`."""
        if not self.is_locked(name):
            return None
        with self._lock_file(name) as file:
            file.seek(0)
            machine, _, process = file.read().rpartition(" ")
        return int(process) if machine == socket.gethostname() else None

    @staticmethod
    def sign(lock: IO[str]) -> None:
        """Writes into a lock which process of which machine holds it."""
        lock.truncate(0)
        lock.write(f"{socket.gethostname()} {os.getpid()}")
        lock.flush()

    def _lock_file(self, name: str) -> IO[str]:
        path = self.path / "locks" / name
        make_folder(path.parent)
        return path.open("a+", encoding="utf-8")
