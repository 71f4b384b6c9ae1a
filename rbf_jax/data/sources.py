"""Where documents come from. Every source gives the documents of a split, in a fixed order."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any, Protocol

SPLITS = ("train", "valid")
SOURCES = ("embedded", "text", "tinystories", "tinystories/original", "tfds:NAME")
# Keys that some sources use, and their defaults, as in configs/base.py: to set one for another
# source is an error.
DEFAULTS = {
    "train_files": (),
    "valid_files": (),
    "separator": "<|endoftext|>",
    "tfds_dir": "",
    "manual_dir": "",
}


class Source(Protocol):
    """Documents: strings without white space around them, none empty."""

    fingerprint: str
    """Changes where a document of either split does."""

    def documents(self, split: str) -> Iterator[str]:
        """Yields the documents of "train" or "valid"."""


def open_source(config: Any) -> Source:
    """Returns the source that `config.source` names.

    Args:
      config: As `configs.base.data()`.

    Raises:
      ValueError: if there is no such source, if it cannot be read, or if a key is set that it
        does not use.
      ImportError: if it needs packages that are not installed.
    """
    name = config.source
    if name == "embedded":
        _refuse_keys(config, used=())
        return EmbeddedSource()
    if name == "text":
        from rbf_jax.data.text import TextSource

        _refuse_keys(config, used=("train_files", "valid_files", "separator"))
        return TextSource(config.train_files, config.valid_files, config.separator)
    family, _, version = name.partition("/")
    if family == "tinystories" or name.startswith("tfds:"):
        _require_tfds(name)
        from rbf_jax.data import tfds_source

        _refuse_keys(config, used=("tfds_dir", "manual_dir"))
        if family == "tinystories":
            return tfds_source.tinystories(version, config.tfds_dir, config.manual_dir)
        return tfds_source.named(name.removeprefix("tfds:"), config.tfds_dir, config.manual_dir)
    raise ValueError(f"data.source is {name!r}; it must be one of {', '.join(SOURCES)}.")


def _require_tfds(name: str) -> None:
    packages = ("tensorflow_datasets", "array_record", "importlib_resources")
    if missing := [one for one in packages if importlib.util.find_spec(one) is None]:
        raise ImportError(
            f"data.source is {name!r}, but {', '.join(missing)} is not installed: "
            "pip install 'rbf-jax[tfds]'"
        )


def _refuse_keys(config: Any, used: tuple[str, ...]) -> None:
    for key, default in DEFAULTS.items():
        value = getattr(config, key)
        if key not in used and value != default and (value or default):
            raise ValueError(
                f"data.{key} is {value!r}; data.source={config.source!r} has no use for it: leave "
                f"it at its default, {default!r}."
            )


class EmbeddedSource:
    """Stories made on the spot by `rbf_jax.data.stories`."""

    def __init__(self):
        from rbf_jax.data import stories

        self.fingerprint = stories.CORPUS_SHA256
        self._generate = stories.generate

    def documents(self, split: str) -> Iterator[str]:
        """Yields the stories of a split."""
        return self._generate(split)
