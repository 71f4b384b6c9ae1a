"""One configuration trained with several seeds at once: `jax.vmap` of a run over its seeds.

Each member is the run that `rbf_jax.training.train` would make of its seed: the same parameters at
the start, the same batches, the same steps, up to rounding. Small models leave most of a GPU idle;
together they do not, and are compiled once.

The folder:

    config.json  tokenizer.json  checkpoints/  metrics.jsonl  summary.json  seeds/SEED/

It is a run folder, but for the metrics, which hold a list with a number per seed (null where a
member has diverged: the others go on) under the splits "train" (every step), "inspect" (every
train.log_every steps), "valid" and, at the end, "length" and "inside". seeds/SEED are ordinary run
folders with the last parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rbf_jax import environment
from rbf_jax.training.checkpoint import Checkpoints
from rbf_jax.training.ensemble_programs import Programs, Texts
from rbf_jax.training.evaluation import bits_per_byte
from rbf_jax.training.metrics import MetricsFile
from rbf_jax.training.progress import Stopwatch
from rbf_jax.training.run_folder import RunFolder, write_json
from rbf_jax.training.signals import StopRequest
from rbf_jax.training.state import TrainState
from rbf_jax.training.trainer import TrainingStopped


def train_ensemble(
    config: ConfigDict,
    run_dir: str | Path,
    texts: Texts,
    programs: Programs,
    *,
    keep_members: bool = True,
    on_chunk: Callable[[int, np.ndarray], None] = lambda step, losses: None,
) -> dict[str, Any]:
    """Trains all seeds, or goes on from the newest checkpoint.

    Args:
      config: as the programs were compiled for.
      run_dir: the ensemble's folder; made if it does not exist.
      texts: of the ensemble.
      programs: of `compile_programs`.
      keep_members: make an ordinary run folder of each seed in the end.
      on_chunk: called with the step and its losses (n,) as training goes on.

    Returns:
      The content of summary.json; that of an ensemble that has finished already is read.

    Raises:
      ValueError: the folder belongs to another configuration.
      TrainingStopped: a signal came; the state was saved.
    """
    folder, seeds = RunFolder(run_dir), list(texts.data)
    # Where the seeds are, a configuration has the first.
    config = _of_seed(config, seeds[0])
    with StopRequest() as stop, contextlib.ExitStack() as opened:
        opened.enter_context(folder.claimed(config))
        if (finished := folder.read_summary()) is not None:
            return finished
        texts.first.tokenizer.save(folder.tokenizer)
        checkpoints = Checkpoints(
            folder.checkpoints, keep=1, data_fingerprint=texts.first.fingerprint
        )
        opened.callback(checkpoints.close)
        state = programs.create(np.array(seeds, np.uint32))
        seconds = 0.0
        if restored := checkpoints.restore_newest(state):
            state, seconds = restored
        metrics = MetricsFile(folder.metrics, int(state.step))
        opened.callback(metrics.close)
        loop = _Loop(config, texts, programs, checkpoints, metrics, Stopwatch(seconds), on_chunk)
        state = loop.run(state, stop)
        _finish(texts, programs, state, metrics)
        summary = _summary(config, texts, state, loop.watch.seconds)
        if keep_members:
            _write_members(folder, config, texts, state, metrics, loop.watch.seconds)
        write_json(folder.summary, summary)
    return summary


@dataclasses.dataclass
class _Loop:
    config: ConfigDict
    texts: Texts
    programs: Programs
    checkpoints: Checkpoints
    metrics: MetricsFile
    watch: Stopwatch
    on_chunk: Callable[[int, np.ndarray], None]

    def run(self, state: TrainState, stop: StopRequest) -> TrainState:
        """Trains to the last step. What a chunk measured is read when the next is under way."""
        train, step = self.config.train, int(state.step)
        chunks = self.texts.steps_from(step)
        unread: list[tuple[int, Any, Any]] = []
        self.watch.start()
        while step < train.steps:
            chunk = next(chunks)
            state, measured = self.programs.train(state, chunk)
            inspected = self.programs.inspect(
                state.params, {name: array[-1] for name, array in chunk.items()}
            )
            unread.append((step, measured, inspected))
            step += train.log_every
            last = step == train.steps
            evaluate = last or step % train.eval_every == 0
            save = last or step % train.checkpoint_every == 0 or stop.received
            while len(unread) > (0 if evaluate or save else 1):
                self._write(*unread.pop(0))
            if evaluate:
                self._evaluate(state, step)
            if save:
                self._save(state)
            if stop.received and not last:
                self.checkpoints.wait()
                raise TrainingStopped(
                    f"stopped by a signal after step {step}, which is saved; "
                    "the same command goes on from there.",
                    stop.received,
                )
        self.watch.stop()
        return state

    def _write(self, start: int, measured: Any, inspected: Any) -> None:
        measured = {name: np.asarray(array) for name, array in measured.items()}
        for i in range(len(measured["loss"])):
            self.metrics.write(
                start + i + 1,
                "train",
                {
                    "loss": finite(measured["loss"][i]),
                    "grad_norm": finite(measured["grad_norm"][i]),
                    "learning_rate": float(measured["learning_rate"][i, 0]),
                },
            )
        step = start + len(measured["loss"])
        self.metrics.write(step, "inspect", {k: finite(x) for k, x in inspected.items()})
        self.on_chunk(step, measured["loss"][-1])

    def _evaluate(self, state: TrainState, step: int) -> None:
        self.watch.stop()
        losses = np.asarray(self.programs.evaluate(state.params, self.texts.valid))
        bytes_per_token = self.texts.first.bytes_per_token["valid"]
        bits = [bits_per_byte(float(loss), bytes_per_token) for loss in losses]
        values = {"loss": finite(losses), "bits_per_byte": finite(bits)}
        self.metrics.write(step, "valid", {**values, "seconds": self.watch.seconds})
        self.watch.start()

    def _save(self, state: TrainState) -> None:
        jax.block_until_ready(state)
        self.watch.stop()
        self.metrics.flush()
        self.checkpoints.save(state, self.watch.seconds)
        self.watch.start()


def _finish(texts: Texts, programs: Programs, state: TrainState, metrics: MetricsFile) -> None:
    """What is asked of the last parameters."""
    step = int(state.step)
    for length, evaluate in programs.lengths.items():
        losses = evaluate(state.params, programs.streams[length])
        metrics.write(step, "length", {"length": length, "loss": finite(losses)})
    if programs.inside is None:
        return
    rows = texts.inside_rows
    arrays = programs.inside(state.params, rows)
    tokens = [texts.first.tokenizer.decode([int(i)]) for i in rows["inputs"][0]]
    metrics.write(step, "inside", {**{k: finite(x) for k, x in arrays.items()}, "tokens": tokens})


def _write_members(
    folder: RunFolder,
    config: ConfigDict,
    texts: Texts,
    state: TrainState,
    metrics: MetricsFile,
    seconds: float,
) -> None:
    """An ordinary run folder for each seed, with the last parameters."""
    for index, seed in enumerate(texts.data):
        member = RunFolder(folder.path / "seeds" / str(seed))
        own = _of_seed(config, seed)
        with member.claimed(own):
            texts.first.tokenizer.save(member.tokenizer)
            checkpoints = Checkpoints(
                member.checkpoints, keep=1, data_fingerprint=texts.data[seed].fingerprint
            )
            whole = dataclasses.replace(state, step=jnp.full(len(texts.data), state.step))
            checkpoints.save(jax.tree.map(lambda x, i=index: x[i], whole), seconds)
            checkpoints.close()
            file = MetricsFile(member.metrics, 0)
            for line in metrics.lines:
                if line["split"] in ("train", "valid"):
                    values = {
                        key: value[index] if isinstance(value, list) else value
                        for key, value in line.items()
                        if key not in ("step", "split")
                    }
                    file.write(line["step"], line["split"], values)
            file.close()
            losses = [x for x in file.lines if x["split"] == "valid"]
            known = [x for x in losses if x["loss"] is not None]
            best = min(known, key=lambda x: x["loss"], default=losses[-1])
            write_json(
                member.summary,
                {
                    **_summary(own, texts, state, seconds),
                    "seeds": [seed],
                    "valid_loss": losses[-1]["loss"],
                    "valid_bits_per_byte": losses[-1]["bits_per_byte"],
                    "best_valid_loss": best["loss"],
                    "best_step": best["step"],
                },
            )


def _summary(config: ConfigDict, texts: Texts, state: TrainState, seconds: float) -> dict[str, Any]:
    steps = int(state.step)
    rows = steps * config.train.batch_size
    tokens = rows * config.data.context_length
    members = len(state.bad_step)
    return {
        "seeds": list(texts.data),
        "steps": steps,
        "epochs": rows / texts.first.num_rows("train"),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)) // members,
        # Of each seed; positions of all batches, padding included.
        "train_tokens": tokens,
        # Of all seeds together.
        "tokens_per_second": members * tokens / seconds,
        "seconds": seconds,
        **environment.describe(),
    }


def _of_seed(config: ConfigDict, seed: int) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.seed = seed
    return config


def finite(values: Any) -> Any:
    """Lists of numbers, with None for what is not finite: JSON has no NaN."""
    values = np.asarray(values, np.float64)
    if values.ndim == 0:
        return float(values) if math.isfinite(values) else None
    return [finite(value) for value in values]
