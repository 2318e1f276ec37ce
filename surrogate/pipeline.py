"""The run folder: pool, labels, features, predictors, scores and selection, one stage after another.

Every stage writes its result atomically beside what it was made from, can be run again at any time, and does
nothing if its result is there already; killed in the middle it continues. What each stage cost is kept in
`cost.json`.

    run.json  pool.parquet  cost.json  targets/  labels/  features/  predictors/<surrogate>/
    scores/<surrogate>.parquet  selection/
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle import plugins
from oracle.artifacts import fingerprint, provenance, read_json, timed, write_json
from oracle.errors import MismatchError, MissingFileError
from oracle.labels import Labels
from oracle.targets import read_targets
from oracle.texts import list_text_ids, text_format, write_texts
from surrogate.option_strings import parse_plugin
from surrogate.predictor import ENCODERS, InfluencePredictor
from surrogate.run_folder import RunFolder
from surrogate.scores import Scores
from surrogate.selection import Budget, Selection, select

if TYPE_CHECKING:
    from oracle.language_model import LanguageModel

DEFAULT_ENCODERS = ("hashed_ngrams", "text_stats")


class Run(RunFolder):
    """A run folder and its stages.

    Args:
        folder: Where everything is kept; made when first written to.
    """

    def label(
        self,
        lm: LanguageModel | None,
        targets: Mapping[str, Any] | None,
        *,
        sample_size: int,
        method: str = "grad_dot",
        seed: int = 0,
        model_path: str | None = None,
        name: str = "labels",
        **options: Any,
    ) -> Labels:
        """Measure the influence of a sample; see `oracle.label` for the options.

        Args:
            lm: The model at the checkpoint in question; None for a method without a model.
            targets: The named target sets; None for a method without targets.
            sample_size: How many texts get a label.
            method: The oracle method.
            seed: Decides the sample.
            model_path: Where the model came from, for later stages that need it (`model_state` features, token counts).
            name: Folder of the labels inside the run. Only for `labels` are target sets and model remembered.
            **options: Passed to `oracle.label`.
        """
        from oracle.measure import label

        sample = self.sample(sample_size, seed=seed)
        labels = label(lm, sample, targets, method=method, workdir=self.folder / name, seed=seed, **options)
        cost = labels.meta["cost"]
        self.set_cost(
            name,
            seconds=cost["prepare_seconds"] + cost["label_seconds"],
            flops=cost["label_flops"] + cost["prepare_flops"],
            num_texts=len(labels),
        )
        if name == "labels":
            measured_on = [] if targets is None else read_targets(targets, max_texts=options.get("max_target_texts"), seed=seed)
            for target in measured_on:
                write_texts(target.texts, self._target_path(target.name))
            self.remember(**_describe_model(lm, model_path), targets=[target.name for target in measured_on])
        return labels

    def _target_path(self, name: str) -> Path:
        return self.folder / "targets" / f"{name}.parquet"

    def labels(self, name: str = "labels") -> Labels:
        """Return the labels of the run."""
        return Labels.load(self.folder / name)

    def encoders(self, names: Sequence[str | Any], *, lm: LanguageModel | None = None) -> list[Any]:
        """Make encoders from `name` or `name:option=value,...`; `model_state` gets the run's model and targets."""
        made: list[Any] = []
        for given in names:
            if not isinstance(given, str):
                made.append(given)
                continue
            name, options = parse_plugin(given)
            if name == "model_state":  # a model given as an option is a proxy; the targets are the run's all the same
                own = (
                    {"targets": self._targets()}
                    if "model" in options
                    else {"targets": self._targets(), "model": lm or self._language_model()}
                )
                options = {**own, **options}
            made.append(plugins.create(ENCODERS, name, options))
        return made

    def embed(self, encoders: Sequence[str | Any] = DEFAULT_ENCODERS, *, lm: LanguageModel | None = None) -> dict[str, Any]:
        """Encode the whole pool into the run's feature cache."""
        predictor = InfluencePredictor(self.encoders(encoders, lm=lm), "ridge", cache=self.folder / "features")
        features = predictor.features(self.pool())
        cost = self._count_features(predictor)
        return {"num_texts": len(features), "num_features": features.shape[1], "seconds": cost["seconds"], "flops": cost["flops"]}

    def fit(
        self,
        encoders: Sequence[str | Any] = DEFAULT_ENCODERS,
        surrogate: str | Any = "trees",
        *,
        lm: LanguageModel | None = None,
        num_folds: int = 5,
        seed: int = 0,
    ) -> InfluencePredictor:
        """Fit a surrogate on the run's labels and measure its held-out fidelity; a finished fit is loaded."""
        labels = self.labels()
        predictor = InfluencePredictor(
            self.encoders(encoders, lm=lm), _surrogate(surrogate), cache=self.folder / "features", num_folds=num_folds, seed=seed
        )
        folder = self.folder / "predictors" / predictor.surrogate_name
        identity = {
            "labels": _fingerprint_of(labels),
            "encoders": [e.key() for e in predictor.encoders],
            "options": predictor.surrogate_options,
            "num_folds": num_folds,
            "seed": seed,
            "version": provenance()["version"],
        }
        if (folder / "stage.json").exists() and read_json(folder / "stage.json") == _as_json(identity):
            return InfluencePredictor.load(folder, lm=lm, cache=self.folder / "features")
        labelled = set(labels.text_ids)
        pool = self.pool()
        rows = [row for row, text_id in enumerate(list_text_ids(pool)) if text_id in labelled]
        predictor.fit(pool.select(rows), labels)
        predictor.save(folder)
        write_json(folder / "stage.json", identity)
        self._count_features(predictor)
        seconds = predictor.cost_["fit_seconds"] + predictor.cost_["crossfit_seconds"]
        self.set_cost(f"fit {predictor.surrogate_name}", seconds=seconds, flops=0.0, num_texts=len(labels))
        return predictor

    def predictor(self, surrogate: str | None = None, *, lm: LanguageModel | None = None) -> InfluencePredictor:
        """Load a predictor fitted on the run's labels; without a name the one with the highest mean held-out Spearman.

        Raises:
            MissingFileError: None was fitted, or not this one.
            MismatchError: It was fitted before the labels changed.
        """
        folders = sorted(path.parent for path in (self.folder / "predictors").glob("*/stage.json"))
        if surrogate is not None:
            folders = [folder for folder in folders if folder.name == surrogate]
        if not folders:
            raise MissingFileError(
                f"the run {self.folder} has no fitted predictor" + (f" {surrogate!r}." if surrogate else "."),
                "a run whose fit stage is done",
                "run `surrogate fit` on this folder first.",
            )
        labels = _fingerprint_of(self.labels())
        current = [folder for folder in folders if read_json(folder / "stage.json")["labels"] == labels]
        if not current:
            raise MismatchError(
                f"{', '.join(folder.name for folder in folders)} in {self.folder} was fitted on other labels than these.",
                "a predictor of the present labels",
                "run `surrogate fit` again.",
            )
        loaded = [InfluencePredictor.load(folder, lm=lm, cache=self.folder / "features") for folder in current]
        return max(loaded, key=lambda predictor: float(np.mean([row.spearman for row in predictor.fidelity_.surrogate])))

    def score(self, surrogate: str | None = None, *, lm: LanguageModel | None = None) -> Scores:
        """Score the whole pool; finished scores of the same predictor are read."""
        predictor = self.predictor(surrogate, lm=lm)
        path = self.folder / "scores" / f"{predictor.surrogate_name}.parquet"
        stage = self.folder / "predictors" / predictor.surrogate_name / "stage.json"
        counter = lm or self._language_model()
        identity = {
            "predictor": fingerprint(read_json(stage)),
            "pool": self.settings()["pool"],
            "tokens_counted_to": None if counter is None else counter.max_tokens,
        }
        meta = path.with_suffix(".json")
        if path.exists() and meta.exists() and read_json(meta) == _as_json(identity):
            return Scores.load(path)
        spent: dict[str, float] = {}
        before = predictor.cost_["feature_seconds"]
        with timed(lambda seconds: spent.__setitem__("seconds", seconds)):
            plain = predictor.predict(self.pool())
        counts = self._num_tokens(counter)
        scores = Scores(np.asarray(plain), text_ids=plain.text_ids, target_names=plain.target_names, num_tokens=counts)
        meta.unlink(missing_ok=True)
        scores.save(path)
        write_json(meta, identity)
        self._count_features(predictor)
        seconds = spent["seconds"] - (predictor.cost_["feature_seconds"] - before)
        self.set_cost("score", seconds=seconds, flops=0.0, num_texts=len(scores))
        return scores

    def select(
        self,
        budget: Budget,
        *,
        rule: str = "top",
        surrogate: str | None = None,
        lm: LanguageModel | None = None,
        seed: int = 0,
        allow_low_fidelity: bool = False,
        **options: Any,
    ) -> Selection:
        """Spend a budget on the scored pool and write the selection (with its texts) to `selection/`."""
        predictor = self.predictor(surrogate, lm=lm)
        scores = self.score(predictor.surrogate_name, lm=lm)
        selection = select(
            scores,
            budget=budget,
            rule=rule,
            labels=self.labels(),
            fidelity=predictor.fidelity_,
            seed=seed,
            allow_low_fidelity=allow_low_fidelity,
            **options,
        )
        selection.save(self.folder / "selection")
        write_texts(self.texts(selection.text_ids), self.folder / "selection" / "texts.parquet")
        return selection

    # ------------------------------------------------------------------ cost

    def _count_features(self, predictor: InfluencePredictor) -> dict[str, float]:
        """Write what the cached features have cost over all processes that worked on them, as the cache counted it."""
        assert predictor.cache is not None
        stages = {f"features {encoder.plugin_name}": predictor.cache.cost(encoder) for encoder in predictor.encoders}
        for stage, cost in stages.items():
            self.set_cost(stage, seconds=cost["seconds"], flops=cost["flops"], num_texts=int(cost["num_encoded"]))
        return {unit: sum(cost[unit] for cost in stages.values()) for unit in ("seconds", "flops")}

    def _num_tokens(self, lm: LanguageModel | None) -> list[int] | None:
        """Count tokens, as training would see them (cut at max_tokens), where there is something to count them with."""
        pool = self.pool()
        if text_format(pool) == "tokens":
            return [len(ids) for ids in pool["input_ids"]]
        return None if lm is None else [len(text.input_ids) for text in lm.encode(pool)]

    def _targets(self) -> dict[str, str] | None:
        """The target texts that the labels were measured on, as kept in the run."""
        return {name: str(self._target_path(name)) for name in self.settings().get("targets", [])} or None

    def _language_model(self) -> LanguageModel | None:
        """Load the model that the labels were made with, if it came from a folder or the hub."""
        from oracle.language_model import LanguageModel

        settings = self.settings()
        if settings.get("model") is None:
            return None
        return LanguageModel.from_pretrained(settings["model"], max_tokens=settings["max_tokens"], dtype=settings["dtype"])


def _describe_model(lm: LanguageModel | None, path: str | None) -> dict[str, Any]:
    """What it takes to load the model again, as JSON; nothing where there is none."""
    if lm is None:
        return {"model": None, "max_tokens": None, "dtype": None}
    where = str(Path(path).resolve()) if path and Path(path).is_dir() else path
    dtype = str(next(lm.module.parameters()).dtype).removeprefix("torch.")
    return {"model": where, "max_tokens": lm.max_tokens, "dtype": dtype}


def _fingerprint_of(labels: Labels) -> str:
    return fingerprint([labels.text_ids, labels.target_names, labels.values.tobytes().hex()])


def _surrogate(given: str | Any) -> Any:
    if not isinstance(given, str):
        return given
    name, options = parse_plugin(given)
    return plugins.create("surrogate.models", name, options)


def _as_json(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value, default=str))
