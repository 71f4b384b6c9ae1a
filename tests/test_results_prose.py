"""Numbers in the text of docs/results.md and README.md are those of the kept records."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from rbf_jax.analysis import paired, records
from rbf_jax.analysis.comparison import steps_to_reach

REPOSITORY = Path(__file__).parents[1]
MATCHED, NORMED = "dot_scale=rbf,kind=dot", "kind=dot,qk_norm=True"
SINK, NO_REGISTER = "sink=origin", "sink=none"
DOT_WITHOUT = "kind=dot,sink=none,positions=rope"
NUMBER = r"([+−-]?\d[\d,]*(?:\.\d+)?)"


@functools.cache
def drawn(figure, text="results"):
    """What drawing returned; tests/test_results.py compares it with the records."""
    return json.loads((REPOSITORY / f"docs/figures/{text}/{figure}.json").read_text())


@functools.cache
def record(name, text="paper"):
    folder = REPOSITORY / "docs/measurements/experiments" / text
    return records.read_record(folder / f"{name}{records.SUFFIX}")


def interval(value, sign=1):
    """The mean and the ends of an interval, or of the opposite difference."""
    low, high = sorted(sign * value[end] for end in ("low", "high"))
    return [sign * value["mean"], low, high]


def estimate(values, sign=1):
    return interval(paired.as_numbers(paired.estimate(values)), sign)


def against(pair, text="results", key="final_difference", sign=1):
    """Of `loss_curves`; a pair is "A against B"."""
    return interval(drawn("loss_curves", text)["differences"][pair][key], sign)


def figure(name, *path, sign=1):
    value = drawn(name)
    for key in path:
        value = value[key]
    return interval(value, sign)


def rope_instead(reference, text):
    """What RoPE instead of SuSiE costs RBF more than the reference."""
    rbf, rbf_rope, other, other_rope = (
        paired.loss(record(name, text))
        for name in ("base", "positions=rope", reference, f"{reference},positions=rope")
    )
    return estimate((rbf_rope - rbf) - (other_rope - other))


def lost(name):
    by_length = record(name).lengths
    return by_length[2048] - by_length[256]


def earlier(reference, loss=1.8):
    """How many steps RBF has a loss before the reference, and when that has it, on average."""
    steps = record("base").valid["step"].astype(float)
    own, other = (
        np.array([steps_to_reach(steps, seed, loss) for seed in record(name).valid["loss"].T])
        for name in ("base", reference)
    )
    return [*estimate(other - own), other.mean()]


def gradients(key, rates=slice(None), sign=1):
    """Percent over the reference's, by learning rate."""
    found = [n[key] for n in drawn("stability").values() if key in n]
    return [sign * 100 * np.expm1(value) for v in found[rates] for value in interval(v)]


def logit(*names):
    return [drawn("stability")[name]["largest_logit"] for name in names]


def learned(name, what="key_norm_weight"):
    return [drawn("dial")[name][what][key] for key in ("mean", "least", "largest")]


def masses(name, *kinds):
    return [100 * drawn("registers")[name][kind] for kind in kinds]


def key_norms(name):
    """The least and the largest over layers: of registers' norms, of text's median."""
    found = drawn("key_norms")[name]
    middle = found["quantiles"].index(0.5)
    medians = [layer[middle] for layer in found["key_norm_quantiles"]]
    registers = [norm for layer in found["register_key_norm"] for norm in layer]
    return [min(registers), max(registers), min(medians), max(medians)]


def pace(*names):
    """Seconds of 100 steps of all seeds, behind the first 100."""
    spent = [record(name, "again").valid["seconds"] for name in names]
    return [(seconds[-1] - seconds[0]) / 19 for seconds in spent]


def hopper(direction, lengths):
    """The least and the largest time of the Mosaic kernels over cuDNN's dot product."""
    ratios = []
    for H in (64, 128):
        path = REPOSITORY / f"docs/measurements/bench_attention_h200_{H}.json"
        times = {
            (r["implementation"], r["length"], r["causal"]): r["milliseconds"]
            for r in json.loads(path.read_text())["results"]
            if r["direction"] == direction and r["length"] in lengths
        }
        ratios += [
            milliseconds / times["dot product, cuDNN", *cell]
            for (name, *cell), milliseconds in times.items()
            if name == "RBF mosaic"
        ]
    assert len(ratios) == 4 * len(lengths)
    return [min(ratios), max(ratios)]


HIGH_RATE = "final_learning_rate=0.0001,learning_rate=0.01"
SENTENCES = {
    "With RoPE 100 steps of four seeds take {} s for RBF and {} s for the dot product, "
    "with QK-norm and SuSiE {} s and {} s": lambda: pace(
        "positions=rope", "kind=dot,positions=rope", "qk_norm=True", NORMED
    ),
    "the reformulation takes {} to {} of the dot product's time forward and {} to {} "
    "forward + backward at T ≥ 4,096": lambda: [
        *hopper("forward", (4096, 16_384)),
        *hopper("forward+backward", (4096, 16_384)),
    ],
    "forward + backward at T ≥ 4,096 takes {} to {} of the time of cuDNN's": lambda: hopper(
        "forward+backward", (4096, 16_384)
    ),
    "Without a register RBF's loss is {} nats higher [{}, {}]": lambda: figure(
        "registers", NO_REGISTER, "final_difference"
    ),
    "does as well without any register ({} [{}, {}] against one register)": lambda: figure(
        "registers", SINK, "final_difference"
    ),
    "A register takes {} % of the attention where an even share would be {} %; "
    "an origin sink takes {} %": lambda: [
        *masses("base", "register_mass", "even_share"),
        *masses(SINK, "sink_mass"),
    ],
    "it takes {} %, where its even share is {} %": lambda: masses(
        NO_REGISTER, "first_token_mass", "even_share"
    ),
    "A dot product without a register loses {}, in an interval that leaves it open [{}, {}]; "
    "its register takes {} %": lambda: [
        *figure("registers", DOT_WITHOUT, "final_difference"),
        *masses("kind=dot,positions=rope", "register_mass"),
    ],
    "RoPE cannot be told from SuSiE for distances: {} [{}, {}]": lambda: figure(
        "positions", "positions=rope", "less_susie"
    ),
    "RBF with RoPE ends {} [{}, {}] above RBF with SuSiE, and {} [{}, {}] above the dot product "
    "with RoPE, while RBF with SuSiE ends {} below": lambda: [
        *against("positions=rope against base", "wikitext"),
        *against("positions=rope against kind=dot,positions=rope", "wikitext"),
        against("base against kind=dot", "wikitext", sign=-1)[0],
    ],
    "by {} [{}, {}], or by {} [{}, {}] for the dot product of RBF's scale; TinyStories leaves "
    "both open ({} [{}, {}] and {} [{}, {}])": lambda: [
        number
        for text in ("wikitext", "paper")
        for reference in ("kind=dot", MATCHED)
        for number in rope_instead(reference, text)
    ],
    "Learned positions cost RBF {}, none {}, ALiBi {} [{}, {}]; with ALiBi RBF is {} [{}, {}] "
    "below the dot product": lambda: [
        figure("positions", "positions=learned", "less_susie")[0],
        figure("positions", "positions=none", "less_susie")[0],
        *figure("positions", "positions=alibi", "less_susie"),
        *figure("positions", "positions=alibi", "final_difference", sign=-1),
    ],
    "a third of the difference with SuSiE ({} [{}, {}] of {})": lambda: [
        *estimate(lost("kind=dot") - lost(MATCHED)),
        figure("lengths", "kind=dot", "rbf_less", sign=-1)[0],
    ],
    "by at least {} [{}, {}], which is against RoPE with QK-norm": lambda: figure(
        "lengths", f"{NORMED},positions=rope", "rbf_less", sign=-1
    ),
    "next to nothing to lose: {} and {}, RBF {} [{}, {}] more": lambda: [
        figure("lengths", "positions=alibi", "lost")[0],
        figure("lengths", "kind=dot,positions=alibi", "lost")[0],
        *figure("lengths", "kind=dot,positions=alibi", "rbf_less"),
    ],
    "RBF is {} [{}, {}] of 2,000 steps ahead of the dot product, and {} [{}, {}] ahead": lambda: [
        *against("base against kind=dot", key="steps_saved"),
        *against(f"base against {MATCHED}", key="steps_saved"),
    ],
    "a loss of 1.8 it has {} [{}, {}] of {} steps before the first, and {} [{}, {}] of {} before "
    "the second": lambda: [*earlier("kind=dot"), *earlier(MATCHED)],
    "lower at 0.03. The largest norm of those steps is {} % lower": lambda: [
        gradients("log_largest_less_dot", slice(2, 3), sign=-1)[0]
    ],
    "then {} % higher at 0.01 and {} % [{}, {}] lower at 0.03": lambda: [
        gradients("log_gradient_less_matched", slice(3, 4))[0],
        *(gradients("log_gradient_less_matched", slice(4, 5), sign=-1)[i] for i in (0, 2, 1)),
    ],
    "the same at 0.003 ({} and {}; {} for the dot product at RBF's scale), not at 0.01 ({} and {}; "
    "{})": lambda: logit(
        "base",
        "kind=dot",
        MATCHED,
        HIGH_RATE,
        f"kind=dot,{HIGH_RATE}",
        f"{MATCHED},{HIGH_RATE}",
    ),
    "RBF ends {} nats below the dot product; with QK-norm": lambda: [
        drawn("sensitivity")["dot product"]["by_rate"]["0.03"]
        - drawn("sensitivity")["RBF"]["by_rate"]["0.03"]
    ],
    "*and* QK-norm, {}, then": lambda: [
        drawn("loss_curves")["records"]["qk_norm=True,positions=rope"]["final_loss"]["mean"]
    ],
    "dot product at 2/√H is *better* than RBF, by {} [{}, {}]": lambda: against(
        f"base against {MATCHED}", "wikitext"
    ),
    "better than RBF with SuSiE by {} [{}, {}]. QK-norm costs RBF {} [{}, {}] with SuSiE; with "
    "RoPE it gains {} [{}, {}]": lambda: [
        *against(f"base against {NORMED},positions=rope", "wikitext"),
        *estimate(
            paired.loss(record("qk_norm=True", "wikitext"))
            - paired.loss(record("base", "wikitext"))
        ),
        *estimate(
            paired.loss(record("positions=rope", "wikitext"))
            - paired.loss(record("qk_norm=True,positions=rope", "wikitext"))
        ),
    ],
    "to λ = 1 the loss falls by {} nats [{}, {}]": lambda: figure(
        "dial", "key_norm_weight=0", "final_difference"
    ),
    "moves from 0 to {} on average ({} to {} by head) and from 1 to {} ({} to {}); from 0 it ends "
    "{} [{}, {}] above": lambda: [
        *learned("key_norm_weight=0,learn_key_norm_weight=True"),
        *learned("learn_key_norm_weight=True"),
        *figure("dial", "key_norm_weight=0,learn_key_norm_weight=True", "final_difference"),
    ],
    "fixed λ = γ√H = 1, by {} [{}, {}]": lambda: figure(
        "dial", "learn_gamma=True,learn_key_norm_weight=True", "final_difference", sign=-1
    ),
    "in every layer ({} to {}, the median key of text {} to {})": lambda: key_norms("base"),
    "rate too, the gain is {} [{}, {}] and {} [{}, {}], which leaves": lambda: [
        number
        for kind in ("dot product, RBF's scale", "dot product + QK-norm")
        for number in figure("sensitivity", "RBF", "best_less", kind, sign=-1)
    ],
    "trained at 0.003 alone, it cannot be told ({} [{}, {}])": lambda: against(
        f"base against {NORMED},positions=rope"
    ),
    "no help to RBF: {} [{}, {}] at the best rates on TinyStories, {} [{}, {}] worse": lambda: [
        *figure("sensitivity", "RBF + QK-norm", "best_less", "dot product + QK-norm"),
        *against(f"qk_norm=True against {NORMED}", "wikitext"),
    ],
}
IN_README = {
    "RBF attention ends {} nats below the dot product": lambda: [
        against("base against kind=dot", sign=-1)[0]
    ],
    "has a loss of 1.8 {} of {} steps earlier": lambda: [
        earlier("kind=dot")[0],
        earlier("kind=dot")[-1],
    ],
}


def quoted(sentence, file):
    """The numbers of a sentence, as they are written."""
    text = " ".join((REPOSITORY / file).read_text().split())
    found = re.findall(re.escape(sentence).replace(r"\{\}", NUMBER), text)
    assert len(found) == 1, f"{file} does not say once: {sentence}"
    return [found[0]] if isinstance(found[0], str) else list(found[0])


@pytest.mark.parametrize(
    ("file", "sentence"),
    [*(("docs/results.md", s) for s in SENTENCES), *(("README.md", s) for s in IN_README)],
)
def test_numbers_in_sentences(file, sentence):
    written = quoted(sentence, file)
    measured = {**SENTENCES, **IN_README}[sentence]()
    assert len(written) == len(measured)
    for text, value in zip(written, measured):
        number = float(text.replace("−", "-").replace(",", ""))
        digits = len(text.partition(".")[2])
        assert abs(number - value) <= 0.5001 * 10**-digits, f"{text}: {value} was measured"


def final(name, text):
    return record(name, text).valid["loss"][-1]


def of_four_seeds(values):
    """Mean and 95 % interval; not by the code that draws."""
    assert values.shape == (4,)
    half = 3.182446 * values.std(ddof=1) / 2  # Student's t, 3 degrees of freedom.
    return values.mean(), values.mean() - half, values.mean() + half


@pytest.mark.parametrize(("text", "figures"), [("paper", "results"), ("wikitext", "wikitext")])
def test_drawn_differences_are_those_of_the_records(text, figures):
    differences = drawn("loss_curves", figures)["differences"]
    assert len(differences) > 10
    for pair, numbers in differences.items():
        own, other = pair.split(" against ")
        found = [numbers["final_difference"][key] for key in ("mean", "low", "high")]
        expected = of_four_seeds(final(own, text) - final(other, text))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
