"""Every mesh computes what one device does, up to rounding, and is laid out as it says."""

import numpy as np
import pytest

from tests.harness.meshes import CASES, EVALUATED, B, T, compile_wide, run

# "all" splits along three axes at once, accumulates and recomputes.
DEFAULT = ("data", "all")


def cases(names):
    marks = {True: (), False: pytest.mark.exhaustive}
    return [pytest.param(name, marks=marks[name in DEFAULT]) for name in names if name != "one"]


@pytest.mark.parametrize("name", cases(CASES))
def test_a_mesh_changes_nothing_but_rounding(name):
    expected, actual = run("one"), run(name)
    for a, b in zip(actual["initial"], expected["initial"]):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(actual["metrics"], expected["metrics"], rtol=2e-5)
    # Where a gradient is rounding noise, Adam makes a whole step of it; elsewhere all agree.
    pairs = [(np.array(a), np.array(b)) for a, b in zip(actual["params"], expected["params"])]
    different = sum(np.sum(~np.isclose(a, b, rtol=1e-3, atol=1e-5)) for a, b in pairs)
    assert different < 0.01 * sum(a.size for a, _ in pairs)


@pytest.mark.parametrize("name", cases(EVALUATED))
def test_a_mesh_evaluates_and_inspects_alike(name):
    expected, actual = run("one"), run(name)
    np.testing.assert_allclose(actual["eval"], expected["eval"], rtol=2e-5)
    assert actual["inspect"].keys() == expected["inspect"].keys()
    for key, value in expected["inspect"].items():
        np.testing.assert_allclose(actual["inspect"][key], value, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", cases(CASES))
def test_devices_hold_their_parts(name):
    data, fsdp, tensor, seq, _, _ = CASES[name]
    assert run(name)["tokens_of_a_device"] == B * T // (data * fsdp * seq)
    # The optimizer's state, as its parameter.
    assert run(name)["part_of_a_moment"] == 1 / (fsdp * tensor)
    assert run(name)["share"] == [0, 1]


@pytest.mark.parametrize("name", cases(["data", "fsdp", "tensor", "mixed"]))
def test_rows_are_not_gathered(name):
    data, fsdp, _, _, accumulate_steps, _ = CASES[name]
    rows = B // accumulate_steps
    # Registers are in front of the text.
    activations = [shape for shape in run(name)["gathered"] if {T, T + 1} & set(shape)]
    too_many = [shape for shape in activations if rows in shape and data * fsdp > 1]
    assert not too_many


def test_rows_are_not_gathered_rather_than_larger_parameters():
    shapes = compile_wide()
    assert [512, 4 * 512] in shapes
    assert not [shape for shape in shapes if {T, T + 1} & set(shape)]
