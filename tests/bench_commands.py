"""`python -m bench` as a process of its own, without torch."""

import os
import subprocess
import sys
from pathlib import Path

from bench.peers.contestants import PEERS_PYTHON


def started(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "bench", *arguments],
        cwd=cwd,
        env={**os.environ, PEERS_PYTHON: "absent"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
