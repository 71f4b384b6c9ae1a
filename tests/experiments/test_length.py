"""Contexts longer than those trained at: the plan, one row from text to record, the table."""

import dataclasses

import numpy as np
import pytest

from configs.figures import length as configuration
from experiments.paper import length
from rbf_jax.analysis import paired
from rbf_jax.analysis.records import read_record
from rbf_jax.training import ensemble
from tests.experiments.conftest import REPOSITORY
from tests.harness.synthetic_records import make_record


def test_the_plan_has_every_row_once_and_no_confounded_one():
    rows = length.plan("paper")
    assert len(rows) == 4 * 3 * 4
    assert {row.name for row in rows[:6]} == {
        f"{kind}-{position}-none"
        for kind in ("rbf", "dot", "qknorm")
        for position in ("rope", "susie")
    }
    for row in rows:
        if row.changes.get("model.attention.qk_norm"):
            assert row.changes["model.attention.kind"] == "dot"
    shards = [length.shard(rows, f"{i}/5") for i in range(5)]
    assert sorted(v.name for some in shards for v in some) == sorted(v.name for v in rows)
    for wrong in ("5/5", "1", "a/2", "-1/2"):
        with pytest.raises(ValueError, match="must be I/N"):
            length.shard(rows, wrong)


def test_one_row(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    text = "<|endoftext|>".join("".join(rng.choice(list("abc "), 600)) for _ in range(8))
    (tmp_path / "books.txt").write_text(text)

    def run(*arguments):
        common = [
            *("length", "--scale=smoke", "--shard=3/48", f"--out={tmp_path / 'out'}"),
            f"--records={tmp_path / 'kept'}",
            *("--base.data.source=text", f"--base.data.train_files={tmp_path / 'books.txt'}"),
            f"--base.data.cache_dir={tmp_path / 'cache'}",
            "--base.model.attention.implementation=reference",  # Compiles in less time.
        ]
        return length.main([*common, *arguments])

    assert run("--plan") == 0
    assert "1 rbf-susie-none\n1 of 1 rows left" in capsys.readouterr().out
    assert run() == 0, capsys.readouterr().err
    path = tmp_path / "out" / "records" / "rbf-susie-none.jsonl.xz"
    record = read_record(path)
    assert record.seeds == (0, 1)
    assert record.lengths.keys() == {32, 64, 256}
    losses = {key: record.inside[f"loss/{key}"] for key in (32, 64, 256, "window")}
    assert {x.shape for x in losses.values()} == {(2, 32)}
    # A context sees nothing of what is in front of it, and the window all of the first 32 tokens.
    for key in (64, 256, "window"):
        np.testing.assert_allclose(losses[key][:, :4], losses[32][:, :4], rtol=1e-4)
        assert not np.allclose(losses[key][:, 4:], losses[32][:, 4:], rtol=1e-4)
    np.testing.assert_allclose(record.lengths[64], losses[64].mean(1), rtol=1e-4)
    assert record.inside["beyond"].shape == (2, 1, 2)
    assert 0.5 < record.inside["beyond"].mean() < 0.9  # Near 1 - 32 / 192 at the start.
    assert not record.inside["register"].any()
    table = (tmp_path / "out" / "length.md").read_text()
    assert "| RBF | SuSiE | none |" in table
    assert "47 of 48 rows have no record" in table

    # Neither again from its own folder, nor from that of records kept elsewhere.
    monkeypatch.setattr(ensemble, "train_ensemble", None)
    assert run() == 0
    (tmp_path / "kept").mkdir()
    path.rename(tmp_path / "kept" / path.name)
    assert run("--plan") == 0
    assert "0 of 1 rows left" in capsys.readouterr().out


def make(name, far):
    """A record whose loss far away is `far` (seeds,), and 2 everywhere else."""
    record = make_record(name, configuration.get_config("smoke").to_dict(), lengths=(32, 64, 256))
    n = len(record.seeds)
    losses = np.full((n, 32), 2.0)
    losses[:, 8:] = np.asarray(far)[:, None]
    inside = {"loss/32": np.full((n, 32), 2.0), "loss/256": losses, "loss/window": losses}
    return dataclasses.replace(record, inside={**inside, "beyond": np.full((n, 1, 2), 0.25)})


def test_table_and_primary_contrast():
    noise = np.array([0.001, -0.001, 0.002, -0.002])
    records = {
        "rbf-rope-none": make("rbf-rope-none", 1.9 + noise),
        "dot-rope-none": make("dot-rope-none", 2.5 + noise),
        "qknorm-rope-none": make("qknorm-rope-none", 2.0 + noise),
        # Best for the even seeds, which are measured on what the odd ones chose.
        "qknorm-susie-none": make("qknorm-susie-none", [1.0, 3.0, 1.0, 3.0]),
    }
    np.testing.assert_allclose(length.use(records["rbf-rope-none"]), noise - 0.1)
    found = length.primary(records)
    assert found["chosen"] == [
        ["rbf-rope-none", "qknorm-rope-none"],
        ["rbf-rope-none", "qknorm-susie-none"],
    ]
    differences = [-0.1, 1.899 - 3, -0.1, 1.898 - 3]
    assert found["contrast"]["mean"] == pytest.approx(np.mean(differences))
    table = length.report(records, length.plan("smoke"))
    assert table.startswith(length.summary(records))
    assert "| RBF | -0.10 |  |  |  |" in table
    cells = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    verdicts = ["uses", "degrades", "survives", "open"]
    assert [row[-2] for row in cells if row[-2] in verdicts] == verdicts
    assert "44 of 48 rows have no record" in table
    assert length.primary({"rbf-rope-none": records["rbf-rope-none"]}) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [([-0.1, -0.1], "uses"), ([0.1, 0.1], "degrades"), ([0, 0], "survives"), ([0, 1], "open")],
)
def test_verdicts(values, expected):
    assert length.verdict(paired.estimate(np.array(values))) == expected
    assert length.verdict(paired.estimate(np.array([*values, np.nan]))) == "diverged"


def test_the_kept_tables_are_those_of_the_kept_records():
    kept = REPOSITORY / "docs/measurements/experiments/length"
    found = {path.name.split(".")[0]: read_record(path) for path in kept.glob("*.xz")}
    assert (kept / "length.md").read_text() == length.report(found, length.plan("paper"))
    assert length.summary(found) in (REPOSITORY / "docs/results.md").read_text()
