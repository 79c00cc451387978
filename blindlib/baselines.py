"""Classical blind deblurring, without a learned prior: a baseline, and a start for what follows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from blindlib.metrics import recentred
from blindlib.operators import otf


def edge_kernel(y: Tensor, kernel_size: int, noise_std: float, *, rounds: int = 10) -> Tensor:
    """The kernel that blurred the edges of ``y``: coarse to fine, from cartoons of few edges.

    After Xu, Zheng & Jia (CVPR 2013). On each level of a pyramid, alternately: the cartoon that the kernel blurs to
    ``y`` and that has few edges (an l0 norm of its differences, by half-quadratic splitting); and the kernel that takes
    the cartoon's differences to those of ``y``, by least squares, faint pixels cut. Each level starts from the kernel
    of the one before, the coarsest from no blur. A cartoon's edges are steep or absent, so that "nothing was blurred"
    is no answer that it prefers.

    Parameters
    ----------
    y : Tensor, shape (B, C, H, W), about [-1, 1]
        Measurements under a circular blur.
    kernel_size : int
        Side of the kernel's window, 3 at least.
    noise_std : float
        Of ``y``, on the [-1, 1] scale: the more of it, the dearer is an edge, and the smoother the kernel. Taken for
        0.005 at least.
    rounds : int
        Of each level.

    Returns
    -------
    Tensor, shape (B, 1, kernel_size, kernel_size)
        Non-negative, of sum one, its centre of mass nearest to pixel ``kernel_size // 2``.

    Raises
    ------
    ValueError
        If ``y`` is of another rank, or a number is out of range.
    """
    if y.ndim != 4:
        raise ValueError(f"y: expected shape (B, C, H, W), got {tuple(y.shape)}")
    side = min(y.shape[-2:])
    if not 3 <= kernel_size <= side:
        raise ValueError(f"kernel_size: expected 3 to {side}, the size of y, got {kernel_size}")
    for name, value in (("noise_std", noise_std), ("rounds", rounds)):
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")

    noise_std = max(noise_std, 0.005)
    # In double precision: what lies at a threshold is to fall on the same side, alone or in a batch.
    y, given = y.double(), y
    # Half as many pixels on each level, down to 16 along a side or to a kernel of 3.
    levels = 1 + max(0, int(2 * math.log2(min(side / 16, kernel_size / 3))))
    scales = [2 ** (-i / 2) for i in reversed(range(levels))]
    kernel = None
    for scale in scales:
        small = [max(round(scale * n), 1) for n in y.shape[-2:]]
        window = min(max(3, int(kernel_size * scale)), *small)
        level = F.interpolate(y, size=small, mode="bilinear", antialias=True)
        if kernel is None:
            kernel = y.new_zeros(len(y), 1, window, window)
            kernel[..., window // 2, window // 2] = 1
        elif window != kernel.shape[-1]:
            kernel = F.interpolate(kernel, size=(window, window), mode="bicubic").clamp(min=0)
            kernel = recentred(kernel / kernel.sum((2, 3), keepdim=True))
        for i in range(rounds):
            cartoon = _cartoon(level, kernel, 0.3 * noise_std * 0.9**i)
            kernel = _kernel_between(cartoon, level, window, 500 * noise_std**2)
        kernel = recentred(kernel)
    return kernel.to(given)


def _differences(size: tuple[int, int], like: Tensor) -> Tensor:
    """Transfer functions of forward differences along both axes, (2, 1, 1, H, W // 2 + 1)."""
    (h, w), kind = size, dict(dtype=like.dtype, device=like.device)
    fy = torch.fft.fftfreq(h, **kind)[:, None].expand(-1, w // 2 + 1)
    fx = torch.fft.rfftfreq(w, **kind)[None].expand(h, -1)
    return (torch.exp(2j * math.pi * torch.stack([fx, fy])) - 1)[:, None, None]


def _cartoon(y: Tensor, kernel: Tensor, price: float) -> Tensor:
    """The image of few edges that ``kernel`` blurs to ``y``; the edges of all channels are paid for together."""
    size = tuple(y.shape[-2:])
    h, d = otf(kernel, size), _differences(size, y)
    fits, steep = h.conj() * torch.fft.rfft2(y), d.abs().square().sum(0)
    x, weight = y, 2 * price
    while weight < 1e3:
        edges = torch.fft.irfft2(d * torch.fft.rfft2(x), s=size)
        edges = edges * (edges.square().sum((0, 2), keepdim=True) > price / weight)
        top = fits + weight * (d.conj() * torch.fft.rfft2(edges)).sum(0)
        x = torch.fft.irfft2(top / (h.abs() ** 2 + weight * steep + 1e-8), s=size)
        weight *= 2
    return x.clamp(-1, 1)


def _kernel_between(x: Tensor, y: Tensor, window: int, ridge: float) -> Tensor:
    """The kernel that takes the differences of ``x`` to those of ``y``."""
    size = tuple(y.shape[-2:])
    d = _differences(size, y)
    of_x, of_y = d * torch.fft.rfft2(x), d * torch.fft.rfft2(y)
    top = (of_x.conj() * of_y).sum((0, 2))
    bottom = of_x.abs().square().sum((0, 2)) + ridge * size[0] * size[1]
    full = torch.fft.irfft2(top / bottom, s=size)[:, None]
    k = full.roll((window // 2, window // 2), (-2, -1))[..., :window, :window]
    k = k * (k > 0.05 * k.amax((-2, -1), keepdim=True))
    total = k.sum((-2, -1), keepdim=True)
    # Where there are no edges there is nothing to tell a kernel by.
    return torch.where(total > 0, k / total.clamp(min=1e-12), 1 / window**2)
