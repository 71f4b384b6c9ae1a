"""The causal language model."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rbf_jax.nn import cache as caches
from rbf_jax.nn import losses
from rbf_jax.nn.attention import Attention
from rbf_jax.nn.config import TransformerConfig
from rbf_jax.nn.inspection import statistics_collection
from rbf_jax.nn.layers import Norm, output_init, weight_init
from rbf_jax.nn.positions import Sinusoids, sinusoids
from rbf_jax.nn.registers import Registers
from rbf_jax.ops.vjp import LOGSUMEXP_NAME, OUTPUT_NAME


class MLP(nn.Module):
    """D → mlp_ratio·D → GELU (its tanh form, as GPT-2 has it) → D."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, R+T, D) → (B, R+T, D)."""
        config = self.config
        width = config.mlp_ratio * config.d_model
        x = nn.Dense(
            width,
            use_bias=config.use_bias,
            dtype=config.dtype,
            kernel_init=weight_init,
            name="in",
        )(x)
        return nn.Dense(
            config.d_model,
            use_bias=config.use_bias,
            dtype=config.dtype,
            kernel_init=output_init(config.num_layers),
            name="out",
        )(nn.gelu(x))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: Sinusoids | None,
        segment_ids: jax.Array | None,
        past: caches.Past | None = None,
    ) -> Any:
        """(B, R+T, D) → (B, R+T, D); with a `past`, a pair of it and the cache as it is then."""
        config = self.config
        in_front = caches.registers_in_front(config, past)
        normed = Norm(config.dtype, in_front, config.norm, name="attention_norm")(x)
        attended = Attention(config, name="attention")(normed, angles, segment_ids, past)
        out, cache = (attended, None) if past is None else attended
        x = x + out
        normed = Norm(config.dtype, in_front, config.norm, name="mlp_norm")(x)
        x = x + MLP(config, name="mlp")(normed)
        return x if past is None else (x, cache)


# Attention's backward pass needs its output and logsumexp, which the operation names; with these
# kept, recomputing a block does not attend again.
_remat_block = nn.remat(
    Block,
    policy=jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME, LOGSUMEXP_NAME),
)


class CausalLM(nn.Module):
    """Predicts the next token at each position.

    With ``mutable=["statistics"]``, ``apply`` also returns, per attention layer: key_norms
    (B, R+T, K), ‖k‖, registers first; logit_max (), the largest logit of text, which is where
    segment_ids are greater than 0; gamma (N,); key_norm_weight (N,); sink_logits (N,), with
    attention.sink "origin" or "learned"; and, of the model, register_norm (), if there are
    registers. With ``mutable=["intermediates"]`` it returns these
    and, per layer, attention_weights (B, N, T, R+T), quadratic in T; value_norms (B, R+T, K), ‖v‖;
    bound (B, N, T), the larger of γ‖q‖²/λ and the sink's logit, which no logit of the row exceeds
    (infinite for λ ≤ 0); and bound_gap (B, N, T), the bound − the row's logsumexp, sink included.
    All are float32.

    Attributes:
      config: sizes and choices.
    """

    config: TransformerConfig

    def setup(self):
        """Names the parts, as they are named in the parameters."""
        config = self.config
        block = _remat_block if config.remat else Block
        self.embedding = nn.Embed(
            config.vocab_size, config.d_model, dtype=config.dtype, embedding_init=weight_init
        )
        if config.positions == "learned":
            self.position_embedding = nn.Embed(
                config.context_length,
                config.d_model,
                dtype=config.dtype,
                embedding_init=weight_init,
            )
        if config.num_registers:
            self.registers = Registers(config.num_registers, config.d_model, config.register_init)
        self.block = [block(config) for _ in range(config.num_layers)]  # named block_0, block_1 …
        self.final_norm = Norm(config.dtype, kind=config.norm)
        if not config.tie_embeddings:
            self.head = self.param("head", weight_init, (config.vocab_size, config.d_model))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the logits of each position's next token.

        Args:
          tokens: int32 (B, T).
          positions: int32 (B, T), from 0 in each document; None counts along the row. Used by
            "susie", "rope" and "learned"; ALiBi and windows count tokens along the row, which
            within a document comes to the same.
          segment_ids: int32 (B, T); tokens attend to their own segment only. None: all is one.
            0 is padding: a segment like the others, but for what is sown.

        Returns:
          (B, T, V) float32.

        Raises:
          ValueError: a shape or dtype is wrong, or T exceeds the table of learned positions.
        """
        return losses.logits(self._hidden(tokens, positions, segment_ids), self._head())

    def token_losses(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Returns −log p(target), (B, T) float32 in nats, `loss_chunk` logits of each at a time.

        Args:
          tokens: int32 (B, T).
          targets: int32 (B, T).
          positions: as for a call of the model.
          segment_ids: as for a call of the model.
        """
        _require_integers("targets", targets, jnp.shape(tokens))
        return losses.token_losses(
            self._hidden(tokens, positions, segment_ids),
            self._head(),
            targets,
            chunk=self.config.loss_chunk,
            dtype=self.config.loss_dtype,
        )

    def prefill(
        self, tokens: jax.Array, lengths: jax.Array, cache: caches.Cache
    ) -> tuple[jax.Array, caches.Cache]:
        """Reads prompts of different lengths.

        Args:
          tokens: int32 (B, P); what comes after a row's length is ignored.
          lengths: int32 (B,), 1 to P.
          cache: of `empty_cache`.

        Returns:
          The logits of what follows each prompt, (B, V) float32, and the cache.

        Raises:
          ValueError: a shape or dtype is wrong, or P exceeds the cache or the table of learned
            positions.
        """
        config, slots = self.config, caches.num_slots(self.config, cache)
        x, angles = self._embed(tokens, None)
        _require_integers("lengths", lengths, tokens.shape[:1])
        if tokens.shape[1] > slots and not caches.rolls(config, cache, 1):
            raise ValueError(
                f"tokens has length {tokens.shape[1]}, but the cache has room for {slots}."
            )
        if config.num_registers:
            x = self.registers(x)
        x, layers = self._with_cache(x, angles, cache, lambda x: caches.Prompt(x, lengths))
        last = config.num_registers + lengths - 1
        x = self.final_norm(jnp.take_along_axis(x, last[:, None, None], axis=1))
        return losses.logits(x, self._head())[:, 0], caches.Cache(layers, lengths)

    def extend(
        self, tokens: jax.Array, cache: caches.Cache, counts: jax.Array | None = None
    ) -> tuple[jax.Array, caches.Cache]:
        """Reads T more tokens in each row, or as many of them as count.

        No error can be raised for a row that outgrows the cache, or the table of learned positions:
        its logits are NaN from there on.

        Args:
          tokens: int32 (B, T); T is small, as attention takes memory for T times the cache's slots.
          cache: of `prefill` or of this method. Donate it, and nothing is copied.
          counts: int32 (B,), 0 to T; None for T. Ignore the logits beyond.

        Returns:
          The logits of each position's next token, (B, T, V) float32, and the cache.

        Raises:
          ValueError: a shape or dtype is wrong.
        """
        if jnp.ndim(tokens) != 2:
            raise ValueError(f"tokens has shape {jnp.shape(tokens)}, but must be (B, T).")
        B, T = tokens.shape
        if counts is None:
            counts = jnp.full(B, T, jnp.int32)
        _require_integers("counts", counts, (B,))
        starts, lengths = cache.lengths, cache.lengths + counts
        places = starts[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
        x, angles = self._embed(tokens, places)
        x, layers = self._with_cache(x, angles, cache, lambda x: caches.Step(x, starts, lengths))
        logits = losses.logits(self.final_norm(x), self._head())
        if not caches.rolls(self.config, cache, T):
            fits = places < caches.num_slots(self.config, cache)
            logits = jnp.where(fits[..., None], logits, jnp.nan)
        return logits, caches.Cache(layers, lengths)

    def _with_cache(self, x, angles, cache, past):
        """All blocks, with `past(layer)` of each layer of the cache."""
        layers = []
        for block, layer in zip(self.block, cache.layers, strict=True):
            x, layer = block(x, angles, None, past(layer))
            layers.append(layer)
        return x, tuple(layers)

    def _head(self) -> jax.Array:
        return self.embedding.embedding if self.config.tie_embeddings else self.head

    def _hidden(self, tokens, positions, segment_ids) -> jax.Array:
        """Returns the normed residual stream behind the last block, (B, T, D)."""
        config = self.config
        x, angles = self._embed(tokens, positions)
        if segment_ids is not None:
            _require_integers("segment_ids", segment_ids, tokens.shape)
        if config.num_registers:
            x = self.registers(x)
            if collection := statistics_collection(self):
                register_norm = jnp.linalg.norm(self.registers.embedding)
                self.sow(collection, "register_norm", register_norm)
        for block in self.block:
            x = block(x, angles, segment_ids)
        return self.final_norm(x[:, config.num_registers :])

    def _embed(self, tokens, positions) -> tuple[jax.Array, Sinusoids | None]:
        """Returns the residual stream in front of the first block, without registers, (B, T, D)."""
        config = self.config
        if jnp.ndim(tokens) != 2:
            raise ValueError(f"tokens has shape {jnp.shape(tokens)}, but must be (B, T).")
        T = tokens.shape[1]
        _require_integers("tokens", tokens, tokens.shape)
        if positions is None:
            positions = jnp.arange(T, dtype=jnp.int32)[None]
        else:
            _require_integers("positions", positions, tokens.shape)
        x = self.embedding(tokens)
        if config.positions == "learned":
            if config.context_length < T:
                raise ValueError(
                    f"tokens has length {T}, but positions='learned' has "
                    f"context_length={config.context_length} positions."
                )
            x = x + self.position_embedding(positions)
        angles = None
        if config.positions in ("susie", "rope"):
            angles = sinusoids(positions, config.head_dim)
        return x, angles


def _require_integers(name: str, array, shape: tuple[int, ...]) -> None:
    if jnp.shape(array) != shape or not jnp.issubdtype(jnp.result_type(array), jnp.integer):
        raise ValueError(
            f"{name} has shape {jnp.shape(array)} and dtype {jnp.result_type(array)}, but must be "
            f"integers of shape {shape}."
        )
