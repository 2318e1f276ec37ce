"""Errors in three parts: they say all of them, and keep them when they are carried to another process."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest

from oracle import errors
from oracle.errors import InputError, MissingFileError, check_at_least, check_choice, check_count

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, InputError)]


def refuse(kind):
    raise kind("given", "accepted", "remedy")


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_keeps_its_class_its_parts_and_its_text_when_it_is_pickled(kind):
    error = kind("given", "accepted", "remedy")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind and str(again) == str(error) == "given\n  accepted: accepted\n  to do: remedy"
        assert (again.given, again.accepted, again.remedy) == ("given", "accepted", "remedy")


def test_a_process_pool_hands_the_error_of_a_worker_to_the_caller():
    with ProcessPoolExecutor(1) as pool:
        with pytest.raises(MissingFileError) as raised:
            pool.submit(refuse, MissingFileError).result()
        assert raised.value.remedy == "remedy"
        assert pool.submit(len, "the pool goes on").result() == 16


def test_a_child_with_parts_of_its_own_is_carried_too():
    class LocalError(InputError):
        """A class that no module names is copied all the same."""

    assert copy.copy(LocalError("a", "b", "c")).remedy == "c"


def test_choices_and_numbers_are_checked():
    assert check_choice("rule", "top", ["top", "random"]) == "top"
    with pytest.raises(InputError, match="did you mean 'top'"):
        check_choice("rule", "topp", ["top", "random"])
    for value in (0, True, float("nan"), "2"):
        with pytest.raises(InputError, match="at least 1"):
            check_at_least("rate", value, 1)
    for value in (0, True, 2.0):
        with pytest.raises(InputError, match="whole number"):
            check_count("steps", value)
