"""PyTorch and transformers: GPT2LMHeadModel as it comes, eager or compiled, and its `generate`.

Runs in the peers' environment: imports nothing of flaxmill but the protocol and the workloads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from bench.peers import protocol
from bench.workloads import Workload


class PyTorch:
    """`mode` is "eager" or "compile"; in both, attention is what transformers takes by default (sdpa)."""

    def __init__(self, mode: str, device: str, threads: int) -> None:
        self.mode = mode
        self.device = torch.device(device)
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

    def hello(self) -> dict[str, Any]:
        return {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "threads": torch.get_num_threads(),
            "device": str(self.device),
        }

    def ceilings(self) -> dict[str, float]:
        a, b = torch.randn(2, 2048, 2048, device=self.device).unbind()
        large = torch.ones(2**26, device=self.device)  # 256 MiB, beyond any cache
        return {
            "gemm_flops_per_s": 2 * 2048**3 / self._fastest(lambda: a @ b),
            "read_bytes_per_s": 4 * large.numel() / self._fastest(large.sum),
        }

    def _fastest(self, compute) -> float:
        def call() -> None:
            compute()
            self.synchronize()

        return min(protocol.seconds(call) for _ in range(8))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def prepare(self, workload: Workload, weights: Path) -> protocol.Task:
        torch.compiler.reset()
        task = {
            "forward": Forward,
            "prefill": Generate,
            "decode": Generate,
            "train": Train,
            "open": Open,
        }[workload.kind]
        return task(self, workload, weights)

    def load(self, weights: Path) -> transformers.GPT2LMHeadModel:
        model = transformers.GPT2LMHeadModel.from_pretrained(weights, dtype=torch.float32)
        return model.to(self.device)

    def tokens(self, workload: Workload) -> torch.Tensor:
        return torch.tensor(workload.tokens(), device=self.device)


class Forward:
    def __init__(self, torch_: PyTorch, workload: Workload, weights: Path) -> None:
        self.torch = torch_
        model = torch_.load(weights).eval()
        self.model = torch.compile(model) if torch_.mode == "compile" else model
        self.tokens_BT = torch_.tokens(workload)

    @torch.inference_mode()
    def call(self) -> None:
        self.logits_BTV = self.model(self.tokens_BT, use_cache=False).logits
        self.torch.synchronize()

    def outputs(self) -> Mapping[str, Any]:
        return {"logits": _sampled(self.logits_BTV)}


class Generate:
    def __init__(self, torch_: PyTorch, workload: Workload, weights: Path) -> None:
        self.torch = torch_
        self.model = torch_.load(weights).eval()
        self.new_tokens = workload.new_tokens
        self.tokens_BT = torch_.tokens(workload)
        self.mask_BT = torch.ones_like(self.tokens_BT)

    @torch.inference_mode()
    def call(self) -> None:
        self.generated_BT = self.model.generate(
            self.tokens_BT,
            attention_mask=self.mask_BT,
            do_sample=False,
            min_new_tokens=self.new_tokens,
            max_new_tokens=self.new_tokens,
            pad_token_id=0,
        )
        self.torch.synchronize()

    def outputs(self) -> Mapping[str, Any]:
        return {"tokens": self.generated_BT[:, self.tokens_BT.shape[1] :].tolist()}


class Train:
    """nanoGPT's step: AdamW over two groups (matrices decay, the rest does not), gradients clipped to norm 1."""

    def __init__(self, torch_: PyTorch, workload: Workload, weights: Path) -> None:
        self.torch = torch_
        model = torch_.load(weights).train()
        self.parameters = list(model.parameters())
        self.model = torch.compile(model) if torch_.mode == "compile" else model
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        # The fused kernel is PyTorch's fastest AdamW, on a CPU too.
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
        tokens = torch_.tokens(workload)
        self.inputs_BT, self.targets_BT = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.losses: list[float] = []

    def call(self) -> None:
        logits_BTV = self.model(self.inputs_BT, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), self.targets_BT.flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())

    def outputs(self) -> Mapping[str, Any]:
        while len(self.losses) < 4:
            self.call()
        return {"losses": self.losses[:4]}


class Open:
    """Loading and one pass, as the mapped file is read when it is first used."""

    def __init__(self, torch_: PyTorch, workload: Workload, weights: Path) -> None:
        self.torch = torch_
        self.weights = weights
        self.tokens_BT = torch_.tokens(workload)

    @torch.inference_mode()
    def call(self) -> None:
        model = self.torch.load(self.weights).eval()
        self.logits_BTV = model(self.tokens_BT, use_cache=False).logits
        self.torch.synchronize()

    def outputs(self) -> Mapping[str, Any]:
        return {"logits": _sampled(self.logits_BTV)}


def _sampled(logits_BTV: torch.Tensor) -> list[float]:
    _, length, vocab = logits_BTV.shape
    times, ids = protocol.sampled(length, 8), protocol.sampled(vocab, 256)
    return logits_BTV[:, times][..., ids].flatten().tolist()


def main(mode: str, device: str, threads: str) -> None:
    protocol.serve(PyTorch(mode, device, int(threads)))
