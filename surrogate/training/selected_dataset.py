"""A dataset of fixed length that shows the texts selected for the present round, and a sampler for loaders of one's own.

A loader asks a dataset for its length once and copies it to its workers once, so neither can follow a selection that
changes. Here the length stays, and which texts stand at its places is kept in shared memory: `select` between two passes
over the loader is seen by every worker, whether it is forked, spawned or kept alive. Within a pass it would not be exact:
a loader is `1 + workers x prefetch` batches ahead of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from oracle.encoding import IGNORED
from oracle.errors import InputError, check_at_least, check_count
from surrogate.training.pool_texts import labels_of

Item = Any
UNKNOWN = -1  # tokens of a text that was not shown yet
ROTARY_OPTIONS = ("rope_parameters", "rope_theta", "rope_scaling")  # of configurations


class SelectedDataset(torch.utils.data.Dataset):
    """`num_items` places, filled from `base` with what was selected last.

    Without `row_tokens`, place i has the text at place i of the selection, which is repeated from its beginning where it
    has fewer texts. With `row_tokens`, the selected texts are joined in their order, again as often as needed, and cut into
    rows of equal length (`surrogate.training.loop.pack` joins them in the same way); a row is tokenised when it is asked
    for.

    Args:
        base: A map-style dataset (of torch, or a `datasets.Dataset`); for rows, items have `input_ids` and, unless all
            of them are predicted, `labels`.
        num_items: Items of one round; None if `resize` will say.
        row_tokens: Tokens of a packed row; None shows single texts.
        separator: Token after each packed text. With None nothing stands between two texts, and the first token of a
            text is not predicted.

    Example:
        >>> dataset = SelectedDataset(["a", "b", "c", "d"], 4)
        >>> dataset.select([2, 0, 3])
        >>> [dataset[place] for place in range(4)]
        ['c', 'a', 'd', 'c']
    """

    def __init__(
        self, base: Any, num_items: int | None = None, *, row_tokens: int | None = None, separator: int | None = None
    ) -> None:
        if separator is not None and row_tokens is None:
            raise InputError(
                f"separator={separator!r} without row_tokens.", "a separator only where texts are packed", "leave it out."
            )
        if row_tokens is not None:
            check_count("row_tokens", row_tokens, minimum=2)
        self.base, self.row_tokens, self.separator = base, row_tokens, separator
        self.num_items = 0
        # Of packed texts there may be any number up to the whole base, of single ones num_items.
        capacity = len(base) if row_tokens is not None else 0
        self._rows = torch.zeros(capacity, dtype=torch.long).share_memory_()
        self._starts = torch.zeros(capacity + 1, dtype=torch.long).share_memory_()  # of each text in the joined tokens
        self._num_selected = torch.zeros(1, dtype=torch.long).share_memory_()
        self._lengths = _unknown(base)
        if num_items is not None:
            self.resize(num_items)

    def resize(self, num_items: int) -> None:
        """Set the number of places; what was selected is forgotten. Loaders made before keep the old length."""
        check_at_least("num_items", num_items, 1)
        self.num_items = num_items
        if self.row_tokens is None:
            self._rows = torch.zeros(num_items, dtype=torch.long).share_memory_()
        self._num_selected.zero_()

    def select(self, rows: Sequence[int] | np.ndarray) -> None:
        """Fill the places with these rows of the base, in this order.

        Raises:
            InputError: There are none, more than places, or rows that the base has not; packed texts without any token.
        """
        chosen = torch.as_tensor(np.asarray(rows, dtype=np.int64))  # (K,)
        most = len(self._rows)
        if not 0 < len(chosen) <= most:
            raise InputError(
                f"{len(chosen)} rows for {most} places.",
                "from one row to as many as there are places",
                "select fewer texts, or make the dataset larger.",
            )
        if int(chosen.min()) < 0 or int(chosen.max()) >= len(self.base):
            raise InputError(
                f"rows from {int(chosen.min())} to {int(chosen.max())} of a dataset of {len(self.base)}.",
                f"rows from 0 to {len(self.base) - 1}",
                "pass a dataset whose row i is row i of the pool.",
            )
        self._rows[: len(chosen)] = chosen
        if self.row_tokens is not None:
            self._join(chosen.tolist())
        self._num_selected.fill_(len(chosen))

    def replace_base(self, base: Any, *, separator: int | None = None) -> None:
        """Show other items in the place of the base's, of the same texts or of some of them."""
        self.base, self.separator = base, separator
        self._lengths = _unknown(base)

    def forget_lengths(self) -> None:
        """Note that the base has other texts now."""
        self._lengths.fill_(UNKNOWN)

    def known_lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of rows of the base that this process or its workers have shown, (K,); `UNKNOWN` of the others."""
        return self._lengths.numpy()[rows].astype(np.int64)

    def read_lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of rows of the base, (K,), which are read for that; `UNKNOWN` of items without `input_ids`."""
        return np.array([_num_tokens(item) for item in _take(self.base, rows.tolist())], dtype=np.int64)

    @property
    def repeats(self) -> float:
        """How often a round shows what is selected."""
        count = int(self._num_selected)
        if self.row_tokens is None:
            return self.num_items / max(count, 1)
        return self.num_items * self.row_tokens / max(int(self._starts[count]), 1)

    @property
    def selected(self) -> np.ndarray:
        """The rows of the base that are selected (K,)."""
        return self._rows[: int(self._num_selected)].numpy().copy()

    def __len__(self) -> int:
        return max(self.num_items, 1)  # 1 until `resize`: a Trainer whose callback has not said more then fails at the first item

    def __getitem__(self, place: int) -> Item:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[Item]:
        count = int(self._num_selected)
        if not count:
            raise InputError(
                "an item of a dataset with nothing selected.",
                "a selection",
                "call select(rows) first; under a Trainer that is done by the InfluenceCallback, in callbacks=[...].",
            )
        for place in places:
            if not 0 <= place < self.num_items:
                raise IndexError(f"place {place} of {self.num_items}")
        if self.row_tokens is not None:
            return [self._packed_row(int(place), count) for place in places]
        rows = [int(self._rows[int(place) % count]) for place in places]
        items = _take(self.base, rows)
        self._lengths.numpy()[rows] = [_num_tokens(item) for item in items]
        return items

    # ------------------------------------------------------------------ packing

    def _join(self, rows: list[int], *, block: int = 1024) -> None:
        extra = 0 if self.separator is None else 1
        lengths: list[int] = []
        for start in range(0, len(rows), block):
            lengths += [len(item["input_ids"]) + extra for item in _take(self.base, rows[start : start + block])]
        self._starts[0] = 0
        self._starts[1 : len(rows) + 1] = torch.tensor(lengths).cumsum(0)
        if not int(self._starts[len(rows)]):
            raise InputError(f"{len(rows)} selected texts without a token.", "texts with tokens", "check the dataset's items.")

    def _packed_row(self, place: int, count: int) -> dict[str, list[int]]:
        """Join the texts that lie between the row's first and last token."""
        assert self.row_tokens is not None
        starts = self._starts[: count + 1].numpy()
        total = int(starts[-1])
        position = place * self.row_tokens % total
        index = int(np.searchsorted(starts, position, side="right")) - 1
        skipped = position - int(starts[index])
        needed, texts, found = skipped + self.row_tokens, [], 0
        while found < needed:
            texts.append(index)
            found += int(starts[index + 1] - starts[index])
            index = (index + 1) % count
        ids: list[int] = []
        labels: list[int] = []
        for item in _take(self.base, [int(self._rows[text]) for text in texts]):
            own_ids, own_labels = list(item["input_ids"]), labels_of(item)
            if self.separator is None:
                ids += own_ids
                labels += [IGNORED, *own_labels[1:]] if own_labels else []
            else:
                ids += [*own_ids, self.separator]
                labels += [*own_labels, self.separator]
        chosen = slice(skipped, needed)
        return {"input_ids": ids[chosen], "labels": labels[chosen]}


def _num_tokens(item: Item) -> int:
    return len(item["input_ids"]) if isinstance(item, Mapping) and "input_ids" in item else UNKNOWN


def _unknown(base: Any) -> torch.Tensor:
    return torch.full((len(base),), UNKNOWN, dtype=torch.int32).share_memory_()


def _take(base: Any, rows: list[int]) -> list[Item]:
    """Return several items, at one go where the dataset can."""
    if hasattr(base, "__getitems__"):
        return list(base.__getitems__(rows))
    return [base[row] for row in rows]


def check_row_tokens(row_tokens: int | None, config: Any) -> None:
    """Refuse packed rows that are longer than a model with learned positions has; others run beyond their context.

    Args:
        row_tokens: Tokens of a row.
        config: The model's configuration, or None.

    Raises:
        InputError: They are.
    """
    context = getattr(config, "max_position_embeddings", None)
    is_rotary = any(getattr(config, name, None) is not None for name in ROTARY_OPTIONS)
    if row_tokens is not None and context is not None and not is_rotary and row_tokens > context:
        raise InputError(
            f"row_tokens={row_tokens}, and the model's context is {context} tokens.",
            f"rows of up to {context} tokens",
            "pass fewer row_tokens.",
        )


class SelectedSampler(torch.utils.data.Sampler):
    """Yields the rows of the pool that are selected, for a loader of one's own over a dataset whose row i is pool row i.

    Every pass over it is a round: `select` before `iter(loader)`, never within. Each process gets its own part, of the
    same length; the selection is repeated from its beginning where it has fewer rows.

    Args:
        num_items: Rows per pass, over all processes.
        shuffle: Mix the rows anew in every round; False keeps their order, best first.
        seed: Decides how they are mixed.
        rank: Number of this process.
        world_size: How many processes there are.

    Example:
        >>> sampler = SelectedSampler(4, shuffle=False)
        >>> sampler.select([7, 1, 5], index=0)
        >>> list(sampler)
        [7, 1, 5, 7]
    """

    def __init__(self, num_items: int, *, shuffle: bool = True, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        check_at_least("num_items", num_items, 1)
        if num_items % world_size or not 0 <= rank < world_size:
            raise InputError(
                f"num_items={num_items} for process {rank} of {world_size}.",
                "a multiple of the number of processes, and a rank below it",
                "choose another number of items per round.",
            )
        self.num_items, self.shuffle, self.seed, self.rank, self.world_size = num_items, shuffle, seed, rank, world_size
        self._order = np.zeros(0, dtype=np.int64)

    def select(self, rows: Sequence[int] | np.ndarray, *, index: int, skip: int = 0) -> None:
        """Take these rows for the next pass.

        Args:
            rows: Rows of the pool, best first.
            index: Number of the round, which decides how they are mixed.
            skip: Leave out as many of this process's rows at the beginning: training is resumed within the round.
        """
        chosen = np.asarray(rows, dtype=np.int64)
        if not 0 < len(chosen) <= self.num_items:
            raise InputError(
                f"{len(chosen)} rows for {self.num_items} places.",
                "from one row to as many as there are places",
                "select fewer texts, or make the round longer.",
            )
        order = mixed(self.num_items, index=index, seed=self.seed) if self.shuffle else np.arange(self.num_items)
        self._order = chosen[order % len(chosen)][self.rank :: self.world_size][skip:]

    def __iter__(self) -> Iterator[int]:
        if not len(self._order):
            raise InputError("a pass over a sampler with nothing selected.", "a selection", "call select(rows, index=...) first.")
        return iter(self._order.tolist())

    def __len__(self) -> int:
        return len(self._order) if len(self._order) else self.num_items // self.world_size


def mixed(num_items: int, *, index: int, seed: int) -> np.ndarray:
    """Return the places of a round in an order that follows from its number and the seed."""
    return np.random.default_rng([seed, index]).permutation(num_items)
