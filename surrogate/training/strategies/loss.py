"""Texts by the live model's loss on them: the hardest first, or the easiest, or those in the middle.

Training on what has the highest loss now is as old as hard example mining; pruning of pretraining texts by perplexity
found the highest, the middle or the lowest best, depending on the corpus. No target is looked at, so what is hard
because it is noise comes first too. The pool is read in blocks, each of which is a file when it is finished. Several
processes share the blocks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from oracle.artifacts import fingerprint, read_json, write_json
from oracle.errors import NotFiniteError, check_choice
from oracle.plugins import option
from oracle.progress import track
from oracle.texts import list_text_ids
from surrogate.scores import Scores
from surrogate.training.strategies import Ranking, RankingContext

if TYPE_CHECKING:
    from datasets import Dataset

    from oracle.encoding import EncodedText
    from oracle.language_model import LanguageModel

BLOCK_TEXTS = 1024
SHOWN_IDS = 3  # text_ids named in an error
KEPT = ("highest", "middle", "lowest")


@dataclass(kw_only=True)
class Loss:
    """The texts on which the live model's loss, the mean over their tokens, is highest, lowest or in the middle.

    Paper:
        Loshchilov and Hutter 2016, Online Batch Selection, arXiv 1511.06343 (highest); Marion et al. 2023, When Less is
        More, arXiv 2309.04564, and Ankner et al. 2024, Perplexed by Perplexity, arXiv 2405.20541 (all three, once).
    Cost:
        One forward pass of the live model over every candidate: a third of training on them.
    Limit:
        The order of 'lowest' is that of 'highest' turned round.

    A text without a token to be predicted comes last whatever is kept.
    """

    plugin_name: ClassVar[str] = "loss"
    needs_model: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = False
    adapts: ClassVar[bool] = True
    redraws: ClassVar[bool] = False

    keep: str = option("highest", "Which losses come first: the 'highest', the 'lowest', or those in the 'middle' of the order.")

    def __post_init__(self) -> None:
        check_choice("keep", self.keep, KEPT)

    def rank(self, context: RankingContext) -> Ranking:
        """Measure the present loss of every candidate."""
        from oracle.processes import working_together

        texts = context.candidate_texts()
        ids = list_text_ids(texts)
        row_of = {text_id: row for row, text_id in enumerate(ids)}  # a text that stands there twice is read once
        order = [row_of[text_id] for text_id in sorted(row_of)]  # so that no block depends on the order of the rows
        blocks = [order[start : start + BLOCK_TEXTS] for start in range(0, len(order), BLOCK_TEXTS)]
        with working_together() as processes:
            with processes.all_or_none():
                assert context.lm is not None
                state = fingerprint([context.lm.fingerprint(), context.lm.tokenizer_fingerprint(), context.lm.max_tokens])
            processes.require_same({"model": state, "candidates": fingerprint([ids[row] for row in order])})
            with processes.all_or_none():
                own = range(processes.rank, len(blocks), processes.world_size)
                found = _measure_blocks(context.lm, texts, {block: blocks[block] for block in own}, context.folder, state=state)
            joined = {block: entry for share in processes.gather(found) for block, entry in share.items()}
        each: dict[str, tuple[float, bool]] = {}  # text_id -> loss, whether it has a target token
        for block, rows in enumerate(blocks):
            for row, loss, has_one in zip(rows, joined[block]["losses"], joined[block]["has_target"], strict=True):
                each[ids[row]] = loss, has_one
        losses = np.array([each[text_id][0] for text_id in ids])  # (M,)
        has_target = np.array([each[text_id][1] for text_id in ids])  # (M,)
        return Ranking(
            scores=Scores(_worth(losses, has_target, keep=self.keep)[:, None], text_ids=ids, target_names=[self.plugin_name]),
            costs={"score": {unit: float(sum(entry[unit] for entry in joined.values())) for unit in ("seconds", "flops")}},
            facts={"mean_loss": float(losses[has_target].mean()) if has_target.any() else None},
        )


def _worth(losses: np.ndarray, has_target: np.ndarray, *, keep: str) -> np.ndarray:
    """Turn losses (M,) into scores (M,): higher is better, and texts without a target token are below all others."""
    from scipy.stats import rankdata

    worth = {
        "highest": lambda kept: kept,
        "lowest": lambda kept: -kept,
        "middle": lambda kept: -np.abs((rankdata(kept) - 0.5) / len(kept) - 0.5),  # distance from the median, in shares
    }[keep](losses[has_target])
    scores = np.full(len(losses), worth.min() - 1.0 if len(worth) else 0.0)
    scores[has_target] = worth
    return scores


def _measure_blocks(
    lm: LanguageModel, texts: Dataset, blocks: dict[int, list[int]], folder: Path, *, state: str
) -> dict[int, dict[str, Any]]:
    """Return what each block's file has, measuring those that have none: losses, has_target, seconds and flops."""
    import torch

    from oracle.memory import batch_size_kept

    found = {}
    with (
        track("losses", sum(map(len, blocks.values()))) as tracker,
        lm.preserved(weights=False),
        torch.no_grad(),
        batch_size_kept(lm),
    ):
        for block, rows in blocks.items():
            part = texts.select(rows)
            path = folder / "losses" / f"{fingerprint([state, *list_text_ids(part)])}.json"
            if not path.exists():
                write_json(path, _measure_block(lm, part))
            found[block] = read_json(path)
            tracker.advance(len(rows))
    return found


def _measure_block(lm: LanguageModel, texts: Dataset) -> dict[str, Any]:
    from oracle.memory import within_memory
    from oracle.target_columns import TargetColumns

    start_seconds = time.perf_counter()
    encoded = lm.encode(texts)
    longest = max(len(text.input_ids) for text in encoded)
    no_columns = TargetColumns(["none"], [], np.zeros(0), [], [], 0)
    losses = within_memory(partial(_losses, lm, encoded), lm, no_columns, longest=longest)
    bad = [encoded[row].text_id for row in np.flatnonzero(~np.isfinite(losses))]
    if bad:
        raise NotFiniteError(
            f"the loss of {len(bad)} texts is NaN or infinite, first {bad[:SHOWN_IDS]}.",
            "texts with finite losses",
            "check the checkpoint (did training diverge?), remove these texts, or load the model in float32.",
        )
    return {
        "losses": losses.tolist(),
        "has_target": [text.num_targets > 0 for text in encoded],
        "seconds": time.perf_counter() - start_seconds,
        "flops": lm.forward_flops_per_token * sum(len(text.input_ids) for text in encoded),
    }


def _losses(lm: LanguageModel, encoded: list[EncodedText]) -> np.ndarray:
    """Return (B,) losses, nats per target token, in the order of the texts."""
    losses = np.zeros(len(encoded))
    for batch in lm.batches(encoded):
        losses[batch.positions] = lm.text_losses(batch).double().cpu().numpy()
    return losses
