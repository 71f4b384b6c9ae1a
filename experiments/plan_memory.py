"""Memory per device of a training step, by mesh: compiled for devices that need not be there.

    python -m experiments.plan_memory [--config=FILE.py [--config.KEY=VALUE]] [--vocab_size=V]
        [--meshes=1,8,1,1;1,1,1,8] [--out=FILE.json]

A mesh is data,fsdp,tensor,seq. The step is compiled for so many CPU devices, with implementation
"xla"; no array is made. A device has one row, or its part of one, in work at a time; the others are
accumulated. Numbers are of the compiler's plan: arguments are parameters, optimizer state and
batch; temporaries are activations, gradients and gathered parameters. The arguments are those of
any device. The temporaries are an upper bound: CPUs multiply bfloat16 as float32, of which the plan
holds copies, and its order is not made for memory. Without --config: a model of a billion
parameters at context 131,072, 64 rows a step.

Exit status: 0, or 2 with one line that says why it could not be done.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs import base
from experiments import config_files

GIB = 2**30
AXES = ("data", "fsdp", "tensor", "seq")
# For CPUs the compiler drops the barriers that hold recomputation back until it is needed, and
# model.remat with them; without this pass it keeps them, as it does for GPUs.
_KEEP_REMAT = "--xla_disable_hlo_passes=cse_barrier_expander"
MESHES = "8,1,1,1;1,8,1,1;1,1,8,1;1,1,1,8;1,2,1,4;1,8,1,8"


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="plan_memory", allow_abbrev=False)
    parser.add_argument("--meshes", default=MESHES, metavar="DATA,FSDP,TENSOR,SEQ;…")
    parser.add_argument("--vocab_size", type=int, default=32768)
    parser.add_argument("--out", metavar="FILE.json")
    options, rest = parser.parse_known_args(argv[1:])
    try:
        config = config_files.parse([argv[0], *rest])[0] if rest else a_billion_parameters()
        meshes = [_mesh(text) for text in options.meshes.split(";")]
        # Before JAX looks for devices.
        devices = max(math.prod(mesh.values()) for mesh in meshes)
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = f"{_KEEP_REMAT} --xla_force_host_platform_device_count={devices}"
        results = []
        print("| data | fsdp | tensor | seq | arguments, GiB | temporaries, GiB | sum, GiB |")
        print("|---:|---:|---:|---:|---:|---:|---:|")
        for mesh in meshes:
            results.append(plan(config, mesh, options.vocab_size))
            print(_line(results[-1]), flush=True)
    except (ValueError, NotImplementedError) as error:
        print(f"plan_memory: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{results[0]['parameters']:,} parameters, context {config.data.context_length:,}")
    if options.out:
        _write(Path(options.out), config, results)
    return 0


def a_billion_parameters() -> Any:
    """Returns a configuration that nobody runs on one device."""
    config = base.get_config()
    config.data.context_length = 131_072
    config.model.num_layers = 20
    config.model.d_model = 2048
    config.model.num_heads = 16
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.train.batch_size = 64
    return config


def plan(config: Any, mesh_sizes: Mapping[str, int], vocab_size: int) -> dict[str, Any]:
    """Compiles the training step on a mesh; returns bytes per device.

    Args:
      config: with the keys of configs/base.py; its mesh and accumulate_steps are replaced.
      mesh_sizes: devices along each axis.
      vocab_size: V.

    Raises:
      ValueError: the configuration is wrong, or does not fit the mesh.
    """
    import jax

    from rbf_jax.nn import CausalLM
    from rbf_jax.training.config import model_config, validate
    from rbf_jax.training.optimizer import make_optimizer
    from rbf_jax.training.sharding import make_mesh
    from rbf_jax.training.state import state_shapes
    from rbf_jax.training.step import compile_train_step

    config = config.copy_and_resolve_references()
    config.unlock()
    config.mesh.update(mesh_sizes)
    rows = mesh_sizes["data"] * mesh_sizes["fsdp"]
    config.optimizer.accumulate_steps = max(config.train.batch_size // rows, 1)
    config.model.attention.implementation = "xla"
    devices = jax.devices()[: math.prod(mesh_sizes.values())]
    validate(config, len(devices))
    model = CausalLM(model_config(config, vocab_size))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = state_shapes(model, optimizer)
    started = time.perf_counter()
    step = compile_train_step(config, model, optimizer, state, make_mesh(mesh_sizes, devices))
    memory: Any = step.memory_analysis()
    return {
        "mesh": dict(mesh_sizes),
        "accumulate_steps": config.optimizer.accumulate_steps,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": round(time.perf_counter() - started, 1),
    }


def _mesh(text: str) -> dict[str, int]:
    sizes = text.split(",")
    if len(sizes) != len(AXES) or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"--meshes has {text!r}; a mesh is data,fsdp,tensor,seq, four numbers.")
    return dict(zip(AXES, map(int, sizes)))


def _line(result: Mapping[str, Any]) -> str:
    arguments, temporaries = result["argument_bytes"], result["temporary_bytes"]
    sizes = [*result["mesh"].values()]
    gibs = [f"{size / GIB:.2f}" for size in (arguments, temporaries, arguments + temporaries)]
    return f"| {' | '.join(map(str, [*sizes, *gibs]))} |"


def _write(path: Path, config: Any, results: Sequence[Mapping[str, Any]]) -> None:
    from rbf_jax import environment
    from rbf_jax.training.run_folder import write_json

    write_json(path, {"config": config.to_dict(), "meshes": results, **environment.describe()})


if __name__ == "__main__":
    sys.exit(main(sys.argv))
