"""Train the checkpoint on chosen texts and look at the target losses: what labels are judged by.

Every retrained model begins at the same weights and optimiser state, which are put back from memory. Its texts come in
an order of salted hashes of their ids, so two subsets see the texts that they share in the same order, which takes part
of the noise of the order out of their difference, and rows and positions decide nothing. Each retrained model is a
small file; killed and run again, a call trains only those that are missing.

The loop is plain on purpose: whole texts in batches, nothing packed, no autocast, the optimiser's own constant learning
rate. A text weighs in its batch as labels see it: by the mean over its tokens or, with `text_loss="sum"`, by the number
of them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from oracle.artifacts import fingerprint, read_json, require_same, write_json
from oracle.checkpoint_identity import checkpoint_identity, reading_identity
from oracle.encoding import IGNORED, EncodedText
from oracle.errors import InputError, MismatchError, NotFiniteError, check_at_least, check_choice, check_count
from oracle.label_store import IDENTITY_FILE
from oracle.language_model import REDUCTIONS, LanguageModel
from oracle.optimizers import require_optimizer
from oracle.progress import track
from oracle.target_columns import TargetColumns, prepare_targets
from oracle.targets import read_targets
from oracle.texts import read_texts

if TYPE_CHECKING:
    from oracle.targets import Targets


@dataclass(frozen=True, kw_only=True)
class RetrainingPlan:
    """How a retrained model is trained.

    Attributes:
        batch_size: Texts per optimiser step. A pass is cut into batches that differ by one text at most, so that no
            text weighs more because its batch is a short rest.
        num_steps: Optimiser steps, in as many passes as they take, each in a new order; None is one pass.
        max_grad_norm: Clip gradients at this global norm; None does not clip.
        text_loss: A batch's loss as the 'mean' of its texts' mean losses, or as the 'sum' over all target tokens by
            their number, in which a long text weighs more. Labels have an option of the same name.
    """

    batch_size: int = 8
    num_steps: int | None = None
    max_grad_norm: float | None = 1.0
    text_loss: str = "mean"

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        check_choice("text_loss", self.text_loss, REDUCTIONS)
        if self.num_steps is not None:
            check_count("num_steps", self.num_steps)
        if self.max_grad_norm is not None:
            check_at_least("max_grad_norm", self.max_grad_norm, 1e-30)


@dataclass(frozen=True)
class Subset:
    """Texts to train on; the order in which they are named does not matter.

    Attributes:
        text_ids: Their ids, sorted.
        seed: Decides the order in which they are trained on, and dropout where the model has any.
    """

    text_ids: tuple[str, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "text_ids", tuple(sorted(self.text_ids)))

    @cached_property
    def name(self) -> str:
        """Name of its file: a hash of the ids and the seed."""
        return fingerprint([list(self.text_ids), self.seed])


@dataclass(frozen=True)
class Retrained:
    """What training on a subset did.

    Attributes:
        before: (C,) loss of each target set at the checkpoint, in nats per target token.
        after: (C,) the same after training.
        half_effects: (2, C) loss before minus after on either half of each target set; NaN without halves.
        num_steps: Optimiser steps taken.
        num_tokens: Tokens trained on.
    """

    before: np.ndarray
    after: np.ndarray
    half_effects: np.ndarray
    num_steps: int
    num_tokens: int

    @property
    def effects(self) -> np.ndarray:
        """(C,) loss before minus after: positive where training helped."""
        return np.asarray(self.before - self.after)


def retrain(
    lm: LanguageModel,
    texts: Any,
    targets: Targets,
    *,
    plan: RetrainingPlan | None = None,
    seed: int = 0,
    workdir: str | Path | None = None,
) -> Retrained:
    """Train the checkpoint on texts, measure the target losses before and after, and put everything back.

    Args:
        lm: The model with its optimiser, whose state and learning rate the training begins with.
        texts: The texts to train on: anything `read_texts` takes.
        targets: Name -> target set, as for `oracle.label`.
        plan: Batches, steps, clipping.
        seed: Decides the order of the texts and the halves of the target sets.
        workdir: Folder for the result; what is found there is not trained again.

    Raises:
        InputError: There is no optimiser, or its learning rate is 0, or no text has a target token.
        MismatchError: `workdir` has results of another checkpoint, other targets or another plan.
        NotFiniteError: The loss became NaN or infinite.
    """
    dataset = read_texts(texts)
    columns = prepare_targets(lm, read_targets(targets), seed=seed)
    retraining = Retraining(lm, dataset, columns, plan=plan or RetrainingPlan(), workdir=workdir)
    return retraining.run([Subset(tuple(dataset["text_id"]), seed)])[0]


@dataclass
class Retraining:
    """Retrained models of one checkpoint, kept in a folder.

    Args:
        lm: The model with its optimiser.
        texts: Texts that subsets may be taken from, as `read_texts` returns them.
        columns: The target sets.
        plan: Batches, steps, clipping.
        workdir: Folder for results, one file per retrained model; None keeps them in memory.

    Raises:
        InputError: There is no optimiser, or its learning rate is 0.
        MismatchError: `workdir` has results of another checkpoint, other targets or another plan.
    """

    lm: LanguageModel
    texts: Any
    columns: TargetColumns
    plan: RetrainingPlan = field(default_factory=RetrainingPlan, kw_only=True)
    workdir: str | Path | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        require_optimizer(self.lm, needed_by="retraining")
        self.num_trained_now = 0
        self._encoded = {text.text_id: text for text in self.lm.encode(self.texts)}
        self._stored: dict[str, dict[str, Any]] = {}
        self._seconds: dict[str, float] = {}
        self._folder = None if self.workdir is None else Path(self.workdir)
        if self._folder is not None:
            path, has_models = self._folder / IDENTITY_FILE, any((self._folder / "models").glob("*.json"))
            if has_models and path.exists():
                require_same(read_json(path), self._identity(), where=self._folder)
            else:  # without a model it may still be given another identity
                write_json(path, self._identity())

    def run(self, subsets: Sequence[Subset], *, title: str = "retrain") -> list[Retrained]:
        """Return what training on each subset does; the same subset twice is trained once.

        Raises:
            MismatchError: A subset has a text that is none of the texts given.
            NotFiniteError: The loss became NaN or infinite; finished models are kept.
        """
        for subset in subsets:
            self._check(subset)
        distinct = list({subset.name: subset for subset in subsets}.values())
        missing = [subset for subset in distinct if not self._is_stored(subset.name)]
        with track(title, len(distinct), unit="models") as tracker:
            tracker.advance(len(distinct) - len(missing))
            if missing:
                outside = torch.autocast(self.lm.device.type, enabled=False)  # it would go on with weights from before a step
                with outside, torch.enable_grad(), self.lm.preserved() as snapshot:
                    before = self.columns.losses(self.lm)  # (K,)
                    _check_finite(before, "the loss on the target sets before training")
                    for subset in missing:
                        self._train_one(subset, before)
                        self.lm.restore_weights(snapshot)
                        tracker.advance()
        return [self._result(subset.name) for subset in subsets]

    def cost(self) -> dict[str, float]:
        """Counted FLOPs and measured seconds of all models that were asked for, whichever process trained them."""
        per_token = self.lm.forward_flops_per_token
        num_tokens = sum(stored["num_tokens"] for stored in self._stored.values())
        return {
            "num_models": len(self._stored),
            "num_trained_now": self.num_trained_now,
            "num_tokens": num_tokens,
            "flops": per_token * (3 * num_tokens + len(self._stored) * self.columns.num_tokens),
            "seconds": round(sum(self._seconds.values()), 3),
        }

    def _train_one(self, subset: Subset, before: np.ndarray) -> None:
        """Train, measure and store; the seconds go into a file of their own, so that the result's bytes stay the same."""
        start_seconds = time.perf_counter()
        encoded = [self._encoded[text_id] for text_id in subset.text_ids]
        torch.manual_seed(int(subset.name, 16) % 2**63)  # dropout; `preserved` puts the random state back
        num_steps, num_tokens = _train(self.lm, encoded, plan=self.plan, seed=subset.seed)
        self.lm.module.eval()
        after = self.columns.losses(self.lm)  # (K,)
        _check_finite(after, "the loss on the target sets after training")
        self._stored[subset.name] = {
            "num_texts": len(encoded),
            "seed": subset.seed,
            "num_steps": num_steps,
            "num_tokens": num_tokens,
            "before": before.tolist(),
            "after": after.tolist(),
        }
        self._seconds[subset.name] = time.perf_counter() - start_seconds
        self.num_trained_now += 1
        if self._folder is not None:
            write_json(self._folder / "seconds" / f"{subset.name}.json", {"seconds": self._seconds[subset.name]})
            write_json(self._folder / "models" / f"{subset.name}.json", self._stored[subset.name])

    def _is_stored(self, name: str) -> bool:
        if name not in self._stored and self._folder is not None and (self._folder / "models" / f"{name}.json").exists():
            self._stored[name] = read_json(self._folder / "models" / f"{name}.json")
            self._seconds[name] = read_json(self._folder / "seconds" / f"{name}.json")["seconds"]
        return name in self._stored

    def _result(self, name: str) -> Retrained:
        stored = self._stored[name]
        before, after = np.array(stored["before"]), np.array(stored["after"])  # (K,)
        return Retrained(
            self.columns.combine(before),
            self.columns.combine(after),
            self.columns.halves(before - after),
            stored["num_steps"],
            stored["num_tokens"],
        )

    def _check(self, subset: Subset) -> None:
        unknown = [text_id for text_id in subset.text_ids if text_id not in self._encoded]
        if unknown:
            raise MismatchError(
                f"{len(unknown)} of the {len(subset.text_ids)} texts to train on are unknown, first {unknown[:3]}.",
                "ids of the texts given",
                "take the subset from the same texts.",
            )
        if not any(self._encoded[text_id].num_targets for text_id in subset.text_ids):
            raise InputError(
                f"none of the {len(subset.text_ids)} texts to train on has a target token.",
                "at least one text of two tokens",
                "give more texts or raise max_tokens.",
            )

    def _identity(self) -> dict[str, Any]:
        """What must be the same for stored models to be gone on with; the texts' ids name their files."""
        return {
            "plan": asdict(self.plan),
            **checkpoint_identity(self.lm, autocast=False),
            **reading_identity(self.lm),
            "targets": self.columns.names,
            "target_ids": fingerprint([_target_ids(self.columns), self.columns.parts]),
        }


def _target_ids(columns: TargetColumns) -> list[list[tuple[list[int], list[int]]]]:
    """Return ids and labels of every part's texts, K lists, however they are batched, padded or packed."""
    found: list[list[tuple[list[int], list[int]]]] = [[] for _ in columns.parts]
    for batch, part in zip(columns.batches, columns.batch_parts, strict=True):
        for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
            length = 1 + max(place for place, label in enumerate(labels) if label != IGNORED)  # no loss depends on what follows
            found[part].append((ids[:length], labels[:length]))
    return [sorted(texts) for texts in found]


def hash_order(text_ids: Sequence[str], salt: str) -> list[str]:
    """Return ids in the order of their salted hashes: a random order that depends on content and salt alone."""
    return sorted(text_ids, key=lambda text_id: hashlib.sha256(f"{salt}:{text_id}".encode()).digest())


def _check_finite(losses: np.ndarray | float, what: str) -> None:
    if not np.isfinite(losses).all():
        raise NotFiniteError(
            f"{what} is NaN or infinite.",
            "finite losses",
            "lower the learning rate, check the checkpoint or load it in float32; the models finished before are kept.",
        )


def _train(lm: LanguageModel, encoded: Sequence[EncodedText], *, plan: RetrainingPlan, seed: int) -> tuple[int, int]:
    """Train in place; return how many steps were taken, and on how many tokens."""
    assert lm.optimizer is not None
    parameters = [p for p in lm.module.parameters() if p.requires_grad]
    num_steps = num_tokens = 0
    lm.module.train()
    for texts in _batches(encoded, plan, seed=seed):
        for parameter in parameters:
            parameter.grad = None
        weight = len(texts) if plan.text_loss == "mean" else max(sum(text.num_targets for text in texts), 1)
        total = 0.0
        for batch in lm.batches(texts, packing=False):  # one, or several where the memory asks for it
            loss = lm.text_losses(batch, reduction=plan.text_loss).sum() / weight
            loss.backward()
            total += float(loss.detach())
        _check_finite(total, f"the training loss at step {num_steps}")
        if plan.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm)
        lm.optimizer.step()
        num_steps += 1
        num_tokens += sum(len(text.input_ids) for text in texts)
    for parameter in parameters:
        parameter.grad = None
    return num_steps, num_tokens


def _batches(encoded: Sequence[EncodedText], plan: RetrainingPlan, *, seed: int) -> Iterator[list[EncodedText]]:
    """Yield the texts of each step, pass after pass."""
    by_id = {text.text_id: text for text in encoded}
    per_pass = -(-len(encoded) // plan.batch_size)
    num_steps = per_pass if plan.num_steps is None else plan.num_steps
    for step in range(num_steps):
        if step % per_pass == 0:
            order = hash_order(list(by_id), f"order:{seed}:{step // per_pass}")
            parts = np.array_split(np.arange(len(order)), per_pass)
        yield [by_id[order[index]] for index in parts[step % per_pass]]
