"""Real steps on few target texts, corrected by slopes on all of them.

The price of `one_step` is the evaluation of the target texts, and with few of them its labels are mostly those texts' noise.
`grad_dot` sees any number of target texts at the same price, and on the same few texts it makes nearly the same error. So the
error is measured there and taken off (a control variate): steps(few) + beta * (slopes(all) - slopes(few)), beta the slope of
the regression of steps(few) on slopes(few) over the labelled texts.
"""

from __future__ import annotations

import numpy as np

from oracle.errors import MismatchError
from oracle.labels import Labels


def corrected(steps: Labels, slopes_few: Labels, slopes_all: Labels) -> Labels:
    """Correct labels of real steps, target by target.

    Args:
        steps: `one_step` on a few target texts (`max_target_texts`).
        slopes_few: `grad_dot` on the same target texts: the same `max_target_texts` and `seed`.
        slopes_all: `grad_dot` on all target texts.

    Returns:
        The labels of `steps`, corrected; halves are corrected by the slopes' whole difference too. No further columns.

    Raises:
        MismatchError: A text or target of `steps` is missing in the slopes, or `slopes_few` was measured on other target texts.
    """
    theirs = [slopes.meta.get("targets") for slopes in (steps, slopes_few)]
    if None not in theirs and theirs[0] != theirs[1]:
        raise MismatchError(
            f"steps were measured on the target texts {theirs[0]}, slopes_few on {theirs[1]}.",
            "the same target texts for both",
            "label both with the same targets, max_target_texts and seed.",
        )
    names = steps.target_names
    lacking = [name for name in names if name not in slopes_few.target_names or name not in slopes_all.target_names]
    if lacking:
        raise MismatchError(
            f"the slopes lack the targets {lacking}.", "slopes for every target of the steps", "label these targets too."
        )
    few, everything = slopes_few.take(steps.text_ids), slopes_all.take(steps.text_ids)
    values, halves = steps.values.copy(), steps.halves.copy()
    for column, name in enumerate(names):
        change = corrected_values(steps.target(name), few.target(name), everything.target(name)) - steps.target(name)
        values[:, column] += change
        halves[:, :, column] += change
    meta = {**steps.meta, "corrected_by": {"few": slopes_few.meta.get("targets"), "all": slopes_all.meta.get("targets")}}
    return Labels(values, list(steps.text_ids), list(names), steps.units, halves, {}, meta)


def corrected_values(steps: np.ndarray, slopes_few: np.ndarray, slopes_all: np.ndarray) -> np.ndarray:
    """Return (S,) steps + beta * (slopes_all - slopes_few), beta from a regression; 0 where the slopes are all the same."""
    centred = np.asarray(slopes_few, dtype=np.float64) - np.mean(slopes_few)
    square = float(centred @ centred)
    beta = float(centred @ np.asarray(steps, dtype=np.float64)) / square if square > 0 else 0.0
    return np.asarray(steps + beta * (np.asarray(slopes_all, dtype=np.float64) - slopes_few))
