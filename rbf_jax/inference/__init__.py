"""Text from a trained model: sampling, generation from a cache, and models as files.

    run = load_run("runs/mine")
    prompts = [run.data.tokenizer.encode("Once upon a time")]
    for tokens in generate(run.model, run.variables, prompts, max_new_tokens=100):
        ...  # a token of each prompt, None where the text has ended

`complete` returns the new tokens once all texts have ended.
"""

from rbf_jax.inference.generation import complete, generate
from rbf_jax.inference.sampling import Sampling
from rbf_jax.inference.saved import SavedModel, load_model, save_model
from rbf_jax.inference.text import TextStream

__all__ = [
    "Sampling",
    "SavedModel",
    "TextStream",
    "complete",
    "generate",
    "load_model",
    "save_model",
]
