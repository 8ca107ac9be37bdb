"""Runs of a study in parallel: joblib on one machine, the same through Ray on many."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moirai_sim.errors import InputError
from moirai_sim.progress import progress

if TYPE_CHECKING:
    from moirai_sim.studies.store import Store

_WORKER_BYTES = 1 << 30
"""What a worker may need: numpy, numba and a solver take 0.3 GiB, a problem of 100,000 operators the rest."""

Key = Mapping[str, Any]
Run = Callable[[Key], tuple[dict[str, Any], float]]


def run_all(run: Run, keys: Mapping[str, Key], store: Store, *, jobs: int | None, ray: str | None, label: str) -> None:
    """Run every key and write each result as it comes, so that a kill loses only what was in flight.

    Parameters
    ----------
    run
        Returns outcome and seconds of a key; must be importable by a worker process.
    keys
        Keys by result name.
    jobs
        Worker processes; None takes one a core, fewer where memory is short.
    ray
        Address of a Ray cluster, or None for processes of this machine.
    """
    import joblib

    if not keys:
        return
    workers = _workers(jobs, len(keys))
    with _backend(ray), progress(label, total=len(keys)) as advance:
        calls = (joblib.delayed(_named)(run, name, key) for name, key in keys.items())
        if ray is None and workers == 1:
            finished: Iterator[Any] = (_named(run, name, key) for name, key in keys.items())
        else:
            finished = joblib.Parallel(n_jobs=-1 if ray else workers, return_as="generator_unordered")(calls)
        for name, outcome, seconds in finished:
            store.write(name, keys[name], outcome, seconds)
            advance()


def _named(run: Run, name: str, key: Key) -> tuple[str, dict[str, Any], float]:
    return (name, *run(key))


def _workers(jobs: int | None, runs: int) -> int:
    import joblib
    import psutil

    wanted = joblib.cpu_count() if jobs is None else jobs
    if wanted < 1:
        raise InputError(f"--jobs {wanted}: give at least one worker")
    room = max(1, int(psutil.virtual_memory().available // _WORKER_BYTES))
    return min(wanted, runs, room)


@contextlib.contextmanager
def _backend(ray: str | None) -> Iterator[None]:
    """Send joblib's calls to a Ray cluster while the context is open."""
    if ray is None:
        yield
        return
    import joblib

    try:
        import ray as engine
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise InputError("--ray: Ray is not installed; install it with: pip install 'moirai-sim[ray]'") from error
    try:
        engine.init(address=None if ray == "local" else ray, log_to_driver=False, ignore_reinit_error=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"--ray {ray}: no Ray cluster answers there ({error}); start one: ray start --head") from error
    register_ray()
    try:
        with joblib.parallel_config(backend="ray"):
            yield
    finally:
        engine.shutdown()
