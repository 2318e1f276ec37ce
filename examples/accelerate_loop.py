"""The same under Accelerate: gradient accumulation, several processes, checkpoints by `save_state`.

python examples/accelerate_loop.py runs/accelerate
ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/accelerate_loop.py runs/two    # two processes, without a GPU
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

import oracle
from surrogate import corpora
from surrogate.training import Refresher, Rounds
from surrogate.training.small_models import build_model, train_tokenizer


def main(workdir: Path, *, num_texts: int = 2000, every: int = 25, max_steps: int = 100, sample_size: int = 200) -> Rounds:
    """Train a small model on texts of Python's library that help with its documentation."""
    corpus = corpora.load("python_library", num_texts=num_texts)
    tokenizer = train_tokenizer(corpus.pool["text"][:1000])
    model = build_model("llama", vocabulary_size=len(tokenizer))

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

    # Measured is the model itself, with the optimiser itself, not what Accelerate has put around them.
    lm = oracle.LanguageModel(accelerator.unwrap_model(model), tokenizer, optimizer.optimizer, max_tokens=128)
    options = {"sample_size": sample_size, "num_probe": 32, "max_target_texts": 64, "allow_low_fidelity": True}
    refresher = Refresher(corpus.pool, corpus.targets, workdir=workdir / "influence", strategy="refresh", **options)
    rounds = Rounds(refresher, lm, every=every, batch_size=4, grad_accumulation=2, max_steps=max_steps)

    accelerator.register_for_checkpointing(rounds)
    if (workdir / "checkpoint").exists():
        accelerator.load_state(str(workdir / "checkpoint"))

    model.train()
    for batch in rounds:  # each process gets its part of every batch
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if rounds.completes_step and rounds.step % every == 1:
            accelerator.print(f"step {rounds.step}: loss {loss.item():.3f}", rounds.metrics())
        if rounds.completes_step and rounds.step % 20 == 0:
            accelerator.save_state(str(workdir / "checkpoint"))
    return rounds


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/accelerate"))
