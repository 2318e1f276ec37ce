"""Which rows of the input files are meant: positions by file, as a selection leaves them and a second pass takes them.

positions/<name>.npy     int64 positions in the input file of that name, rising; no file where none is meant
positions.json           how many there are, and a fingerprint of all of them; written last
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from oracle.artifacts import read_json, write_json

POSITIONS_FOLDER, POSITIONS_FILE = "positions", "positions.json"


class PositionsWriter:
    """Writes positions file by file, in the order of their names.

    Args:
        folder: Where `positions/` and `positions.json` go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_rows = folder, 0
        self._digest = hashlib.sha256()

    def write(self, name: str, positions: np.ndarray) -> None:
        """Add the positions of an input file, rising."""
        path = _path(self.folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, positions.astype("<i8", copy=False))
        self._digest.update(f"{name}\0{len(positions)}\0".encode())
        self._digest.update(positions.astype("<i8", copy=False).tobytes())
        self.num_rows += len(positions)

    def close(self) -> None:
        """Finish: from here on they can be read."""
        write_json(self.folder / POSITIONS_FILE, {"num_rows": self.num_rows, "fingerprint": self._digest.hexdigest()[:16]})


def read_positions(folder: str | Path, name: str) -> np.ndarray:
    """Return the positions of an input file that are meant, rising, (n,) int64; they are mapped, not loaded."""
    path = _path(Path(folder), name)
    return np.load(path, mmap_mode="r") if path.exists() else np.zeros(0, dtype=np.int64)


def positions_fingerprint(folder: str | Path) -> str:
    """Return what identifies all positions of a folder.

    Raises:
        MissingFileError: There are none, or they are not complete.
    """
    return read_json(Path(folder) / POSITIONS_FILE)["fingerprint"]


def among(positions: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return (n,) bool, which of some rising positions are among the wanted ones, which rise too."""
    if not len(positions):
        return np.zeros(0, dtype=bool)
    start, stop = np.searchsorted(wanted, [positions[0], positions[-1] + 1])
    return np.isin(positions, wanted[start:stop], assume_unique=True)


def _path(folder: Path, name: str) -> Path:
    return folder / POSITIONS_FOLDER / f"{name}.npy"
