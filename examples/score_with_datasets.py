"""Scoring inside a `datasets` pipeline: `ScoreBatch` is a function for `map(batched=True)`.

    python examples/score_with_datasets.py runs/datasets

A predictor is fitted first, on labels of a few texts and a model that has learnt nothing yet; with one of your own, such as
`runs/demo/predictors/trees`, the call of `map` is all that is needed. A streamed dataset (`IterableDataset`) maps the same way.
"""

from __future__ import annotations

import sys
from pathlib import Path

from datasets import Dataset

import oracle
from surrogate import InfluencePredictor, corpora
from surrogate.scoring import ScoreBatch
from surrogate.training.small_models import build_model, train_tokenizer


def fit_predictor(corpus: corpora.Corpus, folder: Path, *, sample_size: int) -> Path:
    """Label a sample, fit a surrogate on cheap features, and return the folder of the predictor."""
    tokenizer = train_tokenizer(corpus.pool["text"][:1000])
    lm = oracle.LanguageModel(build_model("llama", vocabulary_size=len(tokenizer)), tokenizer, max_tokens=128)
    sample = corpus.pool.shuffle(seed=0).select(range(sample_size))
    labels = oracle.label(lm, sample, corpus.targets, method="grad_dot", workdir=folder / "labels", max_target_texts=64)
    predictor = InfluencePredictor(encoder=["hashed_ngrams", "text_stats"], surrogate="ridge").fit(sample, labels)
    predictor.save(folder / "predictor")
    return folder / "predictor"


def main(workdir: Path, *, num_texts: int = 2000, sample_size: int = 200, num_proc: int | None = None) -> Dataset:
    """Score texts of Python's library by how much they help with its documentation, and keep the best fifth."""
    corpus = corpora.load("python_library", num_texts=num_texts)
    predictor = fit_predictor(corpus, workdir, sample_size=sample_size)

    # Each process loads the predictor once. A row without a score keeps its place, with the reason in score_error.
    scored = corpus.pool.map(ScoreBatch(predictor), batched=True, batch_size=2048, num_proc=num_proc)
    best = scored.sort("score:documentation", reverse=True).select(range(len(scored) // 5))
    best.to_parquet(workdir / "best.parquet")
    return best


if __name__ == "__main__":
    for row in main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/datasets")).select(range(3)):
        print(f"{row['score:documentation']:.5f}  {row['text_id']}  {row['text'][:60]!r}")
