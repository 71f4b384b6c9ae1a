import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from rbf_jax.sweeps import table
from rbf_jax.sweeps.table import Row


def row(number, state="finished", value=math.nan, **fields):
    default = {
        "part": "",
        "params": {"learning_rate": 0.1},
        "values": {},
        "seed": 0,
        "step": 5,
        "steps": 10,
        "loss": 3.0,
        "best_loss": 2.0,
        "error": "",
        "begun_at": [0],
        "folder": Path("trials"),
    }
    return Row(number=number, state=state, value=value, **(default | fields))


def shown(rows):
    console = Console(file=io.StringIO(), width=200)
    console.print(table.to_table(rows, len(rows)))
    return console.file.getvalue()


def test_the_table_says_what_varies_where_each_trial_is_and_why_it_failed():
    text = shown(
        [
            row(0, value=2.5),
            row(1, value=2.25, params={"learning_rate": 0.01, "kind": "dot"}),
            row(2, "failed", error="loss is [bold]not finite"),
            row(3, "running", loss=math.nan, seed=7),
        ]
    )
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    assert [line for line in lines if line] == [
        ["0", "finished", "0.1", "", "0", "5/10", "3.0000", "2.5000", ""],
        ["1 *", "finished", "0.01", "dot", "0", "5/10", "3.0000", "2.2500", ""],
        ["2", "failed", "0.1", "", "0", "5/10", "3.0000", "", "loss is [bold]not finite"],
        ["3", "running", "0.1", "", "7", "5/10", "", "", ""],
    ]
    assert "4 trials: 2 finished, 1 failed, 1 running; best 2.2500, trial 1 (*)" in text


def test_a_headline_alone_has_no_mark_of_the_table():
    assert table.headline([row(0, value=2.5)], 4) == "4 trials: 1 finished; best 2.5000, trial 0"


def test_of_many_trials_it_shows_those_that_run_or_failed_and_the_best():
    rows = [row(number, value=float(number)) for number in range(100)]
    rows[50], rows[60], rows[70] = row(50, "running"), row(60, "failed"), row(70, "interrupted")
    rows += [row(number, "waiting") for number in range(100, 200)]
    numbers = {r.number for r in table._shown(rows)}
    assert {50, 60, 70, *range(10), 99} <= numbers
    assert len(numbers) == 30
    assert max(numbers) == 99


def test_few_begun_trials_leave_room_for_the_next():
    rows = [row(0, "running"), *(row(number, "waiting") for number in range(1, 100))]
    assert {r.number for r in table._shown(rows)} == set(range(30))


@pytest.mark.parametrize(
    ("content", "step"),
    [
        ("", 0),
        ('{"step": 3}\n{"step": 7}\n', 7),
        ('{"step": 3}\n{"step": 7, "lo', 3),
        ('{"step": 3, "long": "' + "x" * 20_000 + '"}\n{"step": 9}\n', 9),
    ],
)
def test_the_step_is_that_of_the_newest_whole_line(tmp_path, content, step):
    assert table._last_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text(content)
    assert table._last_step(tmp_path) == step
