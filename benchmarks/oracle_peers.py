"""Products of text gradients with one target's gradient: the engine of `grad_dot` beside kronfluence and bergson.

Every row runs in one process, in turns, on the same model, texts and layers (the linear layers under the base model,
without the output head, as bergson's commands choose them), each with its own loop and its own target gradient. The price of
a further text is the time from the start of one forward pass to that of the next; what a run costs beyond its texts (the
target gradient, set-up, writing) is its fixed part. Both are given over a plain forward and backward pass of one text,
as the median over the turns of a ratio taken within one turn, in the process's own CPU seconds where there is no GPU.

A text's loss is the mean over its tokens and a target's the mean over its texts, for everyone. The peers' values are held
against ours on what each covers, ours against one backward pass per text; the script fails if they differ. A peer that is
not installed is left out and the table says so:

    pip install kronfluence==1.0.1 bergson==2.5.1
    python benchmarks/oracle_peers.py --threads 1
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from setting import arguments, report, start
from torch import Tensor, nn

import oracle
from oracle.encoding import Batch, EncodedText, make_batch
from oracle.gradients.products import GradientProducts, PerTextProducts
from oracle.language_model import LanguageModel
from oracle.target_columns import TargetColumns, prepare_targets
from oracle.targets import read_targets
from surrogate.training.small_models import build_model

PEERS = {"kronfluence": "1.0.1", "bergson": "2.5.1"}  # the releases this was written against
TOLERANCE = 1e-4  # of the largest value
PLAIN = "forward and backward"


@dataclass
class Texts:
    """What everyone measures: the model, the texts in batches of equal size, and one target set."""

    lm: LanguageModel
    train: list[EncodedText]
    target: list[EncodedText]
    columns: TargetColumns
    size: int

    def linear_layers(self, *, head: bool = False) -> list[str]:
        """Names of the linear layers under the base model, or of all of them."""
        root = self.lm.module if head else self.lm.module.base_model
        wanted = {id(module) for module in root.modules() if isinstance(module, nn.Linear)}
        return [name for name, module in self.lm.module.named_modules() if id(module) in wanted]

    def batches(self) -> list[Batch]:
        """The training texts in order."""
        groups = [self.train[first : first + self.size] for first in range(0, len(self.train), self.size)]
        return [make_batch(group, positions=list(range(self.size)), device=self.lm.device) for group in groups]

    def parameters_of(self, modules: list[str], *, biases: bool = True) -> list[str]:
        """Names of the modules' own parameters."""
        return [
            f"{name}.{key}"
            for name in modules
            for key, _ in self.lm.module.get_submodule(name).named_parameters(recurse=False)
            if biases or key != "bias"
        ]

    def share(self, names: list[str]) -> float:
        """Their share of all parameters."""
        sizes = {name: parameter.numel() for name, parameter in self.lm.module.named_parameters()}
        return sum(sizes[name] for name in names) / self.lm.num_parameters

    def products(self, names: list[str], engine: type = GradientProducts) -> np.ndarray:
        """The texts' products with the target's gradient over these parameters: (S,)."""
        directions = self.columns.gradients(self.lm)
        run = engine(self.lm.module, {name: directions[name] for name in names}, self.lm.text_losses)
        products = []
        for batch in self.batches():
            with run:  # anew for every batch, as `grad_dot` does
                products.append(run(batch).products[:, 0].cpu().numpy())
        return np.concatenate(products)


@dataclass
class Row:
    """One way to the values, and what was measured of it.

    Attributes:
        module: The model whose last forward passes in a run are the texts' batches.
        run: Measures all texts; (S,) values, or None where there are none.
        covers: Names of the parameters in the products, as our model has them.
        at_most: Those that it could cover in this model.
        needs: What it takes besides the model, its loss and the texts.
        fit_seconds: What it needs once, before the first run.
        is_product: Whether its values are the plain products.
        seconds: (turns, 2) a further text, and the fixed part.
        difference: The largest over the largest value.
    """

    module: nn.Module
    run: Callable[[], np.ndarray | None]
    covers: list[str] = field(default_factory=list)
    at_most: list[str] = field(default_factory=list)
    needs: str = ""
    fit_seconds: float = 0.0
    is_product: bool = True
    seconds: list[tuple[float, float]] = field(default_factory=list)
    difference: float | None = None


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.splitlines()[0], pool=False)
    parser.add_argument("--architecture", default="neox")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=256, help="tokens per text")
    parser.add_argument("--batch", type=int, default=8, help="texts per batch")
    parser.add_argument("--batches", type=int, default=4, help="batches per run, at least 3")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--target-texts", type=int, default=16)
    parser.add_argument("--training-steps", type=int, default=20, help="steps that the model is trained before")
    options = parser.parse_args()
    if options.batches < 3:
        parser.error(f"--batches {options.batches}: at least 3, so that a further batch can be timed.")
    start(options)
    logging.disable(logging.INFO)
    texts = _prepare(options)
    options.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.workdir) as folder:
        rows = _own_rows(texts)
        missing = {}
        for name, make_rows in {"kronfluence": _kronfluence_rows, "bergson": _bergson_rows}.items():
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                    rows |= make_rows(texts, Path(folder) / name)
            except ImportError as error:
                missing[name] = f"not installed ({error.name}): pip install {name}=={PEERS[name]}"
        _compare(texts, rows)
        _time(texts, rows, options.turns)
    _report(options, texts, rows, missing)
    wrong = {name: row.difference for name, row in rows.items() if row.difference is not None and not row.difference <= TOLERANCE}
    if wrong:
        raise SystemExit(f"values differ by more than {TOLERANCE} of the largest: {wrong}")


def _prepare(options: Any) -> Texts:
    """A model that has learned how frequent its tokens are, and random texts with these frequencies."""
    shape = {"width": options.width, "num_layers": options.layers, "context": options.tokens}
    module = build_model(options.architecture, vocabulary_size=options.vocabulary, **shape)
    lm = LanguageModel(module, max_tokens=options.tokens)
    rng = np.random.default_rng(0)
    frequencies = 1.0 / np.arange(1, options.vocabulary)
    frequencies /= frequencies.sum()

    def rows(count: int) -> list[dict[str, Any]]:
        ids = rng.choice(np.arange(1, options.vocabulary), size=(count, options.tokens), p=frequencies)
        return [{"input_ids": row.tolist()} for row in ids]

    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for _ in range(options.training_steps):
        encoded = lm.encode(rows(options.batch))
        lm.text_losses(make_batch(encoded, positions=list(range(len(encoded))), device=lm.device)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    module.eval()
    target = rows(options.target_texts)
    columns = prepare_targets(lm, read_targets({"t": oracle.read_texts(target)}), halves=False)
    return Texts(lm, lm.encode(rows(options.batch * options.batches)), lm.encode(target), columns, options.batch)


# ---------------------------------------------------------------------- the rows


def _own_rows(texts: Texts) -> dict[str, Row]:
    module, everything = texts.lm.module, [name for name, _ in texts.lm.module.named_parameters()]

    def plain() -> None:
        for batch in texts.batches():
            texts.lm.text_losses(batch).sum().backward()
            module.zero_grad(set_to_none=True)

    linear = texts.parameters_of(texts.linear_layers())
    return {
        PLAIN: Row(module, plain),
        "ours, linear layers": Row(module, partial(texts.products, linear), linear, everything, "nothing"),
        "ours, every parameter": Row(module, partial(texts.products, everything), everything, everything, "nothing"),
    }


def _kronfluence_rows(texts: Texts, folder: Path) -> dict[str, Row]:
    """Pairwise scores with one summed query, of a wrapped copy of the model."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.module.utils import get_tracked_module_names
    from kronfluence.task import Task

    lm = LanguageModel(copy.deepcopy(texts.lm.module), max_tokens=texts.lm.max_tokens)

    class MeanLoss(Task):
        """The sum of the texts' mean losses; the target's share of the mean over all its texts."""

        def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
            assert model is lm.module and not sample
            return lm.text_losses(Batch(batch["input_ids"], batch["labels"], [])).sum()

        def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model) / len(texts.target)

        def get_influence_tracked_modules(self) -> list[str]:
            return texts.linear_layers()

    def as_dataset(encoded: list[EncodedText]) -> list[dict[str, Tensor]]:
        whole = make_batch(encoded, positions=list(range(len(encoded))), device=torch.device("cpu"))
        return [{"input_ids": ids, "labels": labels} for ids, labels in zip(whole.input_ids, whole.labels, strict=True)]

    prepare_model(lm.module, MeanLoss())
    analyzer = Analyzer("peer", lm.module, MeanLoss(), cpu=lm.device.type == "cpu", disable_tqdm=True, output_dir=str(folder))
    train, target = as_dataset(texts.train), as_dataset(texts.target)

    def fit(strategy: str) -> float:
        factors = FactorArguments(strategy=strategy, use_empirical_fisher=True)
        begin = _now()
        analyzer.fit_all_factors(strategy, train, per_device_batch_size=texts.size, factor_args=factors)
        return _now() - begin

    def score(strategy: str) -> np.ndarray:
        analyzer.compute_pairwise_scores(
            scores_name=strategy,
            factors_name=strategy,
            query_dataset=target,
            train_dataset=train,
            per_device_query_batch_size=texts.size,
            per_device_train_batch_size=texts.size,
            score_args=ScoreArguments(aggregate_query_gradients=True),
            overwrite_output_dir=True,
        )
        return analyzer.load_pairwise_scores(strategy)["all_modules"][0].double().numpy()

    def make_row(strategy: str, needs: str) -> Row:
        tracked = get_tracked_module_names(lm.module)
        covers, at_most = texts.parameters_of(tracked), texts.parameters_of(texts.linear_layers(head=True))
        return Row(lm.module, partial(score, strategy), covers, at_most, needs, fit(strategy), strategy == "identity")

    return {
        "kronfluence, identity": make_row("identity", "a wrapped copy, a task, a folder"),
        "kronfluence, ekfac": make_row("ekfac", f"the same, factors of {len(train)} texts"),
    }


def _bergson_rows(texts: Texts, folder: Path) -> dict[str, Row]:
    """Scores against one mean query, with its collectors that keep everything in memory."""
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector, PreprocessConfig, Scorer
    from bergson.score.score_writer import InMemorySequenceScoreWriter

    module = copy.deepcopy(texts.lm.module)
    module.requires_grad_(False)  # as its own set-up leaves a model
    module.get_input_embeddings().requires_grad_(True)
    folder.with_name(f"{folder.name}.part").mkdir()  # where it notes the number of tokens

    def as_dataset(encoded: list[EncodedText]) -> Dataset:
        ids = [text.input_ids for text in encoded]
        return Dataset.from_dict({"input_ids": ids, "length": [len(row) for row in ids]})

    train, target = as_dataset(texts.train), as_dataset(texts.target)

    def collect(data: Dataset, *, biases: bool, **kind: Any) -> Any:
        config = IndexConfig(run_path=str(folder), include_bias=biases, loss_reduction="mean")
        processor = GradientProcessor(include_bias=biases)
        collector = InMemoryCollector(model=module.base_model, cfg=config, processor=processor, data=data, **kind)
        batches = [list(range(first, min(first + texts.size, len(data)))) for first in range(0, len(data), texts.size)]
        CollectorComputer(module, data, collector=collector, batches=batches, cfg=config).run_with_collector_hooks()
        return collector

    def score(*, biases: bool) -> np.ndarray:
        query = collect(target, biases=biases, preprocess_cfg=PreprocessConfig(aggregation="mean")).gradients
        writer = InMemorySequenceScoreWriter(len(train), 1)
        scorer = Scorer(query, list(query), writer, device=texts.lm.device, dtype=torch.float32)
        return collect(train, biases=biases, scorer=scorer).scores[:, 0].double().numpy()

    def make_row(*, biases: bool) -> Row:
        scored = [f"{module.base_model_prefix}.{name}" for name in InMemoryCollector.discover_targets(module.base_model)]
        covers, at_most = texts.parameters_of(scored, biases=biases), texts.parameters_of(texts.linear_layers(head=True))
        return Row(module, partial(score, biases=biases), covers, at_most, "a Dataset, query gradients, a folder")

    return {"bergson": make_row(biases=True), "bergson, no biases (its default)": make_row(biases=False)}


# ---------------------------------------------------------------------- values, times, table


def _compare(texts: Texts, rows: dict[str, Row]) -> None:
    """Hold the peers against ours, and ours against one backward pass per text."""
    for name, row in rows.items():
        if row.covers and row.is_product:
            truth = texts.products(row.covers, PerTextProducts if name.startswith("ours") else GradientProducts)
            with contextlib.redirect_stderr(io.StringIO()):
                row.difference = float(np.abs(row.run() - truth).max() / np.abs(truth).max())


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _time(texts: Texts, rows: dict[str, Row], turns: int) -> None:
    num_batches = len(texts.train) // texts.size
    for turn in range(turns + 1):
        for row in rows.values():
            starts: list[float] = []
            handle = row.module.register_forward_pre_hook(lambda *_, starts=starts: starts.append(_now()))
            begin = _now()
            with contextlib.redirect_stderr(io.StringIO()):
                row.run()
            total = _now() - begin
            handle.remove()
            per_batch = statistics.median(np.diff(starts[-num_batches:]).tolist())
            if turn:  # the first turn warms up
                row.seconds.append((per_batch / texts.size, total - num_batches * per_batch))


def _report(options: Any, texts: Texts, rows: dict[str, Row], missing: dict[str, str]) -> None:
    plain = [unit for unit, _ in rows[PLAIN].seconds]
    figures: dict[str, dict[str, Any]] = {key: {} for key in ("ratio", "fixed_texts", "fit_texts", "coverage", "difference")}
    table = []
    for name, row in rows.items():
        further, fixed = (
            statistics.median(turn[part] / unit for turn, unit in zip(row.seconds, plain, strict=True)) for part in (0, 1)
        )
        cells = [name, f"{1000 * statistics.median(seconds for seconds, _ in row.seconds):.1f}", f"{further:.3f}"]
        if name != PLAIN:
            fit, coverage = row.fit_seconds / statistics.median(plain), texts.share(row.covers)
            cells += [f"{fixed:.1f}", f"{fit:.1f}", f"{coverage:.1%}", f"{texts.share(row.at_most):.1%}"]
            cells += ["other values" if row.difference is None else f"{row.difference:.1e}", row.needs]
            for key, value in zip(figures, (further, fixed, fit, coverage, row.difference), strict=True):
                figures[key][name] = None if value is None else float(f"{value:.4g}")
        table.append(cells + [""] * (9 - len(cells)))
    table += [[name, *[""] * 7, reason] for name, reason in missing.items()]
    report(
        f"{options.architecture}, {texts.lm.num_parameters / 1e6:.1f}M parameters, {options.tokens} tokens, "
        f"batch {options.batch}, 1 target of {options.target_texts} texts, {texts.lm.device.type}",
        ["", "ms per text", "over plain", "fixed, texts", "fit once, texts", "covers", "at most", "difference", "needs"],
        table,
        {
            "benchmark": "oracle_peers",
            "parameters": texts.lm.num_parameters,
            "tokens": options.tokens,
            "batch": options.batch,
            "target_texts": options.target_texts,
            **figures,
            "peers": {name: missing[name] if name in missing else version(name) for name in PEERS},
        },
    )


if __name__ == "__main__":
    main()
