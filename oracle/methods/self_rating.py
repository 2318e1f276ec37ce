"""How good the model itself finds a text: it is asked for a rating, and how sure it is counts too. No targets.

SelectIT (Liu et al. 2024, arXiv 2402.16705) asks with several prompts. One prompt's score is the most likely rating
times how far it stands out among the ratings; a text's score is the mean over the prompts, lowered by how much they
disagree. The prompts here are our own. What releases and copies of it got wrong is refused here: token ids of one
model's digits used for all models, one rating prompt repeated, a scale of one rating, and keeping the lowest scores.
Left out: averaging over models of several sizes, and chat templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from oracle.encoding import IGNORED, EncodedText
from oracle.errors import InputError, check_at_least
from oracle.language_model import LanguageModel
from oracle.methods import Measured
from oracle.plugins import option
from oracle.target_columns import TargetColumns

PROMPTS = (  # what stands before the text and after it; {worst} and {best} are the ends of the scale
    (
        "Here is a text that a language model could be trained on.\n\n",
        "\n\nOn a scale from {worst} (teaches nothing) to {best} (teaches a lot), its value for training is",
    ),
    (
        "Read this passage.\n---\n",
        "\n---\nHow clear and well written is it? {worst} is the poorest mark and {best} the finest.\nMark:",
    ),
    (
        "An editor checks texts for mistakes and gives marks from {worst} (useless) to {best} (excellent).\n\nText:\n",
        "\n\nThe editor's mark:",
    ),
    (
        "Question: how useful is the text below to somebody who wants to learn from it?\n\n",
        "\n\nAnswer with one number, where {best} means very useful and {worst} means not at all.\nAnswer:",
    ),
    (
        "Text under review:\n\n",
        "\n\nIs it correct, complete and informative? Points ({worst} = no, {best} = fully):",
    ),
)
MAX_RATINGS = 9  # ratings of one digit


@dataclass(frozen=True)
class _Prompt:
    """A rating prompt in token ids, around a text; one of `ratings` comes next."""

    front: list[int]
    behind: list[int]
    ratings: list[int]

    def __len__(self) -> int:
        return len(self.front) + len(self.behind)


@dataclass(kw_only=True)
class SelfRating:
    """The model's own rating of the text's quality, the same for every target.

    Paper:
        SelectIT, Liu et al. 2024, arXiv 2402.16705.
    Cost:
        One forward pass over the text and a prompt for each of `num_prompts` prompts. No gradients, no targets.
    Limit:
        Where the model puts all probability on one rating, the same for every prompt, the value is that rating; where
        it prefers none, the value is 0.

    Not an influence: it says nothing about a target, long texts and arithmetic are known to be rated higher, and only
    an instruction-tuned model of some size rates with sense. A text that is too long for the prompt loses its end.
    """

    plugin_name: ClassVar[str] = "self_rating"
    needs_optimizer: ClassVar[bool] = False
    uses_optimizer: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = False

    num_ratings: int = option(5, "Ratings go from 1 to this number; each must be one token for the model.")
    alpha: float = option(0.2, "How much disagreement between the prompts lowers the score; 0 takes their plain mean.")
    num_prompts: int = option(len(PROMPTS), f"How many of the {len(PROMPTS)} rating prompts are asked; the cost is proportional.")

    def __post_init__(self) -> None:
        check_at_least("alpha", self.alpha, 0)
        for name, value, allowed in (
            ("num_ratings", self.num_ratings, range(2, MAX_RATINGS + 1)),
            ("num_prompts", self.num_prompts, range(2, len(PROMPTS) + 1)),
        ):
            if not isinstance(value, int) or value not in allowed:
                raise InputError(
                    f"{name}={value!r} cannot be used.",
                    f"a whole number from {allowed[0]} to {allowed[-1]}",
                    f"pass such a number for {name}: one rating is no scale, and one prompt cannot disagree with itself.",
                )

    @property
    def units(self) -> str:
        """Unit of the values."""
        return "rating"

    def prepare(self, lm: LanguageModel, columns: TargetColumns) -> None:
        """Tokenise the prompts and find the tokens of the ratings."""
        self.lm_ = lm
        tokenizer = lm.tokenizer
        if tokenizer is None:
            raise InputError(
                "self_rating asks the model in words, and there is no tokenizer.",
                "a LanguageModel with its tokenizer",
                "pass tokenizer=... to LanguageModel.",
            )
        self.special_ = set(tokenizer.all_special_ids)
        opening = _opening(tokenizer)
        scale = {"worst": 1, "best": self.num_ratings}
        self.prompts_ = []
        for before, after in PROMPTS[: self.num_prompts]:
            behind, ratings = _ratings(tokenizer, after.format(**scale), self.num_ratings)
            self.prompts_.append(_Prompt(opening + _bare(tokenizer, before.format(**scale)), behind, ratings))
        longest = max(map(len, self.prompts_))
        if longest >= lm.max_tokens:
            raise InputError(
                f"the longest rating prompt has {longest} tokens, which leaves none for a text in max_tokens={lm.max_tokens}.",
                f"max_tokens above {longest}",
                "raise max_tokens, or use a model with a longer context.",
            )

    def measure(self, encoded: Sequence[EncodedText]) -> Measured:
        """Ask every prompt about every text."""
        texts = [[token for token in text.input_ids if token not in self.special_] for text in encoded]
        scores = np.zeros((len(encoded), len(self.prompts_)))  # (B, prompts)
        for number, prompt in enumerate(self.prompts_):
            room = self._room(prompt)
            asked = [prompt.front + ids[:room] + prompt.behind for ids in texts]
            scores[:, number] = token_scores(self._probabilities(asked, prompt.ratings))
        mean, spread = scores.mean(1), scores.std(1)
        values = (mean / (1 + self.alpha * spread))[:, None]  # (B, 1)
        smallest_room = min(map(self._room, self.prompts_))
        was_cut = np.array([float(len(ids) > smallest_room) for ids in texts])
        columns = {"rating_mean": mean, "rating_std": spread, "cut_for_prompt": was_cut}
        return Measured(values, np.full((2, *values.shape), np.nan), columns)

    def facts(self) -> dict[str, Any]:
        """How long the prompts are."""
        return {"prompt_tokens": [len(prompt) for prompt in self.prompts_]}

    def prepare_flops(self, columns: TargetColumns) -> float:
        """Counted FLOPs of `prepare`: none."""
        return 0.0

    def flops(self, num_tokens: int, columns: TargetColumns) -> float:
        """Counted FLOPs for one text of `num_tokens`: a forward pass over it and each prompt."""
        read = sum(min(num_tokens, self._room(prompt)) + len(prompt) for prompt in self.prompts_)
        return self.lm_.forward_flops_per_token * read

    def _room(self, prompt: _Prompt) -> int:
        return self.lm_.max_tokens - len(prompt)

    def _probabilities(self, asked: Sequence[list[int]], ratings: list[int]) -> np.ndarray:
        """Return the probabilities of the ratings as the next token, among the ratings alone: (B, K) float64."""
        rows = [EncodedText(str(number), ids, [IGNORED] * len(ids)) for number, ids in enumerate(asked)]
        found = np.zeros((len(asked), len(ratings)))
        with torch.no_grad():
            for batch in self.lm_.batches(rows, packing=False):
                logits = self.lm_.module(input_ids=batch.input_ids, use_cache=False).logits  # (B, L, V)
                last = torch.tensor([len(asked[position]) - 1 for position in batch.positions], device=logits.device)
                chosen = logits[torch.arange(len(last), device=logits.device), last][:, ratings]  # (B, K)
                found[batch.positions] = chosen.double().softmax(1).cpu().numpy()
        return found


def token_scores(probabilities: np.ndarray) -> np.ndarray:
    """Return the most likely rating (1 to K), times its mean distance to the other ratings' probabilities: (B, K) -> (B,)."""
    best = probabilities.argmax(1)
    distances = np.abs(probabilities.max(1)[:, None] - probabilities).sum(1)
    return (best + 1) * distances / (probabilities.shape[1] - 1)


def _bare(tokenizer: Any, string: str) -> list[int]:
    return list(tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])


def _opening(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before every text."""
    whole, bare = list(tokenizer("a", verbose=False)["input_ids"]), _bare(tokenizer, "a")
    start = next((index for index in range(len(whole)) if whole[index : index + len(bare)] == bare), 0)
    return whole[:start]


def _ratings(tokenizer: Any, after: str, num_ratings: int) -> tuple[list[int], list[int]]:
    """Tokenise the prompt's end with every rating behind it; return what all share, and the last token of each.

    The rating comes after a space, or on a new line where a tokenizer joins some digits with the space and others not.

    Raises:
        InputError: They differ in more than the last token.
    """
    for gap in (" ", "\n"):
        ends = [_bare(tokenizer, f"{after}{gap}{rating}") for rating in range(1, num_ratings + 1)]
        behind, ratings = ends[0][:-1], [end[-1] for end in ends]
        if all(end[:-1] == behind for end in ends) and len(set(ratings)) == num_ratings:
            return behind, ratings
    raise InputError(
        f"the tokenizer does not write every rating from 1 to {num_ratings} as one token after {after[-20:]!r}.",
        "a tokenizer with one token for every digit",
        "lower num_ratings, or rate with another model.",
    )
