"""A worker process of the local engine: shards come in on stdin, reports go out on stdout, one JSON object a line.

It is started as `python -m surrogate.scoring.worker` and not forked or spawned from the caller's main module, so that a
script without a main guard and a notebook work alike. When its driver dies its stdin ends, and it ends with it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from oracle import errors
from oracle.errors import InputError
from surrogate.scoring.files import InputFile
from surrogate.scoring.layout import ScoreOptions
from surrogate.scoring.shard import ScoreTask, Shard

LOST_DRIVER = 3  # exit code


def as_line(value: ScoreTask | Shard) -> bytes:
    """Return a task, whose predictor is a folder, or a shard as a line of JSON."""
    return json.dumps(dataclasses.asdict(value), default=str).encode() + b"\n"


def task_of_line(line: str) -> ScoreTask:
    """Return the task of a line."""
    stored = json.loads(line)
    options = {**stored["options"], "columns": tuple(stored["options"]["columns"])}
    return ScoreTask(**{**stored, "options": ScoreOptions(**options)})


def shard_of_line(line: str) -> Shard:
    """Return the shard of a line."""
    stored = json.loads(line)
    return Shard(**{**stored, "file": InputFile(**stored["file"])})


def describe_error(error: BaseException) -> dict[str, Any]:
    """Return an error as JSON-able values: its parts where the caller is to blame, and where it was raised."""
    last = traceback.format_exception_only(error)[-1].strip()
    described: dict[str, Any] = {
        "error": type(error).__name__,
        "text": last,
        "traceback": "".join(traceback.format_exception(error)),
    }
    if isinstance(error, InputError):
        described["parts"] = [error.given, error.accepted, error.remedy]
    return described


def raise_refusal(answer: dict[str, Any]) -> None:
    """Raise the error that `describe_error` described, if the caller is to blame for it."""
    if "parts" in answer:
        raise getattr(errors, answer["error"], InputError)(*answer["parts"])


def serve(send: Callable[[dict[str, Any]], None], lines: SimpleQueue[str]) -> None:
    """Score shards until there are no more.

    Args:
        send: Sends an answer: `{"rows": n}` while a shard goes on, then its report or an error.
        lines: The task, then shards; an empty line ends.
    """
    task = task_of_line(lines.get())
    with ThreadPoolExecutor(1) as executor:
        while line := lines.get():
            scoring = executor.submit(task.score, shard_of_line(line), lambda num_rows: send({"rows": num_rows}))
            error = scoring.exception()  # whatever it is, the driver decides what becomes of it
            if error is not None:
                sys.stderr.writelines(traceback.format_exception(error))
                send(describe_error(error))
            else:
                send({"report": scoring.result().as_dict()})


def main() -> None:
    """Serve over stdin and stdout; what is printed in between goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line.strip())
            if not line.strip():
                return
        os._exit(LOST_DRIVER)

    def send(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer, ensure_ascii=True) + "\n")
        answers.flush()

    threading.Thread(target=listen, daemon=True).start()
    serve(send, lines)


if __name__ == "__main__":
    main()
