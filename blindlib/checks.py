"""Checks of arguments, with errors that name the argument, what is expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor


def is_integer(value: object) -> bool:
    """Whether it is one, of Python's or numpy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a real one, of Python's, numpy's or torch's; True and False are none."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_complex() and value.dtype != torch.bool
    return isinstance(value, Real) and not isinstance(value, bool)


def check_counts(*, optional: bool = False, **counts: int | None) -> None:
    """ValueError that names the first that is no positive integer; where ``optional``, None is one not given."""
    for name, value in counts.items():
        if not (value is None and optional) and not (is_integer(value) and value >= 1):
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def check_pair(**pairs: tuple[int, int]) -> None:
    """ValueError that names the first that is not two positive integers, such as height and width."""
    for name, pair in pairs.items():
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"{name}: expected two positive integers, got {pair!r}")
        for side in pair:
            check_counts(**{name: side})


def check_positive(**values: float) -> None:
    """ValueError that names the first that is not positive, or not finite."""
    for name, value in values.items():
        if not is_number(value) or not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")


def check_not_negative(**values: float) -> None:
    """ValueError that names the first that is negative, or not finite."""
    for name, value in values.items():
        if not is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a number, at least 0, got {value!r}")


def check_noise(noise_std: float | None, *, optional: bool = False) -> None:
    """ValueError if it is no standard deviation on the [-1, 1] scale; where ``optional``, None is to be found."""
    if noise_std is None and optional:
        return
    if not is_number(noise_std) or not 0 <= noise_std < 1:
        raise ValueError(f"noise_std: expected a number in [0, 1), on the [-1, 1] scale, got {noise_std!r}")


def check_images(**images: Tensor) -> None:
    """TypeError or ValueError that names the first that is no tensor (B, C, H, W) of floats, or not beside the others.

    Looks at no values, so that a GPU is not waited for.
    """
    (first, one), *_ = images.items()
    for name, x in images.items():
        # In half precision there is no FFT on CPUs, and a PSNR overflows.
        if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {kind}; it has to be float32 or float64")
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name}: expected 4 dimensions (B, C, H, W), none of them 0, got shape {tuple(x.shape)}")
        if x.device != one.device:
            raise ValueError(f"{name}: is on {x.device}, the {first} on {one.device}; move one with .to(device)")


def check_kernel(**kernels: Tensor) -> None:
    """ValueError that names the first that has not non-negative values of sum one, over its last two dimensions."""
    for name, kernel in kernels.items():
        total = kernel.sum((-2, -1))
        if not bool((kernel >= 0).all()) or not torch.allclose(total, torch.ones_like(total), atol=1e-3):
            raise ValueError(f"{name}: expected a kernel, non-negative and of sum one; divide it by its sum")


def check_mapping(**mappings: Mapping[str, object]) -> None:
    """TypeError that names the first that is none."""
    for name, mapping in mappings.items():
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{name}: expected a mapping with the names of latents, got {type(mapping).__name__}")


def check_priors(priors: Mapping[str, object], *names: str) -> None:
    """TypeError or ValueError that names those that are missing, no priors, or priors of another latent."""
    check_mapping(priors=priors)
    if missing := [name for name in names if name not in priors]:
        raise ValueError(f"priors: none for {', '.join(missing)}")
    for name, prior in priors.items():
        # All that a sampler itself asks of one, guidances may ask for more.
        if not all(hasattr(prior, a) for a in ("shape", "stride", "device", "schedule", "start", "physical")):
            raise TypeError(f"priors: expected a prior of the {name}, such as load_prior returns, got {prior!r:.80}")
        latent = getattr(prior, "latent", None)
        if name in ("image", "kernel", "tilt") and latent not in (None, name):
            raise ValueError(f"priors: expected a prior of the {name} by that name, got one of the {latent}")
    if "kernel" in names and priors["kernel"].shape[-1] is None:  # what is sought has the prior's window
        raise ValueError("priors: expected a prior of the kernel with a size, that of its window, got one of any")
