"""`label`: any oracle method over any sample of texts, resumable, with provenance and cost.

The sample is measured in blocks; a finished block is a file, and the file names and contents follow from the
texts alone. Killed and run again, the call skips what is finished and ends with the same bytes. The model is
left exactly as it was, also when a text raises.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oracle import plugins
from oracle.artifacts import atomic_path, fingerprint, provenance, read_json, require_same, storing, timed, write_json
from oracle.encoding import EncodedText
from oracle.errors import InputTypeError, NotFiniteError, check_at_least
from oracle.labels import Labels, from_table, to_table
from oracle.language_model import LanguageModel
from oracle.methods import Measured
from oracle.progress import track
from oracle.target_columns import TargetColumns, prepare_targets
from oracle.targets import TargetSet, read_targets
from oracle.texts import read_texts

METHODS = "oracle.methods"
IDENTITY_FILE = "identity.json"
COUNTED_BLOCKS = "counted_blocks"  # in meta.json: the blocks in the folder whose seconds `label_seconds` has already


class UnlabelableTextWarning(UserWarning):
    """Texts without a target token, or cut at the model's limit."""


def label(
    lm: LanguageModel,
    sample: Any,
    targets: Any,
    *,
    method: str = "one_step",
    workdir: str | Path | None = None,
    seed: int = 0,
    max_target_texts: int | None = None,
    halves: bool = True,
    block_size: int = 32,
    **options: Any,
) -> Labels:
    """Measure the influence of every text of a sample on every target set.

    Args:
        lm: The model (and its optimiser) at the checkpoint in question.
        sample: The texts: anything `read_texts` takes.
        targets: Name -> target set (anything `read_texts` takes); a single source is called "target".
        method: Name of an oracle method; `one_step` is the definition, `grad_dot` its cheap first-order limit.
        workdir: Folder for finished blocks and the result; None keeps everything in memory, without resuming.
        seed: Decides which target texts are taken and how target sets are halved.
        max_target_texts: Measure on at most this many texts of each target set.
        halves: Also measure on either half of each target set, in the same pass, for the noise ceiling.
        block_size: Texts per finished block.
        **options: The method's own options.

    Returns:
        Labels in the order of the sample.

    Raises:
        MismatchError: `workdir` has labels made at another checkpoint, for other targets or with other options.
        NotFiniteError: The loss of a text or target is NaN; finished blocks are kept.
        InputError: An option is unknown, a target set has no target token, and so on.

    Example:
        >>> labels = oracle.label(lm, sample, {"math": "math_dev.jsonl"}, method="grad_dot", workdir="labels")  # doctest: +SKIP
    """
    if not isinstance(lm, LanguageModel):
        raise InputTypeError(
            f"lm is a {type(lm).__name__}.",
            "an oracle.LanguageModel",
            "wrap the module: LanguageModel(module, tokenizer, optimizer).",
        )
    check_at_least("block_size", block_size, 1)
    oracle_method = plugins.create(METHODS, method, options)
    texts = read_texts(sample)
    target_sets = read_targets(targets, max_texts=max_target_texts, seed=seed)
    identity = _identity(lm, target_sets, oracle_method, seed=seed, halves=halves)
    store = _Store(Path(workdir) if workdir is not None else None, [target.name for target in target_sets], identity)
    if store.is_complete(texts["text_id"]):
        return store.finished(texts["text_id"])
    encoded = lm.encode(texts)
    with torch.enable_grad(), lm.preserved(weights=oracle_method.changes_weights):
        columns, cost = _prepare(oracle_method, lm, target_sets, seed=seed, halves=halves)
        cost["num_measured_now"] = _measure_blocks(oracle_method, encoded, store, block_size=block_size)
    cost |= _label_cost(oracle_method, columns, store)
    facts = oracle_method.facts()
    meta = {
        **identity,
        **_counts(encoded, columns),
        "model": model_identity(lm),
        "facts": facts,
        "cost": cost,
        "provenance": provenance(),
    }
    return store.finish(texts["text_id"], units=oracle_method.units, meta=meta)


def model_identity(lm: LanguageModel) -> dict[str, Any]:
    """Say which model this is (`kind`: class and size) and at which weights."""
    return {"kind": f"{type(lm.module).__name__} of {lm.num_parameters} parameters", "weights": lm.fingerprint()}


def method_names() -> list[str]:
    """List the oracle methods."""
    return plugins.names(METHODS)


class _Store:
    """Finished rows by text_id, in memory and, with a folder, as one file per block.

    A kill while the result is written may leave blocks whose seconds are in meta.json already; it names them.
    """

    def __init__(self, folder: Path | None, target_names: list[str], identity: dict[str, Any]) -> None:
        self.folder, self.target_names, self.identity = folder, target_names, identity
        self.blocks: list[Labels] = []
        self.seconds = 0.0  # spent on measuring, over all processes that worked on this folder
        if folder is None:
            return
        counted: set[str] = set()
        if (folder / IDENTITY_FILE).exists():
            require_same(read_json(folder / IDENTITY_FILE), identity, where=folder)
        else:
            write_json(folder / IDENTITY_FILE, identity)
        if (folder / "labels.parquet").exists():
            self.blocks.append(Labels.load(folder))
            cost = self.blocks[0].meta["cost"]
            self.seconds += cost["label_seconds"]
            counted = set(cost[COUNTED_BLOCKS])
        self.seconds += sum(read_json(path)["seconds"] for path in (folder / "blocks").glob("*.json") if path.stem not in counted)
        self.blocks += [self._read(path) for path in sorted((folder / "blocks").glob("*.parquet"))]

    def _read(self, path: Path) -> Labels:
        import pyarrow.parquet as pq

        return from_table(pq.read_table(path), self.target_names, units="", meta={})

    def done(self) -> set[str]:
        return {text_id for block in self.blocks for text_id in block.text_ids}

    def num_tokens(self) -> list[int]:
        """Return the tokens of every text that has labels, in the order of their text_ids."""
        found = {i: int(n) for block in self.blocks for i, n in zip(block.text_ids, block.columns["num_tokens"], strict=True)}
        return [found[text_id] for text_id in sorted(found)]

    def block_names(self) -> list[str]:
        """Name the blocks that lie in the folder."""
        return [] if self.folder is None else sorted(path.stem for path in (self.folder / "blocks").glob("*.json"))

    def is_complete(self, text_ids: Sequence[str]) -> bool:
        """Whether `labels.parquet` holds all of these texts."""
        is_file = self.folder is not None and (self.folder / "labels.parquet").exists()
        return is_file and set(self.blocks[0].text_ids) >= set(text_ids)

    def finished(self, text_ids: Sequence[str]) -> Labels:
        """Read labels from `labels.parquet`."""
        return self.blocks[0].take(list(text_ids))

    def add(self, block: Labels, *, seconds: float) -> None:
        """Keep a block; with a folder, on disk before anything else is measured.

        The seconds go into a file of their own, so that the block's bytes stay the same.
        """
        self.blocks.append(block)
        self.seconds += seconds
        if self.folder is not None:
            import pyarrow.parquet as pq

            name = fingerprint(block.text_ids)
            write_json(self.folder / "blocks" / f"{name}.json", {"seconds": seconds})
            with atomic_path(self.folder / "blocks" / f"{name}.parquet") as partial:
                pq.write_table(to_table(block), partial)

    def finish(self, text_ids: Sequence[str], *, units: str, meta: dict[str, Any]) -> Labels:
        """Join the blocks, write the result, drop the block files; return the labels of the sample, in its order.

        Labels of texts outside the sample, measured earlier into the same folder, stay in the file behind those of the sample.
        """
        values = np.concatenate([block.values for block in self.blocks])
        halves = np.concatenate([block.halves for block in self.blocks], axis=1)
        names = sorted({name for block in self.blocks for name in block.columns})
        columns = {name: np.concatenate([block.columns[name] for block in self.blocks]) for name in names}
        ids = [text_id for block in self.blocks for text_id in block.text_ids]
        others = sorted(set(ids) - set(text_ids))
        everything = Labels(values, ids, self.target_names, units, halves, columns, meta).take([*text_ids, *others])
        if self.folder is not None:
            everything.save(self.folder)
            with storing(self.folder / "blocks"):
                shutil.rmtree(self.folder / "blocks", ignore_errors=True)
        return everything.take(list(text_ids))


def _prepare(
    method: Any, lm: LanguageModel, targets: Sequence[TargetSet], *, seed: int, halves: bool
) -> tuple[TargetColumns, dict[str, Any]]:
    """Do once what does not depend on the sample; return the target columns and what it cost."""
    seconds: list[float] = []
    with timed(seconds.append):
        columns = prepare_targets(lm, targets, seed=seed, halves=halves)
        method.prepare(lm, columns)
    return columns, {"prepare_seconds": round(seconds[0], 3), "prepare_flops": method.prepare_flops(columns)}


def _measure_blocks(method: Any, encoded: list[EncodedText], store: _Store, *, block_size: int) -> int:
    """Measure what is not stored yet, in fixed blocks of the sample; return how many texts that was."""
    done = store.done()
    num_measured = 0
    with track(f"label ({method.plugin_name})", len(encoded)) as tracker:
        for start in range(0, len(encoded), block_size):
            block = encoded[start : start + block_size]
            missing = [text for text in block if text.text_id not in done]
            if missing:
                start_seconds = time.perf_counter()
                measured = _as_labels(method.measure(missing), missing, store.target_names)
                store.add(measured, seconds=time.perf_counter() - start_seconds)
                num_measured += len(missing)
            tracker.advance(len(block))
    return num_measured


def _as_labels(measured: Measured, encoded: list[EncodedText], target_names: list[str]) -> Labels:
    columns: dict[str, np.ndarray] = {"num_tokens": np.array([len(text.input_ids) for text in encoded], dtype=np.float32)}
    for name, column in measured.columns.items():
        if column.ndim == 1:
            columns[name] = column.astype(np.float32)
        else:
            columns.update({f"{name}.{target}": column[:, index].astype(np.float32) for index, target in enumerate(target_names)})
    rows = np.flatnonzero(~np.isfinite(measured.values).all(1))
    if len(rows):
        raise NotFiniteError(
            f"the influence of {len(rows)} texts is NaN or infinite, first {[encoded[row].text_id for row in rows[:3]]}.",
            "texts with finite losses and gradients",
            "remove these texts from the sample or load the model in float32; the blocks finished before are kept.",
        )
    return Labels(
        measured.values.astype(np.float32),
        [text.text_id for text in encoded],
        target_names,
        "",
        measured.halves.astype(np.float32),
        columns,
    )


def _identity(lm: LanguageModel, targets: Sequence[TargetSet], method: Any, *, seed: int, halves: bool) -> dict[str, Any]:
    """What must be the same for stored labels to be gone on with.

    The tokenizer stands for the ids of the sample, which may grow; those of the target sets are known and hashed.
    """
    encoded = {
        target.name: sorted((text.text_id, text.input_ids, text.labels) for text in lm.encode(target.texts)) for target in targets
    }
    return {
        "method": method.plugin_name,
        "options": plugins.options_of(method),
        "seed": seed,
        "halves": halves,
        "checkpoint": lm.fingerprint(optimizer=True),
        "trainable_parameters": fingerprint(sorted(name for name, p in lm.module.named_parameters() if p.requires_grad)),
        "tokenizer": lm.tokenizer_fingerprint(),
        "max_tokens": lm.max_tokens,
        "device": lm.device.type,
        "target_ids": {name: fingerprint(texts) for name, texts in encoded.items()},
        "targets": {target.name: target.fingerprint for target in targets},
        "num_target_texts": {target.name: len(target.texts) for target in targets},
    }


def _counts(encoded: Sequence[EncodedText], columns: TargetColumns) -> dict[str, int]:
    counts = {
        "num_texts": len(encoded),
        "num_truncated": sum(text.was_truncated for text in encoded),
        "num_without_target_token": sum(text.num_targets == 0 for text in encoded),
        "num_target_texts_truncated": columns.num_truncated,
    }
    told = [
        f"{counts[key]} of {len(encoded)} {what}"
        for key, what in (
            ("num_truncated", "texts were cut at max_tokens"),
            ("num_without_target_token", "texts have no target token (their gradient is zero)"),
        )
        if counts[key]
    ]
    if told:
        warnings.warn("; ".join(told) + ".", UnlabelableTextWarning, stacklevel=3)
    return counts


def _label_cost(method: Any, columns: TargetColumns, store: _Store) -> dict[str, Any]:
    """Seconds, FLOPs and tokens of all texts that the folder has labels of, whichever process measured them."""
    num_tokens = store.num_tokens()
    return {
        "label_seconds": round(store.seconds, 3),
        "label_flops": sum(method.flops(number, columns) for number in num_tokens),
        "num_tokens": sum(num_tokens),
        "num_labelled": len(num_tokens),
        COUNTED_BLOCKS: store.block_names(),
    }
