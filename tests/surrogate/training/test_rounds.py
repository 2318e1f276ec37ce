"""Rounds in a plain loop: exact resume, exact accounts, refreshes that leave training alone."""

from __future__ import annotations

import copy
import json
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import oracle
from oracle.errors import InputError, InputTypeError, MismatchError, MissingFileError, NotFiniteError
from surrogate.scores import Scores
from surrogate.training import InfluenceCallback, Refresher, Rounds, WeightAverage, held_files
from surrogate.training.pool_texts import PoolTexts, collate
from surrogate.training.refresher import EmptyAverageWarning
from surrogate.training.round_feed import RoundCountWarning
from surrogate.training.round_reports import NoMetricWarning, RefreshFailedWarning, SmallPoolWarning, metrics_of
from surrogate.training.selected_dataset import mixed
from surrogate.training.strategies import Ranking
from tests.surrogate.training.conftest import ByFingerprint


class Training:
    """A training with dropout, and everything that it has to save."""

    def __init__(self, make_module, pool, workdir, *, strategy=None, refresher_options=None, **options):
        torch.manual_seed(0)
        self.module = make_module("llama", attention_dropout=0.2)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2)
        lm = oracle.LanguageModel(self.module, optimizer=self.optimizer, max_tokens=64, device="cpu")
        strategy = strategy or ByFingerprint()
        self.refresher = Refresher(pool, workdir=workdir, strategy=strategy, **(refresher_options or {}))
        self.rounds = Rounds(
            self.refresher, lm, **{"every": 3, "batch_size": 2, "max_steps": 8, "grad_accumulation": 2, **options}
        )
        self.batches, self.saved = [], {}

    def run(self, *, save_at=()):
        self.module.train()
        for batch in self.rounds:
            self.batches.append({name: tensor.clone() for name, tensor in batch.items()})
            (self.module(**batch).loss / self.rounds.grad_accumulation).backward()
            if self.rounds.completes_step:
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.rounds.step in save_at:
                    self.saved[self.rounds.step] = copy.deepcopy(self.state())
        return self

    def state(self):
        parts = {"module": self.module, "optimizer": self.optimizer, "rounds": self.rounds}
        return {**{name: part.state_dict() for name, part in parts.items()}, "random": torch.get_rng_state()}

    def load(self, state):
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.rounds.load_state_dict(state["rounds"])
        torch.set_rng_state(state["random"])
        return self

    def weights(self):
        return {name: tensor.clone() for name, tensor in self.module.state_dict().items()}


@pytest.fixture
def pool(make_token_texts):
    return make_token_texts(64, seed=5)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def chosen(training):
    return [training.refresher.round_at(index).text_ids for index in range(training.refresher.num_rounds_done)]


@pytest.mark.parametrize("options", [{}, {"row_tokens": 16}, {"loader_options": {"num_workers": 2}}], ids=str)
def test_a_resumed_loop_sees_the_batches_and_ends_with_the_weights_of_an_uninterrupted_one(options, make_module, pool, tmp_path):
    whole = Training(make_module, pool, tmp_path / "whole", **options).run(save_at=(2, 3, 5))
    assert len(whole.batches) == 16 and whole.refresher.num_rounds_done == 3
    for step, state in whole.saved.items():
        again = Training(make_module, pool, tmp_path / "whole", **options).load(state).run()
        assert all(map(same, again.batches, whole.batches[2 * step :])) and len(again.batches) == 16 - 2 * step
        assert same(again.weights(), whole.weights()) and chosen(again) == chosen(whole)


def test_the_rounds_of_an_older_checkpoint_are_made_again_in_the_same_way(make_module, pool, tmp_path):
    whole = Training(make_module, pool, tmp_path / "whole").run(save_at=(2,))
    for file in (tmp_path / "whole").glob("round-0000[12]/round.json"):
        file.unlink()
    again = Training(make_module, pool, tmp_path / "whole").load(whole.saved[2]).run()
    assert same(again.weights(), whole.weights()) and chosen(again) == chosen(whole)


@pytest.mark.parametrize(
    "loader", [{"num_workers": 2}, {"num_workers": 1, "persistent_workers": True, "prefetch_factor": 4}], ids=str
)
def test_workers_change_nothing(loader, make_module, pool, tmp_path):
    alone = Training(make_module, pool, tmp_path / "alone").run()
    other = Training(make_module, pool, tmp_path / "other", loader_options=loader).run()
    assert all(map(same, other.batches, alone.batches)) and same(other.weights(), alone.weights())


def test_each_step_trains_on_the_texts_of_its_round_and_on_each_of_them_once(make_module, pool, tmp_path):
    training = Training(make_module, pool, tmp_path, max_steps=6).run()
    ids = {text_id: row["input_ids"] for text_id, row in zip(training.refresher.text_ids, pool, strict=True)}
    shown = []
    for index in range(2):
        batches = training.batches[6 * index : 6 * index + 6]
        rows = [
            row[mask.bool()].tolist()
            for batch in batches
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert sorted(rows) == sorted(ids[text_id] for text_id in training.refresher.round_at(index).text_ids)
        shown += rows
    assert len(shown) == len({tuple(row) for row in shown}) == 24  # each text once in a pass over the pool


def test_texts_come_again_when_that_is_wanted_or_when_the_pool_is_spent(make_module, pool, tmp_path):
    again = Training(make_module, pool, tmp_path / "again", refresher_options={"consume_once": False, "rule": "top"}).run()
    rounds = chosen(again)
    assert len({text_id for round_ in rounds for text_id in round_}) < sum(map(len, rounds))
    small = Training(make_module, pool[:20], tmp_path / "small").run()
    assert [record["starts_pass"] for record in small.refresher.table()] == [False, True, False]
    with pytest.warns(SmallPoolWarning):
        tiny = Training(make_module, pool[:5], tmp_path / "tiny", max_steps=3).run()
    assert len(tiny.batches) == 6 and len(tiny.refresher.round_at(0).text_ids) == 5


def test_gradient_accumulation_cuts_the_same_steps_out_of_a_round(make_module, pool, tmp_path):
    def steps(workdir, *, batch_size, grad_accumulation):
        training = Training(
            make_module, pool, tmp_path / workdir, strategy="random", batch_size=batch_size, grad_accumulation=grad_accumulation
        )
        counts = []
        for batch in training.rounds:
            counts.append((training.rounds.step, training.rounds.completes_step, batch["input_ids"].shape[0]))
        rows = [tuple(row) for row in training.rounds._places(1)]
        return counts, np.array(rows).reshape(-1, 4)

    whole, places = steps("whole", batch_size=4, grad_accumulation=1)
    parts, same_places = steps("parts", batch_size=2, grad_accumulation=2)
    assert whole == [(step, True, 4) for step in range(1, 9)]
    assert parts == [(step - 1 + half, bool(half), 2) for step in range(1, 9) for half in (0, 1)]
    np.testing.assert_array_equal(np.sort(places), np.sort(same_places))


def test_a_refresh_leaves_model_optimiser_random_state_and_gradients_as_they_were(make_module, pool, tmp_path):
    training = Training(make_module, pool, tmp_path, strategy="loss")
    scheduler = torch.optim.lr_scheduler.LinearLR(training.optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    training.module.train()
    training.module(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    training.optimizer.step()

    def state():
        return {
            **copy.deepcopy(training.state()),
            "scheduler": copy.deepcopy(scheduler.state_dict()),
            "scaler": scaler.state_dict(),
            "numpy": np.random.get_state()[1].tolist(),
            "grads": [parameter.grad.clone() for parameter in training.module.parameters()],
            "modes": [child.training for child in training.module.modules()],
        }

    before = state()
    training.rounds.feed.enter(0, training.rounds.lm)
    after = state()
    for side in (before, after):
        side.pop("rounds")
    assert training.refresher.table()[0]["refreshed"]
    flat = [dict(torch.utils._pytree.tree_leaves_with_path(side)) for side in (before, after)]
    assert flat[0].keys() == flat[1].keys()
    for path, value in flat[0].items():
        other = flat[1][path]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, path


def test_a_refresh_that_fails_is_told_and_training_goes_on_or_stops(make_module, pool, tmp_path):
    for on_failure in ("continue", "stop"):
        options = {"strategy": ByFingerprint(fails_in=1), "refresher_options": {"on_failure": on_failure}}
        training = Training(make_module, pool, tmp_path / on_failure, **options)
        if on_failure == "stop":
            with pytest.raises(NotFiniteError):
                training.run()
            assert training.rounds.step == 3
            continue
        with pytest.warns(RefreshFailedWarning, match="refresh at step 3 failed.*NaN"):
            training.run()
        first, second, third = training.refresher.table()
        assert "NaN" in second["failure"] and second["ranked_in_round"] == 0 and third["ranked_in_round"] == 2
        assert first["failure"] is None and training.rounds.step == 8


def test_tokens_and_seconds_of_training_are_counted(make_module, pool, tmp_path):
    training = Training(make_module, pool, tmp_path / "texts").run()
    state = training.rounds.state_dict()["feed"]
    assert state["seconds"] > 0
    num_tokens = int(sum(batch["attention_mask"].sum() for batch in training.batches[:6]))
    flops = training.refresher.table()[1]["account"]["trained"]["flops"]
    assert flops == pytest.approx(3 * training.rounds.lm.forward_flops_per_token * num_tokens)
    packed = Training(make_module, pool, tmp_path / "packed", row_tokens=16).run()
    assert packed.rounds.state_dict()["feed"]["tokens_before"] == 2 * 12 * 16
    assert all(batch["input_ids"].shape == (2, 16) and batch["attention_mask"].all() for batch in packed.batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_text_is_tokenised_once_more_to_be_counted(workers, make_module, pool, tmp_path, monkeypatch):
    """Also not where a loader's workers have tokenised it."""
    asked, original = [], PoolTexts.encode
    monkeypatch.setattr(PoolTexts, "encode", lambda texts, rows: asked.append(len(rows)) or original(texts, rows))
    training = Training(make_module, pool, tmp_path, max_steps=6, loader_options={"num_workers": workers}).run()
    assert asked[0] == 64 and sum(asked[1:]) == (4 * 6 if workers == 0 else 0)  # first for the mean length
    assert training.rounds.state_dict()["feed"]["rounds_counted"] == 2


def test_the_account_of_a_whole_training_is_written_down(make_module, pool, tmp_path):
    training = Training(make_module, pool, tmp_path, strategy="random").run()  # eight steps, in rounds of three
    account = json.loads((tmp_path / "overhead.json").read_text())
    num_tokens = [int(batch["attention_mask"].sum()) for batch in training.batches]
    shown = sum(num_tokens[:12]) + training.rounds.feed._tokens_of(2) * 2 / 3
    assert account["trained"]["flops"] == pytest.approx(3 * training.rounds.lm.forward_flops_per_token * shown)
    assert account["is_kept"] is None and account["stages"]["rest"]["seconds"] > 0
    # A training that has come to its end was as long as it was, not as long as the pool's mean text had made it out.
    assert account["share_of_planned_training"] == pytest.approx(account["share_of_training_so_far"])


def test_a_loop_that_is_left_closes_its_account_and_can_be_gone_on_with(make_module, pool, tmp_path):
    whole = Training(make_module, pool, tmp_path / "whole", strategy="random").run()
    training = Training(make_module, pool, tmp_path / "left", strategy="random")
    number, batches = len(held_files._held), []
    for batch in training.rounds:
        batches.append(batch)
        assert len(held_files._held) == number + 1
        if training.rounds.step == 4:
            break
    assert len(held_files._held) == number
    trained = json.loads((tmp_path / "left/overhead.json").read_text())["trained"]["flops"]
    assert trained == pytest.approx(
        3 * training.rounds.lm.forward_flops_per_token * training.rounds.feed._tokens_of(0) * 4 / 3, rel=0.3
    )
    batches += list(training.rounds)
    assert all(map(same, batches, whole.batches)) and len(batches) == len(whole.batches)


def test_an_average_of_nothing_is_told(make_module, pool, tmp_path):
    training = Training(make_module, pool, tmp_path / "none")
    training.rounds.feed.average = WeightAverage(training.module, decay=0.9)
    with pytest.warns(EmptyAverageWarning, match=r"no weights after 3 steps.*average\.watch\(optimizer\)"):
        training.run()
    training = Training(make_module, pool, tmp_path / "watched")
    training.rounds.feed.average = average = WeightAverage(training.module, decay=0.9)
    average.watch(training.optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EmptyAverageWarning)
        training.run()


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (None, "the model has no optimiser"),
        (torch.optim.RMSprop, "the optimiser RMSprop"),
        (torch.optim.SGD, None),
        (torch.optim.AdamW, None),
    ],
    ids=["none", "RMSprop", "SGD", "AdamW"],
)
def test_labels_without_the_metric_of_the_optimiser_are_told(optimizer, told, make_module, pool, tmp_path):
    options = {"sample_size": 20, "num_probe": 0, "encoder": ("hashed_ngrams",), "num_folds": 2, "allow_low_fidelity": True}
    training = Training(
        make_module, pool, tmp_path, strategy="refresh", refresher_options={"targets": {"goal": pool[:4]}, **options}
    )
    training.rounds.lm.optimizer = None if optimizer is None else optimizer(training.module.parameters(), lr=1e-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training.run()
    found = [str(warning.message) for warning in caught if warning.category is NoMetricWarning]
    assert [told in text for text in found] == ([] if told is None else [True])  # once, of three rounds
    wish = {"method_options": {"preconditioner": "none"}, "targets": {"goal": pool[:4]}, **options}
    plain = Training(make_module, pool, tmp_path / "plain", strategy="refresh", refresher_options=wish)
    plain.rounds.lm.optimizer = None
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoMetricWarning)
        plain.run()


def test_the_training_to_come_is_planned_by_the_texts_that_were_chosen(make_module, pool, tmp_path):
    class Shortest(ByFingerprint):
        def rank(self, context):
            lengths = np.array([len(pool[row]["input_ids"]) for row in context.candidates], dtype=np.float32)
            ids = [context.pool["text_id"][row] for row in context.candidates]
            return Ranking(scores=Scores(-lengths[:, None], text_ids=ids, target_names=["x"]))

    training = Training(make_module, pool, tmp_path, strategy=Shortest(), refresher_options={"rule": "top"})
    planned = []
    for _ in training.rounds:
        if training.refresher.overhead.planned_flops not in planned:
            planned.append(training.refresher.overhead.planned_flops)
    shown = training.rounds.feed._tokens_before / 2  # of a round
    per_token = 3 * training.rounds.lm.forward_flops_per_token
    assert planned[0] > 1.3 * planned[1]  # the pool's mean; the first round's
    assert planned[2] == pytest.approx(per_token * shown * 8 / 3, rel=1e-6)


def test_a_pool_smaller_than_a_round_is_told_once(make_module, pool, tmp_path):
    for options in ({}, {"row_tokens": 16}):
        training = Training(make_module, pool[:5], tmp_path / str(len(options)), strategy="random", **options)
        with pytest.warns(SmallPoolWarning, match="shows each of its 5 texts") as told:
            training.run()
        assert len([warning for warning in told if warning.category is SmallPoolWarning]) == 1


def test_an_optimiser_that_accelerate_has_wrapped_is_refused_before_the_first_label(make_module, pool, tmp_path):
    """`grad_dot` would find no state in it, and go on as without an optimiser."""
    training = Training(make_module, pool, tmp_path)
    training.rounds.lm.optimizer = SimpleNamespace(optimizer=training.optimizer)
    with pytest.raises(InputError, match=r"SimpleNamespace around another one[\s\S]*optimizer\.optimizer"):
        training.run()


def test_things_of_another_kind_are_refused(make_module, pool, tmp_path):
    training = Training(make_module, pool, tmp_path, strategy="random")
    for wrong in ((pool, training.rounds.lm), (training.refresher, training.module)):
        with pytest.raises(InputTypeError, match="a Refresher or StreamRefresher, and an"):
            Rounds(*wrong, every=3, batch_size=2, max_steps=8)


def test_a_packed_round_is_filled_by_as_many_texts_as_it_needs(make_module, pool, tmp_path):
    training = Training(make_module, pool, tmp_path, row_tokens=16, max_steps=3).run()
    lengths = dict(zip(training.refresher.text_ids, (len(row["input_ids"]) for row in pool), strict=True))
    num_tokens = sum(lengths[text_id] for text_id in training.refresher.round_at(0).text_ids)
    assert 12 * 16 - 40 <= num_tokens <= 12 * 16  # the longest text has 40 tokens


def test_a_packed_round_of_ones_own_items_is_filled_by_their_tokens(make_module, pool, tmp_path):
    own = [{"input_ids": row["input_ids"][:4]} for row in pool]
    training = Training(make_module, pool, tmp_path, strategy="random", base=own, row_tokens=8, max_steps=3).run()
    rows = training.refresher.round_at(0).rows
    joined = [token for row in rows for token in own[row]["input_ids"]]
    assert 12 * 8 - 4 <= len(joined) <= 12 * 8
    shown = [row for batch in training.batches for row in batch["input_ids"].tolist()]
    places = mixed(12, index=0, seed=0)
    packed = [token for _, row in sorted(zip(places.tolist(), shown, strict=True)) for token in row]
    assert packed[: len(joined)] == joined  # nothing stands between them


def test_the_metrics_of_a_round_are_flat_numbers(make_module, pool, make_token_texts, tmp_path):
    training = Training(make_module, pool, tmp_path, strategy="random", max_steps=1).run()
    assert training.rounds.present.index == 0
    metrics = training.rounds.metrics()
    assert metrics["influence/round"] == 0.0 and metrics["influence/texts"] == 12.0
    assert all(isinstance(value, float) for value in metrics.values())
    told = {**training.refresher.table()[0], "fidelity": {"math": 0.5}, "drift": {"labels": 0.25}, "overhead": {"flops": None}}
    assert metrics_of(told)["influence/fidelity/math"] == 0.5 and metrics_of(told)["influence/drift"] == 0.25
    assert "influence/overhead/flops" not in metrics_of(told)


def test_a_dataset_of_ones_own_is_trained_on(make_module, pool, tmp_path):
    own = [{"input_ids": [3 + row % 50] * 3, "labels": [3 + row % 50] * 3} for row in range(64)]
    training = Training(make_module, pool, tmp_path, strategy="random", base=own, max_steps=3).run()
    rows = training.refresher.round_at(0).rows
    seen = sorted(int(row[0]) for batch in training.batches for row in batch["input_ids"])
    assert seen == sorted(3 + int(row) % 50 for row in rows)


@pytest.mark.parametrize("wrong", ["longer", "shuffled"])
def test_items_that_are_not_those_of_the_pools_texts_are_refused(wrong, make_module, pool, tmp_path):
    texts = oracle.read_texts(pool)
    own = [*pool[:3], *pool] if wrong == "longer" else texts.select(range(63, -1, -1))
    with pytest.raises(InputError, match=f"base of {len(own)} items"):
        Training(make_module, pool, tmp_path, strategy="random", base=own)
    with pytest.raises(InputError, match=f"base of {len(own)} items"):
        InfluenceCallback(pool, every=3, workdir=tmp_path, strategy="random", base=own)
    Training(make_module, pool, tmp_path, strategy="random", base=texts)
    with pytest.raises(InputError, match=r"(?s)items have no input_ids \(text\)"):
        Training(make_module, pool, tmp_path, strategy="random", base=[{"text": "a"}] * 64)
    with pytest.raises(InputTypeError, match="base=generator, which has no length"):
        Training(make_module, pool, tmp_path, strategy="random", base=iter(texts))


def test_seconds_are_those_of_the_loop_and_its_data_but_for_pauses(make_module, pool, tmp_path):
    def collate_slowly(items):
        time.sleep(0.05)
        return collate(items)

    rounds = Training(make_module, pool, tmp_path, strategy="random", max_steps=2, collate_fn=collate_slowly).rounds
    for _ in rounds:
        time.sleep(0.05)
        with rounds.paused():
            time.sleep(1.0)
    assert 4 * 0.1 <= rounds.state_dict()["feed"]["seconds"] < 1.0


def test_another_number_of_rounds_than_the_refresher_was_told_is_said(make_module, pool, tmp_path):
    with pytest.warns(RoundCountWarning, match=r"num_rounds=2, and 8 steps in rounds of every=3 are 3 rounds.*Pass every=4"):
        Training(make_module, pool, tmp_path, strategy="random", refresher_options={"num_rounds": 2})


def test_a_checkpoint_is_resumed_only_as_itself(make_module, pool, tmp_path):
    state = Training(make_module, pool, tmp_path / "run").run(save_at=(5,)).saved[5]
    for options, difference in (
        ({"every": 4}, "every=3, and now every=4"),
        ({"batch_size": 3}, "num_items=12, and now num_items=18"),
        ({"seed": 1}, "seed=0, and now seed=1"),
        ({"shuffle": False}, "shuffle=True, and now shuffle=False"),
        ({"row_tokens": 16}, "row_tokens=None, and now row_tokens=16"),
    ):
        with pytest.raises(MismatchError, match=difference):
            Training(make_module, pool, tmp_path / "run", **options).load(state)
    with pytest.raises(MissingFileError):
        Training(make_module, pool, tmp_path / "elsewhere").load(state)
    Training(make_module, pool, tmp_path / "other", refresher_options={"seed": 1}).run()
    with pytest.raises(MismatchError, match="not those of the checkpoint"):
        Training(make_module, pool, tmp_path / "other", refresher_options={"seed": 1}).load(state)


def test_options_that_cannot_be_used_are_refused(make_module, pool, tmp_path):
    for options, given in (
        ({"every": 0}, "every"),
        ({"max_steps": 0}, "max_steps"),
        ({"loader_options": {"shuffle": True}}, "shuffle"),
    ):
        with pytest.raises(InputError, match=given):
            Training(make_module, pool, tmp_path, **options)
