"""A plain PyTorch training loop over packed texts: exact token counts, exact resume.

The texts are put in an order that follows from their ids and the seed, joined with the tokenizer's
end-of-text token (with nothing, where there is none) and cut into rows of equal length; the number of tokens
asked for is rounded up to whole optimiser steps, however long the texts are. The rows of a whole run are a
function of texts, seed and token count, so a run resumed from its checkpoint sees exactly the rows that it
would have seen. A run is resumed only as itself: plan, texts, optimiser and the model it began with are kept
beside the checkpoint and compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from oracle.artifacts import read_json, require_same, write_json
from oracle.encoding import IGNORED, EncodedText
from oracle.errors import InputError, NotFiniteError, check_at_least
from oracle.language_model import LanguageModel
from oracle.progress import track

Evaluate = Callable[[LanguageModel], dict[str, float]]


@dataclass(kw_only=True)
class TrainingPlan:
    """How long and how to train.

    Attributes:
        num_tokens: Tokens to train on, in all; rounded up to whole optimiser steps.
        row_tokens: Length of one packed row.
        rows_per_step: Rows per optimiser step.
        warmup_steps: Steps over which the learning rate rises from 0 to the optimiser's own.
        max_grad_norm: Clip gradients at this global norm.
        evaluate_every: Steps between evaluations; the first is before any step, the last after the last.
        checkpoint_every: Steps between checkpoints, where a folder for them is given. It changes no result, so a
            run may be continued with another value.
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
    """What a run measured.

    Attributes:
        steps: Optimiser steps before each evaluation.
        tokens: Training tokens before each evaluation.
        losses: Each evaluation's losses by name, in nats per target token.
        seconds: Wall-clock seconds of training, evaluations and checkpoints, over all processes that the run
            took; work that a kill undid, and that was therefore done again, is counted once.
        evaluation_seconds: The evaluations' part of them.
    """

    steps: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    evaluation_seconds: float = 0.0

    def column(self, name: str) -> list[float]:
        """One evaluated loss over the run."""
        return [losses[name] for losses in self.losses]

    def smoothed(self, name: str, *, window: int = 1) -> list[float]:
        """One evaluated loss as its mean over the last `window` evaluations (fewer at the start)."""
        values = self.column(name)
        return [float(np.mean(values[max(index + 1 - window, 0) : index + 1])) for index in range(len(values))]

    def tokens_to_reach(self, name: str, loss: float, *, window: int = 1) -> float | None:
        """Training tokens at which a smoothed loss was first reached, interpolated between evaluations; None if never."""
        values = self.smoothed(name, window=window)
        for index, value in enumerate(values):
            if value <= loss:
                if index == 0:
                    return float(self.tokens[0])
                share = (values[index - 1] - loss) / (values[index - 1] - value)
                return self.tokens[index - 1] + share * (self.tokens[index] - self.tokens[index - 1])
        return None


def pack(encoded: Sequence[EncodedText], *, num_rows: int, row_tokens: int, separator: int | None, seed: int) -> np.ndarray:
    """Join texts in seeded order, as often as needed, and cut the stream into rows.

    Args:
        encoded: The texts.
        num_rows: Rows to fill.
        row_tokens: Length of one row.
        separator: Token after each text. It is predicted, and from it the first token of the next text. With None
            nothing stands between two texts, and the first token of a text is not predicted.
        seed: Decides the order.

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
            text = ordered[index]
            if separator is None:
                ids += text.input_ids
                labels += [IGNORED, *text.labels[1:]] if text.labels else []
            else:
                ids += [*text.input_ids, separator]
                labels += [*text.labels, separator]
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
    stop: Callable[[TrainingCurve], bool] | None = None,
    title: str = "train",
) -> TrainingCurve:
    """Train `lm` (which must have its optimiser) on texts, in place.

    Args:
        lm: The model and its optimiser, with whatever state they have. To continue a run, give them as they were
            before its first step.
        texts: Anything `LanguageModel.encode` takes.
        plan: Tokens, batch, schedule.
        evaluate: Called every `plan.evaluate_every` steps; returns named losses.
        folder: Where to keep checkpoints and the curve; a run found there is continued.
        stop: Called with the curve after each evaluation; training ends early when it returns True.
        title: What the progress display says.

    Raises:
        InputError: There is no optimiser or nothing to train on.
        MismatchError: The run in `folder` began with another plan, other texts, another model or optimiser.
        NotFiniteError: The loss became NaN or infinite; the last checkpoint is kept.
    """
    start_seconds = time.perf_counter()
    run = _begin(lm, texts, plan, folder=folder)
    curve, seconds_before = run.curve, run.curve.seconds
    with track(title, plan.num_steps, unit="steps") as tracker:
        tracker.advance(run.first_step)
        for step in range(run.first_step, plan.num_steps + 1):
            is_last = step == plan.num_steps
            is_due = is_last or step % plan.evaluate_every == 0
            if evaluate is not None and is_due and (not curve.steps or curve.steps[-1] < step):
                _record(curve, lm, evaluate, step=step, plan=plan)
                if stop is not None and stop(curve):
                    break
            if is_last:
                break
            if folder is not None and step > run.first_step and step % plan.checkpoint_every == 0:
                _save(lm, folder, run, step=step, spent=lambda: seconds_before + time.perf_counter() - start_seconds)
            rows = run.rows[:, step * plan.rows_per_step : (step + 1) * plan.rows_per_step]
            _step(lm, rows, plan, step=step, rates=run.rates)
            tracker.advance()
    curve.seconds = seconds_before + time.perf_counter() - start_seconds
    return curve


@dataclass(kw_only=True)
class _Run:
    """A run as it stands before the first step of this process; `identity` is empty where no folder keeps it."""

    rows: np.ndarray  # (2, rows, L)
    rates: list[float]
    identity: dict[str, Any]
    curve: TrainingCurve
    first_step: int


def _begin(lm: LanguageModel, texts: Any, plan: TrainingPlan, *, folder: Path | None) -> _Run:
    """Pack the rows of the whole run, and continue from the checkpoint in `folder` if there is one."""
    if lm.optimizer is None:
        raise InputError(
            "the model has no optimizer.",
            "a LanguageModel with optimizer=...",
            "pass torch.optim.AdamW(module.parameters(), lr=...).",
        )
    check_at_least("num_tokens", plan.num_tokens, 1)
    encoded = lm.encode(texts)
    separator = getattr(lm.tokenizer, "eos_token_id", None)
    rows = pack(
        encoded,
        num_rows=plan.num_steps * plan.rows_per_step,
        row_tokens=plan.row_tokens,
        separator=separator,
        seed=plan.seed,
    )
    rates = [float(group["lr"]) for group in lm.optimizer.param_groups]
    identity = {} if folder is None else _identity(lm, plan, encoded, separator=separator)
    run = _Run(rows=rows, rates=rates, identity=identity, curve=TrainingCurve(), first_step=0)
    if folder is not None and (folder / "state.json").exists():
        state = read_json(folder / "state.json")
        require_same(state.get("identity", {}), identity, where=folder)
        run.curve, run.first_step, run.rates = _resume(lm, folder, state)
    return run


def _identity(lm: LanguageModel, plan: TrainingPlan, encoded: Sequence[EncodedText], *, separator: int | None) -> dict[str, Any]:
    """Everything that decides the result of a run, before its first step, as JSON values."""
    assert lm.optimizer is not None
    names: dict[Tensor, str] = {parameter: name for name, parameter in lm.module.named_parameters()}
    texts = sorted((text.text_id, text.input_ids, text.labels) for text in encoded)
    groups = [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "params": _digest([names.get(parameter, "") for parameter in group["params"]]),
        }
        for group in lm.optimizer.param_groups
    ]
    identity = {
        **{key: value for key, value in asdict(plan).items() if key != "checkpoint_every"},
        "separator": separator,
        "texts": f"{len(texts)} texts, tokens {_digest(texts)}",
        "model and optimizer state at the start": lm.fingerprint(optimizer=True),
        "trainable parameters": _digest([name for parameter, name in names.items() if parameter.requires_grad]),
        "optimizer": type(lm.optimizer).__name__,
        "optimizer groups": groups,
    }
    plain = json.dumps(identity, default=lambda value: float(value) if isinstance(value, Tensor) else str(value))
    return dict(json.loads(plain))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


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
    start_seconds = time.perf_counter()
    with lm.preserved(weights=False):
        losses = evaluate(lm)
    curve.evaluation_seconds += time.perf_counter() - start_seconds
    curve.steps.append(step)
    curve.tokens.append(step * plan.rows_per_step * plan.row_tokens)
    curve.losses.append(losses)


def _save(lm: LanguageModel, folder: Path, run: _Run, *, step: int, spent: Callable[[], float]) -> None:
    """A checkpoint counts only once state.json names it, so a kill between the two loses nothing."""
    lm.save(folder / f"step-{step}")
    run.curve.seconds = spent()
    write_json(
        folder / "state.json",
        {
            "step": step,
            "identity": run.identity,
            "rates": run.rates,
            "torch_random": torch.get_rng_state().tolist(),
            "curve": asdict(run.curve),
        },
    )
    for other in folder.glob("step-*"):
        if other.name != f"step-{step}":
            shutil.rmtree(other)


def _resume(lm: LanguageModel, folder: Path, state: dict[str, Any]) -> tuple[TrainingCurve, int, list[float]]:
    """Load weights, optimiser and random state of the last checkpoint into `lm`, in place."""
    from oracle.checkpoints import load_checkpoint, load_optimizer, place_state

    path = folder / f"step-{state['step']}"
    module, _ = load_checkpoint(path, dtype=next(lm.module.parameters()).dtype)
    optimizer = load_optimizer(path, module)
    assert optimizer is not None and lm.optimizer is not None
    lm.module.load_state_dict(module.state_dict())
    loaded = dict(module.named_parameters())
    names: dict[Tensor, str] = {parameter: name for name, parameter in lm.module.named_parameters()}
    for group in lm.optimizer.param_groups:
        for parameter in group["params"]:
            slots = optimizer.state.get(loaded[names[parameter]], {}) if parameter in names else {}
            lm.optimizer.state.pop(parameter, None)
            if slots:
                lm.optimizer.state[parameter] = dict(slots)
    place_state(lm.optimizer)
    torch.set_rng_state(torch.tensor(state["torch_random"], dtype=torch.uint8))
    return TrainingCurve(**state["curve"]), int(state["step"]), list(state["rates"])
