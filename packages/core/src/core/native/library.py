"""The compiled kernels inside JAX: loaded at first use, under names that carry the instruction set.

FLAXMILL_NATIVE      auto (kernels where they can be had), off, or require (an error where they cannot)
FLAXMILL_NATIVE_ISA  an instruction set, instead of the best that the processor has (`core.native.build.isas`)
"""

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax

from core.errors import NativeError
from core.native import build

MODE = "FLAXMILL_NATIVE"
ISA = "FLAXMILL_NATIVE_ISA"
_MODES = ("auto", "off", "require")
# Every kernel, by its symbol in the library.
_KERNELS = ("product", "rounded_product", "mix_experts", "attend_cache", "attend_prompt")

# JAX traces anew for another value, so no function that was traced outside is taken for one that was traced inside.
_serving = jax.make_user_context(False)


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """What is traced inside computes with native kernels, where there are any; gradients are not defined there."""
    with _serving(True):
        yield


def is_serving() -> bool:
    """Whether what is being traced may use native kernels: asked for, on one CPU, and compiled.

    Raises:
      NativeError: FLAXMILL_NATIVE=require, and they cannot be had.
    """
    asked = _serving.value and jax.default_backend() == "cpu"
    return asked and jax.sharding.get_abstract_mesh().empty and available()


def available() -> bool:
    """Whether there are native kernels for this machine. The first call compiles them if the cache has none.

    Raises:
      NativeError: FLAXMILL_NATIVE=require, and they cannot be had.
    """
    mode = _mode()
    if mode == "off":
        return False
    missing = _missing(_isa())
    if missing and mode == "require":
        raise NativeError(f"{MODE}=require, and no native kernels: {missing}")
    return not missing


def name() -> str:
    """Returns the instruction set of the kernels that this process serves with, or xla: bits depend on it."""
    return _isa() if available() else "xla"


def call(
    kernel: str,
    result: jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct, ...],
    *arrays: jax.Array,
    **attributes: Any,
) -> Any:
    """Returns what the kernel of that name makes of `arrays`, which it reads where they lie.

    Raises:
      NativeError: a gradient is asked for, or there are no native kernels.
    """
    if not available():
        raise NativeError(f"{kernel} is a native kernel, and there are none here")
    name = f"flaxmill_{kernel}_{_isa()}"

    @jax.custom_jvp
    def run(*arrays: jax.Array) -> Any:
        return jax.ffi.ffi_call(name, result)(*arrays, **attributes)

    @run.defjvp
    def no_gradient(primals: Any, tangents: Any) -> Any:
        raise NativeError(
            f"no gradient is defined through the native kernel {kernel}: "
            f"differentiate outside core.native.serving(), or with {MODE}=off"
        )

    return run(*arrays)


def _mode() -> str:
    mode = os.environ.get(MODE) or "auto"
    if mode not in _MODES:
        raise NativeError(f"{MODE}={mode}; it is one of {', '.join(_MODES)}")
    return mode


def _isa() -> str:
    known = build.isas()
    isa = os.environ.get(ISA) or next(iter(known))
    if isa not in known:
        raise NativeError(f"{ISA}={isa}; this machine has {', '.join(known)}")
    return isa


@functools.cache
def _missing(isa: str) -> str:
    """Loads the kernels; returns why that cannot be, after having said so once, or nothing."""
    try:
        loaded = ctypes.CDLL(str(build.library(build.isas()[isa])))
    except (NativeError, OSError) as error:
        if _mode() == "auto":
            print(f"note: no native kernels, XLA's serve: {error}", file=sys.stderr)  # noqa: T201
        return str(error)
    for kernel in _KERNELS:
        capsule = jax.ffi.pycapsule(getattr(loaded, kernel))
        jax.ffi.register_ffi_target(f"flaxmill_{kernel}_{isa}", capsule, platform="cpu")
    return ""
