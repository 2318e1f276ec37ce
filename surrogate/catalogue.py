"""The table of everything that can be chosen by name, read off the plug-ins themselves."""

from __future__ import annotations

from typing import Any

from oracle import plugins

KINDS = {
    "oracle methods": "oracle.methods",
    "encoders": "surrogate.features",
    "surrogates": "surrogate.models",
    "rules": "surrogate.rules",
    "strategies": "surrogate.training.strategies",
}


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Describe every plug-in: summary, paper, cost, limit, options with their defaults and help."""
    return {kind: [plugins.describe(package, name) for name in plugins.names(package)] for kind, package in KINDS.items()}


def as_markdown() -> str:
    """Return the catalogue as the README's table."""
    lines = ["| kind | name | what it does | options (default) |", "|---|---|---|---|"]
    for kind, rows in catalogue().items():
        for row in rows:
            options = ", ".join(f"`{option['name']}` ({option['default']!r})" for option in row["options"])
            lines.append(f"| {kind} | `{row['name']}` | {row['summary']} | {options} |")
    return "\n".join(lines) + "\n"
