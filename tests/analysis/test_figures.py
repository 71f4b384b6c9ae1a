import io

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from rbf_jax.analysis import figures, style
from rbf_jax.analysis.diagnostics import Inside
from rbf_jax.analysis.runs import read_run, read_runs
from tests.harness.synthetic import make_config, make_rows, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    learned = {
        "model__attention__learn_gamma": True,
        "model__attention__learn_key_norm_weight": True,
    }
    write_run(folder / "rbf", make_rows(slope=0.015, heads=4), make_config(**learned))
    dot = make_config(model__attention__kind="dot")
    write_run(folder / "$dot$_run", make_rows(slope=0.01, spike=40, heads=4), dot)
    return read_runs([folder / "rbf", folder / "$dot$_run"])


@pytest.fixture(scope="module")
def inside():
    """2 layers, 3 heads, 2 registers, 4 tokens, some weight missing to 1."""
    rng = np.random.default_rng(0)
    weights = np.tril(rng.uniform(0.5, 1.0, (2, 1, 3, 4, 6)), 2)
    weights *= 0.8 / weights.sum(-1, keepdims=True)
    return Inside(weights.astype(np.float32), rng.uniform(size=(2, 1, 6, 3)).astype(np.float32))


def line(axes, x, y):
    """The line of `axes` that runs through exactly these points."""
    found = [
        line
        for line in axes.lines
        if len(line.get_xdata()) == len(x)
        and np.allclose(line.get_xdata(), x)
        and np.allclose(line.get_ydata(), y)
    ]
    assert len(found) == 1
    return found[0]


def pixels(figure):
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=40)
    return np.asarray(Image.open(content).convert("L"))


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_loss_figure_draws_the_metrics(runs):
    figure = figures.loss_figure(runs)
    by_step, by_time, difference = figure.axes
    rbf, dot = style.line_styles([run.config for run in runs])
    for run, look in zip(runs, (rbf, dot)):
        thick = line(by_step, run.valid["step"], run.valid["loss"])
        assert (thick.get_color(), thick.get_marker()) == (look.color, look.marker)
        line(by_time, run.valid["seconds"], run.valid["loss"])
        thin = line(by_step, run.train["step"], figures.smooth(run.train["loss"]))
        assert thin.get_color() == look.color
        assert thin.get_linewidth() < thick.get_linewidth()
    expected = runs[1].valid["loss"] - runs[0].valid["loss"]
    line(difference, runs[0].valid["step"], expected)
    assert by_step.get_ylabel() == "loss (nats per token)"
    assert by_time.get_xlabel() == "training time (seconds)"
    # The first training losses, near 3, lie above the first validations.
    assert by_step.get_ylim()[1] < 2.9
    assert pixels(figure).std() > 10


def test_loss_figure_of_another_metric(runs):
    figure = figures.loss_figure(runs, "bits_per_byte")
    line(figure.axes[0], runs[0].valid["step"], runs[0].valid["bits_per_byte"])
    assert len(figure.axes[0].lines) == 2  # Training has no bits per byte.
    assert figure.axes[0].get_ylabel() == "bits per byte"


def test_loss_figure_without_any_validation(tmp_path):
    rows = [row for row in make_rows() if row["split"] == "train"]
    young = read_runs([write_run(tmp_path / name, rows) for name in "ab"])
    assert pixels(figures.loss_figure(young)).std() > 10


@pytest.mark.parametrize(("seconds", "unit"), [(1, "seconds"), (100, "minutes"), (1000, "hours")])
def test_time_has_a_unit_that_suits(tmp_path, seconds, unit):
    rows = [{"step": s, "split": "train", "loss": 1.0, "seconds": s * seconds} for s in range(20)]
    young = read_runs([write_run(tmp_path / name, rows) for name in "ab"])
    assert figures.loss_figure(young).axes[1].get_xlabel() == f"training time ({unit})"


def test_stability_figure(runs):
    figure = figures.stability_figure(runs)
    keys = ["grad_norm", "logit_max", "key_norm_max", "register_norm"]
    for axes, key in zip(figure.axes, keys, strict=True):
        for run in runs:
            values = run.train[key]
            assert any(np.allclose(line.get_ydata(), values) for line in axes.lines)
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "linear", "linear"]
    assert pixels(figure).std() > 10


def test_stability_figure_has_panels_for_what_was_logged(tmp_path):
    rows = [{"step": s, "split": "train", "loss": 1.0, "grad_norm": 2.0} for s in range(3)]
    some = read_runs([write_run(tmp_path / name, rows) for name in "ab"])
    (axes,) = figures.stability_figure(some).axes
    assert axes.get_title("left") == "Gradient norm"
    assert axes.get_yscale() == "linear"  # On a logarithmic one there would be hardly a tick.
    rows = [{"step": s, "split": "train", "loss": 1.0} for s in range(3)]
    none = read_runs([write_run(tmp_path / name, rows) for name in "cd"])
    assert figures.stability_figure(none) is None


def test_learned_figure(runs):
    figure = figures.learned_figure(runs)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["γ, layer 0", "γ, layer 1", "λ, layer 0", "λ, layer 1"]
    values = runs[0].train["key_norm_weight/1"]
    assert values.shape[1] == 4
    for head in values.T:
        assert any(np.allclose(line.get_ydata(), head) for line in figure.axes[3].lines)
    line(figure.axes[3], runs[0].train["step"], values.mean(1))
    assert len(figure.axes[3].lines) == 5  # The other run logs λ too, but does not learn it.
    assert figures.learned_figure(runs[1:]) is None


def test_learned_sinks_are_drawn_beside_gamma_and_lambda(tmp_path):
    rows = [dict(row, **{"sink_logits/0": [0.0, 0.1 * row["step"]]}) for row in make_rows()]
    config = make_config(model__attention__sink="learned")
    run = read_run(write_run(tmp_path / "a", rows, config))
    (axes,) = figures.learned_figure([run]).axes
    assert axes.get_title("left") == "sink's logit, layer 0"
    assert len(axes.lines) == 3


def test_the_legend_shows_runs_as_they_are_drawn(tmp_path):
    learned = make_config(model__attention__learn_gamma=True)
    folders = [
        write_run(tmp_path / name, make_rows(heads=4), config)
        for name, config in (("a", make_config()), ("b", learned))
    ]
    figure = figures.learned_figure(read_runs(folders))
    (drawn,) = {line.get_marker() for line in figure.axes[0].lines} - {"None"}
    shown = figure.legends[0].get_lines()[0]
    assert shown.get_marker() == drawn != style.PALETTE["RBF"].marker


def test_attention_figure(inside):
    figure = figures.attention_figure(inside, ["a", "b", "␣", "$d$"], "x", sink=True)
    panels = np.array([axes for axes in figure.axes if axes.images]).reshape(2, 3)
    drawn = np.ma.filled(panels[1, 2].images[0].get_array(), np.nan)
    expected = inside.attention_weights[1, 0, 2]
    np.testing.assert_allclose(drawn[:, 0], 0.2, atol=1e-6)
    np.testing.assert_array_equal(drawn[:, 1:3], expected[:, :2])
    later = np.triu(np.ones((4, 4), bool), 1)
    np.testing.assert_array_equal(drawn[:, 3:], np.where(later, np.nan, expected[:, 2:]))
    assert ticks(panels[1, 0].xaxis) == ["sink", "r0", "r1", "a", "b", "␣", r"\$d\$"]
    assert ticks(panels[1, 0].yaxis) == ["a", "b", "␣", r"\$d\$"]
    assert panels[0, 0].xaxis.get_ticklabels() == []
    colors = [label.get_color() for label in panels[1, 0].xaxis.get_ticklabels()]
    assert colors[:3] == [style.REGISTER_COLOR] * 3
    assert style.REGISTER_COLOR not in colors[3:]
    assert panels[1, 0].lines[0].get_xdata()[0] == 2.5
    assert pixels(figure).std() > 10


def test_attention_figure_without_sink_and_with_too_many_tokens(inside):
    weights = np.full((1, 1, 8, 100, 101), 0.01, np.float32)
    many = Inside(weights, np.ones((1, 1, 101, 8), np.float32))
    axes = figures.attention_figure(many, ["a"] * 100, "x").axes[0]
    assert ticks(axes.xaxis) == ["r0", "0", "25", "50", "75"]
    np.testing.assert_array_equal(axes.get_xticks(), [0, 1, 26, 51, 76])
    np.testing.assert_array_equal(axes.get_yticks(), [0, 25, 50, 75])


def test_attention_figure_names_registers_together_where_they_are_many(inside):
    weights = np.full((1, 1, 12, 40, 43), 1 / 43, np.float32)
    many = Inside(weights, np.ones((1, 1, 43, 12), np.float32))
    axes = figures.attention_figure(many, ["a"] * 40, "x", sink=True).axes[0]
    assert ticks(axes.xaxis) == ["sink…r2", "0", "10", "20", "30"]
    np.testing.assert_array_equal(axes.get_xticks(), [1.5, 4, 14, 24, 34])


def test_key_norm_figure(runs):
    rng = np.random.default_rng(0)
    text = [rng.normal(5, 1, (2, 50)), rng.normal(8, 1, (2, 50))]
    registers = [np.array([[0.1, 0.2], [0.3, 0.4]]), np.zeros((2, 0))]
    figure = figures.key_norm_figure(runs, text, registers)
    (axes,) = figure.axes
    medians = [line.get_ydata() for line in axes.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(medians, np.median(text, axis=2))
    marks = [line.get_ydata() for line in axes.lines if line.get_marker() == "D"]
    np.testing.assert_allclose(marks, registers[0].T)
    hatches = [body.get_hatch() for body in axes.collections if body.get_hatch()]
    looks = style.line_styles([run.config for run in runs])
    assert hatches == [look.hatch for look in looks for _ in range(2)]
    assert "register tokens, one a head" in [t.get_text() for t in figure.legends[0].get_texts()]
    assert pixels(figure).std() > 10


def test_smooth():
    values = np.zeros(100)
    values[50] = 100.0
    assert figures.smooth(values).max() == 0.0
    few = np.array([1.0, 9.0, 2.0, 3.0])
    np.testing.assert_array_equal(figures.smooth(few), [1.0, 2.0, 3.0, 3.0])
    ramp = np.arange(100.0)
    np.testing.assert_allclose(figures.smooth(ramp), ramp)
    noise = np.random.default_rng(0).normal(size=1000)
    assert figures.smooth(noise).std() < 0.5
    np.testing.assert_array_equal(figures.smooth(np.array([1.0, np.nan, 3.0])), [1.0, np.nan, 3.0])
    assert figures.smooth(np.array([])).shape == (0,)


def test_names_are_drawn_as_they_are_where_the_font_can():
    assert figures.plain("$x$") == r"\$x\$"
    assert figures.plain("_x") == " _x"
    assert figures.plain("é␣狐\x00\ufffd") == "é␣□□\ufffd"


def test_the_users_own_settings_are_left_alone(runs):
    before = dict(mpl.rcParams)
    figures.loss_figure(runs)
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "RBF"),
        ({"qk_norm": True}, "RBF + QK-norm"),
        ({"key_norm_weight": 0.5}, "RBF, dial"),
        ({"learn_key_norm_weight": True}, "RBF, dial"),
        ({"kind": "dot"}, "dot product"),
        ({"kind": "dot", "dot_scale": "rbf"}, "dot product, RBF's scale"),
        ({"kind": "dot", "qk_norm": True}, "dot product + QK-norm"),
    ],
)
def test_variant(changes, expected):
    changes = {f"model__attention__{key}": value for key, value in changes.items()}
    assert style.variant(make_config(**changes)) == expected


def test_styles_can_be_told_apart():
    config = make_config()
    first, second, third = style.line_styles([config, make_config(seed=1), config])
    assert first == style.PALETTE["RBF"]
    assert {first.color} == {second.color, third.color}
    assert len({first.marker, second.marker, third.marker}) == 3
    for part in ("color", "linestyle", "marker"):
        assert len({getattr(look, part) for look in style.PALETTE.values()}) == len(style.PALETTE)
    # In grey.
    lightness = sorted(
        np.dot(mpl.colors.to_rgb(look.color), (0.299, 0.587, 0.114))
        for look in style.PALETTE.values()
    )
    assert np.diff(lightness).min() > 0.06
