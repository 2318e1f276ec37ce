"""What a LightGBM model's text says: its header, its parameters, and of each tree what attribution needs.

The text is the one source that every model has: an estimator, a Booster and a saved file. It is read in one pass,
since LightGBM's JSON dump takes longer than the attribution itself. Numbers of the parameter block and shrinkage are
printed with six digits; `number` takes the digits that are missing from the parameters that a living model remembers.

Left out are thresholds and split features beyond what is said here: rows are routed by LightGBM.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from oracle.errors import InputError

CATEGORICAL_BIT = 1  # of decision_type
PRINTED_DIGITS = 6  # of parameters and shrinkage
NO_SPLIT = -1


@dataclass(frozen=True)
class TreeText:
    """One tree: `leaf_values` (L,) as stored, `leaf_counts` (L,) rows that grew it, its `shrinkage` with six digits.

    `categorical_parents` (L,) is the feature of the split right above the leaf where that split is categorical, else -1:
    LightGBM penalises such leaves more.
    """

    leaf_values: NDArray[np.float64]
    leaf_counts: NDArray[np.int64]
    shrinkage: float
    is_linear: bool
    categorical_parents: NDArray[np.int64]

    @property
    def is_constant(self) -> bool:
        """Whether the tree has no split."""
        return len(self.leaf_values) == 1

    @property
    def has_categorical_splits(self) -> bool:
        """Whether a leaf lies right below a categorical split."""
        return bool((self.categorical_parents != NO_SPLIT).any())


@dataclass(frozen=True)
class ModelText:
    """A model's header, parameter block and trees; `known_numbers` are parameters with all their digits."""

    header: dict[str, str]
    parameters: dict[str, str]
    trees: list[TreeText]
    known_numbers: list[float] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str, known_numbers: Iterable[float] = ()) -> ModelText:
        """Read a model from its text.

        Raises:
            InputError: The text is no LightGBM model, or has no parameter block.
        """
        head, *blocks = text.split("\nTree=")
        header = _pairs(head)
        _, found, rest = text.partition("\nparameters:\n")
        if "num_tree_per_iteration" not in header or not found:
            raise InputError(
                "the model text has no header or no parameter block.",
                "a model that LightGBM saved (save_model, model_to_string)",
                "save the model again with LightGBM 3 or later.",
            )
        parameters = dict(re.findall(r"^\[(\w+): (.*)\]$", rest.partition("\nend of parameters")[0], flags=re.MULTILINE))
        if not blocks:
            raise InputError("the model has no trees.", "a trained model", "train it for at least one round.")
        return cls(header, parameters, [_tree(block.partition("\n\n")[0]) for block in blocks], list(known_numbers))

    @property
    def num_trees_per_round(self) -> int:
        """Trees that one round of boosting adds: one per score."""
        return int(self.header["num_tree_per_iteration"])

    def number(self, name: str) -> float:
        """Return a numeric parameter, with all its digits where the living model remembers them."""
        if name not in self.parameters:
            raise InputError(
                f"the model text does not give the parameter {name!r}.",
                "a model of LightGBM 3 or later",
                "train the model with a recent LightGBM.",
            )
        return self.sharpened(float(self.parameters[name]))

    def sharpened(self, printed: float) -> float:
        """Return the known number that prints as `printed`, or `printed` itself where none or several do."""
        candidates = self._known_by_print.get(printed, set())
        return next(iter(candidates)) if len(candidates) == 1 else printed

    @cached_property
    def _known_by_print(self) -> dict[float, set[float]]:
        """The known numbers that print alike."""
        found: dict[float, set[float]] = {}
        for number in self.known_numbers:
            found.setdefault(float(f"{number:.{PRINTED_DIGITS}g}"), set()).add(number)
        return found


def is_cut_off(number: float) -> bool:
    """Whether a number fills all printed digits and has no further ones: it may have had more before it was printed."""
    digits = f"{number:.{PRINTED_DIGITS - 1}e}"
    return float(digits) == number and len(digits.partition("e")[0].rstrip("0").lstrip("-")) > PRINTED_DIGITS


def _pairs(block: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in block.split("\n") if "=" in line)


def _numbers(text: str, dtype: type) -> NDArray:
    return np.array(text.split(), dtype=np.float64).astype(dtype)


def _tree(block: str) -> TreeText:
    pairs = _pairs("Tree=" + block)
    num_leaves = int(pairs["num_leaves"])
    values = _numbers(pairs["leaf_value"], np.float64)
    parents = np.full(num_leaves, NO_SPLIT, dtype=np.int64)
    if num_leaves > 1 and int(pairs["num_cat"]) > 0:
        features = _numbers(pairs["split_feature"], np.int64)
        is_categorical = (_numbers(pairs["decision_type"], np.int64) & CATEGORICAL_BIT) > 0
        for side in ("left_child", "right_child"):
            children = _numbers(pairs[side], np.int64)
            is_leaf = (children < 0) & is_categorical
            parents[~children[is_leaf]] = features[is_leaf]
    counts = pairs.get("leaf_count", "")
    return TreeText(
        leaf_values=values,
        leaf_counts=_numbers(counts, np.int64) if counts else np.full(num_leaves, -1, dtype=np.int64),
        shrinkage=float(pairs.get("shrinkage", "1")),
        is_linear=pairs.get("is_linear", "0") != "0",
        categorical_parents=parents,
    )
