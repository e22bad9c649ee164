"""How an update runs on a CPU: what is compiled, and in which pages."""

import functools
import os
import re
import subprocess
import sys
from typing import Any, cast

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from core.models import build
from train import pages, program, step
from train.config import TrainConfig

MADVISE = "always [madvise] never"


def test_no_moment_is_copied_before_it_is_overwritten_and_no_bit_is_another():
    model = build(tiny.config(n_layer=1))
    params = tiny.params(model)
    config = TrainConfig(batch_size=2, block_size=7)
    tokens = tiny.tokens(model.config, 1, 2, 8)
    given = {"model": model, "config": config, "dtype": jnp.dtype(jnp.float32)}
    plain: Any = jax.jit(functools.partial(step.update, **given), donate_argnums=0)
    states = []
    for update in (plain, cast(Any, program.update(**given, platform="cpu"))):
        state = step.initial_state(jax.tree.map(jnp.copy, params), config)
        compiled = update.lower(state, tokens, np.float32(1e-3), None).compile()
        copies = re.findall(r"copy\(%state\S*[mn]u", str(compiled.as_text()))
        for _ in range(3):
            state, _ = compiled(state, tokens, np.float32(1e-3), None)
        states.append((len(copies), state))
    (some, expected), (none, found) = states
    assert none == 0 < some
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_an_update_is_lowered_for_accelerators_without_calls_of_the_processor_s(platform: str):
    model = build(tiny.config(n_layer=1))
    config = TrainConfig(batch_size=2, block_size=7, dropout=0.1)
    update: Any = program.update(
        model=model, config=config, dtype=jnp.dtype(jnp.bfloat16), platform=platform
    )
    state = jax.eval_shape(lambda: step.initial_state(model.init(jax.random.key(0)), config))
    tokens = jax.ShapeDtypeStruct((1, 2, 8), jnp.int32)
    rate, key = jax.ShapeDtypeStruct((), jnp.float32), jax.eval_shape(lambda: jax.random.key(0))
    lowered = jax.export.export(update, platforms=[platform])(state, tokens, rate, key)
    text = lowered.mlir_module()
    assert lowered.platforms == (platform,)
    assert "custom_call" not in text  # core.native's kernels are for a CPU
    products = re.findall(r"dot_general .*: \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\)", text)
    # Of weights; attention's scores and sums are float32 (core.attention).
    assert products.count(("bf16", "bf16")) >= 3 * len(["qkv", "out", "up", "down", "head"])
    assert "donor" in text or "aliasing_output" in text  # the state is given away


@pytest.mark.parametrize(
    ("given", "mode", "expected"),
    [
        ({}, MADVISE, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "a=2"}, MADVISE, "a=2:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, MADVISE, None),
        ({}, "[always] madvise never", None),
        ({}, "always madvise [never]", None),
        ({}, "", None),
    ],
)
def test_huge_pages_are_asked_for_where_that_changes_anything(
    given: dict[str, str], mode: str, expected: str | None
):
    assert pages.wanted(given, mode) == expected


def test_the_program_that_starts_again_is_the_same_program():
    code = (
        "import os, sys, train.pages as p\n"
        "p._mode = lambda: 'always [madvise] never'\n"
        "p.start_again_with_huge()\n"
        "print(os.getpid(), os.environ['GLIBC_TUNABLES'], sys.argv[1:])\n"
    )
    given = [sys.executable, "-P", "-c", code, "--a=b c", "d"]
    environment = {key: x for key, x in os.environ.items() if key != "GLIBC_TUNABLES"}
    process = subprocess.Popen(given, stdout=subprocess.PIPE, text=True, env=environment)
    said = process.communicate()[0]
    assert said == f"{process.pid} glibc.malloc.hugetlb=1 ['--a=b c', 'd']\n"
    assert process.returncode == 0


@pytest.mark.skipif("[always]" in pages._mode(), reason="pages are huge on this machine anyway")
def test_memory_that_is_given_back_is_kept():
    """40 MB are ten thousand pages, which without it the system finds and clears each time."""
    code = (
        "import ctypes, resource, sys, train.pages as p\n"
        "if sys.argv[1] == 'keep': p.keep()\n"
        "c = ctypes.CDLL(None)\n"
        "c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n"
        "c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]\n"
        "def use():\n"
        "    block = c.malloc(40_000_000); c.memset(block, 1, 40_000_000); c.free(block)\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "use(); use(); before = faults(); use(); print(faults() - before)\n"
    )
    environment = {key: x for key, x in os.environ.items() if key != "GLIBC_TUNABLES"}
    counts = [
        int(subprocess.check_output([sys.executable, "-P", "-c", code, word], env=environment))
        for word in ("leave", "keep")
    ]
    assert counts[1] < 100 < 9000 < counts[0]
