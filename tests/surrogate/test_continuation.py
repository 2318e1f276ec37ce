from __future__ import annotations

import numpy as np
import pytest

from oracle.errors import InputError, InputTypeError
from surrogate.continuation import SMALLEST_SHARE, Continuation, check_warm_start, full_output
from surrogate.models.ridge import RidgeSurrogate
from surrogate.models.trees import InfluenceTrees

OPTIONS = {RidgeSurrogate: {}, InfluenceTrees: {"num_trees": 20, "min_trees": 20, "validation_folds": 0, "bagging": 1.0}}


def data(num_texts=150, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(num_texts, 12)).astype(np.float32)
    return X, np.stack([X[:, 0] + X[:, 1], X[:, 2]], axis=1).astype(np.float64)


@pytest.fixture(params=OPTIONS, ids=lambda kind: kind.plugin_name)
def make(request):
    return lambda **options: request.param(**{**OPTIONS[request.param], **options})


def test_offset_and_share_are_the_least_squares_fit_of_new_labels(make):
    X, y = data()
    earlier = make().fit(X, y)
    X_new, _ = data(seed=1)
    scores = full_output(earlier, X_new)
    noise = 0.3 * scores.std(axis=0) * np.random.default_rng(2).normal(size=scores.shape)
    targets, weights = 3.0 + 0.4 * scores + noise, np.random.default_rng(3).random(len(X_new)) + 0.1
    found = Continuation.of(earlier, X_new, targets, weights=weights)
    for column in range(2):
        root = np.sqrt(weights)
        design = np.stack([np.ones(len(X_new)), scores[:, column]], axis=1)
        offset, share = np.linalg.lstsq(design * root[:, None], targets[:, column] * root, rcond=None)[0]
        np.testing.assert_allclose([found.offset[column], found.parts[0][1][column]], [offset, share], rtol=1e-8)
    np.testing.assert_allclose(found.output(X_new), found.offset + found.parts[0][1] * scores)


@pytest.mark.parametrize(("slope", "share"), [(-1.0, 0.0), (2.0, 1.0)])
def test_the_share_stays_between_nothing_and_all(make, slope, share):
    X, y = data()
    earlier = make().fit(X, y)
    found = Continuation.of(earlier, X, slope * full_output(earlier, X), weights=None)
    assert np.array_equal(found.parts[0][1], [share] * 2) if share else not found.parts


def test_a_chain_is_the_sum_of_its_parts_and_comes_back_from_disk(make, tmp_path):
    X_test, _ = data(seed=9)
    model = make(label_scale="none").fit(*data())
    by_hand = full_output(model, X_test)
    for seed in (1, 2):
        X, y = data(seed=seed)
        y = 5.0 * seed + y + 0.5 * X[:, 3 + seed : 5 + seed]
        earlier, model = model, make(label_scale="none").fit(X, y, warm_start=model)
        step = Continuation.of(earlier, X, y, weights=None)
        share = step.parts[0][1]
        offset = y.mean(axis=0) - share * full_output(earlier, X).mean(axis=0)
        by_hand = offset + share * by_hand + model.own_output(X_test)
    np.testing.assert_allclose(full_output(model, X_test), by_hand, rtol=1e-6, atol=1e-7)
    assert len(model.earlier_.parts) == 2 and all(part.earlier_ is None for part, _ in model.earlier_.parts)
    model.save(tmp_path)
    assert type(model).load(tmp_path).predict(X_test).tobytes() == model.predict(X_test).tobytes()


def test_what_is_learned_now_is_what_the_earlier_scores_leave(make):
    earlier = make(label_scale="none").fit(*data())
    X, y = data(seed=1)
    y = y + X[:, 3:5]
    warm = make(label_scale="none").fit(X, y, warm_start=earlier)
    rest = make(label_scale="none").fit(X, y - warm.earlier_.output(X))
    np.testing.assert_allclose(warm.own_output(X), rest.own_output(X), rtol=1e-4, atol=1e-5)


def test_parts_of_hardly_any_share_are_forgotten(make):
    X, y = data()
    first = make().fit(X, y)
    halved = Continuation(np.zeros(2), [(first, np.array([2.5, 2.5]) * SMALLEST_SHARE)])
    second = make().fit(X, y)
    second.earlier_ = halved
    scores = full_output(second, X)
    kept, forgotten = (Continuation.of(second, X, share * scores, weights=None) for share in (0.8, 0.2))
    assert len(kept.parts) == 2 and len(forgotten.parts) == 1


def test_fitting_on_from_a_surrogate_leaves_it_as_it_was(make):
    X, y = data()
    earlier = make().fit(X, y)
    before = earlier.predict(X)
    make().fit(*data(seed=1), warm_start=make().fit(*data(seed=2), warm_start=earlier))
    np.testing.assert_array_equal(earlier.predict(X), before)
    assert earlier.earlier_ is None


def test_what_cannot_be_gone_on_from_is_refused():
    X, y = data()
    ridge = RidgeSurrogate()
    shape = {"num_features": 12, "num_targets": 2}
    with pytest.raises(InputTypeError, match="InfluenceTrees"):
        check_warm_start(InfluenceTrees(), ridge, **shape)
    with pytest.raises(InputError, match="not been fitted"):
        check_warm_start(RidgeSurrogate(), ridge, **shape)
    fitted = RidgeSurrogate().fit(X, y)
    check_warm_start(fitted, ridge, **shape)
    with pytest.raises(InputError, match="features=12"):
        check_warm_start(fitted, ridge, **{**shape, "num_features": 13})
    with pytest.raises(InputError, match="targets=2"):
        check_warm_start(fitted, ridge, **{**shape, "num_targets": 1})
    with pytest.raises(InputError, match="label_scale='rank'"):
        check_warm_start(fitted, RidgeSurrogate(label_scale="none"), **shape)
    with pytest.raises(InputError, match="alpha=None"):
        check_warm_start(fitted, RidgeSurrogate(alpha=2.0), also_equal=("alpha",), **shape)
