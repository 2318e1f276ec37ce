"""The short ways of counting against the plain ones."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from surrogate.features import text_stats
from surrogate.features.text_stats import CODE_WORDS, FIRST_SECOND_PERSON, MARKUP, STOP_WORDS, WORD, text_statistics

PLAIN = " \n\tab_1.,'<>/\\htp:w!?-#\x1c\x00"
WIDE = PLAIN + "é—日🎉\u00a0²ΣİB’…"


@pytest.fixture(params=[PLAIN, WIDE], ids=["ascii", "unicode"])
def texts(request):
    choose = random.Random(0)
    odd = ["".join(choose.choice(request.param) for _ in range(choose.randint(0, 80))) for _ in range(2000)]
    return [*odd, "don't 'quoted' x''y I'm", "see http://a <b>c</b> \\frac www.x", "the return of the self you"]


def test_words_are_those_of_the_regular_expression(texts):
    for text in texts:
        assert text_stats._find_words(text) == WORD.findall(text), text


def test_characters_are_counted_alike(texts):
    for text in texts:
        if text.isascii() and text:
            assert text_stats._count_ascii(text.encode()) == text_stats._count_characters(text), text


def test_statistics_of_words_are_those_of_plain_loops(texts):
    for text in texts:
        found, words = text_statistics(text), WORD.findall(text)
        counts, num_words = Counter(word.lower() for word in words), max(1, len(words))
        triples = list(zip(words, words[1:], words[2:], strict=False))
        lowered = {tuple(map(str.lower, triple)) for triple in triples}
        assert found["share_repeated_word_triples"] == (1.0 - len(lowered) / len(triples) if triples else 0.0)
        assert found["share_long_words"] == sum(len(word) >= 8 for word in words) / num_words
        assert found["share_one_char_words"] == sum(len(word) == 1 for word in words) / num_words
        assert found["share_words_seen_once"] == sum(count == 1 for count in counts.values()) / num_words
        assert found["share_capitalised_words"] == sum(word[0].isupper() for word in words) / num_words
        assert found["share_number_words"] == sum(word[0].isdigit() for word in words) / num_words
        for name, listed in (
            ("share_stop_words", STOP_WORDS),
            ("share_first_second_person", FIRST_SECOND_PERSON),
            ("share_code_words", CODE_WORDS),
        ):
            assert found[name] == sum(counts[word] for word in listed) / num_words
        assert found["digits_per_word"] == (sum(map(str.isdigit, text)) / num_words if words else 0.0)
        assert found["tags_per_word"] == (sum(bool(tag) for _, tag, _ in MARKUP.findall(text)) / num_words if words else 0.0)
