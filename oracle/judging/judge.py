"""`judge`: the last judge of labels, models that were actually retrained.

Agreement with another label is agreement with another approximation. Here the checkpoint is trained on subsets of the
labelled sample, and what that does to the targets is held against what the labels said it would do. All methods are
judged by the same retrained models. Three judges: the linear datamodelling score (`oracle.judging.datamodelling`),
removal and addition of the top share (`oracle.judging.shares`), and the recovery of planted texts
(`oracle.judging.planted`), which trains nothing.

The measured effects are those of a whole short training run and the labels those of one step, so a score below its
ceiling is not only the method's error: influence changes along the run, and texts repeat what others have taught.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle import plugins
from oracle.errors import InputError, InputTypeError, MismatchError, check_count
from oracle.judging.datamodelling import Ceiling, Score, datamodelling_scores, draw_subsets, predicted_effects, score_ceilings
from oracle.judging.planted import Planted, Recovery, recovery
from oracle.judging.retraining import Retrained, Retraining, RetrainingPlan, Subset
from oracle.judging.shares import BOTTOM, JUDGES, RANDOM, TOP, SharePlan, Worth, share_worth
from oracle.judging.verdicts import Judgement, Verdict, label_cost
from oracle.labels import Labels
from oracle.language_model import LanguageModel
from oracle.measure import METHODS
from oracle.methods import needs_of
from oracle.target_columns import prepare_targets
from oracle.targets import TargetSet, read_targets
from oracle.texts import list_text_ids, read_texts

if TYPE_CHECKING:
    from oracle.targets import Targets

MIN_SUBSETS = 4  # a rank correlation over fewer says nothing


def judge(
    lm: LanguageModel,
    sample: Any,
    targets: Targets,
    labels: Mapping[str, Labels],
    *,
    workdir: str | Path | None = None,
    planted: Planted | None = None,
    plan: RetrainingPlan | None = None,
    alpha: float = 0.5,
    num_subsets: int = 32,
    share: float | None = 0.2,
    num_seeds: int = 2,
    max_target_texts: int | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> Judgement:
    """Judge labels by models that were retrained on parts of the labelled sample.

    Args:
        lm: The model with its optimiser, at the checkpoint that the retrained models begin with.
        sample: The labelled texts, in any order: anything `read_texts` takes. Planted ones are not trained on.
        targets: Name -> target set, as for `oracle.label`. They may be other texts than those labelled with: then the
            labels are judged by texts that they have not seen.
        labels: Method name -> its labels, of the whole sample and of at least these targets. Scores of a surrogate, or
            any other numbers per text, can be judged too: `Labels.from_values`.
        workdir: Folder for the retrained models' results; killed and run again, only missing models are trained.
        planted: From `oracle.plant`; the labels must then be of `planted.texts`.
        plan: How models are retrained.
        alpha: Share of the sample in each random subset.
        num_subsets: Random subsets; 0 leaves the linear datamodelling score out.
        share: The top and bottom share that is removed and added; None leaves removal and addition out.
        num_seeds: Models per subset and share, each with another order of the texts.
        max_target_texts: Measure on at most this many texts of each target set.
        num_bootstrap: Draws for the intervals.
        seed: Decides subsets, orders, random shares, target texts and halves.

    Returns:
        A verdict per method; `table()` for people, `as_dict()` for programs.

    Units:
        Worths of shares in nats per target token, positive where the texts lower the loss more than random ones do.

    Raises:
        MismatchError: Labels do not have all texts or targets; `workdir` has models of another checkpoint, other targets
            or another plan.
        InputError: The sample is too small, a share is no share, or no judge is left.
        NotFiniteError: A retrained model's loss became NaN or infinite.

    Example:
        >>> found = oracle.judge(lm, sample, targets, {"grad_dot": labels}, workdir="judge")  # doctest: +SKIP
        >>> print(found.table())                                                              # doctest: +SKIP
    """
    for option, value, minimum in (("num_seeds", num_seeds, 1), ("num_bootstrap", num_bootstrap, 1), ("seed", seed, 0)):
        check_count(option, value, minimum)
    if max_target_texts is not None:
        check_count("max_target_texts", max_target_texts)
    texts = read_texts(sample)
    target_sets = read_targets(targets, max_texts=max_target_texts, seed=seed)
    names = [target.name for target in target_sets]
    text_ids = sorted(set(list_text_ids(texts)) - (set() if planted is None else planted.text_ids))
    _check_judges(num_subsets, share, planted, alpha=alpha, num_texts=len(text_ids))
    taken = {name: _take(name, given, text_ids, names) for name, given in _by_name(labels).items()}
    recovered = {} if planted is None else {name: _recovery(name, labels[name], planted, names) for name in taken}
    parts: dict[str, Any] = {"alpha": alpha, "num_subsets": num_subsets, "num_seeds": num_seeds, "share": share, "seed": seed}
    evidence = _Evidence.planned(text_ids, {name: own.values for name, own in taken.items()}, **parts)
    plan, cost = plan or RetrainingPlan(), {}
    if num_subsets or share is not None:
        columns = prepare_targets(lm, target_sets, seed=seed)
        cost = evidence.gather(Retraining(lm, texts, columns, plan=plan, workdir=workdir))
    scores = evidence.scores(num_bootstrap=num_bootstrap, seed=seed)
    verdicts = {
        name: _verdict(name, own, evidence, lm=lm, targets=target_sets, scores=scores.get(name), planted=recovered.get(name, {}))
        for name, own in taken.items()
    }
    settings = {
        "num_texts": len(text_ids),
        "target_texts": {target.name: len(target) for target in target_sets},
        "num_planted": 0 if planted is None else len(planted.table),
        "plan": asdict(plan),
        **parts,
    }
    return Judgement(verdicts, names, dict(zip(names, evidence.ceilings(), strict=False)), settings, cost)


@dataclass
class _Evidence:
    """The retrained models that all methods are judged by.

    Attributes:
        text_ids: The sample, sorted.
        values: Method name -> (S, C) its labels.
        subsets: M random subsets for the linear datamodelling score.
        seeds: R seeds of the models of each subset.
        shares: What to remove and to add, or None.
    """

    text_ids: list[str]
    values: dict[str, np.ndarray]
    subsets: list[tuple[str, ...]]
    seeds: Sequence[int]
    shares: SharePlan | None

    @classmethod
    def planned(
        cls,
        text_ids: list[str],
        values: dict[str, np.ndarray],
        *,
        alpha: float,
        num_subsets: int,
        num_seeds: int,
        share: float | None,
        seed: int,
    ) -> _Evidence:
        """Draw the subsets and random shares; nothing is trained yet."""
        subsets = draw_subsets(text_ids, alpha=alpha, num_subsets=num_subsets, seed=seed)
        shares = None if share is None else SharePlan(text_ids, round(share * len(text_ids)), num_seeds, seed)
        return cls(text_ids, values, subsets, range(seed, seed + num_seeds), shares)

    def gather(self, retraining: Retraining) -> dict[str, float]:
        """Train what is asked for and return its cost; a subset that several methods or judges ask for is trained once."""
        asked = [Subset(text_ids, seed) for seed in self.seeds for text_ids in self.subsets]
        for judge_name in JUDGES if self.shares is not None else ():
            assert self.shares is not None
            asked += self.shares.subsets(judge_name, None, RANDOM)
            for array in self.values.values():
                for column in array.T:
                    asked += [subset for side in (TOP, BOTTOM) for subset in self.shares.subsets(judge_name, column, side)]
        results = retraining.run(asked, title="judge")
        self.retrained: dict[str, Retrained] = {subset.name: found for subset, found in zip(asked, results, strict=True)}
        return retraining.cost()

    def scores(self, *, num_bootstrap: int, seed: int) -> dict[str, tuple[list[Score], Score]]:
        """Method name -> its score on each target and their mean; empty without subsets."""
        if not self.subsets:
            return {}
        measured = self._measured("effects").mean(0)  # (M, C)
        return {
            name: datamodelling_scores(
                predicted_effects(array, self.text_ids, self.subsets), measured, num_bootstrap=num_bootstrap, seed=seed
            )
            for name, array in self.values.items()
        }

    def ceilings(self) -> list[Ceiling | None]:
        """How high a score can be, for each target; empty without subsets."""
        if not self.subsets:
            return []
        return score_ceilings(self._measured("effects"), np.swapaxes(self._measured("half_effects"), 1, 2))

    def worths(self, method: str, names: Sequence[str]) -> dict[str, dict[str, dict[str, Worth]]]:
        """Target name -> worth of the shares by a method's labels; empty without shares."""
        if self.shares is None:
            return {}
        columns = self.values[method].T
        return {name: share_worth(self.shares, columns[index], self.retrained, column=index) for index, name in enumerate(names)}

    def _measured(self, what: str) -> np.ndarray:
        """Of every seed and subset: effects (R, M, C) or half_effects (R, M, 2, C)."""
        return np.array([[getattr(self.retrained[Subset(ids, seed).name], what) for ids in self.subsets] for seed in self.seeds])


def _verdict(
    name: str,
    labels: Labels,
    evidence: _Evidence,
    *,
    lm: LanguageModel,
    targets: Sequence[TargetSet],
    scores: tuple[list[Score], Score] | None,
    planted: dict[str, dict[str, Recovery]],
) -> Verdict:
    """Put together what the judges say of one method's labels, and whether they speak of this checkpoint and these targets."""
    names = [target.name for target in targets]
    return Verdict(
        {} if scores is None else dict(zip(names, scores[0], strict=True)),
        None if scores is None else scores[1],
        evidence.worths(name, names),
        planted,
        label_cost(labels.meta, forward_flops_per_token=lm.forward_flops_per_token),
        *_sameness(labels, lm, targets),
    )


def _by_name(labels: Mapping[str, Labels]) -> Mapping[str, Labels]:
    is_mapping = isinstance(labels, Mapping)
    if not is_mapping or not all(isinstance(given, Labels) for given in labels.values()):
        kinds = sorted({type(given).__name__ for given in labels.values()}) if is_mapping else type(labels).__name__
        raise InputTypeError(
            f"labels is or holds {kinds}.",
            "a mapping of method name to oracle.Labels",
            "pass for example {'grad_dot': labels}; other numbers per text become labels by Labels.from_values.",
        )
    if not labels:
        raise InputError("labels is empty.", "a mapping of method name to oracle.Labels", "give labels of at least one method.")
    return labels


def _take(name: str, labels: Labels, text_ids: Sequence[str], target_names: Sequence[str]) -> Labels:
    """Return a method's labels of these texts on these targets, in this order.

    A method that looks at no target set has one column, which stands for every target.
    """
    if labels.meta.get("per", "text") != "text":
        raise InputError(
            f"labels {name!r} are per {labels.meta['per']}, and subsets and shares here have equal numbers of texts.",
            "labels per text",
            "label with per='text'.",
        )
    looks_at_none = labels.meta.get("targets") == {}
    missing = [target for target in target_names if target not in labels.target_names]
    if missing and not looks_at_none:
        raise MismatchError(
            f"labels {name!r} have the targets {', '.join(labels.target_names)} and not {', '.join(missing)}.",
            "labels of every target set that is judged by",
            "label for these target sets, or name only those that were labelled for.",
        )
    try:
        taken = labels.take(text_ids)
    except MismatchError as error:
        raise MismatchError(f"labels {name!r}: {error.given}", error.accepted, error.remedy) from error
    columns = [0 if looks_at_none else labels.target_names.index(target) for target in target_names]
    return replace(taken, values=taken.values[:, columns], halves=taken.halves[:, :, columns], target_names=list(target_names))


def _recovery(name: str, labels: Labels, planted: Planted, target_names: Sequence[str]) -> dict[str, dict[str, Recovery]]:
    return recovery(_take(name, labels, list_text_ids(planted.texts), target_names), planted)


def _sameness(labels: Labels, lm: LanguageModel, targets: Sequence[TargetSet]) -> tuple[bool | None, bool | None]:
    """Whether labels were measured at this checkpoint, and on these target texts; None where they do not say."""
    checkpoint, texts = labels.meta.get("checkpoint"), labels.meta.get("targets")
    return (
        None if checkpoint is None else checkpoint == lm.fingerprint(optimizer=_depends_on_optimizer(labels)),
        None if not texts else all(texts.get(target.name) == target.fingerprint for target in targets),
    )


def _depends_on_optimizer(labels: Labels) -> bool:
    method = labels.meta.get("method")
    return method not in plugins.names(METHODS) or needs_of(plugins.load(METHODS, method)).optimizer


def _check_judges(num_subsets: int, share: float | None, planted: Planted | None, *, alpha: float, num_texts: int) -> None:
    """Refuse a call without a judge, and parts of the sample that are none."""
    if not num_subsets and share is None and planted is None:
        raise InputError(
            "num_subsets=0, share=None and planted=None leave no judge.", "at least one of the three", "give one of them."
        )
    if num_subsets:
        check_count("num_subsets", num_subsets, MIN_SUBSETS)
    for option, value, largest in (("alpha", alpha if num_subsets else None, 1.0), ("share", share, 0.5)):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value <= largest and 0 < round(value * num_texts) < num_texts):
            raise InputError(
                f"{option}={value!r} of {num_texts} texts is no part of them.",
                f"a number above 0 and up to {largest:g} that leaves at least one text in and one out",
                f"choose another {option}, or give a larger sample.",
            )
