"""A run small enough for tests: a few hundred short documents, one layer of width 16."""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from configs import base


def write_corpus(folder: Path) -> Path:
    """Writes documents of a few words each; returns the file."""
    words = np.array(["sun", "sea", "fox", "owl", "runs", "sings", "far", "home"])
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(words, size=rng.integers(3, 9))) for _ in range(300)]
    path = folder / "stories.txt"
    path.write_text("<|endoftext|>".join(documents))
    return path


def tiny_config(folder: Path) -> ConfigDict:
    """Returns a configuration on the corpus in `folder`; 12 steps, saved every 2."""
    config = base.get_config()
    config.data.source = "text"
    config.data.train_files = (str(folder / "stories.txt"),)
    config.data.cache_dir = str(folder / "cache")
    config.data.context_length = 16
    config.model.num_layers = 1
    config.model.d_model = 16
    config.model.num_heads = 2
    config.optimizer.warmup_steps = 3
    config.train.steps = 12
    config.train.batch_size = 4
    config.train.log_every = 1
    config.train.eval_every = 4
    config.train.checkpoint_every = 2
    config.train.eval_batches = 2
    config.logging.tensorboard = False
    return config


def state_digests(run: Path, step: int) -> tuple[int, int]:
    """Returns the digests, kept in a checkpoint, of the parameters and of the rest of the state."""
    about = json.loads((run / "checkpoints" / str(step) / "about" / "metadata").read_text())
    return about["params"], about["rest"]


def without_timing(path: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl, timing left out."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
        line.pop("seconds", None)
    return lines
