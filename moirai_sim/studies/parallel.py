"""Runs of a study in parallel: joblib on one machine, the same through Ray on many."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moirai_sim.errors import ExecutionError, InputError
from moirai_sim.progress import progress

if TYPE_CHECKING:
    from moirai_sim.studies.store import Store

_WORKER_BYTES = 1 << 30
"""What a worker may need: numpy, numba and a solver take 0.3 GiB, a problem of 100,000 operators the rest."""
_KILLED = (
    "a worker was killed, most often because memory was short; what has finished is kept: run the same command again "
    "with fewer --jobs"
)

Key = Mapping[str, Any]
Run = Callable[[Key], tuple[dict[str, Any], float]]
Finished = tuple[str, dict[str, Any], float]
_started: list[int] = []
"""Worker processes of each pool that has not been ended."""


def run_all(
    run: Run,
    keys: Mapping[str, Key],
    store: Store,
    *,
    name: str,
    jobs: int | None = None,
    ray: str | None = None,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Run every key whose result is not there yet, and write each result as it comes: a kill loses what was in flight.

    Parameters
    ----------
    run
        Returns outcome and seconds of a key; must be importable by a worker process.
    keys
        Keys by result name.
    store
        Where results are kept.
    name
        Of the study.
    jobs
        Worker processes; None takes one a core, fewer where memory is short.
    ray
        Address of a Ray cluster ("auto", "HOST:PORT", or "local" to start one here); None takes processes of this
        machine. Files that the keys name must exist under the same path on every node.
    retry_failed
        Run failed runs again.

    Returns
    -------
    dict
        ``study``, ``runs``, ``failed`` and ``resumed``: how many runs were there before.

    Raises
    ------
    InputError
        If there are no workers, Ray is not installed, or no cluster answers.
    ExecutionError
        If a worker process is killed.
    """
    store.ask(keys)
    missing = {one: key for one, key in keys.items() if not store.has(one, failed_too=not retry_failed)}
    if missing:
        finished = _on_this_machine(run, missing, jobs) if ray is None else _on_ray(run, missing, ray)
        with progress(name, total=len(missing)) as advance:
            for one, outcome, seconds in finished:
                store.write(one, missing[one], outcome, seconds)
                advance()
    failed = sum(result["outcome"]["status"] == "error" for result in store.read(list(keys)))
    return {"study": name, "runs": len(keys), "failed": failed, "resumed": len(keys) - len(missing)}


def _named(run: Run, name: str, key: Key) -> Finished:
    return (name, *run(key))


def _on_this_machine(run: Run, keys: Mapping[str, Key], jobs: int | None) -> Iterator[Finished]:
    workers = _workers(jobs, len(keys))
    if workers == 1:
        return (_named(run, name, key) for name, key in keys.items())
    return _in_processes(run, keys, workers)


def _in_processes(run: Run, keys: Mapping[str, Key], workers: int) -> Iterator[Finished]:
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    _started.append(workers)
    calls = (joblib.delayed(_named)(run, name, key) for name, key in keys.items())
    # Loky replaces a worker whose memory has grown, which is no reason to warn.
    warnings.filterwarnings("ignore", message="A worker stopped while some jobs", category=UserWarning)
    try:
        yield from joblib.Parallel(n_jobs=workers, return_as="generator_unordered")(calls)
    except TerminatedWorkerError as error:
        raise ExecutionError(_KILLED) from error


def end_processes() -> None:
    """End the worker processes that studies started here, with all that they remember of files; if there are any."""
    from joblib.externals.loky import get_reusable_executor

    if _started:
        get_reusable_executor().shutdown()
        _started.clear()


def _on_ray(run: Run, keys: Mapping[str, Key], address: str) -> Iterator[Finished]:
    """Run the keys as Ray tasks, a few for each core at a time, so that the driver's memory does not grow with runs."""
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray: Ray is not installed; install it with: pip install 'moirai-sim[ray]'") from error
    try:
        more = {"include_dashboard": False} if address == "local" else {}
        ray.init(address=address, log_to_driver=False, **more)
    except (ConnectionError, ValueError, RuntimeError, SystemExit) as error:  # a dead port ends in the last one
        raise InputError(
            f"--ray {address}: no Ray cluster answers ({error}); start one with: ray start --head"
        ) from error
    try:
        task = ray.remote(_named)
        waiting = iter(keys.items())
        room = 4 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        running = [task.remote(run, name, key) for name, key in itertools.islice(waiting, room)]
        while running:
            done, running = ray.wait(running, num_returns=1)
            running += [task.remote(run, name, key) for name, key in itertools.islice(waiting, len(done))]
            yield from ray.get(done)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise ExecutionError(_KILLED) from error
    finally:
        ray.shutdown()


def _workers(jobs: int | None, runs: int) -> int:
    import joblib
    import psutil

    wanted = joblib.cpu_count() if jobs is None else jobs
    if wanted < 1:
        raise InputError(f"--jobs {wanted}: give at least one worker")
    room = max(1, int(psutil.virtual_memory().available // _WORKER_BYTES))
    return min(wanted, runs, room)
