"""What this installation can do: versions, solvers, devices, and how to get what is missing."""

from __future__ import annotations

import importlib
import platform
from importlib import metadata
from typing import Any

from moirai_sim import __version__
from moirai_sim.console import print_facts, print_table, print_text

_EXTRAS = {
    "torch": ("torch", "policy 'placeto', backend 'torch', profiling on NVIDIA GPUs"),
    "ray": ("ray", "studies over several machines"),
    "pyscipopt": ("scip", "cross-checks of the MILP with a second solver"),
    "kaleido": ("figures", "pictures of a report as PDF, PNG and SVG"),
    "matplotlib": ("figures", "a timeline as PNG"),
}
"""Import name -> (extra that brings it, what it is for)."""
_SOLVERS = {
    "highspy": "HiGHS (MILP)",
    "ortools": "OR-Tools CP-SAT (interval models)",
    "pyscipopt": "SCIP (cross-check)",
}


def examine() -> dict[str, Any]:
    """Return what is installed and found; ``broken`` lists needed packages that are missing or cannot be imported."""
    from moirai_sim import catalog
    from moirai_sim.clusters.local import local_core, local_cores
    from moirai_sim.policies.registry import policy_names
    from moirai_sim.profiling import telemetry

    packages, broken = _requirements()
    core = local_core()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "broken": broken,
        "solvers": {title: _version(name) for name, title in _SOLVERS.items()},
        "cpu": {
            "model": telemetry.cpu_model(),
            "cores": list(local_cores()),
            "memory_bytes_per_core": core.memory_bytes,
            "nominal_flops_per_core": core.peak_flops["float32"],
        },
        "gpus": telemetry.gpu_snapshot(),
        "policies": policy_names(),
        "user_folder": str(catalog.user_folder()),
        "missing": [
            {"package": name, "for": purpose, "install": f"pip install 'moirai-sim[{extra}]'"}
            for name, (extra, purpose) in _EXTRAS.items()
            if _version(name) is None
        ],
    }


def _requirements() -> tuple[dict[str, str | None], list[str]]:
    """Return versions of the packages that this distribution needs, and what is wrong with them."""
    packages: dict[str, str | None] = {}
    broken = []
    for requirement in metadata.requires("moirai-sim") or []:
        if "extra ==" in requirement:
            continue
        name = requirement.split(";")[0].translate(str.maketrans("<>=!~[(", "       ")).split()[0]
        packages[name] = _version(name)
        if packages[name] is None:
            broken.append(f"{name} is not installed; pip install '{requirement}'")
    for module in ("highspy", "onnxruntime", "ortools.sat.python.cp_model", "numba"):  # those with compiled parts
        try:
            importlib.import_module(module)
        except ImportError as error:
            broken.append(f"{module} cannot be imported ({error}); install it again")
    return packages, broken


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def print_examination(found: dict[str, Any]) -> None:
    """Write what `examine` found for people."""
    cpu = found["cpu"]
    print_facts(
        {
            "moirai-sim": found["version"],
            "python": f"{found['python']} on {found['platform']}",
            "cpu": f"{cpu['model']}, {len(cpu['cores'])} cores",
            "gpus": ", ".join(map(_board, found["gpus"])) or "none found (NVML)",
            "policies": ", ".join(found["policies"]),
            "own entries": found["user_folder"],
        }
    )
    print_text()
    print_table(["solver", "version"], ((name, version or "missing") for name, version in found["solvers"].items()))
    print_text()
    print_table(["package", "version"], ((name, version or "missing") for name, version in found["packages"].items()))
    if found["missing"]:
        print_text("\noptional parts that are not installed:")
        print_table(["package", "for", "install"], (list(row.values()) for row in found["missing"]))
    for problem in found["broken"]:
        print_text(f"broken: {problem}")


def _board(gpu: dict[str, Any]) -> str:
    return str(gpu["model"] or f"GPU {gpu['index']} (does not answer)")
