"""From frames seen through turbulent air to one sharp picture: optical flow first, then the parallel diffusion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from blindlib.baselines import no_blur
from blindlib.deblur import estimate_noise, find_kernels
from blindlib.em import Threshold
from blindlib.metrics import recentred
from blindlib.operators import Blur, Turbulence
from blindlib.priors import DiffusionPrior, kernel_to_latent
from blindlib.sampler import DPS, DiffPIR, Result, sample

# Smoothness of the flow in pixels, round by round.
COARSE_TO_FINE = (6.0, 4.0, 3.0, 3.0, 3.0, 3.0)
# When the parallel diffusion starts: the noise of this time hides what is fine only. What it leaves of a kernel below
# this share of the peak is noise of the sampler.
START_TIME = 120
HAZE = 0.03


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
    steps: int = 60,
    samples: int = 4,
    rounds: int = 2,
    seed: int = 0,
    progress: bool = False,
) -> Result:
    """One sharp picture from frames that turbulence has bent and blurred; kernel and tilts are unknown.

    All frames bend the same scene, each its own way, so that they agree once they are registered (:func:`register`).
    What is left is a blurred picture with little noise, whose kernel :func:`~blindlib.deblur.find_kernels` finds. From
    there image and kernel diffuse in parallel (BlindDPS, arXiv 2211.10656), tied to all frames by the tilts. Lastly the
    tilts follow the sharp image, and the image, the mean of posterior samples by DiffPIR, follows the tilts.

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
    steps : int
        Of the parallel diffusion.
    samples : int
        Posterior samples of the image of which the mean is taken.
    rounds : int
        How often tilts and image follow each other.
    seed : int
    progress : bool

    Returns
    -------
    Result
        ``.image`` (1, C, H, W), ``.kernel`` (1, 1, K, K) and ``.tilt`` (1, M, 2, H, W), pixels, whose mean is zero.

    Raises
    ------
    ValueError
        If ``y`` is not one set of frames, or the boundary is ``"valid"``: frames tell no tilt of what they do not see.

    Examples
    --------
    >>> run = mitigate(y, {"image": load_prior("image"), "kernel": load_prior("kernel")})  # doctest: +SKIP
    """
    if not isinstance(y, Tensor) or y.ndim != 5 or len(y) != 1 or y.shape[1] < 2:
        shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y: expected shape (1, M, C, H, W) with two frames or more, got {shape}")
    if boundary == "valid":
        raise ValueError("boundary: expected 'circular', 'zero' or 'reflect', got 'valid'")
    operator, blur = Turbulence(boundary, frames=y.shape[1]), Blur(boundary)
    noise_std = estimate_noise(y.flatten(0, 1)) if noise_std is None else noise_std
    common = dict(seed=seed, progress=progress)

    still, tilt = register(y, operator)
    left = estimate_noise(still)
    two = {name: priors[name] for name in ("image", "kernel")}
    kernel, rest = find_kernels(still, two, blur, left, **common)

    def mean(y: Tensor, known: Callable, noise: float, rest: float) -> Tensor:
        """Of posterior samples; by frames whose tilts are a little wrong, plug and play is led further astray."""
        # What is wrong with kernel and tilts is noise, and more than is seen, as the image could adapt to it.
        options = dict(steps=20, samples=samples, guidance=DiffPIR(max(noise, 1.5 * rest), strength=1.0), **common)
        return sample(y, known, {"image": priors["image"]}, **options).posterior("image").mean(1)

    image = mean(still, partial(blur, kernel=kernel), left, float(rest))
    tilt = flow(y, image, kernel, tilt, operator)

    run, kernel = _refined(y, partial(operator, tilt=tilt), two, image, kernel, steps=steps, samples=2, **common)
    image = run.posterior("image").mean(1)
    for _ in range(rounds):
        tilt = flow(y, image, kernel, tilt, operator)
        known = partial(operator, kernel=kernel, tilt=tilt)
        rest = (y - known(image=image)).square().mean().sqrt()
        image = mean(y, known, noise_std, float(rest))
    rest = (y - operator(image, kernel, tilt)).square().mean().sqrt()
    return replace(run, latents={"image": image, "kernel": kernel, "tilt": tilt}, samples=1, residual=rest[None])


def _refined(
    y: Tensor,
    operator: Callable,
    priors: Mapping[str, DiffusionPrior],
    image: Tensor,
    kernel: Tensor,
    **options: object,
) -> tuple[Result, Tensor]:
    """The parallel diffusion (BlindDPS) from an image and a kernel, with little noise; options are :func:`sample`'s.

    Returns
    -------
    tuple of Result and Tensor, shape (B, 1, K, K)
        The run, and its kernels (the mean of several samples) centred and without the faint haze.
    """
    start = {"image": image, "kernel": kernel_to_latent(kernel)}
    # Steps as long as in a run of 300, which has about as many at these times.
    guidance = DPS().respaced(300, (y.shape[-2] * y.shape[-1]) ** 0.5)
    run = sample(y, operator, priors, guidance=guidance, start=start, start_time=START_TIME, **options)
    kernel = Threshold(HAZE)(run.posterior("kernel").mean(1), 0)
    return run, recentred(kernel / kernel.sum((2, 3), keepdim=True))
