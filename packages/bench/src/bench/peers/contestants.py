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

from bench import machine, workloads
from bench.peers.process import BENCH, command
from bench.shapes import GptOssShape
from bench.workloads import Workload

OURS = "flaxmill"
PEERS_PYTHON = "FLAXMILL_PEERS_PYTHON"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """One implementation: the workloads it takes part in, and the command that starts it or why there is none.

    `refuses` says why one of these workloads cannot be done here; "" where nothing speaks against it.
    """

    name: str
    kinds: frozenset[workloads.Kind]
    command: tuple[str, ...] = ()
    absent: str = ""
    refuses: Callable[[Workload], str] = dataclasses.field(default=lambda _: "", compare=False)

    def obstacle(self, workload: Workload) -> str:
        """Says what keeps this contestant from a workload of its kinds; "" if nothing does."""
        return self.absent or self.refuses(workload)


def contestants(*, device: str, threads: int) -> tuple[Contestant, ...]:
    """Returns everyone, ours first; those that cannot run here say why."""
    ours = command(Path(sys.executable), "bench.peers.ours")
    python, absent = peers_python()

    def peer(name: str, mode: str, *kinds: workloads.Kind) -> Contestant:
        start = command(python, "bench.peers.pytorch", mode, device, str(threads)) if python else ()
        return Contestant(name=name, kinds=frozenset(kinds), command=start, absent=absent)

    return (
        Contestant(
            name=OURS,
            kinds=frozenset({"forward", "prefill", "decode", "train", "open", "load", "convert"}),
            command=ours,
        ),
        peer("torch eager", "eager", "forward", "train", "open"),
        peer("torch.compile", "compile", "forward", "train"),
        peer("HF generate", "eager", "prefill", "decode"),
        Contestant(
            name="transformers",
            kinds=frozenset({"load", "convert"}),
            command=command(python, "bench.peers.jobs", "transformers") if python else (),
            absent=absent,
            refuses=_unfit_for_transformers,
        ),
        _copier("cp + sha256sum"),
        _copier("cp + sync + sha256sum"),
        _copier("cp + sync + openssl"),
    )


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


def _missing(python: Path) -> str:
    """Says what keeps the peers from running in `python`; the empty string if nothing does."""
    probe = "import importlib.util as u; print(*[m for m in ('torch', 'transformers') if not u.find_spec(m)])"
    try:
        answer = subprocess.run(
            [python, "-P", "-c", probe], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"is not a working Python ({type(error).__name__})"
    absent = answer.stdout.split()
    return f"has no {' and no '.join(absent)}" if absent else ""


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
