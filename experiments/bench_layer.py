"""Time and memory of the attention layer of a model, by attention and positions, against T.

    python -m experiments.bench_layer [--lengths=512,1024,…] [--out=FILE.json]

The layer is `rbf_jax.nn.attention.Attention`: projections, positions, registers and the operation,
forward, and forward + backward with respect to input and parameters; one text a row, B·T =
--tokens. All take turns round by round on the same input, so that a machine that slows down slows
all; a time is the median over the rounds, by the GPU's own clock where there is one
(experiments/benchmarks/clock.py). Memory is the compiler's: temporaries.

`python -m experiments.figures --figure=layer_profile` draws the file.

Hardware: any; on 2 CPU cores some 3 minutes. Exit status: 0 measured; 2 wrong command.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.benchmarks.clock import Call, Clock
from experiments.benchmarks.contenders import memory
from experiments.benchmarks.options import command_line, json_file, lengths, positive
from rbf_jax import environment
from rbf_jax.data.files import write_text
from rbf_jax.nn import AttentionConfig, TransformerConfig
from rbf_jax.nn.attention import Attention
from rbf_jax.nn.positions import sinusoids

# The first is what the others are compared with. Registers are part of RBF's recipe.
LAYERS: Mapping[str, Mapping[str, Any]] = {
    "dot product, RoPE": {"kind": "dot", "positions": "rope", "sink": "none"},
    "dot product, SuSiE": {"kind": "dot", "positions": "susie", "sink": "none"},
    "RBF, RoPE": {"kind": "rbf", "positions": "rope", "sink": "none"},
    "RBF, SuSiE": {"kind": "rbf", "positions": "susie", "sink": "none"},
    "RBF, SuSiE, 1 register": {"kind": "rbf", "positions": "susie", "sink": "register"},
}


def calls(name: str, length: int, options: argparse.Namespace) -> dict[str, tuple[Call, int]]:
    """The compiled forward pass of a layer, and forward + backward, with bytes of temporaries."""
    fields = dict(LAYERS[name])
    config = TransformerConfig(
        vocab_size=257,
        context_length=length,
        d_model=options.d_model,
        num_heads=options.heads,
        dtype=options.dtype,
        attention=AttentionConfig(kind=fields.pop("kind"), sink=fields.pop("sink")),
        **fields,
    )
    layer, rows = Attention(config), max(1, options.tokens // length)
    angles = sinusoids(jnp.arange(length, dtype=jnp.int32)[None], config.head_dim)
    keys = jax.random.split(jax.random.key(0), 3)
    shape = rows, config.num_registers + length, options.d_model
    x, cotangent = (jax.random.normal(key, shape, options.dtype) for key in keys[:2])
    variables = jax.jit(layer.init)(keys[2], x, angles)

    def forward(variables, x):
        return layer.apply(variables, x, angles)

    def both(variables, x, cotangent):
        out, backward = jax.vjp(forward, variables, x)
        return out, backward(cotangent)

    found = {}
    for direction, function, arguments in (
        ("forward", forward, (variables, x)),
        ("forward+backward", both, (variables, x, cotangent)),
    ):
        program = jax.jit(function).lower(*arguments).compile()
        call = Call(functools.partial(program, *arguments), jax.block_until_ready)
        found[direction] = call, memory(program).temp_size_in_bytes
    return found


def measure(length: int, clock: Clock, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times all layers at one length; returns a row for each layer and direction."""
    made = {
        (name, direction): call
        for name in LAYERS
        for direction, call in calls(name, length, options).items()
    }
    repeats = {key: clock.times_for(call, 20.0) for key, (call, _) in made.items()}
    times: dict[Any, list[float]] = {key: [] for key in made}
    for _ in range(options.rounds):
        for key, (call, _) in made.items():
            times[key].append(clock.measure(call, repeats[key]).device)
    return [
        {
            "implementation": name,
            "length": length,
            "direction": direction,
            "milliseconds": statistics.median(times[name, direction]),
            "temporary_bytes": temporaries,
        }
        for (name, direction), (_, temporaries) in made.items()
    ]


def table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Milliseconds, and how many times the first layer's they are."""
    grid = Table(title=title)
    grid.add_column("T", justify="right", no_wrap=True)
    grid.add_column("layer", no_wrap=True)
    directions = {"forward": "fwd", "forward+backward": "fwd+bwd"}
    for short in directions.values():
        for column in (f"{short}\nms", "of\nfirst", f"{short}\nMiB"):
            grid.add_column(column, justify="right", no_wrap=True)
    cells = {(r["implementation"], r["length"], r["direction"]): r for r in rows}
    first = next(iter(LAYERS))
    for length, name in dict.fromkeys((r["length"], r["implementation"]) for r in rows):
        texts = []
        for direction in directions:
            row, base = cells[name, length, direction], cells[first, length, direction]
            texts += [
                f"{row['milliseconds']:.3g}",
                f"{row['milliseconds'] / base['milliseconds']:.2f}",
                f"{row['temporary_bytes'] / 2**20:.1f}",
            ]
        grid.add_row(f"{length:,}", name, *texts)
    return grid


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    options = _parse(argv)
    clock, out, console = Clock(), Path(options.out), Console()
    settings = {
        **{k: getattr(options, k) for k in ("d_model", "heads", "tokens", "rounds")},
        "dtype": options.dtype,
    }
    content: dict[str, Any] = {
        "command": command_line("bench_layer", argv),
        **environment.describe(),
        "clock": clock.describe(),
        "settings": settings,
        "results": [],
    }
    for length in track(options.lengths, description="lengths", console=console):
        content["results"] += measure(length, clock, options)
        write_text(out, json.dumps(content, indent=1) + "\n")
    described = ", ".join(f"{name} {value}" for name, value in settings.items())
    console.print(table(content["results"], f"{described}\n{content['device']}"))
    console.print(f"written to {out}")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_layer", description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=lengths, default=lengths("256,512,1024,2048,4096"))
    parser.add_argument("--tokens", type=positive, default=4096, help="B·T, at least a row")
    parser.add_argument("--d_model", type=positive, default=256)
    parser.add_argument("--heads", type=positive, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument(
        "--out",
        type=json_file,
        default="runs/bench_layer.json",
        help="JSON file to write (default: %(default)s)",
    )
    options = parser.parse_args(argv[1:])
    if options.d_model % (2 * options.heads):
        parser.error(
            f"--d_model is {options.d_model}; it must be a multiple of 2 × --heads = "
            f"{2 * options.heads}: the head dimension is even."
        )
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv))
