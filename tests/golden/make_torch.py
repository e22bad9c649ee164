"""Makes tests/golden/pytorch: what torch.save itself writes, for tests that have no torch.

    .venv-peers/bin/python tests/golden/make_torch.py

The weights are those that `tests/nanogpt.py` and `tests/hf_checkpoints.py` draw, so the tests know them. Made with
torch 2.15.0; another version may write other bytes of the same content.

    ckpt.pt, meta.pkl     nanoGPT's checkpoint of a compiled model after an update, with AdamW's state, and characters
    expected.npz          what nanoGPT's model computes with it: logits of `tokens`, greedy tokens after `prompt`
    zip.bin, legacy.bin   GPT2LMHeadModel's state dict in the format of today and in that of before 1.6, with the masks
                          and the repeated head of files of 2019; some matrices of zip.bin are transposed views
"""

import collections
import pickle
import sys
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).parents[1]))
import hf_checkpoints as hf
import nanogpt

OUT = Path(__file__).parent / "pytorch"


def hf_state(*, transposed: bool) -> collections.OrderedDict:
    """GPT2LMHeadModel's state dict; with `transposed`, matrices are views of their transposes."""
    named = hf.prefixed(hf.tensors() | hf.masks())
    state = collections.OrderedDict()
    for name, array in named.items():
        tensor = torch.from_numpy(array.copy())
        is_matrix = transposed and tensor.ndim == 2 and name.endswith("c_fc.weight")
        state[name] = tensor.t().contiguous().t() if is_matrix else tensor
    state["lm_head.weight"] = state["transformer.wte.weight"]
    setattr(state, "_metadata", {"": {"version": 1}})  # noqa: B010 - as a module's state_dict() has it
    return state


def main() -> None:
    torch.manual_seed(0)
    OUT.mkdir(exist_ok=True)
    checkpoint = nanogpt.checkpoint(torch, nanogpt.weights(), compiled=True)
    torch.save(checkpoint, OUT / "ckpt.pt")
    (OUT / "meta.pkl").write_bytes(pickle.dumps(nanogpt.META))
    model = nanogpt.model(nanogpt.ARGS)
    model.load_state_dict(nanogpt.state(torch, nanogpt.weights()))
    tokens = np.arange(3, 3 + nanogpt.P)[None] % nanogpt.V
    np.savez(
        OUT / "expected.npz",
        tokens=tokens,
        logits=nanogpt.logits(torch, model, tokens),
        prompt=[1, 2, 3],
        greedy=nanogpt.greedy(torch, model, [1, 2, 3], nanogpt.P - 3),
    )
    torch.save(hf_state(transposed=True), OUT / "zip.bin")
    torch.save(hf_state(transposed=False), OUT / "legacy.bin", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
