"""Real contestants for the bench's tests: a sleeper that speaks our protocol, and our own worker slowed down."""

import sys
from typing import Any

from bench import shapes, workloads
from bench.peers.contestants import Contestant

KINDS: frozenset[workloads.Kind] = frozenset(
    {"forward", "prefill", "decode", "serve", "batch", "train", "open", "load", "convert"}
)
TINY = shapes.Shape(
    name="tiny", n_layer=2, n_head=3, n_embd=24, n_positions=40, vocab_size=61, activation="gelu"
)
TINY_GPT_OSS = shapes.GptOssShape(
    name="tiny-oss",
    n_layer=3,
    n_experts=5,
    vocab_size=61,
    width=64,
    n_head=4,
    n_kv_head=2,
    head_dim=14,
    n_positions=8192,
)


def workload(kind: workloads.Kind, *, rounds: int = 3, **sizes: Any) -> workloads.Workload:
    batch, length, new_tokens = {
        "forward": (2, 7, 0),
        "prefill": (1, 11, 1),
        "decode": (3, 9, 5),
        "serve": (2, 6, 5),
        "batch": (2, 6, 5),
        "train": (4, 13, 0),
        "open": (1, 5, 0),
        "load": (1, 1, 0),
        "convert": (1, 1, 0),
        "start": (1, 7, 6),
        "compile": (1, 7, 0),
        "import": (1, 1, 0),
        "giant": (1, 11, 4),
    }[kind]
    sizes = {"requests": 5 if kind in ("serve", "batch") else 0} | sizes
    sizes = {"batch": batch, "length": length, "new_tokens": new_tokens, "shape": TINY} | sizes
    return workloads.Workload(name=f"{kind}-tiny", kind=kind, rounds=rounds, **sizes)


# Sleeps as long as its first argument says and computes its second.
SLEEPER = """
import json, os, sys, time
from bench.peers import protocol

class Sleeper:
    def hello(self):
        return {"versions": {"sleeper": "1"}, "threads": 1, "device": "cpu"}

    def ceilings(self):
        return {"gemm_float32_flops_per_s": 1e9, "read_bytes_per_s": 2e9}

    def prepare(self, workload, weights):
        print("a library that prints")
        os.system("echo a child that prints")
        return self

    def call(self):
        time.sleep(float(sys.argv[1]))

    def outputs(self):
        return json.loads(sys.argv[2])

    def judge(self, rows):
        if len(sys.argv) < 4:
            raise RuntimeError("knows no better")
        return [float(sys.argv[3])] * len(rows)

protocol.serve(Sleeper())
"""

# Our own worker, with 30 ms more to every pass.
SLOWED = """
import time
from bench.peers import ours, protocol

class Slowed(ours.Flaxmill):
    def prepare(self, workload, weights):
        task = super().prepare(workload, weights)
        call = task.call
        task.call = lambda: (time.sleep(0.03), call())
        return task

protocol.serve(Slowed())
"""


# Our own worker, whose converter does what its first argument says before it begins.
BURDENED = """
import sys
from bench.peers import jobs, ours, protocol

jobs.MARKED = jobs.MARKED.replace("import runpy", f"import runpy, time\\n{sys.argv[1]}")
protocol.serve(ours.Flaxmill())
"""

# Copies the checkpoint, and then does to the copy what its first argument says.
COPIER = """
import pathlib, shutil, sys
from bench.peers import jobs, protocol

def convert(weights, out):
    shutil.copytree(weights, out)
    exec(sys.argv[1])
    return jobs.run(["true"])

class Copier:
    def hello(self):
        return {"versions": {}, "threads": 1, "device": "cpu"}

    def prepare(self, workload, weights):
        return jobs.Conversion(workload, weights, convert)

protocol.serve(Copier())
"""


def program(name: str, code: str, *arguments: str) -> Contestant:
    """A contestant that is a Python program, in this Python."""
    return Contestant(
        name=name, kinds=KINDS, command=(sys.executable, "-P", "-c", code, *arguments)
    )


def sleeper(
    name: str, seconds: float, outputs: str = '{"tokens": [[1, 2]]}', *judgement: str
) -> Contestant:
    """`judgement` is how far below the best it finds any token that it has to judge."""
    return program(name, SLEEPER, str(seconds), outputs, *judgement)
