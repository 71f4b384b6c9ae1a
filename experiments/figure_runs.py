"""Trains the variants that no record holds yet, one after the other, and keeps their records."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from configs import base as schema
from rbf_jax.analysis import records
from rbf_jax.analysis.diagnostics import diagnose
from rbf_jax.analysis.records import Record
from rbf_jax.analysis.variants import Variant
from rbf_jax.training import ensemble, ensemble_programs
from rbf_jax.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

# Data is read by one thread.
_reading = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Variants of one configuration, each with the same seeds.

    Attributes:
      base: the configuration that all start from.
      seeds: of every variant.
      out: folder: runs/NAME is the ensemble of a variant, records/NAME.jsonl.xz its record.
      kept: folder of records from elsewhere, which are as good, or None.
    """

    base: ConfigDict
    seeds: tuple[int, ...]
    out: Path
    kept: Path | None

    def config(self, variant: Variant) -> ConfigDict:
        """Of a variant."""
        config = self.base.copy_and_resolve_references()
        config.update_from_flattened_dict(dict(variant.changes))
        return config

    def find(self, variant: Variant) -> Record | None:
        """The record of a variant, if one of the very same configuration and seeds is there."""
        config = _plain(self.config(variant))
        wanted = records.identity(config, config)

        def same(config: Mapping[str, Any]) -> bool:
            return records.identity(config, self._schema) == wanted

        for folder in (self.out / "records", self.kept):
            path = _record_of(variant, folder, same)
            if path is None:
                continue
            try:
                record = records.read_record(path)
            except ValueError as error:
                logger.warning("%s; it is made again.", error)
                continue
            record = dataclasses.replace(record, name=variant.name)
            if not same(record.config) or record.seeds != self.seeds:
                logger.info("%s is of another configuration and is not used.", path)
            elif lacking := self._lengths(variant) - set(record.lengths):
                at = ", ".join(map(str, sorted(lacking)))
                logger.info("%s was not evaluated at %s tokens and is not used.", path, at)
            else:
                return record
        return None

    @functools.cached_property
    def _schema(self) -> Mapping[str, Any]:
        """Every key with its default."""
        return _plain(schema.get_config())

    def find_kept(self, variant: Variant) -> Record | None:
        """The kept record of a variant, whatever it was trained on."""
        wanted = records.model_identity(_plain(self.config(variant)), self._schema)

        def same(config: Mapping[str, Any]) -> bool:
            return records.model_identity(config, self._schema) == wanted

        if (path := _record_of(variant, self.kept, same)) is None:
            return None
        return dataclasses.replace(records.read_record(path), name=variant.name)

    def train(
        self,
        variants: Sequence[Variant],
        *,
        compile_workers: int,
        keep_members: bool,
        alone: bool = False,
    ) -> dict[str, str]:
        """Trains variants; returns the reasons of those that failed, by name.

        While one is trained the next are compiled, each in a thread; if `alone` all are, and all
        batches are made, before the first is trained, and their records say so.

        Raises:
          TrainingStopped: a signal came; the same call goes on.
        """
        failed: dict[str, str] = {}
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with futures.ThreadPoolExecutor(compile_workers) as pool, Progress(*columns) as progress:
            total = progress.add_task("", total=len(variants) * self.base.train.steps)
            try:
                for position, (variant, prepared) in enumerate(
                    self._prepared(variants, pool, alone)
                ):

                    def show(step: int, losses: np.ndarray, name=variant.name, at=position) -> None:
                        done = at * self.base.train.steps + step
                        text = f"{name}: step {step}, loss {np.mean(losses):.3f}"
                        progress.update(total, completed=done, description=text)

                    try:
                        texts, programs = prepared.result()
                        folder = self._folder(variant)
                        self._reopen(variant, folder)
                        ensemble.train_ensemble(
                            self.config(variant),
                            folder,
                            texts,
                            programs,
                            keep_members=keep_members,
                            on_chunk=show,
                        )
                        record = records.from_ensemble(variant.name, folder)
                        if alone:
                            record = dataclasses.replace(
                                record, summary={**record.summary, "timed_alone": True}
                            )
                        records.write_record(record, self._path(variant))
                        logger.info("%s", _headline(record))
                    except (ValueError, NotImplementedError, OSError, RuntimeError) as error:
                        failed[variant.name] = " ".join(str(error).split())[:300]
                        logger.warning("%s failed: %s", variant.name, failed[variant.name])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return failed

    def _prepared(
        self, variants: Sequence[Variant], pool: futures.Executor, alone: bool
    ) -> Iterator[tuple[Variant, futures.Future]]:
        """Yields variants with what will be their texts and programs."""
        texts: dict[str, ensemble_programs.Texts] = {}
        pending = collections.deque(
            (variant, pool.submit(self._prepare, variant, texts)) for variant in variants
        )
        if alone:
            futures.wait([prepared for _, prepared in pending])
            for read in texts.values():
                read.make_all()
        while pending:
            yield pending.popleft()  # Programs take memory: none is held that has run.

    def _prepare(self, variant: Variant, texts: dict[str, ensemble_programs.Texts]) -> Any:
        config = self.config(variant)
        config.seed = self.seeds[0]
        with RunFolder(self._folder(variant)).claimed(config):
            pass  # A folder of another configuration is noticed before minutes of compiling.
        key = json.dumps([_plain(config)["data"], _plain(config)["train"]], sort_keys=True)
        with _reading:
            if key not in texts:
                folder = self.out / "tokenizer"
                texts[key] = ensemble_programs.Texts.read(config, self.seeds, folder)
        return texts[key], self.compile(variant, texts[key])

    def compile(
        self, variant: Variant, texts: ensemble_programs.Texts
    ) -> ensemble_programs.Programs:
        """Compiles what training and evaluating a variant takes."""
        lengths = sorted(self._lengths(variant))
        return ensemble_programs.compile_programs(
            self.config(variant), texts, lengths=lengths, diagnose=diagnose
        )

    def _reopen(self, variant: Variant, folder: Path) -> None:
        """Has the end of a finished run repeated where lengths are asked for that it lacks."""
        if (folder / "summary.json").exists():
            there = set(records.from_ensemble(variant.name, folder).lengths)
            if not self._lengths(variant) <= there:
                (folder / "summary.json").unlink()

    def _lengths(self, variant: Variant) -> set[int]:
        config = self.config(variant)
        most = 1 if config.model.positions == "learned" else max(variant.lengths, default=0)
        return {m * config.data.context_length for m in variant.lengths if m <= most}

    def _folder(self, variant: Variant) -> Path:
        return self.out / "runs" / variant.name

    def _path(self, variant: Variant) -> Path:
        return self.out / "records" / f"{variant.name}{records.SUFFIX}"


def _record_of(
    variant: Variant, folder: Path | None, same: Callable[[Mapping[str, Any]], bool]
) -> Path | None:
    """Returns the record with the variant's name, or else one of the `same` configuration.

    A key that is renamed renames variants: records from before have their old names.
    """
    if folder is None:
        return None
    path = folder / f"{variant.name}{records.SUFFIX}"
    if path.is_file():
        return path
    for other in sorted(folder.glob(f"*{records.SUFFIX}")):
        with contextlib.suppress(OSError, ValueError):
            if same(records.read_config_of_record(other)):
                return other
    return None


def _headline(record: Record) -> str:
    losses = record.valid["loss"][-1]
    return (
        f"{record.name}: validation loss {np.mean(losses):.4f} "
        f"({np.min(losses):.4f} to {np.max(losses):.4f}), "
        f"{record.summary['tokens_per_second']:,.0f} tokens/s"
    )


def _plain(config: ConfigDict) -> Mapping[str, Any]:
    """As it is when it has been JSON."""
    return json.loads(json.dumps(config.to_dict()))
