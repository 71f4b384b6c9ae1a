import hashlib
import re

import pytest

from rbf_jax.data import stories
from rbf_jax.data.stories.teller import Teller


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[str]]:
    return {split: list(stories.generate(split)) for split in ("train", "valid")}


def test_the_corpus_is_the_pinned_one(corpus):
    text = "".join(f"{story}\0" for story in [*corpus["train"], *corpus["valid"]])
    assert hashlib.sha256(text.encode()).hexdigest() == stories.CORPUS_SHA256
    assert 4_500_000 < len(text) < 5_500_000


def test_no_story_is_told_twice(corpus):
    everything = [*corpus["train"], *corpus["valid"]]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize(
    "wrong",
    [
        r"[{}|()]",  # a template that was not filled in
        r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou\W]",
        r"[.!?] [a-z]",
        r"  | \n|\n ",
        r"\b(\w+) \1\b",
    ],
)
def test_stories_are_written_properly(corpus, wrong):
    found = re.search(wrong, "\n".join(corpus["valid"] + corpus["train"][:500]))
    assert found is None


def test_what_was_said_early_returns(corpus):
    # The color of what was lost, on the far side of a search; one in fourteen plots.
    lost = [
        (story, match)
        for story in corpus["train"]
        if (match := re.search(r"I saw something (\w+) ", story))
    ]
    assert len(lost) > 200
    for story, match in lost:
        owned = re.findall(rf"(?:had an?|owned was an?) {match[1]} (\w+)", story[: match.start()])
        assert any(
            f"the {match[1]} {toy}" in story[match.end() :]
            or f"the {toy}, as {match[1]}" in story[match.end() :]
            for toy in owned
        )


def test_pronouns_agree(corpus):
    worn = re.compile(
        r"\b(boy|girl)\b (?:called|named) (\w+)\.(?s:.)*\2 \w+ wore an? [^.]* (his|her)\b"
    )
    found = [match for story in corpus["train"] if (match := worn.search(story))]
    assert len(found) > 100
    assert {(match[1], match[3]) for match in found} == {("boy", "his"), ("girl", "her")}


def test_templates():
    teller = Teller(0)
    teller.know(thing="owl")
    teller.tell('a {thing} said, "a {thing}? {Thing}!" it (laughed|laughed). so it was.')
    assert teller.text() == 'An owl said, "An owl? Owl!" it laughed. So it was.'
