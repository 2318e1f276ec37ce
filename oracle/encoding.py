"""From rows of text to token ids with a loss mask, and from those to right-padded batches.

The mask follows the format of the texts: plain text and token ids are predicted whole (from the second
token on), of a prompt and completion only the completion, of a chat only the assistant's turns. Padding
stands on the right, where a causal model cannot see it, so no attention mask is needed and a text's loss
does not depend on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
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
        labels: L token ids; `IGNORED` where the token is not predicted. The first one has nothing before it to be
            predicted from, so it counts only where texts are packed one after another.
        was_truncated: Whether tokens beyond the limit were cut off.
    """

    text_id: str
    input_ids: list[int]
    labels: list[int]
    was_truncated: bool = False

    @property
    def num_targets(self) -> int:
        """How many tokens are predicted where the text stands alone."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True, slots=True)
class Batch:
    """A right-padded batch: one text per row. Where `packed` is there, a model may read that in its place.

    Attributes:
        input_ids: (B, L) token ids, 0 in the padding.
        labels: (B, L) token ids, `IGNORED` in the padding and wherever the loss does not count.
        positions: For each text, its index in the list that was batched.
        packed: The same texts in fewer rows (`oracle.packing`), or None.
    """

    input_ids: Tensor
    labels: Tensor
    positions: list[int]
    packed: PackedRows | None = None

    @property
    def model_shape(self) -> tuple[int, int]:
        """Rows and tokens per row that the model reads."""
        rows, tokens = (self if self.packed is None else self.packed).input_ids.shape
        return rows, tokens

    @property
    def places(self) -> list[tuple[int, int]]:
        """Row and first token of each text in what the model reads."""
        return [(row, 0) for row in range(len(self.input_ids))] if self.packed is None else self.packed.places

    def some(self, texts: slice) -> Batch:
        """Return some of the texts, one per row; packed ones without the padding that the longest of them needs not."""
        length = self.input_ids.shape[1] if self.packed is None else max(self.packed.lengths[texts])
        return Batch(self.input_ids[texts, :length], self.labels[texts, :length], self.positions[texts])


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Several texts one after the other in a row, each with positions from 0 on, which keeps them apart.

    Attributes:
        input_ids: (R, M) token ids, 0 in the padding.
        labels: (R, M) token ids, `IGNORED` in the padding, at each text's first token and wherever the loss does not count.
        position_ids: (R, M) places within the text; the padding counts as a text of its own.
        places: Row and first token of each of the B texts, the longest text first.
        lengths: Tokens of each text, at least 1.
        index: (B, L) place of every token of every text among the R * M; R * M in the padding.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    places: list[tuple[int, int]]
    lengths: list[int]
    index: Tensor

    def by_text(self, values: Tensor) -> Tensor:
        """Arrange values of tokens (R, M) as (B, L), with 0 in the padding."""
        return torch.cat([values.reshape(-1), values.new_zeros(1)])[self.index]

    def groups(self) -> list[slice]:
        """Cut the texts, which stand in the order of length, into groups that take R * M tokens at most when padded."""
        starts = [0]
        for text in range(1, len(self.lengths)):
            if (text + 1 - starts[-1]) * self.lengths[starts[-1]] > self.input_ids.numel():
                starts.append(text)
        return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(self.lengths)], strict=True)]


def encode_texts(texts: Dataset, tokenizer: Any, *, max_tokens: int, too_long: str = "truncate") -> list[EncodedText]:
    """Tokenise texts of any format.

    Args:
        texts: What `oracle.read_texts` returns.
        tokenizer: A Hugging Face tokenizer; may be None for texts that are token ids already.
        max_tokens: Longer texts are cut on the right, or refused.
        too_long: "truncate" or "refuse".

    Raises:
        InputError: No text_id column; no tokenizer or chat template where one is needed; the template cannot
            render a chat; a text is longer than `max_tokens` and `too_long` is "refuse".
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
        pairs = [
            _encode_chat(messages, tokenizer, text_id=text_id)
            for text_id, messages in zip(text_ids, texts["messages"], strict=True)
        ]
    else:
        ids = [list(row) for row in texts["input_ids"]]
        given = list(texts["labels"]) if "labels" in texts.column_names else [None] * len(ids)
        pairs = [(own, list(own if row is None else row)) for own, row in zip(ids, given, strict=True)]
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
    if _appends_end(tokenizer):
        prompts = [prompt[:-1] for prompt in prompts]
    return [
        (prompt + completion, [IGNORED] * len(prompt) + list(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _appends_end(tokenizer: Any) -> bool:
    """Whether the tokenizer ends every text with its end-of-text token, which would part a prompt from its completion."""
    end = getattr(tokenizer, "eos_token_id", None)
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return end is not None and bool(bare) and bare[-1] != end and whole[-1] == end


def _encode_chat(messages: Sequence[dict[str, str]], tokenizer: Any, *, text_id: str) -> tuple[list[int], list[int]]:
    """Render with the tokenizer's own template, which brings its special tokens along, and find the assistant's tokens."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            "the texts are chats and the tokenizer has no chat template.",
            "a tokenizer with a chat_template",
            "set tokenizer.chat_template, or give the texts as prompt and completion.",
        )
    rendered, spans = _render_chat(messages, tokenizer, text_id=text_id)
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = list(encoded["input_ids"])
        is_target = _overlaps(encoded["offset_mapping"], spans)
    else:
        ids = _bare_ids(rendered, tokenizer)
        is_target = _covered_by_prefixes(ids, spans, rendered=rendered, tokenizer=tokenizer, text_id=text_id)
    return ids, [token if counts else IGNORED for token, counts in zip(ids, is_target, strict=True)]


def _render_chat(messages: Sequence[dict[str, str]], tokenizer: Any, *, text_id: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a chat as one string, and where in it each turn of the assistant begins and ends.

    A turn is what the conversation up to it adds to the conversation before it with the assistant's turn opened,
    so it has the text and the mark that ends it, but not the mark that opens it.
    """
    from jinja2.exceptions import TemplateError

    def render(part: Sequence[dict[str, str]], *, open_turn: bool = False) -> str:
        try:
            return str(tokenizer.apply_chat_template(list(part), tokenize=False, add_generation_prompt=open_turn))
        except TemplateError as error:
            raise InputError(
                f"the tokenizer's chat template fails on the first {len(part)} of the {len(messages)} messages of text "
                f"{text_id}: {error} (roles: {', '.join(message['role'] for message in messages)}).",
                "chats with the roles, and in the order, that the template takes",
                "leave this text out, change its messages, set another chat_template, or give it as prompt and completion.",
            ) from error

    whole = render(messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        after = render(messages[: index + 1])
        if index:
            before = render(messages[:index], open_turn=True)
        else:  # transformers renders no empty conversation: what opens the turn is what any content shares
            other = "1" if message["content"].strip().startswith("0") else "0"
            pairs = zip(after, render([{**message, "content": other}]), strict=False)
            before = after[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))]
        if not (whole.startswith(before) and whole.startswith(after)):
            raise InputError(
                f"the chat template does not render the conversation of text {text_id} as an extension of its beginning.",
                "a template whose rendering of the first n messages stays the same when more follow",
                "give the texts as prompt and completion, or as input_ids with labels.",
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _overlaps(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens have a character inside a span; one that stands across its edge counts."""
    marks, last_stop = [], 0
    for start, stop in offsets:
        first = min(start, last_stop) if start == stop else start  # white space that the tokenizer trims off its offsets
        marks.append(any(first < end and stop > begin for begin, end in spans))
        last_stop = stop
    return marks


def _bare_ids(rendered: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])


def _covered_by_prefixes(
    ids: list[int], spans: Sequence[tuple[int, int]], *, rendered: str, tokenizer: Any, text_id: str
) -> list[bool]:
    """Which tokens lie inside a span, for a tokenizer without offsets: by the number of tokens up to its edges."""
    marks = [False] * len(ids)
    for span in spans:
        before, after = (_bare_ids(rendered[:edge], tokenizer) for edge in span)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise InputError(
                f"in text {text_id} a token stands across the edge of an assistant's turn.",
                "a fast tokenizer, which tells where its tokens stand, or a template with a special token at each edge",
                "load the tokenizer as a fast one, or give the texts as prompt and completion.",
            )
        marks[len(before) : len(after)] = [True] * (len(after) - len(before))
    return marks


def make_batches(encoded: Sequence[EncodedText], *, batch_tokens: int, device: torch.device) -> Iterator[Batch]:
    """Yield batches of at most `batch_tokens` padded tokens (always at least one text), texts of like length together."""
    for group in group_by_length(encoded, batch_tokens=batch_tokens):
        yield make_batch([encoded[index] for index in group], positions=group, device=device)


def group_by_length(encoded: Sequence[EncodedText], *, batch_tokens: int) -> list[list[int]]:
    """Group the indices of texts, in the order of length, so that each group has at most `batch_tokens` padded tokens."""
    order = sorted(range(len(encoded)), key=lambda index: (len(encoded[index].input_ids), encoded[index].text_id))
    groups: list[list[int]] = []
    for index in order:
        if groups and len(encoded[index].input_ids) * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


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
