"""A plain PyTorch training loop over packed texts: exact token counts, exact resume.

The texts are put in an order that follows from their ids and the seed, joined with the end-of-text token and
cut into rows of equal length; every number of tokens asked for is met to the row, however long the texts are.
The rows of a whole run are a function of texts, seed and token count, so a run resumed from its checkpoint
sees exactly the rows that it would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from oracle.artifacts import read_json, write_json
from oracle.encoding import IGNORED, EncodedText
from oracle.errors import InputError, NotFiniteError, check_at_least
from oracle.language_model import LanguageModel
from oracle.progress import track

Evaluate = Callable[[LanguageModel], dict[str, float]]


@dataclass(kw_only=True)
class TrainingPlan:
    """How long and how to train.

    Attributes:
        num_tokens: Tokens to train on, in all.
        row_tokens: Length of one packed row.
        rows_per_step: Rows per optimiser step.
        warmup_steps: Steps over which the learning rate rises from 0 to the optimiser's own.
        max_grad_norm: Clip gradients at this global norm.
        evaluate_every: Steps between evaluations; the first is before any step, the last after the last.
        checkpoint_every: Steps between checkpoints, where a folder for them is given.
        seed: Decides the order of the texts.
    """

    num_tokens: int
    row_tokens: int = 256
    rows_per_step: int = 16
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    evaluate_every: int = 10
    checkpoint_every: int = 50
    seed: int = 0

    @property
    def num_steps(self) -> int:
        """Optimiser steps, rounded up to whole ones."""
        return max(1, math.ceil(self.num_tokens / (self.row_tokens * self.rows_per_step)))


@dataclass
class TrainingCurve:
    """What a run measured: at `steps`, after `tokens` training tokens, each evaluated loss in nats per target token."""

    steps: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[dict[str, float]] = field(default_factory=list)

    def column(self, name: str) -> list[float]:
        """One evaluated loss over the run."""
        return [losses[name] for losses in self.losses]

    def tokens_to_reach(self, name: str, loss: float) -> float | None:
        """Training tokens at which a loss was first reached, interpolated between evaluations; None if never."""
        values = self.column(name)
        for index, value in enumerate(values):
            if value <= loss:
                if index == 0:
                    return float(self.tokens[0])
                share = (values[index - 1] - loss) / (values[index - 1] - value)
                return self.tokens[index - 1] + share * (self.tokens[index] - self.tokens[index - 1])
        return None


def pack(encoded: Sequence[EncodedText], *, num_rows: int, row_tokens: int, separator: int, seed: int) -> np.ndarray:
    """Join texts in seeded order, as often as needed, and cut the stream into rows.

    Shapes:
        (2, num_rows, row_tokens) int64: token ids, and labels with `IGNORED` where the loss does not count.
    """
    if not any(text.num_targets for text in encoded):
        raise InputError(
            f"none of the {len(encoded)} texts to train on has a target token.",
            "at least one text of two tokens",
            "select more texts or raise max_tokens.",
        )
    ordered = sorted(encoded, key=lambda text: text.text_id)
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    labels: list[int] = []
    needed = num_rows * row_tokens
    while len(ids) < needed:
        for index in rng.permutation(len(ordered)):
            ids += [*ordered[index].input_ids, separator]
            labels += [*ordered[index].labels, separator]
            if len(ids) >= needed:
                break
    return np.stack([np.array(ids[:needed]), np.array(labels[:needed])]).reshape(2, num_rows, row_tokens)


def train(
    lm: LanguageModel,
    texts: Any,
    plan: TrainingPlan,
    *,
    evaluate: Evaluate | None = None,
    folder: Path | None = None,
    stop: Callable[[dict[str, float]], bool] | None = None,
    title: str = "train",
) -> TrainingCurve:
    """Train `lm` (which must have its optimiser) on texts, in place.

    Args:
        lm: The model and its optimiser, with whatever state they have.
        texts: Anything `LanguageModel.encode` takes.
        plan: Tokens, batch, schedule.
        evaluate: Called every `plan.evaluate_every` steps; returns named losses.
        folder: Where to keep checkpoints and the curve; a run found there is continued.
        stop: Called with each evaluation; training ends early when it returns True.
        title: What the progress display says.

    Raises:
        InputError: There is no optimiser or nothing to train on.
        NotFiniteError: The loss became NaN or infinite; the last checkpoint is kept.
    """
    if lm.optimizer is None:
        raise InputError(
            "the model has no optimizer.",
            "a LanguageModel with optimizer=...",
            "pass torch.optim.AdamW(module.parameters(), lr=...).",
        )
    check_at_least("num_tokens", plan.num_tokens, 1)
    separator = getattr(lm.tokenizer, "eos_token_id", None) or 0
    rows = pack(
        lm.encode(texts),
        num_rows=plan.num_steps * plan.rows_per_step,
        row_tokens=plan.row_tokens,
        separator=separator,
        seed=plan.seed,
    )
    curve, first_step = TrainingCurve(), 0
    rates = [float(group["lr"]) for group in lm.optimizer.param_groups]
    if folder is not None and (folder / "state.json").exists():
        curve, first_step, rates = _resume(lm, folder)
    with track(title, plan.num_steps, unit="steps") as tracker:
        tracker.advance(first_step)
        for step in range(first_step, plan.num_steps + 1):
            is_last = step == plan.num_steps
            if (
                evaluate is not None
                and (is_last or step % plan.evaluate_every == 0)
                and (not curve.steps or curve.steps[-1] < step)
            ):
                _record(curve, lm, evaluate, step=step, plan=plan)
                if stop is not None and stop(curve.losses[-1]):
                    break
            if is_last:
                break
            if folder is not None and step > first_step and step % plan.checkpoint_every == 0:
                _save(lm, folder, curve, step=step, rates=rates)
            _step(lm, rows[:, step * plan.rows_per_step : (step + 1) * plan.rows_per_step], plan, step=step, rates=rates)
            tracker.advance()
    return curve


def _step(lm: LanguageModel, rows: np.ndarray, plan: TrainingPlan, *, step: int, rates: list[float]) -> None:
    assert lm.optimizer is not None
    ids, labels = torch.from_numpy(rows).to(lm.device)  # (rows, L) each
    lm.module.train()
    share = min(1.0, (step + 1) / (plan.warmup_steps + 1))
    for group, rate in zip(lm.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * share
    logits = lm.module(input_ids=ids, use_cache=False).logits[:, :-1].float()
    loss = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=IGNORED)
    if not bool(torch.isfinite(loss)):
        raise NotFiniteError(
            f"the training loss is {float(loss.detach())} at step {step}.",
            "a finite loss",
            "lower the learning rate, or train in float32; the last checkpoint is kept.",
        )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(lm.module.parameters(), plan.max_grad_norm)
    lm.optimizer.step()
    lm.optimizer.zero_grad(set_to_none=True)


def _record(curve: TrainingCurve, lm: LanguageModel, evaluate: Evaluate, *, step: int, plan: TrainingPlan) -> None:
    with lm.preserved(weights=False):
        losses = evaluate(lm)
    curve.steps.append(step)
    curve.tokens.append(step * plan.rows_per_step * plan.row_tokens)
    curve.losses.append(losses)


def _save(lm: LanguageModel, folder: Path, curve: TrainingCurve, *, step: int, rates: list[float]) -> None:
    """A checkpoint counts only once state.json names it, so a kill between the two loses nothing."""
    lm.save(folder / f"step-{step}")
    write_json(
        folder / "state.json",
        {
            "step": step,
            "rates": rates,
            "torch_random": torch.get_rng_state().tolist(),
            "curve": {"steps": curve.steps, "tokens": curve.tokens, "losses": curve.losses},
        },
    )
    for other in folder.glob("step-*"):
        if other.name != f"step-{step}":
            _remove(other)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


def _resume(lm: LanguageModel, folder: Path) -> tuple[TrainingCurve, int, list[float]]:
    """Load weights, optimiser and random state of the last checkpoint into `lm`, in place."""
    from oracle.checkpoints import load_checkpoint, load_optimizer

    state = read_json(folder / "state.json")
    path = folder / f"step-{state['step']}"
    module, _ = load_checkpoint(path, dtype=next(lm.module.parameters()).dtype)
    optimizer = load_optimizer(path, module)
    assert optimizer is not None and lm.optimizer is not None
    lm.module.load_state_dict(module.state_dict())
    own, loaded = dict(lm.module.named_parameters()), dict(module.named_parameters())
    for name, parameter in own.items():
        lm.optimizer.state[parameter] = {
            key: value.to(lm.device) if value.shape == parameter.shape else value
            for key, value in optimizer.state[loaded[name]].items()
        }
    torch.set_rng_state(torch.tensor(state["torch_random"], dtype=torch.uint8))
    curve = TrainingCurve(**state["curve"])
    return curve, int(state["step"]), list(state["rates"])
