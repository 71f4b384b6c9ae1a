"""The benchmark's table and file; times are whatever they are."""

import json

import pytest

from experiments import bench_attention


def test_measures_every_implementation_and_writes_json(tmp_path, capsys):
    out = tmp_path / "new folder" / "bench.json"
    argv = ["bench", "--lengths=8,40", "--rounds=1", "--heads=2", "--head_dim=8", f"--out={out}"]
    assert bench_attention.main(argv) == 0
    content = json.loads(out.read_text())
    cells = [(r["implementation"], r["length"], r["direction"]) for r in content["results"]]
    assert len(set(cells)) == len(cells) == 3 * 2 * 2
    assert all(r["milliseconds"] > 0 for r in content["results"])
    assert content["causal"] is True
    assert content["versions"]["jax"]
    assert "rbf xla" in capsys.readouterr().out
    rows = out.with_suffix(".md").read_text().splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| 8", "| 40"]


def test_a_program_over_the_memory_limit_is_not_run(tmp_path):
    out = tmp_path / "bench.json"
    argv = ["bench", "--lengths=64", "--rounds=1", "--memory_limit=0", f"--out={out}"]
    assert bench_attention.main([*argv, "--heads=1", "--head_dim=8"]) == 0
    results = json.loads(out.read_text())["results"]
    assert {r["milliseconds"] for r in results if r["temporary_bytes"]} == {None}
    assert any(r["temporary_bytes"] for r in results)


@pytest.mark.parametrize("lengths", ["0", "12,x", ""])
def test_wrong_lengths(lengths, capsys):
    with pytest.raises(SystemExit):
        bench_attention.main(["bench", f"--lengths={lengths}"])
    assert "must be an integer of at least 1" in capsys.readouterr().err
