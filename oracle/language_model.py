"""A causal language model behind a few verbs: encode, losses, snapshot, restore.

`LanguageModel` joins a Hugging Face module with its tokenizer and, where influence of a real training step
is asked for, the optimiser that trains it. It never changes the module it is given except inside
`preserved()`, which puts everything back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from oracle.checkpoints import load_checkpoint, load_optimizer, place_state, save_checkpoint
from oracle.encoding import IGNORED, MAX_LOGIT_ELEMENTS, Batch, EncodedText, encode_texts, make_batches
from oracle.errors import InputError, InputTypeError, check_choice, check_count
from oracle.fingerprints import model_fingerprint, tokenizer_fingerprint
from oracle.packing import keeps_texts_apart, pack_batches
from oracle.snapshot import Snapshot, restore_snapshot, restore_weights, take_snapshot
from oracle.texts import read_texts
from oracle.wrappers import check_whole, devices_of_map, entrance

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULT_MAX_TOKENS = 512
REDUCTIONS = ("mean", "sum")  # what a text's loss is of its tokens' losses
MAX_BATCH_TOKENS = 8192  # beyond this a larger batch no longer makes a CPU or GPU pass cheaper per token


class LanguageModel:
    """Any Hugging Face causal language model, with its tokenizer and (optionally) its optimiser.

    Args:
        module: The model; it returns an object with `logits` (B, L, V) for `input_ids` (B, L).
        tokenizer: Its tokenizer; None if all texts are token ids.
        optimizer: The torch optimiser that trains `module`, with its live state. `one_step` needs it;
            `grad_dot` takes its second moments from it.
        max_tokens: Longer texts are truncated or refused; None means 512, or the model's context if that is shorter.
        device: "auto" keeps a module that has an optimiser or is on an accelerator where it is, and
            otherwise takes CUDA where there is one; or any torch device. A module that `device_map` spreads over
            several devices stays there, and serves methods without gradients.
        too_long: What happens to texts longer than `max_tokens`: "truncate" (counted) or "refuse".
        packing: Let several texts share a row of a batch, each as if it stood alone (`oracle.packing`). It pays where texts
            that are batched together have very different lengths, as in a small sample or target set; the texts of a
            large sample are put in the order of length, which leaves little padding. Values change by rounding alone,
            so labels made with and without it may stand in one folder.

    Attributes:
        batch_tokens: Padded tokens per batch in the place of `default_batch_tokens`; None, as at first, for the default.

    Raises:
        InputError: The tokenizer has more tokens than the model has embeddings; `max_tokens` exceeds the
            model's context; the optimiser holds none of the model's parameters; the module is wrapped or sharded.

    Example:
        >>> lm = oracle.LanguageModel.from_pretrained("checkpoints/step-1000")   # doctest: +SKIP
        >>> lm.losses(["A text.", "Another one."])                               # doctest: +SKIP
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        max_tokens: int | None = None,
        device: str | torch.device = "auto",
        too_long: str = "truncate",
        packing: bool = False,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise InputTypeError(
                f"module is a {type(module).__name__}.",
                "a torch module, such as a transformers causal model",
                "to load one from a folder or hub name use LanguageModel.from_pretrained(path).",
            )
        check_whole(module)
        check_choice("too_long", too_long, ("truncate", "refuse"))
        self.module, self.tokenizer, self.optimizer = module, tokenizer, optimizer
        self.max_tokens = min(DEFAULT_MAX_TOKENS, self.context or DEFAULT_MAX_TOKENS) if max_tokens is None else max_tokens
        self.too_long, self.packing, self._keeps_texts_apart = too_long, packing, False
        self._held: Snapshot | None = None  # what `preserved` puts back, while its block runs
        self.batch_tokens: int | None = None
        if devices_of_map(module):
            self.device = entrance(module)
        else:
            self.device = _choose_device(module, optimizer, device)
            module.to(self.device)
        if optimizer is not None:
            place_state(optimizer)
        self._check_fit()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "float32",
        max_tokens: int | None = None,
        device: str | torch.device = "auto",
        too_long: str = "truncate",
        packing: bool = False,
    ) -> LanguageModel:
        """Load a model and tokenizer from a folder or a hub name, and the optimiser state saved beside them.

        Args:
            path: A folder written by `save`, by `save_pretrained` or by the Hugging Face Trainer, or a hub name. Of a
                folder with an adapter of peft (LoRA), the adapter is trainable and its base model is loaded too.
            dtype: "float32" or "bfloat16", or torch's own.
            max_tokens: As in the constructor.
            device, too_long, packing: As in the constructor.

        Raises:
            InputError: Nothing can be loaded from `path`, its optimiser cannot be rebuilt, or `dtype` is unknown.
            MissingPackageError: The folder has an adapter, and peft is not installed.
            MismatchError: The optimiser's state does not fit the model.
        """
        name = check_choice("dtype", str(dtype).removeprefix("torch."), ("float32", "bfloat16"))
        module, tokenizer = load_checkpoint(path, dtype=getattr(torch, name))
        target = _choose_device(module, None, device)
        module.to(target)
        optimizer = load_optimizer(Path(path), module) if Path(path).is_dir() else None
        return cls(module, tokenizer, optimizer, max_tokens=max_tokens, device=target, too_long=too_long, packing=packing)

    def save(self, folder: str | Path) -> None:
        """Write weights, tokenizer and optimiser state (all safetensors and JSON) to `folder`, atomically.

        Raises:
            InputError: The optimiser holds parameters that are not the model's, or an adapter could not be loaded again.
        """
        save_checkpoint(Path(folder), self.module, self.tokenizer, optimizer=self.optimizer)

    # ------------------------------------------------------------------ texts and losses

    def encode(self, texts: Dataset | Sequence[str]) -> list[EncodedText]:
        """Tokenise texts (a Dataset from `read_texts`, or anything it reads) with their loss masks.

        Raises:
            InputError: A token id is outside the model's vocabulary, or see `encode_texts`.
        """
        dataset = read_texts(texts)
        encoded = encode_texts(dataset, self.tokenizer, max_tokens=self.max_tokens, too_long=self.too_long)
        highest = max((max(text.input_ids) for text in encoded if text.input_ids), default=0)
        if highest >= self.vocabulary_size:
            raise InputError(
                f"a text has token id {highest}, the model has {self.vocabulary_size} embeddings.",
                "token ids of the tokenizer that the model was trained with",
                "use the model's own tokenizer, or resize the embeddings.",
            )
        return encoded

    def losses(self, texts: Dataset | Sequence[str]) -> np.ndarray:
        """Return each text's loss.

        Shapes:
            (B,) float32, in the order of `texts` as `read_texts` keeps them.
        Units:
            Nats per target token; 0 for a text without a target token.
        """
        encoded = self.encode(texts)
        losses = np.zeros(len(encoded), dtype=np.float32)
        with self.preserved(weights=False), torch.no_grad():
            for batch in self.batches(encoded):
                losses[batch.positions] = self.text_losses(batch).cpu().numpy()
        return losses

    def batches(
        self, encoded: Sequence[EncodedText], *, batch_tokens: int | None = None, packing: bool | None = None
    ) -> Iterator[Batch]:
        """Yield batches on the model's device.

        Args:
            encoded: The texts.
            batch_tokens: Tokens per batch, padding counted; None for `self.batch_tokens` or else `default_batch_tokens`.
            packing: Whether texts may share rows; None for `self.packing`. Padded rows for what reads `input_ids` itself.

        Raises:
            InputError: Texts share rows, and the model does not keep them apart.
        """
        size = batch_tokens or self.batch_tokens or self.default_batch_tokens
        make = pack_batches if (self.packing if packing is None else packing) else make_batches
        for batch in make(encoded, batch_tokens=size, device=self.device):
            if batch.packed is not None and not self._keeps_texts_apart:
                self._keeps_texts_apart = keeps_texts_apart(self.module, batch)
            yield batch

    @property
    def default_batch_tokens(self) -> int:
        """Padded tokens per batch: `MAX_BATCH_TOKENS`, or fewer where the logits would fill the memory."""
        return max(min(MAX_BATCH_TOKENS, MAX_LOGIT_ELEMENTS // self.vocabulary_size), 1)

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits (R, M, V) of the batch's rows: (B, L, V), one per text, or packed ones."""
        rows = batch.packed
        inputs = (
            {"input_ids": batch.input_ids} if rows is None else {"input_ids": rows.input_ids, "position_ids": rows.position_ids}
        )
        logits: Tensor = self.module(**inputs, use_cache=False).logits
        return logits

    def token_losses(self, batch: Batch, *, fine: bool = False) -> tuple[Tensor, Tensor]:
        """Return every predicted token's loss and the mask of those that count, both (B, L-1); nats.

        Args:
            fine: The losses come in float64, without the last rounding to float32 (2e-7 nats of a loss of 4), which is most
                of the error where the logits are small; the logits are what the model computes. Forward passes only.
        """
        rows = batch.packed
        logits = self.logits(batch)[:, :-1]  # (R, M-1, V)
        labels = (batch if rows is None else rows).labels[:, 1:]  # (R, M-1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = _fine_cross_entropy(logits, labels) if fine else _cross_entropy(logits, labels)
        if rows is not None:
            losses = rows.by_text(functional.pad(losses, (1, 0)))[:, 1:]  # (B, L-1)
        return losses, batch.labels[:, 1:] != IGNORED

    def text_losses(self, batch: Batch, *, reduction: str = "mean") -> Tensor:
        """Return (B,) losses, differentiable, the mean over each text's target tokens or their sum; 0 where it has none."""
        losses, mask = self.token_losses(batch)
        return losses.sum(1) / mask.sum(1).clamp_min(1) if reduction == "mean" else losses.sum(1)

    # ------------------------------------------------------------------ state

    def snapshot(self, *, weights: bool = True) -> Snapshot:
        """Copy weights, optimiser state, random state, modes, requires_grad and hooks (see `oracle.snapshot`)."""
        return take_snapshot(self.module, self.optimizer, weights=weights)

    def restore(self, snapshot: Snapshot) -> None:
        """Put a snapshot back, bit for bit."""
        restore_snapshot(snapshot, self.module, self.optimizer)

    def restore_weights(self, snapshot: Snapshot) -> None:
        """Put back only what an optimiser step changes: weights, buffers and optimiser state."""
        restore_weights(snapshot, self.module, self.optimizer)

    @contextmanager
    def preserved(self, *, weights: bool = True) -> Iterator[Snapshot]:
        """Switch to eval mode for a block and restore everything after it, also when it raises.

        Args:
            weights: False if the block only reads weights and optimiser state; they are then not copied.
        """
        snapshot = self.snapshot(weights=weights)
        outer, self._held = self._held, snapshot if weights else None
        self.module.eval()
        try:
            yield snapshot
        finally:
            self._held = outer
            self.restore(snapshot)

    def start_of_steps(self) -> Snapshot:
        """Return the copy of weights and optimiser state that `preserved` holds in this block, or else make one."""
        return self.snapshot() if self._held is None else self._held

    def fingerprint(self, *, optimizer: bool = False) -> str:
        """Return 16 hex digits that identify the weights bit for bit.

        Args:
            optimizer: Also identify the optimiser: its class, state and hyper-parameters, and which parameters
                they hold for. The learning rate counts; `oracle.fingerprints.STEP_NEUTRAL_KEYS` do not.
        """
        return model_fingerprint(self.module, self.optimizer if optimizer else None)

    def tokenizer_fingerprint(self) -> str:
        """Return 16 hex digits that identify how the tokenizer turns texts and chats into ids; "" without a tokenizer.

        They cover the vocabulary, the merges and every other rule of a fast tokenizer, the special tokens and
        the chat template. Truncation and padding, which a call sets, do not count.
        """
        return tokenizer_fingerprint(self.tokenizer)

    # ------------------------------------------------------------------ size

    @property
    def context(self) -> int | None:
        """The longest sequence that the model takes, or None where its config does not say."""
        return getattr(getattr(self.module, "config", None), "max_position_embeddings", None)

    @property
    def vocabulary_size(self) -> int:
        """How many token ids the model can embed."""
        return int(self._embeddings().weight.shape[0])

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def forward_flops_per_token(self) -> float:
        """Twice the parameters that take part in a matrix product; attention scores are left out.

        Input embeddings are looked up, not multiplied, and do not count unless the output layer is tied to them.
        A backward pass costs twice a forward one.
        """
        module: Any = self.module
        head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
        embeddings = self._embeddings()
        is_tied = head is not None and head.weight is embeddings.weight
        return 2.0 * (self.num_parameters - (0 if is_tied else embeddings.weight.numel()))

    def _embeddings(self) -> Any:
        module: Any = self.module
        if not hasattr(module, "get_input_embeddings"):
            raise InputTypeError(
                f"{type(module).__name__} has no get_input_embeddings().",
                "a transformers causal language model",
                "give the module these methods of transformers' PreTrainedModel.",
            )
        return module.get_input_embeddings()

    def _check_fit(self) -> None:
        if self.tokenizer is not None and len(self.tokenizer) > self.vocabulary_size:
            raise InputError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model {self.vocabulary_size} embeddings.",
                "the tokenizer that the model was trained with",
                "load both from the same folder, or resize the embeddings.",
            )
        check_count("max_tokens", self.max_tokens)
        if not 1 < self.max_tokens <= (self.context or self.max_tokens):
            raise InputError(
                f"max_tokens={self.max_tokens}, and the model's context is {self.context} tokens.",
                f"from 2 to {self.context or 'the context'}",
                "pass max_tokens within the context.",
            )
        if self.optimizer is not None:
            own = set(self.module.parameters())
            if not any(parameter in own for group in self.optimizer.param_groups for parameter in group["params"]):
                raise InputError(
                    "the optimizer holds none of the model's parameters.",
                    "the optimizer that trains this module",
                    "build it from module.parameters() after the module has its final form.",
                )


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    flat = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(labels.shape)


def _fine_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    largest = logits.amax(-1)  # (R, M-1)
    total = (logits - largest.unsqueeze(-1)).exp_().sum(-1)  # its rounding is relative to 1 or more
    own = logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    losses = total.double().log() + largest.double() - own.double()
    return losses.masked_fill(labels == IGNORED, 0.0)


def _choose_device(module: nn.Module, optimizer: torch.optim.Optimizer | None, device: str | torch.device) -> torch.device:
    current = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise InputError(
                f"device={device!r} is not a torch device.", "'auto', 'cpu', 'cuda', 'cuda:0', ...", "choose one."
            ) from error
    if current.type == "cpu" and optimizer is None and torch.cuda.is_available():
        return torch.device("cuda")
    return current
