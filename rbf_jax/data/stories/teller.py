"""What a plot needs to be told: chance, people, facts, and sentences that fill themselves in."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import TypeVar

from rbf_jax.data.stories import words

T = TypeVar("T")

_CHOICE = re.compile(r"\(([^()]*)\)")
_FACT = re.compile(r"\{([A-Za-z0-9_.]+)\}")
# Inside a template, sentences begin after ". ", "! " and "? ", with a quotation, and after a quoted
# statement; what follows a quoted question or call may go on ("Why?" asked Tom).
_SENTENCE = re.compile(r'([.!?] |\." |(?:^| )")([a-z])')
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
_PRONOUNS = {
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
}


@dataclasses.dataclass(frozen=True)
class Character:
    """Somebody: a name, "he" or "she", and what they are ("boy", "fox", "baker")."""

    name: str
    he: str
    kind: str


class Teller:
    """Tells one story. Everything follows from the seed, on any machine and Python version.

    Templates are sentences with choices, ``(big|small)``, and facts, ``{hero}`` or ``{hero.his}``;
    ``{Hero.he}`` is capitalised. Beginnings of sentences and "a"/"an" come out right by themselves.
    """

    def __init__(self, seed: int):
        # Of `random`, only this method is promised to give the same numbers for ever.
        self._random = random.Random(seed).random
        self.facts: dict[str, str] = {}
        self.recap: list[str] = []
        self.morals: tuple[str, ...] = ()
        self._paragraphs: list[list[str]] = [[]]
        self._names: set[str] = set()

    def chance(self, probability: float) -> bool:
        """Returns True with this probability."""
        return self._random() < probability

    def number(self, first: int, last: int) -> int:
        """Returns an integer from `first` to `last`, both included."""
        return first + int(self._random() * (last - first + 1))

    def pick(self, options: Sequence[T]) -> T:
        """Returns one of the options."""
        return options[int(self._random() * len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """Returns `count` different options."""
        rest = list(options)
        return [rest.pop(int(self._random() * len(rest))) for _ in range(count)]

    def person(self, animal: bool) -> Character:
        """Returns a child or an animal with a name that is new in this story."""
        he = self.pick(("he", "she"))
        names = words.BOYS if he == "he" else words.GIRLS
        name = self.pick([name for name in names if name not in self._names])
        self._names.add(name)
        child = "boy" if he == "he" else "girl"
        return Character(name, he, self.pick(words.ANIMALS) if animal else child)

    def cast(self, role: str, who: Character) -> None:
        """Makes a character known to the templates: {role}, {role.he}, {role.kind} and so on."""
        self.facts[role] = who.name
        self.facts[f"{role}.kind"] = who.kind
        for word, form in _PRONOUNS[who.he].items():
            self.facts[f"{role}.{word}"] = form

    def know(self, **facts: str) -> None:
        """Makes facts known to the templates; the values may be templates themselves."""
        for name, value in facts.items():
            self.facts[name] = self.fill(value)

    def place(self, role: str, place: tuple[str, str]) -> None:
        """Makes a place known: {role} is "the river", {role.at} "by the river"."""
        name, preposition = place
        self.facts[role] = name
        self.facts[f"{role}.at"] = f"{preposition} {name}"

    def fill(self, template: str) -> str:
        """Returns the template with choices made and facts filled in."""
        while "(" in template:
            template = _CHOICE.sub(lambda match: self.pick(match[1].split("|")), template)
        return _FACT.sub(self._fact, template)

    def tell(self, *templates: str) -> None:
        """Adds one of the templates to the paragraph."""
        sentence = self.fill(self.pick(templates))
        self._paragraphs[-1].append(sentence[0].upper() + sentence[1:])

    def maybe(self, probability: float, *templates: str) -> None:
        """Adds one of the templates, or nothing."""
        if self.chance(probability):
            self.tell(*templates)

    def paragraph(self) -> None:
        """Begins a paragraph."""
        self._paragraphs.append([])

    def remember(self, *templates: str) -> None:
        """Keeps something for the end of the story, as in "how the wind had taken the kite"."""
        self.recap.append(self.fill(self.pick(templates)))

    def text(self) -> str:
        """Returns the story, a line a paragraph."""
        return "\n".join(_polish(" ".join(lines)) for lines in self._paragraphs if lines)

    def _fact(self, match: re.Match[str]) -> str:
        key = match[1]
        if key[0].islower():
            return self.facts[key]
        value = self.facts[key[0].lower() + key[1:]]
        return value[0].upper() + value[1:]


def listed(items: Sequence[str]) -> str:
    """Returns "a", "a and b", or "a, b and c"."""
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} and {items[-1]}"


def _polish(paragraph: str) -> str:
    paragraph = _ARTICLE.sub(r"\1n ", paragraph)
    return _SENTENCE.sub(lambda match: match[1] + match[2].upper(), paragraph)
