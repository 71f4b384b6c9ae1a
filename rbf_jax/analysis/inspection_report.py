"""What the report of one model's inspection says: its tables, its sections, its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rbf_jax.analysis import figures, inspection_figures
from rbf_jax.analysis.comparison import MISSING
from rbf_jax.analysis.diagnostics import QUANTILES
from rbf_jax.analysis.inspection_figures import HeadTable
from rbf_jax.analysis.models import Inspection
from rbf_jax.analysis.report import Section, markdown_table
from rbf_jax.analysis.style import PALETTE, variant


def title(seen: Inspection) -> str:
    """The report's heading."""
    return f"Inside {seen.path.name} at step {seen.step:,}"


def sections(seen: Inspection, command: str, where: Mapping[str, Any]) -> list[Section]:
    """The report's parts, in order.

    Args:
      seen: what the model does.
      command: what wrote the report.
      where: machine, versions and date, as `rbf_jax.environment.describe` says them.
    """
    return [
        _model_section(seen),
        _heads_section(seen),
        _norms_section(seen),
        _gamma_section(seen),
        _maps_section(seen),
        _written_section(command, where),
    ]


def numbers(seen: Inspection, command: str, where: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into numbers.json: all but the attention maps."""
    found = {name: values.tolist() for name, values in seen.numbers.items()}
    del found["attention_map"]
    return {
        "run": str(seen.path),
        "step": seen.step,
        "attention": variant(seen.config),
        "config": seen.config,
        "rows": seen.rows,
        "text_tokens": seen.text_tokens,
        "has_bound": has_bound(seen),
        "quantiles": QUANTILES,
        "uniform": seen.uniform,
        "numbers": found,
        "document": list(seen.document.tokens),
        "command": command,
        **where,
    }


def has_bound(seen: Inspection) -> bool:
    """Whether any head's logits have a bound that is known before the keys: λ > 0."""
    return bool((seen.numbers["key_norm_weight"] > 0).any())


def head_tables(seen: Inspection) -> dict[str, HeadTable]:
    """What is known of the heads, by name; of what this model has."""
    found, uniform = seen.numbers, seen.uniform
    tables = {
        "entropy (nats)": HeadTable(found["entropy"], ".2f", uniform["entropy"]),
        "distance (tokens)": HeadTable(found["distance"], ".1f", uniform["distance"]),
    }
    if seen.model.num_registers:
        tables["weight on registers"] = HeadTable(found["register_mass"], ".0%", 1.0)
    if seen.model.attention.has_virtual_sink:
        tables["weight on sink"] = HeadTable(found["sink_mass"], ".0%", 1.0)
    tables["weight on first token"] = HeadTable(found["first_token_mass"], ".0%", 1.0)
    if has_bound(seen):
        tables["rows that need the gate"] = HeadTable(found["gated_by_head"], ".1%", 1.0)
    return tables


def head_rows(seen: Inspection) -> list[list[str]]:
    """The table of heads as text: a header, then a row a layer and head."""
    tables = head_tables(seen)
    learned = seen.model.attention.sink == "learned"
    rows = [["layer, head", *tables, "γ", "λ", *["sink logit"] * learned]]
    for place in np.ndindex(seen.numbers["entropy"].shape):
        cells = [format(table.values[place], table.form) for table in tables.values()]
        cells.append(f"{seen.numbers['gamma'][place]:.4f}")
        cells.append(f"{seen.numbers['key_norm_weight'][place]:.3f}")
        cells += [f"{seen.numbers['sink_logits'][place]:.3f}"] if learned else []
        rows.append([", ".join(map(str, place)), *cells])
    return rows


def norm_rows(seen: Inspection, name: str) -> list[list[str]]:
    """The table of norms as text: a header, then a row a layer.

    Args:
      seen: what the model does.
      name: "key" or "value".
    """
    found = seen.numbers
    quantiles, registers = found[f"{name}_norm_quantiles"], found[f"register_{name}_norm"]
    R = registers.shape[1]
    ratio = f"{'registers' if R else 'first tokens'} / other text"
    header = ["layer", *(_QUANTILE_NAMES.get(q, f"{q:.0%}") for q in QUANTILES), "first tokens"]
    header += [f"register {r}" for r in range(R)] + [ratio] * (name == "value")
    rows = [header]
    for layer, row in enumerate(quantiles):
        values = [*row, found[f"first_token_{name}_norm"][layer], *registers[layer]]
        values += [found["sink_value_norm"][layer]] * (name == "value")
        rows.append([str(layer), *(f"{value:.3g}" for value in values)])
    return rows


_QUANTILE_NAMES = {0.0: "least", 0.5: "median", 1.0: "largest"}


def _model_section(seen: Inspection) -> Section:
    model, attention, data = seen.model, seen.model.attention, seen.config["data"]
    loss = seen.valid_loss
    heads = f"{model.num_heads} heads of {model.head_dim}"
    if model.kv_heads != model.num_heads:
        heads += f", {model.kv_heads} of keys and values"
    R = model.num_registers
    registers = f"{R}, at the start {_STARTS[model.register_init]}" if R else "none"
    rows = [
        ["", ""],
        ["run", f"`{seen.path}`"],
        ["checkpoint", f"step {seen.step:,} of {seen.config['train']['steps']:,}"],
        ["validation loss there", MISSING if loss is None else f"{loss:.4f} nats per token"],
        ["attention", variant(seen.config)],
        ["size", f"{model.num_layers} layers of width {model.d_model}, {heads}"],
        ["positions", model.positions],
        ["registers", registers],
        ["sink", attention.sink],
        ["window", "none" if attention.window is None else f"{attention.window} tokens back"],
        *(
            [f"{symbol} at the start", f"{v:.4g}, {how}"]
            for symbol, (v, how) in _starts(seen).items()
        ),
        ["text", f"{', '.join(data['train_files']) or data['source']}, {data['layout']}"],
        ["context", f"{data['context_length']} tokens ({data['tokenizer']})"],
        ["seed", str(seen.config["seed"])],
    ]
    text = (
        f"Looked at: the first {seen.rows:,} rows of the validation split, "
        f"{seen.text_tokens:,} tokens; padding does not count. One model of one seed: another seed "
        "puts other things into other heads."
    )
    return Section("The model, and the text", f"{markdown_table(rows)}\n\n{text}")


_STARTS = {"zero": "zero", "normal": "random"}


def _starts(seen: Inspection) -> dict[str, tuple[float, str]]:
    """γ and λ at the start, and how they went on from there."""
    attention = seen.model.attention
    words = {True: "learned for each head", False: "not learned"}
    weight = words[attention.learn_key_norm_weight]
    if steps := seen.config.get("optimizer", {}).get("anneal_steps"):
        weight = f"to 1 in {steps:,} steps"
    return {
        "γ": (attention.initial_gamma(seen.model.head_dim), words[attention.learn_gamma]),
        "λ": (attention.initial_key_norm_weight(), weight),
    }


def _heads_section(seen: Inspection) -> Section:
    uniform = seen.uniform
    text = [
        "Entropy of a token's attention, registers and sink included: 0 looks at one key only; "
        f"weights that are all the same would have {uniform['entropy']:.2f} nats here. Distance is "
        "the mean number of tokens that attention reaches back, over text, weighted by attention; "
        f"the same weights would have {uniform['distance']:.1f}. The first token is that of the "
        "token's own document (of its piece, where a document was cut). Darkest is all of the "
        "weight, or what weights that are all the same would have."
    ]
    if has_bound(seen):
        text.append(
            "The gate: the Triton kernel measures RBF's logits from the bound γ‖q‖²/λ, known "
            "before the first key. Rows too far below it are done a second time, with the whole "
            f"tile of 128 that they are in. Over all heads, {seen.numbers['gated'].mean():.2%} of "
            "the rows need that."
        )
    else:
        text.append("A dot product has no bound that is known before the keys, so no gate either.")
    drawn = inspection_figures.heads_figure(
        {name[:1].upper() + name[1:]: table for name, table in head_tables(seen).items()}
    )
    table = markdown_table(head_rows(seen))
    return Section("Heads", "\n\n".join([*text, table]), {"heads": drawn})


def _norms_section(seen: Inspection) -> Section:
    style = PALETTE[variant(seen.config)]
    text = (
        "Over text tokens and heads; those of first tokens and registers are means over heads. A "
        "sink that only takes weight has a value near zero (that of a virtual key is 0): the last "
        "column is its norm over that of the other text. A dot product can make a sink of a "
        "long key; RBF attention penalises long keys."
    )
    parts = [text]
    for name, symbol in (("key", "‖k‖"), ("value", "‖v‖")):
        parts += [f"**{symbol}**", markdown_table(norm_rows(seen, name))]
    figure = inspection_figures.norms_figure(seen.numbers, style)
    return Section("Norms of keys and values", "\n\n".join(parts), {"norms": figure})


def _gamma_section(seen: Inspection) -> Section:
    starts = _starts(seen)
    panels = {
        "γ": (seen.numbers["gamma"], *starts["γ"]),
        "λ": (seen.numbers["key_norm_weight"], *starts["λ"]),
    }
    figure = inspection_figures.gamma_figure(panels, PALETTE[variant(seen.config)])
    text = (
        "γ is the bandwidth (of a dot product, half its scale), λ the weight of the key norms: 1 "
        "is RBF attention, 0 the dot product. A layer's heads stand in order, from left to right."
    )
    return Section("γ and λ", text, {"gamma-lambda": figure})


def _maps_section(seen: Inspection) -> Section:
    document, R = seen.document, seen.model.num_registers
    sink = seen.model.attention.has_virtual_sink
    special = ["the sink"] * sink
    special += [f"the register{'s r0 to' * (R > 1)} r{R - 1}"] * bool(R)
    text = (
        f"The first {len(document.tokens)} tokens of the longest document in the first row. Rows "
        "are queries, columns are keys; grey: the future, which is masked."
    )
    if special:
        text += f" Left of the red line: {' and '.join(special)}."
    text += f" The tokens:\n\n````text\n{' '.join(document.tokens)}\n````"
    figure = figures.attention_figure(
        document.inside,
        document.tokens,
        f"{seen.path.name}, step {seen.step:,}",
        sink=sink,
    )
    return Section("Attention maps", text, {"attention": figure})


def _written_section(command: str, where: Mapping[str, Any]) -> Section:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    made = f"`{command}`, {where['date'][:10]}, on {where['device']}; {versions}."
    return Section("Written by", f"{made} The numbers are in [numbers.json](numbers.json).")
