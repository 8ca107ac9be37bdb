# ruff: noqa: ANN401, B008, B023  # PyTorch has no types here; closures are called at once
"""What the sweep measures besides single operators: copies, whole models, models cut between CPU and GPU, energy."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from networks import networks

from moirai_sim.files import write_whole
from moirai_sim.profiling.schema import statistics

if TYPE_CHECKING:
    from moirai_sim.graphs.operator import Operator
    from moirai_sim.profiling.backends.torch import TorchDevice

ROUNDS = 15
BATCHES = (1, 8, 32)
TOLERANCE = 2e-2
"""Largest difference between outputs of two placements, as a share of the largest output."""
NO_TIME = "no time left"
_COMPILE_S = 45.0
"""What compiling a model may take; once begun it cannot be stopped."""
_PRODUCT_S = 2e-3
"""A product that keeps the device busy is no longer than this, so that some hundreds outlast any copy."""
_MAX_PRODUCTS = 800
"""A stream holds about a thousand kernels, then the host waits."""


class Rows:
    """Rows of a section in a file that is whole after each of them, so that what ends the process loses none.

    Parameters
    ----------
    path
        Rows that are there already are kept and not measured again, also one that ended the process; those that had
        no time are.
    budget_s
        After so many seconds the rest has no time.
    check
        Called after an error: what it raises ends the section, as where the device takes no more work.
    """

    def __init__(self, path: Path, budget_s: float, check: Callable[[], object]) -> None:
        self._path, self._check, self._end = path, check, time.perf_counter() + budget_s
        kept = json.loads(path.read_text()) if path.exists() else []
        self.rows: list[dict[str, Any]] = [row for row in kept if row.get("error") != NO_TIME]

    def left_s(self) -> float:
        """Return the seconds that are left."""
        return self._end - time.perf_counter()

    def measure(
        self, label: Mapping[str, Any], figures: Callable[[], Mapping[str, Any]], *, needs_s: float = 0.0
    ) -> None:
        """Add a row of a label and its figures, or of the error that came instead, where ``needs_s`` is left."""
        if any(all(row.get(key) == value for key, value in label.items()) for row in self.rows):
            return
        late = self.left_s() < needs_s
        self.rows.append({**label, "error": NO_TIME if late else "ended the process"})
        self._write()
        if late:
            return
        try:
            self.rows[-1] = {**label, **figures()}
        except Exception as error:  # noqa: BLE001 - one that fails takes no other with it
            self.rows[-1] = {**label, "error": f"{type(error).__name__}: {error}"[:300]}
            self._write()
            self._check()
        self._write()
        if len(self.rows) % 20 == 0:
            print(f"{self._path.stem}: {len(self.rows)} rows, {max(self.left_s(), 0):.0f} s left", flush=True)

    def _write(self) -> None:
        write_whole(self._path, json.dumps(self.rows, indent=1) + "\n")


def wall(device: TorchDevice, run: Callable[[], object], budget_s: float) -> list[float]:
    """Return host-clock timings from an idle device until it is idle again, seconds."""
    for _ in range(2):
        run()
    samples: list[float] = []
    end = time.perf_counter() + budget_s
    while len(samples) < 5 or (time.perf_counter() < end and len(samples) < 50):
        device.synchronize()
        start = time.perf_counter()
        run()
        device.synchronize()
        samples.append(time.perf_counter() - start)
    return samples


def links(device: TorchDevice, rows: Rows, budget_s: float) -> None:
    """Time copies of 1 KiB to 1 GiB: each way alone, both at once, and while matrix products run.

    Copies from and to the host are timed alone by the host's clock, from an idle device until it is idle again, which
    is what one takes that others wait for; ``queued`` is the device's time of one in a row of them. ``both-ways`` is
    the time until both copies are done and ``while-kernels`` that of a copy on a stream of its own, by its own events,
    while another stream is busy from before until after it.
    """
    torch, cuda = device.torch, device.kind == "cuda"
    sizes = [1 << e for e in range(10, 31 if cuda else 21)]
    each = budget_s / (len(sizes) * (18 if cuda else 3))
    busy = _Busy(device) if cuda else None
    streams = [torch.cuda.Stream() for _ in range(2)] if cuda else []
    all_host = [torch.randint(0, 1 << 62, (sizes[-1] // 8,)).view(torch.uint8) for _ in range(2)]
    all_device = [whole.to(device.device, copy=True) for whole in all_host]
    memory = {"pinned": [whole.pin_memory() for whole in all_host]} if cuda else {}
    for size, (label, pair) in itertools.product(sizes, (memory | {"pageable": all_host}).items()):
        host, back, here, other = (whole[:size] for whole in (*pair, *all_device))
        ways = {("host", "device"): [(here, host)], ("device", "host"): [(back, here)]}
        if label == "pinned" or not cuda:  # through more memory than the cache holds
            starts = range(0, sizes[-1] - size + 1, size)[: max(1, -(-2 * device.cache_bytes // size))]
            ways["device", "device"] = [tuple(whole[at : at + size] for whole in all_device) for at in starts]

        def row(way: tuple[str, str], how: str, samples: Callable[[], Any]) -> None:
            named = {"source_device": way[0], "target_device": way[1], "collective": f"copy {way[0]}-{way[1]} {how}",
                     "participants": 2, "bytes": size, "source": "measured"}  # fmt: skip
            rows.measure(named, lambda: statistics(samples()))

        for way, pairs in ways.items():
            turn = itertools.cycle(pairs)

            def copy() -> None:
                into, out = next(turn)
                into.copy_(out, non_blocking=True)

            if cuda and "host" in way:
                row(way, label, lambda: wall(device, copy, each))
                row(way, f"{label} queued", lambda: device.time(copy, each))
            else:
                row(way, label, lambda: device.time(copy, each))
        if busy is None:
            continue

        def both() -> None:
            with torch.cuda.stream(streams[0]):
                other.copy_(host, non_blocking=True)
            with torch.cuda.stream(streams[1]):
                back.copy_(here, non_blocking=True)

        row(("host", "device"), f"{label} both-ways", lambda: wall(device, both, each))
        for way, ((into, out), *_) in ways.items():
            row(way, f"{label} while-kernels", lambda: busy.times(lambda: into.copy_(out, non_blocking=True)))


class _Busy:
    """Matrix products on a stream of their own, beside which something else is timed."""

    def __init__(self, device: TorchDevice) -> None:
        self._device, self._torch, side = device, device.torch, 8192
        self._streams = [device.torch.cuda.Stream() for _ in range(2)]
        while True:
            self._left = device.tensor((side, side), "float16")
            self._product = device.torch.empty_like(self._left)
            self._once_s = float(np.median(device.time(self._multiply, 0.05)))
            if self._once_s <= _PRODUCT_S or side <= 1024:
                return
            side //= 2

    def _multiply(self) -> None:
        self._torch.mm(self._left, self._left, out=self._product)

    def times(self, run: Callable[[], object], repeats: int = 7) -> list[float]:
        """Return the times of a call by events around it, seconds; products run from before until after each.

        Raises
        ------
        RuntimeError
            If the call outlasts the longest queue of products.
        """
        torch, device, samples = self._torch, self._device, []
        device.synchronize()
        start = time.perf_counter()
        run()
        device.synchronize()
        count = 2 + math.ceil(2 * (time.perf_counter() - start) / self._once_s)
        while len(samples) < repeats:
            begin, end, first, last = (torch.cuda.Event(enable_timing=True) for _ in range(4))
            device.synchronize()
            with torch.cuda.stream(self._streams[0]):
                self._multiply()
                first.record()
                for _ in range(min(count, _MAX_PRODUCTS)):
                    self._multiply()
                last.record()
            with torch.cuda.stream(self._streams[1]):
                self._streams[1].wait_event(first)
                begin.record()
                run()
                end.record()
            device.synchronize()
            if first.elapsed_time(last) >= first.elapsed_time(end):
                samples.append(max(float(begin.elapsed_time(end)), 5e-4) * 1e-3)
            elif count >= _MAX_PRODUCTS:
                raise RuntimeError(f"it outlasts {_MAX_PRODUCTS} products of {self._once_s:.2g} s")
            else:
                count *= 2
        return samples


def whole_models(device: TorchDevice, rows: Rows, budget_s: float) -> None:
    """Time whole models by the host's clock: eager, a CUDA graph of that, compiled, compiled with graphs.

    Modes in this order, each over all models: compiling takes minutes, and the others must not wait for it.
    """
    torch, cuda = device.torch, device.kind == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = networks(torch, small=not cuda)
    batches = BATCHES if cuda else (1,)
    modes = ("eager", "eager-cuda-graph", "compiled", "compiled-cuda-graph") if cuda else ("eager",)
    each = 0.3 * budget_s / (len(found) * len(batches) * len(modes))
    for mode, batch, (name, (stages, shape)) in itertools.product(modes, batches, found.items()):

        def figures() -> dict[str, Any]:
            module = torch.nn.Sequential(*stages).to(device.device)
            x = torch.randn(batch, *shape, device=device.device)
            with torch.no_grad():
                want = module(x)
                run = _as(torch, mode, module, x)
                off = _difference(run(), want)
                return statistics(wall(device, run, each)) | {"difference": off, "right": off < TOLERANCE}

        needs_s = _COMPILE_S if mode.startswith("compiled") else 0.0
        rows.measure({"model": name, "batch": batch, "mode": mode, "dtype": "float32"}, figures, needs_s=needs_s)


def _as(torch: Any, mode: str, module: Any, x: Any) -> Callable[[], Any]:
    if mode == "eager":
        return lambda: module(x)
    if mode == "eager-cuda-graph":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                module(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = module(x)

        def replay() -> Any:
            graph.replay()
            return result

        return replay
    torch.compiler.reset()
    compiled = torch.compile(module, mode="reduce-overhead" if mode == "compiled-cuda-graph" else None)
    return lambda: compiled(x)


def _difference(found: Any, want: Any) -> float:
    return float((found.float().cpu() - want.float().cpu()).abs().max() / want.float().abs().max().cpu())


def placements(device: TorchDevice, rows: Rows, budget_s: float) -> None:
    """Time chains cut stage by stage between CPU and device: all, prefixes, random, and the exact optimum.

    The exact one is the best of all cuts by the times of stages and copies measured alone (a shortest path); rounds
    run every placement once in random order. Without a GPU both sides are the CPU, which tries the path only.
    """
    torch, cuda = device.torch, device.kind == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    threads = (1, len(os.sched_getaffinity(0))) if cuda else (1,)
    batches = (1, 8) if cuda else (1,)
    found = {k: v for k, v in networks(torch, small=not cuda).items() if k in ("resnet", "bert", "gpt2")}
    cases = list(itertools.product(batches, sorted(set(threads), reverse=True), found.items()))  # quick ones first
    for batch, count, (name, (stages, shape)) in cases:
        case = {"model": name, "batch": batch, "cpu_threads": count, "devices": ["cpu", str(device.device)]}
        torch.set_num_threads(count)
        x = torch.randn(batch, *shape)
        rows.measure(case, lambda: _cut_times(device, stages, x, rows.left_s(), budget_s / len(cases)))


def _cut_times(device: TorchDevice, stages: Sequence[Any], x: Any, left_s: float, budget_s: float) -> dict[str, Any]:
    torch, rng = device.torch, random.Random(0)
    sides = (torch.device("cpu"), device.device)
    held = [[copy.deepcopy(stage).to(side) for stage in stages] for side in sides]

    def run(cut: Sequence[int]) -> Any:
        at = x
        for index, side in enumerate(cut):
            at = held[side][index](at.to(sides[side]))
        return at.cpu()

    with torch.no_grad():
        start, stage_s, copy_s, at = time.perf_counter(), [], [], x
        for index in range(len(stages)):
            given = [at.to(side) for side in sides]
            copy_s.append([_median(device, lambda g=given, s=s: g[s].to(sides[1 - s])) for s in (0, 1)])
            stage_s.append([_median(device, lambda g=given, s=s, i=index: held[s][i](g[s])) for s in (0, 1)])
            at = held[0][index](at)
        copy_s.append([_median(device, lambda a=at.to(side): a.cpu()) for side in sides])
        size = len(stages)
        cuts: dict[str, tuple[int, ...]] = {"all-cpu": (0,) * size, "all-gpu": (1,) * size}
        cuts |= {f"cpu-first-{k}": (0,) * k + (1,) * (size - k) for k in {size // 4, size // 2} if k}
        cuts |= {f"gpu-first-{k}": (1,) * k + (0,) * (size - k) for k in {size // 2} if k}
        cuts |= {f"random-{k}": tuple(rng.randrange(2) for _ in range(size)) for k in range(6)}
        cuts["exact"] = _exact(stage_s, copy_s)
        need_s = 4 * sum(_predicted(cut, stage_s, copy_s) for cut in cuts.values())  # a check and three rounds
        if need_s > 1.5 * (left_s - (time.perf_counter() - start)):
            raise RuntimeError(f"three rounds take {need_s:.0f} s, which are not left")
        want, times = run(cuts["all-cpu"]), {label: [] for label in cuts}
        off = {label: _difference(run(cut), want) for label, cut in cuts.items()}
        stop = time.perf_counter() + budget_s
        for number in range(ROUNDS):
            if number >= 3 and time.perf_counter() > stop:
                break
            for label in rng.sample(sorted(cuts), len(cuts)):
                device.synchronize()
                start = time.perf_counter()
                run(cuts[label])
                times[label].append(time.perf_counter() - start)
    return {"stages_s": stage_s, "copies_s": copy_s, "placements": [
        {"placement": label, "sides": list(cut), "difference": off[label], "right": off[label] < TOLERANCE,
         "predicted_s": _predicted(cut, stage_s, copy_s), **statistics(times[label])}
        for label, cut in cuts.items()]}  # fmt: skip


def _median(device: TorchDevice, run: Callable[[], object]) -> float:
    return float(np.median(wall(device, run, 0.02)))


def _predicted(cut: Sequence[int], stage_s: Sequence[Sequence[float]], copy_s: Sequence[Sequence[float]]) -> float:
    total, at = 0.0, 0
    for index, side in enumerate(cut):
        total += stage_s[index][side] + (copy_s[index][at] if side != at else 0.0)
        at = side
    return total + (copy_s[-1][1] if at else 0.0)


def _exact(stage_s: Sequence[Sequence[float]], copy_s: Sequence[Sequence[float]]) -> tuple[int, ...]:
    best: dict[int, tuple[int, ...]] = {0: ()}
    for _ in stage_s:
        grown = [(*cut, side) for cut in best.values() for side in (0, 1)]
        best = {
            side: min((c for c in grown if c[-1] == side), key=lambda c: _path(c, stage_s, copy_s)) for side in (0, 1)
        }
    return min(best.values(), key=lambda cut: _predicted(cut, stage_s, copy_s))


def _path(cut: Sequence[int], stage_s: Sequence[Sequence[float]], copy_s: Sequence[Sequence[float]]) -> float:
    return _predicted(cut, stage_s, copy_s) - (copy_s[-1][1] if cut[-1] else 0.0)


def energy(device: TorchDevice, operators: Sequence[Operator], rows: Rows, budget_s: float) -> None:
    """Measure joules of one run by the board's counter over long repeats; idle watts first."""
    board = device.board

    def idle() -> dict[str, float]:
        if board is None or (before := board.energy_j()) is None:
            raise RuntimeError("no energy counter: no GPU, or pip install nvidia-ml-py")
        start = time.perf_counter()
        time.sleep(3)
        return {"watts": (board.energy_j() - before) / (time.perf_counter() - start)}

    def figures(operator: Operator) -> dict[str, float]:
        run = device.prepare(operator)
        with device.torch.no_grad():
            once = float(np.median(device.time(run, 0.1)))
            joules = device.energy(run, once, budget_s / len(operators))
        if math.isnan(joules):
            raise RuntimeError("the energy counter did not move")
        return {"flops": operator.flops, "seconds": once, "joules": joules, "watts": joules / once}

    rows.measure({"operator": "idle"}, idle)
    if "error" in rows.rows[0]:
        return
    for operator in operators:
        shapes = [list(tensor.shape) for tensor in operator.inputs]
        label = {"operator": operator.op_type, "dtype": operator.dtype, "input_shapes": shapes}
        rows.measure(label, lambda: figures(operator))
