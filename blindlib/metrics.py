"""Figures of merit for blind restoration, where image and kernel are known only up to a common shift."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blindlib.checks import check_counts, check_images, is_integer
from blindlib.operators import warp


def psnr(x: Tensor, ref: Tensor, max_shift: int = 0, subpixel: int = 1) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], after the best shift.

    No measurement tells how a shift is shared between image and kernel, a fraction of a pixel no more than a whole one;
    at fine detail half a pixel costs decibels.

    Parameters
    ----------
    x, ref : Tensor, shape (B, C, H, W)
    max_shift : int
        Shifts of up to this many pixels along each axis are tried, and a border as wide is left out
        for each of them, so that all are scored on the same pixels of ``ref``.
    subpixel : int
        Shifts are tried in steps of 1 / subpixel pixels, those by fractions in Fourier space, mirrored at the edges.

    Returns
    -------
    Tensor, shape (B,)

    Raises
    ------
    TypeError, ValueError
        If either is no tensor of floats (a byte is no value in [-1, 1]); if shapes or devices differ, shapes are not
        (B, C, H, W), or leave nothing between the borders; if ``subpixel`` is not positive.
    """
    moved, inner = aligned(x, ref, max_shift, subpixel)
    return 10 * torch.log10(4 / (moved - inner).square().mean((1, 2, 3)).clamp(min=1e-12))


def aligned(x: Tensor, ref: Tensor, max_shift: int = 0, subpixel: int = 1) -> tuple[Tensor, Tensor]:
    """``x`` after the shift that brings it nearest to ``ref``, and ``ref``, both without a border of ``max_shift``.

    Arguments and errors are those of :func:`psnr`; both have the shape (B, C, H - 2 max_shift, W - 2 max_shift).
    """
    check_images(x=x, ref=ref)
    if x.shape != ref.shape:
        raise ValueError(f"x: expected the shape of ref, {tuple(ref.shape)}; got {tuple(x.shape)}")
    m, (h, w) = max_shift, x.shape[-2:]
    if not is_integer(m) or m < 0 or 2 * m >= min(h, w):
        raise ValueError(f"max_shift: expected an integer, 0 <= max_shift < {min(h, w) / 2}, got {max_shift!r}")
    inner = ref[..., m : h - m, m : w - m]
    best, least = torch.full_like(inner, math.nan), torch.full((len(x),), math.inf, device=x.device)
    for down, right in _fractions(subpixel)[: None if m else 1]:
        moved = _moved(x, down, right)
        for dy in range(-m + (down > 0), m + 1):
            for dx in range(-m + (right > 0), m + 1):
                here = moved[..., m + dy : h - m + dy, m + dx : w - m + dx]
                error = (here - inner).square().mean((1, 2, 3))
                best = torch.where((error < least)[:, None, None, None], here, best)
                least = torch.minimum(error, least)
    return best, inner


def mnc(kernel: Tensor, ref: Tensor, subpixel: int = 1) -> Tensor:
    """Maximum of normalised convolution: the largest cosine between two kernels over all shifts (Hu & Yang, ECCV 2012).

    Parameters
    ----------
    kernel, ref : Tensor, shapes (B, 1, K, K) and (B or 1, 1, L, L)
        The windows may differ in size.
    subpixel : int
        Shifts go in steps of 1 / subpixel pixels, those by fractions in Fourier space; see :func:`psnr`.

    Returns
    -------
    Tensor, shape (B,)
        1 for the same kernel up to a shift; at least 0 for non-negative kernels.

    Raises
    ------
    TypeError, ValueError
        If either is no tensor of floats, of rank 4 with one channel, or batch sizes or devices do not fit; if
        ``subpixel`` is not positive.
    """
    check_images(kernel=kernel, ref=ref)
    for name, k in (("kernel", kernel), ("ref", ref)):
        if k.shape[1] != 1:
            raise ValueError(f"{name}: expected shape (B, 1, K, K), got {tuple(k.shape)}")
    if ref.shape[0] not in (1, kernel.shape[0]):
        raise ValueError(f"ref: expected one kernel or {kernel.shape[0]}, got {ref.shape[0]}")
    size = [a + b - 1 for a, b in zip(kernel.shape[-2:], ref.shape[-2:], strict=True)]
    # FFT of real kernels in double precision: the peak is to be exact to float tolerance.
    spectrum = torch.fft.rfft2(kernel.double(), s=size) * torch.fft.rfft2(ref.double(), s=size).conj()
    shifted = (spectrum * _ramp(size, *shift).to(spectrum.device) for shift in _fractions(subpixel))
    peak = torch.stack([torch.fft.irfft2(one, s=size).amax((1, 2, 3)) for one in shifted]).amax(0)
    norms = kernel.double().flatten(1).norm(dim=1) * ref.double().flatten(1).norm(dim=1)
    return (peak / norms.clamp(min=1e-30)).float()


def mean_mnc(kernels: Tensor, truth: Tensor) -> float:
    """The mean over kernels, or PSFs, (..., 1, K, K) of their MNC with the true ones."""
    return float(mnc(*(k.cpu().flatten(0, -4) for k in (kernels, truth))).mean())


def ranks(samples: Tensor, truth: Tensor) -> Tensor:
    """How often the truth is above none, one, ..., all of n posterior samples.

    If truth and samples are draws from one and the same distribution, all n + 1 ranks are equally frequent: the test
    of simulation-based calibration (Talts et al., arXiv 1804.06788). Frequent ends mean samples that lie too close to
    one another; a frequent middle, samples that lie too far apart.

    Parameters
    ----------
    samples : Tensor, shape (B, n, C, H, W)
    truth : Tensor, shape (B, C, H, W)

    Returns
    -------
    Tensor, shape (B, n + 1)
        Frequencies, of sum 1. The first and last are the share of values outside the samples' range, 2 / (n + 1) if all
        is well. Where the truth equals samples, its possible ranks share it. NaN where anything is NaN.

    Raises
    ------
    ValueError
        If shapes do not fit.
    """
    _check_samples(samples, truth, 1)
    below, up_to = (samples < truth[:, None]).sum(1), (samples <= truth[:, None]).sum(1)
    share = 1 / (up_to - below + 1)
    share = torch.where(samples.isnan().any(1) | truth.isnan(), torch.nan, share)
    return torch.stack(
        [(share * ((below <= i) & (i <= up_to))).mean((1, 2, 3)) for i in range(samples.shape[1] + 1)], dim=1
    )


def error_over_spread(samples: Tensor, truth: Tensor) -> Tensor:
    """Root mean square error of the mean of n posterior samples, over that which their own spread predicts.

    1 if truth and samples are draws from one distribution, whose mean n draws miss by ``sqrt(1 + 1 / n)`` standard
    deviations; above 1 the samples are too sure of themselves.

    Parameters
    ----------
    samples : Tensor, shape (B, n, C, H, W), n at least 2
    truth : Tensor, shape (B, C, H, W)

    Returns
    -------
    Tensor, shape (B,)

    Raises
    ------
    ValueError
        If shapes do not fit.
    """
    _check_samples(samples, truth, 2)
    variance = (1 + 1 / samples.shape[1]) * samples.var(1).mean((1, 2, 3))
    return ((samples.mean(1) - truth).square().mean((1, 2, 3)) / variance.clamp(min=1e-30)).sqrt()


def _check_samples(samples: Tensor, truth: Tensor, least: int) -> None:
    if samples.ndim != 5 or samples[:, 0].shape != truth.shape or samples.shape[1] < least:
        raise ValueError(
            f"samples: expected shape (B, n, C, H, W) with n >= {least}, for a truth (B, C, H, W) of "
            f"{tuple(truth.shape)}; got {tuple(samples.shape)}"
        )


def _fractions(subpixel: int) -> list[tuple[float, float]]:
    """Shifts down and right by parts of a pixel."""
    check_counts(subpixel=subpixel)
    parts = [i / subpixel for i in range(subpixel)]
    return [(down, right) for down in parts for right in parts]


def _ramp(size: Sequence[int], down: float, right: float) -> Tensor:
    """What a shift does to a spectrum (rfft2)."""
    rows, columns = torch.fft.fftfreq(size[0], dtype=torch.double), torch.fft.rfftfreq(size[1], dtype=torch.double)
    return torch.exp(-2j * torch.pi * (down * rows[:, None] + right * columns))


def _moved(x: Tensor, down: float, right: float) -> Tensor:
    """Images (B, C, H, W) shifted by a part of a pixel, mirrored at their edges."""
    if not down and not right:
        return x
    twice = torch.cat([x, x.flip(-1)], -1)
    twice = torch.cat([twice, twice.flip(-2)], -2)
    size = twice.shape[-2:]
    moved = torch.fft.irfft2(torch.fft.rfft2(twice) * _ramp(size, down, right).to(x.device, torch.cfloat), s=size)
    return moved[..., : x.shape[-2], : x.shape[-1]]


def tilt_error(tilt: Tensor, ref: Tensor, image: Tensor) -> Tensor:
    """Mean distance of two tilt fields, in pixels, where the scene has edges.

    Each pixel counts with the length of the warped image's gradient: no measurement can tell the tilt of a flat place.

    Parameters
    ----------
    tilt, ref : Tensor, shape (B, 2, H, W) or (B, M, 2, H, W)
        In pixels; M frames.
    image : Tensor, shape (B, C, H, W)
        The true scene.

    Returns
    -------
    Tensor, shape (B,) or (B, M)

    Raises
    ------
    ValueError
        If shapes do not fit.
    """
    if tilt.shape != ref.shape or tilt.ndim not in (4, 5) or image.shape[-2:] != ref.shape[-2:]:
        raise ValueError(
            f"tilt: expected the shape of ref, {tuple(ref.shape)}, over an image of that size; got "
            f"{tuple(tilt.shape)} and an image of {tuple(image.shape)}"
        )
    frames = tilt.shape[1] if tilt.ndim == 5 else 1
    seen = warp(image.repeat_interleave(frames, 0), ref.flatten(0, -4))
    slopes = torch.gradient(seen, dim=(-2, -1))
    weight = sum(s.square() for s in slopes).sum(1).sqrt().view(ref.shape[:-3] + ref.shape[-2:])
    distance = (tilt - ref).norm(dim=-3)
    return (weight * distance).sum((-2, -1)) / weight.sum((-2, -1)).clamp(min=1e-12)


def recentred(kernel: Tensor) -> Tensor:
    """Kernels (B, 1, K, K) shifted by whole pixels so that their centre of mass lies nearest to pixel ``K // 2``.

    What leaves the window on one side is lost, not wrapped, and the sum is restored.
    """
    k, l = kernel.shape[-2:]
    out = torch.empty_like(kernel)
    for i, one in enumerate(kernel):
        mass = one / one.sum()
        dy = k // 2 - int(torch.round((mass.sum((0, 2)) * torch.arange(k, device=one.device)).sum()))
        dx = l // 2 - int(torch.round((mass.sum((0, 1)) * torch.arange(l, device=one.device)).sum()))
        out[i] = F.pad(one, (dx, -dx, dy, -dy))
    return out / out.sum((-2, -1), keepdim=True)
