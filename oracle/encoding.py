"""From rows of text to token ids with a loss mask, and from those to right-padded batches.

The mask follows the format of the texts: plain text and token ids are predicted whole (from the second
token on), of a prompt and completion only the completion, of a chat only the assistant's turns. Padding
stands on the right, where a causal model cannot see it, so no attention mask is needed and a text's loss
does not depend on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oracle.errors import InputError
from oracle.texts import check_text_ids, text_format

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100  # the label that torch's cross-entropy leaves out
MAX_LOGIT_ELEMENTS = 2**26  # float32 logits of one batch stay under 256 MiB


@dataclass(frozen=True, slots=True)
class EncodedText:
    """One text as a model sees it.

    Attributes:
        text_id: Hash of the content.
        input_ids: L token ids.
        labels: L token ids; `IGNORED` where the token is not predicted. The first one never is.
        was_truncated: Whether tokens beyond the limit were cut off.
    """

    text_id: str
    input_ids: list[int]
    labels: list[int]
    was_truncated: bool = False

    @property
    def num_targets(self) -> int:
        """How many tokens are predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True, slots=True)
class Batch:
    """A right-padded batch.

    Attributes:
        input_ids: (B, L) token ids, 0 in the padding.
        labels: (B, L) token ids, `IGNORED` in the padding and wherever the loss does not count.
        positions: For each row, its index in the list that was batched.
    """

    input_ids: Tensor
    labels: Tensor
    positions: list[int]


def encode_texts(texts: Dataset, tokenizer: Any, *, max_tokens: int, too_long: str = "truncate") -> list[EncodedText]:
    """Tokenise texts of any format.

    Args:
        texts: What `oracle.read_texts` returns.
        tokenizer: A Hugging Face tokenizer; may be None for texts that are token ids already.
        max_tokens: Longer texts are cut on the right, or refused.
        too_long: "truncate" or "refuse".

    Raises:
        InputError: No text_id column; no tokenizer or chat template where one is needed; a text is longer
            than `max_tokens` and `too_long` is "refuse".
    """
    check_text_ids(texts)
    kind = text_format(texts)
    text_ids = list(texts["text_id"])
    if tokenizer is None and kind != "tokens":
        raise InputError(
            f"no tokenizer, and the texts are in the {kind!r} format.",
            "a Hugging Face tokenizer, or texts as input_ids",
            "pass tokenizer=... to LanguageModel.",
        )
    if kind == "text":
        ids = tokenizer(list(texts["text"]), truncation=False, verbose=False)["input_ids"] if len(texts) else []
        pairs = [(row, list(row)) for row in ids]
    elif kind == "completion":
        pairs = _encode_completions(texts, tokenizer)
    elif kind == "chat":
        pairs = [_encode_chat(messages, tokenizer) for messages in texts["messages"]]
    else:
        ids = [list(row) for row in texts["input_ids"]]
        labels = [list(row) for row in texts["labels"]] if "labels" in texts.column_names else ids
        pairs = list(zip(ids, [list(row) for row in labels], strict=True))
    longest = max((len(ids) for ids, _ in pairs), default=0)
    if too_long == "refuse" and longest > max_tokens:
        count = sum(len(ids) > max_tokens for ids, _ in pairs)
        raise InputError(
            f"{count} of {len(pairs)} texts are longer than {max_tokens} tokens (the longest has {longest}).",
            "texts within max_tokens, or too_long='truncate'",
            "split the texts, raise max_tokens, or allow truncation.",
        )
    return [
        EncodedText(text_id, ids[:max_tokens], labels[:max_tokens], len(ids) > max_tokens)
        for text_id, (ids, labels) in zip(text_ids, pairs, strict=True)
    ]


def _encode_completions(texts: Dataset, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    prompts = tokenizer(list(texts["prompt"]), verbose=False)["input_ids"]
    completions = tokenizer(list(texts["completion"]), add_special_tokens=False, verbose=False)["input_ids"]
    return [
        (prompt + completion, [IGNORED] * len(prompt) + list(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _encode_chat(messages: Sequence[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Render with the tokenizer's own template; the assistant's turns are what each of them adds to its prefix."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            "the texts are chats and the tokenizer has no chat template.",
            "a tokenizer with a chat_template",
            "set tokenizer.chat_template, or give the texts as prompt and completion.",
        )

    def render(upto: int, *, open_turn: bool) -> list[int]:
        rendered = tokenizer.apply_chat_template(
            list(messages[:upto]), tokenize=True, add_generation_prompt=open_turn, return_dict=True
        )
        return list(rendered["input_ids"])

    ids = render(len(messages), open_turn=False)
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, open_turn=True), render(index + 1, open_turn=False)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise InputError(
                "the chat template does not render a conversation as an extension of its beginning.",
                "a template whose prefix for the first n messages stays the same when more follow",
                "give the texts as prompt and completion, or as input_ids with labels.",
            )
        labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return ids, labels


def make_batches(encoded: Sequence[EncodedText], *, batch_tokens: int, device: torch.device) -> Iterator[Batch]:
    """Yield batches of at most `batch_tokens` padded tokens (always at least one text), texts of like length together."""
    order = sorted(range(len(encoded)), key=lambda index: (len(encoded[index].input_ids), encoded[index].text_id))
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and len(encoded[order[stop]].input_ids) * (stop + 1 - start) <= batch_tokens:
            stop += 1
        yield make_batch([encoded[index] for index in order[start:stop]], positions=order[start:stop], device=device)
        start = stop


def make_batch(encoded: Sequence[EncodedText], *, positions: list[int], device: torch.device) -> Batch:
    """Pad texts on the right to the longest of them."""
    length = max(max(len(text.input_ids) for text in encoded), 1)
    input_ids = torch.zeros(len(encoded), length, dtype=torch.long)
    labels = torch.full((len(encoded), length), IGNORED, dtype=torch.long)
    for row, text in enumerate(encoded):
        input_ids[row, : len(text.input_ids)] = torch.tensor(text.input_ids, dtype=torch.long)
        labels[row, : len(text.labels)] = torch.tensor(text.labels, dtype=torch.long)
    labels[:, 0] = IGNORED
    return Batch(input_ids.to(device), labels.to(device), positions)
