"""A model folder whose model says what it is told to: which token comes next depends on the position alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np

import chat_templates
import tiny_gpt_oss
from core import axes, checkpoint
from core.config import GPT2Config

CONTEXT = 512


def write(folder: Path, family: str, *, says: str, after: int, **settings: Any) -> None:
    """Writes a chat model that continues a prompt of `after` tokens with `says`, special tokens written out.

    It stops where generation_config.json says so: gpt-oss's has what ends a turn and what calls a tool.
    """
    tokenizer = chat_templates.tokenizer(family)
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size,
        n_positions=CONTEXT,
        n_embd=CONTEXT,
        n_layer=1,
        n_head=1,
        n_inner=8,
        tie_word_embeddings=False,
    )
    weights = {
        name: np.zeros(axes.shape(word, config.axes), np.float32)
        for name, word in config.tensors().items()
    }
    weights["wpe.embedding"] += 10 * np.eye(CONTEXT, dtype=np.float32)
    weights["ln_f.scale"] += 1
    for position, token in enumerate(tokenizer.encode(says), start=after - 1):
        weights["lm_head.kernel"][token, position] = 1
    checkpoint.save(folder, config, tiny_gpt_oss.params(weights))
    chat_templates.write(folder, family, **settings)
    if family == "harmony":
        ends = [tokenizer.encode(token)[0] for token in ("<|return|>", "<|endoftext|>", "<|call|>")]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
