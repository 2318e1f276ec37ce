"""Distils an encoder into a table of token vectors: what `static_embedding` looks up in place of a transformer.

The mean of a text's token vectors is linear in its token counts, so the best table for a sample of texts is a ridge
regression of the encoder's features on them. Most tokens are rare in any sample; the penalty is therefore on the
distance from vectors that are known for all of them: the word vectors of the start table, mapped linearly to where they
fit best. Conjugate gradients solve it without ever making the matrix of all pairs of tokens.

What it is worth was measured on 4,000 real texts (3,600 to fit) with MiniLM as the encoder and `grad_dot` labels of seven
targets for 3,000 of them (ridge, cross-fitted, mean Spearman):

| features | cosine with MiniLM | Spearman with the labels |
|---|---|---|
| MiniLM itself (`sentence`) | 1 | 0.560 |
| MiniLM's word vectors, mean, as they are (`static_embedding`) | 0.125 | 0.649 |
| the same, mapped linearly | 0.666 | 0.628 |
| distilled, mean of tokens | 0.708 | 0.607 |
| distilled, logarithms of counts | 0.716 | 0.601 |
| `hashed_ngrams` | | 0.603 |

The closer to MiniLM, the further from influence, there: distil where the full encoder is the better one for the labels.

Paper: Tulkens and van Dongen 2024, Model2Vec (which takes the encoder's output for each token alone; here it is fitted to texts).
Left out: damped counts, which gain 0.01 of cosine and cost as much as splitting the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle import plugins
from oracle.errors import InputError
from oracle.texts import list_text_ids, read_texts
from surrogate.feature_cache import Encoder, FeatureCache, encode_all
from surrogate.features.static_embedding import PACKAGED_TABLE, StaticEmbedding, Table
from surrogate.option_strings import parse_plugin
from surrogate.predictor import strings_of
from surrogate.splits import grouped_holdout, near_duplicate_groups

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

ENCODERS = "surrogate.features"
RIDGES = (1e-3, 3e-3, 1e-2, 3e-2)
MIN_TEXTS = 100
MAP_RIDGE = 1e-4  # of the linear map, in mean variances of the word vectors
MAX_STEPS = 25  # of conjugate gradients; more change the held-out cosine by less than 0.001
TOLERANCE = 1e-5


def distil(
    texts: Any,
    folder: str | Path,
    *,
    teacher: str | Encoder = "sentence",
    start: str = PACKAGED_TABLE,
    max_tokens: int = 256,
    ridges: Sequence[float] = RIDGES,
    holdout: float = 0.1,
    seed: int = 0,
    cache: FeatureCache | str | Path | None = None,
) -> StaticEmbedding:
    """Learn a table of token vectors from what an encoder makes of a sample of texts.

    Args:
        texts: The sample (anything `read_texts` takes); some thousands, of the pool that will be scored.
        folder: Where the table goes.
        teacher: The encoder that is to be approached, by name or as an object.
        start: Table whose tokenizer and word vectors are begun with: 'minilm', or a folder with a table.
        max_tokens: Where texts are cut.
        ridges: Penalties to choose from, by the cosine on held-out texts.
        holdout: Share of the texts that is held out for that; near-duplicates stay together.
        seed: Decides which.
        cache: Folder (or FeatureCache) with the teacher's features.

    Returns:
        The encoder `StaticEmbedding(table=folder)`. Its `loaded.meta` tells the held-out cosines of the start table (mapped
        linearly) and of the distilled one.

    Raises:
        InputError: Too few texts, or an option out of range.

    Cost:
        The teacher on the texts once; then a minute for 4,000 texts of 250 tokens and 384 columns, and 300 MB.

    Example:
        >>> cheap = surrogate.distilling.distil("pool/*.parquet", "static", cache="features")            # doctest: +SKIP
        >>> surrogate.InfluencePredictor(encoder=cheap, surrogate="ridge").fit(sample, labels)       # doctest: +SKIP
    """
    dataset = read_texts(texts)
    if len(dataset) < MIN_TEXTS:
        raise InputError(f"{len(dataset)} texts to learn a table from.", f"at least {MIN_TEXTS}", "give some thousands.")
    if not ridges or not all(isinstance(value, (int, float)) and value > 0 for value in ridges):
        raise InputError(f"ridges={ridges!r}.", "at least one penalty above 0", "pass ridges=(1e-3, 1e-2), say.")
    encoder: Any = plugins.create(ENCODERS, teacher, {}) if isinstance(teacher, str) else teacher
    known = FeatureCache(cache) if isinstance(cache, (str, Path)) else cache
    wanted = _unit(encode_all([encoder], dataset, known, cost={}))  # (S, D)
    splitter = StaticEmbedding(table=start, max_tokens=max_tokens)
    shares = _token_shares(splitter, dataset)  # (S, V)
    groups = near_duplicate_groups(strings_of(dataset))
    held_out = grouped_holdout(groups, fraction=holdout, seed=seed, keys=list_text_ids(dataset))
    found = {}
    mapped = _mapped(splitter.loaded.vectors, shares[~held_out], wanted[~held_out])
    for ridge in ridges:
        vectors = mapped + _ridge(shares[~held_out], wanted[~held_out] - shares[~held_out] @ mapped, ridge)
        found[ridge] = _cosine(shares[held_out] @ vectors, wanted[held_out])
    best = max(found, key=lambda ridge: (found[ridge], ridge))
    final = _mapped(splitter.loaded.vectors, shares, wanted)
    final += _ridge(shares, wanted - shares @ final, best)
    meta = {
        "teacher": encoder.key(),
        "teacher_fingerprint": encoder.fingerprint(),
        "start": splitter.loaded.fingerprint,
        "max_tokens": max_tokens,
        "num_texts": len(dataset),
        "num_held_out": int(held_out.sum()),
        "ridge": best,
        "held_out_cosine": {
            "linear_map": _cosine(shares[held_out] @ mapped, wanted[held_out]),
            **{f"ridge {ridge:g}": value for ridge, value in found.items()},
        },
        "distilled": True,
    }
    Table(final.astype(np.float32), splitter.loaded.tokenizer, meta).save(Path(folder))
    return StaticEmbedding(table=str(folder), max_tokens=max_tokens)


def distil_stage(
    output: Path,
    pool: Sequence[str] | None,
    *,
    text_column: str,
    limit: int | None,
    teacher: str,
    start: str,
    max_tokens: int,
    cache: Path | None,
    seed: int,
) -> dict[str, Any]:
    """Distil from the command line and return what the table says of itself."""
    from surrogate import corpora

    if not pool:
        raise InputError("no --pool.", "files of texts, or a bundled corpus", "give some thousand texts of what will be scored.")
    name, options = parse_plugin(teacher)
    encoder = distil(
        read_texts(corpora.pool_source(pool), text_column=text_column, limit=limit),
        output,
        teacher=plugins.create(ENCODERS, name, options),
        start=start,
        max_tokens=max_tokens,
        cache=cache,
        seed=seed,
    )
    return {"encoder": f"static_embedding:table={output}", **encoder.loaded.meta}


def _token_shares(splitter: StaticEmbedding, dataset: Any) -> csr_matrix:
    """Return (S, V) float32, the share of each token among those of each text."""
    from scipy.sparse import csr_matrix

    prepared = splitter.prepare(dataset)
    ends = np.append(prepared.starts, len(prepared.token_ids))
    shares = csr_matrix(
        (np.ones(len(prepared.token_ids), dtype=np.float32), prepared.token_ids, ends),
        shape=(len(dataset), len(splitter.loaded.vectors)),
    )
    shares.sum_duplicates()
    shares.data /= np.repeat(np.maximum(np.diff(ends), 1), np.diff(shares.indptr)).astype(np.float32)
    return shares


def _mapped(vectors: np.ndarray, shares: csr_matrix, wanted: np.ndarray) -> np.ndarray:
    """Return word vectors (V, D) under the linear map that brings their means closest to what is wanted."""
    means = shares @ vectors  # (S, E)
    square = means.T @ means
    square[np.diag_indices(len(square))] += MAP_RIDGE * np.trace(square) / len(square)
    return np.asarray(vectors @ np.linalg.solve(square, means.T @ wanted), dtype=np.float32)


def _ridge(shares: csr_matrix, wanted: np.ndarray, penalty: float) -> np.ndarray:
    """Return vectors (V, D) that minimise |shares @ vectors - wanted|^2 + penalty * |vectors|^2, by conjugate gradients."""
    across = shares.T.tocsr()
    vectors = np.zeros((shares.shape[1], wanted.shape[1]), dtype=np.float32)
    residual = across @ wanted
    direction = residual.copy()
    error = begin = np.square(residual).sum(axis=0)  # (D,), each column is solved by itself
    for _ in range(MAX_STEPS):
        image = across @ (shares @ direction) + np.float32(penalty) * direction
        step = error / np.maximum((direction * image).sum(axis=0), np.finfo(np.float32).tiny)
        vectors += step * direction
        residual -= step * image
        before, error = error, np.square(residual).sum(axis=0)
        if (error <= TOLERANCE**2 * begin).all():
            break
        direction = residual + error / np.maximum(before, np.finfo(np.float32).tiny) * direction
    return vectors


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)


def _cosine(found: np.ndarray, wanted: np.ndarray) -> float:
    return float((_unit(found) * wanted).sum(axis=1).mean())
