"""Learning an operator from unpaired images by distribution matching (DDM4IP, arXiv 2506.14605).

Many degraded images, a few other clean ones, and the operator's form are known; its parameters are not. They are right
when clean images, degraded by the operator, cannot be told from the degraded ones. What tells them apart is the
velocity field of a flow from noise to images: one network learns that of the measured images (:func:`fit_flow`), a
second one, which starts as a copy, follows that of the simulated ones, and their difference says how to change the
operator (:func:`learn_operator`). It starts where the moments of the two sets agree (:class:`Moments`), found from
their power spectra by phase retrieval (:func:`retrieved_kernel`), and ends no worse by those moments. A blur that
changes over the field is a grid of PSFs, each learned from its cell (:class:`FieldMoments`).
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blindlib.baselines import differences
from blindlib.checks import check_counts, check_kernel, check_noise, check_positive
from blindlib.em import Threshold, fit_kernel
from blindlib.files import save_whole
from blindlib.jobs import Team
from blindlib.metrics import mnc, recentred
from blindlib.operators import Blur, Downsample, SpaceVaryingBlur, otf, share, warp
from blindlib.priors import Prior, pick_device, read_checkpoint, write_checkpoint
from blindlib.sampler import bar, dpir
from blindlib.simulate import gaussian_kernels
from blindlib.unet import UNet, moving_average

Operator = Blur | Downsample | SpaceVaryingBlur
Velocity = Callable[[Tensor, Tensor], Tensor]
Images = Tensor | Sequence[Tensor]

FLOW = dict(base_channels=16, multipliers=(1, 2, 2), groups=8)
"""Settings of the default velocity net, 0.3 million parameters."""
FLOW_STRIDE = 2 ** (len(FLOW["multipliers"]) - 1)
"""The side of a patch is a multiple of it."""

SECONDS_BETWEEN_SAVES = 60
# How often in a run moments look at the kernel that networks learn, steps that lie between at least, and how many times
# in a row they may find it astray.
CHECKS, APART, PATIENCE = 5, 10, 2


def between(y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The flow's path ``x_t = (1 - t) noise + t y`` from noise to images ``y`` (B, C, H, W); ``t`` (B,) in [0, 1]."""
    t = t.reshape(-1, 1, 1, 1)
    return (1 - t) * noise + t * y


def velocity(net: UNet, positions: Tensor | None = None) -> Velocity:
    """``net`` as a velocity field ``v(x_t, t)``, ``t`` (B,) in [0, 1]: the net counts a thousand steps in that time.

    With ``positions`` (B, 2, H, W), two more channels say where in the field, from -1 to 1, each pixel of x_t lies.
    """
    return lambda x_t, t: net(x_t if positions is None else torch.cat([x_t, positions], 1), 1000 * t)


def flow_loss(field: Velocity, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Flow matching: squared error of ``field`` at x_t against ``y - noise``, mean over pixels, (B,).

    The field that minimises its mean is ``E[y - noise | x_t]`` (arXiv 2210.02747, on its straight paths).
    """
    return (field(between(y, t, noise), t) - (y - noise)).square().mean((1, 2, 3))


def operator_loss(difference: Tensor, y: Tensor) -> Tensor:
    """What an operator step lowers: ``mean(difference * y)``, ``difference`` taken as constant.

    Its gradient with respect to the simulated images ``y`` (B, C, H, W) is the difference of the two velocities at
    x_t, that of the simulated images minus that of the measured ones. As a velocity v goes with the score (t v - x_t) /
    (1 - t), this is, up to a weight for each t, the gradient of the divergence KL(simulated || measured).
    """
    return (difference.detach() * y).mean()


def standard(y: Tensor) -> Tensor:
    """Patches (B, C, H, W) less their mean, in units of their contrast (plus a little, for flat ones).

    Scenes differ in brightness and contrast far more than blur changes them, and of a hundred clean scenes the contrast
    is not known well. Two sets that are alike are alike in this form too, and in it every patch counts the same.
    """
    y = y - y.mean((1, 2, 3), keepdim=True)
    return y / (y.square().mean((1, 2, 3), keepdim=True) + 0.05**2).sqrt()


def simplex(theta: Tensor) -> Tensor:
    """Free parameters (..., K, L) to kernels ``|theta| / sum |theta|``: non-negative, of sum one."""
    return theta.abs() / theta.abs().sum((-2, -1), keepdim=True)


class DeepLinear(nn.Module):
    """A kernel as a chain of small convolutions with many channels, without biases or anything nonlinear between them.

    As a network this is one linear filter, for super-resolution with a stride at its last layer (KernelGAN, arXiv
    1909.06581; arXiv 2506.14605). Its gradients reach the kernel through the layers, so that pixels do not move one by
    one. The kernel that the layers make together is far cheaper to apply than they are, and has the same gradients; so
    this gives the kernel, and the operator, a :class:`~blindlib.operators.Downsample`, has the stride.

    Parameters
    ----------
    sizes : sequence of int
        Sides of the layers' filters; the kernel's is ``1 + sum(size - 1)``.
    channels : int
        Between the layers; the paper has 64.
    seed : int
        Of the first weights.

    Raises
    ------
    ValueError
        If a size or the channels are no positive integer, or there is no layer.
    """

    def __init__(self, sizes: Sequence[int] = (7, 5, 3, 1, 1, 1), *, channels: int = 64, seed: int = 0) -> None:
        super().__init__()
        if not sizes:
            raise ValueError("sizes: expected at least one layer, got none")
        check_counts(channels=channels, **{f"sizes[{i}]": size for i, size in enumerate(sizes)})
        widths = [1, *[channels] * (len(sizes) - 1), 1]
        with _seeded(seed):
            self.layers = nn.ModuleList(
                nn.Conv2d(i, o, size, bias=False) for i, o, size in zip(widths, widths[1:], sizes, strict=False)
            )

    def forward(self) -> Tensor:
        """The layers' answer to one bright pixel, (1, 1, K, K): of either sign, of any sum."""
        h = self.layers[0].weight.new_ones(1, 1, 1, 1)
        for layer in self.layers:
            h = F.conv2d(h, layer.weight, padding=layer.kernel_size[0] - 1)
        return h

    def fit(self, kernel: Tensor, *, steps: int = 300, learning_rate: float = 3e-3) -> None:
        """Make the layers give ``kernel``, by least squares with Adam.

        Parameters
        ----------
        kernel : Tensor, shape (1, 1, K, K)
            Of the size that the layers make, ``1 + sum(size - 1)``.
        steps : int
        learning_rate : float
            It rises over the first tenth of the steps and falls to zero over the last third.

        Raises
        ------
        ValueError
            If the kernel is not of that shape.
        """
        if kernel.shape != self().shape:
            raise ValueError(f"kernel: expected shape {tuple(self().shape)}, got {tuple(kernel.shape)}")
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        for step in range(steps):
            _set_rate(optimizer, learning_rate, step, steps)
            optimizer.zero_grad()
            (self() - kernel).square().sum().backward()
            optimizer.step()


def bare(kernel: Tensor) -> Tensor:
    """Kernels (..., K, L) of sum one without what is fainter than a fiftieth of their peak.

    A tenth of a fitted kernel may be haze all over its window. Few low frequencies show it, so it hardly changes what
    is simulated; but it takes as much from all others, which a restoration then makes too strong. A real skirt that is
    as faint, such as a lens's glare, is lost with it.
    """
    kernel = Threshold(0.02)(kernel, 0)
    return kernel / kernel.sum((-2, -1), keepdim=True)


def off_centre(kernel: Tensor) -> Tensor:
    """Squared distance, in pixels, of the centre of mass of kernels (..., K, L) from pixel ``K // 2``; shape (...)."""
    y, x = _offsets(kernel)
    return (kernel * y).sum((-2, -1)).square() + (kernel * x).sum((-2, -1)).square()


def spread(kernel: Tensor) -> Tensor:
    """Mean squared distance, in pixels, of kernels (..., K, L) from their centre of mass; shape (...)."""
    y, x = _offsets(kernel)
    return (kernel * (y**2 + x**2)).sum((-2, -1)) - off_centre(kernel)


def _offsets(kernel: Tensor) -> tuple[Tensor, Tensor]:
    k, l = kernel.shape[-2:]
    grid = [torch.arange(n, device=kernel.device, dtype=kernel.dtype) - n // 2 for n in (k, l)]
    return grid[0][:, None], grid[1][None, :]


@dataclass
class Learned:
    """What :func:`learn_operator` returns.

    Attributes
    ----------
    kernel : Tensor, shape (1, 1, K, K), or (1, rows, columns, 1, K, K) for a SpaceVaryingBlur
        On the CPU, non-negative, of sum one, its centre of mass near pixel ``K // 2``. (For PSFs of their own for red,
        green and blue, learn three and put them together, as ``learn-operator --colour`` does.)
    operator : Blur, Downsample or SpaceVaryingBlur
    noise_std : float
        As given, or as fitted.
    flow : UNet
        The velocity net of the degraded images as it was at the start; another run on the same images can take it over.
    history : dict of Tensor
        Every few steps: ``step``; ``gap``, the mean squared difference of the two velocities since the last entry (it
        falls to a floor as the two sets become alike); ``loss``, that of the auxiliary net's flow matching; ``kernel``
        (n, ...), with the haze that ``Learned.kernel`` is rid of (:func:`bare`); ``mnc``, where the truth was given.
    deviation : Tensor, shape (n, 3)
        :class:`Moments` (of a field the mean over its cells) at the start, at each fifth of the run, ten steps apart at
        least, and at its end. Where a row's largest is above the start's and above 1.2, networks lead away from what
        the images show. After two such rows in a row the run ends, and if the last is one, ``kernel`` is the start.
    seconds : float
        Of the operator steps, those of earlier sessions included.
    field : (int, int), optional
        Height and width of the degraded images, where the blur varies over them: what the PSFs are of.
    """

    kernel: Tensor
    operator: Operator
    noise_std: float
    flow: UNet
    history: dict[str, Tensor]
    deviation: Tensor
    seconds: float
    field: tuple[int, int] | None = None

    @property
    def psfs(self) -> Tensor:
        """The kernel, by the name that it has where it varies over the field."""
        return self.kernel

    def save(self, path: str | Path, note: str = "", response: str = "linear") -> None:
        """Write the operator as safetensors, whole or not at all; :func:`load_operator` reads it, if it is a blur.

        It does not read a :class:`~blindlib.operators.Downsample`, which ``deblur`` could not undo. ``response``
        says of what the images were that it was learned from: values, or (``"srgb"``) the light that they stand for.
        """
        about = dict(operator=repr(self.operator), note=note, response=response, field=self.field)
        write_checkpoint(path, about, {"kernel": self.kernel})


def load_operator(path: str | Path) -> dict[str, object]:
    """The operator in a file that :meth:`Learned.save` wrote, as options of :func:`~blindlib.deblur`.

    Returns
    -------
    dict
        ``kernel``: Tensor (1, 1, K, K), or PSFs (1, rows, columns, 1 or 3, K, K); ``response``: ``"linear"`` or
        ``"srgb"``, whether it blurs values or light; ``field``: (height, width) of what PSFs are of, or None.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is truncated, or holds no operator.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"operator: no file {str(path)!r}")
    if path.suffix != ".safetensors":
        raise ValueError(f"operator: expected a .safetensors file, as learn-operator writes, got {str(path)!r}")
    about, state = read_checkpoint(path)
    kernel = state.get("kernel")
    ranks = {repr(Blur("valid")): 4, repr(SpaceVaryingBlur("valid")): 6}
    if about is None or kernel is None or kernel.ndim != ranks.get(about.get("operator")):
        raise ValueError(f"operator: {str(path)!r} holds no blur; make one with learn-operator")
    field = about.get("field")
    return dict(kernel=kernel, response=about.get("response", "linear"), field=field and tuple(field))


def fit_flow(
    degraded: Images,
    *,
    patch: int = 32,
    steps: int = 600,
    batch: int = 32,
    learning_rate: float = 1e-3,
    net: Mapping = FLOW,
    positions: bool = False,
    seed: int = 0,
    folder: str | Path | None = None,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> UNet:
    """Learn the velocity field of degraded images by flow matching (arXiv 2506.14605, step 1).

    The path is ``x_t = (1 - t) noise + t y`` with t uniform and y a :func:`standard` patch, the net regresses ``y -
    noise``; what counts is the moving average of its weights.

    Parameters
    ----------
    degraded : Tensor (N, C, H, W), or sequence of Tensors (C, H, W), about [-1, 1]
    patch : int
        Side of the random patches that the net sees, a multiple of its stride. Larger than the kernel to be learned.
    steps, batch : int
        The batch is that of each process, if ``accelerate launch`` runs several; they learn one net together.
    learning_rate : float
        Of Adam; it rises over the first tenth of the steps and falls to zero over the last third.
    net : mapping
        Settings of the :class:`UNet`, without its channels.
    positions : bool
        Tell the net where in the field a patch lies, for a blur that varies over it; all images are then of one size.
        One patch in five gets a wrong place, as in the paper, so that the net does not rely on it.
    seed : int
    folder : str or Path, optional
        Where the run is saved about once a minute, whole or not at all; the same call goes on from there.
    device : str or torch.device
        ``"auto"``: a GPU where there is one.
    progress : bool

    Returns
    -------
    UNet
        In evaluation mode, without gradients; ``velocity(net)`` is the field.

    Raises
    ------
    TypeError
        If images are no floating-point tensors.
    ValueError
        If shapes, sizes or values do not fit, or the folder holds another run.
    ArithmeticError
        If the run diverges.
    """
    images = _checked("degraded", degraded, patch)
    field = _field(images) if positions else None
    team = Team(device)
    device = team.device
    check_counts(steps=steps, batch=batch, patch=patch)
    model = _seeded_net(net, len(images[0]), patch, seed, positions).to(device)
    mean = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=moving_average)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    parts = dict(model=model, mean=mean, optimizer=optimizer)
    about = dict(batch=batch, learning_rate=learning_rate, net=repr(model.config), patch=patch, seed=seed)
    run = _Run(folder, "flow", {**about, "degraded": _fingerprint(images)}, parts, team)

    for step in run.steps(steps, "flow matching", progress):
        _set_rate(optimizer, learning_rate, step, steps)
        g = _generator(seed, 0, step, team.rank)
        y, corners = _patches(images, batch, (patch, patch), g)
        y = standard(y.to(device))
        times_and_noise = _times_and_noise(y, g)
        with _seeded(g.initial_seed(), device):
            loss = flow_loss(velocity(model, _positions(corners, field, y, g)), y, *times_and_noise).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        team.average(p.grad for p in model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean.update_parameters(model)
        run.note(loss=loss)
        if (step + 1) % max(1, steps // 40) == 0:
            run.keep()
    return mean.module.eval().requires_grad_(False)


def learn_operator(
    clean: Images,
    degraded: Images,
    operator: Operator | None = None,
    *,
    noise_std: float | None,
    kernel_size: int = 17,
    grid: tuple[int, int] = (4, 4),
    patch: int = 32,
    steps: int = 200,
    batch: int = 32,
    learning_rate: float = 1e-4,
    flow_rate: float = 3e-4,
    centre: float = 0.01,
    compact: float = 0.0,
    frozen: bool = False,
    flow: UNet | None = None,
    start: Tensor | None = None,
    parameters: DeepLinear | None = None,
    truth: Tensor | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> Learned:
    """Learn the kernel that makes ``clean`` images look like the ``degraded`` ones, which show other scenes.

    Each step simulates measurements ``A(x) + noise`` of random clean patches, in :func:`standard` form, takes one
    flow-matching step of an auxiliary velocity net on them, and moves the kernel along the difference of its velocity
    and that of the degraded images (arXiv 2506.14605, step 2). Both use the same evaluation of the auxiliary net.

    Unlike the paper's, the net of the degraded images goes on learning, in step with the auxiliary one. After minutes
    of training no net is at its end; without this (``frozen=True``), what the auxiliary one goes on to learn would pass
    for a difference of the images.

    Up to five times a run :class:`Moments` compare what the kernel simulates with the degraded images, which needs no
    truth. Twice in a row worse than at the start, and beyond chance, and the run ends, for its start.

    Parameters
    ----------
    clean, degraded : Tensor (N, C, H, W), or sequence of Tensors (C, H, W), about [-1, 1]
        Sizes may differ, channels not. A clean image has to be as large as a patch and the kernel around it, a
        degraded one as a patch and as the kernel's autocorrelation, ``2 kernel_size - 1``.
    operator : Blur, Downsample or SpaceVaryingBlur, optional
        With the boundary ``"valid"``, the only one under which a patch is as the whole image is; default: a blur. If it
        varies over the field, all degraded images are of one size, that of the field; the clean ones look alike
        everywhere in it.
    noise_std : float, optional
        Of the degraded images, on the [-1, 1] scale. ``None``: fitted with the start, which then may not be given.
    kernel_size : int
        Side of the kernel's window, at most ``patch``.
    grid : (int, int)
        Rows and columns of PSFs, of a SpaceVaryingBlur.
    patch, batch, steps : int
        The batch is that of each process, as of :func:`fit_flow`; the kernel too is one, and the same in all of them.
    learning_rate : float
        Of the kernel's Adam (betas 0.5, 0.95); it rises over the first tenth of the steps, while the auxiliary net
        catches up, and falls to zero over the last third.
    flow_rate : float
        Of the nets' Adam.
    centre, compact : float
        Weights of :func:`off_centre` and :func:`spread`. Matching cannot tell a kernel from its shifted self, so the
        first has to be positive. (The paper's mean absolute value is constant for kernels of sum one.)
    frozen : bool
        Leave the net of the degraded images as it is, as the paper does: for one that has learned all it can.
    flow : UNet, optional
        From :func:`fit_flow` on the same degraded images and patches; default: it is called.
    start : Tensor, shape of the kernel, optional
        Kernel to start from; default: that of :meth:`Moments.fit`, from :func:`retrieved_kernel`,
        or, for a :class:`Downsample`, from a blot.
    parameters : DeepLinear, optional
        Learn the layers of a deep linear net, of which the kernel is made, instead of its pixels. A copy of it is
        fitted to the start first. :func:`simplex` makes a kernel of what it gives, as of pixels: the papers penalise
        sums other than one instead, and leave the sign free.
    truth : Tensor, shape of the kernel, optional
        The true kernel, for the MNC in progress and history; it does not change the run.
    seed, folder, device, progress
        As of :func:`fit_flow`.

    Returns
    -------
    Learned

    Raises
    ------
    TypeError
        If images are no floating-point tensors, or the operator is none of these.
    ValueError
        If shapes, sizes, values or settings do not fit, or the folder holds another run.
    ArithmeticError
        If the run diverges.
    """
    operator = _operator(operator)
    check_counts(steps=steps, batch=batch, patch=patch, kernel_size=kernel_size)
    if kernel_size > patch:
        raise ValueError(f"kernel_size: a kernel of {kernel_size} pixels is larger than the patch, {patch}")
    check_noise(noise_std, optional=True)
    if noise_std is None and start is not None:
        raise ValueError("noise_std: has to be given with a start; only the fit that finds a start finds the noise too")
    if centre <= 0 or compact < 0:
        raise ValueError(f"centre, compact: expected a positive and a non-negative weight, got {centre}, {compact}")
    scene = operator.sizes((patch, patch), (kernel_size, kernel_size))["image"]
    varying = isinstance(operator, SpaceVaryingBlur)
    blind = start is None and not isinstance(operator, Downsample)
    xs = _checked("clean", clean, scene[0])
    ys = _checked("degraded", degraded, max(patch, 2 * kernel_size - 1) if blind else patch)
    if len(xs[0]) != len(ys[0]):
        raise ValueError(f"clean: has {len(xs[0])} channels, degraded {len(ys[0])}; give both in colour, or both grey")
    shape = (1, *(grid if varying else ()), 1, kernel_size, kernel_size)
    model = _Pixels(shape) if parameters is None else copy.deepcopy(parameters)
    if model().shape != shape:
        raise ValueError(f"parameters: expected such as give a kernel of shape {shape}, got {tuple(model().shape)}")
    for name, given in (("start", start), ("truth", truth)):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(given.shape)}")
    if start is not None:
        check_kernel(start=start)
    channels = len(ys[0]) + 2 * varying
    if flow is not None and flow.in_channels != channels:
        raise ValueError(f"flow: a net of {flow.in_channels} channels, the images (and positions) have {channels}")
    _check_patch(patch, FLOW_STRIDE if flow is None else flow.stride)
    team = Team(device)
    device = team.device
    common = dict(noise_std=noise_std, kernel_size=kernel_size, seed=seed)
    field = _field(ys) if varying else None
    if varying:
        moments = FieldMoments(xs, ys, grid, **common, device=device)
    else:
        moments = Moments(xs, ys, operator, **common, device=device)
    about = common | dict(clean=_fingerprint(xs), degraded=_fingerprint(ys))
    about |= dict(operator=repr(operator), grid=tuple(map(int, grid)) if varying else None)
    given = None if start is None else _fingerprint(start)
    if start is None:
        # Saved, as it takes minutes, and with another machine's rounding it would be another start.
        first = _Run(folder, "start", about, {}, team)
        for _ in first.steps(1, "fitting moments", False):
            if varying:
                guess = moments.retrieved()
            elif blind:
                guess = retrieved_kernel(xs, ys, **common | {"noise_std": noise_std or 0.0})
            else:  # every second pixel mixes up frequencies, and then no spectrum tells the kernel's magnitude
                guess = _blot(kernel_size)
            fitted = moments.fit(guess)
            first.keep(**{k: team.agreed(v).cpu() for k, v in dict(kernel=fitted, noise_std=moments.noise_std).items()})
        start, moments.noise_std = first.kept["kernel"][0], first.kept["noise_std"][0].to(moments.noise_std)
    noise_std = float(moments.noise_std)
    if flow is None:
        shared = dict(seed=seed, folder=folder, device=device, progress=progress)
        flow = fit_flow(ys, patch=patch, positions=varying, **shared)

    data, auxiliary = (copy.deepcopy(flow).to(device).train().requires_grad_(True) for _ in range(2))
    about |= dict(parameters=_fingerprint(model.parameters()))
    model.to(device).fit(start.to(device))
    team.average(p.data for p in model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.5, 0.95))
    nets = torch.nn.ModuleDict({"data": data, "auxiliary": auxiliary})
    learning = [auxiliary] if frozen else [data, auxiliary]
    follower = torch.optim.Adam([p for net in learning for p in net.parameters()], lr=flow_rate)
    parts = dict(kernel=model, nets=nets, optimizer=optimizer, follower=follower)
    about |= dict(flow_rate=flow_rate, batch=batch, centre=centre, compact=compact, frozen=frozen)
    about |= dict(learning_rate=learning_rate, patch=patch, start=given, flow=_fingerprint(flow.parameters()))
    run = _Run(folder, "operator", about, parts, team)
    deviation = team.agreed(moments(start.cpu()).cpu())
    checks = run.kept.setdefault("deviation", [])

    def astray(now: Tensor) -> bool:
        return bool(now.max() > max(1.2, float(deviation.max())))

    for step in run.steps(steps, "learning the operator", progress):
        _set_rate(optimizer, learning_rate, step, steps)
        g = _generator(seed, 1, step, team.rank)
        x = _patches(xs, batch, scene, g)[0].to(device)
        t, noise = _times_and_noise(x[..., :patch, :patch], g)
        k = simplex(model())
        if varying:
            corners = [_corner(field, (patch, patch), g) for _ in x]
            y = operator(x, k, part=[(*corner, *field) for corner in corners])
            positions = _positions(corners, field, noise, g)
        else:
            y, positions = operator(x, k), None
        y = standard(y + noise_std * torch.randn(y.shape, generator=g).to(device))

        x_t = between(y.detach(), t, noise)
        with _seeded(g.initial_seed(), device):
            v = velocity(auxiliary, positions)(x_t, t)
        with torch.no_grad(), _seeded(g.initial_seed(), device):
            difference = v - velocity(data, positions)(x_t, t)
        loss = operator_loss(difference, y) + (centre * off_centre(k) + compact * spread(k)).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        team.average(p.grad for p in model.parameters())
        optimizer.step()

        follower.zero_grad(set_to_none=True)
        flow_matching = (v - (y.detach() - noise)).square().mean()
        flow_matching.backward()
        if not frozen:
            measured, corners = _patches(ys, batch, (patch, patch), g)
            positions = _positions(corners, field, noise, g)
            with _seeded(g.initial_seed(), device):
                flow_loss(velocity(data, positions), standard(measured.to(device)), t, noise).mean().backward()
        team.average(p.grad for net in learning for p in net.parameters())
        for net in learning:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        follower.step()
        run.note(gap=difference.square().mean(), loss=flow_matching)
        last = step + 1 == steps
        check = last or (step + 1) % max(APART, steps // CHECKS) == 0
        if check or (step + 1) % max(1, steps // 40) == 0:
            now = simplex(model().detach()).cpu()
            seen = {} if truth is None else {"mnc": float(mnc(*(p.cpu().flatten(0, -4) for p in (now, truth))).mean())}
            run.keep(step=step + 1, kernel=now[0], **seen)
        if check:
            checks.append(team.agreed(moments(bare(now)).cpu()))
            run.ended = len(checks) >= PATIENCE and all(astray(one) for one in checks[-PATIENCE:])
    found = start.cpu() if astray(checks[-1]) else bare(simplex(model().detach())).cpu()
    history = run.stacked()
    deviation = torch.stack([deviation, *history.pop("deviation")])
    return Learned(found, operator, noise_std, flow, history, deviation, run.seconds, field)


def spectrum_kernel(clean: Images, degraded: Images, *, noise_std: float, kernel_size: int) -> Tensor:
    """The kernel that the power spectra of the two sets show, without a phase: the baseline.

    A blur multiplies power spectra by ``|K|^2``, and the noise adds its own. Their ratio gives the magnitude ``|K|``
    and nothing else; the kernel returned has that magnitude and phase zero, so that it is symmetric about its centre.

    Parameters
    ----------
    clean, degraded : Tensor (N, C, H, W), or sequence of Tensors (C, H, W), about [-1, 1]
        No side shorter than ``2 kernel_size - 1``, the extent of the kernel's autocorrelation. What is computed is
        computed where the degraded ones are.
    noise_std : float
        Of the degraded images, on the [-1, 1] scale.
    kernel_size : int
        Side of its window.

    Returns
    -------
    Tensor, shape (1, 1, K, K)
        Non-negative, of sum one.

    Raises
    ------
    TypeError, ValueError
        As :func:`learn_operator`.
    """
    kernel = torch.fft.fftshift(_inverse(_magnitude(clean, degraded, noise_std, kernel_size)))
    first = len(kernel) // 2 - kernel_size // 2
    kernel = kernel[first : first + kernel_size, first : first + kernel_size].clamp(min=0)
    return (kernel / kernel.sum())[None, None]


def retrieved_kernel(
    clean: Images, degraded: Images, *, noise_std: float, kernel_size: int, starts: int = 64, seed: int = 0
) -> Tensor:
    """A kernel of the magnitude that the power spectra show, and of a phase that makes it one: where learning starts.

    To be non-negative and of bounded size fixes the phase nearly always, but for a shift and a turn by 180 degrees,
    which no power spectrum shows. Phase retrieval is Fienup's hybrid input-output algorithm (Applied Optics 1982), as
    Goldstein & Fattal (ECCV 2012) use it for blur, from many random starts. Of the kernels that come nearest to the
    magnitude, and these turned, the one counts that undoes the blur to the sparsest edges: a wrong phase leaves echoes.

    Parameters
    ----------
    clean, degraded, noise_std, kernel_size
        As of :func:`spectrum_kernel`, and so are the errors.
    starts : int
        At least 2: the better half of them is compared.
    seed : int
        Of the random phases.

    Returns
    -------
    Tensor, shape (1, 1, K, K)
        Non-negative, of sum one, its centre of mass nearest to pixel ``K // 2``.
    """
    if starts < 2:
        raise ValueError(f"starts: expected at least 2, the better half of which counts, got {starts}")
    magnitude = _magnitude(clean, degraded, noise_std, kernel_size)
    side, k, iterations = len(magnitude), kernel_size, 300
    x = magnitude.new_zeros(starts, side, side)
    x[:, :k, :k] = torch.rand(starts, k, k, generator=torch.Generator().manual_seed(seed)) / k**2
    inside = torch.zeros_like(x[0], dtype=torch.bool)
    inside[:k, :k] = True
    for i in range(iterations):
        spectrum = torch.fft.rfft2(x)
        wanted = _inverse(magnitude * spectrum / spectrum.abs().clamp(min=1e-9))
        # Feedback of what is not allowed leads out of local minima, plain projection down into them.
        explore = i % 50 < 35 and i < iterations - 40
        x = torch.where(inside & (wanted > 0), wanted, x - 0.9 * wanted if explore else 0.0)
    error = (torch.fft.rfft2(x).abs() - magnitude).square().sum((1, 2))
    near = x[error.argsort()[: starts // 2], :k, :k][:, None].clamp(min=0) + 1e-12
    near = near / near.sum((2, 3), keepdim=True)
    candidates = recentred(torch.cat([near, near.flip(-2, -1)]))  # turned, one of even size has another centre
    images = [y[:, : 8 * k, : 8 * k] for y in _checked("degraded", degraded, side)[:100]]
    return candidates[sum(_edges(y, candidates) for y in images).argmin()][None]


class Moments:
    """What one can measure of two sets of images without a network, with error bars: two kinds of moments.

    The power spectrum, which a kernel's phase does not change, and two cross-spectra between the image's differences
    ``d`` and only their strongest ``s(d)``, whose square is more than 2 or 6 times the image's mean: ``<S* D> /
    <|S|^2>``, a mean edge. (The thresholds are smooth, so that moments change smoothly with the kernel.) Those are of
    higher order, and show on which side of an edge its blur lies. Of simulated and measured images all are to agree
    within their error bars, which makes a chi-square test: about 1 for the right kernel, whatever the scenes. (With a
    hundred scenes. With twenty the error bars of the spectrum come out too small.) Scenes are coarse or fine, so that
    all frequencies of one err together: along the first principal component of the measured tiles a deviation counts in
    units of that component's variance. To fit a model by moments of its simulations is the method of simulated moments
    (McFadden, Econometrica 1989).

    The scenes are taken to look the same in a mirror, which makes two of each clean one. Arguments and errors as of
    :func:`learn_operator`.

    Attributes
    ----------
    noise_std : Tensor, shape ()
        Of the degraded images, on the [-1, 1] scale; where none was given, what :meth:`fit` found.
    """

    strong = (2.0, 6.0)

    def __init__(
        self,
        clean: Images,
        degraded: Images,
        operator: Blur | Downsample | None = None,
        *,
        noise_std: float | None,
        kernel_size: int,
        seed: int = 0,
        device: str | torch.device = "auto",
    ) -> None:
        check_noise(noise_std, optional=True)
        self.operator = _operator(operator)
        if isinstance(self.operator, SpaceVaryingBlur):
            raise TypeError("operator: a SpaceVaryingBlur has the moments of each cell, FieldMoments")
        factor, grow = getattr(self.operator, "factor", 1), kernel_size - 1
        xs, ys = _checked("clean", clean, factor + grow), _checked("degraded", degraded, 1)
        least = [min(y.shape[-2:]) for y in ys] + [(min(x.shape[-2:]) - grow) // factor for x in xs]
        side = min(4 * kernel_size, *least)
        g = torch.Generator().manual_seed(seed)
        device = pick_device(device)
        x = _tiles(xs, factor * side + grow, 400, g).to(device)
        self.scenes, self.seed = torch.cat([x, x.flip(-1)]), seed
        self.noise_is_known = noise_std is not None
        self.noise_std = torch.tensor(0.02 if noise_std is None else noise_std, device=device)
        moments = self._moments(_tiles(ys, side, 1000, g).to(device))
        self.measured = [(value, variance, *_component(variance, each)) for value, variance, each in moments]

    def __call__(self, kernel: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared deviation in units of its variance, (3,), of images simulated with ``kernel`` (1, 1, K, K).

        Of the power spectrum, then of each cross-spectrum; differentiable. Their noise is the generator's, or always
        the same.
        """
        y = self.operator(self.scenes, kernel.to(self.scenes))
        generator = generator or _generator_on(y.device, self.seed)
        simulated = self._moments(y + self.noise_std * torch.randn(y.shape, generator=generator, device=y.device))
        out = []
        for (a, va, _), (b, vb, component, excess) in zip(simulated, self.measured, strict=True):
            z = _reals((a - b) / (va + vb + 1e-6).sqrt())
            out.append((z.square().sum() - excess * (component @ z).square()) / (a.numel() - 1))
        return torch.stack(out)

    def fit(self, start: Tensor, *, steps: int = 400, learning_rate: float = 1e-2) -> Tensor:
        """The kernel (1, 1, K, K) of least deviation near ``start``, its centre of mass at pixel ``K // 2``.

        A noise level that is not known is fitted too. No moment depends on a shift. So for half of the steps the
        kernel may lie where it likes: held to its centre, it would have to move as a whole whenever one end of it
        became brighter, and would end in a wrong place.
        """
        held, g = steps // 2, _generator_on(self.scenes.device, self.seed)
        kernel = Threshold(0.1)(start.to(self.scenes), 0)  # without the haze of a retrieved kernel
        kernel = self._descend(kernel, steps - held, learning_rate, 0.0, g)
        # A sharp kernel differs much from itself a third of a pixel away.
        return bare(self._descend(recentred(bare(kernel)), held, learning_rate, 10.0, g))

    def _descend(
        self, kernel: Tensor, steps: int, learning_rate: float, hold: float, generator: torch.Generator
    ) -> Tensor:
        # Squares are never negative, and with them a step moves faint pixels less than bright ones.
        root = torch.nn.Parameter((kernel + 1e-5).sqrt())
        level = torch.nn.Parameter(self.noise_std.log()) if not self.noise_is_known else None
        optimizer = torch.optim.Adam([root], lr=learning_rate, betas=(0.9, 0.95))
        if level is not None:
            optimizer.add_param_group({"params": [level]})
        for step in range(steps):
            _set_rate(optimizer, learning_rate, step, steps)
            if level is not None:
                optimizer.param_groups[1]["lr"] *= 5  # a logarithm, to the kernel's roots
                self.noise_std = level.exp()
            k = simplex(root.square())
            # Noise that was always the same would be fitted too, and haze far out would decide where the centre is.
            loss = self(k, generator).sum() + hold * off_centre(bare(k)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if level is not None:
            self.noise_std = level.detach().exp()
        return simplex(root.detach().square())

    def _moments(self, y: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Moments of tiles (N, C, S, S), each (S, S // 2 + 1), its mean's variance, the N tiles' deviations."""
        n, side = len(y), y.shape[-1]
        i = torch.arange(side, device=y.device) + 0.5
        taper = torch.sin((i.minimum(side - i) * 8 / side).clamp(max=1) * math.pi / 2).square()
        taper = taper[:, None] * taper
        slopes = differences((side, side), y)[:, 0, 0]
        d = torch.fft.rfft2(standard(y) * taper)[:, :, None] * slopes  # (N, C, 2, S, S // 2 + 1)
        power = d.abs().square().sum((1, 2))
        mean = power.mean(0) + 1e-9
        rest = (power / mean - 1).detach()
        out = [(mean.log(), rest.square().mean(0) / n, rest)]
        edges = torch.fft.irfft2(d, s=(side, side))
        size = edges.square().sum((1, 2), keepdim=True)
        size = size / (size.mean((-2, -1), keepdim=True) + 1e-4)
        for least in self.strong:
            strong = edges * (size**6 / (size**6 + least**6))
            strong = strong / (strong.square().mean((1, 2, 3, 4), keepdim=True) + 1e-4).sqrt()
            s = torch.fft.rfft2(strong)
            cross, weight = (s.conj() * d).sum((1, 2)), s.abs().square().sum((1, 2))
            weight = weight + 0.01 * weight.mean() + 1e-9  # if all tiles are flat
            ratio = cross.mean(0) / weight.mean(0)
            rest = ((cross - ratio * weight) / weight.mean(0)).detach()
            out.append((ratio, rest.abs().square().mean(0) / n, rest))
        return out


def _generator_on(device: torch.device, seed: int) -> torch.Generator:
    """For noise of ten million pixels a step, which a CPU draws more slowly than a GPU does all the rest."""
    return torch.Generator(device).manual_seed(seed)


def _reals(z: Tensor) -> Tensor:
    """Spectra (..., S, S // 2 + 1) without their zero frequency as vectors of real numbers."""
    z = z.flatten(-2)[..., 1:]
    return torch.cat([z.real, z.imag], -1) if z.is_complex() else z


def _component(variance: Tensor, each: Tensor) -> tuple[Tensor, Tensor]:
    """The first principal component of deviations (N, S, S // 2 + 1) in units of the variance of their mean.

    With the share by which its own variance exceeds that of the rest, 1 - 1 / eigenvalue (Sherman-Morrison).
    """
    z = _reals(each / ((variance + 1e-6) * len(each) ** 2).sqrt())
    z = z * (2 if each.is_complex() else 1) ** 0.5
    values, vectors = torch.linalg.eigh(z @ z.T)
    largest = values[-1].clamp(min=1)
    return vectors[:, -1] @ z / largest.sqrt(), 1 - 1 / largest


@torch.no_grad()
def indirect_kernel(
    clean: Images,
    degraded: Images,
    start: Tensor,
    prior: Prior,
    *,
    noise_std: float,
    patches: int = 200,
    rounds: int = 3,
    steps: int = 4,
    rate: float = 2.0,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """A kernel near the true one brought nearer, by what an image prior says of both sets.

    Restore degraded patches with a kernel, and fit the kernel that takes what was restored to what was measured
    (:func:`~blindlib.dpir` and an M-step of EM). By itself this goes astray: no prior restores without error, and even
    from the true kernel the fit leads to another one. But it goes as far astray with patches that were *simulated*, of
    the clean images, with the kernel at hand. So the difference between the two fits counts, and not the first one. It
    vanishes at the true kernel, whatever the prior. This is indirect inference (Gourieroux, Monfort & Renault, Journal
    of Applied Econometrics 1993), with :class:`Moments` as an earlier, and a prior of images as the better, auxiliary
    model: a fit to what lies beside each edge minds less than power spectra by how much a hundred scenes happen to
    differ from others. A kernel that is right to half a percent it makes no better. Ours; it needs an image prior,
    which the paper (arXiv 2506.14605) does without.

    Parameters
    ----------
    clean, degraded : Tensor (N, C, H, W), or sequence of Tensors (C, H, W), about [-1, 1]
        Of one channel, or as many as the prior has.
    start : Tensor, shape (1, 1, K, K)
        Such as :meth:`Moments.fit` finds. All is computed where the prior is.
    prior : Prior
        Of images, such as ``load_prior("image")``.
    noise_std : float
        Of the degraded images, on the [-1, 1] scale.
    patches : int
        Of each set, drawn at random, of up to 64 pixels a side (more for a larger kernel); fewer tell less.
    rounds : int
    steps : int
        Network evaluations of each restoration.
    rate : float
        By how much of the difference the kernel is moved in a round. It shows only a part of the way.
    seed : int
    progress : bool

    Returns
    -------
    Tensor, shape (1, 1, K, K)
        Of sum one, its centre of mass nearest to pixel ``K // 2``, without haze (:func:`bare`).

    Raises
    ------
    TypeError, ValueError
        As :func:`learn_operator`; or if the start is no kernel, or the prior has other channels.
    """
    check_noise(noise_std)
    check_positive(noise_std=noise_std, rate=rate)
    check_counts(patches=patches, rounds=rounds, steps=steps)
    if start.ndim != 4 or start.shape[:2] != (1, 1) or start.shape[2] != start.shape[3]:
        raise ValueError(f"start: expected shape (1, 1, K, K), got {tuple(start.shape)}")
    check_kernel(start=start)
    grow = start.shape[-1] - 1
    xs, ys = _checked("clean", clean, 1), _checked("degraded", degraded, 1)
    channels, stride = len(ys[0]), prior.stride
    if len(xs[0]) != channels or channels not in (1, prior.shape[0]):
        raise ValueError(f"clean, degraded: expected 1 or {prior.shape[0]} channels, got {len(xs[0])} and {channels}")
    # A patch and the scene behind it, which the prior takes.
    side = min(max(64, grow + stride), min(min(y.shape[1:]) for y in ys), min(min(x.shape[1:]) for x in xs) - grow)
    side -= (side + grow) % stride
    if side <= grow:
        least = 2 * grow + stride
        raise ValueError(f"clean, degraded: too small for a kernel of {grow + 1}, {least}x{least} pixels are enough")
    kernel = start.to(prior.device).float()
    blur, g = Blur("valid"), torch.Generator().manual_seed(seed)
    measured = _patches(ys, patches, (side, side), g)[0].to(kernel)
    scenes = _patches(xs, patches, (side + grow, side + grow), g)[0].to(kernel)

    def fitted(y: Tensor) -> Tensor:
        y, told = y.expand(-1, prior.shape[0], -1, -1), noise_std * (prior.shape[0] / channels) ** 0.5
        x = [dpir(some, partial(blur, kernel=kernel), prior, told, steps=steps) for some in y.split(8)]
        x, y = (images.flatten(0, 1)[None] for images in (torch.cat(x), y))  # the kernel is one for all of them
        return fit_kernel(y, x, told, kernel, boundary="valid")

    for _ in bar(range(rounds), "indirect inference", progress, unit="round"):
        simulated = blur(scenes, kernel)
        simulated = simulated + noise_std * torch.randn(simulated.shape, generator=g).to(kernel)
        kernel = simplex((kernel + rate * (fitted(measured) - fitted(simulated))).clamp(min=0))
    return bare(recentred(kernel))


class FieldMoments:
    """:class:`Moments` of each cell of a field, for a blur that changes over it: a grid of PSFs.

    A cell's moments are taken from tiles about its middle, where its PSF's share is largest. Neighbouring PSFs have
    theirs in it too, so a tile is simulated with all of them, as :class:`SpaceVaryingBlur` interpolates them; while one
    is fitted, the others stay. (A cell taken as uniformly blurred has no PSF that fits: the mean of power spectra is
    not the spectrum of the mean.)

    Parameters
    ----------
    clean : Tensor (N, C, H, W), or sequence of Tensors (C, H, W), about [-1, 1]
    degraded : Tensor (N, C, H, W), or sequence of Tensors (C, H, W), about [-1, 1]
        Of one size, that of the field. Where cells have less than ``4 kernel_size`` pixels a side, tiles are larger
        than cells.
    grid : (int, int)
        Rows and columns of cells.
    noise_std, kernel_size, seed, device
        As of :class:`Moments`.

    Attributes
    ----------
    noise_std : Tensor, shape ()
        Of the degraded images, on the [-1, 1] scale; where none was given, the median of what :meth:`fit` found in the
        cells.

    Raises
    ------
    TypeError
        If images are no floating-point tensors.
    ValueError
        If shapes or values do not fit, a side is shorter than ``3 kernel_size - 2`` (clean) or ``2 kernel_size - 1``
        (degraded), or the grid has no cell.
    """

    def __init__(
        self,
        clean: Images,
        degraded: Images,
        grid: tuple[int, int],
        *,
        noise_std: float | None,
        kernel_size: int,
        seed: int = 0,
        device: str | torch.device = "auto",
    ) -> None:
        check_counts(rows=grid[0], columns=grid[1])
        self.clean = _checked("clean", clean, 3 * kernel_size - 2)
        self.degraded = _checked("degraded", degraded, 2 * kernel_size - 1)
        self.field, self.grid = _field(self.degraded), tuple(grid)
        self.side = min(4 * kernel_size, *self.field, min(min(x.shape[1:]) for x in self.clean) - kernel_size + 1)
        self.options = dict(noise_std=noise_std, kernel_size=kernel_size, seed=seed, device=device)
        check_noise(noise_std, optional=True)
        self.noise_std = torch.tensor(0.02 if noise_std is None else noise_std)
        self.cells = {}  # what was measured in each stays as it is from sweep to sweep

    def retrieved(self) -> Tensor:
        """Each cell's :func:`retrieved_kernel`, as if it were blurred uniformly: (1, rows, columns, 1, K, K)."""
        options = {name: self.options[name] for name in ("kernel_size", "seed")}
        options |= dict(noise_std=self.options["noise_std"] or 0.0, starts=32)
        cells = [retrieved_kernel(self.clean, self._tiles(cell), **options) for cell in self._cells()]
        return torch.stack(cells, 1).unflatten(1, self.grid)

    def __call__(self, psfs: Tensor) -> Tensor:
        """As of :class:`Moments`, the mean over the cells; (3,)."""
        with torch.no_grad():
            return torch.stack([self._moments(cell, psfs)(psfs[:, *cell]).cpu() for cell in self._cells()]).mean(0)

    def fit(
        self, start: Tensor, *, sweeps: int = 4, steps: int = 8, learning_rate: float = 2e-2, progress: bool = False
    ) -> Tensor:
        """PSFs (1, rows, columns, 1, K, K) of little deviation near ``start``: ``sweeps`` times each one is fitted."""
        psfs, levels = simplex(Threshold(0.1)(start, 0)), []
        g = _generator_on(pick_device(self.options["device"]), self.options["seed"])
        for cell in bar(sweeps * self._cells(), "fitting PSFs", progress, unit="PSF"):
            moments = self._moments(cell, psfs)
            # Held all the way: between PSFs of which each lies where it likes, none can be interpolated.
            psf = _centred(bare(psfs[:, *cell]).to(moments.scenes))
            psfs[:, *cell] = moments._descend(psf, steps, learning_rate, 10.0, g).to(psfs)
            levels.append(moments.noise_std.cpu())
            self.noise_std = torch.stack(levels[-len(self._cells()) :]).median()
        return bare(psfs)

    def _cells(self) -> list[tuple[int, int]]:
        return list(itertools.product(*map(range, self.grid)))

    def _corners(self, cell: tuple[int, int]) -> list[tuple[int, int]]:
        """Where the tiles of a cell begin: side by side as many as it holds, at least one, about its middle."""
        axes = []
        for i, n, length in zip(cell, self.grid, self.field, strict=True):
            count = max(1, length // (n * self.side))
            first = round((i + 0.5) * length / n - count * self.side / 2)
            first = min(max(first, 0), length - count * self.side)
            axes.append([first + k * self.side for k in range(count)])
        return list(itertools.product(*axes))

    def _tiles(self, cell: tuple[int, int]) -> list[Tensor]:
        side = self.side
        return [y[:, a : a + side, b : b + side] for y in self.degraded for a, b in self._corners(cell)]

    def _moments(self, cell: tuple[int, int], psfs: Tensor) -> Moments:
        blur = _OnePSF(psfs, cell, [(*corner, *self.field) for corner in self._corners(cell)])
        if cell not in self.cells:
            self.cells[cell] = new = Moments(self.clean, self._tiles(cell), blur, **self.options)
            new.scenes = next(iter(self.cells.values())).scenes  # the same in all cells
        moments = copy.copy(self.cells[cell])
        moments.operator, moments.noise_std = blur, self.noise_std.to(moments.noise_std)
        return moments


def mirrored(psfs: Tensor) -> Tensor:
    """PSFs over a field made to mirror one another about its middle, as those of a lens do about its axis.

    Each becomes the mean of itself and its mirror images, left and right, above and below. Fitted one by one they err
    each in its own way, and the mean of four errs less.

    Parameters
    ----------
    psfs : Tensor, shape (B, rows, columns, C, K, K)
        K odd, so that a mirror leaves the centre where it is.

    Returns
    -------
    Tensor, as ``psfs``

    Raises
    ------
    ValueError
        If the shape is no such one.
    """
    if psfs.ndim != 6 or psfs.shape[-1] % 2 == 0 or psfs.shape[-2] % 2 == 0:
        raise ValueError(f"psfs: expected shape (B, rows, columns, C, K, K) with K odd, got {tuple(psfs.shape)}")
    for axis, cells in ((-1, 2), (-2, 1)):
        psfs = (psfs + psfs.flip(axis, cells)) / 2
    return psfs


class _OnePSF(Blur):
    """The blur of parts of a field as a function of one of its PSFs; always of the same scenes, each in one part."""

    def __init__(self, psfs: Tensor, cell: tuple[int, int], parts: list[tuple[int, int, int, int]]) -> None:
        super().__init__("valid")
        self.others, self.cell, self.parts, self.fixed = psfs.clone(), cell, parts, None
        self.others[:, *cell] = 0

    def __call__(self, image: Tensor, kernel: Tensor) -> Tensor:
        y = super().__call__(image, kernel)
        if self.fixed is None:
            varying, others = SpaceVaryingBlur("valid"), self.others.to(image)
            rest, weight = torch.empty_like(y), torch.empty_like(y[:, :1])
            parts = self.parts[:: -(-len(self.parts) // len(image))]  # no more than there are scenes, from all over
            for i, part in enumerate(parts):
                rest[i :: len(parts)] = varying(image[i :: len(parts)], others, part=part)
                weight[i :: len(parts)] = share(self.cell, others.shape[1:3], [part], y)
            self.fixed = rest.detach(), weight
        rest, weight = self.fixed
        return rest + weight * y


class _Pixels(nn.Module):
    """A kernel's pixels themselves, as what is learned; beside :class:`DeepLinear`."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(*shape))

    def forward(self) -> Tensor:
        return self.kernel

    @torch.no_grad()
    def fit(self, kernel: Tensor) -> None:
        self.kernel.copy_(kernel + 1e-5)  # a little above zero, where |theta| has no slope


def _blot(kernel_size: int) -> Tensor:
    """A Gaussian (1, 1, K, K), as broad as a kernel that one knows nothing about."""
    return gaussian_kernels(1, kernel_size, std=(kernel_size / 8, kernel_size / 8), seed=0)


def _tiles(images: list[Tensor], side: int, most: int, g: torch.Generator) -> Tensor:
    """Squares of all images, side by side, at most so many of them, drawn at random; (N, C, side, side)."""
    tiles = [x.cpu().unfold(1, side, side).unfold(2, side, side).flatten(1, 2).transpose(0, 1) for x in images]
    tiles = torch.cat(tiles)
    return tiles[torch.randperm(len(tiles), generator=g)[:most]]


def _centred(kernel: Tensor) -> Tensor:
    """A kernel (1, 1, K, K) with its centre of mass at pixel ``K // 2``, moved by fractions of a pixel."""
    for _ in range(2):  # what leaves the window moves the centre a little
        y, x = _offsets(kernel)
        move = torch.stack([(kernel * x).sum(), (kernel * y).sum()])[None, :, None, None]
        kernel = warp(kernel, move.expand(1, 2, *kernel.shape[-2:]), "zero")
        kernel = kernel / kernel.sum()
    return kernel


def _edges(y: Tensor, kernels: Tensor) -> Tensor:
    """Mean absolute difference between neighbours, over their root mean square, in ``y`` (C, H, W) deblurred.

    With each of ``kernels`` (n, 1, K, K); (n,).
    """
    h = otf(kernels, tuple(y.shape[-2:]))
    x = torch.fft.irfft2(h.conj() * torch.fft.rfft2(y - y.mean()) / (h.abs() ** 2 + 0.01), s=y.shape[-2:])
    cut = min(kernels.shape[-1], min(y.shape[-2:]) // 4)  # the blur did not come round the edges
    x = x[..., cut:-cut, cut:-cut]
    d = torch.cat([x.diff(dim=-1).flatten(1), x.diff(dim=-2).flatten(1)], 1)
    return d.abs().mean(1) / d.square().mean(1).sqrt().clamp(min=1e-8)


def _magnitude(clean: Images, degraded: Images, noise_std: float, kernel_size: int) -> Tensor:
    """``|K|`` on a grid (S, S // 2 + 1) that has room for the kernel's autocorrelation."""
    check_counts(kernel_size=kernel_size)
    check_noise(noise_std)
    xs, ys = (_checked(n, v, 2 * kernel_size - 1) for n, v in (("clean", clean), ("degraded", degraded)))
    side = min(4 * kernel_size, *(min(x.shape[-2:]) for x in [*xs, *ys]))
    device = ys[0].device
    (px, _), (py, noise) = _power_spectrum(xs, side, 0.0, device), _power_spectrum(ys, side, noise_std, device)
    # The share of the signal in what was measured: frequencies that are mostly noise count little.
    magnitude = (py / px.clamp(min=1e-8) * py / (py + noise + 1e-8)).sqrt()
    magnitude[0, 0] = 1  # the kernel's sum; of the images only the means were left there, and they were taken out
    return magnitude


def _inverse(spectrum: Tensor) -> Tensor:
    return torch.fft.irfft2(spectrum, s=(spectrum.shape[-2],) * 2)


def _power_spectrum(images: list[Tensor], side: int, noise_std: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean periodogram (side, side // 2 + 1) of half-overlapping squares under a Hann window: without noise, and of it.

    Each square counts in units of its own power at the lowest frequencies, which a blur leaves alone: scenes differ so
    much in contrast that of a hundred a plain mean would show a few.
    """
    window = torch.hann_window(side + 2, device=device)[1:-1]
    window = window[:, None] * window
    low = torch.fft.fftfreq(side, device=device)[:, None] ** 2 + torch.fft.rfftfreq(side, device=device) ** 2
    low = (low > 0) & (low < (2.6 / side) ** 2)
    total, noise, count = window.new_zeros(side, side // 2 + 1), window.new_zeros(()), 0
    for x in images:
        tiles = x.to(device).unfold(1, side, max(1, side // 2)).unfold(2, side, max(1, side // 2)).flatten(0, 2)
        tiles = (tiles - tiles.mean((1, 2), keepdim=True)) * window
        power = torch.fft.rfft2(tiles).abs().square() / window.square().sum()
        weight = 1 / (power[:, low].mean(1) + 1e-3)
        total += (power * weight[:, None, None]).sum(0)
        noise += noise_std**2 * weight.sum()
        count += len(tiles)
    return (total - noise).clamp(min=0) / count, noise / count


class _Run:
    """The loop of a run: its steps, what it records, and, in a folder, its state, from which it can go on."""

    def __init__(self, folder: str | Path | None, name: str, about: dict, parts: dict, team: Team) -> None:
        self.name, self.parts, self.team = name, parts, team
        # As plain numbers: what holds NumPy's, torch.load does not trust.
        self.about = about = {k: v.item() if isinstance(v, np.generic) else v for k, v in about.items()}
        self.done, self.seconds, self.ended = 0, 0.0, False
        self.kept: dict[str, list] = {}
        self.sums: dict[str, list] = {}
        self.path = None if folder is None else Path(folder) / f"{name}.pt"
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        team.wait()  # the first may be writing still, at the end of the run before
        if self.path.is_file():
            # Records stay on the CPU, where they were made; the parts move their own to where they are.
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            wrong = [key for key in about if state["about"].get(key) != about[key]]
            if wrong:
                raise ValueError(
                    f"folder: {self.path} is of another run, whose {', '.join(wrong)} differed; "
                    "name another folder, or delete this one"
                )
            for key, part in parts.items():
                part.load_state_dict(state[key])
            self.done, self.seconds, self.kept, self.sums = (state[k] for k in ("step", "seconds", "kept", "sums"))
            self.ended = state.get("ended", False)  # earlier versions' runs did not end early

    def steps(self, steps: int, title: str, progress: bool) -> Iterator[int]:
        """The steps that are left to do, until :attr:`ended`; their state is saved now and then, and after the last."""
        if steps < self.done:
            raise ValueError(f"steps: {self.path} has {self.done} steps already, got {steps}; ask for as many or more")
        saved = time.monotonic()
        shown, saves = progress and self.team.rank == 0, self.path and self.team.rank == 0
        left = range(steps if self.ended else self.done, steps)
        self.bar = bar(left, title, shown, initial=self.done, total=steps)
        for step in self.bar:
            began, self.step = time.monotonic(), step
            yield step
            self.seconds += min(time.monotonic() - began, 60)  # a longer step was a machine asleep
            last = self.ended or step + 1 == steps
            if saves and (last or time.monotonic() - saved >= SECONDS_BETWEEN_SAVES):
                state = {key: part.state_dict() for key, part in self.parts.items()}
                state |= dict(about=self.about, step=step + 1, seconds=self.seconds, kept=self.kept, sums=self.sums)
                save_whole(state | dict(ended=self.ended), self.path)
                saved = time.monotonic()
            if last:
                return

    def note(self, **values: Tensor) -> None:
        """Count ``values`` into the means that the next :meth:`keep` takes; a NaN ends the run before it is saved."""
        for key, value in values.items():
            value = value.detach().clone()
            self.team.average([value])
            total, n = self.sums.get(key, [0.0, 0])
            self.sums[key] = [total + float(value), n + 1]
            if not math.isfinite(self.sums[key][0]):
                raise ArithmeticError(
                    f"{self.name}: diverged at step {self.step + 1}, where the {key} is no number; take smaller "
                    "learning rates"
                )

    def keep(self, **values: Tensor | float) -> None:
        """Record ``values`` and the means since the last time; show the numbers."""
        values |= {key: total / n for key, (total, n) in self.sums.items()}
        self.sums = {}
        for key, value in values.items():
            self.kept.setdefault(key, []).append(value)
        self.bar.set_postfix({k: f"{v:.4f}" for k, v in values.items() if isinstance(v, float)}, refresh=False)

    def stacked(self) -> dict[str, Tensor]:
        """The records, each as one tensor."""
        return {k: torch.stack(v) if isinstance(v[0], Tensor) else torch.tensor(v) for k, v in self.kept.items()}


def _seeded_net(settings: Mapping, channels: int, patch: int, seed: int, positions: bool) -> UNet:
    with _seeded(seed):
        net = UNet(channels + 2 * positions, channels, **settings).to(memory_format=torch.channels_last)
    _check_patch(patch, net.stride)
    return net


def _check_patch(patch: int, stride: int) -> None:
    if patch % stride:
        raise ValueError(f"patch: expected a multiple of the net's stride, {stride}, got {patch}")


def _set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    """Up over the first tenth of all steps, down to zero over the last third."""
    for group in optimizer.param_groups:
        # A plain number, as it is saved: what holds NumPy's, torch.load does not trust.
        group["lr"] = float(rate) * min(1.0, 10 * (step + 1) / steps, 3 * (1 - step / steps))


def _generator(seed: int, phase: int, step: int, rank: int) -> torch.Generator:
    """Random numbers of a process's step depend on nothing but it: a resumed run draws what it would have drawn."""
    number = 2 * (100_000_007 * (seed + 1 + 1_000_003 * rank) + step) + phase
    return torch.Generator().manual_seed(number % 2**63)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Within, torch's own random numbers, on the CPU and on ``device``, follow from a seed; later they go on as before.

    First weights are drawn from them, and masks of dropout. (``torch.manual_seed`` sets all GPUs', for good.)
    """
    gpu = device is not None and device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if gpu else []):
        torch.default_generator.manual_seed(seed)
        if gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _patches(
    images: list[Tensor], n: int, size: tuple[int, int], g: torch.Generator
) -> tuple[Tensor, list[tuple[int, int]]]:
    """``n`` random patches (n, C, *size) of random images, and where they begin."""
    out, corners = [], []
    for i in torch.randint(len(images), (n,), generator=g).tolist():
        x = images[i]
        top, left = _corner(x.shape[-2:], size, g)
        out.append(x[:, top : top + size[0], left : left + size[1]])
        corners.append((top, left))
    return torch.stack(out).contiguous(memory_format=torch.channels_last), corners


def _positions(
    corners: Sequence[Sequence[int]], field: tuple[int, int] | None, y: Tensor, g: torch.Generator
) -> Tensor | None:
    """Where pixels of patches ``y`` (B, C, H, W) lie in the field, from -1 to 1: (B, 2, H, W); one in five is wrong."""
    if field is None:
        return None
    size = y.shape[-2:]
    wrong = torch.tensor([_corner(field, size, g) for _ in y])
    lost = torch.rand(len(y), 1, generator=g) < 0.2
    places = torch.where(lost, wrong, torch.tensor(corners))
    rows, columns = (2 * (places[:, a, None] + torch.arange(size[a]) + 0.5) / field[a] - 1 for a in (0, 1))
    return torch.stack([rows[:, :, None].expand(-1, *size), columns[:, None].expand(-1, *size)], 1).to(y)


def _corner(whole: Sequence[int], part: Sequence[int], g: torch.Generator) -> tuple[int, int]:
    """A random place for the first pixel of a part of this size."""
    return tuple(int(torch.randint(a - b + 1, (), generator=g)) for a, b in zip(whole, part, strict=True))


def _field(images: list[Tensor]) -> tuple[int, int]:
    """The one size (H, W) of all images."""
    sizes = {tuple(y.shape[1:]) for y in images}
    if len(sizes) > 1:
        raise ValueError(f"degraded: a blur that varies over the field needs images of one size, got {sorted(sizes)}")
    return sizes.pop()


def _times_and_noise(y: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Times (B,), uniform and stratified over the batch, and normal noise as ``y``."""
    t = (torch.randperm(len(y), generator=g) + torch.rand(len(y), generator=g)) / len(y)
    return t.to(y.device), torch.randn(y.shape, generator=g).to(y.device)


def _checked(name: str, images: Images, side: int) -> list[Tensor]:
    """The images as a list of (C, H, W), if they are finite, alike in channels, and no side is less than ``side``."""
    found = list(images)
    if not found:
        raise ValueError(f"{name}: expected at least one image, got none")
    for i, x in enumerate(found):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: expected floating-point tensors, got {kind}")
        if x.ndim != 3 or x.shape[0] != found[0].shape[0]:
            raise ValueError(
                f"{name}: expected a tensor (N, C, H, W), or tensors (C, H, W) of one C; image {i} is {tuple(x.shape)}"
            )
        if min(x.shape[-2:]) < side:
            raise ValueError(
                f"{name}: image {i} has {x.shape[-1]}x{x.shape[-2]} pixels, {side}x{side} are needed; leave it out, or "
                "take a smaller patch or kernel"
            )
        if not bool(torch.isfinite(x).all()) or float(x.abs().max()) > 3:
            raise ValueError(f"{name}: expected finite values in about [-1, 1]; image {i} has NaN or larger ones")
    return [x.float() for x in found]


def _operator(operator: Operator | None) -> Operator:
    """The operator, if it is one whose kernel can be learned from patches; default: a blur."""
    operator = Blur("valid") if operator is None else operator
    if not isinstance(operator, Operator):
        raise TypeError(f"operator: expected a Blur, Downsample or SpaceVaryingBlur, got {type(operator).__name__}")
    if operator.boundary != "valid":
        raise ValueError(f"operator: expected the boundary 'valid', got {operator.boundary!r}; patches have no other")
    if getattr(operator, "weights_at", "sensor") != "sensor":
        raise ValueError(f"operator: expected weights_at='sensor', which PSFs are fitted for, got {operator!r}")
    return operator


def _fingerprint(tensors: Iterable[Tensor]) -> int:
    """A checksum, to tell whether a saved run was of the same data."""
    value = 0
    for x in tensors:
        value = zlib.crc32(x.detach().cpu().contiguous().numpy().tobytes(), value)
    return value
