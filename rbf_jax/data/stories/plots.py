"""Plots about things: lost, traded, bought, broken, built, stolen, buried.

A plot finds the hero, a friend, an elder of the hero's family, a place and the weather among the
facts (`rbf_jax.data.stories.frame`), tells what happens, and leaves something to remember.
Whatever is said early (who owns what, its color, a list, a clue) is needed again later.
"""

from __future__ import annotations

from rbf_jax.data.stories import words
from rbf_jax.data.stories.teller import Teller, listed


def lost_thing(t: Teller) -> None:
    """A gift is lost, looked for in the wrong places, and found with the help of a witness."""
    first, second, last = t.sample(words.SPOTS, 3)
    found = t.sample(words.FINDS, 2)
    t.know(first=first, second=second, last=last, find=found[0], other=found[1])
    worker = t.person(animal=False)
    t.cast("witness", worker)
    t.know(job=t.pick(words.WORKERS))
    t.tell(
        "{hero} had a {color} {toy}(| that {hero.he} loved more than anything).",
        "the best thing {hero} owned was a {color} {toy}.",
    )
    t.tell(
        "it was a (present|gift) from {hero.his} {elder.word}.",
        "{elder} had (made it|given it to {hero.him}) for {hero.his} birthday.",
    )
    t.know(
        loss={
            "windy": "the wind tore the {toy} out of {hero.his} hands and carried it away",
            "rainy": "the {toy} slipped out of {hero.his} wet hands without a sound",
            "snowy": "the {toy} fell into the snow and was gone",
            "foggy": "the {toy} dropped out of {hero.his} bag, and in the fog nobody saw it",
        }.get(t.facts["weather"], "a cheeky magpie grabbed the {toy} and flew away with it")
    )
    t.tell("{once}, {hero} took it along to play {place.at}.")
    t.tell("(suddenly,|before {hero.he} knew it,|all at once,) {loss}.")
    t.paragraph()
    t.tell(
        '"my {toy}! where is my {toy}?" cried {hero}.',
        '"oh no! I have lost my {toy}!" {hero.he} (cried|called).',
    )
    t.tell(
        '{friend} {friend.came} at once. "(do not cry|do not worry), {hero}. we will find it," '
        "{friend.he} said.",
        '"I will help you look for it," said {friend}.',
    )
    t.tell(
        "first they looked {first}, but there was (only|nothing but) a {find}.",
        "they searched {first}. they found a {find}, but no {toy}.",
    )
    t.tell(
        "then they looked {second}. there they found a {other}, but (not the|no) {toy}.",
        "{second}, there was a {other} and (nothing else|a lot of dust).",
    )
    t.maybe(0.6, "{hero} (felt very sad|wanted to give up|sat down and sighed).")
    t.paragraph()
    t.tell(
        "on the path they met {witness} the {job}.",
        "just then {witness} the {job} came (along|by|down the path).",
    )
    t.tell(
        '"have you seen a {color} {toy}?" asked {hero}.',
        '"did you see a {toy}?" asked {friend}. "it is {color}."',
    )
    t.tell('"I saw something {color} {last}," (said|answered) {witness}.')
    t.tell(
        "they ran there as fast as they could. and {last}, there it was, the {color} {toy}!",
        "and really, {last} lay the {toy}, as {color} as ever.",
    )
    t.tell(
        "to say thank you, {hero} gave {witness} the {find} and {friend} kept the {other}.",
        "{hero} thanked {witness} and gave {witness.him} the {find} that they had found {first}.",
        "{witness} was happy too, because {friend} gave {witness.him} the {other} "
        "that had been lying {second}.",
    )
    t.remember(
        "how {loss}",
        "how {witness} had seen the {toy} {last}",
        "how they had found the {toy} {last}",
    )
    t.morals = (
        "(if you|when you) keep looking, you will find what you have lost",
        "it is easier to find things with the help of others",
    )


def trade_chain(t: Teller) -> None:
    """A wants what B has, who wants what C has; back along the chain everybody gets theirs."""
    length = t.number(2, 4)
    goods = t.sample(words.TOYS, length + 1)
    jobs = t.sample(words.WORKERS, length)
    people = [t.person(animal=False) for _ in range(length)]
    t.know(start=goods[-1], goal=goods[0], goal_color=t.pick(words.COLORS))
    t.tell(
        "in {hero.his} pocket {hero} had an old {start}(| that {hero.he} did not need any more).",
        "{hero} had an old {start}, but what {hero.he} really wanted was a {goal}.",
    )
    t.tell(
        "{place.at}, {hero} saw a {goal_color} {goal}. {hero.he} wanted it very much.",
        "{once} {hero.he} saw a {goal_color} {goal} {place.at}.",
    )
    for step, (who, job) in enumerate(zip(people, jobs)):
        t.cast("owner", who)
        t.know(job=job, has=goods[step], wants=goods[step + 1])
        t.paragraph()
        t.tell(
            "the {has} belonged to {owner} the {job}.",
            "{owner} the {job} had a {has}.",
        )
        t.tell(
            '"I will give you my {has} if you bring me a {wants}," said {owner}.',
            '"may I have your {has}?" asked {hero}. "yes, but I need a {wants} for it," said '
            "{owner}.",
        )
    t.tell(
        '"a {start}? but I have a {start}!" cried {hero}.',
        "{hero} laughed and pulled the {start} out of {hero.his} pocket.",
    )
    t.paragraph()
    for step in range(length - 1, -1, -1):
        t.cast("owner", people[step])
        t.know(has=goods[step], wants=goods[step + 1])
        t.tell(
            "{owner} took the {wants} and gave {hero} the {has}.",
            "{hero} gave {owner} the {wants} and got the {has}.",
            "for the {wants}, {owner} handed {hero.him} the {has}.",
        )
    t.tell(
        "now the {goal_color} {goal} was {hero.his} own, and everybody (had|got) what they wanted.",
        "so at last the {goal_color} {goal} belonged to {hero}, and all (of them|the others) "
        "were happy too.",
    )
    t.remember("how an old {start} had become a {goal_color} {goal}")
    t.morals = (
        "what one does not need may be just what another is looking for",
        "a fair trade makes both sides happy",
    )


def shopping(t: Teller) -> None:
    """A list is given, all but one thing are bought; which one is missing?"""
    count = t.number(3, 4)
    items = t.sample(words.GROCERIES, count)
    missing = t.number(0, count - 1)
    bought = [item for number, item in enumerate(items) if number != missing]
    t.know(
        list=listed(items),
        song=", ".join(items),
        bag=listed([f"the {item}" for item in t.sample(bought, count - 1)]),
        missing=items[missing],
        shop=t.pick(words.WORKERS),
    )
    t.tell(
        '"please go to the market and bring me {list}," said {elder}(| {once}).',
        '{elder} gave {hero} a basket. "we need {list}," {elder.he} said.',
    )
    t.tell(
        "so that {hero.he} would not forget, {hero} sang all the way, " + '"{song}, {song}!"',
        '"{list}, {list}," {hero} said to {hero.himself} on the way.',
    )
    t.paragraph()
    t.tell("(near|behind) the house of the {shop}, {hero} met {friend}.")
    t.tell(
        "{friend} wanted to (race|play hide and seek|look at a beetle|throw stones into the "
        "water), "
        "and {hero} (forgot the time|could not say no).",
        "they (played with a ball|told each other jokes|watched the clouds) until the bells rang.",
    )
    t.tell("then {hero} ran to the market and filled the basket in a great hurry.")
    t.tell(
        '"are you sure that you have everything?" asked {friend}.',
        '"let us see what is in the basket," said {friend}.',
    )
    t.tell("{hero} looked into the basket. there was {bag}.")
    t.tell(
        '"I forgot the {missing}!" (cried|said) {hero}.',
        '"the {missing}!" cried {hero}. "I forgot the {missing}!"',
    )
    t.tell(
        "{hero.he} ran back and (bought|got) the {missing} just before the shop closed.",
        "together they went back for the {missing}.",
    )
    t.paragraph()
    t.tell(
        'at home, {elder} put {list} on the table. "(well done|thank you), {hero}," '
        "said {hero.his} {elder.word}.",
        "{elder} looked into the basket and found {list}, just as {elder.he} had asked.",
    )
    t.remember("how {hero.he} had almost forgotten the {missing}")
    t.morals = (
        "first comes the work and then the play",
        "it is good to look twice before you go home",
    )


def broken_thing(t: Teller) -> None:
    """Something breaks; the truth is told, at once or after a bad night."""
    t.know(
        item=t.pick(words.FRAGILE),
        item_color=t.pick(words.COLORS),
        hiding=t.pick(words.SPOTS),
        animal=t.pick(("cat", "dog", "parrot", "wind")),
    )
    t.tell(
        "{elder} had a {item_color} {item} that stood (on the shelf|by the window|on the table).",
        "on the shelf stood a {item_color} {item}. {elder} was very proud of it.",
    )
    t.tell('"(please|you must) never play ball near the {item}," {elder.he} always said.')
    t.tell(
        "but {once} {hero} and {friend} played with {hero.his} {color} {toy} in the house.",
        "but {hero} was bored and threw {hero.his} {color} {toy} into the air, again and again.",
    )
    t.tell("(crash!|crack!|bang!) the {item} fell down and broke into {pieces} pieces.")
    t.paragraph()
    honest = t.chance(0.5)
    if honest:
        t.tell(
            '"we could say that it was the {animal}," whispered {friend}. {hero} shook '
            "{hero.his} head.",
            '"hide the pieces {hiding}!" said {friend}. but {hero} did not want to hide anything.',
        )
        t.tell(
            '{hero.he} went straight to {elder}. "I broke your {item}. I am sorry," {hero.he} '
            "said.",
        )
    else:
        t.tell("{hero} was afraid. {hero.he} hid the pieces {hiding}.")
        t.tell(
            '"who broke my {item}?" asked {elder}. "it was the {animal}," said {hero}.',
            "when {elder} asked about the {item}, {hero} blamed the {animal}.",
        )
        t.tell(
            "that night {hero.he} could not sleep. {hero.he} thought of the {pieces} pieces "
            "{hiding}.",
            "but {hero.he} could not eat and {hero.he} could not sleep, for it was not the "
            "{animal}.",
        )
        t.tell(
            'in the morning {hero} said, "it was not the {animal}. I broke the {item}, and the '
            'pieces are {hiding}."',
        )
    t.tell(
        '{elder} was quiet for a (moment|while). then {elder.he} said, "(thank you for telling me '
        'the truth|I am glad that you told me)."',
        '"a {item} can be mended," said {elder}. "telling the truth is harder."',
    )
    t.tell(
        "together they glued all {pieces} pieces, and the {item} was nearly as {item_color} as "
        "before.",
        "they took some glue and put the {pieces} pieces together again.",
    )
    if honest:
        t.remember("how {hero.he} had told the truth about the {item_color} {item}")
    else:
        t.remember("why {hero.he} would never blame the {animal} again")
    t.morals = (
        "the truth is better than a lie",
        "(everybody breaks something|mistakes happen), but it takes courage to say so",
    )


def building(t: Teller) -> None:
    """Something is built from what others give; each material comes back in the end."""
    count = t.number(2, 3)
    materials = t.sample(words.MATERIALS, count)
    givers = t.sample(words.WORKERS, count)
    owner = {name: giver for (name, _), giver in zip(materials, givers)}
    t.know(
        house=t.pick(("tree house", "little hut", "puppet theater", "clubhouse")),
        materials=listed([name for name, _ in materials]),
    )
    t.tell(
        "{hero} and {friend} wanted to build a {house} {place.at}.",
        '"let us build a {house} {place.at}!" said {hero}. {friend} loved the idea.',
    )
    t.tell('"we need {materials}," said {friend}(|, who had thought about it for a long time).')
    t.paragraph()
    for (name, giver), favor in zip(owner.items(), t.sample(_FAVORS, count)):
        t.know(material=name, giver=giver, favor=favor)
        t.tell(
            "the {giver} gave them {material} because they {favor}.",
            "from the {giver} they got {material}, and for that they {favor}.",
            "they {favor}, and so the {giver} let them have some {material}.",
        )
    t.paragraph()
    t.tell("for {days} days they (sawed and hammered|worked from morning to evening).")
    for name, part in t.sample(materials, count):
        t.know(material=name, part=part, giver=owner[name])
        t.tell(
            "{part} made from the {material} of the {giver}.",
            "{part} made of {material}, and they thanked the {giver} for it.",
        )
    t.know(guests=listed([f"the {giver}" for giver in givers]))
    t.tell(
        "when the {house} was ready, they invited {guests}.",
        "on the first evening, {guests} came to see the {house}.",
    )
    t.tell('"(how beautiful|well done)!" said all of them.', "everybody clapped and drank tea.")
    t.remember("how {hero.he} had built a {house} with {materials}")
    t.morals = (
        "many hands make a big work small",
        "what friends build together stands firmly",
    )


_FAVORS = (
    "swept the yard",
    "carried wood into the kitchen",
    "washed all the windows",
    "found the lost keys",
    "brushed the old donkey",
    "picked up the apples",
    "fed the ducks for a week",
)


def thief(t: Teller) -> None:
    """Something is stolen; one of three suspects fits the clue."""
    suspects = t.sample(words.THIEVES, 3)
    guilty = t.number(0, 2)
    t.know(
        cake=t.pick(("apple cake", "cherry pie", "honey cake", "loaf of bread", "plum tart")),
        sill=t.pick(("on the window sill", "on the table", "on the stone wall", "by the oven")),
    )
    t.tell("{elder} had baked (a big|a fine|a lovely) {cake} and put it {sill} to cool.")
    t.tell("three animals lived near the house.")
    for animal, description, _ in suspects:
        t.know(animal=animal, description=description)
        t.tell("the {animal} {description}.")
    t.paragraph()
    t.tell("when {hero} came home from {place}, the {cake} was gone!")
    t.know(clue=suspects[guilty][2], animal=suspects[guilty][0])
    others = [name for number, (name, _, _) in enumerate(suspects) if number != guilty]
    t.know(wrong=others[0], also_wrong=others[1])
    t.maybe(0.6, '"it must have been the {wrong}," said {friend}. "wait," said {hero}.')
    t.tell(
        "{sill}, {hero} found {clue}.",
        "{hero} looked (closely|carefully), and what did {hero.he} find {sill}? {clue}!",
    )
    t.tell(
        '"now I know who it was," said {hero}. "it was not the {wrong} and not the {also_wrong}. '
        "it "
        'was the {animal}!"',
        '"look at this," said {hero}. "it was the {animal} who took the {cake}!"',
    )
    t.tell(
        "they found the {animal} {spot}, with crumbs all over its face.",
        "and there was the {animal}, asleep {spot}, with a very round belly.",
    )
    t.tell(
        "{elder} laughed and baked another {cake}, and this time {hero} kept watch.",
        '"next time, ask me for a piece," {hero} told the {animal}.',
    )
    t.remember("how {clue} had shown that it was the {animal}")
    t.morals = (
        "you should look carefully before you blame anyone",
        "small signs can tell the whole story",
    )


def treasure(t: Teller) -> None:
    """Directions are read, then followed in order; what is found was lost in an earlier tale."""
    count = t.number(2, 4)
    marks = t.sample(words.LANDMARKS, count)
    treasure_toy = t.pick(words.TOYS)
    t.know(
        old=treasure_toy,
        old_color=t.pick(words.COLORS),
        last=t.pick(words.GROUND),
        where=t.pick(("an old book", "a dusty box", "a drawer", "the pocket of an old coat")),
    )
    t.tell(
        "when {elder} was a child, {elder.he} had lost a {old_color} {old}. {elder.he} still spoke "
        "about it.",
        '"when I was little, I had a {old_color} {old}, but I lost it," {elder} often said.',
    )
    t.tell("{once} {hero} found a (map|sheet of paper) in {where}.")
    path = ", then to ".join(marks)
    t.know(path=path)
    t.tell('it said, "go to {path}, and dig {last}."')
    t.tell("{hero} showed it to {friend}, and they (set out|left) at once.")
    t.paragraph()
    walks = t.sample(_WALKS, count)
    for step, mark in enumerate(marks):
        t.know(mark=mark, step=("first", "then", "after that", "at last")[step])
        t.tell(
            "{step} they came to {mark}.",
            '"here is {mark}!" (said|cried|called) {friend}.',
            "{step} they saw {mark}.",
        )
        t.maybe(0.3, walks[step])
    t.tell("then they dug {last}(| with their bare hands| with a spade and a stick).")
    t.tell("there was a (box|chest), and in it lay a {old_color} {old}!")
    t.paragraph()
    t.tell(
        '"this is the {old} that my {elder.word} lost!" (cried|said) {hero}.',
        "{hero} knew at once whose {old} it was.",
    )
    t.tell(
        "when {elder} saw the {old_color} {old}, {elder.he} (laughed and cried at once|could not "
        "speak for joy).",
        "{elder} held the {old} in {elder.his} hands and smiled like a child.",
    )
    t.remember("how {hero.he} had walked to {path}", "how the {old} had been lying {last}")
    t.morals = (
        "the best treasure is the joy of somebody you love",
        "what is lost is not always lost for ever",
    )


_WALKS = (
    "they were getting (tired|hungry), but they went on.",
    "a (lark|crow|blackbird) flew over their heads.",
    "{friend} told a joke, and they laughed.",
    "the path went (up and down|through tall grass).",
    "it began to rain a little.",
)
