"""What holds for every command of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from surrogate import stages
from surrogate.cli import STOPPED, app


def test_a_command_that_is_stopped_from_the_keyboard_says_that_it_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "embed_stage", stop)
    answer = CliRunner().invoke(app, ["embed", str(tmp_path)])
    assert answer.exit_code == STOPPED and not answer.stdout
    assert answer.stderr.splitlines() == [
        "stopped from the keyboard; what is finished is kept, and the same command goes on from there"
    ]


def test_every_command_does_and_keeps_its_own_options() -> None:
    for command in app.registered_commands:
        assert command.callback is not None and hasattr(command.callback, "__wrapped__")
        answer = CliRunner().invoke(app, [command.callback.__name__, "--help"])
        assert answer.exit_code == 0 and str(command.callback.__doc__).split()[0] in answer.stdout
