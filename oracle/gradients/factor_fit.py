"""The stages of a fit of Kronecker factors: covariances, eigenvectors, the curvature along them, what has no factors.

Sums over texts go block by block, in the order of the texts, and are on disk after each block, so a fit that was stopped
goes on behind the last one. What the sums are is said in `oracle.gradients.curvature`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from oracle.artifacts import atomic_path, fingerprint, timed
from oracle.encoding import IGNORED, Batch, EncodedText, make_batch
from oracle.errors import NotFiniteError
from oracle.gradients.linear_layers import Layer, LayerHooks, Take, find_layers
from oracle.gradients.module_rules import GRADIENT_BLOCK_BYTES
from oracle.language_model import LanguageModel
from oracle.progress import track

NUM_SCALAR_TEXTS = 64  # texts whose gradients give the curvature of parameters without factors
EIGH_FLOPS = 9.0  # times n^3: eigenvectors of a symmetric matrix, Golub and Van Loan, section 8.3


@dataclass(frozen=True)
class FittedTensors:
    """What a fit gave, on the CPU.

    Attributes:
        vectors: "<weight>::inputs" and "<weight>::outputs" -> eigenvectors in columns.
        curvature: Parameter -> its curvature.
        counts: Texts, tokens, sides without eigenvectors, cost.
    """

    vectors: dict[str, Tensor]
    curvature: dict[str, Tensor]
    counts: dict[str, Any]


class FactorFit:
    """The stages of a fit, one after the other.

    Args:
        lm: The model.
        encoded: The texts, in the order in which they are summed up.
        folder: Where the unfinished sums go; None keeps them in memory.
        identity: What decides the factors, with `block_size`.
    """

    def __init__(self, lm: LanguageModel, encoded: list[EncodedText], folder: Path | None, identity: dict[str, Any]) -> None:
        self.lm, self.encoded, self.identity = lm, encoded, identity
        self.partial = folder
        size = identity["block_size"]
        self.blocks = [encoded[start : start + size] for start in range(0, len(encoded), size)]
        self.layers = find_layers(lm, next(lm.batches(self.blocks[0], packing=False)))
        self.widest = identity["max_factor_dim"]
        self.seconds = 0.0

    def run(self) -> FittedTensors:
        """Fit, or go on with a fit that was stopped."""
        sides = [(f"{layer.weight}::{side}", width) for layer in self.layers for side, width in self._sides(layer)]
        wide = {name: (width, width) for name, width in sides if width <= self.widest}
        covariances = self._sum("covariances", wide, self._add_covariances, dtype=torch.float64)
        self.vectors = {name: self._eigenvectors(index, covariances[name]) for index, name in enumerate(wide)}
        shapes = {layer.weight: (layer.num_outputs, layer.num_inputs) for layer in self.layers}
        curvature = self._sum("curvature", shapes, self._add_squares, dtype=torch.float32)
        with timed(self._spend):
            curvature = {name: total / len(self.encoded) for name, total in curvature.items()} | self._other_curvature()
        num_tokens = sum(len(text.input_ids) for text in self.encoded)
        counts = {
            "num_texts": len(self.encoded),
            "num_tokens": num_tokens,
            "diagonal_sides": [f"{name} ({width})" for name, width in sides if width > self.widest],
            "cost": {"fit_seconds": round(self.seconds, 3), "fit_flops": self._flops(num_tokens, list(wide.values()))},
        }
        to_cpu = [{name: tensor.cpu() for name, tensor in tensors.items()} for tensors in (self.vectors, curvature)]
        return FittedTensors(to_cpu[0], to_cpu[1], counts)

    def _spend(self, seconds: float) -> None:
        self.seconds += seconds

    def _sides(self, layer: Layer) -> tuple[tuple[str, int], tuple[str, int]]:
        return ("inputs", layer.num_inputs), ("outputs", layer.num_outputs)

    def _sum(self, stage: str, shapes: dict[str, Any], add: Take, *, dtype: torch.dtype) -> dict[str, Tensor]:
        """Sum over all blocks what `add` adds to `self.sums` for each layer and batch; on disk after every block."""
        path = None if self.partial is None else self.partial / f"{stage}.safetensors"
        if path is not None and path.exists():
            self.sums, state = load_sums(path, self.lm.device)
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
                    save_tensors(path, self.sums, state={"blocks": number, "seconds": self.seconds})
                tracker.advance(len(block))
        return self.sums

    def _loss(self, batch: Batch, block: list[EncodedText]) -> Tensor:
        """The summed loss of a batch, with the labels that the kind of Fisher asks for."""
        logits = self.lm.logits(batch)[:, :-1]  # (R, M-1, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = (batch.packed or batch).labels[:, 1:]  # (R, M-1)
        if self.identity["fisher"] == "sampled":
            texts = [block[row] for row in batch.positions]
            drawn = draw_labels(logits.detach(), texts, seed=self.identity["seed"], places=batch.places)
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
            return load_sums(path, self.lm.device)[0]["vectors"]
        with timed(self._spend):
            vectors = torch.linalg.eigh(covariance)[1].float()
        if path is not None:
            save_tensors(path, {"vectors": vectors})
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


def draw_labels(
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


def save_tensors(path: Path, tensors: dict[str, Tensor], *, state: dict[str, Any] | None = None) -> None:
    """Write named tensors, and beside them what `load_sums` gives back of a state."""
    from safetensors.torch import save_file

    with atomic_path(path) as partial:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, partial, metadata={key: repr(value) for key, value in (state or {}).items()} or None)


def load_sums(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: the tensors, and how many blocks and seconds are in them."""
    from safetensors import safe_open

    with safe_open(path, "pt", device=str(device)) as file:
        state: dict[str, str] = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors, {"blocks": int(state.get("blocks", 0)), "seconds": float(state.get("seconds", 0.0))}
