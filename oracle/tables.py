"""Plain-text tables for people: names to the left, figures to the right."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]], *, num_names: int = 1) -> str:
    """Return lines of cells as a table whose columns stand under each other.

    Args:
        lines: The header and the rows, all of the same number of cells.
        num_names: How many columns on the left hold names.
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < num_names else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def figure(value: float | None, *, digits: int = 3) -> str:
    """Return a number with so many digits, or "-" for one that was not measured."""
    return "-" if value is None else f"{value:.{digits}f}"
