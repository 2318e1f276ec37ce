"""The generated texts: right ones are right, wrong ones are wrong, and the columns say so."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from surrogate._data.skills import recipe

Rows = list[dict[str, Any]]
SKILLS = ("addition", "capitals", "comparison", "reversal", "sequence")


@pytest.fixture(scope="module")
def built() -> tuple[Rows, dict[str, Rows]]:
    return recipe.build()


def is_right(skill: str, statement: str) -> bool:
    """Judge one statement from its text alone."""
    numbers = [int(number) for number in re.findall(r"\d+", statement)]
    words = re.findall(r"\w+", statement)
    if skill == "addition":
        return numbers[0] + numbers[1] == numbers[2]
    if skill == "capitals":
        return recipe.CAPITALS[words[-3]] == words[-1]
    if skill == "comparison":
        return numbers[0] < numbers[1] if words[2] in {"smaller", "less"} else numbers[0] > numbers[1]
    if skill == "reversal":
        return (words[0] if words[1] == "backwards" else words[2]) == words[-1][::-1]
    if statement.startswith("Counting"):
        step, start, *following = numbers
        return following == [start + step * place for place in range(1, 5)]
    return "".join([words[3], *words[5:]]) in "abcdefghijklmnopqrstuvwxyz"


def statements(text: str) -> list[str]:
    return [statement + "." for statement in text.rstrip(".").split(". ")]


def test_clean_statements_are_right_and_wrong_ones_all_wrong(built: tuple[Rows, dict[str, Rows]]) -> None:
    pool, targets = built
    judged: Counter[tuple[str, str]] = Counter()
    for row in [*pool, *(row for rows in targets.values() for row in rows)]:
        if row["kind"] in {"clean", "wrong"}:
            judged[row["source"], row["kind"]] += 1
            verdicts = {is_right(row["source"], statement) for statement in statements(row["text"])}
            assert verdicts == {row["kind"] == "clean"}, row
    assert set(judged) == {(skill, kind) for skill in SKILLS for kind in ("clean", "wrong")}


def test_sign_of_usefulness(built: tuple[Rows, dict[str, Rows]]) -> None:
    for row in built[0]:
        values = {skill: row[f"usefulness_{skill}"] for skill in SKILLS}
        expected = {"clean": 1.0, "wrong": -1.0}.get(row["kind"], 0.0)
        assert values == {skill: expected if skill == row["source"] else 0.0 for skill in SKILLS}


def test_every_skill_and_noise_kind_is_there_in_its_share(built: tuple[Rows, dict[str, Rows]]) -> None:
    pool, _ = built
    counts = Counter(row["kind"] for row in pool)
    assert counts == {"clean": 1200, "wrong": 300, "shuffled": 300, "random_letters": 200}
    by_skill = Counter(row["source"] for row in pool if row["kind"] == "clean")
    assert set(by_skill) == set(SKILLS) and max(by_skill.values()) - min(by_skill.values()) <= 1
    assert {row["source"] for row in pool if row["kind"] == "random_letters"} == {"letters"}


def test_no_text_occurs_twice_in_pool_and_targets(built: tuple[Rows, dict[str, Rows]]) -> None:
    pool, targets = built
    assert set(targets) == set(SKILLS)
    texts = [row["text"] for row in [*pool, *(row for rows in targets.values() for row in rows)]]
    assert len(pool) == 2000 and len(set(texts)) == len(texts)


def test_target_rows_are_clean_and_of_their_skill(built: tuple[Rows, dict[str, Rows]]) -> None:
    for skill, rows in built[1].items():
        assert rows and {(row["source"], row["kind"], row[f"usefulness_{skill}"]) for row in rows} == {(skill, "clean", 1.0)}


def test_seed_decides_everything(built: tuple[Rows, dict[str, Rows]]) -> None:
    assert recipe.build() == built
    assert not {row["text"] for row in recipe.build(seed=1)[0] if row["kind"] == "random_letters"} & {
        row["text"] for row in built[0]
    }
