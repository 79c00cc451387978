"""Several processes: tasks that are spread over them, and one job that they do together.

Tasks that do not depend on each other go through joblib, over local processes or a Dask cluster
(:func:`imap_unordered`). A training in which every process has its share of each step runs under ``accelerate launch``
(:class:`Team`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from blindlib.priors import pick_device

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def imap_unordered(
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
    from joblib import Parallel, delayed, parallel_config
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    # A task has no arguments: large ones joblib would put on one worker, to die with it.
    calls = [delayed(partial(task, item))() for item in items]
    common = dict(return_as="generator_unordered", batch_size=1, pre_dispatch="all")
    if cluster is None:
        try:
            yield from Parallel(jobs, backend="loky", **common)(calls)
        except TerminatedWorkerError:
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


class Team:
    """The processes of ``accelerate launch``, each of which runs the same lines; without it, this process alone.

    Parameters
    ----------
    device : str or torch.device
        ``"auto"``: a GPU where there is one, for each process its own.

    Attributes
    ----------
    device : torch.device
        Of this process.
    rank : int
        Its number. 0 is the one that writes files and speaks.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device, self.rank, self.accelerator = pick_device(device), 0, None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator(cpu=self.device.type == "cpu")
            self.device, self.rank = self.accelerator.device, self.accelerator.process_index

    def wait(self) -> None:
        """Until all have come here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Put in place of each tensor, on the team's device, its mean over the processes, the same in all of them."""
        if self.accelerator is None:
            return
        tensors = list(tensors)
        mean = self.accelerator.reduce(torch.cat([x.flatten() for x in tensors]), "mean")
        for x, part in zip(tensors, mean.split([x.numel() for x in tensors]), strict=True):
            x.copy_(part.view_as(x))

    def agreed(self, x: Tensor) -> Tensor:
        """The first process's ``x``, where rounding may have made a difference."""
        if self.accelerator is None:
            return x
        from accelerate.utils import broadcast

        return broadcast(x.detach().to(self.device, copy=True).contiguous()).to(x)
