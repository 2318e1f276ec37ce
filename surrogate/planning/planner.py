"""Plan a run before anything is spent: oracle, labels, refreshes and features that keep `max_overhead`.

From the sizes of model, pool, target sets and training follow the costs (`cost_model`); a stated rule (`plan_search`)
chooses. A plan promises what is counted. What it expects of fidelity was measured once, on another model and pool, and is
no promise: the fidelity that a refresh measures is what counts. Everything assumed stands in `Plan.assumptions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oracle.errors import InputError, check_at_least, check_choice, check_count
from surrogate.planning.cost_model import TOKENS_PER_SECOND, Rates, Sizes
from surrogate.planning.costs import check_share
from surrogate.planning.plan_reasons import alternatives, assumptions, fit_reason, remedy
from surrogate.planning.plan_result import Plan
from surrogate.planning.plan_search import (
    MAX_REFRESHES,
    METHODS,
    MIN_LABELS,
    NUM_PROBE,
    OF_WORDS,
    PREFERENCES,
    TEXT,
    Choices,
    Search,
)
from surrogate.planning.sizes import ModelSize, measure_rates, pool_size, target_size

if TYPE_CHECKING:
    from oracle.language_model import LanguageModel

ENCODERS = (*TEXT, "sentence", "model_state")


def plan(
    model: LanguageModel | str | Path | float,
    pool: Any = None,
    targets: Any = None,
    *,
    training_tokens: float,
    num_pool_texts: int | None = None,
    text_tokens: float | None = None,
    target_tokens: float | None = None,
    num_targets: int | None = None,
    num_rounds: int = MAX_REFRESHES,
    proxy: LanguageModel | str | Path | float | None = None,
    max_tokens: int | None = None,
    method: str | None = None,
    encoders: Sequence[str] = ENCODERS,
    prefer: str = "labels",
    training_flops_per_second: float | None = None,
    texts_per_second: Mapping[str, float] | None = None,
    measure: bool = False,
    max_overhead: float = 0.1,
) -> Plan:
    """Choose oracle, sample size, refreshes and features that keep a promise on cost, without a pass of any model.

    Args:
        model: The model that is trained: a LanguageModel, a folder or hub name (its config is read), or its number of
            parameters.
        pool: The pool, anything `read_texts` takes; or give `num_pool_texts` and `text_tokens`.
        targets: Target sets as `oracle.label` takes them; or give `target_tokens`.
        training_tokens: Tokens to train on in all: steps times texts per step times tokens per text.
        num_pool_texts: In the place of `pool`, how many texts it has.
        text_tokens: Mean tokens of a text after cutting.
        target_tokens: In the place of `targets`, the tokens of all target sets together.
        num_targets: How many target sets; 1 where nothing is said.
        num_rounds: Rounds of the training; a refresh comes at the beginning of one.
        proxy: A smaller model whose `model_state` features may be used, given like `model`.
        max_tokens: Where texts are cut; None as the model does it.
        method: Oracle method; None chooses.
        encoders: Encoders that may be used beside the proxy; hashed_ngrams and text_stats always are.
        prefer: What is bought first: "labels" (refreshes and labels) or "features".
        training_flops_per_second: Speed of training. Without it the promise on time is judged only as the run goes on.
        texts_per_second: Measured speeds of hashed_ngrams, text_stats, sentence or score, in the place of assumed ones.
        measure: Time 64 texts of the pool through the encoders and the model now; needs a LanguageModel and `pool`.
        max_overhead: What labels, features, fitting and scoring may cost, as a share of training, in FLOPs and in seconds.

    Returns:
        The plan. Where even the smallest one passes the promise, `fits` is False and `reason` has the figures.

    Raises:
        InputError: A number is missing, given twice or unusable, or an option is unknown.

    Example:
        >>> found = plan(1e9, num_pool_texts=2_000_000, text_tokens=500, training_tokens=2e8, target_tokens=50_000)
        >>> found.choices.num_refreshes, found.choices.sample_size, round(found.overhead["flops"], 3)
        (8, 2000, 0.043)
    """
    _check_options(max_overhead=max_overhead, prefer=prefer, num_rounds=num_rounds, encoders=encoders, method=method)
    sizes = _read_sizes(
        model,
        {"pool": pool, "num_pool_texts": num_pool_texts, "text_tokens": text_tokens},
        {"targets": targets, "target_tokens": target_tokens, "num_targets": num_targets},
        training_tokens=training_tokens,
        num_rounds=num_rounds,
        proxy=proxy,
        max_tokens=max_tokens,
    )
    rates = Rates(training_flops_per_second=training_flops_per_second, texts_per_second=dict(texts_per_second or {}))
    if measure:
        rates = _measured(model, pool, encoders, rates, has_texts=sizes.has_texts)
    search = Search(
        sizes=sizes,
        rates=rates,
        max_overhead=max_overhead,
        methods=tuple(METHODS) if method is None else (method,),
        encoders=(*TEXT, *encoders, *(() if proxy is None else ("proxy",))),
        prefer=prefer,
    )
    return _as_plan(search, search.best(), proxy=proxy)


def _check_options(*, max_overhead: float, prefer: str, num_rounds: int, encoders: Sequence[str], method: str | None) -> None:
    check_share("max_overhead", max_overhead)
    check_choice("prefer", prefer, PREFERENCES)
    check_count("num_rounds", num_rounds)
    for name in encoders:
        check_choice("encoders", name, ENCODERS)
    if method is not None:
        check_choice("method", method, METHODS)


def _as_plan(search: Search, chosen: Choices, *, proxy: Any) -> Plan:
    """Put together what was chosen with its costs and reasons."""
    fits = search.fits(chosen)
    return Plan(
        fits=fits,
        reason=fit_reason(search, chosen),
        remedy="" if fits else remedy(search, chosen),
        max_overhead=search.max_overhead,
        choices=chosen,
        costs=search.costs(chosen),
        overhead=search.overhead(chosen),
        training=search.training(),
        spearman=search.spearman(chosen),
        alternatives=alternatives(search, chosen),
        assumptions=assumptions(search, chosen),
        sizes=search.sizes,
        proxy=proxy,
    )


def _read_sizes(
    model: Any,
    pool: Mapping[str, Any],
    targets: Mapping[str, Any],
    *,
    training_tokens: float,
    num_rounds: int,
    proxy: Any,
    max_tokens: int | None,
) -> Sizes:
    """Read what was given as an object and check what was given as a number."""
    size = ModelSize(model, max_tokens=max_tokens)
    small = None if proxy is None else ModelSize(proxy, max_tokens=max_tokens, name="proxy")
    assumed = [*size.assumptions, *(small.assumptions if small else [])]
    if _is_read("pool", pool, ("num_pool_texts", "text_tokens")):
        num_texts, text_tokens, has_texts, more = pool_size(size, pool["pool"])
        assumed += more
    else:
        num_texts, text_tokens, has_texts = pool["num_pool_texts"], pool["text_tokens"], True
    if _is_read("targets", targets, ("target_tokens",), also=("num_targets",)):
        target_tokens, num_targets = target_size(size, targets["targets"])
    else:
        target_tokens, num_targets = targets["target_tokens"], targets["num_targets"] or 1
    check_at_least("the number of texts of the pool", num_texts, MIN_LABELS + NUM_PROBE)
    for name, value in (("text_tokens", text_tokens), ("training_tokens", training_tokens), ("target_tokens", target_tokens)):
        check_at_least(name, value, 1)
    check_at_least("num_targets", num_targets, 1)
    return Sizes(
        forward_flops_per_token=size.forward_flops_per_token,
        head_parameters=size.head_parameters,
        num_texts=int(num_texts),
        text_tokens=float(text_tokens),
        training_tokens=float(training_tokens),
        target_tokens=float(target_tokens),
        num_targets=int(num_targets),
        num_rounds=num_rounds,
        proxy_flops_per_token=None if small is None else small.forward_flops_per_token,
        proxy_head_parameters=0.0 if small is None else small.head_parameters,
        has_texts=has_texts,
        assumptions=tuple(dict.fromkeys(assumed)),
    )


def _is_read(name: str, given: Mapping[str, Any], numbers: Sequence[str], *, also: Sequence[str] = ()) -> bool:
    """Whether the object itself was given; if not, all the numbers have to be, and if so, none of them."""
    is_read = given[name] is not None
    present = [number for number in (*numbers, *also) if given[number] is not None]
    if (is_read and present) or (not is_read and not set(numbers) <= set(present)):
        raise InputError(
            f"{name} was {'given' if is_read else 'not given'}, with {', '.join(present) or 'no number'} for its size.",
            f"either {name}, or {' and '.join(numbers)}",
            "give one of the two.",
        )
    return is_read


def _measured(model: Any, pool: Any, encoders: Sequence[str], rates: Rates, *, has_texts: bool) -> Rates:
    """Time what was not given; what was given stays."""
    if not hasattr(model, "preserved") or pool is None:
        raise InputError(
            "measure=True without a model that can run, or without texts.",
            "a LanguageModel and pool=...",
            "pass both, or measure=False and training_flops_per_second=... where it is known.",
        )
    timed = [
        name for name in dict.fromkeys((*TEXT, *encoders)) if name in TOKENS_PER_SECOND and (has_texts or name not in OF_WORDS)
    ]
    measured = measure_rates(model, pool, encoders=timed)
    return Rates(
        training_flops_per_second=rates.training_flops_per_second or measured.training_flops_per_second,
        texts_per_second={**measured.texts_per_second, **rates.texts_per_second},
    )
