"""Figures of the claims, drawn from records that no training made."""

import importlib
import json

import numpy as np
import pytest
from matplotlib.colors import same_color

from configs.figures import scales
from rbf_jax.analysis import claims, paired, variants
from rbf_jax.analysis.claims import operation, panels, verdicts
from rbf_jax.analysis.claims.lengths import lengths_table
from rbf_jax.analysis.report import jsonable
from rbf_jax.analysis.style import PALETTE
from tests.harness.synthetic_records import make_records

BASE = scales.get_config("smoke").to_dict()
TRAINED = [claim for claim in claims.FIGURES.values() if claim.trained]


def needed(claim, scale="paper"):
    figure = importlib.import_module(f"configs.figures.{claim.trained}").get_config(scale)
    return variants.variants(figure.to_dict(), BASE)


@pytest.mark.parametrize("claim", TRAINED, ids=lambda claim: claim.name)
def test_every_variant_is_in_the_numbers_of_its_figure(claim, tmp_path):
    records = make_records(needed(claim), tmp_path)
    made, numbers = claim.draw(list(records.values()))
    made.savefig(tmp_path / "figure.png")
    text = json.dumps(jsonable(numbers))
    assert "NaN" not in text
    assert "Infinity" not in text
    if claim.name in ("registers", "lengths", "dial", "stability"):
        assert numbers.keys() == records.keys()
    if claim.name == "positions":
        assert len(numbers) == 2 * len(panels.POSITIONS)
        assert not {name for name in numbers if "dot_scale" in name or "qk_norm" in name}


@pytest.mark.parametrize("claim", TRAINED, ids=lambda claim: claim.name)
def test_seeds_that_diverge_and_variants_that_lack_do_not_stop_a_figure(claim, tmp_path):
    every = needed(claim)
    some, lost = every[: max(2, len(every) // 2)], every[1].name
    records = make_records(some, tmp_path, **{lost: {"diverged": (0, 1, 2, 3)}})
    made, _ = claim.draw(list(records.values()))
    made.savefig(tmp_path / "figure.png")


def test_every_claim_is_judged_at_the_smallest_scale(tmp_path):
    """It trains fewer variants: all those that verdicts look for."""
    numbers = {}
    for claim in claims.FIGURES.values():
        records = make_records(needed(claim, "smoke"), tmp_path) if claim.trained else {}
        _, numbers[claim.name] = claim.draw(list(records.values()))
    judged = verdicts.verdicts(numbers)
    assert len(judged) == 7
    assert not [v for v in judged if "not measured:" in v.measured]


def test_differences_are_those_of_the_records(tmp_path):
    records = make_records(
        needed(claims.FIGURES["registers"]), tmp_path, **{"sink=none": {"offset": 0.07}}
    )
    _, numbers = claims.FIGURES["registers"].draw(list(records.values()))
    found = numbers["sink=none"]
    assert found["reference"] == "base"
    assert found["final_difference"]["mean"] == pytest.approx(0.07)
    assert found["spikes_difference"]["mean"] == found["spikes"]["mean"] == 0
    mass = records["sink=none"].inside["first_token_mass"].mean()
    assert found["first_token_mass"] == pytest.approx(mass)


def test_variants_have_their_colours_everywhere(tmp_path):
    for name in ("loss_curves", "sensitivity", "stability", "lengths"):
        claim = claims.FIGURES[name]
        made, _ = claim.draw(list(make_records(needed(claim), tmp_path).values()))
        (legend,) = made.legends
        for text, line in zip(legend.get_texts(), legend.get_lines()):
            style = PALETTE[text.get_text()]
            assert same_color(line.get_color(), style.color)
            assert line.get_marker() == style.marker


def test_sensitivity_compares_each_at_its_best_rate(tmp_path):
    claim = claims.FIGURES["sensitivity"]
    changes = {
        "final_learning_rate=0.0001,learning_rate=0.01": {"offset": -0.2},
        "kind=dot,final_learning_rate=3e-06,learning_rate=0.0003": {"offset": -0.1},
        # The least loss of all, but for two seeds alone.
        "kind=dot,final_learning_rate=0.0003,learning_rate=0.03": {
            "diverged": (0, 1),
            "offset": -0.5,
        },
    }
    records = make_records(needed(claim), tmp_path, **changes)
    assert changes.keys() <= records.keys()
    _, numbers = claim.draw(list(records.values()))
    assert numbers["RBF"]["best_rate"] == 0.01
    assert numbers["dot product"]["best_rate"] == 3e-4
    assert numbers["RBF"]["best_less"]["dot product"]["mean"] == pytest.approx(-0.1)
    assert numbers["dot product"]["best_less"]["RBF"]["mean"] == pytest.approx(0.1)
    assert numbers["dot product + QK-norm"]["best_less"]["dot product"]["mean"] == pytest.approx(
        0.1
    )
    assert numbers["dot product"]["diverged"] == 2


def test_longer_contexts_are_compared_with_matched_controls(tmp_path):
    claim = claims.FIGURES["lengths"]
    records = make_records(needed(claim), tmp_path)
    # A nat for each doubling, more than the 0.01 of the others; seeds differ at every length alike.
    matched = records["dot_scale=rbf,kind=dot"]
    for doublings, length in enumerate(sorted(matched.lengths)):
        matched.lengths[length][:] = 1 + np.arange(4) + doublings
    learned = records["positions=learned"].lengths
    for length in sorted(learned)[1:]:
        del learned[length]
    made, numbers = claim.draw(list(records.values()))
    found = numbers[matched.name]
    assert found["lost"]["mean"] == pytest.approx(3.0)
    assert found["rbf_less"]["mean"] == pytest.approx(0.03 - 3.0)
    assert found["losses"]["64"]["mean"] == pytest.approx(2.5 + 1)
    assert "rbf_less" not in numbers["base"]
    table = lengths_table(numbers)
    (row,) = (line for line in table.splitlines() if line.startswith(f"| {found['label']} |"))
    assert "| +3.000 [+3.000, +3.000] | -2.970 [-2.970, -2.970] |" in row
    # One that has no longer contexts has no row.
    assert table.count("\n") == 2 + len(records) - 1
    for axis, positions in zip(made.axes, ("SuSiE", "RoPE")):
        assert axis.get_title(loc="left") == positions
        assert len({(str(line.get_linestyle()), line.get_marker()) for line in axis.lines}) == 4


def test_a_record_without_longer_contexts_is_left_out(tmp_path):
    claim = claims.FIGURES["lengths"]
    records = make_records(needed(claim), tmp_path)
    records["dot_scale=rbf,kind=dot"].lengths.clear()
    _, numbers = claim.draw(list(records.values()))
    assert numbers.keys() == records.keys() - {"dot_scale=rbf,kind=dot"}


def test_stability_compares_first_gradients_by_rate(tmp_path):
    claim = claims.FIGURES["stability"]
    records = make_records(needed(claim), tmp_path)
    for record in records.values():
        norms = record.train["grad_norm"]
        rbf = record.config["model"]["attention"]["kind"] == "rbf"
        norms[: len(norms) // 5] = 3.0 if rbf else 4.0
        norms[3] = 10.0 if rbf else 20.0
    _, numbers = claim.draw(list(records.values()))
    compared = [n for n in numbers.values() if "log_gradient_less_dot" in n]
    assert len(compared) == 5
    first = 200 // 5
    mean = ((first - 1) * np.log(3 / 4) + np.log(1 / 2)) / first
    for n in compared:
        assert n["log_gradient_less_dot"]["mean"] == pytest.approx(mean)
        assert np.exp(n["log_largest_less_dot"]["mean"]) == pytest.approx(0.5)
        assert n["log_gradient_less_matched"] == n["log_gradient_less_dot"]


def test_a_panel_of_less_than_a_decade_has_ticks_enough(tmp_path):
    claim = claims.FIGURES["stability"]
    records = make_records(needed(claim), tmp_path)
    for record in records.values():
        norms = record.train["grad_norm"]
        norms[: len(norms) // 5] = np.geomspace(3.0, 0.6, len(norms) // 5)[:, None]
    made, _ = claim.draw(list(records.values()))
    for axis in made.axes[1::4]:
        low, high = axis.get_ylim()
        assert 2 * low < high < 10 * low
        assert sum(low <= tick <= high for tick in axis.get_yticks()) >= 3


def test_even_shares_are_marked_where_there_is_a_register_or_a_sink(tmp_path):
    claim = claims.FIGURES["registers"]
    records = make_records(needed(claim), tmp_path)
    del records["register_init=normal"].inside["even_share"]
    made, numbers = claim.draw(list(records.values()))
    (marks,) = (line for line in made.axes[2].lines if line.get_marker() == "d")
    at = dict(zip(records, marks.get_xdata()))
    assert at["num_registers=4"] == pytest.approx(4 * 0.02)
    assert at["sink=origin,num_registers=4"] == pytest.approx(5 * 0.02)
    unmarked = {"sink=none", "kind=dot,sink=none,positions=rope"}
    unmarked |= {"register_init=normal"}
    assert {name for name, x in at.items() if np.isnan(x)} == unmarked
    assert numbers["sink=none"]["even_share"] == pytest.approx(0.02)


def test_spikes_are_counted_in_whole_numbers(tmp_path):
    claim = claims.FIGURES["registers"]
    made, _ = claim.draw(list(make_records(needed(claim), tmp_path).values()))
    ticks = made.axes[1].get_xticks()
    np.testing.assert_array_equal(ticks, np.round(ticks))


def test_heads_of_a_single_layer_lie_at_their_name(tmp_path):
    claim = claims.FIGURES["dial"]
    records = make_records(needed(claim), tmp_path)
    for record in records.values():
        for name in ("gamma", "key_norm_weight"):
            record.inside[name] = record.inside[name][:, :1]
    made, _ = claim.draw(list(records.values()))
    heights = [line.get_ydata()[0] for line in made.axes[1].lines]
    np.testing.assert_array_equal(heights, made.axes[1].get_yticks())


def test_times_are_drawn_of_those_that_had_the_machine_alone(tmp_path):
    claim = claims.FIGURES["loss_curves"]
    records = make_records(needed(claim), tmp_path)
    made, _ = claim.draw(list(records.values()))
    assert "time" not in {axis.get_label() for axis in made.axes}
    assert "not measured" in made.get_supxlabel()
    for names, positions in (
        (("positions=rope", "kind=dot,positions=rope"), "RoPE"),
        (("base",), "RoPE"),  # not without the dot product beside
        (("kind=dot",), "SuSiE"),
    ):
        for name in names:
            records[name].summary["timed_alone"] = True
        made, numbers = claim.draw(list(records.values()))
        (panel,) = (axis for axis in made.axes if axis.get_label() == "time")
        assert panel.get_title("left") == f"By time, {positions} for all"
        assert len(panel.lines) == len(numbers["seconds"]) == 2
    seconds = records["base"].valid["seconds"]
    assert list(panel.lines[0].get_xdata()) == list(seconds - seconds[0])
    assert numbers["seconds"].keys() == {"base", "kind=dot"}
    assert "not measured" not in made.get_supxlabel()


def test_curves_less_the_dot_products_are_paired(tmp_path):
    claim = claims.FIGURES["loss_curves"]
    records = make_records(needed(claim), tmp_path, base={"offset": -0.25})
    made, _ = claim.draw(list(records.values()))
    panels_of = {axis.get_label(): axis for axis in made.axes}
    for name in ("valid less", "train less"):
        (line,) = (x for x in panels_of[name].lines if x.get_color() == PALETTE["RBF"].color)
        np.testing.assert_allclose(line.get_ydata(), -0.25, atol=1e-9)
        looks = {(str(x.get_linestyle()), x.get_marker()) for x in panels_of[name].lines}
        assert len(looks) == len(panels_of[name].lines) == 5


def test_registers_have_a_shape_that_no_variant_has(tmp_path):
    claim = claims.FIGURES["key_norms"]
    made, _ = claim.draw(list(make_records(needed(claim), tmp_path).values()))
    (axis,) = made.axes
    stars = [line for line in axis.lines if line.get_marker() == "*"]
    assert len(stars) == 5 * 2 + 1  # variants, layers, the legend's
    assert "*" not in {style.marker for style in PALETTE.values()}
    assert {line.get_markerfacecolor() for line in stars} == {"white"}


def test_first_gradients_are_drawn_over_the_dot_products(tmp_path):
    claim = claims.FIGURES["stability"]
    records = make_records(needed(claim), tmp_path)
    for record in records.values():
        dot = record.config["model"]["attention"]["kind"] == "dot"
        record.train["grad_norm"][:] = 4.0 if dot else 3.0
    made, _ = claim.draw(list(records.values()))
    for row in range(2):
        lines = made.axes[4 * row + 2].lines
        (line,) = (x for x in lines if x.get_color() == PALETTE["RBF"].color)
        np.testing.assert_allclose(line.get_ydata(), 0.75)


def test_maps_mark_the_registers(tmp_path):
    claim = claims.FIGURES["attention_maps"]
    records = make_records(needed(claim), tmp_path)
    made, numbers = claim.draw(list(records.values()))
    maps = [axis for axis in made.axes if axis.images]
    assert len(maps) == 3 * 2 * 2  # models, layers, heads
    assert all([line.get_xdata()[0] for line in axis.lines] == [2.5] for axis in maps)
    assert len(numbers) == 3


def test_an_origin_sink_is_a_column_of_its_map(tmp_path):
    claim = claims.FIGURES["attention_maps"]
    records = make_records(needed(claim), tmp_path)
    maps = records["sink=origin"].inside["attention_map"]
    maps *= 0.75
    made, _ = claim.draw(list(records.values()))
    drawn = [axis.images[0].get_array() for axis in made.axes if axis.images]
    of_sink = drawn[4:8]
    assert all(array.shape[1] == maps.shape[-1] + 3 for array in of_sink)
    np.testing.assert_allclose(of_sink[0][:, 0], 0.5, rtol=1e-6)


def test_figures_of_the_operation_are_drawn_from_the_kept_files():
    for name in ("profile", "memory", "layer_profile"):
        made, numbers = claims.FIGURES[name].draw([])
        assert made.axes
        assert numbers["file"].startswith("docs/measurements/")


def test_memory_has_plain_numbers_and_names_its_limit():
    made, numbers = claims.FIGURES["memory"].draw([])
    made.draw_without_rendering()
    (axis,) = made.axes
    limit = max(row["bytes_limit"] for row in numbers["memory"])
    assert f"there are {limit / 2**30:.0f} GiB" in {text.get_text() for text in axis.texts}
    assert {"1,024", "16,384", "262,144"} <= {text.get_text() for text in axis.get_xticklabels()}


def test_without_its_file_a_figure_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(operation, "LAYER", (tmp_path / "none.json",))
    claims.write([claims.FIGURES["layer_profile"]], {"layer_profile": []}, {}, {}, tmp_path, "x")
    report = (tmp_path / "report.md").read_text()
    assert "Not drawn: none of" in report
    assert not (tmp_path / "layer_profile.png").exists()


def test_report_names_what_is_missing_and_why(tmp_path):
    claim = claims.FIGURES["dial"]
    every = needed(claim)
    records = make_records(every[:-2], tmp_path)
    reasons = {every[-1].name: "it did not work"}
    claims.write([claim], {"dial": every}, records, reasons, tmp_path, "the command")
    report = (tmp_path / "report.md").read_text()
    assert f"Missing: {every[-2].name}: no record; {every[-1].name}: it did not work" in report
    assert "`the command`" in report
    assert {p.name for p in tmp_path.iterdir()} >= {"dial.png", "dial.svg", "dial.json"}
    numbers = json.loads((tmp_path / "dial.json").read_text())
    expected = paired.as_numbers(paired.estimate(paired.loss(records["base"])))
    assert numbers["base"]["final_loss"] == pytest.approx(expected)


def test_names_of_figures():
    assert len(claims.named("all")) == len(claims.FIGURES)
    assert [c.name for c in claims.named("dial,memory")] == ["dial", "memory"]
    with pytest.raises(ValueError, match="did you mean 'registers'"):
        claims.named("register")
