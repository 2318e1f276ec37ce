"""What the first refresh of a run will cost in FLOPs, before one was measured: counted from the strategy's options.

Without it the first refresh, which is often the dearest, would be decided on without a figure. Later ones are expected to
cost what the last one did (`Overhead.expected`). Seconds stay 0: no training step was timed yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle import plugins
from oracle.methods import needs_of
from oracle.texts import list_text_ids
from surrogate.planning.cost_model import Sizes, label_costs, model_state_flops
from surrogate.planning.costs import Cost, Expected
from surrogate.planning.plan_search import METHODS
from surrogate.planning.sizes import ModelSize, target_size
from surrogate.predictor import ENCODERS

if TYPE_CHECKING:
    from datasets import Dataset

    from oracle.language_model import LanguageModel
    from oracle.targets import TargetSet

COUNTED_TEXTS = 256  # of the candidates, for the mean cost of a text


def expected_first(
    strategy: Any,
    candidates: Dataset,
    targets: Sequence[TargetSet],
    *,
    lm: LanguageModel | None = None,
    num_processes: int = 1,
) -> Expected:
    """Count what a strategy's first ranking will cost; nothing runs, but texts are tokenised.

    Labels of a method whose cost does not follow from sizes alone count as one forward and backward pass each, which is
    then a lower bound; so does a strategy with neither labels nor a pass of the model count as free.

    Args:
        strategy: The strategy, with its options.
        candidates: The M texts that may be chosen.
        targets: The target sets.
        lm: The live model; without one only frozen encoders cost anything.
        num_processes: How many processes share the labels; each makes the target gradients for itself.
    """
    drawn = np.sort(np.argsort(np.array(list_text_ids(candidates)), kind="stable")[:COUNTED_TEXTS])
    few, num_candidates = candidates.select(drawn), len(candidates)
    labels = Expected()
    if lm is not None:
        size = ModelSize(lm)
        text_tokens = float(size.count_tokens(few)[0].mean())
        if strategy.plugin_name == "loss":
            return Expected(fixed=Cost(lm.forward_flops_per_token * text_tokens * num_candidates))
        labels = _labels(
            strategy, size, targets, text_tokens=text_tokens, num_candidates=num_candidates, num_processes=num_processes
        )
    num_labelled = min(getattr(strategy, "sample_size", 0) + getattr(strategy, "num_probe", 0), num_candidates)
    share = getattr(strategy, "second_share", 0.0)
    first = sum(_flops_per_text(encoder, few, lm) for encoder in getattr(strategy, "encoder", ()))
    second = sum(_flops_per_text(encoder, few, lm) for encoder in getattr(strategy, "second_encoder", ()))
    features = first * num_candidates + second * min(share * num_candidates + num_labelled, num_candidates)
    return Expected(sampled=labels.sampled, fixed=labels.fixed, once=Cost(features))


def _labels(
    strategy: Any,
    size: ModelSize,
    targets: Sequence[TargetSet],
    *,
    text_tokens: float,
    num_candidates: int,
    num_processes: int,
) -> Expected:
    method = getattr(strategy, "method", None)
    if method is None or not needs_of(plugins.load("oracle.methods", method)).model:
        return Expected()
    target_tokens, num_targets = 0.0, 0
    if targets:
        target_tokens, num_targets = target_size(size, list(targets), max_texts=getattr(strategy, "max_target_texts", None))
    sizes = Sizes(
        forward_flops_per_token=size.forward_flops_per_token,
        head_parameters=size.head_parameters,
        num_texts=num_candidates,
        text_tokens=text_tokens,
        training_tokens=0.0,
        target_tokens=target_tokens,
        num_targets=num_targets,
        num_rounds=1,
    )
    once, per_label = label_costs(method if method in METHODS else "grad_dot", sizes)
    fixed = once * num_processes
    if not hasattr(strategy, "sample_size"):
        return Expected(fixed=Cost(fixed + per_label * num_candidates))
    num_sampled = min(strategy.sample_size, num_candidates)
    return Expected(sampled=Cost(per_label * num_sampled), fixed=Cost(fixed + per_label * strategy.num_probe))


def _flops_per_text(encoder: Any, texts: Dataset, lm: LanguageModel | None) -> float:
    """Mean FLOPs of encoding a text, by the encoder's own count."""
    if encoder == "model_state":
        if lm is None:
            return 0.0
        size = ModelSize(lm)
        per_token = model_state_flops(size.forward_flops_per_token, size.head_parameters)
        return per_token * float(size.count_tokens(texts)[0].mean())
    made = plugins.create(ENCODERS, encoder, {}) if isinstance(encoder, str) else encoder
    return float(made.flops(texts)) / len(texts)
