"""Small language models from a config and tokenizers trained on the spot, so that nothing has to be downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from oracle.errors import check_at_least, check_choice

if TYPE_CHECKING:
    from torch import nn

ARCHITECTURES = ("llama", "neox")


def train_tokenizer(strings: Iterable[str], *, vocabulary_size: int = 2048) -> Any:
    """Train a byte-level BPE tokenizer; the same strings in the same order give the same tokenizer.

    Args:
        strings: Texts to learn from; a few thousand are enough.
        vocabulary_size: Tokens, at least 257: all bytes and the end-of-text token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    check_at_least("vocabulary_size", vocabulary_size, 257)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(strings, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False)


def build_model(
    architecture: str,
    *,
    vocabulary_size: int,
    width: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    context: int = 512,
    seed: int = 0,
) -> nn.Module:
    """Build a small causal language model with random weights.

    Args:
        architecture: "llama" or "neox".
        vocabulary_size: Rows of the (untied) input and output embeddings.
        width: Size of the hidden state.
        num_layers: Transformer blocks.
        num_heads: Attention heads.
        context: Longest sequence in tokens.
        seed: Decides the weights; the global random state is left alone.
    """
    import torch
    import transformers

    check_choice("architecture", architecture, ARCHITECTURES)
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary_size,
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "max_position_embeddings": context,
        "use_cache": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if architecture == "llama":
        config: Any = transformers.LlamaConfig(**sizes, intermediate_size=width * 8 // 3, tie_word_embeddings=False)
    else:
        config = transformers.GPTNeoXConfig(**sizes, intermediate_size=width * 4, tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config)
