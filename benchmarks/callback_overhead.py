"""What the callback costs while it refreshes nothing: training steps per second with it, over those without it.

One small model, trained by the Hugging Face Trainer and by a plain loop on texts that fill their rows, so that every step
costs the same. With the callback (or `Rounds`) a round has `--every` steps, and all but the first go on with the ranking that
stands, of which a rule that looks at no score takes texts. Measured are the steps after the first round: the median of those
within a round, and the median of those that begin one, which count once in a round. Runs with and without take turns in one
process, one going first and then the other, and a figure is the median over the turns of a ratio taken within one turn. Times
are the process's own CPU seconds where there is no GPU (other jobs on the machine then count little), and wall-clock seconds
on a GPU.

    python benchmarks/callback_overhead.py --threads 1
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from setting import arguments, now, report, start
from transformers import Trainer, TrainerCallback, TrainingArguments

import oracle
from surrogate import corpora
from surrogate.training import InfluenceCallback, Refresher, Rounds
from surrogate.training.pool_texts import PoolTexts, collate
from surrogate.training.small_models import build_model, train_tokenizer

NEVER = 10**6  # rounds from one refresh to the next
REFRESHER = {  # chosen by the rule at random, as without: the best texts may be longer ones, which take longer to tokenise
    "sample_size": 60, "num_probe": 16, "max_target_texts": 16, "num_folds": 2, "rule": "random", "refresh_every": NEVER
}  # fmt: skip


class Stamps(TrainerCallback):
    """Notes the time at the end of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note it."""
        self.seconds.append(now())


class World:
    """One pool, one model's shape, and the four ways to train."""

    def __init__(self, options: Any) -> None:
        corpus = corpora.load("python_library")
        pool = oracle.read_texts(corpus.pool)
        self.options, self.targets = options, corpus.targets
        self.tokenizer = train_tokenizer(pool["text"][:2000], vocabulary_size=options.vocabulary)
        encoded = PoolTexts(pool, self.tokenizer, max_tokens=options.tokens).encode(range(len(pool)))
        full = [row for row, text in enumerate(encoded) if len(text.input_ids) == options.tokens]
        self.pool = pool.select(full)
        self.tokens = [{"input_ids": encoded[row].input_ids, "labels": encoded[row].labels} for row in full]
        self.texts = PoolTexts(self.pool, self.tokenizer, max_tokens=options.tokens)
        self.folder = options.workdir / "callback-overhead"

    def model(self) -> torch.nn.Module:
        """Return the model as it is before training."""
        shape = self.options
        return build_model(
            "llama", vocabulary_size=len(self.tokenizer), width=shape.width, num_layers=shape.layers, context=shape.tokens
        )

    def trainer(self, base: Any, *, is_refreshed: bool) -> list[float]:
        """Train by the Trainer on `base`, whose item i is text i; return the time at the end of each step."""
        stamps, callbacks, dataset = Stamps(), [], base
        if is_refreshed:
            callback = InfluenceCallback(
                self.pool,
                self.targets,
                every=self.options.every,
                workdir=self.workdir(),
                max_tokens=self.options.tokens,
                base=None if base is self.texts else base,
                **REFRESHER,
            )
            callbacks, dataset = [callback], callback.train_dataset
        args = TrainingArguments(
            output_dir=str(self.folder / "out"),
            max_steps=self.options.every * self.options.rounds,
            per_device_train_batch_size=self.options.batch,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(
            self.model(),
            args,
            train_dataset=dataset,
            data_collator=collate,
            processing_class=self.tokenizer,
            callbacks=[stamps, *callbacks],
        )
        trainer.train()
        return stamps.seconds

    def loop(self, *, is_refreshed: bool) -> list[float]:
        """Train by a loop of one's own, likewise."""
        model, seconds = self.model(), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        lm = oracle.LanguageModel(model, self.tokenizer, optimizer, max_tokens=self.options.tokens)
        num_steps = self.options.every * self.options.rounds
        if is_refreshed:
            refresher = Refresher(self.pool, self.targets, workdir=self.workdir(), **REFRESHER)
            batches: Any = Rounds(
                refresher, lm, every=self.options.every, batch_size=self.options.batch, max_steps=num_steps, base=self.tokens
            )
        else:
            sampler = torch.utils.data.RandomSampler(self.tokens, num_samples=num_steps * self.options.batch)
            batches = torch.utils.data.DataLoader(self.tokens, batch_size=self.options.batch, sampler=sampler, collate_fn=collate)
        model.train()
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(now())
        return seconds

    def workdir(self) -> Path:
        """Return an empty folder."""
        folder = self.folder / "influence"
        shutil.rmtree(folder, ignore_errors=True)
        return folder


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.splitlines()[0], pool=False)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=128, help="tokens per text")
    parser.add_argument("--batch", type=int, default=8, help="texts per step")
    parser.add_argument("--every", type=int, default=25, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=8)
    options = parser.parse_args()
    start(options)
    world = World(options)
    ways: dict[str, Callable[..., list[float]]] = {
        "Trainer, texts tokenised when read": lambda **given: world.trainer(world.texts, **given),
        "Trainer, texts tokenised in advance": lambda **given: world.trainer(world.tokens, **given),
        "plain loop, texts tokenised in advance": world.loop,
    }
    steps = {name: ([], []) for name in ways}
    for turn in range(options.turns + 1):
        for name, way in ways.items():
            order = (True, False) if turn % 2 else (False, True)
            pair = {flag: _seconds_per_step(way(is_refreshed=flag), options.every) for flag in order}
            if turn:  # the first turn warms up
                for times, flag in zip(steps[name], (True, False), strict=True):
                    times.append(pair[flag])
    shutil.rmtree(world.folder)
    ratios = {name: [without / with_it for with_it, without in zip(*times, strict=True)] for name, times in steps.items()}
    report(
        f"llama, width {options.width}, {options.layers} layers, {options.batch} texts of {options.tokens} tokens a step, rounds "
        f"of {options.every} steps, {len(world.pool)} texts",
        ["", "steps per second without", "with", "with over without (lowest to highest turn)"],
        [
            [
                name,
                *(f"{1 / statistics.median(times):.2f}" for times in reversed(steps[name])),
                f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})",
            ]
            for name, values in ratios.items()
        ],
        {
            "benchmark": "callback_overhead",
            "options": {name: value for name, value in vars(options).items() if name != "workdir"},
            "ratios": {name: round(statistics.median(values), 4) for name, values in ratios.items()},
            "turns": {name: [round(value, 4) for value in values] for name, values in ratios.items()},
        },
    )


def _seconds_per_step(stamps: list[float], every: int) -> float:
    """Seconds per step after the first round, by medians of the steps that begin a round and of those within one."""
    steps = [later - earlier for earlier, later in pairwise(stamps)][every - 1 :]
    begins = [seconds for place, seconds in enumerate(steps) if place % every == 0]
    within = [seconds for place, seconds in enumerate(steps) if place % every]
    return (statistics.median(begins) + (every - 1) * statistics.median(within)) / every


if __name__ == "__main__":
    main()
