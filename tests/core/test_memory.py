"""What is free is what the machine has left and what the control groups around this process still allow."""

import types
from pathlib import Path

import psutil
import pytest

from core import memory

MB = 2**20


def group(folder: Path, limit: int | str, used: int, *, caches: int = 0, version: int = 2) -> None:
    """Writes a control group as Linux shows it; of what is used, `caches` are of files, active and not."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("memory.max", "memory.current"),
    }
    total = "total_" if version == 1 else ""
    for name, value in zip(names[version], (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    lines = {
        "anon": used - caches,
        "inactive_file": caches // 4,
        "active_file": caches - caches // 4,
    }
    stat = "".join(f"{total}{name} {value}\n" for name, value in lines.items())
    (folder / "memory.stat").write_text(stat + "inactive_file_unlike 5\n")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """What /proc/self/cgroup says."""
    path = tmp_path / "own"
    path.write_text("0::/job/worker\n")
    return path


def test_a_limit_is_what_is_free_where_the_machine_has_more(tmp_path: Path, own: Path):
    group(tmp_path / "job/worker", 30 * MB, 20 * MB, caches=8 * MB)
    assert memory.free_on_host(tmp_path, own) == 18 * MB


def test_the_narrowest_of_the_groups_around_counts(tmp_path: Path, own: Path):
    group(tmp_path / "job/worker", 30 * MB, 20 * MB)
    group(tmp_path / "job", 50 * MB, 47 * MB, caches=MB)
    group(tmp_path, "max", 10**12)
    assert memory.free_on_host(tmp_path, own) == 4 * MB
    group(tmp_path / "job", "max", 47 * MB)
    assert memory.free_on_host(tmp_path, own) == 10 * MB
    group(tmp_path, 9 * MB, 8 * MB)
    assert memory.free_on_host(tmp_path, own) == MB


def test_in_a_container_what_is_mounted_counts_whatever_the_names_outside(
    tmp_path: Path, own: Path
):
    group(tmp_path, 30 * MB, 20 * MB)
    assert memory.free_on_host(tmp_path, own) == 10 * MB


def test_the_first_version_has_its_own_names(tmp_path: Path, own: Path):
    own.write_text("9:cpu,cpuacct:/else\n4:hugetlb,memory:/job\n1:name=systemd:/\n0::/\n")
    group(tmp_path / "memory", 9223372036854771712, 10**12, version=1)
    group(tmp_path / "memory/job", 40 * MB, 30 * MB, caches=3 * MB, version=1)
    group(tmp_path / "else", MB, MB)
    assert memory.free_on_host(tmp_path, own) == 13 * MB


def test_who_is_over_the_limit_has_nothing_left(tmp_path: Path, own: Path):
    group(tmp_path / "job/worker", 20 * MB, 21 * MB)
    assert memory.free_on_host(tmp_path, own) == 0


@pytest.mark.parametrize("limit", ["max", 2**62, "", "none"])
def test_without_a_limit_the_machine_has_what_it_has(tmp_path: Path, own: Path, limit: int | str):
    group(tmp_path / "job/worker", limit, 20 * MB)
    there = psutil.virtual_memory().available
    assert memory.free_on_host(tmp_path, own) == pytest.approx(there, rel=0.2)
    assert memory.free_on_host(tmp_path, tmp_path / "none") == pytest.approx(there, rel=0.2)


def test_a_processor_has_what_this_process_may_take():
    device = types.SimpleNamespace(platform="cpu")
    assert memory.free(device) == pytest.approx(memory.free_on_host(), rel=0.2)


def test_an_accelerator_has_its_own():
    stats = {"bytes_limit": 9, "bytes_in_use": 4}
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    assert memory.free(device) == 5
    stats.clear()
    assert memory.free(device) is None
