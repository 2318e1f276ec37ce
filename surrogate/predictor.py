"""`InfluencePredictor`: encoders, a surrogate and its honest fidelity in one object.

Fitting first predicts every labelled text by a surrogate that saw neither it nor a near-duplicate of it
(cross-fitting), and measures fidelity on those predictions, beside ridge regression, a constant and the
labels' noise ceiling; then it fits the surrogate that is kept on all labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle import plugins
from oracle.artifacts import atomic_folder, provenance, read_json, timed, write_json
from oracle.comparison import noise_ceiling
from oracle.errors import InputError, InputTypeError, MismatchError, MissingFileError, check_at_least
from oracle.labels import Labels
from oracle.texts import list_text_ids, plain_strings, read_texts, text_format
from surrogate.feature_cache import Encoder, FeatureCache, encode_all
from surrogate.fidelity import Fidelity, cross_predict, measure_fidelity
from surrogate.models import Surrogate
from surrogate.scores import Scores
from surrogate.splits import grouped_folds, near_duplicate_groups

if TYPE_CHECKING:
    from datasets import Dataset

    from oracle.language_model import LanguageModel

ENCODERS, SURROGATES = "surrogate.features", "surrogate.models"
ROWS_PER_BLOCK = 16_384  # texts whose features are in memory at the same time
PREDICTOR_FILE = "predictor.json"
HELD_OUT_FILE = "held_out.parquet"


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
        cost_: Seconds and counted FLOPs of features, fitting and cross-fitting so far.

    Example:
        >>> predictor = surrogate.InfluencePredictor(encoder=["hashed_ngrams", "text_stats"], surrogate="trees")  # doctest: +SKIP
        >>> predictor.fit(sample, labels).predict(pool)                                                          # doctest: +SKIP
    """

    surrogate_: Surrogate
    fidelity_: Fidelity
    held_out_: Scores
    target_names_: list[str]

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
        dataset = read_texts(texts)
        spent: dict[str, float] = {}
        features = encode_all(self.encoders, dataset, self.cache, cost=spent)
        self.cost_["feature_seconds"] += spent.get("seconds", 0.0)
        self.cost_["feature_flops"] += spent.get("flops", 0.0)
        return features

    def fit(
        self, sample: Any, labels: Labels, *, sources: Sequence[str] | None = None, allow_stale: bool = False
    ) -> InfluencePredictor:
        """Fit on labelled texts and measure held-out fidelity.

        Args:
            sample: The labelled texts (anything `read_texts` takes); texts without a label are left out.
            labels: Their labels, joined by text_id.
            sources: Where each text of `sample` comes from; None takes its column `source`, if it has one.
            allow_stale: Accept labels that were measured at another checkpoint of the model whose features are used.

        Returns:
            self.

        Raises:
            MismatchError: The labels are of other texts, or of another checkpoint of the model behind `model_state` features.
            InputError: Too few labelled texts.
        """
        texts = read_texts(sample)
        if not allow_stale:
            _check_checkpoint(self.encoders, labels)
        if sources is not None and len(sources) != len(texts):
            raise InputError(
                f"{len(sources)} sources for {len(texts)} texts.", "one source per text", "give one for each row of the sample."
            )
        labelled = set(labels.text_ids)
        rows = [row for row, text_id in enumerate(list_text_ids(texts)) if text_id in labelled]
        if not rows:
            raise MismatchError(
                f"none of the {len(texts)} texts is among the {len(labels)} labelled ones.",
                "the texts that the labels were made for",
                "pass the sample that was given to oracle.label.",
            )
        if sources is None and "source" in texts.column_names:
            sources = [str(source) for source in texts["source"]]
        texts = texts.select(rows)
        ids = list_text_ids(texts)
        labels = labels.take(ids)
        features = self.features(texts)
        groups = near_duplicate_groups(strings_of(texts))
        self.target_names_, self.units_ = list(labels.target_names), labels.units
        with timed(lambda seconds: self._add("crossfit_seconds", seconds)):
            self.fidelity_ = self._cross_fit(
                features, labels, groups=groups, sources=None if sources is None else [sources[row] for row in rows]
            )
        with timed(lambda seconds: self._add("fit_seconds", seconds)):
            self.surrogate_ = self._new_surrogate().fit(features, labels.values, groups=groups)
        return self

    def predict(self, texts: Any) -> Scores:
        """Predict the influence of texts.

        Returns:
            Scores: an (N, C) float32 array in label units that knows its text_ids and target names.

        Raises:
            InputError: The predictor has not been fitted.
        """
        if not hasattr(self, "surrogate_"):
            raise InputError(
                "this predictor has not been fitted.", "a fitted or loaded predictor", "call fit(sample, labels) first."
            )
        dataset = read_texts(texts)
        blocks = [range(start, min(start + ROWS_PER_BLOCK, len(dataset))) for start in range(0, len(dataset), ROWS_PER_BLOCK)]
        values = np.concatenate([self.surrogate_.predict(self.features(dataset.select(block))) for block in blocks])
        return Scores(values, text_ids=list_text_ids(dataset), target_names=self.target_names_)

    def save(self, folder: str | Path) -> None:
        """Write the surrogate, the encoders' names and options, and the fidelity to `folder` (safetensors, text, JSON)."""
        if not hasattr(self, "surrogate_"):
            raise InputError("this predictor has not been fitted.", "a fitted predictor", "call fit(sample, labels) first.")
        with atomic_folder(Path(folder)) as partial:
            self.surrogate_.save(partial / "surrogate")
            self.held_out_.save(partial / HELD_OUT_FILE)
            encoders = []
            for number, encoder in enumerate(self.encoders):
                if hasattr(encoder, "save_state"):
                    encoder.save_state(partial / f"encoder-{number}")
                options = encoder.saved_options() if hasattr(encoder, "saved_options") else plugins.options_of(encoder)
                encoders.append({"name": encoder.plugin_name, "options": options, "fingerprint": encoder.fingerprint()})
            write_json(
                partial / PREDICTOR_FILE,
                {
                    "encoders": encoders,
                    "surrogate": self.surrogate_name,
                    "options": self.surrogate_options,
                    "num_folds": self.num_folds,
                    "seed": self.seed,
                    "target_names": self.target_names_,
                    "units": self.units_,
                    "fidelity": self.fidelity_.as_dict(),
                    "cost": self.cost_,
                    "provenance": provenance(),
                },
            )

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
        folder = Path(folder)
        if not (folder / PREDICTOR_FILE).exists():
            raise MissingFileError(
                f"there is no predictor in {folder}.",
                "a folder that InfluencePredictor.save wrote",
                "check the path, or fit first.",
            )
        stored = read_json(folder / PREDICTOR_FILE)
        encoders = [_load_encoder(entry, folder / f"encoder-{number}", lm=lm) for number, entry in enumerate(stored["encoders"])]
        surrogate = plugins.load(SURROGATES, stored["surrogate"])
        predictor = cls(
            encoders, surrogate(**_as_options(stored["options"])), cache=cache, num_folds=stored["num_folds"], seed=stored["seed"]
        )
        predictor.surrogate_ = surrogate.load(folder / "surrogate")  # type: ignore[attr-defined]
        predictor.held_out_ = Scores.load(folder / HELD_OUT_FILE)
        predictor.target_names_, predictor.units_ = stored["target_names"], stored["units"]
        predictor.fidelity_, predictor.cost_ = Fidelity.from_dict(stored["fidelity"]), stored["cost"]
        return predictor

    def _cross_fit(self, features: np.ndarray, labels: Labels, *, groups: np.ndarray, sources: list[str] | None) -> Fidelity:
        folds = grouped_folds(groups, num_folds=self.num_folds, seed=self.seed, keys=labels.text_ids)
        options: dict[str, Any] = {"target_names": labels.target_names, "sources": sources, "seed": self.seed}
        scores, means = cross_predict(self._new_surrogate, features, labels.values, folds=folds, groups=groups)
        self.held_out_ = Scores(scores, text_ids=labels.text_ids, target_names=labels.target_names)
        ridge = scores
        if self.surrogate_name != "ridge":
            ridge, _ = cross_predict(
                lambda: plugins.create(SURROGATES, "ridge", {}), features, labels.values, folds=folds, groups=groups
            )
        rows = [measure_fidelity(values, labels.values, baseline=means, **options) for values in (scores, ridge, means)]
        return Fidelity(
            surrogate_name=self.surrogate_name,
            surrogate=rows[0],
            ridge=rows[1],
            constant=rows[2],
            noise_ceiling=noise_ceiling(labels),
        )

    def _new_surrogate(self) -> Surrogate:
        return plugins.create(SURROGATES, self.surrogate_name, self.surrogate_options)

    def _add(self, key: str, amount: float) -> None:
        self.cost_[key] += amount


def _check_checkpoint(encoders: Sequence[Encoder], labels: Labels) -> None:
    """Refuse features of one checkpoint beside labels of another; a proxy is a model of another kind or size."""
    from oracle.measure import model_identity

    measured = labels.meta.get("model")
    for encoder in encoders:
        if measured is None or not encoder.needs_model:
            continue
        own = model_identity(encoder.lm)  # type: ignore[attr-defined]
        if own["kind"] == measured["kind"] and own["weights"] != measured["weights"]:
            raise MismatchError(
                f"the labels were measured at checkpoint {measured['weights']} of a {measured['kind']}, "
                f"the features are of its checkpoint {own['weights']}.",
                "labels and features of one checkpoint, or a proxy of another size",
                "label again at this checkpoint, use the checkpoint of the labels, or pass allow_stale=True.",
            )


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


def _as_options(stored: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; options that are tuples come back as lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}


def _load_encoder(entry: dict[str, Any], folder: Path, *, lm: LanguageModel | None) -> Encoder:
    """Make a saved encoder; a model at hand is used where it is the one of the fit, else the one at the saved path."""
    plugin: Any = plugins.load(ENCODERS, entry["name"])
    options = _as_options(entry["options"])
    models = [lm] if lm is not None and not options.get("model") else [lm, None] if lm is not None else [None]
    found: list[str] = []
    for model in models:
        has_state = hasattr(plugin, "load_state")
        encoder: Encoder = plugin.load_state(folder, dict(options), lm=model) if has_state else plugin(**options)
        found.append(encoder.fingerprint())
        if found[-1] == entry["fingerprint"]:
            return encoder
    raise MismatchError(
        f"the encoder {entry['name']!r} has the fingerprint {' or '.join(found)}; "
        f"the predictor was fitted with {entry['fingerprint']}.",
        "the same weights and package versions as in the fit",
        "use the checkpoint and packages of the fit, or fit the predictor again.",
    )
