"""A language model that answers requests on a cluster: placement, prefill and decoding steps, the cache's room."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.placement import Placement
from moirai_sim.problem import UNLIMITED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.graphs.operator import OperatorGraph
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.simulation.llm import Generation, StepTimes
    from moirai_sim.timeline import Timeline


@dataclass(frozen=True)
class Answered:
    """What `answer_requests` found."""

    step: Timeline
    """A decoding step of a full batch with full caches: where everything is, and how sure its time is."""
    times: StepTimes
    generation: Generation
    cache_bytes: int
    """Room for keys and values beside the weights, over all devices, as the placement shares them out."""

    def figures(self) -> dict[str, Any]:
        """Return the headline figures by name, times in ns."""
        found = self.generation
        gaps = found.time_between_tokens_ns
        waits = {"first_token": found.time_to_first_token_ns, "latency": found.done_ns - found.arrival_ns}
        return {
            "tokens_per_s": found.tokens_per_s,
            **{
                f"{name}_p{share}_ns": float(np.percentile(ns, share))
                for name, ns in waits.items()
                for share in (50, 95)
            },
            "between_tokens_p50_ns": float(np.percentile(gaps, 50)) if len(gaps) else None,
            "between_tokens_p95_ns": float(np.percentile(gaps, 95)) if len(gaps) else None,
            "largest_gap_ns": int(found.largest_gap_ns.max()),
            "steps": found.steps,
            "peak_cache_bytes": found.peak_cache_bytes,
            "cache_bytes": self.cache_bytes,
        }


def answer_requests(
    model: str,
    cluster: Cluster,
    *,
    policy: str,
    request: Request,
    arrivals: Sequence[int],
    prompts: Sequence[int],
    answers: Sequence[int],
    max_batch: int,
    network: str | None = None,
) -> Answered:
    """Place a language model, simulate its steps, and let it answer requests by iteration-level batching.

    The placement is made for a decoding step of a full batch with full caches, whose bytes count beside the weights; if
    that fits nowhere, for the weights alone, and the cache limits the batch. Weights stay, so all steps run by it.

    Parameters
    ----------
    model
        ``zoo:NAME`` of a model with the parameters ``batch``, ``seq`` and ``past``, e.g. ``zoo:llama3-8b``.
    policy, request
        Who places it, and within what limits.
    arrivals, prompts, answers, max_batch
        As for `moirai_sim.simulation.llm.generate`.

    Raises
    ------
    InputError
        If the model has no such parameters, or it fits no placement.
    """
    from moirai_sim.graphs.load import load_graph
    from moirai_sim.policies.run import place
    from moirai_sim.progress import progress
    from moirai_sim.simulation.llm import generate, step_times

    longest = max(p + a for p, a in zip(prompts, answers, strict=True))
    lengths = _grid(min(prompts), longest)
    batches = _grid(1, max_batch)
    graph = load_graph(f"{model}{'&' if '?' in model else '?'}batch={max_batch}&seq=1&past={longest}")
    each = _token_bytes(graph, max_batch)
    step: Timeline | None = None
    room = 0

    def by_name(problem: PlacementProblem) -> Placement:
        nonlocal step, room
        token = np.array([each.get(name, 0) for name in problem.operators], dtype=np.int64)
        if step is None:
            full = replace(problem, weight_bytes=problem.weight_bytes + token * max_batch * longest)
            step = place(full, policy, request)
            if not step.spans:
                step = place(problem, policy, request)
            if not step.spans:
                raise InputError(f"{model}: {policy} finds no placement whose weights fit ({step.status})")
        if unplaced := [name for name in problem.operators if name not in step.placement]:
            raise InputError(
                f"{model}: operator '{unplaced[0]}' is in some steps alone; its steps need equal operators"
            )
        where = {name: k for k, name in enumerate(problem.devices)}
        device = np.array([where[step.placement[name]] for name in problem.operators], dtype=np.int64)
        if not room:
            room = _room(problem, device, token)
        return Placement(device=device)

    with progress("steps", 2 * len(batches) * len(lengths)) as advance:

        def placed(problem: PlacementProblem) -> Placement:
            advance()
            return by_name(problem)

        # The largest decoding step comes first: it is the one that the placement is made for.
        times = step_times(model, cluster, placed, batches=batches[::-1], lengths=lengths[::-1], network=network)
    if step is None:
        raise InputError(f"{model}: there is no step to simulate")
    total = sum(each.values())
    generation = generate(
        times, arrivals, prompts, answers, max_batch=max_batch, cache_bytes=room * total, token_bytes=total
    )
    return Answered(step, times, generation, room * total)


def lengths_from(text: str, count: int, seed: int, option: str) -> NDArray[np.int64]:
    """Return ``count`` numbers of tokens: all as many as ``"512"`` says, or drawn evenly from ``"128-1024"``.

    Raises
    ------
    InputError
        If the text is neither.
    """
    low, dash, high = text.partition("-")
    numbers = [one for one in (low, high if dash else low) if one.isascii() and one.isdecimal() and len(one) < 10]
    if len(numbers) != 2 or not 1 <= int(numbers[0]) <= int(numbers[1]):
        raise InputError(f"{option}: cannot read '{text}'; write tokens as 512, or a range as 128-1024")
    return np.random.default_rng([seed, len(option)]).integers(int(numbers[0]), int(numbers[1]) + 1, count)


def _grid(least: int, most: int) -> list[int]:
    """Return whole numbers from ``least`` to ``most``, each about twice the one before."""
    doublings = max(1, round(np.log2(most / least))) if most > least else 0
    return sorted({round(x) for x in np.geomspace(least, most, doublings + 1).tolist()})


def _token_bytes(graph: OperatorGraph, batch: int) -> dict[str, int]:
    """Return what a token of a request takes in the cache of each operator that has one."""
    found = {}
    for operator in graph:
        present = [tensor for tensor in operator.outputs[1:] if len(tensor.shape) == 4]
        if operator.op_type in ("Attention", "GroupQueryAttention", "MultiHeadAttention") and present:
            found[operator.name] = sum(tensor.bytes // (batch * tensor.shape[2]) for tensor in present)
    if not found:
        raise InputError(f"{graph.name}: keeps no keys and values; name a model with a cache, such as zoo:llama3-8b")
    return found


def _room(problem: PlacementProblem, device: NDArray[np.int64], token: NDArray[np.int64]) -> int:
    """Return for how many tokens the devices have room beside the weights: the fullest one says."""
    weights, tokens = (
        np.bincount(device, weights=size, minlength=problem.n_devices) for size in (problem.weight_bytes, token)
    )
    left = problem.memory_bytes.astype(np.float64) - weights
    needed = (tokens > 0) & (problem.memory_bytes != UNLIMITED)
    if not needed.any():
        return 2**40
    return int((left[needed] / tokens[needed]).min())
