"""A predictor at work: texts in, scores and spreads out, with tokenising apart from encoding.

Everything runs on one thread of the CPU, so that scores do not depend on how many cores a machine has or how many
workers share it: more cores are used by more processes, which is also faster. What could not be scored is told row by row.
"""

from __future__ import annotations

import hashlib
import inspect
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from oracle import plugins
from oracle.artifacts import fingerprint, read_json
from oracle.errors import InputError, MismatchError, MissingFileError, MissingPackageError, StorageError
from oracle.texts import read_texts

if TYPE_CHECKING:
    from datasets import Dataset

    from surrogate.feature_cache import Encoder
    from surrogate.predictor import InfluencePredictor

PredictorLike: TypeAlias = "str | Path | InfluencePredictor | Scorer"

PREDICTOR_FILE = "predictor.json"
SURROGATES = "surrogate.models"
READ_BYTES = 2**20
PROBE_TEXT = "A plain text that any encoder takes."
NOT_THE_TEXTS = (MismatchError, MissingFileError, MissingPackageError, StorageError)


@dataclass(frozen=True)
class PredictorIdentity:
    """What score files keep of a predictor.

    Attributes:
        predictor: A fingerprint of encoders, surrogate, targets and units: equal ones give equal scores.
        encoders: Name and fingerprint of each encoder.
        target_names: C names, in column order.
        units: Units of the scores.
        has_spread: Whether the surrogate tells how far its members disagree.
    """

    predictor: str
    encoders: tuple[dict[str, str], ...]
    target_names: tuple[str, ...]
    units: str
    has_spread: bool


class Scorer:
    """Scores texts with a fitted predictor; its feature cache is not used.

    Attributes:
        predictor: The predictor.
        identity: What score files keep of it.
        flops: Counted floating-point operations of all encoding so far.
        seconds: Seconds in `prepare`, `encode` and `predict` so far.
    """

    def __init__(self, predictor: InfluencePredictor, *, identity: PredictorIdentity | None = None) -> None:
        if not hasattr(predictor, "surrogate_"):
            raise InputError("the predictor has not been fitted.", "a fitted predictor, or its folder", "call fit first.")
        self.predictor = predictor
        self.identity = identity or _identity_of_object(predictor)
        self.flops = 0.0
        self.seconds = {"prepare": 0.0, "encode": 0.0, "predict": 0.0}

    def prepare(self, texts: Dataset) -> list[Any]:
        """Tokenise texts for the encoders that can do so beforehand; another thread may encode meanwhile."""
        start_seconds = time.perf_counter()
        prepared = [self._prepare(encoder, texts) if len(texts) else None for encoder in self.predictor.encoders]
        self.seconds["prepare"] += time.perf_counter() - start_seconds
        return prepared

    def score(self, texts: Dataset, prepared: list[Any] | None = None) -> tuple[np.ndarray, list[str]]:
        """Score texts.

        Args:
            texts: U texts as `oracle.read_texts` returns them.
            prepared: What `prepare` returned for them.

        Returns:
            (U, C) float32 scores, or (U, 2C) scores and spreads, NaN where there is none; and for each text why it has
            none, or nothing.
        """
        num_values = len(self.identity.target_names) * (1 + self.identity.has_spread)
        values = np.full((len(texts), num_values), np.nan, dtype=np.float32)
        reasons = [""] * len(texts)
        if not len(texts):
            return values, reasons
        start_seconds = time.perf_counter()
        try:
            features = self._features(texts, prepared or [None] * len(self.predictor.encoders))  # (U, D)
        except NOT_THE_TEXTS:
            raise
        except InputError as error:
            self._see_that_it_is_the_texts(error)
            return values, [f"refused by the encoder: {error.given}"] * len(texts)
        encoded_seconds = time.perf_counter()
        is_finite = np.isfinite(features).all(axis=1)
        rows = np.flatnonzero(is_finite)
        if len(rows):
            values[rows] = self._predict(features if len(rows) == len(features) else features[rows])
        for row in np.flatnonzero(~is_finite):
            reasons[row] = "features that are not finite"
        for row in rows[~np.isfinite(values[rows]).all(axis=1)]:
            reasons[row] = "a score that is not finite"
        self.seconds["encode"] += encoded_seconds - start_seconds
        self.seconds["predict"] += time.perf_counter() - encoded_seconds
        return values, reasons

    def _prepare(self, encoder: Any, texts: Dataset) -> Any:
        try:
            return encoder.prepare(texts) if hasattr(encoder, "prepare") else None
        except InputError:
            return None  # raised again where the texts are encoded

    def _features(self, texts: Dataset, prepared: list[Any]) -> np.ndarray:
        parts = [self._encode(encoder, texts, piece) for encoder, piece in zip(self.predictor.encoders, prepared, strict=True)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _encode(self, encoder: Encoder, texts: Dataset, prepared: Any) -> np.ndarray:
        if prepared is not None:
            self.flops += prepared.flops
            features = encoder.encode_prepared(prepared)  # type: ignore[attr-defined]
        else:
            self.flops += encoder.flops(texts)
            features = encoder.encode(texts)
        assert features.ndim == 2 and len(features) == len(texts) and features.dtype == np.float32, encoder.plugin_name
        return features

    def _see_that_it_is_the_texts(self, error: InputError) -> None:
        """Raise the error of an encoder that refuses any text, as one with wrong options does."""
        try:
            self._features(read_texts([PROBE_TEXT]), [None] * len(self.predictor.encoders))
        except InputError:
            raise error from None

    def _predict(self, features: np.ndarray) -> np.ndarray:
        surrogate: Any = self.predictor.surrogate_
        if self.identity.has_spread:
            return np.concatenate(surrogate.predict(features, return_spread=True), axis=1)
        return np.asarray(surrogate.predict(features))


@contextmanager
def one_thread() -> Iterator[None]:
    """Run a block on one thread of torch and of the libraries for linear algebra."""
    import torch
    from threadpoolctl import threadpool_limits

    num_threads = torch.get_num_threads()
    with threadpool_limits(1):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)


class WorkClock:
    """Adds up seconds by kind of work, and what a scorer counted since the clock was made or last stopped."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._begin()

    def _begin(self) -> None:
        self.seconds = {"read": 0.0, "write": 0.0}
        self._began_seconds = time.perf_counter()
        self._before, self._flops = dict(self.scorer.seconds), self.scorer.flops

    @contextmanager
    def counting(self, kind: str) -> Iterator[None]:
        """Count the seconds of a block."""
        start_seconds = time.perf_counter()
        yield
        self.seconds[kind] += time.perf_counter() - start_seconds

    def stop(self) -> tuple[dict[str, float], float]:
        """Return seconds by kind of work and FLOPs, and begin anew."""
        before, flops, began_seconds, seconds = self._before, self._flops, self._began_seconds, self.seconds
        self._begin()
        spent = {kind: self._before[kind] - before[kind] for kind in before}
        return {**seconds, **spent, "total": self._began_seconds - began_seconds}, self._flops - flops


def load_scorer(predictor: PredictorLike) -> Scorer:
    """Return the scorer of whatever stands for a predictor; that of a folder is loaded once per process.

    Raises:
        MissingFileError: There is no predictor.
        MismatchError: An encoder's weights are not those of the fit.
    """
    if isinstance(predictor, Scorer):
        return predictor
    if not isinstance(predictor, (str, Path)):
        return Scorer(predictor)
    path = Path(predictor)
    return _load(str(path.resolve()), _changed(path))


def read_identity(predictor: PredictorLike) -> PredictorIdentity:
    """Return the identity of whatever stands for a predictor; the encoders of a folder are not loaded.

    Raises:
        MissingFileError: There is no predictor.
    """
    if not isinstance(predictor, (str, Path)):
        return load_scorer(predictor).identity
    path = Path(predictor)
    return _identity(str(path.resolve()), _changed(path))


def _identity_of_object(predictor: InfluencePredictor) -> PredictorIdentity:
    with tempfile.TemporaryDirectory() as folder:
        predictor.save(Path(folder) / "predictor")
        return read_identity(Path(folder) / "predictor")


def _changed(folder: Path) -> int:
    try:
        return (folder / PREDICTOR_FILE).stat().st_mtime_ns
    except OSError as error:
        raise MissingFileError(
            f"there is no predictor in {folder}.", "a folder that InfluencePredictor.save wrote", "check the path, or fit first."
        ) from error


@lru_cache(maxsize=1)
def _load(folder: str, changed: int) -> Scorer:
    from surrogate.predictor import InfluencePredictor

    return Scorer(InfluencePredictor.load(folder), identity=_identity(folder, changed))


@lru_cache(maxsize=8)
def _identity(folder: str, changed: int) -> PredictorIdentity:
    stored = read_json(Path(folder) / PREDICTOR_FILE)
    digest = hashlib.sha256()
    for part in [Path(folder) / "surrogate", *sorted(Path(folder).glob("encoder-*"))]:
        for path in sorted(part.rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
                with path.open("rb") as file:
                    while data := file.read(READ_BYTES):
                        digest.update(data)
    encoders = tuple({"name": encoder["name"], "fingerprint": encoder["fingerprint"]} for encoder in stored["encoders"])
    names, units = tuple(stored["target_names"]), stored["units"]
    surrogate: Any = plugins.load(SURROGATES, stored["surrogate"])
    has_spread = "return_spread" in inspect.signature(surrogate.predict).parameters
    return PredictorIdentity(
        fingerprint([encoders, stored["surrogate"], names, units, digest.hexdigest()]), encoders, names, units, has_spread
    )
