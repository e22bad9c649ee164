"""The tests of native kernels, of kernels that are not this process's: compiled with checks, or for another processor.

As a pytest plugin (-p native_elsewhere) it puts a program in the place of this process's own kernels: NATIVE_DRIVER
is its command, and tests/native_driver.cc what it is made of.
"""

import functools
import importlib
import os
import shlex
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from core.native import build

DRIVER = "NATIVE_DRIVER"
FILES = [
    Path(__file__).parent / "core" / f"test_native_{name}.py"
    for name in ("products", "attention", "experts")
]
# XLA's numbers of the types.
_TYPES = {"int8": 2, "int32": 4, "int64": 5, "uint8": 6, "float32": 11, "bfloat16": 16}


def pytest_configure(config: pytest.Config) -> None:
    if DRIVER not in os.environ:
        return
    jax.config.update(
        "jax_cpu_enable_async_dispatch", False
    )  # a callback is not to wait for itself
    program = subprocess.Popen(
        shlex.split(os.environ[DRIVER]), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    for name in ("products", "attention", "experts"):
        module = importlib.import_module(f"core.native.{name}")
        module.call = functools.partial(_call, program)  # pyright: ignore[reportAttributeAccessIssue]


def _end(program: "subprocess.Popen[bytes]") -> None:
    """Its input ends, and it does."""
    program.communicate()


def _call(
    program: "subprocess.Popen[bytes]",
    kernel: str,
    result: Any,
    *arrays: jax.Array,
    **attributes: Any,
) -> Any:
    """`core.native.library.call`, elsewhere."""
    results = result if isinstance(result, tuple) else (result,)
    ask = functools.partial(_ask, program, kernel, results, attributes)
    found = jax.pure_callback(ask, results, *arrays)
    return found if isinstance(result, tuple) else found[0]


def _ask(
    program: "subprocess.Popen[bytes]",
    kernel: str,
    results: Sequence[jax.ShapeDtypeStruct],
    attributes: Mapping[str, Any],
    *arrays: Any,
) -> tuple[np.ndarray, ...]:
    assert program.stdin is not None
    assert program.stdout is not None
    told = [_word(kernel), struct.pack("<I", len(arrays))]
    for array in map(np.ascontiguousarray, arrays):
        told += [_shape(array), array.tobytes()]
    told += [struct.pack("<I", len(results)), *map(_shape, results)]
    told.append(struct.pack("<I", len(attributes)))
    for name, value in sorted(attributes.items()):
        number = np.asarray(value)
        told += [_word(name), struct.pack("<I", _TYPES[number.dtype.name])]
        told.append(number.tobytes().ljust(8, b"\0"))
    program.stdin.write(b"".join(told))
    program.stdin.flush()
    found = []
    for result in results:
        count = int(np.prod(result.shape, dtype=int))
        data = program.stdout.read(count * result.dtype.itemsize)
        found.append(np.frombuffer(data, result.dtype, count).reshape(result.shape))
    return tuple(found)


def _word(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()


def _shape(array: Any) -> bytes:
    return struct.pack(
        f"<II{len(array.shape)}q", _TYPES[array.dtype.name], len(array.shape), *array.shape
    )


def compiled(
    compiler: str,
    isa: build.Isa,
    folder: Path,
    *,
    more: Sequence[str] = (),
    is_static: bool = False,
) -> Path:
    """Returns the driver with the kernels for an instruction set, compiled as their library is, and as `more` says."""
    sources = [*sorted(build._SOURCES.glob("*.cc")), Path(__file__).with_name("native_driver.cc")]
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    given = (compiler, *build._FLAGS, *isa.flags, *more, "-isystem", jax.ffi.include_dir())
    pairs = zip(sources, objects, strict=True)
    build._run([(*given, "-c", str(source), "-o", made) for source, made in pairs])
    program = folder / "driver"
    linked = (*more, *(["-static"] if is_static else []), "-pthread", *objects)
    build._run([(compiler, *linked, "-o", str(program))])
    return program


def run_tests(driver: str, *, leaving_out: Sequence[str] = ()) -> None:
    """Runs the kernels' fast tests on a driver, in a process of its own; fails where one fails or is skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-p", "native_elsewhere", "-m", "not slow", *map(str, FILES)]
    command += ["-k", " and ".join(f"not {name}" for name in leaving_out)]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {"PYTHONPATH": path, "FLAXMILL_NATIVE": "require", DRIVER: driver}
    done = subprocess.run(
        command,
        env=os.environ | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    told = f"{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
    assert done.returncode == 0, told
    assert " passed" in done.stdout, told
    assert "skipped" not in done.stdout, told
