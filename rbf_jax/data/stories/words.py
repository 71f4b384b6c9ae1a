"""The words of the stories. Changing anything here changes the corpus and its pinned hash."""
# ruff: noqa: SIM905  (words in a line read better than a word a line)

BOYS = (
    "Tom Ben Sam Max Leo Jack Finn Noah Oscar Hugo Theo Eli Jonas Milo Felix Toby Peter Adam Luca "
    "Omar Henry Paul Victor Ravi"
).split()
GIRLS = (
    "Anna Lily Mia Emma Zoe Ruby Clara Nina Ella Rosa Ivy Maya Lucy Sara Alma Freya Tess Hanna "
    "Amira June Nora Greta Stella Leila"
).split()
ANIMALS = (
    "fox rabbit bear mouse hedgehog squirrel frog duck badger otter mole goat lamb beaver"
).split()

KIND_TRAITS = "kind gentle cheerful curious clever brave friendly patient loyal quiet".split()
ADULTS = {
    "she": ("mother", "grandmother", "aunt"),
    "he": ("father", "grandfather", "uncle"),
}
WORKERS = (
    "baker farmer gardener miller shoemaker librarian carpenter fisherman painter shepherd tailor "
    "postman"
).split()

FLOWER_COLORS = "red blue yellow white orange purple pink".split()
COLORS = "red blue green yellow white brown orange purple silver golden pink black".split()
TOYS = (
    "kite ball boat drum whistle scarf lantern ring hat book bell umbrella blanket ribbon flute "
    "doll wagon puppet necklace cap"
).split()
FINDS = [
    *"button feather shell coin pebble spoon marble acorn nail leaf cork".split(),
    *("pine cone", "piece of string", "bit of glass"),
]
TREATS = "apple pear plum cookie muffin carrot bun pancake nut cherry".split()
PLURALS = {"cherry": "cherries"}
GROCERIES = (
    "bread milk honey cheese flour butter salt rice soup tea sugar jam oil corn pepper fish"
).split()
FRAGILE = "vase cup bowl lamp plate jug mirror clock".split()
FLOWERS = "rose tulip daisy lily violet poppy sunflower bluebell".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()

# A place, and how one is there.
PLACES = (
    ("the garden", "in"),
    ("the forest", "in"),
    ("the river", "by"),
    ("the pond", "by"),
    ("the meadow", "in"),
    ("the hill", "on"),
    ("the beach", "on"),
    ("the market", "at"),
    ("the old mill", "near"),
    ("the school", "behind"),
    ("the orchard", "in"),
    ("the bridge", "near"),
    ("the well", "near"),
    ("the harbor", "at"),
    ("the village square", "in"),
    ("the lake", "by"),
    ("the church", "behind"),
    ("the farm", "on"),
)
SPOTS = (
    "under the old bench",
    "behind the big stone",
    "inside the hollow tree",
    "between the roots of the oak",
    "beside the well",
    "on top of the wall",
    "among the tall reeds",
    "under the blackberry bush",
    "behind the barn",
    "in the long grass",
    "next to the broken fence",
    "under the wooden stairs",
    "behind the water barrel",
    "at the foot of the hill",
    "near the beehives",
    "inside an empty basket",
)
# Where one can dig, and where flowers grow.
GROUND = tuple(spot for spot in SPOTS if spot.split()[0] not in ("inside", "on", "among"))
LANDMARKS = (
    "a crooked tree",
    "a bridge made of stone",
    "a house with a red door",
    "a field of yellow flowers",
    "a tall white rock",
    "a stream full of frogs",
    "a row of seven birches",
    "a windmill without wings",
    "a pond with two swans",
    "a gate painted green",
    "a hill shaped like an egg",
    "an empty bird nest",
    "a well with a rusty bucket",
    "a wall covered with ivy",
)
WEATHER = (
    ("sunny", "The sun was shining", "warm light lay on the roofs"),
    ("windy", "A strong wind was blowing", "the trees bent and rustled"),
    ("rainy", "It had rained all night", "there were puddles on every path"),
    ("foggy", "A thick fog lay over the fields", "nobody could see very far"),
    ("snowy", "Snow had fallen in the night", "everything was white and still"),
    ("cloudy", "Gray clouds hung in the sky", "the air was cool"),
)
# What is worn from the first sentence to the last, where, and what becomes of it at night.
CLOTHES = (
    ("scarf", "around {hero.his} neck", "hung {hero.his} {wear} on its hook"),
    ("hat", "on {hero.his} head", "put {hero.his} {wear} on the chair"),
    ("ribbon", "around {hero.his} neck", "untied {hero.his} {wear}"),
    ("bag", "over {hero.his} shoulder", "laid {hero.his} {wear} beside the bed"),
    ("coat", "on rainy days and on sunny ones", "hung {hero.his} {wear} behind the door"),
)
# What somebody is good at; where the trouble is in which it helps; the trouble; how it is solved.
SKILLS = (
    (
        "climb like a cat",
        (("the orchard", "in"), ("the forest", "in")),
        "was stuck high up in a tree and did not dare to come down",
        "climbed from branch to branch, took {it} on {hero.his} back and climbed down again",
    ),
    (
        "swim like a fish",
        (("the river", "by"), ("the lake", "by")),
        "had fallen into the water and was drifting away",
        "jumped in, swam with long strokes and pulled {it} back to the shore",
    ),
    (
        "whistle very loudly",
        (("the meadow", "in"), ("the marsh", "in")),
        "was lost in the tall grass and could not find the way back",
        "whistled again and again until {it} followed the sound and came out of the grass",
    ),
    (
        "tie strong knots",
        (("the old mill", "near"), ("the farm", "on")),
        "had fallen into a deep hole and could not get out",
        "tied a rope to a tree with the best of knots, let it down and pulled {it} up",
    ),
    (
        "sing beautifully",
        (("the garden", "in"), ("the church", "behind")),
        "was hiding under a bush, trembling with fear, and would not let anyone come near",
        "sat down and sang very softly until {it} stopped trembling and came out",
    ),
    (
        "run faster than anyone else",
        (("the hill", "on"), ("the road", "on")),
        "was sitting on a little cart that rolled down the hill, faster and faster",
        "ran after the cart, caught it just before the wall and lifted {it} out",
    ),
    (
        "dig deep tunnels",
        (("the beach", "on"), ("the old wall", "behind")),
        "was trapped behind a heap of fallen stones",
        "dug a tunnel under the stones, wide enough for {it} to crawl out",
    ),
    (
        "make anyone laugh",
        (("the village square", "in"), ("the market", "at")),
        "sat all alone in a corner and cried and cried",
        "made one funny face after another until {it} forgot to cry and began to laugh",
    ),
)
# What is feared; where it has to be faced; the trick is told by a friend.
FEARS = (
    ("the dark", "the cellar, where no lamp was burning"),
    ("thunder", "the open field, while the thunder rolled"),
    ("deep water", "the narrow bridge over the deep water"),
    ("high places", "the top of the tall ladder"),
    ("big dogs", "the yard where the big dog lived"),
    ("spiders", "the attic, where the spiders had spun their webs"),
    ("the forest at night", "the black forest, though it was already night"),
)
# A task; what goes wrong without it; how it is put right; how it looks when it was done.
CHORES = (
    (
        "water the flowers",
        "the flowers hung their heads and the earth was dry as dust",
        "carried bucket after bucket from the well until every flower had got its drink",
        "the flowers stood straight and bright",
    ),
    (
        "feed the hens",
        "the hens were running up and down, crying with hunger",
        "gave the hens two bowls of corn and told them how sorry {hero.he} was",
        "the hens sat fat and sleepy in the straw",
    ),
    (
        "close the garden gate",
        "the goat had walked through the open gate and eaten all the cabbages",
        "led the goat back, closed the gate and planted new cabbages",
        "the gate was closed and the cabbages were safe",
    ),
    (
        "bring in the washing",
        "the washing lay in the mud and had to be washed again",
        "washed every shirt and every sock again and hung them by the fire",
        "the shirts lay dry and folded in the basket",
    ),
    (
        "light the lamp at the landing",
        "it was dark at the landing and the boats could not find their way home",
        "ran down with a torch and swung it until the last boat was safe",
        "the lamp burned brightly and the boats came home",
    ),
    (
        "stir the soup",
        "the soup was burnt and the kitchen was full of smoke",
        "scrubbed the pot until it shone and cooked a new soup",
        "the soup was ready and smelled wonderful",
    ),
)
# Who took it: the animal, what the reader is told about it, the clue that it leaves.
THIEVES = (
    ("goose", "had feathers as white as milk", "one white feather"),
    ("dog", "had been rolling in the mud all morning", "a row of muddy paw prints"),
    ("cat", "wore a small bell around its neck", "a small bell"),
    ("goat", "loved to chew on straw", "a bit of chewed straw"),
    ("raven", "had feathers as black as night", "one black feather"),
    ("sheep", "had thick curly wool", "a tuft of curly wool"),
    ("squirrel", "always carried nuts in its cheeks", "two empty nut shells"),
    ("pony", "had new iron shoes on its hooves", "the round print of an iron shoe"),
)
MATERIALS = (
    ("planks", "the floor was"),
    ("rope", "the ladder was"),
    ("nails", "the shelves were"),
    ("cloth", "the curtains were"),
    ("straw", "the roof was"),
    ("clay", "the oven was"),
    ("bricks", "the walls were"),
    ("branches", "the fence was"),
)
BABIES = "duckling kitten puppy lamb foal fawn gosling owlet".split()
