"""Posterior sampling of any number of latents in parallel, tied together by one measurement.

:func:`sample` is the loop; what happens in one step is a *guidance*: :class:`DPS` is BlindDPS when two latents or
more are unknown and DPS when only the image is; :class:`DiffPIR` replaces the gradient by a proximal solve and needs
the operator known. Where one estimate is wanted rather than samples, :func:`dpir` finds it without noise of its own.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm

from blindlib.checks import (
    check_counts,
    check_mapping,
    check_noise,
    check_not_negative,
    check_positive,
    check_priors,
    is_integer,
    is_number,
)
from blindlib.priors import Prior
from blindlib.schedule import NoiseSchedule

Latents = dict[str, Tensor]


# Root mean square of a latent in a run that has diverged: diffusion variables lie in [-1, 1], noise has variance 1.
LARGEST = 10.0

# Of DPS, for 300 steps and more; `DPS.respaced` adapts them to fewer.
STEP_SIZE = {"image": 20 / 3, "kernel": 20 / 3, "tilt": 10 / 3}
LEAD = 2.0


@dataclass(frozen=True)
class DPS:
    """Guidance by the gradient of the residual's norm: DPS (arXiv 2209.14687), BlindDPS (arXiv 2211.10656, alg. 1).

    The defaults worked best in short trials with the shipped priors and a noise_std of 0.02. A step is as long whatever
    the noise, and more of it wants a smaller ``step_size``. :meth:`paper` and :meth:`released` are the choices of the
    publication and of its code.

    Parameters
    ----------
    step_size : float or mapping of latent name to float
        alpha in the paper; 1 for a name that the mapping lacks.
    growing : bool
        Multiply the step size by sqrt(alpha_bar_t): small steps while the estimates are coarse.
    settling : collection of str
        Latents whose step size is multiplied by sqrt(1 - alpha_bar_t) too: the gradient of a norm keeps its length
        however small the residual is, and without it the end of the run shakes.
    edges : collection of str
        Latents that follow the residual's finite differences instead of its pixels. The spectrum of images falls as
        1/f, so pixels tell a kernel's low frequencies loudly and its fine ones hardly; differences tell all alike
        (which is why blind deconvolution has long worked on them: Levin et al., CVPR 2009).
    lead : mapping of latent name to float
        How many times less noise a latent has than the others at any time, so that it settles before them. All the
        pixels of an image speak for the few of its kernel: with equal noise the image takes shape first, with a kernel
        that is still a blot (noise has to be scaled with the number of pixels: arXiv 2301.11093, section 3.1).
    sparsity : mapping of latent name to float
        Weight lambda of the l1 norm of a latent, scaled to [0, 1]: for a kernel that is the kernel with peak 1,
        *before* it is divided by its sum (afterwards its l1 norm is 1, whatever the kernel, and has no gradient).
    solved : collection of str
        Latents that take no step along a gradient: their posterior mean is pulled to the measurement by the operator's
        ``solve`` (the image) or ``solve_<name>``, and no derivative of their network is needed. For where one step
        size cannot fit, such as a tilt: strong gradients at edges, none where the image is flat.
    caution : mapping of latent name to float
        Weight of the prior's mean against the measurement in that pull, 1 if not given. More is for an operator that
        is still wrong.
    release : mapping of latent name to float
        Noise level of the latent above which it is not pulled, and keeps to its prior: a tilt can be seen once
        the image has edges, and before that it would only fit the image's faults.

    Raises
    ------
    TypeError, ValueError
        If what should be a mapping is none, or a number is negative, not finite, or for ``lead`` 0. Names that are not
        among the unknowns are none's fault: the defaults are for all that a latent may be.
    """

    step_size: float | Mapping[str, float] = field(default_factory=lambda: dict(STEP_SIZE))
    growing: bool = True
    settling: Collection[str] = ("kernel",)
    edges: Collection[str] = ("kernel",)
    lead: Mapping[str, float] = field(default_factory=lambda: {"kernel": LEAD})
    sparsity: Mapping[str, float] = field(default_factory=dict)
    solved: Collection[str] = ()
    caution: Mapping[str, float] = field(default_factory=dict)
    release: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = {name: getattr(self, name) for name in ("lead", "sparsity", "caution", "release")}
        check_mapping(**named)
        check_positive(**{f"lead[{latent!r}]": number for latent, number in named.pop("lead").items()})
        # Above infinity there is no noise: that one is pulled from the start.
        named["release"] = {latent: level for latent, level in self.release.items() if level != math.inf}
        if isinstance(self.step_size, Mapping):
            named["step_size"] = self.step_size
        else:
            check_not_negative(step_size=self.step_size)
        for name, numbers in named.items():
            check_not_negative(**{f"{name}[{latent!r}]": number for latent, number in numbers.items()})

    @classmethod
    def paper(cls, **changes: object) -> DPS:
        """The paper's choice: a constant step size of 0.3 for every latent."""
        return cls(**{"step_size": 0.3, "growing": False, "settling": (), "edges": (), "lead": {}, **changes})

    @classmethod
    def released(cls, **changes: object) -> DPS:
        """The released code's choice: sqrt(alpha_bar_t) for every latent."""
        return cls(**{"step_size": 1.0, "settling": (), "edges": (), "lead": {}, **changes})

    @classmethod
    def turbulence(cls, **changes: object) -> DPS:
        """For :class:`blindlib.Turbulence`: image and tilt are solved for, the kernel follows its gradient."""
        return cls(**{"solved": ("image", "tilt"), "caution": {"image": 2.0}, "release": {"tilt": 0.3}, **changes})

    def respaced(self, steps: int, side: float = 64) -> DPS:
        """The same guidance for ``steps`` steps instead of 1000 and measurements of ``side`` x ``side`` pixels.

        A step size that is one number for all latents, as in the publications, grows by 1000 / steps, at most fivefold:
        fewer steps are to cover the same way, but with longer ones the first would overshoot. Sizes by name, as the
        defaults, are as long as a step may be at any number of steps; those of fewer than 300 have to be longer still,
        by 300 / steps and at most by half. The image's grows with the side too, the others' shrink: the gradient of a
        norm over N pixels is 1 / sqrt(N) at each pixel of the image, and sqrt(N) at a latent that all pixels share.
        """
        check_counts(steps=steps)
        check_positive(side=side)
        if isinstance(self.step_size, Mapping):
            gain, wide = min(max(300 / steps, 1), 1.5), side / 64
            size = {name: gain * s * (wide if name == "image" else 1 / wide) for name, s in self.step_size.items()}
        else:
            size = min(1000 / steps, 5) * self.step_size
        return replace(self, step_size=size)

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
        """One step of all latents from ``t`` to ``t_prev``.

        Returns the new latents, the posterior means x0_hat (as diffusion variables), and the residual's norm (B,).
        """
        times = {name: (self.time(name, t, priors[name]), self.time(name, t_prev, priors[name])) for name in x}
        led = [name for name in x if name not in self.solved]
        x = {name: value.detach().requires_grad_(name in led) for name, value in x.items()}
        with torch.enable_grad():
            estimates = {name: priors[name].estimate(x[name], times[name][0]) for name in x}
            x0 = {name: mean for name, (mean, _) in estimates.items()}
            physical = {name: priors[name].physical(mean) for name, mean in x0.items()}

            def residual(moved: list[str]) -> Tensor:
                return y - operator(**{name: v if name in moved else v.detach() for name, v in physical.items()})

            r = residual([name for name in led if name not in self.edges])
            objective = _norms(r).sum()
            if moved := [name for name in led if name in self.edges]:
                objective = objective + _norms(_differences(residual(moved))).sum()
            for name, weight in self.sparsity.items():
                if name not in x0:
                    raise ValueError(f"sparsity: of {name!r}, but the unknowns are {', '.join(x0)}")
                objective = objective + weight * ((x0[name] + 1) / 2).abs().sum()
            gradient = torch.autograd.grad(objective, [x[name] for name in led]) if led else ()

            physical = {name: value.detach() for name, value in physical.items()}
            for name in reversed([name for name in x if name in self.solved]):
                x0[name] = self.pulled(name, x0[name].detach(), physical, times[name][0], y, operator, priors[name])
                physical[name] = priors[name].physical(x0[name])

        new = {}
        with torch.no_grad():
            for name, mean in x0.items():
                now, then = times[name]
                extra = estimates[name][1]
                # Times are whole numbers: two of the run's can be one of a latent that leads.
                new[name] = priors[name].step(x[name], mean, now, then, noise[name], extra) if then < now else x[name]
            for name, g in zip(led, gradient, strict=True):
                # What all frames share follows their mean, what is a frame's own that frame alone.
                share = x[name].shape[1:-3].numel() / y.shape[1:-3].numel()
                new[name] = new[name] - share * self.scale(name, t, priors[name]) * g
        return new, {name: mean.detach() for name, mean in x0.items()}, r.detach().flatten(1).norm(dim=1)

    @torch.no_grad()
    def pulled(
        self, name: str, x0: Tensor, physical: Latents, t: int, y: Tensor, operator: Callable, prior: Prior
    ) -> Tensor:
        """The posterior mean ``x0`` of latent ``name``, pulled to the measurement by the operator's own solve."""
        a = prior.schedule.alpha_bar(t)
        if prior.schedule.sigma(t) > self.release.get(name, math.inf):
            return x0
        (whole, known), method = _parts(operator), "solve" if name == "image" else f"solve_{name}"
        if not hasattr(whole, method):
            raise TypeError(f"operator: to pull the {name} it needs a method {method}, which {whole!r} has not")
        # As in PiGDM: x_0 is normal around its mean, with this variance (of at most one physical unit). What is left of
        # y is not noise alone: early on most of it is the other latents' fault, and this one must not take it on.
        variance = 1 / (1 + a / (1 - a) / prior.scale**2)
        rest = (y - operator(**physical)).square().mean((-3, -2, -1), keepdim=True)
        if name == "image":
            rest = rest.flatten(1).mean(1)[:, None, None, None]
        latents = {**known, **physical}
        moved = getattr(whole, method)(y=y, weight=self.caution.get(name, 1.0) * rest / variance, **latents)
        return (x0 + (moved - physical[name]) / prior.scale).clamp(-1, 1)

    def time(self, name: str, t: int, prior: Prior) -> int:
        """Time of latent ``name`` in its own diffusion when the run is at ``t``."""
        lead = self.lead.get(name, 1.0)
        return t if lead == 1 or t < 0 else prior.schedule.time(prior.schedule.sigma(t) / lead)

    def scale(self, name: str, t: int, prior: Prior) -> float:
        """Step size of latent ``name`` at time ``t``."""
        size = self.step_size.get(name, 1.0) if isinstance(self.step_size, Mapping) else self.step_size
        a = prior.schedule.alpha_bar(t)
        return size * (math.sqrt(a) if self.growing else 1) * (math.sqrt(1 - a) if name in self.settling else 1)


def _differences(r: Tensor) -> Tensor:
    """Finite differences of ``r`` (B, ..., C, H, W) along both axes, (B, ..., N, 1, 1)."""
    return torch.cat([r.diff(dim=-1).flatten(-3), r.diff(dim=-2).flatten(-3)], dim=-1)[..., None, None]


def _norms(r: Tensor) -> Tensor:
    """One norm for each frame: (B, ...) of ``r`` (B, ..., C, H, W)."""
    return r.flatten(-3).norm(dim=-1)


@dataclass(frozen=True)
class DiffPIR:
    """Guidance by the proximal map of the data term: DiffPIR (arXiv 2305.08995, alg. 1), for a known linear operator.

    No gradient passes through the network, and the operator's ``solve`` does the rest: 20 to 100 steps suffice.

    Parameters
    ----------
    noise_std : float
        Of the measurement, on the [-1, 1] scale.
    strength : float
        lambda in the paper: weight of the prior against the data.
    eta : float
        zeta in the paper: share of fresh noise in each step, 1 for posterior samples; 0 is deterministic.
    """

    noise_std: float
    strength: float = 3.0
    eta: float = 1.0

    def __post_init__(self) -> None:
        check_noise(self.noise_std)
        check_positive(strength=self.strength)
        if not is_number(self.eta) or not 0 <= self.eta <= 1:
            raise ValueError(f"eta: expected a number in [0, 1], got {self.eta!r}")

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
        """One step of the image from ``t`` to ``t_prev``; returns as :meth:`DPS.__call__`."""
        name, x_t = _only(x)
        prior = priors[name]
        schedule = prior.schedule
        x0, _ = prior.estimate(x_t, t)
        weight = self.strength * (max(self.noise_std, 1e-3) / schedule.sigma(t)) ** 2
        x0 = solve(operator, y, x0, weight)
        norm = (y - operator(**{name: x0})).flatten(1).norm(dim=1)
        a, a_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        eps = (x_t - math.sqrt(a) * x0) / math.sqrt(1 - a)
        eps = math.sqrt(1 - self.eta) * eps + math.sqrt(self.eta) * noise[name]
        return {name: math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev) * eps}, {name: x0}, norm


@dataclass(frozen=True)
class PiGDM:
    """Pseudo-inverse guidance (PiGDM, Song et al., ICLR 2023), for a known linear operator.

    Given x_t the image is taken to be normal around x0_hat with variance r_t^2, so that the measurement moves its mean
    by ``J^T A^T (r_t^2 A A^T + noise_std^2)^-1 (y - A x0_hat)``, J being the Jacobian of x0_hat: exact where the prior
    is white and normal. The pseudo-inverse comes from the operator's ``solve``.

    Parameters
    ----------
    noise_std : float
        Of the measurement, on the [-1, 1] scale.
    data_std : float
        Standard deviation of clean images, 1 in the paper; r_t^2 = (1 / data_std^2 + alpha_bar / (1 - alpha_bar))^-1.
    """

    noise_std: float
    data_std: float = 1.0

    def __post_init__(self) -> None:
        check_noise(self.noise_std)
        check_positive(data_std=self.data_std)

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
        """One step of the image from ``t`` to ``t_prev``; returns as :meth:`DPS.__call__`."""
        name, x_t = _only(x)
        prior = priors[name]
        a = prior.schedule.alpha_bar(t)
        variance = 1 / (self.data_std**-2 + a / (1 - a))
        x_t = x_t.detach().requires_grad_(True)
        with torch.enable_grad():
            x0, extra = prior.estimate(x_t, t)
            mean = x0.detach()
            pull = (solve(operator, y, mean, max(self.noise_std, 1e-3) ** 2 / variance) - mean) / variance
            # (1 - alpha_bar) / sqrt(alpha_bar) J is the covariance of x_0 given x_t (Tweedie's second moment).
            moved = mean + (1 - a) / math.sqrt(a) * torch.autograd.grad(x0, x_t, pull)[0]
        moved = prior.physical(moved)
        norm = (y - operator(**{name: moved})).flatten(1).norm(dim=1)
        extra = None if extra is None else extra.detach()
        new = prior.step(x_t.detach(), moved, t, t_prev, noise[name], extra)
        return {name: new}, {name: moved}, norm


def solve(operator: Callable, y: Tensor, image: Tensor, weight: float) -> Tensor:
    """The proximal map of ``operator``, or of ``partial(operator, kernel=...)``, at ``image``."""
    whole, known = _parts(operator)
    if not hasattr(whole, "solve"):
        raise TypeError(f"operator: this guidance needs an operator with a solve method, {whole!r} has none")
    return whole.solve(y, image=image, weight=weight, **known)


@torch.no_grad()
def dpir(
    y: Tensor,
    operator: Callable[..., Tensor],
    prior: Prior,
    noise_std: float,
    *,
    steps: int = 8,
    strength: float = 0.23,
    first: float = 98 / 255,
    last: float = 0.4,
) -> Tensor:
    """Undo a known linear operator by plug and play: DPIR (arXiv 2008.13751), with a diffusion prior as the denoiser.

    Half-quadratic splitting of ``|y - A x|^2 / (2 noise_std^2) + lambda R(x)``: in turns the proximal map of the first
    term and a denoiser in place of the second's, whose noise level falls evenly in log. No noise is drawn, so that the
    result is one estimate and no posterior sample. That is also why it is no guidance of :func:`sample`, whose runs
    start from noise, at other levels.

    Parameters
    ----------
    y : Tensor, shape (B, C, h, w)
        Measurements, about [-1, 1] plus noise.
    operator : callable
        As of :func:`sample`, all but the image fixed, with a ``solve``.
    prior : Prior
        Of images.
    noise_std : float
        Of ``y``, on the [-1, 1] scale.
    steps : int
        Network evaluations; the paper takes 8 for blur and 24 for super-resolution, where with the shipped prior 8 do
        as well.
    strength : float
        lambda: weight of the prior. With less than the paper's 0.23, noise that the data step amplified remains.
    first : float
        The highest noise level, of which the first estimate is free; the paper's 49 / 255 of the range [0, 1].
    last : float
        The lowest, in units of ``noise_std``, but no less than 2.55 / 255 of the range [0, 1]. The paper's is 1, though
        the data step has left less noise than that: at 20 / 255 it costs 0.9 dB, at 5 / 255 0.1.

    Returns
    -------
    Tensor, shape (B, C, H, W)

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; the message names it, says what came and what is expected.
    ArithmeticError
        If the estimate is no number, as with an operator that amplifies beyond measure.

    Examples
    --------
    >>> sharp = dpir(y, partial(Blur(), kernel=k), load_prior("image"), 0.02)  # doctest: +SKIP
    """
    shapes, schedule = _check(y, operator, {"image": prior}, 1)
    check_counts(steps=steps)
    check_positive(strength=strength, first=first, last=last)
    check_noise(noise_std)
    least = min(max(last * noise_std, 5.1 / 255), first)
    levels = torch.logspace(math.log10(first), math.log10(least), steps, dtype=torch.float64)

    # z_0: at each pixel the mean of the measurements that see it, by their share (the paper's y, or y interpolated).
    nothing = y.new_zeros(len(y), *shapes["image"])
    _check_output(operator, {"image": nothing}, y)
    back, of_ones = (
        torch.autograd.functional.vjp(lambda image: operator(image=image), nothing, v)[1]
        for v in (y, torch.ones_like(y))
    )
    z = back / of_ones.clamp(min=1e-3)
    for t in (schedule.time(float(level)) for level in levels):
        x = solve(operator, y, z, strength * (max(noise_std, 1e-3) / schedule.sigma(t)) ** 2)  # alg. 1: alpha_k
        z = prior.denoise(math.sqrt(schedule.alpha_bar(t)) * x, t)  # x taken for x_t with noise of sigma_k
    if not bool(torch.isfinite(z).all()):
        raise ArithmeticError("dpir: the estimate is no number; check the operator, and that y is on the [-1, 1] scale")
    return prior.physical(z)


def _parts(operator: Callable) -> tuple[Callable, dict]:
    """The operator itself, and those of its arguments that are fixed."""
    return (operator.func, operator.keywords) if isinstance(operator, functools.partial) else (operator, {})


def _only(x: Latents) -> tuple[str, Tensor]:
    """Name and value of the one latent."""
    if len(x) != 1:
        raise ValueError(
            f"guidance: DiffPIR and PiGDM take one unknown, got {', '.join(x)}; fix the others with functools.partial, "
            "or take DPS"
        )
    return next(iter(x.items()))


@dataclass
class Result:
    """What :func:`sample` returns. Latents are attributes too: ``result.image``, ``result.kernel``.

    Attributes
    ----------
    latents : dict of name to Tensor
        Physical estimates, (B * samples, [M,] C, H, W); the samples of one measurement are neighbours.
    samples : int
        Posterior samples of each measurement.
    residual : Tensor, shape (B * samples,)
        Root mean square of y - A(x) at the last step; the noise's standard deviation if all went well.
    evaluations : int
        Network evaluations of each latent, with their backward passes where the guidance has any.
    seconds : float
    history : dict
        ``"t"``: the times of the frames kept; each latent's name: its estimates then, (frames, B * samples, C, H, W),
        on the CPU; ``"residual"``: (frames, B * samples).
    """

    latents: Latents
    samples: int
    residual: Tensor
    evaluations: int
    seconds: float
    history: dict[str, Tensor]

    def __getattr__(self, name: str) -> Tensor:
        if name != "latents" and name in self.latents:
            return self.latents[name]
        raise AttributeError(f"no latent {name!r} in this result")

    def posterior(self, name: str) -> Tensor:
        """The samples of a latent, (B, samples, C, H, W)."""
        return self.latents[name].unflatten(0, (-1, self.samples))


def sample(
    y: Tensor,
    operator: Callable[..., Tensor],
    priors: Mapping[str, Prior],
    *,
    steps: int | Sequence[int] = 1000,
    seed: int | Sequence[int] = 0,
    guidance: Callable | None = None,
    samples: int = 1,
    start: Mapping[str, Tensor] | None = None,
    start_time: int | None = None,
    history: int = 0,
    progress: bool = False,
    callback: Callable[[int, Latents], None] | None = None,
) -> Result:
    """Draw the unknowns of ``y = operator(**latents) + noise`` from their posterior, in parallel (BlindDPS, alg. 1).

    Parameters
    ----------
    y : Tensor, shape (B, C, h, w)
        Measurements, about [-1, 1] plus noise; (B, M, C, h, w) where the operator sees the scene in M frames. Items of
        a batch do not influence one another.
    operator : callable
        Called with the physical latents by name, such as ``Blur()``. What is known is fixed with
        ``functools.partial(operator, kernel=k)``.
    priors : mapping of name to Prior
        One for each of the operator's unknown arguments.
    steps : int or sequence of int
        Reverse steps, from 1 to the length of the priors' schedule, or to ``start_time + 1``. Or their times. Where a
        time is not below the one before, the latents are denoised fully and get the noise of that time anew ("time
        travel", arXiv 2201.09865): with ``t = schedule.timesteps``, ``t(300) + 12 * t(60, first=120)`` goes down
        once from noise, and twelve times from where details are still hidden.
    seed : int or sequence of int
        The noise is a function of it and the index of the posterior sample; one for all measurements or one for each.
        An item comes out the same alone or in a batch.
    guidance : callable, optional
        What one step does; default: ``DPS()``, :meth:`~DPS.respaced` for so many steps and pixels.
    samples : int
        Independent posterior samples of each measurement.
    start : mapping of name to Tensor, optional
        Estimates of every latent, (B, ...), to begin at instead of noise (SDEdit, arXiv 2108.01073), as diffusion
        variables: a kernel through :func:`~blindlib.priors.kernel_to_latent`. They get the noise of ``start_time``.
    start_time : int, optional
        Highest time of a run with a ``start``. What is finer than its noise level is drawn anew, the rest stays.
    history : int
        How many frames of the run to keep, evenly spaced.
    progress : bool
        Show a progress bar.
    callback : callable, optional
        Called after each step with its number and the current physical estimates.

    Returns
    -------
    Result

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; the message names it, says what came and what is expected.
    ArithmeticError
        If the run diverges; the message names the step and a remedy.

    Examples
    --------
    >>> priors = {"image": load_prior("image"), "kernel": load_prior("kernel")}     # doctest: +SKIP
    >>> sample(y, Blur(), priors, steps=1000).kernel                                # doctest: +SKIP
    """
    if guidance is not None and (not callable(guidance) or isinstance(guidance, type)):
        raise TypeError(f"guidance: expected one such as DPS(), got {guidance!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: expected a function of step and latents, got {callback!r}")
    shapes, schedule = _check(y, operator, priors, samples)
    if (start is None) != (start_time is None):
        raise ValueError("start, start_time: expected both or neither")
    times = _times(steps, start_time, schedule)
    steps = len(times)
    if guidance is None:
        guidance = DPS().respaced(steps, math.sqrt(y.shape[-2] * y.shape[-1]))
    if not is_integer(history) or not 0 <= history <= steps:
        raise ValueError(f"history: expected an integer, 0 <= history <= steps = {steps}, got {history!r}")
    draws = _Noise(seed, len(y), samples, y.device)
    if isinstance(operator, functools.partial):
        known = {name: _repeated(value, len(y), samples) for name, value in operator.keywords.items()}
        operator = functools.partial(operator.func, *operator.args, **known)
    y = y.repeat_interleave(samples, 0)
    noise = {name: draws(*shapes[name]) for name in priors}
    if start is None:
        x = {name: prior.start(noise[name]) for name, prior in priors.items()}
    else:
        x = _diffused(start, noise, times[0], priors, guidance, samples)

    _check_output(operator, {name: priors[name].physical(value) for name, value in x.items()}, y)

    frames = {round((i + 1) * steps / history) - 1 for i in range(history)}
    kept: dict[str, list[Tensor]] = {name: [] for name in ("t", "residual", *priors)}
    pixels = math.sqrt(y[0].numel())
    started = time.perf_counter()
    for i, (t, t_prev) in enumerate(bar(list(zip(times, [*times[1:], -1], strict=True)), "sampling", progress)):
        noise = {name: draws(*shapes[name]) for name in priors}
        with torch.no_grad():
            x, x0, norm = guidance(x, t, t_prev if t_prev < t else -1, y, operator, priors, noise)
        # Estimates are clipped, so that the residual stays small however far the latents run away: look at both.
        size = float(torch.stack([value.flatten(1).square().mean(1).max() for value in x.values()]).max().sqrt())
        if not size < LARGEST or not bool(torch.isfinite(norm).all()):
            raise ArithmeticError(
                f"sample: diverged at step {i + 1} of {steps} (t = {t}): latents of root mean square {size:.3g} where "
                "about 1 is right; take a smaller step_size or more steps, and check that y is on the [-1, 1] scale"
            )
        if i in frames or callback is not None:
            now = {name: priors[name].physical(mean) for name, mean in x0.items()}
            if i in frames:
                for name, value in {**now, "residual": norm / pixels, "t": torch.tensor(t)}.items():
                    kept[name].append(value.cpu())
            if callback is not None:
                callback(i, now)
        if t_prev >= t:
            noise = {name: draws(*shapes[name]) for name in priors}
            x = _diffused(x, noise, t_prev, priors, guidance, 1)
    latents = {name: priors[name].physical(value) for name, value in x.items()}
    return Result(
        latents=latents,
        samples=samples,
        residual=norm / pixels,
        evaluations=steps,
        seconds=time.perf_counter() - started,
        history={name: torch.stack(values) for name, values in kept.items() if values},
    )


def _times(steps: int | Sequence[int], first: int | None, schedule: NoiseSchedule) -> list[int]:
    """The times of all steps."""
    if not isinstance(steps, Sequence):
        return schedule.timesteps(steps, first=first)
    times = list(steps)
    if not times or not all(is_integer(t) and 0 <= t < len(schedule) for t in times):
        raise ValueError(f"steps: expected a number, or times from 0 to {len(schedule) - 1}, got {steps!r:.80}")
    times = [int(t) for t in times]
    if first is not None and times[0] != first:
        raise ValueError(f"steps: times are expected to begin at start_time={first}, got {times[0]}")
    return times


def _diffused(
    start: Mapping[str, Tensor],
    noise: Latents,
    t: int,
    priors: Mapping[str, Prior],
    guidance: Callable,
    samples: int,
) -> Latents:
    """``start`` with the noise that each latent has when the run is at ``t``."""
    check_mapping(start=start)
    if set(start) != set(noise):
        raise ValueError(f"start: expected one for each of {', '.join(noise)}, got {', '.join(start) or 'none'}")
    out = {}
    for name, z in noise.items():
        if not isinstance(start[name], Tensor):
            raise TypeError(f"start: expected a tensor of the {name}, got {type(start[name]).__name__}")
        x0 = start[name].to(z).repeat_interleave(samples, 0)
        if x0.shape != z.shape or not bool(torch.isfinite(x0).all()):
            expected = (len(z) // samples, *z.shape[1:])
            raise ValueError(f"start: expected finite values of shape {expected} of the {name}, got {tuple(x0.shape)}")
        own = guidance.time(name, t, priors[name]) if isinstance(guidance, DPS) else t
        out[name] = priors[name].schedule.diffuse(x0, torch.tensor([own], device=z.device), z)
    return out


def _repeated(value: object, batch: int, samples: int) -> object:
    """What is known of each measurement, for each of its samples."""
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch:
        return value.repeat_interleave(samples, 0)
    return value


class _Noise:
    """Standard normal draws (B * samples, ...) that depend on the seed and the sample's index, not on the batch.

    Drawn on the CPU, so that a seed gives the same result on every device.
    """

    def __init__(self, seed: int | Sequence[int], batch: int, samples: int, device: torch.device) -> None:
        one = is_integer(seed)
        seeds = [seed] if one else list(seed) if isinstance(seed, Sequence) else []
        if not all(is_integer(s) for s in seeds) or len(seeds) not in ((1,) if one else (batch,)):
            raise ValueError(f"seed: expected an int, or one for each of {batch} measurements, got {seed!r}")
        numbers = [(int(s) * 1_000_003 + j) % 2**63 for s in seeds for j in range(samples)]
        self.generators = [torch.Generator().manual_seed(number) for number in numbers]
        self.repeat, self.device = batch if one else 1, device

    def __call__(self, *shape: int) -> Tensor:
        noise = torch.stack([torch.randn(shape, generator=g) for g in self.generators])
        return noise.repeat(self.repeat, *[1] * len(shape)).to(self.device)


def _check(
    y: Tensor, operator: Callable, priors: Mapping[str, Prior], samples: int
) -> tuple[dict[str, tuple[int, ...]], object]:
    """Check what came; returns each latent's shape and the common schedule."""
    if not isinstance(y, Tensor) or y.dtype != torch.float32:
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y: expected a tensor of torch.float32, got {kind}")
    if y.ndim not in (4, 5) or 0 in y.shape:
        raise ValueError(f"y: expected shape (B, C, h, w), or (B, M, C, h, w) of frames, got {tuple(y.shape)}")
    if not bool(torch.isfinite(y).all()):
        raise ValueError(f"y: has {int((~torch.isfinite(y)).sum())} values that are NaN or infinite")
    if float(y.abs().max()) > 3:
        raise ValueError(
            f"y: expected values of about [-1, 1] plus noise, got [{float(y.min()):.3g}, {float(y.max()):.3g}]; "
            "an image of bytes becomes one by x / 127.5 - 1"
        )
    check_counts(samples=samples)
    check_mapping(priors=priors)
    if not priors:
        raise ValueError("priors: expected one for each unknown, got none")
    if not callable(operator) or isinstance(operator, type):
        raise TypeError(f"operator: expected one such as Blur(), got {operator!r}")
    _, known = _parts(operator)
    for name, value in known.items():
        if name in priors:
            raise ValueError(f"priors: expected none for {name}, which functools.partial has fixed; leave one out")
        if isinstance(value, Tensor) and (lost := int((~value.isfinite()).sum())):
            raise ValueError(f"operator: its {name} has {lost} values that are NaN or infinite")

    arguments = inspect.signature(operator).parameters
    needed = {name for name, p in arguments.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in arguments.values())
    if needed - set(priors):
        missing = sorted(needed - set(priors))
        raise ValueError(
            f"priors: no prior for {', '.join(missing)}; give one, or fix what is known with "
            f"functools.partial(operator, {missing[0]}=...)"
        )
    if set(priors) - set(arguments) and not open_ended:
        raise ValueError(
            f"priors: {', '.join(sorted(set(priors) - set(arguments)))} is unknown to the operator, "
            f"which takes {', '.join(arguments)}"
        )
    check_priors(priors)
    for name, prior in priors.items():
        if prior.device != y.device:
            raise ValueError(
                f"priors: the prior of {name} is on {prior.device}, y on {y.device}; move one with .to(device)"
            )

    schedules = [prior.schedule for prior in priors.values()]
    if any(not torch.equal(s.alpha_bars, schedules[0].alpha_bars) for s in schedules):
        raise ValueError("priors: have different noise schedules, so that they cannot run in step")
    return _shapes(y, operator, priors), schedules[0]


def _check_output(operator: Callable, physical: Latents, y: Tensor) -> None:
    """Shapes that differ from y's could still broadcast, and items of a batch mix."""
    with torch.no_grad():
        made = operator(**physical)
    if made.shape != y.shape:
        raise ValueError(f"operator: returned shape {tuple(made.shape)}, but y has {tuple(y.shape)}")


def _shapes(y: Tensor, operator: Callable, priors: Mapping[str, Prior]) -> dict[str, tuple[int, ...]]:
    """Shape ([M,] C, H, W) of each latent: as its prior says, or as the operator derives it from y's size."""
    whole, known = _parts(operator)
    tensors = {name: value for name, value in known.items() if isinstance(value, Tensor) and value.ndim > 1}
    sizes = {name: tuple(value.shape[-2:]) for name, value in tensors.items()}
    sizes |= {name: tuple(p.shape[-2:]) for name, p in priors.items() if p.shape[-1] is not None}
    derived = {}
    if hasattr(whole, "sizes"):
        _, *others = inspect.signature(whole.sizes).parameters.values()
        for name in (p.name for p in others if p.default is p.empty and p.kind is not p.VAR_KEYWORD):
            if name in sizes:
                continue
            if name in known:
                got = tuple(known[name].shape) if isinstance(known[name], Tensor) else type(known[name]).__name__
                raise TypeError(f"operator: its {name} is expected to be a tensor with height and width, got {got}")
            raise ValueError(f"priors: the size of the {name} does not follow from y's, its prior has to give one")
        derived = whole.sizes(tuple(y.shape[-2:]), **sizes)
    shapes = {}
    for name, prior in priors.items():
        height, width = sizes.get(name) or derived.get(name) or tuple(y.shape[-2:])
        if height % prior.stride or width % prior.stride:
            down = [side - side % prior.stride for side in (height, width)]
            raise ValueError(
                f"y: a measurement of {y.shape[-2]}x{y.shape[-1]} needs a {name} of {height}x{width}, but its prior "
                f"works at multiples of {prior.stride}; crop y so that it needs one of {down[0]}x{down[1]}"
            )
        if name == "image" and prior.shape[-3] != y.shape[-3]:
            raise ValueError(f"y: has {y.shape[-3]} channels, the image prior {prior.shape[0]}; repeat or average y's")
        shapes[name] = (*prior.shape[:-2], height, width)
    return shapes


def bar(items: Collection, title: str, progress: bool, *, unit: str = "step", **options: object) -> tqdm:
    """``items`` with a progress bar; lines in a log or a saved notebook are for ever, so there it is seldom drawn."""
    seldom = 0.2 if sys.stderr.isatty() else 5
    return tqdm(items, title, unit=unit, disable=not progress, mininterval=seldom, **options)
