"""Diffusion EM (arXiv 2309.00287): the kernel that is most likely, while images are sampled with it.

The E-step draws images given the kernel, the M-step (:func:`fit_kernel`) fits the kernel to them. :func:`diffusion_em`
alternates whole runs with M-steps; :func:`fast_em` makes one run, with an M-step at each of its steps. Both are
:func:`~blindlib.sampler.sample` with a guidance of their own.

The regulariser decides: with a kernel denoiser EM finds the kernel, without one it is lost. It starts by default from
:func:`~blindlib.baselines.l0_pyramid` and fits no kernel before images have edges, which is a little better than the
paper's start, :func:`as_published`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from blindlib.baselines import l0_pyramid, no_blur
from blindlib.checks import check_counts, check_kernel, check_positive, is_integer
from blindlib.metrics import recentred
from blindlib.operators import Blur, LinearLight, linear_values, otf, seen, windowed
from blindlib.priors import KERNEL_DENOISER, Prior, kernel_to_latent, pick_device, read_checkpoint, write_checkpoint
from blindlib.sampler import DPS, DiffPIR, Latents, PiGDM, Result, bar, sample
from blindlib.schedule import NoiseSchedule

Regularizer = Callable[[Tensor, float], Tensor]

# Time below which images have edges to fit a kernel to.
FIT_BELOW = 300
EM_BOUNDARIES = ("circular", "valid")
RESPONSES = ("linear", "srgb")
# What sampled images get wrong of a measurement counts as noise, too. In DiffPIR's E-step: an image that explains the
# measurement down to its noise makes the M-step give back the kernel it was sampled with, right or wrong; this lets the
# kernel move. And in the M-step of `Annealed`.
MISFIT = 0.035


@dataclass(frozen=True)
class L1:
    """``weight * |k|_1``: its proximal map at strength 1 / beta is the soft threshold."""

    weight: float = 1.0

    def __call__(self, kernel: Tensor, beta: float) -> Tensor:
        return (kernel.abs() - self.weight / beta).clamp(min=0) * kernel.sign()


@dataclass(frozen=True)
class L2:
    """``weight / 2 * |k|_2^2``: its proximal map shrinks. All of it is lost when the sum is made one again."""

    weight: float = 1.0

    def __call__(self, kernel: Tensor, beta: float) -> Tensor:
        return kernel / (1 + self.weight / beta)


@dataclass(frozen=True)
class Threshold:
    """Cuts what is fainter than ``share`` of a kernel's peak: few pixels are lit (an l0 norm's proximal map).

    The least-squares solve leaves a haze of errors all over the window, most of it far below the peak.
    """

    share: float = 0.1

    def __call__(self, kernel: Tensor, beta: float) -> Tensor:
        return kernel * (kernel > self.share * kernel.amax((-2, -1), keepdim=True))


@dataclass(frozen=True)
class PlugAndPlay:
    """A denoiser in the place of the proximal map, at the noise level that belongs to it, sqrt(weight / beta).

    Parameters
    ----------
    denoise : callable, optional
        ``denoise(kernel, std)``: kernels (B, 1, K, K) that sum to one, with white noise of standard deviation ``std``.
        Default: the net that ships, :func:`load_kernel_denoiser`.
    weight : float
        lambda in the paper: 1 for windows of 33 x 33, 0.2 for 64 x 64.
    """

    denoise: Callable[[Tensor, float], Tensor] | None = None
    weight: float = 1.0

    def __call__(self, kernel: Tensor, beta: float) -> Tensor:
        denoise = self.denoise or _shipped_denoiser(kernel.device)
        return denoise(kernel, (self.weight / beta) ** 0.5)


@dataclass(frozen=True)
class Annealed:
    """Plug and play with a diffusion prior of kernels, from coarse to fine: DPIR (arXiv 2008.13751) for the kernel.

    Ours, in place of :class:`PlugAndPlay`, from which it differs in four ways, each of which matters: noise levels
    fall from ``first`` to ``last``; all colour channels speak for the one kernel in one least-squares solve; nothing
    is cut before the denoiser has seen it (noise without its negative half is haze, which grows from M-step to M-step);
    and what the images get wrong counts beside the noise, which alone averages out over pixels and samples. It keeps
    the long faint strokes that a denoiser at one low level takes for noise.

    Parameters
    ----------
    prior : DiffusionPrior
        Of kernels; its window is that of the kernels.
    strength : float
        Weight of the prior against the images.
    first, last : float
        Noise levels, in units of half the kernel's peak.
    steps : int
        Network evaluations of one M-step.
    cut : float
        What is fainter than this share of the peak is cut at the end of an M-step.
    """

    prior: Prior
    strength: float = 0.0615
    first: float = 0.5
    last: float = 0.03
    steps: int = 12
    cut: float = 0.02

    @torch.no_grad()
    def fit(self, kernel: Tensor, solve: Callable[[Tensor, Tensor], Tensor], wrong: float) -> Tensor:
        """From ``kernel``, by ``solve(kernel, weight)`` and the denoiser in turns; ``wrong``: noise and misfit."""
        half = kernel.amax((-2, -1), keepdim=True) / 2
        for level in torch.logspace(math.log10(self.first), math.log10(self.last), self.steps).tolist():
            kernel = solve(kernel, self.strength * (wrong / (level * half)) ** 2)
            kernel = _denoised(self.prior, kernel, level)
            half = kernel.amax((-2, -1), keepdim=True) / 2
        # What the denoiser leaves everywhere is faint, but everywhere: a tenth of the sum and more.
        return _simplex(Threshold(self.cut)(kernel, 0))


class KernelDenoiser(nn.Module):
    """A small net that takes noise off kernels, for :class:`PlugAndPlay`; fully convolutional, for any window.

    The noise level is a second input channel (FFDNet, arXiv 1710.04026), and nothing has a bias, so that the net is
    homogeneous of degree one (arXiv 1906.05478): kernel and noise ten times as large give a result ten times as large.

    Parameters
    ----------
    channels : int
        Of the hidden layers.
    dilations : sequence of int
        Of each 3x3 layer: 1, 2, 3, 2, 1 see 19 pixels, where a kernel's strokes and their noise look different.
    """

    def __init__(self, channels: int = 32, dilations: Sequence[int] = (1, 2, 3, 2, 1)) -> None:
        super().__init__()
        widths = [2, *[channels] * (len(dilations) - 1), 1]
        self.layers = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=d, dilation=d, bias=False)
            for i, o, d in zip(widths, widths[1:], dilations, strict=False)
        )
        self.config = dict(channels=channels, dilations=list(dilations))

    def forward(self, kernel: Tensor, std: float | Tensor) -> Tensor:
        """``kernel`` (B, 1, K, L), on the scale of kernels that sum to one, without its white noise of ``std``.

        ``std`` is one number, or one for each kernel, (B,).
        """
        level = torch.as_tensor(std).to(kernel).reshape(-1, 1, 1, 1).expand_as(kernel)
        h = torch.cat([kernel, level], dim=1)
        for layer in self.layers[:-1]:
            h = layer(h).relu()
        return kernel - self.layers[-1](h)

    def save(self, path: str | Path, note: str = "") -> None:
        """Write it as safetensors, whole or not at all; :func:`load_kernel_denoiser` reads it."""
        write_checkpoint(path, dict(net=self.config, note=note), dict(self.state_dict()))


def load_kernel_denoiser(path: str | Path | None = None, *, device: str | torch.device = "cpu") -> KernelDenoiser:
    """The denoiser of kernels that ships, or one that ``python -m blindlib.train kernel-denoiser`` wrote to ``path``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no checkpoint of such a net.

    Examples
    --------
    >>> regularizer = PlugAndPlay(load_kernel_denoiser("my.safetensors"))  # doctest: +SKIP
    """
    path = KERNEL_DENOISER if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no file {str(path)!r}")
    about, state = read_checkpoint(path)
    try:
        net = KernelDenoiser(**(about or {})["net"])
        net.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a checkpoint of a kernel denoiser: {error}") from None
    return net.eval().requires_grad_(False).to(pick_device(device))


_shipped_denoiser = functools.cache(lambda device: load_kernel_denoiser(device=device))


def prior_denoiser(prior: Prior) -> Callable[[Tensor, float], Tensor]:
    """The diffusion prior of kernels as the denoiser of :class:`PlugAndPlay`.

    A kernel is scaled to peak 1 for its diffusion, and its noise with it: the time is the one with that noise level,
    for each kernel its own.
    """

    return lambda kernel, std: torch.cat([_denoised(prior, k[None], 2 * std / float(k.max())) for k in kernel])


@torch.no_grad()
def _denoised(prior: Prior, kernel: Tensor, level: float) -> Tensor:
    """``kernel`` without its noise, of ``level`` halves of its peak, by the diffusion prior; its sum one."""
    t = prior.schedule.time(level)
    return prior.physical(prior.denoise(prior.schedule.alpha_bar(t) ** 0.5 * kernel_to_latent(kernel), t))


def fit_kernel(
    y: Tensor,
    x_samples: Tensor,
    noise_std: float,
    kernel0: Tensor,
    regularizer: Regularizer | Annealed | None = None,
    *,
    boundary: str = "circular",
    beta: float = 1e5,
    iterations: int = 10,
) -> Tensor:
    """The M-step: the kernel for which samples of the image explain ``y`` best (arXiv 2309.00287).

    Minimises the sum over the samples of ``|y - k * x|^2 / (2 noise_std^2)`` plus the regulariser, by half-quadratic
    splitting: alternately a least-squares solve in Fourier space, for each colour channel and then averaged, and the
    regulariser's proximal map, after each of which negative values are cut and the sum is made one. Fourier space
    needs a blur that is circular. Where the sensor saw less than that (our addition), the rest is taken to be what the
    kernel at hand makes of the samples, anew each time: missing data, as EM treats it.

    Parameters
    ----------
    y : Tensor, shape (B, C, H, W)
        Measurements, on any scale.
    x_samples : Tensor, shape (B, n, C, H, W) or (B, C, H, W)
        Images, on the same scale; K - 1 pixels larger than ``y`` if the boundary is ``"valid"``.
    noise_std : float
        Of ``y``, on its scale.
    kernel0 : Tensor, shape (B or 1, 1, K, L)
        Start; its window is the result's.
    regularizer : callable or Annealed, optional
        ``regularizer(kernel, beta)``: a proximal map, such as :class:`L1`, :class:`L2` or :class:`PlugAndPlay`. Or
        :class:`Annealed`, a diffusion prior, which has steps and levels of its own.
    boundary : {"circular", "valid"}
        Of the blur, as of :class:`~blindlib.operators.Blur`.
    beta : float
        Weight of the splitting, for kernels that sum to one.
    iterations : int

    Returns
    -------
    Tensor, shape (B, 1, K, L)

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not positive, or a value not finite.
    """
    x = x_samples.unsqueeze(1) if x_samples.ndim == 4 else x_samples
    _check_boundary(boundary)
    if kernel0.ndim != 4 or kernel0.shape[0] not in (1, len(y)) or kernel0.shape[1] != 1:
        raise ValueError(f"kernel0: expected shape (B or 1, 1, K, L), got {tuple(kernel0.shape)}")
    window = tuple(kernel0.shape[-2:])
    scene = Blur(boundary).sizes(tuple(y.shape[-2:]), window)["image"]
    if y.ndim != 4 or x.ndim != 5 or x.shape[:1] + x.shape[2:] != y.shape[:2] + scene:
        raise ValueError(
            f"x_samples: expected shape (B, n, C, H, W) with {(*y.shape[:2], *scene)} for y's {tuple(y.shape)} "
            f"(boundary={boundary!r}), got {tuple(x_samples.shape)}"
        )
    together = isinstance(regularizer, Annealed)
    _check_regularizer(regularizer, window)
    if any(k > side for k, side in zip(window, y.shape[-2:], strict=True)):
        raise ValueError(f"kernel0: {window} is larger than the image, {tuple(y.shape[-2:])}")
    for name, value in (("y", y), ("x_samples", x), ("kernel0", kernel0)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name}: has values that are NaN or infinite")
    check_positive(noise_std=noise_std, beta=beta)
    check_counts(iterations=iterations)

    spectrum = torch.fft.rfft2(x)
    z = kernel0.to(y).expand(len(y), -1, -1, -1)

    def pooled(products: Tensor) -> Tensor:
        over_samples = products.sum(1)
        return over_samples.sum(1, keepdim=True) if together else over_samples

    def correlation(whole: Tensor) -> Tensor:
        return pooled(spectrum.conj() * torch.fft.rfft2(whole))

    bottom = pooled(spectrum.abs().square())
    of_y = correlation(y[:, None]) if boundary == "circular" else None

    def solve(kernel: Tensor, weight: float | Tensor) -> Tensor:
        h, top = otf(kernel, scene), of_y
        if boundary == "valid":
            whole = torch.fft.irfft2(spectrum * h[:, None], s=scene)
            whole[..., *seen(scene, window)] = y[:, None]
            top = correlation(whole)
        solved = ((top + weight * h) / (bottom + weight)).mean(1, keepdim=True)
        return windowed(torch.fft.irfft2(solved, s=scene), window)

    if together:
        # Errors of sampled images are no noise that more samples or pixels average out; the unit is 64x64 pixels.
        share = x.shape[1] * y.shape[-2] * y.shape[-1] / 64**2
        return regularizer.fit(z, solve, math.hypot(noise_std, MISFIT * share**0.5))
    for _ in range(iterations):
        z = _simplex(solve(z, noise_std**2 * beta))
        if regularizer is not None:
            z = _simplex(regularizer(z, beta))
    return z


def centred(kernel: Tensor) -> Tensor:
    """Kernels (B, 1, K, L) moved, by parts of a pixel too, so that their centre of mass is pixel (K // 2, L // 2).

    By cubic splines; what leaves the window is lost, negative values are cut and the sum is made one.
    """
    middle = [side // 2 for side in kernel.shape[-2:]]
    moved = []
    for one in kernel[:, 0].cpu().numpy():
        mass = ndimage.center_of_mass(one)
        moved.append(torch.from_numpy(ndimage.shift(one, [m - c for m, c in zip(middle, mass, strict=True)])))
    return _simplex(torch.stack(moved)[:, None].to(kernel))


def bare(kernel: Tensor, rims: bool = False) -> Tensor:
    """Kernels (..., K, L) of sum one without what is fainter than a fiftieth of their peak.

    A tenth of a fitted kernel may be haze all over its window. Few low frequencies show it, so it hardly changes what
    is simulated or predicted; but it takes as much from all others, which a restoration then makes too strong: its
    shadows are black. A real skirt that is as faint, such as a lens's glare, is lost with it. With ``rims``, what is
    faint but next to a brighter pixel stays: up to a twentieth of a real kernel, and half a decibel. What moments show
    there is as often haze.
    """
    bright = Threshold(0.02)(kernel, 0)
    if rims:
        beside = F.max_pool2d(bright.flatten(0, -3)[:, None], 3, stride=1, padding=1).reshape(kernel.shape)
        bright = kernel * (beside > 0)
    return bright / bright.sum((-2, -1), keepdim=True)


def _simplex(kernel: Tensor) -> Tensor:
    """Negative values cut, the sum made one; a kernel of which nothing is left becomes flat."""
    k = kernel.clamp(min=0)
    total = k.sum((-2, -1), keepdim=True)
    return torch.where(total > 0, k / total.clamp(min=1e-12), 1 / (k.shape[-2] * k.shape[-1]))


class _KernelEstimate:
    """Stands where a prior of the kernel would: the "latent" is one kernel, which EM replaces at each step."""

    stride = 1

    def __init__(self, kernel0: Tensor, schedule: NoiseSchedule) -> None:
        self.kernel0, self.schedule = kernel0, schedule
        self.shape, self.device = tuple(kernel0.shape[1:]), kernel0.device

    def start(self, noise: Tensor) -> Tensor:
        return self.kernel0.repeat_interleave(len(noise) // len(self.kernel0), 0)

    def physical(self, x0: Tensor) -> Tensor:
        return x0


@dataclass(frozen=True)
class EM:
    """A guidance that takes a step of the image with the current kernel, then an M-step (FastEM).

    Parameters
    ----------
    guidance : callable
        Of the image: :class:`PiGDM` or :class:`DPS`.
    noise_std : float
    samples : int
        Neighbouring items that are samples of one measurement, and share its kernel.
    regularizer : callable, optional
    fit_below : int
        M-steps begin at this time. Before, the image has no edges yet to fit a kernel to.
    """

    guidance: Callable
    noise_std: float
    samples: int = 1
    regularizer: Regularizer | Annealed | None = None
    fit_below: int = FIT_BELOW

    def __call__(
        self,
        x: Latents,
        t: int,
        t_prev: int,
        y: Tensor,
        operator: Callable,
        priors: Mapping[str, Prior],
        noise: Latents,
    ) -> tuple[Latents, Latents, Tensor]:
        """One step from ``t`` to ``t_prev``; returns as :meth:`DPS.__call__`."""
        known, image = partial(operator, kernel=x["kernel"]), {"image": priors["image"]}
        new, x0, norm = self.guidance({"image": x["image"]}, t, t_prev, y, known, image, noise)
        kernel = x["kernel"]
        # Of a run that diverges `sample` says so, with the step.
        if t < self.fit_below and bool(torch.isfinite(x0["image"]).all()):
            grouped = priors["image"].physical(x0["image"]).unflatten(0, (-1, self.samples))
            first = slice(None, None, self.samples)
            kernel = _m_step(operator, y[first], grouped, self.noise_std, kernel[first], self.regularizer)
            kernel = centred(kernel).repeat_interleave(self.samples, 0)
        return {**new, "kernel": kernel}, {**x0, "kernel": kernel}, norm


def _m_step(operator: Blur | LinearLight, y: Tensor, x_samples: Tensor, *args: object) -> Tensor:
    """:func:`fit_kernel`, in light if that is what is blurred; the noise there is as large in the mean."""
    y, x_samples = (linear_values(operator, v) for v in (y, x_samples))
    return fit_kernel(y, x_samples, *args, boundary=operator.boundary)


def fast_em(
    y: Tensor,
    image_prior: Prior,
    *,
    kernel_size: int,
    noise_std: float,
    steps: int = 100,
    backbone: str = "pigdm",
    samples: int = 1,
    regularizer: Regularizer | Annealed | None = PlugAndPlay(),
    kernel0: Tensor | None = None,
    fit_below: int = FIT_BELOW,
    boundary: str = "circular",
    response: str = "linear",
    **options: object,
) -> Result:
    """Blind deblurring in one run, with an M-step at every step (FastEM, arXiv 2309.00287).

    Parameters
    ----------
    y : Tensor, shape (B, C, H, W), about [-1, 1]
    image_prior : Prior
    kernel_size : int
        Side of the kernel's window, odd or even.
    noise_std : float
        Of ``y``, on the [-1, 1] scale.
    steps : int
    backbone : {"pigdm", "dps", "diffpir"}
        The last is ours, and a third of the cost: no gradient passes through the network.
    samples : int
        Posterior samples that run in parallel and share one kernel.
    regularizer : callable or Annealed, optional
        Of the M-step, see :func:`fit_kernel`.
    kernel0 : Tensor, shape (B or 1, 1, K, K), optional
        Start; default that of :func:`~blindlib.baselines.l0_pyramid`.
    fit_below : int
        M-steps begin at this time of the diffusion.
    boundary : {"circular", "valid"}
        Of the blur; the paper's is circular. With ``"valid"``, H + K - 1 has to be a multiple of the prior's stride.
    response : {"linear", "srgb"}
        Of the camera: whether the values are what was blurred, or sRGB's code of it, as in a photograph
        (:class:`~blindlib.operators.LinearLight`).
    **options
        As of :func:`~blindlib.sampler.sample`: ``seed``, ``history``, ``progress``, ``callback``.

    Returns
    -------
    Result
        ``.image`` (B * samples, C, H, W), ``.kernel`` (B * samples, 1, K, K), that of a measurement repeated.

    Raises
    ------
    ValueError
        If the backbone or the response is unknown, or sizes do not fit.

    Examples
    --------
    >>> run = fast_em(y, load_prior("image"), kernel_size=32, noise_std=0.02)  # doctest: +SKIP
    """
    operator = blur_of(boundary, response, noise_in="light")
    check_counts(fit_below=fit_below)
    kernel0 = _start(y, kernel_size, kernel0, noise_std, operator, regularizer)
    e_step = _backbone(backbone, noise_std, steps, min(y.shape[-2:]))
    guidance = EM(e_step, noise_std, samples, regularizer, fit_below)
    priors = {"image": image_prior, "kernel": _KernelEstimate(kernel0, image_prior.schedule)}
    return sample(y, operator, priors, steps=steps, samples=samples, guidance=guidance, **options)


def diffusion_em(
    y: Tensor,
    image_prior: Prior,
    *,
    kernel_size: int,
    noise_std: float,
    steps: int = 100,
    rounds: int = 10,
    backbone: str = "pigdm",
    samples: int = 1,
    regularizer: Regularizer | Annealed | None = PlugAndPlay(),
    kernel0: Tensor | None = None,
    image0: Tensor | None = None,
    start_time: int | None = None,
    boundary: str = "circular",
    response: str = "linear",
    seed: int | Sequence[int] = 0,
    progress: bool = False,
    **options: object,
) -> Result:
    """Blind deblurring by whole runs that alternate with M-steps (DiffEM, arXiv 2309.00287).

    Parameters as of :func:`fast_em`; ``rounds`` is the number of runs, each of ``steps`` steps. History and residual
    are the last round's, with the kernel it was sampled with; the result's kernel is of the M-step after it. In the
    paper each run starts from noise, here always the same, so that rounds differ by their kernel. With ``start_time``
    (ours) a run starts from the image of the one before, the first from ``image0`` if there is one, with new noise of
    that time: where only details are hidden, a few steps bring a sample that the new kernel allows.
    """
    blur = blur_of(boundary, response, noise_in="light")
    check_counts(rounds=rounds, samples=samples)
    kernel = _start(y, kernel_size, kernel0, noise_std, blur, regularizer)
    if image0 is not None and start_time is None:
        raise ValueError("image0: is given, but no start_time, the time of the noise to put on it")
    guidance = _backbone(backbone, noise_std, steps, min(y.shape[-2:]))
    seconds = 0.0
    for i in bar(range(rounds), "EM", progress, unit="round"):
        if image0 is not None:
            options |= dict(start={"image": image0}, start_time=start_time)
        # The first round, too, must not meet the noise that its start was made with.
        own = seed if start_time is None else _shifted(seed, 1000 * (i + 1))
        known = kernel.expand(len(y), -1, -1, -1)
        operator = partial(blur, kernel=known)
        common = dict(steps=steps, samples=samples, guidance=guidance, seed=own, **options)
        run = sample(y, operator, {"image": image_prior}, **common)
        seconds += run.seconds
        drawn = run.posterior("image")
        if start_time is not None:
            image0 = drawn[:, 0]
        kernel = _m_step(blur, y, drawn, noise_std, kernel, regularizer)
        # An image to go on from has its place, by fractions of a pixel: the kernel is not to move against it.
        kernel = centred(kernel) if start_time is None else recentred(kernel)
    latents = {"image": run.image, "kernel": kernel.repeat_interleave(samples, 0)}
    if history := run.history:
        frames = known.repeat_interleave(samples, 0).cpu()
        history = {**history, "kernel": frames.expand(len(history["t"]), -1, -1, -1, -1)}
    return replace(run, latents=latents, history=history, evaluations=rounds * steps, seconds=seconds)


def _shifted(seed: int | Sequence[int], by: int) -> int | list[int]:
    return [s + by for s in seed] if isinstance(seed, Sequence) else seed + by


def as_published(kernel_size: int) -> dict:
    """Arguments that make :func:`fast_em` what the paper has: ``fast_em(..., **as_published(33))``.

    The start is a centred bright pixel, and M-steps are made from the first step on. :func:`diffusion_em` takes
    ``kernel0`` of these.
    """
    return dict(kernel0=no_blur(1, kernel_size), fit_below=1000)


def _backbone(name: str, noise_std: float, steps: int, side: int) -> Callable:
    if not is_integer(steps):  # times that rise again would put noise on the kernel, which here has none
        raise ValueError(f"steps: EM expects a number, got {type(steps).__name__}")
    if name == "pigdm":
        return PiGDM(noise_std)
    if name == "dps":
        return DPS().respaced(steps, side)
    if name == "diffpir":
        return DiffPIR(math.hypot(noise_std, MISFIT))
    raise ValueError(f"backbone: expected 'pigdm', 'dps' or 'diffpir', got {name!r}")


def _check_regularizer(regularizer: object, window: tuple[int, int]) -> None:
    if isinstance(regularizer, Annealed):
        if regularizer.prior.shape[-2:] not in ((None, None), window):
            raise ValueError(
                f"regularizer: its prior has windows of {regularizer.prior.shape[-1]}, the kernel of {window}"
            )
    elif regularizer is not None and not callable(regularizer):
        raise TypeError(f"regularizer: expected None, Annealed or a callable, got {type(regularizer).__name__}")


def _check_boundary(boundary: str) -> None:
    if boundary not in EM_BOUNDARIES:
        raise ValueError(f"boundary: EM knows {EM_BOUNDARIES}, got {boundary!r}")


def blur_of(boundary: str, response: str, noise_in: str = "values") -> Blur | LinearLight:
    """What EM inverts, with the E-step's ``noise_in`` light: images must be drawn by the distance that the M-step has.

    By that of values, kernels grow wider from round to round and images sharper, even from the truth. (DPS, which asks
    for no ``solve``, follows the gradient of the distance in values all the same.)
    """
    _check_boundary(boundary)
    if response not in RESPONSES:
        raise ValueError(f"response: expected one of {RESPONSES}, got {response!r}")
    return Blur(boundary) if response == "linear" else LinearLight(Blur(boundary), noise_in)


def _start(
    y: Tensor,
    size: int,
    kernel0: Tensor | None,
    noise_std: float,
    operator: Blur | LinearLight,
    regularizer: Regularizer | Annealed | None,
) -> Tensor:
    """The kernel to start from, on y's device; what an M-step would find wrong is said before the first step."""
    check_counts(kernel_size=size)
    check_positive(noise_std=noise_std)
    _check_regularizer(regularizer, (size, size))
    if size > min(y.shape[-2:]):
        raise ValueError(f"kernel_size: expected 1 to {min(y.shape[-2:])}, the size of y, got {size}")
    if kernel0 is None:
        periodic = operator.boundary == "circular"
        _, kernel0 = l0_pyramid(linear_values(operator, y), size, noise_std, periodic=periodic)
    if kernel0.ndim != 4 or kernel0.shape[0] not in (1, len(y)) or kernel0.shape[1:] != (1, size, size):
        raise ValueError(f"kernel0: expected shape (1 or {len(y)}, 1, {size}, {size}), got {tuple(kernel0.shape)}")
    check_kernel(kernel0=kernel0)
    return kernel0.to(y).expand(len(y), -1, -1, -1)
