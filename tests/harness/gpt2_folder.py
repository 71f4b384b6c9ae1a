"""A tiny random GPT-2 in Hugging Face's layout, and GPT-2 itself in plain NumPy.

`logits` is written from the published architecture (Radford et al. 2019; layer norm in front of
each part and behind the last block), in float64, one head at a time.
"""

import json
import math

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LAYERS, WIDTH, HEADS, POSITIONS = 2, 24, 3, 20
CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-05,
    "n_embd": WIDTH,
    "n_head": HEADS,
    "n_layer": LAYERS,
    "n_positions": POSITIONS,
    "n_inner": None,
    "vocab_size": 258,
}


def random_tensors(seed=0, scale=0.3):
    """All tensors by GPT-2's names."""
    rng = np.random.default_rng(seed)
    shapes = {"wte.weight": (CONFIG["vocab_size"], WIDTH), "wpe.weight": (POSITIONS, WIDTH)}
    dense = {
        "attn.c_attn": (WIDTH, 3 * WIDTH),
        "attn.c_proj": (WIDTH, WIDTH),
        "mlp.c_fc": (WIDTH, 4 * WIDTH),
        "mlp.c_proj": (4 * WIDTH, WIDTH),
    }
    for i in range(LAYERS):
        for name, shape in dense.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (WIDTH,), f"h.{i}.{name}.bias": (WIDTH,)}
    shapes |= {"ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}
    return {n: (scale * rng.normal(size=s)).astype(np.float32) for n, s in shapes.items()}


def byte_tokenizer():
    """Byte-level BPE with one merge, "th", and the end of a document: 258 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "th", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def write_folder(folder, tensors=None, tokenizer_files="tokenizer.json", prefix="", **changes):
    """Writes the folder, with what is to differ from the above; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    tensors = random_tensors() if tensors is None else tensors
    safetensors.numpy.save_file(
        {prefix + name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    if tokenizer_files == "tokenizer.json":
        byte_tokenizer().save(str(folder / "tokenizer.json"))
    elif tokenizer_files == "vocab.json":
        content = json.loads(byte_tokenizer().to_str())["model"]
        (folder / "vocab.json").write_text(
            json.dumps(content["vocab"] | {"<|endoftext|>": CONFIG["vocab_size"] - 1})
        )
        (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    return folder


def logits(tensors, tokens):
    """GPT-2's logits (T, V) float64 of tokens (T,)."""
    w = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    x = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
    for i in range(LAYERS):
        x = x + _attention(w, f"h.{i}.attn", _layer_norm(w, f"h.{i}.ln_1", x))
        hidden = _affine(w, f"h.{i}.mlp.c_fc", _layer_norm(w, f"h.{i}.ln_2", x))
        cubic = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        x = x + _affine(w, f"h.{i}.mlp.c_proj", 0.5 * hidden * (1 + np.tanh(cubic)))
    return _layer_norm(w, "ln_f", x) @ w["wte.weight"].T


def _affine(w, name, x):
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def _layer_norm(w, name, x):
    variance = x.var(axis=-1, keepdims=True)
    normed = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(variance + 1e-5)
    return normed * w[f"{name}.weight"] + w[f"{name}.bias"]


def _attention(w, name, x):
    fused = _affine(w, f"{name}.c_attn", x)
    size = WIDTH // HEADS
    outputs = []
    for head in range(HEADS):
        query, key, value = (
            fused[:, part * WIDTH + head * size : part * WIDTH + (head + 1) * size]
            for part in range(3)
        )
        scores = query @ key.T / math.sqrt(size)
        scores[np.triu_indices(len(x), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        outputs.append(weights / weights.sum(axis=1, keepdims=True) @ value)
    return _affine(w, f"{name}.c_proj", np.concatenate(outputs, axis=1))
