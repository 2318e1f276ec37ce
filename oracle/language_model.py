"""A causal language model behind a few verbs: encode, losses, snapshot, restore.

`LanguageModel` joins a Hugging Face module with its tokenizer and, where influence of a real training step
is asked for, the optimiser that trains it. It never changes the module it is given except inside
`preserved()`, which puts everything back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from oracle.artifacts import fingerprint
from oracle.checkpoints import describe_groups, load_checkpoint, load_optimizer, place_state, save_checkpoint
from oracle.encoding import IGNORED, MAX_LOGIT_ELEMENTS, Batch, EncodedText, encode_texts, make_batches
from oracle.errors import InputError, InputTypeError, check_choice
from oracle.snapshot import Snapshot, restore_snapshot, restore_weights, take_snapshot
from oracle.texts import read_texts
from oracle.wrappers import check_whole

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULT_MAX_TOKENS = 512
STEP_NEUTRAL_KEYS = ("foreach", "fused", "capturable", "differentiable", "initial_lr", "param_names")  # no step depends on them
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
            otherwise takes CUDA where there is one; or any torch device.
        too_long: What happens to texts longer than `max_tokens`: "truncate" (counted) or "refuse".

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
        self.too_long = too_long
        self.batch_tokens: int | None = None
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
        dtype: str = "float32",
        max_tokens: int | None = None,
        device: str | torch.device = "auto",
        too_long: str = "truncate",
    ) -> LanguageModel:
        """Load a model and tokenizer from a folder or a hub name, and the optimiser state saved beside them.

        Args:
            path: A folder written by `save`, by `save_pretrained` or by the Hugging Face Trainer, or a hub name.
            dtype: "float32" or "bfloat16".
            max_tokens: As in the constructor.
            device: As in the constructor.
            too_long: As in the constructor.

        Raises:
            InputError: Nothing can be loaded from `path`, its optimiser cannot be rebuilt, or `dtype` is unknown.
            MismatchError: The optimiser's state does not fit the model.
        """
        check_choice("dtype", dtype, ("float32", "bfloat16"))
        module, tokenizer = load_checkpoint(path, dtype=getattr(torch, dtype))
        target = _choose_device(module, None, device)
        module.to(target)
        optimizer = load_optimizer(Path(path), module) if Path(path).is_dir() else None
        return cls(module, tokenizer, optimizer, max_tokens=max_tokens, device=target, too_long=too_long)

    def save(self, folder: str | Path) -> None:
        """Write weights, tokenizer and optimiser state (all safetensors and JSON) to `folder`, atomically."""
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

    def batches(self, encoded: Sequence[EncodedText], *, batch_tokens: int | None = None) -> Iterator[Batch]:
        """Yield padded batches on the model's device; by default as large as `self.batch_tokens` or `default_batch_tokens`."""
        size = batch_tokens or self.batch_tokens or self.default_batch_tokens
        return make_batches(encoded, batch_tokens=size, device=self.device)

    @property
    def default_batch_tokens(self) -> int:
        """Padded tokens per batch: `MAX_BATCH_TOKENS`, or fewer where the logits would fill the memory."""
        return max(min(MAX_BATCH_TOKENS, MAX_LOGIT_ELEMENTS // self.vocabulary_size), 1)

    def token_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return every predicted token's loss and the mask of those that count, both (B, L-1); float32, nats."""
        logits = self.module(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]  # (B, L-1, V)
        labels = batch.labels[:, 1:]  # (B, L-1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        flat = functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="none"
        )
        return flat.view(labels.shape), labels != IGNORED

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
        self.module.eval()
        try:
            yield snapshot
        finally:
            self.restore(snapshot)

    def fingerprint(self, *, optimizer: bool = False) -> str:
        """Return 16 hex digits that identify the weights bit for bit.

        Args:
            optimizer: Also identify the optimiser: its class, state and hyper-parameters, and which parameters
                they hold for. The learning rate counts; `STEP_NEUTRAL_KEYS` do not.
        """
        digest = hashlib.sha256()
        for name, tensor in self.module.state_dict().items():
            _hash_tensor(digest, name, tensor)
        if optimizer and self.optimizer is not None:
            names: dict[Tensor, str] = {parameter: name for name, parameter in self.module.named_parameters()}
            groups = [
                {
                    key: value
                    for key, value in {**group, "params": sorted(group["params"])}.items()
                    if key not in STEP_NEUTRAL_KEYS
                }
                for group in describe_groups(self.optimizer, names)
            ]
            digest.update(fingerprint([type(self.optimizer).__name__, groups]).encode())
            for parameter, slots in sorted(self.optimizer.state.items(), key=lambda item: names.get(item[0], "")):
                for slot, value in sorted(slots.items()):
                    if value is not None:
                        _hash_tensor(digest, f"{names.get(parameter, '')} {slot}", torch.as_tensor(value))
        return digest.hexdigest()[:16]

    def tokenizer_fingerprint(self) -> str:
        """Return 16 hex digits that identify how the tokenizer turns texts and chats into ids; "" without a tokenizer.

        They cover the vocabulary, the merges and every other rule of a fast tokenizer, the special tokens and
        the chat template. Truncation and padding, which a call sets, do not count.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            return ""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = {} if backend is None else json.loads(backend.to_str())
        return fingerprint(
            {
                "vocabulary": tokenizer.get_vocab(),
                "rules": {key: value for key, value in rules.items() if key not in ("truncation", "padding")},
                "special_tokens": tokenizer.special_tokens_map,
                "chat_template": getattr(tokenizer, "chat_template", None),
            }
        )

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


def _hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
