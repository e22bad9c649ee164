"""Who takes part, and in which Python.

The peers need torch, which is no dependency of flaxmill's: `.venv-peers` holds it (make builds it), and
FLAXMILL_PEERS_PYTHON names another Python that has torch and transformers.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from bench import machine, workloads
from bench.peers.process import BENCH, command
from bench.shapes import GptOssShape
from bench.workloads import Workload
from train import pages

OURS, STATIC_BATCH, ENGINE = "flaxmill", "flaxmill, equal lengths", "flaxmill, engine alone"
TORCH = "torch eager"
EVERYTHING: frozenset[workloads.Kind] = frozenset(get_args(workloads.Kind))
PEERS_PYTHON = "FLAXMILL_PEERS_PYTHON"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """One implementation: the workloads it takes part in, and the command that starts it or why there is none.

    `refuses` says why one of these workloads cannot be done here; "" where nothing speaks against it. `tells_ceilings`:
    it is asked for the rates that it reaches on this machine.
    """

    name: str
    kinds: frozenset[workloads.Kind]
    command: tuple[str, ...] = ()
    absent: str = ""
    tells_ceilings: bool = False
    refuses: Callable[[Workload], str] = dataclasses.field(default=lambda _: "", compare=False)

    def obstacle(self, workload: Workload) -> str:
        """Says what keeps this contestant from a workload of its kinds; "" if nothing does."""
        return self.absent or self.refuses(workload)


def contestants(*, device: str, threads: int) -> tuple[Contestant, ...]:
    """Returns everyone, ours first; those that cannot run here say why."""
    python, absent = peers_python()

    def peer(name: str, module: str, *arguments: str, **values: Any) -> Contestant:
        start = command(python, f"bench.peers.{module}", *arguments) if python else ()
        return Contestant(**{"name": name, "command": start, "absent": absent} | values)

    def torch(name: str, mode: str, *kinds: workloads.Kind) -> Contestant:
        return peer(
            name,
            "pytorch",
            *(mode, device, str(threads)),
            kinds=frozenset(kinds),
            tells_ceilings=name == TORCH,  # which all of them would tell
            refuses=_unfit_for_torch,
        )

    return (
        _ours(OURS, "doors", *EVERYTHING),
        _ours(STATIC_BATCH, "static", "serve"),
        _ours(ENGINE, "engine", "batch"),
        torch(TORCH, "eager", "forward", "train", "open", "import"),
        torch(workloads.TORCH_COMPILE, "compile", "forward", "train", "compile"),
        torch(workloads.GENERATE, "eager", "prefill", "decode", "serve", "start"),
        torch(workloads.COMPILED, "compile", "decode"),
        _llama(peer, python, device=device, threads=threads),
        _ctranslate(peer, python, device=device, threads=threads),
        _onnx(peer, python, device=device, threads=threads),
        peer(
            "transformers",
            "jobs",
            "transformers",
            kinds=frozenset({"load", "convert"}),
            refuses=_unfit_for_transformers,
        ),
        _copier("cp + sha256sum"),
        _copier("cp + sync + sha256sum"),
        _copier("cp + sync + openssl"),
    )


def _ours(name: str, mode: str, *kinds: workloads.Kind) -> Contestant:
    start = command(Path(sys.executable), "bench.peers.ours", mode)
    kinds_ = frozenset(kinds)
    return Contestant(name=name, kinds=kinds_, command=start, tells_ceilings=name == OURS)


def _llama(
    peer: Callable[..., Contestant], python: Path | None, *, device: str, threads: int
) -> Contestant:
    """Returns llama.cpp: compiled for this very machine where that was done, else for any."""
    folder, absent = _llama_folder(python)
    return peer(
        workloads.LLAMA,
        "llama",
        str(folder or ""),
        str(threads),
        sys.executable,
        kinds=frozenset({"prefill", "decode", "serve", "start", "import", "giant"}),
        **_beyond(absent, device),
    )


def _llama_folder(python: Path | None) -> tuple[Path | None, str]:
    """Returns the folder that holds llama.cpp's package, None where it is installed, and why there is none."""
    if python is None:
        return None, ""
    for name in ("llama-native", "llama"):
        folder = python.parents[1] / name
        if (folder / "llama_cpp").is_dir():
            made_for = folder / "processor"
            if name == "llama-native" and (
                not made_for.exists() or made_for.read_text().strip() != machine.instructions()
            ):
                continue
            return folder, ""
    return None, _missing(python, "llama_cpp")


def _ctranslate(
    peer: Callable[..., Contestant], python: Path | None, *, device: str, threads: int
) -> Contestant:
    absent = _missing(python, "ctranslate2") if python else ""
    return peer(
        workloads.CTRANSLATE,
        "ctranslate",
        str(threads),
        kinds=frozenset({"prefill", "decode", "import"}),
        refuses=_unfit_for_ctranslate,
        **_beyond(absent, device),
    )


def _onnx(
    peer: Callable[..., Contestant], python: Path | None, *, device: str, threads: int
) -> Contestant:
    absent = _missing(python, "onnxruntime", "onnxscript") if python else ""
    return peer(
        workloads.ONNX,
        "onnx",
        str(threads),
        kinds=frozenset({"forward"}),
        refuses=_unfit_for_onnx,
        **_beyond(absent, device),
    )


def _beyond(absent: str, device: str) -> dict[str, str]:
    """Returns the reason why a peer of the CPU's is absent, if there is one."""
    if device != "cpu":
        return {"absent": "is measured on a CPU only"}
    return {"absent": absent} if absent else {}


def _copier(name: str) -> Contestant:
    """Returns who does what no conversion can do without: writes the bytes and hashes them."""
    missing = [tool for tool in name.split(" + ") if not shutil.which(tool)]
    return Contestant(
        name=name,
        kinds=frozenset({"convert"}),
        command=command(Path(sys.executable), "bench.peers.jobs", name),
        absent=f"there is no {missing[0]} here" if missing else "",
        refuses=_unfit_for_copying,
    )


def _unfit_for_torch(workload: Workload) -> str:
    if workload.precision == "int8":
        return "transformers has no int8 for a GPT-2 on a CPU"
    if isinstance(workload.shape, GptOssShape) and workload.kind == "start":
        return "is measured with GPT-2"
    return ""


def _unfit_for_ctranslate(workload: Workload) -> str:
    if isinstance(workload.shape, GptOssShape):
        return "has no converter for GPT-OSS"
    return ""


def _unfit_for_onnx(workload: Workload) -> str:
    if workload.precision != "float32":
        return "has no bfloat16 for this graph on a CPU"
    return ""


def _unfit_for_copying(workload: Workload) -> str:
    read, written = workload.source_bytes, workload.output_bytes
    if read == written:
        return ""
    return f"copies {read / 1e9:.1f} GB where {written / 1e9:.1f} GB are written"


def _unfit_for_transformers(workload: Workload) -> str:
    if isinstance(workload.shape, GptOssShape) and workload.experts == "keep":
        return "unpacks MXFP4 on a CPU, so it cannot write the same model"
    # It holds the whole model, and what it unpacks or writes at the moment beside it.
    needed, free = 1.5 * workload.output_bytes, machine.free_memory_bytes()
    if needed > free:
        return f"needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB free"
    return ""


def peers_python() -> tuple[Path | None, str]:
    """Returns the Python in which the peers run, or None and the reason why they cannot."""
    named = os.environ.get(PEERS_PYTHON)
    if named:
        missing = _missing(Path(named))
        return (None, f"{PEERS_PYTHON}={named} {missing}") if missing else (Path(named), "")
    for root in (Path.cwd(), *BENCH.parents):
        if (root / ".venv-peers/bin/python").exists():
            candidate = root / ".venv-peers/bin/python"
            missing = _missing(candidate)
            return (None, f".venv-peers {missing}") if missing else (candidate, "")
    if not _missing(Path(sys.executable)):
        return Path(sys.executable), ""
    return None, "torch is not installed (make bench builds .venv-peers)"


def _missing(python: Path, *modules: str) -> str:
    """Says what keeps what needs these modules from running in `python`; the empty string if nothing does."""
    modules = modules or ("torch", "transformers")
    probe = f"import importlib.util as u; print(*[m for m in {modules} if not u.find_spec(m)])"
    try:
        answer = subprocess.run(
            [python, "-P", "-c", probe], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"is not a working Python ({type(error).__name__})"
    absent = answer.stdout.split()
    return f"has no {' and no '.join(absent)}" if absent else ""


def settings_for(kind: workloads.Kind, base: Mapping[str, str]) -> dict[str, str]:
    """Returns what a worker's environment has for one kind of work beyond `base`.

    Training takes large pages from the C library, where the system has them: `python -m train` starts itself so, and
    PyTorch is no slower for it (docs/log.md).
    """
    tunables = pages.tunables(base) if kind == "train" else None
    return {} if tunables is None else {pages.TUNABLES: tunables}


def environment(
    base: Mapping[str, str], *, device: str, threads: int, scratch: Path
) -> dict[str, str]:
    """Returns the environment of every worker: the same threads, no network, compiler caches that begin empty."""
    env = {
        **base,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
    }
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    if device == "cpu":
        env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return env
