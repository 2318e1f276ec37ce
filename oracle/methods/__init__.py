"""Oracle methods, one file each; the file name is what `oracle.label(method=...)` takes.

A method is a keyword-only dataclass whose fields are its options, with

- `plugin_name`: its name; `needs_optimizer`: whether the model must come with its optimiser;
  `changes_weights`: whether it steps the weights (they are then copied and put back);
- `prepare(lm, columns)`: everything that does not depend on the text, once;
- `measure(encoded) -> Measured`: a few texts' influence on every target set;
- `units`: after `prepare`, what one unit of a value is;
- `facts()`: after measuring, what belongs into the labels' meta.json;
- `prepare_flops(columns)`: counted FLOPs of `prepare`;
- `flops(num_tokens, columns)`: counted FLOPs of measuring one text of so many tokens.

Positive values mean that training on the text lowers the target's loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


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
