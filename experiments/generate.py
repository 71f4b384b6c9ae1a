"""Goes on with a text, as a trained model would.

    python -m experiments.generate --run=DIR (--prompt=TEXT [--prompt=TEXT ...] | --interactive)
        [--checkpoint=last|best|STEP] [--max_tokens=N] [--temperature=1.0] [--top_k=K] [--top_p=P]
        [--seed=0]

Text is written as it comes, tokens per second at the end. Several prompts are gone on with at once,
and written one after the other. A text ends where the model ends it, or after --max_tokens, by
default what is left of the context that the model was trained with. --temperature=0 takes the
likeliest token always. --interactive asks for prompts, one a line, until Ctrl-D; Ctrl-C stops the
text that is being written. DIR is the folder of a run, or one of experiments.export. Any hardware:
some seconds to start.

Exit status: 0, 2 with one line that says why it could not be done, or 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.evaluate import add_checkpoint


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    arguments = _parser().parse_args(argv[1:])
    try:
        writer = _Writer(arguments)
        if arguments.interactive:
            _converse(writer)
        else:
            writer.write(arguments.prompt)
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        print(f"generate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ngenerate: interrupted.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="generate", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", required=True, metavar="DIR", help="run folder")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to go on with; may be repeated"
    )
    prompts.add_argument("--interactive", action="store_true", help="ask for prompts")
    add_checkpoint(parser)
    parser.add_argument(
        "--max_tokens", type=int, metavar="N", help="default: what is left of the context"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0 for greedy (default: 1)")
    parser.add_argument("--top_k", type=int, metavar="K", help="choose among the K likeliest")
    parser.add_argument(
        "--top_p", type=float, metavar="P", help="choose among the likeliest of probability P"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


class _Writer:
    """A model that writes on from prompts."""

    def __init__(self, arguments: argparse.Namespace):
        # Behind the command line: these imports take seconds.
        from rbf_jax.inference import Sampling

        self._sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
        self._model, self._variables, self._tokenizer = _load(arguments.run, arguments.checkpoint)
        self._max_tokens, self._seed = arguments.max_tokens, arguments.seed

    def write(self, prompts: Sequence[str]) -> None:
        """Writes prompts and what follows them; then, to standard error, how fast it was."""
        from rbf_jax.inference import TextStream, generate

        tokens = [self._tokenizer.encode(prompt) for prompt in prompts]
        longest = max(map(len, tokens))
        left = max(1, self._model.config.context_length - longest)
        start = time.perf_counter()
        steps = generate(
            self._model,
            self._variables,
            tokens,
            max_new_tokens=left if self._max_tokens is None else self._max_tokens,
            sampling=self._sampling,
            seed=self._seed,
            eos_id=self._tokenizer.eos_id,
        )
        streams = [TextStream(self._tokenizer, prompt) for prompt in tokens]
        rows = _Rows(prompts)
        counts, times = [], [start]
        for step in steps:
            for row, token in enumerate(step):
                if token is None:
                    rows.end(row, streams[row].end())
                else:
                    rows.add(row, streams[row].push(token))
            counts.append(sum(token is not None for token in step))
            times.append(time.perf_counter())
        for row, stream in enumerate(streams):
            rows.end(row, stream.end())
        _report(counts, times)


class _Rows:
    """Several texts that grow at once, written one after the other as they come."""

    def __init__(self, prompts: Sequence[str]):
        self._pending = list(prompts)
        self._done = [False] * len(prompts)
        self._current = 0
        self._flush()

    def add(self, row: int, piece: str) -> None:
        """Takes a piece of a text."""
        self._pending[row] += piece
        self._flush()

    def end(self, row: int, piece: str) -> None:
        """Takes the last piece of a text."""
        self._done[row] = True
        self.add(row, piece)

    def _flush(self) -> None:
        while self._current < len(self._pending):
            text, self._pending[self._current] = self._pending[self._current], ""
            done = self._done[self._current]
            if text or done:
                print(text, end="\n" if done else "", flush=True)
            if not done:
                return
            self._current += 1


def _load(folder: str, step: int | str) -> tuple[Any, Any, Any]:
    """Returns model, variables and tokenizer of a run, or of an exported model."""
    from rbf_jax.data import load_tokenizer
    from rbf_jax.inference import load_model
    from rbf_jax.training import load_run

    if (Path(folder).expanduser() / "model.safetensors").is_file():
        if step != "last":
            raise ValueError(f"--checkpoint={step} is for runs; {folder} is an exported model.")
        saved = load_model(folder)
        return saved.model, saved.variables, saved.tokenizer
    run = load_run(folder, step)
    return run.model, run.variables, load_tokenizer(run.path)


def _converse(writer: _Writer) -> None:
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        try:
            writer.write([prompt])
        except ValueError as error:
            print(f"generate: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print()


def _report(counts: Sequence[int], times: Sequence[float]) -> None:
    """The first token waits for the compiler; the speed is that of the others."""
    text = f"generate: {sum(counts):,} tokens"
    if counts:
        text += f"; the first after {times[1] - times[0]:.2f} s, compiling included"
    if len(counts) > 1:
        speed = sum(counts[1:]) / (times[-1] - times[1])
        text += f", then {speed:,.0f} tokens/s"
    print(f"{text}.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
