"""docs/results.md and README.md say what the kept records say."""

import json
import re
from pathlib import Path

import pytest

from experiments import figures
from rbf_jax.analysis import claims
from rbf_jax.analysis.claims import verdicts

REPOSITORY = Path(__file__).parents[1]
SCALE = "small"


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Drawn from the records as `make figures` draws, elsewhere."""
    out = tmp_path_factory.mktemp("figures")
    command = ["figures", "--figure=all", f"--scale={SCALE}", "--kept", f"--out={out}"]
    assert figures.main(command) == 0
    return out


def test_the_pictures_are_those_of_the_records(judged):
    kept = REPOSITORY / "docs" / "figures" / "results"
    for name in claims.FIGURES:
        numbers = json.loads((judged / f"{name}.json").read_text())
        assert json.loads((kept / f"{name}.json").read_text()) == numbers, f"make figures: {name}"
        assert {(kept / f"{name}.{kind}").is_file() for kind in ("png", "svg")} == {True}


def test_the_tables_are_those_of_the_records(judged):
    found = [
        verdicts.Verdict(**{**v, "figures": tuple(v["figures"])})
        for v in json.loads((judged / "verdicts.json").read_text())
    ]
    assert not any("not measured" in v.measured for v in found)
    results = (REPOSITORY / "docs" / "results.md").read_text()
    assert verdicts.table(found, "figures/results/") in results
    assert verdicts.short_table(found) in (REPOSITORY / "README.md").read_text()


def test_links_of_the_results_lead_somewhere():
    docs = REPOSITORY / "docs"
    links = re.findall(r"\]\(([^)#]+)\)", (docs / "results.md").read_text())
    assert len(links) > 10
    assert [link for link in links if not (docs / link).exists()] == []
