"""Which texts to label next: those whose labels are expected to change most scores of the pool.

A surrogate says how far a label of one text moves the score of another by `similarity_features`, whose inner products are
that: scaled features for ridge, shared leaves for trees, the last hidden layers for a network. As in a Gaussian process with
that covariance, labelling text x moves the score of z by cov(z, x) / (var(x) + noise) times a surprise of variance
var(x) + noise. So the expected squared change, summed over the pool, is

    mass(x) = sum over z of cov(x, z)^2 / (var(x) + noise)

Texts are taken one by one, the largest mass first, and after each of them the covariances are what is left once its label
is known: near-duplicates of it and of labelled texts have hardly any mass left, which makes the choice diverse. The noise
is what held-out scores leave unexplained: (1 - r^2) / r^2 with the mean held-out rank agreement r. No label is needed.

Papers: Cohn, Ghahramani and Jordan 1996, Active Learning with Statistical Models (arXiv cs/9603104): the text that lowers
the summed variance of all predictions most, which is the same number. Seo et al. 2000 for Gaussian processes. The random
projection to at most 256 columns is this project's.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from oracle.errors import InputError, check_at_least
from oracle.texts import list_text_ids, read_texts

if TYPE_CHECKING:
    from surrogate.predictor import InfluencePredictor

PROJECTED_COLUMNS = 256
ROWS_PER_BLOCK = 4096
LEAST_AGREEMENT, MOST_AGREEMENT = 0.2, 0.95  # beyond them a held-out agreement of few texts is not believed


def what_to_label_next(predictor: InfluencePredictor, pool_texts: Any, num_texts: int, *, seed: int = 0) -> list[str]:
    """Choose texts whose labels would change most scores of the pool.

    Args:
        predictor: Fitted on the labels so far.
        pool_texts: The texts that scores are wanted of (anything `read_texts` takes), labelled ones may be among them.
        num_texts: How many to choose.
        seed: Of the random projection.

    Returns:
        text_ids of texts without a label, the most telling first.

    Raises:
        InputError: There are not so many texts without a label, or the predictor or its surrogate cannot say.

    Example:
        >>> oracle.label(lm, [texts[i] for i in what_to_label_next(predictor, pool, 100)], targets)  # doctest: +SKIP
    """
    check_at_least("num_texts", num_texts, 1)
    dataset = read_texts(pool_texts)
    ids = list_text_ids(dataset)
    labelled = set(_fitted_rows(predictor).text_ids)
    num_free = len(set(ids) - labelled)
    if num_texts > num_free:
        raise InputError(
            f"num_texts={num_texts}, and {num_free} of {len(ids)} texts have no label yet.",
            f"at most {num_free}",
            "ask for fewer texts, or pass a larger pool.",
        )
    return order_by_mass(predictor, dataset, num_texts, seed=seed)


def order_by_mass(predictor: InfluencePredictor, dataset: Any, num_texts: int, *, seed: int = 0) -> list[str]:
    """Return the texts without a label in the order of choice, at most `num_texts`; see `what_to_label_next`."""
    rows = _fitted_rows(predictor)
    given = list_text_ids(dataset)
    order = sorted(range(len(given)), key=given.__getitem__)  # places decide nothing, not even the rounding of a sum
    ids = [given[place] for place in order]
    pool = _similarity_features(predictor.surrogate_, predictor.features(dataset)[order], seed)  # (N, F)
    known_order = sorted(range(len(rows.text_ids)), key=rows.text_ids.__getitem__)
    known = _similarity_features(predictor.surrogate_, rows.features[known_order], seed)  # (T, F)
    centre = pool.mean(axis=0)
    pool, known = pool - centre, known - centre
    scale = np.sqrt(np.square(pool).sum(axis=1).mean())
    if scale > 0:
        pool, known = pool / scale, known / scale
    labelled = set(rows.text_ids)
    is_free = np.array([text_id not in labelled and text_id != before for before, text_id in pairwise(["", *ids])])
    mean_agreement = np.mean([row.spearman for row in predictor.fidelity_.surrogate])
    agreement = float(np.clip(mean_agreement, LEAST_AGREEMENT, MOST_AGREEMENT))
    chosen = largest_masses(
        pool, known, is_free=is_free, num_texts=min(num_texts, int(is_free.sum())), noise=(1 - agreement**2) / agreement**2
    )
    return [ids[place] for place in chosen]


def largest_masses(
    pool: NDArray[np.float64],
    known: NDArray[np.float64],
    *,
    is_free: NDArray[np.bool_],
    num_texts: int,
    noise: float,
) -> NDArray[np.int64]:
    """Choose rows of `pool` (N, F) one by one, the largest mass first, given labels of `known` (T, F).

    Only rows of `is_free` (N,) are chosen, each once; equal ones by their place.

    Returns:
        (num_texts,) places.
    """
    covariance = noise * np.linalg.inv(known.T @ known + noise * np.eye(pool.shape[1]))  # (F, F) of the weights
    gram = pool.T @ pool
    spread = covariance @ gram @ covariance  # a row's sum of squared covariances is row' spread row
    squares = ((pool @ spread) * pool).sum(axis=1)  # (N,)
    variances = ((pool @ covariance) * pool).sum(axis=1)  # (N,)
    open_rows = is_free.copy()
    chosen = np.empty(num_texts, dtype=np.int64)
    for number in range(num_texts):
        mass = np.where(open_rows, squares / (variances + noise), -np.inf)
        chosen[number] = place = int(np.argmax(mass))
        open_rows[place] = False
        direction = covariance @ pool[place]  # (F,), covariance with the chosen text
        share = 1.0 / (variances[place] + noise)
        moved = covariance @ (gram @ direction)
        total = direction @ gram @ direction
        along, across = pool @ direction, pool @ moved  # (N,)
        squares = np.maximum(squares - 2 * share * along * across + share**2 * total * np.square(along), 0.0)
        variances = np.maximum(variances - share * np.square(along), 0.0)
        covariance = covariance - share * np.outer(direction, direction)
    return chosen


def _similarity_features(surrogate: Any, features: NDArray[np.float32], seed: int) -> NDArray[np.float64]:
    """Return similarity features, projected at random where they are many, (N, F) with F at most 256."""
    if not hasattr(surrogate, "similarity_features"):
        raise InputError(
            f"the surrogate {surrogate.plugin_name!r} does not say which texts it takes for alike.",
            "a surrogate with `similarity_features`, such as ridge, trees and network",
            "fit one of these.",
        )
    blocks, projection = [], None
    for start in range(0, len(features), ROWS_PER_BLOCK):
        similar = surrogate.similarity_features(features[start : start + ROWS_PER_BLOCK])  # (b, F)
        if similar.shape[1] > PROJECTED_COLUMNS:
            if projection is None:
                rng = np.random.default_rng(seed)
                shape = (similar.shape[1], PROJECTED_COLUMNS)
                projection = rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(PROJECTED_COLUMNS))
            similar = similar @ projection
        blocks.append(similar.astype(np.float64))
    return np.concatenate(blocks)


def _fitted_rows(predictor: InfluencePredictor) -> Any:
    rows = getattr(predictor, "fitted_rows_", None)
    if rows is None:
        raise InputError(
            "this predictor is not fitted, or was saved without the texts that it was fitted on.",
            "a predictor that this version fitted",
            "fit it first, or again; features in the cache are used.",
        )
    return rows
