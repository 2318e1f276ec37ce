"""Importance resampling by hashed n-grams: texts whose words are likelier in the target set than in the pool.

A text's log weight is the sum, over its words and pairs of words, of log p_target - log p_pool, both counted in hashed
buckets. Gumbel noise on the log weights makes the highest ones a draw without replacement in proportion to the weights,
so that the selection has the target's mixture of words and not only its most typical texts. The noise is a hash of text,
target and seed. Each target set has a column, which no other set touches.

Two things differ from the paper, whose texts all have 128 words and whose target sets are large:

- An n-gram that the target set lacks counts as if it had been seen there in `smoothing` words of the pool. The released
  code gives its bucket a probability of 1e-8, nine nats below the pool's or more: with small target sets it ranks by how
  few such n-grams a text has. Laplace's one per bucket instead rewards n-grams that are rare in pool and target alike.
- A sum over more n-grams is larger, so each text's sum is brought to the pool's mean length.

Share of the texts of the target's kind among as many selected, by the order without noise (3,000 texts of each of the
bundled corpora; for `skills` the mean of its five kinds):

|  | 1e-8 | Laplace | 100 of the pool | 1,000 of the pool | 10,000 of the pool |
|---|---|---|---|---|---|
| python_library, sums | 0.23 | 0.63 | 0.30 | 0.45 | 0.62 |
| python_library, at mean length | 0.52 | 0.61 | 0.54 | 0.57 | 0.60 |
| skills, sums | 0.89 | 0.45 | 0.96 | 0.98 | 0.98 |
| skills, at mean length | 1.00 | 0.45 | 1.00 | 0.99 | 0.98 |

Left out: the released code's filter of short texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from oracle.artifacts import timed
from oracle.errors import InputError, check_at_least, check_choice
from oracle.plugins import option
from oracle.progress import track
from oracle.texts import list_text_ids, plain_strings, text_format
from surrogate.scores import Scores
from surrogate.training.chance import uniform
from surrogate.training.strategies import Ranking, RankingContext

if TYPE_CHECKING:
    from datasets import Dataset

WORD = re.compile(r"\w+|[^\w\s]+")
BLOCK_TEXTS = 4096
LEAST_SMOOTHING = 1e-6


@dataclass(kw_only=True)
class Dsir:
    """Texts drawn in proportion to how much likelier their words and word pairs are in each target set than in the pool.

    Paper:
        DSIR, Xie et al. 2023, Data Selection for Language Models via Importance Resampling, arXiv 2302.03169.
    Cost:
        No model. The pool is hashed twice, once for its counts and once for the weights.
    Limit:
        As `smoothing` grows all weights tend to 1, and the order to one at random.
    """

    plugin_name: ClassVar[str] = "dsir"
    needs_model: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = True
    adapts: ClassVar[bool] = False
    redraws: ClassVar[bool] = False

    num_buckets: int = option(10_000, "Buckets that words and word pairs are hashed into.")
    smoothing: float = option(1000.0, "Words and pairs of the pool that count as seen in each target set.")
    length: str = option("mean", "A text's weight as if it had the pool's 'mean' length, or the plain 'sum' over its n-grams.")
    noise: bool = option(True, "Draw in proportion to the weights; without, the highest weights come first.")

    def __post_init__(self) -> None:
        check_at_least("num_buckets", self.num_buckets, 1)
        check_at_least("smoothing", self.smoothing, LEAST_SMOOTHING)
        check_choice("length", self.length, ("mean", "sum"))

    def rank(self, context: RankingContext) -> Ranking:
        """Weigh the candidates for every target set; where there are several processes, the first one does."""
        from oracle.processes import working_together

        def weigh() -> tuple[np.ndarray, float]:
            seconds: list[float] = []
            with timed(seconds.append):
                weights = self._log_weights(context)
            return weights, seconds[0]

        with working_together() as processes:
            log_weights, seconds = processes.on_first(weigh)  # (M, C)
        ids, names = list_text_ids(context.candidate_texts()), [target.name for target in context.targets]
        if self.noise:
            drawn = [uniform(ids, salt=f"dsir:{context.seed}:{name}") for name in names]
            log_weights = log_weights - np.log(-np.log(np.stack(drawn, axis=1)))
        scores = Scores(log_weights, text_ids=ids, target_names=names)
        return Ranking(scores=scores, costs={"score": {"seconds": seconds * context.num_processes, "flops": 0.0}})

    def _log_weights(self, context: RankingContext) -> np.ndarray:
        """Return the candidates' log weights for every target set: (M, C)."""
        tokenizer = _tokenizer(context)
        pool_counts = self._counts(context.pool, tokenizer)  # (V,)
        pool_share = pool_counts / max(pool_counts.sum(), 1.0)
        log_ratios = np.zeros((self.num_buckets, len(context.targets)))  # (V, C)
        for column, target in enumerate(context.targets):
            counts = self._counts(target.texts, tokenizer)
            smoothed = (counts + self.smoothing * pool_share) / (counts.sum() + self.smoothing)
            seen = pool_counts > 0  # no candidate has an n-gram in any other bucket
            log_ratios[seen, column] = np.log(smoothed[seen] / pool_share[seen])
        texts = context.candidate_texts()
        weights = np.zeros((len(texts), len(context.targets)))
        mean_length = pool_counts.sum() / len(context.pool)
        with track("dsir", len(texts)) as tracker:
            for start in range(0, len(texts), BLOCK_TEXTS):
                hashed = self._hash(texts.select(range(start, min(start + BLOCK_TEXTS, len(texts)))), tokenizer)  # (B, V)
                sums = hashed @ log_ratios
                if self.length == "mean":
                    sums *= mean_length / np.maximum(np.asarray(hashed.sum(axis=1)), 1.0)  # (B, 1)
                weights[start : start + BLOCK_TEXTS] = sums
                tracker.advance(len(sums))
        return weights

    def _counts(self, texts: Dataset, tokenizer: Any) -> np.ndarray:
        """Count the n-grams of all texts by bucket: (V,)."""
        counts = np.zeros(self.num_buckets)
        for start in range(0, len(texts), BLOCK_TEXTS):
            block = texts.select(range(start, min(start + BLOCK_TEXTS, len(texts))))
            counts += np.asarray(self._hash(block, tokenizer).sum(axis=0)).ravel()
        return counts

    def _hash(self, texts: Dataset, tokenizer: Any) -> Any:
        """Count each text's n-grams by bucket: a sparse matrix (B, V)."""
        from sklearn.feature_extraction import FeatureHasher

        hasher = FeatureHasher(n_features=self.num_buckets, input_type="string", alternate_sign=False)
        return hasher.transform(_ngrams(words) for words in _words(texts, tokenizer))


def _ngrams(words: list[str]) -> Iterable[str]:
    """Words, and words with their neighbours; a word has no space in it."""
    yield from words
    yield from map(" ".join, pairwise(words))


def _words(texts: Dataset, tokenizer: Any) -> Iterable[list[str]]:
    if text_format(texts) == "tokens" and tokenizer is None:
        return ([str(token) for token in ids] for ids in texts["input_ids"])
    return (WORD.findall(string.lower()) for string in plain_strings(texts, tokenizer))


def _tokenizer(context: RankingContext) -> Any:
    """Return what turns token ids into strings where only some texts are ids; None where all are, or none.

    Raises:
        InputError: Some are, and there is no tokenizer.
    """
    formats = {text_format(context.pool), *(text_format(target.texts) for target in context.targets)}
    if "tokens" not in formats or len(formats) == 1:
        return None
    tokenizer = None if context.lm is None else context.lm.tokenizer
    if tokenizer is None:
        raise InputError(
            f"pool and targets have the formats {', '.join(sorted(formats))}, and nothing turns ids into words.",
            "token ids everywhere, or nowhere, or a model with its tokenizer",
            "pass the LanguageModel whose tokenizer made the ids.",
        )
    return tokenizer
