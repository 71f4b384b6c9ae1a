"""The tuner without a GPU: what it would try, what it writes, and how it says that it needs one."""

import argparse
import json

import pytest

from experiments import autotune
from experiments.benchmarks import tile_candidates
from experiments.benchmarks.tile_timing import LENGTHS, Job, Outcome, Winner
from rbf_jax.ops.gpu import device
from rbf_jax.ops.gpu.triton import config as tiles
from rbf_jax.ops.gpu.triton.config import PASSES, Tiles

H100 = device.Target("NVIDIA H100 80GB HBM3", 90)
JOB = Job("keys", 64, "bfloat16", True, tuple(LENGTHS))
FAST, SLOW = Tiles(64, 64, 4, 3, 8, 168), Tiles(32, 64, 4, 2)


def winner(chosen, length="long"):
    return Winner(length, chosen, 1.25, 1.5)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_candidates_fit_and_begin_with_the_default(name, dtype, capability):
    limit = tiles.shared_memory_limit(capability)
    for H in (16, 32, 48, 64, 128, 256):
        found = tile_candidates.candidates(name, H, dtype, capability)
        assert found[0] == tiles.default_tiles(name, H, dtype, capability)
        assert len(set(found)) == len(found)
        for candidate in found:
            assert tiles.shared_memory(name, candidate, H, dtype) <= limit
        if capability == 90:
            assert len(found) >= 2, "there is nothing to choose from"


def test_a_candidate_with_too_many_sums_is_left_out(monkeypatch):
    table = {"keys": {128: [(64, 128, 4, 2), (64, 64, 8, 2)]}}
    monkeypatch.setattr(tile_candidates, "_HALF", table)
    found = tile_candidates.candidates("keys", 128, "bfloat16", 90)
    assert found[1:] == [Tiles(64, 64, 8, 2)]


def test_a_candidate_gets_fewer_stages_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(tile_candidates, "_HALF", {"forward": {128: [(64, 64, 8, 4, 128)]}})
    assert tile_candidates.candidates("forward", 128, "bfloat16", 90)[1].num_stages == 4
    found = tile_candidates.candidates("forward", 128, "bfloat16", 86)[1:]
    assert found == [Tiles(64, 64, 8, 2, max_registers=128)]


def test_merging_replaces_what_was_measured_again_and_keeps_the_rest():
    other_gpu = device.Target("NVIDIA A100-SXM4-40GB", 80)
    old = [
        autotune.entry(JOB, winner(SLOW), H100),
        autotune.entry(JOB, winner(SLOW, "short"), H100),
        autotune.entry(JOB, winner(SLOW), other_gpu),
    ]
    new = [autotune.entry(JOB, winner(FAST), H100)]
    merged = autotune.merge(old, new)
    found = {(e["gpu"], e["length"]): e["tiles"]["block_q"] for e in merged}
    assert len(merged) == len(found)
    assert found == {
        (other_gpu.name, "long"): SLOW.block_q,
        (H100.name, "short"): SLOW.block_q,
        (H100.name, "long"): FAST.block_q,
    }
    assert autotune.merge(merged, []) == merged == autotune.merge(merged[::-1], [])


def options(out, **changed):
    parsed = autotune._parse(["autotune", "--head_dims=64", "--dtypes=bfloat16", f"--out={out}"])
    return argparse.Namespace(**{**vars(parsed), **changed})


@pytest.fixture
def tuned(monkeypatch):
    """Runs the tuner with these outcomes instead of measurements; returns what it said."""
    monkeypatch.setattr(device, "target", lambda: H100)

    def tune(options, outcomes):
        said = []
        monkeypatch.setattr(autotune, "outcomes", lambda *_: iter(outcomes))
        autotune.tune(options, "the command", said.append)
        return said

    return tune


def test_the_file_is_what_choose_reads(tmp_path, tuned, monkeypatch):
    out = tmp_path / "tuned.json"
    tuned(options(out), [(JOB, Outcome([winner(FAST)], clock="cupti"))])
    content = json.loads(out.read_text())
    assert content["command"] == "the command"
    assert content["versions"]["jax"]
    assert content["date"]
    monkeypatch.setattr(tiles, "tuned_table", lambda: content["entries"])
    call = {"head_dim": 64, "dtype": "bfloat16", "causal": True, "length": LENGTHS["long"]}
    chosen = tiles.choose("keys", **call, gpu=H100.name, compute_capability=90)
    assert chosen == FAST
    only = content["entries"][0]
    assert (only["milliseconds"], only["runner_up_milliseconds"]) == (1.25, 1.5)


def test_the_file_is_written_after_every_job(tmp_path, tuned):
    out = tmp_path / "tuned.json"

    def killed():
        yield JOB, Outcome([winner(FAST)])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(options(out), killed())
    assert len(json.loads(out.read_text())["entries"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.json"]


def test_what_failed_or_was_not_reached_is_said(tmp_path, tuned):
    out = tmp_path / "tuned.json"
    todo = autotune.jobs(options(out))
    assert len(todo) == 2 * len(PASSES)
    done = (todo[0], Outcome([winner(FAST)], ["these tiles: no"])), (todo[1], Outcome())
    said = tuned(options(out), done)
    assert "these tiles: no" in said
    assert [line for line in said if line.startswith("not measured")] == [
        f"not measured: {job}" for job in todo[1:]
    ]


def test_without_a_gpu_one_sentence(tmp_path, capsys):
    out = tmp_path / "tuned.json"
    assert autotune.main(["autotune", f"--out={out}"]) == 2
    expected = "autotune needs an NVIDIA GPU, and JAX's default backend is cpu.\n"
    assert capsys.readouterr().err == expected
    assert not out.exists()


@pytest.mark.parametrize(
    "option", ["--head_dims=512", "--dtypes=float64", "--passes=backward", "--lengths=512"]
)
def test_wrong_options(option, capsys):
    with pytest.raises(SystemExit):
        autotune.main(["autotune", option])
    assert "must be" in capsys.readouterr().err
