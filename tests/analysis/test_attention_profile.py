import pytest

from experiments.benchmarks.contenders import BASELINE, MOSAIC, TRITON
from rbf_jax.analysis.attention_profile import STYLES, profile_figure
from rbf_jax.analysis.report import save_figure
from rbf_jax.analysis.style import PALETTE
from tests.harness.gpu_suite_content import COST, LENGTHS, failed, make_content


@pytest.fixture
def content():
    return make_content()


def lines(axes):
    return {
        line.get_label(): dict(zip(line.get_xdata(), line.get_ydata()))
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def notes(axes):
    return [text.get_text() for text in axes.texts]


def test_each_panel_draws_what_was_measured(content):
    forward, backward, memory = profile_figure(content).axes
    assert lines(forward).keys() == lines(backward).keys() == COST.keys()
    for name, cost in COST.items():
        expected = {T: cost * T / 1024 for T in LENGTHS}
        assert lines(forward)[name] == pytest.approx(expected)
        assert lines(backward)[name] == pytest.approx({T: 2.5 * expected[T] for T in expected})
    assert lines(memory).keys() == {row["implementation"] for row in content["memory"]}
    assert lines(memory)[TRITON][262144] == 16.0
    assert {axes.get_xscale() for axes in (forward, backward, memory)} == {"log"}
    assert {axes.get_yscale() for axes in (forward, backward, memory)} == {"log"}


def test_the_legend_names_all_once_and_styles_differ_without_colour(content):
    (legend,) = profile_figure(content).legends
    names = [text.get_text() for text in legend.get_texts()]
    assert sorted(names) == sorted({*COST, *(row["implementation"] for row in content["memory"])})
    assert len({(str(s.linestyle), s.marker) for s in STYLES.values()}) == len(STYLES)


def test_no_implementation_has_the_colour_or_marker_of_another_variant():
    assert STYLES[MOSAIC] == PALETTE["RBF"]
    assert STYLES[BASELINE] == PALETTE["dot product"]
    others = [style for name, style in STYLES.items() if name not in (MOSAIC, BASELINE)]
    for part in ("color", "marker"):
        taken = {getattr(style, part) for style in PALETTE.values()}
        assert not taken & {getattr(style, part) for style in others}


def test_only_the_head_dimension_and_causality_asked_for(content):
    for row in content["results"]:
        if (row["head_dim"], row["causal"]) == (128, False):
            row["milliseconds"] *= 10
    forward = profile_figure(content, head_dim=128, causal=False).axes[0]
    assert lines(forward)[BASELINE] == pytest.approx({T: 10 * T / 1024 for T in LENGTHS})
    with pytest.raises(ValueError, match=r"no time was measured at H = 32, causal = True; .*64"):
        profile_figure(content, head_dim=32)


def test_where_memory_runs_out_is_said(content):
    memory = profile_figure(content).axes[2]
    assert notes(memory).count("runs out") == 2
    assert max(lines(memory)["RBF reference"]) == 65536
    content["memory"] = [row for row in content["memory"] if not row["runs_out"]]
    assert "runs out" not in notes(profile_figure(content).axes[2])
    last = {"implementation": "RBF reference", "length": 65536, "bytes_limit": None}
    content["memory"].append(
        {**last, "error": "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory"}
    )
    assert "runs out beyond" in notes(profile_figure(content).axes[2])


def test_what_failed_leaves_a_gap(content):
    content["results"] = [
        failed(row, "broken") if row["implementation"] == TRITON and row["length"] == 512 else row
        for row in content["results"]
    ]
    forward, backward, _ = profile_figure(content).axes
    assert lines(forward)[TRITON].keys() == lines(backward)[TRITON].keys() == {4096}


def test_saved_twice_it_is_the_same_file(content, tmp_path):
    def saved(folder):
        return save_figure(profile_figure(content), tmp_path / folder, "f.v1", ("png", "svg"))

    first = [path.read_bytes() for path in saved("a")]
    again = saved("b")
    assert [path.name for path in again] == ["f.v1.png", "f.v1.svg"]
    assert [path.read_bytes() for path in again] == first
    assert first[0].startswith(b"\x89PNG")
    assert b"<svg" in first[1]
