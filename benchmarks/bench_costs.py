"""Speed of the shipped multi-device cost model: operators priced a second, and time to load."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from benchmarks.row import Row
from moirai_sim.clusters.reader import read_device_type
from moirai_sim.costs.catalog_model import load_cost_model
from moirai_sim.graphs.work import make_operator

MODEL, DEVICE, OPERATORS = "nvidia-gpus", "nvidia-t4", 100_000


def predict() -> Row:
    """Distinct matrix products, batched products and element-wise operators, no two alike."""
    generator = np.random.default_rng(0)
    operators = []
    for i, (m, n, k) in enumerate(generator.integers(8, 4096, (OPERATORS, 3)).tolist()):
        if i % 4 < 2:
            operators.append(make_operator(f"o{i}", "Gemm", [(m, k), (k, n), (n,)], [(m, n)]))
        elif i % 4 == 2:
            operators.append(make_operator(f"o{i}", "MatMul", [(8, m % 512 + 1, k), (8, k, n)], [(8, m % 512 + 1, n)]))
        else:
            operators.append(make_operator(f"o{i}", "Add", [(m, n), (m, n)], [(m, n)]))
    model, device = load_cost_model(MODEL), read_device_type(DEVICE)
    model.predict(operators[:100], device)
    start = time.perf_counter()
    model.predict(operators, device)
    rate = OPERATORS / (time.perf_counter() - start)
    return Row("predict", rate, "operators/s", 100_000, rate >= 100_000, f"{OPERATORS} distinct operators, {MODEL}")


_LOAD = """
import time
import numpy, onnxruntime
from moirai_sim.clusters.reader import read_device_type
from moirai_sim.graphs.work import make_operator
device = read_device_type("nvidia-t4")
operators = [
    make_operator("a", "Gemm", [(8, 8), (8, 8)], [(8, 8)]),
    make_operator("b", "Add", [(8, 8), (8, 8)], [(8, 8)]),
    make_operator("c", "MatMul", [(8, 8, 8), (8, 8, 8)], [(8, 8, 8)]),
    make_operator("d", "Softmax", [(8, 8)], [(8, 8)]),
]
start = time.perf_counter()
from moirai_sim.costs.catalog_model import load_cost_model
load_cost_model("nvidia-gpus").predict(operators, device)
print(time.perf_counter() - start)
"""


def load_model() -> Row:
    """A fresh process: from the model's name to the first prices of four families, libraries imported before."""
    runs = [
        float(subprocess.run([sys.executable, "-c", _LOAD], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    best = sorted(runs)[1]
    return Row("load-model", best, "s", 0.3, best <= 0.3, "median of 3 processes; load and price 4 families")


BENCHMARKS: dict[str, Callable[[], Row]] = {"predict": predict, "load-model": load_model}
