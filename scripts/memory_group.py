"""Memory cgroups of version 1, for scripts that run a program in one."""
import os
import pathlib
import re

GROUPS = pathlib.Path("/sys/fs/cgroup/memory")


def usable():
    return os.geteuid() == 0 and (GROUPS / "memory.soft_limit_in_bytes").exists()


class MemoryGroup:
    """A group for one process; `limit` in bytes."""

    def __init__(self, limit):
        self.path = GROUPS / f"duet-{os.getpid()}"
        self.path.mkdir()
        self.write("memory.limit_in_bytes", limit)

    def enter(self):  # in the child, before the program begins
        self.write("cgroup.procs", os.getpid())

    def write(self, name, value):
        (self.path / name).write_text(str(value))

    def number(self, name):
        return int((self.path / name).read_text())

    def kills(self):
        found = re.search(r"^oom_kill (\d+)", (self.path / "memory.oom_control").read_text(), re.M)
        return int(found[1]) if found else 0

    def remove(self):
        self.write("memory.force_empty", 0)  # of page cache
        self.path.rmdir()
