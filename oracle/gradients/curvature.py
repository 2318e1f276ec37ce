"""Curvature of a language model in Kronecker factors (EK-FAC), fitted once on given texts, resumable.

A text's gradient of a linear layer is G = sum_t b_t a_t': a the layer's inputs (with a constant 1 where it has a bias),
b the gradients of the text's summed loss at its outputs. K-FAC takes their covariances over tokens, A = E[a a'] and
S = E[b b'], as factors of the curvature. EK-FAC keeps only their eigenvectors U_A and U_S and measures the curvature along
them a second time, Lambda_ij = E[(U_S' G U_A)_ij^2], over the gradients of whole texts and not of tokens. Then
(curvature + damping)^-1 G = U_S ((U_S' G U_A) / (Lambda + damping)) U_A'.

The labels are drawn from the model (the true Fisher) or are the texts' own (the empirical one). Tokens count up to the one
that predicts a text's last target; what stands behind it, padding above all, has no gradient. Every linear layer has
factors, those of attention and the output head too; a side wider than `max_factor_dim` has none, and the unit vectors
stand for its eigenvectors. A head tied to the embeddings gives the shared weight its factors, fitted on its use as a head.
Other parameters (embeddings, norms, biases without a weight) get one number each. Covariances are summed in float64,
Lambda in float32, over blocks of texts in the order of their text_ids (`oracle.gradients.factor_fit`).

George et al. 2018, arXiv 1806.03884; Grosse et al. 2023, arXiv 2308.03296.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oracle.artifacts import fingerprint, provenance, read_json, require_same, write_json
from oracle.checkpoint_identity import checkpoint_identity, reading_identity
from oracle.errors import InputError, MismatchError, check_choice, check_count
from oracle.gradients.factor_fit import FactorFit, save_tensors
from oracle.gradients.linear_layers import Layer
from oracle.language_model import LanguageModel
from oracle.texts import list_text_ids, read_texts

FISHERS = ("sampled", "empirical")
DEFAULT_FACTOR_DIM = 4096  # the eigenvectors of one side then take at most 64 MiB
IDENTITY_FILE = "identity.json"  # of factors that are not finished
MAY_DIFFER = ("device", "autocast")  # between the fit and the use of factors: rounding


@dataclass(frozen=True)
class KroneckerFactors:
    """Fitted factors; `fit_factors` makes them.

    Attributes:
        layers: The layers that have factors.
        vectors: "<weight>::inputs" (I, I) and "<weight>::outputs" (O, O) eigenvectors in columns; none for a side too wide.
        curvature: Weight -> (O, I) Lambda; any other parameter -> () mean square of the entries that a text's gradient touches.
        meta: Identity (checkpoint, texts, options), counts, cost.
    """

    layers: list[Layer]
    vectors: dict[str, Tensor]
    curvature: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> KroneckerFactors:
        """Read what `fit_factors` wrote.

        Raises:
            MissingFileError: The folder holds no complete factors.
        """
        from safetensors.torch import load_file

        meta = read_factors_meta(folder)
        tensors = load_file(Path(folder) / "factors.safetensors")
        curvature = {
            name.removeprefix("curvature::"): tensors.pop(name) for name in list(tensors) if name.startswith("curvature::")
        }
        return cls([Layer(**layer) for layer in meta["layers"]], tensors, curvature, meta)

    def save(self, folder: str | Path) -> None:
        """Write `factors.safetensors`, then `meta.json`, whose existence means that the factors are complete."""
        tensors = self.vectors | {f"curvature::{name}": tensor for name, tensor in self.curvature.items()}
        save_tensors(Path(folder) / "factors.safetensors", tensors)
        write_json(Path(folder) / "meta.json", {**self.meta, "layers": [asdict(layer) for layer in self.layers]})

    def precondition(self, layer: Layer, gradients: Tensor, damping: float) -> Tensor:
        """Return (curvature + damping)^-1 times gradients (K, O, I) of a layer."""
        inputs, outputs = (self._vectors(layer, side, gradients) for side in ("inputs", "outputs"))
        rotated = _rotate(gradients, outputs, inputs) / (self.curvature[layer.weight].to(gradients) + damping)
        return _rotate(rotated, None if outputs is None else outputs.T, None if inputs is None else inputs.T)

    def check_model(self, lm: LanguageModel) -> None:
        """Refuse a model, tokenizer or token limit other than those the factors were fitted with.

        Raises:
            MismatchError: Something differs; the message lists it.
        """
        stored = self.meta["identity"]
        asked = {key: value for key, value in _model_identity(lm).items() if key not in MAY_DIFFER}
        differences = [f"{key}: fitted {stored.get(key)!r}, now {asked[key]!r}" for key in asked if stored.get(key) != asked[key]]
        if differences:
            raise MismatchError(
                "the factors were fitted with another model: " + "; ".join(differences) + ".",
                "factors fitted with this very checkpoint, set of trainable parameters, tokenizer and max_tokens",
                "fit factors with this model: oracle.gradients.curvature.fit_factors(lm, texts, folder).",
            )

    def _vectors(self, layer: Layer, side: str, like: Tensor) -> Tensor | None:
        found = self.vectors.get(f"{layer.weight}::{side}")
        return None if found is None else found.to(like)


def fit_factors(
    lm: LanguageModel,
    texts: Any,
    folder: str | Path | None = None,
    *,
    fisher: str = "sampled",
    seed: int = 0,
    max_factor_dim: int = DEFAULT_FACTOR_DIM,
    block_size: int = 64,
) -> KroneckerFactors:
    """Fit the factors in two passes over texts; finished factors in `folder` are read, and unfinished ones gone on with.

    Args:
        lm: The model at the checkpoint in question.
        texts: Texts of the training distribution: anything `read_texts` takes. Those without a target token are left out.
        folder: Where the factors go; None keeps them in memory, without resuming.
        fisher: Labels "sampled" from the model's own predictions, or "empirical": the texts' own.
        seed: Decides the sampled labels, text by text.
        max_factor_dim: A wider side of a layer has no eigenvectors of its own.
        block_size: Texts between two writes of the sums to the disk.

    Raises:
        MismatchError: The folder holds factors of another checkpoint, of other texts or options.
        NotFiniteError: A loss is NaN or infinite.
        InputError: No text has a target token, no linear layer is trainable, or an option is unknown.

    Example:
        >>> fit_factors(lm, "pool.jsonl", "factors")                                                # doctest: +SKIP
        >>> oracle.label(lm, sample, targets, method="ekfac", factors="factors")                    # doctest: +SKIP
    """
    check_choice("fisher", fisher, FISHERS)
    check_count("max_factor_dim", max_factor_dim)
    check_count("block_size", block_size)
    dataset = read_texts(texts)
    fit = fit_identity(list_text_ids(dataset), fisher=fisher, seed=seed, max_factor_dim=max_factor_dim)
    identity = {**_model_identity(lm), **fit, "block_size": block_size}
    path = None if folder is None else Path(folder)
    if path is not None:
        _check_alone(path)
        if (path / "meta.json").exists():
            require_same(read_json(path / "meta.json")["identity"], identity, where=path)
            shutil.rmtree(path / "partial", ignore_errors=True)
            return KroneckerFactors.load(path)
        _bind(path, identity)
    encoded = sorted((text for text in lm.encode(dataset) if text.num_targets), key=lambda text: text.text_id)
    if not encoded:
        raise InputError(
            f"none of the {len(dataset)} texts to fit on has a target token within {lm.max_tokens} tokens.",
            "texts of at least two tokens",
            "give other texts, or raise max_tokens.",
        )
    with torch.enable_grad(), lm.preserved(weights=False):
        fitting = FactorFit(lm, encoded, None if path is None else path / "partial", identity)
        fitted = fitting.run()
    meta = {"identity": identity, **fitted.counts, "provenance": provenance()}
    factors = KroneckerFactors(fitting.layers, fitted.vectors, fitted.curvature, meta)
    if path is not None:
        factors.save(path)
        shutil.rmtree(path / "partial", ignore_errors=True)
        (path / IDENTITY_FILE).unlink(missing_ok=True)
    return factors


def _bind(path: Path, identity: dict[str, Any]) -> None:
    """Let the folder hold sums of this identity only; one without any sums may still be given another."""
    if (path / IDENTITY_FILE).exists() and any((path / "partial").glob("*.safetensors")):
        require_same(read_json(path / IDENTITY_FILE), identity, where=path)
    else:
        write_json(path / IDENTITY_FILE, identity)


def _check_alone(path: Path) -> None:
    distributed = torch.distributed
    is_alone = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1
    if not is_alone and not (path / "meta.json").exists():
        raise InputError(
            f"there are no finished factors in {path}, and {distributed.get_world_size()} processes would fit into it.",
            "one process that fits, or finished factors",
            "fit first in a process of its own: oracle.gradients.curvature.fit_factors(lm, texts, folder).",
        )


def fit_identity(
    text_ids: list[str], *, fisher: str = "sampled", seed: int = 0, max_factor_dim: int = DEFAULT_FACTOR_DIM
) -> dict[str, Any]:
    """Say what, beside the model, decides the factors."""
    return {"texts": fingerprint(sorted(text_ids)), "fisher": fisher, "seed": seed, "max_factor_dim": max_factor_dim}


def read_factors_meta(folder: str | Path) -> dict[str, Any]:
    """Return the meta.json of complete factors.

    Raises:
        MissingFileError: The folder holds none.
    """
    return read_json(Path(folder) / "meta.json")


def _rotate(gradients: Tensor, outputs: Tensor | None, inputs: Tensor | None) -> Tensor:
    """Return outputs' G inputs for gradients (K, O, I); None stands for the unit matrix."""
    gradients = gradients if inputs is None else gradients @ inputs
    return gradients if outputs is None else outputs.T @ gradients


def _model_identity(lm: LanguageModel) -> dict[str, Any]:
    return {**checkpoint_identity(lm, optimizer=False), **reading_identity(lm)}
