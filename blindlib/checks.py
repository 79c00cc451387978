"""Checks of arguments, with errors that name the argument, what is expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral

import torch
from torch import Tensor


def check_counts(**counts: int | None) -> None:
    """ValueError that names the first that is no positive integer; None stands for one that is not given."""
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def check_positive(**values: float) -> None:
    """ValueError that names the first that is not positive, or not finite."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value}")


def check_noise(noise_std: float | None, *, optional: bool = False) -> None:
    """ValueError if it is no standard deviation on the [-1, 1] scale; where ``optional``, None is to be found."""
    if noise_std is None and optional:
        return
    if noise_std is None or not 0 <= noise_std < 1:
        raise ValueError(f"noise_std: expected a number in [0, 1), on the [-1, 1] scale, got {noise_std}")


def check_kernel(**kernels: Tensor) -> None:
    """ValueError that names the first that has not non-negative values of sum one, over its last two dimensions."""
    for name, kernel in kernels.items():
        total = kernel.sum((-2, -1))
        if not bool((kernel >= 0).all()) or not torch.allclose(total, torch.ones_like(total), atol=1e-3):
            raise ValueError(f"{name}: expected a kernel, non-negative and of sum one; divide it by its sum")


def check_priors(priors: Mapping[str, object], *names: str) -> None:
    """ValueError that names those that are missing."""
    if missing := [name for name in names if name not in priors]:
        raise ValueError(f"priors: none for {', '.join(missing)}")
