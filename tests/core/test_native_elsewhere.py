"""The kernels' own tests once more: under the sanitizers, and as an ARM processor computes them."""

import shutil
import subprocess
from pathlib import Path

import pytest

import native_elsewhere
from core import native
from core.errors import NativeError
from core.native import build

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SANITIZERS = ("-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ARM_COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
ARM = {isa.name: isa for isa in build._ISAS["aarch64"]}

# What they say is of how JAX calls a kernel, not of what it computes.
OF_JAX = ("no_gradient", "while_serving", "read_where_they_lie", "nothing_else_does")


@pytest.fixture(autouse=True)
def kernels() -> None:
    if not native.available():
        pytest.skip("no native kernels: no C++ compiler, or FLAXMILL_NATIVE=off")


@pytest.fixture
def compiler(tmp_path: Path) -> str:
    """The compiler of the kernels, if it has the sanitizers."""
    (found, *_), _ = build._compiler()
    source, program = tmp_path / "empty.cc", tmp_path / "empty"
    source.write_text("int main() {}")
    try:
        build._run([(found, *SANITIZERS, str(source), "-o", str(program))])
        subprocess.run([program], check=True)
    except (NativeError, subprocess.CalledProcessError) as error:
        pytest.skip(f"{found} makes no program with sanitizers here: {error}")
    return found


@pytest.mark.parametrize("isa", list(build.isas()))
def test_no_kernel_reads_beyond_its_arrays_or_does_what_is_not_defined(
    isa: str, compiler: str, tmp_path: Path
):
    """Each array is an allocation of its own there, with nothing to be touched before and after it."""
    program = native_elsewhere.compiled(compiler, build.isas()[isa], tmp_path, more=SANITIZERS)
    native_elsewhere.run_tests(str(program), leaving_out=OF_JAX)


@pytest.mark.parametrize("isa", ARM)
def test_an_arm_processor_computes_the_same(isa: str, tmp_path: Path):
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    if shutil.which(ARM_COMPILER) is None or emulator is None:
        pytest.skip(f"needs {ARM_COMPILER} and {EMULATORS[0]} (g++-aarch64-linux-gnu, qemu-user)")
    program = native_elsewhere.compiled(ARM_COMPILER, ARM[isa], tmp_path, is_static=True)
    native_elsewhere.run_tests(f"{emulator} {program}", leaving_out=OF_JAX)
