"""`label`: any oracle method over any sample of texts, resumable, with provenance and cost.

The sample is measured in blocks; a finished block is a file, and the file names and contents follow from the
texts alone. Killed and run again, the call skips what is finished and ends with the same bytes. The model is
left exactly as it was, also when a text raises. Several processes share the blocks (`oracle.processes`), and a device
that runs out of memory gets smaller batches (`oracle.memory`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oracle import plugins
from oracle.artifacts import fingerprint, provenance, timed
from oracle.encoding import EncodedText
from oracle.errors import InputError, NotFiniteError
from oracle.label_store import COUNTED_BLOCKS, LabelStore
from oracle.label_task import LabelTask, check_divisible, identity_of, read_task
from oracle.labels import Labels
from oracle.language_model import LanguageModel
from oracle.memory import batch_size_kept, within_memory
from oracle.methods import Measured, TextTargets
from oracle.optimizers import warn_of_fresh_adam
from oracle.processes import Processes, working_together
from oracle.progress import track
from oracle.target_columns import TargetColumns, prepare_targets
from oracle.targets import split_halves
from oracle.texts import text_format

METHODS = "oracle.methods"
NUM_REHEARSED = 16  # texts of the sample, for methods that choose by them how to measure


class UnlabelableTextWarning(UserWarning):
    """Texts without a target token, or cut at the model's limit."""


@dataclass(frozen=True)
class _Share:
    """What one process measured; the blocks themselves only where no folder holds them."""

    blocks: list[Labels]
    seconds: float
    num_measured: int


def label(
    lm: LanguageModel | None,
    sample: Any,
    targets: Any = None,
    *,
    method: str = "one_step",
    workdir: str | Path | None = None,
    seed: int = 0,
    max_target_texts: int | None = None,
    halves: bool = True,
    block_size: int = 32,
    per: str = "text",
    **options: Any,
) -> Labels:
    """Measure the influence of every text of a sample on every target set.

    Where `torch.distributed` is initialised, every process calls this with its own copy of the model on its own device;
    they share the blocks, and all return the same labels.

    Args:
        lm: The model (and its optimiser) at the checkpoint in question; may be None for a method that needs no model.
        sample: The texts: anything `read_texts` takes.
        targets: Name -> target set (anything `read_texts` takes); a single source is called "target". None for a method
            that needs no targets.
        method: Name of an oracle method; `one_step` is the definition, `grad_dot` its cheap first-order limit.
        workdir: Folder for finished blocks and the result, the same one for all processes; None keeps everything in
            memory, without resuming.
        seed: Decides which target texts are taken and how target sets are halved.
        max_target_texts: Measure on at most this many texts of each target set.
        halves: Also measure on either half of each target set, in the same pass, for the noise ceiling.
        block_size: Texts per finished block.
        per: "text" for the effect of training on the whole text; "token" divides that by the text's input tokens, which
            is what a budget of tokens buys. Refused for values whose 0 is not that of no text at all.
        **options: The method's own options.

    Returns:
        Labels in the order of the sample.

    Raises:
        MismatchError: `workdir` has labels made at another checkpoint, for other targets or with other options.
        NotFiniteError: The loss of a text or target is NaN; finished blocks are kept.
        InputError: An option is unknown, a target set has no target token, a text alone does not fit into memory, the
            module is wrapped, sharded or frozen, and so on.
        OtherProcessError: Another process failed.

    Inside a `torch.autocast`, methods that step the weights switch it off for their measurement, whose small differences
    of losses would drown in its rounding; all others measure in it, and it belongs to the labels' identity.

    Example:
        >>> labels = oracle.label(lm, sample, {"math": "math_dev.jsonl"}, method="grad_dot", workdir="labels")  # doctest: +SKIP
    """
    settings: dict[str, Any] = {"seed": seed, "halves": halves, "per": per, "block_size": block_size}
    with working_together() as processes:
        with processes.all_or_none():
            task = read_task(
                lm, sample, targets, method=plugins.create(METHODS, method, options), max_texts=max_target_texts, **settings
            )
            identity = identity_of(task)
        asked = {"sample": fingerprint(task.text_ids), "block_size": block_size, "has_workdir": workdir is not None}
        processes.require_same({**identity, **asked})
        folder = None if workdir is None else Path(workdir)
        store = processes.first_then_others(lambda: LabelStore(folder, task.column_names, identity))
        if _is_complete(task, store, processes):
            return _recounted(task, store.finished(task.text_ids))
        return _measure(task, identity, store, processes=processes)


def model_identity(lm: LanguageModel) -> dict[str, Any]:
    """Say which model this is (`kind`: class and size) and at which weights."""
    return {"kind": f"{type(lm.module).__name__} of {lm.num_parameters} parameters", "weights": lm.fingerprint()}


def method_names() -> list[str]:
    """List the oracle methods."""
    return plugins.names(METHODS)


def _is_complete(task: LabelTask, store: LabelStore, processes: Processes) -> bool:
    """Whether all of the sample is stored already, which all processes have to see alike: some would wait for ever."""
    found = processes.gather(store.is_complete(task.text_ids))
    if any(found) != all(found):
        raise InputError(
            f"{store.folder} has finished labels of this sample for process {found.index(True)}, and not for process "
            f"{found.index(False)}.",
            "a workdir that all processes share",
            "put workdir on a disk that every process sees under this path, or leave workdir out.",
        )
    return all(found)


def _measure(task: LabelTask, identity: dict[str, Any], store: LabelStore, *, processes: Processes) -> Labels:
    """Measure this process's share; the first process joins all shares to the result, which all return."""
    with processes.all_or_none():
        if task.lm is not None and _steps_as_optimizer(task) and processes.rank == 0:
            warn_of_fresh_adam(task.lm)
        encoded = None if task.lm is None else task.lm.encode(task.texts)
    with _model_preserved(task):
        with processes.all_or_none():
            columns, seconds = _prepare(task)
            check_divisible(task)
        seconds += _rehearse(task, encoded, columns, store, processes=processes)
        with processes.all_or_none():
            num_measured = _measure_blocks(task, encoded, columns, store, processes=processes)
    shares = processes.gather(_Share([] if store.folder else store.blocks, store.seconds, num_measured))
    labels = None
    with processes.all_or_none():
        if processes.rank == 0:
            if processes.world_size > 1:
                _join(task, store, shares)
            cost = {
                "prepare_seconds": round(seconds, 3),
                "prepare_flops": task.method.prepare_flops(columns),
                "num_measured_now": sum(share.num_measured for share in shares),
                **_label_cost(task, columns, store),
            }
            meta = {
                **identity,
                **_counts(task, encoded, num_truncated=columns.num_truncated if isinstance(columns, TargetColumns) else 0),
                **({"model": model_identity(task.lm)} if task.lm is not None and task.needs.model else {}),
                "facts": task.method.facts(),
                "cost": cost,
                "provenance": provenance(),
            }
            units = task.method.units + (" per text token" if task.per == "token" else "")
            labels = store.finish(task.text_ids, units=units, meta=meta)
    result = processes.gather(labels)[0]
    assert result is not None
    return result


def _steps_as_optimizer(task: LabelTask) -> bool:
    """Whether the state of the model's optimiser decides the labels."""
    is_asked_not_to = getattr(task.method, "preconditioner", None) == "none"
    return task.needs.model and task.needs.optimizer and not is_asked_not_to


@contextmanager
def _model_preserved(task: LabelTask) -> Iterator[None]:
    """Put the model back after a block, if the method uses it; steps are taken and measured outside the caller's autocast."""
    if task.lm is None or not task.needs.model:
        yield
        return
    changes_weights = task.method.changes_weights
    outside = torch.autocast(task.lm.device.type, enabled=False) if changes_weights else nullcontext()
    with outside, torch.enable_grad(), task.lm.preserved(weights=changes_weights), batch_size_kept(task.lm):
        yield


def _prepare(task: LabelTask) -> tuple[TargetColumns | TextTargets, float]:
    """Do once what does not depend on the sample; return the target columns and the seconds it took."""
    lm, method = task.lm, task.method
    columns: TargetColumns | TextTargets
    seconds: list[float] = []
    with timed(seconds.append):
        if lm is None or not task.needs.model:
            halved = [
                split_halves(target, seed=task.seed) if task.halves else np.ones(len(target), dtype=bool)
                for target in task.targets
            ]
            columns = TextTargets(task.targets, halved)
            method.prepare(lm, columns)
        else:
            columns = (
                prepare_targets(lm, task.targets, seed=task.seed, halves=task.halves)
                if task.needs.targets
                else TargetColumns(task.column_names, [], np.zeros(0), [], [], 0)
            )
            within_memory(partial(method.prepare, lm, columns), lm, columns, longest=0)
    return columns, seconds[0]


def _rehearse(
    task: LabelTask,
    encoded: list[EncodedText] | None,
    columns: TargetColumns | TextTargets,
    store: LabelStore,
    *,
    processes: Processes,
) -> float:
    """Let a method that chooses how to measure choose by a few texts of all lengths; return the seconds it took."""
    lm, method = task.lm, task.method
    if not hasattr(method, "rehearse") or not encoded or lm is None or isinstance(columns, TextTargets):
        return 0.0
    order = _longest_first(task, _count_tokens(task, encoded))
    places = np.linspace(0, len(order) - 1, min(NUM_REHEARSED, len(order))).round().astype(int)
    few = [encoded[order[place]] for place in places]
    rehearse = partial(method.rehearse, few)
    longest = max(len(text.input_ids) for text in few)
    seconds: list[float] = []
    with timed(seconds.append):
        method.choose(processes.on_first(lambda: store.choice(partial(within_memory, rehearse, lm, columns, longest=longest))))
    return seconds[0]


def _measure_blocks(
    task: LabelTask,
    encoded: list[EncodedText] | None,
    columns: TargetColumns | TextTargets,
    store: LabelStore,
    *,
    processes: Processes,
) -> int:
    """Measure what is not stored yet of this process's blocks of the sample; return how many texts that was.

    Texts of like length share a block, so that little is padded; the longest come first, and with them a lack of memory.
    """
    num_texts, lm = len(task.text_ids), task.lm
    num_tokens, done = _count_tokens(task, encoded), store.done()
    size = num_texts if task.needs.whole_sample else task.block_size
    order = _longest_first(task, num_tokens)
    blocks = [order[start : start + size] for start in range(0, num_texts, size)]
    own = blocks[processes.rank :: processes.world_size]
    num_measured = 0
    with track(f"label ({task.method.plugin_name})", sum(map(len, own))) as tracker:
        for block in own:
            rows = [row for row in block if task.text_ids[row] not in done]
            if rows:
                start_seconds = time.perf_counter()
                if isinstance(columns, TextTargets) or lm is None or encoded is None:
                    measured = task.method.measure(task.texts.select(rows))
                else:
                    texts = [encoded[row] for row in rows]
                    longest = max(len(text.input_ids) for text in texts)
                    measured = within_memory(partial(task.method.measure, texts), lm, columns, longest=longest)
                block_labels = _as_labels(task, measured, rows=rows, num_tokens=num_tokens[rows])
                store.add(block_labels, seconds=time.perf_counter() - start_seconds)
                num_measured += len(rows)
            tracker.advance(len(block))
    return num_measured


def _longest_first(task: LabelTask, num_tokens: np.ndarray) -> list[int]:
    """Return the sample's rows, longest first, in an order that does not depend on theirs."""
    return sorted(range(len(num_tokens)), key=lambda row: (-np.nan_to_num(num_tokens[row]), task.text_ids[row]))


def _count_tokens(task: LabelTask, encoded: list[EncodedText] | None) -> np.ndarray:
    """Return the texts' input tokens (S,), NaN where there is neither a model to count them nor ids to be counted."""
    if encoded is not None:
        return np.array([len(text.input_ids) for text in encoded], dtype=np.float32)
    if text_format(task.texts) == "tokens":
        return np.array([len(ids) for ids in task.texts["input_ids"]], dtype=np.float32)
    return np.full(len(task.text_ids), np.nan, dtype=np.float32)


def _as_labels(task: LabelTask, measured: Measured, *, rows: Sequence[int], num_tokens: np.ndarray) -> Labels:
    """Check what a method says of some rows of the sample and bring it into the form of labels."""
    text_ids = [task.text_ids[row] for row in rows]
    columns: dict[str, np.ndarray] = {"num_tokens": num_tokens}
    for name, column in measured.columns.items():
        if column.ndim == 1:
            columns[name] = column.astype(np.float32)
        else:
            own = {f"{name}.{target}": column[:, index].astype(np.float32) for index, target in enumerate(task.column_names)}
            columns.update(own)
    bad = np.flatnonzero(~np.isfinite(measured.values).all(1))
    if len(bad):
        raise NotFiniteError(
            f"the influence of {len(bad)} texts is NaN or infinite, first {[text_ids[row] for row in bad[:3]]}.",
            "texts with finite losses and gradients",
            "remove these texts from the sample or load the model in float32; the blocks finished before are kept.",
        )
    divisors = np.maximum(num_tokens, 1)[:, None].astype(np.float64) if task.per == "token" else 1.0  # (B, 1)
    values, halves = measured.values / divisors, measured.halves / divisors
    return Labels(values.astype(np.float32), text_ids, task.column_names, "", halves.astype(np.float32), columns)


def _join(task: LabelTask, store: LabelStore, shares: Sequence[_Share]) -> None:
    """Bring the blocks of all processes into the store of the first one."""
    if store.folder is not None:
        store.reload()
    else:
        store.blocks = [block for share in shares for block in share.blocks]
        store.seconds = sum(share.seconds for share in shares)
    store.check_all_there(task.text_ids)


def _recounted(task: LabelTask, stored: Labels) -> Labels:
    """Count for this call's sample what meta.json counts for that of the call which measured it."""
    encoded = None if task.lm is None else task.lm.encode(task.texts)
    counts = _counts(task, encoded, num_truncated=stored.meta["num_target_texts_truncated"])
    return replace(stored, meta={**stored.meta, **counts, "cost": {**stored.meta["cost"], "num_measured_now": 0}})


def _counts(task: LabelTask, encoded: list[EncodedText] | None, *, num_truncated: int) -> dict[str, int]:
    """Count the sample's texts, and warn of those that are not what they look like; `num_truncated` is that of the targets."""
    texts, num_texts = encoded or [], len(task.text_ids)
    counts = {
        "num_texts": num_texts,
        "num_truncated": sum(text.was_truncated for text in texts),
        "num_without_target_token": sum(text.num_targets == 0 for text in texts),
        "num_target_texts_truncated": num_truncated,
    }
    told = [
        f"{counts[key]} of {num_texts} {what}"
        for key, what in (
            ("num_truncated", "texts were cut at max_tokens"),
            ("num_without_target_token", "texts have no target token (training on them changes nothing)"),
        )
        if counts[key]
    ]
    if told:
        warnings.warn("; ".join(told) + ".", UnlabelableTextWarning, stacklevel=4)
    return counts


def _label_cost(task: LabelTask, columns: TargetColumns | TextTargets, store: LabelStore) -> dict[str, Any]:
    """Seconds, FLOPs and tokens of all texts that the folder has labels of, whichever process measured them."""
    num_tokens = store.num_tokens()
    return {
        "label_seconds": round(store.seconds, 3),
        "label_flops": sum(task.method.flops(number, columns) for number in num_tokens),
        "num_tokens": sum(num_tokens),
        "num_labelled": len(num_tokens),
        COUNTED_BLOCKS: store.block_names(),
    }
