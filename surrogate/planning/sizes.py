"""The numbers a plan is made from, read from a model, a pool and target sets without a pass of any model.

A model in a folder or on the hub is built from its config without weights. Tokens are counted with its tokenizer, over a
draw of the pool by content and over all target texts. `measure_rates` is the one function here that spends something.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle import plugins
from oracle.errors import InputError, MissingFileError
from oracle.targets import read_targets
from oracle.texts import list_text_ids, plain_strings, read_texts, text_format
from surrogate.planning.cost_model import Rates

if TYPE_CHECKING:
    from datasets import Dataset

    from oracle.language_model import LanguageModel

COUNTED_TEXTS = 2_000  # of the pool, for the mean number of tokens
TIMED_TEXTS = 64
CHARACTERS_PER_TOKEN = 4.0  # of English under a vocabulary of 30,000 or more
MAX_TOKENS = 512  # where texts are cut, if nothing else is said
HEAD_SHARE = 0.25  # of a model of which only the number of parameters is known; above that of most of a billion or more


class ModelSize:
    """FLOPs per token of a model, and what can be had of its tokenizer.

    Args:
        model: A LanguageModel, the folder or hub name of one (only its config is read), or its number of parameters.
        max_tokens: Where texts are cut; None as the model does it.
        name: What the model is called in errors: "model" or "proxy".
    """

    def __init__(self, model: LanguageModel | str | Path | float, *, max_tokens: int | None = None, name: str = "model") -> None:
        self.lm: LanguageModel | None = None
        self.assumptions: list[str] = []
        if isinstance(model, (int, float)):
            _check_positive(name, float(model))
            self.forward_flops_per_token, self.head_parameters = 2.0 * model, HEAD_SHARE * model
            self.assumptions.append(f"{name}: a forward pass takes 2 FLOPs per parameter, a quarter of them in the output layer")
            self.max_tokens = max_tokens or MAX_TOKENS
            return
        self.lm = _without_weights(model, max_tokens=max_tokens) if isinstance(model, (str, Path)) else model
        module: Any = self.lm.module
        head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
        self.forward_flops_per_token = self.lm.forward_flops_per_token
        self.head_parameters = 0.0 if head is None else float(head.weight.numel())
        self.max_tokens = max_tokens or self.lm.max_tokens

    def count_tokens(self, texts: Dataset) -> tuple[np.ndarray, str]:
        """Tokens of each text after cutting, (B,) float64, and what was assumed in counting ("" for nothing)."""
        if text_format(texts) == "tokens":
            lengths, assumption = [len(ids) for ids in texts["input_ids"]], ""
        elif self.lm is not None and self.lm.tokenizer is not None:
            lengths, assumption = [len(text.input_ids) for text in self.lm.encode(texts)], ""
        else:
            lengths = [max(round(len(string) / CHARACTERS_PER_TOKEN), 1) for string in plain_strings(texts)]
            assumption = f"no tokenizer: {CHARACTERS_PER_TOKEN:g} characters are taken for a token"
        return np.minimum(np.array(lengths, dtype=np.float64), self.max_tokens), assumption


def pool_size(size: ModelSize, pool: Any) -> tuple[int, float, bool, list[str]]:
    """Return the number of texts, their mean tokens, whether they are texts and not token ids, and what was assumed."""
    texts = read_texts(pool)
    drawn = np.sort(np.argsort(np.array(list_text_ids(texts)), kind="stable")[:COUNTED_TEXTS])  # ids are hashes: a fair draw
    tokens, assumption = size.count_tokens(texts.select(drawn))
    assumptions = [assumption] if assumption else []
    if len(drawn) < len(texts):
        assumptions.append(f"mean tokens of {len(drawn):,} of the {len(texts):,} texts")
    return len(texts), float(tokens.mean()), text_format(texts) != "tokens", assumptions


def target_size(size: ModelSize, targets: Any, *, max_texts: int | None = None) -> tuple[float, int]:
    """Return the tokens of all target sets together, and their number; padding counts, where a tokenizer tells of it."""
    from oracle.target_columns import prepare_targets

    sets = read_targets(targets, max_texts=max_texts)
    if size.lm is not None and (size.lm.tokenizer is not None or all(text_format(one.texts) == "tokens" for one in sets)):
        return float(prepare_targets(size.lm, sets).num_tokens), len(sets)
    return float(sum(size.count_tokens(one.texts)[0].sum() for one in sets)), len(sets)


def measure_rates(lm: LanguageModel, pool: Any, *, encoders: Sequence[str]) -> Rates:
    """Time 64 texts of the pool through each encoder, and forward and backward passes over them.

    The model is left as it was: no step is taken, and gradients are not kept.
    """
    import torch

    texts = read_texts(pool)
    texts = texts.select(np.sort(np.argsort(np.array(list_text_ids(texts)), kind="stable")[:TIMED_TEXTS]))
    rates = {}
    for name in encoders:
        encoder = plugins.create("surrogate.features", name, {})
        encoder.encode(texts.select(range(1)))  # loads what has to be loaded
        start_seconds = time.perf_counter()
        encoder.encode(texts)
        rates[name] = len(texts) / max(time.perf_counter() - start_seconds, 1e-9)
    encoded = lm.encode(texts)
    batches = list(lm.batches(encoded))
    parameters = [parameter for parameter in lm.module.parameters() if parameter.requires_grad]
    with lm.preserved(weights=False), torch.enable_grad():
        seconds = 0.0
        for number, batch in enumerate([batches[0], *batches]):  # the first one once more, untimed: it warms up
            start_seconds = time.perf_counter()
            torch.autograd.grad(lm.text_losses(batch).sum(), parameters, allow_unused=True)
            if lm.device.type == "cuda":
                torch.cuda.synchronize(lm.device)
            seconds += time.perf_counter() - start_seconds if number else 0.0
    flops = 3 * lm.forward_flops_per_token * sum(len(text.input_ids) for text in encoded)
    return Rates(training_flops_per_second=flops / max(seconds, 1e-9), texts_per_second=rates)


def _without_weights(path: str | Path, *, max_tokens: int | None) -> LanguageModel:
    """Build the model of a folder or hub name from its config on torch's meta device, with its tokenizer if it has one.

    Raises:
        MissingFileError: There is no such folder and the hub cannot give it.
        InputError: The folder holds no causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from oracle.language_model import LanguageModel

    accepted = "a folder written by save_pretrained, the Trainer or LanguageModel.save, or a name on the Hugging Face hub"
    is_folder = Path(path).is_dir()
    if not is_folder and (str(path).startswith((".", "/", "~")) or str(path).count("/") > 1):
        raise MissingFileError(
            f"there is no folder {str(path)!r}.", accepted, "check the path, or give the number of parameters."
        )
    try:
        config = AutoConfig.from_pretrained(str(path))
        tokenizer = AutoTokenizer.from_pretrained(str(path)) if not is_folder or any(Path(path).glob("tokenizer*")) else None
        with torch.random.fork_rng(), torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        kind = InputError if is_folder else MissingFileError
        reason = str(error).splitlines()[0]
        remedy = "check the path, or give the number of parameters."
        raise kind(f"cannot read the config of a causal language model in {str(path)!r}: {reason}", accepted, remedy) from error
    return LanguageModel(module, tokenizer, max_tokens=max_tokens, device="meta")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise InputError(f"{name}={value!r}.", "a number above 0", f"pass such a number for {name}.")
