"""Make one round: decide whether to rank the pool anew, ask the strategy, choose, count, and write it all down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch

from oracle.artifacts import fingerprint, read_json, write_json
from oracle.errors import InputError, LowFidelityError, NotFiniteError
from oracle.memory import is_out_of_memory
from oracle.processes import OtherProcessError, Processes
from oracle.targets import TargetSet
from surrogate.feature_cache import FeatureCache
from surrogate.planning.costs import Decision
from surrogate.planning.first_cost import expected_first
from surrogate.planning.overhead import Overhead
from surrogate.selection import Selection
from surrogate.training.choice import Choice, describe
from surrogate.training.pool_state import Candidates, PoolState
from surrogate.training.round_store import HeldRanking, RoundStore
from surrogate.training.schedule import Schedule, drift_of
from surrogate.training.strategies import Ranking, RankingContext

if TYPE_CHECKING:
    from oracle.language_model import LanguageModel

T = TypeVar("T")
Records: TypeAlias = list[dict[str, Any]]  # of the rounds so far

NO_SOLUTION = (np.linalg.LinAlgError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
RECOVERABLE = (NotFiniteError, LowFidelityError, *NO_SOLUTION)  # beside a lack of memory


@dataclass(kw_only=True)
class RoundMaker:
    """The parts of a refresher that a round is made with; `make` is the way in."""

    pool: PoolState
    targets: Sequence[TargetSet]
    strategy: Any
    schedule: Schedule
    choice: Choice
    overhead: Overhead
    store: RoundStore
    cache: FeatureCache
    stops_on_failure: bool
    seed: int
    held: HeldRanking | None = field(default=None, init=False)

    def why_not(self, records: Records, size: Mapping[str, int], lm: LanguageModel | None) -> str:
        """Say why the round after `records` begins without a new ranking; "" where one is due, if it can be afforded."""
        starts_pass = self.pool.candidates(size, lm).starts_pass
        return self.schedule.why_not(len(records), ranked_in=self._last_try(records, starts_pass), strategy=self.strategy)

    def make(
        self,
        identity: dict[str, Any],
        lm: LanguageModel | None,
        records: Records,
        *,
        size: Mapping[str, int],
        step: int,
        coming_flops: float,
        processes: Processes,
        start_seconds: float,
    ) -> dict[str, Any]:
        """Make the round after `records`, begun at `start_seconds`; all processes call it, the first one writes the record."""
        candidates = self.pool.candidates(size, lm)
        record: dict[str, Any] = {"index": identity["index"], "step": step, "identity": identity}
        record |= {"starts_pass": candidates.starts_pass, "num_leftover": len(candidates.leftover)}
        record |= {"reason": "", "refreshed": False, "drift": None, "failure": None, "left_out": False, "costs": {}, "facts": {}}
        record |= {"num_labels": 0, "num_ranked": 0}
        context = self._context(lm, candidates.rows, records, size=size, num_processes=processes.world_size)
        ranking = None
        if self._is_due(context, record, records, coming_flops=coming_flops, processes=processes):
            ranking = self._rank(context, record, processes=processes)

        def finish() -> dict[str, Any]:
            counts = self.pool.token_counts(lm) if "num_tokens" in size else None
            held, selection = self._choose(ranking, candidates, record, records, size=size, token_counts=counts)
            if ranking is not None:
                self.store.save_ranking(record["index"], ranking)
            record.update(describe(held, selection, candidate_ids={self.choice.text_ids[row] for row in candidates.rows}))
            seconds = time.perf_counter() - start_seconds
            self._count(record, seconds=seconds * processes.world_size)
            record["seconds"] = round(seconds, 3)
            record["chain"] = fingerprint([identity, selection.text_ids])
            self.store.write(record, selection, records)
            return record

        return processes.on_first(finish)

    def _context(
        self, lm: LanguageModel | None, candidates: np.ndarray, records: Records, *, size: Mapping[str, int], num_processes: int
    ) -> RankingContext:
        """What the strategy may look at; one that is asked once ranks what was trained on already, too."""
        ranked = [record["index"] for record in records if record["num_ranked"]]
        return RankingContext(
            pool=self.pool.texts,
            candidates=candidates if self.strategy.adapts else self.pool.free,
            targets=self.targets,
            lm=lm,
            cache=self.cache,
            folder=self.store.ranking_folder(len(records)),
            earlier=[self.store.ranking_folder(index) for index in ranked],
            refresh=len(ranked),
            num_texts=size.get("num_texts", len(candidates)),
            seed=self.seed,
            num_processes=num_processes,
        )

    def _fresh(self, records: Records, starts_pass: bool) -> int | None:
        """The round of the newest ranking, if it knows all texts that may be chosen now."""
        last = ranked_in(records)
        return last if last is not None and last == self._complete(records, starts_pass) else None

    def _last_try(self, records: Records, starts_pass: bool) -> int | None:
        """The round that the schedule counts from: of the newest ranking, or of a try in this pass that came to nothing.

        A strategy that ranks once tries again after a failure, but not where it has paid for a ranking that is at chance.
        """
        last = self._fresh(records, starts_pass)
        if last is not None or starts_pass:
            return last
        for record in reversed(records):
            if record["num_ranked"] or (record["failure"] and self.strategy.adapts):
                return int(record["index"])
            if record["starts_pass"]:
                break
        return None

    def _complete(self, records: Records, starts_pass: bool) -> int | None:
        """The newest ranking that knows all texts that may be chosen now: of this pass over the pool, or of the whole pool."""
        is_of_pass = not starts_pass
        for record in reversed(records):
            if record["refreshed"] and (is_of_pass or record["num_ranked"] == len(self.pool.free)):
                return int(record["index"])
            is_of_pass = is_of_pass and not record["starts_pass"]
        return None

    def _is_due(
        self,
        context: RankingContext,
        record: dict[str, Any],
        records: Records,
        *,
        coming_flops: float,
        processes: Processes,
    ) -> bool:
        """Decide whether the pool is ranked anew; the record gets the reason, the drift and what looking at it cost."""
        last, tried = self._fresh(records, record["starts_pass"]), self._last_try(records, record["starts_pass"])
        record["reason"] = self.schedule.why_not(int(record["index"]), ranked_in=tried, strategy=self.strategy)
        if record["reason"]:
            return False
        decision = processes.on_first(lambda: self._afford(context, record, coming_flops=coming_flops))
        record["overhead_decision"], record["reason"] = decision.as_dict(), decision.reason
        if not decision.is_allowed:
            record["left_out"] = True
            return False
        fewer = "" if decision.sample_factor >= 1 else f", with {decision.sample_factor:.0%} of its labels"
        if last is None:
            record["reason"] = ("first ranking" if ranked_in(records) is None else "a new pass over the pool begins") + fewer
            return True
        if self.schedule.drift_threshold is None:
            record["reason"] = f"refresh on schedule{fewer}"
            return True
        folder = self.store.ranking_folder(last)
        probed = self.overhead.expected(0, num_fixed=self.strategy.num_probe)
        look = partial(self.strategy.agreement_now, context, folder)
        flops = 0.0 if probed is None else probed.total().flops
        found = self._attempt(look, context, record, flops=flops, processes=processes)
        if found is None:
            record["reason"] = "the look at the drift failed"
            return False
        has_drifted, record["reason"] = self.schedule.has_drifted(found)
        record["drift"], record["costs"] = drift_of(found), dict(found["costs"])
        return has_drifted

    def _afford(self, context: RankingContext, record: dict[str, Any], *, coming_flops: float) -> Decision:
        """Ask the account, once: seconds may have decided, and a refresh that is taken up again has to go on as it began."""
        index = int(record["index"])
        self.store.begin_ranking(index, record["identity"])
        path = self.store.ranking_folder(index) / "decision.json"
        if not path.exists():
            has_sample = hasattr(self.strategy, "sample_size")  # without one, all candidates get whatever labels there are
            num_labels = min(int(self.strategy.sample_size), len(context.candidates)) if has_sample else 0
            num_fixed = int(getattr(self.strategy, "num_probe", 0)) if has_sample else len(context.candidates)
            expected = self.overhead.expected(num_labels, num_fixed=num_fixed)
            if expected is None:
                expected = expected_first(
                    self.strategy,
                    context.candidate_texts(),
                    self.targets,
                    lm=context.lm,
                    num_processes=context.num_processes,
                )
            decision = self.schedule.afford(
                index,
                self.overhead,
                expected,
                sample_size=num_labels,
                adapts=bool(self.strategy.adapts),
                coming_flops=coming_flops,
            )
            write_json(path, decision.as_dict())
        return Decision(**read_json(path))

    def _rank(self, context: RankingContext, record: dict[str, Any], *, processes: Processes) -> Ranking | None:
        """Ask the strategy, and note what it cost; None where it failed."""
        factor = float(record["overhead_decision"]["sample_factor"])
        ranking: Ranking | None = self._attempt(
            lambda: self.strategy.rank(replace(context, sample_factor=factor)),
            context,
            record,
            flops=float(record["overhead_decision"]["flops"]),
            processes=processes,
        )
        if ranking is None:
            return None
        costs = dict(ranking.costs)
        if record["drift"]:  # the probe's labels are among those of the refresh; the target gradients were made twice
            costs["drift targets"] = record["costs"]["drift targets"]
        record["refreshed"], record["costs"], record["facts"] = True, costs, dict(ranking.facts)
        record["num_labels"], record["num_ranked"] = int(ranking.facts.get("num_labelled", 0)), len(context.candidates)
        return ranking

    def _attempt(
        self, action: Callable[[], T], context: RankingContext, record: dict[str, Any], *, flops: float, processes: Processes
    ) -> T | None:
        """Return what `action` returns, or None where it failed in a way that training can live with, on all processes alike.

        The record gets the failure. How far it came is not known, so it is charged the `flops` it was expected to take. A refusal
        (`InputError`) stops the first ranking, which would fail again and again, and is lived with later.
        """
        start_seconds = time.perf_counter()
        result, failure = None, ""
        recoverable = (*RECOVERABLE, InputError) if context.earlier else RECOVERABLE
        try:
            with stepping(context.lm):
                result = action()
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"
            can_go_on = isinstance(error, (*recoverable, OtherProcessError)) or is_out_of_memory(error)
            if self.stops_on_failure or not can_go_on:
                processes.gather((False, failure))
                raise
        found = processes.gather((True, failure))
        stopped = [told for can_go_on, told in found if not can_go_on]
        if stopped:
            raise OtherProcessError(
                f"another process failed, so all stop: {stopped[0]}",
                "all processes finishing their part",
                "mend what that process says and run all of them again; what is finished is kept.",
            )
        failures = [told for _, told in found if told]
        if not failures:
            return result
        own = [told for told in failures if not told.startswith(OtherProcessError.__name__)]
        record["failure"] = (own or failures)[0]
        seconds = (time.perf_counter() - start_seconds) * processes.world_size
        record["costs"]["failed refresh"] = {"seconds": seconds, "flops": flops}
        return None

    def _choose(
        self,
        ranking: Ranking | None,
        candidates: Candidates,
        record: dict[str, Any],
        records: Records,
        *,
        size: Mapping[str, int],
        token_counts: np.ndarray | None,
    ) -> tuple[HeldRanking, Selection]:
        """Select by the new ranking; where its scores are NaN or at chance, by the one before, or at random."""
        index = int(record["index"])
        if ranking is not None:
            new = HeldRanking(index, ranking.scores, ranking.labels, ranking.fidelity)
            try:
                return new, self.choice.select(new, candidates, index=index, size=size, token_counts=token_counts)
            except (LowFidelityError, NotFiniteError) as error:
                if self.stops_on_failure:
                    raise
                record["failure"], record["refreshed"] = f"{type(error).__name__}: {error}", False
        held = self._present(candidates.rows, self._complete(records, record["starts_pass"]), index=index)
        return held, self.choice.select(held, candidates, index=index, size=size, token_counts=token_counts)

    def _present(self, candidates: np.ndarray, ranked: int | None, *, index: int) -> HeldRanking:
        """The ranking made in round `ranked`; for round `index` an order at random where there is none."""
        if ranked is None:
            return self.choice.at_random(candidates, index=index)
        if self.held is None or self.held.round != ranked:
            self.held = self.store.load_ranking(ranked)
        return self.held

    def _count(self, record: dict[str, Any], *, seconds: float) -> None:
        """Bring what the round cost into the account, and the account into the record.

        What is left of the `seconds` of all processes, beside the stages that were timed, went into looking at the state of
        the model, choosing and writing.
        """
        rest = max(seconds - sum(cost["seconds"] for cost in record["costs"].values()), 0.0)
        record["costs"]["rest"] = {"seconds": rest, "flops": 0.0}
        if record["num_ranked"]:
            is_live = bool(record["facts"].get("live_features"))
            once = ("rest",) if is_live else ("rest", "features")
            self.overhead.record(record["costs"], num_labels=record["num_labels"], once=once)
        else:
            self.overhead.spend(record["costs"])
        record["account"], record["overhead"] = self.overhead.state_dict(), self.overhead.share(of="trained")
        record["overhead_planned"] = self.overhead.share(of="planned")


def ranked_in(records: Records) -> int | None:
    """Return the round in which the present ranking was made; None where there is none."""
    return next((int(record["index"]) for record in reversed(records) if record["refreshed"]), None)


@contextmanager
def stepping(lm: LanguageModel | None) -> Iterator[None]:
    """A block in which an optimiser whose schedule starts at a learning rate of 0 has the rate that the schedule goes up to.

    At rate 0 a real step measures nothing. Schedulers keep the rate that they were given as `initial_lr`.
    """
    groups = [] if lm is None or lm.optimizer is None else lm.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    if any(float(rate) for rate in rates):
        yield
        return
    for group in groups:
        group["lr"] = group.get("initial_lr", group["lr"])
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
