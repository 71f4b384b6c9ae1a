"""Parameters at the start from elsewhere: a run of ours, or GPT-2 as Hugging Face has it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rbf_jax.data.tokenizer import Tokenizer, load_tokenizer
from rbf_jax.training.gpt2 import GPT2Folder, read_object
from rbf_jax.training.load import load_run

logger = logging.getLogger(__name__)

# Parameters that a model may have where the one that it starts from has them fixed.
_MAY_BE_NEW = ("key_norm_weight", "log_gamma", "sink_logits")
_POSITIONS = "position_embedding/embedding"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to start from.

    Attributes:
      path: of its folder.
      fields: what the section `model` of a configuration says of it, keys at their defaults may
        be left out.
      num_positions: T, the longest sequence, or None if nothing binds it.
      tokenizer: of the model.
      params: reads the parameters, nested NumPy arrays.
    """

    path: Path
    fields: dict[str, Any]
    num_positions: int | None
    tokenizer: Tokenizer
    params: Callable[[], Any]


def open_source(path: str | Path) -> Source:
    """Returns a model of GPT-2's kind, if config.json has a model_type, or else that of a run.

    Raises:
      ValueError: the folder holds neither.
    """
    path = Path(path).expanduser().absolute()
    content = read_object(path / "config.json")
    if "model_type" in content:
        gpt2 = GPT2Folder(path)
        return Source(path, gpt2.fields, gpt2.num_positions, gpt2.tokenizer(), gpt2.params)
    if "model" not in content:
        raise ValueError(f"{path / 'config.json'} is neither that of a run nor that of GPT-2.")
    run = load_run(path)
    learned = run.model.config.positions == "learned"
    return Source(
        path,
        run.config.model.to_dict(),
        run.model.config.context_length if learned else None,
        load_tokenizer(path),
        lambda: jax.tree.map(np.asarray, run.variables["params"]),
    )


def start_from(source: Source, drawn: Any, tokenizer: Tokenizer) -> Any:
    """Returns the source's parameters as those of another model, which must be of its shapes.

    Two things may differ: a table of learned positions may be longer than needed; and γ, λ
    and the sink's logits, where they are parameters of the new model only, stay as drawn.

    Args:
      source: what to start from.
      drawn: the new model's parameters.
      tokenizer: of the new model.

    Returns:
      Nested NumPy arrays.

    Raises:
      ValueError: the models or tokenizers are not the same.
    """
    if source.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"the tokenizer of {source.path} is another one than that of the run; "
            "set data.tokenizer to its tokenizer.json."
        )
    given = _by_name(source.params())

    def choose(path: jax.tree_util.KeyPath, old: jax.Array) -> np.ndarray:
        name = _name(path)
        if name not in given:
            if name.rpartition("/")[2] in _MAY_BE_NEW:
                return np.asarray(old)
            raise ValueError(f"{source.path} has no parameter {name}, but the model does.")
        new = given.pop(name)
        if name == _POSITIONS and new.shape[0] >= old.shape[0]:
            new = new[: old.shape[0]]
        if new.shape != old.shape:
            raise ValueError(
                f"{source.path}: parameter {name} has shape {new.shape}, but that of the model "
                f"has {old.shape}."
            )
        return new

    params = jax.tree_util.tree_map_with_path(choose, drawn)
    for name in given:
        raise ValueError(f"{source.path} has a parameter {name}, but the model does not.")
    logger.info("Starting from the parameters in %s.", source.path)
    return params


def _by_name(params: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {_name(path): np.asarray(leaf) for path, leaf in leaves}


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
