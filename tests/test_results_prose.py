"""Numbers in the text of docs/results.md and README.md are those of the kept records."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from rbf_jax.analysis import records
from rbf_jax.analysis.comparison import steps_to_reach

REPOSITORY = Path(__file__).parents[1]
MATCHED, NORMED = "dot_scale=rbf,kind=dot", "kind=dot,qk_norm=True"
NUMBER = r"([+−-]?\d[\d,]*(?:\.\d+)?)"
INTERVAL = re.compile(rf"{NUMBER}(?: nats)?(?: %)? \[{NUMBER}, {NUMBER}\]")
# Of runs that were made again and are not kept.
NOT_KEPT = {("−0.010", "−0.017", "−0.004"), ("144", "−49", "337")}


@functools.cache
def drawn(figure, text="results"):
    """What drawing returned; tests/test_results.py compares it with the records."""
    return json.loads((REPOSITORY / f"docs/figures/{text}/{figure}.json").read_text())


@functools.cache
def record(name, text="paper"):
    folder = REPOSITORY / "docs/measurements/experiments" / text
    return records.read_record(folder / f"{name}{records.SUFFIX}")


def final(name, text="paper"):
    return record(name, text).valid["loss"][-1]


def interval(values):
    """Mean and 95 % interval of four seeds; not by the code that draws."""
    assert values.shape == (4,)
    half = 3.182446 * values.std(ddof=1) / 2  # Student's t, 3 degrees of freedom.
    return values.mean(), values.mean() - half, values.mean() + half


def prose(file):
    """A page's text without its tables, which tests/test_results.py compares."""
    lines = (REPOSITORY / file).read_text().splitlines()
    return " ".join(" ".join(line for line in lines if not line.startswith("|")).split())


def as_written(text, value):
    """Whether a number, rounded to the digits of `text`, is the one written there."""
    digits = len(text.partition(".")[2])
    return abs(float(text.replace("−", "-").replace(",", "")) - value) <= 0.5001 * 10**-digits


@pytest.mark.parametrize(("text", "figures"), [("paper", "results"), ("wikitext", "wikitext")])
def test_drawn_differences_are_those_of_the_records(text, figures):
    differences = drawn("loss_curves", figures)["differences"]
    assert len(differences) > 10
    for pair, numbers in differences.items():
        own, other = pair.split(" against ")
        found = [numbers["final_difference"][key] for key in ("mean", "low", "high")]
        expected = interval(final(own, text) - final(other, text))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def intervals_in(content, percent=False):
    """Every (mean, low, high) of a drawing; differences of logarithms as percentages too."""
    if isinstance(content, list):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        return
    found = [content.get(key) for key in ("mean", "low", "high")]
    if None not in found:
        yield tuple(found)
        if percent:
            yield tuple(100 * np.expm1(found))
    for key, value in content.items():
        yield from intervals_in(value, str(key).startswith("log_"))


def rope_instead(reference, text):
    """What RoPE instead of SuSiE costs RBF more than the reference."""
    cost, others = (
        final(rope, text) - final(susie, text)
        for susie, rope in (
            ("base", "positions=rope"),
            (reference, f"{reference},positions=rope"),
        )
    )
    return cost - others


def lost(name):
    by_length = record(name).lengths
    return by_length[2048] - by_length[256]


def reached(name, loss=1.8):
    """Steps until each seed has the loss."""
    steps = record(name).valid["step"].astype(float)
    return np.array([steps_to_reach(steps, seed, loss) for seed in record(name).valid["loss"].T])


@functools.cache
def measured():
    """Intervals of all figures, and of what no figure shows; either sign."""
    texts = (("paper", "kind=dot"), ("paper", MATCHED), ("wikitext", "kind=dot"))
    computed = [
        *(rope_instead(reference, text) for text, reference in (*texts, ("wikitext", MATCHED))),
        *(reached(name) - reached("base") for name in ("kind=dot", MATCHED)),
        lost("kind=dot") - lost(MATCHED),
        final("qk_norm=True", "wikitext") - final("base", "wikitext"),
        final("qk_norm=True,positions=rope", "wikitext") - final("positions=rope", "wikitext"),
    ]
    found = [interval(values) for values in computed]
    for path in (REPOSITORY / "docs/figures").glob("*/*.json"):
        found += intervals_in(json.loads(path.read_text()))
    return [*found, *((-mean, -high, -low) for mean, low, high in found)]


def test_every_interval_in_the_text_was_measured():
    tables = (REPOSITORY / "docs/measurements/experiments/length/length.md").read_text()
    elsewhere = {x.groups() for x in INTERVAL.finditer(tables.replace("-", "−"))}
    written = [x.groups() for x in INTERVAL.finditer(prose("docs/results.md"))]
    assert len(written) > 20
    unknown = [
        texts
        for texts in written
        if texts not in NOT_KEPT | elsewhere
        and not any(all(map(as_written, texts, values)) for values in measured())
    ]
    assert not unknown


def hopper(direction):
    """The least and the largest time of the Mosaic kernels over cuDNN's at T ≥ 4,096."""
    ratios = []
    for H in (64, 128):
        path = REPOSITORY / f"docs/measurements/bench_attention_h200_{H}.json"
        times = {
            (r["implementation"], r["length"], r["causal"]): r["milliseconds"]
            for r in json.loads(path.read_text())["results"]
            if r["direction"] == direction and r["length"] in (4096, 16_384)
        }
        for (name, *cell), milliseconds in times.items():
            if name == "RBF mosaic":
                ratios.append(milliseconds / times["dot product, cuDNN", *cell])
    assert len(ratios) == 8
    return [min(ratios), max(ratios)]


def masses(name, *kinds):
    return [100 * record(name).inside[kind].mean() for kind in kinds]


def learned(name):
    """The mean, the least and the largest over seeds and heads."""
    values = record(name).inside["key_norm_weight"]
    return [values.mean(), values.min(), values.max()]


def gain():
    return [(final("kind=dot") - final("base")).mean()]


# The numbers that the rest hangs on, by the words around them.
SENTENCES = {
    ("README.md", "RBF attention ends {} nats below the dot product"): gain,
    ("README.md", "has a loss of 1.8 {} of {} steps earlier"): lambda: [
        (reached("kind=dot") - reached("base")).mean(),
        reached("kind=dot").mean(),
    ],
    ("docs/results.md", "with SuSiE RBF gains {}, at the best"): gain,
    ("docs/results.md", "takes {} to {} of the time of cuDNN's"): lambda: hopper(
        "forward+backward"
    ),
    ("docs/results.md", "takes {} to {} of the dot product's time forward"): lambda: hopper(
        "forward"
    ),
    ("docs/results.md", "register takes {} % of the attention where an even share would be {} %"): (
        lambda: masses("base", "register_mass", "even_share")
    ),
    ("docs/results.md", "an origin sink takes {} %"): lambda: masses(
        "origin_sink=True,num_registers=0", "sink_mass"
    ),
    ("docs/results.md", "RBF loses {} nats with SuSiE and {} with RoPE"): lambda: [
        lost("base").mean(),
        lost("positions=rope").mean(),
    ],
    ("docs/results.md", "dot product loses {} and {}. Two controls"): lambda: [
        lost("kind=dot").mean(),
        lost("kind=dot,positions=rope").mean(),
    ],
    ("docs/results.md", "A learned λ moves from 0 to {} on average ({} to {} by head)"): (
        lambda: learned("key_norm_weight=0,learn_key_norm_weight=True")
    ),
}


@pytest.mark.parametrize(("file", "sentence"), SENTENCES)
def test_numbers_in_sentences(file, sentence):
    (found,) = re.findall(re.escape(sentence).replace(r"\{\}", NUMBER), prose(file))
    written = [found] if isinstance(found, str) else found
    values = SENTENCES[file, sentence]()
    assert len(written) == len(values)
    assert all(map(as_written, written, values)), f"{written}: {values} was measured"
