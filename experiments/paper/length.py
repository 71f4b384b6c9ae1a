"""Length: does attention use, or only survive, contexts longer than those it was trained on?

    python -m experiments.paper.length [--scale=paper|smoke] [--shard=I/N] [--minutes=M]
                                       [--out=DIR] [--records=DIR] [--base.KEY=VALUE]
    python -m experiments.paper.length --plan     prints the rows left to train and their time
    python -m experiments.paper.length --table    writes the table from the records alone

Trains each row of the plan (configs/figures/length.py) with all its seeds at once, at 256 tokens of
books, and evaluates it at 256 to 8,192 tokens. DIR/records/ROW.jsonl.xz is its record; a row with a
record there or in --records (docs/measurements/experiments/length) is not trained again.
--shard=I/N takes every N-th row, so that N processes share the plan. --minutes stops the process
that long after its start: finished rows have their records, the row in progress is lost unless its
folder is kept. Writes DIR/length.md, the table.

What is evaluated. The validation books are cut into pieces of 8,192 tokens, each inside one book.
All contexts see the same pieces: for a context of C tokens a piece is 8,192 / C separate segments.
"window" lets each token attend to the last 256 tokens of a piece only, itself included. A record
holds the loss of every 64 tokens of a piece: inside["loss/C"] and inside["loss/window"], (seeds,
128), and lengths[C], their mean. inside["beyond"], ["sink"] and ["register"] are the shares of
attention on tokens 256 or more back, on an origin sink and on registers, (seeds, L, N), for the
later half of a context of 2,048.

Written down before it runs:

* Use, of a row: (loss at places 2,048 to 8,191 of a context of 8,192) - (loss at positions 192 to
  255 of contexts of 256 in the same places), paired by seed; negative is better. With a 95 %
  interval by Student's t over seeds the row "uses" the longer context where the whole interval is
  below -0.01 nats, "degrades" where it is above 0.01, "survives" where it is within, else "open".
* Primary contrast: best RBF - best dot product, of the loss at places 2,048 to 8,191. The best row
  of each side, over positions and sinks, is the one with the lowest mean over half of the seeds;
  the contrast is measured on the other half, and the halves are swapped (so that no seed both
  chooses and measures). Repeated runs of one seed differ by 0.0027 nats: the interval is never
  narrower than that allows.
* Everything else in the table is description, not a test.
* Stop rule: rows are trained in the order of the plan, with eight seeds, until all have a record
  or two runs of ten minutes on two GPUs are over. No row or seed is added for what was seen. The
  primary contrast counts once the first 18 rows are complete; before, it is preliminary.
* Rows with a learned sink logit were added on 2026-12-01, after the others had been seen: they
  describe, and are no part of the primary contrast.
* Left out: RBF with QK-norm and a sink or register at the origin, which is broken by construction
  (every key pays the norm penalty, the sink does not), and without one is the dot product with
  QK-norm (docs/mathematics.md).

Exit status: 0 done; 1 a row failed; 2 wrong command; 143 or 130 stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from configs.figures import length as configuration
from experiments import config_files
from experiments.figure_runs import Experiment
from rbf_jax.analysis import paired
from rbf_jax.analysis.records import Record
from rbf_jax.analysis.report import markdown_table
from rbf_jax.analysis.variants import Variant
from rbf_jax.data import load_data
from rbf_jax.data.files import write_text
from rbf_jax.nn import CausalLM
from rbf_jax.training import TrainingStopped
from rbf_jax.training.ensemble_programs import Batch, Programs, Texts, compile_programs

# A new kind, encoding or sink is one line here and a place in _PLAN.
_KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "rbf": ("RBF", {}),
    "dot": ("dot, 2/√H", {"kind": "dot", "dot_scale": "rbf"}),
    "qknorm": ("dot + QK-norm, 2/√H", {"kind": "dot", "dot_scale": "rbf", "qk_norm": True}),
    "learned": ("dot, learned scale", {"kind": "dot", "dot_scale": "rbf", "learn_gamma": True}),
}
_POSITIONS = {"rope": "RoPE", "susie": "SuSiE", "alibi": "ALiBi"}
_SINKS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "none": ("none", {}),
    "origin": ("origin", {"model.attention.sink": "origin"}),
    "register": ("register", {"model.attention.sink": "register"}),
    "logit": ("learned logit", {"model.attention.sink": "learned"}),
}
# Sinks whose rows were added after the others had been seen: not in the primary contrast.
_ADDED = ("logit",)
_CORE = ("rbf", "dot", "qknorm")
# The most informative first; a row counts where it comes first.
_PLAN = (
    (("rope", "susie"), ("none",), _CORE),
    (("rope", "susie"), ("origin", "register"), _CORE),
    (("alibi",), ("none",), _CORE),
    (("rope", "susie"), ("none",), ("learned",)),
    (tuple(_POSITIONS), tuple(_SINKS), tuple(_KINDS)),
)
# Places of the longest context that count as far, from this share of it on.
_FAR = 1 / 4
# Equal parts of the trained length that a loss by position is kept for.
_BINS = 4
_DECISIVE = 0.01
_REPEAT = 0.0027
# Of a row on one H200, until a record says how long training takes there.
_SECONDS = 45.0
_EVALUATION_SECONDS = 12.0


def plan(scale: str) -> list[Variant]:
    """Returns all rows, in the order in which they are trained."""
    found: dict[str, Variant] = {}
    for positions, sinks, kinds in _PLAN:
        for position, sink, kind in itertools.product(positions, sinks, kinds):
            changes = {
                "model.positions": position,
                **{f"model.attention.{key}": value for key, value in _KINDS[kind][1].items()},
                **_SINKS[sink][1],
            }
            name = f"{kind}-{position}-{sink}"
            found.setdefault(name, Variant(name, changes, configuration.LENGTHS[scale]))
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class Lengths(Experiment):
    """Rows, each evaluated by position in pieces of documents.

    Attributes:
      multiples: contexts to evaluate at, over the length that is trained at.
      num_pieces: the most pieces of documents that are evaluated.
    """

    multiples: tuple[int, ...] = (1,)
    num_pieces: int = 1

    def compile(self, variant: Variant, texts: Texts) -> Programs:
        """Compiles training, and in place of the figures' evaluations those by position."""
        config = self.config(variant)
        programs = compile_programs(config, texts)
        contexts = [m * config.data.context_length for m in sorted(self.multiples)]
        evaluation = _Evaluation(programs, self._pieces, contexts)
        return dataclasses.replace(
            programs,
            lengths={C: functools.partial(evaluation.mean_loss, C) for C in contexts},
            streams={C: {} for C in contexts},
            inside=evaluation.inside,
        )

    @functools.cached_property
    def _pieces(self) -> Batch:
        """(M, 1, longest context): pieces of validation documents, spread over all of them."""
        config = self.base.data.copy_and_resolve_references()
        config.context_length *= max(self.multiples)
        data = load_data(config, seed=0, tokenizer_dir=self.out / "tokenizer")
        rows = data.batches("valid", 1, shuffle=False, repeat=False)
        # A row that is one segment is a piece of one document, from its start or a later place.
        whole = (row for row in rows if (row["segment_ids"] == 1).all())
        kept = list(itertools.islice(whole, self.num_pieces))
        if not kept:
            raise ValueError(
                f"no validation document has {config.context_length + 1} tokens, which the longest "
                "context needs."
            )
        names = {"tokens": "inputs", "targets": "targets"}
        return {name: np.stack([row[key] for row in kept]) for name, key in names.items()}


class _Evaluation:
    """Losses by position of all seeds; one compiled program serves all contexts, by segments."""

    def __init__(self, programs: Programs, pieces: Batch, contexts: Sequence[int]):
        self._pieces, self._contexts = pieces, contexts
        trained, longest = contexts[0], contexts[-1]
        params = jax.tree.map(  # As a run has them on its devices.
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            programs.create.out_info.params,  # type: ignore[attr-defined]
        )
        config = programs.model.config
        attention = dataclasses.replace(config.attention, window=trained - 1)
        windowed = CausalLM(dataclasses.replace(config, attention=attention))
        whole = self._batch(longest)
        # Attention weights are quadratic in T: two shorter pieces for them.
        T = min(longest, 8 * trained)
        self._some = {name: array[:2, :, :T] for name, array in whole.items()}

        def compiled(function: Any, model: CausalLM, number: int, batch: Batch) -> Any:
            of_all = jax.vmap(functools.partial(function, model, number), in_axes=(0, None))
            return jax.jit(of_all).lower(params, batch).compile()

        bins = _BINS * longest // trained
        self._full = compiled(_losses, programs.model, bins, whole)
        self._windowed = compiled(_losses, windowed, bins, whole)
        self._shares = compiled(_shares, programs.model, trained, self._some)
        self._found: dict[str, np.ndarray] = {}

    def mean_loss(self, context: int, params: Any, _: Any) -> Any:
        """(n,), and keeps the losses by position for `inside`."""
        losses = np.asarray(self._full(params, self._batch(context)))
        self._found[f"loss/{context}"] = losses
        return losses.mean(-1)

    def inside(self, params: Any, _: Any) -> dict[str, Any]:
        """Everything else that a record holds, (n, ...) by name; asked for last."""
        windowed = self._windowed(params, self._batch(self._contexts[-1]))
        found = {"loss/window": windowed, **self._shares(params, self._some)}
        return self._found | {name: np.asarray(array) for name, array in found.items()}

    def _batch(self, context: int) -> Batch:
        """The pieces, (M, 1, T) arrays, as segments of `context` tokens."""
        shape = self._pieces["tokens"].shape
        segments, positions = np.divmod(np.arange(shape[-1], dtype=np.int32), np.int32(context))
        placed = {"positions": positions, "segment_ids": segments + np.int32(1)}
        return {**self._pieces, **{k: np.broadcast_to(x, shape) for k, x in placed.items()}}


def _losses(model: CausalLM, bins: int, params: Any, batches: Batch) -> jax.Array:
    """The mean loss in each of `bins` equal parts of (M, 1, T) pieces, float32 (bins,)."""

    def of_piece(batch: Batch) -> jax.Array:
        losses: Any = model.apply({"params": params}, **batch, method="token_losses")
        return losses.reshape(bins, -1).mean(-1)

    return jax.lax.map(of_piece, batches).mean(0)


def _shares(model: CausalLM, near: int, params: Any, batches: Batch) -> dict[str, jax.Array]:
    """Mean attention, float32 (L, N), of the later half of (M, 1, T) pieces, see the module."""
    registers = model.config.num_registers

    def of_piece(batch: Batch) -> dict[str, jax.Array]:
        tokens = {name: array for name, array in batch.items() if name != "targets"}
        _, state = model.apply({"params": params}, **tokens, mutable=["intermediates"])
        layers = [state["intermediates"][f"block_{i}"] for i in range(model.config.num_layers)]
        weights = jnp.stack([layer["attention"]["attention_weights"][0][0] for layer in layers])
        half = weights.shape[-2] // 2
        weights = weights[:, :, half:]  # (L, N, T/2, R + T)
        behind = jnp.arange(half, 2 * half)[:, None] - jnp.arange(2 * half)
        shares = {
            "beyond": jnp.sum(weights[..., registers:], -1, where=behind >= near),
            "sink": 1 - weights.sum(-1),
            "register": weights[..., :registers].sum(-1),
        }
        return {name: share.mean(-1) for name, share in shares.items()}

    return {name: x.mean(0) for name, x in jax.lax.map(of_piece, batches).items()}


def far(record: Record) -> np.ndarray:
    """Loss (n,) far from the start of the longest context."""
    return _behind(record, max(record.lengths)).mean(-1)


def use(record: Record) -> np.ndarray:
    """`far` - the loss at the last positions of the trained length, (n,); negative is better."""
    return far(record) - _behind(record, min(record.lengths))[:, _BINS - 1 :: _BINS].mean(-1)


def _behind(record: Record, context: int) -> np.ndarray:
    """The losses of the places of a piece that count as far."""
    losses = record.inside[f"loss/{context}"]
    return losses[:, int(_FAR * losses.shape[1]) :]


def verdict(value: paired.Estimate) -> str:
    """What a row's `use` says, by the rule of the module."""
    if value.missing or value.n < 2:
        return "diverged" if value.missing else "open"
    if value.high < -_DECISIVE:
        return "uses"
    if value.low > _DECISIVE:
        return "degrades"
    return "survives" if value.low > -_DECISIVE and value.high < _DECISIVE else "open"


def primary(records: Mapping[str, Record]) -> dict[str, Any] | None:
    """Best RBF - best dot product of `far`, each seed measured on rows that the others chose.

    Returns:
      The rows that each half of the seeds chose, and the contrast; None without both sides.
    """
    records = {name: x for name, x in records.items() if not name.endswith(_ADDED)}
    sides = [[n for n in records if n.startswith("rbf-") == rbf] for rbf in (True, False)]
    if not all(sides):
        return None
    losses = {name: far(record) for name, record in records.items()}
    seeds = np.arange(len(next(iter(losses.values()))))
    differences, chosen = np.full(len(seeds), np.nan), []
    for half in (0, 1):
        measured = seeds % 2 == half
        means = {name: np.mean(values[~measured]) for name, values in losses.items()}
        best = [
            min(side, key=lambda name: means[name] if np.isfinite(means[name]) else np.inf)
            for side in sides
        ]
        differences[measured] = (losses[best[0]] - losses[best[1]])[measured]
        chosen.append(best)
    value = paired.estimate(differences)
    least = 1.96 * _REPEAT * np.sqrt(2 / max(value.n, 1))
    low, high = min(value.low, value.mean - least), max(value.high, value.mean + least)
    contrast = paired.as_numbers(dataclasses.replace(value, low=low, high=high))
    return {"chosen": chosen, "contrast": contrast}


def report(records: Mapping[str, Record], rows: Sequence[Variant]) -> str:
    """Returns the table, Markdown, of one record or more."""
    contexts = sorted(next(iter(records.values())).lengths)
    trained, longest = contexts[0], contexts[-1]
    spans = list(itertools.pairwise(contexts))
    where = f"{int(_FAR * longest):,}-{longest:,}"
    head = ["attention", "positions", "sink", "valid", f"last quarter of {trained:,}"]
    head += [f"{a:,}-{b:,}" for a, b in spans]
    head += [f"window, {where}", "use", "verdict", f"beyond {trained:,}"]
    table = [head]
    for row in rows:
        if (record := records.get(row.name)) is None:
            continue
        kind, position, sink = row.name.split("-")
        losses, windowed = (record.inside[f"loss/{key}"] for key in (longest, "window"))
        at = np.arange(losses.shape[1]) * longest // losses.shape[1]
        value = paired.estimate(use(record))
        means = [
            np.mean(paired.loss(record)),
            np.mean(far(record) - use(record)),
            *(losses[:, (a <= at) & (at < b)].mean() for a, b in spans),
            windowed[:, at >= _FAR * longest].mean(),
        ]
        cells = [_KINDS[kind][0], _POSITIONS[position], _SINKS[sink][0]]
        cells += [f"{mean:.3f}" for mean in means]
        cells += [paired.interval(paired.as_numbers(value), 3), verdict(value)]
        table.append([*cells, f"{np.mean(record.inside['beyond']):.1%}"])
    lines = [markdown_table(table)]
    if (contrast := primary(records)) is not None:
        names = " and ".join(" - ".join(best) for best in contrast["chosen"])
        text = paired.interval(contrast["contrast"], 3)
        lines += ["", f"Best RBF - best dot product, loss at {where}: {text} ({names})."]
    lines += ["", f"{len(rows) - len(records)} of {len(rows)} rows have no record."]
    return f"{summary(records)}\n\n" + "\n".join(lines) + "\n"


def summary(records: Mapping[str, Record]) -> str:
    """Returns a table of mean `use`, Markdown: kinds by positions and sinks."""
    columns = list(itertools.product(_POSITIONS, _SINKS))
    head = [f"{_POSITIONS[position]}, {_SINKS[sink][0]}" for position, sink in columns]
    table = [["attention", *head]]
    for kind, (title, _) in _KINDS.items():
        found = [records.get(f"{kind}-{position}-{sink}") for position, sink in columns]
        cells = ["" if record is None else f"{np.mean(use(record)):+.2f}" for record in found]
        table.append([title, *cells])
    return markdown_table(table)


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, force=True)
    for name in ("rbf_jax", "experiments"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        return _run(*parse(argv))
    except TrainingStopped as error:
        return _fail(str(error), 128 + error.signal)
    except (ValueError, OSError) as error:
        return _fail(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on.", 130)


def parse(argv: Sequence[str]) -> tuple[Lengths, list[Variant], flags.FlagValues]:
    """Reads the command line; returns the experiment, all rows, and the flags.

    Raises:
      ValueError: in one line, what is wrong.
    """
    values = flags.FlagValues()
    kept = "docs/measurements/experiments/length"
    flags.DEFINE_string("scale", "paper", "smoke or paper", flag_values=values)
    flags.DEFINE_string("out", "runs/length", "folder", flag_values=values)
    flags.DEFINE_string("records", kept, "folder of records", flag_values=values)
    flags.DEFINE_string("shard", "0/1", "I/N: rows I, I + N, ...", flag_values=values)
    flags.DEFINE_float("minutes", None, "stop after", flag_values=values)
    flags.DEFINE_bool("plan", False, "print what is left", flag_values=values)
    flags.DEFINE_bool("table", False, "train nothing", flag_values=values)
    flags.DEFINE_integer("compile_workers", 1, "threads", flag_values=values)
    scale = next((x.partition("=")[2] for x in argv if x.startswith("--scale=")), "paper")
    base = configuration.get_config(scale)
    base, rest = config_files.override(base, "base", argv, values)
    config_files.require_no_more(rest)
    experiment = Lengths(
        base,
        tuple(range(configuration.SEEDS[scale])),
        Path(values.out),
        Path(values.records),
        configuration.LENGTHS[scale],
        configuration.PIECES[scale],
    )
    return experiment, plan(scale), values


def shard(rows: Sequence[Variant], text: str) -> list[Variant]:
    """Returns every N-th row from the I-th on, of "I/N".

    Raises:
      ValueError: `text` is nothing of this form.
    """
    index, _, number = text.partition("/")
    if not (index.isdecimal() and number.isdecimal() and int(index) < int(number)):
        raise ValueError(f"--shard={text} must be I/N with 0 ≤ I < N.")
    return list(rows[int(index) :: int(number)])


def _run(experiment: Lengths, rows: Sequence[Variant], options: flags.FlagValues) -> int:
    mine = shard(rows, options.shard)
    found = {v.name: record for v in rows if (record := experiment.find(v)) is not None}
    missing = [v for v in mine if v.name not in found]
    if options.plan:
        print(_plan_text(missing, found, len(mine)))
        return 0
    failed = {}
    if not options.table:
        if options.minutes is not None:
            _stop_after(60 * options.minutes)
        failed = experiment.train(
            missing, compile_workers=options.compile_workers, keep_members=False
        )
        found = {v.name: record for v in rows if (record := experiment.find(v)) is not None}
    if found:
        write_text(experiment.out / "length.md", report(found, rows))
        print(f"written to {experiment.out / 'length.md'}")
    for name, reason in failed.items():
        print(f"length: {name} failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _plan_text(missing: Sequence[Variant], found: Mapping[str, Record], number: int) -> str:
    seconds = [record.summary["seconds"] + _EVALUATION_SECONDS for record in found.values()]
    each = float(np.mean(seconds)) if seconds else _SECONDS
    lines = [f"{i:3d} {variant.name}" for i, variant in enumerate(missing, 1)]
    return "\n".join(
        [
            *lines,
            f"{len(missing)} of {number} rows left, {each:.0f} s each on one GPU beside compiling: "
            f"{len(missing) * each / 60:.0f} minutes",
        ]
    )


def _stop_after(seconds: float) -> None:
    """Has the process stopped as by a signal; what is compiling then is not waited for."""
    for delay, stop in (
        (seconds, lambda: os.kill(os.getpid(), signal.SIGTERM)),
        (seconds + 15, lambda: os._exit(128 + signal.SIGTERM)),
    ):
        timer = threading.Timer(delay, stop)
        timer.daemon = True
        timer.start()


def _fail(message: str, status: int) -> int:
    print(f"length: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
