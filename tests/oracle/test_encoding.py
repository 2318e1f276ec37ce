"""Which tokens of a chat or completion are predicted, whatever the template and the tokenizer do, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import oracle
from oracle.encoding import IGNORED, encode_texts
from oracle.errors import InputError

MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + (MARKED.split("%}", 1)[1])
)
SENTENCES = ["assistant: the quick brown fox", "user: the lazy dog", "assistant: hi"] * 3
CHAT = [
    {"role": "user", "content": "fox?"},
    {"role": "assistant", "content": "the quick brown fox"},
    {"role": "user", "content": "dog?"},
    {"role": "assistant", "content": "hi"},
]


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer(SENTENCES)


@pytest.fixture
def joining_tokenizer():
    """Its only tokens beyond single bytes stand across the edge of a turn that begins with h."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), ":Ġ", ":Ġh"]
    merges = [(":", "Ġ"), (":Ġ", "h")]
    inner = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.chat_template = PLAIN
    return tokenizer


class SlowTokenizer:
    """A tokenizer without offsets, as one written in Python is."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self.inner, self.chat_template = tokenizer, tokenizer.chat_template

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.apply_chat_template(*args, **kwargs)

    def __call__(self, text: Any, *, return_offsets_mapping: bool = False, **kwargs: Any) -> Any:
        if return_offsets_mapping:
            raise NotImplementedError
        return self.inner(text, **kwargs)


def _encode(rows, tokenizer):
    return encode_texts(oracle.read_texts(rows), tokenizer, max_tokens=512)


def _predicted(text, tokenizer):
    return tokenizer.decode([label for label in text.labels if label != IGNORED])


def test_a_fast_and_a_slow_tokenizer_mark_the_same_tokens(tokenizer):
    tokenizer.chat_template = MARKED.replace("<assistant>", "<eos><assistant>").replace("<{{", "<eos><{{")
    fast, slow = (_encode([{"messages": CHAT}], kind)[0] for kind in (tokenizer, SlowTokenizer(tokenizer)))
    assert fast == slow and _predicted(fast, tokenizer) == "the quick brown fox<eos>hi<eos>"


def test_the_ids_of_a_chat_are_those_of_its_template(tokenizer):
    tokenizer.chat_template = MARKED
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)
    assert _encode([{"messages": CHAT}], tokenizer)[0].input_ids == list(rendered["input_ids"])


def test_a_template_of_plain_text_marks_the_turns_although_a_token_joins_over_their_edge(joining_tokenizer):
    text = _encode([{"messages": CHAT}], joining_tokenizer)[0]
    assert joining_tokenizer.convert_tokens_to_ids(":Ġh") in text.labels
    assert _predicted(text, joining_tokenizer) == ": the quick brown fox\n: hi\n"


@pytest.mark.parametrize("trim", [False, True])
def test_offsets_without_white_space_still_mark_it(tokenizer, trim):
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.chat_template = PLAIN
    text = _encode([{"messages": CHAT}], tokenizer)[0]
    assert _predicted(text, tokenizer) == " the quick brown fox\n hi\n"
    tokenizer.chat_template = PLAIN.replace("\n", " ")
    assert _predicted(_encode([{"messages": CHAT[2:]}], tokenizer)[0], tokenizer) == " hi "


def test_characters_of_several_tokens_are_marked_whole(tokenizer):
    tokenizer.chat_template = MARKED
    chat = [{"role": "user", "content": "é🦊"}, {"role": "assistant", "content": "🦊é"}]
    assert _predicted(_encode([{"messages": chat}], tokenizer)[0], tokenizer) == "🦊é<eos>"


@pytest.mark.parametrize("content", ["hi", "assistant", "0", "1 fox"])
def test_a_chat_that_the_assistant_opens_is_marked_behind_its_role(tokenizer, content):
    tokenizer.chat_template = MARKED
    chat = [{"role": "assistant", "content": content}, {"role": "user", "content": "dog"}]
    assert _predicted(_encode([{"messages": chat}], tokenizer)[0], tokenizer) == f"{content}<eos>"


def test_a_template_that_refuses_a_chat_names_the_text(tokenizer):
    tokenizer.chat_template = STRICT
    rows = [{"messages": CHAT}, {"messages": [{"role": "system", "content": "be brief"}, *CHAT]}]
    text_id = oracle.read_texts(rows)["text_id"][1]
    with pytest.raises(InputError, match=r"System role not supported") as caught:
        _encode(rows, tokenizer)
    assert text_id in caught.value.given and "system" in caught.value.given


def test_a_chat_that_cannot_be_marked_names_the_text(tokenizer, joining_tokenizer):
    tokenizer.chat_template = "{{ messages | length }}" + MARKED
    text_id = oracle.read_texts([{"messages": CHAT}])["text_id"][0]
    with pytest.raises(InputError, match=f"{text_id} as an extension"):
        _encode([{"messages": CHAT}], tokenizer)
    with pytest.raises(InputError, match=f"{text_id} a token stands across"):
        _encode([{"messages": CHAT}], SlowTokenizer(joining_tokenizer))


def test_an_end_token_that_the_tokenizer_appends_does_not_part_prompt_and_completion(tokenizer):
    row = {"prompt": "the quick", "completion": " fox"}
    bare = _encode([row], tokenizer)[0]
    end = ("<eos>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[end])
    assert tokenizer("the")["input_ids"][-1] == tokenizer.eos_token_id
    assert _encode([row], tokenizer)[0] == bare
    own = _encode([{"prompt": "the<eos>", "completion": " fox"}], tokenizer)[0]
    assert own.input_ids.count(tokenizer.eos_token_id) == 1  # the prompt's own stays


def test_a_start_token_that_is_also_the_end_token_stays_before_an_empty_prompt(tokenizer):
    start = ("<eos>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[start])
    text = _encode([{"prompt": "", "completion": "fox"}, {"prompt": "the", "completion": "fox"}], tokenizer)[0]
    assert tokenizer.decode(text.input_ids) == "<eos>fox" and text.labels[0] == IGNORED


def test_token_texts_of_which_only_some_have_labels_are_predicted_whole_where_they_have_none():
    texts = oracle.read_texts([{"input_ids": [1, 2, 3], "labels": [-100, 2, -100]}, {"input_ids": [4, 5], "labels": None}])
    encoded = encode_texts(texts, None, max_tokens=8)
    assert sorted(tuple(text.labels) for text in encoded) == [(-100, 2, -100), (4, 5)]
