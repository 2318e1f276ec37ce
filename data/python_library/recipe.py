"""Recipe of `python_library`: real texts read at run time from the running Python's own standard library.

Every Python carries some ten megabytes of documentation, sources, tables, tests and licences, so a pool of several
thousand real texts of several kinds needs no download, and nothing of it is kept in this project. The target set is
documentation prose of topics that the pool does not hold, so a selection method has something to find:
documentation of other topics among the other kinds.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from surrogate._data.python_library.library import MAX_CHARS, MIN_CHARS, Passage, read_library, read_topics

NUM_RUN_WORDS = 13  # a pool text that shares a run of so many words with the target set is dropped
RUN_STRIDE = 4  # only every fourth run is remembered for finding near-copies, to save memory
SHARES = {
    "documentation": 0.10,
    "docstring": 0.24,
    "code": 0.30,
    "test": 0.16,
    "comment": 0.10,
    "data": 0.05,
    "news": 0.03,
    "license": 0.02,
}
FILLING_KINDS = ("code", "docstring", "test", "comment", "data")  # in this order where a kind has too few texts
TARGET_SHARE = 0.28  # of the documentation passages
MAX_TOPIC_SHARE = 0.2  # of the target set that one topic may hold


def build(
    num_texts: int = 6000,
    seed: int = 0,
    *,
    corrupted_share: float = 0.15,
    library_folder: str | Path | None = None,
    without: Sequence[str] = (),
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Make the pool and the target set `documentation`.

    Args:
        num_texts: Size of the pool; it is smaller where the library has not so many texts.
        seed: Decides which texts are drawn, which topics are held out, and the corruptions.
        corrupted_share: Share of the pool that is replaced by corrupted copies.
        library_folder: The standard library to read; that of the running Python if not given.
        without: Names of folders that are not read, such as `("test", "idlelib")`, which some systems do not install.

    Returns:
        The rows of the pool, and the rows of each target set by name.

    Raises:
        FileNotFoundError: The library has no documentation topics.
    """
    folder = str(library_folder if library_folder is not None else sysconfig.get_path("stdlib"))
    target, spare = _split_topics(read_topics(folder), random.Random(f"{seed}:topics"))
    candidates = {kind: list(passages) for kind, passages in read_library(folder, tuple(sorted(without))).items()}
    candidates["documentation"] += spare
    pool = _draw(candidates, target, num_texts=num_texts, seed=seed)
    pool = _corrupt_some(pool, round(corrupted_share * len(pool)), random.Random(f"{seed}:corruption"))
    random.Random(f"{seed}:order").shuffle(pool)
    return [asdict(passage) for passage in pool], {"documentation": [asdict(passage) for passage in target]}


def _split_topics(topics: dict[str, list[Passage]], rng: random.Random) -> tuple[list[Passage], list[Passage]]:
    """Return the passages of the held-out topics, and those of all others."""
    goal = max(1, round(TARGET_SHARE * sum(map(len, topics.values()))))
    names = sorted(topics)
    rng.shuffle(names)
    target: list[Passage] = []
    spare: list[Passage] = []
    for name in names:
        fits = len(topics[name]) <= min(max(1, MAX_TOPIC_SHARE * goal), goal - len(target))
        (target if fits else spare).extend(topics[name])
    return target, spare


def _letter_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: Sequence[str], *, every: int = 1) -> set[str]:
    """Return the runs of NUM_RUN_WORDS words that start at every `every`-th word."""
    return {" ".join(words[start : start + NUM_RUN_WORDS]) for start in range(0, len(words) - NUM_RUN_WORDS + 1, every)}


def _all_runs(text: str) -> set[str]:
    """Return the runs of a text under both usual meanings of a word: letters and digits, and what stands between spaces."""
    return _runs(_letter_words(text)) | _runs(text.lower().split())


def _draw(candidates: dict[str, list[Passage]], target: Sequence[Passage], *, num_texts: int, seed: int) -> list[Passage]:
    """Draw texts in the shares of their kinds, without near-copies and without any overlap with the target set."""
    held_out = {run for passage in target for run in _all_runs(passage.text)}
    seen_words: set[str] = set()
    seen_runs: set[str] = set()

    def accepted(kind: str) -> Iterator[Passage]:
        passages = sorted(candidates[kind], key=lambda passage: passage.origin)
        random.Random(f"{seed}:{kind}").shuffle(passages)
        for passage in passages:
            words = _letter_words(passage.text)
            runs = _runs(words)
            key = " ".join(words)
            near_copy = key in seen_words or RUN_STRIDE * len(runs & seen_runs) > len(runs) / 2
            if not near_copy and not _all_runs(passage.text) & held_out:
                seen_words.add(key)
                seen_runs.update(_runs(words, every=RUN_STRIDE))
                yield passage

    streams = {kind: accepted(kind) for kind in SHARES}
    pool = [passage for kind, share in SHARES.items() for passage in islice(streams[kind], round(share * num_texts))]
    for kind in FILLING_KINDS:
        pool += islice(streams[kind], max(num_texts - len(pool), 0))
    return pool[:num_texts]


def _shuffled(text: str, rng: random.Random) -> str:
    words = text.split()
    windows = []
    while words:
        length = rng.randint(1, 3)
        windows.append(" ".join(words[:length]))
        words = words[length:]
    rng.shuffle(windows)
    return " ".join(windows)


def _character_noise(text: str, rng: random.Random) -> str:
    share = rng.uniform(0.10, 0.25)
    characters = list(text)
    places = [place for place, character in enumerate(characters) if not character.isspace()]
    for place in rng.sample(places, round(share * len(places))):
        change = rng.choice(("swap", "replace", "drop"))
        if change == "swap" and place + 1 < len(characters):
            characters[place], characters[place + 1] = characters[place + 1], characters[place]
        else:
            characters[place] = rng.choice("abcdefghijklmnopqrstuvwxyz") if change == "replace" else ""
    return "".join(characters)


def _repetition(text: str, rng: random.Random) -> str:
    pieces = [piece.strip() for piece in re.split(r"\n|(?<=[.!?]) ", text)]
    separator = "\n" if "\n" in text else " "
    piece = rng.choice([piece for piece in pieces if len(piece.split()) >= 4] or [" ".join(text.split()[:8])])[: MAX_CHARS // 4]
    return separator.join([piece] * max(3, len(text) // (len(piece) + 1)))


CORRUPTIONS: dict[str, Callable[[str, random.Random], str]] = {
    "shuffled": _shuffled,
    "character_noise": _character_noise,
    "repetition": _repetition,
}


def _corrupt_some(pool: list[Passage], num_corrupted: int, rng: random.Random) -> list[Passage]:
    """Replace some passages by corrupted copies, in equal numbers of each corruption; the originals leave the pool."""
    texts = {passage.text for passage in pool}
    places = [place for place, passage in enumerate(pool) if len(passage.text.split()) >= 2 * NUM_RUN_WORDS]
    rng.shuffle(places)
    pool = list(pool)
    names = sorted(CORRUPTIONS)
    for place in places:
        if num_corrupted == 0:
            break
        name = names[num_corrupted % len(names)]
        text = CORRUPTIONS[name](pool[place].text, rng).strip()
        if len(text) >= MIN_CHARS and text not in texts:
            texts.add(text)
            pool[place] = replace(pool[place], text=text, corruption=name)
            num_corrupted -= 1
    return pool
