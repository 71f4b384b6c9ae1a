"""Makes a dot-product model RBF: trains on while λ of softmax(2γ q·k − λγ‖k‖²) goes from 0 to 1.

    python -m experiments.convert --from=FOLDER --config=configs/convert.py [--run=DIR]
        [--arms=annealed,control] [--config.KEY=VALUE]
    python -m experiments.convert --report=DIR[,DIR...] --out=FILE.json [--figure=FILE.png]

FOLDER is a GPT-2 in a local folder as Hugging Face has it (config.json, safetensors, and
tokenizer.json or vocab.json and merges.txt), or a run of ours with attention.kind "dot". Prints the
validation loss at λ = 0, where the model is as it was, and at λ = 1 untrained; then trains the
arms, each a run in a folder of its own in DIR (runs/NAME of the configuration unless given):

    annealed  λ goes from 0 to 1 in optimizer.anneal_steps
    switched  λ is 1 at once
    learned   λ starts at 0 and is learned, per head
    control   λ stays 0: the dot product, trained on for as many steps

DIR/convert.json says what came of it. The same command again goes on with what was stopped or
killed. One process, with all its devices.

--report writes the reports of several conversions, unlike in seed and FOLDER only, into one file,
with their means; --figure draws them.

Exit status: 0 finished; 1 diverged; 2 wrong command, configuration or folder; 128 + N stopped by
signal N after saving.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from configs import base
from experiments import config_files


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    parser = argparse.ArgumentParser("convert", add_help=False, allow_abbrev=False)
    for name in ("from", "arms", "report", "out", "figure"):
        parser.add_argument(f"--{name}", dest=f"{name}_", default="")
    flags, rest = parser.parse_known_args(argv)
    # Behind the command line: these imports take seconds.
    from rbf_jax.training import SetupError, TrainingDiverged, TrainingStopped

    try:
        return _report(flags, rest, argv) if flags.report_ else _convert(flags, rest, argv)
    except (SetupError, ValueError, NotImplementedError, OSError, ImportError) as error:
        return _fail(" ".join(str(error).split()), 2)
    except TrainingDiverged as error:
        return _fail(str(error), 1)
    except TrainingStopped as error:
        return _fail(str(error), 128 + error.signal)


def _convert(flags: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    if not flags.from_:
        raise ValueError("--from is missing: the folder of the model to convert.")
    _refuse(flags, "without --report", "out", "figure")
    config, folder = config_files.parse(rest)
    require_free(config)
    from rbf_jax.training.conversion import convert, summary_table
    from rbf_jax.training.initial import open_source

    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("rbf_jax").setLevel(logging.INFO)
    arms = (flags.arms_ or "annealed,control").split(",")
    report = convert(config, open_source(flags.from_), folder, arms, command(argv))
    print(summary_table(report), end="")
    return 0


def require_free(config: ConfigDict) -> None:
    """Raises ValueError if the configuration says of the model what only its folder can say."""
    from rbf_jax.training.config import differences
    from rbf_jax.training.conversion import FREE

    changed = differences(base.model().to_dict(), config.model.to_dict())
    for change in changed:
        key = change.partition(":")[0]
        if key == "attention.key_norm_weight" and config.model.attention.key_norm_weight == 0:
            continue
        if key not in FREE:
            raise ValueError(
                f"model.{change}: the model is that of --from; of model, only "
                f"{', '.join(FREE)} may be set."
            )
    if config.train.init_from or config.data.tokenizer != base.data().tokenizer:
        raise ValueError(
            "train.init_from and data.tokenizer are those of --from; leave them at their defaults."
        )


def command(argv: Sequence[str]) -> str:
    """Returns the command line."""
    return shlex.join(["python", "-m", "experiments.convert", *argv[1:]])


def _report(flags: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    _refuse(flags, "with --report", "from", "arms")
    config_files.require_no_more(rest)
    if not flags.out_:
        raise ValueError("--out is missing: the file to write.")
    from rbf_jax.analysis.conversion import conversion_figure, merge
    from rbf_jax.data.files import write_text

    merged = {"command": command(argv), **merge(flags.report_.split(","))}
    write_text(Path(flags.out_), json.dumps(merged, indent=1) + "\n")
    if flags.figure_:
        conversion_figure(merged).savefig(flags.figure_)
    print(json.dumps(merged["mean"], indent=1))
    return 0


def _refuse(flags: argparse.Namespace, why: str, *names: str) -> None:
    for name in names:
        if getattr(flags, f"{name}_"):
            raise ValueError(f"--{name} has no effect {why}.")


def _fail(message: str, status: int) -> int:
    print(f"convert: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
