"""Trains many runs over a space of configurations, or goes on with a sweep that was stopped.

    python -m experiments.sweep --config=configs/sweeps/NAME.py [--sweep=DIR]
                                [--config.KEY=VALUE] [--base.KEY=VALUE] [--retry]
    python -m experiments.sweep --report --sweep=DIR

The sweep's folder is runs/sweeps/NAME unless --sweep names another. --config.KEY changes the sweep
file, whose keys are in configs/sweeps/base.py; --base.KEY the configuration that all trials start
from. The same command again goes on with a sweep that was stopped or killed: trials that have ended
stay, the others go on from their checkpoints. Local workers go on when this program is killed, and
end when it is interrupted (Ctrl-C, SIGTERM). --retry trains those that have failed again, each from
its start in a new folder.

--report writes DIR/report: report.md, figures, trials.csv, best_config.py. It works at any time.

Exit status: 0 all trials have ended, some perhaps failed; 1 workers cannot run; 2 wrong command,
sweep file or configuration; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from configs.sweeps import base
from experiments import config_files

if TYPE_CHECKING:
    from rbf_jax.sweeps.sweep import Sweep


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("rbf_jax").setLevel(logging.INFO)
    try:
        if "--report" in argv:
            return _report(_report_folder(argv))
        return _run(*parse(argv))
    except (ValueError, OSError) as error:
        return _fail(" ".join(str(error).split()), 2)
    except ImportError as error:
        return _fail(f"{error}: pip install 'rbf-jax[sweep,train]'", 2)


def parse(argv: Sequence[str]) -> tuple[Sweep, Path, bool]:
    """Reads and checks the command line, the sweep file and every configuration of the space.

    Args:
      argv: the command line, the program's name first.

    Returns:
      The sweep, its folder, and whether to train again what has failed.

    Raises:
      ValueError: in one line, what is wrong.
    """
    spec, argv = config_files.take_config(argv)
    config, space = _read_sweep_file(spec)
    config, argv = config_files.override(
        config, "config", argv, flags.FlagValues(), base.get_config, known_only=True
    )
    if not config.base:
        raise ValueError(f"{spec}: base is missing; name the configuration that trials start from.")
    values = flags.FlagValues()
    default = str(Path("runs/sweeps") / Path(spec.partition(":")[0]).stem)
    flags.DEFINE_string("sweep", default, "the sweep's folder", flag_values=values)
    flags.DEFINE_bool("retry", False, "train failed trials again", flag_values=values)
    start, argv = config_files.override(config_files.read_config(config.base), "base", argv, values)
    config_files.require_no_more(argv)
    sweep = _make_sweep(config.to_dict(), start.to_dict(), space, spec)
    return sweep, Path(values.sweep), values.retry


def _read_sweep_file(spec: str) -> tuple[Any, Any]:
    """Returns the checked keys of a sweep file, and its space as it is."""
    config = config_files.load_config(spec)
    where = f"in {spec.partition(':')[0]}"
    if "space" not in config:
        raise ValueError(f"{where}: space is missing; start from configs.sweeps.base.get_config().")
    space = config.space
    with config.unlocked():
        config["space"] = None
    return config_files.checked(config, where, base.get_config), space


def _make_sweep(settings: dict[str, Any], start: dict[str, Any], space: Any, spec: str) -> Sweep:
    # Behind the command line: these imports take seconds.
    from rbf_jax.sweeps.space import parse as parse_space
    from rbf_jax.sweeps.sweep import Sweep
    from rbf_jax.training.config import from_json, validate

    del settings["space"]
    try:
        sweep = Sweep(**{**settings, "base": start, "parts": parse_space(space)})
    except ValueError as error:
        raise ValueError(f"in {spec}: {error}") from error
    # Of one worker.
    devices = max(1, sweep.slurm["gpus_per_node"]) if sweep.executor == "slurm" else 1
    points = sweep.points() if sweep.is_grid else [*sweep.parts[0].corners()]
    for point in points:
        changed = ", ".join(f"{key}={value!r}" for key, value in point.values.items())
        where = f"in {spec}, at {changed}"
        config = config_files.checked(from_json(json.dumps(sweep.config(point.values, 0))), where)
        try:
            validate(config, devices)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return sweep


def _report_folder(argv: Sequence[str]) -> Path:
    """Reads ``--report --sweep=DIR``; with --config, DIR is by default that of the sweep file."""
    rest = [argument for argument in argv if argument != "--report"]
    values = flags.FlagValues()
    flags.DEFINE_string("sweep", None, "the sweep's folder", flag_values=values)
    flags.DEFINE_string("config", None, "a sweep file", flag_values=values)
    try:
        config_files.require_no_more(values(rest))
    except flags.Error as error:
        raise ValueError(str(error)) from error
    if values.sweep is None and values.config is None:
        raise ValueError("--sweep=DIR is missing; give the folder of the sweep to report on.")
    return Path(values.sweep or Path("runs/sweeps") / Path(values.config).stem)


def _run(sweep: Sweep, path: Path, retry: bool) -> int:
    from rbf_jax.sweeps import engine, table
    from rbf_jax.sweeps.sweep import SweepFolder

    folder = SweepFolder(path)
    folder.settle(sweep)
    try:
        study = engine.run(folder, retry=retry)
    except engine.WorkersFailed as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on.", 130)
    found = table.rows(study)
    print(f"{path}: {table.headline(found, sweep.num_trials)}")
    print(f"python -m experiments.sweep --report --sweep={path}")
    return 0


def _report(path: Path) -> int:
    from configs.base import get_config
    from rbf_jax.sweeps import report
    from rbf_jax.sweeps.sweep import SweepFolder

    command = f"python -m experiments.sweep --report --sweep={path}"
    for file in report.write(SweepFolder(path), get_config().to_dict(), command):
        print(file)
    return 0


def _fail(message: str, status: int) -> int:
    print(f"sweep: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
