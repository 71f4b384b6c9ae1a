"""What a configuration must satisfy before anything is read or compiled, and its JSON form."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from rbf_jax.nn import AttentionConfig, TransformerConfig
from rbf_jax.nn.config import from_stored
from rbf_jax.training.sharding import axis_sizes

# Least values of whole numbers.
_LEAST = {
    "train.steps": 1,
    "train.batch_size": 1,
    "train.log_every": 1,
    "train.eval_every": 1,
    "train.checkpoint_every": 1,
    "train.eval_batches": 0,
    "train.keep_checkpoints": 1,
    "optimizer.warmup_steps": 0,
    "optimizer.anneal_steps": 0,
    "optimizer.accumulate_steps": 1,
}
# Ranges of real numbers: from, up to, and whether the ends belong to it.
_RANGES = {
    "optimizer.learning_rate": (0.0, math.inf, "( )"),
    "optimizer.final_learning_rate": (0.0, math.inf, "[ )"),
    "optimizer.weight_decay": (0.0, math.inf, "[ )"),
    "optimizer.b1": (0.0, 1.0, "[ )"),
    "optimizer.b2": (0.0, 1.0, "[ )"),
    "optimizer.clip_norm": (0.0, math.inf, "( )"),
}
SMALLEST_VOCABULARY = 257
# Where and in which order a run is computed, not what: its result is the same up to rounding.
_PLACEMENT = ("mesh.", "optimizer.accumulate_steps", "model.remat")


def validate(config: ConfigDict, num_devices: int, *, keeps_best: bool = True) -> None:
    """Raises ValueError, naming key, value and requirement, if a run could not work.

    What only the data can tell is left to `rbf_jax.data`.

    Args:
      config: with the keys and types of configs/base.py.
      num_devices: of all processes.
      keeps_best: the checkpoint of best validation loss is kept; an ensemble has no such step.
    """
    for key, least in _LEAST.items():
        if _get(config, key) < least:
            raise ValueError(f"{key} is {_get(config, key)}; it must be at least {least}.")
    for key, (low, high, ends) in _RANGES.items():
        value = _get(config, key)
        if value is None:
            continue
        above = value >= low if ends[0] == "[" else value > low
        if not (above and value < high):
            raise ValueError(
                f"{key} is {value}; it must be in {ends[0]}{low:g}, {high:g}{ends[-1]}."
            )
    train, optimizer = config.train, config.optimizer
    if optimizer.warmup_steps >= train.steps:
        raise ValueError(
            f"optimizer.warmup_steps is {optimizer.warmup_steps}; it must be less than "
            f"train.steps = {train.steps}."
        )
    if optimizer.final_learning_rate > optimizer.learning_rate:
        raise ValueError(
            f"optimizer.final_learning_rate is {optimizer.final_learning_rate}; it must be at "
            f"most optimizer.learning_rate = {optimizer.learning_rate}."
        )
    if keeps_best and train.eval_every % train.checkpoint_every:
        raise ValueError(
            f"train.eval_every is {train.eval_every}; it must be a multiple of "
            f"train.checkpoint_every = {train.checkpoint_every}, so that the best can be kept."
        )
    if train.init_from and not keeps_best:
        raise ValueError(
            f"train.init_from is {train.init_from!r}; an ensemble draws its parameters: leave it "
            "at ''."
        )
    model = model_config(config, SMALLEST_VOCABULARY)
    _validate_annealing(config)
    _validate_mesh(config, axis_sizes(config.mesh, num_devices), model)
    window, length = config.model.attention.window, config.data.context_length
    if window is not None and window >= length - 1:
        raise ValueError(
            f"model.attention.window is {window}; it must be less than data.context_length - 1 = "
            f"{length - 1}, or None: from there on it leaves nothing out."
        )


def _validate_annealing(config: ConfigDict) -> None:
    """Raises ValueError if λ is to be annealed where it cannot be, or not all the way."""
    steps, attention = config.optimizer.anneal_steps, config.model.attention
    if not steps:
        return
    if steps > config.train.steps:
        raise ValueError(
            f"optimizer.anneal_steps is {steps}; it must be at most train.steps = "
            f"{config.train.steps}, so that λ arrives at 1."
        )
    if attention.kind != "rbf" or attention.learn_key_norm_weight or attention.key_norm_weight == 1:
        raise ValueError(
            f"optimizer.anneal_steps is {steps}; it needs model.attention.kind 'rbf', a "
            "key_norm_weight other than 1 to start from, and learn_key_norm_weight False, but "
            f"they are {attention.kind!r}, {attention.key_norm_weight} and "
            f"{attention.learn_key_norm_weight}."
        )


def _validate_mesh(config: ConfigDict, mesh: Mapping[str, int], model: TransformerConfig) -> None:
    """Raises ValueError if what the mesh splits cannot be split evenly."""
    steps = config.optimizer.accumulate_steps
    if config.train.batch_size % (steps * mesh["data"] * mesh["fsdp"]):
        raise ValueError(
            f"train.batch_size is {config.train.batch_size}; it must be a multiple of "
            "optimizer.accumulate_steps × mesh.data × mesh.fsdp = "
            f"{steps} × {mesh['data']} × {mesh['fsdp']}."
        )
    for key, heads in (("num_heads", model.num_heads), ("num_kv_heads", model.kv_heads)):
        if heads % mesh["tensor"]:
            raise ValueError(
                f"model.{key} is {heads}; it must be a multiple of mesh.tensor = {mesh['tensor']}."
            )
    if config.data.context_length % mesh["seq"]:
        raise ValueError(
            f"data.context_length is {config.data.context_length}; it must be a multiple of "
            f"mesh.seq = {mesh['seq']}."
        )


def model_config(config: ConfigDict, vocab_size: int) -> TransformerConfig:
    """Returns the model's configuration. With `anneal_steps`, λ is a parameter of it.

    Args:
      config: with the keys of configs/base.py.
      vocab_size: of the tokenizer.

    Raises:
      ValueError: a value is wrong, or has no effect beside the others.
    """
    fields = config.model.to_dict()
    attention = AttentionConfig(**fields.pop("attention"))
    if config.optimizer.get("anneal_steps"):  # Runs of before have no such key.
        attention = dataclasses.replace(attention, learn_key_norm_weight=True)
    return TransformerConfig(
        vocab_size=vocab_size,
        context_length=config.data.context_length,
        attention=attention,
        **fields,
    )


def to_json(config: ConfigDict) -> str:
    """Returns the configuration as JSON."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """Returns the configuration that `to_json` wrote, of any age, with the keys of today.

    Raises:
      ValueError: it is not JSON, or no object.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"a configuration must be a JSON object, not {type(content).__name__}.")
    if isinstance(content.get("model"), dict):
        content["model"] = from_stored(content["model"])
    return ConfigDict(_tuples(content))


def is_placement(difference: str) -> bool:
    """Whether a difference, of `differences`, is in where and in which order a run is computed."""
    return difference.startswith(_PLACEMENT)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns "key: old value -> new value" for each key that differs.

    Args:
      old: nested mappings.
      new: nested mappings.
    """
    old_flat, new_flat = dict(_flat(old)), dict(_flat(new))
    keys = [*old_flat, *(key for key in new_flat if key not in old_flat)]

    def shown(flat: Mapping[str, Any], key: str) -> str:
        return repr(flat[key]) if key in flat else "absent"

    pairs = {key: (shown(old_flat, key), shown(new_flat, key)) for key in keys}
    return [
        f"{key}: {before} -> {after}" for key, (before, after) in pairs.items() if before != after
    ]


def _get(config: ConfigDict, key: str) -> Any:
    section, name = key.split(".")
    return config[section][name]


def _tuples(content: Any) -> Any:
    """JSON has lists where configurations have tuples."""
    if isinstance(content, dict):
        return {key: _tuples(value) for key, value in content.items()}
    return tuple(content) if isinstance(content, list) else content


def _flat(config: Mapping[str, Any], prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
