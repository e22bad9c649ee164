"""llama.cpp, through its C interface as its Python package has it: a GGUF file of the same weights, several at a time.

Our exporter writes the file, in the type that corresponds to the precision. Runs in the peers' environment: imports
nothing of flaxmill but the protocol and the workloads.

    python -m bench.peers.llama FOLDER 2 PYTHON           the contestant; FOLDER has the package, PYTHON has flaxmill
    python -m bench.peers.llama start FOLDER 2 WORKLOAD FILE     a process that continues a prompt
    python -m bench.peers.llama giant FOLDER 2 WORKLOAD FILE     a process that opens a large model and goes on
"""

import ctypes
import heapq
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers import jobs, process, protocol
from bench.workloads import Workload

# What our exporter calls the types; experts stay MXFP4 and what is beside them as it is.
TYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}
F32, F16 = 0, 1  # ggml's numbers of the types
UBATCH = 512  # tokens that it computes at a time, which is its default

Prompts = Sequence[tuple[Sequence[int], int]]
"""Prompts with the number of tokens to continue each by."""


class Llama:
    """A GGUF file with a context of so many rows, each `length` positions at the most."""

    def __init__(self, file: Path, *, rows: int, length: int, threads: int, is_exact: bool) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.api = llama_cpp
        quiet = llama_cpp.llama_log_callback(_say_nothing)
        self._quiet = quiet  # the library has no reference to it
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot open {file.name}")
        self.context = self._context(rows, length, threads, is_exact=is_exact)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(max(UBATCH, rows * length), 0, 1)

    def _context(self, rows: int, length: int, threads: int, *, is_exact: bool) -> Any:
        options = self.api.llama_context_default_params()
        each = -(-length // 256) * 256
        options.n_ctx = rows * each
        options.n_seq_max = rows
        options.n_batch = max(UBATCH, rows * length)
        options.n_ubatch = UBATCH
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = F32 if is_exact else F16
        if is_exact:  # its fused attention would make float16 of the whole cache, at every step
            options.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.no_perf = True
        context = self.api.llama_init_from_model(self.model, options)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context of {rows} x {length} positions")
        return context

    def close(self) -> None:
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def generate(self, requests: Prompts, slots: int) -> list[list[int]]:
        """Returns each prompt's greedy continuation; a slot whose request is done takes the next one."""
        self.api.llama_memory_clear(self.memory, True)
        rows: list[list[int]] = [[] for _ in requests]
        waiting = iter(range(len(requests)))
        running: dict[int, int] = {}
        free = list(range(slots))
        while True:
            self.batch.n_tokens = 0
            asked: list[tuple[int, int]] = []  # slots, and where in the batch their last token is
            while free and (i := next(waiting, None)) is not None:
                running[heapq.heappop(free)] = i
            # In the order of the slots: what does not follow on the sequence before it is computed apart.
            for slot, i in sorted(running.items()):
                prompt, new = requests[i][0], rows[i]
                tokens, position = (new[-1:], len(prompt) + len(new) - 1) if new else (prompt, 0)
                asked.append((slot, self._add(tokens, position, slot)))
            if not asked:
                return rows
            for slot, token in zip((s for s, _ in asked), self._decode(asked), strict=True):
                i = running[slot]
                rows[i].append(token)
                if len(rows[i]) == requests[i][1]:
                    del running[slot]
                    heapq.heappush(free, slot)
                    self.api.llama_memory_seq_rm(self.memory, slot, -1, -1)

    def _add(self, tokens: Sequence[int], position: int, slot: int) -> int:
        """Puts tokens of a row into the batch, the last of which is asked for its logits; returns its place."""
        batch = self.batch
        for offset, token in enumerate(tokens):
            at = batch.n_tokens
            batch.token[at], batch.pos[at] = token, position + offset
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, slot
            batch.logits[at] = offset == len(tokens) - 1
            batch.n_tokens += 1
        return batch.n_tokens - 1

    def _decode(self, asked: Sequence[tuple[int, int]]) -> list[int]:
        code = self.api.llama_decode(self.context, self.batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        return [int(self._logits(at).argmax()) for _, at in asked]

    def _logits(self, at: int) -> np.ndarray:
        pointer = self.api.llama_get_logits_ith(self.context, at)
        return np.ctypeslib.as_array(pointer, (self.vocab,))


def _say_nothing(level: int, text: bytes, data: Any) -> None:
    pass


class Contestant:
    def __init__(self, folder: str, threads: int, python: str) -> None:
        self.folder, self.threads, self.python = folder, threads, python

    def hello(self) -> dict[str, Any]:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        build = "compiled for this processor" if "native" in self.folder else "compiled for any"
        version = f"{llama_cpp.__version__} ({build})"
        return {
            "versions": {"llama-cpp-python": version},
            "threads": self.threads,
            "device": "cpu",
        }

    def ceilings(self) -> dict[str, float]:
        raise RuntimeError("has no products of its own to measure")

    def prepare(self, workload: Workload, weights: Path) -> protocol.Task:
        if workload.kind == "import":
            code = f"import sys; sys.path.insert(0, {self.folder!r}); import llama_cpp"
            return jobs.Command([sys.executable, "-P", "-c", code])
        file = self.exported(workload, weights)
        if workload.kind in ("start", "giant"):
            arguments = (workload.kind, self.folder, str(self.threads))
            told = (json.dumps(workload.to_dict()), str(file))
            command = process.command(Path(sys.executable), "bench.peers.llama", *arguments, *told)
            return jobs.Command(command, reads=file if workload.kind == "giant" else None)
        return Generate(workload, file, self.threads)

    def exported(self, workload: Workload, weights: Path) -> Path:
        """Returns the GGUF file of a checkpoint, made by our exporter when it is first needed."""
        type_ = TYPES[workload.precision] if workload.shape.family == "gpt2" else "keep"
        file = weights.with_name("gguf") / f"{type_}.gguf"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            ours = weights.with_name("flaxmill")
            if not ours.exists():
                self._ours("convert", f"--source={weights}", f"--out={ours}")
            self._ours(
                "convert.export", f"--model={ours}", "--to=gguf", f"--type={type_}", f"--out={file}"
            )
        return file

    def _ours(self, module: str, *flags: str) -> None:
        command = [self.python, "-P", "-m", module, *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{module}: {done.stderr.strip().splitlines()[-1:]}")


class Generate:
    def __init__(self, workload: Workload, file: Path, threads: int) -> None:
        self.slots = workload.batch
        self.requests = _requests(workload)
        self.llama = _opened(workload, file, threads)

    def __del__(self) -> None:
        if llama := getattr(self, "llama", None):
            llama.close()

    def call(self) -> None:
        self.rows = self.llama.generate(self.requests, self.slots)

    def outputs(self) -> Mapping[str, Any]:
        return {"tokens": self.rows, "counts": [sum(map(len, self.rows))]}


def _requests(workload: Workload) -> list[tuple[list[int], int]]:
    if workload.requests:
        return workload.served()
    return [(prompt, workload.new_tokens) for prompt in workload.tokens()]


def _opened(workload: Workload, file: Path, threads: int) -> Llama:
    is_exact = workload.precision == "float32"
    rows, length = workload.batch, workload.longest
    return Llama(file, rows=rows, length=length, threads=threads, is_exact=is_exact)


def _start(llama: Llama, workload: Workload, open_s: float) -> dict[str, Any]:
    return {"tokens": llama.generate(_requests(workload), 1)}


def _giant(llama: Llama, workload: Workload, open_s: float) -> dict[str, Any]:
    """Tells the seconds of opening, of a prompt, and of going on after it."""
    (prompt,) = workload.tokens()

    def seconds(tokens: list[int], new_tokens: int) -> float:
        return protocol.seconds(lambda: llama.generate([(tokens, new_tokens)], 1))

    seconds(prompt[1:] + prompt[:1], 2)
    prompt_s = seconds(prompt[2:] + prompt[:2], 1)
    decode_s = seconds(prompt, 1 + workload.new_tokens) - prompt_s
    parts_s = {"open": open_s, "prompt": prompt_s}
    return {"seconds": decode_s, "parts_s": parts_s, "counts": [workload.new_tokens]}


def _alone(
    tell: Callable[[Llama, Workload, float], dict[str, Any]], threads: str, work: str, file: str
) -> None:
    answers = protocol.claim_stdout()
    workload = Workload.from_dict(json.loads(work))
    start = time.perf_counter()
    llama = _opened(workload, Path(file), int(threads))
    told = tell(llama, workload, time.perf_counter() - start)
    print(json.dumps(told), file=answers, flush=True)


def main(first: str, *arguments: str) -> None:
    modes = {"start": _start, "giant": _giant}
    folder, *rest = arguments if first in modes else (first, *arguments)
    if folder:
        sys.path.insert(0, folder)
    if first in modes:
        _alone(modes[first], *rest)
    else:
        threads, python = rest
        protocol.serve(Contestant(folder, int(threads), python))
