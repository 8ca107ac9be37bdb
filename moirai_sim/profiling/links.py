"""Times real transfers between the workers of this machine, through the channel that the executor uses.

The price of a transfer is what it costs to cut a model there: the time from the moment when the producer has written a
tensor to the moment when the consumer has started a run of its backend and a kernel has read the tensor, less the time
that the same kernel takes on the core of the producer. The kernel is a matrix product of 64 columns, which hides some
of the reading behind arithmetic, as most kernels do.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.profiling.schema import LINK_COLUMNS, statistics

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import Cluster

SIZES: tuple[int, ...] = tuple(1 << exponent for exponent in range(10, 27))
"""1 KiB to 64 MiB."""
_WARM_UP = 5
_MAX_PAIRS = 12
_STOP = -1
_COLUMNS = 64


def profile_links(cluster: Cluster, *, sizes: Sequence[int] = SIZES, repeats: int = 60) -> pd.DataFrame:
    """Time transfers between the CPU devices of a cluster that lie on this machine.

    Parameters
    ----------
    cluster
        Its devices' addresses say which cores to use. With more than four devices, neighbours are profiled.
    sizes
        Bytes of the tensors.
    repeats
        Transfers of a size; a tenth of them from 8 MiB on.

    Returns
    -------
    pandas.DataFrame
        Columns of ``schema.LINK_COLUMNS``, a row a pair and size; ``attrs["metadata"]`` holds telemetry.

    Raises
    ------
    InputError
        If fewer than two devices lie on this machine, or a worker fails.
    """
    import pandas as pd

    from moirai_sim.profiling import telemetry
    from moirai_sim.profiling.operators import parse_cores
    from moirai_sim.progress import progress

    devices = [device for device in cluster.devices if device.address.startswith("cpu:")]
    if len(devices) < 2:
        raise InputError(f"cluster '{cluster.name}': links are profiled between two CPU devices at least")
    cores = {device.name: parse_cores(device.address) for device in devices}
    names = [device.name for device in devices]
    pairs = [(a, b) for a in names for b in names if a != b]
    if len(pairs) > _MAX_PAIRS:
        pairs = [pair for a, b in itertools.pairwise(names) for pair in ((a, b), (b, a))][:_MAX_PAIRS]
    before = telemetry.snapshot()
    rows = []
    with progress("links", len(pairs)) as step:
        for source, target in pairs:
            times = _pair(cores[source], cores[target], sizes, repeats)
            rows += [
                {
                    "source_device": source,
                    "target_device": target,
                    "collective": "send",
                    "participants": 2,
                    "bytes": size,
                    "source": "measured",
                    **statistics(samples),
                }
                for size, samples in zip(sizes, times, strict=True)
            ]
            step()
    frame = pd.DataFrame(rows)[list(LINK_COLUMNS)]
    frame.attrs["metadata"] = {
        "hardware": telemetry.hardware(),
        "versions": telemetry.versions(),
        "telemetry": {"before": before, "after": telemetry.snapshot()},
        "channel": "shared memory",
    }
    return frame


def _pair(source: set[int], target: set[int], sizes: Sequence[int], repeats: int) -> list[NDArray[np.float64]]:
    """Return transfer times in seconds for each size; this process is the producer, a child the consumer."""
    from moirai_sim.execution.channel import SPIN_NS, Inbox, close_all, post

    spin_ns = SPIN_NS if not source & target else 0
    allowed = os.sched_getaffinity(0)
    to_child, from_child = os.pipe(), os.pipe()
    memory = os.memfd_create("moirai_sim_links")
    os.ftruncate(memory, max(sizes))
    arguments = [memory, to_child[0], from_child[1], spin_ns]
    child = subprocess.Popen(  # noqa: S603 - our own module in our own interpreter
        [sys.executable, "-m", __name__, *map(str, arguments), ",".join(map(str, sorted(target)))],
        stdin=subprocess.DEVNULL,
        pass_fds=arguments[:3],
    )
    try:
        os.close(from_child[1])
        os.sched_setaffinity(0, source)
        inbox = Inbox(from_child[0], spin_ns)
        segment = _map(memory, max(sizes))
        inbox.wait()  # the child is ready
        return [_transfers(inbox, to_child[1], segment, size, repeats) for size in sizes]
    except (EOFError, BrokenPipeError) as error:
        raise InputError("the worker at the far end of the link ended early; look for its message above") from error
    finally:
        os.sched_setaffinity(0, allowed)
        if child.poll() is None:
            post(to_child[1], _STOP, 0)
        close_all((memory, to_child[0], to_child[1], from_child[0]))
        child.wait(timeout=10)


def _transfers(inbox: Any, outbox: int, segment: NDArray[np.uint8], size: int, repeats: int) -> NDArray[np.float64]:  # noqa: ANN401
    from moirai_sim.execution.channel import post

    shared, private = segment[:size], _values(size)
    count = repeats if size < 8 << 20 else max(repeats // 10, 5)
    kernel = _kernel(segment, size)
    wake, there, here = [], [], []
    for repeat in range(_WARM_UP + count):
        np.copyto(shared, private)
        sent = post(outbox, size, repeat)
        tokens = inbox.wait()
        while len(tokens) < 2:
            tokens += inbox.wait()
        started, done = (token.sent_ns for token in tokens)
        np.copyto(shared, private)
        start = time.monotonic_ns()
        kernel()
        end = time.monotonic_ns()
        if repeat >= _WARM_UP:
            wake.append(started - sent)
            there.append(done - started)
            here.append(end - start)
    further = np.maximum(np.array(there) - np.median(here), 0)
    return (np.array(wake) + further) * 1e-9


def _values(size: int) -> NDArray[np.uint8]:
    return np.resize(np.random.default_rng(0).standard_normal(1 << 16, dtype=np.float32), size // 4).view(np.uint8)


def _kernel(segment: NDArray[np.uint8], size: int) -> Callable[[], object]:
    """Return a function that multiplies the first ``size`` bytes of the segment, as rows of 64, by a 64 x 64 matrix."""
    session = _product_session()
    rows = size // (4 * _COLUMNS)
    result = np.zeros((rows, _COLUMNS), np.float32)
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, result.shape, segment.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, result.shape, result.ctypes.data)

    def run(_keep: object = (segment, result)) -> None:
        session.run_with_iobinding(binding)

    return run


@cache
def _product_session() -> Any:  # noqa: ANN401
    import onnx

    from moirai_sim.profiling.backends.onnxruntime import make_session, random_array

    tensor = onnx.helper.make_tensor_value_info
    weight = random_array((_COLUMNS, _COLUMNS), np.dtype(np.float32))
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [tensor("x", onnx.TensorProto.FLOAT, ["rows", _COLUMNS])],
        [tensor("y", onnx.TensorProto.FLOAT, ["rows", _COLUMNS])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10)
    return make_session(model.SerializeToString())


def _map(memory: int, size: int) -> NDArray[np.uint8]:
    import mmap

    return np.frombuffer(mmap.mmap(memory, size), dtype=np.uint8)


def _consume(memory: int, inbox_handle: int, outbox: int, spin_ns: int, cores: set[int]) -> None:
    """Answer each token twice: when a first run of the backend is through, and when a kernel has read the tensor."""
    from moirai_sim.execution.channel import Inbox, post
    from moirai_sim.profiling.backends.onnxruntime import make_session, probe_model, random_feeds

    os.sched_setaffinity(0, cores)
    session = make_session(probe_model())
    binding = session.io_binding()
    feeds = random_feeds(session)
    result = np.zeros(1, np.float32)
    for name, array in feeds.items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    binding.bind_output(session.get_outputs()[0].name, "cpu", 0, np.float32, result.shape, result.ctypes.data)
    segment = _map(memory, os.fstat(memory).st_size)
    kernels: dict[int, Callable[[], object]] = {}
    inbox = Inbox(inbox_handle, spin_ns)
    post(outbox, 0, 0)
    while (token := inbox.wait()[0]).tensor != _STOP:
        if token.tensor not in kernels:  # made in the warm-up
            kernels[token.tensor] = _kernel(segment, token.tensor)
        session.run_with_iobinding(binding)
        post(outbox, 0, token.request)
        kernels[token.tensor]()
        post(outbox, 0, token.request)


if __name__ == "__main__":
    shared_memory, tokens_in, tokens_out, spin = map(int, sys.argv[1:5])
    _consume(shared_memory, tokens_in, tokens_out, spin, {int(core) for core in sys.argv[5].split(",")})
