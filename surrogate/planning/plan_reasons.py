"""What a plan says of itself: what was not chosen and why, what was assumed, figures in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from surrogate.planning.cost_model import FIT_SECONDS, TIMED, label_costs
from surrogate.planning.costs import UNIT_NAMES
from surrogate.planning.plan_search import (
    CASCADE_CHOICE,
    GOOD_LABELS,
    MAX_LABELS,
    MAX_REFRESHES,
    METHODS,
    PREFERENCES,
    Alternative,
    Choices,
    Search,
)

SHOWN_STAGES = 3  # in the reason why nothing fits


def alternatives(search: Search, chosen: Choices) -> list[Alternative]:
    """Everything that was considered beside what was chosen, with its cost and the reason against it."""
    found = [*_methods(search, chosen), *_amounts(search, chosen), *_features(search, chosen)]
    other = next(name for name in PREFERENCES if name != search.prefer)
    best = replace(search, prefer=other).best()
    if search.fits(chosen) and best != chosen:
        what = f"prefer={other!r}: {best.num_refreshes} refreshes of {best.sample_size} labels, {best.features}"
        found.append(_alternative(search, best, what=what, reason=f"prefer={search.prefer!r} was asked for"))
    return [*found, _whole_pool(search, chosen)]


def assumptions(search: Search, chosen: Choices) -> list[str]:
    """Say what the figures rest on."""
    lines = list(search.sizes.assumptions)
    passes = search.sizes.training_tokens / search.sizes.pool_tokens
    if passes >= 1:
        lines.append(f"training goes through the pool {passes:.3g} times, so every text comes up whatever is selected")
    lines.append("a backward pass takes two forward passes; attention scores are left out; rounds are of equal length")
    if search.rates.training_flops_per_second:
        lines.append("labels and features of models run at the speed of training")
        on_cpu = [name for name in (*chosen.encoder, "score") if name in TIMED]
        guessed = [name for name in on_cpu if name not in search.rates.texts_per_second]
        lines += [f"speeds of another machine's single core for {', '.join(guessed)}"] if guessed else []
        always, per_label = FIT_SECONDS[chosen.surrogate]
        lines.append(f"one fit of {chosen.surrogate} takes {always:g} s and {per_label:g} s per label, as on another machine")
    else:
        lines.append("the speed of training is not known, so time decides nothing here: the run judges it once steps were timed")
    lines.append("expected Spearman is that of another model and pool (README, fidelity); labels of earlier refreshes add to it")
    if "proxy" in (*chosen.encoder, *chosen.second_encoder):
        lines.append("the proxy keeps what one of 0.12 of the model's size kept; a smaller one may keep less")
    if chosen.second_encoder:
        lines.append(f"the dear features see {CASCADE_CHOICE:g} times as many texts as a refresh selects")
    return lines


def fit_reason(search: Search, chosen: Choices) -> str:
    """Say how a plan stands to the promise; where it breaks it, with the figures and the smallest promise that would do."""
    overhead = search.overhead(chosen)
    if search.fits(chosen):
        return (
            f"costs {shares(overhead)} of training, labels and features included; at most {search.max_overhead:.3g} is promised"
        )
    unit = max((one for one in overhead if overhead[one] is not None), key=lambda one: overhead[one] or 0.0)
    share = overhead[unit] or 0.0
    costs = {name: getattr(cost, unit) for name, cost in search.costs(chosen).items()}
    dearest = sorted(costs, key=lambda name: -costs[name])[:SHOWN_STAGES]
    stages = ", ".join(f"{name} {costs[name]:.3g}" for name in dearest)
    return (
        f"even {chosen.sample_size} labels once, with features of the text, cost {share:.3g} of training in {UNIT_NAMES[unit]}, "
        f"more than max_overhead={search.max_overhead:.3g}: {stages}, training {getattr(search.training(), unit):.3g}. "
        f"The smallest max_overhead that would do is {rounded_up(share):.3g}"
    )


def remedy(search: Search, chosen: Choices) -> str:
    """Say what to do about a plan that does not fit."""
    overhead = search.overhead(chosen)
    is_time = (overhead["seconds"] or 0.0) > max(overhead["flops"] or 0.0, search.max_overhead)
    faster = "measure what the encoders do on all cores and give texts_per_second, " if is_time else ""
    return f"raise max_overhead, {faster}train on more tokens, or take fewer target texts"


def shares(overhead: Mapping[str, float | None]) -> str:
    """Write shares by unit."""
    return " and ".join(f"{share:.3g} in {UNIT_NAMES[unit]}" for unit, share in overhead.items() if share is not None)


def rounded_up(value: float) -> float:
    """Round up to three digits, so that what is printed suffices."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return math.ceil(value * 10**digits) / 10**digits


def _alternative(search: Search, choices: Choices, *, what: str, reason: str) -> Alternative:
    overhead = search.overhead(choices)
    is_too_dear = not search.fits(choices)
    too_dear = "breaks the promise" if is_too_dear else ""
    text = "; ".join(part for part in (reason, too_dear) if part) or "it fits, and was not bought"
    return Alternative(what=what, share=overhead, spearman=search.spearman(choices), reason=text)


def _whole_pool(search: Search, chosen: Choices) -> Alternative:
    """Measured labels of every text, which need neither features nor a prediction."""
    whole = replace(
        chosen,
        sample_size=search.sizes.num_texts,
        num_refreshes=1,
        refresh_every=search.sizes.num_rounds,
        encoder=(),
        second_encoder=(),
    )
    fits = search.fits(whole)
    reason = "it fits: think of strategy='oracle'" if fits else "what the surrogate is there to save; breaks the promise"
    return Alternative(what="labels of the whole pool, once", share=search.overhead(whole), spearman=None, reason=reason)


def _methods(search: Search, chosen: Choices) -> list[Alternative]:
    one_pass = 3 * search.sizes.forward_flops_per_token * search.sizes.text_tokens
    own = search.label_flops(chosen.method, chosen.sample_size)
    found = []
    for name, worth in METHODS.items():
        if name == chosen.method:
            continue
        passes = label_costs(name, search.sizes)[1] / one_pass
        is_dearer = search.label_flops(name, chosen.sample_size) > own
        against = f"{'dearer' if is_dearer else 'not cheaper'} than {chosen.method}: {passes:.2f} training passes per label"
        reason = against if name in search.methods else f"method={chosen.method!r} was asked for"
        found.append(_alternative(search, replace(chosen, method=name), what=f"method {name} ({worth})", reason=reason))
    return found


def _amounts(search: Search, chosen: Choices) -> list[Alternative]:
    found = []
    more = {count: every for count, every in search.refresh_counts().items() if count > chosen.num_refreshes}
    if more:
        count = min(more)
        choices = replace(
            chosen, num_refreshes=count, refresh_every=more[count], sample_size=min(GOOD_LABELS, chosen.sample_size)
        )
        found.append(_alternative(search, choices, what=f"{count} refreshes of {choices.sample_size} labels", reason=""))
    else:
        why = f"at most {MAX_REFRESHES}, at equal distances of whole rounds, each with {GOOD_LABELS} texts not labelled before"
        found.append(Alternative(what="more refreshes", share={}, spearman=None, reason=why))
    if chosen.sample_size < MAX_LABELS:
        choices = replace(chosen, sample_size=MAX_LABELS)
        cap = search.most_labels(chosen.num_refreshes)
        reason = f"up to {cap} are bought before more refreshes, or the pool has no more" if chosen.sample_size >= cap else ""
        found.append(_alternative(search, choices, what=f"{MAX_LABELS} labels at each refresh", reason=reason))
    return found


def _features(search: Search, chosen: Choices) -> list[Alternative]:
    found, is_better = [], True
    own = (chosen.encoder, chosen.second_encoder)
    for tier in search.tiers(replace(chosen, encoder=chosen.encoder[:2], second_encoder=(), second_share=0.0)):
        if (tier.encoder, tier.second_encoder) == own:
            is_better = False
            continue
        reason = search.why_not(tier)
        name = (*tier.encoder, *tier.second_encoder)[-1]
        if name == "proxy" and search.sizes.proxy_flops_per_token is None:
            found.append(Alternative(what=f"features {tier.features}", share={}, spearman=None, reason=reason))
            continue
        if not reason and not is_better:
            reason = "the features chosen bought more where it was measured"
        elif not reason and search.fits(tier):
            reason = "labels and refreshes were bought instead"
        found.append(_alternative(search, tier, what=f"features {tier.features}", reason=reason))
    return found
