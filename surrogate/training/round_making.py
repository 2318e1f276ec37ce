"""Make one round: decide whether to rank the pool anew, ask the strategy, choose, count, and write it all down."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from oracle.artifacts import fingerprint, read_json, write_json
from oracle.errors import LowFidelityError, NotFiniteError, TooLittleMemoryError
from oracle.processes import OtherProcessError, Processes
from oracle.targets import TargetSet
from surrogate.feature_cache import FeatureCache
from surrogate.planning.first_cost import expected_first
from surrogate.planning.overhead import Decision, Overhead
from surrogate.selection import Selection
from surrogate.training.choice import Choice, describe
from surrogate.training.pool_state import PoolState
from surrogate.training.round_store import HeldRanking, RoundStore
from surrogate.training.schedule import Schedule, drift_of
from surrogate.training.strategies import Ranking, RankingContext

if TYPE_CHECKING:
    from oracle.language_model import LanguageModel

Records: TypeAlias = list[dict[str, Any]]  # of the rounds so far

RECOVERABLE = (NotFiniteError, LowFidelityError, TooLittleMemoryError, torch.OutOfMemoryError, MemoryError)


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
    ) -> dict[str, Any]:
        """Make the round after `records` and return its record; all processes call it, the first one writes."""
        start_seconds = time.perf_counter()
        candidates, starts_pass = self.pool.candidates(size, lm)
        record: dict[str, Any] = {"index": identity["index"], "step": step, "identity": identity, "starts_pass": starts_pass}
        record |= {"reason": "", "refreshed": False, "drift": None, "failure": None, "costs": {}, "num_labels": 0, "facts": {}}
        context = self._context(lm, candidates, records, size=size)
        ranking = None
        if self._is_due(context, record, records, coming_flops=coming_flops, processes=processes):
            ranking = self._rank(context, record, processes=processes)

        def finish() -> dict[str, Any]:
            counts = self.pool.token_counts(lm) if "num_tokens" in size else None
            held, selection = self._choose(ranking, candidates, record, records, size=size, token_counts=counts)
            if ranking is not None:
                self.store.save_ranking(record["index"], ranking)
            record.update(describe(held, selection, num_candidates=len(candidates)))
            self._count(record)
            record["seconds"] = round(time.perf_counter() - start_seconds, 3)
            record["chain"] = fingerprint([identity, selection.text_ids])
            self.store.write(record, selection, records)
            return record

        return processes.on_first(finish)

    def _context(
        self, lm: LanguageModel | None, candidates: np.ndarray, records: Records, *, size: Mapping[str, int]
    ) -> RankingContext:
        refreshed = [record["index"] for record in records if record["refreshed"]]
        return RankingContext(
            pool=self.pool.texts,
            candidates=candidates,
            targets=self.targets,
            lm=lm,
            cache=self.cache,
            folder=self.store.ranking_folder(len(records)),
            earlier=[self.store.ranking_folder(index) for index in refreshed],
            refresh=len(refreshed),
            num_texts=size.get("num_texts", len(candidates)),
            seed=self.seed,
        )

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
        index = int(record["index"])
        last = None if record["starts_pass"] else ranked_in(records)
        record["reason"] = self.schedule.why_not(index, ranked_in=last, strategy=self.strategy)
        if record["reason"]:
            return False
        decision = processes.on_first(lambda: self._afford(context, record, coming_flops=coming_flops))
        record["overhead_decision"], record["reason"] = decision.as_dict(), decision.reason
        if not decision.is_allowed:
            return False
        if last is None:
            record["reason"] = "a new pass over the pool begins" if record["starts_pass"] else "first ranking"
        elif self.schedule.drift_threshold is None:
            record["reason"] = "refresh on schedule"
        else:
            with stepping(context.lm):
                found = self.strategy.agreement_now(context, self.store.ranking_folder(last))
            has_drifted, record["reason"] = self.schedule.has_drifted(found)
            record["drift"] = drift_of(found)
            record["costs"] = {"drift": {"seconds": found["seconds"], "flops": found["flops"]}}
            return has_drifted
        return True

    def _afford(self, context: RankingContext, record: dict[str, Any], *, coming_flops: float) -> Decision:
        """Ask the account, once: seconds may have decided, and a refresh that is taken up again has to go on as it began."""
        index = int(record["index"])
        self.store.begin_ranking(index, record["identity"])
        path = self.store.ranking_folder(index) / "decision.json"
        if not path.exists():
            labels = {
                "num_labels": int(getattr(self.strategy, "sample_size", 0)),
                "num_probe": int(getattr(self.strategy, "num_probe", 0)),
            }
            expected = self.overhead.expected(**labels)
            if expected is None:
                expected = expected_first(self.strategy, context.candidate_texts(), self.targets, lm=context.lm)
            decision = self.schedule.afford(
                index,
                self.overhead,
                expected,
                sample_size=labels["num_labels"],
                adapts=bool(self.strategy.adapts),
                coming_flops=coming_flops,
            )
            write_json(path, decision.as_dict())
        return Decision(**read_json(path))

    def _rank(self, context: RankingContext, record: dict[str, Any], *, processes: Processes) -> Ranking | None:
        """Ask the strategy; a failure that training can live with goes into the record, on all processes alike."""
        start_seconds = time.perf_counter()
        ranking, failure = None, ""
        try:
            with stepping(context.lm):
                ranking = self.strategy.rank(replace(context, sample_factor=float(record["overhead_decision"]["sample_factor"])))
        except (*RECOVERABLE, OtherProcessError) as error:
            failure = f"{type(error).__name__}: {error}"
            if self.stops_on_failure:
                processes.gather((False, failure))
                raise
        except BaseException as error:
            processes.gather((False, f"{type(error).__name__}: {error}"))
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
        if failures:
            own = [told for told in failures if not told.startswith(OtherProcessError.__name__)]
            record["failure"] = (own or failures)[0]
            record["costs"] = {"failed refresh": {"seconds": time.perf_counter() - start_seconds, "flops": 0.0}}
            return None
        assert ranking is not None
        record["refreshed"] = True
        record["costs"] = dict(ranking.costs)  # the probe's labels, if drift was looked at, are among those of the refresh
        record["facts"], record["num_labels"] = dict(ranking.facts), int(ranking.facts.get("num_labelled", 0))
        return ranking

    def _choose(
        self,
        ranking: Ranking | None,
        candidates: np.ndarray,
        record: dict[str, Any],
        records: Records,
        *,
        size: Mapping[str, int],
        token_counts: np.ndarray | None,
    ) -> tuple[HeldRanking, Selection]:
        """Select by the new ranking; where its fidelity is at chance, by the one before, or at random."""
        if ranking is not None:
            new = HeldRanking(record["index"], ranking.scores, ranking.labels, ranking.fidelity)
            try:
                return new, self.choice.select(new, candidates, size=size, token_counts=token_counts)
            except LowFidelityError as error:
                if self.stops_on_failure:
                    raise
                record["failure"], record["refreshed"] = f"{type(error).__name__}: {error}", False
        held = self._present(candidates, records)
        return held, self.choice.select(held, candidates, size=size, token_counts=token_counts)

    def _present(self, candidates: np.ndarray, records: Records) -> HeldRanking:
        """The ranking in use, if it knows any of the candidates; else an order at random."""
        last = ranked_in(records)
        if last is None:
            return self.choice.at_random(candidates)
        if self.held is None or self.held.round != last:
            self.held = self.store.load_ranking(last)
        known = set(self.held.scores.text_ids)
        return self.held if any(self.pool.text_ids[row] in known for row in candidates) else self.choice.at_random(candidates)

    def _count(self, record: dict[str, Any]) -> None:
        """Bring what the round cost into the account, and the account into the record."""
        if "label" in record["costs"] or record["refreshed"]:
            is_live = bool(record["facts"].get("live_features"))
            self.overhead.record(record["costs"], num_labels=record["num_labels"], once=() if is_live else ("features",))
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
