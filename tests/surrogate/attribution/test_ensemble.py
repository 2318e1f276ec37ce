from __future__ import annotations

import lightgbm as lgb
import numpy as np
import pytest
from scipy import sparse

from oracle.errors import InputError, InputTypeError, MissingFileError, NotFiniteError
from surrogate.attribution.boostin import BoostIn
from surrogate.attribution.ensemble import TreeEnsemble
from surrogate.models.trees import InfluenceTrees


def test_estimator_booster_and_file_are_one_model(case, tmp_path):
    file = tmp_path / "model.txt"
    case.estimator.booster_.save_model(file)
    found = [
        BoostIn(model)
        .fit(case.X, case.given(case.y), sample_weight=case.sample_weight)
        .attribute(case.X_test, case.given(case.y_test))
        for model in (case.estimator, case.estimator.booster_, file, str(file))
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_scores_are_lightgbms_at_every_round_and_bit_for_bit_at_the_end(case):
    ensemble = TreeEnsemble.read(case.estimator).with_classes_of(case.given(case.y))
    ensemble = ensemble.with_bias(case.y.astype(float), case.sample_weight, has_init_score=False)
    leaves, booster = ensemble.leaves(case.X), case.estimator.booster_
    all_scores = list(ensemble.raw_scores_by_round(leaves))
    assert len(all_scores) == ensemble.num_rounds + 1
    for number in range(1, ensemble.num_rounds + 1):
        truth = booster.predict(case.X, raw_score=True, num_iteration=number).reshape(len(case.X), -1)
        np.testing.assert_allclose(all_scores[number], truth, rtol=0, atol=1e-14)
    final = ensemble.final_scores(leaves)
    np.testing.assert_array_equal(final, booster.predict(case.X, raw_score=True).reshape(final.shape))


def test_an_early_stop_ends_the_ensemble(case):
    rounds = case.estimator.best_iteration_ or case.estimator.n_estimators
    assert TreeEnsemble.read(case.estimator).num_rounds == TreeEnsemble.read(case.estimator.booster_).num_rounds == rounds


def test_leaf_numbers_of_blocks_are_those_of_the_whole(case, monkeypatch):
    ensemble = TreeEnsemble.read(case.estimator)
    whole = ensemble.leaves(case.X)
    monkeypatch.setattr("surrogate.attribution.ensemble.CELLS_PER_CALL", 50)
    np.testing.assert_array_equal(ensemble.leaves(case.X), whole)
    assert whole.dtype == np.int32 and whole.flags.f_contiguous


def test_float32_sparse_and_lists_are_the_same_rows(train_case):
    case = train_case("binary")
    X, X_test = case.X.astype(np.float32), case.X_test.astype(np.float32)
    model = lgb.LGBMClassifier(**case.settings).fit(X, case.y)
    truth = BoostIn(model).fit(X, case.y).attribute(X_test, case.y_test)
    for form in (np.asfortranarray, sparse.csr_array, sparse.csc_matrix, np.ndarray.tolist):
        np.testing.assert_array_equal(BoostIn(model).fit(form(X), case.y.tolist()).attribute(form(X_test), case.y_test), truth)


def test_a_data_frame_with_categories_is_routed_by_their_names(train_case):
    pd = pytest.importorskip("pandas")
    case = train_case("regression", categories=True, min_data_per_group=1, cat_smooth=1.0)
    names = np.array(list("pqrstuvwxyz"))

    def frame(X):
        columns = {f"f{number}": X[:, number] for number in range(3)}
        return pd.DataFrame({**columns, "kind": pd.Categorical(names[X[:, 3].astype(int)], categories=list(names))})

    settings = {**case.settings, "min_data_per_group": 1, "cat_smooth": 1.0}
    model = lgb.LGBMRegressor(**settings).fit(frame(case.X), pd.Series(case.y))
    found = BoostIn(model).fit(frame(case.X), pd.Series(case.y)).attribute(frame(case.X_test), pd.Series(case.y_test))
    assert found.shape == (60, 9)
    shuffled = frame(case.X_test)
    shuffled["kind"] = shuffled["kind"].cat.reorder_categories(list(names[::-1]))
    again = BoostIn(model).fit(frame(case.X), case.y).attribute(shuffled, case.y_test)
    np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize(
    "labels", [np.array(["no", "yes"]), np.array([1, 2]), np.array([-1, 1]), np.array([True, False])[::-1]], ids=str
)
def test_labels_of_any_kind_are_their_classes(train_case, labels):
    plain, case = train_case("binary"), train_case("binary", labels=np.sort(labels))
    truth = BoostIn(plain.estimator).fit(plain.X, plain.y).attribute(plain.X_test, plain.y_test)
    for model in (case.estimator, case.estimator.booster_):
        method = BoostIn(model).fit(case.X, case.given(case.y))
        np.testing.assert_array_equal(method.attribute(case.X_test, case.given(case.y_test)), truth)


def test_unknown_labels_are_named(train_case):
    case = train_case("multiclass", labels=np.array(["a", "b", "c"]))
    method = case.fit(BoostIn(case.estimator))
    with pytest.raises(InputError, match="'d'"):
        method.attribute(case.X_test, ["d"] * 9)
    with pytest.raises(InputError, match="2 different labels"):
        BoostIn(case.estimator.booster_).fit(case.X, np.where(case.y > 0, "x", "y"))
    with pytest.raises(InputError, match=r"0\.0"):
        TreeEnsemble.read(case.estimator).encode_targets(np.zeros(3))
    with pytest.raises(InputTypeError, match="labels of type object"):
        TreeEnsemble.read(case.estimator).encode_targets([None, "a"])


def test_targets_that_are_no_numbers_are_refused(train_case):
    case = train_case("regression")
    ensemble = TreeEnsemble.read(case.estimator)
    with pytest.raises(NotFiniteError, match="NaN"):
        ensemble.encode_targets([1.0, np.nan])
    with pytest.raises(InputTypeError, match="numbers"):
        ensemble.encode_targets(["a", "b"])
    with pytest.raises(InputError, match="one target per row"):
        ensemble.encode_targets(np.zeros((4, 2)))


def test_what_is_no_fitted_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="not been fitted"):
        TreeEnsemble.read(lgb.LGBMRegressor())
    with pytest.raises(MissingFileError, match=r"absent\.txt"):
        TreeEnsemble.read(tmp_path / "absent.txt")
    with pytest.raises(InputTypeError, match="dict was given"):
        TreeEnsemble.read({})


def test_a_booster_of_our_own_trees_is_read_bagging_and_all(train_case):
    case = train_case("regression", num_rows=150)
    trees = InfluenceTrees(num_trees=8, min_trees=5, label_scale="none").fit(case.X, case.y)
    with pytest.raises(InputTypeError, match="booster_tables"):
        TreeEnsemble.read(trees)
    table = trees.booster_tables(case.X, case.y)[0]
    method = BoostIn(table.booster).fit(table.features, table.targets)
    assert method.attribute(case.X_test, of="prediction").shape == (150, 9)
    ensemble = method.rows_.ensemble
    assert ensemble.num_rounds == trees.num_trees_[0] and ensemble.reg_lambda == 10.0 and ensemble.learning_rates[0] == 0.03


def test_features_of_another_width_are_refused(train_case):
    case = train_case("regression")
    with pytest.raises(InputError, match="4 columns"):
        TreeEnsemble.read(case.estimator).leaves(case.X[:, :3])
