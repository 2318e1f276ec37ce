"""The refresher: rounds that follow from content and state, texts offered once, refreshes when due, failures survived."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from oracle.errors import InputError, MismatchError, MissingFileError, NotFiniteError, TooLittleMemoryError
from oracle.labels import Labels
from oracle.language_model import LanguageModel
from oracle.texts import list_text_ids, read_texts
from surrogate.fidelity import measure_fidelity
from surrogate.scores import Scores
from surrogate.training.refresher import Refresher
from surrogate.training.round_store import ReplacedRoundsWarning
from surrogate.training.schedule import Schedule
from surrogate.training.strategies import Ranking, RankingContext
from tests.conftest import VOCABULARY, build_module

NUM_TEXTS = 120
REFRESH = {"sample_size": 40, "num_probe": 12, "encoder": ("hashed_ngrams",), "num_folds": 2, "allow_low_fidelity": True}


def rows_of_tokens(count: int, *, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(1, VOCABULARY, size=int(rng.integers(6, 20))).tolist()} for _ in range(count)]


POOL = rows_of_tokens(NUM_TEXTS, seed=0)
TARGETS = {"a": rows_of_tokens(6, seed=1), "b": rows_of_tokens(6, seed=2)}


def language_model(*, seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    module = build_module("llama")
    lm = LanguageModel(module, None, torch.optim.AdamW(module.parameters(), lr=1e-3), max_tokens=32)
    train(lm, read_texts(POOL[:16]))
    return lm


def train(lm: LanguageModel, texts: Any) -> None:
    assert lm.optimizer is not None
    lm.module.train()
    for batch in lm.batches(lm.encode(texts)):
        lm.text_losses(batch).mean().backward()
        lm.optimizer.step()
        lm.optimizer.zero_grad()


@dataclass(kw_only=True)
class Counting:
    """Scores by the order of text_ids; counts how often it was asked, and fails when told to."""

    plugin_name: ClassVar[str] = "counting"
    needs_model: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = False
    adapts: ClassVar[bool] = True
    redraws: ClassVar[bool] = False
    sample_size: ClassVar[int] = 10

    fails_at: tuple[int, ...] = ()
    at_chance: bool = False

    def __post_init__(self) -> None:
        self.asked: list[int] = []

    def rank(self, context: RankingContext) -> Ranking:
        ids = list_text_ids(context.candidate_texts())
        number = len(context.earlier)
        self.asked.append(number)
        if len(self.asked) - 1 in self.fails_at:
            raise NotFiniteError("a loss is NaN.", "finite losses", "lower the rate.")
        values = np.array([[int(text_id[:6], 16)] for text_id in ids], dtype=np.float32) * (-1) ** number
        fidelity = None
        if self.at_chance:
            from surrogate.fidelity import Fidelity

            rng = np.random.default_rng(0)
            rows = measure_fidelity(rng.normal(size=(50, 1)), rng.normal(size=(50, 1)), target_names=["x"])
            fidelity = Fidelity(surrogate_name="ridge", surrogate=rows, ridge=rows, constant=rows)
        return Ranking(
            scores=Scores(values, text_ids=ids, target_names=["x"]),
            fidelity=fidelity,
            costs={"label": {"seconds": 1.0, "flops": 10.0}},
            facts={"num_labelled": 10},
        )


@dataclass(kw_only=True)
class Once(Counting):
    """Does not adapt."""

    plugin_name: ClassVar[str] = "once"
    adapts: ClassVar[bool] = False


def counting(tmp_path: Path, strategy: Counting | None = None, **options: Any) -> Refresher:
    return Refresher(POOL, workdir=tmp_path, strategy=strategy or Counting(), **{"rule": "top", **options})


def test_the_best_texts_come_first_and_no_text_comes_twice_in_a_pass(tmp_path: Path) -> None:
    refresher = counting(tmp_path, Counting(), refresh_every=100)
    rounds = [refresher.next_round(num_texts=30) for _ in range(4)]
    seen = [text_id for made in rounds for text_id in made.text_ids]
    assert len(set(seen)) == NUM_TEXTS
    assert seen == sorted(seen, key=lambda text_id: -int(text_id[:6], 16))
    assert [refresher.text_ids[row] for row in rounds[2].rows] == rounds[2].text_ids
    again = refresher.next_round(num_texts=30)
    assert again.record["starts_pass"] and again.text_ids == rounds[0].text_ids  # that ranking knows them all


def test_a_spent_pool_begins_anew_with_all_texts(tmp_path: Path) -> None:
    refresher = counting(tmp_path)
    sizes = [len(refresher.next_round(num_texts=50).rows) for _ in range(3)]
    assert sizes == [50, 50, 50]  # 20 are left after two rounds: too few
    assert [record["starts_pass"] for record in refresher.table()] == [False, False, True]


def test_what_a_pass_has_left_is_taken_before_the_next_one_begins(tmp_path: Path) -> None:
    order = sorted(list_text_ids(read_texts(POOL)), key=lambda text_id: -int(text_id[:6], 16))
    refresher = counting(tmp_path, Once())
    seen = [text_id for _ in range(5) for text_id in refresher.next_round(num_texts=50).text_ids]
    assert seen == [order[place % NUM_TEXTS] for place in range(250)]
    resumed = counting(tmp_path, Once())
    resumed.rewind(3)  # within the second pass, which began within a round
    assert resumed.next_round(num_texts=50).text_ids == seen[150:200]


def test_what_a_pass_has_left_is_taken_before_the_next_one_begins_by_tokens(tmp_path: Path) -> None:
    counts = [len(row["input_ids"]) for row in POOL]
    refresher = counting(tmp_path, num_tokens=counts)
    made = [refresher.next_round(num_tokens=500) for _ in range(7)]
    ends = [index for index, round_ in enumerate(made) if round_.record["starts_pass"]]
    first = [row for round_ in made[: ends[0]] for row in round_.rows] + list(
        made[ends[0]].rows[: made[ends[0]].record["num_leftover"]]
    )
    assert sorted(first) == list(range(NUM_TEXTS))
    assert all(450 < sum(counts[row] for row in round_.rows) <= 500 for round_ in made)
    seen = np.bincount(np.concatenate([round_.rows for round_ in made]), minlength=NUM_TEXTS)
    assert seen.max() - seen.min() <= 1


def test_a_new_pass_is_ranked_anew_where_the_ranking_does_not_know_all_texts(tmp_path: Path) -> None:
    strategy = Counting()
    refresher = counting(tmp_path / "due", strategy, refresh_every=100, warmup_fraction=0.2, num_rounds=5)
    records = [refresher.next_round(num_texts=30).record for _ in range(5)]
    assert [record["ranked_in_round"] for record in records] == [-1, 1, 1, 1, 4]
    assert records[4]["reason"] == "a new pass over the pool begins" and strategy.asked == [0, 1]


@pytest.mark.parametrize(("warmup", "goes_on_with"), [(0.0, 0), (0.2, -1)])
def test_a_new_pass_that_cannot_be_ranked_takes_a_ranking_that_knows_all_texts(
    tmp_path: Path, warmup: float, goes_on_with: int
) -> None:
    """And not the newest one, which knows no more than what was left of the pass before."""
    refresher = counting(tmp_path, Counting(fails_at=(2,)), refresh_every=2, warmup_fraction=warmup, num_rounds=5)
    records = [refresher.next_round(num_texts=25).record for _ in range(5)]
    assert [record["refreshed"] for record in records].count(True) == 2 and records[4]["starts_pass"]
    assert records[4]["failure"] and records[4]["ranked_in_round"] == goes_on_with and records[4]["num_texts"] == 25


def test_a_strategy_that_ranks_once_knows_what_was_trained_on_before(tmp_path: Path) -> None:
    strategy = Once()
    refresher = counting(tmp_path, strategy, warmup_fraction=0.4, num_rounds=10)
    records = [refresher.next_round(num_texts=40).record for _ in range(8)]
    assert [record["refreshed"] for record in records] == [False] * 4 + [True] + [False] * 3
    assert strategy.asked == [0] and records[4]["num_ranked"] == NUM_TEXTS
    assert {record["num_texts"] for record in records} == {40}


def test_repeating_offers_the_same_texts_in_every_round(tmp_path: Path) -> None:
    refresher = counting(tmp_path, refresh_every=100, consume_once=False)
    assert refresher.next_round(num_texts=30).text_ids == refresher.next_round(num_texts=30).text_ids


def test_a_rule_with_chance_draws_anew_in_every_round(tmp_path: Path) -> None:
    refresher = counting(tmp_path, refresh_every=100, consume_once=False, rule="top_share", rule_options={"share": 0.5})
    first, second = (set(refresher.next_round(num_texts=20).text_ids) for _ in range(2))
    best = set(sorted(refresher.text_ids, key=lambda text_id: -int(text_id[:6], 16))[:60])
    assert first != second and first | second <= best


def test_refreshes_come_on_schedule(tmp_path: Path) -> None:
    refresher = counting(tmp_path, refresh_every=2)
    for _ in range(5):
        refresher.next_round(num_texts=10)
    assert [record["refreshed"] for record in refresher.table()] == [True, False, True, False, True]
    assert [record["ranked_in_round"] for record in refresher.table()] == [0, 0, 2, 2, 4]


@pytest.mark.parametrize(
    ("options", "first"),
    [({"warmup_fraction": 0.25}, 1), ({"final_fraction": 0.5}, 2), ({"final_fraction": 0.1}, 3), ({"warmup_fraction": 0.9}, 3)],
)
def test_random_texts_before_selection_begins(tmp_path: Path, options: dict[str, float], first: int) -> None:
    refresher = counting(tmp_path, num_rounds=4, **options)
    rounds = [refresher.next_round(num_texts=10) for _ in range(4)]
    assert [made.record["ranked_in_round"] for made in rounds] == [-1] * first + list(range(first, 4))
    assert rounds[0].text_ids != sorted(rounds[0].text_ids, key=lambda text_id: -int(text_id[:6], 16))


def test_a_token_budget_takes_at_most_so_many_tokens(tmp_path: Path) -> None:
    lm = language_model()
    refresher = counting(tmp_path)
    made = refresher.next_round(lm, num_tokens=200)
    lengths = {text_id: len(row["input_ids"]) for text_id, row in zip(refresher.text_ids, POOL, strict=True)}
    assert 180 <= sum(lengths[text_id] for text_id in made.text_ids) <= 200


def test_a_resumed_run_reads_its_rounds_and_is_asked_nothing(tmp_path: Path) -> None:
    first = counting(tmp_path, refresh_every=2)
    rounds = [first.next_round(num_texts=20) for _ in range(3)]
    state = json.loads(json.dumps(first.state_dict()))
    rounds += [first.next_round(num_texts=20) for _ in range(2)]

    strategy = Counting()
    second = counting(tmp_path, strategy, refresh_every=2)
    second.load_state_dict(state)
    assert second.num_rounds_done == 3 and second.round_at(1).text_ids == rounds[1].text_ids
    again = [second.next_round(num_texts=20) for _ in range(2)]
    assert [made.text_ids for made in again] == [made.text_ids for made in rounds[3:]]
    assert strategy.asked == []
    assert second.table() == first.table()


def test_a_run_from_the_start_reads_its_rounds_too(tmp_path: Path) -> None:
    first = counting(tmp_path)
    rounds = [first.next_round(num_texts=20) for _ in range(3)]
    strategy = Counting()
    second = counting(tmp_path, strategy)
    assert [second.next_round(num_texts=20).text_ids for _ in range(3)] == [made.text_ids for made in rounds]
    assert strategy.asked == []


def test_a_round_of_another_size_is_made_anew_and_later_ones_go(tmp_path: Path) -> None:
    first = counting(tmp_path)
    for _ in range(3):
        first.next_round(num_texts=20)
    stored = {path.parent.name: path.read_bytes() for path in tmp_path.glob("round-*/round.json")}
    second = counting(tmp_path)
    assert second.next_round(num_texts=20).text_ids == first.round_at(0).text_ids
    with pytest.warns(ReplacedRoundsWarning, match=r"from round 1 in another way.*round-00001, round-00002 of"):
        assert len(second.next_round(num_texts=10).rows) == 10
    assert not (tmp_path / "round-00002").exists()
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == 2
    for index in (1, 2):  # nothing that was paid for is lost
        kept = tmp_path / f"replaced/round-0000{index}-{first.table()[index]['chain'][:8]}"
        assert (kept / "round.json").read_bytes() == stored[f"round-0000{index}"] and (kept / "ranking/scores.parquet").exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    first = counting(tmp_path / "one")
    first.next_round(num_texts=20)
    second = counting(tmp_path / "two")
    with pytest.raises(MissingFileError, match=r"round\.json"):
        second.load_state_dict(first.state_dict())
    second.next_round(num_texts=10)
    with pytest.raises(MismatchError, match="not those of the checkpoint"):
        second.load_state_dict(first.state_dict())


def test_a_workdir_of_other_options_is_refused(tmp_path: Path) -> None:
    counting(tmp_path).next_round(num_texts=20)
    with pytest.raises(MismatchError, match="seed: stored 0, asked 1"):
        counting(tmp_path, seed=1).next_round(num_texts=20)


@pytest.mark.parametrize("changed", [{"max_overhead": 0.5}, {"allow_low_fidelity": True}])
def test_what_warnings_advise_to_change_may_be_changed_when_training_is_resumed(tmp_path: Path, changed: dict[str, Any]) -> None:
    first = counting(tmp_path)
    first.next_round(num_texts=20)
    resumed = counting(tmp_path, **changed)
    resumed.load_state_dict(first.state_dict())
    assert resumed.next_round(num_texts=20, trained_flops=1e3, coming_flops=1e3, planned_flops=2e3).record["refreshed"]
    with pytest.raises(MismatchError, match="training that began otherwise"):  # from the start it would read what others made
        counting(tmp_path, **changed).next_round(num_texts=20)


def test_a_failing_refresh_goes_on_with_the_ranking_before(tmp_path: Path) -> None:
    strategy = Counting(fails_at=(1,))
    refresher = counting(tmp_path, strategy)
    rounds = [refresher.next_round(num_texts=10) for _ in range(3)]
    assert [made.record["ranked_in_round"] for made in rounds] == [0, 0, 2]
    assert "a loss is NaN" in rounds[1].record["failure"]
    expected = sorted(refresher.text_ids, key=lambda text_id: -int(text_id[:6], 16))
    assert rounds[1].text_ids == expected[10:20]


def test_a_failing_first_refresh_goes_on_with_random_texts_and_stop_stops(tmp_path: Path) -> None:
    made = counting(tmp_path / "on", Counting(fails_at=(0,))).next_round(num_texts=10)
    assert made.record["ranked_in_round"] == -1 and not made.record["refreshed"]
    with pytest.raises(NotFiniteError, match="a loss is NaN"):
        counting(tmp_path / "stop", Counting(fails_at=(0,)), on_failure="stop").next_round(num_texts=10)


def test_scores_at_chance_are_not_selected_by(tmp_path: Path) -> None:
    made = counting(tmp_path / "no", Counting(at_chance=True)).next_round(num_texts=10)
    assert "LowFidelityError" in made.record["failure"] and made.record["ranked_in_round"] == -1
    assert made.record["costs"]["label"]["flops"] == 10.0  # spent all the same
    strategy = Counting(at_chance=True)
    refresher = counting(tmp_path / "again", strategy)
    for _ in range(3):
        refresher.next_round(num_texts=10)
    assert strategy.asked == [0, 1, 2]  # what was labelled in vain is there for the next ranking, which draws another sample
    allowed = counting(tmp_path / "yes", Counting(at_chance=True), allow_low_fidelity=True).next_round(num_texts=10)
    assert allowed.record["failure"] is None and allowed.record["ranked_in_round"] == 0


def test_rankings_at_chance_come_as_seldom_as_others_and_a_strategy_that_ranks_once_pays_once(tmp_path: Path) -> None:
    often, once = Counting(at_chance=True), Once(at_chance=True)
    records = []
    for name, strategy in (("often", often), ("once", once)):
        refresher = counting(tmp_path / name, strategy, refresh_every=2)
        records += [refresher.next_round(num_texts=10).record for _ in range(5)]
    assert often.asked == [0, 1, 2] and once.asked == [0]
    assert "every 2 rounds" in records[1]["reason"] and "ranks once" in records[6]["reason"]
    failing = Once(fails_at=(0,))
    refresher = counting(tmp_path / "failing", failing)
    assert [refresher.next_round(num_texts=10).record["refreshed"] for _ in range(3)] == [False, True, False]


def test_rounds_at_random_differ_also_where_texts_may_come_again(tmp_path: Path) -> None:
    refresher = counting(tmp_path, consume_once=False, warmup_fraction=0.75, num_rounds=8)
    rounds = [set(refresher.next_round(num_texts=20).text_ids) for _ in range(6)]
    assert {record["ranked_in_round"] for record in refresher.table()} == {-1}
    assert len(set().union(*rounds)) > 80 and all(len(texts) == 20 for texts in rounds)


def test_an_order_at_random_is_taken_as_it_stands_and_never_from_its_beginning_only(tmp_path: Path) -> None:
    def seen(strategy: str) -> set[str]:
        refresher = Refresher(POOL, workdir=tmp_path / strategy, strategy=strategy)
        return {text_id for _ in range(4) for text_id in refresher.next_round(num_texts=30).text_ids}

    assert len(seen("random")) == NUM_TEXTS  # the whole pool, once
    assert 60 < len(seen("rs2")) < NUM_TEXTS
    with pytest.raises(InputError, match="every round would show the same texts"):
        Refresher(POOL, workdir=tmp_path / "again", strategy="random", consume_once=False)


def test_the_mean_of_the_candidates_is_that_of_the_texts_still_there(tmp_path: Path) -> None:
    refresher = counting(tmp_path, Once())
    records = [refresher.next_round(num_texts=30).record for _ in range(3)]
    means = [record["influence_candidates"]["x"] for record in records]
    assert means[0] > means[1] > means[2]  # the best ones are gone
    assert all(record["influence_selected"]["x"] > mean for record, mean in zip(records, means, strict=True))


def test_a_workdir_of_a_training_that_began_elsewhere_is_refused_and_stays(tmp_path: Path) -> None:
    options = {**REFRESH, "refresh_every": 2}
    Refresher(POOL, TARGETS, workdir=tmp_path, **options).next_round(language_model(), num_texts=20)
    before = (tmp_path / "round-00000/selection.parquet").read_bytes()
    other, elsewhere = Refresher(POOL, TARGETS, workdir=tmp_path, **options), language_model()
    train(elsewhere, read_texts(POOL[16:20]))
    with pytest.raises(MismatchError, match="a training that began otherwise"):
        other.next_round(elsewhere, num_texts=20)
    assert (tmp_path / "round-00000/selection.parquet").read_bytes() == before
    same = Refresher(POOL, TARGETS, workdir=tmp_path, **options)
    assert same.next_round(language_model(), num_texts=20).record["refreshed"]


def test_a_round_that_is_made_anew_is_not_taken_for_finished_meanwhile(tmp_path: Path) -> None:
    class Killed(Counting):
        def rank(self, context: RankingContext) -> Ranking:
            assert not (context.folder.parent / "round.json").exists()
            raise KeyboardInterrupt

    refresher = counting(tmp_path)
    refresher.next_round(num_texts=20)
    refresher.next_round(num_texts=20)
    again = counting(tmp_path, Killed())
    again.load_state_dict({"num_rounds": 1, "chain": refresher.table()[0]["chain"]})
    with pytest.raises(KeyboardInterrupt):
        again.next_round(num_texts=10)
    with pytest.raises(MissingFileError):
        counting(tmp_path).load_state_dict(refresher.state_dict())


def test_encoders_of_words_are_refused_for_token_ids_before_anything_is_paid(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a pool of token ids, and the encoder 'text_stats'"):
        Refresher(POOL, TARGETS, workdir=tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_encoder_may_be_written_as_on_the_command_line(tmp_path: Path) -> None:
    refresher = Refresher(POOL, TARGETS, workdir=tmp_path, **{**REFRESH, "encoder": "hashed_ngrams:dim=64"})
    assert refresher.strategy.encoder[0].dim == 64
    with pytest.raises(InputError, match="an object of it"):
        Refresher(POOL, TARGETS, workdir=tmp_path, encoder="model_state:states=False")


def test_the_overhead_forbids_a_refresh_and_says_why(tmp_path: Path) -> None:
    refresher = counting(tmp_path, max_overhead=0.1)
    options = {"num_texts": 10, "planned_flops": 250.0, "coming_flops": 50.0}
    rounds = [refresher.next_round(trained_flops=50.0 * number, **options) for number in range(4)]
    assert [made.record["refreshed"] for made in rounds] == [True, True, False, False]  # 10 FLOPs each, of 25
    assert "refused" in rounds[2].record["reason"]
    assert rounds[1].record["overhead_planned"]["flops"] == pytest.approx(20 / 250)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        MemoryError("none"),
        TooLittleMemoryError("a", "b", "c"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        np.linalg.LinAlgError("Singular matrix"),
        torch.linalg.LinAlgError("not positive definite"),
    ],
)
def test_a_refresh_without_memory_or_a_solution_is_lived_with_also_at_first(tmp_path: Path, error: Exception) -> None:
    class Hungry(Counting):
        def rank(self, context: RankingContext) -> Ranking:
            raise error

    made = counting(tmp_path, Hungry()).next_round(num_texts=10)
    assert type(error).__name__ in made.record["failure"] and made.record["ranked_in_round"] == -1


def test_a_failing_refresh_is_charged_what_was_expected_of_it(tmp_path: Path) -> None:
    refresher = counting(tmp_path, Counting(fails_at=(1, 2, 3)), max_overhead=0.1)
    options = {"num_texts": 10, "planned_flops": 350.0, "coming_flops": 50.0}
    records = [refresher.next_round(trained_flops=50.0 * number, **options).record for number in range(4)]
    assert [record["costs"].get("failed refresh", {}).get("flops") for record in records] == [None, 10.0, 10.0, None]
    assert records[3]["left_out"] and "30 FLOPs spent and 10 for this refresh, of 35" in records[3]["reason"]


def test_a_refusal_stops_the_first_ranking_and_is_lived_with_later(tmp_path: Path) -> None:
    class Refusing(Counting):
        def rank(self, context: RankingContext) -> Ranking:
            if len(self.asked) in self.fails_at:
                self.asked.append(-1)
                raise InputError("4 labelled texts were given.", "at least 10", "label more texts.")
            return super().rank(context)

    with pytest.raises(InputError, match="4 labelled texts"):
        counting(tmp_path / "first", Refusing(fails_at=(0,))).next_round(num_texts=10)
    refresher = counting(tmp_path / "later", Refusing(fails_at=(1,)))
    records = [refresher.next_round(num_texts=10).record for _ in range(3)]
    assert "4 labelled texts" in records[1]["failure"] and [record["ranked_in_round"] for record in records] == [0, 0, 2]
    stopping = counting(tmp_path / "stop", Refusing(fails_at=(1,)), on_failure="stop")
    stopping.next_round(num_texts=10)
    with pytest.raises(InputError, match="4 labelled texts"):
        stopping.next_round(num_texts=10)


def test_labels_of_all_candidates_are_expected_to_cost_what_they_did(tmp_path: Path) -> None:
    """A strategy without a sample cannot make it smaller, so its next refresh is refused whole."""

    class Whole(Counting):
        sample_size = property()  # none

    refresher = counting(tmp_path, Whole(), max_overhead=0.1)
    options = {"num_texts": 40, "planned_flops": 150.0, "coming_flops": 50.0}
    records = [refresher.next_round(trained_flops=50.0 * number, **options).record for number in range(2)]
    assert records[0]["refreshed"] and records[0]["costs"]["label"]["flops"] == 10.0
    assert records[1]["left_out"] and "10 FLOPs spent and 80 for this refresh" in records[1]["reason"]  # one for each text


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without target sets"):
        Refresher(POOL, workdir=tmp_path)
    with pytest.raises(InputError, match="no probe set"):
        Refresher(POOL, TARGETS, workdir=tmp_path, drift_threshold=0.8, num_probe=0)
    with pytest.raises(InputError, match="which ranks once"):
        Refresher(POOL, TARGETS, workdir=tmp_path, strategy="static", num_probe=5, drift_threshold=0.8)
    with pytest.raises(InputError, match="did you mean 'top'"):
        Refresher(POOL, TARGETS, workdir=tmp_path, rule="tpo")
    with pytest.raises(InputError, match="did you mean 'temperature'"):
        Refresher(POOL, TARGETS, workdir=tmp_path, rule="softmax", rule_options={"temprature": 1.0})
    with pytest.raises(InputError, match="combine='c'"):
        Refresher(POOL, TARGETS, workdir=tmp_path, rule_options={"combine": "c"})
    with pytest.raises(InputError, match="one of the two"):
        counting(tmp_path, warmup_fraction=0.1, final_fraction=0.2, num_rounds=10)
    for wrong in ({"final_fraction": 20, "num_rounds": 5}, {"warmup_fraction": "0.2"}, {"refresh_every": 1.5}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}="):
            counting(tmp_path, **wrong)
    with pytest.raises(InputError, match="no number of rounds"):
        counting(tmp_path, warmup_fraction=0.1)
    with pytest.raises(InputError, match="exactly one of the two"):
        counting(tmp_path).next_round(num_texts=1, num_tokens=1)
    with pytest.raises(InputError, match="looks at the live model"):
        Refresher(POOL, TARGETS, workdir=tmp_path, **REFRESH).next_round(num_texts=5)


# ---------------------------------------------------------------------- with a model


def state_of(lm: LanguageModel) -> tuple[str, list[Any], bool]:
    return lm.fingerprint(optimizer=True), torch.get_rng_state().tolist(), lm.module.training


def test_a_refresh_leaves_weights_optimiser_and_random_state_as_they_were(tmp_path: Path) -> None:
    lm = language_model()
    lm.module.train()
    torch.manual_seed(5)
    np.random.seed(7)
    before, numpy_before = state_of(lm), copy.deepcopy(np.random.get_state()[1])
    refresher = Refresher(POOL, TARGETS, workdir=tmp_path, drift_threshold=0.9, **REFRESH)
    refresher.next_round(lm, num_texts=20)
    refresher.next_round(lm, num_texts=20)  # looks at the drift
    assert state_of(lm) == before
    assert (np.random.get_state()[1] == numpy_before).all()
    assert all(parameter.grad is None for parameter in lm.module.parameters())


def test_refreshes_use_old_labels_that_still_agree_and_never_train_on_the_probe(tmp_path: Path) -> None:
    lm = language_model()
    refresher = Refresher(POOL, TARGETS, workdir=tmp_path, **REFRESH)
    seen: set[str] = set()
    for _ in range(3):
        made = refresher.next_round(lm, num_texts=20)
        seen |= set(made.text_ids)
        train(lm, refresher.pool.select(made.rows))
    probe = {refresher.text_ids[row] for row in refresher.strategy.reserved(refresher.text_ids, seed=0)}
    assert len(probe) == 12 and not probe & seen
    facts = [record["facts"] for record in refresher.table()]
    assert [fact["num_older_labels"] for fact in facts[:2]] == [0, 40]
    assert 40 < facts[2]["num_older_labels"] <= 80  # the pool has run out of texts without a label
    assert all(-1 <= value <= 1 for value in facts[2]["agreements_with_older_labels"])


def test_without_a_probe_old_labels_are_kept_and_no_agreement_can_be_asked_for(tmp_path: Path) -> None:
    lm = language_model()
    refresher = Refresher(POOL, TARGETS, workdir=tmp_path, **{**REFRESH, "num_probe": 0})
    for _ in range(2):
        train(lm, refresher.pool.select(refresher.next_round(lm, num_texts=20).rows))
    facts = refresher.table()[1]["facts"]
    assert facts["num_older_labels"] == 40 and not facts.get("agreements_with_older_labels")
    with pytest.raises(InputError, match="without a probe set"):
        Refresher(POOL, TARGETS, workdir=tmp_path, **{**REFRESH, "num_probe": 0, "min_agreement": 0.5})


def test_labels_that_no_longer_agree_are_dropped(tmp_path: Path) -> None:
    lm = language_model()
    refresher = Refresher(POOL, TARGETS, workdir=tmp_path, min_agreement=1.1, **REFRESH)
    for _ in range(2):
        refresher.next_round(lm, num_texts=20)
        train(lm, read_texts(POOL[:40]))
    assert refresher.table()[1]["facts"]["num_older_labels"] == 0


def test_drift_is_none_at_the_same_checkpoint_and_fires_after_training_elsewhere(tmp_path: Path) -> None:
    lm = language_model()
    refresher = Refresher(POOL, TARGETS, workdir=tmp_path, drift_threshold=0.9, **REFRESH)
    refresher.next_round(lm, num_texts=20)
    still = refresher.next_round(lm, num_texts=20).record
    assert still["drift"]["labels"] == pytest.approx(0, abs=1e-9)
    assert still["refreshed"] == (still["drift"]["scores_agreed"] <= 0)
    assert still["costs"]["drift targets"]["flops"] > 0
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in lm.module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    moved = refresher.next_round(lm, num_texts=20).record
    assert moved["drift"]["labels"] > 0.1
    agree, agreed = moved["drift"]["scores_agree"], moved["drift"]["scores_agreed"]
    assert moved["refreshed"] == (agreed <= 0 or agree < 0.9 * agreed)


def test_the_drift_rule_compares_with_what_agreement_was() -> None:
    schedule = Schedule(drift_threshold=0.8)
    assert schedule.has_drifted({"scores": 0.47, "scores_then": 0.6})[0]
    assert not schedule.has_drifted({"scores": 0.49, "scores_then": 0.6})[0]
    has_drifted, told = schedule.has_drifted({"scores": 0.3, "scores_then": -0.1})
    assert has_drifted and "never agreed" in told  # there is nothing to fall from, and nothing worth keeping


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_a_look_at_the_drift_that_fails_is_told_like_a_refresh_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_failure: str
) -> None:
    from surrogate.training import labelled_ranking

    lm = language_model()
    refresher = Refresher(POOL, TARGETS, workdir=tmp_path, drift_threshold=0.9, on_failure=on_failure, **REFRESH)
    refresher.next_round(lm, num_texts=20)

    def failing(*_: Any) -> None:
        raise NotFiniteError("a label is NaN.", "finite labels", "lower the rate.")

    monkeypatch.setattr(labelled_ranking.LabelledRanking, "agreement_now", failing)
    if on_failure == "stop":
        with pytest.raises(NotFiniteError, match="a label is NaN"):
            refresher.next_round(lm, num_texts=20)
        return
    record = refresher.next_round(lm, num_texts=20).record
    assert "a label is NaN" in record["failure"] and record["ranked_in_round"] == 0 and not record["refreshed"]


def test_the_target_gradients_of_a_look_at_the_drift_are_paid_beside_those_of_the_refresh(tmp_path: Path) -> None:
    lm = language_model()
    refresher = Refresher(POOL, TARGETS, workdir=tmp_path, drift_threshold=1.0, **REFRESH)
    refresher.next_round(lm, num_texts=20)
    for _ in range(3):
        train(lm, read_texts(POOL[:40]))
        record = refresher.next_round(lm, num_texts=20).record
        if record["refreshed"]:
            break
    costs = record["costs"]
    assert record["drift"] and costs["drift targets"]["flops"] == costs["targets"]["flops"] > 0
    assert "drift label" not in costs  # the probe's labels are among those of the refresh


def test_a_round_depends_on_how_texts_are_read(tmp_path: Path) -> None:
    lm = language_model()
    first = Refresher(POOL, workdir=tmp_path, strategy="loss").next_round(lm, num_texts=20)
    lm.max_tokens = 8
    assert Refresher(POOL, workdir=tmp_path / "cut", strategy="loss").next_round(lm, num_texts=20).text_ids != first.text_ids
    with pytest.raises(MismatchError, match="began otherwise"):
        Refresher(POOL, workdir=tmp_path, strategy="loss").next_round(lm, num_texts=20)
    lm.max_tokens = 32
    assert Refresher(POOL, workdir=tmp_path, strategy="loss").next_round(lm, num_texts=20).text_ids == first.text_ids


def test_the_weights_are_read_only_where_a_ranking_may_look_at_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model takes seconds to read, and most rounds go down a ranking that stands."""
    lm = language_model()
    refresher = Refresher(POOL, workdir=tmp_path, strategy="loss", refresh_every=3)
    asked: list[int] = []
    original = LanguageModel.fingerprint
    monkeypatch.setattr(
        LanguageModel, "fingerprint", lambda lm, **options: asked.append(refresher.num_rounds_done) or original(lm, **options)
    )
    for _ in range(4):
        refresher.next_round(lm, num_texts=10)
    assert set(asked) == {0, 3}


def test_an_interrupted_refresh_goes_on_and_ends_with_the_same_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model()
    whole = Refresher(POOL, TARGETS, workdir=tmp_path / "whole", **REFRESH).next_round(lm, num_texts=20)

    from surrogate.training import labelled_ranking

    refresher = Refresher(POOL, TARGETS, workdir=tmp_path / "cut", **REFRESH)
    with monkeypatch.context() as patch:
        patch.setattr(labelled_ranking.LabelledRanking, "_fit_and_score", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            refresher.next_round(lm, num_texts=20)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("labels/**/*.parquet")}
    assert stamps
    resumed = Refresher(POOL, TARGETS, workdir=tmp_path / "cut", **REFRESH).next_round(lm, num_texts=20)
    assert resumed.text_ids == whole.text_ids
    for name in ("ranking/scores.parquet", "selection.parquet"):
        assert (tmp_path / "cut/round-00000" / name).read_bytes() == (tmp_path / "whole/round-00000" / name).read_bytes()


def test_a_refresh_cut_off_at_other_weights_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surrogate.training import labelled_ranking

    refresher = Refresher(POOL, TARGETS, workdir=tmp_path, **REFRESH)
    with monkeypatch.context() as patch:
        patch.setattr(labelled_ranking.LabelledRanking, "_fit_and_score", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            refresher.next_round(language_model(), num_texts=20)
    lm = language_model(seed=3)
    made = Refresher(POOL, TARGETS, workdir=tmp_path, **REFRESH).next_round(lm, num_texts=20)
    assert made.record["failure"] is None and made.record["refreshed"]


def test_the_second_tier_sees_the_best_share_only(tmp_path: Path) -> None:
    lm = language_model()
    refresher = Refresher(
        POOL, TARGETS, workdir=tmp_path, second_encoder=("model_state",), second_share=0.25, **{**REFRESH, "num_probe": 0}
    )
    record = refresher.next_round(lm, num_texts=20).record
    cached = [path for path in (tmp_path / "features").iterdir() if "model_state" in path.name]
    ids = {text_id for path in cached[0].glob("*.ids.json") for text_id in json.loads(path.read_text())}
    assert record["facts"]["live_features"] and record["costs"]["features"]["flops"] > 0
    assert NUM_TEXTS * 0.25 <= len(ids) <= NUM_TEXTS * 0.25 + 40  # the best share and the labelled texts


def test_a_schedule_that_starts_at_0_is_measured_at_the_rate_it_goes_up_to(tmp_path: Path) -> None:
    lm = language_model()
    assert lm.optimizer is not None
    torch.optim.lr_scheduler.LambdaLR(lm.optimizer, lambda step: float(step))
    assert lm.optimizer.param_groups[0]["lr"] == 0.0
    options = {**REFRESH, "method": "one_step", "sample_size": 20, "num_probe": 0}
    record = Refresher(POOL, TARGETS, workdir=tmp_path, **options).next_round(lm, num_texts=20).record
    assert record["refreshed"] and record["failure"] is None
    assert lm.optimizer.param_groups[0]["lr"] == 0.0
    labels = Labels.load(tmp_path / "round-00000/ranking/labels")
    assert np.abs(labels.values).max() > 0


@pytest.mark.parametrize(
    "options",
    [
        {"sampling": "stratified"},
        {"sampling": "uncertain", "surrogate": "network", "surrogate_options": {"ensemble": 2, "max_epochs": 3}},
        {"sampling": "mass"},
        {"warm_start": True, "keep_labels": 0.0},
    ],
)
def test_later_refreshes_can_look_at_the_one_before(tmp_path: Path, options: dict[str, Any]) -> None:
    lm = language_model()
    refresher = Refresher(POOL, TARGETS, workdir=tmp_path, **{**REFRESH, "sample_size": 30, **options})
    for _ in range(2):
        refresher.next_round(lm, num_texts=20)
        train(lm, read_texts(POOL[:20]))
    assert [record["failure"] for record in refresher.table()] == [None, None]
    assert refresher.table()[1]["refreshed"]


def test_live_features_beside_the_surrogate_before_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its own checkpoint only"):
        Refresher(POOL, TARGETS, workdir=tmp_path, encoder=("model_state",), warm_start=True, keep_labels=0.0)


def test_a_target_set_may_be_called_like_a_column_of_the_table(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    class Named(Counting):
        def rank(self, context: RankingContext) -> Ranking:
            ids = list_text_ids(context.candidate_texts())
            return Ranking(scores=Scores(np.arange(len(ids) * 2.0).reshape(-1, 2), text_ids=ids, target_names=["reason", "rank"]))

    made = counting(tmp_path, Named()).next_round(num_texts=3)
    table = pq.read_table(tmp_path / "round-00000/selection.parquet")
    assert table["text_id"].to_pylist() == made.text_ids and table["reason"].to_pylist() == ["score"] * 3
    assert table["value.reason"].to_pylist() == [238.0, 236.0, 234.0]
