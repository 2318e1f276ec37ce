"""The texts that were chosen from a corpus: best first in one list, by file and position, and the rows of the inputs.

Cost: two dealings of the chosen texts to parts that are sorted in memory, 50 bytes of disk each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oracle.artifacts import storing
from oracle.errors import InputError
from surrogate.scoring.disk_columns import Column, Spill, num_parts_for, unpack
from surrogate.scoring.disk_order import KEY_TYPE, Cut, places_in_order
from surrogate.scoring.disk_pool import PLACE, CorpusLike, DiskPool
from surrogate.scoring.outputs import output_name
from surrogate.scoring.positions import PositionsWriter, among, read_positions
from surrogate.scoring.score_files import POSITION

CHOSEN = np.dtype([*PLACE, ("key", KEY_TYPE), ("rank", "<i8"), ("combined", "<f8"), ("tokens", "<i8"), ("is_label", "?")])
KEYS_PER_PART = 1024  # numbers looked at to cut the order into parts of about the same size


def order_chosen(pool: DiskPool, combined: Column, keys: Column, *, cut: Cut, beyond: np.ndarray, folder: Path) -> Column:
    """Put the chosen texts in the order of the rule.

    Args:
        pool: The pool.
        combined: One number per text.
        keys: Numbers that give the order.
        cut: All texts up to here were chosen.
        beyond: Rows of later ones that were chosen too, in the order.
        folder: Where the column is kept.

    Returns:
        Records of `CHOSEN`, best first; ranks count from 1.
    """
    num_texts = sum(int(mask.sum()) for mask in _masks(keys, cut))
    num_parts = num_parts_for(num_texts, CHOSEN.itemsize)
    borders = _borders(keys, cut, num_parts=num_parts, step=max(1, num_texts // (num_parts * KEYS_PER_PART)))
    ordered = Column(folder / "chosen", CHOSEN)
    later = np.zeros(len(beyond), dtype=CHOSEN)
    by_row = np.argsort(beyond)
    with Spill(folder / "by_key", CHOSEN, num_parts=num_parts) as spill:
        start = 0
        for records, mask in zip(_records(pool, combined, keys), _masks(keys, cut), strict=True):
            chosen = records[mask]
            spill.add(num_parts - 1 - np.searchsorted(borders, chosen["key"], side="right"), chosen)
            place = np.searchsorted(beyond[by_row], [start, start + len(records)])
            wanted = by_row[place[0] : place[1]]
            later[wanted] = records[beyond[wanted] - start]
            start += len(records)
        for part in spill.parts():
            part = part[np.argsort(~part["key"], kind="stable")]
            part["rank"] = np.arange(ordered.num_rows + 1, ordered.num_rows + len(part) + 1)
            ordered.append(part)
    later["rank"] = places_in_order(beyond, keys) + 1
    ordered.append(later)
    ordered.close()
    return ordered


def write_list(ordered: Column, path: Path, *, names: Sequence[str], reason: str | None, with_tokens: bool) -> dict[str, int]:
    """Write the list of chosen texts, best first.

    Args:
        ordered: What `order_chosen` returned.
        path: The parquet file.
        names: Names of the corpus's files.
        reason: Why each was chosen; None tells labels from scores.
        with_tokens: Whether token counts are known.

    Returns:
        Numbers of texts by reason, and their tokens under "tokens".
    """
    reasons = ["score", "label"] if reason is None else [reason]
    counts = dict.fromkeys(["label", "score", *reasons], 0) | {"tokens": 0}
    writer: pq.ParquetWriter | None = None
    for records in _blocks_or_nothing(ordered):
        by = records["is_label"].astype(np.int8) if reason is None else np.zeros(len(records), dtype=np.int8)
        columns: dict[str, pa.Array] = {
            "rank": pa.array(records["rank"]),
            "text_id": unpack(records["id"]),
            "reason": pa.DictionaryArray.from_arrays(pa.array(by), reasons),
            "combined": pa.array(records["combined"]),
        }
        if with_tokens:
            columns["num_tokens"] = pa.array(records["tokens"])
        files, inverse = np.unique(records["file"], return_inverse=True)
        own_names = pa.array([names[number] for number in files], pa.string())
        columns["file"] = pa.DictionaryArray.from_arrays(pa.array(inverse.astype(np.int32)), own_names)
        columns["position"] = pa.array(records["position"])
        table = pa.table(columns)
        if writer is None:
            writer = pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
        for number, name in enumerate(reasons):
            counts[name] += int((by == number).sum())
        counts["tokens"] += int(records["tokens"].sum())
    assert writer is not None
    writer.close()
    return counts


def write_positions(ordered: Column, scored: CorpusLike, folder: Path, *, scratch: Path) -> None:
    """Write the positions of the chosen texts by file (see `surrogate.scoring.positions`)."""
    rows = np.cumsum([0, *(file.num_rows for file in scored.files)])
    num_rows = max(1, int(rows[-1]))
    num_parts = num_parts_for(ordered.num_rows, np.dtype(PLACE).itemsize)
    writer = PositionsWriter(folder)
    waiting: list[np.ndarray] = []
    current = -1

    def finish() -> None:
        if waiting:
            writer.write(scored.files[current].name, np.concatenate(waiting))
            waiting.clear()

    with Spill(scratch / "by_file", np.dtype(PLACE), num_parts=num_parts) as spill:
        for records in ordered.blocks():
            longest = np.diff(rows)[records["file"]]
            row = rows[records["file"]] + np.minimum(records["position"], longest - 1)  # rises with file and position
            spill.add(row * num_parts // num_rows, records[[name for name, _ in PLACE]].astype(PLACE))
        for part in spill.parts():
            part = part[np.lexsort((part["position"], part["file"]))]
            for records in np.split(part, np.flatnonzero(np.diff(part["file"].astype(np.int64))) + 1):
                if len(records) and records["file"][0] != current:
                    finish()
                    current = int(records["file"][0])
                waiting.append(records["position"].astype(np.int64))
    finish()
    writer.close()


def write_chosen_rows(scored: CorpusLike, selection: Path, folder: Path) -> None:
    """Write `<folder>/<name>.parquet` for each input file with chosen rows, in their order in the file.

    Args:
        scored: The corpus; its `joined` reads the inputs again, which must not have changed.
        selection: Where the positions are.
        folder: For the files.
    """
    for file in scored.files:
        wanted = read_positions(selection, file.name)
        if not len(wanted):
            continue
        path = folder / output_name(file.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with storing(path):
            num_written = _write_rows(scored, file.name, wanted, path)
        if num_written != len(wanted):
            raise InputError(
                f"only {num_written} of {len(wanted)} chosen rows of {file.name} were found again.",
                "the input files as they were scored",
                "score the corpus again.",
            )


def _blocks_or_nothing(ordered: Column) -> Iterator[np.ndarray]:
    if ordered.num_rows:
        yield from ordered.blocks()
    else:
        yield np.zeros(0, dtype=CHOSEN)


def _masks(keys: Column, cut: Cut) -> Iterator[np.ndarray]:
    start = 0
    for block in keys.blocks():
        yield cut.takes(block, start)
        start += len(block)


def _borders(keys: Column, cut: Cut, *, num_parts: int, step: int) -> np.ndarray:
    """Return `num_parts - 1` rising numbers that cut the chosen texts into parts of about the same size."""
    if num_parts == 1:
        return np.zeros(0, dtype=KEY_TYPE)
    some = [block[mask][::step] for block, mask in zip(keys.blocks(), _masks(keys, cut), strict=True)]
    sample = np.sort(np.concatenate(some))
    return sample[np.arange(1, num_parts) * len(sample) // num_parts]


def _records(pool: DiskPool, combined: Column, keys: Column) -> Iterator[np.ndarray]:
    columns = [pool.places.blocks(), combined.blocks(), keys.blocks(), pool.is_label.blocks()]
    tokens = None if pool.num_tokens is None else pool.num_tokens.blocks()
    for places, numbers, key, is_label in zip(*columns, strict=True):
        records = np.zeros(len(places), dtype=CHOSEN)
        for name, _ in PLACE:
            records[name] = places[name]
        records["key"], records["combined"], records["is_label"] = key, numbers, is_label
        if tokens is not None:
            records["tokens"] = next(tokens)
        yield records


def _write_rows(scored: CorpusLike, name: str, wanted: np.ndarray, path: Path) -> int:
    """Write the wanted rows of one file and return how many there were."""
    if name.lower().endswith(".parquet"):
        schema = None
    else:  # rows of JSON have the types of their block; those of the file are known at its end
        found = {table.schema for table in _chosen_rows(scored, name, wanted)}
        schema = pa.unify_schemas(sorted(found, key=str), promote_options="permissive")
    writer: pq.ParquetWriter | None = None
    num_written = 0
    for table in _chosen_rows(scored, name, wanted):
        if schema is not None:
            table = pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
        if writer is None:
            writer = pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
        num_written += table.num_rows
    if writer is not None:
        writer.close()
    return num_written


def _chosen_rows(scored: CorpusLike, name: str, wanted: np.ndarray) -> Iterator[pa.Table]:
    for table in scored.joined(name):
        kept = table.filter(pa.array(among(table[POSITION].to_numpy(), wanted)))
        if kept.num_rows:
            yield kept
