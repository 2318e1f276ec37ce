"""The two pictures of a run, as PNG: loss over training tokens, and scores against held-out labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from oracle.artifacts import atomic_path


def plot_curves(path: Path, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], *, target: str) -> None:
    """Draw target loss over training tokens, one line per selection.

    Args:
        path: The PNG to write.
        curves: Name -> (tokens, losses in nats per token). A curve called "random" also gives a dashed line at its last loss.
        target: Name of the target set.
    """
    figure, axes = _figure()
    for name, (tokens, losses) in curves.items():
        axes.plot(tokens, losses, label=name, linewidth=2)
    if "random" in curves:
        axes.axhline(curves["random"][1][-1], color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel="training tokens after the checkpoint", ylabel="loss (nats per target token)", title=f"target: {target}")
    axes.legend(frameon=False)
    _write(figure, path)


def plot_fidelity(path: Path, scores: np.ndarray, labels: np.ndarray, *, title: str, units: str) -> None:
    """Draw held-out scores (S,) against labels (S,), both as measured."""
    figure, axes = _figure()
    axes.scatter(labels, scores, s=10, alpha=0.5, linewidths=0)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.set(xlabel=f"label ({units})", ylabel=f"held-out score ({units})", title=f"{title}, {len(labels)} held-out texts")
    _write(figure, path)


def _figure() -> tuple:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure, path: Path) -> None:  # type: ignore[no-untyped-def]
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png")
