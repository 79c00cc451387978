"""A classical method to compare with, and to start from: blind deblurring by few edges, on a pyramid.

It knows no images but for one thing: edges are few. That is enough to find many kernels in a second, which is why
:func:`~blindlib.deblur.deblur` lets the diffusion start from what it finds.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from blindlib.metrics import recentred
from blindlib.operators import otf

SMALLEST = 8  # pixels of the kernel's window on the coarsest level


def l0_pyramid(
    y: Tensor,
    kernel_size: int,
    *,
    strength: float = 0.008,
    ridge: float = 0.2,
    rounds: int = 10,
    levels: int | None = None,
    periodic: bool = True,
) -> tuple[Tensor, Tensor]:
    """Image and kernel by alternating an image of few edges with the kernel that takes its edges to those of ``y``.

    In the manner of Xu, Zheng & Jia (CVPR 2013): from coarse to fine, sqrt(2) a level, the image is the cartoon that
    :func:`cartoon` makes, the kernel the least-squares one of :func:`kernel_between`.

    Parameters
    ----------
    y : Tensor, shape (B, C, H, W), about [-1, 1]
    kernel_size : int
        Side of the kernel's window.
    strength : float
        What an edge costs, falling by a tenth each round; from about 0.002 (many edges) to 0.02 (few).
    ridge : float
        Keeps down what the edges do not tell of the kernel.
    rounds : int
        At each level.
    levels : int, optional
        Below the full size; default as many as leave the kernel 8 pixels. 0: no pyramid.
    periodic : bool
        Whether ``y`` is blurred circularly; if not, its borders are faded first, so that they make no edges.

    Returns
    -------
    tuple of Tensor, shapes (B, C, H, W) and (B, 1, K, K)

    Raises
    ------
    ValueError
        If ``y`` is not of rank 4 or not finite, or the kernel is larger than the image.
    """
    if y.ndim != 4 or not bool(torch.isfinite(y).all()):
        raise ValueError(f"y: expected finite values of shape (B, C, H, W), got shape {tuple(y.shape)}")
    if not 1 <= kernel_size <= min(y.shape[-2:]):
        raise ValueError(f"kernel_size: expected 1 to {min(y.shape[-2:])}, the side of y, got {kernel_size}")
    if not periodic:
        y = faded(y, kernel_size // 2)
    if levels is None:
        levels = max(0, math.floor(2 * math.log2(kernel_size / SMALLEST)))
    scales = [2 ** (-level / 2) for level in range(levels, -1, -1)]
    coarsest = max(1, round(kernel_size * scales[0]))
    kernel = torch.zeros(len(y), 1, coarsest, coarsest, dtype=y.dtype, device=y.device)
    kernel[..., coarsest // 2, coarsest // 2] = 1
    for scale in scales:
        small = F.interpolate(y, [round(side * scale) for side in y.shape[-2:]], mode="bilinear", antialias=True)
        kernel = _enlarged(kernel, max(1, round(kernel_size * scale)))
        cost = strength
        for _ in range(rounds):
            image = cartoon(small, kernel, cost)
            kernel = kernel_between(image, small, kernel.shape[-1], ridge)
            cost *= 0.9
        kernel = recentred(kernel)
    return image, kernel


def cartoon(y: Tensor, kernel: Tensor, strength: float) -> Tensor:
    """The image of few edges that ``kernel`` blurs, circularly, to ``y``: least squares plus ``strength`` an edge.

    Half-quadratic splitting (Xu, Lu, Xu & Jia, SIGGRAPH Asia 2011): edges below a threshold are cut, which falls as
    the splitting's weight grows. Shapes (B, C, H, W) and (B, 1, K, K).
    """
    size, weight, x = tuple(y.shape[-2:]), 2 * strength, y
    h, d, spectrum = otf(kernel, size), differences(size, y), torch.fft.rfft2(y)
    top, blurred, edged = h.conj() * spectrum, h.abs().square(), d.abs().square().sum(0)
    while weight < 1e3:
        edges = torch.fft.irfft2(d * torch.fft.rfft2(x), s=size)
        edges = edges * (edges.square().sum((0, 2), keepdim=True) > strength / weight)
        solved = (top + weight * (d.conj() * torch.fft.rfft2(edges)).sum(0)) / (blurred + weight * edged + 1e-8)
        x, weight = torch.fft.irfft2(solved, s=size), 2 * weight
    return x.clamp(-1, 1)


def kernel_between(x: Tensor, y: Tensor, kernel_size: int, ridge: float) -> Tensor:
    """The kernel (B, 1, K, K) that takes the differences of ``x`` to those of ``y``, both (B, C, H, W).

    Least squares with a ridge; what is below a twentieth of the peak is cut, the sum made one. Without edges: no blur.
    """
    size, k = tuple(y.shape[-2:]), kernel_size
    d = differences(size, y)
    of_x, of_y = d * torch.fft.rfft2(x), d * torch.fft.rfft2(y)
    bottom = of_x.abs().square().sum((0, 2)) + ridge * size[0] * size[1]
    kernel = torch.fft.irfft2((of_x.conj() * of_y).sum((0, 2)) / bottom, s=size)[:, None]
    kernel = kernel.roll((k // 2, k // 2), (-2, -1))[..., :k, :k]
    kernel = kernel * (kernel > 0.05 * kernel.amax((-2, -1), keepdim=True))
    none = kernel.sum((-2, -1), keepdim=True) < 1e-6
    pixel = torch.zeros_like(kernel)
    pixel[..., k // 2, k // 2] = 1
    kernel = torch.where(none, pixel, kernel)
    return kernel / kernel.sum((-2, -1), keepdim=True)


def differences(size: tuple[int, int], like: Tensor) -> Tensor:
    """Transfer functions of forward differences along x and y on periodic images, (2, 1, 1, H, W // 2 + 1)."""
    fy = torch.fft.fftfreq(size[0], dtype=like.dtype, device=like.device)[:, None]
    fx = torch.fft.rfftfreq(size[1], dtype=like.dtype, device=like.device)[None]
    return torch.stack([torch.exp(2j * math.pi * f) - 1 for f in torch.broadcast_tensors(fx, fy)])[:, None, None]


def faded(y: Tensor, width: int) -> Tensor:
    """``y`` (B, C, H, W) made periodic: over the outer ``width`` pixels it fades into a very blurred copy of itself."""
    far = torch.arange(-3 * width, 3 * width + 1, dtype=y.dtype, device=y.device)
    bell = torch.exp(-0.5 * (far / width) ** 2)
    soft = y
    for axis in (2, 3):
        weights = torch.zeros(y.shape[axis], dtype=y.dtype, device=y.device)
        weights.index_add_(0, far.long() % y.shape[axis], bell / bell.sum())
        shape = [1] * 4
        shape[axis] = -1
        spectrum = torch.fft.rfft(soft, dim=axis) * torch.fft.rfft(weights).reshape(shape)
        soft = torch.fft.irfft(spectrum, n=y.shape[axis], dim=axis)
    inside = torch.ones_like(y[:1, :1])
    for axis in (2, 3):
        i = torch.arange(y.shape[axis], dtype=y.dtype, device=y.device) + 0.5
        ramp = (torch.minimum(i, y.shape[axis] - i) / width).clamp(max=1)
        ramp = (1 - torch.cos(math.pi * ramp)) / 2
        inside = inside * (ramp[:, None] if axis == 2 else ramp)
    return inside * y + (1 - inside) * soft


def _enlarged(kernel: Tensor, size: int) -> Tensor:
    kernel = F.interpolate(kernel, (size, size), mode="bicubic").clamp(min=0)
    return recentred(kernel / kernel.sum((-2, -1), keepdim=True))
