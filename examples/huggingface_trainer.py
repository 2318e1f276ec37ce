"""The Hugging Face Trainer, choosing its texts anew every 25 steps.

    python examples/huggingface_trainer.py runs/trainer    # run again, it goes on at its last checkpoint

TRL's SFTTrainer takes the same callback; it tokenises the texts itself, so it is given the pool:

    trainer = SFTTrainer(model, args=args, train_dataset=callback.pool, processing_class=tokenizer, callbacks=[callback])
    callback.attach(trainer).train()
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from surrogate import corpora
from surrogate.training import InfluenceCallback
from surrogate.training.small_models import build_model, train_tokenizer


def main(workdir: Path, *, num_texts: int = 2000, every: int = 25, max_steps: int = 100, sample_size: int = 200) -> Trainer:
    """Train a small model on texts of Python's library that help with its documentation."""
    corpus = corpora.load("python_library", num_texts=num_texts)
    tokenizer = train_tokenizer(corpus.pool["text"][:1000])
    model = build_model("llama", vocabulary_size=len(tokenizer))

    callback = InfluenceCallback(
        corpus.pool,
        corpus.targets,
        every=every,
        workdir=workdir / "influence",
        strategy="refresh",
        max_tokens=128,
        sample_size=sample_size,
        num_probe=32,
        max_target_texts=64,
        allow_low_fidelity=True,
    )
    args = TrainingArguments(
        output_dir=str(workdir / "trainer"),
        max_steps=max_steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=10,
        save_steps=20,
        report_to="none",
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=callback.train_dataset,
        data_collator=callback.data_collator,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    callback.attach(trainer)  # so that rounds are reported by the Trainer's own log
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir))
    return trainer


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/trainer"))
