"""What a model does inside on given tokens: pure functions from variables and tokens to arrays."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.scipy.special import xlogy

from rbf_jax.nn.config import TransformerConfig
from rbf_jax.ops.gpu import bound as gate

# Of the norms of keys.
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
# Tokens of the first row whose attention weights are kept.
MAP_TOKENS = 48


@dataclasses.dataclass(frozen=True)
class Inside:
    """What the attention layers of a model did with a batch of tokens.

    Attributes:
      attention_weights: (L, B, N, T, R + T) float32, keys of registers first. A row sums to 1, to
        less with a sink "origin" or "learned", to 0 where it attends to nothing.
      key_norms: (L, B, R + T, K) float32, ‖k‖ of the keys as attention sees them.
    """

    attention_weights: np.ndarray
    key_norms: np.ndarray

    @property
    def num_registers(self) -> int:
        """R."""
        return self.attention_weights.shape[-1] - self.attention_weights.shape[-2]

    def start(self, row: int, length: int) -> Inside:
        """The first tokens of one row, B = 1; causal models do the same with them alone."""
        columns = self.num_registers + length
        return Inside(
            self.attention_weights[:, row : row + 1, :, :length, :columns],
            self.key_norms[:, row : row + 1, :columns],
        )

    @property
    def sink_weights(self) -> np.ndarray:
        """(L, B, N, T): the weight that a sink takes, what is missing to a sum of 1."""
        return np.clip(1.0 - self.attention_weights.sum(-1), 0.0, 1.0)

    @property
    def register_key_norms(self) -> np.ndarray:
        """(L, B, R, K) float32."""
        return self.key_norms[:, :, : self.num_registers]

    @property
    def text_key_norms(self) -> np.ndarray:
        """(L, B, T, K) float32."""
        return self.key_norms[:, :, self.num_registers :]


def look_inside(
    model: nn.Module,
    variables: Mapping[str, Any],
    tokens: np.ndarray,
    positions: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
) -> Inside:
    """Applies a causal language model and gathers what its attention layers sow.

    Args:
      model: a ``CausalLM``.
      variables: its variables.
      tokens: int32 (B, T).
      positions: int32 (B, T), as the model takes them; None for 0 … T − 1.
      segment_ids: int32 (B, T), as the model takes them; None for one text a row.

    Raises:
      ValueError: the model has no attention layers that sow what they do.
    """
    sown = flatten_dict(_intermediates(model, variables, tokens, positions, segment_ids))
    if not any(path[-1] == "attention_weights" for path in sown):
        raise ValueError(f"model={type(model).__name__} must sow attention_weights, and sows none")
    return Inside(_by_layer(sown, "attention_weights"), _by_layer(sown, "key_norms"))


@functools.partial(jax.jit, static_argnums=0)
def _intermediates(model, variables, tokens, positions, segment_ids):
    _, state = model.apply(
        variables, tokens, positions=positions, segment_ids=segment_ids, mutable=["intermediates"]
    )
    return state["intermediates"]


def diagnose(model: nn.Module, params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What attention does with the text of a batch, in numbers: pure JAX, for jit and vmap.

    Padding does not count. L layers, N heads, R registers:

    * entropy (L, N): mean entropy of a token's attention, in nats, registers and sink included.
    * register_mass, sink_mass, first_token_mass (L, N): mean weight on the registers, on the sink
      "origin" or "learned", and on the first token of the document, which dot-product models make a
      sink.
    * even_share (): that of one register, or of the sink, were all that a token sees weighed alike.
    * distance (L, N): mean |i − j| in tokens, over text keys, weighted by attention.
    * key_norm_quantiles, value_norm_quantiles (L, 9): ‖k‖, ‖v‖ of text, at `QUANTILES`.
    * register_key_norm, register_value_norm (L, R): mean over heads.
    * first_token_key_norm, first_token_value_norm (L,): mean over documents and heads.
    * sink_value_norm (L,): mean ‖v‖ of registers, or of first tokens where there are none, over
      the mean ‖v‖ of the other text.
    * gamma, key_norm_weight (L, N); sink_logits (L, N) with a sink "origin" or "learned".
    * gated_by_head (L, N): share of rows that are too far below the bound γ‖q‖²/λ, or the sink's
      logit if that is larger, for the Triton kernel to measure logits from it
      (`rbf_jax.ops.gpu.bound`); 1 for dot products, which have no bound. gated (L,): the mean over
      heads.
    * attention_map (L, N, M, R + M): weights of the first row's first M = 48 tokens.

    Args:
      model: a ``CausalLM``.
      params: its parameters.
      batch: of (B, T) arrays, as `rbf_jax.data` makes them.

    Returns:
      float32 arrays by name.
    """
    _, state = model.apply(
        {"params": params},
        batch["inputs"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        mutable=["intermediates"],
    )
    layers = [
        {
            name: values[0]
            for name, values in state["intermediates"][f"block_{i}"]["attention"].items()
        }
        for i in range(model.config.num_layers)
    ]
    sown = {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}
    R = model.config.num_registers
    weights = sown["attention_weights"]  # (L, B, N, T, R + T)
    is_text = batch["segment_ids"] > 0  # (B, T)
    is_first = is_text & (batch["positions"] == 0)

    def over_rows(values: jax.Array) -> jax.Array:
        """(L, B, N, T) → (L, N), mean over text."""
        return jnp.mean(values, axis=(1, 3), where=is_text[None, :, None])

    sink = jnp.clip(1 - weights.sum(-1), 0, 1)
    text = weights[..., R:]
    T = text.shape[-1]
    apart = jnp.abs(jnp.arange(T)[:, None] - jnp.arange(T)).astype(text.dtype)
    gated = over_rows(_gated(sown["bound"], sown["bound_gap"]))
    return {
        "entropy": over_rows(-xlogy(weights, weights).sum(-1) - xlogy(sink, sink)),
        "register_mass": over_rows(weights[..., :R].sum(-1)),
        "sink_mass": over_rows(sink),
        "first_token_mass": over_rows(jnp.sum(text, -1, where=is_first[None, :, None, None])),
        "even_share": jnp.mean(1.0 / _keys_seen(model.config, batch["positions"]), where=is_text),
        "distance": over_rows((text * apart).sum(-1)) / over_rows(text.sum(-1)),
        **_norm_statistics("key", sown["key_norms"], R, is_text, is_first),
        **_norm_statistics("value", sown["value_norms"], R, is_text, is_first),
        "sink_value_norm": _sink_value_norm(sown["value_norms"], R, is_text, is_first),
        "gamma": sown["gamma"],
        "key_norm_weight": sown["key_norm_weight"],
        **({"sink_logits": sown["sink_logits"]} if "sink_logits" in sown else {}),
        "gated": gated.mean(-1),
        "gated_by_head": gated,
        "attention_map": weights[:, 0, :, :MAP_TOKENS, : R + MAP_TOKENS],
    }


def _keys_seen(config: TransformerConfig, positions: jax.Array) -> jax.Array:
    """How many keys a token at a position of its document sees, registers and sink included."""
    window = config.attention.window
    behind = positions if window is None else jnp.minimum(positions, window)
    seen = behind + 1 + config.num_registers + int(config.attention.has_virtual_sink)
    return seen.astype(jnp.float32)


def _norm_statistics(name, norms, num_registers, is_text, is_first) -> dict[str, jax.Array]:
    """(L, B, R + T, K) → what `diagnose` says of the norms of keys or values."""
    text = norms[:, :, num_registers:]
    known = jnp.where(is_text[..., None], text, jnp.nan).reshape(len(norms), -1)
    return {
        f"{name}_norm_quantiles": jnp.nanquantile(known, jnp.array(QUANTILES), axis=1).T,
        # Registers see nothing but each other: they are the same in every row.
        f"register_{name}_norm": norms[:, 0, :num_registers].mean(-1),
        f"first_token_{name}_norm": jnp.mean(text, (1, 2, 3), where=is_first[None, ..., None]),
    }


def _sink_value_norm(norms, num_registers, is_text, is_first) -> jax.Array:
    """(L, B, R + T, K) → (L,)."""
    text = norms[:, :, num_registers:]

    def mean(where):
        return jnp.mean(text, axis=(1, 2, 3), where=where[None, ..., None])

    if num_registers:
        return norms[:, :, :num_registers].mean((1, 2, 3)) / mean(is_text)
    return mean(is_first) / mean(is_text & ~is_first)


def _gated(bounds, gaps) -> jax.Array:
    """1 where the forward kernel would not trust the bound of a row, else 0."""
    farthest = (gate.HEADROOM - math.log2(gate.SMALLEST_SUM)) * math.log(2)
    return (gaps > farthest) | (bounds > gate.LARGEST_REFERENCE * math.log(2))


def _by_layer(sown: Mapping[tuple[str, ...], tuple[jax.Array, ...]], name: str) -> np.ndarray:
    """Stacks what each layer sowed under a name, in the order of the layers' numbers."""
    paths = [path for path in sown if path[-1] == name]
    return np.stack(
        [
            np.asarray(sown[path][0])
            for path in sorted(paths, key=lambda path: natural("/".join(path)))
        ]
    )


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts block_2 before block_10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
