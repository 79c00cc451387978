"""From a blurred photograph to a sharp one: diffusion EM for the kernel, DPIR for the picture."""

from __future__ import annotations

import inspect
import io
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageCms
from torch import Tensor

from blindlib.baselines import l0_pyramid, no_blur
from blindlib.checks import check_counts, check_kernel, check_noise, check_positive, check_priors, is_integer
from blindlib.em import EM_BOUNDARIES, RESPONSES, Annealed, bare, blur_of, diffusion_em, fast_em
from blindlib.files import whole
from blindlib.jobs import imap_unordered
from blindlib.metrics import mnc
from blindlib.operators import (
    BOUNDARIES,
    Blur,
    Downsample,
    LinearLight,
    SpaceVaryingBlur,
    linear_values,
    otf,
    seen,
    to_light,
    to_srgb,
)
from blindlib.priors import DiffusionPrior, kernel_to_latent, load_prior, pick_device
from blindlib.sampler import DiffPIR, bar, dpir, sample
from blindlib.simulate import gaussian_kernels

# Strength and ridge of the guesses that EM starts from; no one setting suits all pictures. It also starts from no blur,
# which explains any photograph, as that of something blurred: to count, that run has to leave this much less.
GUESSES = ((0.2, 500), (0.4, 500), (0.1, 2000))
HANDICAP = 1.03
EM_STEPS = 30
# EM goes on from what it has found by going back to this time, whose noise hides what is fine only, again and again.
START_TIME = 150
ROUNDS = 12
ROUND_STEPS = 6
# At the end the best kernel descends the error of prediction, so many steps for each round of EM. Restorations see at
# least this much noise, in light less at the end; steps start at this rate; the network is differentiated at the last
# so many of their levels.
REFINE_STEPS = 3
PREDICT_FROM = 0.03
RATE = 0.1
# In light as many steps at half the size come first: from kernels made wider, by so much (standard deviation, in its
# pixels), on a haze, between these levels of noise, at this rate. The noise is no less than this: at half the size a
# blur is only nearly one.
WIDER = 1.0
HAZE = 1e-4
COARSE_LEVELS = (0.1, 0.03)
COARSE_RATE = 0.15
COARSE_NOISE = 0.02
LEVELS = torch.logspace(math.log10(98 / 255), math.log10(0.04), 8).tolist()
LEVELS_IN_LIGHT = torch.logspace(math.log10(98 / 255), math.log10(0.02), 8).tolist()
FOLLOWED = 3
# Likeness at which two kernels are one, and but one of them goes on.
SAME = 0.97
# Likeness of a kernel to one bright pixel at which nothing is to be undone: restoring would only make up detail. Both
# are looked at through a lens and pixels, which blur every photograph about so much (standard deviation, in pixels).
SHARP = 0.9
OPTICS = 0.6
# What is less like one bright pixel is no blur that was mistaken for one: where none predicts better, it is only wrong.
NEARLY_SHARP = 0.7
# Error over the spread of posterior samples (`expected_error`), the kernel known or found: of the benchmark's images of
# seed 2030, circular, noise_std 0.02. `tests/calibration.py` measures on other seeds how well they hold.
KNOWN, FOUND = 1.5, 2.5

# How to turn a picture upright, by its EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# To be written: those that keep every pixel and any size.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")

Photo = str | os.PathLike | Image.Image | np.ndarray | Tensor


@dataclass
class Deblurred:
    """What :func:`deblur` returns.

    Attributes
    ----------
    image : Tensor, shape (1, 3, H, W), in [-1, 1]
        The sharp photograph.
    kernel : Tensor, shape (1, 1, K, K)
        What blurred it, centred; or the PSFs that were given.
    images : Tensor, shape (n, 3, H, W)
        The best estimate under each kernel of ``kernels``, that whose kernel explains the measurement best first.
    kernels : Tensor, shape (n, 1, K, K)
        What runs from other noise and other guesses found, as many as ``samples``; or the PSFs that were given.
    blurred : Tensor, shape (1, 3, H, W)
        What came in, at the size that was worked at.
    figures : dict
        ``seconds``; ``noise_std`` on the [-1, 1] scale; ``scale``, 1 at full resolution; the ``response`` that was
        taken; ``crop``, where a kernel was sought: top, left, height and width of the part that it was read from;
        ``residual``: root mean square of what image and kernel leave unexplained.
    error : Tensor, shape (1, 1, H, W), optional
        Root mean square error of ``image`` that is to be expected at each pixel, on the [-1, 1] scale, if it was asked
        for; see :func:`expected_error`.
    source : Path, optional
        The file that came in, if it was one.
    """

    image: Tensor
    kernel: Tensor
    images: Tensor
    kernels: Tensor
    blurred: Tensor
    figures: dict
    error: Tensor | None = None
    source: Path | None = None

    def save(self, path: str | os.PathLike) -> None:
        """Write the sharp photograph, whole or not at all; the suffix of ``path`` gives the format.

        Raises
        ------
        ValueError
            If ``path`` is the photograph that came in, which is never written over.
        OSError, ValueError
            As :func:`write_image`.
        """
        if self.source is not None and is_same_file(path, self.source):
            raise ValueError(f"path: {os.fspath(path)!r} is the photograph itself; name another file")
        write_image(self.image, path)


def deblur(
    photo: Photo,
    *,
    kernel: Tensor | None = None,
    field: tuple[int, int] | None = None,
    rounds: int = ROUNDS,
    starts: int = 1,
    samples: int = 1,
    error: bool = False,
    boundary: str = "valid",
    response: str | None = None,
    noise_std: float | None = None,
    max_size: int | None = 1024,
    crop: int = 128,
    seed: int = 0,
    device: str | torch.device = "auto",
    prior: str = "image",
    priors: dict[str, DiffusionPrior] | None = None,
    progress: bool = True,
) -> Deblurred:
    """Sharpen a photograph that a motion, a shake or defocus has blurred, alike all over the picture.

    The kernel is found on the most textured part, by :func:`find_kernels`; with it, the whole picture is restored, by
    :func:`restore`. A kernel no wider than what any lens and pixels do to a picture (two or three pixels) is no blur:
    the picture comes back as it is, at its own size, with a kernel of one bright pixel.

    Parameters
    ----------
    photo : path, PIL image, array or tensor
        Any file that Pillow reads: colour, grey, 16 bits, with EXIF rotation; transparency is laid on white. Arrays
        are (H, W) or (H, W, C), of bytes, 16-bit integers or floats in [0, 1]; tensors (3, H, W) or (1, 3, H, W) in
        [-1, 1].
    kernel : Tensor, shape (1, 1, K, K), optional
        The kernel, if it is known; or a grid of PSFs, (1, rows, columns, 1 or 3, K, K). Nothing is sought then, and
        ``rounds``, ``starts``, ``samples`` and ``crop`` are of no use.
    field : (int, int), optional
        Height and width of the photographs that PSFs are of; a photo of another size, such as one on end, is refused.
    rounds : int
        Of EM, each a short run of the image's diffusion and an M-step; see :func:`find_kernels`.
    starts : int
        Kernels that are sought, of which ``samples`` are kept; at least as many.
    samples : int
        How many of the runs are kept, those whose kernels explain the photograph best, each with its restoration.
    error : bool
        Estimate how wrong the picture may be, pixel by pixel: ten times the evaluations of a restoration.
    boundary : {"valid", "circular", "zero", "reflect"}
        ``"valid"`` is right for photographs; the others for measurements that were simulated so.
    response : {"srgb", "linear"}, optional
        Of the camera. ``"srgb"``: what was blurred is the light, and a file's values are its code
        (:class:`~blindlib.operators.LinearLight`), as in photographs. ``"linear"``: the values themselves were blurred,
        as in most simulations. Default: ``"srgb"``; of a tensor, which comes from a simulation, ``"linear"``.
    noise_std : float, optional
        Of the noise at the size that is worked at, on the [-1, 1] scale (scaling down makes it less); estimated when
        not given.
    max_size : int, optional
        A photograph whose longer side has more pixels is scaled down to it first, and a line says so. ``None``: never;
        nor where the kernel is known, which is that of the photograph's own size.
    crop : int
        Side of the part of the photograph that the kernel is read from, about.
    seed : int
    device : str or torch.device
        ``"auto"``: a GPU where there is one.
    prior : {"image", "text"}
        Which shipped prior of images: that of all kinds of scenes, or that of printed text and line drawings.
    priors : dict with "image" and, where it is sought, "kernel", optional
        Others than those that ship; ``prior`` is not asked then. They are moved to the device.
    progress : bool
        Print what is being done, with progress bars.

    Returns
    -------
    Deblurred

    Raises
    ------
    FileNotFoundError, TypeError, ValueError
        If the photo cannot be read, is too small for the kernel's window, or another argument does not fit.
    """
    started = time.perf_counter()
    say = print if progress else (lambda *_: None)
    if boundary not in BOUNDARIES:
        raise ValueError(f"boundary: expected one of {BOUNDARIES}, got {boundary!r}")
    if response is None:
        response = "linear" if isinstance(photo, Tensor) else "srgb"
    if response not in RESPONSES:
        raise ValueError(f"response: expected one of {RESPONSES}, got {response!r}")
    check_counts(rounds=rounds, samples=samples, starts=starts, crop=crop)
    check_counts(max_size=max_size, optional=True)
    check_noise(noise_std, optional=True)
    if not is_integer(seed):
        raise ValueError(f"seed: expected an integer, got {seed!r}")
    seed = int(seed)
    if prior not in ("image", "text"):
        raise ValueError(f"prior: expected 'image' or 'text', got {prior!r}; others are given as priors")
    if priors is not None:
        check_priors(priors, "image", *(["kernel"] if kernel is None else []))
    if kernel is not None:
        _check_known(kernel)
        kernel = kernel.float()
    device = pick_device(device)
    priors = priors or {"image": load_prior(prior), "kernel": load_prior("kernel")}
    for one in priors.values():
        if isinstance(one, DiffusionPrior):
            one.to(device)
    linear = Blur(boundary) if kernel is None or kernel.ndim == 4 else SpaceVaryingBlur(boundary)
    blur = linear if response == "linear" else LinearLight(linear)

    y = read_image(photo)
    if field is not None and kernel is not None and kernel.ndim == 6 and tuple(y.shape[-2:]) != tuple(field):
        raise ValueError(
            f"photo: has {y.shape[-1]}x{y.shape[-2]} pixels, but the PSFs are of photographs of {field[1]}x{field[0]}"
        )
    scale = 1.0
    if kernel is None and max_size is not None and max(y.shape[-2:]) > max_size:
        scale = max_size / max(y.shape[-2:])
        size = [max(1, round(side * scale)) for side in y.shape[-2:]]
        say(f"scaling down from {y.shape[-1]}x{y.shape[-2]} to {size[1]}x{size[0]} pixels (max_size={max_size})")
        full, y = y, resize(y, size)
    y = y.to(device)
    if kernel is not None and any(k > side for k, side in zip(kernel.shape[-2:], y.shape[-2:], strict=True)):
        raise ValueError(
            f"kernel: of {kernel.shape[-1]}x{kernel.shape[-2]} pixels, is larger than the photograph of "
            f"{y.shape[-1]}x{y.shape[-2]}"
        )
    noise_std = estimate_noise(y) if noise_std is None else noise_std

    figures = dict(noise_std=noise_std, scale=scale, response=response)
    if kernel is None:
        window = priors["kernel"].shape[1]
        part, figures["crop"] = _textured_part(y, window, crop, boundary, priors["image"].stride)
        starts = max(starts, samples)
        say(f"finding the kernel from {part.shape[-1]}x{part.shape[-2]} pixels")
        options = dict(rounds=rounds, starts=starts, seed=seed, progress=progress)
        kernels, rest = find_kernels(part, priors, blur, noise_std, **options)
        # What no picture explains with a kernel that is not quite right is noise to the restoration.
        kernels, stds = kernels[:samples], [max(noise_std, float(r)) for r in rest[:samples]]
        sharp = _do_not_blur(kernels).tolist()
        kernels[sharp] = no_blur(1, window).to(kernels)
        if scale < 1 and all(sharp):  # nothing was done that would need another size
            y, crop = full.to(device), tuple(round(i / scale) for i in figures["crop"])
            noise_std = estimate_noise(y)
            figures |= dict(noise_std=noise_std, scale=1.0, crop=crop)
    else:
        kernels, stds, sharp = kernel.to(device), [noise_std] * len(kernel), [False] * len(kernel)
    say("not blurred: it comes back as it is" if sharp[0] else f"restoring {y.shape[-1]}x{y.shape[-2]} pixels")
    images = [
        y if as_it_is else restore(y, k[None], priors["image"], blur, std, progress=progress)
        for k, std, as_it_is in zip(kernels, stds, sharp, strict=True)
    ]
    images, wrong = torch.cat(images), None
    if error and sharp[0]:
        wrong = torch.full_like(y[:, :1], noise_std, device="cpu")
    elif error:
        factor = FOUND if kernel is None else KNOWN
        wrong = expected_error(
            y, kernels[:1], priors["image"], blur, stds[0], factor=factor, seed=seed, progress=progress
        ).cpu()
    figures["residual"] = float(_residual(y, images[:1], kernels[:1], blur))
    figures["seconds"] = time.perf_counter() - started
    # Absolute, as the current folder may change.
    source = Path(photo).resolve() if isinstance(photo, str | os.PathLike) else None
    return Deblurred(images[:1].cpu(), kernels[:1].cpu(), images.cpu(), kernels.cpu(), y.cpu(), figures, wrong, source)


def _do_not_blur(kernels: Tensor) -> Tensor:
    return _likeness_to_none(kernels) >= SHARP


def _likeness_to_none(kernels: Tensor) -> Tensor:
    optics = gaussian_kernels(1, 9, std=(OPTICS, OPTICS)).to(kernels)
    # By quarters of a pixel: a shift by part of one, which looks like two pixels or four, is no blur either.
    return mnc(Blur("zero")(kernels, optics), optics, 4)


def _check_known(kernel: Tensor) -> None:
    shape = tuple(kernel.shape) if isinstance(kernel, Tensor) else type(kernel).__name__
    square = isinstance(kernel, Tensor) and kernel.ndim in (4, 6) and kernel.shape[-1] == kernel.shape[-2]
    if not square or kernel.shape[0] != 1:
        raise ValueError(f"kernel: expected shape (1, 1, K, K), or (1, rows, columns, 1 or 3, K, K); got {shape}")
    check_kernel(kernel=kernel)


def deblur_folder(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    jobs: int = 1,
    cluster: str | None = None,
    say: Callable[[str], None] = print,
    **options: object,
) -> dict[str, str]:
    """Sharpen every photograph of a folder by :func:`deblur`, into another folder, each under its own name.

    What is there already is not done again: the same call goes on where an earlier one was stopped.

    Parameters
    ----------
    folder : path
        Its subfolders and hidden files are left out.
    out : path
        Of another folder, made if it is not there. A name whose suffix is of no format to write gets ``.png`` added.
    jobs, cluster
        As of :func:`~blindlib.jobs.imap_unordered`.
    say : callable
        Is told, in a line, of every photograph that is finished.
    **options
        Of :func:`deblur`, the same for each, ``seed`` too; ``progress`` is not shown.

    Returns
    -------
    dict of str to str
        The names that could not be restored, pictures or not, and why.

    Raises
    ------
    TypeError
        If :func:`deblur` has no such option.
    ValueError
        If there is nothing in the folder, ``out`` is the same one, two photographs would get one name in it, or the
        errors to be expected are asked for.
    OSError, ImportError
        If there is no such folder, ``out`` cannot be one, or processes fail, see :func:`~blindlib.jobs.imap_unordered`.
    """
    if options.get("error"):
        raise ValueError("error: of a folder only the sharp photographs are written; leave it out")
    folder, out = Path(folder).resolve(), Path(out).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: there is no folder {str(folder)!r}")
    if out == folder:
        raise ValueError(f"out: {str(out)!r} is the folder of the photographs itself; name another")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out: there is no folder {str(out.parent)!r}")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out: expected a folder, as {str(folder)!r} is one, got the file {str(out)!r}")
    out.mkdir(exist_ok=True)
    photos = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if not photos:
        raise ValueError(f"folder: there is no photograph in {str(folder)!r}")
    options["progress"] = False
    inspect.signature(deblur).bind(photos[0], **options)  # an option that it has not is no photograph's fault
    sharp: dict[Path, Path] = {}
    for photo in photos:
        try:
            check_output(out / photo.name)
            target = out / photo.name
        except ValueError:
            target = out / f"{photo.name}.png"
        if target in sharp:
            raise ValueError(
                f"folder: {sharp[target].name!r} and {photo.name!r} would both become {target.name!r}; rename one"
            )
        sharp[target] = photo
    todo = [(photo, target) for target, photo in sharp.items() if not target.exists()]
    if len(todo) < len(photos):
        say(f"{len(photos) - len(todo)} of {len(photos)} are there already")
    failed = {}
    finished = imap_unordered(partial(_deblur_file, options=options), todo, jobs=jobs, cluster=cluster)
    for n, (photo, target, seconds, scale, error) in enumerate(finished, len(photos) - len(todo) + 1):
        if error is not None:
            failed[photo.name] = error
        done = f"{seconds:.0f} s" + (f", scaled down to {scale:.0%}" if scale < 1 else "")
        say(f"{n}/{len(photos)} {target.name}: " + (done if error is None else f"skipped, {error}"))
    return failed


def _deblur_file(files: tuple[Path, Path], options: dict) -> tuple[Path, Path, float, float, str | None]:
    """The photograph, its sharp one, the time it took, the scale that was worked at, and what went wrong."""
    began, scale, error = time.perf_counter(), 1.0, None
    try:
        if not files[1].exists():  # or a worker that has died since had finished it
            made = deblur(files[0], **options)
            made.save(files[1])
            scale = made.figures["scale"]
    except (OSError, ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as e:
        error = str(e) or type(e).__name__
    return *files, time.perf_counter() - began, scale, error


def restore(
    y: Tensor,
    kernel: Tensor,
    prior: DiffusionPrior,
    operator: Blur | SpaceVaryingBlur | Downsample | LinearLight,
    noise_std: float,
    *,
    steps: int = 8,
    tile: int = 256,
    progress: bool = False,
) -> Tensor:
    """Undo a known operator by :func:`~blindlib.dpir`; large pictures are restored piece by piece.

    One estimate that adds no details of its own making. Samples of what is possible are :func:`~blindlib.sample`'s.

    Parameters
    ----------
    y : Tensor, shape (1, 3, H, W)
    kernel : Tensor, shape (1, 1 or 3, K, K)
        Of a SpaceVaryingBlur its PSFs, (1, rows, columns, 1 or 3, K, K).
    prior : DiffusionPrior
        Of images.
    operator : Blur, SpaceVaryingBlur or Downsample, or LinearLight of one
        Its boundary decides how the picture's edges are treated. Only ``"valid"`` allows pieces, and sizes that
        are no multiples of the prior's stride.
    noise_std : float
    steps : int
        Network evaluations of each piece.
    tile : int
        Larger pictures are cut into overlapping pieces of about this side, at least twice the kernel's.
    progress : bool

    Returns
    -------
    Tensor, shape (1, 3, H, W), with Downsample's factor f (1, 3, f H, f W)
        The scene where ``y`` saw it.
    """
    return _in_pieces(
        lambda piece, known: dpir(piece, known, prior, noise_std, steps=steps),
        y, kernel, prior, operator, tile, "restoring" if progress else None,
    )  # fmt: skip


def expected_error(
    y: Tensor,
    kernel: Tensor,
    prior: DiffusionPrior,
    operator: Blur | SpaceVaryingBlur | Downsample | LinearLight,
    noise_std: float,
    *,
    factor: float = KNOWN,
    samples: int = 4,
    steps: int = 20,
    tile: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """How wrong :func:`restore` may be, pixel by pixel: the standard deviation of posterior samples, made to be true.

    Samples by :class:`~blindlib.DiffPIR` disagree where a picture's details are guesses, but by too little: they leave
    out that the data step is uncertain, and no prior is perfect. How much too little hardly depends on the place, so
    that one factor mends it, which is measured where the truth is known.

    Parameters
    ----------
    y, kernel, prior, operator, noise_std, tile, progress
        As of :func:`restore`; a batch of ``y`` only where the boundary is not "valid".
    factor : float
        What the standard deviation is multiplied by. The default is for a kernel that is known; ``FOUND`` is for one of
        :func:`find_kernels`, whose own error comes on top. Both are of blur that is alike all over the picture and the
        prior "image"; ``python tests/calibration.py`` measures how well they hold.
    samples : int
        At least 2. Their number is made up for by the mean over colours and 5 x 5 pixels.
    steps : int
        Network evaluations of each sample.
    seed : int

    Returns
    -------
    Tensor, shape (B, 1, H, W), with Downsample's factor f (B, 1, f H, f W)
        Root mean square error to be expected, on the [-1, 1] scale.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    """
    check_counts(samples=samples, steps=steps)
    check_positive(factor=factor)
    if samples < 2:
        raise ValueError(f"samples: expected at least 2, got {samples}")
    settings = dict(steps=steps, samples=samples, seed=seed, guidance=DiffPIR(noise_std, strength=1.0))

    def variance(piece: Tensor, known: Callable) -> Tensor:
        return sample(piece, known, {"image": prior}, **settings).posterior("image").var(1)

    title = "measuring what samples disagree on" if progress else None
    found = _in_pieces(variance, y, kernel, prior, operator, tile, title).mean(1, keepdim=True)
    return factor * F.avg_pool2d(found, 5, stride=1, padding=2, count_include_pad=False).sqrt()


def _in_pieces(
    undo: Callable[[Tensor, Callable], Tensor],
    y: Tensor,
    kernel: Tensor,
    prior: DiffusionPrior,
    operator: Blur | SpaceVaryingBlur | Downsample | LinearLight,
    tile: int,
    title: str | None,
) -> Tensor:
    """``undo(piece, known operator)`` for all pieces of ``y``, blended; see :func:`restore`."""
    varying, factor = kernel.ndim == 6, getattr(operator, "factor", 1)
    name = "psfs" if varying else "kernel"
    if operator.boundary != "valid":
        return undo(y, partial(operator, **{name: kernel}))
    if len(y) != 1:
        raise ValueError(f"y: expected one picture (1, 3, H, W), got {tuple(y.shape)}")
    k, sizes = kernel.shape[-1], y.shape[-2:]
    overlap = -(-k // factor)
    spans = [_spans(side, max(tile // factor, 2 * overlap), overlap) for side in sizes]
    pieces = [(top, left) for top in spans[0] for left in spans[1]]
    out = y.new_zeros(1, 3, *(factor * side for side in sizes))
    weight = torch.zeros_like(out[:, :1])
    for (top, bottom), (left, right) in bar(pieces, title, title is not None and len(pieces) > 1, unit="piece"):
        piece = y[..., top:bottom, left:right]
        # A border of zeros on the kernel makes the scene a little larger, up to a size that the prior takes.
        grow = [-(factor * side + k - 1) % prior.stride for side in piece.shape[-2:]]
        before = [(k + g) // 2 - k // 2 for g in grow]  # keeps the centre at the centre
        grown = F.pad(kernel, (before[1], grow[1] - before[1], before[0], grow[0] - before[0]))
        place = {"part": (top, left, *sizes)} if varying else {}
        scene = undo(piece, partial(operator, **{name: grown}, **place))
        inner = scene[..., *seen(scene.shape[-2:], grown.shape[-2:])]
        there = (..., slice(factor * top, factor * bottom), slice(factor * left, factor * right))
        ramp = _ramp(inner.shape[-2], k, y)[:, None] * _ramp(inner.shape[-1], k, y)
        out[there] += ramp * inner
        weight[there] += ramp
    return out / weight


def find_kernels(
    y: Tensor,
    priors: Mapping[str, DiffusionPrior],
    blur: Blur | LinearLight,
    noise_std: float,
    *,
    rounds: int = ROUNDS,
    starts: int = 1,
    refine: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Kernels that explain ``y``: guesses of a classical method, made better by EM, first coarsely, then finely.

    A run from pure noise spends most of its steps on coarse matters, and its noise decides which kernel it ends at.
    :func:`~blindlib.baselines.l0_pyramid` settles these in a second, for a few settings. From most of these guesses
    :func:`~blindlib.em.fast_em` comes to nearly the same kernel. From there :func:`~blindlib.em.diffusion_em` goes on:
    a little noise on the image, a short run back, an M-step with the diffusion prior of kernels, which finds the faint
    strokes that are missing, again and again. Kernels that have become one go on as one; those that are not one by then
    go on as long again, and :func:`unexplained` tells which is right. The M-step takes images as given, and so leaves
    kernels that are a little too wide: :func:`refine_kernels` makes the best ones exact. They are kept where they
    explain no worse.

    In light this tells little. There, strokes that EM missed are sought at half the size (:func:`refine_coarsely`)
    before the kernel is refined, and of it as EM left it, refined, and none the one is kept that predicts best
    (:func:`prediction_error`).

    Parameters
    ----------
    y : Tensor, shape (1, 3, H, W)
        Of a size at which the image prior can hold the scene behind it.
    priors : mapping with "image" and "kernel"
    blur : Blur or LinearLight of one
    noise_std : float
    rounds : int
        How often; for each kernel, and as often again. Then a few times as many steps of refinement.
    starts : int
        How many kernels are sought; when more than are left, the best go on several times, with other noise.
    refine : bool
        Whether the best are refined, which asks more of ``y``: that all that is wrong with it is white noise.
    seed : int
    progress : bool

    Returns
    -------
    tuple of Tensor, shapes (starts, 1, K, K) and (starts,)
        The best first, and what each leaves unexplained.
    """
    noise_std = max(noise_std, 1e-3)  # without any, the measurement would weigh infinitely much
    window = priors["kernel"].shape[1]
    response = "srgb" if isinstance(blur, LinearLight) else "linear"
    if blur.boundary not in EM_BOUNDARIES:  # what is far enough from the edges is as if the sensor saw no more
        y, blur = y[..., *seen(y.shape[-2:], (window, window))], blur_of("valid", response)
    periodic = blur.boundary == "circular"
    pyramid = partial(l0_pyramid, linear_values(blur, y), window, noise_std, periodic=periodic)
    guesses = [pyramid(strength=strength, ridge=ridge)[1] for strength, ridge in GUESSES]
    guesses = torch.cat([*guesses, no_blur(1, window).to(y)])
    many = y.expand(len(guesses), -1, -1, -1)
    common = dict(kernel_size=window, noise_std=noise_std, boundary=blur.boundary, response=response, progress=progress)
    # Noise of its own for each stage: one that met its own again would get back what it had put in.
    seeds = torch.randint(
        2**31, (3 + starts + len(guesses),), generator=torch.Generator().manual_seed(seed % 2**64)
    ).tolist()
    run = fast_em(many, priors["image"], steps=EM_STEPS, kernel0=guesses, seed=seeds[0], **common)

    again = dict(steps=ROUND_STEPS, rounds=rounds, start_time=START_TIME, backbone="diffpir")
    go_on = partial(diffusion_em, regularizer=Annealed(priors["kernel"]), **again, **common)
    apart = _apart(run.kernel, range(len(guesses)))
    handicap = y.new_tensor([1.0] * len(GUESSES) + [HANDICAP])[apart]
    many = y.expand(len(apart), -1, -1, -1)
    run = go_on(many, priors["image"], kernel0=run.kernel[apart], image0=run.image[apart], seed=seeds[1])
    rest = unexplained(y, run.kernel, priors["image"], blur, noise_std)
    order = (handicap * rest).argsort().tolist()
    kept = _apart(run.kernel, order)
    kept += [order[i % len(order)] for i in range(starts - len(kept))]

    many = y.expand(len(kept), -1, -1, -1)
    run = go_on(many, priors["image"], kernel0=run.kernel[kept], image0=run.image[kept], seed=seeds[2 : 2 + len(kept)])
    rest, handicap = unexplained(y, run.kernel, priors["image"], blur, noise_std), handicap[kept]
    best = (handicap * rest).argsort()[:starts]
    kernels, rest, handicap = run.kernel[best], rest[best], handicap[best]
    if not refine:
        return kernels, rest
    steps = REFINE_STEPS * rounds
    if response == "srgb":
        kernels = _refined_in_light(y, kernels, priors, blur, noise_std, steps, seeds[-2:], progress)
        rest = unexplained(y, kernels, priors["image"], blur, noise_std)
    else:
        refined = refine_kernels(y, kernels, priors, blur, noise_std, steps=steps, seed=seeds[-2], progress=progress)
        after = unexplained(y, refined, priors["image"], blur, noise_std)
        # A kernel that a restoration predicts best without is none: wide ones explain a sharp picture as well.
        better = (after <= rest) | _do_not_blur(refined)
        kernels, rest = torch.where(better[:, None, None, None], refined, kernels), torch.where(better, after, rest)
    order = (handicap * rest).argsort()
    return kernels[order], rest[order]


def _apart(kernels: Tensor, order: Sequence[int]) -> list[int]:
    """In this order, the kernels that have not become one with any before."""
    apart = []
    for i in order:
        if all(mnc(kernels[i : i + 1], kernels[j : j + 1]) < SAME for j in apart):
            apart.append(i)
    return apart


def _refined_in_light(
    y: Tensor, kernels: Tensor, priors: Mapping[str, DiffusionPrior], blur: LinearLight, noise_std: float,
    steps: int, seeds: Sequence[int], progress: bool,
) -> Tensor:  # fmt: skip
    """Of each kernel, it with the strokes that half the size shows, refined, and no blur, which predicts best."""
    found = refine_coarsely(y, kernels, priors, blur, noise_std, steps=steps, seed=seeds[1], progress=progress)
    refined = refine_kernels(y, found, priors, blur, noise_std, steps=steps, seed=seeds[0], progress=progress)
    choices, unlike = torch.stack([kernels, refined]), _likeness_to_none(refined) < NEARLY_SHARP
    if not unlike.all():
        choices = torch.cat([choices, no_blur(1, kernels.shape[-1]).to(kernels).expand_as(choices[:1])])
    wrong = prediction_error(y, choices.flatten(0, 1), priors["image"], blur, noise_std, seed=seeds[0] + 1)
    wrong = wrong.view(len(choices), -1)
    wrong[2:, unlike] = torch.inf
    return choices[wrong.argmin(0), range(len(kernels))]


def refine_kernels(
    y: Tensor,
    kernels: Tensor,
    priors: Mapping[str, DiffusionPrior],
    blur: Blur | LinearLight,
    noise_std: float,
    *,
    levels: tuple[float, float] | None = None,
    rate: float = RATE,
    steps: int = REFINE_STEPS * ROUNDS,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Kernels under which a restoration predicts best what it has not seen, from those nearby.

    Noise ``e``, added in one share and taken away in another, makes two measurements of one whose noise is independent
    (recorrupted to recorrupted, CVPR 2021; arXiv 2111.09447). DPIR restores the first, and what comes out, blurred
    again, has to be the second: noise is no help in that, and a wrong kernel leaves a picture that is wrong. This error
    is descended, with new noise at each step, by Adam on the kernel's logarithm. Unlike an M-step it feels how the
    restoration itself depends on the kernel, through its data steps and networks. Beside it counts the diffusion prior
    of kernels, by its score at a random noise level. Neither sees haze, and Adam's steps are as long where the error is
    flat: what comes out is :func:`~blindlib.em.bare`.

    It sharpens kernels that are nearly right. From one that is wrong it may go astray: no blur predicts well, too.

    Parameters
    ----------
    y : Tensor, shape (1, 3, H, W)
        Of a size at which the image prior can hold the scene behind it.
    kernels : Tensor, shape (n, 1, K, K)
    priors : mapping with "image" and "kernel"
    blur : Blur or LinearLight of one
        Circular or valid.
    noise_std : float
        Of ``y``, positive.
    levels : (float, float), optional
        What the restorations are told of the noise, with what is added, at the first step and at the last: more than
        ``noise_std``. Default: 0.03, or ``sqrt(2) noise_std`` where that is more; in light it falls to the latter.
    rate : float
        Of Adam; it falls in the second half.
    steps : int
        Each costs about 14 evaluations of the image's network.
    seed : int
    progress : bool

    Returns
    -------
    Tensor, shape (n, 1, K, K)
    """
    g = torch.Generator().manual_seed(seed)
    if levels is None:
        equal = 2**0.5 * noise_std  # both measurements have as much noise
        first = max(equal, PREDICT_FROM)
        levels = (first, equal if isinstance(blur, LinearLight) else first)
    first, last = levels
    log = (kernels + 1e-5).log().requires_grad_()
    adam = torch.optim.Adam([log], betas=(0.9, 0.99))
    for i in bar(range(steps), "refining", progress):
        adam.param_groups[0]["lr"] = rate * min(1, 2 * (1 - i / steps))
        kernel = log.flatten(1).softmax(1).view_as(log)
        level = first * (last / first) ** (i / max(steps - 1, 1))
        wrong = _mispredicted(y, kernel, priors["image"], blur, noise_std, level, g)
        pull = _away_from_prior(kernel.detach(), priors["kernel"], g)
        adam.zero_grad()
        (wrong.square().sum() / (2 * level**2) + (pull * kernel).sum()).backward()
        adam.step()
    return bare(log.detach().flatten(1).softmax(1).view_as(log))


def refine_coarsely(
    y: Tensor,
    kernels: Tensor,
    priors: Mapping[str, DiffusionPrior],
    blur: LinearLight,
    noise_std: float,
    *,
    steps: int = REFINE_STEPS * ROUNDS,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Kernels with the strokes that are missing in those given: :func:`refine_kernels` at half the size.

    Where a kernel has no light at all, its logarithm hardly moves, and fine details of a picture do not tell of strokes
    far from those that are there. So it begins with wider kernels on a haze, and with much noise. At a quarter of the
    pixels that costs a third. What comes out is soft, and has lost fine strokes: half and half with what was given it
    has all of them, for :func:`refine_kernels` to make exact.

    Parameters
    ----------
    y : Tensor, shape (1, 3, H, W)
    kernels : Tensor, shape (n, 1, K, K), K even
    priors : mapping with "image" and "kernel"
    blur : LinearLight
        Circular or valid. Halving is of light: in values a blur would not stay one.
    noise_std : float
        Of ``y``, positive.
    steps : int
    seed : int
    progress : bool

    Returns
    -------
    Tensor, shape (n, 1, K, K)
        Those given and those found, half and half; those given, where they predict the halved picture better, or where
        that is less than twice as wide as the halved kernel.
    """
    stride, half = priors["image"].stride, kernels.shape[-1] // 2
    grow = half - 1 if blur.boundary == "valid" else 0
    sizes = [(side // 2 + grow) // stride * stride - grow for side in y.shape[-2:]]
    if min(sizes) < 2 * half or (not grow and any(2 * s != side for s, side in zip(sizes, y.shape[-2:], strict=True))):
        return kernels
    light = F.interpolate(to_light(y[..., : 2 * sizes[0], : 2 * sizes[1]]), sizes, mode="bicubic", antialias=True)
    # White noise is halved, but there is what halving gets wrong: restorations are told no less noise than of y.
    y, noise_std = to_srgb(light.clamp(-1, 1)), max(noise_std, COARSE_NOISE)
    small = 4 * F.avg_pool2d(kernels, 2)
    wide = Blur("zero")(small, gaussian_kernels(1, 9, std=(WIDER, WIDER)).to(small)) + HAZE
    first, last = COARSE_LEVELS
    levels = (max(first, 4 * noise_std), max(last, 2**0.5 * noise_std))
    options = dict(levels=levels, rate=COARSE_RATE, steps=steps, seed=seed, progress=progress)
    found = refine_kernels(y, wide, priors, blur, noise_std, **options)
    before, after = (prediction_error(y, k, priors["image"], blur, noise_std, seed=seed + 1) for k in (small, found))
    large = torch.cat([_enlarged(*pair) for pair in zip(found.split(1), kernels.split(1), strict=True)])
    return torch.where((after < before)[:, None, None, None], (kernels + large) / 2, kernels)


def _enlarged(small: Tensor, like: Tensor) -> Tensor:
    """A kernel (1, 1, K/2, K/2) at the size of another, (1, 1, K, K), by quarters of a pixel where it is most like it.

    No measurement tells where a kernel lies, and one that has drifted would shift the picture.
    """
    by = torch.arange(-8, 9, device=like.device) / 4 * 2 / like.shape[-1]
    down, right = (d.flatten() for d in torch.meshgrid(by, by, indexing="ij"))
    moves = torch.eye(2, 3, device=like.device).repeat(len(down), 1, 1)
    moves[:, 0, 2], moves[:, 1, 2] = right, down
    many = small.expand(len(moves), -1, -1, -1)
    grids = F.affine_grid(moves, [len(moves), *like.shape[1:]], align_corners=False)
    large = F.grid_sample(many, grids, mode="bicubic", align_corners=False).clamp(min=0)
    large = large / large.sum((-2, -1), keepdim=True)
    best = F.cosine_similarity(large.flatten(1), like.flatten(1)).argmax()
    return large[best : best + 1]


@torch.no_grad()
def prediction_error(
    y: Tensor,
    kernels: Tensor,
    prior: DiffusionPrior,
    blur: Blur | LinearLight,
    noise_std: float,
    *,
    draws: int = 2,
    seed: int = 0,
) -> Tensor:
    """What :func:`refine_kernels` descends, of each kernel and with the same noise, to choose among them.

    In light it tells the true kernel by far, also from no blur, which leaves nothing :func:`unexplained`.

    Parameters
    ----------
    y : Tensor, shape (1, 3, H, W)
    kernels : Tensor, shape (n, 1, K, K)
    prior : DiffusionPrior
        Of images.
    blur : Blur or LinearLight of one
        Circular or valid.
    noise_std : float
        Of ``y``, positive.
    draws : int
        Of noise; each costs 8 evaluations of the network a kernel.
    seed : int

    Returns
    -------
    Tensor, shape (n,)
        Mean squares.
    """
    g, level = torch.Generator().manual_seed(seed), 2**0.5 * noise_std
    wrong = [_mispredicted(y, kernels, prior, blur, noise_std, level, g) for _ in range(draws)]
    return torch.stack(wrong).square().mean((0, 2, 3, 4))


def _mispredicted(
    y: Tensor, kernels: Tensor, prior: DiffusionPrior, blur: Blur | LinearLight, noise_std: float, level: float,
    g: torch.Generator,
) -> Tensor:  # fmt: skip
    """A prediction from ``y`` with noise added up to ``level``, less the measurement whose noise is independent."""
    # Near the edges a wide kernel depends on what was not seen, so that narrow ones would predict them better.
    margin = 0 if blur.boundary == "circular" else min(kernels.shape[-1] // 2, min(y.shape[-2:]) // 4)
    inner = (..., slice(margin, y.shape[-2] - margin), slice(margin, y.shape[-1] - margin))
    added = (level**2 - noise_std**2) ** 0.5
    e = torch.randn(y.shape, generator=g).to(y)
    given, kept = (y + added * e).clamp(-3, 3), y - noise_std**2 / added * e  # more than 3 would be no image's
    return (predicted(given, kernels, prior, blur, min(level, 0.99)) - kept)[inner]


def predicted(y: Tensor, kernels: Tensor, prior: DiffusionPrior, blur: Blur | LinearLight, noise_std: float) -> Tensor:
    """``y`` restored with each kernel and blurred again, as :func:`~blindlib.dpir` does it; differentiable in them.

    The gradient passes through the last levels only, which is half the cost and as good. It passes through the
    solution of a linear data step implicitly, by one step of Newton whose value is nothing; in light, through the
    iterations of its solution.
    """
    light = isinstance(blur, LinearLight)
    levels = LEVELS_IN_LIGHT if light else LEVELS
    first = len(levels) - FOLLOWED
    with torch.no_grad():
        many, known = y.expand(len(kernels), -1, -1, -1), partial(blur, kernel=kernels)
        z = dpir(many, known, prior, noise_std, steps=first, last=levels[first - 1] / noise_std)
    for level in levels[first:]:
        t = prior.schedule.time(level)
        weight = 0.23 * (noise_std / prior.schedule.sigma(t)) ** 2
        with torch.set_grad_enabled(light and torch.is_grad_enabled()):
            x = blur.solve(y=many, kernel=kernels, image=z, weight=weight)
        if torch.is_grad_enabled() and not light:
            at = x.clone().requires_grad_()
            distance = (many - blur(at, kernels)).square().sum() + weight * (at - z).square().sum()
            slope = torch.fft.rfft2(torch.autograd.grad(distance / 2, at, create_graph=True)[0])
            curvature = otf(kernels.detach(), tuple(x.shape[-2:])).abs() ** 2 + weight
            x = x - torch.fft.irfft2((slope - slope.detach()) / curvature, s=x.shape[-2:])
        z = prior.denoise(math.sqrt(prior.schedule.alpha_bar(t)) * x, t)
    return blur(z, kernels)


@torch.no_grad()
def _away_from_prior(kernel: Tensor, prior: DiffusionPrior, g: torch.Generator) -> Tensor:
    """Gradient of the negative logarithm of the prior's density, smoothed by noise of a random level, by Tweedie."""
    half = kernel.amax((-2, -1), keepdim=True) / 2
    level = 0.1 * 5 ** float(torch.rand((), generator=g))
    t = prior.schedule.time(level)
    margin = (prior.shape[-1] - kernel.shape[-1]) // 2  # a smaller kernel is one in the middle of the prior's window
    latent = kernel_to_latent(F.pad(kernel, (margin, margin, margin, margin)))
    noisy = latent + level * torch.randn(latent.shape, generator=g).to(kernel)
    slope = (latent - prior.denoise(math.sqrt(prior.schedule.alpha_bar(t)) * noisy, t)) / (level**2 * half)
    return slope[..., margin : margin + kernel.shape[-2], margin : margin + kernel.shape[-1]]


def unexplained(
    y: Tensor, kernels: Tensor, prior: DiffusionPrior, blur: Blur | LinearLight, noise_std: float
) -> Tensor:
    """What remains of ``y`` when it is restored with each kernel and blurred again: which of them fits?

    The restoration expects twice the noise, so that it keeps to pictures that the prior knows: under a wrong kernel
    there is none that explains ``y``. (The residual of a parallel run tells less: there image and kernel have adapted
    to each other.) A kernel that does nothing explains any photograph, as a picture of something blurred: this is for
    choosing among kernels that may be right.

    Parameters
    ----------
    y : Tensor, shape (1, 3, H, W)
        Of a size at which the prior can hold the scene behind it.
    kernels : Tensor, shape (n, 1, K, K)
    prior : DiffusionPrior
        Of images.
    blur : Blur or LinearLight of one
    noise_std : float

    Returns
    -------
    Tensor, shape (n,)
        Root mean squares; for the right kernel between once and twice the noise's standard deviation.
    """
    many, known, level = y.expand(len(kernels), -1, -1, -1), partial(blur, kernel=kernels), 2 * noise_std
    while True:
        try:
            images = sample(many, known, {"image": prior}, steps=20, guidance=DiffPIR(min(level, 0.99))).image
            return (y - blur(images, kernels)).square().mean((1, 2, 3)).sqrt()
        except ArithmeticError:  # the noise is more: a picture of few colours has errors that look like none
            if level >= 0.99:
                raise
            level *= 2


def estimate_noise(y: Tensor) -> float:
    """Standard deviation of white noise in ``y`` (B, C, H, W), from the median of its diagonal differences.

    Blur leaves next to nothing at the finest diagonal scale, so what is there is noise (Donoho & Johnstone,
    Biometrika 1994). At least 0.004: half a grey level of a byte, and what a single row of pixels is taken to have.
    """
    d = (y[..., 1:, 1:] + y[..., :-1, :-1] - y[..., 1:, :-1] - y[..., :-1, 1:]) / 2
    return min(max(float(d.detach().abs().median()) / 0.6745, 0.004), 0.99) if d.numel() else 0.004


def read_image(photo: Photo) -> Tensor:
    """Any picture as a tensor (1, 3, H, W) in [-1, 1]; see :func:`deblur` for what it takes, and its errors."""
    if isinstance(photo, Tensor):
        x = photo[None] if photo.ndim == 3 else photo
        if not x.is_floating_point():
            raise TypeError(f"photo: a tensor is expected to hold floats in [-1, 1], got {x.dtype}")
        if x.ndim != 4 or x.shape[:2] != (1, 3):
            raise ValueError(f"photo: expected a tensor (3, H, W) or (1, 3, H, W), got {tuple(photo.shape)}")
        if not bool(torch.isfinite(x).all()) or float(x.abs().max()) > 3:
            raise ValueError("photo: expected a tensor of finite values in [-1, 1]; it has NaN or larger ones")
        return x.float()
    if isinstance(photo, str | os.PathLike):
        if not Path(photo).is_file():
            raise FileNotFoundError(f"photo: no file {os.fspath(photo)!r}")
        try:
            # From bytes: of a TIFF on end Pillow maps the file by the sides that it has when upright.
            with Image.open(io.BytesIO(Path(photo).read_bytes())) as opened:
                photo = _decoded(opened)
        except Exception as error:  # of damaged files Pillow raises a dozen kinds
            reason = str(error) or type(error).__name__
            raise ValueError(f"photo: {os.fspath(photo)!r} cannot be read as an image ({reason})") from None
    elif isinstance(photo, Image.Image):
        photo = _decoded(photo)
    if isinstance(photo, Image.Image):
        if photo.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
            photo = np.asarray(photo).astype(np.float32) / (65535 if photo.mode != "F" else 1)
        elif photo.mode in ("RGBA", "LA", "PA") or "transparency" in photo.info:
            rgba = photo.convert("RGBA")
            photo = np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
        else:
            photo = np.asarray(photo.convert("RGB"))
    if not isinstance(photo, np.ndarray):
        raise TypeError(f"photo: expected a path, PIL image, array or tensor, got {type(photo).__name__}")
    if photo.ndim not in (2, 3) or (photo.ndim == 3 and photo.shape[2] not in (1, 3, 4)) or 0 in photo.shape:
        raise ValueError(f"photo: expected an array (H, W), (H, W, 3) or (H, W, 4), got {photo.shape}")
    if photo.dtype not in (np.uint8, np.uint16) and not np.issubdtype(photo.dtype, np.floating):
        raise TypeError(f"photo: expected an array of uint8, uint16 or floats in [0, 1], got {photo.dtype}")
    full = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}.get(photo.dtype, 1)
    x = torch.from_numpy(photo.astype(np.float32) / full)
    if not bool(torch.isfinite(x).all()) or float(x.min()) < -0.01 or float(x.max()) > 1.01:
        raise ValueError(f"photo: floats are expected in [0, 1], got [{float(x.min()):.3g}, {float(x.max()):.3g}]")
    x = x[:, :, None] if x.ndim == 2 else x
    if x.shape[2] == 4:
        x = x[:, :, :3] * x[:, :, 3:] + 1 - x[:, :, 3:]
    return 2 * x.expand(*x.shape[:2], 3).permute(2, 0, 1)[None].contiguous() - 1


def _decoded(photo: Image.Image) -> Image.Image:
    """Upright, and in sRGB."""
    photo.load()
    turn = UPRIGHT.get(photo.getexif().get(ExifTags.Base.Orientation))
    return _in_srgb(photo if turn is None else photo.transpose(turn))


def _in_srgb(photo: Image.Image) -> Image.Image:
    """The picture in sRGB, which is what is written: its own colours, such as a camera's, would be lost in silence."""
    if photo.mode not in ("RGB", "RGBA") or not (profile := photo.info.get("icc_profile")):
        return photo
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(photo, own, ImageCms.createProfile("sRGB"))
    except (ImageCms.PyCMSError, OSError):  # a profile that is broken
        return photo


def resize(image: Tensor, size: int | Sequence[int]) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] at another ``size``: (height, width), or the side of a square."""
    size = (size, size) if isinstance(size, int) else tuple(size)
    return F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


def write_image(image: Tensor, path: str | os.PathLike) -> None:
    """Write an image (1, 3, H, W) or (1, 1, H, W) in [-1, 1], whole or not at all.

    Raises
    ------
    ValueError
        If the suffix of ``path`` is of no known format.
    OSError
        If its folder does not exist, or it is a folder itself.
    """
    kind = check_output(path)
    x = ((image[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    with whole(path) as part:
        Image.fromarray(x[:, :, 0] if x.shape[2] == 1 else x).save(part, format=kind, quality=95)


def is_same_file(path: str | os.PathLike, other: Path) -> bool:
    """Whether both are there and one file, by whatever names."""
    return os.path.exists(path) and other.exists() and other.samefile(path)


def check_output(path: str | os.PathLike) -> str:
    """The image format that ``path`` asks for; raises as :func:`write_image`, so that nothing is computed in vain."""
    path, formats = Path(path), Image.registered_extensions()
    if formats.get(path.suffix.lower()) not in FORMATS:
        raise ValueError(f"path: no image format to write goes by the suffix {path.suffix!r}; take .png or .jpg")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"path: {str(path)!r} is a folder; name a file")
    return formats[path.suffix.lower()]


def _textured_part(y: Tensor, window: int, crop: int, boundary: str, stride: int) -> tuple[Tensor, tuple]:
    """The square part with most edges, of such a size that the scene behind it suits the prior; and where it is."""
    h, w = y.shape[-2:]
    if boundary != "valid":
        return y, (0, 0, h, w)
    grow = window - 1
    side = (min(h, w, crop) + grow) // stride * stride - grow
    if side < window:
        few = f"crop: {crop}" if crop < min(h, w) else f"photo: {w}x{h}"
        raise ValueError(f"{few} pixels are too few to read a kernel of up to {window} pixels from")
    grey = y.mean(1, keepdim=True)
    edges = F.pad((grey.diff(dim=2)[..., :-1].square() + grey.diff(dim=3)[..., :-1, :].square()).sqrt(), (0, 1, 0, 1))
    edges = edges * (grey.abs() < 0.97)  # clipped highlights break the linear model
    score = F.avg_pool2d(edges, side, stride=max(1, side // 16))[0, 0]
    best = int(score.argmax())
    top, left = (best // score.shape[1]) * max(1, side // 16), (best % score.shape[1]) * max(1, side // 16)
    return y[..., top : top + side, left : left + side], (top, left, side, side)


def _residual(y: Tensor, image: Tensor, kernel: Tensor, blur: Blur | SpaceVaryingBlur | LinearLight) -> Tensor:
    """Root mean square residual where the restored picture reaches."""
    size, place = tuple(y.shape[-2:]), {}
    if blur.boundary == "valid":
        inner = seen(size, kernel.shape[-2:])
        y = y[..., *inner]
        if kernel.ndim == 6:
            place = {"part": (inner[0].start, inner[1].start, *size)}
    return (y - blur(image, kernel, **place)).square().mean().sqrt()


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Overlapping intervals of about ``tile`` that cover ``length``."""
    if length <= tile + overlap:
        return [(0, length)]
    n = -(-(length - overlap) // (tile - overlap))
    starts = [round(i * (length - tile) / (n - 1)) for i in range(n)]
    return [(s, s + tile) for s in starts]


def _ramp(length: int, overlap: int, like: Tensor) -> Tensor:
    """Weights that fade towards both ends of a piece, for a seamless overlap."""
    i = torch.arange(length, device=like.device, dtype=like.dtype) + 0.5
    return (torch.minimum(i, length - i) / overlap).clamp(max=1)
