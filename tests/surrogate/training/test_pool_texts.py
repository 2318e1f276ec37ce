"""The pool's texts as tokens: what is trained on is what is labelled."""

from __future__ import annotations

import pytest
import torch

import oracle
from oracle.encoding import IGNORED
from oracle.errors import InputError
from surrogate.training.pool_texts import PoolTexts, collate

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
FORMATS = {
    "text": [{"text": "one two three"}, {"text": "four"}],
    "completion": [{"prompt": "one two ", "completion": "three"}, {"prompt": "", "completion": "four five"}],
    "chat": [
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
        {"messages": [{"role": "user", "content": "four"}, {"role": "assistant", "content": "five six"}]},
    ],
    "tokens": [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}],
}


@pytest.mark.parametrize("kind", FORMATS)
def test_items_are_the_texts_as_the_oracle_encodes_them(kind, make_module, make_tokenizer):
    pool = oracle.read_texts(FORMATS[kind])
    tokenizer = make_tokenizer(["one two three four five six"])
    tokenizer.chat_template = TEMPLATE
    lm = oracle.LanguageModel(make_module("llama", vocab_size=len(tokenizer)), tokenizer, max_tokens=12)
    texts = PoolTexts(pool, tokenizer, max_tokens=12)
    expected = [{"input_ids": text.input_ids, "labels": text.labels} for text in lm.encode(pool)]
    assert [texts[row] for row in range(2)] == expected and len(texts) == 2
    assert texts.__getitems__([1, 0, 1]) == [expected[1], expected[0], expected[1]]
    assert texts.needs_tokenizer == (kind != "tokens") and texts.separator == tokenizer.eos_token_id


def test_texts_without_a_tokenizer_are_refused_when_they_are_asked_for():
    texts = PoolTexts(oracle.read_texts(["one", "two"]))
    assert texts.separator is None
    with pytest.raises(InputError, match="no tokenizer"):
        texts[0]


def test_a_batch_is_padded_where_no_loss_and_no_attention_is():
    batch = collate([{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "labels": [[IGNORED, 6, 7], [8, IGNORED, IGNORED]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_what_items_say_of_attention_and_positions_is_kept():
    left_padded = {"input_ids": [0, 0, 5, 6], "labels": [IGNORED, IGNORED, 5, 6], "attention_mask": [0, 0, 1, 1]}
    batch = collate([{**left_padded, "position_ids": [0, 0, 0, 1], "text_id": "a"}, {"input_ids": [8], "position_ids": [0]}])
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 5, 6], [8, IGNORED, IGNORED, IGNORED]]  # the second is predicted whole
    assert set(batch) == {"input_ids", "labels", "attention_mask", "position_ids"}
    padded = collate([{"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]}])
    assert padded["labels"].tolist() == [[5, 6, IGNORED, IGNORED]]
    masked = collate([{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}, {"input_ids": [8, 9], "assistant_masks": [0, 1]}])
    assert masked["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    with pytest.raises(InputError, match=r"no input_ids \(text\)"):
        collate([{"text": "a"}])


def test_the_loss_of_a_batch_is_that_of_its_texts(make_module, make_token_texts):
    rows = make_token_texts(4, seed=1)
    module = make_module("llama")
    lm = oracle.LanguageModel(module, max_tokens=64)
    texts = PoolTexts(oracle.read_texts(rows), max_tokens=64)
    with torch.no_grad():
        loss = module(**collate(texts.__getitems__(range(4)))).loss
    weights = torch.tensor([len(row["input_ids"]) - 1.0 for row in rows])
    expected = (torch.from_numpy(lm.losses(rows)) * weights).sum() / weights.sum()
    torch.testing.assert_close(loss, expected)
