"""What labels, features, fitting and scoring cost before anything is spent: FLOPs by formula, seconds by rates.

The unit of all FLOPs is a forward pass over a token; a backward pass costs two. The formulas are those by which the
methods and encoders count themselves (`flops`, `prepare_flops`), on means in the place of single texts.

Seconds follow from FLOPs at the speed of training, since labels and live features run on the same device, and from the
length of the texts for what runs on a CPU. The speeds below were measured on one core, with English of four characters to
a token, 1,065 columns and four target sets, and are no more than a guess at another machine; `Rates` takes better ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from oracle.errors import InputError, check_at_least
from surrogate.planning.costs import Cost, Expected

Stages: TypeAlias = dict[str, tuple[str, Cost]]  # name -> (paid "once" or "each" refresh or by the "sampled" texts, cost)

NUM_FOLDS = 5  # of the cross-fitting that measures fidelity; each fold fits a ridge regression beside the surrogate
OLD_SAMPLES = 6  # earlier samples whose labels, and so whose live features, a refresh goes on using
MINILM_PARAMETERS = 10_795_392  # of all-MiniLM-L6-v2 without its embedding tables, which are looked up
MINILM_TOKENS = 256  # where it cuts a text
TOKENS_PER_SECOND: Mapping[str, float] = {"hashed_ngrams": 1.2e6, "text_stats": 7e5, "sentence": 4e3}
SCORED_PER_SECOND = 20_000.0  # texts
TIMED = (*TOKENS_PER_SECOND, "score")  # what `Rates.texts_per_second` may name
FIT_SECONDS: Mapping[str, tuple[float, float]] = {
    "ridge": (0.05, 8e-4),
    "network": (2.4, 1.1e-3),
}  # of one fit: always, and per label


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers that decide what a run costs.

    Attributes:
        forward_flops_per_token: Of the model that is trained.
        head_parameters: Weights of its output layer.
        num_texts: Texts of the pool.
        text_tokens: Mean tokens of a text of the pool, after cutting.
        training_tokens: Tokens to train on, in all.
        target_tokens: Tokens of all target sets together.
        num_targets: How many target sets.
        num_rounds: Rounds of the training, at each of which there may be a refresh.
        proxy_flops_per_token: Of the proxy model whose features may be used; None where there is none.
        proxy_head_parameters: Weights of the proxy's output layer.
        has_texts: False where texts are token ids, which `sentence` cannot read.
        assumptions: What was assumed for want of better, in sentences.
    """

    forward_flops_per_token: float
    head_parameters: float
    num_texts: int
    text_tokens: float
    training_tokens: float
    target_tokens: float
    num_targets: int
    num_rounds: int
    proxy_flops_per_token: float | None = None
    proxy_head_parameters: float = 0.0
    has_texts: bool = True
    assumptions: tuple[str, ...] = ()

    @property
    def training_flops(self) -> float:
        """Of the whole training: a forward and a backward pass over every token."""
        return 3 * self.forward_flops_per_token * self.training_tokens

    @property
    def pool_tokens(self) -> float:
        """Tokens of the whole pool."""
        return self.num_texts * self.text_tokens


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured or known speeds; what is not given is assumed, or seconds are not predicted.

    Attributes:
        training_flops_per_second: Speed of training. Without it seconds decide nothing.
        texts_per_second: Of `TIMED`, for texts of this pool.
    """

    training_flops_per_second: float | None = None
    texts_per_second: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.training_flops_per_second is not None:
            check_at_least("training_flops_per_second", self.training_flops_per_second, 1e-30)
        for name, rate in self.texts_per_second.items():
            if name not in TIMED:
                remedy = "name one of these; models run at the speed of training."
                raise InputError(f"texts_per_second of {name!r}.", ", ".join(TIMED), remedy)
            check_at_least(f"texts_per_second[{name!r}]", rate, 1e-30)

    def passes(self, flops: float) -> Cost:
        """Cost of so many FLOPs of a language model."""
        rate = self.training_flops_per_second
        return Cost(flops, flops / rate if rate else 0.0)

    def texts(self, name: str, num_texts: float, *, tokens: float, flops: float = 0.0) -> Cost:
        """Cost of what is done on a CPU with so many texts of so many tokens."""
        assumed = SCORED_PER_SECOND if name == "score" else TOKENS_PER_SECOND[name] / tokens
        return Cost(flops, num_texts / self.texts_per_second.get(name, assumed))


def label_costs(method: str, sizes: Sizes) -> tuple[float, float]:
    """FLOPs of what a method does once per refresh, and of one label; both halves of each target set are measured.

    Raises:
        InputError: The method's cost does not follow from these sizes.
    """
    forward, text, target = sizes.forward_flops_per_token, sizes.text_tokens, sizes.target_tokens
    costs = {
        "grad_dot": (3 * forward * target, 3 * forward * text),
        "less": (3 * forward * target, forward * (3 * text + 2 * sizes.num_targets)),
        "two_forward": (3 * forward * target, 3 * 2 * sizes.num_targets * forward * text),  # the dearer of its ways
        "one_step": (2 * forward * target, forward * (3 * text + target)),
    }
    if method not in costs:
        raise InputError(
            f"the cost of method={method!r} cannot be planned.",
            ", ".join(costs),
            "plan with one of these; for the others label a few texts and look at the cost in the labels' meta.json.",
        )
    return costs[method]


def model_state_flops(forward_flops_per_token: float, head_parameters: float) -> float:
    """FLOPs per token of `model_state`: a forward pass and two more products of the output layer's size."""
    return forward_flops_per_token + 2 * 2.0 * head_parameters


def fit_cost(surrogate: str, num_labels: float) -> Cost:
    """Cost of fitting a surrogate with its cross-fitting, for which ridge regression is fitted as often."""
    always, per_label = FIT_SECONDS[surrogate]
    seconds = (NUM_FOLDS + 1) * (always + per_label * num_labels)
    if surrogate != "ridge":
        always, per_label = FIT_SECONDS["ridge"]
        seconds += NUM_FOLDS * (always + per_label * num_labels)
    return Cost(0.0, seconds)


def refresh_stages(
    sizes: Sizes,
    rates: Rates,
    *,
    method: str = "grad_dot",
    num_labels: int = 600,
    num_probe: int = 64,
    encoder: tuple[str, ...] = ("hashed_ngrams", "text_stats"),
    second_encoder: tuple[str, ...] = (),
    second_share: float = 0.0,
    num_refreshes: int = 1,
    surrogate: str = "ridge",
) -> Stages:
    """Cost of the stages of one refresh, or of all of them for what is paid once.

    Encoders are hashed_ngrams, text_stats, sentence, model_state (the live model) and proxy (`model_state` of another
    model, whose features do not age). Those of `second_encoder` see the labelled texts and the best `second_share`.
    """
    fixed, per_label = label_costs(method, sizes)
    labelled = num_labels + num_probe
    stages: Stages = {
        "target gradients": ("each", rates.passes(fixed)),
        "labels": ("sampled", rates.passes(per_label * num_labels)),
        "labels of the probe": ("each", rates.passes(per_label * num_probe)),
    }
    old = labelled * min(num_refreshes - 1, OLD_SAMPLES)
    for name in (*encoder, *second_encoder):
        num_texts = float(sizes.num_texts)
        if name in second_encoder:
            per_refresh = sizes.num_texts * second_share + labelled
            num_texts = per_refresh + old if name == "model_state" else min(num_texts, per_refresh * num_refreshes)
        stages[f"features: {name}"] = _features(name, sizes, rates, num_texts=num_texts)
    predicted = sizes.num_texts * (1 + (second_share if second_encoder else 0.0))
    fits = 1 + bool(second_encoder)
    # labels of earlier refreshes are fitted on as well
    stages["fit"] = ("each", fit_cost(surrogate, labelled + old).times(fits))
    stages["score"] = ("each", rates.texts("score", predicted, tokens=sizes.text_tokens))
    return stages


def expected_cost(stages: Stages) -> Expected:
    """Sum the stages of one refresh for `Overhead.decide`."""
    sums = {kind: Cost() for kind in ("sampled", "each", "once")}
    for kind, cost in stages.values():
        sums[kind] += cost
    return Expected(sampled=sums["sampled"], fixed=sums["each"], once=sums["once"])


def total_cost(stages: Stages, num_refreshes: int) -> dict[str, Cost]:
    """Cost of every stage over the whole run."""
    return {name: cost if kind == "once" else cost.times(num_refreshes) for name, (kind, cost) in stages.items()}


def _features(name: str, sizes: Sizes, rates: Rates, *, num_texts: float) -> tuple[str, Cost]:
    """Cost of one encoder on so many texts; models look at the target sets as well."""
    if name == "sentence":
        tokens = min(sizes.text_tokens, MINILM_TOKENS)
        return "once", rates.texts(name, num_texts, flops=2.0 * MINILM_PARAMETERS * tokens * num_texts, tokens=tokens)
    if name in ("model_state", "proxy"):
        forward, head = sizes.forward_flops_per_token, sizes.head_parameters
        if name == "proxy":
            assert sizes.proxy_flops_per_token is not None
            forward, head = sizes.proxy_flops_per_token, sizes.proxy_head_parameters
        tokens = sizes.text_tokens * num_texts + sizes.target_tokens
        return "each" if name == "model_state" else "once", rates.passes(model_state_flops(forward, head) * tokens)
    return "once", rates.texts(name, num_texts, tokens=sizes.text_tokens)
