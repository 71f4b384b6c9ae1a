"""From a dot-product model to RBF attention by the dial: softmax(2γ q·k − λγ‖k‖²).

At λ = 0 and γ = scale / 2 the RBF model is the dot-product model. Each arm of a conversion trains
on from there, and differs from the others in λ only.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rbf_jax import environment
from rbf_jax.data import load_data
from rbf_jax.data.files import make_folder
from rbf_jax.data.tokenizer import FILE_NAME, ByteTokenizer
from rbf_jax.nn import AttentionConfig, CausalLM, TransformerConfig
from rbf_jax.training.config import model_config, validate
from rbf_jax.training.evaluation import evaluate
from rbf_jax.training.initial import Source, start_from
from rbf_jax.training.loop import train
from rbf_jax.training.metrics import read_lines
from rbf_jax.training.run_folder import RunFolder, write_json
from rbf_jax.training.sharding import make_mesh, on_mesh, replicated
from rbf_jax.training.step import make_eval_step

logger = logging.getLogger(__name__)

# λ over an arm's steps.
ARMS = {
    "annealed": "from 0 to 1 in optimizer.anneal_steps",
    "switched": "1 at once",
    "learned": "from 0, learned per head",
    "control": "0: the dot product, trained on",
}
REPORT = "convert.json"
# How a model is computed is free; what it is comes from the source.
FREE = ("dtype", "remat", "loss_chunk", "loss_dtype", "attention.implementation")


def arm_config(config: ConfigDict, source: Source, arm: str, tokenizer: str) -> ConfigDict:
    """Returns the configuration of one arm.

    Args:
      config: of the conversion; of its section `model`, the keys in `FREE` count.
      source: a dot-product model.
      arm: of `ARMS`.
      tokenizer: what data.tokenizer is to be.

    Raises:
      ValueError: the source is no dot-product model, or has fewer positions than a row has tokens.
    """
    content = config.to_dict()
    # What the source leaves out is at its default, not at what this configuration says.
    model: dict[str, Any] = {
        field.name: field.default
        for field in dataclasses.fields(TransformerConfig)
        if field.name in content["model"]
    } | source.fields
    attention = dataclasses.asdict(AttentionConfig()) | source.fields["attention"]
    if attention["kind"] != "dot":
        raise ValueError(
            f"{source.path} has attention.kind {attention['kind']!r}; only a dot-product model "
            "can be converted."
        )
    length = content["data"]["context_length"]
    if source.num_positions is not None and length > source.num_positions:
        raise ValueError(
            f"data.context_length is {length}; {source.path} has {source.num_positions} positions."
        )
    for key in FREE:
        section, _, name = key.rpartition(".")
        (attention if section else model)[name] = config.model[key]
    if arm != "control":
        gamma = AttentionConfig(**attention).initial_gamma(model["d_model"] // model["num_heads"])
        attention |= {"kind": "rbf", "dot_scale": "standard", "gamma": gamma}
        attention["key_norm_weight"] = 1.0 if arm == "switched" else 0.0
        attention["learn_key_norm_weight"] = arm == "learned"
    content["model"] = {**model, "attention": attention}
    content["data"]["tokenizer"] = tokenizer
    content["train"]["init_from"] = str(source.path)
    if arm != "annealed":
        content["optimizer"]["anneal_steps"] = 0
    return ConfigDict(content)


def convert(
    config: ConfigDict,
    source: Source,
    folder: str | Path,
    arms: Sequence[str],
    command: str = "",
) -> dict[str, Any]:
    """Trains the arms, each in a run folder of its own, or goes on with them; returns the report.

    Args:
      config: with the keys of configs/base.py.
      source: a dot-product model.
      folder: of the conversion; holds the arms' run folders, and convert.json at the end.
      arms: of `ARMS`.
      command: for the report.

    Raises:
      ValueError: the source and the configuration do not go together.
      SetupError: as `train`; so TrainingStopped and TrainingDiverged.
    """
    folder = Path(folder).expanduser().absolute()
    for arm in arms:
        if arm not in ARMS:
            raise ValueError(f"arm {arm!r} must be one of {', '.join(ARMS)}.")
    if "annealed" in arms and not config.optimizer.anneal_steps:
        raise ValueError("optimizer.anneal_steps is 0; the arm 'annealed' needs at least 1.")
    in_bytes = isinstance(source.tokenizer, ByteTokenizer)
    tokenizer = "bytes" if in_bytes else str(folder / FILE_NAME)
    configs = {arm: arm_config(config, source, arm, tokenizer) for arm in arms}
    for arm_of in configs.values():
        validate(arm_of, jax.device_count())
    make_folder(folder)
    source.tokenizer.save(folder / FILE_NAME)
    untrained = {
        name: starting_loss(arm_config(config, source, arm, tokenizer), source)
        for name, arm in (("dot_product", "control"), ("rbf", "switched"))
    }
    logger.info("Validation loss at λ = 0, the dot product: %.4f.", untrained["dot_product"])
    logger.info("Validation loss at λ = 1, untrained: %.4f.", untrained["rbf"])
    trained = {}
    for arm, arm_of in configs.items():
        logger.info("Arm %s: λ %s.", arm, ARMS[arm])
        train(arm_of, folder / arm)
        trained[arm] = arm_report(folder / arm, untrained["dot_product"])
    report = {
        "command": command,
        "source": str(source.path),
        "config": config.to_dict(),
        "untrained": untrained,
        "lost": untrained["rbf"] - untrained["dot_product"],
        "arms": trained,
        **environment.describe(),
    }
    write_json(folder / REPORT, report)
    return report


def starting_loss(config: ConfigDict, source: Source) -> float:
    """Returns the validation loss of an arm before its first step, as training evaluates it."""
    data = load_data(config.data, seed=config.seed, tokenizer_dir=None)
    model = CausalLM(model_config(config, data.tokenizer.vocab_size))
    drawn = jax.jit(model.init)(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32))
    params = start_from(source, drawn["params"], data.tokenizer)
    rows = config.train.batch_size // config.optimizer.accumulate_steps
    mesh = make_mesh(devices=jax.devices()[: math.gcd(rows, jax.device_count())])
    eval_step = jax.jit(make_eval_step(model, packed=config.data.layout == "packed"))
    return evaluate(
        on_mesh(mesh, eval_step),
        jax.device_put(params, replicated(mesh)),
        data.batches("valid", rows, shuffle=False, repeat=False),
        mesh,
        bytes_per_token=data.bytes_per_token["valid"],
        limit=config.train.eval_batches,
    )["loss"]


def arm_report(run: Path, dot_product: float) -> dict[str, Any]:
    """Returns what a finished arm came to.

    Args:
      run: its run folder.
      dot_product: validation loss of the model that it started from.

    Returns:
      "valid_loss" [[step, loss] …]; "key_norm_weight" [[step, mean over heads and layers] …], of
      lines of the training metrics; "best" and "final" loss; and "recovered_at", the first
      evaluated step whose loss is at most `dot_product`, or None.
    """
    lines = read_lines(RunFolder(run).metrics)
    valid = [[line["step"], line["loss"]] for line in lines if line["split"] == "valid"]
    weights = []
    for line in lines:
        layers = [line[key] for key in line if key.startswith("key_norm_weight/")]
        if line["split"] == "train":
            heads = [weight for layer in layers for weight in layer]
            weights.append([line["step"], sum(heads) / len(heads)])
    losses = [loss for _, loss in valid]
    return {
        "valid_loss": valid,
        "key_norm_weight": weights,
        "best": min(losses),
        "final": losses[-1],
        "recovered_at": next((step for step, loss in valid if loss <= dot_product), None),
    }


def summary_table(report: dict[str, Any]) -> str:
    """Returns what was lost and what came back, as a table of text."""
    start = report["untrained"]["dot_product"]
    rows = [
        ("", "validation loss", "− dot product's", "recovered at step"),
        ("dot product, λ = 0", f"{start:.4f}", "", ""),
        ("RBF, λ = 1", f"{report['untrained']['rbf']:.4f}", f"{report['lost']:+.4f}", ""),
    ]
    for arm, result in report["arms"].items():
        step = result["recovered_at"]
        rows.append(
            (
                f"{arm}, trained",
                f"{result['final']:.4f}",
                f"{result['final'] - start:+.4f}",
                "not yet" if step is None else str(step),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join(line.rstrip() for line in lines) + "\n"
