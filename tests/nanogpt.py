"""nanoGPT, for tests: its model as it is, the checkpoint that its train.py saves, and weights for both sides.

The classes are model.py of github.com/karpathy/nanoGPT, shortened to what a forward pass, loading and resuming need.
MIT License, Copyright (c) 2022 Andrej Karpathy.
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

# Pairwise different, also in products, so that no wrong layout has the right shape.
V, P, D, N, H, L = 37, 11, 10, 2, 5, 3
F = 4 * D
ARGS: dict[str, Any] = {
    "n_layer": L,
    "n_head": N,
    "n_embd": D,
    "block_size": P,
    "bias": True,
    "vocab_size": V,
    "dropout": 0.1,
}
CHARACTERS = "zyx\n !'(),-.:;?ABCDEabcdefghijklmnopé"  # in no order, as itos may be
META = {
    "vocab_size": V,
    "itos": dict(enumerate(CHARACTERS)),
    "stoi": {character: id_ for id_, character in enumerate(CHARACTERS)},
}


def shapes(args: Mapping[str, Any] = ARGS) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model, in the order of its state dict, from its description in words."""
    d = args["n_embd"]
    block = {
        "ln_1.weight": (d,),
        "ln_1.bias": (d,),
        "attn.c_attn.weight": (3 * d, d),
        "attn.c_attn.bias": (3 * d,),
        "attn.c_proj.weight": (d, d),
        "attn.c_proj.bias": (d,),
        "ln_2.weight": (d,),
        "ln_2.bias": (d,),
        "mlp.c_fc.weight": (4 * d, d),
        "mlp.c_fc.bias": (4 * d,),
        "mlp.c_proj.weight": (d, 4 * d),
        "mlp.c_proj.bias": (d,),
    }
    names = {"wte.weight": (args["vocab_size"], d), "wpe.weight": (args["block_size"], d)}
    names |= {f"h.{i}.{name}": s for i in range(args["n_layer"]) for name, s in block.items()}
    names |= {"ln_f.weight": (d,), "ln_f.bias": (d,)}
    kept = {n: s for n, s in names.items() if args.get("bias", True) or not n.endswith(".bias")}
    return {f"transformer.{name}": shape for name, shape in kept.items()}


def weights(args: Mapping[str, Any] = ARGS, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights, several times as large as at the start of a training, norms and biases too."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, shape in shapes(args).items():
        noise = rng.standard_normal(shape).astype(np.float32)
        is_norm = ".ln_" in name
        result[name] = noise * np.float32(0.1 if is_norm else 0.6) + np.float32(
            is_norm and name.endswith(".weight")
        )
    return result


def as_parameters(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights under our names and shapes, spelled out by hand and not by a table."""
    theirs = {name.removeprefix("transformer."): array for name, array in weights.items()}
    d = theirs["wte.weight"].shape[1]
    n, h = (N, H) if d == D else (2, d // 2)
    result = {"wte.embedding": theirs["wte.weight"], "wpe.embedding": theirs["wpe.weight"]}
    for name, array in theirs.items():
        if not name.startswith(("h.", "ln_f")):
            continue
        ours = name.replace("h.", "blocks.", 1) if name.startswith("h.") else name
        if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            ours, value = ours.replace(".weight", ".scale"), array
        elif ".c_attn." in name:
            is_weight = name.endswith("weight")
            value = array.T.reshape(d, 3, n, h) if is_weight else array.reshape(3, n, h)
            ours = ours.replace("c_attn", "qkv")
        elif "attn.c_proj.weight" in name:
            value, ours = array.T.reshape(n, h, d), ours.replace("c_proj", "out")
        else:
            value = array.T
            ours = ours.replace("attn.c_proj", "attn.out").replace("mlp.c_proj", "mlp.down")
            ours = ours.replace("c_fc", "up")
        result[ours.replace(".weight", ".kernel")] = value
    return result


def state(torch: Any, weights: Mapping[str, np.ndarray], *, compiled: bool = False) -> Any:
    """The state dict of the model with these weights, as `raw_model.state_dict()` gives it."""
    args = dict(ARGS, bias="transformer.ln_f.bias" in weights)
    args["vocab_size"], args["n_embd"] = weights["transformer.wte.weight"].shape
    args["block_size"] = len(weights["transformer.wpe.weight"])
    built = model(args)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    built.load_state_dict({**tensors, "lm_head.weight": tensors["transformer.wte.weight"]})
    found = built.state_dict()
    if compiled:  # what torch.compile's wrapper does to the names
        for name in list(found):
            found[f"_orig_mod.{name}"] = found.pop(name)
    return found


def checkpoint(
    torch: Any,
    weights: Mapping[str, np.ndarray],
    args: Mapping[str, Any] = ARGS,
    *,
    compiled: bool = False,
    dataset: str = "shakespeare_char",
) -> dict[str, Any]:
    """The dict that train.py saves, after a step of its optimizer."""
    built = model(args)
    built.load_state_dict(state(torch, weights))
    optimizer = built.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    tokens = torch.arange(P)[None] % args["vocab_size"]
    logits = built(tokens)
    torch.nn.functional.cross_entropy(logits[0], tokens[0]).backward()
    optimizer.step()
    return {
        "model": state(torch, weights, compiled=compiled),
        "optimizer": optimizer.state_dict(),
        "model_args": dict(args),
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": dataset, "out_dir": "out", "learning_rate": 1e-3, "compile": True},
    }


def logits(torch: Any, built: Any, tokens: np.ndarray) -> np.ndarray:
    """The logits of every position."""
    with torch.no_grad():
        return built.eval()(torch.from_numpy(tokens)).numpy()


def greedy(torch: Any, built: Any, prompt: list[int], count: int) -> list[int]:
    """The most likely tokens, one after the other, as model.generate with top_k=1 draws them."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits(torch, built, np.array([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def model(args: Mapping[str, Any]) -> Any:
    """Builds nanoGPT's GPT(GPTConfig(**args)); its forward gives the logits of all positions."""
    torch = pytest.importorskip("torch")
    nn, F = torch.nn, torch.nn.functional

    @dataclasses.dataclass
    class GPTConfig:
        block_size: int = 1024
        vocab_size: int = 50304
        n_layer: int = 12
        n_head: int = 12
        n_embd: int = 768
        dropout: float = 0.0
        bias: bool = True

    class LayerNorm(nn.Module):
        def __init__(self, ndim, bias):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(ndim))
            self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

        def forward(self, input):
            return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)

    class CausalSelfAttention(nn.Module):
        def __init__(self, config):
            super().__init__()
            assert config.n_embd % config.n_head == 0
            self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
            self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
            self.resid_dropout = nn.Dropout(config.dropout)
            self.n_head, self.n_embd, self.dropout = config.n_head, config.n_embd, config.dropout

        def forward(self, x):
            B, T, C = x.size()
            q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
            k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            y = F.scaled_dot_product_attention(
                q, k, v, dropout_p=self.dropout if self.training else 0, is_causal=True
            )
            y = y.transpose(1, 2).contiguous().view(B, T, C)
            return self.resid_dropout(self.c_proj(y))

    class MLP(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
            self.gelu = nn.GELU()
            self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
            self.dropout = nn.Dropout(config.dropout)

        def forward(self, x):
            return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))

    class Block(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
            self.attn = CausalSelfAttention(config)
            self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
            self.mlp = MLP(config)

        def forward(self, x):
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    class GPT(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.transformer = nn.ModuleDict(
                {
                    "wte": nn.Embedding(config.vocab_size, config.n_embd),
                    "wpe": nn.Embedding(config.block_size, config.n_embd),
                    "drop": nn.Dropout(config.dropout),
                    "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                    "ln_f": LayerNorm(config.n_embd, bias=config.bias),
                }
            )
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
            self.transformer.wte.weight = self.lm_head.weight
            for name, p in self.named_parameters():
                if name.endswith("c_proj.weight"):
                    nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

        def forward(self, idx):
            pos = torch.arange(0, idx.size(1), dtype=torch.long)
            x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
            for block in self.transformer.h:
                x = block(x)
            return self.lm_head(self.transformer.ln_f(x))

        def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
            param_dict = {pn: p for pn, p in self.named_parameters() if p.requires_grad}
            decay_params = [p for n, p in param_dict.items() if p.dim() >= 2]
            nodecay_params = [p for n, p in param_dict.items() if p.dim() < 2]
            optim_groups = [
                {"params": decay_params, "weight_decay": weight_decay},
                {"params": nodecay_params, "weight_decay": 0.0},
            ]
            fused_available = "fused" in inspect.signature(torch.optim.AdamW).parameters
            extra_args = {"fused": True} if fused_available and device_type == "cuda" else {}
            return torch.optim.AdamW(optim_groups, lr=learning_rate, betas=betas, **extra_args)

    return GPT(GPTConfig(**args))
