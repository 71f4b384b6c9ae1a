import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from rbf_jax.analysis import inspection_figures, inspection_report, style
from rbf_jax.analysis.diagnostics import Inside
from rbf_jax.analysis.inspection_figures import HeadTable
from rbf_jax.analysis.models import Findings, Inspection
from tests.analysis.test_figures import line, pixels, ticks
from tests.harness.models import small_config
from tests.harness.synthetic import make_config

WHERE = {"device": "abacus", "versions": {"jax": "1.2"}, "date": "2026-01-02T03:04:05+00:00"}
L, N, K = 2, 4, 2
MODEL, NORMS = "The model, and the text", "Norms of keys and values"


def inspection(registers=1, attention=None, **changes):
    """Of two layers and four heads, all numbers different."""
    attention = attention or {"sink": "register" if registers else "none"}
    rng = np.random.default_rng(0)
    heads = ("entropy", "distance", "register_mass", "sink_mass", "first_token_mass", "gamma")
    found = {name: rng.uniform(0.1, 0.3, (L, N)) for name in (*heads, "gated_by_head")}
    if attention.get("sink") == "learned":
        found["sink_logits"] = rng.normal(size=(L, N))
    found["gated"] = found["gated_by_head"].mean(-1)
    found["key_norm_weight"] = np.full((L, N), float(attention.get("kind") != "dot"))
    found["sink_value_norm"] = rng.uniform(0.1, 0.3, L)
    for name in ("key", "value"):
        found[f"{name}_norm_quantiles"] = np.sort(rng.uniform(1, 5, (L, 9)))
        found[f"register_{name}_norm"] = rng.uniform(0.1, 0.5, (L, registers))
        found[f"first_token_{name}_norm"] = rng.uniform(1, 5, L)
    found["attention_map"] = np.ones((L, N, 3, registers + 3))
    weights = np.full((L, 1, N, 3, registers + 3), 0.1)
    inside = Inside(weights, np.ones((L, 1, registers + 3, K)))
    document = Findings(1200, inside, ["a", "␣b", "$c"], np.ones((L, 5)), np.ones((L, registers)))
    config = make_config(**{f"model__attention__{k}": v for k, v in attention.items()})
    return Inspection(
        path=Path("runs/x"),
        config=config,
        model=small_config(attention, num_registers=registers, **changes),
        step=1200,
        valid_loss=1.25,
        rows=3,
        text_tokens=1234,
        numbers=found,
        uniform={"entropy": 3.5, "distance": 20.25},
        document=document,
    )


def written(seen):
    parts = inspection_report.sections(seen, "the command", WHERE)
    return {part.title: part for part in parts}


# Every pair of two options.
@pytest.mark.parametrize(
    ("kind", "registers", "sink"),
    [
        ("rbf", 0, "none"),
        ("rbf", 1, "origin"),
        ("rbf", 4, "register"),
        ("dot", 0, "learned"),
        ("dot", 1, "register"),
        ("dot", 4, "origin"),
    ],
)
def test_sections_tell_of_what_a_model_has(kind, registers, sink):
    seen = inspection(registers, {"kind": kind, "sink": sink})
    parts = written(seen)
    assert [name for part in parts.values() for name in part.figures] == [
        "heads",
        "norms",
        "gamma-lambda",
        "attention",
    ]
    header = inspection_report.head_rows(seen)[0]
    assert ("weight on registers" in header) == (registers > 0)
    virtual = sink in ("origin", "learned")
    assert ("weight on sink" in header) == virtual
    assert ("sink logit" in header) == (sink == "learned")
    assert ("rows that need the gate" in header) == (kind == "rbf")
    assert ("A dot product has no bound" in parts["Heads"].text) == (kind == "dot")
    assert f"| sink | {sink} |" in parts[MODEL].text
    heads = parts["Heads"].figures["heads"]
    titles = [axes.get_title("left") for axes in heads.axes]
    assert [title.lower() for title in titles] == header[1 : header.index("γ")]
    maps = parts["Attention maps"]
    special = ["sink"] * virtual + [f"r{i}" for i in range(registers)]
    assert ("Left of the red line" in maps.text) == bool(special)
    named = {0: "The tokens", 1: "the register r0.", 4: "the registers r0 to r3."}
    assert named[registers] in maps.text
    assert "\na ␣b $c\n" in maps.text
    lowest = maps.figures["attention"].axes[(L - 1) * N]
    assert ticks(lowest.xaxis) == [*special, "a", "␣b", r"\$c"]
    labels = [text.get_text() for text in parts[NORMS].figures["norms"].legends[0].get_texts()]
    assert ("registers, each" in labels) == (registers > 0)


def test_what_the_sections_say():
    parts = written(inspection(attention={"learn_gamma": True, "gamma": 0.5, "window": 7}))
    text = parts[MODEL].text
    for row in (
        "| run | `runs/x` |",
        "| checkpoint | step 1,200 of 200 |",
        "| validation loss there | 1.2500 nats per token |",
        "| attention | RBF |",
        "| size | 2 layers of width 16, 4 heads of 4, 2 of keys and values |",
        "| registers | 1, at the start zero |",
        "| window | 7 tokens back |",
        "| γ at the start | 0.5, learned for each head |",
        "| λ at the start | 1, not learned |",
    ):
        assert row in text
    assert "first 3 rows of the validation split, 1,234 tokens" in text
    text = parts["Heads"].text
    assert "would have 3.50 nats here" in text
    assert "the same weights would have 20.2" in text
    gated = inspection().numbers["gated"].mean()
    assert f"{gated:.2%} of the rows need that" in text
    assert "`the command`, 2026-01-02, on abacus; jax 1.2." in parts["Written by"].text


def test_a_dial_is_not_called_learned():
    seen = inspection(attention={"key_norm_weight": 0.5, "learn_key_norm_weight": True})
    assert "| λ at the start | 0.5, learned for each head |" in written(seen)[MODEL].text
    seen.config["optimizer"] = {"anneal_steps": 2000}
    parts = written(seen)
    assert "| λ at the start | 0.5, to 1 in 2,000 steps |" in parts[MODEL].text
    _, axes = parts["γ and λ"].figures["gamma-lambda"].axes
    assert axes.get_title("left") == "λ, to 1 in 2,000 steps"


def test_head_rows():
    seen = inspection(attention={"sink": "learned"})
    header, *rows = inspection_report.head_rows(seen)
    assert [row[0] for row in rows] == [f"{layer}, {head}" for layer in (0, 1) for head in range(N)]
    for name, key, form in (
        ("entropy (nats)", "entropy", ".2f"),
        ("distance (tokens)", "distance", ".1f"),
        ("weight on registers", "register_mass", ".0%"),
        ("weight on sink", "sink_mass", ".0%"),
        ("weight on first token", "first_token_mass", ".0%"),
        ("rows that need the gate", "gated_by_head", ".1%"),
        ("γ", "gamma", ".4f"),
        ("λ", "key_norm_weight", ".3f"),
        ("sink logit", "sink_logits", ".3f"),
    ):
        column = [row[header.index(name)] for row in rows]
        assert column == [format(value, form) for value in seen.numbers[key].ravel()]


@pytest.mark.parametrize(("registers", "sinks"), [(0, "first tokens"), (2, "registers")])
def test_norm_rows(registers, sinks):
    seen = inspection(registers)
    header, *rows = inspection_report.norm_rows(seen, "value")
    quantiles = ["least", "1%", "5%", "25%", "median", "75%", "95%", "99%", "largest"]
    names = [f"register {r}" for r in range(registers)]
    ratio = f"{sinks} / other text"
    assert header == ["layer", *quantiles, "first tokens", *names, ratio]
    found = seen.numbers
    for layer, row in enumerate(rows):
        expected = [
            *found["value_norm_quantiles"][layer],
            found["first_token_value_norm"][layer],
            *found["register_value_norm"][layer],
            found["sink_value_norm"][layer],
        ]
        assert row == [str(layer), *(f"{value:.3g}" for value in expected)]
    assert inspection_report.norm_rows(seen, "key")[0] == header[:-1]


def test_numbers_are_all_but_the_maps():
    seen = inspection()
    found = json.loads(json.dumps(inspection_report.numbers(seen, "the command", WHERE)))
    assert found["numbers"].keys() == seen.numbers.keys() - {"attention_map"}
    for name, values in found["numbers"].items():
        np.testing.assert_allclose(values, seen.numbers[name])
    assert (found["step"], found["command"]) == (1200, "the command")
    assert (found["device"], found["document"]) == ("abacus", ["a", "␣b", "$c"])


def test_heads_figure():
    values = np.array([[0.0, 0.1, 0.5], [1.0, 0.9, 0.4]])
    tables = {"Share": HeadTable(values, ".0%", 1.0), "Number": HeadTable(4 * values, ".1f", 2.0)}
    figure = inspection_figures.heads_figure(tables)
    for axes, (title, table) in zip(figure.axes, tables.items(), strict=True):
        assert axes.get_title("left") == title
        (image,) = axes.images
        np.testing.assert_array_equal(image.get_array(), table.values)
        cells = {text.get_position(): text for text in axes.texts}
        for (layer, head), value in np.ndenumerate(table.values):
            assert cells[head, layer].get_text() == format(value, table.form)
        # White on dark and black on light.
        assert cells[0, 1].get_color() == "white"
        assert cells[0, 0].get_color() != "white"
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
    assert figure.axes[0].images[0].norm(0.25) == pytest.approx(0.5)
    assert figure.axes[1].images[0].norm(2.0) == pytest.approx(0.5)
    assert pixels(figure).std() > 10


@pytest.mark.parametrize(("heads", "columns"), [(8, 3), (12, 2), (32, 1)])
def test_numbers_fit_into_their_cells(heads, columns):
    tables = {str(i): HeadTable(np.full((2, heads), 100.0), ".1f", 1.0) for i in range(3)}
    figure = inspection_figures.heads_figure(tables)
    FigureCanvasAgg(figure).draw()
    assert len({round(axes.get_position().x0, 3) for axes in figure.axes}) == columns
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes[:heads]))
    assert boxes[0].y0 > boxes[heads].y1


def test_norms_figure():
    seen = inspection(registers=2)
    seen.numbers["value_norm_quantiles"][1, -1] = 1000.0
    figure = inspection_figures.norms_figure(seen.numbers, style.PALETTE["RBF"])
    for axes, name in zip(figure.axes, ("key", "value"), strict=True):
        quantiles = seen.numbers[f"{name}_norm_quantiles"]
        for place in (0, 4, 8):
            line(axes, np.arange(L) - 0.12, quantiles[:, place])
        line(axes, np.arange(L) + 0.06, seen.numbers[f"first_token_{name}_norm"])
        for norms in seen.numbers[f"register_{name}_norm"].T:
            assert line(axes, np.arange(L) + 0.2, norms).get_color() == style.REGISTER_COLOR
        bars = [np.array(lines.get_segments())[:, :, 1] for lines in axes.collections]
        np.testing.assert_allclose(bars[0], quantiles[:, [1, 7]])
        np.testing.assert_allclose(bars[1], quantiles[:, [3, 5]])
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log"]
    assert figure.axes[0].get_ylim()[0] == 0
    assert pixels(figure).std() > 10


def test_gamma_figure():
    values = np.random.default_rng(0).uniform(0.2, 0.4, (L, N))
    panels = {"γ": (values, 0.25, "learned"), "λ": (np.ones((L, N)), 1.0, "not learned")}
    figure = inspection_figures.gamma_figure(panels, style.PALETTE["RBF"])
    gamma, weight = figure.axes
    assert gamma.get_title("left") == "γ, learned"
    assert weight.get_title("left") == "λ, not learned"
    heads = [mark for mark in gamma.lines if mark.get_marker() == "o"]
    np.testing.assert_allclose([mark.get_ydata() for mark in heads], values)
    for layer, mark in enumerate(heads):
        assert (np.round(mark.get_xdata()) == layer).all()
    (start,) = {mark.get_ydata()[0] for mark in gamma.lines if mark.is_dashed()}
    assert start == 0.25
    assert [text.get_text() for text in gamma.texts] == list("0123") * L
    low, high = weight.get_ylim()
    assert low < 1 < high
    many = {"γ": (np.ones((7, 7)), 1.0, "")}
    (axes,) = inspection_figures.gamma_figure(many, style.PALETTE["RBF"]).axes
    assert not axes.texts
    assert pixels(figure).std() > 10
