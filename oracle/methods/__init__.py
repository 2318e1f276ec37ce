"""Oracle methods, one file each; the file name is what `oracle.label(method=...)` takes.

A method is a keyword-only dataclass whose fields are its options, with

- `plugin_name`: its name; `needs_optimizer`: whether the model must come with its optimiser;
  `changes_weights`: whether it steps the weights (they are then copied and put back, and a `torch.autocast` around the
  call is switched off, because it would go on with copies of the weights from before the step);
- `prepare(lm, columns)`: everything that does not depend on the text, once;
- `measure(encoded) -> Measured`: a few texts' influence on every target set;
- `units`: after `prepare`, what one unit of a value is;
- `facts()`: after measuring, what belongs into the labels' meta.json;
- `prepare_flops(columns)`: counted FLOPs of `prepare`;
- `flops(num_tokens, columns)`: counted FLOPs of measuring one text of so many tokens.

Positive values mean that training on the text lowers the target's loss.

A method that needs other things than a model, target sets and a few texts at a time says so in further class
variables, which may be left out (`needs_of` has their defaults):

- `needs_model = False`: `label` takes `lm=None`. `prepare` gets that or the model (whose tokenizer it may use),
  and `TextTargets` for columns; `measure` gets the texts themselves, as `read_texts` returns them.
- `needs_targets = False`: `label` takes no targets. The labels have one column, named like the method, and no halves.
- `needs_gradients = False`: forward passes are all it makes, so the model may be spread over devices by `device_map`.
- `uses_optimizer = False`: the values do not depend on the optimiser, so its state is no part of the labels' identity.
- `needs_whole_sample = True`: `measure` gets the whole sample at once, because a text's value depends on the others.
  The sample then belongs to the identity of the labels: a grown sample is refused, not added to.

and it may have further methods:

- `inputs()`: hashes of what its options only point to (files, other models), by name. They belong to the identity of the
  labels. It is asked before `prepare`.
- `rehearse(encoded)` and `choose(choice)`: after `prepare`, the first process rehearses a few texts of the sample and returns
  by JSON values how all of them are to be measured; every process then takes up that choice, and so does every later call
  that goes on with the same folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from oracle.targets import TargetSet


@dataclass(frozen=True)
class Measured:
    """What a method says of B texts.

    Attributes:
        values: (B, C) influence.
        halves: (2, B, C) the same on either half of each target set; NaN where a set has no halves.
        columns: Further numbers per text, each (B,) or (B, C), by name (loss, gradient norm, loss after).
    """

    values: np.ndarray
    halves: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class TextTargets:
    """Target sets as texts, for methods that need no model.

    Attributes:
        sets: The C target sets, in column order.
        in_first: For each of them, which of its texts belong to the first half; all of them where there are no halves.
    """

    sets: list[TargetSet]
    in_first: list[np.ndarray]


@dataclass(frozen=True)
class Needs:
    """What `label` has to give a method.

    Attributes:
        model: A model, target columns and encoded texts; without it, `TextTargets` and the texts themselves.
        gradients: A model with all its weights on one device.
        targets: Target sets; without them there is one column, named like the method.
        optimizer: Labels of the same optimiser state only, where it has one.
        whole_sample: The whole sample in one call of `measure`.
    """

    model: bool
    gradients: bool
    targets: bool
    optimizer: bool
    whole_sample: bool


def needs_of(method: Any) -> Needs:
    """Return what a method, or its class, needs; what it does not say has its default here."""
    needs_model = getattr(method, "needs_model", True)
    return Needs(
        model=needs_model,
        gradients=needs_model and getattr(method, "needs_gradients", True),
        targets=getattr(method, "needs_targets", True),
        optimizer=getattr(method, "uses_optimizer", True),
        whole_sample=getattr(method, "needs_whole_sample", False),
    )
