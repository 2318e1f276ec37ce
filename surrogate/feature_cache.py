"""The feature cache: what an encoder computed for a text is computed once, and found again by text_id.

Layout of a cache folder:

    <encoder.key()>/meta.json               options, fingerprint, dimension and package version
    <encoder.key()>/block-<hash>.ids.json   the text_ids of one block, sorted; written first
    <encoder.key()>/block-<hash>.cost.json  seconds, FLOPs and number of texts that encoding it took
    <encoder.key()>/block-<hash>.npy        their features (rows, D) float32; its existence means complete

A block is named by a hash of its text_ids. Blocks are cut from the sorted missing ids, so a run that was
killed and started again leaves the same files as one that was not, seconds aside. Several processes may fill
one cache: at worst a block is computed twice. Features are gathered from memory-mapped blocks, so that only
the rows asked for are read.

Left out: compression and half precision; removing rows (delete the encoder's folder instead).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Protocol

import numpy as np

from oracle.artifacts import atomic_path, provenance, read_json, timed, write_json
from oracle.errors import InputError, MismatchError, NotFiniteError
from oracle.plugins import options_of
from oracle.progress import track
from oracle.texts import list_text_ids

if TYPE_CHECKING:
    from datasets import Dataset

BLOCK_TEXTS = 1024
SHOWN_IDS = 5  # text_ids named in an error


class Encoder(Protocol):
    """What the cache needs of an encoder; `surrogate.features` has the whole contract."""

    plugin_name: ClassVar[str]
    frozen: ClassVar[bool]
    needs_model: ClassVar[bool]

    def encode(self, texts: Dataset) -> np.ndarray:
        """Return (N, D) float32 features."""

    def key(self) -> str:
        """Return a folder-safe name of the encoder and its options."""

    def fingerprint(self) -> str:
        """Return what identifies everything that the features depend on."""

    def flops(self, texts: Dataset) -> float:
        """Return the floating-point operations that `encode(texts)` counts for."""


class FeatureCache:
    """Features on disk, by encoder and text_id.

    Args:
        folder: Where the cache lives; made when something is first written.

    Example:
        >>> cache = FeatureCache("features")
        >>> X = cache.features(encoder, texts)     # encodes
        >>> X = cache.features(encoder, texts)     # reads
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._indices: dict[str, _Index] = {}

    def features(self, encoder: Encoder, texts: Dataset, *, cost: dict[str, float] | None = None) -> np.ndarray:
        """Return the features of `texts`, encoding only those that are not in the cache.

        Args:
            encoder: Any encoder.
            texts: What `oracle.read_texts` returns; the same text may occur more than once.
            cost: Gets `seconds`, `flops` and `num_encoded` of what had to be encoded added to it.

        Returns:
            (N, D) float32, in the order of `texts`.

        Units:
            `cost["seconds"]` is wall-clock time inside `encode`; `cost["flops"]` is counted, not measured.

        Raises:
            MismatchError: The cache holds features of another state of this encoder.
            NotFiniteError: A feature is NaN or infinite; nothing of its block is kept.
            StorageError: The disk is full; finished blocks stay.
        """
        ids = list_text_ids(texts)
        if not ids:
            return check_features(encoder, encoder.encode(texts), ids)
        index = self._open(encoder)
        first_positions: dict[str, int] = {}
        for position, text_id in enumerate(ids):
            first_positions.setdefault(text_id, position)
        missing = sorted(text_id for text_id in first_positions if text_id not in index.places)
        spent = _no_cost()
        if missing:
            with track(f"features ({encoder.plugin_name})", len(missing)) as tracker:
                for start in range(0, len(missing), BLOCK_TEXTS):
                    block_ids = missing[start : start + BLOCK_TEXTS]
                    rows = texts.select([first_positions[text_id] for text_id in block_ids])
                    block_cost = _no_cost()
                    features = _encode_counted(encoder, rows, ids=block_ids, cost=block_cost)
                    index.add_block(block_ids, features, encoder, cost=block_cost)
                    _add_cost(spent, block_cost)
                    tracker.advance(len(block_ids))
        if cost is not None:
            _add_cost(cost, spent)
        return index.gather(ids)

    def cost(self, encoder: Encoder, text_ids: Collection[str] | None = None) -> dict[str, float]:
        """Return what the features of an encoder that the cache holds took, whichever process made them.

        Args:
            encoder: The encoder.
            text_ids: Those of these texts only, each at the mean of the block that it was computed in; None for all.

        Returns:
            `seconds`, `flops` and `num_encoded`, as `features` counts them; a block that was computed twice counts once.

        Raises:
            MismatchError: The cache holds features of another state of this encoder.
        """
        return self._open(encoder).cost(text_ids)

    def _open(self, encoder: Encoder) -> _Index:
        key = encoder.key()
        index = self._indices.setdefault(key, _Index(self.folder / key))
        index.check(encoder)
        index.scan()
        return index


def encode_all(
    encoders: Sequence[Encoder], texts: Dataset, cache: FeatureCache | None = None, *, cost: dict[str, float] | None = None
) -> np.ndarray:
    """Return the features of several encoders side by side.

    Args:
        encoders: At least one; their columns stand in this order.
        texts: What `oracle.read_texts` returns.
        cache: Where features are looked up and kept; without one everything is encoded.
        cost: Gets `seconds`, `flops` and `num_encoded` (summed over the encoders) added to it.

    Returns:
        (N, sum of D) float32.

    Raises:
        InputError: No encoders, or what `FeatureCache.features` raises.
    """
    if not encoders:
        raise InputError("no encoders.", "at least one encoder", "pass for example encoders=[HashedNgrams()].")
    ids = list_text_ids(texts)
    parts = []
    for encoder in encoders:
        if cache is not None:
            parts.append(cache.features(encoder, texts, cost=cost))
            continue
        spent = _no_cost()
        parts.append(_encode_counted(encoder, texts, ids=ids, cost=spent))
        if cost is not None:
            _add_cost(cost, spent)
    return np.concatenate(parts, axis=1)  # (N, sum of D)


def check_features(encoder: Encoder, features: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    """Return `features` if they are finite float32 with one row per id.

    Raises:
        NotFiniteError: Some are NaN or infinite; their text_ids are named.
    """
    assert features.ndim == 2 and len(features) == len(ids) and features.dtype == np.float32, (
        f"encoder {encoder.plugin_name!r} returned {features.dtype} {features.shape} for {len(ids)} texts"
    )
    broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(broken):
        shown = ", ".join(ids[row] for row in broken[:SHOWN_IDS])
        raise NotFiniteError(
            f"encoder {encoder.plugin_name!r} gave NaN or infinite features for {len(broken)} texts: {shown}"
            f"{', ...' if len(broken) > SHOWN_IDS else ''}.",
            "finite features",
            "look at these texts; leave them out, or use another encoder.",
        )
    return features


class _Index:
    """The blocks of one encoder: which text_id stands in which row of which file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, tuple[int, int]] = {}  # text_id -> (block, row)
        self.blocks: list[Path] = []
        self._known: set[str] = set()
        self._dim: int | None = None

    def check(self, encoder: Encoder) -> None:
        """Refuse a cache that another state of the encoder has filled."""
        path = self.folder / "meta.json"
        if not path.exists():
            return
        meta = read_json(path)
        self._dim = meta["dim"]
        current = encoder.fingerprint()
        if meta["fingerprint"] != current:
            raise MismatchError(
                f"encoder changed since the cache was made: {self.folder} holds features of "
                f"{encoder.plugin_name!r} with fingerprint {meta['fingerprint']}, it now has {current}.",
                "the encoder (weights and version) that filled the cache",
                f"delete {self.folder}, or use a cache in another folder.",
            )

    def scan(self) -> None:
        """Read the ids of blocks that were not seen yet."""
        for path in sorted(self.folder.glob("block-*.npy")):
            if path.name not in self._known:
                self._append(path, read_json(path.with_suffix(".ids.json")))

    def cost(self, text_ids: Collection[str] | None = None) -> dict[str, float]:
        """Add up what the blocks took, or the share in them of some texts."""
        total = _no_cost()
        own = None if text_ids is None else Counter(self.places[text_id][0] for text_id in text_ids if text_id in self.places)
        for number, path in enumerate(self.blocks):
            cost = read_json(path.with_suffix(".cost.json"))
            share = 1.0 if own is None else own[number] / cost["num_encoded"]
            _add_cost(total, {unit: share * value for unit, value in cost.items()})
        return total

    def add_block(self, ids: Sequence[str], features: np.ndarray, encoder: Encoder, *, cost: dict[str, float]) -> None:
        """Write one block; the features come last, since their existence means complete."""
        dim = features.shape[1]
        if self._dim is None:
            write_json(self.folder / "meta.json", _meta(encoder, dim))
            self._dim = dim
        assert dim == self._dim, f"encoder {encoder.plugin_name!r} returned {dim} columns, the cache holds {self._dim}"
        path = self.folder / f"block-{hashlib.sha256(' '.join(ids).encode()).hexdigest()[:16]}.npy"
        write_json(path.with_suffix(".ids.json"), list(ids))
        write_json(path.with_suffix(".cost.json"), cost)
        with atomic_path(path) as partial, partial.open("wb") as file:
            _write_array(file, features)
        if path.name not in self._known:
            self._append(path, ids)

    def gather(self, ids: Sequence[str]) -> np.ndarray:
        """Return (N, D) features, reading each block once."""
        assert self._dim is not None
        places = np.array([self.places[text_id] for text_id in ids], dtype=np.int64)  # (N, 2)
        order = np.argsort(places[:, 0], kind="stable")
        bounds = np.flatnonzero(np.diff(places[order, 0])) + 1
        features = np.empty((len(ids), self._dim), dtype=np.float32)  # (N, D)
        for positions in np.split(order, bounds):
            path = self.blocks[places[positions[0], 0]]
            features[positions] = np.load(path, mmap_mode="r", allow_pickle=False)[places[positions, 1]]
        return features

    def _append(self, path: Path, ids: Sequence[str]) -> None:
        self._known.add(path.name)
        for row, text_id in enumerate(ids):
            self.places.setdefault(text_id, (len(self.blocks), row))
        self.blocks.append(path)


def _meta(encoder: Encoder, dim: int) -> dict[str, Any]:
    options = {name: value if isinstance(value, (str, int, float)) else str(value) for name, value in options_of(encoder).items()}
    return {"encoder": encoder.plugin_name, "options": options, "fingerprint": encoder.fingerprint(), "dim": dim, **provenance()}


def _encode_counted(encoder: Encoder, texts: Dataset, *, ids: Sequence[str], cost: dict[str, float]) -> np.ndarray:
    with timed(lambda seconds: _add_cost(cost, {"seconds": seconds})):
        features = encoder.encode(texts)
    _add_cost(cost, {"flops": encoder.flops(texts), "num_encoded": len(ids)})
    return check_features(encoder, features, ids)


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
    """Write the bytes that `np.save` writes; where the disk is full, `np.save` loses the system's error number."""
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.data)


def _no_cost() -> dict[str, float]:
    return {"seconds": 0.0, "flops": 0.0, "num_encoded": 0.0}


def _add_cost(cost: dict[str, float], spent: dict[str, float]) -> None:
    for name, amount in spent.items():
        cost[name] = cost.get(name, 0.0) + amount
