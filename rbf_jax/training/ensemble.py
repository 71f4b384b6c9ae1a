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
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from rbf_jax import environment
from rbf_jax.data import Data, load_data
from rbf_jax.nn import CausalLM
from rbf_jax.training.checkpoint import Checkpoints
from rbf_jax.training.config import model_config, validate
from rbf_jax.training.evaluation import bits_per_byte
from rbf_jax.training.metrics import MetricsFile
from rbf_jax.training.optimizer import make_optimizer, make_schedule
from rbf_jax.training.progress import Stopwatch
from rbf_jax.training.run_folder import RunFolder, write_json
from rbf_jax.training.signals import StopRequest
from rbf_jax.training.state import TrainState, create_state_of, state_shapes
from rbf_jax.training.step import make_eval_step, make_inspect_step, make_train_step
from rbf_jax.training.trainer import TrainingStopped

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]
Diagnose = Callable[[CausalLM, Any, Batch], Mapping[str, jax.Array]]

# Step is one number; all else has a member per seed.
_STATE_AXES = TrainState(step=None, params=0, opt_state=0, bad_step=0)  # type: ignore[arg-type]
_INSIDE_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Texts:
    """The data of all seeds, and the batches made of it.

    Attributes:
      data: by seed; they differ in the order of the rows.
      valid: (M, B, T) arrays, the validation batches that all are evaluated on.
      chunks: train.log_every steps each, (steps, n, B, T) arrays: those kept once made, since other
        configurations want the same, until they fill `limit` bytes.
      limit: on what is kept.
    """

    data: Mapping[int, Data]
    valid: Batch
    chunks: list[Batch]
    limit: int
    _config: ConfigDict

    @classmethod
    def read(
        cls, config: ConfigDict, seeds: Sequence[int], folder: Path, limit: int = 8 * 2**30
    ) -> Texts:
        """Reads the data; its tokenizer is kept in `folder`.

        Raises:
          ValueError: the data cannot be read.
        """
        data = {seed: load_data(config.data, seed=seed, tokenizer_dir=folder) for seed in seeds}
        batches = data[seeds[0]].batches(
            "valid", config.train.batch_size, shuffle=False, repeat=False
        )
        limited = itertools.islice(batches, config.train.eval_batches or None)
        return cls(data, _stack(limited), [], limit, config)

    @property
    def first(self) -> Data:
        """Of the first seed."""
        return next(iter(self.data.values()))

    def steps_from(self, step: int) -> Iterator[Batch]:
        """Yields the batches of train.log_every steps at a time, from behind `step` on."""
        train = self._config.train
        index = step // train.log_every
        yield from self.chunks[index:]
        index = max(index, len(self.chunks))
        iterators = [
            iter(
                data.batches(
                    "train",
                    train.batch_size,
                    shuffle=True,
                    repeat=True,
                    start=index * train.log_every,
                )
            )
            for data in self.data.values()
        ]
        while True:
            steps = ([next(i) for i in iterators] for _ in range(train.log_every))
            chunk = _stack(_stack(members) for members in steps)
            size = sum(array.nbytes for array in chunk.values())
            if index == len(self.chunks) and (index + 1) * size <= self.limit:
                self.chunks.append(chunk)
            index += 1
            yield chunk


@dataclasses.dataclass(frozen=True)
class Programs:
    """What an ensemble runs, compiled ahead of time: compiling can go on while others train.

    Attributes:
      model: the language model.
      create: seeds uint32 (n,) → TrainState.
      train: (state, chunk) → (state, metrics (steps, n)).
      evaluate: (params, validation batches) → mean losses (n,).
      inspect: (params, batch (n, B, T)) → metrics (n, …).
      lengths: context length → the same as `evaluate`, on text as one stream.
      streams: context length → the batches of `lengths`.
      inside: (params, batch (B, T)) → what `diagnose` returns, (n, …).
    """

    model: CausalLM
    create: Callable[..., TrainState]
    train: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[..., jax.Array]
    inspect: Callable[..., dict[str, jax.Array]]
    lengths: Mapping[int, Callable[..., jax.Array]]
    streams: Mapping[int, Batch]
    inside: Callable[..., dict[str, jax.Array]] | None


def require_chunks(config: ConfigDict) -> None:
    """Raises ValueError unless steps come in chunks of train.log_every."""
    for key in ("steps", "eval_every", "checkpoint_every"):
        if config.train[key] % config.train.log_every:
            raise ValueError(
                f"train.{key} is {config.train[key]}; in an ensemble it must be a multiple of "
                f"train.log_every = {config.train.log_every}."
            )


def compile_programs(
    config: ConfigDict,
    texts: Texts,
    *,
    lengths: Sequence[int] = (),
    diagnose: Diagnose | None = None,
) -> Programs:
    """Compiles everything that an ensemble runs.

    Args:
      config: with the keys of configs/base.py; its seed counts for nothing.
      texts: of the ensemble.
      lengths: context lengths to evaluate at in the end.
      diagnose: (model, params, batch) → arrays, asked for in the end.

    Raises:
      ValueError: the configuration is wrong.
      NotImplementedError: attention cannot be computed as it wants it.
    """
    validate(config, jax.device_count(), keeps_best=False)
    require_chunks(config)
    model = CausalLM(model_config(config, texts.first.tokenizer.vocab_size))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    schedule = make_schedule(config.optimizer, config.train.steps)
    packed = config.data.layout == "packed"
    n = len(texts.data)
    members, whole = _shardings(n)
    train, shape = config.train, (config.train.batch_size, config.data.context_length)

    def of(function, *arguments, shardings, results=None, donate=()):
        jitted = jax.jit(
            function, donate_argnums=donate, in_shardings=shardings, out_shardings=results
        )
        return jitted.lower(*arguments).compile()

    one = state_shapes(model, optimizer)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), one)
    state = dataclasses.replace(state, step=one.step)
    of_state = dataclasses.replace(jax.tree.map(lambda _: members, state), step=whole)
    steps = make_train_step(
        model,
        optimizer,
        schedule,
        accumulate_steps=config.optimizer.accumulate_steps,
        packed=packed,
    )
    step_of_all = jax.vmap(steps, in_axes=(_STATE_AXES, 0), out_axes=(_STATE_AXES, 0))
    create = jax.vmap(create_state_of(model, optimizer), out_axes=_STATE_AXES)
    evaluate = jax.vmap(_mean_loss(model, packed=packed), in_axes=(0, None))
    inspect = jax.vmap(make_inspect_step(model))
    streams = {T: _stream(texts.valid, T) for T in lengths}
    inside = None
    if diagnose is not None:
        rows = {name: array[0, :_INSIDE_ROWS] for name, array in texts.valid.items()}
        inside = of(
            jax.vmap(functools.partial(diagnose, model), in_axes=(0, None)),
            state.params,
            _shapes(rows),
            shardings=(members, whole),
        )
    return Programs(
        model=model,
        create=of(
            create, jax.ShapeDtypeStruct((n,), np.uint32), shardings=members, results=of_state
        ),
        train=of(
            lambda state, chunk: jax.lax.scan(step_of_all, state, chunk),
            state,
            _batch_shapes((train.log_every, n, *shape)),
            donate=0,
            shardings=(of_state, NamedSharding(members.mesh, P(None, *members.spec))),
            results=(of_state, None),
        ),
        evaluate=of(evaluate, state.params, _shapes(texts.valid), shardings=(members, whole)),
        inspect=of(inspect, state.params, _batch_shapes((n, *shape)), shardings=(members, members)),
        lengths={
            T: of(
                jax.vmap(_mean_loss(model, packed=True), in_axes=(0, None)),
                state.params,
                _shapes(stream),
                shardings=(members, whole),
            )
            for T, stream in streams.items()
        },
        streams=streams,
        inside=inside,
    )


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
    rows = {name: array[0, :_INSIDE_ROWS] for name, array in texts.valid.items()}
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


def _mean_loss(model: CausalLM, *, packed: bool) -> Callable[[Any, Batch], jax.Array]:
    """(params, batches (M, B, T)) → the mean loss over all their targets, float32 ()."""
    step = make_eval_step(model, packed=packed)

    def mean_loss(params: Any, batches: Batch) -> jax.Array:
        losses, targets = jax.lax.map(lambda batch: step(params, batch), batches)
        return jnp.sum(losses) / jnp.sum(targets, dtype=jnp.float32)

    return mean_loss


def _stream(valid: Batch, length: int) -> Batch:
    """The validation text as one stream, without borders of documents, in rows of `length`.

    Raises:
      ValueError: there is not enough of it for a row.
    """
    tokens = valid["targets"][valid["loss_mask"]]
    rows = (len(tokens) - 1) // length
    if rows == 0:
        raise ValueError(
            f"the validation batches hold {len(tokens)} tokens: too few for a row of {length}."
        )
    cut = tokens[: rows * length + 1]
    inputs, targets = (x.reshape(rows, 1, length) for x in (cut[:-1], cut[1:]))
    return {
        "inputs": inputs,
        "targets": targets,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), inputs.shape),
        "segment_ids": np.ones_like(inputs),
        "loss_mask": np.ones(inputs.shape, bool),
    }


def _shardings(n: int) -> tuple[NamedSharding, NamedSharding]:
    """Members over as many devices as divide them, and whole on each."""
    devices = jax.devices()[: math.gcd(n, jax.device_count())]
    mesh = jax.make_mesh(
        (len(devices),), ("seeds",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )
    return NamedSharding(mesh, P("seeds")), NamedSharding(mesh, P())


def _of_seed(config: ConfigDict, seed: int) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.seed = seed
    return config


def _stack(batches: Any) -> dict[str, np.ndarray]:
    batches = list(batches)
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def _shapes(batch: Batch) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}


def _batch_shapes(shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    names = ("inputs", "targets", "positions", "segment_ids")
    shapes = {name: jax.ShapeDtypeStruct(shape, np.int32) for name in names}
    return {**shapes, "loss_mask": jax.ShapeDtypeStruct(shape, np.bool_)}


def finite(values: Any) -> Any:
    """Lists of numbers, with None for what is not finite: JSON has no NaN."""
    values = np.asarray(values, np.float64)
    if values.ndim == 0:
        return float(values) if math.isfinite(values) else None
    return [finite(value) for value in values]
