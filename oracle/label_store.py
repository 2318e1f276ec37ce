"""Finished labels while a sample is being measured: in memory and, with a folder, as one file per block.

A block's name and bytes follow from its texts alone, so whoever measures it writes the same file, and a call that was
killed goes on where it stopped. The result takes the blocks' place at the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oracle.artifacts import atomic_path, fingerprint, read_json, require_same, storing, write_json
from oracle.errors import InputError
from oracle.labels import Labels, from_table, to_table

IDENTITY_FILE, CHOICE_FILE = "identity.json", "choice.json"
COUNTED_BLOCKS = "counted_blocks"  # in meta.json: the blocks in the folder whose seconds `label_seconds` has already


class LabelStore:
    """Finished rows by text_id.

    A kill while the result is written may leave blocks whose seconds are in meta.json already; it names them.

    Args:
        folder: Where blocks and result lie; None keeps everything in memory.
        target_names: Names of the C columns.
        identity: What must be the same for stored labels to be gone on with.

    Raises:
        MismatchError: `folder` has labels of another identity.
    """

    def __init__(self, folder: Path | None, target_names: list[str], identity: dict[str, Any]) -> None:
        self.folder, self.target_names, self.identity = folder, target_names, identity
        self.blocks: list[Labels] = []
        self.seconds = 0.0  # spent on measuring, over all processes that worked on this folder
        if folder is None:
            return
        self._bind(folder)
        self.reload()

    def _bind(self, folder: Path) -> None:
        """Let the folder hold labels of this identity only; one without any finished row may still be given another."""
        has_rows = (folder / "labels.parquet").exists() or any((folder / "blocks").glob("*.parquet"))
        if has_rows and (folder / IDENTITY_FILE).exists():
            self._check_bound(folder)
            return
        if not has_rows:
            with storing(folder / "blocks"):
                shutil.rmtree(folder / "blocks", ignore_errors=True)  # seconds of a block that was never finished
                (folder / CHOICE_FILE).unlink(missing_ok=True)
        write_json(folder / IDENTITY_FILE, self.identity)

    def _check_bound(self, folder: Path) -> None:
        require_same(read_json(folder / IDENTITY_FILE), self.identity, where=folder)

    def choice(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return how a method chose to measure the texts of this folder, by `make` if it has not chosen yet."""
        path = None if self.folder is None else self.folder / CHOICE_FILE
        if path is not None and path.exists():
            return read_json(path)
        made = make()
        if path is not None:
            write_json(path, made)
        return made

    def reload(self) -> None:
        """Read anew what lies in the folder, whichever process put it there."""
        assert self.folder is not None
        self.blocks, self.seconds = [], 0.0
        counted: set[str] = set()
        if (self.folder / "labels.parquet").exists():
            self.blocks.append(Labels.load(self.folder))
            cost = self.blocks[0].meta["cost"]
            self.seconds += cost["label_seconds"]
            counted = set(cost[COUNTED_BLOCKS])
        paths = sorted((self.folder / "blocks").glob("*.json"))
        self.seconds += sum(read_json(path)["seconds"] for path in paths if path.stem not in counted)
        self.blocks += [self._read(path) for path in sorted((self.folder / "blocks").glob("*.parquet"))]

    def _read(self, path: Path) -> Labels:
        import pyarrow.parquet as pq

        return from_table(pq.read_table(path), self.target_names, units="", meta={})

    def done(self) -> set[str]:
        """Return the text_ids of all finished rows."""
        return {text_id for block in self.blocks for text_id in block.text_ids}

    def num_tokens(self) -> list[int]:
        """Return the tokens of every text that has labels, in the order of their text_ids; 0 where nobody counted them."""
        found = {
            text_id: 0 if np.isnan(number) else int(number)
            for block in self.blocks
            for text_id, number in zip(block.text_ids, block.columns["num_tokens"], strict=True)
        }
        return [found[text_id] for text_id in sorted(found)]

    def block_names(self) -> list[str]:
        """Name the blocks that lie in the folder."""
        return [] if self.folder is None else sorted(path.stem for path in (self.folder / "blocks").glob("*.json"))

    def is_complete(self, text_ids: Sequence[str]) -> bool:
        """Whether `labels.parquet` holds all of these texts."""
        is_file = self.folder is not None and (self.folder / "labels.parquet").exists()
        return is_file and set(self.blocks[0].text_ids) >= set(text_ids)

    def finished(self, text_ids: Sequence[str]) -> Labels:
        """Return labels as `labels.parquet` has them."""
        return self.blocks[0].take(list(text_ids))

    def add(self, block: Labels, *, seconds: float) -> None:
        """Keep a block; with a folder, on disk before anything else is measured.

        The seconds go into a file of their own, so that the block's bytes stay the same.

        Raises:
            MismatchError: Another call has bound the folder to its own identity while this one had no block there.
        """
        self.blocks.append(block)
        self.seconds += seconds
        if self.folder is not None:
            import pyarrow.parquet as pq

            self._check_bound(self.folder)
            name = fingerprint(block.text_ids)
            write_json(self.folder / "blocks" / f"{name}.json", {"seconds": seconds})
            with atomic_path(self.folder / "blocks" / f"{name}.parquet") as partial:
                pq.write_table(to_table(block), partial)

    def check_all_there(self, text_ids: Sequence[str]) -> None:
        """Refuse to finish without the blocks of other processes.

        Raises:
            InputError: Some texts have no finished row.
        """
        missing = set(text_ids) - self.done()
        if missing:
            raise InputError(
                f"{len(missing)} of {len(text_ids)} texts were measured by other processes and are not in {self.folder}.",
                "a workdir that all processes share",
                "put workdir on a disk that every process sees under this path, or leave workdir out.",
            )

    def finish(self, text_ids: Sequence[str], *, units: str, meta: dict[str, Any]) -> Labels:
        """Join the blocks, write the result, drop the block files; return the labels of the sample, in its order.

        Labels of texts outside the sample, measured earlier into the same folder, stay in the file behind those of the sample.
        """
        values = np.concatenate([block.values for block in self.blocks])
        halves = np.concatenate([block.halves for block in self.blocks], axis=1)
        names = sorted({name for block in self.blocks for name in block.columns})
        columns = {name: np.concatenate([block.columns[name] for block in self.blocks]) for name in names}
        ids = [text_id for block in self.blocks for text_id in block.text_ids]
        others = sorted(set(ids) - set(text_ids))
        everything = Labels(values, ids, self.target_names, units, halves, columns, meta).take([*text_ids, *others])
        if self.folder is not None:
            everything.save(self.folder)
            with storing(self.folder / "blocks"):
                shutil.rmtree(self.folder / "blocks", ignore_errors=True)
        return everything.take(list(text_ids))
