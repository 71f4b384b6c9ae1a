import json

import pytest

from experiments import bench_scaling
from experiments.bench_scaling import Case
from tests.experiments.conftest import REPOSITORY, SMOKE

RBF = f"--config={REPOSITORY / 'configs' / 'stories_rbf.py'}"
TINY = [
    "--vocab_size=300",
    "--rounds=1",
    "--steps=1",
    "--config.model.num_layers=1",
    "--config.model.d_model=16",
    "--config.train.batch_size=2",
    "--config.data.context_length=16",
]


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "new" / "scaling.json"
    patch = pytest.MonkeyPatch()
    patch.chdir(REPOSITORY)
    argv = ["bench", RBF, *TINY, "--meshes=fsdp", f"--out={out}"]
    assert bench_scaling.main(argv) == 0
    patch.undo()
    return json.loads(out.read_text())


def test_one_device_and_all_by_mesh_and_by_what_is_kept(content):
    cases = [(r["scaling"], r["devices"], r["axis"], r["batch_size"]) for r in content["results"]]
    assert cases == [
        ("strong", 1, "data", 2),
        ("strong", 2, "fsdp", 2),
        ("weak", 2, "fsdp", 4),
    ]
    one, *several = content["results"]
    assert len(one["rates"]) == 2  # Before the others and after.
    assert one["efficiency"] == 1
    for result in several:
        ratio = result["tokens_per_second"] / one["tokens_per_second"]
        assert result["efficiency"] == pytest.approx(ratio / 2)
        assert result["tokens_per_step"] == result["batch_size"] * 16
    # "fsdp" splits the parameters and AdamW's two moments.
    assert several[0]["peak_bytes"] < one["peak_bytes"]
    assert content["config"]["train"]["batch_size"] == 2
    assert content["versions"]["jax"]


def test_cut_off_it_leaves_what_was_measured(tmp_path, monkeypatch):
    prepare = bench_scaling._prepare

    def break_off(config, case, options):
        if case.scaling == "weak":
            raise KeyboardInterrupt
        return prepare(config, case, options)

    monkeypatch.setattr(bench_scaling, "_prepare", break_off)
    monkeypatch.chdir(REPOSITORY)
    out = tmp_path / "scaling.json"
    with pytest.raises(KeyboardInterrupt):
        bench_scaling.main(["bench", RBF, *TINY, "--meshes=fsdp", f"--out={out}"])
    one, strong = json.loads(out.read_text())["results"]
    assert (one["devices"], strong["devices"]) == (1, 2)
    ratio = strong["tokens_per_second"] / one["tokens_per_second"]
    assert strong["efficiency"] == pytest.approx(ratio / 2)


def test_a_case_has_its_mesh():
    config = bench_scaling.config_files.parse(["", SMOKE])[0]
    changed = Case("weak", 4, "seq").of(config)
    assert changed.mesh.to_dict() == {"data": 1, "fsdp": 1, "tensor": 1, "seq": 4}
    assert changed.train.batch_size == 4 * config.train.batch_size
    assert Case("strong", 4, "seq").of(config).train.batch_size == config.train.batch_size
    assert config.mesh.seq == 1


def test_the_table_of_the_docs_is_the_measured_one():
    docs = REPOSITORY / "docs"
    kept = json.loads((docs / "measurements" / "bench_scaling_gpu.json").read_text())
    table = "\n".join([bench_scaling.HEADER, *map(bench_scaling._line, kept["results"])])
    assert table in (docs / "scaling.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices=1,16"], "--devices has 16; it must be at most 2, all there are."),
        (["--devices=1"], "--devices is 1; it must hold a number above 1."),
        (
            ["--config.train.batch_size=3"],
            "strong scaling to data=2: train.batch_size is 3; it must be a multiple of",
        ),
        (["--config.model.num_heads=3"], "num_heads"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments, message, capsys):
    assert bench_scaling.main(["bench", RBF, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--meshes=data,rows", "'rows' must be one of data"), ("--step=3", "'--step=3' is not")],
)
def test_wrong_options(argument, message, capsys):
    with pytest.raises(SystemExit):
        bench_scaling.main(["bench", RBF, argument])
    assert message in capsys.readouterr().err
