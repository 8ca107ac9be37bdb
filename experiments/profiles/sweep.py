"""Measure a device with PyTorch in one command: operators where they say most, links, whole models, energy.

    python experiments/profiles/sweep.py --device cuda:0 --minutes 25 -o my-gpu

Each section runs in a process of its own (a failed kernel or a hang ends that section only), writes as it goes and is
tried twice; the same command again takes up what is missing. ``operators.parquet`` and ``links.parquet`` are versioned
profiles, ``facts.json`` holds the rest; they are joined anew after each section, so that whatever ends the run leaves
what it had. ``moirai-sim calibrate my-gpu/*.parquet -o my-model`` fits a cost model. A machine with PyTorch, pandas,
PyArrow and this checkout alone is enough.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where the package is not installed

import sections
from networks import called, networks

from moirai_sim.files import write_whole
from moirai_sim.graphs.operator import Operator, Tensor
from moirai_sim.graphs.work import make_operator
from moirai_sim.profiling import telemetry
from moirai_sim.profiling.backends.torch import TorchDevice, finish, profile_graph_operators, stack
from moirai_sim.profiling.backends.torch_calls import RESULTS, Unsupported
from moirai_sim.profiling.schema import (
    device_type_from_json,
    device_type_json,
    operator_key,
    operator_row,
    read_profile,
    row_operator,
    write_profile,
)

if TYPE_CHECKING:
    import pandas as pd

    from moirai_sim.clusters.cluster import DeviceType

AWKWARD = (1, 2, 3, 7, 17, 31, 33, 63, 65, 127, 129, 251, 255, 257, 509, 1021, 1025, 2047, 4093, 8191)
"""Primes, and sizes off by one from tiles."""
CUDA_DTYPES = ("float32", "tf32", "float16", "bfloat16")
LISTED = Path(__file__).with_name("real-operators.parquet")
TRIES = 2
"""So many, for a time limit ends a process as a broken kernel does."""
GROUP = 100
"""Operators in a file."""
GRACE_S = 60.0
"""What a section may take beyond its time, half of it again, and what the whole run may: a compiler does not stop."""
ENERGY_EVERY = 25
"""Of so many operators one is repeated until its energy is known."""
SHARES = {
    "limits": 0.03, "links": 0.1, "filling": 0.32, "whole-models": 0.12, "placements": 0.1, "real": 0.12,
    "uncertain": 0.14, "noise": 0.03, "energy": 0.04,
}  # fmt: skip
"""Sections in the order in which they run, and their shares of the time."""
ZOO = ("zoo:resnet50?batch={batch}", "zoo:bert-base?batch={batch}&seq=128", "zoo:gpt2?batch={batch}&seq=64",
       "zoo:swin-t?batch={batch}", "zoo:alphafold2-87m?batch={batch}")  # fmt: skip


def log_uniform(u: float, low: int, high: int) -> int:
    """Map a number in [0, 1) to a size between ``low`` and ``high``; a quarter of them are awkward."""
    value = round(low * (high / low) ** u)
    if int(u * 1e4) % 4 == 0:
        near = [size for size in AWKWARD if low <= size <= high and value / 2 <= size <= value * 2]
        value = min(near, key=lambda size: abs(math.log(size / value))) if near else value
    return value


def matmul(u: np.ndarray, dtype: str, side: int) -> Operator:
    m, n, k = (log_uniform(x, 1, side) for x in u[:3])
    if dtype == "bfloat16" and u[3] < 0.4 and side > 4096:  # 8-bit floats where the device has them, sides that fit
        m, n, k = (16 * -(-size // 16) for size in (m, n, k))
        result = Tensor("product", (m, n), RESULTS["float8"])
        return make_operator("matmul", "MatMul", [(m, k), (k, n)], [result], dtype="float8")
    if dtype == "float16" and u[3] < 0.2 and side > 4096:  # 8-bit integers, of the sides that cuBLAS takes
        m, n, k = (32 * -(-size // 32) for size in (m, n, k))
        result = Tensor("product", (m, n), RESULTS["int8"])
        return make_operator("matmul", "MatMulInteger", [(m, k), (k, n)], [result], dtype="int8")
    return make_operator("matmul", "MatMul", [(m, k), (k, n)], [(m, n)], dtype=dtype)


def batched(u: np.ndarray, dtype: str, side: int) -> Operator:
    b, m, n, k = log_uniform(u[3], 2, 512), *(log_uniform(x, 1, max(side // 4, 8)) for x in u[:3])
    return make_operator("bmm", "MatMul", [(b, m, k), (b, k, n)], [(b, m, n)], dtype=dtype)


def convolution(u: np.ndarray, dtype: str, side: int) -> Operator:
    batch, size = log_uniform(u[0], 1, 64 if side > 4096 else 2), log_uniform(u[1], 7, 224)
    kernel, stride = (1, 3, 3, 5, 7)[int(u[2] * 5)], 1 + int(u[3] > 0.75)
    into, out = 8 * log_uniform(u[4], 1, 128), 8 * log_uniform(u[5], 1, 128)
    group = (1, 1, 1, 8, into)[int(u[6] * 5)]
    out = into if group == into else out
    side_out = (size + 2 * (kernel // 2) - kernel) // stride + 1
    return make_operator(
        "conv", "Conv", [(batch, into, size, size), (out, into // group, kernel, kernel)],
        [(batch, out, side_out, side_out)],
        {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4, "group": group}, dtype,
    )  # fmt: skip


def streaming(u: np.ndarray, dtype: str, side: int) -> Operator:
    """Draw one of the families that are bound by memory, from 1 KiB up to 1 GiB (64 MiB on a CPU)."""
    width = log_uniform(u[1], 8, 16384)
    rows = max(1, log_uniform(u[0], 1 << 8, 1 << (30 if side > 4096 else 22)) // width)
    shape = (rows, width)
    kind = ("Add", "Mul", "Relu", "Gelu", "Tanh", "LayerNormalization", "Softmax", "ReduceMean", "Transpose", "Concat",
            "Gather", "MaxPool")[int(u[2] * 12)]  # fmt: skip
    if kind in ("Add", "Mul"):
        return make_operator(kind, kind, [shape, shape], [shape], dtype=dtype)
    if kind == "LayerNormalization":
        return make_operator(kind, kind, [shape, (width,), (width,)], [shape], {"axis": -1}, dtype)
    if kind == "Softmax":
        return make_operator(kind, kind, [shape], [shape], {"axis": -1}, dtype)
    if kind == "ReduceMean":
        return make_operator(kind, kind, [shape], [(rows, 1)], {"axes": [1]}, dtype)
    if kind == "Transpose":
        return make_operator(kind, kind, [shape], [shape[::-1]], {"perm": [1, 0]}, dtype)
    if kind == "Concat":
        return make_operator(kind, kind, [shape, shape], [(2 * rows, width)], {"axis": 0}, dtype)
    if kind == "Gather":
        return make_operator(kind, kind, [shape, (rows,)], [shape], {"axis": 0}, dtype)
    if kind == "MaxPool":
        edge = max(4, int(math.sqrt(rows * width / 64)))
        attributes = {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0] * 4}
        return make_operator(kind, kind, [(1, 64, edge, edge)], [(1, 64, edge // 2, edge // 2)], attributes, dtype)
    return make_operator(kind, kind, [shape], [shape], dtype=dtype)


def attention(u: np.ndarray, dtype: str, side: int) -> Operator:
    """Draw prefill (as many queries as keys; causal in half of the cases) or decode (one query)."""
    top = 8192 if side > 4096 else 512
    batch, heads, keys = log_uniform(u[0], 1, 32), log_uniform(u[1], 1, 64), log_uniform(u[2], 16, top)
    depth, queries = (64, 128)[int(u[3] * 2)], 1 if u[4] < 0.5 else keys
    q, kv = (batch, heads, queries, depth), (batch, heads, keys, depth)
    attributes = {"is_causal": 1} if queries > 1 and u[5] < 0.5 else {}
    return make_operator("attention", "Attention", [q, kv, kv], [q], attributes, dtype)


FAMILIES: tuple[tuple[Callable[[np.ndarray, str, int], Operator], float], ...] = (
    (matmul, 0.25), (batched, 0.15), (convolution, 0.2), (streaming, 0.3), (attention, 0.1),
)  # fmt: skip


def design(count: int, seed: int, device: TorchDevice, sheet: DeviceType) -> list[Operator]:
    """Return a space-filling (scrambled Sobol) design over families, and over data types and sizes that the device has.

    Family and data type have dimensions of their own: a turn by position would give each data type one part of the
    sizes, since neighbours of the sequence lie in opposite halves.
    """
    side = 16384 if device.kind == "cuda" else 1024
    dtypes = [dtype for dtype in CUDA_DTYPES if dtype in sheet.peak_flops]
    points = device.torch.quasirandom.SobolEngine(9, scramble=True, seed=seed).draw(count).numpy().clip(0, 1 - 1e-6)
    shares = np.cumsum([share for _, share in FAMILIES])
    limit = 2e13 if device.kind == "cuda" else 2e9
    chosen = []
    for point in points:
        draw = FAMILIES[int(np.searchsorted(shares, point[7], side="right").clip(0, len(FAMILIES) - 1))][0]
        operator = draw(point[:7], dtypes[int(point[8] * len(dtypes))], side)
        if operator.flops < limit and 3 * (operator.read_bytes + operator.write_bytes) < sheet.memory_bytes:
            chosen.append(operator)
    return chosen


def least_certain(
    frame: pd.DataFrame, candidates: Sequence[Operator], count: int, sheet: DeviceType, versions: str
) -> list[Operator]:
    """Return the candidates whose predicted 90 % interval is widest, after a fit to what was measured so far."""
    import pandas as pd

    from moirai_sim.costs.estimator import estimator_for
    from moirai_sim.profiling.schema import operator_row

    fitted = estimator_for(frame).fit(frame)
    rows = finish(pd.DataFrame([operator_row(operator) for operator in candidates]), sheet, versions)
    rows["median_s"] = 1.0
    _, low, high, outside = fitted.predict_interval(rows)
    order = np.argsort(-(np.log(high / low) + outside), kind="stable")
    return [candidates[i] for i in order[:count]]


def operators(
    device: TorchDevice, todo: Sequence[Operator], name: str, out: Path, budget_s: float,
    models: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Time operators in groups, a file each; a group that ended the process twice is left out when run again.

    ``models`` names the model of operators by their key.
    """
    sheet = device_type_from_json(json.dumps(json.loads((out / "limits.json").read_text())["sheet"]))
    end, done, skipped = time.perf_counter() + budget_s, 0, {}
    groups = [todo[i : i + GROUP] for i in range(0, len(todo), GROUP)]
    for number, group in enumerate(groups):
        path, mark = out / "parts" / f"{name}-{number:03}.parquet", out / "parts" / f"{name}-{number:03}.started"
        tries = int(mark.read_text(encoding="ascii") or 0) if mark.exists() else 0
        if path.exists() or tries >= TRIES:
            continue
        left = end - time.perf_counter()
        if left <= 0:
            skipped[sections.NO_TIME] = len(todo) - number * GROUP
            break
        write_whole(mark, str(tries + 1))  # one that ends the process has to try again with what came after it
        with telemetry.Watch(device.board) as watch:
            frame, missed = profile_graph_operators(
                device, group, left / (len(groups) - number), energy_every=ENERGY_EVERY
            )
            device.synchronize()
        for reason, count in missed.items():
            skipped[reason] = skipped.get(reason, 0) + count
        if len(frame):
            if models:
                frame["model"] = [models.get(operator_key(row_operator(row)), "") for _, row in frame.iterrows()]
            facts = {"telemetry": watch.summary()}
            if device.kind == "cuda":
                facts["launch_s"] = frame["launch_s"].tolist()
            write_profile(finish(frame, sheet, stack(device.torch)), path, metadata=facts)
        done += len(frame)
        print(f"{name}: group {number + 1} of {len(groups)}, {done} operators, {max(left, 0):.0f} s left", flush=True)
    return {"operators": done, "skipped": skipped}


def finished(path: Path) -> bool:
    """Tell whether a section has ended, and for another reason than that its time was over."""
    return path.exists() and sections.NO_TIME not in path.read_text(encoding="utf-8")


def parts(out: Path, *names: str) -> list[Path]:
    """Return the files of the groups of some sections."""
    return [path for name in names for path in sorted((out / "parts").glob(f"{name}-*.parquet"))]


def measured(out: Path, *names: str) -> pd.DataFrame:
    """Return what the groups of some sections hold so far."""
    import pandas as pd

    frames = [read_profile(path)[0] for path in parts(out, *names)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def real_operators(*, small: bool) -> dict[str, list[Operator]]:
    """Return the operators of `listed_operators` as the file beside this one has them, quick while a GPU waits."""
    import pandas as pd

    found: dict[str, list[Operator]] = {}
    for _, row in pd.read_parquet(LISTED)[: 20 if small else None].iterrows():
        found.setdefault(row["model"], []).append(row_operator(row))
    return found


def listed_operators() -> dict[str, list[Operator]]:
    """Return the distinct operators of the light ONNX models and of the zoo's, by the model where each is met first."""
    from moirai_sim.graphs.light import light_models
    from moirai_sim.graphs.load import load_graph

    sources = [str(path) for path in light_models().values()]
    for batch in (1, 8, 32):
        sources += [source.format(batch=batch) for source in ZOO]
    found: dict[str, list[Operator]] = {}
    seen: set[str] = set()
    for source in sources:
        try:
            graph = load_graph(source)
        except Exception as error:  # noqa: BLE001 - one model that cannot be read takes no other with it
            print(f"real: {source}: {type(error).__name__}: {error}", flush=True)
            continue
        distinct = {key: operator for operator in graph if (key := operator_key(operator)) not in seen}
        seen |= distinct.keys()
        found[graph.name] = list(distinct.values())
    return found


def called_operators(device: TorchDevice) -> dict[str, list[Operator]]:
    """Return the operators of every network that is timed whole, by network and batch; see `networks.called`."""
    torch, cuda = device.torch, device.kind == "cuda"
    found = {}
    for name, (stages, shape) in networks(torch, small=not cuda).items():
        for batch in sections.BATCHES if cuda else (1,):
            moved = [stage.to(device.device) for stage in stages]
            found[f"{name}?batch={batch}"] = called(torch, moved, torch.randn(batch, *shape, device=device.device))
    return found


def real(device: TorchDevice, out: Path, budget_s: float) -> dict[str, Any]:
    """Time the operators of the networks that are timed whole, then those of the ONNX models; return their sums."""
    whole = called_operators(device)
    first: dict[str, str] = {}
    todo: dict[str, Operator] = {}
    for model, found in (*whole.items(), *real_operators(small=device.kind != "cuda").items()):
        for operator in found:
            key = operator_key(operator)
            first.setdefault(key, model)
            todo.setdefault(key, operator)
    done = operators(device, list(todo.values()), "real", out, budget_s, first)
    known = {operator_key(row_operator(row)): row["median_s"] for _, row in measured(out, "real").iterrows()}
    return done | {"sums": {model: _sum(found, known) for model, found in whole.items()}}


def _sum(found: Sequence[Operator], known: Mapping[str, float]) -> dict[str, Any]:
    times = [known.get(operator_key(operator)) for operator in found]
    return {"calls": len(times), "not_timed": times.count(None), "operators_s": sum(t for t in times if t is not None)}


def noise(device: TorchDevice, out: Path, budget_s: float) -> dict[str, Any]:
    """Time 200 operators again and return the spread against the first time."""
    frame = measured(out, "filling")
    rows = frame.iloc[np.unique(np.linspace(0, len(frame) - 1, min(200, len(frame))).astype(int))]
    ratios: list[float] = []
    for index, (_, row) in enumerate(rows.iterrows()):
        try:
            again = device.time_operator(row_operator(row), budget_s / len(rows))
        except Unsupported:
            continue
        ratios.append(float(np.median(again) / row["median_s"]))
        if index % 50 == 0:
            print(f"noise: {index} of {len(rows)}", flush=True)
    off = np.abs(np.array(ratios) - 1)
    return {"points": len(off), "median_ape": float(np.median(off)), "p90_ape": float(np.percentile(off, 90)),
            "ratios": ratios}  # fmt: skip


def shares(out: Path) -> dict[str, Any]:
    """Return by family and data type the median share of the limit that binds: copy bandwidth or product rate."""
    frame = measured(out, "filling", "uncertain", "real")
    sheet = json.loads((out / "limits.json").read_text())["sheet"]
    peak = frame["dtype"].map(sheet["peak_flops"]).fillna(max(sheet["peak_flops"].values()))
    bound = np.maximum(
        (frame["read_bytes"] + frame["write_bytes"]) / sheet["memory_bandwidth_bytes_per_s"], frame["flops"] / peak
    )  # fmt: skip
    grouped = (bound / frame["median_s"]).groupby([frame["family"], frame["dtype"]])
    return {
        f"{family} {dtype}": {"operators": len(share), "median_share": float(share.median()), "top": float(share.max())}
        for (family, dtype), share in grouped
    }


def section(name: str, device_name: str, seconds: float, out: Path, seed: int) -> dict[str, Any]:
    """Run one section in this process; return what is to be remembered of it."""
    device = TorchDevice(device_name)
    device.wake()
    with telemetry.Watch(device.board) as watch:
        found = _section(name, device, seconds, out, seed)
    here = {"hardware": telemetry.hardware(), "versions": telemetry.versions(), "telemetry": telemetry.snapshot()}
    return found | {"telemetry": watch.summary(), "machine": here}


def _section(name: str, device: TorchDevice, seconds: float, out: Path, seed: int) -> dict[str, Any]:
    if name == "limits":
        return {"sheet": json.loads(device_type_json(device.device_type()))}
    cuda = device.kind == "cuda"
    kept = partial(sections.Rows, out / f"{name}-rows.json", seconds, device.synchronize)
    whole = {"links": sections.links, "whole-models": sections.whole_models, "placements": sections.placements}
    if name in whole:
        rows = kept()
        whole[name](device, rows, seconds)
        return {"rows": rows.rows}
    known = json.loads((out / "limits.json").read_text())["sheet"]
    sheet, count = device_type_from_json(json.dumps(known)), 7000 if cuda else 60
    if name == "filling":
        return operators(device, design(count, seed, device, sheet), name, out, seconds)
    if name == "uncertain":
        candidates, how = design(count, seed + 1, device, sheet), "widest intervals of a first fit"
        try:
            first = measured(out, "filling")
            chosen = least_certain(first, candidates, count // 2, sheet, stack(device.torch))
            device.wake()
        except Exception as error:  # noqa: BLE001 - without scikit-learn, more of the space-filling design
            chosen, how = candidates[: count // 2], f"space-filling: {type(error).__name__}: {error}"
        return operators(device, chosen, name, out, seconds) | {"chosen": how}
    if name == "real":
        return real(device, out, seconds)
    if name == "noise":
        return noise(device, out, seconds)
    frame = measured(out, "filling")
    frame = frame[frame["median_s"] > 2e-5] if cuda else frame
    picked = frame.groupby(["family", "dtype"]).head(2)
    rows = kept()
    sections.energy(device, [row_operator(row) for _, row in picked.iterrows()], rows, seconds)
    return {"rows": rows.rows}


def gather(out: Path, minutes: float, seed: int, device_name: str) -> dict[str, Any]:
    """Join the groups into ``operators.parquet``, the copies into ``links.parquet`` and all facts into ``facts.json``.

    Both profiles have the facts as metadata: hardware, driver, PCIe link, and what was sampled during each part.
    """
    import pandas as pd

    limits = out / "limits.json"
    if not limits.exists():
        return {"operators": 0}
    machine = json.loads(limits.read_text())["machine"]  # where it was measured, wherever the parts are joined
    facts: dict[str, Any] = {**machine, "minutes": minutes, "seed": seed, "device": device_name}
    for name in SHARES:
        path = out / f"{name}.json"
        facts[name] = json.loads(path.read_text()) if path.exists() else {"error": "did not end; see the log"}
        rows = out / f"{name}-rows.json"
        if not path.exists() and rows.exists():
            facts[name]["rows"] = json.loads(rows.read_text())
    copies = [row for row in facts["links"].get("rows", []) if "error" not in row]
    if copies:
        known = {key: facts[key] for key in ("hardware", "versions", "device", "telemetry")}
        known["during"] = facts["links"].get("telemetry", {})
        write_profile(pd.DataFrame(copies), out / "links.parquet", kind="links", metadata=known)
    _compare(facts)
    facts["parts"] = {path.stem: read_profile(path)[1] for path in parts(out, "filling", "uncertain", "real")}
    frame = measured(out, "filling", "uncertain", "real")
    if len(frame):
        facts["shares_of_limits"] = shares(out)
        write_profile(frame, out / "operators.parquet", metadata=facts)
    write_whole(out / "facts.json", json.dumps(facts, indent=1) + "\n")
    return facts | {"operators": len(frame)}


def _compare(facts: dict[str, Any]) -> None:
    """Write beside the sums of operators what the whole networks took: eager, and as a CUDA graph without launches."""
    for row in facts["whole-models"].get("rows", []):
        found = facts["real"].get("sums", {}).get(f"{row['model']}?batch={row['batch']}")
        if found is not None and "median_s" in row:
            found[f"{row['mode']}_s"] = row["median_s"]
            found[f"{row['mode']}_ratio"] = found["operators_s"] / row["median_s"]


def ended(command: Sequence[str], limit_s: float) -> int | str:
    """Run a command; return its exit code, or that it hung. Nothing that it started outlives it, or us."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return "hung and was ended"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    """Read the command line; run each section in a process of its own, twice if it fails, and join the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--section", choices=SHARES, help="run this one only, in this process")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--gather", action="store_true", help="join what a stopped run left, and measure nothing")
    parser.add_argument("--list-operators", action="store_true", help="write real-operators.parquet (needs onnx)")
    given = parser.parse_args()
    if given.list_operators:
        import pandas as pd

        rows = [operator_row(one) | {"model": model} for model, ops in listed_operators().items() for one in ops]
        pd.DataFrame(rows).to_parquet(LISTED, compression="zstd", index=False)
        return
    if given.out is None:
        parser.error("name a folder with -o")
    if given.section:
        found = section(given.section, given.device, 60 * given.minutes, given.out, given.seed)
        write_whole(given.out / f"{given.section}.json", json.dumps(found, indent=1) + "\n")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command again takes up what is missing"))
    errors = {}
    last = time.perf_counter() + 60 * given.minutes + GRACE_S
    for name, share in SHARES.items() if not given.gather else ():
        code: int | str | None = None
        for attempt in (1, 2):
            start, minutes = time.perf_counter(), given.minutes * share / attempt
            if code == 0 or finished(given.out / f"{name}.json") or start > last:
                break
            print(f"== {name}: {minutes:.1f} minutes", flush=True)
            command = [sys.executable, __file__, "--device", given.device, "--minutes", str(minutes), "--seed",
                       str(given.seed), "--section", name, "-o", str(given.out)]  # fmt: skip
            code = ended(command, min(GRACE_S + 75 * minutes, last - start))
            if code:
                errors[f"{name} {attempt}"] = str(code)
            print(f"== {name}: ended with {code} after {time.perf_counter() - start:.0f} s", flush=True)
        with suppress(Exception):  # a run that is stopped later leaves this
            gather(given.out, given.minutes, given.seed, given.device)
    try:
        facts = gather(given.out, given.minutes, given.seed, given.device)
        print(f"{facts['operators']} operators, written to {given.out}; failures: {errors or 'none'}")
    finally:
        write_whole(given.out / "errors.json", json.dumps(errors) + "\n")


if __name__ == "__main__":
    main()
