"""Pure functions of state and batch: a training step, an evaluation step, what attention does.

A batch is a dict of (B, T) arrays as `rbf_jax.data` makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rbf_jax.nn import CausalLM
from rbf_jax.training.optimizer import make_schedule
from rbf_jax.training.sharding import (
    Batch,
    batch_sharding,
    gather_outer,
    keep_rows_split,
    replicated,
    state_shardings,
)
from rbf_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


def model_inputs(batch: Batch, *, packed: bool) -> dict[str, Any]:
    """Returns positions and segments for the model.

    With one document a row, both are what the model assumes by itself, but for the padding behind
    it, which causality hides from what counts.

    Args:
      batch: of (B, T) arrays.
      packed: whether a row may hold several documents.
    """
    if not packed:
        return {}
    return {"positions": batch["positions"], "segment_ids": batch["segment_ids"]}


def make_loss(model: CausalLM, *, packed: bool) -> Callable[[Any, Batch], jax.Array]:
    """Returns the function (params, batch) → the targets' losses added up, float32 (), in nats."""

    def summed_loss(params: Any, batch: Batch) -> jax.Array:
        with nn.intercept_methods(keep_rows_split):
            losses: Any = model.apply(
                {"params": gather_outer(params)},
                batch["inputs"],
                batch["targets"],
                **model_inputs(batch, packed=packed),
                method="token_losses",
            )
        return jnp.sum(losses, where=batch["loss_mask"])

    return summed_loss


def make_train_step(
    model: CausalLM,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulate_steps: int = 1,
    packed: bool = True,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the function (state, batch) → (state, metrics).

    Metrics are float32 (): "loss", mean over the batch's targets in nats, "grad_norm", before
    clipping, and "learning_rate".

    Args:
      model: the language model.
      optimizer: of `make_optimizer`.
      schedule: of `make_schedule`, for the metrics.
      accumulate_steps: micro-batches, one after another; divides B. The update is that of the
        whole batch at once, up to rounding: losses are divided by the targets of all of it.
      packed: whether a row may hold several documents.
    """
    value_and_grad = jax.value_and_grad(make_loss(model, packed=packed))

    def loss_and_grads(params: Any, batch: Batch) -> tuple[jax.Array, Any]:
        if accumulate_steps == 1:
            return value_and_grad(params, batch)

        def add(total: Any, micro_batch: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(params, micro_batch)), None

        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
        return jax.lax.scan(add, zero, _micro_batches(batch, accumulate_steps))[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, grads = loss_and_grads(state.params, batch)
        targets = jnp.maximum(jnp.sum(batch["loss_mask"], dtype=jnp.float32), 1)
        loss, grads = jax.tree.map(lambda total: total / targets, (loss, grads))
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        step = state.step + 1
        bad = ~jnp.isfinite(loss + grad_norm) & (state.bad_step == 0)
        new_state = TrainState(
            step=step,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            bad_step=jnp.where(bad, step, state.bad_step),
        )
        metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": schedule(state.step)}
        return new_state, metrics

    return train_step


def compile_train_step(
    config: ConfigDict,
    model: CausalLM,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
) -> jax.stages.Compiled:
    """Returns the training step of a run, compiled; it donates the state that it is given.

    Args:
      config: with the keys of configs/base.py.
      model: the language model.
      optimizer: of `make_optimizer`.
      state: any state of the run, or its shapes.
      mesh: of `make_mesh`.
    """
    shardings = state_shardings(mesh, state)
    train_step = jax.jit(
        make_train_step(
            model,
            optimizer,
            make_schedule(config.optimizer, config.train.steps),
            accumulate_steps=config.optimizer.accumulate_steps,
            packed=config.data.layout == "packed",
        ),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    shape = (config.train.batch_size, config.data.context_length)
    names = ("inputs", "targets", "positions", "segment_ids")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    batch["loss_mask"] = jax.ShapeDtypeStruct(shape, jnp.bool)
    with jax.set_mesh(mesh):
        return train_step.lower(state, batch).compile()


def _micro_batches(batch: Batch, number: int) -> Batch:
    """(B, T) → (number, B/number, T), every number-th row: each device keeps the rows it has."""
    return {
        name: array.reshape(-1, number, *array.shape[1:]).swapaxes(0, 1)
        for name, array in batch.items()
    }


def make_eval_step(
    model: CausalLM, *, packed: bool = True
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """Returns the function (params, batch) → (summed loss float32 (), targets int32 ())."""
    summed_loss = make_loss(model, packed=packed)

    def eval_step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return summed_loss(params, batch), jnp.sum(batch["loss_mask"], dtype=jnp.int32)

    return eval_step


def make_inspect_step(model: CausalLM, *, rows: int = 2) -> Callable[[Any, Batch], Metrics]:
    """Returns the function (params, batch) → what attention does in the batch's first rows.

    float32: "logit_max" (), "key_norm_mean" and "key_norm_max" () of text tokens' keys ‖k‖ over
    all layers, "register_norm" () if there are registers, and per layer "gamma/LAYER",
    "key_norm_weight/LAYER" and, if learned, "sink_logits/LAYER" (N,). Padding does not count. It
    is a forward pass of its own, so that a step that does not log pays nothing, and one that does
    needs no more memory than it trains in.
    """
    num_registers = model.config.num_registers
    learned_sink = model.config.attention.sink == "learned"
    per_head = ("gamma", "key_norm_weight", *["sink_logits"] * learned_sink)

    def inspect_step(params: Any, batch: Batch) -> Metrics:
        batch = {name: array[:rows] for name, array in batch.items()}
        _, variables = model.apply(
            {"params": params},
            batch["inputs"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],  # They tell text from padding, packed or not.
            mutable=["statistics"],
        )
        sown = variables["statistics"]
        layers = [sown[f"block_{i}"]["attention"] for i in range(model.config.num_layers)]
        norms = jnp.stack([layer["key_norms"][0][:, num_registers:] for layer in layers])
        is_text = jnp.broadcast_to(batch["segment_ids"][None, ..., None] > 0, norms.shape)
        metrics = {
            "logit_max": jnp.max(jnp.stack([layer["logit_max"][0] for layer in layers])),
            "key_norm_mean": jnp.mean(norms, where=is_text),
            "key_norm_max": jnp.max(norms, where=is_text, initial=0.0),
        }
        if num_registers:
            metrics["register_norm"] = sown["register_norm"][0]
        for name in per_head:
            metrics |= {f"{name}/{i}": layer[name][0] for i, layer in enumerate(layers)}
        return metrics

    return inspect_step
