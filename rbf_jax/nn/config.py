"""What a model is made of. The fields are those of `model` in configs/base.py, checked here."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from rbf_jax.ops.api import Implementation

KINDS = ("rbf", "dot")
DOT_SCALES = ("standard", "rbf")
POSITIONS = ("susie", "rope", "alibi", "learned", "none")
SINKS = ("none", "origin", "learned", "register")
# A virtual key with value 0 in every layer; its logit is 0, or learned.
VIRTUAL_SINKS = ("origin", "learned")
REGISTER_INITS = ("zero", "normal")
NORMS = ("rms", "layer")
DTYPES = ("float32", "bfloat16")

_SIZES = (
    "vocab_size",
    "context_length",
    "num_layers",
    "d_model",
    "num_heads",
    "num_kv_heads",
    "mlp_ratio",
    "num_registers",
    "loss_chunk",
)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """One attention layer.

    Attributes:
      kind: "rbf", softmax(2γ q·k − λγ‖k‖²), or "dot", softmax(scale · q·k).
      dot_scale: for "dot": "standard" is 1/√H, "rbf" is 2/√H, RBF's scale at its default γ.
      qk_norm: RMS-normalise queries and keys per head, with a learned scale.
      gamma: γ at the start, for "rbf"; None is 1/√H.
      learn_gamma: learn γ per head ("dot": half the scale); positive by construction.
      key_norm_weight: λ at the start, for "rbf".
      learn_key_norm_weight: learn λ per head, for "rbf".
      sink: what a query attends to where no token is near. "none"; "origin", a virtual key with
        logit 0 and value 0; "learned", such a key with a learned logit per head, from 0; or
        "register", registers in front of the sequence.
      normalize: False sums exp(−γ‖q − k‖²) v without softmax's denominator, for "rbf".
      exclusive: exclusive self attention, arXiv:2603.09078.
      window: attend to this many tokens back, and to itself; None for all.
      implementation: of the operation; None takes the best available.

    Raises:
      ValueError: a value is wrong, or has no effect beside the others.
    """

    kind: str = "rbf"
    dot_scale: str = "standard"
    qk_norm: bool = False
    gamma: float | None = None
    learn_gamma: bool = False
    key_norm_weight: float = 1.0
    learn_key_norm_weight: bool = False
    sink: str = "register"
    normalize: bool = True
    exclusive: bool = False
    window: int | None = None
    implementation: str | None = None

    def __post_init__(self):
        require_choice("attention.kind", self.kind, KINDS)
        require_choice("attention.dot_scale", self.dot_scale, DOT_SCALES)
        require_choice("attention.sink", self.sink, SINKS)
        if self.implementation is not None:
            require_choice(
                "attention.implementation", self.implementation, get_args(Implementation)
            )
        for name in ("gamma", "key_norm_weight"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and math.isfinite(value)):
                raise ValueError(f"attention.{name}={value!r} must be a finite number.")
        if self.gamma is not None and self.gamma <= 0:
            raise ValueError(f"attention.gamma={self.gamma!r} must be greater than 0.")
        if self.window is not None and not (_is_integer(self.window) and self.window >= 0):
            raise ValueError(f"attention.window={self.window!r} must be None or an int ≥ 0.")
        self._require_effect("rbf", "dot_scale")
        for name in ("gamma", "key_norm_weight", "learn_key_norm_weight", "normalize"):
            self._require_effect("dot", name)
        if self.has_virtual_sink and not self.normalize:
            raise ValueError(
                f"attention.sink={self.sink!r} has no effect with attention.normalize=False; "
                "set it to 'none' or 'register'."
            )

    def _require_effect(self, kind: str, name: str) -> None:
        default = getattr(AttentionConfig, name)
        value = getattr(self, name)
        if self.kind == kind and value != default:
            raise ValueError(
                f"attention.{name}={value!r} has no effect with attention.kind={kind!r}; "
                f"leave it at {default!r}."
            )

    @property
    def has_virtual_sink(self) -> bool:
        """Whether every layer has a virtual key with value 0."""
        return self.sink in VIRTUAL_SINKS

    def initial_gamma(self, head_dim: int) -> float:
        """Returns γ at the start; for "dot", half the scale: then 2γ q·k is scale · q·k."""
        if self.kind == "dot":
            return (2.0 if self.dot_scale == "rbf" else 1.0) / math.sqrt(head_dim) / 2
        return 1 / math.sqrt(head_dim) if self.gamma is None else float(self.gamma)

    def initial_key_norm_weight(self) -> float:
        """Returns λ at the start."""
        return 0.0 if self.kind == "dot" else float(self.key_norm_weight)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The causal language model.

    Attributes:
      vocab_size: V.
      context_length: longest sequence; binds for positions "learned" only.
      num_layers: L.
      d_model: D.
      num_heads: N.
      num_kv_heads: K; None for as many as query heads.
      mlp_ratio: width of the MLP over D.
      norm: of the residual stream, "rms" or "layer"; the latter has biases.
      use_bias: projections of attention and MLP have biases.
      positions: "susie", "rope", "alibi", "learned" or "none".
      num_registers: R, learned vectors in front of the sequence. None, which reads as an int
        afterwards, is 1 with attention.sink "register", else 0. "origin" and "learned" may have
        registers too; "none" has none.
      register_init: how they start, "zero" or "normal" (standard deviation 0.02).
      tie_embeddings: the head is the token embedding.
      dtype: of activations, "float32" or "bfloat16"; parameters are float32 always.
      remat: recompute blocks in the backward pass, keeping attention's output and logsumexp.
      loss_chunk: entries of the vocabulary whose logits exist at once in the loss.
      loss_dtype: of these logits as they are stored, "float32" or "bfloat16"; the softmax is
        computed in float32 always.
      attention: the same in every block.

    Raises:
      ValueError: a value is wrong, or has no effect beside the others.
    """

    vocab_size: int
    context_length: int
    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 4
    num_kv_heads: int | None = None
    mlp_ratio: int = 4
    norm: str = "rms"
    use_bias: bool = False
    positions: str = "susie"
    num_registers: int = None  # type: ignore[assignment]  # an int after __post_init__
    register_init: str = "zero"
    tie_embeddings: bool = True
    dtype: str = "float32"
    remat: bool = False
    loss_chunk: int = 8192
    loss_dtype: str = "float32"
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)

    def __post_init__(self):
        sink = self.attention.sink
        if self.num_registers is None:
            object.__setattr__(self, "num_registers", default_registers(sink))
        for name in _SIZES:
            value, least = getattr(self, name), 0 if name == "num_registers" else 1
            if name == "num_kv_heads" and value is None:
                continue
            if not (_is_integer(value) and value >= least):
                raise ValueError(f"{name}={value!r} must be an int ≥ {least}.")
        require_choice("norm", self.norm, NORMS)
        require_choice("positions", self.positions, POSITIONS)
        require_choice("register_init", self.register_init, REGISTER_INITS)
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("loss_dtype", self.loss_dtype, DTYPES)
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}."
            )
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide d_model={self.d_model}.")
        if self.positions in ("susie", "rope") and self.head_dim % 2:
            raise ValueError(
                f"d_model / num_heads = {self.head_dim} must be even for "
                f"positions={self.positions!r}, which pairs dimensions."
            )
        if sink == "register" and not self.num_registers:
            raise ValueError(
                "num_registers=0 leaves attention.sink='register' without registers; "
                "set attention.sink='none'."
            )
        if sink == "none" and self.num_registers:
            raise ValueError(
                f"num_registers={self.num_registers} contradicts attention.sink='none'; set "
                "attention.sink='register', or num_registers=None."
            )
        if self.num_registers == 0 and self.register_init != "zero":
            raise ValueError(
                f"register_init={self.register_init!r} has no effect with num_registers=0; "
                "leave it at 'zero'."
            )

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_dim(self) -> int:
        """H = D / N."""
        return self.d_model // self.num_heads


def default_registers(sink: str) -> int:
    """Returns the number of registers of a model whose num_registers is None."""
    return 1 if sink == "register" else 0


def num_registers(model: Mapping[str, Any]) -> int:
    """Returns the number of registers that a section `model` of a configuration asks for."""
    number = model.get("num_registers")
    return default_registers(model["attention"]["sink"]) if number is None else number


def from_stored(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stored section `model` with the keys of today.

    Before `attention.sink` there were `attention.origin_sink`, False by default, and
    `num_registers`, 1 by default. A number that is the default of its sink becomes None, so that
    the result equals the configuration that trains the same model today.

    Args:
      model: of a run, a record or an exported model, of any age; is not changed.
    """
    attention = dict(model.get("attention", {}))
    if "sink" in attention:
        return dict(model)
    number = model.get("num_registers", 1)
    if attention.pop("origin_sink", False):
        attention["sink"] = "origin"
    else:
        attention["sink"] = "register" if number else "none"
    if number == default_registers(attention["sink"]):
        number = None
    return {**model, "num_registers": number, "attention": attention}


def require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ValueError, with the nearest valid name, where `value` is none of `choices`."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}{hint}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
