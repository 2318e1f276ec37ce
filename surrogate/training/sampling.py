"""Which of the candidates get a label at a refresh.

Part of every sample is drawn at random, whatever the texts' scores: on that part fidelity is measured, because on texts
chosen by their scores it would mean something else. All draws are by hashes of text_ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oracle.errors import InputError, check_choice
from surrogate.training.chance import uniform

SAMPLINGS = ("random", "stratified", "uncertain", "mass")
RANDOM_SHARE = 0.5  # of a sample that is otherwise chosen by scores
NUM_STRATA = 10
TOP_WEIGHT, BOTTOM_WEIGHT = 4.0, 2.0  # of the outer strata, beside 0.5 for each of the others


@dataclass(frozen=True)
class Sample:
    """Places of the texts to label.

    Attributes:
        places: (S,) places in the list that was drawn from, ascending.
        at_random: (S,) bool, whether a text was drawn whatever its score.
    """

    places: np.ndarray
    at_random: np.ndarray


def draw_order(text_ids: Sequence[str], salt: str) -> np.ndarray:
    """Return the places of the texts in the order of their salted hashes, (M,) int64."""
    return np.argsort(uniform(text_ids, salt=salt), kind="stable")


def draw_sample(
    text_ids: Sequence[str],
    size: int,
    *,
    how: str = "random",
    scores: np.ndarray | None = None,
    spread: np.ndarray | None = None,
    mass: np.ndarray | None = None,
    salt: str = "",
) -> Sample:
    """Draw texts to label.

    Args:
        text_ids: M candidates.
        size: How many to draw; all of them where there are no more.
        how: "random"; "stratified" for a half at random and a half by tenths of the present scores, the best and the worst
            tenth more than the others; "uncertain" for a half at random and the texts of the largest spread; "mass" for a
            half at random and the texts whose labels are expected to change most scores.
        scores: (M,) present scores, for "stratified". Without them everything is drawn at random.
        spread: (M,) how unsure the surrogate is, for "uncertain"; likewise.
        mass: (M,) larger for texts to be labelled earlier, for "mass"; likewise.
        salt: Seed and occasion, as text.

    Raises:
        InputError: An unknown way to draw.
    """
    check_choice("sampling", how, SAMPLINGS)
    order = draw_order(text_ids, salt)
    size = min(size, len(order))
    guide = {"random": None, "stratified": scores, "uncertain": spread, "mass": mass}[how]
    if guide is None:
        return _sample(order[:size], order[:0])
    if guide.shape != (len(text_ids),):
        raise InputError(
            f"{len(text_ids)} texts and scores or spread of shape {guide.shape}.", "one number per text", "pass one per text."
        )
    num_random = size - int(size * (1 - RANDOM_SHARE))
    drawn, rest = order[:num_random], order[num_random:]
    wanted = size - num_random
    by_size = how in ("uncertain", "mass")
    chosen = rest[np.argsort(-guide[rest], kind="stable")[:wanted]] if by_size else _by_strata(rest, guide, wanted)
    return _sample(drawn, chosen)


def _by_strata(places: np.ndarray, scores: np.ndarray, wanted: int) -> np.ndarray:
    """Take texts from tenths of the scores, in hash order within each; what a small stratum lacks comes from the others."""
    ranked = places[np.argsort(scores[places], kind="stable")]  # worst first
    weights = np.full(NUM_STRATA, 0.5)
    weights[0], weights[-1] = BOTTOM_WEIGHT, TOP_WEIGHT
    place_in_draw = np.empty(len(scores), dtype=np.int64)
    place_in_draw[places] = np.arange(len(places))
    queue = []  # (when its turn comes, place in the draw, place): strata take turns in proportion to their weights
    for weight, stratum in zip(weights, np.array_split(ranked, NUM_STRATA), strict=True):
        drawn = stratum[np.argsort(place_in_draw[stratum])]
        queue += [((turn + 1) / weight, int(place_in_draw[place]), int(place)) for turn, place in enumerate(drawn)]
    return np.array([place for _, _, place in sorted(queue)[:wanted]], dtype=np.int64)


def _sample(at_random: np.ndarray, chosen: np.ndarray) -> Sample:
    places = np.concatenate([at_random, chosen])
    flags = np.concatenate([np.ones(len(at_random), dtype=bool), np.zeros(len(chosen), dtype=bool)])
    order = np.argsort(places)
    return Sample(places[order].astype(np.int64), flags[order])
