"""From frames seen through turbulent air to one sharp picture: optical flow first, then blind deblurring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from blindlib.baselines import no_blur
from blindlib.checks import check_counts, check_noise, check_priors
from blindlib.deblur import ROUNDS, estimate_noise, find_kernels
from blindlib.operators import Blur, Turbulence
from blindlib.priors import DiffusionPrior
from blindlib.sampler import DiffPIR, Result, sample

# Smoothness of the flow in pixels, round by round.
COARSE_TO_FINE = (6.0, 4.0, 3.0, 3.0, 3.0, 3.0)
# How often the tilts follow the sharp image, and it them.
TURNS = 3


def register(y: Tensor, operator: Turbulence, *, smoothness: Sequence[float] = COARSE_TO_FINE) -> tuple[Tensor, Tensor]:
    """The picture that all frames are bent versions of, as blurred as they are, and the tilts that bend it.

    Starts from the mean of the frames and alternates: the flow (:func:`flow`) from the picture to each frame, and the
    picture that explains all frames best under these tilts. No prior is asked. What remains is the mean over the
    frames of the true tilts, which bends the picture: no measurement tells it.

    Parameters
    ----------
    y : Tensor, shape (B, M, C, H, W)
        M frames of each scene.
    operator : Turbulence
        With ``frames=M``.
    smoothness : sequence of float
        Of the flow, in pixels, one for each round: coarse first, so that it finds large tilts.

    Returns
    -------
    tuple of Tensor, shapes (B, C, H, W) and (B, M, 2, H, W)
        The picture, and tilts in pixels whose mean over the frames is zero.
    """
    sharp = no_blur(1, 1).to(y)
    still = mean = y.mean(1)
    tilt = y.new_zeros(*y.shape[:2], 2, *y.shape[-2:])
    for scale in smoothness:
        tilt = flow(y, still, sharp, tilt, operator, smoothness=scale)
        # As much weight on the mean as on a frame: without any, what the interpolation blurs comes back as noise.
        still = operator.solve(y, sharp, tilt, mean, 1.0)
    return still, tilt


def flow(
    y: Tensor,
    image: Tensor,
    kernel: Tensor,
    tilt: Tensor,
    operator: Turbulence,
    *,
    smoothness: float = 3.0,
    steps: int = 2,
) -> Tensor:
    """Tilts by which ``image`` and ``kernel`` explain the frames: steps of Gauss and Newton from ``tilt``.

    As :meth:`~blindlib.Turbulence.solve_tilt`, whose weight is here what is left unexplained of each frame, for tilts
    of about a pixel; the result's mean over the frames is zero. Shapes as there.
    """
    for _ in range(steps):
        rest = (y - operator(image, kernel, tilt)).square().mean((-3, -2, -1), keepdim=True)
        tilt = operator.solve_tilt(y, image, kernel, tilt, rest, smoothness=smoothness)
        tilt = tilt - tilt.mean(1, keepdim=True)
    return tilt


def mitigate(
    y: Tensor,
    priors: Mapping[str, DiffusionPrior],
    *,
    boundary: str = "circular",
    noise_std: float | None = None,
    rounds: int = ROUNDS,
    samples: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> Result:
    """One sharp picture from frames that turbulence has bent and blurred; kernel and tilts are unknown.

    All frames bend the same scene, each its own way, so that they agree once they are registered (:func:`register`).
    What is left is a blurred picture with little noise, whose kernel :func:`~blindlib.deblur.find_kernels` finds. Then,
    in turns, the tilts follow the sharp image, and the image, the mean of posterior samples by DiffPIR, the tilts.

    Parameters
    ----------
    y : Tensor, shape (1, M, C, H, W)
        M frames, two or more, in [-1, 1].
    priors : mapping with "image" and "kernel"
        None of tilts: a dozen steps of optical flow with a smooth field come as near as the learned one does.
    boundary : {"circular", "zero", "reflect"}
        As of :class:`~blindlib.Turbulence`; for a video, ``"reflect"``.
    noise_std : float, optional
        Of a frame, on the [-1, 1] scale; estimated when not given.
    rounds : int
        Of EM, in search of the kernel.
    samples : int
        Posterior samples of the image of which the mean is taken.
    seed : int
    progress : bool

    Returns
    -------
    Result
        ``.image`` (1, C, H, W), ``.kernel`` (1, 1, K, K) and ``.tilt`` (1, M, 2, H, W), pixels, whose mean is zero.

    Raises
    ------
    ValueError
        If ``y`` is not one set of frames, a number is not positive, a prior is missing, or the boundary is ``"valid"``:
        frames tell no tilt of what they do not see.

    Examples
    --------
    >>> run = mitigate(y, {"image": load_prior("image"), "kernel": load_prior("kernel")})  # doctest: +SKIP
    """
    if not isinstance(y, Tensor) or y.ndim != 5 or len(y) != 1 or y.shape[1] < 2:
        shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y: expected shape (1, M, C, H, W) with two frames or more, got {shape}")
    if boundary == "valid":
        raise ValueError("boundary: expected 'circular', 'zero' or 'reflect', got 'valid'")
    check_counts(rounds=rounds, samples=samples)
    check_noise(noise_std, optional=True)
    check_priors(priors, "image", "kernel")
    operator, blur = Turbulence(boundary, frames=y.shape[1]), Blur(boundary)
    noise_std = estimate_noise(y.flatten(0, 1)) if noise_std is None else noise_std
    common, only = dict(seed=seed, progress=progress), {"image": priors["image"]}

    def restored(y: Tensor, known: Callable, noise: float) -> Result:
        """The mean of samples; plug and play is led further astray by frames whose tilts are a little wrong."""
        run = sample(y, known, only, steps=20, samples=samples, guidance=DiffPIR(noise, strength=1.0), **common)
        return replace(run, latents={"image": run.posterior("image").mean(1)}, samples=1)

    still, tilt = register(y, operator)
    left = estimate_noise(still)
    # What the registration got wrong is no white noise.
    kernel, rest = find_kernels(still, priors, blur, left, rounds=rounds, refine=False, **common)
    # What is wrong with kernel and tilts is noise, and more than is seen, as the image could adapt to it.
    run = restored(still, partial(blur, kernel=kernel), max(left, 1.5 * float(rest)))
    for _ in range(TURNS):
        tilt = flow(y, run.image, kernel, tilt, operator)
        rest = (y - operator(run.image, kernel, tilt)).square().mean().sqrt()
        run = restored(y, partial(operator, kernel=kernel, tilt=tilt), max(noise_std, 1.5 * float(rest)))
    rest = (y - operator(run.image, kernel, tilt)).square().mean().sqrt()
    return replace(run, latents={**run.latents, "kernel": kernel, "tilt": tilt}, residual=rest[None])
