"""Part of `scoring.py`: MiniLM made faster, and whether the ranking stays.

All variants embed the same texts, of different lengths, in turns on one thread. A surrogate is fitted once, on float32
features of other texts; its scores from each variant's features are held against those from float32. Variants whose package
is not installed are left out and named.
"""

from __future__ import annotations

import copy
import shutil
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from scoring_speed import Part, in_turns
from scoring_texts import made_up_labels
from torch import Tensor

import oracle
from surrogate import InfluenceNetwork
from surrogate.features.sentence import Sentence
from surrogate.scoring.scorer import one_thread

BASELINE = "float32, given order"
SORTED = "float32, sorted by length"
BATCH_SIZE = 32
FIT_TEXTS = 600
SHORT_TOKENS = 128
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Forward = Callable[[dict[str, Tensor]], Tensor]


def encoders(strings: Sequence[str], options: Any, folder: Path) -> Part:
    """Measure rows per second of each variant and the rank correlation of its scores with those of float32."""
    order = np.random.default_rng(0).permutation(len(strings))
    fit_rows, rows = order[:FIT_TEXTS], order[FIT_TEXTS : FIT_TEXTS + options.encoder_texts]
    texts = [strings[row] for row in rows]
    module = Sentence(device="cpu")._load()
    variants, left_out = _variants(module, folder)
    jobs: dict[str, Callable[[], np.ndarray]] = {
        name: partial(embed, module, forward, texts, is_sorted=name != BASELINE) for name, forward in variants.items()
    }
    jobs[f"float32, sorted, cut to {SHORT_TOKENS} tokens"] = partial(_cut_short, module, texts)
    with one_thread():
        sample = oracle.read_texts([strings[row] for row in fit_rows])
        features = embed(module, variants[SORTED], sample["text"])
        fitted = InfluenceNetwork().fit(features, made_up_labels(sample, options.targets).values)
        for forward in variants.values():
            embed(module, forward, texts[:BATCH_SIZE])  # warms up
        seconds, made = in_turns(jobs, options.turns)
    scores = {name: fitted.predict(features) for name, features in made.items()}
    table, figures = [], {}
    for name, taken in seconds.items():
        speed = statistics.median(base / mine for base, mine in zip(seconds[BASELINE], taken, strict=True))
        ranks = [float(spearmanr(*columns).statistic) for columns in zip(scores[BASELINE].T, scores[name].T, strict=True)]
        cosine = float((made[BASELINE] * made[name]).sum(axis=1).mean())
        rate = len(texts) / statistics.median(taken)
        figures[name] = {"rows_per_second": rate, "speed": speed, "least_spearman": min(ranks), "mean_cosine": cosine}
        table.append([name, f"{rate:.1f}", f"{speed:.2f}", f"{min(ranks):.4f}", f"{cosine:.4f}"])
    table += [[f"{name}: left out, {reason}", *["-"] * 4] for name, reason in left_out.items()]
    title = (
        f"encoders: MiniLM on {len(texts):,} texts of {np.mean([len(text) for text in texts]):.0f} characters in the mean, one "
        f"core, batches of {BATCH_SIZE}; Spearman of a network's scores with those of {BASELINE}, the least of "
        f"{options.targets} targets"
    )
    header = ["", "rows per second", "times float32", "Spearman", "cosine"]
    return title, header, table, {"variants": figures, "left_out": left_out, "num_texts": len(texts)}


def embed(module: Any, forward: Forward, texts: Sequence[str], *, is_sorted: bool = True) -> np.ndarray:
    """Return unit vectors (N, D) of texts, tokenised and embedded in batches, longest first or as they come."""
    order = np.argsort([-len(text) for text in texts], kind="stable") if is_sorted else np.arange(len(texts))
    features: np.ndarray | None = None
    with torch.inference_mode():
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            batch = torch.nn.functional.normalize(forward(module.preprocess([texts[row] for row in rows])).float(), dim=1)
            features = np.empty((len(texts), batch.shape[1]), dtype=np.float32) if features is None else features
            features[rows] = batch.numpy()
    assert features is not None
    return features


def _cut_short(module: Any, texts: Sequence[str]) -> np.ndarray:
    before = module.max_seq_length
    module.max_seq_length = SHORT_TOKENS
    try:
        return embed(module, _of_module(module), texts)
    finally:
        module.max_seq_length = before


def _of_module(module: Any) -> Forward:
    return lambda inputs: module(inputs)["sentence_embedding"]


def _variants(module: Any, folder: Path) -> tuple[dict[str, Forward], dict[str, str]]:
    """Return how each variant embeds a batch of inputs, and why others are left out."""
    module.eval()
    variants = {BASELINE: _of_module(module), SORTED: _of_module(module)}
    variants["bfloat16, sorted"] = _of_module(copy.deepcopy(module).to(torch.bfloat16))
    left_out = {}
    try:
        variants["int8 of torch (dynamic), sorted"] = _of_module(_quantised(module))
    except (ImportError, AttributeError, RuntimeError) as error:  # torch.ao is being moved to a package of its own
        left_out["int8 of torch"] = str(error)
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        left_out["ONNX in float32 and int8"] = f"not installed: {', '.join(missing)}"
    else:
        variants |= _onnx_variants(module, folder)
    return variants, left_out


def _quantised(module: Any) -> Any:
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will move
        return quantize_dynamic(copy.deepcopy(module), {torch.nn.Linear}, dtype=torch.qint8)


class _Pooled(torch.nn.Module):
    """The transformer and the mean over tokens, as one graph."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (B, D)."""
        states = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, L, D)
        mask = attention_mask[:, :, None].to(states.dtype)
        return (states * mask).sum(dim=1) / mask.sum(dim=1)


def _onnx_variants(module: Any, folder: Path) -> dict[str, Forward]:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    shutil.rmtree(folder / "onnx", ignore_errors=True)
    (folder / "onnx").mkdir(parents=True)
    plain, small = folder / "onnx" / "float32.onnx", folder / "onnx" / "int8.onnx"
    inputs = module.preprocess(["a text", "another one that is longer"])
    names = ("input_ids", "attention_mask")
    dynamic = {name: {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens", min=2, max=512)} for name in names}
    torch.onnx.export(
        _Pooled(module[0].auto_model).eval(),
        tuple(inputs[name] for name in names),
        str(plain),
        input_names=list(names),
        output_names=["pooled"],
        dynamic_shapes=dynamic,
        dynamo=True,
        verbose=False,
    )
    quantize_dynamic(str(plain), str(small), per_channel=True, weight_type=QuantType.QInt8)
    return {"ONNX float32, sorted": _of_onnx(plain), "ONNX int8 (dynamic), sorted": _of_onnx(small)}


def _of_onnx(path: Path) -> Forward:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        given = {name: inputs[name].numpy() for name in ("input_ids", "attention_mask")}
        return torch.from_numpy(session.run(None, given)[0])

    return forward
