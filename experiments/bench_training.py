"""Speed and memory of the training step of one configuration beside another's, on one device.

    python -m experiments.bench_training --config=configs/stories_rbf.py \
        --against=configs/stories_dot.py [--out=FILE.json] [--config.KEY=VALUE]

With --packing the first configuration is measured in both layouts of its data, packed against
padded, on its text, the rows of an epoch shuffled; then tokens/s are those that the loss counts:

    python -m experiments.bench_training --config=configs/demo.py --packing

--config.KEY=VALUE changes both. The original's sizes are its vocabulary of 50,257, the default of
--vocab_size here, and, on top of the stories configs, --config.model.tie_embeddings=false and
--config.model.dtype=bfloat16.

The step is the one that training runs, compiled as training compiles it; tokens are random, but
with --packing, and on the device, so that no data, tokenizer or checkpoint is needed. The two take
turns, --steps steps at a time, queued and waited for once; tokens/s is the median over --rounds.
Peak memory is the compiler's: arguments, temporaries and results of one step. Beside it stands the
allocator's peak, where the device tells it, measured before that in a process of its own for each.

Exit status: 0 measured; 2 wrong command or configuration.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import config_files
from experiments.benchmarks.options import command_line, json_file, positive
from rbf_jax.data.files import write_text

LAYOUTS = ("packed", "padded")
# The original PyTorch code, its Triton kernel and torch.compile, on an H100.
ORIGINAL = {"tokens_per_second": 0.61e6, "peak_bytes": 10.2 * 2**30}


@dataclasses.dataclass
class Running:
    """A configuration's compiled step, its state, which the step donates, and a batch.

    `tokens` is how many of the batch the loss counts.
    """

    step: Any
    state: Any
    batch: Any
    tokens: int
    parameters: int

    def run(self, steps: int) -> float:
        """Seconds that `steps` steps take."""
        import jax

        start = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start

    def share(self) -> float:
        """Of the batch's places, those that the loss counts."""
        return self.tokens / self.batch["loss_mask"].size

    def peak_bytes(self) -> int:
        """Of one step, by the compiler: donated arguments, which are results too, count once."""
        analysis = self.step.memory_analysis()
        return (
            analysis.argument_size_in_bytes
            + analysis.output_size_in_bytes
            + analysis.temp_size_in_bytes
            - analysis.alias_size_in_bytes
        )


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    options, overrides = _parse(argv)
    specs = [options.config, *([options.against] if options.against else [])]
    try:
        configs = [config_files.parse([argv[0], f"--config={s}", *overrides])[0] for s in specs]
        if options.packing:
            return _report(argv, options, measure_packing(configs[0], options))
        if options.only_peak:
            print(json.dumps({"allocator_peak_bytes": _allocator_peak(configs[0], options)}))
            return 0
        peaks = [_peak_in_own_process(spec, options, overrides) for spec in specs]
        content = measure(configs, specs, options)
    except (ValueError, NotImplementedError) as error:
        print(f"bench_training: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for result, peak in zip(content["results"], peaks):
        result["allocator_peak_bytes"] = peak
    return _report(argv, options, content)


def _report(argv: Sequence[str], options: argparse.Namespace, content: dict[str, Any]) -> int:
    content = {"command": command_line("bench_training", argv), **content}
    write_text(Path(options.out), json.dumps(content, indent=1) + "\n")
    print(describe_packing(content) if options.packing else describe(content))
    print(f"written to {options.out}")
    return 0


def prepare(
    config: Any, vocab_size: int, devices: Sequence[Any] | None = None, batch: Any = None
) -> Running:
    """Makes the state of a run, its step and a batch.

    Args:
      config: with the keys of configs/base.py; its mesh is laid over the devices.
      vocab_size: V.
      devices: by default the first.
      batch: as `rbf_jax.data` makes it; by default of random tokens, that all count.

    Raises:
      ValueError: the configuration is wrong.
      NotImplementedError: attention cannot be computed as it wants it.
    """
    import jax
    import jax.numpy as jnp

    from rbf_jax.nn import CausalLM
    from rbf_jax.training.config import model_config, validate
    from rbf_jax.training.optimizer import make_optimizer
    from rbf_jax.training.sharding import batch_sharding, make_mesh
    from rbf_jax.training.state import create_state
    from rbf_jax.training.step import compile_train_step

    devices = jax.devices()[:1] if devices is None else devices
    validate(config, len(devices))
    mesh = make_mesh(config.mesh, devices)
    model = CausalLM(model_config(config, vocab_size))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = create_state(model, optimizer, config.seed, mesh)
    step = compile_train_step(config, model, optimizer, state, mesh)
    if batch is None:
        shape = config.train.batch_size, config.data.context_length
        inputs, targets = jax.random.randint(jax.random.key(0), (2, *shape), 0, vocab_size)
        batch = {
            "inputs": inputs,
            "targets": targets,
            "positions": jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
            "segment_ids": jnp.ones(shape, jnp.int32),
            "loss_mask": jnp.ones(shape, bool),
        }
    batch = jax.device_put(batch, batch_sharding(mesh))
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    return Running(step, state, batch, int(batch["loss_mask"].sum()), parameters)


def measure(
    configs: Sequence[Any], specs: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Times all configurations in turn; returns the content of the JSON file."""
    from rbf_jax import environment

    runnings = [prepare(config, options.vocab_size) for config in configs]
    rates = _rates(runnings, options)
    results = [
        {
            "config": spec,
            "tokens_per_second": statistics.median(measured),
            "slowest_fastest": [min(measured), max(measured)],
            "peak_bytes": running.peak_bytes(),
            "parameters": running.parameters,
            "tokens_per_step": running.tokens,
            "dtype": config.model.dtype,
        }
        for spec, config, running, measured in zip(specs, configs, runnings, rates)
    ]
    settings = {name: getattr(options, name) for name in ("vocab_size", "rounds", "steps")}
    return {**environment.describe(), **settings, "original": ORIGINAL, "results": results}


def measure_packing(config: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Times one configuration on its text, packed and padded; returns the content of the file."""
    from rbf_jax import environment
    from rbf_jax.data import load_data

    config = config.copy_and_resolve_references()
    runnings, shares, seen = [], [], []
    for layout in LAYOUTS:
        config.data.layout = layout
        data = load_data(config.data, seed=config.seed)
        rows = data.num_rows("train")
        (epoch,) = data.batches("train", rows, shuffle=False, repeat=False)
        shares.append(float(epoch["loss_mask"].mean()))
        seen.append(float(epoch["loss_mask"].sum() / data.num_targets["train"]))
        batch = next(
            iter(data.batches("train", config.train.batch_size, shuffle=True, repeat=True))
        )
        runnings.append(prepare(config, data.tokenizer.vocab_size, batch=batch))
    results = [
        {
            "layout": layout,
            # What counts in a row on average, not in the one batch.
            "tokens_per_second": statistics.median(measured) * share / running.share(),
            "places_per_second": statistics.median(measured) / running.share(),
            "share_that_counts": share,
            "share_of_text": part,
        }
        for layout, running, share, part, measured in zip(
            LAYOUTS, runnings, shares, seen, _rates(runnings, options)
        )
    ]
    settings = {name: getattr(options, name) for name in ("rounds", "steps")}
    return {**environment.describe(), **settings, "config": options.config, "results": results}


def describe_packing(content: dict[str, Any]) -> str:
    """The result in lines: each layout, and their ratio."""
    lines = [
        f"{r['layout']}: {r['tokens_per_second']:,.0f} tokens/s that count, "
        f"{r['share_that_counts']:.1%} of {r['places_per_second']:,.0f}; "
        f"an epoch has {r['share_of_text']:.1%} of the text"
        for r in content["results"]
    ]
    packed, padded = (r["tokens_per_second"] for r in content["results"])
    return "\n".join([*lines, f"packed trains on {packed / padded:.2f} times the tokens/s"])


def _rates(runnings: Sequence[Running], options: argparse.Namespace) -> list[list[float]]:
    """Tokens/s of each, round by round, in turns."""
    rates: list[list[float]] = [[] for _ in runnings]
    for running in runnings:
        running.run(2)  # Warm-up.
    for _ in range(options.rounds):
        for running, measured in zip(runnings, rates):
            measured.append(options.steps * running.tokens / running.run(options.steps))
    return rates


def describe(content: dict[str, Any]) -> str:
    """The result in lines: each configuration, their ratio, the first beside the original."""
    lines = [f"{content['device']}, {content['date']}, vocabulary {content['vocab_size']:,}"]
    for result in content["results"]:
        peak = result.get("allocator_peak_bytes")
        own = "" if peak is None else f", allocator's peak {peak / 2**30:.2f} GiB"
        lines.append(
            f"{result['config']}: {result['tokens_per_second']:,.0f} tokens/s, peak "
            f"{result['peak_bytes'] / 2**30:.2f} GiB{own}, {result['parameters']:,} parameters, "
            f"{result['dtype']}"
        )
    first, *others = content["results"]
    for other in others:
        ratio = first["tokens_per_second"] / other["tokens_per_second"]
        lines.append(f"ratio of the first's tokens/s to {other['config']}'s: {ratio:.3f}")
    original = content["original"]
    speed = first["tokens_per_second"] / original["tokens_per_second"]
    memory = (first.get("allocator_peak_bytes") or first["peak_bytes"]) / original["peak_bytes"]
    lines.append(
        f"beside the original PyTorch code on an H100 ({original['tokens_per_second']:,.0f} "
        f"tokens/s, {original['peak_bytes'] / 2**30:.1f} GiB): {speed:.2f} times its tokens/s, "
        f"{memory:.2f} times its memory"
    )
    return "\n".join(lines)


def _allocator_peak(config: Any, options: argparse.Namespace) -> int | None:
    """Peak bytes in use on the device after some steps; None where it does not tell."""
    import jax

    if jax.devices()[0].memory_stats() is None:
        return None
    prepare(config, options.vocab_size).run(3)
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def _peak_in_own_process(
    spec: str, options: argparse.Namespace, overrides: Sequence[str]
) -> int | None:
    """Of one configuration; None where the device does not tell.

    Raises:
      ValueError: the process failed; its last line.
    """
    command = [sys.executable, "-m", "experiments.bench_training", "--only_peak"]
    command += [f"--config={spec}", f"--vocab_size={options.vocab_size}", *overrides]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or [f"status {process.returncode}"])[-1]
        raise ValueError(f"memory of {spec}: {reason.removeprefix('bench_training: ')}")
    return json.loads(process.stdout.strip().splitlines()[-1])["allocator_peak_bytes"]


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options, and the --config.KEY=VALUE among the arguments."""
    parser = argparse.ArgumentParser(
        prog="bench_training",
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="configuration file that is measured")
    parser.add_argument("--against", help="configuration file that it is compared with")
    parser.add_argument(
        "--packing", action="store_true", help="measure both layouts of --config's text"
    )
    parser.add_argument("--vocab_size", type=positive, default=50257)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--steps", type=positive, default=30, help="in a turn")
    parser.add_argument("--out", type=json_file, default="runs/bench_training.json")
    parser.add_argument("--only_peak", action="store_true", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(argv[1:])
    if wrong := [a for a in rest if not a.startswith(("--config.", "--noconfig."))]:
        parser.error(f"argument {wrong[0]!r} is not understood: give --name=value.")
    if options.packing and options.against:
        parser.error("--against has no effect with --packing: leave it out.")
    return options, rest


if __name__ == "__main__":
    sys.exit(main(sys.argv))
