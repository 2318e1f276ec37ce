"""The model's own rating: by the formula, with the tokenizer's own digits, several prompts and whole prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from oracle import plugins
from oracle.errors import InputError
from oracle.methods.self_rating import PROMPTS, token_scores

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs.",
    "How vexingly quick daft zebras jump!",
]


@pytest.fixture
def lm(make_module, make_tokenizer):
    module = make_module("llama", vocab_size=300, max_position_embeddings=512).double()
    return oracle.LanguageModel(module, make_tokenizer(SENTENCES), max_tokens=512)


def rate(lm, texts, **options):
    return oracle.label(lm, texts, method="self_rating", **options)


def test_a_rating_counts_as_far_as_it_stands_out():
    certain, torn, none = [0, 0, 0, 1, 0], [0, 0.5, 0, 0, 0.5], [0.2] * 5
    np.testing.assert_allclose(token_scores(np.array([certain, none])), [4.0, 0.0])
    assert token_scores(np.array([torn]))[0] == pytest.approx(2 * (3 * 0.5) / 4)
    assert token_scores(np.array([[0.1, 0.6, 0.3]]))[0] == pytest.approx(2 * (0.5 + 0.3) / 2)


def test_values_equal_a_plain_loop_over_texts_and_prompts(lm):
    num_ratings, alpha = 4, 0.7
    labels = rate(lm, SENTENCES, num_ratings=num_ratings, alpha=alpha)
    tokenizer = lm.tokenizer
    for number, text in enumerate(SENTENCES):
        scores = []
        for before, after in PROMPTS:
            asked = [part.format(worst=1, best=num_ratings) for part in (before, after)]
            ids = [*tokenizer(asked[0])["input_ids"], *tokenizer(text)["input_ids"], *tokenizer(asked[1])["input_ids"]]
            with torch.no_grad():
                probabilities = lm.module(input_ids=torch.tensor([ids])).logits[0, -1].softmax(0)
            digits = [tokenizer(f"x {rating}")["input_ids"] for rating in range(1, num_ratings + 1)]
            if len(digits[0]) == 3:  # a space of its own comes first
                with torch.no_grad():
                    probabilities = lm.module(input_ids=torch.tensor([[*ids, digits[0][1]]])).logits[0, -1].softmax(0)
            own = [float(probabilities[digit[-1]]) for digit in digits]
            own = [each / sum(own) for each in own]
            best = int(np.argmax(own))
            scores.append((best + 1) * sum(abs(own[best] - each) for each in own) / (num_ratings - 1))
        assert labels.columns["rating_mean"][number] == pytest.approx(np.mean(scores), rel=1e-5)
        assert labels.columns["rating_std"][number] == pytest.approx(np.std(scores), rel=1e-4, abs=1e-7)
        assert labels.values[number, 0] == pytest.approx(np.mean(scores) / (1 + alpha * np.std(scores)), rel=1e-5)
    assert labels.target_names == ["self_rating"] and labels.units == "rating"
    assert np.isnan(labels.halves).all()


def test_a_model_that_is_certain_gives_its_rating_and_one_without_preference_gives_zero(lm, monkeypatch):
    """The two ends of the score, whatever alpha is."""
    method = plugins.create("oracle.methods", "self_rating", {"alpha": 3.0})
    method.prepare(lm, None)
    encoded = lm.encode(SENTENCES)
    for logit, expected in ((1e4, 3.0), (0.0, 0.0)):

        class Certain:
            def __call__(self, input_ids, use_cache, logit=logit):
                logits = torch.zeros(*input_ids.shape, 300)
                for prompt in method.prompts_:
                    logits[..., prompt.ratings[2]] = logit
                return type("Output", (), {"logits": logits})

        with monkeypatch.context() as patch:
            patch.setattr(lm, "module", Certain())
            monkeypatch.setattr(type(lm), "vocabulary_size", 300)
            measured = method.measure(encoded)
        np.testing.assert_allclose(measured.values[:, 0], expected)


def test_disagreement_between_prompts_lowers_the_score(lm):
    plain, lowered = (rate(lm, SENTENCES, alpha=alpha) for alpha in (0.0, 5.0))
    np.testing.assert_array_equal(plain.values[:, 0], plain.columns["rating_mean"])
    assert (plain.columns["rating_std"] > 0).all()
    assert (lowered.values < plain.values).all()
    few = rate(lm, SENTENCES, num_prompts=2)
    assert not np.allclose(few.values, rate(lm, SENTENCES).values)
    assert len(few.meta["facts"]["prompt_tokens"]) == 2


def test_every_prompt_is_another_and_goes_from_worst_to_best(lm):
    assert len(set(PROMPTS)) == len(PROMPTS) >= 3
    for before, after in PROMPTS:
        assert (before + after).count("{worst}") == (before + after).count("{best}") == 1


def test_the_rating_tokens_are_the_tokenizers_digits(lm):
    method = plugins.create("oracle.methods", "self_rating", {"num_ratings": 9})
    method.prepare(lm, None)
    for prompt in method.prompts_:
        assert [lm.tokenizer.decode([token]).strip() for token in prompt.ratings] == list("123456789")


def test_digits_that_are_joined_with_the_space_only_at_times_come_on_a_line_of_their_own(lm, make_tokenizer):
    lm.tokenizer = make_tokenizer(["take 1, 1 or 1 of 7"])
    assert len(lm.tokenizer("is 1")["input_ids"]) < len(lm.tokenizer("is 2")["input_ids"])
    method = plugins.create("oracle.methods", "self_rating", {})
    method.prepare(lm, None)
    for prompt in method.prompts_:
        assert [lm.tokenizer.decode([token]) for token in prompt.ratings] == list("12345")
        assert lm.tokenizer.decode(prompt.behind).endswith("\n")


class HalfBytes:
    """A tokenizer that writes every character as two tokens, the telling one first."""

    eos_token_id = 0
    all_special_ids = (0,)

    def __len__(self):
        return 300

    def __call__(self, text, **options):
        return {"input_ids": [part for char in text.encode() for part in (16 + char % 16, char // 16)]}


def test_a_tokenizer_without_a_token_for_each_digit_is_refused(lm):
    lm.tokenizer = HalfBytes()
    with pytest.raises(InputError, match="does not write every rating from 1 to 5 as one token"):
        plugins.create("oracle.methods", "self_rating", {}).prepare(lm, None)


def test_special_tokens_in_a_text_are_not_shown(lm):
    ids = lm.tokenizer(SENTENCES[0])["input_ids"]
    end = lm.tokenizer.eos_token_id
    labels = rate(lm, [{"input_ids": ids}, {"input_ids": [end, *ids[:4], end, *ids[4:], end]}])
    np.testing.assert_allclose(labels.values[0], labels.values[1], rtol=1e-6)


def test_the_opening_token_of_the_tokenizer_opens_the_prompt_too(lm):
    from tokenizers.processors import TemplateProcessing

    plain = rate(lm, SENTENCES)
    end = lm.tokenizer.eos_token_id
    lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", end)])
    method = plugins.create("oracle.methods", "self_rating", {})
    method.prepare(lm, None)
    assert all(prompt.front[0] == end and prompt.front.count(end) == 1 and end not in prompt.behind for prompt in method.prompts_)
    assert not np.allclose(rate(lm, SENTENCES).values, plain.values)


def test_a_text_that_is_too_long_loses_its_end_and_the_prompt_nothing(lm):
    prompt_tokens = max(rate(lm, SENTENCES[:1]).meta["facts"]["prompt_tokens"])
    lm.max_tokens = prompt_tokens + 10
    ids = lm.tokenizer(SENTENCES[0] * 4)["input_ids"]
    whole, others_begin_alike = (
        rate(lm, [{"input_ids": text}]) for text in (ids, [*ids[: lm.max_tokens - 1], 5])
    )  # the second is cut before the token that differs
    np.testing.assert_array_equal(whole.values, others_begin_alike.values)
    assert whole.columns["cut_for_prompt"][0] == 1.0
    assert rate(lm, [{"input_ids": ids[:10]}]).columns["cut_for_prompt"][0] == 0.0
    assert not np.array_equal(rate(lm, [{"input_ids": [9, *ids[1:]]}]).values, whole.values)


def test_flops_are_those_of_reading_the_text_behind_every_prompt(lm):
    ids = [5] * 20
    labels = rate(lm, [{"input_ids": ids}], num_prompts=3)
    read = 3 * 20 + sum(labels.meta["facts"]["prompt_tokens"])
    assert labels.meta["cost"]["label_flops"] == lm.forward_flops_per_token * read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ratings": 1}, "num_ratings=1"),
        ({"num_ratings": 2.5}, "num_ratings=2.5"),
        ({"num_prompts": 1}, "num_prompts=1"),
        ({"num_prompts": 99}, "num_prompts=99"),
        ({"alpha": -0.1}, "alpha=-0.1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        plugins.create("oracle.methods", "self_rating", options)


def test_what_cannot_be_asked_is_refused(lm):
    short = oracle.LanguageModel(lm.module, lm.tokenizer, max_tokens=20)
    with pytest.raises(InputError, match="leaves none for a text"):
        rate(short, SENTENCES)
    mute = oracle.LanguageModel(lm.module, max_tokens=512)
    with pytest.raises(InputError, match="there is no tokenizer"):
        rate(mute, [{"input_ids": [5, 6]}])
