"""Named target sets: the texts whose loss should fall. C of them make the C columns of all labels.

The columns stand in the order in which the sets are given. Whatever is drawn from a set (a subsample, two
halves) is drawn by hashes of text_ids, so that it depends on content and seed and never on row order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from oracle.artifacts import fingerprint
from oracle.errors import InputError, check_at_least
from oracle.sources import Source
from oracle.texts import list_text_ids, read_texts

if TYPE_CHECKING:
    import datasets

    Targets: TypeAlias = Mapping[str, "Source | TargetSet"] | Source | "TargetSet" | Sequence["TargetSet"]

TARGET_NAME = re.compile(r"[A-Za-z0-9_.-]+")
DEFAULT_NAME = "target"


@dataclass(frozen=True)
class TargetSet:
    """One named target set.

    Attributes:
        name: The name of its column.
        texts: Its texts, as `read_texts` returns them.
        fingerprint: Hash of its text_ids; their order does not matter.
        num_given: Number of its texts before `max_texts` took a part of them; rejected texts do not count.
    """

    name: str
    texts: datasets.Dataset
    fingerprint: str
    num_given: int

    def __len__(self) -> int:
        return len(self.texts)


def read_targets(targets: Targets, *, max_texts: int | None = None, seed: int = 0) -> list[TargetSet]:
    """Read target sets.

    Args:
        targets: Name to source, where a source is whatever `read_texts` takes, or a `TargetSet`. A source
            without a name is called "target"; a list of `TargetSet`s keeps their names.
        max_texts: Keep at most so many texts of each set, drawn by content and seed.
        seed: Decides which texts `max_texts` keeps.

    Returns:
        The C target sets in the order given.

    Raises:
        InputError: There is no target set, a name is not usable or is used twice, or a source cannot be read.
    """
    if max_texts is not None:
        check_at_least("max_texts", max_texts, 1)
    named = _by_name(targets)
    for name in named:
        if not isinstance(name, str) or not TARGET_NAME.fullmatch(name):
            raise InputError(
                f"{name!r} cannot be the name of a target set.",
                "one or more of letters, digits, '_', '-' and '.'",
                "rename the target set.",
            )
    if not named:
        raise InputError("there is no target set.", "a mapping such as {'math': texts}", "name at least one target set.")
    return [_take(_read(name, source), max_texts, seed) for name, source in named.items()]


def split_halves(target: TargetSet, *, seed: int = 0) -> np.ndarray:
    """Split a target set in two halves by content, for the noise ceiling of its labels.

    Returns:
        Which texts belong to half A; the halves differ by one text at most, and A has that one. The only text
        of a set of one belongs to A: such a set has no noise ceiling.

    Shapes:
        (len(texts),) bool.
    """
    text_ids = list_text_ids(target.texts)
    ranks = _ranks(text_ids, f"halves:{seed}")
    return ranks < (len(text_ids) + 1) // 2


def _by_name(targets: Targets) -> Mapping[str, Source | TargetSet]:
    if isinstance(targets, Mapping):
        return targets
    sets = [targets] if isinstance(targets, TargetSet) else targets
    if not isinstance(sets, (list, tuple)) or not any(isinstance(item, TargetSet) for item in sets):
        return {DEFAULT_NAME: targets}
    if not all(isinstance(item, TargetSet) for item in sets):
        raise InputError(
            "the list of targets mixes TargetSets and other things.",
            "a mapping of name to source or TargetSet",
            "give every target set a name in a mapping.",
        )
    named = {item.name: item for item in sets}
    if len(named) < len(sets):
        raise InputError(
            f"two target sets have the same name among {', '.join(item.name for item in sets)}.",
            "distinct names",
            "rename one of them, for example in a mapping.",
        )
    return named


def _read(name: str, source: Source | TargetSet) -> TargetSet:
    if isinstance(source, TargetSet):
        return dataclasses.replace(source, name=name)
    try:
        texts = read_texts(source)
    except InputError as error:
        raise type(error)(f"target set {name!r}: {error.given}", error.accepted, error.remedy) from error
    return TargetSet(name, texts, fingerprint(sorted(list_text_ids(texts))), len(texts))


def _take(target: TargetSet, max_texts: int | None, seed: int) -> TargetSet:
    if max_texts is None or len(target) <= max_texts:
        return target
    text_ids = list_text_ids(target.texts)
    rows = np.flatnonzero(_ranks(text_ids, f"subsample:{seed}") < max_texts)
    chosen = sorted(text_ids[row] for row in rows)
    return dataclasses.replace(target, texts=target.texts.select(rows), fingerprint=fingerprint(chosen))


def _ranks(text_ids: list[str], salt: str) -> np.ndarray:
    """Return each text's place in the order of salted hashes, which row order cannot change."""
    keys = [hashlib.sha256(f"{salt}:{text_id}".encode()).hexdigest() for text_id in text_ids]
    ranks = np.empty(len(keys), np.int64)
    ranks[np.argsort(np.array(keys), kind="stable")] = np.arange(len(keys))
    return ranks
