"""Small worlds for faults that a test must not bring about in this one: a disk of a few megabytes, a second host.

Linux namespaces, made by util-linux' `unshare` without any privilege where the system allows it.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def why_not() -> str | None:
    """Why namespaces cannot be used here, or None."""
    try:
        trial = subprocess.run(["unshare", "-Urmnu", "ip", "link", "set", "lo", "up"], capture_output=True, text=True)
    except FileNotFoundError as missing:
        return f"{missing.filename} is not installed"
    return None if trial.returncode == 0 else f"unshare -Urmnu: {trial.stderr.strip()}"


@dataclass
class Namespace:
    """A user, mount, network and host-name namespace that lives as long as its `open_namespace` block."""

    pid: int
    """Of the process that holds it."""

    @property
    def prefix(self) -> list[str]:
        """Command line put before a command that shall run inside."""
        return ["nsenter", "-t", str(self.pid), "-U", "-m", "-n", "-u", "--preserve-credentials"]

    def run(self, *command: str) -> str:
        """Runs a command inside; `AssertionError` with its error text where it fails."""
        done = subprocess.run([*self.prefix, *command], capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def outside(self, path: Path) -> Path:
        """Where a path inside is found from here."""
        return Path(f"/proc/{self.pid}/root") / path.relative_to("/")


@contextlib.contextmanager
def open_namespace(within: Namespace | None = None) -> Iterator[Namespace]:
    """A new namespace; `within`: one that shares the users and mounts of another (a second host beside it)."""
    # The holder ends when its standard input closes: nothing stays behind, however this process ends.
    new = [*within.prefix, "unshare", "-nu"] if within else ["unshare", "-Urmnu"]
    holder = subprocess.Popen(
        [*new, "sh", "-c", "echo ready; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert holder.stdout.readline() == "ready\n", "expected unshare to work"
        namespace = Namespace(holder.pid)
        namespace.run("ip", "link", "set", "lo", "up")
        yield namespace
    finally:
        holder.stdin.close()
        holder.wait(10)
        holder.stdout.close()


@contextlib.contextmanager
def open_disk(folder: Path, megabytes: int) -> Iterator[Namespace]:
    """A namespace in which `folder` is a disk of its own of that size."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_namespace() as namespace:
        namespace.run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder))
        yield namespace


@contextlib.contextmanager
def open_hosts() -> Iterator[tuple[Namespace, Namespace]]:
    """Two hosts, node-0 at 10.77.0.1 and node-1 at 10.77.0.2, joined by one cable, the interface "cable" of both."""
    with open_namespace() as first, open_namespace(within=first) as second, tempfile.NamedTemporaryFile("w") as names:
        names.write("127.0.0.1 localhost\n10.77.0.1 node-0\n10.77.0.2 node-1\n")
        names.flush()
        first.run("mount", "--bind", names.name, "/etc/hosts")
        first.run("ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(second.pid))
        for number, host in enumerate((first, second)):
            host.run("hostname", f"node-{number}")
            host.run("ip", "addr", "add", f"10.77.0.{number + 1}/24", "dev", "cable")
            host.run("ip", "link", "set", "cable", "up")
        yield first, second
