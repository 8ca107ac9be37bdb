"""Inference of language models: a prefill a request, then a decoding step a token, over a cache that grows.

Prefill and decoding are two graphs of one model (``seq=PROMPT`` against ``seq=1&past=CONTEXT``). Their makespans are
simulated for a grid of batch sizes and lengths (`step_times`) and interpolated linearly between grid points; `generate`
then serves requests with iteration-level batching (Orca, OSDI 2022): after each step finished requests leave and
waiting ones join. A step that prefills goes before one that decodes, as in vLLM. A request is admitted when the cache
has room for its prompt and its whole answer, so that nothing is ever evicted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem


@dataclass(frozen=True, eq=False)
class StepTimes:
    """Times of steps on a grid of batch sizes and lengths, both ascending; linear between, an error beyond."""

    batches: NDArray[np.int64]
    """[b]."""
    lengths: NDArray[np.int64]
    """[p] prompt tokens of a prefill, or tokens in the cache of a decoding step."""
    prefill_ns: NDArray[np.int64]
    """[b, p]."""
    decode_ns: NDArray[np.int64]
    """[b, p]."""

    def prefill(self, batch: int, prompt: float) -> int:
        """Return the time to prefill ``batch`` prompts of ``prompt`` tokens, ns."""
        return self._between(self.prefill_ns, batch, prompt)

    def decode(self, batch: int, context: float) -> int:
        """Return the time of one token for each of ``batch`` requests with ``context`` tokens in the cache, ns."""
        return self._between(self.decode_ns, batch, context)

    def _between(self, table: NDArray[np.int64], batch: float, length: float) -> int:
        if not (self.batches[0] <= batch <= self.batches[-1] and self.lengths[0] <= length <= self.lengths[-1]):
            raise InputError(
                f"step times: a batch of {batch} with {length:g} tokens is outside the grid (batches "
                f"{self.batches[0]}..{self.batches[-1]}, lengths {self.lengths[0]}..{self.lengths[-1]}); widen the grid"
            )
        by_batch = [np.interp(length, self.lengths, row) for row in table]
        return int(np.rint(np.interp(batch, self.batches, by_batch)))


def step_times(
    model: str,
    cluster: Cluster,
    place: Callable[[PlacementProblem], Placement],
    *,
    batches: Sequence[int],
    lengths: Sequence[int],
    network: str | None = None,
) -> StepTimes:
    """Simulate prefill and decoding steps of a model of the zoo.

    Parameters
    ----------
    model
        ``zoo:NAME`` of a model with the parameters ``batch``, ``seq`` and ``past``, e.g. ``zoo:llama3-8b``.
    place
        Answers each problem with a placement: a policy, or one that keeps layers where they are. Decoding steps come
        first, in the order of ``batches`` and ``lengths``, which need not be ascending.
    """
    from moirai_sim.simulation.engine import simulate_schedule
    from moirai_sim.sources import load_problem

    def makespan(batch: int, seq: int, past: int) -> int:
        joint = "&" if "?" in model else "?"
        problem = load_problem(f"{model}{joint}batch={batch}&seq={seq}&past={past}", cluster, network=network)
        return simulate_schedule(problem, place(problem)).makespan_ns

    decode = np.array([[makespan(b, 1, length) for length in lengths] for b in batches], dtype=np.int64)
    prefill = np.array([[makespan(b, length, 0) for length in lengths] for b in batches], dtype=np.int64)
    rows, columns = np.argsort(batches), np.argsort(lengths)
    return StepTimes(
        np.array(batches, dtype=np.int64)[rows],
        np.array(lengths, dtype=np.int64)[columns],
        prefill[np.ix_(rows, columns)],
        decode[np.ix_(rows, columns)],
    )


@dataclass(frozen=True, eq=False)
class Generation:
    """What the requests of `generate` experienced; [r] in order of arrival, times in ns."""

    arrival_ns: NDArray[np.int64]
    first_token_ns: NDArray[np.int64]
    done_ns: NDArray[np.int64]
    answer_tokens: NDArray[np.int64]
    largest_gap_ns: NDArray[np.int64]
    """Longest time between two tokens of the request; 0 where it has one token."""
    peak_cache_bytes: int
    """Most that admitted requests could fill at once."""
    steps: int

    @property
    def time_to_first_token_ns(self) -> NDArray[np.int64]:
        """From arrival to the first token."""
        return self.first_token_ns - self.arrival_ns

    @property
    def time_between_tokens_ns(self) -> NDArray[np.float64]:
        """Mean gap between the tokens of each request that has more than one."""
        several = self.answer_tokens > 1
        return np.asarray((self.done_ns - self.first_token_ns)[several] / (self.answer_tokens[several] - 1))

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all answers, by the time from the first arrival to the last answer."""
        lasted = int(self.done_ns.max() - self.arrival_ns.min())
        return float(self.answer_tokens.sum()) * 1e9 / lasted if lasted else float("nan")


def generate(
    times: StepTimes,
    arrivals: Sequence[int],
    prompts: Sequence[int],
    answers: Sequence[int],
    *,
    max_batch: int,
    cache_bytes: int,
    token_bytes: int,
) -> Generation:
    """Serve requests by iteration-level batching.

    Parameters
    ----------
    arrivals
        [r] ns, ascending.
    prompts, answers
        [r] tokens of each; an answer has at least one, which the prefill gives.
    max_batch
        Requests that a step may serve.
    cache_bytes
        Memory for keys and values, over all devices.
    token_bytes
        What one token of one request fills of it.

    Raises
    ------
    InputError
        If a request can never fit the cache, or a number is out of range.
    """
    problems = []
    if not (len(arrivals) == len(prompts) == len(answers)) or not len(arrivals):
        problems.append("requests: give an arrival, a prompt and an answer for each, and at least one request")
    if max_batch < 1 or token_bytes < 0:
        problems.append(f"max_batch {max_batch} must be at least 1, token_bytes {token_bytes} at least 0")
    if any(b < a for a, b in pairwise(arrivals)):
        problems.append("arrivals: give them in ascending order")
    for r, (prompt, answer) in enumerate(zip(prompts, answers, strict=False)):
        if prompt < 1 or answer < 1:
            problems.append(f"request {r}: prompt and answer need at least 1 token")
        elif (prompt + answer) * token_bytes > cache_bytes:
            problems.append(f"request {r}: {prompt + answer} tokens fill more than the cache of {cache_bytes} bytes")
    if problems:
        raise InputError(problems[:20])
    total = len(arrivals)
    first, done, gap, last = (np.zeros(total, dtype=np.int64) for _ in range(4))
    produced = [0] * total
    waiting, active = deque(range(total)), list[int]()
    now = held = peak = steps = 0
    while waiting or active:
        if not active and waiting:
            now = max(now, arrivals[waiting[0]])
        joined: list[int] = []
        while waiting and arrivals[waiting[0]] <= now and len(active) + len(joined) < max_batch:
            need = (prompts[waiting[0]] + answers[waiting[0]]) * token_bytes
            if held + need > cache_bytes:
                break
            held += need
            joined.append(waiting.popleft())
        peak, steps = max(peak, held), steps + 1
        if joined:  # padding: all prompts of a batch take the time of the longest
            now += times.prefill(len(joined), max(prompts[r] for r in joined))
            first[joined] = now
            served = joined
            active += joined
        else:
            now += times.decode(len(active), sum(prompts[r] + produced[r] - 1 for r in active) / len(active))
            served = active
            gap[served] = np.maximum(gap[served], now - last[served])
        last[served] = now
        for r in served:
            produced[r] += 1
        for r in [r for r in served if produced[r] == answers[r]]:
            done[r] = now
            held -= (prompts[r] + answers[r]) * token_bytes
            active.remove(r)
    return Generation(
        np.array(arrivals, dtype=np.int64), first, done, np.array(answers, dtype=np.int64), gap, peak, steps
    )
