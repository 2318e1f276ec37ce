"""The options of a refresher: what cannot work is refused before anything is spent, and what decides a run is kept on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle import plugins
from oracle.artifacts import fingerprint
from oracle.errors import InputError, InputTypeError, closest
from oracle.targets import TargetSet
from oracle.texts import text_format
from surrogate.aggregation import targets_used
from surrogate.predictor import ENCODERS
from surrogate.selection import RULES
from surrogate.training.choice import Choice
from surrogate.training.schedule import Schedule

if TYPE_CHECKING:
    from datasets import Dataset

    from oracle.language_model import LanguageModel

STRATEGIES = "surrogate.training.strategies"
FORMAT = 3  # of what stands in a workdir


def make_strategy(strategy: Any, options: Mapping[str, Any], *, other_options: Sequence[str] = ()) -> Any:
    """Return the strategy of a name with its options, or an object as it is.

    Args:
        strategy: A name, or an object of a strategy.
        options: Options of the strategy; none beside an object.
        other_options: Names of what the caller takes besides, for the error of a name that neither knows.

    Raises:
        InputError: An unknown name or option, or options beside an object.
    """
    if isinstance(strategy, str):
        known = [field.name for field in dataclasses.fields(plugins.load(STRATEGIES, strategy))]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise InputError(
                f"{unknown[0]!r} is an option neither of the refresher nor of the strategy {strategy!r}"
                f"{closest(unknown[0], [*known, *other_options])}.",
                f"{', '.join(other_options)}; of the strategy: {', '.join(known) or 'none'}",
                "remove the option or correct its name.",
            )
        return plugins.create(STRATEGIES, strategy, dict(options))
    if not hasattr(strategy, "rank") or not hasattr(strategy, "plugin_name"):
        raise InputTypeError(
            f"strategy={strategy!r} has no method rank.",
            ", ".join(plugins.names(STRATEGIES)) + ", or an object of one of them",
            "choose a strategy by name.",
        )
    if options:
        raise InputError(
            f"options {', '.join(options)} beside a strategy object.",
            "options only with a strategy's name",
            "set them on the object.",
        )
    return strategy


def check_targets(strategy: Any, targets: Sequence[TargetSet]) -> None:
    """Refuse a strategy that lacks its target sets.

    Raises:
        InputError: It does.
    """
    if strategy.needs_targets and not targets:
        raise InputError(
            f"the strategy {strategy.plugin_name!r} without target sets.",
            "a mapping such as {'math': texts}",
            "name the target sets, or use strategy='random'.",
        )


def check_model(strategy: Any, lm: LanguageModel | None) -> None:
    """Refuse a live model that is missing, or whose optimiser is wrapped: labels would then be measured as without one.

    Raises:
        InputError: It is.
    """
    if strategy.needs_model and lm is None:
        raise InputError(
            f"the strategy {strategy.plugin_name!r} looks at the live model, and there is none.",
            "an oracle.LanguageModel",
            "pass next_round(lm, ...).",
        )
    if lm is not None and hasattr(lm.optimizer, "optimizer"):
        raise InputError(
            f"the model's optimiser is a {type(lm.optimizer).__name__} around another one.",
            "the torch optimiser itself",
            "pass LanguageModel(..., optimizer.optimizer); `accelerator.prepare` has put the other one around it.",
        )


def check_repeats(strategy: Any, *, consume_once: bool) -> None:
    """Refuse one order at random, gone through from its beginning in every round.

    Raises:
        InputError: It would be.
    """
    if not consume_once and not strategy.redraws and getattr(strategy, "is_blind", False):
        raise InputError(
            f"consume_once=False with the strategy {strategy.plugin_name!r}: every round would show the same texts.",
            "consume_once=True, or strategy='rs2', which draws anew from the whole pool in every round",
            "pass one of the two.",
        )


def check_readable(strategy: Any, pool: Dataset) -> None:
    """Refuse encoders that read words for a pool of token ids, before labels are paid.

    Raises:
        InputError: There is such an encoder.
    """
    if text_format(pool) != "tokens":
        return
    given = [*getattr(strategy, "encoder", ()), *getattr(strategy, "second_encoder", ())]
    encoders: list[Any] = [plugins.load(ENCODERS, one) if isinstance(one, str) else one for one in given]
    of_words = [encoder.plugin_name for encoder in encoders if getattr(encoder, "needs_words", False)]
    if of_words:
        raise InputError(
            f"a pool of token ids, and the encoder {of_words[0]!r}, which reads words.",
            "encoders that read token ids, hashed_ngrams and model_state, or a pool of texts",
            "pass encoder=['hashed_ngrams'], or the texts that the ids were made of.",
        )


def check_drift(strategy: Any, schedule: Schedule) -> None:
    """Refuse a drift threshold where no drift can be seen.

    Raises:
        InputError: The strategy has no probe set, or ranks once.
    """
    name = strategy.plugin_name
    if schedule.drift_threshold is not None and not (strategy.adapts and getattr(strategy, "num_probe", 0)):
        raise InputError(
            f"drift_threshold with the strategy {name!r}, which {'has no probe set' if strategy.adapts else 'ranks once'}.",
            "strategy='refresh' with num_probe above 0",
            "leave drift_threshold out, or give the strategy a probe set.",
        )


def check_rule(rule: Any, options: Mapping[str, Any], *, target_names: Sequence[str]) -> None:
    """Refuse a selection rule that could not be used once the texts are scored.

    Args:
        rule: Its name, or a rule object.
        options: Its options.
        target_names: Columns of the scores; empty where they are not known.

    Raises:
        InputError: An unknown name or option, or a target that there is not.
    """
    made = plugins.create(RULES, rule, dict(options)) if isinstance(rule, str) else rule
    if target_names and hasattr(made, "combine"):
        targets_used(made.combine, target_names=list(target_names), weights=getattr(made, "weights", None))


def describe_run(
    *,
    text_ids: Sequence[str],
    targets: Sequence[TargetSet],
    strategy: Any,
    schedule: Schedule,
    choice: Choice,
    consume_once: bool,
) -> dict[str, Any]:
    """Return what decides a run beside the model and the two things that may be changed when it is resumed, as JSON values.

    A workdir is of one such run. What may be changed, `max_overhead` and `allow_low_fidelity`, counts for the rounds to come.
    """
    described = {
        "format": FORMAT,
        "pool": fingerprint(sorted(text_ids)),
        "targets": {target.name: target.fingerprint for target in targets},
        "strategy": strategy.plugin_name,
        "strategy_options": plugins.options_of(strategy),
        "rule": choice.rule,
        "rule_options": choice.rule_options,
        "refresh_every": schedule.refresh_every,
        "drift_threshold": schedule.drift_threshold,
        "first_selected": schedule.first_selected,
        "consume_once": consume_once,
        "seed": choice.seed,
    }
    return dict(as_plain(described))


def as_plain(value: Any) -> Any:
    """Return an option's value as JSON values that are the same in every process: of an object its name and its options.

    Of an object that is no plug-in, a model for example, only its class is told.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, TargetSet):
        return {value.name: value.fingerprint}
    if isinstance(value, Mapping):
        return {str(key): as_plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(inner) for inner in value]
    if hasattr(value, "plugin_name"):
        return {value.plugin_name: as_plain(plugins.options_of(value))}
    return type(value).__name__
