"""Two "nodes" on one Linux machine: network namespaces with a cable between them that can be cut. Needs root."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29700


class TwoNodes:
    """Nodes 0 and 1. They share files and process ids, nothing of the network."""

    def __init__(self) -> None:
        self.names = [f"unitdist{os.getpid()}{letter}" for letter in "ab"]

    def command(self, node: int) -> list[str]:
        """What to put before a command to run it on that node."""
        return ["ip", "netns", "exec", self.names[node]]

    def torchrun(self, node: int, *, max_restarts: int) -> list[str]:
        """One agent with one rank on that node; node 0 hosts the rendezvous.

        The nodes share the host's name, so each is told its address, and which of them is the host.
        """
        host = "true" if node == 0 else "false"
        return [
            *self.command(node), sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
            f"--max-restarts={max_restarts}", "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}",
            f"--local-addr={ADDRESSES[node]}", f"--rdzv-conf=is_host={host},read_timeout=600,join_timeout=900",
        ]  # fmt: skip

    @staticmethod
    def environment(node: int) -> dict[str, str]:
        return {"GLOO_SOCKET_IFNAME": f"v{node}"}

    def cut(self) -> None:
        """Pull the cable: packets vanish, connections stay."""
        self._ip("-n", self.names[1], "link", "set", "v1", "down")

    def restore(self) -> None:
        self._ip("-n", self.names[1], "link", "set", "v1", "up")

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


def why_not() -> str | None:
    """The reason why there can be no namespaces here, or None."""
    if not sys.platform.startswith("linux") or shutil.which("ip") is None:
        return "network namespaces need Linux and ip (Debian: iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root here"
    name = f"unitdist{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=30)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True, timeout=30)
    return None


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Make the nodes and the cable; take them away at the end."""
    nodes = TwoNodes()
    names = nodes.names
    try:
        for name in names:
            nodes._ip("netns", "add", name)
        nodes._ip("link", "add", "v0", "netns", names[0], "type", "veth", "peer", "name", "v1", "netns", names[1])
        for node, name in enumerate(names):
            nodes._ip("-n", name, "addr", "add", f"{ADDRESSES[node]}/24", "dev", f"v{node}")
            nodes._ip("-n", name, "link", "set", "lo", "up")
            nodes._ip("-n", name, "link", "set", f"v{node}", "up")
        yield nodes
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30)
