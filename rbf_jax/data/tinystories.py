"""TinyStories (Eldan and Li 2023, arXiv:2305.07759) for tensorflow-datasets, without TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from rbf_jax.data.text import split_file

_HOME = "https://huggingface.co/datasets/roneneldan/TinyStories"
_SEPARATOR = "<|endoftext|>"
# The published files of a version are called so, with "-train.txt" and "-valid.txt" after it.
_STEMS = {"gpt4": "TinyStoriesV2-GPT4", "original": "TinyStories"}


def file_names(version: str) -> dict[str, str]:
    """Returns the published files of "gpt4" or "original", by the names of tfds splits."""
    stem = _STEMS[version]
    return {"train": f"{stem}-train.txt", "validation": f"{stem}-valid.txt"}


def _manual_files(
    dl_manager: tfds.download.DownloadManager, names: dict[str, str]
) -> dict[str, Path]:
    """Returns where the files would be; the default folder is one for all data sets."""
    try:
        folder = Path(dl_manager.manual_dir)
    except AssertionError:  # tfds says so where the folder is not there, or empty.
        folder = Path(dl_manager.download_dir)
    return {split: folder / name for split, name in names.items()}


class TinyStories(tfds.core.GeneratorBasedBuilder):
    """Short stories in words that small children know, written by large language models."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The files as published."}  # noqa: RUF012  (as tfds has it)
    BUILDER_CONFIGS = [  # noqa: RUF012  (as tfds has it)
        tfds.core.BuilderConfig(name="gpt4", description="Stories by GPT-4 only (version 2)."),
        tfds.core.BuilderConfig(name="original", description="Stories by GPT-3.5 and GPT-4."),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Optional: the -train.txt and -valid.txt of {_HOME}, to be used instead of a download."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            homepage=_HOME,
            license="CDLA-Sharing-1.0",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            # The stories stay in the order of the files.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        names = file_names(self.builder_config.name)
        paths = _manual_files(dl_manager, names)
        if not all(path.is_file() for path in paths.values()):
            urls = {split: f"{_HOME}/resolve/main/{name}" for split, name in names.items()}
            paths = dl_manager.download(urls)
        return {split: self._generate_examples(Path(path)) for split, path in paths.items()}

    def _generate_examples(self, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
        stories = (piece.strip() for piece in split_file(path, _SEPARATOR))
        for number, story in enumerate(story for story in stories if story):
            yield number, {"text": story}
