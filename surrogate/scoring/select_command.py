"""`surrogate select --corpus`: texts chosen from a scored corpus from the command line, and what is printed of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oracle.artifacts import read_json
from oracle.errors import InputError, MismatchError
from oracle.labels import Labels
from surrogate.budget import Budget
from surrogate.fidelity import Fidelity
from surrogate.option_strings import parse_plugin
from surrogate.scoring.near_duplicates import ENCODERS, NearDuplicates
from surrogate.scoring.scored_corpus import ScoredCorpus
from surrogate.scoring.scorer import PREDICTOR_FILE, read_identity
from surrogate.scoring.selecting import select_corpus
from surrogate.stages import plugin_options


def select_corpus_stage(
    corpus: Path,
    output: Path | None,
    budget: Mapping[str, float | int | None],
    *,
    rule: str = "top",
    options: Sequence[str] = (),
    min_score: float | None = None,
    tokens_column: str | None = None,
    labels: Path | None = None,
    predictor: Path | None = None,
    allow_low_fidelity: bool = False,
    max_similarity: float | None = None,
    similarity_encoder: str | None = None,
    texts: bool = False,
    allow_incomplete: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Select from a scored corpus.

    Args:
        corpus: The folder that `surrogate score --source` wrote.
        output: Folder for the selection; by default beside the corpus, with its name and `-selection`.
        budget: At most one of tokens, texts and fraction; none is needed with `min_score`.
        rule: top, top_share, softmax or random.
        options: option=value of the rule.
        min_score: Only texts whose combined number is at least this.
        tokens_column: Column of the scores with token counts.
        labels: Folder of labels; a labelled text is ranked by its label.
        predictor: Folder of the predictor that made the scores, for its fidelity; it is looked for beside the scores.
        allow_low_fidelity: Select by scores at chance all the same.
        max_similarity: Drop texts of this cosine or more to a better one.
        similarity_encoder: NAME or NAME:option=value,... of the encoder for that; `sentence` by default.
        texts: Also write the chosen rows of the inputs.
        allow_incomplete: Select from what is scored so far.
        seed: Seed of rules with chance.

    Raises:
        InputError: What `select_corpus` raises, or an option without effect.
    """
    scored = ScoredCorpus(corpus)
    given = {name: value for name, value in budget.items() if value is not None}
    selection = select_corpus(
        scored,
        output or corpus.with_name(f"{corpus.name}-selection"),
        budget=Budget(**given) if given or min_score is None else None,  # type: ignore[arg-type]
        rule=rule,
        min_score=min_score,
        tokens_column=tokens_column,
        labels=None if labels is None else Labels.load(labels),
        fidelity=find_fidelity(scored, predictor),
        allow_low_fidelity=allow_low_fidelity,
        near_duplicates=_near_duplicates(max_similarity, similarity_encoder),
        texts=texts,
        allow_incomplete=allow_incomplete,
        seed=seed,
        **plugin_options("surrogate.rules", rule, options),
    )
    return {
        "corpus": str(corpus),
        "selection": str(selection.folder),
        "num_texts": len(selection),
        "num_tokens": selection.num_tokens,
        "counts": selection.counts,
        "targets_at_chance": selection.meta["targets_at_chance"],
    }


def find_fidelity(scored: ScoredCorpus, predictor: Path | None) -> Fidelity | None:
    """Return the fidelity of the predictor that made the scores; None where it is not named and not found.

    Raises:
        MismatchError: The predictor that is named did not make the scores.
    """
    wanted = scored.identity["predictor"]
    if predictor is not None:
        if read_identity(predictor).predictor != wanted:
            raise MismatchError(
                f"the scores of {scored.folder} are not of the predictor in {predictor}.",
                "the predictor that the corpus was scored with",
                "name that one, or leave it out.",
            )
        return _fidelity(predictor)
    for path in [scored.folder / "predictor", *sorted(scored.folder.parent.glob("predictors/*"))]:
        if (path / PREDICTOR_FILE).exists() and read_identity(path).predictor == wanted:
            return _fidelity(path)
    warnings.warn("the predictor of these scores was not found, so its fidelity is not checked; name it", stacklevel=2)
    return None


def _fidelity(folder: Path) -> Fidelity:
    return Fidelity.from_dict(read_json(folder / PREDICTOR_FILE)["fidelity"])


def _near_duplicates(max_similarity: float | None, encoder: str | None) -> NearDuplicates | None:
    if max_similarity is None:
        if encoder is not None:
            raise InputError(
                f"--similarity-encoder {encoder} has no effect alone.", "--max-similarity beside it", "say how alike is too much."
            )
        return None
    from oracle import plugins

    name, options = parse_plugin(encoder or "sentence")
    return NearDuplicates(max_similarity=max_similarity, encoder=plugins.create(ENCODERS, name, options))
