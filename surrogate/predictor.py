"""`InfluencePredictor`: encoders, a surrogate and its honest fidelity in one object.

Fitting first predicts every labelled text by a surrogate that saw neither it nor a near-duplicate of it
(cross-fitting), and measures fidelity on those predictions, beside ridge regression, a constant and the
labels' noise ceiling; then it fits the surrogate that is kept on all labels. A refresh may bring labels of earlier
checkpoints along and start from the predictor before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from oracle import plugins
from oracle.artifacts import timed
from oracle.comparison import noise_ceiling
from oracle.errors import InputError, InputTypeError, MismatchError, check_at_least
from oracle.labels import Labels
from oracle.texts import list_text_ids, plain_strings, read_texts, text_format
from surrogate.amounts import CONTRIBUTIONS
from surrogate.encoder_identity import ENCODERS as ENCODERS
from surrogate.encoder_identity import check_checkpoint, check_same_features
from surrogate.explanation import TextExplanation, explain
from surrogate.feature_cache import Encoder, FeatureCache, encode_all
from surrogate.fidelity import Fidelity, measure_fidelity
from surrogate.fitted_rows import FittedRows, column_groups
from surrogate.labelled_rows import LabelledRows, check_labels
from surrogate.models import Surrogate
from surrogate.predictor_folder import SURROGATES, read_predictor, write_predictor
from surrogate.scores import Scores, first_of_each
from surrogate.splits import near_duplicate_groups

if TYPE_CHECKING:
    from datasets import Dataset

    from oracle.language_model import LanguageModel

ROWS_PER_BLOCK = 16_384  # texts whose features are in memory at the same time


class InfluencePredictor:
    """Predict influence from a text's features.

    Args:
        encoder: Name of an encoder, an encoder object, or a list of either; their features stand side by side.
        surrogate: Name of a surrogate, or an unfitted surrogate object.
        cache: Folder (or FeatureCache) where features are kept; None encodes anew each time.
        num_folds: Folds of the cross-fitting that fidelity is measured by.
        seed: Decides the folds.

    Attributes:
        surrogate_: The surrogate fitted on all labels.
        fidelity_: Its held-out fidelity, per target.
        held_out_: The held-out scores of the labelled texts that the fidelity was measured on.
        target_names_: C target names, in column order.
        fitted_text_ids_: The texts whose labels went into the surrogate, also by way of the one that it started from.
        fitted_rows_: Features and labels of the fit, for explanations; None in folders of versions that kept none.
        cost_: Seconds and counted FLOPs of features, fitting and cross-fitting so far.

    Example:
        >>> predictor = surrogate.InfluencePredictor(encoder=["hashed_ngrams", "text_stats"], surrogate="trees")  # doctest: +SKIP
        >>> predictor.fit(sample, labels).predict(pool)                                                          # doctest: +SKIP
    """

    surrogate_: Surrogate
    fidelity_: Fidelity
    held_out_: Scores
    target_names_: list[str]
    fitted_text_ids_: list[str]
    fitted_rows_: FittedRows | None

    def __init__(
        self,
        encoder: str | Encoder | Sequence[str | Encoder] = "sentence",
        surrogate: str | Surrogate = "trees",
        *,
        cache: FeatureCache | str | Path | None = None,
        num_folds: int = 5,
        seed: int = 0,
    ) -> None:
        check_at_least("num_folds", num_folds, 2)
        given = [encoder] if isinstance(encoder, str) or not isinstance(encoder, Sequence) else list(encoder)
        self.encoders: list[Encoder] = [plugins.create(ENCODERS, item, {}) if isinstance(item, str) else item for item in given]
        if not self.encoders or not all(hasattr(item, "encode") for item in self.encoders):
            raise InputTypeError(
                f"encoder={encoder!r}.",
                "a name, an encoder object, or a list of them: " + ", ".join(plugins.names(ENCODERS)),
                "pass for example encoder='hashed_ngrams'.",
            )
        self.surrogate_name, self.surrogate_options = _describe_surrogate(surrogate)
        self.cache = FeatureCache(cache) if isinstance(cache, (str, Path)) else cache
        self.num_folds, self.seed = num_folds, seed
        self.units_ = ""
        self.cost_: dict[str, float] = {"feature_seconds": 0.0, "feature_flops": 0.0, "fit_seconds": 0.0, "crossfit_seconds": 0.0}

    def features(self, texts: Any) -> np.ndarray:
        """Return the features of texts, (N, D) float32, from the cache where they are known."""
        return np.concatenate(self._features_by_encoder(read_texts(texts)), axis=1)  # (N, sum of D)

    def fit(
        self,
        sample: Any,
        labels: Labels,
        *,
        sources: Sequence[str] | None = None,
        allow_stale: bool = False,
        sample_weight: ArrayLike | None = None,
        older: Sequence[tuple[Labels, float]] = (),
        judged: Sequence[str] | None = None,
        warm_start: InfluencePredictor | None = None,
    ) -> InfluencePredictor:
        """Fit on labelled texts and measure held-out fidelity.

        Args:
            sample: The labelled texts (anything `read_texts` takes); texts without a label are left out.
            labels: Their labels, joined by text_id.
            sources: Where each text of `sample` comes from; None takes its column `source`, if it has one.
            allow_stale: Accept labels that were measured at another checkpoint of the model whose features are used.
            sample_weight: How much each row of `labels` counts, in its order; 0 leaves it out of fitting.
            older: Labels of earlier checkpoints, of texts of `sample`, and the weight of each such set's rows. They are put
                on the scale of the new labels, help to fit, and are never judged by.
            judged: Ids of newly labelled texts that fidelity is measured on, for example those of a sample that were
                drawn at random; the others only help to fit. None judges by all.
            warm_start: An earlier predictor with the same encoders, targets and surrogate, whose surrogate this one goes on
                from. It was fitted on none of the judged texts; their near-duplicates are not looked for among its texts.

        Returns:
            self.

        Raises:
            MismatchError: The labels are of other texts or targets, or of another checkpoint of the model behind
                `model_state` features.
            InputError: Too few labelled texts, a weight that cannot be used, or judged texts that `warm_start` was fitted on.
        """
        texts = read_texts(sample)
        if not allow_stale:
            check_checkpoint(self.encoders, labels)
        if sources is not None and len(sources) != len(texts):
            raise InputError(
                f"{len(sources)} sources for {len(texts)} texts.", "one source per text", "give one for each row of the sample."
            )
        all_ids = list_text_ids(texts)
        check_labels(labels, older, all_ids)
        if sources is None and "source" in texts.column_names:
            sources = [str(source) for source in texts["source"]]
        source_of = None if sources is None else dict(zip(all_ids, sources, strict=True))
        labelled = set(labels.text_ids).union(*(old.text_ids for old, _ in older))
        texts = texts.select([place for place, text_id in enumerate(all_ids) if text_id in labelled])
        rows = LabelledRows.join(
            list_text_ids(texts),
            labels,
            groups=near_duplicate_groups(strings_of(texts)),
            older=older,
            sample_weight=sample_weight,
            judged=judged,
        )
        fitted = set(rows.text_ids)
        earlier = None
        if warm_start is not None:
            earlier = self._surrogate_to_start_from(warm_start, rows.judged_labels)
            fitted.update(warm_start.fitted_text_ids_)
        parts = self._features_by_encoder(texts)
        features = np.concatenate(parts, axis=1)  # (T, D)
        self.target_names_, self.units_, self.fitted_text_ids_ = list(labels.target_names), labels.units, sorted(fitted)
        judged_sources = None if source_of is None else [source_of[text_id] for text_id in rows.judged_labels.text_ids]
        with timed(lambda seconds: self._add("crossfit_seconds", seconds)):
            self.fidelity_ = self._cross_fit(rows, features, sources=judged_sources, warm_start=earlier)
        with timed(lambda seconds: self._add("fit_seconds", seconds)):
            self.surrogate_ = rows.fit(self._new_surrogate(), features, warm_start=earlier)
        self.fitted_rows_ = FittedRows.of(rows, features, column_groups(self.encoders, [part.shape[1] for part in parts]))
        return self

    def predict(self, texts: Any) -> Scores:
        """Predict the influence of texts.

        Args:
            texts: Anything `read_texts` takes; or an iterator of strings or dicts, such as a generator or a streamed
                dataset, of which only the scores are kept. Of a repeated text the first row is kept.

        Returns:
            Scores: an (N, C) float32 array in label units that knows its text_ids and target names.

        Raises:
            InputError: The predictor has not been fitted, or no text is left.
        """
        self._require_fitted()
        if _is_stream(texts):
            return first_of_each(self.predict_stream(texts), self.target_names_)
        dataset = read_texts(texts)
        blocks = [range(start, min(start + ROWS_PER_BLOCK, len(dataset))) for start in range(0, len(dataset), ROWS_PER_BLOCK)]
        values = np.concatenate([self.surrogate_.predict(self.features(dataset.select(block))) for block in blocks])
        return Scores(values, text_ids=list_text_ids(dataset), target_names=self.target_names_)

    def predict_stream(self, texts: Iterable[str | Mapping[str, Any]], **options: Any) -> Iterator[Scores]:
        """Score a stream of texts, which may be endless, without holding more than a block of it.

        Args:
            texts: Strings or dicts, as `read_texts` takes them.
            **options: `text_column`, `format` and `batch_rows` of `surrogate.scoring.stream_scores`.

        Returns:
            An iterator over Scores (B, C) in label units, block by block in the order of the stream.

        Raises:
            InputError: The predictor has not been fitted, or no column fits.
        """
        from surrogate.scoring.batch import stream_scores

        self._require_fitted()
        return stream_scores(self, texts, **options)

    def explain(self, texts: Any, top_k: int = 5, *, method: str = CONTRIBUTIONS) -> list[TextExplanation]:
        """Say for each text and target which labelled texts raised and lowered its score, and which features mattered.

        Args:
            texts: What to explain (anything `read_texts` takes).
            top_k: So many texts that raised the score, and so many that lowered it, are listed; the others are summed up.
            method: "contributions", whose amounts add up to the score; for trees also "boostin", whose do not.

        Returns:
            One explanation per text; amounts are on the fitted scale, see `surrogate.explanation`.

        Raises:
            InputError: The predictor is not fitted or kept nothing of its fit, or the surrogate has no such method.
        """
        self._require_fitted()
        dataset = read_texts(texts)
        return explain(
            self.surrogate_,
            self.fitted_rows_,
            self.features(dataset),
            text_ids=list_text_ids(dataset),
            target_names=self.target_names_,
            units=self.units_,
            top_k=top_k,
            method=method,
        )

    def save(self, folder: str | Path) -> None:
        """Write the surrogate, the encoders, the fidelity and what explanations need to `folder` (safetensors, text, JSON)."""
        self._require_fitted()
        write_predictor(self, Path(folder))

    @classmethod
    def load(
        cls, folder: str | Path, *, lm: LanguageModel | None = None, cache: FeatureCache | str | Path | None = None
    ) -> InfluencePredictor:
        """Read what `save` wrote.

        Args:
            folder: The predictor's folder.
            lm: The language model behind a `model_state` encoder; None loads it from the path it had.
            cache: Folder for features.

        Raises:
            MissingFileError: There is no predictor in `folder`.
            MismatchError: An encoder's weights are not those that the predictor was fitted with.
        """
        options, learned = read_predictor(Path(folder), lm=lm)
        predictor = cls(**options, cache=cache)
        for name, value in learned.items():
            setattr(predictor, name, value)
        return predictor

    def _surrogate_to_start_from(self, earlier: InfluencePredictor, judged: Labels) -> Surrogate:
        """Return the surrogate of an earlier predictor, if held-out figures stay honest with it."""
        if not hasattr(earlier, "surrogate_"):
            raise InputError(
                "warm_start has not been fitted.", "a fitted or loaded predictor", "fit it, or leave warm_start out."
            )
        check_same_features(earlier.encoders, self.encoders)
        if earlier.target_names_ != judged.target_names:
            raise MismatchError(
                f"warm_start predicts {earlier.target_names_}; the labels are of {judged.target_names}.",
                "the same targets in the same order",
                "label on the same target sets, or leave warm_start out.",
            )
        seen = sorted(set(judged.text_ids) & set(earlier.fitted_text_ids_))
        if seen:
            raise InputError(
                f"warm_start was fitted on {len(seen)} of {len(judged)} judged texts, first {seen[:3]}.",
                "judged texts that it never saw; else their held-out scores would not be held out",
                "name the texts it never saw with judged=, label other texts, or leave warm_start out.",
            )
        return earlier.surrogate_

    def _cross_fit(
        self, rows: LabelledRows, features: np.ndarray, *, sources: list[str] | None, warm_start: Surrogate | None
    ) -> Fidelity:
        labels = rows.judged_labels
        folds: dict[str, Any] = {"num_folds": self.num_folds, "seed": self.seed}
        scores, means = rows.cross_predict(self._new_surrogate, features, warm_start=warm_start, **folds)
        self.held_out_ = Scores(scores, text_ids=labels.text_ids, target_names=labels.target_names)
        ridge = scores
        if self.surrogate_name != "ridge":
            ridge, _ = rows.cross_predict(lambda: plugins.create(SURROGATES, "ridge", {}), features, **folds)
        options: dict[str, Any] = {"target_names": labels.target_names, "sources": sources, "seed": self.seed}
        measured = [measure_fidelity(values, labels.values, baseline=means, **options) for values in (scores, ridge, means)]
        return Fidelity(
            surrogate_name=self.surrogate_name,
            surrogate=measured[0],
            ridge=measured[1],
            constant=measured[2],
            noise_ceiling=noise_ceiling(labels),
        )

    def _features_by_encoder(self, dataset: Dataset) -> list[np.ndarray]:
        spent: dict[str, float] = {}
        parts = [encode_all([encoder], dataset, self.cache, cost=spent) for encoder in self.encoders]
        self.cost_["feature_seconds"] += spent.get("seconds", 0.0)
        self.cost_["feature_flops"] += spent.get("flops", 0.0)
        return parts

    def _require_fitted(self) -> None:
        if not hasattr(self, "surrogate_"):
            raise InputError(
                "this predictor has not been fitted.", "a fitted or loaded predictor", "call fit(sample, labels) first."
            )

    def _new_surrogate(self) -> Surrogate:
        return plugins.create(SURROGATES, self.surrogate_name, self.surrogate_options)

    def _add(self, key: str, amount: float) -> None:
        self.cost_[key] += amount


def strings_of(texts: Dataset) -> list[str]:
    """Return each text as one string; token ids, which need no tokenizer for this, as numbers with spaces."""
    if text_format(texts) == "tokens":
        return [" ".join(map(str, ids)) for ids in texts["input_ids"]]
    return plain_strings(texts)


def _describe_surrogate(surrogate: str | Surrogate) -> tuple[str, dict[str, Any]]:
    if isinstance(surrogate, str):
        made = plugins.create(SURROGATES, surrogate, {})
        return surrogate, plugins.options_of(made)
    if not hasattr(surrogate, "fit") or not hasattr(surrogate, "plugin_name"):
        raise InputTypeError(
            f"surrogate={surrogate!r}.",
            "a name or a surrogate object: " + ", ".join(plugins.names(SURROGATES)),
            "pass for example surrogate='trees'.",
        )
    return surrogate.plugin_name, plugins.options_of(surrogate)


def _is_stream(texts: Any) -> bool:
    """Whether texts come one after the other and cannot be counted beforehand: a generator, a streamed dataset."""
    return isinstance(texts, Iterable) and not isinstance(texts, (str, PathLike)) and not hasattr(texts, "__len__")
