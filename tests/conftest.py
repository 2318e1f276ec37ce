"""Small language models and texts, made on the spot."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small gain nothing from threads, which wait for each other

import torch

VOCABULARY = 211


def build_module(kind: str, **options: Any) -> torch.nn.Module:
    """A tiny model of an architecture, random but with non-trivial norms and biases, in eval mode."""
    import transformers as tf

    common = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "use_cache": False, **options}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    configs = {
        "neox": lambda: tf.GPTNeoXConfig(**sizes, intermediate_size=64, **common),
        "gpt2": lambda: tf.GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **{"vocab_size": VOCABULARY, "n_positions": 64, "use_cache": False, **options},
        ),
        "llama": lambda: tf.LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=64, **common),
        "mistral": lambda: tf.MistralConfig(
            **sizes, num_key_value_heads=2, head_dim=8, intermediate_size=64, sliding_window=8, **common
        ),
        "qwen2": lambda: tf.Qwen2Config(**sizes, num_key_value_heads=2, intermediate_size=64, **common),
        "qwen3": lambda: tf.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, intermediate_size=64, **common),
        "mixtral": lambda: tf.MixtralConfig(
            **sizes, num_key_value_heads=2, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, **common
        ),
        "qwen2_moe": lambda: tf.Qwen2MoeConfig(
            **sizes,
            num_key_value_heads=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
            **common,
        ),
        "gpt_oss": lambda: tf.GptOssConfig(
            **sizes,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            **common,
        ),
        "llama4": lambda: tf.Llama4TextConfig(
            **sizes,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=32,
            intermediate_size_mlp=32,
            num_local_experts=4,
            pad_token_id=None,
            **common,
        ),
        "mamba": lambda: tf.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, use_cache=False, **options
        ),
        "opt": lambda: tf.OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, **common),
        "gemma": lambda: tf.GemmaConfig(**sizes, num_key_value_heads=2, head_dim=8, intermediate_size=64, **common),
        "gemma2": lambda: tf.Gemma2Config(
            **sizes,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=64,
            sliding_window=64,
            final_logit_softcapping=0.5,
            **common,
        ),
        "gemma3": lambda: tf.Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=8, intermediate_size=64, **common),
        "phi": lambda: tf.PhiConfig(**sizes, intermediate_size=64, **common),
        "cohere": lambda: tf.CohereConfig(**sizes, num_key_value_heads=2, intermediate_size=64, logit_scale=4.0, **common),
    }
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = tf.AutoModelForCausalLM.from_config(configs[kind]())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def token_texts(num_texts: int, *, seed: int, longest: int = 40) -> list[dict[str, Any]]:
    """Texts as token ids of many lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (num_texts,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()} for length in lengths]


def build_tokenizer(texts: list[str]) -> Any:
    """A byte-level tokenizer trained on a few texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY + 89,
        special_tokens=["<eos>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="session")
def make_module() -> Any:
    return build_module


@pytest.fixture(scope="session")
def make_token_texts() -> Any:
    return token_texts


@pytest.fixture(scope="session")
def make_tokenizer() -> Any:
    return build_tokenizer


def train_adamw(
    module: torch.nn.Module, rows: list[dict[str, Any]], *, num_steps: int = 3, lr: float = 1e-3, texts_per_step: int = 1
) -> torch.optim.AdamW:
    """Take a few AdamW steps, so that the optimiser has a real state."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.1)
    for step in range(num_steps):
        for number in range(texts_per_step):
            ids = torch.tensor([rows[(step * texts_per_step + number) % len(rows)]["input_ids"]])
            (module(input_ids=ids, labels=ids).loss / texts_per_step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.fixture(scope="session")
def make_adamw() -> Any:
    return train_adamw


class AllButTheFirstToken(torch.nn.Module):
    """A linear layer that is given the tokens of the whole batch without the first of them, as no rule expects it."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> Any:
        return self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return torch.nn.functional.pad(self.inner(flat[1:]), (0, 0, 1, 0)).reshape(*x.shape[:-1], -1)


@pytest.fixture(scope="session")
def without_first_token() -> Any:
    return AllButTheFirstToken
