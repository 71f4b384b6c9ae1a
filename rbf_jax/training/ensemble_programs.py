"""What an ensemble reads, and what it runs: compiled for all seeds at once by `jax.vmap`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
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

from rbf_jax.data import Data, load_data
from rbf_jax.nn import CausalLM
from rbf_jax.training.config import model_config, validate
from rbf_jax.training.optimizer import make_optimizer, make_schedule
from rbf_jax.training.state import TrainState, create_state_of, state_shapes
from rbf_jax.training.step import make_eval_step, make_inspect_step, make_train_step

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
    def inside_rows(self) -> Batch:
        """(B, T): the validation rows that `diagnose` looks at."""
        return {name: array[0, :_INSIDE_ROWS] for name, array in self.valid.items()}

    @property
    def first(self) -> Data:
        """Of the first seed."""
        return next(iter(self.data.values()))

    def make_all(self) -> None:
        """Makes all batches of a run now, so that not the first run alone waits for them."""
        train = self._config.train
        for _ in itertools.islice(self.steps_from(0), -(-train.steps // train.log_every)):
            pass

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
    create = jax.vmap(create_state_of(model, optimizer), out_axes=_STATE_AXES)
    train_chunk = _train_chunk(config, model, optimizer)
    evaluate = jax.vmap(_mean_loss(model, packed=packed), in_axes=(0, None))
    inspect = jax.vmap(make_inspect_step(model))
    streams = {T: _stream(texts.valid, T) for T in lengths}
    inside = None
    if diagnose is not None:
        inside = of(
            jax.vmap(functools.partial(diagnose, model), in_axes=(0, None)),
            state.params,
            _shapes(texts.inside_rows),
            shardings=(members, whole),
        )
    return Programs(
        model=model,
        create=of(
            create, jax.ShapeDtypeStruct((n,), np.uint32), shardings=members, results=of_state
        ),
        train=of(
            train_chunk,
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


def _train_chunk(config: ConfigDict, model: CausalLM, optimizer: Any) -> Callable[..., Any]:
    """(state of all, chunk) → (state, metrics (steps, n))."""
    step = make_train_step(
        model,
        optimizer,
        make_schedule(config.optimizer, config.train.steps),
        accumulate_steps=config.optimizer.accumulate_steps,
        packed=config.data.layout == "packed",
    )
    step_of_all = jax.vmap(step, in_axes=(_STATE_AXES, 0), out_axes=(_STATE_AXES, 0))
    return lambda state, chunk: jax.lax.scan(step_of_all, state, chunk)


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


def _stack(batches: Any) -> dict[str, np.ndarray]:
    batches = list(batches)
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def _shapes(batch: Batch) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}


def _batch_shapes(shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    names = ("inputs", "targets", "positions", "segment_ids")
    shapes = {name: jax.ShapeDtypeStruct(shape, np.int32) for name in names}
    return {**shapes, "loss_mask": jax.ShapeDtypeStruct(shape, np.bool_)}
