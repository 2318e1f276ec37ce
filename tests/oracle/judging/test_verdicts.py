"""The judgement as a table and as JSON: what is shown where, and what a label cost."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from oracle.judging.datamodelling import Ceiling, Score
from oracle.judging.planted import Recovery
from oracle.judging.shares import Worth
from oracle.judging.verdicts import Judgement, LabelCost, Verdict, label_cost

COST = {"label_flops": 600.0, "label_seconds": 4.0, "num_tokens": 10, "num_labelled": 2, "prepare_flops": 300.0}


def _score(value):
    return Score(value, value - 0.2, value + 0.1, np.zeros(3))


def _worths(value):
    sides = {"top": Worth((value, 3 * value)), "bottom": Worth((-value, -value))}
    return {"removal": sides, "addition": sides}


def _verdict(value, targets=("a", "b"), **options):
    given = {
        "lds": {target: _score(value) for target in targets},
        "lds_mean": _score(value),
        "shares": {target: _worths(value / 100) for target in targets},
        "planted": {
            "copies": {"a": Recovery(0.9, 0.8, None, 4)},
            "shuffled": {target: Recovery(0.7, 0.6, 0.5, 4) for target in targets},
        },
        "cost": LabelCost(1.0, 1.5, 0.1),
        "same_checkpoint": True,
        "same_target_texts": None,
        **options,
    }
    return Verdict(**given)


@pytest.fixture
def judgement():
    methods = {"first": _verdict(0.5), "second": _verdict(0.4, cost=None, same_checkpoint=False)}
    settings = {"share": 0.2, "num_seeds": 2, "num_subsets": 16}
    return Judgement(methods, ["a", "b"], {"a": Ceiling(0.81, 0.9, "seeds"), "b": None}, settings, {"num_models": 7})


def test_every_row_of_the_table_has_its_figures_under_the_right_heads(judgement):
    lines = judgement.table().splitlines()
    starts = [
        lines[0].index(head) + len(head) for head in ("lds", "removal of top", "addition of bottom", "shuffled", "per text")
    ]
    first, mean, ceiling = lines[1], lines[3], lines[7]
    assert [first[:end].split("  ")[-1].strip() for end in starts] == [
        "0.500",
        "+0.010 ±0.007",
        "-0.005 ±0.000",
        "0.70/0.60, 0.50",
        "1.00",
    ]
    assert mean.split()[:2] == ["first", "(mean)"] and mean[: starts[0]].endswith("0.500") and "±" not in mean
    assert ceiling.split() == ["(ceiling)", "a", "0.900"] and lines[8].split() == ["(ceiling)", "b", "-"]
    assert "0.90/0.80" in first and "0.90/0.80" not in lines[2]  # copies of a's texts are no copies of b's
    assert "20 % of the texts" in lines[9] and lines[-1] == "second: labels of another checkpoint"
    assert lines[4].endswith("-")


def test_worths_are_shown_with_two_digits_of_the_largest(judgement):
    small = Judgement({"m": _verdict(0.002)}, ["a", "b"], {}, {"share": 0.2, "num_seeds": 2}, {})
    assert "+0.000040" in small.table()
    alone = _verdict(0.5, shares={"a": {j: dict.fromkeys(("top", "bottom"), Worth((0.1,))) for j in ("removal", "addition")}})
    table = Judgement({"m": alone}, ["a"], {}, {"share": 0.2, "num_seeds": 1}, {}).table()
    assert "+0.10" in table and "±" not in table.splitlines()[1]  # one seed has no spread


def test_few_subsets_have_no_interval_and_one_seed_no_spread(judgement):
    assert "0.30 to 0.60" in judgement.table() and "above the ceiling" not in judgement.table()
    few = replace(judgement, settings={"share": 0.2, "num_seeds": 1, "num_subsets": 4})
    table = few.table()
    assert " to " not in "\n".join(table.splitlines()[1:7]) and "4 subsets give no interval" in table
    assert "with one seed" in table and "± standard" not in table
    assert few.as_dict()["methods"]["first"]["lds"]["a"] == {"value": 0.5, "low": None, "high": None}


def test_a_score_above_the_ceiling_is_pointed_out(judgement):
    low = replace(judgement, ceilings={"a": Ceiling(0.2, 0.45, "seeds"), "b": None})
    assert "above the ceiling: first on a;" in low.table()  # 0.5 is, 0.4 of the second is not


def test_the_dictionary_is_json_and_has_everything(judgement):
    values = json.loads(json.dumps(judgement.as_dict(), allow_nan=False))
    first = values["methods"]["first"]
    assert first["lds"]["a"] == {"value": 0.5, "low": 0.3, "high": 0.6}
    assert first["removal"]["b"]["top"]["by_seed"] == [0.005, 0.015]
    assert first["planted"]["shuffled"]["b"]["below_origin"] == 0.5
    assert values["ceilings"] == {"a": {"reliability": 0.81, "ceiling": 0.9, "source": "seeds"}, "b": None}
    assert values["methods"]["second"]["cost"] is None


def test_cost_is_counted_in_passes_over_the_labelled_texts():
    cost = label_cost({"cost": {**COST, "prepare_seconds": 1.0}}, forward_flops_per_token=5.0)
    assert (cost.passes_per_text, cost.passes_with_preparing, cost.seconds_per_text) == (4.0, 6.0, 2.0)
    free = {**COST, "prepare_seconds": 1.0, "label_flops": 0, "prepare_flops": 0, "num_tokens": 0}
    assert label_cost({"cost": free}, forward_flops_per_token=5.0).passes_with_preparing == 0.0
    assert label_cost({}, forward_flops_per_token=5.0) is None and label_cost({"cost": COST}, forward_flops_per_token=5.0) is None
