"""Times of several machines told by one clock, and what a broken connection tells."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from moirai_sim.errors import InputError
from moirai_sim.execution.channel import LOST, Inbox
from moirai_sim.execution.ray_workers import RayWorkers, Reading, clock_between, told_by
from moirai_sim.execution.tcp import Address, TcpLinks
from moirai_sim.execution.worker import Record


def test_a_clock_that_drifts_is_read_between_two_looks_at_it():
    """It is 1000 ns ahead at first, and gains 10 in 1000."""
    clock = clock_between(Reading(11_000, 10_000, 5), Reading(21_200, 20_100, 5))
    assert clock(11_000) == 10_000
    assert clock(21_200) == 20_100
    assert clock(16_100) == 15_050
    assert clock(10_900) == 9_900, "before the first look it is as far ahead as then"
    assert clock_between(Reading(11_000, 10_000, 5), Reading(21_200, 20_100, 5), 7)(16_100) == 15_043


def test_a_transfer_begins_by_the_clock_of_its_sender():
    record = Record(1_100, runs=[(0, 0, 1_150, 1_200, 1_300)], arrivals=[(0, 3, 5_080, 1_150), (0, 4, 5_140, 1_120)])
    told = told_by(record, lambda ns: ns - 1_000, {3: lambda ns: ns - 5_000, 4: lambda ns: ns - 5_000})
    assert told.begun == 100
    assert told.runs == [(0, 0, 150, 200, 300)]
    assert told.arrivals == [(0, 3, 80, 150), (0, 4, 120, 120)], "none arrives before it was sent"


@pytest.mark.timeout(20)
def test_a_connection_that_breaks_wakes_the_worker_and_says_why():
    read, write = os.pipe()
    listener = socket.create_server(("127.0.0.1", 0))
    links = TcpLinks(listener, {}, write, lambda *_: memoryview(bytearray(8)))
    with socket.create_connection(listener.getsockname()) as peer:
        peer.sendall(struct.pack("=iiiqqq", 1, 2, 3, 4, 8, 0)[:20])
    assert [token.tensor for token in Inbox(read, 0).wait()] == [LOST]
    assert links.failure == "connection from 127.0.0.1: ConnectionError: the other worker has ended"
    os.close(read)
    os.close(write)


@pytest.mark.timeout(20)
def test_a_target_that_does_not_listen_wakes_the_worker_and_says_why():
    read, write = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = Address(*closed.getsockname())
    links = TcpLinks(socket.create_server(("127.0.0.1", 0)), {"m1": nobody}, write, lambda *_: memoryview(b""))
    links.send("m1", 1, 2, 3, memoryview(b""))
    assert [token.tensor for token in Inbox(read, 0).wait()] == [LOST]
    assert links.failure.startswith("connection to 'm1': ConnectionRefusedError")
    os.close(read)
    os.close(write)


def test_emulated_machines_are_refused_on_ray():
    pytest.importorskip("ray")
    from moirai_sim.clusters.cluster import Cluster, Device, DeviceType

    kind = DeviceType("core", "cpu", 2**33, 1e10, {"float32": 1e11})
    with pytest.raises(InputError, match="device 'm': address 'netns:0' is an emulated machine"):
        RayWorkers(Cluster("one", (Device("m", kind, address="netns:0"),)))
