"""How the training step of one configuration scales from one device to several.

    python -m experiments.bench_scaling --config=configs/stories_rbf.py [--devices=1,2]
        [--meshes=data,fsdp,seq] [--vocab_size=V] [--out=FILE.json] [--config.KEY=VALUE]

--devices are numbers of devices, by default 1 and all that there are; each of --meshes gives all of
them to one axis of `config.mesh`. "strong" keeps train.batch_size, "weak" multiplies it by the
devices, so that each has as many tokens as one device has. Efficiency is the tokens/s of n devices
over n times that of one, which is measured first and again at the end.

The step is the one that training runs; tokens are random and on the devices, as in
experiments.bench_training. tokens/s is the median over --rounds of --steps steps. Memory is the
compiler's plan for a device: arguments, temporaries and results of one step. The file is written
after each case: cut off, it holds those that were measured.

Exit status: 0 measured; 2 wrong command or configuration.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import bench_training, config_files
from experiments.benchmarks.options import command_line, json_file, lengths, positive
from rbf_jax.data.files import write_text

AXES = ("data", "fsdp", "tensor", "seq")
SCALINGS = ("strong", "weak")
HEADER = """\
| scaling | devices | mesh | rows a step | tokens/s | efficiency | memory of a device, GiB |
|---|---:|---|---:|---:|---:|---:|"""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured once.

    Attributes:
      scaling: "strong" or "weak".
      devices: how many.
      axis: of the mesh, that has them all.
    """

    scaling: str
    devices: int
    axis: str

    def of(self, config: Any) -> Any:
        """Returns the configuration of this case."""
        config = config.copy_and_resolve_references()
        config.mesh.update({axis: self.devices if axis == self.axis else 1 for axis in AXES})
        if self.scaling == "weak":
            config.train.batch_size *= self.devices
        return config


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    options, overrides = _parse(argv)
    try:
        spec = f"--config={options.config}"
        config = config_files.parse([argv[0], spec, *overrides])[0]
        cases = all_cases(config, options.devices, options.meshes)
        command = command_line("bench_scaling", argv)
        content = {"command": command, "config": config.to_dict(), **_settings(options)}
        for content["results"] in measure(config, cases, options):
            write_text(Path(options.out), json.dumps(content, indent=1) + "\n")
    except (ValueError, NotImplementedError) as error:
        print(f"bench_scaling: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n".join([HEADER, *map(_line, content["results"])]))
    print(f"{content['device']}, {content['date']}; written to {options.out}")
    return 0


def all_cases(config: Any, devices: Sequence[int] | None, axes: Sequence[str]) -> list[Case]:
    """Returns what is to be measured on several devices.

    Args:
      config: with the keys of configs/base.py.
      devices: how many; 1 is always measured. None for all that there are.
      axes: of the mesh.

    Raises:
      ValueError: there are fewer devices, or a case does not fit the configuration.
    """
    import jax

    from rbf_jax.training.config import validate

    there = jax.device_count()
    devices = [there] if devices is None else devices
    if max(devices) > there:
        raise ValueError(
            f"--devices has {max(devices)}; it must be at most {there}, all there are."
        )
    several = sorted({number for number in devices if number > 1})
    if not several:
        raise ValueError(f"--devices is {devices[0]}; it must hold a number above 1.")
    cases = [Case(s, number, axis) for s in SCALINGS for number in several for axis in axes]
    for case in cases:
        try:
            validate(case.of(config), case.devices)
        except ValueError as error:
            where = f"{case.scaling} scaling to {case.axis}={case.devices}"
            raise ValueError(f"{where}: {error}") from error
    return cases


def measure(
    config: Any, cases: Sequence[Case], options: argparse.Namespace
) -> Iterator[list[dict[str, Any]]]:
    """Times all cases, one device before and after them; yields what there is after each."""
    one = Case("strong", 1, "data")
    running = _prepare(config, one, options)
    rates = _rates(running, options)
    results = [_shown(_result(one, running, rates))]
    yield _with_efficiency(results)
    for case in cases:
        several = _prepare(config, case, options)
        results.append(_shown(_result(case, several, _rates(several, options))))
        yield _with_efficiency(results)
    results[0] = _shown(_result(one, running, rates + _rates(running, options)))
    yield _with_efficiency(results)


def _with_efficiency(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first is one device's."""
    alone = results[0]["tokens_per_second"]
    return [{**r, "efficiency": r["tokens_per_second"] / (r["devices"] * alone)} for r in results]


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    from rbf_jax import environment

    settings = {name: getattr(options, name) for name in ("vocab_size", "rounds", "steps")}
    return {**environment.describe(), **settings}


def _prepare(config: Any, case: Case, options: argparse.Namespace) -> bench_training.Running:
    import jax

    devices = jax.devices()[: case.devices]
    return bench_training.prepare(case.of(config), options.vocab_size, devices)


def _rates(running: bench_training.Running, options: argparse.Namespace) -> list[float]:
    """tokens/s, a number for each round."""
    running.run(2)  # Warm-up.
    return [
        options.steps * running.tokens / running.run(options.steps) for _ in range(options.rounds)
    ]


def _result(case: Case, running: bench_training.Running, rates: Sequence[float]) -> dict[str, Any]:
    return {
        **dataclasses.asdict(case),
        "batch_size": running.batch["inputs"].shape[0],
        "tokens_per_step": running.tokens,
        "parameters": running.parameters,
        "tokens_per_second": statistics.median(rates),
        "rates": rates,
        "peak_bytes": running.peak_bytes(),
    }


def _shown(result: dict[str, Any]) -> dict[str, Any]:
    several = f"{result['scaling']} scaling to {result['axis']}={result['devices']}"
    name = "one device" if result["devices"] == 1 else several
    rate = f"{result['tokens_per_second']:,.0f} tokens/s"
    print(f"{name}: {rate}", file=sys.stderr, flush=True)
    return result


def _line(result: dict[str, Any]) -> str:
    cells = [
        "one device" if result["devices"] == 1 else result["scaling"],
        str(result["devices"]),
        "" if result["devices"] == 1 else result["axis"],
        str(result["batch_size"]),
        f"{result['tokens_per_second']:,.0f}",
        f"{result['efficiency']:.2f}",
        f"{result['peak_bytes'] / 2**30:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _axes(text: str) -> list[str]:
    names = text.split(",")
    if wrong := [name for name in names if name not in AXES]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} must be one of {', '.join(AXES)}")
    return names


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options, and the --config.KEY=VALUE among the arguments."""
    parser = argparse.ArgumentParser(
        prog="bench_scaling", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="configuration file that is measured")
    parser.add_argument("--devices", type=lengths, help="numbers of devices, between commas")
    parser.add_argument("--meshes", type=_axes, default=["data", "fsdp", "seq"], help="axes")
    parser.add_argument("--vocab_size", type=positive, default=50257)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--steps", type=positive, default=30, help="in a round")
    parser.add_argument("--out", type=json_file, default="runs/bench_scaling.json")
    options, rest = parser.parse_known_args(argv[1:])
    if wrong := [a for a in rest if not a.startswith(("--config.", "--noconfig."))]:
        parser.error(f"argument {wrong[0]!r} is not understood: give --name=value.")
    return options, rest


if __name__ == "__main__":
    sys.exit(main(sys.argv))
