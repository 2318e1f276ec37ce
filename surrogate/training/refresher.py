"""`Refresher`: which texts to train on in the coming round, and when to measure, fit and score anew.

Training goes in rounds. At the start of each, the refresher takes the next best texts by the present ranking of the pool,
or first makes a new one: always after so many rounds, or when fresh labels of a small probe no longer agree with the
stale scores. It knows no framework: `surrogate.training.Rounds` and `InfluenceCallback` call `next_round`.

    refresher.json  rounds.jsonl  features/
    round-00003/{ranking/, selection.parquet, round.json}      the last file's existence means complete

A round is a function of the pool, the options, the model and the rounds before it. One that stands on disk with the same
identity is read, so a resumed run has the same selections and pays for nothing twice; killed within a refresh, the
next call goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle import plugins
from oracle.artifacts import fingerprint
from oracle.errors import (
    InputError,
    InputTypeError,
    MismatchError,
    MissingFileError,
    check_choice,
)
from oracle.processes import working_together
from oracle.targets import read_targets
from oracle.texts import list_text_ids, read_texts
from surrogate.feature_cache import FeatureCache
from surrogate.planning.overhead import Overhead
from surrogate.training.choice import Choice
from surrogate.training.pool_state import PoolState
from surrogate.training.round_making import RoundMaker, ranked_in
from surrogate.training.round_store import RoundStore
from surrogate.training.schedule import Schedule

if TYPE_CHECKING:
    from oracle.language_model import LanguageModel

STRATEGIES = "surrogate.training.strategies"
ON_FAILURE = ("continue", "stop")


@dataclass(frozen=True)
class Round:
    """What to train on until the next round.

    Attributes:
        index: Number of the round, from 0.
        rows: (K,) row numbers of the pool, best first.
        text_ids: K ids.
        record: The round's row in the table of decisions and costs.
    """

    index: int
    rows: np.ndarray
    text_ids: list[str]
    record: dict[str, Any]


class Refresher:
    """Choose the texts of each round of training, and refresh the choice.

    Args:
        pool: The texts to choose from: anything `oracle.read_texts` takes.
        targets: The named target sets; may be left out for a strategy that needs none.
        workdir: Folder for rounds, labels, features and predictors; the same one for all processes.
        cache: Folder (or FeatureCache) of features, to share them between runs; None keeps them in `workdir`. What they took
            is counted all the same.
        num_tokens: N token counts of the pool's texts, where they are known; None counts them when a round needs them.
        strategy: Name of a strategy (`surrogate methods`), or an object of one.
        rule: Selection rule that orders the scored texts. By default a round is drawn at random from the best fifth of the
            candidates: with the very best ones first, rounds were narrow and refreshes ran after what the round before had
            unlearnt.
        rule_options: Its options.
        refresh_every: Rounds from one refresh to the next; with `drift_threshold`, from one look at the drift to the next.
        drift_threshold: Refresh only when the stale scores' rank agreement with fresh labels of the probe has fallen below
            this share of what it was at the last refresh; None refreshes on schedule.
        consume_once: Do not offer a text again until the pool is spent.
        warmup_fraction: Share of the rounds, at the beginning, with texts at random; needs `num_rounds`.
        final_fraction: Select only in this share of the rounds, at the end, and train on random texts before; needs
            `num_rounds`. None selects from the start.
        num_rounds: How many rounds there will be.
        max_overhead: Most that selecting may cost, as a share of training, in counted FLOPs and in seconds.
        on_failure: What to do when a refresh fails for lack of memory, NaN, or fidelity at chance: "continue" with the
            ranking before (with random texts, if there is none), or "stop".
        allow_low_fidelity: Select by scores at chance all the same.
        seed: Decides everything random.
        **strategy_options: Options of the strategy.

    Raises:
        InputError: An option cannot be used, or targets are missing.
        MismatchError: `workdir` belongs to another pool, other targets or other options.

    Example:
        >>> refresher = Refresher("pool.jsonl", {"math": "math.jsonl"}, workdir="influence")         # doctest: +SKIP
        >>> texts = refresher.pool.select(refresher.next_round(lm, num_texts=1024).rows)              # doctest: +SKIP
    """

    def __init__(
        self,
        pool: Any,
        targets: Any = None,
        *,
        workdir: str | Path,
        cache: FeatureCache | str | Path | None = None,
        num_tokens: Sequence[int] | np.ndarray | None = None,
        strategy: Any = "refresh",
        rule: str = "top_share",
        rule_options: Mapping[str, Any] | None = None,
        refresh_every: int = 1,
        drift_threshold: float | None = None,
        consume_once: bool = True,
        warmup_fraction: float = 0.0,
        final_fraction: float | None = None,
        num_rounds: int | None = None,
        max_overhead: float | None = None,
        on_failure: str = "continue",
        allow_low_fidelity: bool = False,
        seed: int = 0,
        **strategy_options: Any,
    ) -> None:
        self.pool = read_texts(pool)
        self.text_ids = list_text_ids(self.pool)
        self.strategy = _make_strategy(strategy, strategy_options)
        self.targets = [] if targets is None else read_targets(targets)
        self.store = RoundStore(workdir)
        self.schedule = Schedule.make(
            refresh_every=refresh_every,
            drift_threshold=drift_threshold,
            warmup_fraction=warmup_fraction,
            final_fraction=final_fraction,
            num_rounds=num_rounds,
        )
        self.choice = Choice(
            text_ids=self.text_ids,
            rule=rule,
            rule_options=dict(rule_options or {}),
            allow_low_fidelity=allow_low_fidelity,
            seed=seed,
        )
        self.overhead = Overhead(max_overhead)
        self.consume_once, self.seed = consume_once, seed
        self.on_failure = check_choice("on_failure", on_failure, ON_FAILURE)
        self._check()
        reserved = self.strategy.reserved(self.text_ids, seed=seed) if hasattr(self.strategy, "reserved") else np.zeros(0, int)
        self._state = PoolState(
            self.pool, reserved=reserved, consume_once=consume_once and not self.strategy.redraws, num_tokens=num_tokens
        )
        self._maker = RoundMaker(
            pool=self._state,
            targets=self.targets,
            strategy=self.strategy,
            schedule=self.schedule,
            choice=self.choice,
            overhead=self.overhead,
            store=self.store,
            cache=cache if isinstance(cache, FeatureCache) else FeatureCache(cache or self.store.folder / "features"),
            stops_on_failure=self.on_failure == "stop",
            seed=seed,
        )
        self._records: list[dict[str, Any]] = []
        self._options = self._describe()

    # ------------------------------------------------------------------ what callers use

    @property
    def num_rounds_done(self) -> int:
        """How many rounds there were."""
        return len(self._records)

    def next_round(
        self,
        lm: LanguageModel | None = None,
        *,
        num_texts: int | None = None,
        num_tokens: int | None = None,
        step: int = 0,
        trained_flops: float = 0.0,
        trained_seconds: float = 0.0,
        coming_flops: float = 0.0,
        planned_flops: float | None = None,
    ) -> Round:
        """Choose the texts of the next round; label, fit and score first where a refresh is due.

        The model, its optimiser, random states and modes are left as they were. Where `torch.distributed` is initialised,
        every process calls this with its own copy of the model, and all get the same round.

        Args:
            lm: The live model with its optimiser; may be None for a strategy that needs no model.
            num_texts: How many texts the round takes; fewer where the pool has not as many.
            num_tokens: In place of that, how many tokens (as the model would see them) at most.
            step: Optimiser steps done so far, for the table.
            trained_flops: FLOPs of training so far, of all processes together, which `max_overhead` is a share of.
            trained_seconds: Seconds of training so far, likewise summed over processes; labels count theirs in the same way.
            coming_flops: FLOPs of training in the coming round.
            planned_flops: FLOPs of the whole training, where they are known.

        Raises:
            InputError: Not exactly one of `num_texts` and `num_tokens`, or what the strategy or rule raises.
        """
        if (num_texts is None) == (num_tokens is None):
            raise InputError(
                f"num_texts={num_texts!r} and num_tokens={num_tokens!r}.", "exactly one of the two", "say how large the round is."
            )
        size: dict[str, int] = {"num_tokens": num_tokens} if num_texts is None else {"num_texts": num_texts}  # type: ignore[dict-item]
        self.overhead.planned_flops = planned_flops
        self.overhead.observe(flops=trained_flops, seconds=trained_seconds)
        with working_together() as processes:
            with processes.all_or_none():
                identity = self._identity(lm, size)
            processes.require_same(identity)
            record = processes.on_first(lambda: self._stored(identity))
            if record is None:
                record = self._maker.make(
                    identity, lm, self._records, size=size, step=step, coming_flops=coming_flops, processes=processes
                )
        return self._accept(record)

    def round_at(self, index: int) -> Round:
        """Return a round that was made before.

        Raises:
            MissingFileError: There was none.
        """
        if not 0 <= index < len(self._records):
            raise MissingFileError(
                f"round {index} of {self.store.folder}, and {len(self._records)} rounds were made.",
                "a round that was made",
                "call next_round first.",
            )
        return self._round(index, self._records[index])

    def rewind(self, num_rounds: int) -> None:
        """Go on as after so many rounds, as they stand on disk: training is resumed from another checkpoint.

        Raises:
            MissingFileError: There are not so many rounds on disk.
            MismatchError: They are of another pool, other targets or other options.
        """
        records = self.store.records(num_rounds)
        if records:
            self.store.claim(self._options)
            self.overhead.load_state_dict(records[-1]["account"])
        else:
            self.overhead.load_state_dict(Overhead().state_dict())
        self._records, self._maker.held = records, None
        self._state.forget()
        for index, record in enumerate(records):
            self._state.take(self._round(index, record).rows, starts_pass=record["starts_pass"])

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint of the training needs to say where the refresher is; the rest is in `workdir`."""
        return {"num_rounds": len(self._records), "chain": self._chain()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            MissingFileError: The rounds are not in `workdir`.
            MismatchError: Those in `workdir` are of another run.
        """
        self.rewind(int(state["num_rounds"]))
        if self._chain() != state["chain"]:
            raise MismatchError(
                f"the {state['num_rounds']} rounds in {self.store.folder} are not those of the checkpoint.",
                "the workdir that belongs to the checkpoint",
                "give each run a workdir of its own.",
            )

    def table(self) -> list[dict[str, Any]]:
        """Return one row per round: why, how well, how much; `rounds.jsonl` in the workdir has the same."""
        return [dict(record) for record in self._records]

    # ------------------------------------------------------------------ identity

    def _check(self) -> None:
        if self.strategy.needs_targets and not self.targets:
            raise InputError(
                f"the strategy {self.strategy.plugin_name!r} without target sets.",
                "a mapping such as {'math': texts}",
                "name the target sets, or use strategy='random'.",
            )
        if self.schedule.drift_threshold is not None and not getattr(self.strategy, "num_probe", 0):
            raise InputError(
                f"drift_threshold with the strategy {self.strategy.plugin_name!r} and no probe set.",
                "strategy='refresh' with num_probe above 0",
                "leave drift_threshold out, or give the strategy a probe set.",
            )

    def _describe(self) -> dict[str, Any]:
        described = {
            "pool": fingerprint(sorted(self.text_ids)),
            "targets": {target.name: target.fingerprint for target in self.targets},
            "strategy": self.strategy.plugin_name,
            "strategy_options": {key: str(value) for key, value in plugins.options_of(self.strategy).items()},
            "rule": self.choice.rule,
            "rule_options": dict(self.choice.rule_options),
            "refresh_every": self.schedule.refresh_every,
            "drift_threshold": self.schedule.drift_threshold,
            "first_selected": self.schedule.first_selected,
            "consume_once": self.consume_once,
            "max_overhead": self.overhead.max_overhead,
            "allow_low_fidelity": self.choice.allow_low_fidelity,
            "seed": self.seed,
        }
        return dict(json.loads(json.dumps(described, default=str)))

    def _identity(self, lm: LanguageModel | None, size: Mapping[str, int]) -> dict[str, Any]:
        """Everything that decides the coming round, as JSON values."""
        index, needs_model = len(self._records), self.strategy.needs_model
        if needs_model and lm is None:
            raise InputError(
                f"the strategy {self.strategy.plugin_name!r} looks at the live model, and there is none.",
                "an oracle.LanguageModel",
                "pass next_round(lm, ...).",
            )
        may_rank = index >= self.schedule.first_selected and (self.strategy.adapts or ranked_in(self._records) is None)
        model = lm.fingerprint(optimizer=True) if needs_model and may_rank and lm is not None else None
        return {"options": fingerprint(self._options), "before": self._chain(), "model": model, "index": index, **size}

    def _chain(self) -> str:
        return str(self._records[-1]["chain"]) if self._records else ""

    def _stored(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        self.store.claim(self._options)
        return self.store.stored(len(self._records), identity)

    def _round(self, index: int, record: dict[str, Any]) -> Round:
        ids = self.store.selected_ids(index)
        return Round(index, self._state.rows(ids), ids, record)

    def _accept(self, record: dict[str, Any]) -> Round:
        made = self._round(len(self._records), record)
        self._state.take(made.rows, starts_pass=record["starts_pass"])
        self.overhead.load_state_dict(record["account"])
        self._records.append(record)
        return made


def _make_strategy(strategy: Any, options: Mapping[str, Any]) -> Any:
    if isinstance(strategy, str):
        return plugins.create(STRATEGIES, strategy, dict(options))
    if not hasattr(strategy, "rank") or not hasattr(strategy, "plugin_name"):
        raise InputTypeError(
            f"strategy={strategy!r} has no method rank.",
            ", ".join(plugins.names(STRATEGIES)) + ", or an object of one of them",
            "choose a strategy by name.",
        )
    if options:
        raise InputError(
            f"options {', '.join(options)} beside a strategy object.",
            "options only with a strategy's name",
            "set them on the object.",
        )
    return strategy
