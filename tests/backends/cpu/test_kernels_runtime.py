"""Instruction sets, threads, and what two compilations of one source may not share."""

import ctypes
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from quire.backends.cpu import _native as native


def python(code, **environment):
    return subprocess.run([sys.executable, "-P", "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
                          capture_output=True, text=True, timeout=120, check=False)  # fmt: skip


def test_instruction_sets():
    available = native.available_isas()
    assert available[-1] == "portable"
    assert native.isa() in available
    with pytest.raises(ValueError, match=r"choose one of .*portable"):
        native.set_isa("neon9")
    code = "from quire.backends.cpu import _native as n; print(n.isa())"
    assert python(code, QUIRE_ISA="portable").stdout.strip() == "portable"
    assert python(code, QUIRE_ISA="").stdout.strip() == available[0]
    failed = python(code, QUIRE_ISA="sse9")
    assert failed.returncode != 0
    assert "QUIRE_ISA: instruction set 'sse9' is not available on this machine: choose one of" in failed.stderr


def test_packed_weights_keep_their_instruction_set():
    before = native.isa()
    native.set_isa("portable")
    packed = native.pack_linear(np.ones((5, 7), np.float32))
    native.set_isa(before)
    assert packed.isa == "portable"
    out = np.zeros((2, 5), np.float32)
    native.linear(packed, np.ones((2, 7), np.float32), out)
    assert (out == 7).all()


def test_number_of_threads():
    before = native.num_threads()
    assert 1 <= native.default_num_threads() <= len(os.sched_getaffinity(0))
    try:
        for n in (1, 4, 2, 7, 1):
            native.set_num_threads(n)
            assert native.num_threads() == n
        for wrong in (0, -1, 257):
            with pytest.raises(ValueError, match="1 to 256"):
                native.set_num_threads(wrong)
    finally:
        native.set_num_threads(before)


def tree(root, groups, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return str(root)


V1 = "3:memory:/\n2:cpu,cpuacct:/box/job\n1:name=systemd:/box/job\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "1000 1000000\n"}, 0.01),
        # The process's own group, and those above it.
        ("0::/box/job\n", {"box/job/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/box/job\n", {"box/job/cpu.max": "max 100000\n", "box/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/box/job\n", {"box/job/cpu.max": "50000 100000\n", "box/cpu.max": "200000 100000\n"}, 0.5),
        ("0::/box/job\n", {"other/cpu.max": "50000 100000\n"}, None),
        # Paths of a host that a container does not see.
        ("0::/host/docker-1234\n", {"cpu.max": "400000 200000\n"}, 2.0),
        ("0::/../../other\n", {"cpu.max": "400000 100000\n"}, 4.0),
        # Version 1, where the controller is mounted under either name.
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        (V1, {"cpu,cpuacct/box/job/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/box/job/cpu.cfs_period_us": "100000\n"}, 2.5),
        (V1, {"cpu/box/cpu.cfs_quota_us": "250000\n", "cpu/box/cpu.cfs_period_us": "1000000\n"}, 0.25),
        # Nonsense is no quota.
        ("nothing here\n0:\n", {"cpu.max": "50000 100000\n"}, None),
        ("0::/\n", {"cpu.max": "many 100000\n"}, None),
        ("0::/\n", {"cpu.max": "50000 0\n"}, None),
    ],
)
def test_quotas_of_control_groups(tmp_path, groups, files, expected):
    assert native.cpu_quota(tree(tmp_path, groups, files)) == expected


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert native.cpu_quota(str(tmp_path)) is None


def test_the_callers_floating_point_mode_changes_nothing():
    """A library may tell the calling thread to flush subnormals to 0, which workers would not."""
    if platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        pytest.skip("fenv_t is another one here")
    libm = ctypes.CDLL("libm.so.6")
    plain, flushing, now = (ctypes.create_string_buffer(32) for _ in range(3))
    libm.fegetenv(plain)
    mode = int.from_bytes(plain.raw[28:], "little")  # MXCSR
    flushing.raw = plain.raw[:28] + (mode | 0x8040).to_bytes(4, "little")
    packed = native.pack_linear(np.full((1000, 8), 1e-20, np.float32))
    x, expected, out = np.full((3, 8), 1e-20, np.float32), np.zeros((3, 1000), np.float32), np.zeros((3, 1000), np.float32)
    native.linear(packed, x, expected)
    libm.fesetenv(flushing)
    try:
        native.linear(packed, x, out)
        libm.fegetenv(now)
    finally:
        libm.fesetenv(plain)
    assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))
    assert expected.view(np.uint32).all()
    assert int.from_bytes(now.raw[28:], "little") & 0x8040 == 0x8040


@pytest.mark.parametrize("threads", [1, 2])
def test_a_task_without_memory_ends_the_call_alone(threads):
    """The sampler wants 160 MB for each thread; then there is room again."""
    code = f"""
import resource, numpy as np
from quire.backends.cpu import _native as native
native.set_num_threads({threads})
logits, zeros = np.zeros((2, 40_000_000), np.float32), np.zeros(2, np.int32)
packed, x, out = native.pack_linear(np.ones((256, 64), np.float32)), np.ones((8, 64), np.float32), np.zeros((8, 256), np.float32)
native.linear(packed, x, out)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))
for _ in range(20):
    try:
        native.sample(logits, zeros, zeros, temperature=np.ones(2, np.float32), seed=np.zeros(2, np.uint64), position=np.zeros(2, np.int64))
    except MemoryError:
        print("no memory")
out[:] = 0
native.linear(packed, x, out)
print(out.min(), out.max())
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["no memory"] * 20 + ["64.0 64.0", ""]


def test_long_regions_with_more_threads_than_cores():
    """Workers leave a region between two tasks and come back to it, or to the next one."""
    before = native.num_threads()
    rng = np.random.default_rng(0)
    packed = native.pack_linear(rng.standard_normal((3000, 512)).astype(np.float32))
    x = rng.standard_normal((700, 512)).astype(np.float32)
    try:
        native.set_num_threads(1)
        expected = np.empty((700, 3000), np.float32)
        native.linear(packed, x, expected)
        native.set_num_threads(2 * len(os.sched_getaffinity(0)) + 1)
        for _ in range(10):
            out = np.zeros((700, 3000), np.float32)
            native.linear(packed, x, out)
            assert np.array_equal(out, expected)
            for row in range(20):  # short ones at once after it
                native.linear(packed, x[row : row + 1], out[row : row + 1])
            assert np.array_equal(out, expected)
    finally:
        native.set_num_threads(before)


def test_calls_from_several_threads_at_once():
    """Regions wait for each other; a change of the number of threads waits as well."""
    rng = np.random.default_rng(0)
    packed = native.pack_linear(rng.standard_normal((300, 64)).astype(np.float32))
    x = rng.standard_normal((20, 64)).astype(np.float32)
    expected = np.empty((20, 300), np.float32)
    native.linear(packed, x, expected)
    before, wrong = native.num_threads(), []

    def work():
        out = np.empty((20, 300), np.float32)
        for _ in range(200):
            out[:] = 0
            native.linear(packed, x, out)
            if not np.array_equal(out, expected):
                wrong.append(out.copy())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for n in (3, 1, 4, 2):
        native.set_num_threads(n)
    for t in threads:
        t.join()
    native.set_num_threads(before)
    assert not wrong


def test_the_interpreter_ends_while_workers_sleep_and_children_work_after_fork():
    code = """
import numpy as np, os
from quire.backends.cpu import _native as n
n.set_num_threads(4)
packed = n.pack_linear(np.ones((500, 100), np.float32))
def run():
    out = np.zeros((9, 500), np.float32)
    n.linear(packed, np.ones((9, 100), np.float32), out)
    assert (out == 100).all()
run()
child = os.fork()
run()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("done")
"""
    done = python(code)
    assert done.stdout.strip() == "done", done.stderr
    assert done.returncode == 0


def test_limits_are_measured():
    before = native.isa()
    for isa in native.available_isas():
        native.set_isa(isa)
        assert all(native.measure_peak(kind) > 0 for kind in ("float32", "bfloat16", "int8"))
    native.set_isa(before)
    assert native.measure_read_bandwidth(1 << 20, 0) > 0
    for wrong in ((100, 0.1), (1 << 20, -1.0), (1 << 20, float("nan"))):
        with pytest.raises(ValueError, match=r"bytes must|seconds must"):
            native.measure_read_bandwidth(*wrong)
    for together in (False, True):
        assert 0 < native.measure_region(together) < 10


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_memory_of_weights_is_given_back_to_the_last_page() -> None:
    """A process may have some 65,000 mappings: a page that stays mapped beside the weights of each expert of a large model uses them up."""

    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    def weights() -> list[native.PackedLinear]:
        return [native.pack_linear(np.zeros((64 + i, 64), np.float32)) for i in range(100)]

    weights()
    before = mappings()
    kept = weights()
    assert mappings() - before < 120
    del kept
    assert abs(mappings() - before) < 20
