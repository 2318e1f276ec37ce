"""Text statistics: what a person would count about a text before reading it.

Lengths, character classes, word and line shapes, repetition, compressibility, markup. Every column has a
name, so a tree or a linear surrogate on them can be read. Shares lie in [0, 1]; counts and lengths enter
as log(1 + x). English stop words and sentence marks are assumed, not checked.

Assumed and not checked: implementations of zlib compress alike (they differ by far less than texts do).
Left out: anything that needs a tokenizer, a tagger or a model.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from oracle.artifacts import fingerprint
from oracle.plugins import options_of
from oracle.texts import plain_strings

if TYPE_CHECKING:
    from datasets import Dataset

ALGORITHM_VERSION = 1  # raise it whenever the same text would get other features
WORD = re.compile(r"\w+(?:['’]\w+)*")
SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
MARKUP = re.compile(r"(https?://|www\.)|(</?[a-zA-Z][^<>\n]{0,80}>)|(\\[a-zA-Z]+)")
MARKUP_SIGNS = ("<", "\\", "://", "www.")  # without one of them there is no markup
WORD_BYTES = bytes(code if code < 128 and (chr(code).isalnum() or chr(code) in "_'") else ord(" ") for code in range(256))
LINE_ENDS = tuple(".!?;:,)}]\"'”…")
BULLETS = ("-", "*", "•", "+", "#", ">")
LONG_WORD_CHARS = 8
SHORT_LINE_CHARS = 40
WIDE_CHARS = 4096  # code points are classed once each; this many are remembered


def _words(written: str) -> frozenset[str]:
    return frozenset(written.split())


STOP_WORDS = _words(
    """
    a about after all also an and any are as at be because been but by can could do does for from had has have he her his
    how i if in into is it its may more most my no not of on one only or other our out over she should so some such than
    that the their them then there these they this to up was we were what when where which who will with would you your
    """
)
FIRST_SECOND_PERSON = _words(
    """
    i me my mine we us our you your yours i'm i've i'll you're don't
    """
)
CODE_WORDS = _words(
    """
    args async await bool const def elif enum false func impl import int lambda namespace none null private public return
    self static str struct true typedef var void
    """
)
WORD_LISTS = {
    word: tuple(number for number, listed in enumerate((STOP_WORDS, FIRST_SECOND_PERSON, CODE_WORDS)) if word in listed)
    for word in STOP_WORDS | FIRST_SECOND_PERSON | CODE_WORDS
}
CHARACTER_CLASSES: dict[str, frozenset[str]] = {
    "newline": frozenset("\n"),
    "tab": frozenset("\t"),
    "brace": frozenset("{}[]()"),
    "math": frozenset("+-*/=<>^~|%±×÷∑∏∫√∞≤≥≠≈∂∇∈"),
    "quote": frozenset("\"'`“”‘’«»"),
    "comma": frozenset(","),
    "stop": frozenset(".!?"),
    "colon": frozenset(":;"),
    "underscore": frozenset("_"),
    "backslash": frozenset("\\"),
    "dollar": frozenset("$"),
    "hash_or_at": frozenset("#@"),
    "latin_1": frozenset(map(chr, range(0xA0, 0x100))),  # accents, and what wrongly decoded UTF-8 looks like
}
CLASS_NAMES = ("letter", "upper", "digit", "space", "punctuation", "non_ascii", "control", *CHARACTER_CLASSES)


@dataclass(kw_only=True)
class TextStats:
    """Interpretable counts and shares: lengths, character classes, repetition, compressibility, markup.

    Paper:
        Rae et al. 2021, Gopher (repetition and word filters), appendix A; the rest is common practice.
    Cost:
        No model. About 4,500 texts of 1 kB a second on one core.
    Limit:
        Texts that differ only in which words of one length they use get nearly the same features.
    """

    plugin_name: ClassVar[str] = "text_stats"
    frozen: ClassVar[bool] = True
    needs_model: ClassVar[bool] = False
    needs_words: ClassVar[bool] = True

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What each column holds."""
        return FEATURE_NAMES

    def encode(self, texts: Dataset) -> np.ndarray:
        """Count.

        Args:
            texts: What `oracle.read_texts` returns, in any format but token ids.

        Returns:
            (N, D) float32, one column per name in `feature_names`.
        """
        features = np.zeros((len(texts), len(FEATURE_NAMES)), dtype=np.float32)  # (N, D)
        for row, string in enumerate(plain_strings(texts) if len(texts) else []):
            features[row] = list(text_statistics(string).values())
        return features

    def key(self) -> str:
        """Return a folder-safe name for the encoder and its options."""
        return f"{self.plugin_name}-{fingerprint(options_of(self))}"

    def fingerprint(self) -> str:
        """Return what the features depend on: the names of the columns and the version of the algorithm."""
        return fingerprint({"algorithm": ALGORITHM_VERSION, "columns": FEATURE_NAMES})

    def flops(self, texts: Dataset) -> float:
        """Return 0: counting is negligible beside any language model."""
        return 0.0


def text_statistics(string: str) -> dict[str, float]:
    """Return all statistics of one text by name, always in the same order."""
    words = _find_words(string)
    characters, num_digits = _character_statistics(string)
    return {
        **characters,
        **_word_statistics(words, is_ascii=string.isascii()),
        **_line_statistics(string),
        **_markup_statistics(string, words, num_digits),
    }


def _find_words(string: str) -> list[str]:
    """Return what `WORD` finds; plain text is cut at what stands between words, which is three times as fast."""
    if not string.isascii():
        return WORD.findall(string)
    runs = string.encode().translate(WORD_BYTES).decode().split()
    if "'" not in string:
        return runs
    return [word for run in runs for word in (WORD.findall(run) if "'" in run else (run,))]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _entropy_bits(counts: Sequence[int]) -> float:
    total = sum(counts)
    return math.log2(total) - sum([count * math.log2(count) for count in counts]) / total if total else 0.0


def _mean_and_spread(values: Sequence[int]) -> tuple[float, float]:
    if not values:
        return 0.0, 0.0
    mean = sum(values) / len(values)
    return mean, math.sqrt(max(0.0, sum([value * value for value in values]) / len(values) - mean * mean))


@lru_cache(maxsize=WIDE_CHARS)
def _classes_of(character: str) -> tuple[int, ...]:
    """Return the indices in `CLASS_NAMES` of the classes that a character belongs to."""
    is_word_like = character.isalnum() or character.isspace()
    member = [
        character.isalpha(),
        character.isupper(),
        character.isdigit(),
        character.isspace(),
        not is_word_like,
        not character.isascii(),
        character == "\ufffd" or not (character.isprintable() or character.isspace()),
        *(character in members for members in CHARACTER_CLASSES.values()),
    ]
    return tuple(index for index, belongs in enumerate(member) if belongs)


def _character_statistics(string: str) -> tuple[dict[str, float], int]:
    """Return statistics of characters, and how many digits there are."""
    data = string.encode("utf-8", "surrogatepass")
    counts, totals = _count_ascii(data) if string.isascii() else _count_characters(string)
    statistics = {"log_chars": math.log1p(len(string)), "bytes_per_char": _share(len(data), len(string))}
    statistics |= {f"share_{name}": _share(total, len(string)) for name, total in zip(CLASS_NAMES, totals, strict=True)}
    statistics["share_upper_of_letters"] = _share(totals[1], totals[0])
    statistics["char_entropy_bits"] = _entropy_bits(counts)
    statistics["zlib_ratio"] = _share(len(zlib.compress(data, 6)), len(data))
    return statistics, totals[CLASS_NAMES.index("digit")]


def _count_characters(string: str) -> tuple[list[int], list[int]]:
    """Return the count of each different character, in the order in which they come, and of each class."""
    counts = Counter(string)
    totals = [0] * len(CLASS_NAMES)
    for character, count in counts.items():
        for index in _classes_of(character):
            totals[index] += count
    return list(counts.values()), totals


def _count_ascii(data: bytes) -> tuple[list[int], list[int]]:
    """Return what `_count_characters` returns, for bytes that are ASCII, in half the time."""
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=128)
    order = sorted(np.flatnonzero(counts).tolist(), key=data.index)
    return counts[order].tolist(), (counts @ _ascii_classes()).tolist()


@lru_cache(maxsize=1)
def _ascii_classes() -> np.ndarray:
    """Return which classes each ASCII character belongs to, (128, number of classes)."""
    classes = np.zeros((128, len(CLASS_NAMES)), dtype=np.int64)
    for code in range(128):
        classes[code, list(_classes_of(chr(code)))] = 1
    return classes


def _word_statistics(words: list[str], *, is_ascii: bool) -> dict[str, float]:
    num_words = len(words)
    lowered = " ".join(words).lower().split(" ") if is_ascii and words else [word.lower() for word in words]
    counts = Counter(lowered)
    repeats = list(counts.values())
    lengths = list(map(len, words))
    length_counts = Counter(lengths)
    mean_chars, std_chars = _mean_and_spread(lengths)
    num_triples = max(0, num_words - 2)
    listed = [0, 0, 0]
    for word in WORD_LISTS.keys() & counts.keys():
        for number in WORD_LISTS[word]:
            listed[number] += counts[word]
    starts = "".join([word[0] for word in words])
    return {
        "log_words": math.log1p(num_words),
        "mean_word_chars": mean_chars,
        "std_word_chars": std_chars,
        "log_longest_word_chars": math.log1p(max(lengths, default=0)),
        "share_long_words": _share(sum(n for length, n in length_counts.items() if length >= LONG_WORD_CHARS), num_words),
        "share_one_char_words": _share(length_counts[1], num_words),
        "type_token_ratio": _share(len(counts), num_words),
        "root_type_token_ratio": _share(len(counts), math.sqrt(num_words)),
        "share_words_seen_once": _share(repeats.count(1), num_words),
        "word_entropy_bits": _entropy_bits(repeats),
        "share_top_word": _share(max(repeats, default=0), num_words),
        "share_repeated_word_triples": 1.0 - len(set(zip(lowered, lowered[1:], lowered[2:], strict=False))) / num_triples
        if num_triples
        else 0.0,
        "share_stop_words": _share(listed[0], num_words),
        "share_first_second_person": _share(listed[1], num_words),
        "share_code_words": _share(listed[2], num_words),
        "share_capitalised_words": _share(sum(map(str.isupper, starts)), num_words),
        "share_number_words": _share(sum(map(str.isdigit, starts)), num_words),
    }


def _line_statistics(string: str) -> dict[str, float]:
    lines = string.split("\n") if string else []
    filled = [stripped for line in lines if (stripped := line.strip())]
    num_filled = len(filled)
    lengths = list(map(len, filled))
    mean_chars, std_chars = _mean_and_spread(lengths)
    num_indented = sum(line[0] in " \t" and not line.isspace() for line in lines if line)
    return {
        "log_lines": math.log1p(len(lines)),
        "log_mean_line_chars": math.log1p(mean_chars),
        "log_std_line_chars": math.log1p(std_chars),
        "share_empty_lines": _share(len(lines) - num_filled, len(lines)),
        "share_short_lines": _share(sum(length < SHORT_LINE_CHARS for length in lengths), num_filled),
        "share_indented_lines": _share(num_indented, num_filled),
        "share_duplicate_lines": 1.0 - _share(len(set(filled)), num_filled) if filled else 0.0,
        "share_lines_end_in_punctuation": _share(sum(line.endswith(LINE_ENDS) for line in filled), num_filled),
        "share_bullet_lines": _share(sum(line.startswith(BULLETS) for line in filled), num_filled),
        "share_lines_start_upper": _share(sum(line[0].isupper() for line in filled), num_filled),
    }


def _markup_statistics(string: str, words: list[str], num_digits: int) -> dict[str, float]:
    marks = Counter(SENTENCE_END.findall(string))
    num_sentences = sum(marks.values())
    matches = MARKUP.findall(string) if any(sign in string for sign in MARKUP_SIGNS) else []
    num_words = len(words)
    return {
        "share_questions": _share(marks["?"], num_sentences),
        "share_exclamations": _share(marks["!"], num_sentences),
        "log_words_per_sentence": math.log1p(num_words / max(1, num_sentences)),
        "digits_per_word": _share(num_digits, num_words),
        "log_urls": math.log1p(sum(bool(url) for url, _, _ in matches)),
        "tags_per_word": _share(sum(bool(tag) for _, tag, _ in matches), num_words),
        "backslash_commands_per_word": _share(sum(bool(command) for _, _, command in matches), num_words),
        "ellipses_per_word": _share(string.count("...") + string.count("…"), num_words),
    }


FEATURE_NAMES: tuple[str, ...] = tuple(text_statistics(""))
