"""The number of threads, and the kernels' own: what may change is who computes, never a bit."""

import multiprocessing
import os
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit import kernels
from lorakit.kernels import dispatch, processors, threads

needs_library = pytest.mark.skipif(dispatch.library() is None, reason="the kernels are not built")


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


V1 = "4:memory:/box\n2:cpu,cpuacct:/box/job\n0::/\n"


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
        (  # the lowest of the groups on the way up
            {
                "proc/self/cgroup": "0::/a/b/c\n",
                "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "50000 20000\n",
                "sys/fs/cgroup/a/b/c/cpu.max": "max 100000\n",
            },
            2.5,
        ),
        (  # the name is the host's, the mount the container's
            {"proc/self/cgroup": "0::/../host/job\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"},
            2.0,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/box/job/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/box/job/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "350000\n",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
            },
            3.5,
        ),
        (  # under the other name that the controllers are mounted by
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/box/job/cpu.cfs_quota_us": "10000\n",
                "sys/fs/cgroup/cpu/box/job/cpu.cfs_period_us": "100000\n",
            },
            0.1,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "many 1\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, None),
        ({"proc/self/cgroup": "nothing\n", "sys/fs/cgroup/cpu.max": ""}, None),
    ],
)
def test_the_quota_of_a_control_group(tmp_path, files, limit):
    write(tmp_path, files)
    assert processors.quota(tmp_path) == limit


@given(st.text(), st.text())
def test_no_text_in_the_files_of_the_system_is_an_error(tmp_path_factory, groups, limit):
    root = tmp_path_factory.mktemp("root")
    for name, text in (("proc/self/cgroup", groups), ("sys/fs/cgroup/cpu.max", limit)):
        path = root / name
        path.parent.mkdir(parents=True)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    found = processors.quota(root)
    assert found is None or found > 0


@pytest.mark.parametrize(
    ("affinity", "limit", "usable"),
    [(8, None, 8), (8, 1.5, 2), (8, 0.1, 1), (2, 16.0, 2), (1, 1.0, 1)],
)
def test_threads_follow_affinity_and_quota(monkeypatch, affinity, limit, usable):
    monkeypatch.setattr(processors, "_affinity", lambda: affinity)
    monkeypatch.setattr(processors, "quota", lambda root: limit)
    assert processors.usable() == usable


@pytest.fixture
def fitted(monkeypatch):
    """Returns torch's threads after `fit`, of a process with 8 processors and a quota of 2."""
    monkeypatch.setattr(processors, "_affinity", lambda: 8)
    monkeypatch.setattr(processors, "quota", lambda root: 2.0)
    for name in processors.SET_BY_HAND:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()

    def found(count):
        torch.set_num_threads(count)
        processors.fit.__wrapped__()
        return torch.get_num_threads()

    yield found
    torch.set_num_threads(before)


@pytest.mark.parametrize(("torchs", "after"), [(8, 2), (4, 2), (3, 3), (1, 1), (12, 12)])
def test_what_torch_takes_by_itself_is_fitted_and_what_was_set_stays(fitted, torchs, after):
    assert fitted(torchs) == after


@pytest.mark.parametrize("name", processors.SET_BY_HAND)
def test_a_number_in_the_environment_stays(fitted, monkeypatch, name):
    monkeypatch.setenv(name, "8")
    assert fitted(8) == 8
    assert processors.set_by_hand()


@pytest.mark.parametrize(("torchs", "hand"), [(8, False), (4, False), (2, False), (3, True)])
def test_whose_number_it_is_can_still_be_told_after_it_was_fitted(fitted, torchs, hand):
    fitted(torchs)
    assert processors.set_by_hand() is hand


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5000000 2500000000 17\n", 2.5),
        ("0 0 0\n", 0.0),
        ("1 2\n", None),
        ("", None),
        ("a b c", None),
    ],
)
def test_how_long_a_thread_has_waited_for_a_processor(tmp_path, text, seconds):
    write(tmp_path, {"proc/thread-self/schedstat": text})
    assert processors.waited(tmp_path) == seconds
    assert processors.waited(tmp_path / "elsewhere") is None


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_library
def test_the_kernels_own_threads_are_as_many_as_torch_had(torch_threads):
    torch_threads(3)
    with threads.own_threads():
        assert (threads.count(), torch.get_num_threads()) == (3, 1)
        with threads.own_threads():
            assert (threads.count(), torch.get_num_threads()) == (3, 1)
        assert threads.count() == 3
    assert threads.count() == torch.get_num_threads() == 3


@needs_library
def test_they_end_with_an_error_too(torch_threads):
    torch_threads(2)
    with pytest.raises(KeyError), threads.own_threads():
        raise KeyError
    assert threads.count() == torch.get_num_threads() == 2


def results():
    """Gradients of ops whose loops are shared among threads."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 520, generator=generator, requires_grad=True) for n in (301, 1))
    y = kernels.rms_norm(kernels.swiglu(x, x.flip(0)), w[0], 1e-5)
    loss, _ = kernels.cross_entropy(y, torch.arange(301))
    q = torch.randn(2, 200, 4, 32, generator=generator, requires_grad=True)
    total = loss + kernels.attention(q, q[:, :, :2], q[:, :, 2:]).square().sum()
    return [total, *torch.autograd.grad(total, (x, w, q))]


@needs_library
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_number_of_own_threads_changes_no_bit(torch_threads, count):
    torch_threads(1)
    one = results()
    torch_threads(count)
    with threads.own_threads():
        for _ in range(20):  # the helpers come early, late or not at all
            assert all(map(torch.equal, one, results()))


@needs_library
def test_threads_of_python_share_them(torch_threads):
    """One of them has the helpers; the others work alone."""
    torch_threads(1)
    one, same = results(), []

    def work():
        for _ in range(5):
            same.append(all(map(torch.equal, one, results())))

    torch_threads(3)
    with threads.own_threads():
        workers = [threading.Thread(target=work) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert same == [True] * 15


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_threads_of_its_own(torch_threads):
    torch_threads(1)
    one = results()
    torch_threads(3)
    with threads.own_threads():
        results()
        child = multiprocessing.get_context("fork").Process(target=_same_in_child, args=(one,))
        child.start()
        child.join(60)
    assert child.exitcode == 0


def _same_in_child(one):
    os._exit(not all(map(torch.equal, one, results())))
