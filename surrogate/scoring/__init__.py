"""Scoring large corpora: one shard in, one score file out; engines for one machine and for many around the same worker.

Files, in the order in which they build on each other:

    files, items            what a source names; what reading yields: pieces of rows, bad rows, bad files
    json_reader, readers    files as streams of rows
    positions, blocks, layout, rows      rows as blocks of texts with their text_ids
    scorer                  a block of texts in, scores out
    score_files, segments, outputs       what is written, and under which names
    batch                   scores in pipelines of others
    read_ahead, shard       `score_shard`: the one worker
    attempts, worker, engines            who runs it on many shards, and what becomes of a shard whose worker dies
    planning, manifest, lock, progress, scored_corpus, checks, corpus       `score_corpus` around an engine; reading the scores
    disk_columns, disk_pool, disk_order, chosen, near_duplicates, corpus_selection, selecting       `select_corpus`
    cascade_recall, cascade, commands    two passes; the command line

The names below are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surrogate.scoring.batch import ScoreBatch as ScoreBatch
    from surrogate.scoring.batch import stream_scores as stream_scores
    from surrogate.scoring.cascade import score_cascade as score_cascade
    from surrogate.scoring.cascade_recall import measure_recall as measure_recall
    from surrogate.scoring.cascade_recall import recall_table as recall_table
    from surrogate.scoring.corpus import score_corpus as score_corpus
    from surrogate.scoring.corpus_selection import CorpusSelection as CorpusSelection
    from surrogate.scoring.files import InputFile as InputFile
    from surrogate.scoring.files import list_inputs as list_inputs
    from surrogate.scoring.layout import ScoreOptions as ScoreOptions
    from surrogate.scoring.lock import LockedError as LockedError
    from surrogate.scoring.near_duplicates import NearDuplicates as NearDuplicates
    from surrogate.scoring.outputs import ShardReport as ShardReport
    from surrogate.scoring.score_files import read_header as read_header
    from surrogate.scoring.scored_corpus import ScoredCorpus as ScoredCorpus
    from surrogate.scoring.selecting import select_corpus as select_corpus
    from surrogate.scoring.shard import ScoreTask as ScoreTask
    from surrogate.scoring.shard import Shard as Shard
    from surrogate.scoring.shard import score_shard as score_shard

_HOMES = {
    "select_corpus": "selecting",
    "recall_table": "cascade_recall",
    "measure_recall": "cascade_recall",
    "score_cascade": "cascade",
    "NearDuplicates": "near_duplicates",
    "CorpusSelection": "corpus_selection",
    "InputFile": "files",
    "LockedError": "lock",
    "ScoreBatch": "batch",
    "ScoreOptions": "layout",
    "ScoreTask": "shard",
    "ScoredCorpus": "scored_corpus",
    "Shard": "shard",
    "ShardReport": "outputs",
    "list_inputs": "files",
    "read_header": "score_files",
    "score_corpus": "corpus",
    "score_shard": "shard",
    "stream_scores": "batch",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surrogate.scoring' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"surrogate.scoring.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
