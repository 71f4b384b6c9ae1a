"""Exports a run's model: its parameters as safetensors, and programs that need nothing but JAX.

    python -m experiments.export --run=DIR [--out=DIR] [--checkpoint=last|best|STEP]
        [--prompt_length=P] [--capacity=C]

Writes into OUT, by default RUN/export:

    model.safetensors, config.json, tokenizer.json    rbf_jax.inference.load_model(OUT) reads them
    prefill.jax_export, step.jax_export               the model with its cache, for CPUs and GPUs
    run.py                                            generates with these; JAX and flatbuffers do

The programs take any number of rows, prompts of up to P tokens and, prompt included, C tokens in a
row; both are the context length of the training unless given. Some ten seconds on a CPU.

Exit status: 0, or 2 with one line that says why it could not be done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.evaluate import add_checkpoint


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="export", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="run folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/export")
    add_checkpoint(parser)
    parser.add_argument("--prompt_length", type=int, metavar="P")
    parser.add_argument("--capacity", type=int, metavar="C")
    arguments = parser.parse_args(argv[1:])
    try:
        paths = export_run(**vars(arguments))
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        print(f"export: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


def export_run(
    run: Path,
    out: Path | None,
    checkpoint: int | str,
    prompt_length: int | None,
    capacity: int | None,
) -> list[Path]:
    """Exports a checkpoint of a run.

    Args:
      run: the run's folder.
      out: where to; None for RUN/export.
      checkpoint: "last", "best" or a step.
      prompt_length: P; None for the context length, or the capacity if that is less.
      capacity: C; None for the context length, or P if that is more.

    Returns:
      The files.

    Raises:
      ValueError: it is no run folder, has no such checkpoint, or a size is wrong.
    """
    # Behind the command line: these imports take seconds.
    from rbf_jax.data import load_tokenizer
    from rbf_jax.inference import save_model
    from rbf_jax.inference.export import export_programs, save_programs
    from rbf_jax.training import load_run

    loaded = load_run(run, checkpoint)
    context = loaded.model.config.context_length
    if capacity is None:
        capacity = max(context, prompt_length or 0)
    if prompt_length is None:
        prompt_length = min(context, capacity)
    sizes = {"prompt_length": prompt_length, "capacity": capacity}
    programs = export_programs(loaded.model, loaded.variables, **sizes)
    out = loaded.path / "export" if out is None else out
    about = {"run": loaded.path.name, "step": loaded.step, **sizes}
    tokenizer = load_tokenizer(loaded.path)
    return [
        *save_model(out, loaded.model, loaded.variables, tokenizer, about),
        *save_programs(out, programs),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv))
