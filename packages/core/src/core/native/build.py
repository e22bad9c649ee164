"""The kernels as a library: compiled by the host's C++ compiler, once, and kept in the user's cache.

    python -m core.native

compiles them now, which takes some seconds; else the first use does. A library is for one instruction set and one
version of the sources, of the compiler and of jaxlib, all of which its name says; it is written under another name and
then renamed, and its name ends in its own hash, so a file that is not whole is found out and made again. Of libraries
that were made before, the ones used last are kept.
"""

import contextlib
import dataclasses
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from core.errors import NativeError

CXX = "CXX"
_COMPILERS = ("c++", "g++", "clang++")
_SOURCES = Path(__file__).parent
_TIMEOUT_S = 300
_KEPT = 8  # libraries: all instruction sets of a processor, twice
_FLAGS = ("-std=c++17", "-O2", "-DNDEBUG", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-w")


@dataclasses.dataclass(frozen=True)
class Isa:
    """An instruction set: what the processor must have for it (as Linux names it), how the compiler is told."""

    name: str
    features: frozenset[str]
    flags: tuple[str, ...]


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_AVX2_FEATURES = frozenset({"avx2", "fma", "f16c"})
_AVX512_FEATURES = _AVX2_FEATURES | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_PLAIN = Isa("plain", frozenset(), ("-DFLAXMILL_PLAIN",))
_X86 = (
    Isa(
        "avx512bf16",  # Zen 4, Sapphire Rapids and later
        _AVX512_FEATURES | {"avx512_vnni", "avx512_bf16"},
        (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    ),
    Isa("avx512", _AVX512_FEATURES, _AVX512),
    Isa("avx2", _AVX2_FEATURES, _AVX2),
    _PLAIN,
)
_ISAS: Mapping[str, tuple[Isa, ...]] = {
    "x86_64": _X86,
    "amd64": _X86,
    "aarch64": (Isa("neon", frozenset(), ()), _PLAIN),
    "arm64": (Isa("neon", frozenset(), ()), _PLAIN),
}


def isas() -> dict[str, Isa]:
    """Returns the instruction sets that this processor has, the best first."""
    features = _features()
    known = _ISAS.get(platform.machine().lower(), (_PLAIN,))
    return {isa.name: isa for isa in known if isa.features <= features}


def library(isa: Isa) -> Path:
    """Returns the library for `isa`, compiled now if the cache has none that is whole.

    Any number of processes may ask at once; one compiles, the others wait for it.

    Raises:
      NativeError: there is no compiler, or it fails.
    """
    compiler, version = _compiler()
    key = _key(isa, compiler, version)
    folder = _cache()
    with _alone(folder / f"{key}.lock"):
        for path in sorted(folder.glob(f"{key}-*.so")):
            if path.stem.rpartition("-")[2] == _digest(path.read_bytes()):
                with contextlib.suppress(OSError):
                    os.utime(path)  # it has been used
                return path
            path.unlink(missing_ok=True)
        path = _compile(compiler, isa, folder, key)
        _drop_old(folder)
        return path


def main() -> None:
    """Compiles for this machine; what is missing is said in one line, and is no failure."""
    try:
        library(next(iter(isas().values())))
    except (NativeError, OSError) as error:
        print(f"note: no native kernels: {error}", file=sys.stderr)  # noqa: T201


def _compile(compiler: tuple[str, ...], isa: Isa, folder: Path, key: str) -> Path:
    import jax

    include = ("-isystem", jax.ffi.include_dir())
    with tempfile.TemporaryDirectory(prefix=f"{key}.", dir=folder) as scratch:
        sources = sorted(_SOURCES.glob("*.cc"))
        objects = [str(Path(scratch, source.stem + ".o")) for source in sources]
        commands = [
            (*compiler, *_FLAGS, *isa.flags, *include, "-c", str(source), "-o", to)
            for source, to in zip(sources, objects, strict=True)
        ]
        _run(commands)
        made = Path(scratch, "library.so")
        _run([(*compiler, "-shared", "-pthread", *objects, "-o", str(made))])
        path = folder / f"{key}-{_digest(made.read_bytes())}.so"
        made.replace(path)
    return path


def _drop_old(folder: Path) -> None:
    """Removes all libraries but those that were used last, and their locks; who has one open keeps it."""
    found = []
    for path in folder.glob("*.so"):
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(found, reverse=True)[_KEPT:]:
        key = path.stem.rpartition("-")[0]
        path.unlink(missing_ok=True)
        if not any(folder.glob(f"{key}-*.so")):
            (folder / f"{key}.lock").unlink(missing_ok=True)


def _run(commands: list[tuple[str, ...]]) -> None:
    """Runs all of them at once.

    Raises:
      NativeError: one fails, or takes minutes.
    """
    with contextlib.ExitStack() as stack:
        running = []
        for command in commands:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            running.append(process)
        for process in running:
            try:
                said, _ = process.communicate(timeout=_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise NativeError(f"{commands[0][0]} took more than {_TIMEOUT_S} s") from None
            if process.returncode:
                line = next((line for line in said.splitlines() if "error" in line), said[:200])
                raise NativeError(f"{commands[0][0]} ended with {process.returncode}: {line}")


def _compiler() -> tuple[tuple[str, ...], str]:
    """Returns the command of the host's C++ compiler, and what it says of its version."""
    named = shlex.split(os.environ.get(CXX, ""))
    for command in [named] if named else [[name] for name in _COMPILERS]:
        found = shutil.which(command[0])
        if found is None:
            continue
        try:
            done = subprocess.run(
                [found, *command[1:], "--version"], capture_output=True, text=True, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return (found, *command[1:]), done.stdout
    looked = f"{CXX}={shlex.join(named)}" if named else ", ".join(_COMPILERS)
    raise NativeError(
        f"found no C++ compiler that runs ({looked}); install one, or name it in {CXX}"
    )


def _key(isa: Isa, compiler: tuple[str, ...], version: str) -> str:
    said = [*compiler, version, *_FLAGS, isa.name, *isa.flags, metadata.version("jaxlib")]
    parts = [text.encode() for text in said]
    for source in sorted([*_SOURCES.glob("*.cc"), *_SOURCES.glob("*.h")]):
        parts += [source.name.encode(), source.read_bytes()]
    return f"{isa.name}-{_digest(b''.join(_digest(part).encode() for part in parts))[:16]}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _cache() -> Path:
    """Returns a folder that only this user writes to: in the user's cache, else among the temporary files.

    Raises:
      NativeError: there is neither.
    """
    homes = [os.environ.get("XDG_CACHE_HOME"), os.path.expanduser("~/.cache")]  # noqa: PTH111
    places = [Path(home, "flaxmill", "native") for home in homes if home and os.path.isabs(home)]  # noqa: PTH117
    places.append(Path(tempfile.gettempdir(), f"flaxmill-native-{os.getuid()}"))
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            status = place.lstat()
            ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
            if ours and not status.st_mode & 0o022 and os.access(place, os.W_OK):
                return place
    raise NativeError(
        f"no folder for compiled kernels can be written to ({', '.join(map(str, places))})"
    )


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds the lock `path`; where the file system has no locks, renaming is safe as well, and work is done twice."""
    import fcntl

    with path.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _features() -> frozenset[str]:
    """Returns what the processor has by Linux's account; nothing where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split()[2:] for line in lines if line.startswith("flags")), ()))
