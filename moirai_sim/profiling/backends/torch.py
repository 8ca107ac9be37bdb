"""PyTorch on a CPU or a CUDA device: an optional extra, never imported by the core.

An operator of the graph becomes one call of PyTorch's eager mode. On a GPU it is timed by device events around a batch
of calls whose inputs and results rotate through more memory than the last-level cache holds, so that it spares nothing.
The stream sleeps until the host has enqueued the batch, so that a kernel shorter than its launch does not wait for it.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moirai_sim.clusters.cluster import DeviceType
from moirai_sim.clusters.local import TORCH_SUFFIX
from moirai_sim.errors import InputError
from moirai_sim.graphs.operator import Tensor
from moirai_sim.graphs.work import make_operator
from moirai_sim.profiling import telemetry
from moirai_sim.profiling.backends.torch_calls import DTYPES, RESULTS, Attributes, Unsupported, call_of
from moirai_sim.profiling.schema import device_type_json, operator_key, operator_row, statistics

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from moirai_sim.graphs.operator import Operator

_WARM_UP, _WAKE_S = 3, 0.5
_FEWEST = 3
"""Samples that are enough by themselves."""
_ENERGY_READ_S, _ENERGY_SHARE = 0.3, 0.2
"""What reading the energy of an operator takes, about, and the share of the time that goes to that."""
_BATCHES = 15
_MIN_BATCH_S = 200e-6
_TICK_MS = 5e-4
"""Resolution of device events (CUDA's documentation): less than a tick may read as nothing."""
_MAX_ENQUEUED = 128
"""Calls of a batch: a stream holds about a thousand kernels, then the host waits."""
_CYCLES_PER_S = 2e9
"""About the clock of a GPU, from above."""
_MAX_SLEEP_S = 0.02
_ENERGY_BATCH_S, _ENERGY_LOOP_S, _ENERGY_LIMIT_S = 5e-3, 0.1, 2.0
_MAX_COPIES = 1024
_LITTLE_WRITTEN = 20
"""Where so many times as much is read as written, it does not matter where the results lie."""
_ALIGNMENT = 256
_COPY_BYTES, _GEMM = 512 << 20, {"cuda": 8192, "cpu": 1536}
_SINCE = {"tf32": (8, 0), "bfloat16": (8, 0), "int8": (8, 0), "float8": (8, 9)}
"""Compute capability that multiplies a data type on tensor cores; where there is less, it is emulated or refused."""


class Measured(NamedTuple):
    """What was measured of one operator."""

    samples: NDArray[np.float64]
    """Seconds of one call each."""
    launch_s: float
    """Host's time for one call, seconds: what a stream of calls takes at least; NaN on a CPU."""
    energy_j: float
    """Joules of one call; NaN where no counter was read."""


class TorchDevice:
    """A device to time operators on.

    Parameters
    ----------
    name
        ``cuda:INDEX``, ``cpu:CORE`` (one thread) or ``cpu:FIRST-LAST`` (as many as cores; the caller pins them).

    Raises
    ------
    InputError
        If PyTorch is not installed or does not see the device, or the name has another form.
    """

    def __init__(self, name: str) -> None:
        try:
            import torch
        except ImportError as error:
            raise InputError("PyTorch is not installed; pip install 'moirai-sim[torch]'") from error
        self.torch = torch
        self._pool: dict[str, Any] = {}
        match = re.fullmatch(r"(cuda|cpu)(?::([0-9]+)(?:-([0-9]+))?)?", name)
        first, last = (0, 0) if match is None else (int(match[2] or 0), int(match[3] or match[2] or 0))
        if match is None or last < first or (match[1] == "cuda" and match[3]):
            raise InputError(f"device '{name}': write cuda:INDEX, such as cuda:0, cpu:CORE or cpu:FIRST-LAST")
        self.kind = match[1]
        if self.kind == "cuda" and not (torch.cuda.is_available() and first < torch.cuda.device_count()):
            raise InputError(f"device '{name}': PyTorch sees {torch.cuda.device_count()} CUDA devices")
        self.device = torch.device("cuda", first) if self.kind == "cuda" else torch.device("cpu")
        self.threads = last - first + 1
        self.board: telemetry.Board | None = None
        """What NVML tells of the device."""
        self._counter_moves = True
        if self.kind == "cpu":
            torch.set_num_threads(self.threads)
            self.cache_bytes = self.threads * (4 << 20)
        else:
            torch.cuda.set_device(self.device)
            facts = torch.cuda.get_device_properties(self.device)
            self.cache_bytes = int(facts.L2_cache_size)
            self.board = telemetry.board(str(getattr(facts, "uuid", "")))

    def synchronize(self) -> None:
        """Wait until all work is done; raises what a kernel failed with."""
        if self.kind == "cuda":
            self.torch.cuda.synchronize(self.device)

    def wake(self) -> None:
        """Keep a GPU busy until its clock is up: idle, it runs at a fifth of it."""
        if self.kind == "cuda":
            square = self.tensor((4096, 4096), "float16")
            end = time.perf_counter() + _WAKE_S
            while time.perf_counter() < end:
                self.torch.mm(square, square)
                self.synchronize()

    def tensor(self, shape: Sequence[int], dtype: str) -> Any:  # noqa: ANN401
        """Return random data: normal where it is a floating type, of 8-bit integers all that there are, else 0 or 1."""
        kind = getattr(self.torch, DTYPES[dtype])
        if kind.is_floating_point:
            return self.torch.randn(tuple(shape), device=self.device).to(kind)
        if kind in (self.torch.int8, self.torch.uint8):  # zeros would draw less power, and let the clock run faster
            least = self.torch.iinfo(kind).min
            return self.torch.randint(least, least + 256, tuple(shape), device=self.device, dtype=kind)
        return self.torch.randint(0, 2, tuple(shape), device=self.device).to(kind)

    def time(self, run: Callable[[], object], budget_s: float) -> NDArray[np.float64]:
        """Return timings of one call each, seconds: each the mean over a batch of calls long enough for the clock.

        On a GPU it is the device's time, without waiting for the host wherever that can run ahead.
        """
        return self._time(run, budget_s)[0]

    def _time(self, run: Callable[[], object], budget_s: float) -> tuple[NDArray[np.float64], float]:
        """Return what `time` does, and the host's time for one call, seconds; NaN on a CPU."""
        for _ in range(_WARM_UP):
            run()
        self.synchronize()
        if self.kind == "cuda":
            once, launch_s, sleep = self._ahead(run, 1)
            batch = int(np.clip(np.ceil(_MIN_BATCH_S / once), 1, _MAX_ENQUEUED))
            if batch > 1:
                once, launch_s, sleep = self._ahead(run, batch)
            count = int(np.clip(budget_s / (batch * (once + 2 * launch_s)), 5, _BATCHES))
            taken = [self._enqueued(run, batch, sleep) for _ in range(count)]
            device_alone = [sample for sample, ahead in taken if ahead]  # the host was late for the others
            few = len(device_alone) < _FEWEST
            return np.array([sample for sample, _ in taken] if few else device_alone), launch_s
        start = time.perf_counter()
        run()
        once = max(time.perf_counter() - start, 1e-7)
        batch = max(1, int(np.ceil(_MIN_BATCH_S / once)))
        count = int(np.clip(budget_s / (once * batch), 5, _BATCHES))
        samples = []
        for _ in range(count):
            start = time.perf_counter()
            for _ in range(batch):
                run()
            samples.append((time.perf_counter() - start) / batch)
        return np.array(samples), math.nan

    def _ahead(self, run: Callable[[], object], batch: int) -> tuple[float, float, int]:
        """Return the device's and the host's time of a call in a batch, seconds, and how long to sleep before it.

        That is in cycles, and 0 where the host cannot run ahead: calls that wait for the device, such as copies of
        pageable memory.
        """
        start = time.perf_counter()
        for _ in range(batch):
            run()
        launch_s = (time.perf_counter() - start) / batch
        self.synchronize()
        for slack in (2, 8):
            sleep_s = slack * launch_s * batch + 20e-6
            if sleep_s > _MAX_SLEEP_S:
                break
            once, ahead = self._enqueued(run, batch, int(sleep_s * _CYCLES_PER_S))
            if ahead:
                return once, launch_s, int(sleep_s * _CYCLES_PER_S)
        return self._enqueued(run, batch, 0)[0], launch_s, 0

    def _enqueued(self, run: Callable[[], object], batch: int, sleep: int) -> tuple[float, bool]:
        """Return the device's time of a call, seconds, and whether the stream slept until the last was enqueued."""
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        if sleep:
            self.torch.cuda._sleep(sleep)
        begin.record()
        for _ in range(batch):
            run()
        end.record()
        ahead = not begin.query()
        end.synchronize()
        return max(float(begin.elapsed_time(end)), _TICK_MS) * 1e-3 / batch, ahead

    def energy(self, run: Callable[[], object], once_s: float, loop_s: float = _ENERGY_LOOP_S) -> float:
        """Return the joules of one call by the board's counter over calls of ``loop_s``; NaN where it has none.

        The counter moves in steps that may be as long as the loop, so the loop begins and ends with one.
        """
        if self.board is None or not self._counter_moves or (last := self.board.energy_j()) is None:
            return math.nan
        batch, count = int(np.clip(_ENERGY_BATCH_S / once_s, 1, 1000)), 0
        begin: tuple[float, float, int] | None = None
        pending = None
        limit = time.perf_counter() + loop_s + _ENERGY_LIMIT_S
        while time.perf_counter() < limit:
            for _ in range(batch):
                run()
            mark = self.torch.cuda.Event()
            mark.record()
            pending, ended = mark, pending
            if ended is None:
                continue
            ended.synchronize()  # the next batch runs while the counter is read: the board never idles
            count += batch
            now, read = time.perf_counter(), self.board.energy_j()
            if read is None:
                break
            if read != last and begin is None:
                begin = (now, read, count)
            elif begin is not None and read != last and now - begin[0] >= loop_s:
                self.synchronize()
                return (read - begin[1]) / (count - begin[2])
            last = read
        self.synchronize()
        self._counter_moves = begin is not None  # one that stands still costs two seconds a time
        return math.nan

    def time_operator(self, operator: Operator, budget_s: float) -> NDArray[np.float64]:
        """Return timings of an operator on rotating random inputs, seconds; see `measure_operator`."""
        return self.measure_operator(operator, budget_s).samples

    def measure_operator(self, operator: Operator, budget_s: float, *, energy: bool = False) -> Measured:
        """Time an operator on rotating random inputs, and read its energy if asked to.

        An operator shorter than its launch gets no energy: the board would mostly idle.

        Raises
        ------
        Unsupported
            If there is no PyTorch call for it, its result has another shape than the operator's, or the device cannot
            run it (out of memory, missing kernel, attributes that do not fit).
        """
        run: Callable[[], object] | None = None
        try:
            run = self.prepare(operator)
            with self.torch.no_grad():
                result: Any = run()
                found = tuple((result[0] if isinstance(result, tuple) else result).shape)
                wanted = operator.outputs[0].shape
                if found != wanted:  # whatever ran, it is not what would be booked
                    raise Unsupported(f"{operator.op_type}: PyTorch gives {found}, the model {wanted}")
                del result
                samples, launch_s = self._time(run, budget_s)
                once = float(np.median(samples))
                return Measured(samples, launch_s, self.energy(run, once) if energy and once > launch_s else math.nan)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if self.kind == "cuda":
                run = None  # lets go of its results
                self._pool.clear()
                self.torch.cuda.empty_cache()
            raise Unsupported(f"{operator.op_type} {operator.dtype}: {error}") from error

    def prepare(self, operator: Operator) -> Callable[[], object]:
        """Return a call that runs an operator once, each time on the next of its rotating sets of random inputs.

        The sets are slices of one pool of random data, twice as large as the last-level cache at least; operators of
        less than a 512th of that cache rotate through 1,024 sets only. On a GPU results rotate as well: so many of the
        last are kept that the allocator gives the next one memory that has left the cache.

        Raises
        ------
        Unsupported
            If there is no PyTorch call for it, or no PyTorch type for one of its inputs.
        """
        call = call_of(self.torch, operator)
        dtypes = [tensor.dtype for tensor in operator.inputs]
        if not DTYPES.keys() >= set(dtypes):
            raise Unsupported(f"{operator.op_type}: not timed on {', '.join(sorted(set(dtypes) - DTYPES.keys()))}")
        size = max(sum(-(-tensor.bytes // _ALIGNMENT) * _ALIGNMENT for tensor in operator.inputs), 1)
        copies = int(np.clip(-(-2 * self.cache_bytes // size), 2, _MAX_COPIES))
        self.torch.backends.cuda.matmul.allow_tf32 = operator.dtype == "tf32"
        self.torch.backends.cudnn.allow_tf32 = operator.dtype == "tf32"
        self._pool = {key: pool for key, pool in self._pool.items() if pool.nbytes <= 2 * self.cache_bytes}
        used: dict[str, int] = {}
        sets = [
            [self._slice(t.shape, dtype, used, copies * size) for t, dtype in zip(operator.inputs, dtypes, strict=True)]
            for _ in range(copies)
        ]
        if operator.op_type == "Gather":  # a row that is not there would end the CUDA context, and the run with it
            rows = operator.inputs[0].shape[Attributes(operator.attributes).int("axis", 0)]
            count = (int(np.prod(operator.inputs[1].shape)),)
            indices = self.torch.randint(0, rows, (copies, *count), device=self.device)
            sets = [[given[0], indices[i]] for i, given in enumerate(sets)]
        if operator.op_type == "Where":  # a profile does not keep that the condition is of another type
            sets = [[given[0] > 0, *given[1:]] for given in sets]
        if operator.op_type == "BatchNormalization":  # no variance is negative
            sets = [[*given[:4], given[4].abs()] for given in sets]
        turn = itertools.cycle(sets)
        if self.kind == "cpu":
            return lambda: call(*next(turn))
        result_size = max(sum(tensor.bytes for tensor in operator.outputs), 1)
        turns = -(-2 * self.cache_bytes // result_size) if result_size * _LITTLE_WRITTEN >= size else 1
        kept: deque[object] = deque(maxlen=int(np.clip(turns, 1, _MAX_COPIES)))

        def run() -> object:
            result = call(*next(turn))
            kept.append(result)
            return result

        with self.torch.no_grad():
            while len(kept) < (kept.maxlen or 0):  # memory is asked for before the clock runs
                run()
        return run

    def _slice(self, shape: Sequence[int], dtype: str, used: dict[str, int], room: int) -> Any:  # noqa: ANN401
        """Return the next tensor out of the pool of a data type, which holds ``room`` bytes at least."""
        key = DTYPES[dtype]
        kind = getattr(self.torch, key)
        width, count = kind.itemsize, int(np.prod(shape, dtype=np.int64))
        if key not in self._pool or self._pool[key].numel() * width < room:
            self._pool.pop(key, None)
            self._pool[key] = self.tensor((-(-max(room, 2 * self.cache_bytes) // width),), dtype)
        start = used.get(key, 0)
        step = -(-count * width // _ALIGNMENT) * _ALIGNMENT // width
        used[key] = start + step
        return self._pool[key][start : start + count].view(tuple(shape))

    def device_type(self) -> DeviceType:
        """Return the data sheet with measured limits: memory bandwidth by a copy, FLOP/s by large products.

        Raises
        ------
        InputError
            If none of the products runs.
        """
        torch = self.torch
        self.wake()
        source = self.tensor((_COPY_BYTES // 4,), "float32")
        target = torch.empty_like(source)
        copy_s = self.time(lambda a=target, b=source: a.copy_(b), 1.0).min()  # type: ignore[misc]
        del source, target
        bandwidth, peaks = round(2 * _COPY_BYTES / float(copy_s), -8), self._product_rates()
        source_text = "measured: copy of 512 MiB (read and write counted), large square matrix product"
        if self.kind == "cpu":
            try:
                from moirai_sim.profiling.cpu import device_type_name, l2_cache_bytes

                name, l2_bytes = device_type_name(self.threads), l2_cache_bytes()
            except ImportError:  # a bare machine without ONNX
                name, l2_bytes = f"{telemetry.cpu_model().lower().replace(' ', '-')}-{self.threads}t", None
            return DeviceType(
                name + TORCH_SUFFIX, "cpu", int(telemetry.hardware()["memory_bytes"]), bandwidth, peaks, self.threads,
                l2_cache_bytes=l2_bytes, source=source_text,
            )  # fmt: skip
        facts = torch.cuda.get_device_properties(self.device)
        name = facts.name.lower().replace(" ", "-")
        told = None if self.board is None else self.board.max_clock_hz()  # CUDA 13 does not tell any more
        clock = getattr(facts, "clock_rate", 0) * 1e3 or told
        return DeviceType(
            name, "gpu", int(facts.total_memory), bandwidth, peaks, int(facts.multi_processor_count), clock,
            int(facts.L2_cache_size), source=source_text,
        )  # fmt: skip

    def _product_rates(self) -> dict[str, float]:
        """Return FLOP/s of a large product by data type; those that the device lacks, or refuses, are left out."""
        side, kinds = _GEMM[self.kind], ("float32", "tf32", "float16", "bfloat16", "int8", "float8")
        level = self.torch.cuda.get_device_capability(self.device) if self.kind == "cuda" else (0, 0)
        found = {}
        for dtype in kinds if self.kind == "cuda" else ("float32",):
            if level < _SINCE.get(dtype, (0, 0)):
                continue
            kind = "MatMulInteger" if dtype == "int8" else "MatMul"
            result = Tensor("product", (side, side), RESULTS.get(dtype, dtype))
            product = make_operator("product", kind, [(side, side)] * 2, [result], dtype=dtype)
            try:
                found[dtype] = round(2 * side**3 / float(self.time_operator(product, 1.0).min()), -9)
            except Unsupported:
                continue
        if not found:
            raise InputError(f"device '{self.device}': no product of {side} x {side} matrices runs; is it in use?")
        return found


def stack(torch: Any) -> str:  # noqa: ANN401
    """Return the versions below an operator, as profiles name them."""
    cuda = f" CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return f"PyTorch {torch.__version__}{cuda}"


def profile_graph_operators(
    device: TorchDevice,
    operators: Sequence[Operator],
    budget_s: float,
    *,
    model: str = "",
    energy_every: int = 1,
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Time operators one by one; return their rows and, by reason, how many could not run.

    Rows have one column more than a profile, ``launch_s``: the host's time for one call, NaN on a CPU.

    Parameters
    ----------
    energy_every
        Energy is read of the first of so many operators: it takes 0.1 s of calls and more each.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    skipped: dict[str, int] = {}
    deadline = time.perf_counter() + budget_s
    for index, operator in enumerate(operators):
        left = max(deadline - time.perf_counter(), 0.0) / (len(operators) - index)
        try:
            found = device.measure_operator(operator, left, energy=index % energy_every == 0)
        except Unsupported as error:
            reason = str(error).splitlines()[0][:120]
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        rows.append(
            operator_row(operator) | statistics(found.samples)
            | {"model": model, "energy_j": found.energy_j, "launch_s": found.launch_s}
        )  # fmt: skip
    return pd.DataFrame(rows), skipped


def profile_models(models: Sequence[str | Path], device: str, *, budget_s: float) -> pd.DataFrame:
    """Time every distinct operator of some models in PyTorch's eager mode; see ``profiling.operators``.

    Raises
    ------
    InputError
        If PyTorch or the device is missing, or no operator could run.
    """
    import pandas as pd

    from moirai_sim.graphs.load import load_graph, model_names

    target = TorchDevice(device)
    before = telemetry.snapshot()
    frames: list[pd.DataFrame] = []
    skipped: dict[str, int] = {}
    names = model_names(map(str, models))
    with telemetry.Watch(target.board) as watch:
        for source in map(str, models):
            graph = load_graph(source)
            distinct = list({operator_key(operator): operator for operator in graph}.values())
            share = budget_s / len(models)
            every = max(1, math.ceil(len(distinct) * _ENERGY_READ_S / (_ENERGY_SHARE * share)))
            frame, missed = profile_graph_operators(target, distinct, share, model=names[source], energy_every=every)
            frames.append(frame)
            skipped |= {f"{names[source]}: {reason}": count for reason, count in missed.items()}
        if not any(len(frame) for frame in frames):
            raise InputError(f"device '{device}': no operator of these models could run; {next(iter(skipped), '')}")
        sheet = target.device_type()
    frame = finish(pd.concat(frames, ignore_index=True), sheet, stack(target.torch))
    frame.attrs["metadata"] = {
        "hardware": telemetry.hardware(),
        "versions": telemetry.versions(),
        "telemetry": {"before": before, "during": watch.summary(), "after": telemetry.snapshot()},
        "threads": target.threads,
        "launch_s": None if target.kind == "cpu" else float(frame["launch_s"].median()),
        "skipped": skipped,
    }
    return frame


def finish(frame: pd.DataFrame, sheet: DeviceType, versions: str) -> pd.DataFrame:
    """Fill the columns that all rows of one run share."""
    frame["device"], frame["device_type"] = sheet.name, device_type_json(sheet)
    frame["backend"], frame["stack"], frame["kernel"], frame["source"] = "torch", versions, "", "measured"
    if "energy_j" not in frame:
        frame["energy_j"] = np.nan
    return frame
