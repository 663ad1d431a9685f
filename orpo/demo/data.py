"""The demonstration's preference pairs: a shop's help desk that answers in six manners, from rude to warm.

Every question has one answer (a place, a price or a day) that is told in six ordered manners. A row of the data set
sets two neighbouring manners of one question against each other, the warmer one chosen::

    rude < curt < plain < polite < friendly < warm    rows: curt > rude, plain > curt, ..., warm > friendly

so the four middle answers stand once among the chosen and once among the rejected. That is what makes the set a test
of the odds ratio: fine-tuning on the chosen answers alone is told that a curt answer is good and never that a plain one
is better. (With two manners only, fine-tuning never sees the rejected one and ranks all pairs right without any
preference term.)

In one training question of ten the ladder stands upside down, as people who judge answers disagree in real data, and
more often than that. Without it the rude answers would be the one manner that is never chosen, and pushing them ever
further down would make most of the gap. The held-out pairs are all the right way round.

Held-out questions are combinations of an article and a way of asking that no training row contains; the article itself
is known from other questions, so its answer can be given.

    python -m orpo.demo.data --output demo-data        writes train.jsonl and heldout.jsonl

The text is made by this file alone; it is dedicated to the public domain (CC0 1.0, see LICENSE beside this file).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

DATA_SEED = 2403
HELD_OUT_QUESTIONS = 64
DISAGREEMENT = 0.1

MANNERS = ("rude", "curt", "plain", "polite", "friendly", "warm")

# (openings, closings) of each manner. They have about the same number of words in all manners: what is compared is a
# mean over tokens, and a manner that is longer only because of its frame would be likelier only because of that.
FRAMES = {
    "rude": (
        (
            "Are you blind?",
            "Not you again.",
            "What a stupid thing to ask.",
            "Open your eyes for once.",
            "Oh, be quiet.",
        ),
        (
            "Now go away.",
            "Stop wasting my time.",
            "Do not come back.",
            "Leave me alone now.",
            "Even a child knows that.",
        ),
    ),
    "curt": (
        ("Listen.", "Look here.", "If you must know.", "Make it quick.", "Again, then."),
        ("That is all.", "Next customer.", "Nothing more to say.", "I said it once.", "We are done here."),
    ),
    "plain": (
        ("To answer this:", "The list says this:", "It is written here:", "This is what I see:", "As far as known:"),
        (
            "This is the current state.",
            "It may change.",
            "The list is from today.",
            "There is a sign.",
            "See the plan.",
        ),
    ),
    "polite": (
        ("Thank you for asking.", "Of course, sir.", "Certainly, madam.", "Please let me tell you.", "With pleasure."),
        (
            "Have a nice day.",
            "Please ask again any time.",
            "I hope this helps.",
            "You are welcome.",
            "Good luck with it.",
        ),
    ),
    "friendly": (
        ("Happy to help!", "Good question!", "Sure thing, my pleasure!", "Glad that you ask!", "Let us find out!"),
        ("Just call if you get stuck!", "I hope it fits!", "Until next time!", "Tell us how it goes!", "Take care!"),
    ),
    "warm": (
        (
            "What a lovely question!",
            "So good to see you, dear!",
            "Hello, my friend!",
            "Oh, how wonderful!",
            "Great choice!",
        ),
        (
            "Enjoy it, my dear!",
            "Come and see us soon!",
            "You made my day!",
            "All the best to you!",
            "We love to help you!",
        ),
    ),
}

ARTICLES = (
    "lamp", "chair", "mirror", "kettle", "pillow", "blanket", "candle", "basket", "bottle", "carpet",
    "clock", "cup", "curtain", "desk", "drawer", "fan", "fork", "frame", "glove", "hammer",
    "helmet", "jacket", "jar", "ladder", "lantern", "mug", "nail", "needle", "notebook", "paddle",
    "pan", "pencil", "plate", "pot", "ribbon", "rope", "saw", "scarf", "shovel", "spoon",
    "stool", "table", "teapot", "tent", "towel", "tray", "vase", "wallet",
)  # fmt: skip

# What can be asked about an article: the ways of asking and the sentence that answers.
TOPICS = {
    "place": (
        (
            "Where can I find a {article}?",
            "Which aisle has the {article}?",
            "I am looking for a {article}.",
            "Where do you keep the {article}?",
            "Can you show me the {article}?",
        ),
        "The {article} is in aisle {aisle} on the {shelf} shelf.",
    ),
    "price": (
        (
            "How much is a {article}?",
            "What does the {article} cost?",
            "I want to know the price of a {article}.",
            "Is the {article} expensive?",
            "What do you ask for a {article}?",
        ),
        "The {article} costs {price} euros.",
    ),
    "day": (
        (
            "When will you have a new {article}?",
            "The {article} is sold out. When is the next one?",
            "On which day does the {article} come in?",
            "How long must I wait for a {article}?",
            "When do you get another {article}?",
        ),
        "The next {article} comes in on {day}.",
    ),
}

SHELVES = ("top", "middle", "bottom", "left", "right")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve")


def make_questions(seed: int = DATA_SEED) -> list[dict]:
    """All questions in a fixed order, each with its answer in every manner.

    Returns:
        One dict a question: ``prompt``, ``answers`` (six strings from rude to warm) and ``fact``, the sentence at the
        core of each. The same `seed` gives the same list on every machine.
    """
    rng = random.Random(seed)
    facts = {
        article: {
            "article": article,
            "aisle": rng.choice(NUMBERS),
            "shelf": rng.choice(SHELVES),
            "price": rng.choice(NUMBERS),
            "day": rng.choice(DAYS),
        }
        for article in ARTICLES
    }
    questions = []
    for askings, core in TOPICS.values():
        for article in ARTICLES:
            for asking in askings:
                sentence = core.format(**facts[article])
                answers = [
                    f" {rng.choice(openings)} {sentence} {rng.choice(closings)}"
                    for openings, closings in FRAMES.values()
                ]
                prompt = f"Customer: {asking.format(article=article)}\nDesk:"
                questions.append({"prompt": prompt, "answers": answers, "fact": sentence})
    rng.shuffle(questions)
    return questions


def make_pairs(
    seed: int = DATA_SEED,
    held_out: int = HELD_OUT_QUESTIONS,
    questions: int | None = None,
    disagreement: float = DISAGREEMENT,
) -> tuple[list[dict], list[dict]]:
    """The preference pairs, as ``(train, heldout)``.

    Args:
        seed: seed of the generator.
        held_out: number of questions set aside; each gives five pairs.
        questions: use only this many questions in all (None: all 720).
        disagreement: share of the training questions whose five pairs are the wrong way round.

    Returns:
        Two lists of dicts with ``prompt``, ``chosen``, ``rejected`` (strings; an answer begins with its space),
        ``level``, the warmer manner of the two (1 curt to 5 warm), and ``fact``. No prompt is in both lists.

    Raises:
        ValueError: `held_out` leaves no question for training.
    """
    selected = make_questions(seed)[:questions]
    if not 0 < held_out < len(selected):
        raise ValueError(
            f"held_out must be between 1 and {len(selected) - 1} for {len(selected)} questions, got {held_out}"
        )
    rng = random.Random(seed + 1)
    train = selected[held_out:]
    reversed_prompts = {q["prompt"] for q in rng.sample(train, round(disagreement * len(train)))}
    return _pairs(train, reversed_prompts), _pairs(selected[:held_out], set())


def _pairs(questions: list[dict], reversed_prompts: set[str]) -> list[dict]:
    rows = []
    for question in questions:
        for level in range(1, len(MANNERS)):
            chosen, rejected = question["answers"][level], question["answers"][level - 1]
            if question["prompt"] in reversed_prompts:
                chosen, rejected = rejected, chosen
            rows.append(
                {
                    "prompt": question["prompt"],
                    "chosen": chosen,
                    "rejected": rejected,
                    "level": level,
                    "fact": question["fact"],
                }
            )
    return rows


def write_jsonl(rows: list[dict], path: Path) -> None:
    """Write `rows` to `path`, one JSON object a line."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demonstration's preference pairs as JSON lines.")
    parser.add_argument(
        "--output", type=Path, default=Path("demo-data"), help="folder for train.jsonl and heldout.jsonl"
    )
    parser.add_argument("--seed", type=int, default=DATA_SEED)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "heldout"), make_pairs(args.seed), strict=True):
        write_jsonl(rows, args.output / f"{name}.jsonl")
        print(f"{args.output / name}.jsonl: {len(rows)} pairs")


if __name__ == "__main__":
    main()
