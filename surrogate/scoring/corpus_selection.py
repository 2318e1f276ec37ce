"""What was chosen from a scored corpus, as it lies in a folder.

    selection.parquet            one row per text, best first: rank, text_id, reason, combined, num_tokens, file, position
    positions/, positions.json   the positions of the chosen rows by input file (`surrogate.scoring.positions`)
    texts/<name>.parquet         the chosen rows of the input files, if they were asked for
    meta.json                    rule, budget, counts; its existence means complete

Left out: the score of each target; join the score files by text_id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle.artifacts import read_json
from oracle.errors import InputError, MissingFileError
from surrogate.scoring.positions import read_positions

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

LIST_FILE, META_FILE, TEXTS_FOLDER = "selection.parquet", "meta.json", "texts"


class CorpusSelection:
    """What was chosen from a scored corpus, best first, as it lies in a folder.

    Attributes:
        folder: The folder.
        counts: Numbers of texts: pool, duplicates, excluded, candidates, labelled, labels_not_in_pool, selected, by_<reason>,
            and near_duplicates where they were looked for.
        num_tokens: Tokens of the chosen texts, or None where they are not known.
        meta: Rule, options, budget, seed, fingerprint of the corpus, package version.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open what `select_corpus` wrote.

        Raises:
            MissingFileError: There is no complete selection in `folder`.
        """
        self.folder = Path(folder)
        if not (self.folder / META_FILE).exists():
            raise MissingFileError(
                f"there is no selection from a corpus in {folder}.", "a folder that select_corpus wrote", "check the path."
            )
        stored = read_json(self.folder / META_FILE)
        self.counts: dict[str, int] = stored["counts"]
        self.num_tokens: int | None = stored["num_tokens"]
        self.meta: dict[str, Any] = stored["meta"]

    def __len__(self) -> int:
        return self.counts["selected"]

    def __repr__(self) -> str:
        return f"CorpusSelection({len(self)} of {self.counts['pool']} texts, rule={self.meta['rule']!r}, {str(self.folder)!r})"

    @property
    def text_ids(self) -> list[str]:
        """The text_ids, best first."""
        return self.table(["text_id"])["text_id"].to_pylist()

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the list of chosen texts, best first, as one table."""
        import pyarrow.parquet as pq

        return pq.read_table(self.folder / LIST_FILE, columns=None if columns is None else list(columns))

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the list in batches, best first."""
        import pyarrow.parquet as pq

        yield from pq.ParquetFile(self.folder / LIST_FILE).iter_batches(columns=None if columns is None else list(columns))

    def positions(self, name: str) -> np.ndarray:
        """Return the positions of the chosen rows of an input file, rising."""
        return read_positions(self.folder, name)

    def dataset(self, *, streaming: bool = False) -> Dataset | IterableDataset:
        """Return the chosen rows of the inputs as a `datasets.Dataset`, in the order of files and rows.

        Raises:
            InputError: The texts were not written, or the files have different columns.
        """
        import datasets

        files = sorted(str(path) for path in (self.folder / TEXTS_FOLDER).rglob("*.parquet"))
        if not files:
            raise InputError(
                f"the selection {self.folder} holds text_ids only.", "one made with texts=True", "select again with texts=True."
            )
        cache = str(self.folder / ".cache")
        try:
            return datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming, cache_dir=cache)
        except datasets.exceptions.DatasetGenerationError as error:
            raise InputError(
                f"the chosen rows of {len(files)} files do not fit into one dataset: {error.__cause__ or error}.",
                "files with the same columns",
                f"read {self.folder / TEXTS_FOLDER} file by file, or score files of other columns into another folder.",
            ) from error
