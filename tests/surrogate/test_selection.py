"""Selections keep to their budget, use labels, ignore row order, refuse bad scores, and survive a round trip."""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from oracle.errors import InputError, LowFidelityError, MismatchError, MissingFileError, NotFiniteError
from oracle.labels import Labels
from surrogate.rules.softmax import Softmax
from surrogate.selection import Budget, Scores, Selection, select

NAMES = ["math", "code"]
NUM_TEXTS = 60


def make_scores(*, order=None, **changes):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(NUM_TEXTS, 2)).astype(np.float32)
    ids = [f"{number:032x}" for number in rng.permutation(NUM_TEXTS)]
    tokens = rng.integers(5, 200, size=NUM_TEXTS)
    rows = np.arange(NUM_TEXTS) if order is None else order
    arguments = {"text_ids": [ids[row] for row in rows], "target_names": NAMES, "num_tokens": tokens[rows], **changes}
    return Scores(values[rows], **arguments)


def single(values, **changes):
    """Scores of one target for texts a, b, c, ..."""
    ids = [chr(ord("a") + row) for row in range(len(values))]
    return Scores(np.array(values, dtype=float)[:, None], **{"text_ids": ids, "target_names": ["math"], **changes})


def make_fidelity(**is_above):
    """What `select` reads of a Fidelity."""
    at_chance = [name for name, above in is_above.items() if not above]
    return SimpleNamespace(surrogate=[SimpleNamespace(target=name) for name in is_above], targets_at_chance=lambda: at_chance)


def test_a_selection_has_the_best_texts_first_with_values_and_counts():
    chosen = select(single([0.1, 0.9, 0.5], num_tokens=[3, 4, 5]), budget=Budget(texts=2))
    assert chosen.text_ids == ["b", "c"] and chosen.reasons == ["score", "score"] and chosen.ranks == [1, 2]
    np.testing.assert_allclose(chosen.values[:, 0], [0.9, 0.5])
    assert chosen.combined[0] > chosen.combined[1] and chosen.num_tokens == 9 and len(chosen) == chosen.num_texts == 2
    assert chosen.counts == {
        "pool": 3,
        "duplicates": 0,
        "excluded": 0,
        "candidates": 3,
        "labelled": 0,
        "labels_not_in_pool": 0,
        "selected": 2,
        "by_label": 0,
        "by_score": 2,
    }
    assert chosen.meta["rule"] == "top" and chosen.meta["budget"] == {"texts": 2}


def test_a_plain_array_with_names_is_as_good_as_scores():
    scores = make_scores()
    plain = select(
        np.asarray(scores), text_ids=scores.text_ids, target_names=NAMES, num_tokens=scores.num_tokens, budget=Budget(tokens=900)
    )
    assert plain.text_ids == select(scores, budget=Budget(tokens=900)).text_ids
    for missing in ({"text_ids": scores.text_ids}, {"target_names": NAMES}):
        with pytest.raises(InputError, match="a plain array of scores without"):
            select(np.asarray(scores), budget=Budget(texts=1), **missing)
    with pytest.raises(MismatchError, match="differ"):
        select(scores, text_ids=scores.text_ids[::-1], budget=Budget(texts=1))


@pytest.mark.parametrize("rule", ["top", "softmax", "random"])
@pytest.mark.parametrize("budget", [Budget(texts=20), Budget(fraction=0.3), Budget(tokens=1000)])
def test_the_order_of_the_pool_changes_nothing(rule, budget):
    scores = make_scores()
    shuffled = make_scores(order=np.random.default_rng(9).permutation(NUM_TEXTS))
    labelled = Labels.from_values(np.array([[3.0, 3.0], [-3.0, -3.0]]), [scores.text_ids[4], scores.text_ids[7]], NAMES)
    first, second = (
        select(each, rule=rule, budget=budget, labels=labelled, exclude=scores.text_ids[:5], seed=2)
        for each in (scores, shuffled)
    )
    assert first.text_ids == second.text_ids and first.ranks == second.ranks and first.meta == second.meta
    assert len(first) > 3


def test_a_labelled_text_is_ranked_by_its_label_and_says_so():
    scores = single([5, 4, 3, 2, 1])
    labels = Labels.from_values([[-9.0], [9.0], [1.5]], ["a", "e", "elsewhere"], ["math"])
    chosen = select(scores, budget=Budget(texts=2), labels=labels)
    assert chosen.text_ids == ["e", "b"] and chosen.reasons == ["label", "score"]
    assert chosen.values[0, 0] == 9.0
    assert {name: chosen.counts[name] for name in ("labelled", "labels_not_in_pool", "by_label", "by_score")} == {
        "labelled": 2,
        "labels_not_in_pool": 1,
        "by_label": 1,
        "by_score": 1,
    }
    assert float(scores[4, 0]) == 1.0  # the scores themselves stay


def test_columns_of_labels_are_matched_by_name():
    scores = Scores(np.zeros((3, 2)), text_ids=["a", "b", "c"], target_names=NAMES)
    labels = Labels.from_values([[9.0, 0.0]], ["b"], ["code", "math"])
    assert select(scores, budget=Budget(texts=1), combine="code", labels=labels).text_ids == ["b"]
    assert select(scores, budget=Budget(texts=1), combine="math", labels=labels).text_ids == ["a"]


def test_labels_of_other_targets_or_other_texts_are_refused():
    with pytest.raises(MismatchError, match="labels for code"):
        select(single([1, 2]), budget=Budget(texts=1), labels=Labels.from_values([[1.0]], ["a"], ["code"]))
    with pytest.raises(MismatchError, match="labels of other text_ids"):
        select(single([1, 2]), budget=Budget(texts=1), labels=Labels.from_values([[1.0]], ["x"], ["math"]))


def test_excluded_texts_are_never_chosen():
    chosen = select(single([5, 4, 3, 2, 1]), budget=Budget(texts=2), exclude=["a", "c", "not there"])
    assert chosen.text_ids == ["b", "d"] and chosen.counts["excluded"] == 2 and chosen.counts["candidates"] == 3
    with pytest.raises(InputError, match="for 3 texts that may be chosen"):
        select(single([5, 4, 3, 2, 1]), budget=Budget(texts=4), exclude=["a", "c"])


def test_a_text_that_occurs_twice_counts_once():
    scores = single([1, 3, 3, 2], text_ids=["a", "b", "b", "c"])
    chosen = select(scores, budget=Budget(texts=3))
    assert chosen.text_ids == ["b", "c", "a"] and chosen.counts["duplicates"] == 1 and chosen.counts["pool"] == 3
    with pytest.raises(InputError, match="text b occurs more than once"):
        select(single([1, 3, 0, 2], text_ids=["a", "b", "b", "c"]), budget=Budget(texts=1))


def test_scores_that_are_not_finite_are_refused_by_text():
    with pytest.raises(NotFiniteError, match="scores of 2 texts are NaN or infinite, first b, d"):
        select(single([1, np.nan, 2, np.inf]), budget=Budget(texts=1))


def test_fidelity_not_above_chance_is_refused_unless_allowed():
    scores, fidelity = make_scores(), make_fidelity(math=True, code=False)
    with pytest.raises(LowFidelityError, match="for code") as caught:
        select(scores, budget=Budget(texts=3), fidelity=fidelity)
    for remedy in ("label more texts", "richer features", "cheaper oracle", "allow_low_fidelity=True"):
        assert remedy in caught.value.remedy
    allowed = select(scores, budget=Budget(texts=3), fidelity=fidelity, allow_low_fidelity=True)
    assert allowed.text_ids == select(scores, budget=Budget(texts=3)).text_ids
    assert allowed.meta["targets_at_chance"] == ["code"]


def test_fidelity_counts_only_for_targets_that_the_rule_looks_at():
    scores, fidelity = make_scores(), make_fidelity(math=True, code=False)
    for options in ({"combine": "math"}, {"weights": {"math": 1, "code": 0}}, {"rule": "random"}):
        assert len(select(scores, budget=Budget(texts=3), fidelity=fidelity, **options)) == 3
    with pytest.raises(LowFidelityError):
        select(scores, budget=Budget(texts=3), fidelity=fidelity, rule="softmax", combine="code")
    with pytest.raises(MismatchError, match="fidelity of the targets math"):
        select(scores, budget=Budget(texts=3), fidelity=make_fidelity(math=True))


def test_select_reads_a_real_fidelity():
    from surrogate.fidelity import Fidelity

    names = (
        "spearman",
        "p_value",
        "spearman_within_source",
        "num_sources_within",
        "r2",
        "top_recall",
        "mean_label_selected",
        "mean_label_all",
        "mean_label_best",
        "top_fraction",
        "num_texts",
    )
    rows = [
        {**dict.fromkeys(names, 0.1), "target": target, "spearman_interval": [-0.1, 0.1], "p_value": p_value}
        for target, p_value in (("math", 0.001), ("code", 0.5))
    ]
    fidelity = Fidelity.from_dict(
        {"surrogate_name": "ridge", "noise_ceiling": {}, **dict.fromkeys(("surrogate", "ridge", "constant"), rows)}
    )
    with pytest.raises(LowFidelityError, match="for code"):
        select(make_scores(), budget=Budget(texts=3), fidelity=fidelity)
    assert len(select(make_scores(), budget=Budget(texts=3), fidelity=fidelity, combine="math")) == 3


def test_options_reach_the_rule_and_unknown_ones_are_refused():
    scores = make_scores()
    named = select(scores, rule="softmax", temperature=3.0, budget=Budget(texts=9), seed=4)
    assert named.text_ids == select(scores, rule=Softmax(temperature=3.0), budget=Budget(texts=9), seed=4).text_ids
    assert named.text_ids != select(scores, rule="softmax", temperature=0.1, budget=Budget(texts=9), seed=4).text_ids
    assert named.meta["options"]["temperature"] == 3.0
    with pytest.raises(InputError, match="did you mean 'temperature'"):
        select(scores, rule="softmax", temprature=3.0, budget=Budget(texts=9))
    with pytest.raises(InputError, match="did you mean 'top'"):
        select(scores, rule="topp", budget=Budget(texts=9))
    with pytest.raises(InputError, match="beside a rule object"):
        select(scores, rule=Softmax(), budget=Budget(texts=9), temperature=1.0)


def test_a_random_selection_says_that_chance_chose():
    chosen = select(make_scores(), rule="random", budget=Budget(texts=4))
    assert chosen.reasons == ["random"] * 4 and chosen.counts["by_random"] == 4 and chosen.counts["by_score"] == 0


@dataclass(kw_only=True)
class Stuck:
    def order(self, scores, *, target_names, seed):
        return np.zeros(len(scores), dtype=np.int64)


def test_a_rule_of_ones_own_must_order_every_text():
    with pytest.raises(InputError, match="returned no order"):
        select(make_scores(), rule=Stuck(), budget=Budget(texts=2))


def test_a_selection_survives_a_round_trip(tmp_path):
    for number, scores in enumerate((make_scores(), make_scores(num_tokens=None))):
        chosen = select(scores, budget=Budget(texts=7))
        chosen.save(tmp_path / str(number))
        loaded = Selection.load(tmp_path / str(number))
        assert (loaded.text_ids, loaded.reasons, loaded.ranks, loaded.counts, loaded.tokens_per_text, loaded.target_names) == (
            chosen.text_ids,
            chosen.reasons,
            chosen.ranks,
            chosen.counts,
            chosen.tokens_per_text,
            chosen.target_names,
        )
        np.testing.assert_array_equal(loaded.values, chosen.values)
        np.testing.assert_array_equal(loaded.combined, chosen.combined)
        assert loaded.meta["rule"] == "top" and loaded.num_tokens == chosen.num_tokens


def test_a_selection_without_its_meta_is_not_complete(tmp_path):
    select(make_scores(), budget=Budget(texts=7)).save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    select(make_scores(), budget=Budget(texts=5)).save(tmp_path)  # again, over the first
    assert len(Selection.load(tmp_path)) == 5 and (tmp_path / "notes.txt").exists()
    (tmp_path / "meta.json").unlink()
    with pytest.raises(MissingFileError):
        Selection.load(tmp_path)


def test_a_save_that_was_killed_half_way_leaves_no_selection(tmp_path, monkeypatch):
    select(make_scores(), budget=Budget(texts=7)).save(tmp_path)

    def killed(path, value):
        raise RuntimeError("killed")

    monkeypatch.setattr("surrogate.selection.write_json", killed)
    with pytest.raises(RuntimeError):
        select(make_scores(), budget=Budget(texts=5)).save(tmp_path)
    with pytest.raises(MissingFileError):  # and not new texts beside old counts
        Selection.load(tmp_path)


def test_scores_survive_a_round_trip(tmp_path):
    for tokens in (np.arange(NUM_TEXTS), None):
        scores = make_scores(num_tokens=tokens)
        scores.save(tmp_path / "scores.parquet")
        loaded = Scores.load(tmp_path / "scores.parquet")
        assert isinstance(loaded, Scores) and (loaded.text_ids, loaded.target_names) == (scores.text_ids, NAMES)
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(scores))
        assert (loaded.num_tokens is None) == (tokens is None)


def test_whatever_is_computed_from_scores_is_a_plain_array():
    scores = make_scores()
    derived = [
        scores[:3],
        scores[scores[:, 0] > 0],
        scores + 1,
        2 * scores,
        scores.mean(axis=0),
        np.sort(scores, axis=0),
        scores.copy(),
        np.concatenate([scores, scores]),
        scores.astype(float),
        np.exp(scores),
        scores.max(axis=1),
    ]
    assert [type(array) for array in derived] == [np.ndarray] * len(derived)
    for array in (scores.T, scores.reshape(-1)):
        with pytest.raises(InputError, match="derived from Scores"):
            _ = array.text_ids
    assert scores.shape == (NUM_TEXTS, 2) and scores.dtype == np.float32 and len(scores.text_ids) == NUM_TEXTS


@pytest.mark.parametrize(
    "changes",
    [
        {"text_ids": ["a"]},
        {"target_names": ["math"]},
        {"target_names": ["math", "math"]},
        {"target_names": ["math", "text_id"]},
        {"num_tokens": [1, 2]},
        {"num_tokens": [0.5] * NUM_TEXTS},
        {"num_tokens": [-1] * NUM_TEXTS},
    ],
)
def test_scores_whose_names_do_not_fit_are_refused(changes):
    with pytest.raises(InputError):
        make_scores(**changes)


def test_pool_fingerprints_tell_pools_apart():
    pools = [single([1, 2]), single([1, 3]), single([1, 2], text_ids=["a", "c"]), single([1, 2], target_names=["code"])]
    prints = [select(scores, budget=Budget(texts=1)).meta["pool_fingerprint"] for scores in pools]
    assert all(one != other for one, other in itertools.combinations(prints, 2))


def test_scores_keep_their_names_on_the_way_to_another_process():
    import pickle  # what torch.distributed sends objects with

    scores = Scores(np.eye(2), text_ids=["a", "b"], target_names=["x", "y"], num_tokens=[1, 2])
    received = pickle.loads(pickle.dumps(scores))
    assert received.text_ids == ["a", "b"] and received.target_names == ["x", "y"]
    assert received.num_tokens.tolist() == [1, 2] and np.array_equal(np.asarray(received), np.eye(2))
