"""What one forward pass of a language model says about a text.

The mean hidden state h below the output layer, the mean error state W'e that a backward pass would send into it,
statistics of the token losses, and the exact influence of the text through the output layer on every target set.
e is the gradient of the loss at the output layer's output: p - y, times whatever the model does to its logits
after that layer (a scale, a soft cap). All of these are pieces of the text's gradient that a forward pass has at
hand: the output layer's gradient is sum_t e_t h_t', and every layer below is driven by the error state. The error
state is what tells the texts of one source apart. The model can be the live checkpoint or a smaller one trained
beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from oracle.artifacts import fingerprint, read_json, write_json
from oracle.encoding import IGNORED, Batch
from oracle.errors import InputError, InputTypeError
from oracle.gradients.metric import maximised, second_moments
from oracle.gradients.module_rules import GRADIENT_BLOCK_BYTES
from oracle.gradients.products import dot_in_blocks
from oracle.language_model import LanguageModel
from oracle.plugins import option, options_of
from oracle.target_columns import TargetColumns, prepare_targets
from oracle.targets import TargetSet, read_targets
from oracle.texts import write_texts
from oracle.token_statistics import MIN_K, STATISTICS, TokenStatistics, statistics_of_log_probabilities, text_statistics

if TYPE_CHECKING:
    from datasets import Dataset

STATES = ("hidden", "hidden_rms", "error", "error_rms")


@dataclass(kw_only=True)
class ModelState:
    """Hidden and error states, token-loss statistics and exact last-layer influence on each target, from one forward pass.

    Cost:
        One forward pass of the model per text, and two more products of the output layer's size.
    Limit:
        Without states and statistics, the last-layer influence is `grad_dot` restricted to the output layer.

    The last-layer influence is in Adam's metric where the optimiser has moments for all parameters of the output
    layer. Where it lacks them for some (a frozen output layer, as with LoRA), it is the plain product for all of them.
    """

    plugin_name: ClassVar[str] = "model_state"
    frozen: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True

    model: Any = option(None, "A LanguageModel, or the folder or hub name of one: the live checkpoint or a proxy.")
    targets: Any = option(None, "The named target sets for the last-layer influence; None leaves it out.")
    max_target_texts: int | None = option(None, "Use at most this many texts of each target set, as `oracle.label` does.")
    states: bool = option(True, "Whether mean and root mean square of hidden and error states are part of the features.")
    min_k: float = option(MIN_K, "Share of the least likely tokens in Min-K%.")

    def __post_init__(self) -> None:
        if not 0 < self.min_k <= 1:
            raise InputError(f"min_k={self.min_k!r}.", "a share above 0 and at most 1", "pass such a share.")
        self._lm: LanguageModel | None = self.model if isinstance(self.model, LanguageModel) else None
        self._columns: TargetColumns | None = None
        self._directions: dict[str, Tensor] = {}
        self._directions_key = ""  # what `key` was when the directions were made

    @property
    def lm(self) -> LanguageModel:
        """The language model, loaded when it is first needed."""
        if self._lm is None:
            if not isinstance(self.model, str):
                raise InputTypeError(
                    f"model_state has model={self.model!r}.",
                    "an oracle.LanguageModel, or the folder or hub name of one",
                    "pass ModelState(model=lm), or a path.",
                )
            self._lm = LanguageModel.from_pretrained(self.model)
        return self._lm

    def saved_options(self) -> dict[str, Any]:
        """Options as JSON; the model by the path it was loaded from, the target sets in `save_state`."""
        path = (
            self.model if isinstance(self.model, str) else getattr(getattr(self.lm.module, "config", None), "_name_or_path", "")
        )
        return {**options_of(self), "model": path, "targets": None, "max_target_texts": None, "max_tokens": self.lm.max_tokens}

    def save_state(self, folder: Path) -> None:
        """Write the target sets, so that the loaded encoder measures influence on the same texts."""
        for number, target in enumerate(self._target_sets()):
            write_texts(target.texts, folder / f"target-{number}.parquet")
        write_json(folder / "targets.json", [target.name for target in self._target_sets()])

    @classmethod
    def load_state(cls, folder: Path, options: dict[str, Any], *, lm: LanguageModel | None) -> ModelState:
        """Make the encoder that was saved, with a model that is at hand or from the path it had.

        Raises:
            InputError: No model is given and the one that was used had no path.
        """
        max_tokens = options.pop("max_tokens")
        path = options.pop("model")
        if lm is None and not path:
            raise InputError(
                "the predictor has model_state features of a model that was not loaded from a folder.",
                "lm=...",
                "pass the language model: InfluencePredictor.load(folder, lm=lm).",
            )
        model = lm or LanguageModel.from_pretrained(path, max_tokens=max_tokens)
        names = read_json(folder / "targets.json")
        targets = {name: str(folder / f"target-{number}.parquet") for number, name in enumerate(names)} or None
        return cls(**{**options, "model": model, "targets": targets})

    def key(self) -> str:
        """Name of the cache folder: options, checkpoint, how texts become ids, and target sets."""
        options = {name: value for name, value in options_of(self).items() if name not in ("model", "targets")}
        targets = {target.name: target.fingerprint for target in self._target_sets()}
        encoding = [self.lm.max_tokens, self.lm.tokenizer_fingerprint()]
        return f"model_state-{fingerprint([options, encoding, targets])}-{self.fingerprint()}"

    def fingerprint(self) -> str:
        """Identity of the weights (and of the optimiser state that preconditions the last layer)."""
        return self.lm.fingerprint(optimizer=True)

    def flops(self, texts: Dataset) -> float:
        """Counted FLOPs for these texts; the passes over the target sets, once per checkpoint and process, are left out."""
        head = self._head()
        extra = 2.0 * head.weight.numel() * (int(self.targets is not None) + int(self.states))
        num_tokens = sum(len(text.input_ids) for text in self.lm.encode(texts))
        return num_tokens * (self.lm.forward_flops_per_token + extra)

    def encode(self, texts: Dataset) -> np.ndarray:
        """Return (N, D) float32 features in the order of `texts`."""
        encoded = self.lm.encode(texts)
        rows: list[np.ndarray | None] = [None] * len(encoded)
        with self.lm.preserved(weights=False), torch.no_grad():
            if self.targets is not None and self._directions_key != (key := self.key()):
                self._prepare_targets()
                self._directions_key = key
            for batch in self.lm.batches(encoded, packing=False):
                features = self._features(batch).float().cpu().numpy()
                for position, row in zip(batch.positions, features, strict=True):
                    rows[position] = row
        return np.stack([row for row in rows if row is not None]).astype(np.float32)

    def feature_names(self) -> list[str]:
        """Name every column."""
        width = self._head().weight.shape[1] if self.states else 0
        targets = [f"last_layer.{target.name}" for target in self._target_sets()]
        return [*STATISTICS, *targets, *(f"{state}.{index}" for state in STATES for index in range(width))]

    def _features(self, batch: Batch) -> Tensor:
        """(B, D) for one batch."""
        hidden, errors, tokens = self._forward(batch)
        count = tokens.mask.sum(1).clamp_min(1)  # (B,)
        columns = [text_statistics(tokens, min_k=self.min_k)]
        if self._directions:
            columns.append(self._influence(hidden, errors) / count.unsqueeze(1))
        if self.states:
            for state in (
                hidden * tokens.mask.unsqueeze(2),
                errors @ self._head().weight.float(),
            ):  # (B, L-1, H), zero where not predicted
                columns += [state.sum(1) / count.unsqueeze(1), (state.square().sum(1) / count.unsqueeze(1)).sqrt()]
        return torch.cat([column.float() for column in columns], dim=1)

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor, TokenStatistics]:
        """Hidden states (B, L-1, H), errors e (B, L-1, V) zero where not predicted, and what is known of each token."""
        labels = batch.labels[:, 1:]
        mask = labels != IGNORED
        safe = labels.clamp_min(0).unsqueeze(2)
        with torch.no_grad(), self._captured_head() as captured:  # gradients are on from the output layer's output on
            logits = self.lm.module(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
            log_p = torch.log_softmax(logits, dim=-1)
            losses = -log_p.gather(2, safe).squeeze(2) * mask
            hidden, output = captured[0]
            (errors,) = torch.autograd.grad(losses.sum(), output)
        del logits
        tokens = statistics_of_log_probabilities(log_p.detach(), labels)
        return hidden[:, :-1].float(), errors[:, :-1].float(), tokens

    def _influence(self, hidden: Tensor, errors: Tensor) -> Tensor:
        """(B, C): product of the text's output-layer gradient (loss summed over its tokens) with each target's direction."""
        weight = self._directions["weight"]
        step = max(1, GRADIENT_BLOCK_BYTES // (4 * errors.shape[2] * hidden.shape[2]))
        blocks = [
            dot_in_blocks(
                torch.bmm(errors[first : first + step].transpose(1, 2), hidden[first : first + step]).flatten(1),
                weight.flatten(1),
            )
            for first in range(0, errors.shape[0], step)
        ]
        products = torch.cat(blocks)
        if "bias" in self._directions:
            products += (errors.sum(1) @ self._directions["bias"].T).double()
        return products

    def _prepare_targets(self) -> None:
        """The output layer's target gradients, from forward passes, preconditioned where there is Adam state for it."""
        columns = self._columns = prepare_targets(self.lm, self._target_sets(), halves=False)
        head = self._head()
        directions = {
            name: torch.zeros(len(columns.names), *parameter.shape, device=parameter.device)
            for name, parameter in head.named_parameters(recurse=False)
        }
        for batch, part in zip(columns.batches, columns.batch_parts, strict=True):
            hidden, errors, _ = self._forward(batch)
            flat_errors = errors.flatten(0, 1) / float(columns.part_tokens[part])  # (B * (L-1), V)
            directions["weight"][columns.parts[part]] += flat_errors.T @ hidden.flatten(0, 1)
            if "bias" in directions:
                directions["bias"][columns.parts[part]] += flat_errors.sum(0)
        moments = second_moments(self.lm)
        names = {parameter: name for name, parameter in self.lm.module.named_parameters()}
        own = {name: names[parameter] for name, parameter in head.named_parameters(recurse=False)}
        is_adam = all(name in moments for name in own.values())
        for key, name in own.items():
            if is_adam:
                moments[name].precondition(directions[key], np.eye(len(directions[key])))
            if name in maximised(self.lm):
                directions[key].neg_()
        self._directions = directions

    def _target_sets(self) -> list[TargetSet]:
        return [] if self.targets is None else read_targets(self.targets, max_texts=self.max_target_texts)

    def _head(self) -> Any:
        head = self.lm.module.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise InputTypeError(
                f"{type(self.lm.module).__name__} has no output embeddings.",
                "a causal language model with an output layer",
                "give the module get_output_embeddings().",
            )
        return head

    @contextmanager
    def _captured_head(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Collect what enters and leaves the output layer; what leaves it is a leaf, and gradients are on behind it.

        The model does not run through autograd below the output layer. Use it in a block of `torch.no_grad`, whose end
        switches gradients back.
        """
        captured: list[tuple[Tensor, Tensor]] = []

        def cut(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            torch.set_grad_enabled(True)
            captured.append((args[0].detach(), output.detach().requires_grad_()))
            return captured[-1][1].clone()  # a copy, because a model may change its logits in place

        handle = self._head().register_forward_hook(cut)
        try:
            yield captured
        finally:
            handle.remove()
