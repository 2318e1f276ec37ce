"""What `surrogate explain` does: accounts of pool texts' scores, with the beginnings of the texts that are named in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oracle.errors import InputError, check_at_least
from surrogate.aggregation import combine
from surrogate.explanation import TextExplanation
from surrogate.pipeline import Run
from surrogate.predictor import strings_of

DEFAULT_TOP = 3
EXCERPT_CHARACTERS = 120


def explain_stage(
    folder: Path,
    text_ids: Sequence[str] | None,
    *,
    top: int | None,
    top_k: int,
    surrogate: str | None,
    method: str,
) -> dict[str, Any]:
    """Explain the scores of texts of the pool, by id or those with the highest scores.

    Raises:
        InputError: Texts were named in both ways, or one is not in the pool.
    """
    if text_ids and top is not None:
        raise InputError(f"{len(text_ids)} --text-id and --top {top} were given.", "one of the two", "leave one of them out.")
    run = Run(folder)
    predictor = run.predictor(surrogate)
    chosen = list(text_ids) if text_ids else _best(run, predictor.surrogate_name, DEFAULT_TOP if top is None else top)
    unknown = sorted(set(chosen) - set(run.pool()["text_id"]))
    if unknown:
        raise InputError(
            f"--text-id {unknown[0]} is not in the pool of {folder}.",
            "text_ids as the scores and the selection of this run have them",
            "look them up in its scores/ folder, or pass --top.",
        )
    explanations = predictor.explain(run.texts(chosen), top_k, method=method)
    return {
        "run_folder": str(folder),
        "surrogate": predictor.surrogate_name,
        "explanations": [explanation.as_dict() for explanation in explanations],
        "excerpts": _excerpts(run, explanations),
    }


def _best(run: Run, surrogate: str, top: int) -> list[str]:
    """Return the texts with the highest mean z-score over the targets."""
    check_at_least("top", top, 1)
    scores = run.score(surrogate)
    combined = combine(np.asarray(scores), "sum_z", target_names=scores.target_names)
    return [scores.text_ids[row] for row in np.argsort(-combined, kind="stable")[:top]]


def _excerpts(run: Run, explanations: Sequence[TextExplanation]) -> dict[str, str]:
    """Return how the texts begin that explanations name."""
    named = {explanation.text_id for explanation in explanations}
    for explanation in explanations:
        for target in explanation.targets:
            named.update(share.text_id for share in (*target.raised, *target.lowered))
    texts = run.texts(sorted(named))
    return {text_id: string[:EXCERPT_CHARACTERS] for text_id, string in zip(texts["text_id"], strings_of(texts), strict=True)}
