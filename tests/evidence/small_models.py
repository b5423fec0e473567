"""Small random transformers models with a word tokenizer, in folders, made from their configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin
from adaptc.delta import LowRank

SCALE = 0.7  # of the adapters
WORDS = [f"w{i}" for i in range(50)]


def write_tokenizer(folder: Path, pad: bool = True) -> None:
    """Write a tokenizer of 52 words: <pad>, <unk>, w0 ... w49."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({w: i for i, w in enumerate(["<pad>", "<unk>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **({"pad_token": "<pad>"} if pad else {}))
    made.save_pretrained(folder)


def write_model(folder: Path, family: str, head: str = "") -> Path:
    """Write a two-layer model of a family (llama, gpt2, bert), weights drawn with a spread that makes gradients."""
    import transformers as t

    torch.manual_seed(7)
    if family == "llama":
        config: Any = t.LlamaConfig(vocab_size=52, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
        kinds: dict[str, Any] = {"": t.LlamaForCausalLM, "classify": t.LlamaForSequenceClassification}
    elif family == "gpt2":
        config = t.GPT2Config(vocab_size=52, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1,
                              eos_token_id=1)
        kinds = {"": t.GPT2LMHeadModel}
    else:
        config = t.BertConfig(vocab_size=52, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                              num_attention_heads=2, max_position_embeddings=64, num_labels=3)
        kinds = {"": t.BertModel, "classify": t.BertForSequenceClassification}
    config.initializer_range = 0.3
    kinds[head](config).save_pretrained(folder)
    write_tokenizer(folder, pad=family != "gpt2")
    return folder


def text(words: int, seed: int) -> str:
    """Return words drawn at random, the first ones more often."""
    g = torch.Generator().manual_seed(seed)
    drawn = (torch.rand(words, generator=g).square() * len(WORDS)).long()
    return " ".join(WORDS[i] for i in drawn.tolist())


def write_rows(path: Path, rows: int, classes: int = 3) -> Path:
    """Write labelled rows of 3 to 12 words, `text TAB label`."""
    lines = [f"{text(3 + i * 7 % 10, 100 + i)}\t{i % classes}" for i in range(rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def drawn(*shape: int, seed: int) -> Tensor:
    """Return normal numbers of a seed, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lora(keys: dict[str, tuple[int, int]], c: float = 1.0) -> Adapter:
    """Return rank-2 factors for parameters of given shapes, b times c and a over c."""
    made = {}
    for i, (key, (m, n)) in enumerate(keys.items()):
        a, b = drawn(2, n, seed=10 + i) * 0.2 / c, drawn(m, 2, seed=20 + i) * 0.2 * c
        made[key] = LowRank(a.float(), b.float(), None, SCALE, (m, n))
    return Adapter(made, {}, Origin("peft"))
