"""Rank candidates by a surrogate that was fitted on a labelled sample of them: what `static` and `refresh` share.

At a refresh a sample of the candidates is labelled at today's checkpoint, and with it a small probe set, which is the same
at every refresh and never trained on. The surrogate is fitted on the new labels and on those of earlier refreshes
(`keep_labels`), as long as these still rank the probe alike (`min_agreement`, off by default). The probe also says when the
present scores have become stale (`agreement_now`).

Old labels are kept because a ranking by the newest alone turns away from what just helped: what is being trained on has
little influence left on what comes next, and would be forgotten without it, which the first-order effect of one step does not
see. Labels of several checkpoints together are close to the sums over checkpoints of LESS (Xia et al. 2024, arXiv 2402.04333)
and, on a mixture, of mirror descent (DoGE, Fan et al. 2023, arXiv 2310.15393). `benchmarks/gain_rounds.py` compares both.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle import plugins
from oracle.artifacts import read_json, write_json
from oracle.comparison import spearman
from oracle.errors import InputError, check_at_least, check_choice, check_count
from oracle.labels import Labels
from oracle.plugins import option
from oracle.processes import working_together
from oracle.texts import list_text_ids
from surrogate.aggregation import combine
from surrogate.label_next import order_by_mass
from surrogate.option_strings import parse_plugin
from surrogate.predictor import ENCODERS, InfluencePredictor
from surrogate.scores import Scores
from surrogate.training.ranking_costs import label_costs, ranking_costs
from surrogate.training.sampling import SAMPLINGS, draw_order, draw_sample
from surrogate.training.strategies import Ranking, RankingContext

if TYPE_CHECKING:
    from datasets import Dataset

OLDEST_LABELS = 6  # refreshes after which labels are dropped whatever they say
PROBE_FILE = "probe.json"
SCORES_FILE = "scores.parquet"


@dataclass(kw_only=True)
class LabelledRanking:
    """Options and steps of a ranking by labels and a surrogate."""

    method: str = option("grad_dot", "Oracle method of the labels.")
    method_options: Mapping[str, Any] | None = option(None, "Its options.")
    sample_size: int = option(600, "Texts that get a label at each refresh, the probe not counted.")
    max_target_texts: int | None = option(None, "Measure on at most this many texts of each target set.")
    sampling: str = option("random", "Which texts get a label: random, stratified (by scores, tails more), uncertain or mass.")
    encoder: Sequence[Any] = option(("hashed_ngrams", "text_stats"), "Encoders of all candidates; model_state is the live model.")
    surrogate: str = option("ridge", "Surrogate that is fitted on the labels.")
    surrogate_options: Mapping[str, Any] | None = option(None, "Its options.")
    second_encoder: Sequence[Any] = option((), "Dearer encoders, beside the others, for the best share of the candidates only.")
    second_share: float = option(0.2, "Share of the candidates, best first, that the dearer encoders see.")
    num_probe: int = option(64, "Texts of the probe set; 0 does without: no agreement and no drift is measured.")
    keep_labels: float = option(1.0, "Weight of labels one refresh old, its square for two, and so on; 0 forgets them.")
    min_agreement: float = option(-1.0, "Old labels whose rank agreement with new ones on the probe is below this are dropped.")
    warm_start: bool = option(False, "Start the surrogate from the one of the refresh before.")
    num_folds: int = option(5, "Folds of the cross-fitting that fidelity is measured by.")

    def __post_init__(self) -> None:
        self.encoder, self.second_encoder = _as_list(self.encoder), _as_list(self.second_encoder)
        plugins.create("oracle.methods", self.method, dict(self.method_options or {}))
        for encoder in (*self.encoder, *self.second_encoder):
            if isinstance(encoder, str):
                plugins.load(ENCODERS, encoder)
        check_choice("sampling", self.sampling, SAMPLINGS)
        for name, minimum in (("num_folds", 2), ("sample_size", self.num_folds), ("num_probe", 0)):
            check_count(name, getattr(self, name), minimum)
        if self.max_target_texts is not None:
            check_count("max_target_texts", self.max_target_texts)
        check_at_least("keep_labels", self.keep_labels, 0)
        if self.keep_labels > 1 or not 0 < self.second_share <= 1:
            raise InputError(
                f"keep_labels={self.keep_labels!r}, second_share={self.second_share!r}.",
                "shares up to 1",
                "pass for example keep_labels=0.5, second_share=0.2.",
            )
        if self.min_agreement > -1 and self.keep_labels and not self.num_probe:
            raise InputError(
                f"min_agreement={self.min_agreement!r} without a probe set to measure it on.",
                "num_probe of some dozens beside it",
                "pass num_probe=64, or leave min_agreement out.",
            )
        surrogate = plugins.create("surrogate.models", self.surrogate, dict(self.surrogate_options or {}))
        if self.sampling == "uncertain" and not hasattr(surrogate, "ensemble"):
            raise InputError(
                f"sampling='uncertain' with the surrogate {self.surrogate!r}, which does not say how sure it is.",
                "a surrogate of several members",
                "use surrogate='network', or sampling='stratified'.",
            )
        if self.sampling == "mass" and not hasattr(surrogate, "similarity_features"):
            raise InputError(
                f"sampling='mass' with the surrogate {self.surrogate!r}, which does not say which texts it takes for alike.",
                "a surrogate with `similarity_features`: ridge, trees or network",
                "use one of these, or sampling='stratified'.",
            )
        if (self.warm_start or self.sampling in ("uncertain", "mass")) and self._has_live_features():
            raise InputError(
                "features of the live model beside warm_start or sampling='uncertain' or 'mass', which need the surrogate "
                "before: that one knows the features of its own checkpoint only.",
                "frozen encoders beside these options",
                "leave model_state out, or use sampling='stratified' and warm_start=False.",
            )
        if self.warm_start and self.keep_labels:
            raise InputError(
                "warm_start with keep_labels: the old labels would be counted twice.",
                "one of the two",
                "pass keep_labels=0 beside warm_start=True, or leave warm_start out.",
            )

    # ------------------------------------------------------------------ what the refresher asks

    def reserved(self, text_ids: Sequence[str], *, seed: int) -> np.ndarray:
        """Return the rows of the probe set, which are never trained on."""
        return np.sort(draw_order(text_ids, f"{seed}:probe")[: self.num_probe])

    def rank(self, context: RankingContext) -> Ranking:
        """Label a sample at the present checkpoint, fit, and score the candidates."""
        texts = context.candidate_texts()
        with working_together() as processes:
            sample_rows, judged = processes.on_first(lambda: self._draw(context, texts))
        labels = self._label(context, np.concatenate([sample_rows, self._probe_rows(context)]))
        with working_together() as processes:
            return processes.on_first(lambda: self._fit_and_score(context, texts, labels, judged=judged))

    def agreement_now(self, context: RankingContext, ranked: Path) -> dict[str, Any]:
        """Label the probe at the present checkpoint and compare it with scores and labels of the ranking in `ranked`.

        Returns:
            `scores`: mean Spearman over the targets of the probe's scores then with its labels now; `scores_then`: with its
            labels then; `labels`: of its labels then and now; `costs`: of target gradients and labels, by stage.
        """
        now = self._label(context, self._probe_rows(context))
        then = read_json(ranked / PROBE_FILE)
        stale = Labels.load(ranked / "labels").take(now.text_ids)
        scores = np.array([then["scores"][text_id] for text_id in now.text_ids])
        costs = label_costs(now, num_processes=context.num_processes)
        return {
            "scores": _mean_spearman(scores, now.values),
            "scores_then": _mean_spearman(scores, stale.values),
            "labels": _mean_spearman(stale.values, now.values),
            "costs": {f"drift {stage}": cost for stage, cost in costs.items()},
        }

    # ------------------------------------------------------------------ steps

    def _probe_rows(self, context: RankingContext) -> np.ndarray:
        return self.reserved(list_text_ids(context.pool), seed=context.seed)

    def _draw(self, context: RankingContext, texts: Dataset) -> tuple[np.ndarray, set[str]]:
        """Choose the sample among candidates without a label; return its pool rows and the ids that fidelity is judged on."""
        ids = list_text_ids(texts)
        known = {text_id for folder in context.earlier for text_id in read_json(folder / "sample.json")}
        places = np.array([place for place, text_id in enumerate(ids) if text_id not in known], dtype=np.int64)
        size = max(int(self.sample_size * context.sample_factor), 1)
        places = places if len(places) >= size else np.arange(len(ids))
        guides = self._guides(context, texts.select(places), size) if context.earlier else {}
        drawn = draw_sample(
            [ids[place] for place in places],
            size,
            how=self.sampling,
            **guides,
            salt=f"{context.seed}:{context.refresh}:sample",
        )
        chosen = places[drawn.places]
        write_json(context.folder / "sample.json", [ids[place] for place in chosen])
        judged = {ids[place] for place in places[drawn.places[drawn.at_random]]}
        return context.candidates[chosen], judged

    def _guides(self, context: RankingContext, texts: Dataset, size: int) -> dict[str, np.ndarray]:
        """What the last ranking says of each text that could get a label, by the names that `draw_sample` takes it by."""
        if self.sampling == "random":
            return {}
        if self.sampling == "stratified":
            scores = Scores.load(context.earlier[-1] / SCORES_FILE)
            combined = combine(np.asarray(scores), "sum_z", target_names=scores.target_names)
            known = dict(zip(scores.text_ids, combined.tolist(), strict=True))
            middle = float(np.median(combined))  # for texts that it did not score
            return {"scores": np.array([known.get(text_id, middle) for text_id in list_text_ids(texts)])}
        predictor = InfluencePredictor.load(context.earlier[-1] / "predictor", lm=context.lm, cache=context.cache)
        if self.sampling == "mass":
            turn = {text_id: number for number, text_id in enumerate(order_by_mass(predictor, texts, size, seed=context.seed))}
            return {"mass": np.array([float(size - turn.get(text_id, size)) for text_id in list_text_ids(texts)])}
        surrogate: Any = predictor.surrogate_
        _, spread = surrogate.predict(predictor.features(texts), return_spread=True)  # (M, C)
        return {"spread": (spread / (spread.mean(0) + 1e-30)).sum(1)}

    def _label(self, context: RankingContext, rows: np.ndarray) -> Labels:
        from oracle.measure import UnlabelableTextWarning, label

        with warnings.catch_warnings():
            if context.refresh:  # said once, of the first sample
                warnings.simplefilter("ignore", UnlabelableTextWarning)
            return label(
                context.lm,
                context.pool.select(rows),
                list(context.targets),
                method=self.method,
                workdir=context.folder / "labels",
                seed=context.seed,
                max_target_texts=self.max_target_texts,
                **dict(self.method_options or {}),
            )

    def _fit_and_score(self, context: RankingContext, texts: Dataset, labels: Labels, *, judged: set[str]) -> Ranking:
        start_seconds = time.perf_counter()
        probe = context.pool.select(self._probe_rows(context))
        probe_ids = set(list_text_ids(probe))
        fresh = labels.take([text_id for text_id in labels.text_ids if text_id not in probe_ids])
        older, agreements = self._older_labels(context, labels, list_text_ids(probe))
        first = self._fit(context, self.encoder, fresh, older, judged=judged, name="predictor")
        scores = first.predict(texts)
        facts: dict[str, Any] = {
            "live_features": self._has_live_features(),
            "num_labelled": len(labels),
            "num_older_labels": sum(len(old) for old, _ in older),
            "metric": self._metric(labels),
        }
        predictors = [first]
        if self.second_encoder:
            second = self._fit(
                context, [*self.encoder, *self.second_encoder], fresh, older, judged=judged, name="second_predictor"
            )
            scores = self._rescore(second, texts, scores)
            predictors.append(second)
        probe_scores = first.predict(probe) if len(probe) else None
        if probe_scores is not None:
            found = {text_id: row.tolist() for text_id, row in zip(probe_scores.text_ids, np.asarray(probe_scores), strict=True)}
            write_json(context.folder / PROBE_FILE, {"scores": found})
            facts["agreements_with_older_labels"] = agreements
        return Ranking(
            scores=scores,
            labels=fresh,
            fidelity=predictors[-1].fidelity_,
            costs=ranking_costs(context, labels, predictors, seconds=time.perf_counter() - start_seconds),
            facts=facts,
        )

    def _metric(self, labels: Labels) -> str | None:
        """The optimiser's metric that labels were measured in; None where a user chose it, or the method has none."""
        is_given = (self.method_options or {}).get("preconditioner", "auto") != "auto"
        return None if is_given else labels.meta.get("facts", {}).get("preconditioner_used")

    def _has_live_features(self) -> bool:
        """Whether features have to be made anew at every checkpoint."""
        return any(
            encoder == "model_state" or getattr(encoder, "frozen", True) is False
            for encoder in (*self.encoder, *self.second_encoder)
        )

    def _older_labels(
        self, context: RankingContext, labels: Labels, probe_ids: Sequence[str]
    ) -> tuple[list[tuple[Labels, float]], list[float]]:
        """Return labels of earlier refreshes that still agree on the probe, with their weights, newest first; the agreements."""
        found: list[tuple[Labels, float]] = []
        agreements: list[float] = []
        if not self.keep_labels:
            return found, agreements
        fresh = set(labels.text_ids)
        for age, folder in enumerate(reversed(context.earlier[-OLDEST_LABELS:]), start=1):
            old = Labels.load(folder / "labels")
            if probe_ids:
                agreements.append(_mean_spearman(old.take(probe_ids).values, labels.take(probe_ids).values))
            kept = [text_id for text_id in old.text_ids if text_id not in fresh]
            if kept and (not probe_ids or agreements[-1] >= self.min_agreement):
                found.append((old.take(kept), self.keep_labels**age))
        return found, agreements

    def _fit(
        self,
        context: RankingContext,
        encoders: Sequence[Any],
        labels: Labels,
        older: list[tuple[Labels, float]],
        *,
        judged: set[str],
        name: str,
    ) -> InfluencePredictor:
        """Fit a predictor, or load it where an interrupted refresh has fitted it already."""
        folder = context.folder / name
        if (folder / "predictor.json").exists():
            return InfluencePredictor.load(folder, lm=context.lm, cache=context.cache)
        made = plugins.create("surrogate.models", self.surrogate, dict(self.surrogate_options or {}))
        predictor = InfluencePredictor(
            [_make_encoder(encoder, context) for encoder in encoders],
            made,
            cache=context.cache,
            num_folds=self.num_folds,
            seed=context.seed,
        )
        labelled = set(labels.text_ids).union(*(old.text_ids for old, _ in older))
        rows = [row for row, text_id in enumerate(list_text_ids(context.pool)) if text_id in labelled]
        options: dict[str, Any] = {"older": older} if older else {}
        if self.warm_start and context.earlier:
            options["warm_start"] = InfluencePredictor.load(context.earlier[-1] / name, lm=context.lm, cache=context.cache)
        if judged < set(labels.text_ids):
            options["judged"] = sorted(judged)
        predictor.fit(context.pool.select(rows), labels, **options)
        predictor.save(folder)
        return predictor

    def _rescore(self, predictor: InfluencePredictor, texts: Dataset, scores: Scores) -> Scores:
        """Put the dearer predictor's scores in the place of the others' for the best share of the candidates."""
        combined = combine(np.asarray(scores), "sum_z", target_names=scores.target_names)
        best = np.sort(np.argsort(-combined, kind="stable")[: max(int(self.second_share * len(scores)), 1)])
        values = np.array(scores)
        values[best] = np.asarray(predictor.predict(texts.select(best)))
        return Scores(values, text_ids=scores.text_ids, target_names=scores.target_names)


def _as_list(encoders: Any) -> tuple[Any, ...]:
    """Several encoders, or one alone; one with options, as the command line writes it, becomes an object."""
    several = encoders if isinstance(encoders, (list, tuple)) else (encoders,)
    return tuple(_spelled_out(encoder) for encoder in several)


def _spelled_out(encoder: Any) -> Any:
    if not isinstance(encoder, str) or ":" not in encoder:
        return encoder
    name, options = parse_plugin(encoder)
    if name == "model_state":
        raise InputError(
            f"the encoder {encoder!r}.",
            "'model_state', or an object of it: ModelState(model=lm, ...)",
            "leave its options out, or pass an object.",
        )
    return plugins.create(ENCODERS, name, options)


def _make_encoder(encoder: Any, context: RankingContext) -> Any:
    if not isinstance(encoder, str):
        return encoder
    options = {"model": context.lm, "targets": list(context.targets)} if encoder == "model_state" else {}
    return plugins.create(ENCODERS, encoder, options)


def _mean_spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over the columns of Spearman's correlation of two (S, C) arrays."""
    return float(np.mean([spearman(a, b) for a, b in zip(first.T, second.T, strict=True)]))
