"""Fidelity: how well scores agree with labels that the surrogate never saw.

A squared error alone says little (predicting the mean looks good on it), so each target gets rank agreement,
R2 against predicting the training mean, and what a selection by score would gain. Rank agreement inside one
source stands beside the overall one: a surrogate that only tells sources apart is high overall and near zero
inside them. The same figures for ridge regression and for a constant, and the noise ceiling of the labels,
belong beside the surrogate's.

Left out: intervals for anything but Spearman; clustering of the bootstrap by near-duplicate groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oracle.comparison import spearman
from oracle.errors import InputError, NotFiniteError, check_at_least
from oracle.tables import aligned, figure
from surrogate.cross_fitting import cross_predict

__all__ = [
    "Fidelity",
    "TargetFidelity",
    "above_chance",
    "cross_predict",
    "fidelity_table",
    "measure_fidelity",
    "spearman",
]

MIN_TEXTS = 3  # Spearman's t approximation needs one degree of freedom
MIN_TEXTS_PER_SOURCE = 8
MIN_TEXTS_PER_FOLD = 8  # below, the median of a fold says more about its texts than about its fit
INTERVAL_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True, kw_only=True)
class TargetFidelity:
    """Agreement of scores and held-out labels for one target; labels in their own units.

    Attributes:
        target: Name of the target set.
        spearman: Rank correlation; 0.0 where scores or labels are constant.
        spearman_interval: 95 % bootstrap interval over texts.
        p_value: One-sided probability of such a correlation by chance (t approximation).
        spearman_within_source: Mean rank correlation inside sources with at least 8 held-out texts, weighted by
            texts; None if there is no such source.
        num_sources_within: How many sources that mean covers.
        r2: 1 minus squared error over that of the training mean; None if the mean makes no error.
        top_recall: Share of the truly best texts found among those with the best scores.
        mean_label_selected: Mean label of the texts with the best scores.
        mean_label_all: Mean label of all held-out texts.
        mean_label_best: Mean label of the truly best texts.
        top_fraction: The share that "best" means.
        num_texts: How many held-out texts.
    """

    target: str
    spearman: float
    spearman_interval: tuple[float, float]
    p_value: float
    spearman_within_source: float | None
    num_sources_within: int
    r2: float | None
    top_recall: float
    mean_label_selected: float
    mean_label_all: float
    mean_label_best: float
    top_fraction: float
    num_texts: int


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """A surrogate's fidelity per target, beside that of ridge regression, a constant and the noise ceiling.

    Attributes:
        surrogate_name: Name of the surrogate.
        surrogate: One row per target.
        ridge: The same for ridge regression.
        constant: The same for the training mean.
        noise_ceiling: Target to agreement of two independent measurements of its labels; None where not measured.
    """

    surrogate_name: str
    surrogate: list[TargetFidelity]
    ridge: list[TargetFidelity]
    constant: list[TargetFidelity]
    noise_ceiling: dict[str, float | None] = field(default_factory=dict)

    def targets_at_chance(self, *, level: float = 0.05) -> list[str]:
        """Return the targets whose scores do not agree with held-out labels better than chance."""
        return [row.target for row in self.surrogate if not above_chance(row, level=level)]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        values = dataclasses.asdict(self)
        for kind in ("surrogate", "ridge", "constant"):
            for row in values[kind]:
                row["spearman_interval"] = list(row["spearman_interval"])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fidelity:
        """Make a Fidelity from what `as_dict` returned."""
        rows = {
            kind: [TargetFidelity(**{**row, "spearman_interval": tuple(row["spearman_interval"])}) for row in values[kind]]
            for kind in ("surrogate", "ridge", "constant")
        }
        return cls(surrogate_name=values["surrogate_name"], noise_ceiling=dict(values["noise_ceiling"]), **rows)

    def table(self) -> str:
        """Return an aligned plain-text table: per target the surrogate, ridge and the constant."""
        named = [(self.surrogate_name, self.surrogate), ("ridge", self.ridge), ("constant", self.constant)]
        if self.surrogate_name == "ridge":
            del named[1]
        rows = [
            (name, row)
            for target in zip(*(rows for _, rows in named), strict=True)
            for (name, _), row in zip(named, target, strict=True)
        ]
        return fidelity_table(rows, self.noise_ceiling)


def fidelity_table(rows: Sequence[tuple[str, TargetFidelity]], noise_ceiling: Mapping[str, float | None]) -> str:
    """Return an aligned plain-text table of named rows, with each target's noise ceiling in the last column."""
    share = f"top-{100 * rows[0][1].top_fraction:g} % recall" if rows else "top recall"
    lines = [["target", "surrogate", "spearman", "within source", "r2", share, "mean label of selected", "noise ceiling"]]
    for name, row in rows:
        figures = [figure(value) for value in (row.spearman, row.spearman_within_source, row.r2, row.top_recall)]
        lines.append([row.target, name, *figures, f"{row.mean_label_selected:.3g}", figure(noise_ceiling.get(row.target))])
    return aligned(lines, num_names=2)


def measure_fidelity(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    target_names: Sequence[str],
    sources: Sequence[str] | None = None,
    baseline: ArrayLike | None = None,
    top_fraction: float = 0.2,
    num_bootstrap: int = 500,
    seed: int = 0,
) -> list[TargetFidelity]:
    """Compare scores with held-out labels, target by target.

    Ties share their places: a text tied at the edge of the best fifth counts in part. Constant scores therefore
    get a Spearman of 0.0 and a recall of `top_fraction`. Where `baseline` differs between texts, the
    scores are cross-fitted, and texts with equal baseline are taken for a fold: its training mean is low exactly when
    its held-out labels are high, which would pull a useless surrogate below zero. So ranks are taken of scores minus
    their fold's median score, if every fold has at least 8 texts.

    Args:
        scores: (S, C) predictions for texts that were not fitted on.
        labels: (S, C) their labels.
        target_names: C names.
        sources: S names of where each text comes from, or None.
        baseline: (S, C) mean label of the texts that each score was fitted on; None takes the mean of `labels`.
        top_fraction: The share of texts that "best" means.
        num_bootstrap: Resamples for the interval.
        seed: Of the bootstrap.

    Raises:
        InputError: Shapes do not fit together, fewer than 3 texts, or an option is out of range.
        NotFiniteError: A score or label is NaN or infinite.
    """
    score_matrix, label_matrix = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    means = (
        np.broadcast_to(label_matrix.mean(axis=0), label_matrix.shape)
        if baseline is None
        else np.asarray(baseline, dtype=np.float64)
    )
    _check(score_matrix, label_matrix, means=means, target_names=target_names, sources=sources)
    check_at_least("num_bootstrap", num_bootstrap, 1)
    if not 0 < top_fraction <= 1:
        raise InputError(
            f"top_fraction={top_fraction!r} cannot be used.",
            "a number above 0 and up to 1",
            "pass the share of texts you mean to select, such as 0.2.",
        )
    return [
        _measure_target(
            score_matrix[:, column],
            label_matrix[:, column],
            means=means[:, column],
            target=target,
            sources=sources,
            top_fraction=top_fraction,
            num_bootstrap=num_bootstrap,
            seed=seed,
        )
        for column, target in enumerate(target_names)
    ]


def above_chance(fidelity: TargetFidelity, *, level: float = 0.05) -> bool:
    """Return whether a target's scores agree with held-out labels better than chance, at `level`."""
    return fidelity.spearman > 0 and fidelity.p_value < level


def _measure_target(
    scores: NDArray[np.float64],
    labels: NDArray[np.float64],
    *,
    means: NDArray[np.float64],
    target: str,
    sources: Sequence[str] | None,
    top_fraction: float,
    num_bootstrap: int,
    seed: int,
) -> TargetFidelity:
    ranked = _centred_by_fold(scores, means)
    correlation = spearman(ranked, labels)
    within, num_sources = _within_sources(ranked, labels, sources)
    num_best = max(1, round(top_fraction * len(labels)))
    selected, best = _top_weights(ranked, num_best), _top_weights(labels, num_best)
    mean_error = float(np.square(labels - means).sum())
    r2 = 1.0 - float(np.square(labels - scores).sum()) / mean_error if mean_error > 0 else None
    return TargetFidelity(
        target=target,
        spearman=correlation,
        p_value=_p_value(correlation, len(labels)),
        spearman_interval=_bootstrap_interval(ranked, labels, num_bootstrap=num_bootstrap, seed=seed),
        spearman_within_source=within,
        num_sources_within=num_sources,
        r2=r2,
        top_recall=float(selected @ best) / num_best,
        mean_label_selected=float(selected @ labels) / num_best,
        mean_label_all=float(labels.mean()),
        mean_label_best=float(best @ labels) / num_best,
        top_fraction=top_fraction,
        num_texts=len(labels),
    )


def _centred_by_fold(scores: NDArray[np.float64], means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return scores minus the median score of the texts with the same training mean, if folds are large enough.

    The median of scores is taken, not the training mean: one outlying label moves that mean, but not the scores of
    a surrogate fitted on ranks.
    """
    _, inverse, counts = np.unique(means, return_inverse=True, return_counts=True)
    if len(counts) == 1 or counts.min() < MIN_TEXTS_PER_FOLD:
        return scores
    medians = np.array([np.median(scores[inverse == fold]) for fold in range(len(counts))])
    return scores - medians[inverse]


def _top_weights(values: NDArray[np.float64], num_best: int) -> NDArray[np.float64]:
    """Return each text's part (0 to 1) in the `num_best` largest values; ties at the edge share the rest."""
    edge = np.partition(values, -num_best)[-num_best]
    above, tied = values > edge, values == edge
    return above + tied * ((num_best - above.sum()) / tied.sum())


def _within_sources(
    scores: NDArray[np.float64], labels: NDArray[np.float64], sources: Sequence[str] | None
) -> tuple[float | None, int]:
    """Return the mean Spearman inside sources, weighted by texts, and how many sources it covers."""
    if sources is None:
        return None, 0
    _, inverse, counts = np.unique(np.asarray(sources, dtype=np.str_), return_inverse=True, return_counts=True)
    numbers = [number for number, count in enumerate(counts) if count >= MIN_TEXTS_PER_SOURCE]
    if not numbers:
        return None, 0
    inside = [spearman(scores[inverse == number], labels[inverse == number]) for number in numbers]
    return float(np.average(inside, weights=counts[numbers])), len(numbers)


def _p_value(correlation: float, num_texts: int) -> float:
    from scipy.special import stdtr

    freedom = num_texts - 2
    with np.errstate(divide="ignore"):
        statistic = correlation * np.sqrt(freedom / np.float64(max(0.0, (1 - correlation) * (1 + correlation))))
    return float(stdtr(freedom, -statistic)) if correlation != 0 else 0.5


def _bootstrap_interval(
    scores: NDArray[np.float64], labels: NDArray[np.float64], *, num_bootstrap: int, seed: int
) -> tuple[float, float]:
    """Return percentiles of Spearman over resampled texts, whatever the order of the rows."""
    order = np.lexsort((scores, labels))
    scores, labels = scores[order], labels[order]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_bootstrap):
        rows = rng.integers(0, len(labels), size=len(labels))
        values.append(spearman(scores[rows], labels[rows]))
    low, high = np.percentile(values, INTERVAL_PERCENTILES)
    return float(low), float(high)


def _check(
    scores: NDArray[np.float64],
    labels: NDArray[np.float64],
    *,
    means: NDArray[np.float64],
    target_names: Sequence[str],
    sources: Sequence[str] | None,
) -> None:
    if (
        labels.ndim != 2
        or scores.shape != labels.shape
        or means.shape != labels.shape
        or (labels.shape[1] != len(target_names))
        or (sources is not None and len(sources) != len(labels))
    ):
        raise InputError(
            f"scores {scores.shape}, labels {labels.shape}, baseline {means.shape}, {len(target_names)} target "
            f"names and {'no' if sources is None else len(sources)} sources were given.",
            "matrices of one shape (texts, targets), a name per target, a source per text",
            "pass rows of the same texts and columns of the same targets.",
        )
    if len(labels) < MIN_TEXTS:
        raise InputError(
            f"{len(labels)} held-out texts were given.", f"at least {MIN_TEXTS}; a hundred to be of use", "hold out more texts."
        )
    for what, values in (("scores", scores), ("labels", labels), ("baseline", means)):
        if not np.isfinite(values).all():
            raise NotFiniteError(f"{what} hold NaN or infinite values.", "finite numbers", f"find out why {what} are not finite.")
