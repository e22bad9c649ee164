"""Run as a program with eight simulated devices: tiny models on a mesh against themselves on one device.

    python tests/sharded_models.py run MODEL FOLDER MESH...
    python tests/sharded_models.py read FOLDER MESH PROCESS PORT

The first writes FOLDER and prints, for each mesh, how far logits and the loss's gradients are from one device's,
whether the greedy tokens are the same, and what share a device holds. The second is one of two processes with half of
the devices each, and prints what it reads. It is a program because the number of devices is fixed when JAX starts.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any


def run(kind: str, folder: Path, meshes: list[str]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import core
    import tiny
    import tiny_gpt_oss
    from core import checkpoint, sharding
    from core.engine import Completion, Engine, Request
    from core.sampling import Sampling

    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    # Heads, experts and hidden sizes that eight devices divide, two key heads that they do not.
    oss = {"vocab_size": 104, "num_attention_heads": 8, "num_local_experts": 16, "head_dim": 10}
    oss |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    if kind == "gpt2":
        config = tiny.config(vocab_size=104, n_embd=48, n_head=8)
        params = tiny.params(core.build(config), amplify=25)
    else:
        packed = {"quantization": "mxfp4"} if kind == "mxfp4" else {}
        config = tiny_gpt_oss.config(**oss, **packed)
        params = tiny_gpt_oss.params(tiny_gpt_oss.weights(config, 8))
    checkpoint.save(folder, config, params)
    opened = checkpoint.open(folder)
    model = core.build(config)
    dense = kind != "mxfp4"  # bytes have no gradient
    tokens_BT = tiny.tokens(config, 3, 31)
    batch = core.Batch(tokens_BT[:, :-1], tokens_BT[:, 1:])
    greedy = Sampling(temperature=0, max_new_tokens=20, ignore_eos=True)
    prompts = [
        Request(row[:length].tolist(), greedy)
        for row, length in zip(tokens_BT, (31, 5, 17), strict=True)
    ]

    def outputs(params: Any) -> tuple[np.ndarray, Any]:
        logits_BTV = np.asarray(jax.jit(model.apply)(params, tokens_BT))
        grads = jax.jit(jax.grad(core.loss), static_argnums=1)(params, model, batch) if dense else 0
        return logits_BTV, grads

    def continuations(params: Any) -> list[tuple[int, ...]]:
        completions = Engine(model, params, slots=4).complete(prompts)
        return [c.tokens for c in completions if isinstance(c, Completion)]

    def furthest(found: Any, expected: Any) -> float:
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)

    alone_BTV, alone_grads = outputs(opened.params())
    alone = continuations(opened.params())
    results = {}
    for sizes in meshes:
        mesh = sharding.mesh(sizes)
        placement = sharding.place(config, mesh)
        _, placed, _ = core.load(folder, mesh=mesh)
        with jax.set_mesh(mesh):
            logits_BTV, grads = outputs(placed)
        found = continuations(placed)
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed))
        results[sizes] = {
            "difference": furthest(logits_BTV, alone_BTV),
            "gradients": furthest(grads, alone_grads)
            / furthest(jax.tree.map(jnp.zeros_like, alone_grads), alone_grads)
            if dense
            else 0,
            "same_tokens": found == alone,
            "share": held / sum(x.nbytes for x in jax.tree.leaves(placed)),
            "notes": placement.notes,
        }
    different = len({token for tokens in alone for token in tokens})
    return {"meshes": results, "spread": float(alone_BTV.std()), "different": different}


def read(folder: Path, sizes: str, process: int, port: int) -> dict[str, Any]:
    import jax
    import numpy as np

    from core import checkpoint, sharding

    jax.distributed.initialize(f"localhost:{port}", 2, process)
    reads: dict[str, int] = {}

    class Counted(np.ndarray):
        """Notes of which tensor how many bytes are taken."""

        name = ""

        def __getitem__(self, index: Any) -> Any:
            part = self.view(np.ndarray)[index]
            reads[self.name] = reads.get(self.name, 0) + part.nbytes
            return part

    opened = checkpoint.open(folder)
    counted = {}
    for name, x in opened.tensors.items():
        counted[name] = x.view(Counted)
        counted[name].name = name
    opened = dataclasses.replace(opened, tensors=counted)
    placement = sharding.place(opened.config, sharding.mesh(sizes))
    params = opened.params(shardings=placement.shardings)
    whole = {name: x.nbytes for name, x in opened.tensors.items()}
    right = all(
        np.array_equal(
            shard.data, np.asarray(opened.tensors[".".join(k.key for k in path)])[shard.index]
        )
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        for shard in x.addressable_shards
    )
    return {"reads": reads, "whole": whole, "right": right, "devices": jax.device_count()}


def main() -> dict[str, Any]:
    mode, *rest = sys.argv[1:]
    devices = 8 if mode == "run" else 4
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    if mode == "run":
        kind, folder, *meshes = rest
        return run(kind, Path(folder), meshes)
    folder, sizes, process, port = rest
    return read(Path(folder), sizes, int(process), int(port))


if __name__ == "__main__":
    print(json.dumps(main()))
