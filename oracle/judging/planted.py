"""Hide texts whose worth is known in a sample, and see whether labels find them.

Three kinds are planted:

- `copies`: near-copies of target texts, the first two thirds of each. They should rank high on that target set. An
  exact copy would be the very text that labels measure by; two thirds of one still is an easy find, so this is a check
  that a method must pass rather than one that tells good methods apart.
- `shuffled`: texts of the sample with their words in random order. They should rank low, and below their originals.
- `wrong_answers`: prompts of the sample with the completion of another prompt (of a chat, the assistant's last turn).
  They should rank low, and below their right versions.

The originals of shuffled texts and wrong answers stay in the sample. What is drawn follows from content and seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle.comparison import average_ranks
from oracle.errors import InputError, check_choice, check_count
from oracle.judging.retraining import hash_order
from oracle.labels import Labels
from oracle.targets import TargetSet, read_targets
from oracle.text_formats import FORMATS, NO_LOSS
from oracle.text_formats import judge as judge_rows
from oracle.texts import list_text_ids, plain_strings, read_texts, text_format

if TYPE_CHECKING:
    from datasets import Dataset

    from oracle.targets import Targets

COPIES, SHUFFLED, WRONG_ANSWERS = KINDS = ("copies", "shuffled", "wrong_answers")
ANSWER_FORMATS = ("completion", "chat")  # those in which a prompt has an answer
COPIED_SHARE = 2 / 3
MIN_WORDS = {COPIES: 3, SHUFFLED: 4, WRONG_ANSWERS: 1}  # in the part of a text that is trained on

Row = dict[str, Any]


@dataclass(frozen=True)
class PlantedText:
    """One planted text.

    Attributes:
        text_id: Its id.
        kind: One of `KINDS`.
        origin: text_id of the text it was made of: of a target set for `copies`, else of the sample.
        target: For `copies`, the target set of its origin; else None.
    """

    text_id: str
    kind: str
    origin: str
    target: str | None


@dataclass(frozen=True)
class Planted:
    """A sample with planted texts.

    Attributes:
        texts: The sample and, after it, what was planted: what is to be labelled. Columns that the format does not
            use are left out.
        table: What was planted.
    """

    texts: Dataset
    table: list[PlantedText]

    @property
    def text_ids(self) -> set[str]:
        """Ids of the planted texts."""
        return {row.text_id for row in self.table}


@dataclass(frozen=True)
class Recovery:
    """How well labels on one target set find the planted texts of one kind.

    Attributes:
        auc: Chance that a planted text ranks beyond a text of the sample, on the side where its kind belongs.
        recall: Share of the planted texts among as many at that end of the ranking; planted ones of other kinds and
            other targets are left out.
        below_origin: Share of the planted texts that rank below the text they were made of; None for `copies`.
        num_planted: How many there are.
    """

    auc: float
    recall: float
    below_origin: float | None
    num_planted: int


def plant(sample: Any, targets: Targets, *, kinds: Sequence[str] | None = None, num_per_kind: int = 16, seed: int = 0) -> Planted:
    """Add texts of known worth to a sample.

    Args:
        sample: The texts: anything `read_texts` takes.
        targets: The target sets that labels are measured on.
        kinds: Some of `copies`, `shuffled` and `wrong_answers`; None takes all that the format of the sample allows.
        num_per_kind: How many texts of each kind, of `copies` for every target set.
        seed: Decides which texts are taken and how they are changed.

    Raises:
        InputError: Too few texts are long enough, a kind is unknown or does not fit the format, or the target sets have
            another format than the sample (copies for a sample of plain text are made of any but token ids).
    """
    check_count("num_per_kind", num_per_kind)
    texts = read_texts(sample)
    format_name = text_format(texts)
    chosen = _check_kinds(kinds, format_name)
    columns = _columns(texts, format_name)
    origins = dict(zip(list_text_ids(texts), texts.select_columns(columns).to_list(), strict=True))
    planting = _Planting(format_name, num_per_kind=num_per_kind, seed=seed, taken=set(origins))
    for kind in chosen:
        if kind == COPIES:
            for target in read_targets(targets):
                planting.add(kind, _target_rows(target, columns, format_name), _cut, target=target.name)
        elif kind == SHUFFLED:
            planting.add(kind, origins, _shuffle)
        else:
            planting.add(kind, origins, _WrongAnswers(origins, format_name, seed=seed))
    return Planted(read_texts([*origins.values(), *planting.rows], format=format_name), planting.table)


def recovery(labels: Labels, planted: Planted) -> dict[str, dict[str, Recovery]]:
    """Judge labels by the planted texts: kind -> target name -> how well they are found.

    Args:
        labels: Labels of `planted.texts`.
        planted: From `plant`.

    Raises:
        MismatchError: Some of the texts have no label.
    """
    known = labels.take(sorted(list_text_ids(planted.texts)))
    row_of = {text_id: row for row, text_id in enumerate(known.text_ids)}
    others = np.array([row for text_id, row in row_of.items() if text_id not in planted.text_ids])
    found: dict[str, dict[str, Recovery]] = {}
    for kind in dict.fromkeys(item.kind for item in planted.table):
        for name in known.target_names:
            items = [item for item in planted.table if item.kind == kind and item.target in (None, name)]
            if items:
                values = known.target(name).astype(np.float64)
                own = np.array([row_of[item.text_id] for item in items])
                origins = None if kind == COPIES else np.array([row_of[item.origin] for item in items])
                found.setdefault(kind, {})[name] = _recovery(values, own, others, origins)
    return found


def _recovery(values: np.ndarray, own: np.ndarray, others: np.ndarray, origins: np.ndarray | None) -> Recovery:
    signed = values if origins is None else -values
    ranks = average_ranks(np.concatenate([signed[own], signed[others]]))[: len(own)]
    auc = (ranks.sum() - len(own) * (len(own) + 1) / 2) / (len(own) * len(others))
    candidates = np.sort(np.concatenate([own, others]))  # rows stand in the order of their ids, which breaks ties
    top = candidates[np.argsort(-signed[candidates], kind="stable")[: len(own)]]
    below = None
    if origins is not None:
        below = float(np.mean((values[own] < values[origins]) + 0.5 * (values[own] == values[origins])))
    return Recovery(float(auc), float(np.isin(own, top).mean()), below, len(own))


class _Planting:
    """Rows and table of what has been planted so far, without a text twice."""

    def __init__(self, format_name: str, *, num_per_kind: int, seed: int, taken: set[str]) -> None:
        self.format_name, self.num_per_kind, self.seed, self.taken = format_name, num_per_kind, seed, taken
        self.rows: list[Row] = []
        self.table: list[PlantedText] = []

    def add(
        self,
        kind: str,
        origins: dict[str, Row],
        change: Callable[[list[Any], np.random.Generator], list[Any]],
        *,
        target: str | None = None,
    ) -> None:
        """Plant `num_per_kind` changed texts, made of `origins` in an order that content and seed decide."""
        salt = f"{kind}:{self.seed}"
        num_before = len(self.rows)
        for origin in hash_order(list(origins), salt):
            if len(self.rows) - num_before == self.num_per_kind:
                return
            units = _units(origins[origin], self.format_name)
            rng = np.random.default_rng([self.seed, int(origin, 16) % 2**32])
            changed = change(units, rng) if _num_words(units) >= MIN_WORDS[kind] else units
            row = _with_units(origins[origin], changed, self.format_name)
            text_id = _text_id(row, self.format_name)
            if changed != units and text_id not in self.taken:
                self.taken.add(text_id)
                self.rows.append(row)
                self.table.append(PlantedText(text_id, kind, origin, target))
        if len(self.rows) - num_before < self.num_per_kind:
            of_what = "the sample" if target is None else f"target set {target!r}"
            raise InputError(
                f"{len(self.rows) - num_before} of the {len(origins)} texts of {of_what} can be planted as {kind!r}, "
                f"not num_per_kind={self.num_per_kind}.",
                f"texts whose trained part has at least {MIN_WORDS[kind]} words, and whose change gives a new text",
                "lower num_per_kind, give more texts, or leave this kind out of `kinds`.",
            )


def _check_kinds(kinds: Sequence[str] | None, format_name: str) -> list[str]:
    allowed = [kind for kind in KINDS if kind != WRONG_ANSWERS or format_name in ANSWER_FORMATS]
    if kinds is None:
        return allowed
    for kind in kinds:
        check_choice("kinds", kind, KINDS)
        if kind not in allowed:
            raise InputError(
                f"{kind!r} cannot be planted in a sample in the format {format_name!r}.",
                ", ".join(allowed),
                "give the sample as prompt and completion or as chats, or leave this kind out.",
            )
    if not kinds:
        raise InputError("kinds is empty.", ", ".join(allowed), "name at least one kind.")
    return list(dict.fromkeys(kinds))


def _columns(texts: Dataset, format_name: str) -> list[str]:
    """Name the columns that make up the texts."""
    names = [*FORMATS[format_name], *(["labels"] if format_name == "tokens" else [])]
    return [name for name in names if name in texts.column_names]


def _target_rows(target: TargetSet, columns: list[str], format_name: str) -> dict[str, Row]:
    """Return a target set's texts in the sample's format and columns, by text_id."""
    own_format = text_format(target.texts)
    text_ids = list_text_ids(target.texts)
    if format_name == "text" and own_format != "tokens":
        return dict(zip(text_ids, ({"text": text} for text in plain_strings(target.texts)), strict=True))
    if own_format != format_name:
        raise InputError(
            f"target set {target.name!r} is in the format {own_format!r}, the sample in {format_name!r}.",
            "one format for both, or a sample of plain text and targets that are not token ids",
            "give both in one format, or leave 'copies' out of `kinds`.",
        )
    rows = target.texts.select_columns(_columns(target.texts, format_name)).to_list()
    if "labels" in columns:
        rows = [{"labels": row["input_ids"], **row} for row in rows]
    return dict(zip(text_ids, ({name: row[name] for name in columns} for row in rows), strict=True))


# -------------------------------------------------- the part of a text that is trained on, as units that can be moved


def _units(row: Row, format_name: str) -> list[Any]:
    """Return words and the white space between them, or (token, label) of the tokens that count."""
    if format_name == "tokens":
        labels = row.get("labels") or row["input_ids"]
        return [pair for pair in zip(row["input_ids"], labels, strict=True) if pair[1] != NO_LOSS]
    return [part for part in re.split(r"(\s+)", _trained_string(row, format_name)) if part]


def _with_units(row: Row, units: list[Any], format_name: str) -> Row:
    """Return the row with other units in the place of its own."""
    if format_name == "tokens":
        labels = row.get("labels") or row["input_ids"]
        places = [index for index, label in enumerate(labels) if label != NO_LOSS][: len(units)]
        end = places[-1] + 1 if len(units) < len(_units(row, format_name)) else len(labels)
        ids, marks = list(row["input_ids"][:end]), list(labels[:end])
        for place, (token, label) in zip(places, units, strict=True):
            ids[place], marks[place] = token, label
        return {"input_ids": ids, "labels": marks} if "labels" in row else {"input_ids": ids}
    string = "".join(units)
    if format_name == "text":
        return {"text": string}
    if format_name == "completion":
        return {"prompt": row["prompt"], "completion": string}
    last = _last_answer(row)
    return {"messages": [*row["messages"][:last], {"role": "assistant", "content": string}, *row["messages"][last + 1 :]]}


def _trained_string(row: Row, format_name: str) -> str:
    if format_name == "chat":
        return str(row["messages"][_last_answer(row)]["content"])
    return str(row["text" if format_name == "text" else "completion"])


def _last_answer(row: Row) -> int:
    return max(index for index, message in enumerate(row["messages"]) if message["role"] == "assistant")


def _is_word(unit: Any) -> bool:
    return not isinstance(unit, str) or not unit.isspace()


def _num_words(units: list[Any]) -> int:
    return sum(_is_word(unit) for unit in units)


def _cut(units: list[Any], rng: np.random.Generator) -> list[Any]:
    """Keep the first two thirds of the words."""
    places = [index for index, unit in enumerate(units) if _is_word(unit)]
    return units[: places[int(COPIED_SHARE * len(places)) - 1] + 1]


def _shuffle(units: list[Any], rng: np.random.Generator) -> list[Any]:
    """Put the words in random order and leave the white space where it is."""
    places = [index for index, unit in enumerate(units) if _is_word(unit)]
    result = list(units)
    for place, source in zip(places, rng.permutation(len(places)), strict=True):
        result[place] = units[places[source]]
    return result


class _WrongAnswers:
    """Gives a prompt the answer of another prompt of the sample."""

    def __init__(self, origins: dict[str, Row], format_name: str, *, seed: int) -> None:
        order = hash_order(list(origins), f"answers:{seed}")
        self.answers = [_units(origins[text_id], format_name) for text_id in order]

    def __call__(self, units: list[Any], rng: np.random.Generator) -> list[Any]:
        """Return the first other answer after a random place; the same one where there is no other."""
        start = int(rng.integers(len(self.answers)))
        own = "".join(units).strip()
        rotated = [*self.answers[start:], *self.answers[:start]]
        return next((answer for answer in rotated if "".join(answer).strip() not in ("", own)), units)


def _text_id(row: Row, format_name: str) -> str:
    text_ids, _ = judge_rows(format_name, {name: [value] for name, value in row.items()}, 1)
    return text_ids[0]
