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
Lambda in float32, over blocks of texts in the order of their text_ids; after each block the sums are on disk.

George et al. 2018, arXiv 1806.03884; Grosse et al. 2023, arXiv 2308.03296.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from oracle.artifacts import atomic_path, fingerprint, provenance, read_json, require_same, timed, write_json
from oracle.encoding import IGNORED, Batch, EncodedText, make_batch
from oracle.errors import InputError, MismatchError, NotFiniteError, check_at_least, check_choice
from oracle.gradients.linear_layers import Layer, LayerHooks, Take, find_layers
from oracle.gradients.module_rules import GRADIENT_BLOCK_BYTES
from oracle.language_model import LanguageModel
from oracle.progress import track
from oracle.texts import list_text_ids, read_texts

FISHERS = ("sampled", "empirical")
DEFAULT_FACTOR_DIM = 4096  # the eigenvectors of one side then take at most 64 MiB
NUM_SCALAR_TEXTS = 64  # texts whose gradients give the curvature of parameters without factors
EIGH_FLOPS = 9.0  # times n^3: eigenvectors of a symmetric matrix, Golub and Van Loan, section 8.3


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
        _save_tensors(Path(folder) / "factors.safetensors", tensors)
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
        stored, asked = self.meta["identity"], _model_identity(lm)
        differences = [f"{key}: fitted {stored[key]!r}, now {asked[key]!r}" for key in asked if stored[key] != asked[key]]
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
    check_at_least("max_factor_dim", max_factor_dim, 1)
    check_at_least("block_size", block_size, 1)
    dataset = read_texts(texts)
    fit = fit_identity(list_text_ids(dataset), fisher=fisher, seed=seed, max_factor_dim=max_factor_dim)
    identity = {**_model_identity(lm), **fit, "device": lm.device.type, "block_size": block_size}
    path = None if folder is None else Path(folder)
    if path is not None:
        _check_alone(path)
        for name in ("meta.json", "identity.json"):
            if (path / name).exists():
                stored = read_json(path / name)
                require_same(stored["identity"] if name == "meta.json" else stored, identity, where=path)
        if (path / "meta.json").exists():
            shutil.rmtree(path / "partial", ignore_errors=True)
            return KroneckerFactors.load(path)
        write_json(path / "identity.json", identity)
    encoded = sorted((text for text in lm.encode(dataset) if text.num_targets), key=lambda text: text.text_id)
    if not encoded:
        raise InputError(
            f"none of the {len(dataset)} texts to fit on has a target token within {lm.max_tokens} tokens.",
            "texts of at least two tokens",
            "give other texts, or raise max_tokens.",
        )
    with torch.enable_grad(), lm.preserved(weights=False):
        factors = _Fit(lm, encoded, path, identity).run()
    if path is not None:
        factors.save(path)
        shutil.rmtree(path / "partial", ignore_errors=True)
        (path / "identity.json").unlink(missing_ok=True)
    return factors


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


class _Fit:
    """The stages of a fit: covariances, eigenvectors, Lambda, the parameters without factors."""

    def __init__(self, lm: LanguageModel, encoded: list[EncodedText], folder: Path | None, identity: dict[str, Any]) -> None:
        self.lm, self.encoded, self.identity = lm, encoded, identity
        self.partial = None if folder is None else folder / "partial"
        size = identity["block_size"]
        self.blocks = [encoded[start : start + size] for start in range(0, len(encoded), size)]
        self.layers = find_layers(lm, next(lm.batches(self.blocks[0], packing=False)))
        self.widest = identity["max_factor_dim"]
        self.seconds = 0.0

    def run(self) -> KroneckerFactors:
        sides = [(f"{layer.weight}::{side}", width) for layer in self.layers for side, width in self._sides(layer)]
        wide = {name: (width, width) for name, width in sides if width <= self.widest}
        covariances = self._sum("covariances", wide, self._add_covariances, dtype=torch.float64)
        self.vectors = {name: self._eigenvectors(index, covariances[name]) for index, name in enumerate(wide)}
        shapes = {layer.weight: (layer.num_outputs, layer.num_inputs) for layer in self.layers}
        curvature = self._sum("curvature", shapes, self._add_squares, dtype=torch.float32)
        with timed(self._spend):
            curvature = {name: total / len(self.encoded) for name, total in curvature.items()} | self._other_curvature()
        num_tokens = sum(len(text.input_ids) for text in self.encoded)
        meta = {
            "identity": self.identity,
            "num_texts": len(self.encoded),
            "num_tokens": num_tokens,
            "diagonal_sides": [f"{name} ({width})" for name, width in sides if width > self.widest],
            "cost": {"fit_seconds": round(self.seconds, 3), "fit_flops": self._flops(num_tokens, list(wide.values()))},
            "provenance": provenance(),
        }
        to_cpu = [{name: tensor.cpu() for name, tensor in tensors.items()} for tensors in (self.vectors, curvature)]
        return KroneckerFactors(self.layers, to_cpu[0], to_cpu[1], meta)

    def _spend(self, seconds: float) -> None:
        self.seconds += seconds

    def _sides(self, layer: Layer) -> tuple[tuple[str, int], tuple[str, int]]:
        return ("inputs", layer.num_inputs), ("outputs", layer.num_outputs)

    def _sum(self, stage: str, shapes: dict[str, Any], add: Take, *, dtype: torch.dtype) -> dict[str, Tensor]:
        """Sum over all blocks what `add` adds to `self.sums` for each layer and batch; on disk after every block."""
        path = None if self.partial is None else self.partial / f"{stage}.safetensors"
        if path is not None and path.exists():
            self.sums, state = _load_sums(path, self.lm.device)
        else:
            self.sums = {name: torch.zeros(shape, dtype=dtype, device=self.lm.device) for name, shape in shapes.items()}
            state = {"blocks": 0, "seconds": self.seconds}
        self.seconds = state["seconds"]
        with track(f"fit factors ({stage})", len(self.encoded)) as tracker:
            tracker.advance(sum(len(block) for block in self.blocks[: state["blocks"]]))
            for number, block in enumerate(self.blocks[state["blocks"] :], start=state["blocks"] + 1):
                with timed(self._spend), LayerHooks(self.lm, self.layers, add) as hooks:
                    for batch in self.lm.batches(block):
                        hooks.run(batch, partial(self._loss, batch, block))
                if path is not None:
                    _save_tensors(path, self.sums, state={"blocks": number, "seconds": self.seconds})
                tracker.advance(len(block))
        return self.sums

    def _loss(self, batch: Batch, block: list[EncodedText]) -> Tensor:
        """The summed loss of a batch, with the labels that the kind of Fisher asks for."""
        logits = self.lm.logits(batch)[:, :-1]  # (R, M-1, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = (batch.packed or batch).labels[:, 1:]  # (R, M-1)
        if self.identity["fisher"] == "sampled":
            texts = [block[row] for row in batch.positions]
            drawn = _draw_labels(logits.detach(), texts, seed=self.identity["seed"], places=batch.places)
            labels = torch.where(labels == IGNORED, labels, drawn)
        loss = functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="sum"
        )
        if not bool(torch.isfinite(loss)):
            raise NotFiniteError(
                f"the loss of one of the texts {[block[row].text_id for row in batch.positions[:3]]}, ... is NaN or infinite.",
                "texts with finite losses",
                "check the checkpoint (did training diverge?), remove the texts, or load the model in float32.",
            )
        return loss

    def _add_covariances(self, layer: Layer, a: Tensor, b: Tensor, counts: Tensor) -> None:
        for side, tokens in (("inputs", a), ("outputs", b)):
            if f"{layer.weight}::{side}" in self.sums:
                rows = tokens[counts]  # (n, I or O)
                self.sums[f"{layer.weight}::{side}"] += (rows.T @ rows).double()

    def _add_squares(self, layer: Layer, a: Tensor, b: Tensor, counts: Tensor) -> None:
        inputs, outputs = (self.vectors.get(f"{layer.weight}::{side}") for side in ("inputs", "outputs"))
        a = a if inputs is None else a @ inputs  # (B, T, I)
        b = (b if outputs is None else b @ outputs).transpose(1, 2)  # (B, O, T)
        step = max(1, GRADIENT_BLOCK_BYTES // (4 * a.shape[0] * a.shape[2]))
        for first in range(0, b.shape[1], step):
            gradients = torch.bmm(b[:, first : first + step], a)  # (B, o, I), of whole texts
            self.sums[layer.weight][first : first + step] += gradients.square().sum(0)

    def _eigenvectors(self, index: int, covariance: Tensor) -> Tensor:
        path = None if self.partial is None else self.partial / f"eigenvectors-{index}.safetensors"
        if path is not None and path.exists():
            return _load_sums(path, self.lm.device)[0]["vectors"]
        with timed(self._spend):
            vectors = torch.linalg.eigh(covariance)[1].float()
        if path is not None:
            _save_tensors(path, {"vectors": vectors})
        return vectors

    def _other_curvature(self) -> dict[str, Tensor]:
        """Mean square of the touched entries of every other parameter's gradient, one text at a time, of the first texts."""
        covered = {name for layer in self.layers for name in (layer.weight, layer.bias)}
        others = {name: p for name, p in self.lm.module.named_parameters() if p.requires_grad and name not in covered}
        totals = {name: torch.zeros(2, dtype=torch.float64, device=self.lm.device) for name in others}  # squares, entries
        for text in self.encoded[:NUM_SCALAR_TEXTS] if others else []:
            batch = make_batch([text], positions=[0], device=self.lm.device)
            gradients = torch.autograd.grad(self._loss(batch, [text]), list(others.values()), allow_unused=True)
            for name, gradient in zip(others, gradients, strict=True):
                if gradient is not None:
                    square = gradient.float().square().sum(dtype=torch.float64)
                    totals[name] += torch.stack([square, (gradient != 0).sum(dtype=torch.float64)])
        return {name: (square / count.clamp_min(1)).float() for name, (square, count) in totals.items()}

    def _flops(self, num_tokens: int, factors: list[tuple[int, int]]) -> float:
        """Two passes (backward without weight gradients costs one forward), both products with every factor, eigenvectors."""
        passes = 2 * 2 * self.lm.forward_flops_per_token * num_tokens
        products = 2 * 2 * num_tokens * sum(width**2 for width, _ in factors)
        gradients = 2 * num_tokens * sum(layer.num_outputs * layer.num_inputs for layer in self.layers)
        return passes + products + gradients + EIGH_FLOPS * sum(width**3 for width, _ in factors)


def _draw_labels(
    logits: Tensor, texts: list[EncodedText], *, seed: int, places: Sequence[tuple[int, int]] | None = None
) -> Tensor:
    """Draw a label for every position (R, M-1) from the logits (R, M-1, V), each text from a generator of its own.

    The texts stand at `places` (row, first position), or without those one in each row.
    """
    uniform = torch.zeros(logits.shape[:2], dtype=torch.float64)
    rows = [(row, 0) for row in range(len(texts))] if places is None else places
    for text, (row, start) in zip(texts, rows, strict=True):
        generator = torch.Generator().manual_seed(int(fingerprint([seed, text.text_id]), 16) >> 1)
        stop = start + len(text.input_ids) - 1
        uniform[row, start:stop] = torch.rand(stop - start, generator=generator, dtype=torch.float64)
    cumulated = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # (R, M-1, V)
    below = uniform.to(logits.device).unsqueeze(-1) * cumulated[..., -1:]
    return torch.searchsorted(cumulated, below, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)


def _rotate(gradients: Tensor, outputs: Tensor | None, inputs: Tensor | None) -> Tensor:
    """Return outputs' G inputs for gradients (K, O, I); None stands for the unit matrix."""
    gradients = gradients if inputs is None else gradients @ inputs
    return gradients if outputs is None else outputs.T @ gradients


def _model_identity(lm: LanguageModel) -> dict[str, Any]:
    return {
        "checkpoint": lm.fingerprint(),
        "trainable_parameters": fingerprint(sorted(name for name, p in lm.module.named_parameters() if p.requires_grad)),
        "tokenizer": lm.tokenizer_fingerprint(),
        "max_tokens": lm.max_tokens,
    }


def _save_tensors(path: Path, tensors: dict[str, Tensor], *, state: dict[str, Any] | None = None) -> None:
    from safetensors.torch import save_file

    with atomic_path(path) as partial:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, partial, metadata={key: repr(value) for key, value in (state or {}).items()} or None)


def _load_sums(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, "pt", device=str(device)) as file:
        state: dict[str, str] = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors, {"blocks": int(state.get("blocks", 0)), "seconds": float(state.get("seconds", 0.0))}
