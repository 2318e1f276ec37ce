"""The dataset that shows what is selected: places, packing, workers; and the sampler for loaders of one's own."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch

from oracle.encoding import IGNORED, EncodedText
from oracle.errors import InputError
from surrogate.training import SelectedDataset, SelectedSampler
from surrogate.training.loop import pack
from surrogate.training.selected_dataset import UNKNOWN

BASE = [{"input_ids": [10 * row + place for place in range(1 + row % 4)]} for row in range(12)]


class Labelled(torch.utils.data.Dataset):
    """Texts with labels; of each the first is not predicted, as in a completion."""

    def __init__(self, lengths):
        self.texts = [[100 * row + place for place in range(length)] for row, length in enumerate(lengths)]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, row):
        ids = self.texts[row]
        return {"input_ids": ids, "labels": [IGNORED if place == 1 else token for place, token in enumerate(ids)]}


def joined(base, rows, *, num_tokens, separator):
    """The selected texts one after the other, again and again, token by token."""
    ids, labels = [], []
    while len(ids) < num_tokens:
        for row in rows:
            item = base[row]
            own = list(item["labels"])
            if separator is None:
                own = [IGNORED, *own[1:]] if own else []
            ids += [*item["input_ids"], *([] if separator is None else [separator])]
            labels += [*own, *([] if separator is None else [separator])]
    return ids[:num_tokens], labels[:num_tokens]


def test_places_have_the_selected_texts_in_order_and_again_from_the_beginning():
    for base in (BASE, datasets.Dataset.from_list(BASE)):
        dataset = SelectedDataset(base, 5)
        dataset.select([7, 2, 9])
        assert [dataset[place]["input_ids"][0] for place in range(5)] == [70, 20, 90, 70, 20]
        assert dataset.selected.tolist() == [7, 2, 9] and len(dataset) == 5
        dataset.select(np.array([0, 1, 2, 3, 4]))
        assert [item["input_ids"][0] for item in dataset.__getitems__([4, 0])] == [40, 0]


@pytest.mark.parametrize("separator", [None, 5])
@pytest.mark.parametrize("rows", [[3, 0, 6, 1], [5], [2, 4, 2]])
def test_packed_rows_are_the_selected_texts_joined_token_by_token(rows, separator):
    base = Labelled([3, 1, 2, 9, 0, 4, 25])
    dataset = SelectedDataset(base, 7, row_tokens=6, separator=separator)
    dataset.select(rows)
    items = [dataset[place] for place in range(7)]
    ids, labels = joined(base, rows, num_tokens=42, separator=separator)
    assert [token for item in items for token in item["input_ids"]] == ids
    assert [token for item in items for token in item["labels"]] == labels


@pytest.mark.parametrize("separator", [None, 5])
def test_packing_joins_like_the_plain_loop(separator):
    base = Labelled([3, 4, 2, 9])
    texts = [EncodedText(str(row), **base[row]) for row in range(4)]
    order = np.random.default_rng(3).permutation(4)  # the order that pack draws for its first pass
    dataset = SelectedDataset(base, 3, row_tokens=5, separator=separator)
    dataset.select(order)
    found = [[item["input_ids"], item["labels"]] for item in dataset.__getitems__(range(3))]
    expected = pack(texts, num_rows=3, row_tokens=5, separator=separator, seed=3)
    np.testing.assert_array_equal(np.array(found).swapaxes(0, 1), expected)


def test_without_labels_every_packed_token_is_predicted():
    dataset = SelectedDataset(BASE, 2, row_tokens=4, separator=5)
    dataset.select([3])
    assert dataset[0] == {"input_ids": [30, 31, 32, 33], "labels": [30, 31, 32, 33]}


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4}], ids=str
)
@pytest.mark.parametrize("packing", [{}, {"row_tokens": 2, "separator": 5}], ids=["texts", "packed"])
def test_a_selection_between_two_passes_reaches_every_worker(options, packing):
    dataset = SelectedDataset(BASE, 8, **packing)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=list, **options)
    for rows in ([3, 7], [11, 1, 5], [0, 1, 2, 3, 4, 5, 6, 7]):
        dataset.select(rows)
        seen = [item for batch in loader for item in batch]
        assert seen == [dataset[place] for place in range(8)]
        assert {item["input_ids"][0] // 10 for item in seen} <= {*rows, 0}


@pytest.mark.slow
def test_a_selection_reaches_spawned_workers_that_are_kept_alive():
    dataset = SelectedDataset(BASE, 4)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, collate_fn=list, num_workers=1, persistent_workers=True, multiprocessing_context="spawn"
    )
    for rows in ([3, 7], [11, 1, 5]):
        dataset.select(rows)
        assert [item for batch in loader for item in batch] == [dataset[place] for place in range(4)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_lengths_of_what_was_shown_are_known_whichever_worker_showed_it(workers):
    dataset = SelectedDataset(BASE, 4)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=list, num_workers=workers)
    dataset.select([3, 7, 6])
    assert (dataset.known_lengths(np.arange(12)) == UNKNOWN).all()
    list(loader)
    expected = np.full(12, UNKNOWN)
    expected[[3, 7, 6]] = [4, 4, 3]
    np.testing.assert_array_equal(dataset.known_lengths(np.arange(12)), expected)
    np.testing.assert_array_equal(dataset.read_lengths(np.array([0, 5])), [1, 2])
    dataset.forget_lengths()
    assert (dataset.known_lengths(np.arange(12)) == UNKNOWN).all()
    dataset.replace_base([{"text": "a"}] * 5)
    dataset.select([4])
    assert dataset[0] == {"text": "a"}
    assert dataset.known_lengths(np.array([4])) == dataset.read_lengths(np.array([4])) == UNKNOWN


def test_how_often_a_selection_is_shown():
    dataset = SelectedDataset(BASE, 6)
    dataset.select([1, 2, 3, 4])
    assert dataset.repeats == 1.5
    packed = SelectedDataset(BASE, 6, row_tokens=2)
    packed.select([3, 1])
    assert packed.repeats == 2.0  # twelve tokens of the six


def test_what_cannot_be_selected_is_refused():
    dataset = SelectedDataset(BASE, 3)
    with pytest.raises(InputError, match="nothing selected"):
        dataset[0]
    for rows, given in (
        ([], "0 rows"),
        ([0, 1, 2, 3], "4 rows for 3 places"),
        ([12], "to 12 of a dataset of 12"),
        ([-1], "from -1"),
    ):
        with pytest.raises(InputError, match=given):
            dataset.select(rows)
    dataset.select([1])
    with pytest.raises(IndexError):
        dataset[3]
    with pytest.raises(InputError, match="num_items"):
        SelectedDataset(BASE, 0)
    with pytest.raises(InputError, match="separator=5 without"):
        SelectedDataset(BASE, 3, separator=5)
    with pytest.raises(InputError, match="row_tokens"):
        SelectedDataset(BASE, 3, row_tokens=1)
    empty = SelectedDataset(Labelled([0, 0]), 3, row_tokens=4)
    with pytest.raises(InputError, match="without a token"):
        empty.select([0, 1])


def test_a_new_length_forgets_the_selection():
    dataset = SelectedDataset(BASE, 3)
    dataset.select([1])
    dataset.resize(6)
    assert len(dataset) == 6 and not len(dataset.selected)
    dataset.select([1, 2, 3, 4, 5, 6])


def test_the_samplers_of_all_processes_yield_every_place_once():
    def parts(*, skip):
        samplers = [SelectedSampler(8, seed=3, rank=rank, world_size=2) for rank in range(2)]
        for sampler in samplers:
            sampler.select([4, 9, 2, 7, 1], index=5, skip=skip)
            assert len(sampler) == 4 - skip
        return [list(sampler) for sampler in samplers]

    first, second = parts(skip=0)
    assert sorted(first + second) == sorted([4, 9, 2, 7, 1, 4, 9, 2])
    assert parts(skip=2) == [first[2:], second[2:]]


def test_the_order_of_a_sampler_follows_from_seed_and_round_alone():
    def order(*, seed=0, index=0, **options):
        sampler = SelectedSampler(6, seed=seed, **options)
        sampler.select([5, 4, 3, 2, 1, 0], index=index)
        torch.manual_seed(index)
        return list(sampler)

    assert order() == order() != order(index=1)
    assert order() != order(seed=1)
    assert order(shuffle=False) == [5, 4, 3, 2, 1, 0]


def test_samplers_refuse_what_they_cannot_share_out():
    with pytest.raises(InputError, match="nothing selected"):
        iter(SelectedSampler(4))
    with pytest.raises(InputError, match="process 0 of 3"):
        SelectedSampler(4, world_size=3)
    with pytest.raises(InputError, match="5 rows for 4"):
        SelectedSampler(4).select(range(5), index=0)
