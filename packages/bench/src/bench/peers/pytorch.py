"""PyTorch and transformers: GPT2LMHeadModel as it comes, eager or compiled, and its `generate`.

Runs in the peers' environment: imports nothing of flaxmill but the protocol and the workloads.

    python -m bench.peers.pytorch eager cpu 2                 the contestant; `compile` is the other mode
    python -m bench.peers.pytorch first FOLDER 2 TOKENS       tells how long its first compiled pass takes
    python -m bench.peers.pytorch start FOLDER 2 TOKENS N     continues a prompt by N tokens
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from bench.peers import jobs, process, protocol
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
        large = torch.ones(
            2**27, device=self.device
        )  # 512 MiB: what a model has, and beyond any cache
        operations = 2 * 2048**3
        narrow_a, narrow_b = a.bfloat16(), b.bfloat16()
        rates = {
            "gemm_float32_flops_per_s": operations / self._fastest(lambda: a @ b),
            "gemm_bfloat16_flops_per_s": operations / self._fastest(lambda: narrow_a @ narrow_b),
            "read_bytes_per_s": 4 * large.numel() / self._fastest(large.sum),
        }
        if self.device.type != "cpu":
            return rates
        whole_a, whole_b = (100 * a).to(torch.int8), (100 * b).to(torch.int8).t()
        rates["gemm_int8_flops_per_s"] = operations / self._fastest(
            lambda: torch._int_mm(whole_a, whole_b)
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        rates["read_1_thread_bytes_per_s"] = 4 * large.numel() / self._fastest(large.sum)
        torch.set_num_threads(threads)
        return rates

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
        match workload.kind:
            case "forward":
                return Forward(self, workload, weights)
            case "prefill" | "decode":
                return Generate(self, workload, weights)
            case "serve":
                return Serve(self, workload, weights)
            case "train":
                return Train(self, workload, weights)
            case "open":
                return Open(self, workload, weights)
            case "import":
                code = "import torch; from transformers import GPT2LMHeadModel"
                return jobs.Command([sys.executable, "-P", "-c", code])
            case "start":
                tokens = json.dumps(workload.tokens())
                return jobs.Command(self._own("start", weights, tokens, str(workload.new_tokens)))
            case "compile":
                cache = Path.cwd() / workload.name
                return jobs.Command(
                    self._own("first", weights, json.dumps(workload.tokens())),
                    env={"TORCHINDUCTOR_CACHE_DIR": str(cache)},
                    fresh=None if workload.is_cached else cache,
                )
            case other:
                raise ValueError(f"takes no part in {other}")

    def _own(self, mode: str, weights: Path, *arguments: str) -> tuple[str, ...]:
        """Returns the command of a process of this module's."""
        threads = str(torch.get_num_threads())
        arguments = (mode, str(weights), threads, *arguments)
        return process.command(Path(sys.executable), "bench.peers.pytorch", *arguments)

    def load(self, workload: Workload, weights: Path) -> Any:
        return _loaded(workload.shape.family, workload.precision, weights).to(self.device)

    def tokens(self, workload: Workload) -> torch.Tensor:
        return torch.tensor(workload.tokens(), device=self.device)


class Forward:
    def __init__(self, torch_: PyTorch, workload: Workload, weights: Path) -> None:
        self.torch = torch_
        model = torch_.load(workload, weights).eval()
        self.model = torch.compile(model) if torch_.mode == "compile" else model
        self.tokens_BT = torch_.tokens(workload)

    @torch.inference_mode()
    def call(self) -> None:
        self.logits_BTV = self.model(self.tokens_BT, use_cache=False).logits
        self.torch.synchronize()

    def outputs(self) -> Mapping[str, Any]:
        return {"logits": _sampled(self.logits_BTV)}


class Generate:
    """`generate` with the cache that it takes by default, or compiled, which takes one of a fixed length."""

    def __init__(self, torch_: PyTorch, workload: Workload, weights: Path) -> None:
        self.torch = torch_
        self.model = torch_.load(workload, weights).eval()
        self.new_tokens = workload.new_tokens
        self.options: dict[str, Any] = {}
        if torch_.mode == "compile":
            self.options["cache_implementation"] = "static"
            self.model.forward = torch.compile(self.model.forward)
        self.tokens_BT = torch_.tokens(workload)
        self.mask_BT = torch.ones_like(self.tokens_BT)

    def call(self) -> None:
        generated_BT = self.generate(self.tokens_BT, self.mask_BT, self.new_tokens)
        self.rows = generated_BT[:, self.tokens_BT.shape[1] :].tolist()

    @torch.inference_mode()
    def generate(self, tokens_BT, mask_BT, new_tokens: int) -> torch.Tensor:
        generated_BT = self.model.generate(
            tokens_BT,
            attention_mask=mask_BT,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            **self.options,
        )
        self.torch.synchronize()
        return generated_BT

    def outputs(self) -> Mapping[str, Any]:
        return {"tokens": self.rows}


class Serve(Generate):
    """Requests in the order in which they come, as many at a time as there are slots, until the longest is done."""

    def __init__(self, torch_: PyTorch, workload: Workload, weights: Path) -> None:
        super().__init__(torch_, workload, weights)
        requests = workload.served()
        step = workload.batch
        self.batches = [requests[i : i + step] for i in range(0, len(requests), step)]

    def call(self) -> None:
        self.rows: list[list[int]] = []
        for batch in self.batches:
            longest = max(len(prompt) for prompt, _ in batch)
            padded = [[0] * (longest - len(prompt)) + prompt for prompt, _ in batch]
            masks = [[0] * (longest - len(p)) + [1] * len(p) for p, _ in batch]
            tokens_BT, mask_BT = (
                torch.tensor(x, device=self.torch.device) for x in (padded, masks)
            )
            generated_BT = self.generate(tokens_BT, mask_BT, max(new for _, new in batch))
            for row, (_, new) in zip(generated_BT[:, longest:].tolist(), batch, strict=True):
                self.rows.append(row[:new])

    def outputs(self) -> Mapping[str, Any]:
        return {"tokens": self.rows, "counts": [sum(map(len, self.rows))]}


class Train:
    """nanoGPT's step: AdamW over two groups (matrices decay, the rest does not), gradients clipped to norm 1.

    In bfloat16 as there: parameters are float32, and autocast has the products in bfloat16.
    """

    def __init__(self, torch_: PyTorch, workload: Workload, weights: Path) -> None:
        self.torch = torch_
        self.precision = workload.precision
        model = torch_.load(dataclasses.replace(workload, precision="float32"), weights).train()
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
        with torch.autocast(
            self.inputs_BT.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"
        ):
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
        self.workload, self.weights = workload, weights
        self.tokens_BT = torch_.tokens(workload)

    @torch.inference_mode()
    def call(self) -> None:
        model = self.torch.load(self.workload, self.weights).eval()
        self.logits_BTV = model(self.tokens_BT, use_cache=False).logits
        self.torch.synchronize()

    def outputs(self) -> Mapping[str, Any]:
        return {"logits": _sampled(self.logits_BTV)}


def _sampled(logits_BTV: torch.Tensor) -> list[float]:
    _, length, vocab = logits_BTV.shape
    times, ids = protocol.sampled(length, 8), protocol.sampled(vocab, 256)
    return logits_BTV[:, times][..., ids].flatten().tolist()


def _loaded(family: str, precision: str, weights: Path) -> Any:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    if family == "gpt2":
        return transformers.GPT2LMHeadModel.from_pretrained(weights, dtype=dtype)
    packed = transformers.Mxfp4Config(dequantize=True)
    return transformers.GptOssForCausalLM.from_pretrained(
        weights, dtype=dtype, quantization_config=packed
    )


@torch.inference_mode()
def _first(folder: str, threads: str, tokens: str) -> None:
    """Tells the seconds from a loaded model to its first logits, compiled."""
    answers = protocol.claim_stdout()
    torch.set_num_threads(int(threads))
    model = _loaded("gpt2", "float32", Path(folder)).eval()
    tokens_BT = torch.tensor(json.loads(tokens))
    sum(float(parameter.sum()) for parameter in model.parameters())  # its pages are in memory
    compiled = torch.compile(model)
    seconds = protocol.seconds(lambda: compiled(tokens_BT, use_cache=False))
    print(json.dumps({"seconds": seconds}), file=answers, flush=True)


@torch.inference_mode()
def _start(folder: str, threads: str, tokens: str, new_tokens: str) -> None:
    answers = protocol.claim_stdout()
    torch.set_num_threads(int(threads))
    model = _loaded("gpt2", "float32", Path(folder)).eval()
    tokens_BT = torch.tensor(json.loads(tokens))
    count = int(new_tokens)
    generated_BT = model.generate(
        tokens_BT,
        attention_mask=torch.ones_like(tokens_BT),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0,
    )
    told = {"tokens": generated_BT[:, tokens_BT.shape[1] :].tolist()}
    print(json.dumps(told), file=answers, flush=True)


def main(mode: str, *arguments: str) -> None:
    match mode:
        case "first":
            _first(*arguments)
        case "start":
            _start(*arguments)
        case _:
            device, threads = arguments
            protocol.serve(PyTorch(mode, device, int(threads)))
