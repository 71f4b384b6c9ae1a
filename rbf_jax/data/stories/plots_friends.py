"""Plots about one another: sharing, promises, courage, rescue. See `plots` for how they work."""

from __future__ import annotations

from rbf_jax.data.stories import words
from rbf_jax.data.stories.teller import Teller, listed


def sharing(t: Teller) -> None:
    """Treats are counted, eaten and given away; the numbers come out right."""
    total = t.number(5, 12)
    eaten = t.number(1, 2)
    given = t.number(1, total - eaten - 1)
    treat = t.pick(words.TREATS)
    t.know(
        treat=treat,
        treats=words.PLURALS.get(treat, f"{treat}s"),
        total=words.NUMBERS[total],
        eaten=words.NUMBERS[eaten],
        rest=words.NUMBERS[total - eaten],
        given=words.NUMBERS[given],
        kept=words.NUMBERS[total - eaten - given],
        present=t.pick(words.FINDS),
    )
    t.know(given_treats=_counted(given, "{treat}", "{treats}"))
    t.know(kept_treats=_counted(total - eaten - given, "{treat}", "{treats}"))
    t.tell(
        "{elder} gave {hero} {total} {treats}.",
        "{hero} had {total} {treats} in a (bag|little box|basket).",
    )
    t.tell("{hero.he} ate {eaten}, and then {hero.he} had {rest}(| left).")
    t.tell(
        "{place.at} {hero.he} met {friend}, who had nothing to eat.",
        "{friend} was sitting {place.at}, (hungry and sad|with an empty stomach).",
    )
    t.paragraph()
    if t.chance(0.5):
        t.tell(
            '"may I have some {treats}?" asked {friend}. "no, they are all mine," said {hero}.',
            "{hero} hid the {treats} behind {hero.his} back. {hero.he} did not want to share.",
        )
        t.tell("{friend} (said nothing and turned away|looked at the ground|went away slowly).")
        t.tell(
            "but the {treats} did not taste good any more. {hero} felt (cold inside|ashamed).",
            "{hero} looked at the {rest} {treats}. suddenly {hero.he} was not hungry at all.",
        )
        t.tell('"wait, {friend}!" {hero.he} (called|shouted).')
    else:
        t.tell(
            '"you look hungry," said {hero}.',
            '"please eat with me," said {hero}.',
        )
    t.tell(
        "{hero} gave {friend} {given_treats}, so {hero.he} had {kept_treats} left.",
        '{hero.he} counted. "{given} for you and {kept} for me," said {hero}.',
    )
    t.paragraph()
    t.tell(
        'the next day {friend} brought {hero} a {present}. "this is for the {given_treats}," '
        "{friend.he} said.",
        "{friend} never forgot the {given_treats} and gave {hero} a {present} in return.",
    )
    t.remember("how {hero.he} had shared {hero.his} {treats} with {friend}")
    t.morals = ("what we share tastes twice as good", "(giving|sharing) makes two people happy")


def promise(t: Teller) -> None:
    """A chore is promised; a game gets in between."""
    chore, trouble, repair, done = t.pick(words.CHORES)
    t.know(chore=chore, trouble=trouble, repair=repair, done=done)
    t.know(game=t.pick(("hide and seek", "pirates", "catch", "kings and queens", "leapfrog")))
    t.tell(
        '"will you {chore} before the sun goes down?" asked {elder}. "yes, I promise," said '
        "{hero}.",
        "{hero} promised {elder} to {chore} before (dark|the evening).",
    )
    t.tell(
        "but then {friend} came and wanted to play {game} {place.at}.",
        '"come and play {game} with us {place.at}!" called {friend}.',
    )
    forgot = t.chance(0.6)
    if forgot:
        t.tell(
            "they played so well that {hero} forgot (everything else|the promise|the time).",
            '"I can do my work later," thought {hero}, and off they ran.',
        )
        t.paragraph()
        t.tell(
            "when {hero} came home in the evening, {trouble}.",
            "the sun went down, and only then did {hero} remember. {hero.he} ran home, but "
            "{trouble}.",
        )
        t.tell(
            '"I am so sorry," said {hero}. "I promised to {chore}, and I did not do it."',
            "{hero} saw what {hero.he} had done, and {hero.his} eyes filled with tears.",
        )
        t.tell("{hero.he} {repair}.", "with the help of {friend}, {hero.he} {repair}.")
        t.remember("why {hero.he} had forgotten to {chore}")
    else:
        t.tell(
            '"first I have to {chore}," said {hero}. "I promised it."',
            "{hero} wanted to go very much, but {hero.he} thought of {hero.his} promise.",
        )
        t.tell(
            '{friend} nodded. "then I will help you, and afterwards we play {game}."',
            "{friend} waited a little, and then they played {game} until the evening.",
        )
        t.paragraph()
        t.tell("when {elder} came home, {done}.")
        t.tell('"I knew that I could trust you," said {hero.his} {elder.word}.')
        t.remember("how {hero.he} had kept {hero.his} promise to {chore}")
    t.morals = ("a promise is a promise", "we must do what we have promised")


def fear(t: Teller) -> None:
    """A friend's trick against fear is used when it matters."""
    feared, ordeal = t.pick(words.FEARS)
    count = t.number(3, 7)
    trick = t.number(0, 2)
    t.know(
        feared=feared,
        ordeal=ordeal,
        counting=", ".join(words.NUMBERS[1 : count + 1]),
        upto=words.NUMBERS[count],
        song=t.pick(("the moon", "the sea", "a brave snail", "seven ducks", "the spring")),
        baby=t.pick(words.BABIES),
        charm=t.pick(words.FINDS),
    )
    t.tell(
        "there was one thing that {hero} was afraid of, and that was {feared}.",
        "{hero} was not afraid of (wolves|storms|bears), but {hero.he} was afraid of {feared}.",
    )
    t.tell(
        (
            '"when I am afraid, I count to {upto} very slowly," {friend} told {hero.him}.',
            '"when I am afraid, I sing the song about {song}," {friend} told {hero.him}.',
            '{friend} gave {hero.him} a {charm}. "hold it tight when you are afraid," '
            "said {friend}.",
        )[trick]
    )
    t.paragraph()
    t.tell(
        "(some|{days}) days later, a {baby} was in danger. to save it, {hero} had to go to "
        "{ordeal}.",
        "{once} {hero} heard a {baby} crying. it came from {ordeal}.",
    )
    t.tell(
        "{hero.his} knees (shook|trembled) and {hero.his} heart beat fast.",
        '"I cannot do it," thought {hero}. {hero.his} hands were cold.',
    )
    t.tell("then {hero.he} remembered {friend}(|, and what {friend.he} had said).")
    t.tell(
        (
            '"{counting}," {hero} counted.',
            "{hero.he} began to sing the song about {song}, first softly and then louder.",
            "{hero} felt the {charm} in {hero.his} hand and held it tight.",
        )[trick]
    )
    t.tell(
        "step by step {hero.he} went on, (took|lifted) the {baby} in {hero.his} arms and carried "
        "it "
        "home.",
        "and so {hero.he} came to the {baby}, and the {baby} was saved.",
    )
    t.tell(
        (
            '"I counted to {upto}, as you told me," {hero} said to {friend}.',
            '"your song about {song} helped me," {hero} said to {friend}.',
            "{hero} wanted to give the {charm} back, but {friend} said that {hero} should keep it.",
        )[trick]
    )
    t.remember("how {hero.he} had been stronger than {hero.his} fear of {feared}")
    t.morals = (
        "to be brave means to go on although you are afraid",
        "fear becomes small when you look at it",
    )


def lost_animal(t: Teller) -> None:
    """A baby animal describes its home; the way there passes what it described."""
    count = t.number(2, 3)
    marks = t.sample(words.LANDMARKS, count + 1)
    t.know(
        baby=t.pick(words.BABIES),
        clues=listed(marks[:count]),
        wrong=marks[count],
        gift=t.pick(words.FINDS),
    )
    t.cast("little", t.person(animal=False))
    t.tell(
        "{place.at}, {hero} and {friend} heard somebody crying. it was a {baby}.",
        "a little {baby} was sitting {place.at} and crying.",
    )
    t.tell(
        '"I am {little}, and I have lost my mother," {little.he} (said|sobbed).',
        "{little.his} name was {little}, and {little.he} had lost {little.his} mother.",
    )
    t.tell(
        '"what do you remember of your home?" asked {friend}. "near my home there is {clues}," '
        "said {little}.",
        '"I only remember {clues}," said the {baby}. "that is where I live."',
    )
    t.paragraph()
    t.maybe(
        0.6,
        'soon they saw {wrong}. "is it here?" asked {hero}. "no," said {little}.',
        "they came to {wrong}, but the {baby} shook {little.his} head.",
    )
    for step, mark in enumerate(marks[:count]):
        t.know(mark=mark, step=("first", "then", "and at last")[step])
        t.tell(
            '{step} they found {mark}. "(yes|oh yes|that is it)!" said {little}.',
            "{step} there was {mark}, just as {little} had said.",
        )
    t.tell(
        "a moment later {little.his} mother came running and held {little} tight.",
        'there stood {little.his} mother. "{little}, my little {baby}!" she called.',
    )
    t.tell(
        "she gave {hero} and {friend} a {gift} to thank them.",
        "as a thank you, {hero} got a {gift} that shone in the light.",
    )
    t.remember(
        "how they had brought {little} the {baby} home", "what {little} had said about {mark}"
    )
    t.morals = (
        "whoever helps the small ones has a big heart",
        "a little help can mean the whole world to somebody",
    )


def race(t: Teller) -> None:
    """One boasts and rests, the other goes on."""
    rival = t.person(animal=True)
    t.cast("rival", rival)
    start, goal = t.sample(words.PLACES, 2)
    t.place("start", start)
    t.place("goal", goal)
    t.know(
        prize=t.pick(words.TOYS),
        prize_color=t.pick(words.COLORS),
        rest=t.pick(("slept under a tree", "ate berries", "admired {rival.himself} in a puddle")),
        judge=t.pick(words.WORKERS),
    )
    t.tell(
        "{rival} the {rival.kind} (said|boasted) every day that nobody was faster than {rival.he}.",
        '"nobody can beat me!" {rival} the {rival.kind} used to say.',
    )
    t.tell('"let us race from {start} to {goal}," said {hero}(| {once}).')
    t.tell(
        "the {judge} was the judge, and the winner would get a {prize_color} {prize}.",
        'the {judge} held up a {prize_color} {prize}. "this is for the winner," said the {judge}.',
    )
    t.paragraph()
    t.tell("(one, two, three, go!|ready, steady, go!) {rival} ran off like an arrow.")
    t.tell(
        'soon {rival} was far ahead. "I have so much time," thought {rival}, and {rival.he} '
        "{rest}.",
        "halfway, {rival} stopped. {rival.he} was so sure of winning that {rival.he} {rest}.",
    )
    t.tell(
        "{hero} did not stop. step by step {hero.he} went on, past the place where {rival} {rest}.",
        "but {hero} ran and ran, not fast, but without a (rest|break).",
    )
    t.maybe(0.6, '"go on, {hero}!" shouted {friend} from the side of the road.')
    t.paragraph()
    t.tell(
        "when {rival} reached {goal}, {hero} was already there.",
        "{rival} ran as fast as {rival.he} could, but {hero} came to {goal} first.",
    )
    t.tell(
        "the {judge} gave {hero} the {prize_color} {prize}.",
        "so the {prize_color} {prize} of the {judge} belonged to {hero}.",
    )
    t.tell(
        '"next time I will not rest," said {rival}, and they shook hands.',
        "{rival} was angry at first, but then {rival.he} laughed about {rival.himself}.",
    )
    t.remember("how {hero.he} had won the {prize} because {rival} {rest}")
    t.morals = ("slow and steady wins the race", "it is not wise to boast before the end")


def sick_friend(t: Teller) -> None:
    """What a sick friend likes is said early and brought later."""
    t.know(
        flower=t.pick(words.FLOWERS),
        flower_color=t.pick(words.FLOWER_COLORS),
        meal=t.pick(("carrot soup", "rice with milk", "honey tea", "apple cake", "warm bread")),
        illness=t.pick(("a sore throat", "a fever", "a bad cough", "a broken leg")),
        where=t.pick(words.GROUND),
    )
    t.tell(
        "{friend} liked two things best, {meal} and {flower_color} flowers.",
        "everybody knew that {friend} loved {meal}, and that {friend.his} favorite color was "
        "{flower_color}.",
    )
    t.tell(
        "{once} {friend} did not come to {place}. {friend.he} had {illness} and had to stay in "
        "bed.",
        "but now {friend} was ill. {friend.he} had {illness}.",
    )
    t.tell(
        '"what would make {friend} happy?" {hero} asked {elder}.',
        "{hero} (thought and thought|wanted to help).",
    )
    t.paragraph()
    t.tell(
        "with {elder}, {hero.he} cooked {meal}.",
        '"I know! we will make {meal}," said {hero}, and {elder} lit the stove.',
    )
    t.tell(
        "then {hero.he} went out and looked for flowers. {where} grew a {flower_color} {flower}.",
        "{where}, {hero} found a {flower_color} {flower}.",
    )
    t.tell(
        '{friend} smiled for the first time in {days} days. "{meal} and a {flower_color} {flower}! '
        'you know me well," said {friend}.',
        "{hero} put the {flower_color} {flower} next to the bed, and {friend} ate all of the "
        "{meal}.",
    )
    t.tell(
        "after {days} more days {friend} was well again.",
        "{days} days later {friend} could get up and play.",
    )
    t.remember("how a {flower_color} {flower} had made {friend} smile")
    t.morals = (
        "a good friend is the best medicine",
        "a friend remembers what you like",
    )


def rescue(t: Teller) -> None:
    """Somebody is in trouble; what the hero is good at, told at the beginning, helps."""
    _, places, trouble, deed = words.SKILLS[int(t.facts["skill.number"])]
    t.place("place", t.pick(places))
    t.know(baby=t.pick(words.BABIES), trouble=trouble, deed=deed.replace("{it}", "the {baby}"))
    t.tell(
        "{place.at} they met a {baby}. it {trouble}.",
        '"help!" cried {friend} {place.at}. "a {baby}!" The poor {baby} {trouble}.',
    )
    t.tell(
        '"what can we do?" asked {friend}. "I am not able to help."',
        "{friend} ran to get help, but nobody was near.",
    )
    t.tell(
        '"I can {skill}," said {hero}. "let me try."',
        "then {hero} thought of what {hero.he} could do best.",
    )
    t.tell("{hero.he} {deed}.")
    t.tell(
        "the {baby} was safe. {friend} (clapped|cheered|hugged {hero}).",
        '"you did it!" cried {friend}, and the {baby} licked {hero.his} hand.',
    )
    t.remember("how {hero.he} had saved a {baby} because {hero.he} could {skill}")
    t.morals = (
        "everybody is good at something, and one day it will be needed",
        "everybody should use what they can do to help others",
    )


def _counted(count: int, one: str, many: str) -> str:
    return f"{words.NUMBERS[count]} {one if count == 1 else many}"
