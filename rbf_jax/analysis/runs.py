"""Reads what a training run leaves behind: config.json, metrics.jsonl, summary.json.

Needs no checkpoint, and works while the run is still going.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rbf_jax.nn.config import from_stored

Columns = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run folder, read.

    Attributes:
      name: what tables and legends call the run.
      path: the folder.
      config: config.json with the keys of today, nested dictionaries.
      summary: summary.json; empty while the run has not ended.
      train: columns of the training metrics, each (n,) or, for metrics per head, (n, N) float64;
        NaN where a line lacks the metric. ``train["step"]`` increases.
      valid: the same of the validation metrics, with ``"seconds"``, the elapsed training time.
      tokenizer: digest of what turns text into tokens; the same in runs whose losses per token
        can be compared.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    train: Columns
    valid: Columns
    tokenizer: str

    @property
    def last_step(self) -> int:
        """Step of the newest line of metrics."""
        return int(max(c["step"][-1] for c in (self.train, self.valid) if len(c["step"])))

    @property
    def finished(self) -> bool:
        """Whether the run wrote its summary, which it does at its end."""
        return bool(self.summary)


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Reads run folders and names each run by the shortest end of its path that is its own.

    Args:
      paths: two or more different run folders.

    Raises:
      ValueError: fewer than two folders, one given twice, or one with a malformed file.
      FileNotFoundError: a folder or a file in one is missing.
    """
    if len(paths) < 2:
        raise ValueError(f"runs={','.join(map(str, paths))!r} must name two or more run folders.")
    if not all(map(str, paths)):
        raise ValueError(f"runs={','.join(map(str, paths))!r} must be paths of run folders.")
    resolved = [Path(path).resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise ValueError(f"runs names {path} twice, and must name different run folders.")
    return [read_run(path, name) for path, name in zip(paths, _names(resolved))]


def read_run(path: str | Path, name: str | None = None) -> Run:
    """Reads one run folder.

    Args:
      path: the folder that ``experiments.train`` wrote.
      name: the run's name; None takes the folder's.

    Raises:
      FileNotFoundError: the folder, config.json or metrics.jsonl is missing.
      ValueError: a file is malformed, or there are no metrics yet.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"run folder {path} does not exist.")
    config = read_config(path)
    for section in ("seed", "data", "model", "train"):
        if section not in config:
            raise ValueError(f"{path / 'config.json'} must hold {section!r}")
    summary = read_json(path / "summary.json") if (path / "summary.json").exists() else {}
    rows = read_lines(path / "metrics.jsonl")
    train, valid = (_columns([row for row in rows if row.get("split") == s]) for s in _SPLITS)
    if not len(train["step"]) and not len(valid["step"]):
        raise ValueError(f"{path / 'metrics.jsonl'} holds no metrics yet")
    if len(train["step"]) and "seconds" in train and "seconds" not in valid:
        steps, seconds = (np.concatenate([[0.0], train[key]]) for key in ("step", "seconds"))
        valid = {**valid, "seconds": np.interp(valid["step"], steps, seconds)}
    return Run(
        name=name or path.resolve().name,
        path=path,
        config=config,
        summary=summary,
        train=train,
        valid=valid,
        tokenizer=_tokenizer_digest(path, config),
    )


_SPLITS = ("train", "valid")


def _names(paths: Sequence[Path]) -> list[str]:
    """Shortest ends of the paths, of one length, that tell them apart."""
    names = [path.name for path in paths]
    for length in range(2, 1 + max(len(path.parts) for path in paths)):
        if len(set(names)) == len(names):
            break
        names = ["/".join(path.parts[-length:]) for path in paths]
    return names


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json of a run folder or an ensemble of any age, with the keys of today.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is malformed.
    """
    config = read_json(folder / "config.json")
    if isinstance(config.get("model"), dict):
        config["model"] = from_stored(config["model"])
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is malformed.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; is {path.parent} a run folder?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics, less a last one that a killed or running program left unfinished."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; is {path.parent} a run folder?")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or "step" not in row:
            raise ValueError(f"{path} line {number} must be a JSON object with a step")
        rows.append(row)
    return rows


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Columns of the rows, by step; of two rows of one step, the one written later counts."""
    by_step = {row["step"]: row for row in rows}
    ordered = [by_step[step] for step in sorted(by_step)]
    keys = sorted({key for row in ordered for key in row} - {"split", "step"})
    columns = {"step": np.array([row["step"] for row in ordered], np.float64)}
    for key in keys:
        shape = np.shape(next(row[key] for row in ordered if key in row))
        missing = np.full(shape, np.nan)
        values = [missing if row.get(key) is None else row[key] for row in ordered]
        columns[key] = np.array(values, np.float64)
    return columns


def _tokenizer_digest(path: Path, config: Mapping[str, Any]) -> str:
    """Digest of the tokenizer kept in the run folder, or of its settings if none is kept."""
    kept = sorted(file for file in path.glob("tokenizer*") if file.is_file())
    if kept:
        content = b"".join(file.read_bytes() for file in kept)
    else:
        data = config.get("data", {})
        content = json.dumps([data.get("tokenizer"), data.get("vocab_size")]).encode()
    return hashlib.sha256(content).hexdigest()
