"""The package: a wheel that installs elsewhere, with and without a compiler."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SMOKE = """
import torch, lorakit as lk
from lorakit.kernels import dispatch
assert "{target}" in lk.__file__, lk.__file__
q = lk.kernels.quantize_nf4(torch.randn(100, 100))
lk.kernels.dequantize_nf4(q)
print("library", dispatch.library() is not None)
"""


def build(kind, out, **environment):
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "-o", out, "."]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(
        Path(out).glob("*.whl" if kind == "wheel" else "*.tar.gz")
    ), done.stdout + done.stderr


def import_elsewhere(wheel, folder):
    """Install into a folder of its own and import from another directory."""
    target = folder / "installed"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel]
    subprocess.run(pip, check=True, capture_output=True)
    code = SMOKE.format(target=target)
    # -S and an explicit path: this checkout's own editable install stays out of the way
    path = os.pathsep.join([str(target), *(p for p in sys.path if p.endswith("site-packages"))])
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel whose library is not optimized, which takes a quarter of the time to compile."""
    out = tmp_path_factory.mktemp("wheel")
    return build("wheel", out, SKBUILD_CMAKE_BUILD_TYPE="Debug")[0]


def test_wheel_installs_and_imports_elsewhere(wheel, tmp_path):
    done = import_elsewhere(wheel, tmp_path)
    assert done.stdout.strip() == "library True"
    assert "torch reference" not in done.stderr


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert re.fullmatch(r"lorakit-[\d.]+-py3-none-\w+\.whl", wheel.name)
    tops = {name.partition("/")[0] for name in names}
    assert len(tops) == 2  # lorakit and its dist-info: no top-level package `kernels`
    assert "lorakit/kernels/ops/nf4/reference.py" in names
    assert {"lorakit/py.typed", "lorakit/__init__.pyi"} <= set(names)  # for type checkers
    assert "lorakit/kernels/liblorakit_cpu.so" in names or sys.platform != "linux"
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    page = ROOT / "lorakit" / "board" / "page"
    files = {p.relative_to(ROOT).as_posix() for p in page.rglob("*") if p.is_file()}
    assert "lorakit/board/page/vendor/uplot/LICENSE" in files
    assert files <= set(names)


def test_installs_without_a_compiler_and_says_so(tmp_path):
    nothing = {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    wheel, log = build("wheel", tmp_path, **nothing)
    assert "no C++ compiler" in log
    done = import_elsewhere(wheel, tmp_path)
    assert done.stdout.strip() == "library False"
    assert done.stderr.count("CPU tensors use the slower torch reference") == 1


def test_sdist_holds_what_a_build_needs(tmp_path):
    import tarfile

    sdist, _ = build("sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "CMakeLists.txt",
        "kernels/simd.h",
        "kernels/digest.cmake",
        "kernels/ops/nf4/cpu.cpp",
        "lorakit/cli/main.py",
        "lorakit/py.typed",
        "LICENSE",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith((".venv", "runs", "build"))]


def test_library_exports_its_abi_only(wheel, tmp_path):
    if sys.platform != "linux":
        pytest.skip("reads ELF symbols")
    zipfile.ZipFile(wheel).extract("lorakit/kernels/liblorakit_cpu.so", tmp_path)
    library = tmp_path / "lorakit/kernels/liblorakit_cpu.so"
    done = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True)
    exported = {line.split()[2] for line in done.stdout.splitlines() if " T " in line}
    assert "lk_runnable" in exported
    assert all(name.startswith("lk_") for name in exported), exported
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    assert "gomp" not in needed.stdout  # torch's pool, not a second one
    assert "torch" not in needed.stdout


def test_no_absolute_path_or_host_is_committed():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in files.split():
        text = (ROOT / name).read_text(errors="ignore")
        assert not re.search(r"/(home|root)/\w", text), name
