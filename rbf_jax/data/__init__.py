"""Text in, resumable batches out: sources, tokenizers, cached token arrays, a grain pipeline.

    data = load_data(config.data, seed=0, tokenizer_dir="runs/mine")
    batches = iter(data.batches("train", 32, shuffle=True, repeat=True))
    next(batches)  # {"inputs": (32, T) int32, "targets": ..., ...}; get_state() and set_state()

Importing this package is light; grain, tokenizers and tensorflow-datasets are imported where a
call needs them, TensorFlow never.
"""

from rbf_jax.data.loading import Data, load_data
from rbf_jax.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Data", "Tokenizer", "load_data", "load_tokenizer"]
