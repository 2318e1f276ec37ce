"""Rows to fit on: one per label, with its weight, old labels beside new ones, and which texts fidelity is judged by.

A text may have a new label and older ones, of earlier checkpoints. Influence shrinks and grows in the course of
training, so older labels are put on the scale of the new ones, target by target: minus their median, over their
spread, times the new spread, plus the new median. That takes for granted that both sets of texts were drawn alike.

Only new labels can be judged. In cross-fitting a judged text is held out together with every row of its group of
near-duplicates, its own older labels among them; all other rows help to fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oracle.errors import InputError, MismatchError
from oracle.labels import Labels
from surrogate.cross_fitting import cross_predict
from surrogate.models import Surrogate, checked_weights
from surrogate.scaling import robust_location_scale
from surrogate.splits import grouped_folds


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """What a surrogate is fitted on; of T texts each may have several labels, R in all.

    Shapes: places (R,) the text of each row; values (R, C) float32; weights (R,) or None, each counts once; groups (R,) of
    near-duplicates; judged (J,) row numbers, ascending.

    Attributes:
        text_ids: T ids.
        judged_labels: The labels (J, C) of the judged rows.
    """

    text_ids: Sequence[str]
    places: NDArray[np.int64]
    values: NDArray[np.float32]
    weights: NDArray[np.float64] | None
    groups: NDArray[np.int64]
    judged: NDArray[np.int64]
    judged_labels: Labels

    @classmethod
    def join(
        cls,
        text_ids: Sequence[str],
        labels: Labels,
        *,
        groups: NDArray[np.int64],
        older: Sequence[tuple[Labels, float]] = (),
        sample_weight: ArrayLike | None = None,
        judged: Sequence[str] | None = None,
    ) -> LabelledRows:
        """Join labels with the T texts that they are of.

        Args:
            text_ids: T ids; every one has a label, new or older.
            labels: New labels; those of other texts are left out.
            groups: (T,) near-duplicate groups.
            older: Labels of earlier checkpoints, all of these texts, and the weight of each of their rows.
            sample_weight: Weight of each row of `labels`, in its order.
            judged: Ids of the texts with a new label that fidelity is measured on; None takes all of them.
        """
        with_label = set(labels.text_ids)
        new = np.array([place for place, text_id in enumerate(text_ids) if text_id in with_label], dtype=np.int64)
        new_ids = [text_ids[place] for place in new]
        taken = labels.take(new_ids)
        weights = np.ones(len(new))
        if sample_weight is not None:
            given = dict(zip(labels.text_ids, checked_weights(sample_weight, len(labels)), strict=True))
            weights = np.array([given[text_id] for text_id in new_ids])
            if not weights.any():
                raise InputError("every sample_weight is 0.", "some labels of positive weight", "leave sample_weight out.")
        judged_rows = _judged_rows(new_ids, judged)
        place_of = {text_id: place for place, text_id in enumerate(text_ids)}
        places, values, all_weights = [new], [taken.values], [weights]
        for old, weight in older:
            places.append(np.array([place_of[text_id] for text_id in old.text_ids], dtype=np.int64))
            values.append(on_new_scale(old, taken, weights=None if sample_weight is None else weights))
            all_weights.append(np.full(len(old), float(weight)))
        joined_places = np.concatenate(places)
        return cls(
            text_ids=text_ids,
            places=joined_places,
            values=np.concatenate(values),
            weights=None if sample_weight is None and not older else np.concatenate(all_weights),
            groups=groups[joined_places],
            judged=judged_rows,
            judged_labels=taken if judged is None else taken.take([new_ids[row] for row in judged_rows]),
        )

    def fit(
        self,
        surrogate: Surrogate,
        features: NDArray[np.float32],
        *,
        rows: NDArray[np.int64] | None = None,
        warm_start: Surrogate | None = None,
    ) -> Surrogate:
        """Fit on these rows (None: all) with features (T, D)."""
        used = np.arange(len(self.places)) if rows is None else rows
        return surrogate.fit(
            features[self.places[used]],
            self.values[used],
            groups=self.groups[used],
            sample_weight=None if self.weights is None else self.weights[used],
            warm_start=warm_start,
        )

    def cross_predict(
        self,
        new_surrogate: Callable[[], Surrogate],
        features: NDArray[np.float32],
        *,
        num_folds: int,
        seed: int,
        warm_start: Surrogate | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Predict every judged row by a surrogate that saw no row of its group; `warm_start` saw none of any.

        Returns:
            Held-out scores (J, C), and the mean label of the other folds' judged rows (J, C).
        """
        groups = self.groups[self.judged]
        folds = grouped_folds(groups, num_folds=num_folds, seed=seed, keys=self.judged_labels.text_ids)
        return cross_predict(
            lambda: cast(Surrogate, _ByRow(self, new_surrogate(), features, warm_start)),  # fits and predicts; it is never saved
            self.judged[:, None],
            self.values[self.judged],
            folds=folds,
            groups=groups,
        )


@dataclass
class _ByRow:
    """A surrogate whose features are numbers of judged rows: `cross_predict` deals them, and the rest is looked up."""

    rows: LabelledRows
    surrogate: Surrogate
    features: NDArray[np.float32]
    warm_start: Surrogate | None

    def fit(self, X: ArrayLike, y: ArrayLike, **_: Any) -> Self:
        """Fit on the judged rows `X` (S, 1) and on every other row that shares no group with a held-out one."""
        given = np.asarray(X)[:, 0]
        held_out = np.setdiff1d(self.rows.judged, given)
        others = np.setdiff1d(np.arange(len(self.rows.places)), self.rows.judged)
        helping = others[~np.isin(self.rows.groups[others], self.rows.groups[held_out])]
        used = np.sort(np.concatenate([given, helping]))
        self.rows.fit(self.surrogate, self.features, rows=used, warm_start=self.warm_start)
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float32]:
        """Return scores (B, C) of the rows `X` (B, 1)."""
        return self.surrogate.predict(self.features[self.rows.places[np.asarray(X)[:, 0]]])


def check_labels(labels: Labels, older: Sequence[tuple[Labels, float]], text_ids: Sequence[str]) -> None:
    """Refuse labels of other texts, and older ones of other targets, of texts not at hand, or of a weight out of range."""
    known = set(text_ids)
    if known.isdisjoint(labels.text_ids):
        raise MismatchError(
            f"none of the {len(text_ids)} texts is among the {len(labels)} labelled ones.",
            "the texts that the labels were made for",
            "pass the sample that was given to oracle.label.",
        )
    for old, weight in older:
        if sorted(old.target_names) != sorted(labels.target_names):
            raise MismatchError(
                f"older labels of the targets {old.target_names} beside new ones of {labels.target_names}.",
                "labels of the same targets",
                "leave out the older labels, or label again on the same target sets.",
            )
        missing = [text_id for text_id in old.text_ids if text_id not in known]
        if missing or not len(old):
            raise MismatchError(
                f"{len(missing)} of {len(old)} older labels are of texts that are not in `sample`, first {missing[:3]}.",
                "older labels of texts of `sample`; texts without a label do no harm there",
                "pass the pool as `sample`.",
            )
        if isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise InputError(
                f"older labels with the weight {weight!r}.", "a finite number above 0", "leave out labels that should not count."
            )


def on_new_scale(old: Labels, new: Labels, *, weights: NDArray[np.float64] | None = None) -> NDArray[np.float32]:
    """Return older values (S, C) in the order of `new`'s targets, moved and stretched to its median and spread.

    Spread is 1.4826 times the median absolute deviation, the standard deviation where that is zero. A target that is
    constant in one of the sets becomes the new median.
    """
    values = np.stack([old.target(name) for name in new.target_names], axis=1).astype(np.float64)  # (S, C)
    old_center, old_scale = robust_location_scale(values)
    new_center, new_scale = robust_location_scale(new.values.astype(np.float64), weights)
    stretch = np.divide(new_scale, old_scale, out=np.zeros_like(new_scale), where=old_scale > 0)
    return ((values - old_center) * stretch + new_center).astype(np.float32)


def _judged_rows(new_ids: Sequence[str], judged: Sequence[str] | None) -> NDArray[np.int64]:
    if judged is None:
        return np.arange(len(new_ids))
    wanted = set(judged)
    rows = np.array([row for row, text_id in enumerate(new_ids) if text_id in wanted], dtype=np.int64)
    if len(rows) < len(wanted) or not wanted:
        missing = sorted(wanted - set(new_ids))
        raise MismatchError(
            f"{len(missing)} of {len(wanted)} judged texts have no new label or are not in `sample`, first {missing[:3]}.",
            "text_ids of newly labelled texts of `sample`",
            "judge by texts that were labelled at this checkpoint, or leave judged out.",
        )
    return rows
