# ruff: noqa: ANN401, B008, B023  # PyTorch has no types here; closures are called at once
"""What the sweep measures besides single operators: copies, whole models, models cut between CPU and GPU, energy."""

from __future__ import annotations

import copy
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from networks import networks

from moirai_sim.profiling import telemetry
from moirai_sim.profiling.schema import statistics

if TYPE_CHECKING:
    from moirai_sim.graphs.operator import Operator
    from moirai_sim.profiling.backends.torch import TorchDevice

ROUNDS = 15
TOLERANCE = 2e-2
"""Largest difference between outputs of two placements, as a share of the largest output."""


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


def links(device: TorchDevice, budget_s: float) -> Iterator[dict[str, Any]]:
    """Yield rows of copies of 1 KiB to 1 GiB: each way alone, both at once, and while a matrix product runs.

    Alone they are timed by device events; ``both-ways`` is the time until both copies are done and ``while-kernels``
    that of a copy on a stream of its own, by its own events, while another stream is busy.
    """
    torch, cuda = device.torch, device.kind == "cuda"
    sizes = [1 << e for e in range(10, 31 if cuda else 21)]
    each = budget_s / (len(sizes) * (14 if cuda else 3))
    side = 4096
    left = device.tensor((side, side), "bfloat16") if cuda else None
    streams = [torch.cuda.Stream() for _ in range(3)] if cuda else []
    for size, pinned in itertools.product(sizes, (True, False) if cuda else (False,)):
        label = "pinned" if pinned else "pageable"
        host, back = (torch.randint(0, 256, (size,), dtype=torch.uint8) for _ in range(2))
        if pinned:
            host, back = host.pin_memory(), back.pin_memory()
        here = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device.device)
        other = torch.empty_like(here)
        ways = {("host", "device"): (here, host), ("device", "host"): (back, here)}
        if pinned or not cuda:
            ways["device", "device"] = (other, here)

        def row(way: tuple[str, str], how: str, samples: Sequence[float], bytes_: int = size) -> dict[str, Any]:
            return {"source_device": way[0], "target_device": way[1], "collective": f"copy {way[0]}-{way[1]} {how}",
                    "participants": 2, "bytes": bytes_, "source": "measured", **statistics(samples)}  # fmt: skip

        for way, (into, out) in ways.items():
            yield row(way, label, device.time(lambda a=into, b=out: a.copy_(b, non_blocking=True), each).tolist())
        if not cuda:
            continue

        def both(a: Any = other, b: Any = back, h: Any = host, d: Any = here) -> None:
            with torch.cuda.stream(streams[0]):
                a.copy_(h, non_blocking=True)
            with torch.cuda.stream(streams[1]):
                b.copy_(d, non_blocking=True)

        yield row(("host", "device"), f"{label} both-ways", wall(device, both, each))
        for way, (into, out) in ways.items():
            samples = []
            for _ in range(7):
                device.synchronize()
                with torch.cuda.stream(streams[2]):
                    for _ in range(4 + size // (32 << 20)):  # longer than the copy: 0.3 ms or so each
                        torch.mm(left, left)
                with torch.cuda.stream(streams[0]):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    into.copy_(out, non_blocking=True)
                    end.record()
                device.synchronize()
                samples.append(max(float(begin.elapsed_time(end)), 5e-4) * 1e-3)
            yield row(way, f"{label} while-kernels", samples)


def whole_models(device: TorchDevice, budget_s: float) -> Iterator[dict[str, Any]]:
    """Yield times of whole models by the host's clock: eager, a CUDA graph of that, compiled, compiled with graphs."""
    torch, cuda = device.torch, device.kind == "cuda"
    found = networks(torch, small=not cuda)
    batches = (1, 8, 32) if cuda else (1,)
    modes = ("eager", "eager-cuda-graph", "compiled", "compiled-cuda-graph") if cuda else ("eager",)
    each = 0.3 * budget_s / (len(found) * len(batches) * len(modes))
    end = time.perf_counter() + budget_s
    for (name, (stages, shape)), batch, mode in itertools.product(found.items(), batches, modes):
        label = {"model": name, "batch": batch, "mode": mode, "dtype": "float32"}
        if time.perf_counter() > end:
            yield label | {"error": "no time left"}
            continue
        try:
            torch.compiler.reset()
            module = torch.nn.Sequential(*stages).to(device.device)
            x = torch.randn(batch, *shape, device=device.device)
            with torch.no_grad():
                want = module(x)
                run = _as(torch, mode, module, x)
                off = _difference(run(), want)
                yield label | statistics(wall(device, run, each)) | {"difference": off, "right": off < TOLERANCE}
        except Exception as error:  # noqa: BLE001 - one mode that fails takes no other with it
            yield label | {"error": f"{type(error).__name__}: {error}"[:300]}


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
    compiled = torch.compile(module, mode="reduce-overhead" if mode == "compiled-cuda-graph" else None)
    return lambda: compiled(x)


def _difference(found: Any, want: Any) -> float:
    return float((found.float().cpu() - want.float().cpu()).abs().max() / want.float().abs().max().cpu())


def placements(device: TorchDevice, budget_s: float) -> Iterator[dict[str, Any]]:
    """Yield times of chains cut stage by stage between CPU and device: all, prefixes, random, and the exact optimum.

    The exact one is the best of all cuts by the times of stages and copies measured alone (a shortest path); rounds
    run every placement once in random order. Without a GPU both sides are the CPU, which tries the path only.
    """
    torch, cuda = device.torch, device.kind == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    threads = (1, os.cpu_count() or 1) if cuda else (1,)
    batches = (1, 8) if cuda else (1,)
    found = {k: v for k, v in networks(torch, small=not cuda).items() if k in ("resnet", "bert", "gpt2")}
    cases = list(itertools.product(batches, sorted(set(threads), reverse=True), found.items()))  # quick ones first
    each, rng = budget_s / len(cases), random.Random(0)
    end = time.perf_counter() + budget_s
    for batch, count, (name, (stages, shape)) in cases:
        case = {"model": name, "batch": batch, "cpu_threads": count, "devices": ["cpu", str(device.device)]}
        if time.perf_counter() > end:
            yield case | {"error": "no time left"}
            continue
        torch.set_num_threads(count)
        sides = (torch.device("cpu"), device.device)
        held = [[copy.deepcopy(stage).to(side) for stage in stages] for side in sides]
        x = torch.randn(batch, *shape)

        def run(cut: Sequence[int], held: Any = held, x: Any = x, sides: Any = sides) -> Any:
            for index, side in enumerate(cut):
                x = held[side][index](x.to(sides[side]))
            return x.cpu()

        with torch.no_grad():
            stage_s, copy_s, at = [], [], x
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
            want, times = run(cuts["all-cpu"]), {label: [] for label in cuts}
            off = {label: _difference(run(cut), want) for label, cut in cuts.items()}
            stop = time.perf_counter() + each
            for number in range(ROUNDS):
                if number >= 3 and time.perf_counter() > stop:
                    break
                for label in rng.sample(sorted(cuts), len(cuts)):
                    device.synchronize()
                    start = time.perf_counter()
                    run(cuts[label])
                    times[label].append(time.perf_counter() - start)
        yield case | {"stages_s": stage_s, "copies_s": copy_s, "placements": [
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


def energy(device: TorchDevice, operators: Sequence[Operator], budget_s: float) -> Iterator[dict[str, Any]]:
    """Yield joules of one run by the board's counter over repeats of seconds; idle watts first."""
    index = device.device.index or 0
    gpus = telemetry.gpu_snapshot() if device.kind == "cuda" else []
    if len(gpus) <= index or gpus[index]["energy_j"] is None:
        yield {"error": "no energy counter: no GPU, or pip install nvidia-ml-py"}
        return

    def joules() -> float:
        return float(telemetry.gpu_snapshot()[index]["energy_j"])

    before, start = joules(), time.perf_counter()
    time.sleep(3)
    yield {"operator": "idle", "watts": (joules() - before) / (time.perf_counter() - start)}
    for operator in operators:
        try:
            run = device.prepare(operator)
            with device.torch.no_grad():
                once = float(np.median(device.time(run, 0.1)))
                batch, count = max(1, int(0.02 / once)), 0
                before, start = joules(), time.perf_counter()
                while time.perf_counter() < start + budget_s / max(len(operators), 1):
                    for _ in range(batch):
                        run()
                    device.synchronize()
                    count += batch
                seconds = time.perf_counter() - start
                used = joules() - before
            shapes = [list(tensor.shape) for tensor in operator.inputs]
            yield {"operator": operator.op_type, "dtype": operator.dtype, "input_shapes": shapes,
                   "flops": operator.flops, "joules": used / count, "watts": used / seconds, "runs": count}  # fmt: skip
        except Exception as error:  # noqa: BLE001 - one operator that fails takes no other with it
            yield {"operator": operator.op_type, "error": str(error)[:300]}
