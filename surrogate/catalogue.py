"""The table of everything that can be chosen by name, read off the plug-ins themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from oracle import plugins
from oracle.errors import check_choice

KINDS = {
    "oracle methods": "oracle.methods",
    "encoders": "surrogate.features",
    "surrogates": "surrogate.models",
    "rules": "surrogate.rules",
    "strategies": "surrogate.training.strategies",
}
TEXT_WIDTH = 110  # characters of a line


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Describe every plug-in: summary, paper, cost, limit, options with their defaults and help."""
    return {kind: [plugins.describe(package, name) for name in plugins.names(package)] for kind, package in KINDS.items()}


def described(name: str | None) -> dict[str, list[dict[str, Any]]]:
    """Describe the plug-ins called `name`, of whichever kinds; all of them for None.

    Raises:
        InputError: No plug-in is called so.
    """
    if name is None:
        return catalogue()
    check_choice("name", name, sorted({own for package in KINDS.values() for own in plugins.names(package)}))
    return {kind: [plugins.describe(package, name)] for kind, package in KINDS.items() if name in plugins.names(package)}


def as_text(rows_by_kind: Mapping[str, Sequence[Mapping[str, Any]]], *, in_full: bool) -> str:
    """Return descriptions for people: names and summaries, and `in_full` also paper, cost, limit and options."""
    lines = []
    for kind, rows in rows_by_kind.items():
        lines.append(f"{kind}:")
        width = max(len(row["name"]) for row in rows)
        for row in rows:
            lines.append(f"  {row['name']:{width}}  {row['summary']}")
            if in_full:
                parts = [f"{title}: {row[title.lower()]}" for title in ("Paper", "Cost", "Limit") if row[title.lower()]]
                parts += [f"{option['name']} ({option['default']!r}): {option['help']}" for option in row["options"]]
                lines += [
                    line for part in parts for line in wrap(part, TEXT_WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8)
                ]
    if not in_full:
        lines.append("`surrogate methods NAME` has paper, cost, limit and options of one of them.")
    return "\n".join(lines) + "\n"


def as_markdown() -> str:
    """Return the catalogue as the README's table."""
    lines = ["| kind | name | what it does | options (default) |", "|---|---|---|---|"]
    for kind, rows in catalogue().items():
        for row in rows:
            options = ", ".join(f"`{option['name']}` ({option['default']!r})" for option in row["options"])
            lines.append(f"| {kind} | `{row['name']}` | {row['summary']} | {options} |")
    return "\n".join(lines) + "\n"
