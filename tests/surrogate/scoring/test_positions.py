"""Positions come back as they were written, and their fingerprint tells them apart."""

import numpy as np
import pytest

from oracle.errors import MissingFileError
from surrogate.scoring.positions import PositionsWriter, among, positions_fingerprint, read_positions


def write(folder, positions):
    writer = PositionsWriter(folder)
    for name, rows in positions.items():
        writer.write(name, np.array(rows))
    writer.close()
    return positions_fingerprint(folder)


def test_positions_come_back_by_file(tmp_path):
    write(tmp_path, {"a/x.parquet": [0, 7, 9], "b.jsonl.gz": [3]})
    np.testing.assert_array_equal(read_positions(tmp_path, "a/x.parquet"), [0, 7, 9])
    assert len(read_positions(tmp_path, "another")) == 0


def test_the_fingerprint_is_of_names_and_positions(tmp_path):
    same = [write(tmp_path / folder, {"a": [1, 2], "b": [3]}) for folder in "xy"]
    others = [
        write(tmp_path / "z", given) for given in ({"a": [1, 2], "c": [3]}, {"a": [1], "b": [2, 3]}, {"a": [1, 2], "b": [4]})
    ]
    assert len(set(same)) == 1 and len({*same, *others}) == 4
    (tmp_path / "z" / "positions.json").unlink()
    with pytest.raises(MissingFileError):
        positions_fingerprint(tmp_path / "z")


def test_rows_of_a_block_are_found_among_all_that_are_wanted():
    wanted = np.array([2, 3, 50, 51, 52, 90])
    assert among(np.arange(50, 53), wanted).all() and not among(np.arange(53, 90), wanted).any()
    np.testing.assert_array_equal(among(np.array([3, 7, 90]), wanted), [True, False, True])
    assert len(among(np.zeros(0, dtype=np.int64), wanted)) == 0
