"""What is kept of one configuration trained with several seeds: all that figures are drawn from."""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rbf_jax.analysis.runs import read_config, read_json, read_lines
from rbf_jax.data.files import replacing
from rbf_jax.nn.config import from_stored

Columns = Mapping[str, np.ndarray]

# Digits of the numbers that are kept.
_DIGITS = 5
SUFFIX = ".jsonl.xz"
_SECTIONS = ("train", "inspected", "valid", "lengths", "inside")


@dataclasses.dataclass(frozen=True)
class Record:
    """One configuration, n seeds. Where a seed has no finite number, there is NaN.

    Attributes:
      name: of the configuration, unique among records; a file name without suffix.
      config: the whole configuration, without its seed, with the keys of today.
      seeds: n whole numbers.
      train: "step" (s,), every step; "loss", "grad_norm" (s, n); "learning_rate" (s,).
      inspected: "step" (m,), every train.log_every steps; "logit_max", "key_norm_mean",
        "key_norm_max", "register_norm" (m, n); "gamma/LAYER", "key_norm_weight/LAYER" (m, n, N).
      valid: "step" (m,), every train.eval_every steps; "loss", "bits_per_byte" (m, n), and
        "seconds" (m,), spent in training all seeds together.
      lengths: context length → validation loss (n,) after the last step.
      inside: what `rbf_jax.analysis.diagnostics.diagnose` says after the last step, each (n, …);
        attention_map, which is large, of the first seed alone, (1, …).
      tokens: the text whose attention weights are in `inside`, as strings.
      summary: as in an ensemble's summary.json: parameters, tokens, device, versions, date.
    """

    name: str
    config: Mapping[str, Any]
    seeds: tuple[int, ...]
    train: Columns
    inspected: Columns
    valid: Columns
    lengths: Mapping[int, np.ndarray]
    inside: Columns
    tokens: tuple[str, ...]
    summary: Mapping[str, Any]


def from_ensemble(name: str, folder: Path) -> Record:
    """Returns the record of an ensemble that has ended, see `rbf_jax.training.ensemble`.

    Raises:
      OSError, ValueError: it has not ended, or a file cannot be read.
    """
    summary, config = read_json(folder / "summary.json"), read_config(folder)
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(folder / "metrics.jsonl"):
        lines.setdefault(line.pop("split"), []).append(line)
    # The last one: lengths asked for later have the end repeated.
    *_, inside = lines.get("inside", [{"step": 0, "tokens": ()}])
    return Record(
        name=name,
        config=_portable(config),
        seeds=tuple(summary["seeds"]),
        train=_columns(lines["train"]),
        inspected=_columns(lines["inspect"]),
        valid=_columns(lines["valid"]),
        lengths={x["length"]: _array(x["loss"]) for x in lines.get("length", ())},
        inside={
            key: _array(values[:1] if key == "attention_map" else values)
            for key, values in inside.items()
            if key not in ("step", "tokens")
        },
        tokens=tuple(inside["tokens"]),
        summary=summary,
    )


def write_record(record: Record, path: Path) -> None:
    """Writes a record: JSON lines, xz, numbers rounded to 5 digits, those of maps to 3."""
    head = {
        "name": record.name,
        "config": record.config,
        "seeds": record.seeds,
        "tokens": record.tokens,
        "summary": record.summary,
    }
    lines: list[dict[str, Any]] = [head]
    for section in _SECTIONS:
        for column, values in getattr(record, section).items():
            digits = 3 if column == "attention_map" else _DIGITS
            values = _rounded(values, digits)
            lines.append({"section": section, "column": column, "values": values})
    content = "".join(json.dumps(line) + "\n" for line in lines)
    with replacing(path) as file:
        file.write(lzma.compress(content.encode()))


def read_record(path: Path) -> Record:
    """Reads what `write_record` wrote.

    Raises:
      OSError, ValueError: it cannot be read.
    """
    try:
        with lzma.open(path, "rt", encoding="utf-8") as text:
            head, *lines = map(json.loads, text)
        head["config"]["model"] = from_stored(head["config"]["model"])
        sections: dict[str, dict[Any, np.ndarray]] = {name: {} for name in _SECTIONS}
        for line in lines:
            key = int(line["column"]) if line["section"] == "lengths" else line["column"]
            sections[line["section"]][key] = _array(line["values"])
        head["seeds"], head["tokens"] = tuple(head["seeds"]), tuple(head["tokens"])
        fields: dict[str, Any] = {**head, **sections}
        return Record(**fields)
    except (lzma.LZMAError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no record: {type(error).__name__}: {error}") from error


def read_config_of_record(path: Path) -> dict[str, Any]:
    """Reads the configuration of a record alone, which is fast.

    Raises:
      OSError, ValueError: it cannot be read.
    """
    try:
        with lzma.open(path, "rt", encoding="utf-8") as text:
            config = json.loads(text.readline())["config"]
        return {**config, "model": from_stored(config["model"])}
    except (lzma.LZMAError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no record: {type(error).__name__}: {error}") from error


def identity(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The same text for configurations that train the same: not seed, place of files or devices.

    Args:
      config: of a record, or of a run.
      defaults: of keys that it lacks, since it was made before they were there.
    """
    config = _portable(_completed(config, defaults))
    data = {k: v for k, v in config["data"].items() if k not in ("cache_dir", "num_workers")}
    rest = {k: v for k, v in config.items() if k not in ("data", "mesh", "logging", "seed")}
    return json.dumps({"data": data, **rest}, sort_keys=True)


def model_identity(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The same text for configurations of the same model and optimizer, whatever the data.

    The arguments are those of `identity`.
    """
    completed = _completed(config, defaults)
    return json.dumps([completed["model"], completed["optimizer"]], sort_keys=True)


def _completed(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    found = {**defaults, **config}
    for key, value in defaults.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), Mapping):
            found[key] = _completed(config[key], value)
    return found


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Files by their names alone: where they lie is another matter on every machine."""
    data = dict(config["data"])
    for key in ("train_files", "valid_files"):
        data[key] = [Path(file).name for file in data[key]]
    return {key: value for key, value in config.items() if key != "seed"} | {"data": data}


def _columns(lines: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    lines = list(lines)
    return {name: _array([line[name] for line in lines]) for name in lines[0]}


def _array(values: Any) -> np.ndarray:
    """float64, NaN for None; whole numbers stay."""
    array = np.asarray(values)
    return array if array.dtype.kind == "i" else np.asarray(values, np.float64)


def _rounded(values: Any, digits: int) -> Any:
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, list):
        return [_rounded(value, digits) for value in values]
    if isinstance(values, int):
        return values
    return float(f"{values:.{digits}g}") if math.isfinite(values) else None
