"""What a sampler needs to know of a latent: its prior.

A prior denoises (``denoise(x_t, t)`` is the posterior mean E[x_0 | x_t]), knows its noise schedule and shape, and
maps the diffusion variable, which lives in [-1, 1], to the physical one: an image to itself, a kernel to the simplex.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from blindlib.checks import check_counts
from blindlib.files import whole
from blindlib.schedule import NoiseSchedule
from blindlib.unet import UNet

WEIGHTS = Path(__file__).parent / "weights"
# Ships beside the priors but is none: `blindlib.em` reads it.
KERNEL_DENOISER = WEIGHTS / "kernel-denoiser.safetensors"

CHANNELS = {"image": 3, "kernel": 1, "tilt": 2}
LATENTS = {channels: latent for latent, channels in CHANNELS.items()}

# For the errors of files that are no such checkpoints.
PUBLISHED = (
    "The published checkpoints (ffhq_10m.pt, kernel.pt, tilt.pt) are linked from "
    "https://github.com/BlindDPS/blind-dps; download one and give its path."
)

# Side of the window of the published kernel prior, which its checkpoint does not tell.
PUBLISHED_KERNEL = 64


def image_to_physical(x0: Tensor) -> Tensor:
    """An image is its own diffusion variable, in [-1, 1]."""
    return x0.clamp(-1, 1)


def kernel_to_physical(x0: Tensor) -> Tensor:
    """Diffusion variable (B, 1, K, K) in [-1, 1] to kernels that are non-negative and sum to one."""
    k = (x0.clamp(min=-1) + 1) / 2
    return k / k.sum((-2, -1), keepdim=True).clamp(min=1e-8)


def kernel_to_latent(kernel: Tensor) -> Tensor:
    """Kernels (B, 1, K, K) to the diffusion variable ``2 k / max(k) - 1``."""
    return 2 * kernel / kernel.amax((-2, -1), keepdim=True) - 1


def tilt_to_physical(x0: Tensor, scale: float = 1.0) -> Tensor:
    """A tilt's diffusion variable is its displacement in units of ``scale`` pixels; 1 in the published prior."""
    return scale * x0


def _channels(latent: str) -> int:
    if latent not in CHANNELS:
        raise ValueError(f"latent: expected one of {sorted(CHANNELS)}, got {latent!r}")
    return CHANNELS[latent]


PHYSICAL = {"image": image_to_physical, "kernel": kernel_to_physical, "tilt": tilt_to_physical}


def _physical(latent: str, scale: float) -> Callable[[Tensor], Tensor]:
    """The map of ``latent`` to its physical quantity, checked against ``scale``, which only a tilt has."""
    if not scale > 0 or (scale != 1 and latent != "tilt"):
        raise ValueError(f"scale: expected a positive number of pixels for a tilt and 1 for others, got {scale}")
    return functools.partial(tilt_to_physical, scale=scale) if latent == "tilt" else PHYSICAL[latent]


class Prior(Protocol):
    """The interface that samplers use."""

    shape: tuple[int | None, ...]
    """Channels, height, width (with the frames before them, if any); ``None`` where any size will do."""
    stride: int
    """Height and width must be multiples of it."""
    device: torch.device
    schedule: NoiseSchedule
    scale: float
    """Physical units in one of the diffusion variable; 1 but for tilts."""

    def start(self, noise: Tensor) -> Tensor:
        """The latent before the first step, made of standard normal ``noise``."""

    def denoise(self, x_t: Tensor, t: int) -> Tensor:
        """Posterior mean of x_0 given ``x_t`` at time ``t``, in [-1, 1]."""

    def estimate(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        """:meth:`denoise`, and whatever :meth:`step` wants of the same evaluation."""

    def step(self, x_t: Tensor, x0: Tensor, t: int, t_prev: int, noise: Tensor, extra: Tensor | None) -> Tensor:
        """One reverse step, from ``t`` to ``t_prev``, given the posterior mean ``x0``."""

    def physical(self, x0: Tensor) -> Tensor:
        """Map the diffusion variable to what the operator takes."""


class DiffusionPrior:
    """A prior learned by a noise-conditioned network.

    Parameters
    ----------
    net : UNet
        Called as ``net(x_t, t)``. Twice as many channels out as in: the second half is the learned variance range.
    latent : {"image", "kernel", "tilt"}
        What it is a prior of.
    prediction : {"noise", "v"}
        What the net predicts: the noise (DDPM), or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (arXiv
        2202.00512).
    schedule : NoiseSchedule, optional
        Default: the linear one.
    size : int, optional
        The only height and width that it works at; default any multiple of the net's stride.
    scale : float
        Of a tilt: how many pixels its diffusion variable counts as 1, so that none is cut at [-1, 1].

    Raises
    ------
    ValueError
        If latent or prediction is unknown, the net's channels do not fit the latent, or the scale does not.
    """

    def __init__(
        self,
        net: UNet,
        latent: str,
        *,
        prediction: str = "noise",
        schedule: NoiseSchedule | None = None,
        size: int | None = None,
        scale: float = 1.0,
    ) -> None:
        channels = _channels(latent)
        if prediction not in ("noise", "v"):
            raise ValueError(f"prediction: expected 'noise' or 'v', got {prediction!r}")
        if net.in_channels != channels or net.config["out_channels"] not in (channels, 2 * channels):
            raise ValueError(f"net: a prior of the {latent} has {channels} channels, the net {net.in_channels}")
        # Channels last is a fifth faster on CPUs, and no slower elsewhere.
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.latent, self.prediction, self.scale = latent, prediction, scale
        self.schedule = schedule or NoiseSchedule.linear()
        self.shape = (channels, size, size)
        self.stride = net.stride
        self.physical = _physical(latent, scale)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def to(self, device: str | torch.device) -> DiffusionPrior:
        """Move the network to ``device``, in place; returns the prior."""
        self.net.to(pick_device(device))
        return self

    def start(self, noise: Tensor) -> Tensor:
        """At the last timestep a diffused signal is standard normal noise."""
        return noise

    def denoise(self, x_t: Tensor, t: int) -> Tensor:
        """Posterior mean E[x_0 | x_t] by Tweedie's formula, clipped to [-1, 1]; ``x_t`` (B, C, H, W), 0 <= t < T.

        Differentiable in ``x_t``.
        """
        return self.estimate(x_t, t)[0]

    def estimate(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        """The posterior mean, and the net's raw variance output (B, C, H, W) if it has one."""
        self.schedule.check_noisy(t)
        out = self.net(x_t, torch.tensor([t], device=x_t.device))
        out, variance = out.split(self.shape[0], dim=1) if out.shape[1] > self.shape[0] else (out, None)
        a = self.schedule.alpha_bar(t)
        if self.prediction == "noise":
            x0 = (x_t - math.sqrt(1 - a) * out) / math.sqrt(a)
        else:
            x0 = math.sqrt(a) * x_t - math.sqrt(1 - a) * out
        return x0.clamp(-1, 1), variance

    def step(self, x_t: Tensor, x0: Tensor, t: int, t_prev: int, noise: Tensor, extra: Tensor | None = None) -> Tensor:
        """The ancestral step (DDPM algorithm 2), with the learned variance where ``extra`` holds one."""
        if extra is None or t_prev < 0:  # the last step has no noise, and so no variance
            return self.schedule.ancestral_step(x_t, x0, t, t_prev, noise)
        low, high = self.schedule.log_variance_range(t, t_prev)
        share = (extra + 1) / 2
        return self.schedule.ancestral_step(x_t, x0, t, t_prev, noise, low + share * (high - low))

    def save(self, path: str | Path, note: str = "") -> None:
        """Write it as safetensors, weights in half precision, whole or not at all; :func:`load_prior` reads it.

        Raises
        ------
        ValueError
            If its schedule is not the linear one, which is what the file will be read with.
        """
        if not torch.equal(self.schedule.betas, NoiseSchedule.linear().betas):
            raise ValueError("schedule: a file holds none; expected the linear one, NoiseSchedule.linear()")
        about = dict(latent=self.latent, prediction=self.prediction, size=self.shape[1], scale=self.scale)
        about |= dict(net=self.net.config, note=note)
        write_checkpoint(path, about, {key: value.detach().half() for key, value in self.net.state_dict().items()})


class _ExactPrior:
    """What priors without a network share; each has its own ``denoise``. Latents are (B, C, H, W)."""

    stride = 1
    scale = 1.0

    def __init__(
        self,
        shape: tuple[int, int | None, int | None],
        latent: str | None,
        device: str | torch.device,
        schedule: NoiseSchedule | None = None,
    ) -> None:
        if latent is not None and shape[0] != _channels(latent):
            raise ValueError(f"latent: a prior of the {latent} has {CHANNELS[latent]} channels, got {shape[0]}")
        self.shape, self.latent = shape, latent
        # As tensors on it report it, "cuda:0" for "cuda": the two are not equal.
        self.device = torch.empty(0, device=pick_device(device)).device
        self.schedule = schedule or NoiseSchedule.linear()
        self.physical: Callable[[Tensor], Tensor] = PHYSICAL[latent] if latent else lambda x0: x0

    def start(self, noise: Tensor) -> Tensor:
        """At the last timestep a diffused signal is standard normal noise, (B, C, H, W)."""
        return noise

    def denoise(self, x_t: Tensor, t: int) -> Tensor:
        """E[x_0 | x_t] of ``x_t`` (B, C, H, W), of that shape."""
        raise NotImplementedError

    def estimate(self, x_t: Tensor, t: int) -> tuple[Tensor, None]:
        """The posterior mean (B, C, H, W); a learned variance there is none."""
        return self.denoise(x_t, t), None

    def step(self, x_t: Tensor, x0: Tensor, t: int, t_prev: int, noise: Tensor, extra: None = None) -> Tensor:
        """The ancestral step (DDPM algorithm 2); all tensors (B, C, H, W)."""
        return self.schedule.ancestral_step(x_t, x0, t, t_prev, noise)


class GaussianPrior(_ExactPrior):
    """The exact prior of a Gaussian field, for tests and for theory.

    Parameters
    ----------
    mean : float or Tensor, shape (C, H, W)
        A number needs a ``spectrum``, which tells the shape.
    covariance : Tensor, shape (N, N), N = C H W
        Of the flattened field. Its eigenvectors are computed: for small fields.
    spectrum : Tensor, shape (C, H, W // 2 + 1)
        Instead of a covariance, for a stationary field on a periodic grid of even width: the variance of each Fourier
        coefficient of ``torch.fft.rfft2(x, norm="ortho")``; symmetric as that of a real field is.
    latent : {"image", "kernel", "tilt"}, optional
        What it is a prior of, which decides the physical map; default: the field is its own physical quantity.
    schedule : NoiseSchedule, optional
        Default: the linear one.

    Raises
    ------
    ValueError
        If not exactly one of covariance and spectrum is given, shapes do not fit, a variance is negative, or the
        covariance is not symmetric.
    """

    def __init__(
        self,
        mean: float | Tensor,
        *,
        covariance: Tensor | None = None,
        spectrum: Tensor | None = None,
        latent: str | None = None,
        schedule: NoiseSchedule | None = None,
    ) -> None:
        if (covariance is None) == (spectrum is None):
            raise ValueError("covariance, spectrum: expected exactly one of the two")
        mean = torch.as_tensor(mean, dtype=torch.float64)
        if spectrum is not None:
            if spectrum.ndim != 3 or spectrum.shape[2] < 2:
                raise ValueError(f"spectrum: expected shape (C, H, W // 2 + 1), got {tuple(spectrum.shape)}")
            shape, self.variance = (*spectrum.shape[:2], 2 * (spectrum.shape[2] - 1)), spectrum
            if mean.shape not in ((), shape):
                raise ValueError(f"mean: expected a number or shape {shape}, got shape {tuple(mean.shape)}")
        else:
            shape = tuple(mean.shape)
            if len(shape) != 3 or covariance.shape != (mean.numel(),) * 2:
                raise ValueError(
                    "mean, covariance: expected shapes (C, H, W) and (N, N) with N = C H W, got "
                    f"{shape} and {tuple(covariance.shape)}"
                )
            if not torch.allclose(covariance, covariance.T, atol=1e-6 * float(covariance.abs().max())):
                raise ValueError("covariance: expected a symmetric matrix")
            self.variance, self.vectors = torch.linalg.eigh(covariance)
            # Rounding makes vanishing eigenvalues a little negative.
            self.variance[self.variance.abs() < 1e-5 * self.variance.abs().max()] = 0
        if not bool((self.variance >= 0).all()):
            raise ValueError(f"covariance, spectrum: has a variance of {float(self.variance.min()):.3g}")
        super().__init__(shape, latent, self.variance.device, schedule)
        self.mean, self.spectrum = mean.to(self.device), spectrum

    def denoise(self, x_t: Tensor, t: int) -> Tensor:
        """E[x_0 | x_t] in closed form: the Wiener filter at noise level t; ``x_t`` (B, C, H, W)."""
        self.schedule.check_noisy(t)
        a = self.schedule.alpha_bar(t)
        mean, gain = self.mean.to(x_t), (math.sqrt(a) * self.variance / (a * self.variance + 1 - a)).to(x_t)
        centred = x_t - math.sqrt(a) * mean
        if self.spectrum is not None:
            return mean + torch.fft.irfft2(gain * torch.fft.rfft2(centred), s=x_t.shape[-2:])
        vectors = self.vectors.to(x_t)
        return mean + (centred.flatten(1) @ vectors * gain @ vectors.T).reshape(x_t.shape)


class GaussianMixturePrior(_ExactPrior):
    """The exact prior of a finite mixture of Gaussians with diagonal covariances.

    With ``std=0`` it is the empirical distribution of its means, and its diffused density a kernel density estimate.

    Parameters
    ----------
    means : Tensor, shape (M, C, H, W)
        Of the components, as diffusion variables. A point in the plane is ``(2, 1, 1)``.
    std : float or Tensor
        Standard deviations within the components, at least 0: anything that broadcasts with ``means``, such as
        (M, 1, 1, 1) for one of each component.
    weights : Tensor, shape (M,), optional
        At least 0; divided by their sum. Default: all equal.
    latent : {"image", "kernel", "tilt"}, optional
        What it is a prior of, which decides the physical map; default: the variable is its own physical quantity.
    schedule : NoiseSchedule, optional
        Default: the linear one.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, or a weight or standard deviation is negative.
    """

    def __init__(
        self,
        means: Tensor,
        std: float | Tensor = 0.0,
        *,
        weights: Tensor | None = None,
        latent: str | None = None,
        schedule: NoiseSchedule | None = None,
    ) -> None:
        if means.ndim != 4 or 0 in means.shape:
            raise ValueError(f"means: expected shape (M, C, H, W), got {tuple(means.shape)}")
        if not bool(torch.isfinite(means).all()):
            raise ValueError(f"means: has {int((~torch.isfinite(means)).sum())} values that are NaN or infinite")
        m = means.shape[0]
        weights = torch.ones(m) if weights is None else weights
        if weights.shape != (m,) or not bool((weights >= 0).all()) or not 0 < float(weights.sum()) < math.inf:
            raise ValueError(f"weights: expected {m} numbers, at least 0 and not all 0, got {weights.tolist()}")
        std = torch.as_tensor(std).to(means)
        try:
            std.expand_as(means)
        except RuntimeError:
            raise ValueError(f"std: {tuple(std.shape)} does not broadcast to {tuple(means.shape)}") from None
        if not bool(((std >= 0) & std.isfinite()).all()):
            raise ValueError("std: expected numbers that are finite and at least 0")
        super().__init__(tuple(means.shape[1:]), latent, means.device, schedule)
        # Distances are differences of large numbers, divided by a small variance: double precision throughout.
        self.means = means.double().flatten(1)
        std = std.double().reshape(*[1] * (4 - std.ndim), *std.shape)
        # One number for a whole component, the usual case, is not written out for all of its pixels.
        self.variance = std.expand(m, *(std.shape[1:] if std[0].numel() == 1 else self.shape)).square().flatten(1)
        self.log_weights = (weights / weights.sum()).to(self.means).log()

    def denoise(self, x_t: Tensor, t: int) -> Tensor:
        """E[x_0 | x_t]: the components' posterior means, weighted with their posterior probabilities.

        ``x_t`` (B, C, H, W). Differentiable in ``x_t``.
        """
        share, a = self._log_joint(x_t, t).softmax(1), self.schedule.alpha_bar(t)
        precision = 1 / (a * self.variance + 1 - a)
        gain = math.sqrt(a) * self.variance * precision
        x0 = share @ ((1 - a) * precision * self.means) + share @ gain * x_t.double().flatten(1)
        return x0.to(x_t.dtype).reshape(x_t.shape)

    def log_density(self, x_t: Tensor, t: int) -> Tensor:
        """log p(x_t), in nats: (B,), double precision; ``x_t`` (B, C, H, W). Differentiable in ``x_t``."""
        return self._log_joint(x_t, t).logsumexp(1)

    def _log_joint(self, x_t: Tensor, t: int) -> Tensor:
        """log of weight times density of ``x_t`` for each component, (B, M)."""
        self.schedule.check_noisy(t)
        a = self.schedule.alpha_bar(t)
        if x_t.shape[1:] != self.shape:
            raise ValueError(f"x_t: expected shape (B, {', '.join(map(str, self.shape))}), got {tuple(x_t.shape)}")
        x, means = x_t.double().flatten(1), math.sqrt(a) * self.means
        precision = 1 / (a * self.variance + 1 - a)
        squares = x.square() if precision.shape[1] > 1 else x.square().sum(1, keepdim=True)
        distance = squares @ precision.T - 2 * x @ (precision * means).T + (precision * means.square()).sum(1)
        normaliser = (precision / (2 * math.pi)).log().mean(1) * x.shape[1]
        return self.log_weights + (normaliser - distance) / 2


class EmpiricalPrior(GaussianMixturePrior):
    """The exact prior of a finite data set: each of its examples, and nothing else, is possible.

    The diffused density is the kernel density estimate of the data with a Gaussian window of the noise's width, and the
    posterior mean the average of all examples, weighted with how well they explain ``x_t``. What an unlimited network
    would learn from these data; hence what a useful one must not learn.

    Parameters
    ----------
    dataset : Tensor, shape (M, C, H, W)
        Examples as diffusion variables: images in [-1, 1], kernels by :func:`kernel_to_latent`.
    latent, schedule
        As of :class:`GaussianMixturePrior`, and so are the errors.
    """

    def __init__(self, dataset: Tensor, *, latent: str | None = None, schedule: NoiseSchedule | None = None) -> None:
        super().__init__(dataset, latent=latent, schedule=schedule)


class UniformPrior(_ExactPrior):
    """A flat prior: no diffusion, the latent follows the measurement alone (the ablation of BlindDPS, section 4.3).

    It starts at a flat kernel (or mid grey) plus a little noise and is changed by the guidance only.

    Parameters
    ----------
    latent : {"image", "kernel", "tilt"}
    size : int, optional
        Height and width of the latent; default: as the operator needs.
    scale : float
        Of a tilt, as of :class:`DiffusionPrior`.
    device : str or torch.device
        Of the measurement that it is used with.

    Raises
    ------
    ValueError
        If the latent is unknown, the size no positive integer, or the scale does not fit it.
    """

    def __init__(
        self, latent: str, size: int | None = None, *, scale: float = 1.0, device: str | torch.device = "cpu"
    ) -> None:
        check_counts(size=size, optional=True)
        super().__init__((_channels(latent), size, size), latent, device)
        self.scale, self.physical = scale, _physical(latent, scale)

    def start(self, noise: Tensor) -> Tensor:
        """A flat kernel or mid grey with a little noise, (B, C, H, W)."""
        return 0.1 * noise

    def denoise(self, x_t: Tensor, t: int) -> Tensor:
        """A flat density has no score: the posterior mean is the variable itself, clipped to [-1, 1]."""
        return x_t.clamp(-1, 1)

    def step(self, x_t: Tensor, x0: Tensor, t: int, t_prev: int, noise: Tensor, extra: None = None) -> Tensor:
        """No diffusion: ``x0`` (B, C, H, W) itself, clipped to [-1, 1]."""
        return x0.clamp(-1, 1)


class Frames:
    """A prior of ``frames`` independent latents of one kind, such as the tilts of as many frames.

    Its latents are (B, frames, C, H, W), and so is all that its methods take and give.

    Parameters
    ----------
    prior : Prior
        Of each.
    frames : int
    centred : bool
        Take their mean to be zero: where the scene is unknown, a tilt that all frames have in common cannot be told
        from a scene that is bent, and so the scene is taken to be as the frames show it on average.

    Raises
    ------
    ValueError
        If ``frames`` is not positive, or is one and to be centred.
    """

    def __init__(self, prior: Prior, frames: int, *, centred: bool = False) -> None:
        if frames < (2 if centred else 1):
            raise ValueError(f"frames: expected a positive number, and two to be centred, got {frames}")
        self.prior, self.shape, self.centred = prior, (frames, *prior.shape), centred
        self.stride, self.schedule, self.scale = prior.stride, prior.schedule, prior.scale

    @property
    def device(self) -> torch.device:
        return self.prior.device

    def start(self, noise: Tensor) -> Tensor:
        """The latents before the first step, made of standard normal ``noise``."""
        return self._each(self.prior.start(noise.flatten(0, 1)))

    def denoise(self, x_t: Tensor, t: int) -> Tensor:
        """Posterior mean of each frame's latent."""
        return self._each(self.prior.denoise(x_t.flatten(0, 1), t))

    def estimate(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        """The posterior mean, and what :meth:`step` wants of the same evaluation, (B frames, ...) or None."""
        x0, extra = self.prior.estimate(x_t.flatten(0, 1), t)
        return self._each(x0), extra

    def step(self, x_t: Tensor, x0: Tensor, t: int, t_prev: int, noise: Tensor, extra: Tensor | None = None) -> Tensor:
        """One reverse step of each; ``extra`` as :meth:`estimate` gave it."""
        x_t, x0, noise = (value.flatten(0, 1) for value in (x_t, x0, noise))
        return self._each(self.prior.step(x_t, x0, t, t_prev, noise, extra))

    def physical(self, x0: Tensor) -> Tensor:
        """The physical latents, less their mean over the frames if they are to be centred."""
        physical = self._each(self.prior.physical(x0.flatten(0, 1)))
        return physical - physical.mean(1, keepdim=True) if self.centred else physical

    def _each(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.shape[0]))


def load_prior(name_or_path: str | Path, *, device: str | torch.device = "cpu") -> DiffusionPrior:
    """Load a shipped prior by name, or any by path.

    Parameters
    ----------
    name_or_path : str or Path
        ``"image"``, ``"text"`` (an image prior of print and drawings), ``"kernel"`` or ``"tilt"``, which ship with the
        package; or a file: one that :meth:`DiffusionPrior.save` or training wrote, or a published checkpoint of
        BlindDPS / DPS (``ffhq_10m.pt``, ``kernel.pt``, ``tilt.pt``; the kind is told from its keys and shapes).
        Nothing in a file is executed: safetensors, or ``torch.load(weights_only=True)``.
    device : str or torch.device
        ``"auto"``: a GPU where there is one.

    Raises
    ------
    FileNotFoundError
        If there is no such name or file; the message says where published checkpoints are to be had.
    TypeError
        If it is neither a name nor a path.
    ValueError
        If the file is truncated, holds anything but tensors, or is not of this family of networks; if a weight is not
        finite, or there is no such device.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"name_or_path: expected a name or a path, got {type(name_or_path).__name__}")
    path = WEIGHTS / f"{name_or_path}.safetensors"
    if str(name_or_path) not in shipped_priors():
        path = Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(
            f"name_or_path: no file {str(name_or_path)!r}, and no shipped prior of that name (there are "
            f"{', '.join(shipped_priors())}). {PUBLISHED}"
        )
    try:
        about, state = read_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{error}. {PUBLISHED}") from None
    try:
        if about is None:
            net = UNet.from_state_dict(state)
            if net.in_channels not in LATENTS:
                raise ValueError(f"a net of {net.in_channels} input channels is no prior of image, kernel or tilt")
            latent = LATENTS[net.in_channels]
            prior = DiffusionPrior(net, latent, size=PUBLISHED_KERNEL if latent == "kernel" else None)
        else:
            net = UNet(**about["net"])
            net.load_state_dict({key: value.float() for key, value in state.items()})
            settings = {key: about[key] for key in ("prediction", "size", "scale") if key in about}
            prior = DiffusionPrior(net, about["latent"], **settings)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path}: not a checkpoint of this package or of the published family: {error}. {PUBLISHED}"
        ) from None
    return prior.to(device)


def shipped_priors() -> list[str]:
    """Names of the priors in the package's ``weights`` folder."""
    return sorted(p.stem for p in WEIGHTS.glob("*.safetensors") if p != KERNEL_DENOISER)


def pick_device(device: str | torch.device) -> torch.device:
    """``device``; for ``"auto"`` a GPU where there is one.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        found = torch.device(("cuda" if gpus else "cpu") if device == "auto" else device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or the like, got {device!r}") from None
    if found.type == "cuda" and (found.index or 0) >= gpus:
        raise ValueError(f"device: {device!r} is not there; torch finds {gpus} CUDA GPUs, take 'auto' or 'cpu'")
    return found


def write_checkpoint(path: str | Path, about: dict, state: dict[str, Tensor]) -> None:
    """Write tensors and metadata as safetensors, whole or not at all; :func:`read_checkpoint` reads them."""
    state = {key: value.cpu().contiguous() for key, value in state.items()}
    with whole(path) as part:
        part.write_bytes(to_bytes(state, metadata={"blindlib": json.dumps(about)}))


def read_checkpoint(path: Path) -> tuple[dict | None, dict[str, Tensor]]:
    """Metadata (if blindlib wrote the file) and state dict of a checkpoint, without running anything in it.

    Raises
    ------
    ValueError
        If the file is missing or truncated, or holds anything but tensors of finite numbers.
    """
    about = None
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as f:
                about = json.loads((f.metadata() or {}).get("blindlib") or "null")
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen kinds, none of which names the file
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path}: cannot be read as a checkpoint, it may be truncated or hold more than tensors ({reason})"
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors, got {type(state).__name__}")
    if broken := [key for key, value in state.items() if not bool(value.isfinite().all())]:
        raise ValueError(f"{path}: expected finite numbers, but {', '.join(map(str, broken)):.80} has NaN or infinity")
    return about, state
