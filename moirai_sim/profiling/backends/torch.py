"""PyTorch on a CPU or a CUDA device: an optional extra, never imported by the core.

An operator of the graph becomes one call of PyTorch's eager mode. On a GPU it is timed by device events around a batch
of calls whose inputs rotate through more memory than the last-level cache holds, so that nothing is read twice from it.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.clusters.cluster import DeviceType
from moirai_sim.clusters.local import TORCH_SUFFIX
from moirai_sim.errors import InputError
from moirai_sim.profiling.backends.torch_calls import Attributes, Unsupported, call_of
from moirai_sim.profiling.schema import device_type_json, operator_key, operator_row, statistics

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from moirai_sim.graphs.operator import Operator

DTYPES: dict[str, str] = {
    "float32": "float32", "tf32": "float32", "float16": "float16", "bfloat16": "bfloat16", "float64": "float64",
    "float8": "float8_e4m3fn", "int64": "int64", "int32": "int32", "int8": "int8", "uint8": "uint8", "bool": "bool",
}  # fmt: skip
"""PyTorch's type of the tensors that hold each data type; tf32 is float32 whose products run on tensor cores."""
_WARM_UP = 3
_BATCHES = 15
_MIN_BATCH_S = 200e-6
_TICK_MS = 5e-4
"""Resolution of device events (CUDA's documentation): less than a tick may read as nothing."""
_MAX_COPIES = 1024
_ALIGNMENT = 256
_COPY_BYTES, _GEMM = 512 << 20, {"cuda": 8192, "cpu": 1536}


class TorchDevice:
    """A device to time operators on.

    Parameters
    ----------
    name
        ``cuda:INDEX`` or ``cpu:CORE``; a CPU runs on one thread, pinned by the caller.

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
        if re.fullmatch(r"cuda(:[0-9]+)?|cpu(:.*)?", name) is None:
            raise InputError(f"device '{name}': write cuda:INDEX, such as cuda:0, or cpu:CORE")
        self.kind, _, index = name.partition(":")
        if self.kind == "cuda" and not (torch.cuda.is_available() and int(index or 0) < torch.cuda.device_count()):
            raise InputError(f"device '{name}': PyTorch sees {torch.cuda.device_count()} CUDA devices")
        self.device = torch.device("cuda", int(index or 0)) if self.kind == "cuda" else torch.device("cpu")
        if self.kind == "cpu":
            torch.set_num_threads(1)
            self.cache_bytes = 4 << 20
        else:
            torch.cuda.set_device(self.device)
            self.cache_bytes = int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def synchronize(self) -> None:
        """Wait until all work is done; raises what a kernel failed with."""
        if self.kind == "cuda":
            self.torch.cuda.synchronize(self.device)

    def tensor(self, shape: Sequence[int], dtype: str) -> Any:  # noqa: ANN401
        """Return random data: normal where it is a floating type, else 0 or 1."""
        kind = getattr(self.torch, DTYPES[dtype])
        if kind.is_floating_point:
            return self.torch.randn(tuple(shape), device=self.device).to(kind)
        return self.torch.randint(0, 2, tuple(shape), device=self.device).to(kind)

    def time(self, run: Callable[[], object], budget_s: float) -> NDArray[np.float64]:
        """Return timings of one call each, seconds: each the mean over a batch of calls long enough for the clock."""
        for _ in range(_WARM_UP):
            run()
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        once = max(time.perf_counter() - start, 1e-7)
        batch = max(1, int(np.ceil(_MIN_BATCH_S / once)))
        count = int(np.clip(budget_s / (once * batch), 5, _BATCHES))
        return np.array([self._batch(run, batch) for _ in range(count)])

    def _batch(self, run: Callable[[], object], batch: int) -> float:
        if self.kind == "cpu":
            start = time.perf_counter()
            for _ in range(batch):
                run()
            return (time.perf_counter() - start) / batch
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(batch):
            run()
        end.record()
        end.synchronize()
        return max(float(begin.elapsed_time(end)), _TICK_MS) * 1e-3 / batch

    def time_operator(self, operator: Operator, budget_s: float) -> NDArray[np.float64]:
        """Return timings of an operator on rotating random inputs, seconds.

        Raises
        ------
        Unsupported
            If there is no PyTorch call for it, its result has another shape than the operator's, or the device cannot
            run it (out of memory, missing kernel, attributes that do not fit).
        """
        try:
            run = self.prepare(operator)
            with self.torch.no_grad():
                found, wanted = tuple(run().shape), operator.outputs[0].shape  # type: ignore[attr-defined]
                if found != wanted:  # whatever ran, it is not what would be booked
                    raise Unsupported(f"{operator.op_type}: PyTorch gives {found}, the model {wanted}")
                return self.time(run, budget_s)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if self.kind == "cuda":
                self._pool.clear()
                self.torch.cuda.empty_cache()
            raise Unsupported(f"{operator.op_type} {operator.dtype}: {error}") from error

    def prepare(self, operator: Operator) -> Callable[[], object]:
        """Return a call that runs an operator once, each time on the next of its rotating sets of random inputs.

        The sets are slices of one pool of random data, twice as large as the last-level cache at least; operators of
        less than a 512th of that cache rotate through 1,024 sets only.

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
        if operator.op_type == "BatchNormalization":  # no variance is negative
            sets = [[*given[:4], given[4].abs()] for given in sets]
        turn = itertools.cycle(sets)
        return lambda: call(*next(turn))

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
        """Return the data sheet with measured limits: memory bandwidth by a copy, FLOP/s by a large product."""
        torch = self.torch
        source = self.tensor((_COPY_BYTES // 4,), "float32")
        target = torch.empty_like(source)
        copy_s = self.time(lambda a=target, b=source: a.copy_(b), 1.0).min()  # type: ignore[misc]
        del source, target
        side = _GEMM[self.kind]
        peaks = {}
        for dtype in ("float32", "tf32", "float16", "bfloat16") if self.kind == "cuda" else ("float32",):
            torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
            left, right = self.tensor((side, side), dtype), self.tensor((side, side), dtype)
            product_s = self.time(lambda a=left, b=right: torch.mm(a, b), 1.0).min()  # type: ignore[misc]
            peaks[dtype] = round(2 * side**3 / float(product_s), -9)
        bandwidth = round(2 * _COPY_BYTES / float(copy_s), -8)
        source_text = "measured: copy of 512 MiB (read and write counted), large square matrix product"
        if self.kind == "cpu":
            from moirai_sim.profiling import telemetry

            try:
                from moirai_sim.profiling.cpu import device_type_name, l2_cache_bytes

                name, l2_bytes = device_type_name(), l2_cache_bytes()
            except ImportError:  # a bare machine without ONNX
                name, l2_bytes = telemetry.cpu_model().lower().replace(" ", "-"), None
            memory = _host_memory()
            return DeviceType(
                name + TORCH_SUFFIX, "cpu", memory, bandwidth, peaks, 1,
                l2_cache_bytes=l2_bytes, source=source_text,
            )  # fmt: skip
        facts = torch.cuda.get_device_properties(self.device)
        name = facts.name.lower().replace(" ", "-")
        clock = getattr(facts, "clock_rate", 0) * 1e3 or None
        return DeviceType(
            name, "gpu", int(facts.total_memory), bandwidth, peaks, int(facts.multi_processor_count), clock,
            int(facts.L2_cache_size), source=source_text,
        )  # fmt: skip


def _host_memory() -> int:
    from moirai_sim.profiling import telemetry

    return int(telemetry.hardware()["memory_bytes"])


def stack(torch: Any) -> str:  # noqa: ANN401
    """Return the versions below an operator, as profiles name them."""
    cuda = f" CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return f"PyTorch {torch.__version__}{cuda}"


def profile_graph_operators(
    device: TorchDevice, operators: Sequence[Operator], budget_s: float, *, model: str = ""
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Time operators one by one; return their rows and, by reason, how many could not run."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    skipped: dict[str, int] = {}
    deadline = time.perf_counter() + budget_s
    for index, operator in enumerate(operators):
        left = max(deadline - time.perf_counter(), 0.0) / (len(operators) - index)
        try:
            samples = device.time_operator(operator, left)
        except Unsupported as error:
            reason = str(error).splitlines()[0][:120]
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        rows.append(operator_row(operator) | statistics(samples) | {"model": model})
    return pd.DataFrame(rows), skipped


def profile_models(models: Sequence[str | Path], device: str, *, budget_s: float) -> pd.DataFrame:
    """Time every distinct operator of some models in PyTorch's eager mode; see ``profiling.operators``.

    Raises
    ------
    InputError
        If PyTorch or the device is missing, or no operator could run.
    """
    import pandas as pd

    from moirai_sim.graphs.load import load_graph
    from moirai_sim.profiling import telemetry

    target = TorchDevice(device)
    before = telemetry.snapshot()
    frames: list[pd.DataFrame] = []
    skipped: dict[str, int] = {}
    for source in models:
        graph = load_graph(str(source))
        distinct = list({operator_key(operator): operator for operator in graph}.values())
        frame, missed = profile_graph_operators(target, distinct, budget_s / len(models), model=graph.name)
        frames.append(frame)
        skipped |= {f"{graph.name}: {reason}": count for reason, count in missed.items()}
    if not any(len(frame) for frame in frames):
        raise InputError(f"device '{device}': no operator of these models could run; {next(iter(skipped), '')}")
    sheet = target.device_type()
    frame = finish(pd.concat(frames, ignore_index=True), sheet, stack(target.torch))
    frame.attrs["metadata"] = {
        "hardware": telemetry.hardware(),
        "versions": telemetry.versions(),
        "telemetry": {"before": before, "after": telemetry.snapshot()},
        "skipped": skipped,
    }
    return frame


def finish(frame: pd.DataFrame, sheet: DeviceType, versions: str) -> pd.DataFrame:
    """Fill the columns that all rows of one run share."""
    frame["device"], frame["device_type"] = sheet.name, device_type_json(sheet)
    frame["backend"], frame["stack"], frame["source"] = "torch", versions, "measured"
    if "energy_j" not in frame:
        frame["energy_j"] = np.nan
    return frame
