"""Which backend runs: by device, by what the kernels take, and by force."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lorakit import kernels
from lorakit.kernels import dispatch, pretend

OP = "lorakit.kernels.ops.swiglu"  # has all three
CPU, META = torch.device("cpu"), torch.device("meta")
compiled = pytest.mark.skipif(dispatch.library() is None, reason="the library is not built")


def picked(device=CPU, **takes):
    return dispatch.backend(OP, device, **takes).__name__.removeprefix(f"{OP}.")


@compiled
def test_a_module_is_picked_by_the_device():
    assert picked() == "cpu"
    assert picked(META) == "reference"


@compiled
def test_what_a_kernel_does_not_take_goes_to_the_reference():
    assert picked(cpu=False) == "reference"
    assert picked(triton=False) == "cpu"


@compiled
def test_a_forced_backend_raises_on_another_device():
    with kernels.use_backend("reference"):
        assert picked() == "reference"
    with kernels.use_backend("cpu"):
        assert picked() == "cpu"
        assert picked(cpu=False) == "reference"
        with pytest.raises(RuntimeError, match="'cpu' is forced, but the tensor is on meta"):
            picked(META)
        assert picked(META, cpu=False, triton=False) == "reference"
    assert picked() == "cpu"


def test_use_backend(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'cuda'"), kernels.use_backend("cuda"):
        pass
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="triton"), kernels.use_backend("triton"):
        pass


@compiled
def test_a_library_of_other_sources_is_refused(monkeypatch, tmp_path):
    """Torch's own library has no digest at all, and ours has that of all files."""
    message = r"was made of other sources than those in .*; build it again"
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "dispatch.py"))
    dispatch.library.__wrapped__()  # a wheel has no sources
    (tmp_path / "one.h").write_text("// another")
    with pytest.raises(RuntimeError, match=message):
        dispatch.library.__wrapped__()
    monkeypatch.setenv("LORAKIT_LIBRARY", torch._C.__file__)
    with pytest.raises(RuntimeError, match=message):
        dispatch.library.__wrapped__()


def test_without_the_library_every_op_runs_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.delenv("LORAKIT_LIBRARY", raising=False)
    monkeypatch.setattr(dispatch, "LIBRARY", "missing.so")
    dispatch.library.cache_clear()
    try:
        for _ in range(3):
            q = kernels.quantize_nf4(torch.randn(64))
            kernels.dequantize_nf4(q)
        assert len(caplog.messages) == 1
        assert "reference" in caplog.messages[0]
        with pytest.raises(RuntimeError, match="not built"), kernels.use_backend("cpu"):
            pass
    finally:
        dispatch.library.cache_clear()


def test_each_thread_pretends_for_itself():
    """One takes the meta device for a GPU, one for a CPU, and a third for what it is."""
    all_three = threading.Barrier(3, timeout=10)

    def seen(pretended):
        with pretended():
            all_three.wait()
            found = pretend.kind_of(META), pretend.kind_of(CPU)
            all_three.wait()
            return found

    with ThreadPoolExecutor(2) as threads:
        both = threads.map(seen, [pretend.pretend_gpu, pretend.pretend_cpu])
        all_three.wait()
        assert pretend.kind_of(META) == "meta"
        all_three.wait()
        assert list(both) == [("cuda", "cpu"), ("cpu", "cpu")]
    assert not pretend.by_thread
