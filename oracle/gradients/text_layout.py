"""Where the texts of a batch stand in the tensors that pass through a model's modules.

In a padded batch row i is text i. In a packed one (`oracle.packing`) a text is a stretch of a row; its tokens are gathered,
for a few texts of like length at a time, so that the padded copy is never larger than the tensor itself.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from oracle.encoding import Batch


class TextLayout:
    """The places of B texts in tensors with rows (R, M, ..., F) or tokens (R * M, ..., F), R = B in a padded batch.

    Args:
        batch: The batch that the model reads.

    Attributes:
        num_texts: B.
        num_rows: R.
        row_tokens: M.
    """

    def __init__(self, batch: Batch) -> None:
        self.packed = batch.packed
        self.num_texts = len(batch.input_ids)
        self.num_rows, self.row_tokens = batch.model_shape
        self._device = batch.input_ids.device

    def holds_texts(self, tensor: Tensor) -> bool:
        """Whether a tensor's rows are the batch's rows or tokens in their order."""
        if self.packed is not None:
            return tensor.dim() > 1 and self._token_axis(tensor) is not None
        return tensor.dim() > 0 and tensor.shape[0] in (self.num_rows, self.num_rows * self.row_tokens)

    def groups(self, *, at_most: int | None = None) -> list[slice]:
        """Cut the texts into groups of at most so many, and in a packed batch of no more padded tokens than the rows have."""
        groups = [slice(0, self.num_texts)] if self.packed is None else self.packed.groups()
        if at_most is None:
            return groups
        return [slice(first, min(first + at_most, g.stop)) for g in groups for first in range(g.start, g.stop, at_most)]

    def longest(self, texts: slice) -> int:
        """Tokens of the longest of some texts, the padding counted in a padded batch."""
        return self.row_tokens if self.packed is None else max(self.packed.lengths[texts])

    def by_text(self, tensor: Tensor, texts: slice | None = None) -> Tensor:
        """Arrange a module's input or output as (b, T, F) for some of the texts or all; 0 behind a packed text's end."""
        texts = slice(0, self.num_texts) if texts is None else texts
        if self.packed is None:
            return tensor.reshape(self.num_rows, -1, tensor.shape[-1])[texts]
        index = self.packed.index[texts, : self.longest(texts)]  # (b, L)
        slots = (index.reshape(-1) < self.num_rows * self.row_tokens).nonzero().squeeze(1)
        tokens = self._tokens(tensor)  # (R * M, n, F), n of them per token
        found = tokens.new_zeros(index.numel(), *tokens.shape[1:])
        found.index_copy_(0, slots, tokens.index_select(0, index.reshape(-1)[slots]))
        return found.reshape(len(index), -1, tensor.shape[-1])

    def sum_by_text(self, tensor: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Add up what the tokens of each text have: (B, F)."""
        return torch.cat([self.by_text(tensor, texts).sum(1, dtype=dtype) for texts in self.groups()])

    def own(self, tree: Any, text: int) -> Any:
        """The part of one text in every tensor, as if it were alone; what has no rows of texts is for all of them."""
        return pytree.tree_map_only(Tensor, lambda tensor: self._own(tensor, text), tree)

    @cached_property
    def owners(self) -> Tensor:
        """The text of every token (R * M,); B in the padding of packed rows."""
        if self.packed is None:
            return torch.arange(self.num_texts, device=self._device).repeat_interleave(self.row_tokens)
        owners = torch.full((self.num_rows * self.row_tokens + 1,), self.num_texts, device=self._device)
        texts = torch.arange(self.num_texts, device=self._device).unsqueeze(1).expand_as(self.packed.index)
        return owners.index_put_((self.packed.index.reshape(-1),), texts.reshape(-1))[:-1]

    def _own(self, tensor: Tensor, text: int) -> Tensor:
        size = tensor.shape[0] if tensor.dim() else 0
        if self.packed is None:
            if size == self.num_rows:
                return tensor[text : text + 1]
            first = text * self.row_tokens
            return tensor[first : first + self.row_tokens] if size == self.num_rows * self.row_tokens else tensor
        (row, start), length = self.packed.places[text], self.packed.lengths[text]
        if size == self.num_rows * self.row_tokens:
            first = row * self.row_tokens + start
            return tensor[first : first + length]
        if size != self.num_rows:
            return tensor
        own = tensor[row : row + 1]
        if tensor.dim() == 4 and tensor.shape[2:] == (self.row_tokens, self.row_tokens):  # an attention mask
            return own[:, :, start : start + length, start : start + length]
        axis = 1 if tensor.dim() == 2 and tensor.shape[1] == self.row_tokens else self._token_axis(tensor)
        return own if axis is None else own.narrow(axis, start, length)

    def _token_axis(self, tensor: Tensor) -> int | None:
        """The axis of a packed batch's tokens; 0 where rows and tokens are one axis, None where it cannot be told."""
        if tensor.shape[0] == self.num_rows * self.row_tokens:
            return 0
        axes = [axis for axis in range(1, tensor.dim() - 1) if tensor.shape[axis] == self.row_tokens]
        return axes[0] if tensor.shape[0] == self.num_rows and len(axes) == 1 else None

    def _tokens(self, tensor: Tensor) -> Tensor:
        axis = self._token_axis(tensor)
        assert axis is not None, "a tensor without the batch's rows was let through"
        tokens = tensor if axis == 0 else tensor.movedim(axis, 1)
        return tokens.reshape(self.num_rows * self.row_tokens, -1, tensor.shape[-1])
