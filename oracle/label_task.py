"""What one call of `label` is asked: its inputs read and checked, and what stored labels have to share with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle import plugins
from oracle.artifacts import fingerprint
from oracle.checkpoint_identity import checkpoint_identity, reading_identity
from oracle.errors import InputError, InputTypeError, check_choice, check_count
from oracle.language_model import LanguageModel
from oracle.methods import Needs, needs_of
from oracle.targets import TargetSet, read_targets
from oracle.texts import list_text_ids, read_texts, text_format
from oracle.wrappers import check_undivided, check_whole

if TYPE_CHECKING:
    from datasets import Dataset

PER = ("text", "token")  # what a label stands for


@dataclass(frozen=True)
class LabelTask:
    """What one call of `label` was asked.

    Attributes:
        method: The method, with its options.
        needs: What the method needs.
        lm: The model; None where it needs none and none was given.
        texts: The sample.
        text_ids: Its S text_ids.
        targets: The C target sets; none for a method that needs none.
        seed: Seed of the target sets' halves.
        halves: Whether halves are measured at all.
        per: One of `PER`.
        block_size: Texts per finished block.
    """

    method: Any
    needs: Needs
    lm: LanguageModel | None
    texts: Dataset
    text_ids: list[str]
    targets: list[TargetSet]
    seed: int
    halves: bool
    per: str
    block_size: int

    @property
    def column_names(self) -> list[str]:
        """Names of the labels' columns: the target sets, or the method that looks at none."""
        return [target.name for target in self.targets] if self.needs.targets else [self.method.plugin_name]


def read_task(
    lm: LanguageModel | None,
    sample: Any,
    targets: Any,
    *,
    method: Any,
    max_texts: int | None,
    seed: int,
    halves: bool,
    per: str,
    block_size: int,
) -> LabelTask:
    """Read the inputs of `label` and refuse what does not go together.

    Raises:
        InputError: The method needs what is not given, or something is given that has no effect.
        InputTypeError: `lm` is no LanguageModel.
    """
    needs = needs_of(method)
    check_count("block_size", block_size)
    check_choice("per", per, PER)
    if (lm is not None or needs.model) and not isinstance(lm, LanguageModel):
        raise InputTypeError(
            f"lm is a {type(lm).__name__}, and the method is {method.plugin_name!r}.",
            "an oracle.LanguageModel" + ("" if needs.model else ", or None"),
            "wrap the module: LanguageModel(module, tokenizer, optimizer).",
        )
    if lm is not None:
        check_whole(lm.module)
        if needs.gradients:
            check_undivided(lm.module, needed_by=method.plugin_name)
    if needs.targets != (targets is not None) or (max_texts is not None and not needs.targets):
        raise InputError(
            f"{method.plugin_name} needs target sets, and there are none."
            if needs.targets
            else f"{method.plugin_name} looks at no target set, and targets or max_target_texts were given.",
            "a mapping such as {'math': texts}" if needs.targets else "targets=None and max_target_texts=None",
            "pass targets." if needs.targets else "leave them out, or choose a method that measures influence on targets.",
        )
    texts = read_texts(sample)
    if per == "token" and lm is None and text_format(texts) != "tokens":
        raise InputError(
            "per='token', and without a model nothing counts the texts' tokens.",
            "a LanguageModel, texts as input_ids, or per='text'",
            "pass the model that is trained, whose tokenizer the budget counts with.",
        )
    target_sets = read_targets(targets, max_texts=max_texts, seed=seed) if needs.targets else []
    return LabelTask(method, needs, lm, texts, list_text_ids(texts), target_sets, seed, halves, per, block_size)


def check_divisible(task: LabelTask) -> None:
    """Refuse labels per token where a value's 0 is not that of a text without effect; known once the method is prepared.

    Divided by its length, what all texts have in common would rank the texts by length.

    Raises:
        InputError: The value is a cosine, a rating or a rank, or has a part that all texts share.
    """
    units, shared = task.method.units, getattr(task.method, "shared_", 0.0)
    has_shared = bool(np.any(shared)) and not getattr(task.method, "subtract_shared", False)
    if task.per == "text" or (units.startswith("nats") and not has_shared):
        return
    subtracts = hasattr(task.method, "subtract_shared")
    raise InputError(
        f"per='token', and the values of {task.method.plugin_name!r} "
        + ("have a part that all texts share (momentum, decay, a companion)." if has_shared else f"are in {units}."),
        "values in nats, of which 0 is the effect of no text at all",
        ("pass subtract_shared=True" if subtracts else "use method='grad_dot', or one_step with subtract_shared=True")
        + ", or per='text'.",
    )


def identity_of(task: LabelTask) -> dict[str, Any]:
    """Return what must be the same for stored labels to be gone on with.

    The tokenizer stands for the ids of the sample, which may grow; those of the target sets are known and hashed.
    """
    identity: dict[str, Any] = {
        "method": task.method.plugin_name,
        "options": plugins.options_of(task.method),
        "seed": task.seed,
        "halves": task.halves,
        "per": task.per,
        "targets": {target.name: target.fingerprint for target in task.targets},
        "num_target_texts": {target.name: len(target.texts) for target in task.targets},
    }
    if hasattr(task.method, "inputs"):
        identity["inputs"] = task.method.inputs()
    if task.needs.whole_sample:
        identity["sample"] = fingerprint(sorted(task.text_ids))
    lm = task.lm
    if lm is not None:  # counts the tokens, also for a method that does not need it
        identity |= reading_identity(lm)
    if lm is not None and task.needs.model:
        encoded = {
            target.name: sorted((text.text_id, text.input_ids, text.labels) for text in lm.encode(target.texts))
            for target in task.targets
        }
        identity |= {
            **checkpoint_identity(lm, optimizer=task.needs.optimizer, autocast=not task.method.changes_weights),
            "target_ids": {name: fingerprint(texts) for name, texts in encoded.items()},
        }
    return identity
