"""Real contestants for the bench's tests: a sleeper that speaks our protocol, and our own worker slowed down."""

import sys
from typing import Any

from bench import workloads
from bench.peers.contestants import Contestant

KINDS: frozenset[workloads.Kind] = frozenset({"forward", "prefill", "decode", "train", "open"})
TINY = workloads.Shape(
    name="tiny", n_layer=2, n_head=3, n_embd=24, n_positions=40, vocab_size=61, activation="gelu"
)


def workload(kind: workloads.Kind, *, rounds: int = 3, **sizes: Any) -> workloads.Workload:
    batch, length, new_tokens = {
        "forward": (2, 7, 0),
        "prefill": (1, 11, 1),
        "decode": (3, 9, 5),
        "train": (4, 13, 0),
        "open": (1, 5, 0),
    }[kind]
    sizes = {"batch": batch, "length": length, "new_tokens": new_tokens} | sizes
    return workloads.Workload(name=f"{kind}-tiny", kind=kind, shape=TINY, rounds=rounds, **sizes)


# Sleeps as long as its first argument says and computes its second.
SLEEPER = """
import json, os, sys, time
from bench.peers import protocol

class Sleeper:
    def hello(self):
        return {"versions": {"sleeper": "1"}, "threads": 1, "device": "cpu"}

    def ceilings(self):
        return {"gemm_flops_per_s": 1e9, "read_bytes_per_s": 2e9}

    def prepare(self, workload, weights):
        print("a library that prints")
        os.system("echo a child that prints")
        return self

    def call(self):
        time.sleep(float(sys.argv[1]))

    def outputs(self):
        return json.loads(sys.argv[2])

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


def program(name: str, code: str, *arguments: str) -> Contestant:
    """A contestant that is a Python program, in this Python."""
    return Contestant(
        name=name, kinds=KINDS, command=(sys.executable, "-P", "-c", code, *arguments)
    )


def sleeper(name: str, seconds: float, outputs: str = '{"tokens": [1, 2]}') -> Contestant:
    return program(name, SLEEPER, str(seconds), outputs)
