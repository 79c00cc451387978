"""A classical method to compare with, and to start from: blind deblurring by few edges, on a pyramid.

It knows no images but for one thing: edges are few and steep. That is enough to find many kernels in a second, which
is why :func:`~blindlib.deblur.deblur` and :func:`~blindlib.em.fast_em` start from what it finds.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from blindlib.checks import check_counts, check_positive
from blindlib.metrics import recentred
from blindlib.operators import otf, windowed


def l0_pyramid(
    y: Tensor,
    kernel_size: int,
    noise_std: float,
    *,
    strength: float = 0.3,
    ridge: float = 500.0,
    rounds: int = 10,
    levels: int | None = None,
    periodic: bool = True,
) -> tuple[Tensor, Tensor]:
    """Image and kernel by alternating an image of few edges with the kernel that takes its edges to those of ``y``.

    After Xu, Zheng & Jia (CVPR 2013): from coarse to fine, sqrt(2) a level, the image is the one that :func:`cartoon`
    makes, the kernel that of :func:`kernel_between`. Each level starts from the kernel of the one before, the coarsest
    from no blur. A cartoon's edges are steep or absent, so that "nothing was blurred" is no answer that it prefers.

    Parameters
    ----------
    y : Tensor, shape (B, C, H, W), about [-1, 1]
    kernel_size : int
        Side of the kernel's window.
    noise_std : float
        Of ``y``, on the [-1, 1] scale; taken for 0.005 at least.
    strength : float
        What an edge costs, in units of the noise, falling by a tenth each round; from 0.1 (many edges) to 1 (few).
    ridge : float
        In units of the noise's variance: keeps down what the edges do not tell of the kernel.
    rounds : int
        At each level.
    levels : int, optional
        Below the full size; default down to 16 pixels, or a kernel of 3. 0: no pyramid.
    periodic : bool
        Whether ``y`` is blurred circularly; if not, its borders are faded first, so that they make no edges.

    Returns
    -------
    tuple of Tensor, shapes (B, C, H, W) and (B, 1, K, K)
        The kernel's centre of mass is nearest to pixel ``K // 2``.

    Raises
    ------
    ValueError
        If ``y`` is not of rank 4 or not finite, the kernel is larger than the image, or a number is not positive (or,
        of ``levels``, negative).
    """
    if y.ndim != 4 or not bool(torch.isfinite(y).all()):
        raise ValueError(f"y: expected finite values of shape (B, C, H, W), got shape {tuple(y.shape)}")
    side = min(y.shape[-2:])
    if not 3 <= kernel_size <= side:
        raise ValueError(f"kernel_size: expected 3 to {side}, the side of y, got {kernel_size}")
    check_positive(noise_std=noise_std, strength=strength, ridge=ridge)
    check_counts(rounds=rounds)
    if levels is not None and levels < 0:
        raise ValueError(f"levels: expected at least 0, got {levels}")

    # In double precision: what lies at a threshold is to fall on the same side, alone or in a batch.
    y, given = y.double(), y
    if not periodic:
        y = faded(y, kernel_size // 2)
    noise_std = max(noise_std, 0.005)
    if levels is None:
        levels = max(0, int(2 * math.log2(min(side / 16, kernel_size / 3))))
    kernel = None
    for level in range(levels, -1, -1):
        scale = 2 ** (-level / 2)
        size = [max(round(scale * n), 1) for n in y.shape[-2:]]
        window = min(max(3, int(kernel_size * scale)), *size)
        small = F.interpolate(y, size, mode="bilinear", antialias=True)
        if kernel is None:
            kernel = no_blur(len(y), window).to(y)
        else:
            kernel = F.interpolate(kernel, (window, window), mode="bicubic").clamp(min=0)
            kernel = recentred(kernel / kernel.sum((-2, -1), keepdim=True))
        for i in range(rounds):
            image = cartoon(small, kernel, strength * noise_std * 0.9**i)
            kernel = kernel_between(image, small, window, ridge * noise_std**2)
        kernel = recentred(kernel)
    return image.to(given), kernel.to(given)


def cartoon(y: Tensor, kernel: Tensor, price: float) -> Tensor:
    """The image of few edges that ``kernel`` blurs, circularly, to ``y``: least squares plus ``price`` an edge.

    Half-quadratic splitting (Xu, Lu, Xu & Jia, SIGGRAPH Asia 2011): edges below a threshold are cut, which falls as
    the splitting's weight grows; those of all channels together. Shapes (B, C, H, W) and (B, 1, K, K).
    """
    size, weight, x = tuple(y.shape[-2:]), 2 * price, y
    h, d = otf(kernel, size), differences(size, y)
    fits, blurred, steep = h.conj() * torch.fft.rfft2(y), h.abs().square(), d.abs().square().sum(0)
    while weight < 1e3:
        edges = torch.fft.irfft2(d * torch.fft.rfft2(x), s=size)
        edges = edges * (edges.square().sum((0, 2), keepdim=True) > price / weight)
        top = fits + weight * (d.conj() * torch.fft.rfft2(edges)).sum(0)
        x, weight = torch.fft.irfft2(top / (blurred + weight * steep + 1e-8), s=size), 2 * weight
    return x.clamp(-1, 1)


def kernel_between(x: Tensor, y: Tensor, kernel_size: int, ridge: float) -> Tensor:
    """The kernel (B, 1, K, K) that takes the differences of ``x`` to those of ``y``, both (B, C, H, W).

    Least squares with a ridge; what is below a twentieth of the peak is cut, the sum made one. Without edges: no blur.
    """
    size, k = tuple(y.shape[-2:]), kernel_size
    d = differences(size, y)
    of_x, of_y = d * torch.fft.rfft2(x), d * torch.fft.rfft2(y)
    bottom = of_x.abs().square().sum((0, 2)) + ridge * size[0] * size[1]
    full = torch.fft.irfft2((of_x.conj() * of_y).sum((0, 2)) / bottom, s=size)[:, None]
    kernel = windowed(full, (k, k))
    kernel = kernel * (kernel > 0.05 * kernel.amax((-2, -1), keepdim=True))
    total = kernel.sum((-2, -1), keepdim=True)
    return torch.where(total > 1e-9, kernel / total.clamp(min=1e-9), no_blur(1, k).to(kernel))


def differences(size: tuple[int, int], like: Tensor) -> Tensor:
    """Transfer functions of forward differences along x and y on periodic images, (2, 1, 1, H, W // 2 + 1)."""
    fy = torch.fft.fftfreq(size[0], dtype=like.dtype, device=like.device)[:, None]
    fx = torch.fft.rfftfreq(size[1], dtype=like.dtype, device=like.device)[None]
    return torch.stack([torch.exp(2j * math.pi * f) - 1 for f in torch.broadcast_tensors(fx, fy)])[:, None, None]


def faded(y: Tensor, width: int) -> Tensor:
    """``y`` (B, C, H, W) made periodic: over the outer ``width`` pixels it fades into a very blurred copy of itself."""
    far = torch.arange(-3 * width, 3 * width + 1, dtype=y.dtype, device=y.device)
    bell = torch.exp(-0.5 * (far / width) ** 2)
    soft, inside = y, torch.ones_like(y[:1, :1])
    for axis in (2, 3):
        n, shape = y.shape[axis], [1] * 4
        shape[axis] = -1
        weights = torch.zeros(n, dtype=y.dtype, device=y.device)
        weights.index_add_(0, far.long() % n, bell / bell.sum())
        spectrum = torch.fft.rfft(soft, dim=axis) * torch.fft.rfft(weights).reshape(shape)
        soft = torch.fft.irfft(spectrum, n=n, dim=axis)
        i = torch.arange(n, dtype=y.dtype, device=y.device) + 0.5
        ramp = (torch.minimum(i, n - i) / width).clamp(max=1)
        inside = inside * ((1 - torch.cos(math.pi * ramp)) / 2).reshape(shape)
    return inside * y + (1 - inside) * soft


def no_blur(n: int, size: int) -> Tensor:
    """``n`` kernels (n, 1, size, size) of one bright pixel in the middle."""
    kernel = torch.zeros(n, 1, size, size)
    kernel[..., size // 2, size // 2] = 1
    return kernel
