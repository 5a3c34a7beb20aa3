"""Available memory in cgroups of both versions, nested, and with page cache that can be reclaimed."""

from __future__ import annotations

import pytest

from engine_core.host_memory import available_memory

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    """Writes a /proc with 16 GiB free and the given mounts and own cgroup lines, and files of cgroups."""

    def make(mountinfo: str, cgroup: str, files: dict[str, object]) -> int:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {16 * GIB // 1024} kB\n")
        (tmp_path / "proc/self/mountinfo").write_text(mountinfo)
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
        for name, value in files.items():
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")
        return available_memory(tmp_path / "proc", tmp_path)

    return make


V2 = "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = "33 30 0:29 {} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def test_reclaimable_cache_counts_as_free(machine):
    files = {"memory.max": 8 * GIB, "memory.current": 7.5 * GIB, "memory.stat": f"anon 5\ninactive_file {7 * GIB}"}
    files["memory.current"] = int(files["memory.current"])
    assert machine(V2, "0::/\n", files) == 8 * GIB - GIB // 2


def test_the_tightest_of_nested_cgroups_counts(machine):
    files = {"a/memory.max": 4 * GIB, "a/memory.current": 3 * GIB, "a/b/memory.max": "max", "a/b/memory.current": 5}
    assert machine(V2, "0::/a/b\n", files) == GIB


@pytest.mark.parametrize("root, own", [("/", "/docker/x"), ("/docker/x", "/docker/x"), ("/..", "/docker/x")])
def test_version_1_in_a_container(machine, root, own):
    inside = "memory/docker/x/" if root == "/" else "memory/"
    stat = f"hierarchical_memory_limit {3 * GIB}\ntotal_inactive_file {GIB}"
    files = {inside + "memory.limit_in_bytes": 8 * GIB, inside + "memory.usage_in_bytes": 2 * GIB}
    files[inside + "memory.stat"] = stat
    assert machine(V1.format(root), f"5:cpuset:/\n4:memory:{own}\n0::/\n", files) == 2 * GIB


def test_without_a_limit_the_kernel_says(machine):
    files = {"memory/memory.limit_in_bytes": 9223372036854771712, "memory/memory.usage_in_bytes": 5 * GIB}
    assert machine(V1.format("/"), "4:memory:/\n", files) == 16 * GIB


def test_a_cgroup_that_is_over_its_limit_has_nothing(machine):
    assert machine(V2, "0::/\n", {"memory.max": GIB, "memory.current": 2 * GIB}) == 0


def test_this_machine():
    assert available_memory() > 0
