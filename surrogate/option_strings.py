"""Plug-ins and their options as the command line writes them: `name:option=value,option=value`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from oracle.errors import InputError


def parse_plugin(given: str) -> tuple[str, dict[str, Any]]:
    """Split `name:option=value,option=value` into a name and options; values are read as JSON where they are JSON.

    Raises:
        InputError: A part has no `=`.
    """
    name, _, rest = given.partition(":")
    return name, parse_options(rest.split(",") if rest else [])


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Read `option=value` pairs.

    Raises:
        InputError: A pair has no `=`.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"the option {pair!r} cannot be read.", "option=value", "write for example max_grad_norm=1.0.")
        try:
            options[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[key.strip()] = value
    return options
