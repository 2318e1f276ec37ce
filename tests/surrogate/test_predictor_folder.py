"""The folder of a predictor: all that was learned comes back, and what exists is complete."""

from __future__ import annotations

import numpy as np
import pytest

import oracle
import surrogate
from oracle.errors import MissingFileError
from oracle.labels import Labels
from surrogate.predictor_folder import PREDICTOR_FILE, read_predictor
from surrogate.scores import Scores


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(0)
    texts = oracle.read_texts([{"text": " ".join(rng.choice(["one", "two", "three", "four"], 12)) + f" {n}"} for n in range(40)])
    labels = Labels.from_values(rng.normal(size=(40, 1)), texts["text_id"], ["math"])
    return surrogate.InfluencePredictor("text_stats", "ridge", num_folds=3, seed=4).fit(texts, labels)


def test_all_options_and_all_that_was_learned_come_back(fitted, tmp_path):
    fitted.save(tmp_path / "predictor")
    options, learned = read_predictor(tmp_path / "predictor", lm=None)
    assert (options["num_folds"], options["seed"], repr(options["surrogate"])) == (3, 4, repr(surrogate.RidgeSurrogate()))
    wanted = {name for name in vars(fitted) if name.endswith("_")}
    assert set(learned) == wanted
    for name in ("target_names_", "units_", "fitted_text_ids_", "cost_"):
        assert learned[name] == getattr(fitted, name)


def test_a_folder_that_was_not_finished_is_no_predictor(fitted, tmp_path, monkeypatch):
    fitted.save(tmp_path / "predictor")
    before = (tmp_path / "predictor" / PREDICTOR_FILE).read_bytes()

    def fail(self, path):
        raise OSError("the disk is full")

    monkeypatch.setattr(Scores, "save", fail)
    for name in ("predictor", "new"):
        with pytest.raises(OSError, match="disk is full"):
            fitted.save(tmp_path / name)
    assert (tmp_path / "predictor" / PREDICTOR_FILE).read_bytes() == before
    with pytest.raises(MissingFileError, match="no predictor"):
        surrogate.InfluencePredictor.load(tmp_path / "new")
