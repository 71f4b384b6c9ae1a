"""One training step after another on several meshes of CPU devices, for test_meshes.py."""

import functools
import re

import jax
import numpy as np

from configs import base
from rbf_jax.nn import CausalLM
from rbf_jax.training.config import model_config, validate
from rbf_jax.training.optimizer import make_optimizer
from rbf_jax.training.sharding import AXES, data_share, make_mesh, on_mesh, place_batch, replicated
from rbf_jax.training.state import create_state, state_shapes
from rbf_jax.training.step import compile_train_step, make_eval_step, make_inspect_step

B, T, V, STEPS = 8, 16, 32, 3
# Name: data, fsdp, tensor, seq; accumulated micro-batches; remat.
CASES = {
    "one": (1, 1, 1, 1, 1, False),
    "data": (8, 1, 1, 1, 1, False),
    "fsdp": (1, 8, 1, 1, 1, False),
    "tensor": (1, 1, 2, 1, 1, False),
    "seq": (1, 1, 1, 8, 1, False),
    "mixed": (2, 2, 2, 1, 2, False),
    "all": (1, 2, 2, 2, 2, True),
}
# Where the other two steps are compiled too.
EVALUATED = ("one", "seq", "mixed", "all")


def make_batches():
    """Packed rows of two segments, some with padding; no two rows have as many targets."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(STEPS):
        cut, end = rng.integers(2, 8, (B, 1)), rng.integers(9, T + 1, (B, 1))
        place = np.tile(np.arange(T), (B, 1))
        segment_ids = np.where(place < end, 1 + (place >= cut), 0)
        batches.append(
            {
                "inputs": rng.integers(0, V, (B, T), np.int32),
                "targets": rng.integers(0, V, (B, T), np.int32),
                "positions": np.where(place >= cut, place - cut, place).astype(np.int32),
                "segment_ids": segment_ids.astype(np.int32),
                "loss_mask": segment_ids > 0,
            }
        )
    return batches


def make_config(data, fsdp, tensor, seq, accumulate_steps, remat):
    """Returns a tiny configuration on a mesh."""
    config = base.get_config()
    config.data.context_length = T
    config.model.num_layers = 1
    config.model.d_model = 32
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.remat = remat
    config.optimizer.warmup_steps = 0
    config.optimizer.accumulate_steps = accumulate_steps
    config.train.batch_size = B
    config.mesh.update(dict(zip(AXES, (data, fsdp, tensor, seq))))
    return config


@functools.cache
def run(name):
    """Trains a few steps of a case; returns what they computed, and how it was laid out."""
    config = make_config(*CASES[name])
    sizes = config.mesh.to_dict()
    devices = jax.local_devices()[: int(np.prod(list(sizes.values())))]
    validate(config, len(devices))
    mesh = make_mesh(sizes, devices)
    model = CausalLM(model_config(config, V))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = create_state(model, optimizer, config.seed, mesh)
    initial = values_of(state.params)  # Before they are donated.
    step = compile_train_step(config, model, optimizer, state, mesh)
    metrics = []
    for batch in make_batches():
        placed = place_batch(batch, mesh)
        state, values = step(state, placed)
        metrics.append([float(values["loss"]), float(values["grad_norm"])])
    moments = {
        jax.tree_util.keystr(path[-3:], simple=True, separator="/"): array
        for path, array in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    kernel = moments["mlp/in/kernel"]
    evaluation = evaluate(mesh, model, state.params, placed) if name in EVALUATED else {}
    return evaluation | {
        "initial": initial,
        "metrics": metrics,
        "params": values_of(state.params),
        "tokens_of_a_device": placed["inputs"].addressable_shards[0].data.size,
        "part_of_a_moment": kernel.addressable_shards[0].data.size / kernel.size,
        "share": list(data_share(mesh)),
        "gathered": gathered(step),
    }


def gathered(step):
    """Returns the shapes that the all-gathers of a compiled step make."""
    shapes = re.findall(r" = \w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", step.as_text())
    return [[int(n) for n in shape.split(",")] for shape in shapes]


def compile_wide():
    """Compiles a step whose parameters are more than its rows; returns what it gathers.

    In the narrow ones the compiler gathers parameters, which are less, by itself.
    """
    config = make_config(*CASES["fsdp"])
    config.model.d_model = 512
    mesh = make_mesh(config.mesh, jax.local_devices())
    model = CausalLM(model_config(config, V))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    return gathered(
        compile_train_step(config, model, optimizer, state_shapes(model, optimizer), mesh)
    )


def values_of(params):
    """Returns all parameters as lists."""
    return [np.asarray(x).ravel().tolist() for x in jax.tree.leaves(params)]


def evaluate(mesh, model, params, batch):
    """Returns what the other two steps compute."""
    whole = replicated(mesh)
    eval_step = on_mesh(mesh, jax.jit(make_eval_step(model), out_shardings=whole))
    inspect_step = on_mesh(mesh, jax.jit(make_inspect_step(model), out_shardings=whole))
    loss, targets = eval_step(params, batch)
    inspected = inspect_step(params, batch)
    return {
        "eval": [float(loss), int(targets)],
        "inspect": {name: np.asarray(value).tolist() for name, value in inspected.items()},
    }
