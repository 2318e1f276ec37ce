"""What a run folder holds beside the results of its stages: the pool, what the run remembers, and what it has cost.

run.json  pool.parquet  cost.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oracle.artifacts import fingerprint, read_json, require_same, write_json
from oracle.errors import InputError, MissingFileError, check_at_least
from oracle.texts import list_text_ids, read_report, read_texts, write_texts

if TYPE_CHECKING:
    from datasets import Dataset


class RunFolder:
    """Pool, settings and costs of a run.

    Args:
        folder: Where everything is kept; made when first written to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._pool: Dataset | None = None

    # ------------------------------------------------------------------ pool and settings

    def set_pool(self, source: Any, **reading: Any) -> dict[str, Any]:
        """Read the pool once and keep it; a pool given again must have the same texts.

        Args:
            source: Anything `oracle.read_texts` takes.
            **reading: Its options.

        Raises:
            MismatchError: The run already has another pool.
        """
        texts = read_texts(source, **reading)
        report = read_report(texts)
        identity = {"texts": fingerprint(sorted(list_text_ids(texts))), "num_texts": len(texts)}
        settings = self.settings()
        if "pool" in settings:
            require_same(settings["pool"], identity, where=self.folder)
        else:
            write_texts(texts, self.folder / "pool.parquet")
            self.remember(pool=identity, rejected=report.rejected)
        return {"num_texts": len(texts), "num_read": report.num_read, "rejected": report.rejected}

    def pool(self) -> Dataset:
        """Return the pool.

        Raises:
            MissingFileError: No stage was given a pool yet.
        """
        if self._pool is None:
            if "pool" not in self.settings():
                raise MissingFileError(
                    f"the run {self.folder} has no pool yet.",
                    "a run folder whose first stage was given --pool",
                    "name the pool: --pool texts.jsonl.",
                )
            self._pool = read_texts(str(self.folder / "pool.parquet"))
        return self._pool

    def settings(self) -> dict[str, Any]:
        """Return what the run remembers: pool, model, targets."""
        path = self.folder / "run.json"
        return read_json(path) if path.exists() else {}

    def sample(self, size: int, *, seed: int = 0) -> Dataset:
        """Return `size` texts of the pool, chosen by content and seed; a larger sample contains a smaller one.

        Raises:
            InputError: The pool is smaller.
        """
        pool = self.pool()
        check_at_least("sample_size", size, 1)
        if size > len(pool):
            raise InputError(
                f"sample_size={size}, and the pool has {len(pool)} texts.", f"at most {len(pool)}", "label fewer texts."
            )
        ids = list_text_ids(pool)
        order = sorted(range(len(pool)), key=lambda row: fingerprint([seed, ids[row]]))
        return pool.select(order[:size])

    def texts(self, text_ids: Sequence[str]) -> Dataset:
        """Return texts of the pool by id, in this order."""
        rows = {text_id: row for row, text_id in enumerate(list_text_ids(self.pool()))}
        return self.pool().select([rows[text_id] for text_id in text_ids])

    # ------------------------------------------------------------------ cost and settings

    def set_cost(self, stage: str, *, seconds: float, flops: float, num_texts: int | None = None) -> None:
        """Write what a stage's present result has cost; writing it again changes nothing."""
        entry: dict[str, float] = {"seconds": round(seconds, 3), "flops": flops}
        if num_texts is not None:
            entry["num_texts"] = num_texts
        write_json(self.folder / "cost.json", {**self.costs(), stage: entry})

    def costs(self) -> dict[str, dict[str, float]]:
        """Return seconds and FLOPs by stage."""
        path = self.folder / "cost.json"
        return read_json(path) if path.exists() else {}

    def remember(self, **entries: Any) -> None:
        """Add entries to what the run remembers."""
        write_json(self.folder / "run.json", {**self.settings(), **entries})
