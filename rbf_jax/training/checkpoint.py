"""Checkpoints through Orbax: written in the background, whole or not at all, checked when read.

A checkpoint is a folder named by its step, with the items params, rest (the training state but for
the parameters) and about (digest of the state, fingerprint of the data, seconds of training). The
step is also the position in the data. Nothing in it depends on the devices or processes that wrote
it: others may go on from it. Orbax notices truncated and missing files, but not a changed byte: the
digest does.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from rbf_jax.training.distributed import is_first, texts_of_all, together
from rbf_jax.training.state import TrainState, digest, fingerprint

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """No checkpoint can be used, or the one asked for cannot."""


@dataclasses.dataclass
class NewestAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the newest checkpoints, and beside them the one of best validation loss.

    Attributes:
      newest: how many of the newest to keep.
      losses: validation loss by step; it grows while training.
    """

    newest: int
    losses: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint, oldest first, whether it stays."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        keep = {*steps[-self.newest :], best_step(steps, self.losses)}
        return [step in keep for step in steps]


def best_step(steps: Iterable[int], losses: Mapping[int, float]) -> int | None:
    """Returns the step of best validation loss, the first of equals, or None if none has one."""
    return min(
        (step for step in steps if step in losses), key=lambda s: (losses[s], s), default=None
    )


class Checkpoints:
    """The checkpoints of a run.

    Attributes:
      losses: validation loss by step, for keeping the best; whoever evaluates adds to it.
    """

    def __init__(self, folder: Path, *, keep: int, data_fingerprint: str):
        """Opens the folder, makes it if it is missing, and removes what a killed program left.

        Args:
          folder: of all checkpoints.
          keep: how many of the newest to keep.
          data_fingerprint: a run must go on with the data that it began with.
        """
        self.losses: dict[int, float] = {}
        self._folder = folder
        self._data_fingerprint = data_fingerprint
        options = ocp.CheckpointManagerOptions(
            preservation_policy=NewestAndBest(keep, self.losses),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,
        )
        self._manager = ocp.CheckpointManager(folder, options=options)

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, the newest last."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, seconds: float) -> None:
        """Starts to write a checkpoint, if the step has none; waits for the one before it.

        Args:
          state: of the step just done; may be donated as soon as this returns.
          seconds: that training took so far.
        """
        params, rest = _split(state)
        marks = fingerprint(state)
        about = {
            "params": int(marks.params),
            "rest": int(marks.rest),
            "data": self._data_fingerprint,
            "seconds": seconds,
        }
        self._manager.save(  # Which leaves a step that is there already as it is.
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                rest=ocp.args.StandardSave(rest),
                about=ocp.args.JsonSave(about),
            ),
        )

    def restore_newest(self, state: TrainState) -> tuple[TrainState, float] | None:
        """Goes back to the newest good checkpoint; bad ones that are newer are moved aside.

        Args:
          state: any state of the run; gives shapes, dtypes and shardings.

        Returns:
          The state and its seconds, or None if there is no checkpoint at all.

        Raises:
          CheckpointError: there are checkpoints, but none is good, or the data has changed.
        """
        bad: dict[int, str] = {}
        # Process 0's, lest another does not see the newest yet.
        steps = json.loads(texts_of_all(json.dumps(self.steps))[0])
        for step in reversed(steps):
            try:
                restored, about = self._read(step, state)
            except Exception as error:  # Orbax and TensorStore raise whatever a bad file leads to.
                bad[step] = _one_line(error)
                logger.warning(
                    "Checkpoint %s cannot be used: %s", self._folder / str(step), bad[step]
                )
                continue
            if about["data"] != self._data_fingerprint:
                raise CheckpointError(
                    f"the training data or the tokenizer has changed since the checkpoint of step "
                    f"{step} in {self._folder}; a run must go on with what it began with."
                )
            self._move_aside(bad)
            return restored, about["seconds"]
        if bad:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in bad.items())
            raise CheckpointError(f"no checkpoint in {self._folder} is good: {reasons}")
        return None

    def wait(self) -> None:
        """Returns when the last checkpoint is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees what is held."""
        self._manager.close()

    def _read(self, step: int, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        here = self._folder / str(step)
        params, rest = jax.tree.map(ocp.utils.to_shape_dtype_struct, _split(state))
        with together():
            about = _read_json(here / "about")
            restored = TrainState(
                params=_read_arrays(here / "params", params), **_read_arrays(here / "rest", rest)
            )
        marks = fingerprint(restored)
        _require_digest(marks.params, about["params"])
        _require_digest(marks.rest, about["rest"])
        return restored, about

    def _move_aside(self, bad: Iterable[int]) -> None:
        with together():
            if is_first():
                self._rename(bad)
        self._manager.reload()

    def _rename(self, bad: Iterable[int]) -> None:
        for step in bad:
            aside = self._folder.parent / "bad_checkpoints" / str(step)
            while aside.exists():
                aside = aside.with_name(f"{aside.name}_")
            aside.parent.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(aside)
            logger.warning("Moved the bad checkpoint of step %d to %s.", step, aside)


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint, the newest last.

    Args:
      folder: of all checkpoints; need not exist.
    """
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def find_step(folder: Path, wanted: int | str | None, losses: Mapping[int, float]) -> int:
    """Returns the step of a checkpoint.

    Args:
      folder: of all checkpoints.
      wanted: a step, "best" by validation loss, or "last" or None for the newest.
      losses: validation loss by step.

    Raises:
      CheckpointError: there is no such checkpoint.
      ValueError: `wanted` is none of these.
    """
    if wanted not in (None, "last", "best") and type(wanted) is not int:
        raise ValueError(f"checkpoint is {wanted!r}; it must be a step, 'best', 'last' or None.")
    steps = saved_steps(folder)
    if not steps:
        raise CheckpointError(f"{folder} holds no checkpoint yet.")
    if wanted is None or wanted == "last":
        return steps[-1]
    step = best_step(steps, losses) if wanted == "best" else int(wanted)
    if step is None or step not in steps:
        raise CheckpointError(
            f"{folder} holds no checkpoint {wanted!r}; it holds {', '.join(map(str, steps))}."
        )
    return step


def read_params(folder: Path, step: int, params: Any) -> Any:
    """Reads the parameters of a checkpoint, alone, onto the first device of this process.

    Args:
      folder: of all checkpoints.
      step: of one.
      params: pytree of ShapeDtypeStructs.

    Raises:
      CheckpointError: it cannot be read.
    """
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params
    )
    here = folder / str(step)
    try:
        restored = _read_arrays(here / "params", wanted)
        about = _read_json(here / "about")
        _require_digest(jax.jit(digest)(restored), about["params"])
    except Exception as error:  # Orbax and TensorStore raise whatever a bad file leads to.
        raise CheckpointError(f"checkpoint {here} cannot be read: {_one_line(error)}") from error
    return restored


def _split(state: TrainState) -> tuple[Any, dict[str, Any]]:
    """Parameters apart from the rest, so that they can be read alone."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return rest.pop("params"), rest


def _read_arrays(path: Path, wanted: Any) -> Any:
    """Reads this process's part of the arrays; it waits for no other process, which may fail."""
    alone = _alone()
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.StandardRestore(wanted))


def _read_json(path: Path) -> dict[str, Any]:
    alone = _alone()
    handler = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        return checkpointer.restore(path)


def _alone() -> ocp.options.MultiprocessingOptions:
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


def _require_digest(actual: jax.Array, expected: int) -> None:
    if int(actual) != expected:
        raise ValueError(
            "the values read back are not those that were saved (their digests differ)"
        )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
