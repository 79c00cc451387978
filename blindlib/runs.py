"""Runs that are saved now and then, and go on from where they were when they are called again."""

from __future__ import annotations

import math
import pickle
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blindlib.files import save_whole
from blindlib.jobs import Team
from blindlib.sampler import bar

SECONDS_BETWEEN_SAVES = 60


class Run:
    """The loop of a run: its steps, what it records, and, in a folder, its state, from which it can go on."""

    def __init__(self, folder: str | Path | None, name: str, about: dict, parts: dict, team: Team) -> None:
        self.name, self.parts, self.team = name, parts, team
        # As plain numbers: what holds NumPy's, torch.load does not trust.
        self.about = about = {k: v.item() if isinstance(v, np.generic) else v for k, v in about.items()}
        self.done, self.seconds, self.ended = 0, 0.0, False
        self.kept: dict[str, list] = {}
        self.sums: dict[str, list] = {}
        self.path = None if folder is None else Path(folder) / f"{name}.pt"
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        team.wait()  # the first may be writing still, at the end of the run before
        if self.path.is_file():
            # Records stay on the CPU, where they were made; the parts move their own to where they are.
            try:
                state = torch.load(self.path, map_location="cpu", weights_only=True)
                wrong = [key for key in about if state["about"].get(key) != about[key]]
            except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
                raise ValueError(f"folder: {self.path} is damaged, or no run of blindlib; delete that file") from error
            if wrong:
                raise ValueError(
                    f"folder: {self.path} is of another run, whose {', '.join(wrong)} differed; "
                    "name another folder, or delete that file"
                )
            for key, part in parts.items():
                part.load_state_dict(state[key])
            self.done, self.seconds, self.kept, self.sums = (state[k] for k in ("step", "seconds", "kept", "sums"))
            self.ended = state.get("ended", False)  # earlier versions' runs did not end early

    def steps(self, steps: int, title: str, progress: bool) -> Iterator[int]:
        """The steps that are left to do, until :attr:`ended`; their state is saved now and then, and after the last."""
        if steps < self.done:
            raise ValueError(f"steps: {self.path} has {self.done} steps already, got {steps}; ask for as many or more")
        saved = time.monotonic()
        shown, saves = progress and self.team.rank == 0, self.path and self.team.rank == 0
        left = range(steps if self.ended else self.done, steps)
        self.bar = bar(left, title, shown, initial=self.done, total=steps)
        for step in self.bar:
            began, self.step = time.monotonic(), step
            yield step
            self.seconds += min(time.monotonic() - began, 60)  # a longer step was a machine asleep
            last = self.ended or step + 1 == steps
            if saves and (last or time.monotonic() - saved >= SECONDS_BETWEEN_SAVES):
                state = {key: part.state_dict() for key, part in self.parts.items()}
                state |= dict(about=self.about, step=step + 1, seconds=self.seconds, kept=self.kept, sums=self.sums)
                save_whole(state | dict(ended=self.ended), self.path)
                saved = time.monotonic()
            if self.ended:
                return

    def note(self, **values: Tensor) -> None:
        """Count ``values`` into the means that the next :meth:`keep` takes; a NaN ends the run before it is saved."""
        for key, value in values.items():
            value = value.detach().clone()
            self.team.average([value])
            total, n = self.sums.get(key, [0.0, 0])
            self.sums[key] = [total + float(value), n + 1]
            if not math.isfinite(self.sums[key][0]):
                raise ArithmeticError(
                    f"{self.name}: diverged at step {self.step + 1}, where the {key} is no number; take smaller "
                    "learning rates"
                )

    def keep(self, **values: Tensor | float) -> None:
        """Record ``values`` and the means since the last time; show the numbers."""
        values |= {key: total / n for key, (total, n) in self.sums.items()}
        self.sums = {}
        for key, value in values.items():
            self.kept.setdefault(key, []).append(value)
        self.bar.set_postfix({k: f"{v:.4f}" for k, v in values.items() if isinstance(v, float)}, refresh=False)

    def stacked(self) -> dict[str, Tensor]:
        """The records, each as one tensor."""
        return {k: torch.stack(v) if isinstance(v[0], Tensor) else torch.tensor(v) for k, v in self.kept.items()}


class Draws:
    """A generator as one of a run's parts: a run that goes on draws what it would have drawn."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def state_dict(self) -> dict[str, Tensor]:
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["state"])


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """A checksum, to tell whether a saved run was of the same data."""
    value = 0
    for x in tensors:
        value = zlib.crc32(x.detach().cpu().contiguous().numpy().tobytes(), value)
    return value
