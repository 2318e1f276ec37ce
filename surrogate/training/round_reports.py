"""What is said of a round: numbers for loggers, and warnings of what nobody wants to find out from a table afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

METRIC_PREFIX = "influence/"
MANY_REPEATS = 1.5  # of a round's texts, from which on it is said


class RefreshFailedWarning(UserWarning):
    """A refresh failed, and training goes on with the ranking before."""


class OverheadWarning(UserWarning):
    """A refresh was left out because of `max_overhead`, or selecting cost more than that."""


class NoMetricWarning(UserWarning):
    """Labels do not know how the optimiser scales gradients."""


class SmallPoolWarning(UserWarning):
    """A round shows its texts several times."""


def tell(record: Mapping[str, Any], *, step: int, repeats: float, optimizer: Any, told: set[type[Warning]]) -> None:
    """Warn of a refresh that failed; and, once in a training, of one that was left out, of too few texts, of a missing metric.

    Args:
        record: The round's row in the table.
        step: The step that it begins at.
        repeats: How often it shows its texts.
        optimizer: The one that labels were measured with, or None.
        told: What was said once already; gets what is said now.
    """
    if record["failure"]:
        text = f"the refresh at step {step} failed, and training goes on without it: {record['failure']}"
        warnings.warn(text, RefreshFailedWarning, stacklevel=4)
    if record["left_out"]:
        held = record["ranked_in_round"]
        goes_on = "random texts" if held < 0 else f"the ranking of round {held}"
        text = (
            f"the refresh at step {step} is left out, and training goes on with {goes_on}: {record['reason']}. Raise "
            "max_overhead (a resumed training may), or lower sample_size in a new training; later ones that are left out stand "
            "in the table of rounds."
        )
        _tell_once(text, OverheadWarning, told)
    if repeats >= MANY_REPEATS:
        text = (
            f"the round at step {step} shows each of its {record['num_texts']} texts {repeats:.1f} times, because the pool has "
            "no more to offer; make rounds shorter or the pool larger."
        )
        _tell_once(text, SmallPoolWarning, told)
    is_adam = optimizer is not None and {"betas", "eps"} <= set(optimizer.param_groups[0])
    is_known = isinstance(optimizer, torch.optim.SGD) or is_adam
    if record["facts"].get("metric") == "none" and not is_known:
        given = "no optimiser" if optimizer is None else f"the optimiser {type(optimizer).__name__}"
        text = (
            f"labels are measured as for plain gradient descent, since the model has {given}: pass the one that trains it "
            "(LanguageModel(module, tokenizer, optimizer)); of others than Adam and SGD the metric is not known, and "
            "method='one_step' takes their real step."
        )
        _tell_once(text, NoMetricWarning, told)


def _tell_once(text: str, category: type[Warning], told: set[type[Warning]]) -> None:
    if category not in told:
        warnings.warn(text, category, stacklevel=5)
        told.add(category)


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what loggers are told of a round: flat names, numbers only; what was not measured is left out.

    `fidelity`, `noise_ceiling`, `selected` and `candidates` (mean predicted influence, in label units) by target; `drift`
    is 1 minus the rank agreement of the probe's old and new labels; `overhead` is the share of the training so far.
    """
    told: dict[str, Any] = {
        "round": record["index"],
        "refreshed": int(record["refreshed"]),
        "failed": int(record["failure"] is not None),
        "left_out": int(record["left_out"]),
        "texts": record["num_texts"],
        "labels": record["num_labels"],
        "seconds": record["seconds"],
        "drift": (record["drift"] or {}).get("labels"),
    }
    for name, key in (
        ("fidelity", "fidelity"),
        ("noise_ceiling", "noise_ceiling"),
        ("selected", "influence_selected"),
        ("candidates", "influence_candidates"),
        ("overhead", "overhead"),
        ("overhead_planned", "overhead_planned"),
    ):
        told |= {f"{name}/{target}": value for target, value in (record[key] or {}).items()}
    return {METRIC_PREFIX + name: float(value) for name, value in told.items() if value is not None}
