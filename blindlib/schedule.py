"""The variance-preserving noise schedule and the reverse steps that follow from it.

Notation of DDPM (arXiv 2006.11239): ``x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps``, t = 0 .. T-1, and
``alpha_bar_{-1} = 1`` for the clean signal. Every step is written between *any* two times t > t_prev, so sampling
with fewer steps is nothing but a shorter list of timesteps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blindlib.checks import is_integer


class NoiseSchedule:
    """A variance-preserving schedule, given by its ``betas``.

    Parameters
    ----------
    betas : Tensor, shape (T,)
        Variance added at each step, each in (0, 1). :meth:`linear` and :meth:`cosine` make the usual ones.

    Attributes
    ----------
    betas, alpha_bars : Tensor, shape (T,), float64

    Raises
    ------
    ValueError
        If ``betas`` is not one-dimensional or leaves (0, 1).
    """

    def __init__(self, betas: Tensor) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas: expected a 1-D tensor of values in (0, 1), got shape {tuple(betas.shape)}")
        self.betas = betas
        self.alpha_bars = torch.cumprod(1 - betas, dim=0)
        self._sigmas = (1 / self.alpha_bars - 1).sqrt()

    @classmethod
    def linear(cls, steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> NoiseSchedule:
        """The schedule of DDPM, and of every published prior used here."""
        return cls(torch.linspace(start, end, steps, dtype=torch.float64))

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """The cosine schedule of Nichol & Dhariwal (arXiv 2102.09672, eq. 17)."""
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
        return cls((1 - f[1:] / f[:-1]).clamp(max=max_beta))

    def __len__(self) -> int:
        return len(self.betas)

    def timesteps(self, steps: int, spacing: str = "half-log", *, first: int | None = None) -> list[int]:
        """``steps`` times from high noise to low, the last of them 0; a single one is the highest, or 0 if "leading".

        Parameters
        ----------
        steps : int
            1 .. T.
        spacing : {"half-log", "linspace", "leading"}
            ``"half-log"``: both ends, halfway between even in time and even in log sigma, as far as whole numbers
            allow. Even times leave few steps for the last octaves of noise, where details and a kernel's bright spots
            settle. ``"linspace"``: even, both ends (published samplers). ``"leading"``: every ((first + 1) // steps)-th
            from 0 (DDIM, arXiv 2010.02502).
        first : int, optional
            The highest time, default T - 1: for a run that starts below. ``"leading"`` may not reach it.

        Raises
        ------
        ValueError
            If ``first`` is not in 0 .. T - 1, ``steps`` not in 1 .. first + 1, or the spacing is unknown.
        """
        last = len(self) - 1 if first is None else first
        if not is_integer(last) or not 0 <= last < len(self):
            raise ValueError(f"first: expected an integer from 0 to {len(self) - 1}, got {first!r}")
        if not is_integer(steps) or not 1 <= steps <= last + 1:
            raise ValueError(f"steps: expected an integer from 1 to {last + 1}, got {steps!r}")
        last, steps = int(last), int(steps)  # numpy's would make numpy's times
        if spacing not in ("half-log", "linspace", "leading"):
            raise ValueError(f"spacing: expected 'half-log', 'linspace' or 'leading', got {spacing!r}")
        if spacing == "leading":
            times = [i * ((last + 1) // steps) for i in range(steps)]
        elif steps == 1:
            times = [last]
        elif spacing == "linspace":
            times = [round(i * last / (steps - 1)) for i in range(steps)]
        else:
            octaves = (1 / self.alpha_bars[: last + 1] - 1).log()
            place = torch.arange(last + 1) / last + (octaves - octaves[0]) / (octaves[-1] - octaves[0])
            times = []
            for i in range(steps):
                nearest = int((place - 2 * i / (steps - 1)).abs().argmin())
                # No time twice, and one left for each step to come.
                times.append(min(max(nearest, i and times[-1] + 1), last - (steps - 1 - i)))
        return times[::-1]

    def check_noisy(self, t: int) -> None:
        """ValueError if there is nothing to denoise at ``t``: of -1, the clean signal, only steps know."""
        if not hasattr(t, "__index__") or not 0 <= t < len(self):
            raise ValueError(f"t: expected an integer from 0 to {len(self) - 1}, got {t!r}")

    def alpha_bar(self, t: int) -> float:
        """alpha_bar at time ``t``; 1 at ``t = -1``, the clean signal."""
        return float(self.alpha_bars[t]) if t >= 0 else 1.0

    def sigma(self, t: int) -> float:
        """Noise-to-signal ratio sqrt((1 - alpha_bar) / alpha_bar): the noise level once x_t is scaled back to x_0."""
        a = self.alpha_bar(t)
        return math.sqrt(1 / a - 1)

    def time(self, sigma: float) -> int:
        """The time whose :meth:`sigma` lies nearest."""
        return int((self._sigmas - sigma).abs().argmin())

    def diffuse(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of ``x0`` (B, ...) at the times ``t`` (B,) with standard normal ``noise`` (DDPM eq. 4)."""
        a = self.alpha_bars.to(t.device)[t].reshape(-1, *[1] * (x0.ndim - 1))
        return a.sqrt().to(x0) * x0 + (1 - a).sqrt().to(x0) * noise

    def posterior_variance(self, t: int, t_prev: int) -> float:
        """Variance of x_{t_prev} given x_t and x_0 (DDPM eq. 7); 0 at ``t_prev = -1``."""
        a, a_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
        return (1 - a_prev) / (1 - a) * (1 - a / a_prev)

    def posterior_coefficients(self, t: int, t_prev: int) -> tuple[float, float]:
        """Weights of x_0 and of x_t in the mean of x_{t_prev} given both (DDPM eq. 7)."""
        a, a_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
        alpha = a / a_prev
        return math.sqrt(a_prev) * (1 - alpha) / (1 - a), math.sqrt(alpha) * (1 - a_prev) / (1 - a)

    def log_variance_range(self, t: int, t_prev: int) -> tuple[float, float]:
        """Bounds between which a learned variance interpolates: log posterior variance and log beta (arXiv 2102.09672).

        For ``t_prev >= 0``: the last step is without noise, and its posterior variance zero.
        """
        beta = 1 - self.alpha_bar(t) / self.alpha_bar(t_prev)
        return math.log(self.posterior_variance(t, t_prev)), math.log(beta)

    def ancestral_step(
        self, x_t: Tensor, x0: Tensor, t: int, t_prev: int, noise: Tensor, log_variance: Tensor | None = None
    ) -> Tensor:
        """Draw x_{t_prev} given x_t and the estimate ``x0`` (DDPM algorithm 2); no noise in the last step.

        ``log_variance`` (same shape as ``x_t``) replaces the posterior variance, for nets that learned it.
        """
        c0, ct = self.posterior_coefficients(t, t_prev)
        mean = c0 * x0 + ct * x_t
        if t_prev < 0:
            return mean
        if log_variance is None:
            return mean + math.sqrt(self.posterior_variance(t, t_prev)) * noise
        return mean + torch.exp(0.5 * log_variance) * noise

    def ddim_step(self, x_t: Tensor, x0: Tensor, t: int, t_prev: int, noise: Tensor, eta: float = 0.0) -> Tensor:
        """Step of DDIM (arXiv 2010.02502, eq. 12): deterministic at ``eta = 0``, ancestral at ``eta = 1``."""
        a, a_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
        std = eta * math.sqrt(self.posterior_variance(t, t_prev))
        eps = (x_t - math.sqrt(a) * x0) / math.sqrt(1 - a)
        return math.sqrt(a_prev) * x0 + math.sqrt(max(1 - a_prev - std**2, 0)) * eps + std * noise
