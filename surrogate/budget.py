"""Budget: how much of a pool may be kept, and how far down an order of its texts that goes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from oracle.errors import InputError
from surrogate.pool import Pool


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be kept: exactly one of the three.

    Attributes:
        tokens: At most this many tokens; needs token counts.
        texts: This many texts.
        fraction: This share of the pool's texts (not of its tokens), rounded down. The pool counts with the
            excluded texts, so that a fraction stands for the same number at every refresh.

    Raises:
        InputError: None or several are given, or the value cannot be a budget.
    """

    tokens: int | None = None
    texts: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if len(given) != 1:
            raise InputError(
                f"a budget with {' and '.join(given) or 'nothing'} set.",
                "exactly one of tokens, texts, fraction",
                "give one: Budget(fraction=0.2) in Python, --fraction 0.2 on the command line.",
            )
        name, value = next(iter(given.items()))
        is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if name == "fraction":
            if not (is_number and 0 < value <= 1):
                raise InputError(f"fraction={value!r} is not a share.", "a number above 0 and at most 1", "write 0.2 for 20 %.")
        elif not (is_number and value >= 1 and value == int(value)):
            raise InputError(f"{name}={value!r} is not a count.", "an integer of at least 1", f"pass such a number for {name}.")

    def as_dict(self) -> dict[str, float]:
        """Return the one entry that is set."""
        return {
            name: float(value) if name == "fraction" else int(value) for name, value in asdict(self).items() if value is not None
        }


def limit_of(budget: Budget, pool: Pool, *, num_pool: int) -> int:
    """Return how many texts or tokens may be kept; refuse more than there are and less than one text."""
    tokens = pool.num_tokens
    num_tokens = None if tokens is None else int(tokens.sum())
    smallest = 0 if tokens is None or not len(tokens) else int(tokens.min())
    return limit_of_totals(budget, len(pool.text_ids), num_tokens=num_tokens, smallest=smallest, num_pool=num_pool)


def limit_of_totals(
    budget: Budget, num_candidates: int, *, num_tokens: int | None, smallest: int, num_pool: int, at_most: bool = False
) -> int:
    """Return the same for a pool of which only totals are known.

    Args:
        budget: What may be kept.
        num_candidates: Texts that may be chosen.
        num_tokens: Their tokens, or None where they are not known.
        smallest: Tokens of the shortest of them.
        num_pool: Texts of the pool, which a fraction is of.
        at_most: Take a budget above what there is for all there is.
    """
    kind, value = next(iter(budget.as_dict().items()))
    if kind == "tokens":
        if num_tokens is None:
            raise InputError(
                f"a budget of {value} tokens without token counts.",
                "num_tokens, or a budget of texts or fraction",
                "pass num_tokens=..., or Budget(texts=...).",
            )
        limit, available = int(value), num_tokens
    else:
        # the addend keeps 0.29 * 100 = 28.999999999999996 from becoming 28
        limit = int(value) if kind == "texts" else math.floor(value * num_pool + 1e-9)
        available, smallest = num_candidates, 1
    unit = "tokens" if kind == "tokens" else "texts"
    if at_most:
        limit = min(limit, available)
    if limit > available:
        raise InputError(
            f"a budget of {limit} {unit} for {available} {unit} that may be chosen.",
            f"at most {available} {unit}",
            "lower the budget, enlarge the pool, or exclude less.",
        )
    if limit < smallest:
        raise InputError(
            f"a budget of {kind}={value} keeps nothing of {num_candidates} texts.",
            f"at least {smallest} {unit}",
            "raise the budget.",
        )
    return limit


def fill(order: np.ndarray, pool: Pool, num_tokens: int) -> np.ndarray:
    """Go down the order and take every text that still fits; return the places in the order that were taken."""
    assert pool.num_tokens is not None
    sizes = pool.num_tokens[order]
    smallest_from_here = np.minimum.accumulate(sizes[::-1])[::-1]
    taken, left = [], num_tokens
    for place, size in enumerate(sizes.tolist()):
        if smallest_from_here[place] > left:
            break
        if size <= left:
            taken.append(place)
            left -= size
    return np.array(taken, dtype=np.int64)
