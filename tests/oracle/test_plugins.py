"""Plug-ins are found by file name; errors, progress and the rest of the ground floor."""

from __future__ import annotations

import inspect
import io
import sys

import pytest

from oracle import plugins, progress
from oracle.errors import InputError, InputTypeError, MissingFileError, StorageError, check_at_least, check_choice, check_count
from oracle.measure import label


def test_every_file_of_a_plugin_folder_is_one_plugin_of_its_name():
    for package in ("oracle.methods", "surrogate.features", "surrogate.models", "surrogate.rules"):
        for name in plugins.names(package):
            assert plugins.load(package, name).plugin_name == name


def test_options_can_be_read_back_and_unknown_ones_are_refused_with_the_closest():
    made = plugins.create("oracle.methods", "grad_dot", {"similarity": "cosine"})
    assert plugins.options_of(made)["similarity"] == "cosine"
    with pytest.raises(InputError, match="did you mean 'similarity'") as caught:
        plugins.create("oracle.methods", "grad_dot", {"simlarity": "cosine"})
    assert "max_grad_norm" in caught.value.accepted
    with pytest.raises(InputError, match="grad_dot"):
        plugins.load("oracle.methods", "gradient")


@pytest.mark.parametrize("value", ["False", "false", 0, None])
def test_what_is_on_or_off_takes_nothing_but_true_and_false(value):
    with pytest.raises(InputTypeError, match=f"statistics={value!r} of 'grad_dot' is neither") as caught:
        plugins.create("oracle.methods", "grad_dot", {"statistics": value})
    assert caught.value.accepted == "True or False"
    assert plugins.create("oracle.methods", "grad_dot", {"statistics": False}).statistics is False


def test_an_integer_in_the_place_of_a_string_is_its_digits():
    """As the command line reads `hashed_ngrams:word_ngrams=1`."""
    made = plugins.create("surrogate.features", "hashed_ngrams", {"word_ngrams": 1})
    assert made == plugins.create("surrogate.features", "hashed_ngrams", {"word_ngrams": "1"})


def test_a_mistyped_argument_of_label_is_named():
    with pytest.raises(InputError, match="did you mean 'max_target_texts'") as caught:
        plugins.create("oracle.methods", "grad_dot", {"max_target_text": 3})
    assert "arguments of oracle.label itself: block_size" in caught.value.accepted
    own = {name for name, kind in inspect.signature(label).parameters.items() if kind.kind is kind.KEYWORD_ONLY}
    assert own - {"method"} == set(plugins.LABEL_ARGUMENTS)


def test_the_description_has_summary_paper_cost_and_limit():
    described = plugins.describe("oracle.methods", "one_step")
    assert described["summary"].startswith("Loss of each target set") and "2406.06046" in described["paper"]
    assert described["cost"] and "grad_dot" in described["limit"]
    assert {option["name"] for option in described["options"]} == {"max_grad_norm", "text_loss", "subtract_shared"}


def test_errors_have_three_parts_and_fit_the_builtin_classes():
    for kind, builtin in (
        (InputError, ValueError),
        (InputTypeError, TypeError),
        (MissingFileError, FileNotFoundError),
        (StorageError, OSError),
    ):
        error = kind("this.", "that", "do so")
        assert isinstance(error, builtin) and str(error) == "this.\n  accepted: that\n  to do: do so"
    with pytest.raises(InputError, match="did you mean 'top'"):
        check_choice("rule", "topp", ["top", "random"])
    for bad in (True, "3", float("nan"), 0):
        with pytest.raises(InputError):
            check_at_least("size", bad, 1)
    for bad in (True, "3", float("nan"), 0, 2.5, 2.0):
        with pytest.raises(InputError, match="whole number of at least 1"):
            check_count("size", bad)
    check_count("size", 1)


def test_progress_is_a_line_on_stderr_with_rate_and_time_left(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "LINE_INTERVAL_SECONDS", 0.0)
    with progress.track("label", 4) as tracker:
        for _ in range(4):
            tracker.advance()
    lines = stream.getvalue().splitlines()
    assert lines[1].startswith("label: 2/4 texts, ") and lines[1].endswith(" s left")


def test_progress_of_a_short_loop_is_silent_without_a_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.track("label", 4) as tracker:
        tracker.advance(4)
    assert stream.getvalue() == ""
