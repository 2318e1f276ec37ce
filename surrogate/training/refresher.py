"""`Refresher`: which texts to train on in the coming round, and when to measure, fit and score anew.

Training goes in rounds. At the start of each, the refresher takes the next best texts by the present ranking of the pool,
or first makes a new one: always after so many rounds, or when fresh labels of a small probe no longer agree with the
stale scores. It knows no framework: `surrogate.training.Rounds` and `InfluenceCallback` call `next_round`.

    refresher.json  rounds.jsonl  overhead.json  features/
    round-00003/{ranking/, selection.parquet, round.json}      the last file's existence means complete

A round is a function of the pool, the options, the model and the rounds before it. One that stands on disk with the same
identity is read, so a resumed run has the same selections and pays for nothing twice; killed within a refresh, the
next call goes on where it was.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle.artifacts import fingerprint
from oracle.errors import InputError, InputTypeError, MismatchError, MissingFileError, check_choice
from oracle.processes import working_together
from oracle.targets import read_targets
from oracle.texts import list_text_ids, read_texts
from surrogate.feature_cache import FeatureCache
from surrogate.planning.overhead import Overhead
from surrogate.training.choice import Choice
from surrogate.training.pool_state import PoolState
from surrogate.training.refresher_options import (
    check_drift,
    check_model,
    check_readable,
    check_repeats,
    check_rule,
    check_targets,
    describe_run,
    make_strategy,
)
from surrogate.training.round_identity import RoundIdentity
from surrogate.training.round_making import RoundMaker
from surrogate.training.round_store import Round, RoundStore
from surrogate.training.schedule import Schedule

if TYPE_CHECKING:
    from oracle.language_model import LanguageModel
    from surrogate.training.weight_average import WeightAverage

ON_FAILURE = ("continue", "stop")


class EmptyAverageWarning(UserWarning):
    """A running average of the weights has counted none."""


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
        rule: Selection rule that orders the scored texts. None draws a round at random from the best fifth of the candidates
            ("top_share"): with the very best ones first, rounds were narrow and refreshes ran after what the round before had
            unlearnt. An order that is random already is taken as it stands ("top").
        rule_options: Its options.
        refresh_every: Rounds from one refresh to the next; with `drift_threshold`, from one look at the drift to the next.
        drift_threshold: Refresh only when the stale scores' rank agreement with fresh labels of the probe has fallen below
            this share of what it was at the last refresh, or there was none; None refreshes on schedule.
        consume_once: Do not offer a text again until the pool is spent: a round takes what the pass before has left, and goes
            on with the best of the others. A new pass begins with a refresh, if the present ranking does not know all
            texts. Where the useful texts are fewer than training takes, let them come again: with False the losses of
            `benchmarks/gain_rounds.py` on mathematics fell three times as far.
        warmup_fraction: Share of the rounds, at the beginning, with texts at random; needs `num_rounds`. Rounded up to whole
            rounds, but for the last one, which is selected.
        final_fraction: Select only in this share of the rounds, at the end, and train on random texts before; needs
            `num_rounds`. Rounded down to whole rounds, and to the last one where it is less. None selects from the start.
        num_rounds: How many rounds there will be. To go on for longer with a workdir that has `warmup_fraction` or
            `final_fraction`, pass the number that it was begun with.
        max_overhead: Most that selecting may cost, as a share of training, in counted FLOPs and in seconds. A resumed training
            may have another one; so it may have `allow_low_fidelity`.
        on_failure: What to do when a refresh, or a look at the drift, fails for lack of memory, NaN, or fidelity at chance:
            "continue" with the ranking before (with random texts, if there is none), or "stop". After a first ranking that
            holds for every refusal, too few texts to label for example; before it, a refusal stops the training.
        allow_low_fidelity: Select by scores at chance all the same.
        seed: Decides everything random.
        **strategy_options: Options of the strategy.

    Raises:
        InputError: An option cannot be used, or targets are missing.
        MismatchError: `workdir` belongs to another pool, other targets or other options, or to a training that began from
            other weights.

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
        rule: Any = None,
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
        if not isinstance(seed, (int, Integral)):
            raise InputTypeError(f"seed={seed!r}.", "a whole number", "pass for example seed=0.")
        if not isinstance(consume_once, bool):
            raise InputTypeError(f"consume_once={consume_once!r}.", "True or False", "pass one of the two.")
        self.pool = read_texts(pool)
        self.text_ids = list_text_ids(self.pool)
        self.strategy = make_strategy(strategy, strategy_options, other_options=OWN_OPTIONS)
        self.targets = [] if targets is None else read_targets(targets)
        self.store = RoundStore(workdir)
        self.schedule = Schedule.make(
            refresh_every=refresh_every,
            drift_threshold=drift_threshold,
            warmup_fraction=warmup_fraction,
            final_fraction=final_fraction,
            num_rounds=num_rounds,
        )
        rule = rule or ("top" if getattr(self.strategy, "is_blind", False) else "top_share")
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
        names = [target.name for target in self.targets] if self.strategy.needs_targets else []
        check_targets(self.strategy, self.targets)
        check_drift(self.strategy, self.schedule)
        check_rule(rule, self.choice.rule_options, target_names=names)
        check_repeats(self.strategy, consume_once=consume_once)
        check_readable(self.strategy, self.pool)
        reserved = self.strategy.reserved(self.text_ids, seed=seed) if hasattr(self.strategy, "reserved") else np.zeros(0, int)
        self._state = PoolState(
            self.pool, reserved=reserved, consume_once=consume_once and not self.strategy.redraws, num_tokens=num_tokens
        )
        self._maker = self._make_maker(cache)
        self._records: list[dict[str, Any]] = []
        self._last: Round | None = None  # that was read
        self._options = describe_run(
            text_ids=self.text_ids,
            targets=self.targets,
            strategy=self.strategy,
            schedule=self.schedule,
            choice=self.choice,
            consume_once=consume_once,
        )
        self._identities = RoundIdentity(fingerprint([self._options, max_overhead, allow_low_fidelity]))

    def _make_maker(self, cache: FeatureCache | str | Path | None) -> RoundMaker:
        return RoundMaker(
            pool=self._state,
            targets=self.targets,
            strategy=self.strategy,
            schedule=self.schedule,
            choice=self.choice,
            overhead=self.overhead,
            store=self.store,
            cache=cache if isinstance(cache, FeatureCache) else FeatureCache(cache or self.store.folder / "features"),
            stops_on_failure=self.on_failure == "stop",
            seed=self.seed,
        )

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
        average: WeightAverage | None = None,
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
            average: The running average of the model's weights, to measure there and not at the last weights, whose labels
                are noisy at a constant learning rate. A resumed training has to bring its average along.

        Raises:
            InputError: Not exactly one of `num_texts` and `num_tokens`, or what the strategy or rule raises.
        """
        if (num_texts is None) == (num_tokens is None):
            raise InputError(
                f"num_texts={num_texts!r} and num_tokens={num_tokens!r}.", "exactly one of the two", "say how large the round is."
            )
        if average is not None and step and not average.num_updates:
            warnings.warn(
                f"the running average has counted no weights after {step} steps, so labels are measured at the last ones: call "
                "average.watch(optimizer) before training; resumed, average.load_state_dict(...) as well.",
                EmptyAverageWarning,
                stacklevel=2,
            )
        size: dict[str, int] = {"num_tokens": num_tokens} if num_texts is None else {"num_texts": num_texts}  # type: ignore[dict-item]
        start_seconds = time.perf_counter()
        self.overhead.planned_flops = planned_flops
        self.overhead.observe(flops=trained_flops, seconds=trained_seconds)
        with nullcontext() if average is None else average.applied(), working_together() as processes:
            with processes.all_or_none():
                identity = self._identity(lm, size)
            processes.require_same(identity)
            record = processes.on_first(lambda: self._stored(identity))
            if record is None:
                record = self._maker.make(
                    identity,
                    lm,
                    self._records,
                    size=size,
                    step=step,
                    coming_flops=coming_flops,
                    processes=processes,
                    start_seconds=start_seconds,
                )
        return self._accept(record)

    def count_tokens_by(self, num_tokens: Sequence[int] | np.ndarray) -> None:
        """Count these (N,) tokens of the pool's texts in rounds of `num_tokens`, unless they were given to begin with."""
        self._state.count_tokens_by(num_tokens)

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
            self._take(self._round(index, record))

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

    def _identity(self, lm: LanguageModel | None, size: Mapping[str, int]) -> dict[str, Any]:
        """Everything that decides the coming round, as JSON values."""
        check_model(self.strategy, lm)
        return self._identities.of(
            len(self._records),
            before=self._chain(),
            lm=lm,
            looks_at_model=self.strategy.needs_model and not self._maker.why_not(self._records, size, lm),
            size=size,
        )

    def _chain(self) -> str:
        return str(self._records[-1]["chain"]) if self._records else ""

    def _stored(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the coming round's record if it was made before; None where it is to be made, here and now."""
        for is_held in (False, True):
            self.store.claim(self._options)
            record = self.store.stored(len(self._records), identity)
            if record is not None or is_held:
                break
            self.store.hold()  # another process may have made the round meanwhile
        if record is None and not self._records:
            self.store.check_unused()
        return record

    def _round(self, index: int, record: dict[str, Any]) -> Round:
        if self._last is None or self._last.record["chain"] != record["chain"]:
            ids = self.store.selected_ids(index)
            self._last = Round(index, self._state.rows(ids), ids, record)
        return self._last

    def _take(self, made: Round) -> None:
        own = made.rows[made.record.get("num_leftover", 0) :]  # what was left of the pass before comes first
        self._state.take(own, starts_pass=made.record["starts_pass"])

    def _accept(self, record: dict[str, Any]) -> Round:
        made = self._round(len(self._records), record)
        self._take(made)
        self.overhead.load_state_dict(record["account"])
        self._records.append(record)
        return made


OWN_OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(Refresher).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)
