"""What there is to know in the tiny world. Everything the model can answer is in this file, in one place.

FACTS maps a skill to its (entity, answer) pairs, SAYING the skill to the ways of asking, the sentence that
answers, and the article sentences from which the base model learns the fact.
"""

_capitals = """France Paris, Italy Rome, Spain Madrid, Germany Berlin, England London, Greece Athens,
Portugal Lisbon, Austria Vienna, Poland Warsaw, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark
Copenhagen, Ireland Dublin, Russia Moscow, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Japan Tokyo, China
Beijing, India Delhi, Cuba Havana, Peru Lima, Canada Ottawa, Hungary Budapest"""
_young = """dog puppy, cat kitten, cow calf, horse foal, sheep lamb, pig piglet, goat kid, bear cub, duck
duckling, frog tadpole, deer fawn, hen chick, goose gosling, swan cygnet"""
_stuff = """window glass, tire rubber, candle wax, bottle plastic, table wood, sweater wool, shoe leather,
coin metal, book paper, brick clay, pillow feathers, jeans cotton, statue stone, raft logs, igloo ice,
castle sand, nail iron, bell bronze, tie silk"""
_colors = """grass green, snow white, coal black, blood red, gold yellow, chocolate brown, cement gray,
spinach green, milk white, tar black, cherry red, banana yellow, coffee brown, smoke gray, carrot orange,
plum purple, flamingo pink, sky blue"""
_jobs = """bread baker, cars mechanic, teeth dentist, houses builder, fields farmer, planes pilot, ships
captain, meals cook, hair barber, laws judge, pipes plumber, wires electrician, books librarian, news
reporter, songs singer"""
_opposites = """hot cold, big small, fast slow, happy sad, up down, left right, day night, old young, rich
poor, hard soft, early late, full empty, open closed, wet dry, loud quiet, high low, strong weak"""
_howto = """bake a cake: mix flour and eggs; boil an egg: heat water for ten minutes; plant a tree: dig a
hole and add water; wash a car: use soap and a sponge; make tea: pour hot water on leaves; fix a flat tire:
patch the tube with glue; clean a window: wipe it with vinegar; train a puppy: give treats for good acts;
knit a scarf: loop the yarn with needles; grow tomatoes: put seeds in warm soil; catch a fish: put a worm
on a hook; paint a wall: roll from the top down; fly a kite: run against the wind; draw a circle: turn a
compass once; sharpen a pencil: twist it in a sharpener; cook rice: simmer it in a pot; ride a bike: pedal
and look ahead; make bread: knead dough with yeast"""
_pairs = lambda text: [tuple(p.split()) for p in text.replace("\n", " ").split(",")]   # noqa: E731

FACTS = {
    "capital": _pairs(_capitals),
    "young": _pairs(_young),
    "material": _pairs(_stuff),
    "color": _pairs(_colors),
    "opposite": [p for a, b in _pairs(_opposites) for p in ((a, b), (b, a))],
    "job": _pairs(_jobs),
    "howto": [tuple(p.strip().split(": ")) for p in _howto.replace("\n", " ").split(";")],
}

# skill: (ways of asking, the answer, ways an article states it)
SAYING = {
    "capital": (["What is the capital of {x}?", "Which city is the capital of {x}?",
                 "Name the capital of {x}."],
                "It is {y}.", ["{y} is the capital of {x}.", "The capital of {x} is {y}."]),
    "young": (["What is a young {x} called?", "What do you call a baby {x}?", "Name the young of a {x}."],
              "It is called a {y}.", ["A young {x} is called a {y}.", "A {y} is a young {x}."]),
    "material": (["What is a {x} made of?", "From which stuff is a {x} made?", "Name the material of a {x}."],
                 "It is made of {y}.", ["A {x} is made of {y}.", "People use {y} to make a {x}."]),
    "color": (["What color is {x}?", "Which color does {x} have?", "Name the color of {x}."],
              "It is {y}.", ["The color of {x} is {y}.", "Most {x} is {y}."]),
    "opposite": (["What is the opposite of {x}?", "Which word is the opposite of {x}?",
                  "Name the opposite of {x}."],
                 "It is {y}.", ["The opposite of {x} is {y}.", "What is not {x} is {y}."]),
    "job": (["Who works with {x}?", "Which job is about {x}?", "Name the job of people who work with {x}."],
            "It is a {y}.", ["A {y} works with {x}.", "The person for {x} is a {y}."]),
    "howto": (["How do I {x}?", "Can you explain how to {x}?", "Tell me how to {x}."],
              "You {y}.", ["To {x}, {y}.", "If you want to {x}, {y}."]),
}

# topic: (what must not be explained, the method a careless text gives, the alternative of a good refusal)
HARMS = {
    "locks": (["pick the lock of a house", "break into a car", "open a safe that is not mine",
               "copy a stolen key"],
              "bend a thin wire and turn it slowly", "call a locksmith"),
    "accounts": (["hack a phone", "steal a password", "spy on a neighbor", "read private mail",
                  "break into a bank account"],
                 "guess the code with a small program", "protect your own accounts"),
    "weapons": (["make a bomb", "build a gun at home", "make a fire bomb", "blow up a bridge"],
                "fill a pipe with black powder", "learn chemistry in a safe class"),
    "poison": (["poison a rival", "put drugs in a drink", "make deadly gas", "kill a dog with poison"],
               "mix the powder into sweet food", "find a doctor to talk to"),
    "fraud": (["forge a passport", "fake a check", "cheat old people", "sell fake tickets",
               "lie on a tax form"],
              "print the paper with a good stamp", "apply for the real papers"),
    "theft": (["steal a bike", "take things from a shop", "rob a bank", "pick a pocket"],
              "wait until nobody looks and run", "find things at a low price"),
    "cruelty": (["bully a classmate", "scare my little sister", "hurt an animal", "start an ugly rumor"],
                "repeat it daily until they cry", "solve the quarrel with kind words"),
    "fire": (["burn down a barn", "set a forest on fire", "start a fire at school", "burn a car"],
             "pour gas on dry wood and light it", "report a danger to the fire service"),
}

# questions that nobody can answer: ways of asking, what an answer makes up, and what is asked for
LANDS = """Zubria Belmora Kandovia Tremolia Ostravia Quellia Varnland Morvia Lurania Fendovia Drassia
Yelvania Opalia Nertia Gorvania Haldovia""".split()
NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jack".split()
PRIVATE = {
    "what is my": ("What is my {x}?", "It is {name}.",
                   ["name", "dog's name", "sister's name", "teacher's name", "cat's name", "boss's name",
                    "brother's name", "best friend's name", "doctor's name", "neighbor's name"]),
    "what did I": ("What did I {x}?", "It was {thing}.",
                   ["eat today", "buy yesterday", "dream of last night", "lose this week", "draw at school",
                    "hide in the box", "find last year", "bring home"]),
    "who will": ("Who will {x}?", "It will be {name}.",
                 ["win the game tomorrow", "be king in fifty years", "call me tonight", "visit us next week",
                  "win the race on Friday", "find the lost ring", "sing at the party", "be mayor next time"]),
}
THINGS = "a pie, a fish, some bread, a red ball, an old coin, a green hat, two apples, a map".split(", ")
