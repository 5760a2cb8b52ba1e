"""The vectors of kernels/simd.h, value by value: simd_check.cpp is compiled for an instruction set
and run. NEON's form is compiled by Debian's g++-aarch64-linux-gnu and runs under qemu-user: no
other test reaches it on an x86 machine.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.instruction_sets import ISAS

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("kernels/ops/*/cpu.cpp"))
AVX2 = ("-mavx2", "-mfma")
FLAGS = {
    "scalar": (),
    "avx2": AVX2,
    "avx512": (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    "neon": ("-DLORAKIT_NEON",),
}
CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"


def compiled(compiler, isa, source, *options):
    command = [compiler, "-std=c++17", "-O2", "-ffp-contract=off", f"-DLORAKIT_ISA={isa}"]
    command += [f"-I{ROOT / 'kernels'}", *FLAGS[isa], *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("isa", FLAGS)
def test_the_functions_of_a_vector(isa, tmp_path):
    compiler, runner, options = "c++", [], []
    if isa == "neon" and platform.machine() != "aarch64":
        compiler, runner, options = CROSS, [QEMU], ["-static"]
    elif isa not in ISAS:
        pytest.skip(f"this processor has no {isa}")
    for program in (compiler, *runner):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    program = tmp_path / "check"
    compiled(compiler, isa, ROOT / "tests/kernels/simd_check.cpp", *options, "-o", program)
    done = subprocess.run([*runner, program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith(" lanes, 0 failures\n")


@pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"{CROSS} is not installed")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.name)
@pytest.mark.parametrize("isa", ["scalar", "neon"])
def test_every_kernel_compiles_for_aarch64(source, isa):
    """The compiler warns of nothing."""
    compiled(CROSS, isa, source, "-Wall", "-Wextra", "-Werror", "-fsyntax-only")
