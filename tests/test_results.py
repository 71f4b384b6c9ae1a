"""docs/results.md and README.md say what the kept records say."""

import json
import re
from pathlib import Path

import pytest

from experiments import figures
from rbf_jax.analysis import claims
from rbf_jax.analysis.claims import verdicts

REPOSITORY = Path(__file__).parents[1]
RECORDS = REPOSITORY / "docs" / "measurements" / "experiments"


def draw(figure, records, out, *, write=False):
    """As `make figures` draws, elsewhere; pictures are drawn but not written, to save time."""
    command = ["figures", f"--figure={figure}", "--scale=paper", "--kept", f"--out={out}"]
    with pytest.MonkeyPatch.context() as patch:
        if not write:
            patch.setattr(claims, "save_figure", lambda *_: None)
        assert figures.main([*command, f"--records={RECORDS / records}"]) == 0
    return out


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return draw("all", "paper", tmp_path_factory.mktemp("stories"))


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory):
    return draw("loss_curves,key_norms", "wikitext", tmp_path_factory.mktemp("wikitext"))


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    return draw("loss_curves,key_norms", "again", tmp_path_factory.mktemp("again"))


def leaves(content, path=()):
    """(path, value) of all that is no dict or list; logarithms differ in the last bits by CPU."""
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            yield from leaves(value, (*path, key))
    else:
        exact = not isinstance(content, float)
        yield path, content if exact else pytest.approx(content, rel=1e-9, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("text", ["stories", "wikitext", "again"])
def test_the_pictures_are_those_of_the_records(text, request):
    folder = {"stories": "results"}.get(text, text)
    kept = REPOSITORY / "docs" / "figures" / folder
    drawn = request.getfixturevalue(text)
    names = sorted(p.stem for p in drawn.glob("*.json"))
    assert len(names) == {"stories": len(claims.FIGURES) + 1}.get(text, 3)
    for name in names:
        numbers = json.loads((drawn / f"{name}.json").read_text())
        there = json.loads((kept / f"{name}.json").read_text())
        assert dict(leaves(there)) == dict(leaves(numbers)), f"make figures: {name}"
        if name != "verdicts":
            assert {(kept / f"{name}.{kind}").is_file() for kind in ("png", "svg")} == {True}


def read_verdicts(folder):
    return [
        verdicts.Verdict(**{**v, "figures": tuple(v["figures"])})
        for v in json.loads((folder / "verdicts.json").read_text())
    ]


def test_trained_from_nothing_the_verdicts_are_the_same(stories, again):
    kept = {v.claim: v.verdict for v in read_verdicts(stories)}
    found = {v.claim: v.verdict for v in read_verdicts(again)}
    assert len(found) == 3
    assert found.items() <= kept.items()


def test_the_tables_are_those_of_the_records(stories, wikitext, again):
    found, others = read_verdicts(stories), read_verdicts(wikitext)
    assert (len(found), len(others)) == (7, 3)
    assert not any(v.measured.startswith("not measured") for v in (*found, *others))
    results = (REPOSITORY / "docs" / "results.md").read_text()
    assert verdicts.table(found, "figures/results/") in results
    assert verdicts.table(others, "figures/wikitext/") in results
    short = verdicts.short_table(found, {"WikiText-2": others})
    assert short in (REPOSITORY / "README.md").read_text()
    for folder in (stories, wikitext, again):
        for name, table in claims.TABLES.items():
            if (folder / f"{name}.json").is_file():
                assert table(json.loads((folder / f"{name}.json").read_text())) in results, name


def test_links_of_the_results_lead_somewhere():
    docs = REPOSITORY / "docs"
    links = re.findall(r"\]\(([^)#]+)\)", (docs / "results.md").read_text())
    assert len(links) > 10
    assert [link for link in links if not (docs / link).exists()] == []


@pytest.mark.exhaustive
def test_every_picture_can_be_written(tmp_path):
    draw("all", "paper", tmp_path, write=True)
    assert {path.stem for path in tmp_path.glob("*.png")} == set(claims.FIGURES)
