"""Records that no training made."""

import numpy as np

from configs.figures import scales
from experiments.figure_runs import Experiment
from rbf_jax.analysis.diagnostics import MAP_TOKENS, QUANTILES
from rbf_jax.analysis.records import Record
from rbf_jax.nn.config import num_registers

LAYERS, HEADS = 2, 2
STEPS = 200


def make_record(name, config, *, offset=0.0, lengths=(), diverged=(), seeds=(0, 1, 2, 3)):
    """A loss that falls from 4 to 1 + `offset` nats; seed s ends s / 10 above it.

    Args:
      name: of the variant.
      config: nested dictionaries.
      offset: nats.
      lengths: to evaluate at.
      diverged: places of the seeds that have NaN from half of the steps on.
      seeds: of the record.
    """
    rng = np.random.default_rng(len(name))
    n, R = len(seeds), num_registers(config["model"])
    step = np.arange(1, STEPS + 1)
    at = np.arange(20, STEPS + 1, 20)

    def loss(steps):
        values = 1 + offset + 3 * np.exp(-steps[:, None] / 40) + np.arange(n) / 10
        values[np.ix_(steps > STEPS // 2, list(diverged))] = np.nan
        return values

    def by_head():
        return rng.uniform(0.05, 0.3, (n, LAYERS, HEADS))

    maps = rng.uniform(size=(n, LAYERS, HEADS, MAP_TOKENS, R + MAP_TOKENS))
    return Record(
        name=name,
        config=config,
        seeds=tuple(seeds),
        train={
            "step": step,
            "loss": loss(step),
            "grad_norm": np.exp(rng.normal(0, 0.1, (STEPS, n)) + offset),
            "learning_rate": np.full(STEPS, config["optimizer"]["learning_rate"]),
        },
        inspected={"step": at, "logit_max": rng.uniform(1, 5, (len(at), n))},
        valid={"step": at, "loss": loss(at), "seconds": at * 0.5},
        lengths={length: loss(at)[-1] + 0.01 * i for i, length in enumerate(lengths)},
        inside={
            **{
                key: by_head()
                for key in ("entropy", "register_mass", "sink_mass", "first_token_mass", "distance")
            },
            "even_share": np.full(n, 0.02),
            "gamma": by_head() + 0.5,
            "key_norm_weight": by_head() + 0.5,
            "gated": rng.uniform(size=(n, LAYERS)),
            "sink_value_norm": rng.uniform(size=(n, LAYERS)),
            "register_key_norm": rng.uniform(0.1, 1, (n, LAYERS, R)),
            "key_norm_quantiles": np.sort(rng.uniform(1, 9, (n, LAYERS, len(QUANTILES)))),
            "attention_map": maps / maps.sum(-1, keepdims=True),
        },
        tokens=("a",) * MAP_TOKENS,
        summary={
            "seeds": list(seeds),
            "steps": STEPS,
            "epochs": 0.5,
            "parameters": 1000,
            "train_tokens": 1_000_000,
            "tokens_per_second": 1e6,
            "device": "cpu",
            "versions": {"jax": "0.10.2"},
            "date": "2026-01-01T00:00:00+00:00",
        },
    )


def make_records(variants, folder, **changes):
    """A record of each variant, by name; `changes` are a variant's arguments, by its name."""
    experiment = Experiment(scales.get_config("smoke"), (0, 1, 2, 3), folder, None)
    return {
        v.name: make_record(
            v.name,
            experiment.config(v).to_dict(),
            lengths=[32 * length for length in v.lengths],
            **changes.get(v.name, {}),
        )
        for v in variants
    }
