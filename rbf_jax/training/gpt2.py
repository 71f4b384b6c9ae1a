"""GPT-2 from a folder as Hugging Face has it: config.json, safetensors and a tokenizer.

Radford et al., Language Models are Unsupervised Multitask Learners, 2019. Its attention is the dot
product of scale 1/√H, which is the dial at λ = 0 and γ = 1/(2√H). Nothing is downloaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rbf_jax.data.tokenizer import Tokenizer, load_tokenizer
from rbf_jax.nn import AttentionConfig, CausalLM, TransformerConfig

# What `CausalLM` computes; a key that config.json leaves out has the first value.
_COMPUTED: Mapping[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Masks that old files hold beside the weights.
_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")


class GPT2Folder:
    """A folder of GPT-2.

    Attributes:
      path: of the folder.
      num_positions: T, the longest sequence.
      vocab_size: V.
      fields: of the section `model` of a configuration, that of attention among them.
    """

    def __init__(self, path: str | Path):
        """Reads config.json.

        Raises:
          ValueError: the folder holds no GPT-2, or one that the model cannot compute.
        """
        self.path = Path(path).expanduser().absolute()
        content = read_object(self.path / "config.json")
        if content.get("model_type") != "gpt2":
            raise ValueError(
                f"{self.path / 'config.json'} has model_type {content.get('model_type')!r}; it "
                "must be 'gpt2'."
            )
        for key, values in _COMPUTED.items():
            if (value := content.get(key, values[0])) not in values:
                raise ValueError(
                    f"{self.path / 'config.json'} has {key} {value!r}; it must be {values[0]!r}."
                )
        for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if type(content.get(key)) is not int or content[key] < 1:
                raise ValueError(
                    f"{self.path / 'config.json'} has {key} {content.get(key)!r}; it must be an "
                    "integer of at least 1."
                )
        self.vocab_size, self.num_positions = content["vocab_size"], content["n_positions"]
        width = content["n_embd"]
        inner = content.get("n_inner") or 4 * width
        if inner % width:
            raise ValueError(
                f"{self.path / 'config.json'} has n_inner {inner}; it must be a multiple of "
                f"n_embd = {width}."
            )
        self.fields: dict[str, Any] = {
            "num_layers": content["n_layer"],
            "d_model": width,
            "num_heads": content["n_head"],
            "num_kv_heads": None,
            "mlp_ratio": inner // width,
            "norm": "layer",
            "use_bias": True,
            "positions": "learned",
            "register_init": "zero",
            "tie_embeddings": bool(content.get("tie_word_embeddings", True)),
            "attention": {"kind": "dot", "dot_scale": "standard", "sink": "none"},
        }

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer, of tokenizer.json or else vocab.json and merges.txt.

        Raises:
          ValueError: the folder has none, or that of another model.
        """
        tokenizer = load_tokenizer(self.path)
        if tokenizer.vocab_size != self.vocab_size:
            raise ValueError(
                f"the tokenizer in {self.path} has {tokenizer.vocab_size} tokens, but the model "
                f"has {self.vocab_size}: it is another model's."
            )
        return tokenizer

    def params(self) -> dict[str, Any]:
        """Returns the parameters, named as `rbf_jax.nn` names them: nested, NumPy float32.

        Raises:
          ValueError: a tensor is missing, is of a wrong shape, or has no place; or a file is bad.
        """
        tensors = _Tensors(self.path, read_tensors(self.path))
        D, N, V = self.fields["d_model"], self.fields["num_heads"], self.vocab_size
        params: dict[str, Any] = {
            "embedding": {"embedding": tensors.take("wte.weight", V, D)},
            "position_embedding": {"embedding": tensors.take("wpe.weight", self.num_positions, D)},
            "final_norm": _norm(tensors, "ln_f", D),
        }
        for i in range(self.fields["num_layers"]):
            params[f"block_{i}"] = _block(tensors, f"h.{i}", D, N, self.fields["mlp_ratio"] * D)
        if not self.fields["tie_embeddings"]:
            params["head"] = tensors.take("lm_head.weight", V, D)
        elif tensors.has("lm_head.weight"):
            head = tensors.take("lm_head.weight", V, D)
            if not np.array_equal(head, params["embedding"]["embedding"]):
                raise ValueError(
                    f"{self.path} has lm_head.weight unlike wte.weight, but tie_word_embeddings."
                )
        tensors.require_no_more()
        return params


def load_gpt2(path: str | Path) -> tuple[CausalLM, dict[str, Any], Tokenizer]:
    """Returns GPT-2 as it is: the model, its variables and the tokenizer.

    Args:
      path: a folder as Hugging Face has it.

    Raises:
      ValueError: it holds no GPT-2, or not all of it.
    """
    folder = GPT2Folder(path)
    fields = dict(folder.fields)
    config = TransformerConfig(
        vocab_size=folder.vocab_size,
        context_length=folder.num_positions,
        attention=AttentionConfig(**fields.pop("attention")),
        **fields,
    )
    return CausalLM(config), {"params": folder.params()}, folder.tokenizer()


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Reads the safetensors of a folder, of one file or of those that its index names.

    Returns:
      Arrays of float32 by name, "transformer." in front of it cut off; masks left out.

    Raises:
      ValueError: there are none, or a file is damaged.
    """
    import safetensors

    files = [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        index = read_object(folder / _INDEX)
        files = [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]
    tensors = {}
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"{file} does not exist: weights are read from safetensors only; "
                "transformers' save_pretrained writes them."
            )
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118  it is no mapping
                    short = name.removeprefix("transformer.")
                    if not _BUFFER.fullmatch(short):
                        tensors[short] = np.asarray(opened.get_tensor(name), np.float32)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {error}.") from error
    return tensors


class _Tensors:
    """Tensors, each to be taken once."""

    def __init__(self, folder: Path, tensors: dict[str, np.ndarray]):
        self._folder, self._tensors = folder, tensors

    def has(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, *shape: int) -> np.ndarray:
        if name not in self._tensors:
            raise ValueError(f"{self._folder} has no tensor {name}; GPT-2 needs it.")
        tensor = self._tensors.pop(name)
        if tensor.shape != shape:
            raise ValueError(
                f"{self._folder}: tensor {name} has shape {tensor.shape}, but must have {shape}."
            )
        return tensor

    def require_no_more(self) -> None:
        for name in self._tensors:
            raise ValueError(f"{self._folder} has a tensor {name}; GPT-2 has no place for it.")


def _norm(tensors: _Tensors, name: str, D: int) -> dict[str, np.ndarray]:
    return {"scale": tensors.take(f"{name}.weight", D), "bias": tensors.take(f"{name}.bias", D)}


def _dense(tensors: _Tensors, name: str, wide: int, out: int) -> dict[str, np.ndarray]:
    """GPT-2 keeps its matrices as Flax does: (in, out)."""
    return {
        "kernel": tensors.take(f"{name}.weight", wide, out),
        "bias": tensors.take(f"{name}.bias", out),
    }


def _block(tensors: _Tensors, name: str, D: int, N: int, inner: int) -> dict[str, Any]:
    # Queries, keys and values of all heads lie side by side in one matrix, in this order.
    fused = _dense(tensors, f"{name}.attn.c_attn", D, 3 * D)
    kernels = np.split(fused["kernel"].reshape(D, 3 * N, -1), 3, axis=1)
    biases = np.split(fused["bias"].reshape(3 * N, -1), 3)
    attention: dict[str, Any] = {
        part: {"kernel": kernel, "bias": bias}
        for part, kernel, bias in zip(("query", "key", "value"), kernels, biases)
    }
    out = _dense(tensors, f"{name}.attn.c_proj", D, D)
    attention["out"] = {"kernel": out["kernel"].reshape(N, -1, D), "bias": out["bias"]}
    return {
        "attention_norm": _norm(tensors, f"{name}.ln_1", D),
        "attention": attention,
        "mlp_norm": _norm(tensors, f"{name}.ln_2", D),
        "mlp": {
            "in": _dense(tensors, f"{name}.mlp.c_fc", D, inner),
            "out": _dense(tensors, f"{name}.mlp.c_proj", inner, D),
        },
    }


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ValueError: there is none.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} is no folder of a model: no {path.name} is in it.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content
