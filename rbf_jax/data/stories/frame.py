"""The frame of a story: who, where and when; one or two plots; how it ends."""

from __future__ import annotations

from rbf_jax.data.stories import plots, plots_friends, words
from rbf_jax.data.stories.teller import Teller, listed

_PLOTS = (
    plots.lost_thing,
    plots.trade_chain,
    plots.shopping,
    plots.broken_thing,
    plots.building,
    plots.thief,
    plots.treasure,
    plots_friends.sharing,
    plots_friends.promise,
    plots_friends.fear,
    plots_friends.lost_animal,
    plots_friends.race,
    plots_friends.sick_friend,
    plots_friends.rescue,
)
_TWO_PLOTS = 0.3


def story(seed: int) -> str:
    """Returns the story of a seed: some 500 to 3,000 characters, a line a paragraph."""
    t = Teller(seed)
    chosen = t.sample(_PLOTS, 2 if t.chance(_TWO_PLOTS) else 1)
    _people(t)
    _opening(t, skill_needed=plots_friends.rescue in chosen)
    for number, plot in enumerate(chosen):
        t.paragraph()
        if number:
            _scene(t)
            t.tell("the next (day|morning) was {weather}.", "{days} days later {sky_later}.")
            t.know(once="that (day|morning)")
        plot(t)
    _closing(t)
    return t.text()


def _people(t: Teller) -> None:
    """Casts hero, friend and elder, and sets the first scene."""
    t.cast("hero", t.person(animal=t.chance(0.5)))
    t.cast("friend", t.person(animal=t.chance(0.5)))
    he = t.pick(("she", "he"))
    word = t.pick(words.ADULTS[he])
    t.know(elder="{hero.his} " + word)
    t.facts.update(
        {
            "elder.word": word,
            "elder.he": he,
            "elder.his": {"he": "his", "she": "her"}[he],
            "friend.came": t.pick(("came", "ran up", "was there")),
        }
    )
    first, second = t.sample(words.KIND_TRAITS, 2)
    t.facts.update({"hero.trait": first, "friend.trait": second})
    number = t.number(0, len(words.SKILLS) - 1)
    t.facts.update({"skill": words.SKILLS[number][0], "skill.number": str(number)})
    t.know(color=t.pick(words.COLORS), toy=t.pick(words.TOYS), once="one (day|morning|afternoon)")
    _scene(t)


def _scene(t: Teller) -> None:
    """Sets place, weather and numbers, anew for each plot."""
    t.place("place", t.pick(words.PLACES))
    weather, sky, ground = t.pick(words.WEATHER)
    t.know(
        weather=weather,
        sky=sky,
        sky_later=sky[0].lower() + sky[1:],
        ground=ground,
        days=words.NUMBERS[t.number(2, 9)],
        pieces=words.NUMBERS[t.number(3, 12)],
        spot=t.pick(words.SPOTS),
    )


def _opening(t: Teller, skill_needed: bool) -> None:
    t.tell(
        "once upon a time, there was a {hero.trait} (little|young|small) {hero.kind} "
        "(named|called) "
        "{hero}.",
        "{hero} was a {hero.trait} {hero.kind} who lived (near|not far from) {place}.",
        "in a (small|quiet|pretty) village lived a {hero.kind} (named|called) {hero}. {hero.he} "
        "was "
        "very {hero.trait}.",
        "there once was a {hero.kind} called {hero}, who was known to be {hero.trait}.",
    )
    t.tell(
        "{hero.his} best friend was {friend}, a {friend.trait} {friend.kind}.",
        "{hero.he} had a friend, a {friend.kind} (named|called) {friend}, who was very "
        "{friend.trait}.",
        "every day {hero.he} played with {hero.his} friend {friend}, the {friend.kind}.",
    )
    if t.chance(0.5):
        wear, where, undress = t.pick(words.CLOTHES)
        t.know(wear=f"{t.pick(words.COLORS)} {wear}", worn=where)
        t.know(undress=undress)
        t.tell("{hero} (always|usually) wore a {wear} {worn}.")
    if skill_needed or t.chance(0.3):
        t.tell(
            "{hero} could {skill}.",
            "what {hero} could do best was this: {hero.he} could {skill}.",
        )
    t.maybe(
        0.7,
        "{sky}, and {ground}.",
        "it was a {weather} (day|morning). {ground}.",
        "it was a {weather} (day|morning), and {hero} woke up early.",
    )


def _closing(t: Teller) -> None:
    t.know(recap=listed(t.recap))
    t.paragraph()
    t.tell(
        "(that evening|in the evening|at supper|before going to bed), {hero} told {elder} {recap}.",
        "{elder} listened when {hero} told the whole story, {recap}.",
        "for a long time {hero} and {friend} talked about {recap}.",
    )
    moral = t.pick(t.morals)
    t.know(moral=moral)
    t.tell(
        '"you see, {moral}," said {elder}.',
        "and {hero} had learned that {moral}.",
        "from that day on, {hero} and {friend} knew that {moral}.",
        '{hero} thought about it for a while. "{moral}," {hero.he} said.',
    )
    t.maybe(
        0.6,
        "{friend} had only one wish, to see {place} again.",
        "and {friend} the {friend.kind} (thought so too|nodded).",
        "they stayed friends (for ever|all their lives).",
        "and on the next {weather} day, you may see them {place.at}.",
    )
    if "wear" in t.facts:
        t.tell("then {hero} {undress} and (went to bed|fell asleep|closed {hero.his} eyes).")
