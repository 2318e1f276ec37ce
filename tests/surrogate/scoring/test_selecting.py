"""A selection from score files is the one that `surrogate.select` makes in memory, whatever the files and the memory."""

import itertools
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oracle.errors import InputError, LowFidelityError, MismatchError, MissingFileError, NotFiniteError
from oracle.labels import Labels
from surrogate.scoring import disk_columns, disk_order, disk_pool
from surrogate.scoring.corpus_selection import CorpusSelection
from surrogate.scoring.disk_columns import pack, unpack
from surrogate.scoring.score_files import ScoreHeader, score_schema
from surrogate.scoring.selecting import select_corpus
from surrogate.selection import Budget, Scores, select

RULES = [
    ("top", {}),
    ("top", {"combine": "mean", "weights": {"math": 2.0, "code": 1.0, "news": 0.0}}),
    ("top", {"combine": "code"}),
    ("top_share", {"share": 0.37}),
    ("top_share", {"share": 0.0, "combine": "min_z"}),
    ("softmax", {"temperature": 0.7}),
    ("softmax", {"combine": "max_z"}),
    ("random", {}),
]
NAMES = ["math", "code", "news"]


def write_corpus(folder, values, ids, *, names=NAMES, cuts=(), tokens=None):
    """Score files of a corpus whose rows are cut into files at `cuts`."""
    files = []
    for number, rows in enumerate(np.split(np.arange(len(ids)), cuts)):
        header = ScoreHeader("predictor", [], names, "nats", False, {}, f"part/{number}.jsonl", 1)
        schema = score_schema(header, None if tokens is None else pa.schema([pa.field("num_tokens", pa.int64())]))
        positions = np.arange(len(rows)) * 3  # rows between them were bad
        columns = [[ids[row] for row in rows], positions, *values[rows].T, *([] if tokens is None else [tokens[rows]])]
        path = folder / f"{number}.parquet"
        pq.write_table(pa.table([pa.array(column) for column in columns], schema=schema), path)
        files.append(SimpleNamespace(path=path, name=f"part/{number}.jsonl", num_rows=len(rows), stamp=""))
    return SimpleNamespace(files=files, target_names=names)


@pytest.fixture
def little_memory(monkeypatch):
    """Blocks and parts of a few rows, so that a small pool takes the ways of a large one."""
    for module in (disk_columns, disk_order):
        monkeypatch.setattr(module, "PART_BYTES", 2000, raising=False)
    monkeypatch.setattr(disk_order, "WINDOW_TEXTS", 3)
    monkeypatch.setattr(disk_columns.Column.blocks, "__defaults__", (16,))
    monkeypatch.setattr(disk_pool, "READ_ROWS", 7)
    monkeypatch.setattr("surrogate.aggregation.BLOCK_ROWS", 16)


def random_pool(seed):
    """Scores with ties, texts that occur twice, and token counts with zeros."""
    rng = np.random.default_rng(seed)
    num_texts = int(rng.integers(30, 150))
    values = rng.normal(size=(num_texts, 3)) * [1, 30, 0.01]
    values = (np.round(values, 1) if seed % 2 else values).astype(np.float32)
    ids = [rng.bytes(16).hex() for _ in range(num_texts)]
    tokens = rng.integers(0 if seed % 3 else 1, 90, size=num_texts)
    again = rng.choice(num_texts, 12)
    rows = rng.permutation(np.concatenate([np.arange(num_texts), again]))
    return values[rows], [ids[row] for row in rows], tokens[rows], np.sort(rng.choice(len(rows), 3))


def same(chosen, expected):
    table = chosen.table()
    assert table["text_id"].to_pylist() == expected.text_ids
    assert table["rank"].to_pylist() == expected.ranks and table["reason"].to_pylist() == expected.reasons
    np.testing.assert_array_equal(table["combined"].to_numpy(), expected.combined)
    assert chosen.counts == expected.counts and len(chosen) == len(expected)


@pytest.mark.parametrize("rule,options", RULES)
@pytest.mark.parametrize("budget", [Budget(texts=17), Budget(fraction=0.5), Budget(tokens=400), Budget(fraction=1.0)])
def test_the_texts_are_those_of_a_selection_in_memory(rule, options, budget, tmp_path, little_memory):
    for seed in range(3):
        values, ids, tokens, cuts = random_pool(seed)
        scores = Scores(values, text_ids=ids, target_names=NAMES, num_tokens=tokens)
        distinct = sorted(set(ids))
        labels = Labels.from_values(np.ones((3, 3)) * [2, -40, 0.02], [*distinct[3:5], "f" * 32], NAMES) if seed < 2 else None
        given = {"budget": budget, "rule": rule, "labels": labels, "exclude": distinct[4:9], "seed": seed, **options}
        if budget.fraction == 1.0:
            given["exclude"] = ()
        expected = select(scores, **given)
        folder = tmp_path / str(seed)
        folder.mkdir()
        scored = write_corpus(folder, values, ids, cuts=cuts, tokens=tokens)
        same(select_corpus(scored, folder / "chosen", **given), expected)
        assert {path.name for path in (folder / "chosen").iterdir()} == {
            "selection.parquet",
            "meta.json",
            "positions",
            "positions.json",
        }


@pytest.mark.parametrize("rule", ["top", "softmax", "random"])
def test_files_and_the_order_of_rows_change_nothing(rule, tmp_path):
    values, ids, tokens, cuts = random_pool(1)
    lists = []
    for number, order in enumerate((np.arange(len(ids)), np.random.default_rng(5).permutation(len(ids)))):
        folder = tmp_path / str(number)
        folder.mkdir()
        scored = write_corpus(folder, values[order], [ids[row] for row in order], cuts=cuts[: 3 * number], tokens=tokens[order])
        lists.append(select_corpus(scored, folder / "chosen", rule=rule, budget=Budget(tokens=500), seed=3).text_ids)
    assert lists[0] == lists[1] and len(lists[0]) > 5


def test_each_chosen_row_is_found_by_file_and_position(tmp_path, little_memory):
    values, ids, _, cuts = random_pool(2)
    scored = write_corpus(tmp_path, values, ids, cuts=cuts)
    chosen = select_corpus(scored, tmp_path / "chosen", budget=Budget(fraction=0.6))
    starts = dict(zip([file.name for file in scored.files], [0, *cuts.tolist()], strict=True))
    rows = chosen.table(["text_id", "file", "position"]).to_pylist()
    assert [ids[starts[row["file"]] + row["position"] // 3] for row in rows] == chosen.text_ids
    for file in scored.files:
        own = [row["position"] for row in rows if row["file"] == file.name]
        np.testing.assert_array_equal(chosen.positions(file.name), sorted(own))
    first = [starts[row["file"]] + row["position"] // 3 for row in rows]
    assert first == [ids.index(text_id) for text_id in chosen.text_ids]  # the first of repeated rows


def test_a_threshold_keeps_what_reaches_it_and_a_budget_is_then_the_most(tmp_path):
    values, ids, tokens, _ = random_pool(3)
    scored = write_corpus(tmp_path, values, ids, tokens=tokens)
    passing = sorted({text_id for text_id, value in zip(ids, values[:, 1], strict=True) if value >= 20})
    chosen = select_corpus(scored, tmp_path / "all", min_score=20.0, combine="code")
    assert sorted(chosen.text_ids) == passing and chosen.meta["budget"] is None
    best = select_corpus(scored, tmp_path / "some", min_score=20.0, combine="code", budget=Budget(texts=3))
    assert best.text_ids == chosen.text_ids[:3]
    fitting = select_corpus(scored, tmp_path / "more", min_score=20.0, combine="code", budget=Budget(tokens=10**6))
    assert fitting.text_ids == chosen.text_ids and fitting.num_tokens == sum(fitting.table()["num_tokens"].to_pylist())
    drawn = select_corpus(scored, tmp_path / "drawn", min_score=20.0, rule="softmax", combine="code")
    assert sorted(drawn.text_ids) == passing


def test_a_finished_selection_is_returned_and_another_one_refused(tmp_path):
    values, ids, tokens, _ = random_pool(0)
    scored = write_corpus(tmp_path, values, ids, tokens=tokens)
    first = select_corpus(scored, tmp_path / "chosen", budget=Budget(texts=5))
    before = (tmp_path / "chosen" / "selection.parquet").stat().st_mtime_ns
    again = select_corpus(scored, tmp_path / "chosen", budget=Budget(texts=5))
    assert again.text_ids == first.text_ids == CorpusSelection(tmp_path / "chosen").text_ids
    assert (tmp_path / "chosen" / "selection.parquet").stat().st_mtime_ns == before
    with pytest.raises(MismatchError, match="budget"):
        select_corpus(scored, tmp_path / "chosen", budget=Budget(texts=6))
    changed = write_corpus(tmp_path, values, ids, tokens=tokens, cuts=[5])
    with pytest.raises(MismatchError, match="corpus"):
        select_corpus(changed, tmp_path / "chosen", budget=Budget(texts=5))
    with pytest.raises(InputError, match="is no selection"):
        select_corpus(scored, tmp_path, budget=Budget(texts=5))
    assert (tmp_path / "0.parquet").exists()


def test_a_selection_that_fails_leaves_nothing(tmp_path, monkeypatch):
    values, ids, _, _ = random_pool(0)
    scored = write_corpus(tmp_path, values, ids)
    monkeypatch.setattr("surrogate.scoring.selecting.write_list", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        select_corpus(scored, tmp_path / "chosen", budget=Budget(texts=5))
    assert [path.name for path in tmp_path.iterdir()] == ["0.parquet"]


def test_token_budgets_need_a_column_of_counts(tmp_path):
    values, ids, tokens, _ = random_pool(0)
    without = write_corpus(tmp_path, values, ids)
    with pytest.raises(InputError, match=r"num_tokens.*not there"):
        select_corpus(without, tmp_path / "chosen", budget=Budget(tokens=100))
    with pytest.raises(InputError, match="no integers"):
        select_corpus(without, tmp_path / "chosen", budget=Budget(tokens=100), tokens_column="score:math")
    with pytest.raises(InputError, match="no effect"):
        select_corpus(without, tmp_path / "chosen", budget=Budget(texts=1), tokens_column="num_tokens")
    negative = write_corpus(tmp_path, values, ids, tokens=tokens - 50)
    with pytest.raises(InputError, match="negative"):
        select_corpus(negative, tmp_path / "chosen", budget=Budget(tokens=100))


def test_what_cannot_be_selected_is_refused_by_name(tmp_path):
    values, ids, tokens, _ = random_pool(0)
    scored = write_corpus(tmp_path, values, ids, tokens=tokens)
    for given, match in (
        ({}, "neither a budget nor min_score"),
        ({"budget": Budget(texts=10_000)}, "a budget of 10000 texts"),
        ({"budget": Budget(tokens=10**9)}, "tokens that may be chosen"),
        ({"budget": Budget(texts=1), "rule": "nothing"}, "not known"),
        ({"budget": Budget(texts=1), "temperature": 2.0}, "no option"),
        ({"min_score": float("nan")}, "finite"),
        ({"budget": Budget(texts=1), "combine": "code", "weights": {"code": 1.0}}, "weights have no effect"),
    ):
        with pytest.raises(InputError, match=match):
            select_corpus(scored, tmp_path / "chosen", **given)
    with pytest.raises(InputError, match="all of them excluded"):
        select_corpus(scored, tmp_path / "chosen", min_score=0.0, exclude=ids)
    assert len(select_corpus(scored, tmp_path / "none", min_score=1e9)) == 0
    with pytest.raises(MissingFileError, match="no selection"):
        CorpusSelection(tmp_path / "chosen")
    fidelity = SimpleNamespace(surrogate=[SimpleNamespace(target=name) for name in NAMES], targets_at_chance=lambda: ["code"])
    with pytest.raises(LowFidelityError, match="code"):
        select_corpus(scored, tmp_path / "chosen", budget=Budget(texts=1), fidelity=fidelity)
    assert len(select_corpus(scored, tmp_path / "chosen", budget=Budget(texts=1), combine="math", fidelity=fidelity)) == 1


def test_bad_scores_and_ids_are_refused(tmp_path):
    values, ids, _, _ = random_pool(0)
    broken = values.copy()
    broken[3, 1] = np.nan
    with pytest.raises(NotFiniteError, match=ids[3]):
        select_corpus(write_corpus(tmp_path, broken, ids), tmp_path / "chosen", budget=Budget(texts=1))
    with pytest.raises(InputError, match="32 hex digits"):
        select_corpus(write_corpus(tmp_path, values, ["x" * 32, *ids[1:]]), tmp_path / "chosen", budget=Budget(texts=1))
    twice = next(row for row, text_id in enumerate(ids) if ids.count(text_id) > 1)
    other = values.copy()
    other[twice] += 1
    with pytest.raises(InputError, match=ids[twice]):
        select_corpus(write_corpus(tmp_path, other, ids, cuts=[40]), tmp_path / "chosen", budget=Budget(texts=1))


def test_text_ids_survive_packing():
    ids = [np.random.default_rng(1).bytes(16).hex(), "0" * 32, "f" * 32, "ab" + "00" * 15]
    packed = pack(ids)
    assert unpack(packed).to_pylist() == ids
    assert [ids[row] for row in np.argsort(packed)] == sorted(ids)


def test_a_window_of_few_texts_fills_a_token_budget_like_one_of_many(tmp_path, monkeypatch):
    """Long and short texts by turns: what is left is filled from far down the order."""
    values = -np.arange(60, dtype=np.float32)[:, None]
    ids = [f"{number:032x}" for number in range(60)]
    tokens = np.array(list(itertools.islice(itertools.cycle([50, 1, 49, 2]), 60)))
    expected = select(Scores(values, text_ids=ids, target_names=["math"], num_tokens=tokens), budget=Budget(tokens=253))
    monkeypatch.setattr(disk_order, "WINDOW_TEXTS", 2)
    scored = write_corpus(tmp_path, values, ids, names=["math"], tokens=tokens)
    chosen = select_corpus(scored, tmp_path / "chosen", budget=Budget(tokens=253))
    assert chosen.text_ids == expected.text_ids and chosen.table()["rank"].to_pylist() == expected.ranks
    assert expected.ranks != list(range(1, len(expected) + 1))
