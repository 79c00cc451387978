"""Tasks that do not depend on each other, spread by joblib over local processes or a Dask cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from functools import partial
from typing import TypeVar

from joblib import Parallel, delayed, parallel_config

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def spread(
    task: Callable[[Item], Outcome], items: Iterable[Item], *, jobs: int = 1, cluster: str | None = None
) -> Iterator[Outcome]:
    """``task(item)`` of each item, in the order in which they end.

    Where a worker of the cluster dies, Dask does again what it was at, and what it had ended last, the result of which
    it held. So that nothing is done twice, a task writes its result to a file, or who asked for it does as soon as it
    comes, and the first thing a task does is to look whether it is there.

    Parameters
    ----------
    task : callable
        It and the items can be pickled.
    items : iterable
    jobs : int
        Local processes, which share the cores; -1 for as many as there are cores. 1: all is done in this process.
    cluster : str, optional
        Address of a Dask scheduler, whose workers are used instead. They have this package too, and see the same files.

    Raises
    ------
    ValueError
        If ``jobs`` is 0.
    ImportError
        If a cluster is asked for and Dask is not installed.
    OSError
        If the cluster cannot be reached, or processes were killed and none is left to go on.
    """
    if jobs == 0:
        raise ValueError("jobs: expected a number of processes, or -1 for one on each core, got 0")
    if cluster is None and jobs == 1:
        yield from map(task, items)
        return
    # A task has no arguments: large ones joblib would put on one worker, to die with it.
    calls = [delayed(partial(task, item))() for item in items]
    common = dict(return_as="generator_unordered", batch_size=1, pre_dispatch="all")
    if cluster is None:
        try:
            yield from Parallel(jobs, backend="loky", **common)(calls)
        except BrokenExecutor:
            raise ChildProcessError("jobs: a process was killed, perhaps for want of memory; take fewer") from None
        return
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise ImportError("cluster: needs Dask; pip install 'blindlib[cluster]'") from None
    try:
        client = Client(cluster, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConnectionError(f"cluster: no Dask scheduler found at {cluster!r} ({error})") from None
    with client:
        with parallel_config("dask", client=client):
            engine = Parallel(**common)
        try:
            yield from engine(calls)
        except KilledWorker as error:
            raise ChildProcessError(f"cluster: {error}") from None
