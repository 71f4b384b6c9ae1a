"""AdamW with linear warm-up and cosine decay; which parameters decay; the dial's annealing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

# Vectors by meaning, though some are arrays of two or more dimensions.
_NO_DECAY = frozenset({"registers", "susie", "bias"})
# λ, as `rbf_jax.nn` names it.
_DIAL = "key_norm_weight"


def make_schedule(config: Any, steps: int) -> optax.Schedule:
    """Learning rate of the update number `count`, from 0.

    The warm-up is a straight line from 0 to the peak, which step `warmup_steps` has; half a cosine
    leads from there to the final learning rate, which the last step has. Steps count from 1, so
    the first step's learning rate is not 0.

    Args:
      config: the section `optimizer` of configs/base.py.
      steps: length of the run.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.final_learning_rate,
    )

    def learning_rate(count: ArrayLike) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and float32.
            return jnp.asarray(schedule(count + 1), jnp.float32)

    return learning_rate


def make_optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """Returns clipping by global norm, if asked for, and AdamW; with `anneal_steps`, not for λ.

    Args:
      config: the section `optimizer` of configs/base.py.
      steps: length of the run.
    """
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.clip_norm is not None:
        adamw = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    if config.get("anneal_steps"):  # Runs of before have no such key.
        parts = {"learned": adamw, "annealed": anneal_to_one(config.anneal_steps)}
        return _with_promotion(optax.partition(parts, _annealed_or_learned))
    return _with_promotion(adamw)


def anneal_to_one(steps: int) -> optax.GradientTransformation:
    """Leads parameters to 1 in a straight line, from wherever each starts, whatever the gradient.

    λ thus is part of the state like any parameter: checkpoints hold it, and evaluation, generation
    and a run that goes on find it where training left it.

    Args:
      steps: update number `steps` arrives at 1; later ones stay there.
    """

    def update(
        updates: optax.Updates, done: jax.Array, params: optax.Params | None = None
    ) -> tuple[optax.Updates, jax.Array]:
        del updates
        left = jnp.maximum(steps - done, 1).astype(jnp.float32)
        return jax.tree.map(lambda x: (1 - x) / left, params), done + 1

    return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)


def _annealed_or_learned(params: Any) -> Any:
    def label(path: jax.tree_util.KeyPath, parameter: Any) -> str:
        del parameter
        return "annealed" if getattr(path[-1], "key", None) == _DIAL else "learned"

    return jax.tree_util.tree_map_with_path(label, params)


def _with_promotion(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """optax mixes dtypes, as in decay**count, which JAX's strict mode would not let it."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def decay_mask(params: Any) -> Any:
    """Which parameters weight decay pulls to 0: the matrices.

    Those are kernels, embeddings and the head. Left alone are norms, γ, λ and the sink's logits,
    which are vectors, and biases, registers and SuSiE's weights and register offsets, whatever
    their shape.

    Args:
      params: pytree of arrays, named as `rbf_jax.nn` names them.

    Returns:
      The same tree of bools.
    """

    def decays(path: jax.tree_util.KeyPath, parameter: jax.Array) -> bool:
        names = {getattr(key, "key", None) for key in path}
        return jnp.ndim(parameter) >= 2 and not names & _NO_DECAY

    return jax.tree_util.tree_map_with_path(decays, params)
