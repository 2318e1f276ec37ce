"""Errors in three parts: what was given, what is accepted, what to do.

Every refusal of user input in this project is an `InputError` or one of its children, so a program can
tell the reasons apart by class and a person can act on the text. Invariants of our own are `assert`ed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the caller gave cannot be used.

    Args:
        given: What was given, with its value.
        accepted: What is accepted in its place.
        remedy: What to do now, as an instruction.
    """

    def __init__(self, given: str, accepted: str, remedy: str) -> None:
        self.given, self.accepted, self.remedy = given, accepted, remedy
        super().__init__(f"{given}\n  accepted: {accepted}\n  to do: {remedy}")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str]]:
        """Let process pools and Ray carry the error: an exception is rebuilt from its one text otherwise, which fails."""
        return type(self), (self.given, self.accepted, self.remedy)


class InputTypeError(InputError, TypeError):
    """An argument has the wrong type."""


class MissingFileError(InputError, FileNotFoundError):
    """A file, folder or URL that was named does not exist."""

    def __str__(self) -> str:  # OSError formats its arguments as (errno, text)
        return ValueError.__str__(self)


class MissingPackageError(InputError, ImportError):
    """An optional package is needed; the remedy has the install line."""


class MismatchError(InputError):
    """Stored results were made with other options or inputs than those asked for now."""


class NotFiniteError(InputError):
    """A loss, gradient or feature is NaN or infinite."""


class TooLittleMemoryError(InputError):
    """One text alone does not fit into the device's memory."""


class LowFidelityError(InputError):
    """The surrogate's held-out agreement with the labels is not above chance."""


class StorageError(InputError, OSError):
    """The disk refused a write (full, read-only, quota); what was finished before is intact."""

    def __str__(self) -> str:
        return ValueError.__str__(self)


def closest(name: str, choices: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest of `choices`, or an empty string."""
    match = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def check_choice(option: str, value: object, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        InputError: It is not; the message lists the choices and the closest one.
    """
    names = list(choices)
    if isinstance(value, str) and value in names:
        return value
    hint = closest(value, names) if isinstance(value, str) else ""
    raise InputError(f"{option}={value!r} is not known{hint}.", ", ".join(names), f"choose one of these for {option}.")


def check_at_least(option: str, value: float, minimum: float) -> None:
    """Raise `InputError` unless `value` is a number of at least `minimum` (NaN and bool are refused)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and value >= minimum):
        raise InputError(
            f"{option}={value!r} is too small or not a number.",
            f"a number of at least {minimum:g}",
            f"pass such a value for {option}.",
        )


def check_count(option: str, value: int, minimum: int = 1) -> None:
    """Raise `InputError` unless `value` is a whole number of at least `minimum` (a float is refused, also 2.0)."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise InputError(
            f"{option}={value!r} is too small or not a whole number.",
            f"a whole number of at least {minimum}",
            f"pass such a number for {option}.",
        )
