"""The command on language models that answer requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moirai_sim.cli.options import Json, NeededCluster, NetworkName, OptionalOut, seconds
from moirai_sim.errors import InputError

if TYPE_CHECKING:
    from moirai_sim.studies.generation import Answered


def generate(
    model: Annotated[str, typer.Argument(help="zoo:NAME of a language model, e.g. zoo:llama3-8b.")],
    cluster: NeededCluster,
    policy: Annotated[str, typer.Option(help="A name of 'catalog policies'.")] = "auto",
    requests: Annotated[int, typer.Option(min=1, help="Requests to answer.")] = 100,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second, at random (Poisson); default all at once.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Tokens of a prompt: 512, or a range as 128-1024.")] = "512",
    answer: Annotated[str, typer.Option(help="Tokens of an answer, likewise.")] = "128",
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that a step may serve.")] = 16,
    network: NetworkName = None,
    time_limit: Annotated[str, typer.Option("--time-limit", help="For policies that search, e.g. 60 or 10min.")] = "10",
    seed: Annotated[int, typer.Option(min=0, help="Of lengths, arrivals and policies.")] = 0,
    out: OptionalOut = None,
    as_json: Json = False,
) -> None:
    """Let a language model answer requests.

    Simulates prefill and decoding steps with a growing cache, by one placement, and batches requests step by step.
    """
    import json

    from moirai_sim.clusters.local import local_cores
    from moirai_sim.clusters.reader import read_cluster
    from moirai_sim.console import plain, print_json
    from moirai_sim.files import write_whole
    from moirai_sim.policies.base import Request
    from moirai_sim.policies.registry import load_policy
    from moirai_sim.simulation.workloads import at_once, poisson
    from moirai_sim.studies.generation import answer_requests, lengths_from

    load_policy(policy)  # a misspelt name is reported before anything is read
    if not model.startswith("zoo:"):
        raise InputError(
            f"{model}: prefill and decoding are two graphs of a model of the zoo; name one as zoo:llama3-8b"
        )
    prompts, answers = (
        lengths_from(text, requests, seed, option) for text, option in ((prompt, "--prompt"), (answer, "--answer"))
    )
    arrivals = at_once(requests) if rate is None else poisson(rate, requests, seed)
    found = answer_requests(
        model,
        read_cluster(cluster),
        policy=policy,
        request=Request(time_limit_s=seconds(time_limit, "--time-limit"), seed=seed, workers=len(local_cores())),
        arrivals=arrivals.tolist(),
        prompts=prompts.tolist(),
        answers=answers.tolist(),
        max_batch=max_batch,
        network=network,
    )
    asked = {
        "requests": requests,
        "rate_per_s": rate,
        "prompt": prompt,
        "answer": answer,
        "max_batch": max_batch,
        "seed": seed,
    }
    document = {"model": model, **asked, **found.figures(), "step": found.step.to_json(), "grid": _grid(found)}
    if out is not None:
        write_whole(out, json.dumps(plain(document), indent=1, allow_nan=False) + "\n")
    print_json(document) if as_json else _print(found)


def _grid(found: Answered) -> dict[str, Any]:
    times = found.times
    return {
        "batches": times.batches,
        "lengths": times.lengths,
        "prefill_ns": times.prefill_ns,
        "decode_ns": times.decode_ns,
    }


def _print(found: Answered) -> None:
    from collections import Counter

    from moirai_sim.console import print_facts, print_table, print_text
    from moirai_sim.summary import evidence, within
    from moirai_sim.units import format_bytes, format_ns

    figures, times = found.figures(), found.times

    def both(name: str) -> str:
        middle, late = (figures[f"{name}_p{share}_ns"] for share in (50, 95))
        return "-" if middle is None else f"{format_ns(round(middle))} (95th percentile {format_ns(round(late))})"

    print_facts(
        {
            "tokens": f"{figures['tokens_per_s']:.4g}/s",
            "first token": both("first_token"),
            "between tokens": both("between_tokens"),
            "largest gap": format_ns(figures["largest_gap_ns"]),
            "whole answer": both("latency"),
            "cache": f"{format_bytes(figures['peak_cache_bytes'])} at most, of {format_bytes(figures['cache_bytes'])}",
            "steps": figures["steps"],
            "largest decoding step": format_ns(found.step.makespan_ns) + within(found.step),
            "times rest on": evidence(found.step),
        }
    )
    print_text()
    count = Counter(found.step.placement.values())
    print_table(["device", "operators"], sorted(count.items()))
    print_text()
    columns = ["batch", "tokens", "prefill", "decoding step"]
    print_table(
        columns,
        (
            (batch, length, format_ns(int(times.prefill_ns[i, j])), format_ns(int(times.decode_ns[i, j])))
            for i, batch in enumerate(times.batches.tolist())
            for j, length in enumerate(times.lengths.tolist())
        ),
    )
