"""Names of variants, and that each is trained once."""

import importlib

import pytest

from configs.figures import scales
from rbf_jax.analysis import variants

BASE = scales.get_config("smoke").to_dict()
NAMES = ("dial", "learning_rate", "positions", "registers", "twins")


def of(name, scale="paper"):
    figure = importlib.import_module(f"configs.figures.{name}").get_config(scale)
    return variants.variants(figure.to_dict(), BASE)


def test_names_say_what_differs_from_the_base():
    names = {v.name for v in of("registers")}
    assert {"base", "sink=none", "kind=dot,sink=none,positions=rope"} <= names
    assert (
        variants.name_of({"model.attention.gamma": 0.25, "train.steps": 9}) == "gamma=0.25,steps=9"
    )


@pytest.mark.parametrize("name", NAMES)
def test_names_are_file_names_and_each_variant_is_there_once(name):
    found = of(name)
    names = [v.name for v in found]
    assert len(set(names)) == len(names)
    assert all("/" not in n and " " not in n for n in names)


def test_what_two_figures_want_is_trained_once_with_all_lengths():
    both = variants.union([*of("twins"), *of("positions")])
    names = [v.name for v in both]
    assert len(set(names)) == len(names) < len(of("twins")) + len(of("positions"))
    (base,) = (v for v in both if v.name == "base")
    assert base.lengths == (1, 2, 4, 8)
    (only_twins,) = (v for v in both if v.name == "qk_norm=True")
    assert only_twins.lengths == ()


def test_controls_of_longer_contexts_are_variants_of_the_first_figure():
    twins = {v.name for v in of("twins")}
    controls = [v for v in of("positions") if "dot_scale" in v.name or "qk_norm" in v.name]
    assert len(controls) == 4
    assert {v.name for v in controls} <= twins
    assert {v.lengths for v in controls} == {(1, 2, 4, 8)}
