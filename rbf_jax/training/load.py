"""A trained model from its run folder, and its loss over a whole split."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rbf_jax.data import Data, load_data, load_tokenizer
from rbf_jax.nn import CausalLM
from rbf_jax.training.checkpoint import find_step, read_params
from rbf_jax.training.config import model_config
from rbf_jax.training.evaluation import evaluate
from rbf_jax.training.metrics import read_valid_losses
from rbf_jax.training.run_folder import RunFolder, write_json
from rbf_jax.training.sharding import make_mesh, on_mesh, replicated
from rbf_jax.training.step import make_eval_step


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A model as a checkpoint holds it.

    Attributes:
      path: the run's folder.
      config: of the run.
      model: the language model.
      variables: its parameters on the first device, ``run.model.apply(run.variables, tokens)``.
      step: of the checkpoint.
    """

    path: Path
    config: ConfigDict
    model: CausalLM
    variables: dict[str, Any]
    step: int

    @functools.cached_property
    def data(self) -> Data:
        """Both splits; read when first asked for.

        Raises:
          ValueError: the data is not where the run found it.
        """
        return load_data(self.config.data, seed=self.config.seed, tokenizer_dir=self.path)


def load_run(run_dir: str | Path, step: int | str | None = None) -> LoadedRun:
    """Reads a model from a run folder, also while the run is going on.

    Args:
      run_dir: the run's folder.
      step: of the checkpoint; "best" is that of best validation loss, "last" or None the newest.

    Raises:
      ValueError: it is no run folder, or has no such checkpoint, or the checkpoint is damaged.
    """
    folder = RunFolder(run_dir)
    config = folder.read_config()
    vocab_size = load_tokenizer(folder.path).vocab_size
    model = CausalLM(model_config(config, vocab_size))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    step = find_step(folder.checkpoints, step, read_valid_losses(folder.metrics))
    params = read_params(folder.checkpoints, step, shapes["params"])
    return LoadedRun(folder.path, config, model, {"params": params}, step)


def evaluate_run(
    run_dir: str | Path, split: str = "valid", checkpoint: int | str = "last"
) -> dict[str, Any]:
    """Evaluates a checkpoint over a whole split, and writes evaluation.json into the run folder.

    Args:
      run_dir: the run's folder.
      split: "valid" or "train".
      checkpoint: "last", "best" or a step.

    Returns:
      "step", "split", and what `evaluate` returns.

    Raises:
      ValueError: as `load_run`, or the data is not where the run found it.
    """
    run = load_run(run_dir, checkpoint)
    config, data = run.config, run.data
    rows = config.train.batch_size // config.optimizer.accumulate_steps
    # As many devices as the rows can be split over.
    mesh = make_mesh(devices=jax.devices()[: math.gcd(rows, jax.device_count())])
    result = {
        "step": run.step,
        "split": split,
        **evaluate(
            on_mesh(
                mesh, jax.jit(make_eval_step(run.model, packed=config.data.layout == "packed"))
            ),
            jax.device_put(run.variables["params"], replicated(mesh)),
            data.batches(split, rows, shuffle=False, repeat=False),
            mesh,
            bytes_per_token=data.bytes_per_token[split],
        ),
    }
    write_json(run.path / "evaluation.json", result)
    return result
