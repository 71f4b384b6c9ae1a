"""The GPU suite on a CPU: what fails there is in the table, what runs is measured by the wall."""

import dataclasses
import functools
import json

import jax.numpy as jnp
import pytest

from experiments import bench_attention
from experiments.benchmarks import contenders, gpu_command, gpu_suite, memory_table
from experiments.benchmarks.clock import Clock, Timing
from experiments.benchmarks.contenders import BASELINE, FLEX, TRITON, TRUSTED, Cell
from experiments.benchmarks.report import markdown
from tests.harness.gpu_suite_content import COST, LENGTHS, failed, make_content

TINY = gpu_suite.Settings(
    lengths=(16, 32),
    head_dims=(8,),
    tokens=64,
    width=16,
    rounds=2,
    queue_milliseconds=0.1,
    memory_lengths=(16, 32),
    matmul_size=16,
    copy_gibibytes=1e-5,
)


def table_rows(text, title):
    part = text.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


@pytest.mark.parametrize("argument", ["--suite=gpu", "--suite gpu"])
def test_without_a_gpu_the_suite_is_refused(argument, tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert bench_attention.main(["bench", *argument.split(), f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert error == "bench_attention: --suite=gpu needs an NVIDIA GPU, but JAX sees only: cpu.\n"
    assert not out.exists()


@pytest.mark.parametrize("option", ["--heads=4", "--batch=2", "--memory_limit=1"])
def test_options_of_the_quick_suite_are_not_ignored(option, capsys):
    with pytest.raises(SystemExit):
        bench_attention.main(["bench", "--suite=gpu", option])
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err


def test_draw(tmp_path, capsys):
    (tmp_path / "gpu.json").write_text(json.dumps(make_content()))
    argv = ["bench", f"--draw={tmp_path / 'gpu.json'}", f"--figure={tmp_path / 'new' / 'figure'}"]
    assert bench_attention.main(argv) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "figure.png",
        "figure.svg",
    ]
    assert bench_attention.main([*argv, "--head_dims=32"]) == 2
    assert "no time was measured at H = 32" in capsys.readouterr().err
    assert bench_attention.main(["bench", f"--draw={tmp_path / 'none.json'}"]) == 2


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", ["causal", "full"])
def test_table_has_every_implementation_at_every_length(head_dim, kind):
    rows = table_rows(markdown(make_content()), f"H {head_dim}, {kind}")
    assert [(row[0], row[1]) for row in rows] == [(f"{T:,}", n) for T in LENGTHS for n in COST]
    by_name = {row[1]: row for row in rows if row[0] == "4,096"}
    assert by_name[TRITON][2:8] == ["5.000", "100", "0.80", "5.007", "4", "17.500"]
    assert by_name[FLEX][4] == by_name[FLEX][9] == "0.25"
    assert by_name[BASELINE][4] == "1.00"
    assert not any(row[-1] for row in rows)


def test_table_shows_errors_and_wrong_results():
    content = make_content()
    wrong = {"out": 0.001, "dk": 0.7, "dv": float("nan")}
    for i, row in enumerate(content["results"]):
        if row["implementation"] == TRITON:
            content["results"][i] = failed(row, "XlaRuntimeError: RESOURCE_EXHAUSTED | 9 GiB")
        if row["implementation"] == FLEX:
            row["difference"] = wrong
    rows = {row[1]: row for row in table_rows(markdown(content), "H 64, causal")}
    assert rows[TRITON][2] == rows[TRITON][7] == "-"
    assert rows[TRITON][-1] == "XlaRuntimeError: RESOURCE_EXHAUSTED / 9 GiB"
    assert rows[FLEX][-1] == "dk differs from RBF xla by 0.7; dv differs from RBF xla by nan"
    assert len(rows["RBF xla"]) == len(rows[TRITON]) == 13


def test_table_shows_where_memory_runs_out_and_what_was_run():
    content = make_content()
    error = {"implementation": "RBF xla", "length": 524288, "bytes_limit": None}
    content["memory"].append({**error, "error": "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of"})
    rows = {row[0]: row[1:] for row in table_rows(markdown(content), "Memory")}
    assert rows["65,536"][:2] == ["runs out: 128.0 GiB", "runs out: 192.0 GiB"]
    assert rows["131,072"][:2] == ["", ""]
    assert rows["262,144"][3] == "16.0 MiB, run in 712 ms"
    assert rows["524,288"][2] == "runs out"


def test_table_says_what_there_was_no_time_for():
    content = make_content()
    content["not_measured"] = [{"head_dim": 128, "causal": True, "length": 512}]
    assert "Not measured, the time was over: H 128 causal T 512." in markdown(content)


def test_on_a_cpu_what_fails_is_an_entry_and_the_rest_is_measured(tmp_path, capsys):
    out = tmp_path / "new" / "gpu.json"
    settings = dataclasses.replace(TINY, lengths=(32,))
    gpu_command.measure(settings, "the command", out)
    content = json.loads(out.read_text())
    assert content["command"] == "the command"
    assert content["clock"]["name"] == "wall"
    assert content["ceilings"].keys() == {"matmul_tflops", "copy_gigabytes_per_second"}
    assert all(value > 0 for value in content["ceilings"].values())
    rows = {
        (r["implementation"], r["length"], r["causal"], r["direction"]): r
        for r in content["results"]
    }
    names = contenders.contenders().keys()
    assert {BASELINE, TRITON, TRUSTED} <= names
    assert len(rows) == len(content["results"]) == len(names) * 2 * 2
    for (name, *_), row in rows.items():
        assert (row["milliseconds"] is None) == (row["error"] is not None) == (name != TRUSTED)
    assert rows[TRUSTED, 32, True, "forward"]["milliseconds"] > 0
    assert "cuDNN" in rows[BASELINE, 32, True, "forward"]["error"]
    trusted = {r["length"] for r in content["memory"] if r["implementation"] == TRUSTED}
    assert trusted == {16, 32}
    assert "| RBF xla |" in out.with_suffix(".md").read_text()
    assert "RBF xla, forward+backward: " in capsys.readouterr().out


def test_results_are_compared_with_the_trusted_ones(monkeypatch):
    def rbf(cell, implementation):
        return contenders.rbf(cell, "xla")

    def wrong(cell, implementation):
        attend = contenders.rbf(cell, "reference")
        return lambda q, k, v: attend(q, k, v) + 0.5 * v

    made = {
        TRUSTED: contenders._jax_contender(functools.partial(rbf, implementation="")),
        "same": contenders._jax_contender(functools.partial(rbf, implementation="")),
        "wrong": contenders._jax_contender(functools.partial(wrong, implementation="")),
    }
    monkeypatch.setattr(gpu_suite, "contenders", lambda: made)
    rows = gpu_suite.measure_cell(Cell(2, 16, 2, 8, True), Clock(), TINY)
    found = {(r["implementation"], r["direction"]): gpu_suite.doubtful(r) for r in rows}
    assert found["same", "forward+backward"] == found["same", "forward"] == []
    assert [text.split()[0] for text in found["wrong", "forward"]] == ["out"]
    assert [text.split()[0] for text in found["wrong", "forward+backward"]] == ["out", "dv"]
    same = next(r for r in rows if r["implementation"] == "same" and r["direction"] != "forward")
    assert same["difference"].keys() == {"out", "dq", "dk", "dv"}


def test_one_that_breaks_while_it_is_timed_leaves_the_others(monkeypatch):
    class Breaking(Clock):
        def measure(self, call, times):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 2:
                raise RuntimeError("device lost\nfor a while")
            return Timing(float(self.calls), 1.0, {"kernel": 1.0})

    start = contenders._jax_contender(lambda cell: contenders.rbf(cell, "xla"))
    monkeypatch.setattr(gpu_suite, "contenders", lambda: {"a": start})
    forward, both = gpu_suite.measure_cell(Cell(1, 16, 2, 8, False), Breaking(), TINY)
    assert both["error"] == "RuntimeError: device lost for a while"
    assert both["milliseconds"] is None
    assert forward["milliseconds"] == 2.0  # The median of its rounds, 1 and 3.
    assert forward["kernels"] == {"kernel": 1.0}
    assert forward["tflops"] == pytest.approx(1e-9 * 4 * 16 * 16 * 8 * 2 / 2.0)


def test_no_cell_is_begun_after_the_time():
    settings = gpu_suite.dataclasses.replace(TINY, seconds=0.0, memory_lengths=())
    *_, content = gpu_suite.run(settings, "", lambda _: None)
    assert content["results"] == content["memory"] == []
    assert [(c["length"], c["causal"]) for c in content["not_measured"]] == [
        (32, True),
        (32, False),
        (16, True),
        (16, False),
    ]


def test_cells_have_all_tokens_and_the_whole_width():
    cells = gpu_suite.Settings().cells()
    assert len(cells) == 16
    assert {cell.batch * cell.length for cell in cells} == {16384}
    assert {cell.heads * cell.head_dim for cell in cells} == {2048}
    full = Cell(1, 16384, 32, 64, False)
    assert full.operations(False) == 4 * 16384 * 16384 * 64 * 32
    assert Cell(1, 16384, 32, 64, True).operations(True) == 1.75 * full.operations(False)


def test_inputs_are_random_and_not_the_same():
    q, k, v, dout = Cell(1, 64, 2, 32, True).arrays()
    assert q.dtype == jnp.bfloat16
    for x in (q, k, v, dout):
        assert float(jnp.std(x.astype(jnp.float32))) == pytest.approx(1.0, abs=0.05)
    assert not bool(jnp.all(q == k))
    assert not bool(jnp.all(v == dout))


def test_memory_ends_where_it_runs_out(monkeypatch):
    monkeypatch.setattr(memory_table, "bytes_limit", lambda: 2**20)
    rows = list(memory_table.measure((16, 32, 64, 128), Clock()))
    reference = [row for row in rows if row["implementation"] == "RBF reference"]
    assert [row["runs_out"] for row in reference] == [False] * (len(reference) - 1) + [True]
    assert reference[-1]["length"] < 128
    assert len({row["implementation"] for row in rows}) == 6
    assert "more than there is" in memory_table.line(reference[-1])


def test_the_longest_length_is_run(monkeypatch):
    made = {TRITON: lambda cell: contenders.rbf(cell, "xla")}
    monkeypatch.setattr(memory_table, "_LINEAR", made)
    monkeypatch.setattr(memory_table, "_QUADRATIC", {})
    short, long = memory_table.measure((32, 16), Clock())
    assert "milliseconds" not in short
    assert (long["length"], long["milliseconds"] > 0) == (32, True)


def test_groups_and_what_is_left_out():
    """N/K query heads to a head of keys; a contender that is named is not even compiled."""
    settings = dataclasses.replace(TINY, group=4, dtype="float16", without=(BASELINE, FLEX))
    cell = settings.cells()[0]
    query, key, *_ = cell.arrays()
    assert query.shape[2] == 4 * key.shape[2]
    assert query.dtype == key.dtype == jnp.float16
    rows = gpu_suite.measure_cell(cell, Clock(), settings)
    names = {row["implementation"] for row in rows}
    assert names == contenders.contenders().keys() - {BASELINE, FLEX}
