"""An emulated cluster on one machine: real bytes cross real, slow links between network namespaces.

Every device and every switch gets a network namespace, every link a pair of virtual Ethernet ends whose rates ``tc``
limits. A kernel that can (``netem``) delays what they carry; without it the receiving worker holds a tensor back for as
long. Namespaces have no names: each lives as long as the process in it, and that ends with its master, so nothing is
left behind however things end. Needs root on Linux.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import networkx as nx

from moirai_sim.clusters.routes import route
from moirai_sim.errors import ExecutionError, InputError
from moirai_sim.execution.tcp import Address

if TYPE_CHECKING:
    from moirai_sim.clusters.cluster import Cluster

PORT = 4713
PREFIX = ("unshare", "--net")
"""Starts a command in a namespace of its own."""
_BURST_BYTES, _BURST_S = 16384, 2.5e-4
"""What may pass at once, though a real link lets nothing pass so: some packets, or what flows until a timer wakes.

At 1 Gbps 64 KiB take 0.8 to 0.9 of their time, 256 KiB 1.02 and a stream 1.06; with twice as much 0.5, 0.9 and 1.01."""
_PIECE_BYTES, _PIECE = 65536, 15 / 16
"""Most bytes that pass in one piece, and the share of a burst: the kernel cuts pieces larger than a burst into packets
of 1,500 bytes, which cost the cores that compute six times as much time, and pieces of half a burst twice as much."""
_PACKETS = 100_000
"""Most that are delayed on a link at once."""
_ENTER_LIMIT_S, _ENTER_POLL_S = 10.0, 1e-3
_LINK = re.compile(r"\s*l\d+[ab]:")
"""Begins the line of a link that `connect` made, in the table of a namespace."""
_TOOLS = ("unshare", "nsenter", "ip", "tc")


def why_not() -> str | None:
    """Return why clusters cannot be emulated here; None where they can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"emulated clusters need the programs {', '.join(missing)} (Linux: util-linux, iproute2)"
    if os.geteuid() != 0:
        return "emulated clusters need root, to make network namespaces"
    probe = subprocess.run([*PREFIX, "true"], capture_output=True, check=False)  # noqa: S603 - fixed command
    return None if probe.returncode == 0 else f"no network namespace can be made here: {probe.stderr.decode().strip()}"


@cache
def kernel_delays() -> bool:
    """Return whether the kernel can delay packets: it has the queueing discipline ``netem``."""
    probe = (*PREFIX, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0  # noqa: S603 - fixed command


def latency_to_hold(cluster: Cluster, source: str) -> dict[str, int]:
    """Return the latency to every other device that the links do not have themselves, ns."""
    if kernel_delays():
        return {}
    others = [device.name for device in cluster.devices if device.name != source]
    return {other: route(cluster, source, other).latency_ns for other in others}


def check_emulated(cluster: Cluster) -> None:
    """Check that a cluster can be emulated.

    Raises
    ------
    InputError
        If only some devices are to be emulated, a device has other than one link, a link is half duplex, switches form
        a cycle, or namespaces cannot be made here.
    """
    reason = why_not()
    if reason is not None:
        raise InputError(f"cluster '{cluster.name}': {reason}")
    place = f"cluster '{cluster.name}'"
    ends = [end for link in cluster.links for end in link.ends]
    problems = [
        f"{place}: device '{device.name}' has {ends.count(device.name)} links; an emulated one has one"
        for device in cluster.devices
        if ends.count(device.name) != 1
    ]
    problems += [
        f"{place}: device '{device.name}': address '{device.address}' is none of an emulated machine, and others are; "
        "write netns:FIRST for all devices or for none"
        for device in cluster.devices
        if not device.address.startswith("netns:")
    ]
    problems += [
        f"{place}: link '{link.name}' is half duplex, and an emulated one carries both directions at once; "
        "write duplex: full"
        for link in cluster.links
        if link.duplex == "half"
    ]
    switches = set(cluster.switches)
    with suppress(nx.NetworkXNoCycle):
        cycle = nx.find_cycle(nx.MultiGraph(link.ends for link in cluster.links if switches.issuperset(link.ends)))
        names = ", ".join(f"'{name}'" for name, *_ in cycle)
        problems.append(
            f"{place}: the switches {names} form a cycle, in which packets would go round for ever; remove a link of it"
        )
    if problems:
        raise InputError(problems)


def received_bytes(pid: int) -> int:
    """Return the bytes that came over the links of a process's namespace so far; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    links = (line.split(":") for line in lines if _LINK.match(line))
    return sum(int(counters.split()[0]) for _, counters in links)


class Switches:
    """The processes that hold the namespaces of switches."""

    def __init__(self, cluster: Cluster) -> None:
        # Each reads a pipe that only this process holds open: it ends when we do, even when we are killed.
        self._processes = {
            name: subprocess.Popen([*PREFIX, "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)  # noqa: S603
            for name in cluster.switches
        }

    @property
    def processes(self) -> dict[str, int]:
        """Process ids by switch."""
        return {name: process.pid for name, process in self._processes.items()}

    def close(self) -> None:
        """End the namespaces of the switches."""
        for process in self._processes.values():
            process.kill()
            process.communicate()


def connect(cluster: Cluster, processes: Mapping[str, int]) -> dict[str, Address]:
    """Lay the links between the namespaces of processes; return where each device listens.

    Parameters
    ----------
    cluster
        What to emulate: rates and, where the kernel can, latencies are those of the links, in each direction. Those of
        the machine come on top.
    processes
        Process id by device and switch.

    Raises
    ------
    ExecutionError
        If a command fails, or a process does not enter its namespace.
    """
    _await_namespaces(processes)
    ends: dict[str, list[str]] = {name: [] for name in processes}
    for number, link in enumerate(cluster.links):
        (a, b), names = link.ends, (f"l{number}a", f"l{number}b")
        pids = (str(processes[a]), str(processes[b]))
        _run("ip", "link", "add", "name", names[0], "netns", pids[0], "type", "veth",
             "peer", "name", names[1], "netns", pids[1])  # fmt: skip
        for node, pid, name in zip((a, b), pids, names, strict=True):
            ends[node].append(name)
            rate = f"{max(1, round(link.bandwidth_bytes_per_s * 8))}bit"
            burst = max(_BURST_BYTES, round(link.bandwidth_bytes_per_s * _BURST_S))
            inside = ("nsenter", "-t", pid, "-n")
            above: tuple[str, ...] = ("root",)
            if link.latency_ns and kernel_delays():
                _run(*inside, "tc", "qdisc", "add", "dev", name, "root", "handle", "1:",
                     "netem", "delay", f"{link.latency_ns / 1e3:.3f}us", "limit", str(_PACKETS))  # fmt: skip
                above = ("parent", "1:1")
            _run(*inside, "tc", "qdisc", "add", "dev", name, *above,
                 "tbf", "rate", rate, "burst", str(burst), "latency", "2s")  # fmt: skip
            _run(*inside, "ip", "link", "set", name, "gso_max_size", str(min(int(burst * _PIECE), _PIECE_BYTES)))
            _run(*inside, "ip", "link", "set", name, "up")
    addresses = {}
    for number, node in enumerate(processes):
        inside = ("nsenter", "-t", str(processes[node]), "-n")
        if node in cluster.switches:
            _run(*inside, "ip", "link", "add", "bridge", "type", "bridge")
            _run(*inside, "ip", "link", "set", "bridge", "up")
            for name in ends[node]:
                _run(*inside, "ip", "link", "set", name, "master", "bridge")
        else:
            host = f"10.213.{number // 250}.{number % 250 + 1}"
            _run(*inside, "ip", "address", "add", f"{host}/16", "dev", ends[node][0])
            addresses[node] = Address(host, PORT)
    return addresses


def _await_namespaces(processes: Mapping[str, int]) -> None:
    """Wait until started processes have left our namespace: a link laid sooner would end in ours."""
    ours = Path("/proc/self/ns/net").readlink()
    deadline = time.monotonic() + _ENTER_LIMIT_S
    for node, pid in processes.items():
        while _namespace(pid) == ours and time.monotonic() < deadline:
            time.sleep(_ENTER_POLL_S)
        if _namespace(pid) in {ours, None}:
            raise ExecutionError(
                f"emulated cluster: the process of '{node}' did not enter a network namespace of its own"
            )


def _namespace(pid: int) -> Path | None:
    try:
        return Path(f"/proc/{pid}/ns/net").readlink()
    except OSError:  # it has ended
        return None


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - our own words, no shell
    if done.returncode:
        raise ExecutionError(f"emulated cluster: '{' '.join(command)}' failed: {done.stderr.decode().strip()}")
