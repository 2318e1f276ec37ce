"""What `surrogate explain` does: accounts of pool texts' scores, with the beginnings of the texts that are named in them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from oracle.errors import InputError, check_at_least
from surrogate.aggregation import combine
from surrogate.explanation import SCALES, LabelShare, TargetExplanation, TextExplanation
from surrogate.pipeline import Run
from surrogate.predictor import strings_of

DEFAULT_TOP = 3
EXCERPT_CHARACTERS = 120
LINE_CHARACTERS = 70  # of a text's beginning, on its line of the account
SMALLEST_SHOWN = 5e-4  # amounts are printed with three decimals
LEGEND = """\
Each score is a sum of amounts, on the scale that the surrogate was fitted on. A labelled text raises a score where the two
are alike and its label is high, or where they are unlike and its label is low; it lowers the score the other way round.
"""


def explain_stage(
    folder: Path,
    text_ids: Sequence[str] | None,
    *,
    top: int | None,
    top_k: int,
    surrogate: str | None,
    method: str,
) -> dict[str, Any]:
    """Explain the scores of texts of the pool, by id or those with the highest scores; the accounts go to stderr as text.

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
    excerpts = _excerpts(run, explanations)
    sys.stderr.write(as_text(explanations, excerpts))
    return {
        "run_folder": str(folder),
        "surrogate": predictor.surrogate_name,
        "explanations": [explanation.as_dict() for explanation in explanations],
        "excerpts": excerpts,
    }


def as_text(explanations: Sequence[TextExplanation], excerpts: Mapping[str, str]) -> str:
    """Return accounts for people; `excerpts` has the beginning of every text that is named, by text_id."""
    lines = [LEGEND]
    for explanation in explanations:
        lines.append(f"text {explanation.text_id}: {_line(excerpts[explanation.text_id])}")
        for target in explanation.targets:
            standing = ""
            if explanation.scale == SCALES["rank"]:
                standing = f", above {NormalDist().cdf(target.scaled_score):.0%} of the labels"
            lines.append(f"  {target.target}: score {target.score:.3g} {explanation.units}{standing}")
            lines.append(f"    in {explanation.scale}:")
            lines += _sum_of_texts(target, explanation.text_id, excerpts)
            lines += _sum_of_features(target)
        lines.append("")
    return "\n".join(lines)


def _sum_of_texts(target: TargetExplanation, text_id: str, excerpts: Mapping[str, str]) -> list[str]:
    def of_text(share: LabelShare) -> str:
        name = "the text itself" if share.text_id == text_id else _line(excerpts[share.text_id])
        return f"    {_amount(share.amount):>9}  label {share.label:9.3g}  {name}"

    lines = [f"    {_amount(target.bias):>9}  where every text starts"]
    if abs(target.earlier) >= SMALLEST_SHOWN:
        lines.append(f"    {_amount(target.earlier):>9}  from the surrogates that this one went on from (warm start)")
    lines += [of_text(share) for share in (*target.raised, *target.lowered)]
    lines.append(f"    {_amount(target.others):>9}  the other {target.num_others} labelled texts together")
    if abs(target.remainder) >= SMALLEST_SHOWN:
        lines.append(f"    {_amount(target.remainder):>9}  remainder: not told by labelled texts in this way")
    return [*lines, f"    {_amount(target.scaled_score):>9}  in all"]


def _sum_of_features(target: TargetExplanation) -> list[str]:
    blocks = ", ".join(f"{name} {_amount(amount)}" for name, amount in target.blocks.items())
    start = f"start {_amount(target.block_bias + target.earlier)}"
    remainder = f", remainder {_amount(target.block_remainder)}" if abs(target.block_remainder) >= SMALLEST_SHOWN else ""
    lines = [f"    the same by features: {start}, {blocks}{remainder}"]
    if target.features:
        lines.append("    strongest: " + ", ".join(f"{share.name} {_amount(share.amount)}" for share in target.features))
    return lines


def _amount(value: float) -> str:
    return f"{value if abs(value) >= SMALLEST_SHOWN else 0.0:+.3f}"


def _line(text: str) -> str:
    """Return a text's beginning on one line."""
    words = " ".join(text.split())
    return words if len(words) <= LINE_CHARACTERS else words[: LINE_CHARACTERS - 3] + "..."


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
