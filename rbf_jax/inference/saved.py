"""A model as files that others can read: model.safetensors, config.json and tokenizer.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rbf_jax.data.files import replacing, write_text
from rbf_jax.data.tokenizer import FILE_NAME, Tokenizer, load_tokenizer
from rbf_jax.nn import AttentionConfig, CausalLM, TransformerConfig
from rbf_jax.nn.config import from_stored

_FORMAT = "rbf_jax"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """What `save_model` wrote.

    Attributes:
      model: the language model.
      variables: its parameters, ``saved.model.apply(saved.variables, tokens)``.
      tokenizer: its tokenizer.
    """

    model: CausalLM
    variables: dict[str, Any]
    tokenizer: Tokenizer


def flat_parameters(variables: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns the parameters by their names, as "block_0.attention.query.kernel"."""
    return traverse_util.flatten_dict(variables["params"], sep=".")


def nested_parameters(flat: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Returns variables from the parameters by their names."""
    return {"params": traverse_util.unflatten_dict(dict(flat), sep=".")}


def save_model(
    folder: str | Path,
    model: CausalLM,
    variables: Mapping[str, Any],
    tokenizer: Tokenizer,
    about: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Writes a model into a folder, each file beside and renamed.

    Args:
      folder: is made if it is not there.
      model: the language model.
      variables: its parameters.
      tokenizer: its tokenizer.
      about: what else config.json is to say, under "about".

    Returns:
      The files.

    Raises:
      ImportError: safetensors is not installed.
    """
    from safetensors.numpy import save

    folder = Path(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    arrays = {
        # In C order: the file has no strides, and the library does not look for any.
        name: np.ascontiguousarray(array)
        for name, array in flat_parameters(variables).items()
    }
    with replacing(weights) as file:
        file.write(save(arrays, metadata={"format": _FORMAT}))
    tokenizer.save(folder / FILE_NAME)
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": dataclasses.asdict(model.config),
        "about": dict(about or {}),
    }
    write_text(config, json.dumps(content, indent=2) + "\n")
    return [weights, config, folder / FILE_NAME]


def load_model(folder: str | Path) -> SavedModel:
    """Reads what `save_model` wrote: the same logits, bit for bit.

    Raises:
      ValueError: a file is missing or damaged, or the parameters are not those of the model.
      ImportError: safetensors is not installed.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder).expanduser()
    model = CausalLM(_read_config(folder / "config.json"))
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{weights} does not exist.")
    try:
        arrays = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} cannot be read: {error}.") from error
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    expected = {name: (x.shape, x.dtype) for name, x in flat_parameters(shapes).items()}
    found = {name: (x.shape, x.dtype) for name, x in arrays.items()}
    wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"{weights} does not hold the parameters of the model in config.json: {wrong[0]} is "
            f"{found.get(wrong[0], 'missing')}, but must be {expected.get(wrong[0], 'absent')}."
        )
    variables = nested_parameters({name: jnp.asarray(x) for name, x in arrays.items()})
    return SavedModel(model, variables, load_tokenizer(folder))


def _read_config(path: Path) -> TransformerConfig:
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no exported model: no config.json is in it.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
            raise ValueError(f"its format must be {_FORMAT!r}, version {_VERSION}")
        fields = from_stored(content["model"])
        attention = AttentionConfig(**fields.pop("attention"))
        return TransformerConfig(attention=attention, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not the configuration of a model: {error}.") from error
