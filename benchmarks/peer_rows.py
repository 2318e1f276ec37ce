"""How kronfluence and bergson are asked for the products that `oracle_peers.py` times: each with its own loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from setting import now
from torch import Tensor, nn

from oracle.encoding import Batch, EncodedText, make_batch
from oracle.gradients.products import GradientProducts
from oracle.language_model import LanguageModel
from oracle.target_columns import TargetColumns


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


def kronfluence_rows(texts: Texts, folder: Path) -> dict[str, Row]:
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
        begin = now()
        analyzer.fit_all_factors(strategy, train, per_device_batch_size=texts.size, factor_args=factors)
        return now() - begin

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


def bergson_rows(texts: Texts, folder: Path) -> dict[str, Row]:
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
