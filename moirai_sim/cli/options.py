"""What several commands share: their options, and how they read a problem and print a timeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moirai_sim.errors import InputError, named

if TYPE_CHECKING:
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.studies.in_place import Priced

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Source = Annotated[str, typer.Argument(help="An .onnx file, zoo:NAME, or a published instance.")]
ClusterName = Annotated[str | None, typer.Option("--cluster", help="A name of 'catalog topologies' or a YAML file.")]
NeededCluster = Annotated[str, typer.Option("--cluster", help="A name of 'catalog topologies' or a YAML file.")]
NetworkName = Annotated[str | None, typer.Option("--network", help="none, one-port, half-duplex or fair.")]
NoMemory = Annotated[bool, typer.Option("--no-memory", help="Lift all memory limits.")]
MemoryScale = Annotated[
    float | None, typer.Option("--memory-scale", help="Give every device this multiple of the model's weights.")
]
MaxLatency = Annotated[str | None, typer.Option("--max-latency", help="Longest latency of a request, e.g. 30ms.")]
MaxPeriod = Annotated[str | None, typer.Option("--max-period", help="Longest period of a stream, e.g. 20ms.")]
MinThroughput = Annotated[
    str | None, typer.Option("--min-throughput", help="The same as a rate: requests a second, e.g. 50/s.")
]
Fuse = Annotated[str | None, typer.Option("--fuse", help="Backend whose fusions apply; 'none' fuses nothing.")]
InPlace = Annotated[
    Path | None, typer.Option("--in-place", help="Price the model by what 'profile in-place' found on the cluster.")
]
PlacementFile = Annotated[Path, typer.Option("--placement", help="A timeline file, e.g. of 'place'.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Where to write the result.")]
OptionalOut = Annotated[Path | None, typer.Option("-o", "--out", help="Where to write the result.")]
Study = Annotated[Path, typer.Argument(help="A study file; see 'schema study'.")]


def problem_of(
    source: str,
    cluster: str | None,
    network: str | None,
    *,
    no_memory: bool,
    memory_scale: float | None,
    fuse: str | None,
    in_place: Path | None,
) -> tuple[PlacementProblem, Priced | None]:
    """Return the problem that the options of a command describe, and how it runs where it was timed in place."""
    from moirai_sim.clusters.reader import read_cluster
    from moirai_sim.sources import load_problem

    where = None if cluster is None else read_cluster(cluster)
    if in_place is None:
        found = load_problem(source, where, network=network, memory=not no_memory, memory_scale=memory_scale, fuse=fuse)
        return found, None
    from moirai_sim.studies.in_place import load_in_place

    without_effect({"--fuse": fuse}, "with --in-place, whose kernels are those that ran")
    priced = load_in_place(source, where, in_place, network=network, memory=not no_memory, memory_scale=memory_scale)
    return priced.problem, priced


def limits(max_latency: str | None, max_period: str | None, min_throughput: str | None) -> dict[str, int | None]:
    """Return ``max_latency_ns`` and ``max_period_ns`` as the options of a command give them."""
    if max_period is not None and min_throughput is not None:
        raise InputError("--max-period, --min-throughput: both limit the period; give one of them")
    longest = None if max_latency is None else round(seconds(max_latency, "--max-latency") * 1e9)
    period = None if max_period is None else round(seconds(max_period, "--max-period") * 1e9)
    if min_throughput is not None:
        from moirai_sim.units import parse_period_ns

        bare = min_throughput.strip()[-1:].isdigit()
        with named("--min-throughput"):
            period = parse_period_ns(f"{min_throughput}/s" if bare else min_throughput)
    return {"max_latency_ns": longest, "max_period_ns": period}


def seconds(text: str, option: str) -> float:
    """Return a time given as bare seconds or with a unit."""
    from moirai_sim.units import parse_ns

    with named(option):
        found = parse_ns(text if text.strip()[-1:].isalpha() else f"{text} s") / 1e9
    if not found > 0:
        raise InputError(f"{option}: must be above zero, read {text!r}")
    return found


def without_effect(options: Mapping[str, object], where: str) -> None:
    """Refuse the options that were given (are neither None nor false) where they change nothing."""
    given = [option for option, value in options.items() if value is not None and value is not False]
    if given:
        raise InputError(f"{option}: has no effect {where}; leave it out" for option in given)


def one_of(value: str, known: tuple[str, ...], option: str) -> None:
    """Refuse a value that an option does not know, with the nearest that it does."""
    from moirai_sim.errors import did_you_mean

    if value not in known:
        raise InputError(f"{option}: unknown value '{value}'; {did_you_mean(value, known)}")
