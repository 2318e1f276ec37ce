"""A plain PyTorch loop that chooses its texts anew every 25 steps, and is resumed exactly when it was killed.

python examples/plain_pytorch.py runs/plain        # killed and started again, it goes on at its last checkpoint
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import oracle
from surrogate import corpora
from surrogate.training import Refresher, Rounds
from surrogate.training.small_models import build_model, train_tokenizer


def main(workdir: Path, *, num_texts: int = 2000, every: int = 25, max_steps: int = 100, sample_size: int = 200) -> Rounds:
    """Train a small model on texts of Python's library that help with its documentation."""
    corpus = corpora.load("python_library", num_texts=num_texts)
    tokenizer = train_tokenizer(corpus.pool["text"][:1000])
    model = build_model("llama", vocabulary_size=len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    lm = oracle.LanguageModel(model, tokenizer, optimizer, max_tokens=128)
    options = {"sample_size": sample_size, "num_probe": 32, "max_target_texts": 64, "allow_low_fidelity": True}
    refresher = Refresher(corpus.pool, corpus.targets, workdir=workdir / "influence", strategy="refresh", **options)
    rounds = Rounds(refresher, lm, every=every, batch_size=8, max_steps=max_steps)

    checkpoint = workdir / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rounds.load_state_dict(state["rounds"])
        torch.set_rng_state(state["random"])

    model.train()
    for batch in rounds:  # refreshes before the first batch of a round
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rounds.step % every == 1:
            print(f"step {rounds.step}: loss {loss.item():.3f}", rounds.metrics())
        if rounds.step % 20 == 0:
            with rounds.paused():  # saving is no training: selecting may cost a share of that
                parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rounds": rounds.state_dict()}
                torch.save({**parts, "random": torch.get_rng_state()}, checkpoint.with_suffix(".partial"))
                checkpoint.with_suffix(".partial").replace(checkpoint)
    return rounds


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/plain"))
