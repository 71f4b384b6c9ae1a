"""Every mesh computes what one device does, up to rounding, and is laid out as it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.harness.meshes import CASES, EVALUATED, B, T

MESHES = [name for name in CASES if name != "one"]


@pytest.fixture(scope="module")
def results():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    process = subprocess.run(
        [sys.executable, "-m", "tests.harness.meshes"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_changes_nothing_but_rounding(name, results):
    expected, actual = results["one"], results[name]
    for a, b in zip(actual["initial"], expected["initial"]):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(actual["metrics"], expected["metrics"], rtol=2e-5)
    # Where a gradient is rounding noise, Adam makes a whole step of it; elsewhere all agree.
    pairs = [(np.array(a), np.array(b)) for a, b in zip(actual["params"], expected["params"])]
    different = sum(np.sum(~np.isclose(a, b, rtol=1e-3, atol=1e-5)) for a, b in pairs)
    assert different < 0.01 * sum(a.size for a, _ in pairs)


@pytest.mark.parametrize("name", EVALUATED[1:])
def test_a_mesh_evaluates_and_inspects_alike(name, results):
    expected, actual = results["one"], results[name]
    np.testing.assert_allclose(actual["eval"], expected["eval"], rtol=2e-5)
    assert actual["inspect"].keys() == expected["inspect"].keys()
    for key, value in expected["inspect"].items():
        np.testing.assert_allclose(actual["inspect"][key], value, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", MESHES)
def test_devices_hold_their_parts(name, results):
    data, fsdp, tensor, seq, _, _ = CASES[name]
    assert results[name]["tokens_of_a_device"] == B * T // (data * fsdp * seq)
    # The optimizer's state, as its parameter.
    assert results[name]["part_of_a_moment"] == 1 / (fsdp * tensor)
    assert results[name]["share"] == [0, 1]


@pytest.mark.parametrize("name", ["data", "fsdp", "tensor", "mixed"])
def test_rows_are_not_gathered(name, results):
    data, fsdp, _, _, accumulate_steps, _ = CASES[name]
    rows = B // accumulate_steps
    # Registers are in front of the text.
    activations = [shape for shape in results[name]["gathered"] if {T, T + 1} & set(shape)]
    too_many = [shape for shape in activations if rows in shape and data * fsdp > 1]
    assert not too_many


def test_rows_are_not_gathered_rather_than_larger_parameters(results):
    shapes = results["wide"]["gathered"]
    assert [512, 4 * 512] in shapes
    assert not [shape for shape in shapes if {T, T + 1} & set(shape)]
