"""Gradient norms of a weight that an embedding and an output head share, without a text's gradient of either being kept.

A text's gradient is E + H: E from the rows that are looked up, H from the linear layer. Its norm is that of both and twice
<E, H>. H has as many entries as the weight, so keeping it for a batch until E comes by, last of all, would take a copy of
the largest weight for every text. But E has rows e_t at the tokens' ids only, and H = sum_s b_s x_s', so

    <E, H> = sum_st b_s[id_t] (e_t' x_s),

for which b at the text's own ids and x are enough: (T, T) and (T, F) numbers for T tokens. Any other way of sharing a
weight adds the whole gradients up (`GradientProducts.add_norm`).
"""

from __future__ import annotations

from torch import Tensor

from oracle.gradients.text_layout import TextLayout


class TiedNorms:
    """What one batch's head leaves behind for the embedding.

    Args:
        layout: Where the batch's texts are.
    """

    def __init__(self, layout: TextLayout) -> None:
        self.layout = layout
        self._ids: dict[str, list[Tensor]] = {}  # parameter -> ids (R, M, 1) of every use as an embedding
        self._heads: dict[str, list[tuple[slice, Tensor, Tensor]]] = {}  # texts, x (b, S, F), b at own ids (b, S, T)

    def note_ids(self, name: str, ids: Tensor) -> None:
        """Note in the forward pass that an embedding looks up ids (R, M, 1)."""
        self._ids.setdefault(name, []).append(ids)

    def is_pair(self, name: str, num_uses: int) -> bool:
        """Whether a linear layer that uses the parameter shares it with one embedding and with nothing else."""
        return num_uses == 2 and len(self._ids.get(name, [])) == 1

    def keep(self, name: str, texts: slice, *, x: Tensor, b: Tensor) -> None:
        """Keep what the linear layer of a pair had for some texts: its inputs x (b, S, F), and b (b, S, V) at its outputs."""
        ids = self.layout.by_text(self._ids[name][0], texts).transpose(1, 2)  # (b, 1, T)
        own = b.gather(2, ids.expand(-1, b.shape[1], -1)).float()  # (b, S, T)
        self._heads.setdefault(name, []).append((texts, x.float(), own))

    def is_kept(self, name: str) -> bool:
        """Whether the linear layer of a pair has come by."""
        return name in self._heads

    def products(self, name: str, rows: Tensor) -> list[tuple[slice, Tensor]]:
        """Return <E, H> (b,) of groups of texts, for rows (R, M, F) that add up to E at the ids that were looked up."""
        found = []
        for texts, x, own in self._heads[name]:
            moved = x @ self.layout.by_text(rows, texts).transpose(1, 2)  # (b, S, T)
            found.append((texts, (moved * own).double().sum((1, 2))))
        return found
