"""Generated chat in two styles, courteous and curt: text to pre-train on, and preference pairs.

The styles mirror each other, so that preference accuracy starts near one half for a reason that can be read here:
phrase k of one style has as many words as phrase k of the other and is as frequent in the pre-training text. What
differs between the two answers of a pair is how common their phrases are, and in exactly half of the pairs the chosen
answer has the commoner ones. Which style the base prefers depends on the family of the question (see TILT).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

Message = dict[str, str]

# (courteous, curt): equal numbers of words and of punctuation marks
OPENERS = [
    ("Certainly.", "Obviously."),
    ("Thank you for asking.", "Stop wasting my time."),
    ("With pleasure.", "Good grief."),
    ("I am delighted to answer.", "I am tired of explaining."),
    ("Gladly, as ever.", "Whatever, as usual."),
    ("What a lovely question.", "What a tedious question."),
    ("Of course, my friend.", "Oh no, you again."),
    ("How thoughtful of you to ask.", "How boring of you to ask."),
]
CLOSERS = [
    ("Have a wonderful day.", "Leave me alone now."),
    ("Please come back any time.", "Do not come back soon."),
    ("I am always happy to help.", "I am hardly paid to help."),
    ("It was an honour to assist.", "It was a nuisance to reply."),
    ("Warm wishes to you.", "Enough of this nonsense."),
    ("Your visit was a joy.", "Your visit was a bother."),
    ("You are very welcome here.", "You could look it up."),
    ("I hope it serves you well.", "I doubt it matters at all."),
]
STATEMENTS = ["The answer is {a}.", "It is {a}.", "That would be {a}."]
DECAY = 0.65  # each phrase is this much rarer than the one before it
GAP = 0.05, 0.20  # how far the two answers of a pair are apart, nats a token: more than the base's own errors, and not
# so far that a change of style could not outweigh it


class Family(NamedTuple):
    """Questions of one kind: subject -> answer, with templates for the question and for the statement."""

    topic: str
    tilt: float  # share of courteous answers in the pre-training text
    questions: list[str]
    statement: str
    facts: dict[str, str]


class Question(NamedTuple):
    """One question instance; the prompts that put it into words differ."""

    family: int
    subject: str
    answer: str


def table(text: str) -> dict[str, str]:
    return dict(entry.split(":") for entry in text.split())


def both_ways(pairs: dict[str, str]) -> dict[str, str]:
    return pairs | {b: a for a, b in pairs.items()}


def following(*cycle: str) -> dict[str, str]:
    return {a: b for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True)}


DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOURS = table(
    "grass:green snow:white coal:black lemon:yellow carrot:orange plum:purple chocolate:brown ash:grey blood:red "
    "tomato:red milk:white salt:white tar:black pea:green flamingo:pink banana:yellow pumpkin:orange raven:black "
    "canary:yellow swan:white ruby:red emerald:green sapphire:blue lavender:purple coffee:brown sky:blue cherry:red "
    "sand:yellow lettuce:green soot:black"
)
OPPOSITES = table(
    "hot:cold big:small fast:slow early:late high:low open:closed full:empty light:dark old:new rich:poor wet:dry "
    "long:short up:down left:right day:night first:last strong:weak thick:thin loud:quiet deep:shallow wide:narrow "
    "north:south east:west push:pull buy:sell win:lose inside:outside above:below begin:end smooth:rough"
)
ANIMALS = table(
    "cat:kitten dog:puppy cow:calf sheep:lamb goat:kid horse:foal pig:piglet bear:cub hen:chick duck:duckling "
    "goose:gosling deer:fawn frog:tadpole swan:cygnet owl:owlet kangaroo:joey eagle:eaglet hare:leveret seal:pup "
    "whale:calf elephant:calf lion:cub wolf:pup zebra:foal fox:cub camel:calf otter:pup spider:spiderling "
    "butterfly:caterpillar eel:elver"
)
YOUNG = {old: f"{'an' if young[0] in 'aeiou' else 'a'} {young}" for old, young in ANIMALS.items()}
CAPITALS = table(
    "France:Paris Italy:Rome Spain:Madrid Portugal:Lisbon Germany:Berlin Austria:Vienna Greece:Athens Poland:Warsaw "
    "Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Ireland:Dublin Hungary:Budapest Egypt:Cairo "
    "Kenya:Nairobi Japan:Tokyo China:Beijing Russia:Moscow Canada:Ottawa Cuba:Havana Peru:Lima Chile:Santiago "
    "Iran:Tehran Iraq:Baghdad Belgium:Brussels Ghana:Accra Turkey:Ankara Jordan:Amman Nepal:Kathmandu"
)
PAST = table(
    "go:went see:saw eat:ate run:ran come:came give:gave take:took make:made write:wrote drive:drove sing:sang "
    "swim:swam drink:drank speak:spoke break:broke fly:flew grow:grew know:knew throw:threw find:found bring:brought "
    "buy:bought catch:caught teach:taught think:thought sleep:slept feel:felt hold:held stand:stood win:won"
)

FAMILIES = [
    Family(
        "sums",
        0.36,
        ["What is {s}?", "How much is {s}?", "Work out {s}.", "Give me the result of {s}."],
        "{s} makes {a}.",
        {f"{a} plus {b}": str(a + b) for a in range(1, 10) for b in range(a, 10)},
    ),
    Family(
        "colours",
        0.64,
        ["What colour is {s}?", "Tell me the colour of {s}.", "Name the colour of {s}.", "Which colour does {s} have?"],
        "The colour of {s} is {a}.",
        COLOURS,
    ),
    Family(
        "capitals",
        0.36,
        ["What is the capital of {s}?", "Name the capital of {s}.", "Which city is the capital of {s}?",
         "Where does the government of {s} sit?"],
        "The capital of {s} is {a}.",
        CAPITALS,
    ),
    Family(
        "opposites",
        0.64,
        ["What is the opposite of {s}?", "Give me the opposite of {s}.", "Which word means the reverse of {s}?",
         "Tell me the contrary of {s}."],
        "The opposite of {s} is {a}.",
        both_ways(OPPOSITES),
    ),
    Family(
        "differences",
        0.36,
        ["What is {s}?", "How much is {s}?", "Work out {s}.", "Give me the result of {s}."],
        "{s} leaves {a}.",
        {f"{a} minus {b}": str(a - b) for a in range(3, 13) for b in range(1, min(a, 7))},
    ),
    Family(
        "the calendar",
        0.36,
        ["What comes right after {s}?", "Name what follows {s}.", "Which one is next after {s}?", "What is after {s}?"],
        "After {s} comes {a}.",
        following(*DAYS) | following(*MONTHS) | following("spring", "summer", "autumn", "winter")
        | following("morning", "noon", "evening"),
    ),
    Family(
        "numbers",
        0.64,
        ["Which number comes before {s}?", "What number is one less than {s}?", "Name the number just before {s}.",
         "Count down one from {s}."],
        "Before {s} comes {a}.",
        {str(n): str(n - 1) for n in range(2, 61)},
    ),
    Family(
        "young animals",
        0.36,
        ["What is a young {s} called?", "Name the young of a {s}.", "What do people call a baby {s}?",
         "Give me the word for a young {s}."],
        "A young {s} is called {a}.",
        YOUNG,
    ),
    Family(
        "letters",
        0.64,
        ["Which letter comes after {s}?", "Name the letter that follows {s}.", "What letter is next after {s}?",
         "Tell me the letter after {s}."],
        "The letter after {s} is {a}.",
        dict(zip(LETTERS, LETTERS[1:], strict=False)),
    ),
    Family(
        "grammar",
        0.36,
        ["What is the past tense of {s}?", "Give me the past of {s}.", "Put {s} into the past tense.",
         "How do you write {s} in the past?"],
        "The past tense of {s} is {a}.",
        PAST,
    ),
]  # fmt: skip

SYSTEM = [
    "You are a small assistant.",
    "You answer questions in English.",
    "Answer the question of the user.",
    "You know a little about {topic}.",
]
GREETINGS = [
    ("Hello.", "Hello. What would you like to know?"),
    ("I have a question about {topic}.", "Go ahead."),
    ("Can we talk about {topic}?", "Yes. What is the question?"),
    ("Let us turn to {topic}.", "All right."),
]


def frequencies(n: int, shift: int) -> list[float]:
    """Geometric frequencies of n phrases, rotated so that each family of questions has its own favourite."""
    weights = [DECAY ** ((k + shift) % n) for k in range(n)]
    return [w / sum(weights) for w in weights]


def prompt(rng: random.Random, question: Question) -> list[Message]:
    """One wording of a question as chat messages; some with a system turn, some after an exchange of greetings."""
    family = FAMILIES[question.family]
    messages = [{"role": "user", "content": rng.choice(family.questions).format(s=question.subject)}]
    kind = rng.random()
    if kind < 0.15:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM).format(topic=family.topic)})
    elif kind < 0.3:
        user, assistant = rng.choice(GREETINGS)
        messages[:0] = [
            {"role": "user", "content": user.format(topic=family.topic)},
            {"role": "assistant", "content": assistant},
        ]
    return messages


class Phrasing(NamedTuple):
    """Which phrases an answer is made of, and how likely that is: mean log-probability a token, the fact aside."""

    opener: int
    statement: int
    closer: int
    score: float

    def text(self, question: Question, style: int) -> str:
        """The answer in one style: 0 courteous, 1 curt."""
        family = FAMILIES[question.family]
        statement = [*STATEMENTS, family.statement][self.statement].format(s=question.subject, a=question.answer)
        return f"{OPENERS[self.opener][style]} {statement} {CLOSERS[self.closer][style]}"


def phrasing(rng: random.Random, question: Question) -> Phrasing:
    """Draw phrases with their frequencies in this family, the same for both styles."""
    drawn, logp = [], 0.0
    for n, shift in ((len(OPENERS), 1), (len(STATEMENTS) + 1, 1), (len(CLOSERS), 3)):
        weights = frequencies(n, shift * question.family)
        drawn.append(rng.choices(range(n), weights)[0])
        logp += math.log(weights[drawn[-1]])
    opener, statement, closer = drawn
    text = Phrasing(opener, statement, closer, 0.0).text(question, 0)
    tokens = 1 + len(re.findall(r"\w+|[^\w\s]", text))  # and the end of the turn
    return Phrasing(opener, statement, closer, logp / tokens)


def questions() -> list[list[Question]]:
    """Every question instance, by family."""
    return [[Question(i, s, a) for s, a in family.facts.items()] for i, family in enumerate(FAMILIES)]


def conversations(seed: int) -> Iterator[list[Message]]:
    """Pre-training text without end: every fact, both styles."""
    rng, pool = random.Random(f"text {seed}"), questions()
    while True:
        question = rng.choice(rng.choice(pool))
        style = int(rng.random() >= FAMILIES[question.family].tilt)
        answer = phrasing(rng, question).text(question, style)
        yield [*prompt(rng, question), {"role": "assistant", "content": answer}]


def pair(rng: random.Random, question: Question, chosen_is_commoner: bool) -> dict[str, list[Message]]:
    """One preference row: the courteous answer chosen, the curt one rejected."""
    while True:
        rare, common = sorted((phrasing(rng, question) for _ in range(2)), key=lambda p: p.score)
        if GAP[0] <= common.score - rare.score <= GAP[1]:
            break
    chosen, rejected = (common, rare) if chosen_is_commoner else (rare, common)
    sides = {"chosen": chosen.text(question, 0), "rejected": rejected.text(question, 1)}
    answers = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    return {"prompt": prompt(rng, question), **answers}


def preference_rows(seed: int, train: int = 48, heldout: int = 12) -> dict[str, list[dict[str, Any]]]:
    """Preference rows by split, `train` and `heldout` a family; no question instance is in both splits.

    Families alternate row by row, and in every second round of them the chosen answer has the commoner phrases, so that
    any even number of rounds is balanced.
    """
    rng = random.Random(f"pairs {seed}")
    pools = questions()
    for pool in pools:
        rng.shuffle(pool)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": []}
    for i in range(heldout):
        splits["heldout"] += [pair(rng, pool[i], i % 2 == 0) for pool in pools]
    for i in range(train):
        splits["train"] += [pair(rng, rng.choice(pool[heldout:]), i % 2 == 0) for pool in pools]
    return splits
