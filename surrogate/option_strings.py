"""Plug-ins and their options as the command line writes them: `name:option=value,option=value`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from oracle.errors import InputError

PYTHON_WORDS = {"True": True, "False": False, "None": None}  # as people write them; JSON has true, false and null


def parse_plugin(given: str) -> tuple[str, dict[str, Any]]:
    """Split `name:option=value,option=value` into a name and options; values are read as `parse_options` reads them.

    Raises:
        InputError: A part has no `=`.
    """
    name, _, rest = given.partition(":")
    return name, parse_options(rest.split(",") if rest else [])


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Read `option=value` pairs; a value is JSON, or True, False or None as in Python, or else a string.

    Raises:
        InputError: A pair has no `=`.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"the option {pair!r} cannot be read.", "option=value", "write for example max_grad_norm=1.0.")
        options[key.strip()] = _parse_value(value.strip())
    return options


def split_plugins(given: str) -> list[str]:
    """Split `name,name:option=value,option=value,name` into one string per plug-in, each as `parse_plugin` reads it.

    A part that has `=` before any `:` is a further option of the plug-in before it.
    """
    found: list[str] = []
    for part in (piece.strip() for piece in given.split(",")):
        if found and ":" in found[-1] and "=" in part and ":" not in part.partition("=")[0]:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _parse_value(value: str) -> Any:
    if value in PYTHON_WORDS:
        return PYTHON_WORDS[value]
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
