"""Who takes part, and in which Python.

The peers need torch, which is no dependency of flaxmill's: `.venv-peers` holds it (make builds it), and
FLAXMILL_PEERS_PYTHON names another Python that has torch and transformers.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from bench import workloads

OURS = "flaxmill"
PEERS_PYTHON = "FLAXMILL_PEERS_PYTHON"
_BENCH = Path(workloads.__file__).parent

# Workers run this very copy of `bench`, in whichever Python, without a path that would show them our other packages.
_BOOTSTRAP = """
import importlib.util, sys
folder, module, *arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location("bench", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["bench"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["bench"])
importlib.import_module(module).main(*arguments)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """One implementation: the workloads it takes part in, and the command that starts it or why there is none."""

    name: str
    kinds: frozenset[workloads.Kind]
    command: tuple[str, ...] = ()
    absent: str = ""


def contestants(*, device: str, threads: int) -> tuple[Contestant, ...]:
    """Returns everyone, ours first; those that cannot run here say why."""
    ours = _command(Path(sys.executable), "bench.peers.ours")
    python, absent = peers_python()

    def peer(name: str, mode: str, *kinds: workloads.Kind) -> Contestant:
        command = (
            _command(python, "bench.peers.pytorch", mode, device, str(threads)) if python else ()
        )
        return Contestant(name=name, kinds=frozenset(kinds), command=command, absent=absent)

    return (
        Contestant(
            name=OURS,
            kinds=frozenset({"forward", "prefill", "decode", "train", "open"}),
            command=ours,
        ),
        peer("torch eager", "eager", "forward", "train", "open"),
        peer("torch.compile", "compile", "forward", "train"),
        peer("HF generate", "eager", "prefill", "decode"),
    )


def _command(python: Path, module: str, *arguments: str) -> tuple[str, ...]:
    return (str(python), "-P", "-c", _BOOTSTRAP, str(_BENCH), module, *arguments)


def peers_python() -> tuple[Path | None, str]:
    """Returns the Python in which the peers run, or None and the reason why they cannot."""
    named = os.environ.get(PEERS_PYTHON)
    if named:
        missing = _missing(Path(named))
        return (None, f"{PEERS_PYTHON}={named} {missing}") if missing else (Path(named), "")
    for root in (Path.cwd(), *_BENCH.parents):
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
