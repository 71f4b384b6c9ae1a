import json
import math
import re
import urllib.parse

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from rbf_jax.analysis.report import Section, markdown_table, write_report


def picture(value):
    figure = Figure(figsize=(2, 2), layout="constrained")
    figure.subplots().plot([0, value])
    return figure


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    sections = [
        Section("One", "Words.", {"a b": picture(1), "c": picture(2)}),
        Section("Two", "More words."),
    ]
    return write_report(
        tmp_path_factory.mktemp("x") / "a" / "out", "Title", sections, {"value": math.nan}
    )


def test_report_links_to_files_that_exist(written):
    report, numbers, *pictures = written
    text = report.read_text()
    assert text.startswith("# Title\n\n## One\n\nWords.\n")
    assert "\n## Two\n\nMore words.\n" in text
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links[0] == "figures/a%20b.png"
    assert [report.parent / urllib.parse.unquote(link) for link in links] == pictures
    assert len(pictures) == 4
    for path in (report, numbers, *pictures):
        assert path.stat().st_size > 0
    assert pictures[1].read_bytes().startswith(b"%PDF")
    image = np.asarray(Image.open(pictures[0]).convert("L"))
    assert image.std() > 10
    assert (image != np.asarray(Image.open(pictures[2]).convert("L"))).any()


def test_nothing_but_the_report_is_left(written):
    out = written[0].parent
    assert sorted(path for path in out.rglob("*") if path.is_file()) == sorted(written)


def test_numbers_are_json_that_any_reader_takes(tmp_path):
    numbers = {"a": [math.nan, math.inf, 1.5], "b": {"c": (1, None)}, "γ": "λ"}
    _, path = write_report(tmp_path, "Title", [], numbers)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    expected = {"a": [None, None, 1.5], "b": {"c": [1, None]}, "γ": "λ"}
    assert json.loads(path.read_text(), parse_constant=refuse) == expected


def test_a_report_replaces_the_one_before(tmp_path):
    first = write_report(tmp_path, "Title", [Section("One", "", {"c": picture(2)})], {})
    before = [path.read_bytes() for path in first]
    again = write_report(tmp_path, "Other", [Section("One", "", {"c": picture(2)})], {})
    assert again == first
    assert again[0].read_text().startswith("# Other")
    # The same figure gives the same bytes.
    assert [path.read_bytes() for path in again[2:]] == before[2:]


def test_vectors_may_be_svg(tmp_path):
    sections = [Section("One", "", {"c": picture(2)})]
    first = [p.read_bytes() for p in write_report(tmp_path / "a", "T", sections, {}, vectors="svg")]
    paths = write_report(tmp_path / "b", "T", sections, {}, vectors="svg")
    assert [path.name for path in paths[2:]] == ["c.png", "c.svg"]
    assert "](figures/c.svg)" in paths[0].read_text()
    assert b"</svg>" in first[3]
    # Without a date or chance in it.
    assert [path.read_bytes() for path in paths] == first


def test_markdown_table():
    assert markdown_table([["", "a|b"], ["x", "1"]]) == "|  | a\\|b |\n|:---|---:|\n| x | 1 |"
