"""Influence functions with eigenvalue-corrected Kronecker factors (EK-FAC).

An influence function asks what more weight on a text does to a model that is trained to the end: the product of the text's
gradient with the target's, through the inverse of the curvature. The curvature is that of `oracle.gradients.curvature`,
fitted once per checkpoint. Its inverse is applied to the target gradients alone, once, so that every text costs what it
costs in `grad_dot`, for any number of targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from oracle.artifacts import require_same
from oracle.encoding import EncodedText
from oracle.errors import InputError, check_at_least, check_choice
from oracle.gradients.curvature import KroneckerFactors, fit_factors, fit_identity, read_factors_meta
from oracle.gradients.text_products import TextProducts
from oracle.language_model import REDUCTIONS, LanguageModel
from oracle.methods import Measured
from oracle.plugins import option
from oracle.target_columns import TargetColumns
from oracle.texts import list_text_ids, read_texts

DAMPING_SCALE = 0.1  # Grosse et al. 2023
ROUNDING = 2.0**-46  # square of float32's: what is left of a gradient that is 0, relative to others
OTHER_PARAMETERS = ("leave_out", "damped")


@dataclass(kw_only=True)
class Ekfac:
    """Influence function: product of the text's gradient with each target's, through the inverse of the damped curvature.

    Paper:
        Grosse et al. 2023, arXiv 2308.03296; the corrected eigenvalues from George et al. 2018, arXiv 1806.03884.
    Cost:
        One forward and backward pass per text for all target sets at once; before that two such passes over the texts to fit
        on and the eigenvectors of two matrices per linear layer, once per checkpoint; K gradients of the model's size.
    Limit:
        Times `damping` it tends to `grad_dot` with `preconditioner="none"` as `damping` grows, over the parameters it covers
        (all of them with `other_parameters="damped"`).

    A value is how far the target loss falls per unit of weight on the text's loss, beside the mean summed loss of the texts
    that the curvature was fitted on. Positive means that the text helps; the papers give the change of the loss or of
    the log-likelihood, with either sign. Grosse et al. take a text's loss as the sum over its tokens (`text_loss="sum"`).

    With weights in bfloat16, values of small models were off by at most 0.02 of the largest one through the factors at
    hand. But factors that are fitted in bfloat16 are others than those of float64: through these the values were off by up
    to 0.36 of the largest (Spearman 0.91 and more), so fit and label in float32 where that matters.
    """

    plugin_name: ClassVar[str] = "ekfac"
    needs_optimizer: ClassVar[bool] = False
    uses_optimizer: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False

    factors: str | None = field(
        default=None,
        repr=False,  # where they lie is no part of what the labels are; `inputs` is
        metadata={"help": "Folder of fitted factors; with `fit_texts` they are fitted into it, or read if it has them."},
    )
    fit_texts: Any = field(
        default=None,
        repr=False,
        metadata={"help": "Texts of the training distribution to fit factors on, anything that read_texts takes."},
    )
    fisher: str | None = option(
        None, "Curvature of labels 'sampled' from the model or of the texts' own ('empirical'); None: as stored, or sampled."
    )
    max_factor_dim: int | None = option(
        None, "A side of a layer wider than this has no factor and is taken as diagonal; None: as stored, or 4096."
    )
    damping: float | None = option(None, "Damping added to the curvature of every layer; None follows `damping_scale`.")
    damping_scale: float = option(DAMPING_SCALE, "Damping of a layer as a multiple of its mean curvature.")
    other_parameters: str = option(
        "leave_out",
        "Parameters without factors (embeddings, norms): 'leave_out', or 'damped': divided by one curvature per parameter.",
    )
    text_loss: str = option(
        "mean", "A text's loss as 'mean' over its target tokens, or as their 'sum', as a batch averaged over tokens weighs it."
    )

    def __post_init__(self) -> None:
        check_choice("other_parameters", self.other_parameters, OTHER_PARAMETERS)
        check_choice("text_loss", self.text_loss, REDUCTIONS)
        check_at_least("damping_scale", self.damping_scale, 1e-30)
        if self.damping is not None:
            check_at_least("damping", self.damping, 1e-30)
            if self.damping_scale != DAMPING_SCALE:
                raise InputError(
                    f"damping_scale={self.damping_scale} has no effect with damping={self.damping}.",
                    "one of the two",
                    "leave one of them out.",
                )
        if self.factors is None and self.fit_texts is None:
            raise InputError(
                "ekfac has neither factors nor texts to fit them on.",
                "factors=<folder of fitted factors>, or fit_texts=<some hundreds of training texts>",
                "pass fit_texts, and factors=<new folder> to keep what is fitted; "
                "or fit first: oracle.gradients.curvature.fit_factors(lm, texts, folder).",
            )

    @property
    def units(self) -> str:
        """Unit of the values."""
        return "nats per target token per unit of the text's weight"

    def inputs(self) -> dict[str, Any]:
        """Which factors are meant, by the texts and options they are fitted with and not by where they lie.

        Raises:
            MismatchError: The stored factors were fitted with other options than those given here.
        """
        options = {"fisher": self.fisher, "max_factor_dim": self.max_factor_dim}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        if self.fit_texts is not None:
            return {"factors": fit_identity(list_text_ids(read_texts(self.fit_texts)), **given)}
        assert self.factors is not None
        stored = read_factors_meta(self.factors)["identity"]
        identity = {key: stored[key] for key in fit_identity([])}
        require_same(identity, identity | given, where=Path(self.factors))
        return {"factors": identity}

    def prepare(self, lm: LanguageModel, columns: TargetColumns) -> None:
        """Fit or read the factors, measure the target gradients and put them through the inverse of the curvature."""
        self.lm_, self.columns_ = lm, columns
        self.factors_ = self._load_or_fit(lm)
        gradients = columns.gradients(lm)
        self.sizes_ = {name: gradient[0].numel() for name, gradient in gradients.items()}
        self.mean_curvature_ = {name: float(tensor.double().mean()) for name, tensor in self.factors_.curvature.items()}
        self.dampings_: dict[str, float] = {}
        directions = self._through_factors(gradients)
        if self.other_parameters == "damped":
            directions |= self._through_scalars(gradients)
        self.products_ = TextProducts(
            lm, directions, losses=partial(lm.text_losses, reduction=self.text_loss), method=self.plugin_name
        )

    def measure(self, encoded: Sequence[EncodedText]) -> Measured:
        """One forward and backward pass over the texts, in as many batches as fit."""
        measured = self.products_.measure(encoded)
        values, halves = self.columns_.combine(measured.products), self.columns_.halves(measured.products)
        return Measured(values, halves, {"text_loss": measured.losses})

    def facts(self) -> dict[str, Any]:
        """What the factors were fitted on, the damping, and the share of the trainable parameters that has which treatment."""
        layers, meta = self.factors_.layers, self.factors_.meta
        with_factors = {name for layer in layers for name in (layer.weight, layer.bias) if name}
        with_scalar = set(self.products_.directions) - with_factors
        left_out = sorted(set(self.sizes_) - with_factors - with_scalar)
        total = sum(self.sizes_.values())
        shares = {
            name: sum(self.sizes_[parameter] for parameter in group) / total
            for name, group in (("factors", with_factors), ("scalar", with_scalar), ("left_out", left_out))
        }
        dampings = np.array(list(self.dampings_.values()))
        return {
            **self.products_.facts(),
            "fit": {key: meta[key] for key in ("num_texts", "num_tokens", "cost")} | meta["identity"],
            "damping": {
                "rule": f"{self.damping_scale} x mean curvature of the layer" if self.damping is None else "the same everywhere",
                **{name: float(np.quantile(dampings, q)) for name, q in (("lowest", 0), ("median", 0.5), ("highest", 1))},
            },
            "coverage": shares,
            "num_layers": len(layers),
            "left_out_parameters": left_out,
            "diagonal_sides": meta["diagonal_sides"],
            "tied_to_embeddings": [layer.weight for layer in layers if layer.is_tied],
        }

    def prepare_flops(self, columns: TargetColumns) -> float:
        """Counted FLOPs of `prepare`: the target gradients, and the fit where it was not found finished."""
        fit_flops = self.factors_.meta["cost"]["fit_flops"] if self.has_fitted_ else 0.0
        return 3 * self.lm_.forward_flops_per_token * columns.num_tokens + fit_flops

    def flops(self, num_tokens: int, columns: TargetColumns) -> float:
        """Counted FLOPs for one text of `num_tokens`, the share of the target gradients left out."""
        return 3 * self.lm_.forward_flops_per_token * num_tokens

    def _load_or_fit(self, lm: LanguageModel) -> KroneckerFactors:
        self.has_fitted_ = self.factors is None or not (Path(self.factors) / "meta.json").exists()
        options = self.inputs()["factors"]
        if self.fit_texts is not None:
            own = {name: options[name] for name in ("fisher", "max_factor_dim")}
            return fit_factors(lm, self.fit_texts, self.factors, **own)
        assert self.factors is not None
        factors = KroneckerFactors.load(self.factors)
        factors.check_model(lm)
        return factors

    def _through_factors(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        directions: dict[str, Tensor] = {}
        for layer in self.factors_.layers:
            joined = layer.join(gradients)  # (K, O, I)
            directions |= layer.part(self.factors_.precondition(layer, joined, self._damping(layer.weight, joined)))
        return directions

    def _through_scalars(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        others = {name for name in self.factors_.curvature if name in gradients} - {
            layer.weight for layer in self.factors_.layers
        }
        scalars = {name: float(self.factors_.curvature[name]) + self._damping(name, gradients[name]) for name in sorted(others)}
        return {name: gradients[name] / scalar for name, scalar in scalars.items()}

    def _damping(self, name: str, gradient: Tensor) -> float:
        """Damping of a parameter.

        Raises:
            InputError: The rule gives nothing but rounding, as no text that the curvature was fitted on has a gradient here.
        """
        mean = self.mean_curvature_[name]
        value = self.damping_scale * mean if self.damping is None else self.damping
        if self.damping is None and mean <= ROUNDING * max(self.mean_curvature_.values()):
            if bool(gradient.any()):
                raise InputError(
                    f"the curvature of {name} is 0 within rounding: no text that it was fitted on has a gradient there.",
                    "texts to fit on that use every layer (those of two tokens leave attention nothing to choose from)",
                    "fit on texts like those of the pool and the targets, or pass damping=<a small number>.",
                )
            value = 1.0  # nothing is divided by it
        self.dampings_[name] = value
        return value
