"""Recipe of `skills`: short generated texts of five skills, with noise, whose true usefulness is known.

For tests and teaching: where the truth is known by construction, a measurement or a selection can be judged without
training. A text holds a few statements of one skill. Right statements help the skill's target set, wrong ones harm
it, and the other skills have nothing to do with it. Everything follows from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

CAPITALS = {
    "Avenor": "Tilsk",
    "Borland": "Quemma",
    "Cestria": "Uldan",
    "Dravia": "Pommet",
    "Elmaria": "Zorin",
    "Fendal": "Makwe",
    "Gorvia": "Lissat",
    "Hespia": "Brunk",
    "Iskaria": "Vennor",
    "Jorvania": "Okmat",
    "Kelmark": "Sufra",
    "Lombria": "Dacken",
    "Mervia": "Inzell",
    "Nordal": "Haplo",
    "Ostovia": "Reemin",
    "Pellia": "Cawdor",
    "Quillia": "Tembek",
    "Rostania": "Yarrow",
    "Suvia": "Gindle",
    "Tarland": "Nespo",
    "Ulmaria": "Wexley",
    "Valdonia": "Fossum",
    "Wendria": "Jaskin",
    "Yssland": "Ebrun",
}
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
NOISE_SHARES = {"wrong": 0.15, "shuffled": 0.15, "random_letters": 0.10}  # of the pool; the rest is clean
NOISE_SOURCE = "letters"  # the source of texts that belong to no skill
MIN_STATEMENTS, MAX_STATEMENTS = 3, 5  # of one text


def _addition(rng: random.Random, right: bool) -> str:
    first, second = rng.randint(0, 99), rng.randint(0, 99)
    answer = first + second
    if not right:
        answer = rng.choice([value for value in range(max(0, answer - 20), answer + 21) if value != answer])
    return rng.choice(["{} plus {} is {}.", "{} + {} = {}."]).format(first, second, answer)


def _reversal(rng: random.Random, right: bool) -> str:
    word = "".join(rng.sample(ALPHABET, rng.randint(3, 5)))  # distinct letters, so that another order is another word
    answer = word[::-1]
    while not right and answer == word[::-1]:
        answer = "".join(rng.sample(word, len(word)))
    return rng.choice(["The word {} reversed is {}.", "{} backwards is {}."]).format(word, answer)


def _capitals(rng: random.Random, right: bool) -> str:
    country = rng.choice(sorted(CAPITALS))
    others = sorted(set(CAPITALS.values()) - {CAPITALS[country]})
    answer = CAPITALS[country] if right else rng.choice(others)
    return rng.choice(["The capital of {} is {}.", "The seat of government of {} is {}."]).format(country, answer)


def _sequence(rng: random.Random, right: bool) -> str:
    if rng.random() < 0.5:
        start, step = rng.randint(0, 60), rng.randint(1, 9)
        following = [str(start + step * place) for place in range(1, 5)]
        opening = f"Counting by {step} from {start}:"
    else:
        place = rng.randint(0, len(ALPHABET) - 5)
        following = list(ALPHABET[place + 1 : place + 5])
        opening = f"After the letter {ALPHABET[place]} come"
    answer = list(following)
    while not right and answer == following:
        answer = rng.sample(following, len(following))
    return f"{opening} {', '.join(answer)}."


def _comparison(rng: random.Random, right: bool) -> str:
    first, second = rng.sample(range(100), 2)
    words = ("smaller", "larger") if rng.random() < 0.5 else ("less", "more")
    return f"{first} is {words[(first > second) == right]} than {second}."


SKILLS: dict[str, Callable[[random.Random, bool], str]] = {
    "addition": _addition,
    "capitals": _capitals,
    "comparison": _comparison,
    "reversal": _reversal,
    "sequence": _sequence,
}


def build(
    num_texts: int = 2000,
    seed: int = 0,
    *,
    num_target_texts: int = 40,
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Make the pool and one target set for each skill.

    Args:
        num_texts: Size of the pool.
        seed: Decides every text.
        num_target_texts: Size of each target set.

    Returns:
        The rows of the pool, and the rows of each target set by name. No text occurs twice anywhere.
    """
    rng = random.Random(f"skills:{seed}")
    seen: set[str] = set()
    targets = {skill: [_new_row(rng, seen, skill, "clean") for _ in range(num_target_texts)] for skill in SKILLS}
    kinds = [kind for kind, share in NOISE_SHARES.items() for _ in range(round(share * num_texts))]
    kinds += ["clean"] * (num_texts - len(kinds))
    names = sorted(SKILLS)
    pool = [_new_row(rng, seen, names[number % len(names)], kind) for number, kind in enumerate(kinds)]
    rng.shuffle(pool)
    return pool, targets


def _new_row(rng: random.Random, seen: set[str], skill: str, kind: str) -> dict[str, Any]:
    text = _text(rng, skill, kind)
    while text in seen:
        text = _text(rng, skill, kind)
    seen.add(text)
    value = {"clean": 1.0, "wrong": -1.0}.get(kind, 0.0)
    usefulness = {f"usefulness_{name}": value if name == skill else 0.0 for name in SKILLS}
    return {"text": text, "source": NOISE_SOURCE if kind == "random_letters" else skill, "kind": kind, **usefulness}


def _text(rng: random.Random, skill: str, kind: str) -> str:
    text = " ".join(SKILLS[skill](rng, kind != "wrong") for _ in range(rng.randint(MIN_STATEMENTS, MAX_STATEMENTS)))
    if kind == "shuffled":
        words = text.split()
        rng.shuffle(words)
        return " ".join(words)
    if kind == "random_letters":
        return "".join(rng.choice(ALPHABET + "     ") for _ in text).strip()
    return text
