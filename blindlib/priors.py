"""What a sampler needs to know of a latent: its prior.

A prior denoises (``denoise(x_t, t)`` is the posterior mean E[x_0 | x_t]), knows its noise schedule and shape, and
maps the diffusion variable, which lives in [-1, 1], to the physical one: an image to itself, a kernel to the simplex.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from blindlib.schedule import NoiseSchedule
from blindlib.unet import UNet

WEIGHTS = Path(__file__).parent / "weights"

CHANNELS = {"image": 3, "kernel": 1, "tilt": 2}

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


def tilt_to_physical(x0: Tensor) -> Tensor:
    """A tilt's diffusion variable is its displacement in pixels, as in the published prior."""
    return x0


PHYSICAL = {"image": image_to_physical, "kernel": kernel_to_physical, "tilt": tilt_to_physical}


class Prior(Protocol):
    """The interface that samplers use."""

    shape: tuple[int, int | None, int | None]
    """Channels, height, width; ``None`` where any size will do."""
    stride: int
    """Height and width must be multiples of it."""
    device: torch.device
    schedule: NoiseSchedule

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

    Raises
    ------
    ValueError
        If latent or prediction is unknown, or the net's channels do not fit the latent.
    """

    def __init__(
        self,
        net: UNet,
        latent: str,
        *,
        prediction: str = "noise",
        schedule: NoiseSchedule | None = None,
        size: int | None = None,
    ) -> None:
        if latent not in CHANNELS:
            raise ValueError(f"latent: expected one of {sorted(CHANNELS)}, got {latent!r}")
        if prediction not in ("noise", "v"):
            raise ValueError(f"prediction: expected 'noise' or 'v', got {prediction!r}")
        channels = CHANNELS[latent]
        if net.in_channels != channels or net.config["out_channels"] not in (channels, 2 * channels):
            raise ValueError(f"net: a prior of the {latent} has {channels} channels, the net {net.in_channels}")
        # Channels last is a fifth faster on CPUs, and no slower elsewhere.
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.latent, self.prediction = latent, prediction
        self.schedule = schedule or NoiseSchedule.linear()
        self.shape = (channels, size, size)
        self.stride = net.stride
        self.physical: Callable[[Tensor], Tensor] = PHYSICAL[latent]

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def to(self, device: str | torch.device) -> DiffusionPrior:
        """Move the network to ``device``, in place; returns the prior."""
        self.net.to(device)
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
        if extra is None:
            return self.schedule.ancestral_step(x_t, x0, t, t_prev, noise)
        low, high = self.schedule.log_variance_range(t, t_prev)
        share = (extra + 1) / 2
        return self.schedule.ancestral_step(x_t, x0, t, t_prev, noise, low + share * (high - low))

    def save(self, path: str | Path, note: str = "") -> None:
        """Write it as safetensors, weights in half precision, whole or not at all; :func:`load_prior` reads it."""
        about = dict(latent=self.latent, prediction=self.prediction, size=self.shape[1], net=self.net.config, note=note)
        path = Path(path)
        part = path.with_name(path.name + ".part")
        state = {key: value.detach().half().cpu().contiguous() for key, value in self.net.state_dict().items()}
        part.write_bytes(to_bytes(state, metadata={"blindlib": json.dumps(about)}))
        part.replace(path)


class GaussianPrior:
    """The exact prior of a stationary Gaussian field on a periodic grid, for tests and for theory.

    Parameters
    ----------
    spectrum : Tensor, shape (C, H, W // 2 + 1)
        Variance of each Fourier coefficient of ``torch.fft.rfft2(x, norm="ortho")``; symmetric as that of a real
        field is.
    mean : float
        Of every pixel.
    schedule : NoiseSchedule, optional
        Default: the linear one.
    """

    stride = 1

    def __init__(self, spectrum: Tensor, mean: float = 0.0, *, schedule: NoiseSchedule | None = None) -> None:
        self.spectrum, self.mean = spectrum, mean
        self.schedule = schedule or NoiseSchedule.linear()
        self.shape = (spectrum.shape[0], spectrum.shape[1], 2 * (spectrum.shape[2] - 1))
        self.device = spectrum.device

    def start(self, noise: Tensor) -> Tensor:
        return noise

    def denoise(self, x_t: Tensor, t: int) -> Tensor:
        """E[x_0 | x_t] in closed form: the Wiener filter at noise level t."""
        a = self.schedule.alpha_bar(t)
        gain = math.sqrt(a) * self.spectrum / (a * self.spectrum + 1 - a)
        centred = torch.fft.rfft2(x_t - math.sqrt(a) * self.mean)
        return self.mean + torch.fft.irfft2(gain * centred, s=x_t.shape[-2:])

    def estimate(self, x_t: Tensor, t: int) -> tuple[Tensor, None]:
        return self.denoise(x_t, t), None

    def step(self, x_t: Tensor, x0: Tensor, t: int, t_prev: int, noise: Tensor, extra: None = None) -> Tensor:
        return self.schedule.ancestral_step(x_t, x0, t, t_prev, noise)

    def physical(self, x0: Tensor) -> Tensor:
        return x0


class UniformPrior:
    """A flat prior: no diffusion, the latent follows the measurement alone (the ablation of BlindDPS, section 4.3).

    It starts at a flat kernel (or mid grey) plus a little noise and is changed by the guidance only.

    Parameters
    ----------
    latent : {"image", "kernel", "tilt"}
    size : int, optional
        Height and width of the latent; default: as the operator needs.
    """

    stride = 1

    def __init__(self, latent: str, size: int | None = None, *, device: str | torch.device = "cpu") -> None:
        if latent not in CHANNELS:
            raise ValueError(f"latent: expected one of {sorted(CHANNELS)}, got {latent!r}")
        self.latent, self.shape, self.device = latent, (CHANNELS[latent], size, size), torch.device(device)
        self.physical = PHYSICAL[latent]
        self.schedule = NoiseSchedule.linear()

    def start(self, noise: Tensor) -> Tensor:
        return 0.1 * noise

    def denoise(self, x_t: Tensor, t: int) -> Tensor:
        """A flat density has no score: the posterior mean is the variable itself, clipped to [-1, 1]."""
        return x_t.clamp(-1, 1)

    def estimate(self, x_t: Tensor, t: int) -> tuple[Tensor, None]:
        return self.denoise(x_t, t), None

    def step(self, x_t: Tensor, x0: Tensor, t: int, t_prev: int, noise: Tensor, extra: None = None) -> Tensor:
        return x_t.clamp(-1, 1)


def load_prior(name_or_path: str | Path, *, device: str | torch.device = "cpu") -> DiffusionPrior:
    """Load a shipped prior by name, or any by path.

    Parameters
    ----------
    name_or_path : str or Path
        ``"image"`` or ``"kernel"``, which ship with the package; or a file: one that :meth:`DiffusionPrior.save` or
        training wrote, or a published checkpoint of BlindDPS / DPS (``ffhq_10m.pt``, ``kernel.pt``, ``tilt.pt``; the
        kind is told from its keys and shapes). Nothing in a file is executed: safetensors, or
        ``torch.load(weights_only=True)``.
    device : str or torch.device

    Raises
    ------
    FileNotFoundError
        If there is no such name or file; the message says where published checkpoints are to be had.
    ValueError
        If the file is truncated, holds anything but tensors, or is not of this family of networks.
    """
    path = WEIGHTS / f"{name_or_path}.safetensors"
    if str(name_or_path) not in shipped_priors():
        path = Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(
            f"name_or_path: no file {str(name_or_path)!r}, and no shipped prior of that name (there are "
            f"{', '.join(shipped_priors())}). The published checkpoints (ffhq_10m.pt, kernel.pt, tilt.pt) are linked "
            "from https://github.com/BlindDPS/blind-dps; download one and give its path."
        )
    about, state = read_checkpoint(path)
    try:
        if about is None:
            net = UNet.from_state_dict(state)
            kinds = {channels: latent for latent, channels in CHANNELS.items()}
            if net.in_channels not in kinds:
                raise ValueError(f"a net of {net.in_channels} input channels is no prior of image, kernel or tilt")
            latent = kinds[net.in_channels]
            prior = DiffusionPrior(net, latent, size=PUBLISHED_KERNEL if latent == "kernel" else None)
        else:
            net = UNet(**about["net"])
            net.load_state_dict({key: value.float() for key, value in state.items()})
            prior = DiffusionPrior(net, about["latent"], prediction=about["prediction"], size=about["size"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a checkpoint of this package or of the published family: {error}") from None
    return prior.to(device)


def shipped_priors() -> list[str]:
    """Names of the priors in the package's ``weights`` folder."""
    return sorted(p.stem for p in WEIGHTS.glob("*.safetensors"))


def read_checkpoint(path: Path) -> tuple[dict | None, dict[str, Tensor]]:
    """Metadata (if blindlib wrote the file) and state dict of a checkpoint, without running anything in it."""
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as f:
                about = (f.metadata() or {}).get("blindlib")
            return (json.loads(about) if about else None), load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen kinds, none of which names the file
        raise ValueError(
            f"{path}: cannot be read as a checkpoint, it may be truncated or hold more than tensors ({error})"
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors, got {type(state).__name__}")
    return None, state
