"""Text data sets of tensorflow-datasets, as array_record files; TensorFlow is not imported."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from rbf_jax.data import tinystories as tiny
from rbf_jax.data.files import hash_files
from rbf_jax.data.hold_out import num_train

_FORMAT = "array_record"
# Records that are read at once.
_BATCH = 1024


def tinystories(version: str, data_dir: str, manual_dir: str) -> TfdsSource:
    """Returns TinyStories, downloaded where it is not there yet.

    Args:
      version: "gpt4", the default, or "original".
      data_dir: Where tensorflow-datasets keeps it; "" for its own default.
      manual_dir: Folder with the published files; "" downloads them.

    Raises:
      ValueError: if there is no such version, or no such file in `manual_dir`.
    """
    version = version or "gpt4"
    allowed = [config.name for config in tiny.TinyStories.BUILDER_CONFIGS]
    if version not in allowed:
        raise ValueError(
            f"data.source is 'tinystories/{version}'; after the slash must be one of "
            f"{', '.join(allowed)}."
        )
    if manual_dir:
        for name in tiny.file_names(version).values():
            if not (Path(manual_dir).expanduser() / name).is_file():
                raise ValueError(f"data.manual_dir is {manual_dir!r}; it must hold {name}.")
    builder = tiny.TinyStories(config=version, data_dir=data_dir or None, file_format=_FORMAT)
    return TfdsSource(builder, manual_dir)


def named(name: str, data_dir: str, manual_dir: str) -> TfdsSource:
    """Returns the data set NAME, NAME/CONFIG or NAME/CONFIG:VERSION; see `tinystories`.

    Raises:
      ValueError: if there is no such data set, or it has no text.
    """
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format=_FORMAT)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name.split("/")[0], known)
        raise ValueError(
            f"data.source is 'tfds:{name}'; after 'tfds:' must come the name of a "
            f"tensorflow-datasets data set{', such as ' if near else ''}{', '.join(near)}."
        ) from error
    except ValueError as error:  # No such configuration or version, or no valid name at all.
        why = str(error).partition("\n")[0]
        raise ValueError(f"data.source is 'tfds:{name}': {why}") from error
    return TfdsSource(builder, manual_dir)


class TfdsSource:
    """The feature "text" of a tensorflow-datasets data set."""

    def __init__(self, builder: tfds.core.DatasetBuilder, manual_dir: str = ""):
        """Prepares the data set where that has not been done.

        Args:
          builder: Of the data set.
          manual_dir: Folder with what has to be fetched by hand; "" for tfds' default.

        Raises:
          ValueError: if there is no feature "text" or no split "train", or if the data set was
            prepared in another file format.
        """
        self._name = builder.info.full_name
        features = builder.info.features
        found = isinstance(features, tfds.features.FeaturesDict) and "text" in features
        if not found or not isinstance(features["text"], tfds.features.Text):
            names = list(features) if isinstance(features, tfds.features.FeaturesDict) else features
            raise ValueError(f"{self._name} has no text feature 'text'; its features: {names}.")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir or None)
        )
        splits = builder.info.splits
        if "train" not in splits:
            raise ValueError(f"{self._name} has no split 'train'; its splits are {list(splits)}.")
        if builder.info.file_format.value != _FORMAT:
            raise ValueError(
                f"{builder.data_dir} is in the format {builder.info.file_format.value}; it must be "
                f"{_FORMAT}: set data.tfds_dir to another folder, to prepare it there."
            )
        self._validation = "validation" if "validation" in splits else None
        self._builder = builder
        names = ["train", self._validation] if self._validation else ["train"]
        files = [Path(file) for name in names for file in splits[name].filepaths]
        self.fingerprint = hash_files(files, "tfds", str(len(splits["train"].filepaths)))

    def documents(self, split: str) -> Iterator[str]:
        """Yields the texts of "train" or "valid".

        Where the data set has no split "validation", "valid" is the last 5 % of "train".

        Raises:
          ValueError: if a text is not UTF-8.
        """
        if self._validation:
            records = self._builder.as_data_source(self._validation if split == "valid" else split)
            first, last = 0, len(records)
        else:
            records = self._builder.as_data_source("train")
            border = num_train(len(records))
            first, last = (0, border) if split == "train" else (border, len(records))
        for start in range(first, last, _BATCH):
            indices = range(start, min(start + _BATCH, last))
            for index, record in zip(indices, records.__getitems__(list(indices))):
                try:
                    document = record["text"].decode().strip()
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{self._name}: text {index} is not UTF-8: {error}."
                    ) from error
                if document:
                    yield document
