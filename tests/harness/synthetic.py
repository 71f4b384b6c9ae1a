"""Run folders that no training made."""

import json
from pathlib import Path

import numpy as np

STEPS = 200


def make_config(**changes):
    """A run's configuration; a change's key is dotted with double underscores."""
    config = {
        "seed": 0,
        "data": {
            "source": "embedded",
            "train_files": [],
            "valid_files": None,
            "tokenizer": "bytes",
            "context_length": 64,
            "layout": "packed",
        },
        "model": {
            "num_layers": 2,
            "positions": "susie",
            "attention": {
                "kind": "rbf",
                "sink": "register",
                "dot_scale": "standard",
                "qk_norm": False,
                "gamma": None,
                "learn_gamma": False,
                "key_norm_weight": 1.0,
                "learn_key_norm_weight": False,
            },
        },
        "train": {"steps": STEPS, "batch_size": 8, "eval_batches": 0},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        section = config
        for part in path:
            section = section[part]
        section[last] = value
    return config


def make_rows(*, slope=0.01, spike=None, heads=None):
    """Lines of metrics of a loss that falls from 3 to 1 nat per token."""
    rng = np.random.default_rng(int(1000 * slope))
    rows = []
    for step in range(0, STEPS + 1, 2):
        loss = 1 + 2 * np.exp(-slope * step)
        row = {
            "step": step,
            "split": "train",
            "loss": loss + rng.normal(0, 0.05),
            "grad_norm": np.exp(rng.normal(0, 0.3)) * (20 if step == spike else 1),
            "logit_max": 5 + 100 * slope * np.log1p(step) + rng.normal(0, 0.2),
            "key_norm_max": 3 + 0.01 * step,
            "register_norm": 0.002 * step,
            "tokens_per_second": 1000.0,
            "seconds": 0.5 * step,
        }
        for layer in range(2 if heads else 0):
            for name, start in (("gamma", 0.125), ("key_norm_weight", 1.0)):
                values = start * (1 + 0.001 * step * (1 + layer) * np.arange(1, heads + 1))
                row[f"{name}/{layer}"] = values.tolist()
        rows.append(row)
        if step % 20 == 0 and step:
            nats = {"loss": loss, "perplexity": np.exp(loss), "bits_per_byte": loss / np.log(2)}
            rows.append({"step": step, "split": "valid", **nats})
    return rows


def write_run(folder, rows=None, config=None, summary=True) -> Path:
    """Writes a run folder as training does, without checkpoints."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    rows = make_rows() if rows is None else rows
    (folder / "config.json").write_text(json.dumps(config or make_config()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tokenizer.json").write_text(json.dumps({"type": "rbf_jax.bytes"}))
    if summary:
        content = {
            "steps": STEPS,
            "parameters": 123_456,
            "train_tokens": 1_000_000,
            "tokens_per_second": 1234.5,
            "seconds": 100.0,
            "device": "cpu",
            "versions": {"python": "3.11", "jax": "0.10.2"},
            "date": "2026-01-01T00:00:00+00:00",
        }
        (folder / "summary.json").write_text(json.dumps(content))
    return folder
