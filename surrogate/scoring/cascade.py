"""The cascade: a cheap predictor scores every text, the full one the best share of them.

Two runs of `score_corpus` over the same files with a selection between them. The second reads the files again and
encodes only the rows that the first lets through. What the first pass loses is measured on the labelled texts before
anything is scored (`surrogate.scoring.cascade_recall`) and stands in the manifest.

Output folder:

    first/          the scored corpus of the cheap predictor
    passed/         the selection that is let through
    full/           the scored corpus of the full predictor: what texts are selected from
    cascade.json    share, recall, counts and cost; written first with the recall, and again at the end

Cost: the cheap predictor on all texts and the full one on `share` of them; files are read twice.
Limit: with a share of 1 the scores are those of the full predictor alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oracle.artifacts import provenance, read_json, require_same, write_json
from oracle.errors import InputError, LowFidelityError
from surrogate.budget import Budget
from surrogate.rules.top import Top
from surrogate.scoring.cascade_recall import COMBINED, TargetRecall, measure_recall
from surrogate.scoring.checks import check_apart, check_folder
from surrogate.scoring.corpus import score_corpus
from surrogate.scoring.outputs import local_folder
from surrogate.scoring.scored_corpus import ScoredCorpus
from surrogate.scoring.scorer import read_identity
from surrogate.scoring.selecting import select_corpus

if TYPE_CHECKING:
    from oracle.labels import Labels
    from surrogate.predictor import InfluencePredictor
    from surrogate.scoring.files import CorpusSource

CASCADE_FILE, FIRST, PASSED, FULL = "cascade.json", "first", "passed", "full"


def score_cascade(
    first: InfluencePredictor | str | Path,
    full: InfluencePredictor | str | Path,
    source: CorpusSource,
    output: str | Path,
    *,
    labels: Labels,
    share: float = 0.2,
    top: float = 0.05,
    how: str = "sum_z",
    weights: Mapping[str, float] | None = None,
    min_recall: float | None = None,
    **scoring: Any,
) -> ScoredCorpus:
    """Score a corpus in two passes.

    Args:
        first: The cheap predictor (`hashed_ngrams` or `static_embedding` features), fitted, or its folder.
        full: The full predictor, or its folder.
        source: What `score_corpus` takes.
        output: Folder for both passes. A run that was killed goes on where it stopped.
        labels: The labels that both predictors were fitted on, for the recall.
        share: Share of the different texts that the full predictor gets to see.
        top: The share that will be selected at last; the recall is that of the best `top` of the labelled texts.
        how: How the first pass makes one number of several targets: 'sum_z', 'mean', 'max_z', 'min_z' or a target's name.
        weights: Weight of each target, for 'sum_z' and 'mean'.
        min_recall: Refuse to begin where the recall of the best is lower.
        **scoring: Options of `score_corpus` for both passes.

    Returns:
        The corpus scored by the full predictor, with the rows that were let through.

    Raises:
        LowFidelityError: The recall is below `min_recall`.
        InputError: `top` is more than `share`, `output` is inside the source, or an option cannot be used.
        MismatchError: `output` holds a cascade with other options.

    Example:
        >>> scored = score_cascade("cheap", "full", "pool/*.parquet", "scored", labels=labels, share=0.2)  # doctest: +SKIP
    """
    if not 0 < top <= share <= 1:
        raise InputError(
            f"top={top!r} with share={share!r}.",
            "0 < top <= share <= 1: no more can be selected than is let through",
            "raise share, or lower top.",
        )
    output = local_folder(output)
    check_apart(source, output)
    check_folder(output, mark=CASCADE_FILE)
    rows = measure_recall(_loaded(first), _loaded(full), labels, shares=[share], top=top, how=how, weights=weights)
    check_recall(rows, min_recall)
    identity = {
        **{name: read_identity(given).predictor for name, given in (("first", first), ("full", full))},
        "share": share,
        "top": top,
        "how": how,
        "weights": None if weights is None else dict(weights),
    }
    path = output / CASCADE_FILE
    if path.exists():
        require_same(read_json(path)["identity"], identity, where=output)
    told: dict[str, Any] = {"identity": identity, "recall": [row.as_dict() for row in rows], **provenance()}
    write_json(path, told)
    everything = score_corpus(first, source, output / FIRST, **scoring)
    rule = Top(combine=how, weights=weights)
    passed = select_corpus(everything, output / PASSED, budget=Budget(fraction=share), rule=rule)
    scored = score_corpus(full, source, output / FULL, only=passed.folder, **scoring)
    passes = {name: _cost(corpus) for name, corpus in ((FIRST, everything), (FULL, scored))}
    write_json(path, {**told, "counts": passed.counts, "passes": passes})
    return scored


def full_corpus(folder: Path) -> tuple[Path, float]:
    """Return where the texts of a cascade are selected from, and which share of the different texts they are.

    Raises:
        InputError: The cascade has not come to its end.
    """
    told = read_json(folder / CASCADE_FILE)
    if "counts" not in told:
        raise InputError(
            f"the cascade in {folder} has not come to its end.", "a finished one", "run the same `surrogate cascade` again."
        )
    return folder / FULL, told["counts"]["selected"] / told["counts"]["pool"]


def check_recall(rows: Sequence[TargetRecall], min_recall: float | None) -> None:
    """Raise `LowFidelityError` where the recall over all targets is below `min_recall`."""
    for row in rows:
        if min_recall is not None and row.target == COMBINED and row.recall < min_recall:
            raise LowFidelityError(
                f"a first pass that keeps {row.share:g} lets through {row.recall:.2f} of the best {row.top:g} "
                f"(95 % interval {row.interval[0]:.2f} to {row.interval[1]:.2f}, {row.num_best} texts).",
                f"a recall of at least {min_recall:g}",
                "keep a larger share, use richer features in the first pass, or score everything with the full predictor.",
            )


def _loaded(predictor: InfluencePredictor | str | Path) -> InfluencePredictor:
    from surrogate.predictor import InfluencePredictor

    return InfluencePredictor.load(predictor) if isinstance(predictor, (str, Path)) else predictor


def _cost(scored: ScoredCorpus) -> dict[str, Any]:
    manifest = scored.manifest
    return {name: manifest[name] for name in ("num_rows", "num_scored", "num_bad", "seconds", "flops")}
