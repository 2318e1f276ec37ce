"""Selecting from a scored corpus of any size: the same texts as `surrogate.select` would choose, without loading the scores.

The rules and budgets are those in memory, and so are the results: repeats of a text count once, z-scores are over all
texts, chance is drawn in the order of the text_ids, ties go by text_id, and a budget of tokens skips what does not fit.
What grows with the corpus is on disk; memory is bounded (see `surrogate.scoring.disk_pool`).

Left out: rules of one's own.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle import plugins
from oracle.artifacts import atomic_folder, fingerprint, provenance, read_json, require_same, write_json
from oracle.errors import InputError, InputTypeError
from surrogate.aggregation import Combination
from surrogate.budget import Budget, limit_of_totals
from surrogate.pool import LabelsLike
from surrogate.scoring.chosen import order_chosen, write_chosen_rows, write_list, write_positions
from surrogate.scoring.corpus_selection import LIST_FILE, META_FILE, TEXTS_FOLDER, CorpusSelection
from surrogate.scoring.disk_columns import Column
from surrogate.scoring.disk_order import check_streamed, combine_on_disk, fill_after, find_cut, order_on_disk
from surrogate.scoring.disk_pool import CorpusLike, DiskPool, find_tokens_column, read_disk_pool
from surrogate.scoring.outputs import local_folder
from surrogate.scoring.score_files import read_header
from surrogate.scoring.scored_corpus import ScoredCorpus
from surrogate.selection import Rule, check_fidelity, make_rule, rule_name

if TYPE_CHECKING:
    from surrogate.fidelity import Fidelity
    from surrogate.scoring.near_duplicates import NearDuplicates


def select_corpus(
    scored: CorpusLike | str | Path,
    output: str | Path,
    *,
    budget: Budget | None = None,
    rule: str | Rule = "top",
    min_score: float | None = None,
    tokens_column: str | None = None,
    labels: LabelsLike | None = None,
    fidelity: Fidelity | None = None,
    allow_low_fidelity: bool = False,
    exclude: Iterable[str] = (),
    seed: int = 0,
    near_duplicates: NearDuplicates | float | None = None,
    texts: bool = False,
    allow_incomplete: bool = False,
    **options: Any,
) -> CorpusSelection:
    """Choose texts from a scored corpus without loading its scores.

    Args:
        scored: What `score_corpus` returned, or its folder.
        output: Folder for the selection. A finished one of the same options and scores is returned as it is.
        budget: What may be kept; None with `min_score` keeps all that reach it.
        rule: top, top_share, softmax or random; with its options they choose what `surrogate.select` chooses.
        min_score: Only texts whose combined number (a target's own score with combine="<target>") is at least this; the
            budget is then the most that is kept.
        tokens_column: Column of the score files with token counts, for a budget of tokens; None looks for num_tokens.
        labels: Measured influence of some of the texts; a labelled text is ranked by its label.
        fidelity: Held-out fidelity of the predictor; makes the check under LowFidelityError possible.
        allow_low_fidelity: Go on where that check fails.
        exclude: text_ids that must not be chosen.
        seed: Seed of rules with chance.
        near_duplicates: How near-duplicates among the chosen are told (`NearDuplicates`), or the largest cosine that two may
            have; the worse one is dropped and not made up for, so that fewer texts may be kept than the budget allows. None
            compares nothing.
        texts: Also write the chosen rows of the inputs.
        allow_incomplete: Select from what is scored so far where files of the source are missing.
        options: Options of the rule, if it is given by name.

    Returns:
        The selection, which lies in `output`.

    Raises:
        InputError: An unknown rule or option, no token counts for a budget of tokens, a budget above the pool or below any
            text, or a text with different scores.
        MismatchError: `output` has a selection with other options, or labels or fidelity of other targets.
        NotFiniteError: A score or label is NaN or infinite.
        LowFidelityError: The surrogate does not beat chance on a target that the rule looks at.

    Example:
        >>> chosen = select_corpus(ScoredCorpus("scored"), "chosen", budget=Budget(fraction=0.1))   # doctest: +SKIP
        >>> chosen.text_ids[:3]                                                                    # doctest: +SKIP
    """
    scored = ScoredCorpus(scored) if isinstance(scored, (str, Path)) else scored
    wanted = _Wanted(
        make_rule(rule, options),
        budget=_checked(budget, min_score),
        min_score=min_score,
        tokens_column=_tokens_column(scored, budget, tokens_column),
        seed=seed,
        labels=labels,
        exclude=sorted(set(exclude)),
        near_duplicates=_told_by(near_duplicates),
        texts=texts,
    )
    check_streamed(wanted.rule)
    if isinstance(scored, ScoredCorpus) and not allow_incomplete:
        _check_complete(scored)
    at_chance = check_fidelity(wanted.rule, list(scored.target_names), fidelity, allow=allow_low_fidelity)
    output, identity = local_folder(output), {"corpus": corpus_fingerprint(scored), **wanted.identity()}
    if _is_finished(output, identity):
        return CorpusSelection(output)
    with atomic_folder(output) as partial:
        scratch = partial / "scratch"
        scratch.mkdir()
        counts, num_tokens = _select_into(partial, scored, wanted, scratch=scratch)
        shutil.rmtree(scratch)
        meta = {**identity, "targets_at_chance": at_chance, "allow_low_fidelity": allow_low_fidelity, **provenance()}
        write_json(partial / META_FILE, {"counts": counts, "num_tokens": num_tokens, "meta": meta})
    return CorpusSelection(output)


@dataclass(frozen=True)
class _Wanted:
    """What is asked for, checked."""

    rule: Rule
    budget: Budget | None
    min_score: float | None
    tokens_column: str | None
    seed: int
    labels: LabelsLike | None
    exclude: list[str]
    near_duplicates: NearDuplicates | None
    texts: bool

    @property
    def how(self) -> str:
        return getattr(self.rule, "combine", "sum_z")

    @property
    def weights(self) -> Mapping[str, float] | None:
        return getattr(self.rule, "weights", None)

    def identity(self) -> dict[str, Any]:
        """What decides the result, beside the corpus."""
        labels = self.labels
        return {
            "rule": rule_name(self.rule),
            "options": plugins.options_of(self.rule),
            "budget": None if self.budget is None else self.budget.as_dict(),
            "min_score": self.min_score,
            "tokens_column": self.tokens_column,
            "seed": self.seed,
            "labels": None if labels is None else fingerprint([list(labels.text_ids), np.asarray(labels.values).tolist()]),
            "exclude": fingerprint(self.exclude),
            "near_duplicates": None if self.near_duplicates is None else self.near_duplicates.identity(),
            "texts": self.texts,
        }


def _select_into(folder: Path, scored: CorpusLike, wanted: _Wanted, *, scratch: Path) -> tuple[dict[str, int], int | None]:
    """Write everything but meta.json; return the counts and the tokens of the chosen texts."""
    all_names = list(scored.target_names)
    names = [wanted.how] if wanted.how in all_names else all_names
    pool = read_disk_pool(
        scored,
        scratch,
        target_names=names,
        tokens_column=wanted.tokens_column,
        labels=wanted.labels,
        exclude=wanted.exclude,
    )
    if not pool.num_rows:
        raise InputError(
            f"no text may be chosen: {pool.num_pool} are scored{', all of them excluded' if pool.num_pool else ''}.",
            "a corpus with texts that are not excluded",
            "exclude less." if pool.num_pool else "score a corpus that has texts.",
        )
    Combination.of(wanted.how, target_names=all_names, weights=wanted.weights)  # refuses weights beside a target's name
    way = Combination.of(wanted.how, target_names=names, weights=wanted.weights)
    ordered = _choose(pool, way, wanted, scratch)
    counts = {
        "pool": pool.num_pool,
        "duplicates": pool.num_duplicates,
        "excluded": pool.num_pool - pool.num_rows,
        "labels_not_in_pool": 0 if wanted.labels is None else len(wanted.labels.text_ids) - pool.num_labels_found,
        "candidates": pool.num_rows,
        "labelled": pool.num_labelled,
    }
    if wanted.near_duplicates is not None:
        num_before = ordered.num_rows
        ordered = wanted.near_duplicates.keep_distinct(ordered, scored, scratch)
        counts["near_duplicates"] = num_before - ordered.num_rows
    blind = None if getattr(wanted.rule, "uses_scores", True) else rule_name(wanted.rule)
    has_tokens = wanted.tokens_column is not None
    file_names = [file.name for file in scored.files]
    by = write_list(ordered, folder / LIST_FILE, names=file_names, reason=blind, with_tokens=has_tokens)
    num_tokens = by.pop("tokens")
    write_positions(ordered, scored, folder, scratch=scratch)
    if wanted.texts:
        write_chosen_rows(scored, folder, folder / TEXTS_FOLDER)
    counts |= {"selected": ordered.num_rows, **{f"by_{name}": count for name, count in sorted(by.items())}}
    return counts, num_tokens if has_tokens else None


def _is_finished(output: Path, identity: dict[str, Any]) -> bool:
    """Whether `output` has this very selection; refuse another one, and a folder that is something else."""
    if (output / META_FILE).exists() and (output / LIST_FILE).exists():
        stored = read_json(output / META_FILE)["meta"]
        require_same({name: value for name, value in stored.items() if name in identity}, identity, where=output)
        return True
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"{output} is there already and is no selection.", "a new or empty folder", "name another folder for the selection."
        )
    return False


def corpus_fingerprint(scored: CorpusLike) -> str:
    """Return what identifies the scores of a corpus: predictor, options, and the files in the state that was scored."""
    return fingerprint([[dataclasses.asdict(read_header(file.path)), file.num_rows, file.stamp] for file in scored.files])


def _choose(pool: DiskPool, way: Combination, wanted: _Wanted, scratch: Path) -> Column:
    """Return records of the chosen texts, best first."""
    budget, at_most = wanted.budget, wanted.min_score is not None
    if budget is not None and not at_most:  # refused before the order is made
        _limit(budget, pool, (pool.num_rows, pool.total_tokens, pool.smallest_tokens))
    combined = combine_on_disk(pool, way, scratch)
    keys = order_on_disk(wanted.rule, combined, scratch, seed=wanted.seed, min_score=wanted.min_score)
    sizes = pool.num_tokens
    limit = pool.num_rows if budget is None else _limit(budget, pool, _candidates(keys, sizes), at_most=at_most)
    if sizes is None:
        cut = find_cut(lambda: ((block, None) for block in keys.blocks()), limit)
        beyond = np.zeros(0, dtype=np.int64)
    else:
        cut = find_cut(lambda: zip(keys.blocks(), sizes.blocks(), strict=True), limit)
        beyond = fill_after(cut, keys, sizes)
    return order_chosen(pool, combined, keys, cut=cut, beyond=beyond, folder=scratch)


def _candidates(keys: Column, sizes: Column | None) -> tuple[int, int, int]:
    """Return how many texts may be chosen, their tokens, and those of the shortest."""
    num_texts = total = 0
    smallest: int | None = None
    others = None if sizes is None else sizes.blocks()
    for block in keys.blocks():
        may_be = block > 0
        num_texts += int(may_be.sum())
        if others is not None and len(size := next(others)[may_be]):
            total += int(size.sum())
            smallest = int(size.min()) if smallest is None else min(smallest, int(size.min()))
    return num_texts, total, smallest or 0


def _limit(budget: Budget, pool: DiskPool, candidates: tuple[int, int, int], *, at_most: bool = False) -> int:
    num_texts, num_tokens, smallest = candidates
    return limit_of_totals(
        budget,
        num_texts,
        num_tokens=None if pool.num_tokens is None else num_tokens,
        smallest=smallest,
        num_pool=pool.num_pool,
        at_most=at_most,
    )


def _told_by(given: NearDuplicates | float | None) -> NearDuplicates | None:
    from surrogate.scoring.near_duplicates import NearDuplicates

    return NearDuplicates(max_similarity=given) if isinstance(given, (int, float)) else given


def _checked(budget: Budget | None, min_score: float | None) -> Budget | None:
    if budget is None and min_score is None:
        raise InputError("neither a budget nor min_score.", "one of them, or both", "write budget=Budget(fraction=0.1), say.")
    if budget is not None and not isinstance(budget, Budget):
        raise InputTypeError(f"budget={budget!r} is not a Budget.", "a surrogate.Budget", "write Budget(fraction=0.2), say.")
    if min_score is not None and not np.isfinite(min_score):
        raise InputError(f"min_score={min_score!r}.", "a finite number", "give the score that a text must reach.")
    return budget


def _check_complete(scored: ScoredCorpus) -> None:
    missing = scored.manifest["missing"]
    if missing:
        raise InputError(
            f"{len(missing)} files of the source of {scored.folder} are not scored yet, first {missing[0]}.",
            "a corpus that is scored to its end",
            "run the scoring again, which does what is missing, or pass allow_incomplete=True.",
        )


def _tokens_column(scored: CorpusLike, budget: Budget | None, name: str | None) -> str | None:
    if budget is not None and budget.tokens is not None:
        return find_tokens_column(scored, name)
    if name is not None:
        raise InputError(
            f"tokens_column={name!r} has no effect without a budget of tokens.", "Budget(tokens=...)", "leave out one of the two."
        )
    return None
