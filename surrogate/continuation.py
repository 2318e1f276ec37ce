"""Warm start: a surrogate that goes on from an earlier one instead of beginning from nothing.

Between two checkpoints influence changes in part. What stays is in the earlier surrogate already, so ridge regression and
trees take a share of its scores and learn the rest: on the label scale,

    score = offset + share * earlier score + what is learned now.

Offset and share are, target by target, the least squares fit of the new labels by the earlier scores, the share kept
between 0 and 1. So an earlier surrogate that says nothing of the new labels gets no share, and the fit is as good as one
from nothing. The new labels must be of texts that the earlier one was not fitted on, or its share comes out too large.

The earlier one may have gone on from a still earlier one. Parts whose share has fallen below 1 % are forgotten.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from oracle.errors import InputError, InputTypeError
from surrogate.models import with_prefix, without_prefix
from surrogate.scaling import weighted_mean

SMALLEST_SHARE = 0.01
PREFIX = "earlier"


class Part(Protocol):
    """What a surrogate needs for others to go on from it."""

    label_scale: str
    earlier_: Continuation | None

    @property
    def num_features_(self) -> int:
        """Number of feature columns D of the fit."""

    def own_output(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return what it learned itself (B, C) on the label scale, without the part of earlier ones."""

    def save(self, folder: Path) -> None:
        """Write it into `folder`."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""


@dataclass(frozen=True)
class Continuation:
    """The part of earlier surrogates in a score: an offset (C,), and surrogates with their shares (C,)."""

    offset: NDArray[np.float64]
    parts: Sequence[tuple[Part, NDArray[np.float64]]]

    @classmethod
    def of(
        cls, earlier: Part, features: NDArray[np.float32], targets: NDArray[np.float64], *, weights: NDArray[np.float64] | None
    ) -> Continuation:
        """Choose offset and share of `earlier` for features (S, D) and new labels (S, C) on the label scale."""
        scores = full_output(earlier, features)  # (S, C)
        mean_score, mean_target = weighted_mean(scores, weights), weighted_mean(targets, weights)
        centred = scores - mean_score
        power = weighted_mean(np.square(centred), weights)
        product = weighted_mean(centred * (targets - mean_target), weights)
        share = np.divide(product, power, out=np.zeros_like(product), where=power > 0).clip(0.0, 1.0)
        offset = mean_target - share * mean_score
        parts: list[tuple[Part, NDArray[np.float64]]] = [(_alone(earlier), share)]
        if earlier.earlier_ is not None:
            offset = offset + share * earlier.earlier_.offset
            parts += [(part, share * own) for part, own in earlier.earlier_.parts]
        return cls(offset, [(part, own) for part, own in parts if own.max() >= SMALLEST_SHARE])

    def output(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return offset plus the earlier ones' shares, (B, C), for features (B, D)."""
        total = np.tile(self.offset, (len(features), 1))
        for part, share in self.parts:
            total += share * part.own_output(features)
        return total

    def save(self, folder: Path) -> dict[str, NDArray]:
        """Write the parts into folders of `folder`, and return offset and shares as named arrays."""
        for number, (part, _) in enumerate(self.parts):
            part.save(_part_folder(folder, number))
        shares = np.array([share for _, share in self.parts]).reshape(len(self.parts), len(self.offset))
        return with_prefix(PREFIX, {"offset": self.offset, "shares": shares})

    @classmethod
    def load(cls, folder: Path, arrays: dict[str, NDArray], part_class: type[Part]) -> Continuation | None:
        """Make what `save` wrote; None where there is nothing of an earlier surrogate."""
        own = without_prefix(PREFIX, arrays)
        if not own:
            return None
        parts = [(part_class.load(_part_folder(folder, number)), share) for number, share in enumerate(own["shares"])]
        return cls(own["offset"], parts)


def full_output(surrogate: Part, features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return scores (B, C) on the label scale, the part of earlier surrogates included."""
    own = surrogate.own_output(features)
    return own if surrogate.earlier_ is None else own + surrogate.earlier_.output(features)


def check_warm_start(
    warm_start: Any, surrogate: Any, *, num_features: int, num_targets: int, also_equal: Sequence[str] = ()
) -> None:
    """Refuse a surrogate that `surrogate` cannot go on from.

    Args:
        warm_start: The earlier one.
        surrogate: The one that is being fitted.
        num_features: Columns of its features.
        num_targets: Columns of its labels.
        also_equal: Options, besides label_scale, that both must have in common.

    Raises:
        InputTypeError: It is of another class.
        InputError: It is not fitted, or was fitted with other features, targets or options.
    """
    if type(warm_start) is not type(surrogate):
        raise InputTypeError(
            f"warm_start is a {type(warm_start).__name__}.",
            f"a fitted {type(surrogate).__name__}",
            "pass a surrogate of the same kind, or leave warm_start out.",
        )
    if not hasattr(warm_start, "num_features_"):
        raise InputError("warm_start has not been fitted.", "a fitted surrogate", "fit it, or leave warm_start out.")
    found = [("features", warm_start.num_features_, num_features), ("targets", warm_start.num_targets_, num_targets)]
    found += [(name, getattr(warm_start, name), getattr(surrogate, name)) for name in ("label_scale", *also_equal)]
    for name, theirs, ours in found:
        if theirs != ours:
            raise InputError(
                f"warm_start has {name}={theirs!r}; this surrogate has {name}={ours!r}.",
                f"the same {name}",
                f"fit with the same {name} as before, or leave warm_start out.",
            )


def _alone(surrogate: Part) -> Part:
    """Return the surrogate without the part of earlier ones; what it learned is shared, not copied."""
    own = copy.copy(surrogate)
    own.earlier_ = None
    return own


def _part_folder(folder: Path, number: int) -> Path:
    return folder / f"{PREFIX}-{number:04d}"
