"""Learning an operator from unpaired images by distribution matching (DDM4IP, arXiv 2506.14605).

Many degraded images, a few other clean ones, and the operator's form are known; its parameters are not. They are right
when clean images, degraded by the operator, cannot be told from the degraded ones. What tells them apart is the
velocity field of a flow from noise to images: one network learns that of the measured images (:func:`fit_flow`), a
second one, which starts as a copy, follows that of the simulated ones, and their difference says how to change the
operator (:func:`learn_operator`). It starts where the moments of the two sets agree (:mod:`blindlib.moments`), and ends
no worse by those.

:func:`fit_flow` is here and not with the training of the priors, as the two share their patches, their state and the
way in which several processes train one net.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blindlib.checks import check_counts, check_kernel, check_noise
from blindlib.em import bare
from blindlib.jobs import Team
from blindlib.metrics import mean_mnc
from blindlib.moments import (
    HALVES,
    FieldMoments,
    Images,
    Moments,
    Operator,
    checked_images,
    checked_operator,
    checked_sets,
    off_centre,
    one_size,
    random_corner,
    random_patches,
    retrieved_kernel,
    set_rate,
    simplex,
    spread,
    standard,
)
from blindlib.operators import Blur, Downsample, SpaceVaryingBlur
from blindlib.priors import read_checkpoint, write_checkpoint
from blindlib.runs import Run, fingerprint
from blindlib.simulate import gaussian_kernels
from blindlib.unet import UNet, moving_average

Velocity = Callable[[Tensor, Tensor], Tensor]

FLOW = dict(base_channels=16, multipliers=(1, 2, 2), groups=8)
"""Settings of the default velocity net, 0.3 million parameters."""
FLOW_STRIDE = 2 ** (len(FLOW["multipliers"]) - 1)
"""The side of a patch is a multiple of it."""

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
            set_rate(optimizer, learning_rate, step, steps)
            optimizer.zero_grad()
            (self() - kernel).square().sum().backward()
            optimizer.step()


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
        As given, or as learned.
    flow : UNet
        The velocity net of the degraded images as it was at the start; another run on the same images can take it over.
    history : dict of Tensor
        Every few steps: ``step``; ``gap``, the mean squared difference of the two velocities since the last entry (it
        falls to a floor as the two sets become alike); ``loss``, that of the auxiliary net's flow matching; ``kernel``
        (n, ...), with the haze that ``Learned.kernel`` is rid of (:func:`bare`); ``mnc``, where the truth was given;
        ``noise_std``, where that was learned.
    deviation : Tensor, shape (n, 3)
        :class:`Moments` (of a field the mean over its cells) at the start, at each fifth of the run (no oftener than
        every tenth step), and at its end. Where a row's largest is above the start's and above 1.2, networks lead away
        from what the images show. After two such rows in a row the run ends, and if the last is one, ``kernel`` is the
        start.
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
    images = checked_images("degraded", degraded, patch)
    field = one_size(images) if positions else None
    team = Team(device)
    device = team.device
    check_counts(steps=steps, batch=batch, patch=patch)
    model = _seeded_net(net, len(images[0]), patch, seed, positions).to(device)
    mean = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=moving_average)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    parts = dict(model=model, mean=mean, optimizer=optimizer)
    about = dict(batch=batch, learning_rate=learning_rate, net=repr(model.config), patch=patch, seed=seed)
    run = Run(folder, "flow", {**about, "degraded": fingerprint(images)}, parts, team)

    for step in run.steps(steps, "flow matching", progress):
        set_rate(optimizer, learning_rate, step, steps)
        g = _generator(seed, 0, step, team.rank)
        y, corners = random_patches(images, batch, (patch, patch), g)
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
    and that of the degraded images (arXiv 2506.14605, step 2). Both use the same evaluation of the auxiliary net, the
    one before its step; the paper evaluates it again after it.

    Unlike the paper's, the net of the degraded images goes on learning, in step with the auxiliary one. After minutes
    of training no net is at its end; without this (``frozen=True``), what the auxiliary one goes on to learn would pass
    for a difference of the images.

    About five times a run :class:`Moments` compare what the kernel simulates with the degraded images, which needs no
    truth. Twice in a row worse than at the start, and beyond chance, and the run ends, for its start. A run that goes
    well ends with its steps: convergence is not looked for.

    Parameters
    ----------
    clean, degraded : Tensor (N, C, H, W), or sequence of Tensors (C, H, W), about [-1, 1]
        Sizes may differ, channels not. A clean image has to be as large as a patch and the kernel around it (under a
        blur that varies, ``3 kernel_size - 2`` too), a degraded one as a patch and as the kernel's autocorrelation,
        ``2 kernel_size - 1``.
    operator : Blur, Downsample or SpaceVaryingBlur, optional
        With the boundary ``"valid"``, the only one under which a patch is as the whole image is; default: a blur. If it
        varies over the field, all degraded images are of one size, that of the field; the clean ones look alike
        everywhere in it.
    noise_std : float, optional
        Of the degraded images, on the [-1, 1] scale. ``None``: learned along with the kernel, from the level that is
        fitted with the start, or from 0.02 if a start is given.
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
        As of :func:`fit_flow`; the fit of the start is saved and shown too.

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
    operator = checked_operator(operator)
    check_counts(steps=steps, batch=batch, patch=patch, kernel_size=kernel_size)
    if kernel_size > patch:
        raise ValueError(f"kernel_size: a kernel of {kernel_size} pixels is larger than the patch, {patch}")
    check_noise(noise_std, optional=True)
    if centre <= 0 or compact < 0:
        raise ValueError(f"centre, compact: expected a positive and a non-negative weight, got {centre}, {compact}")
    scene = operator.sizes((patch, patch), (kernel_size, kernel_size))["image"]
    varying = isinstance(operator, SpaceVaryingBlur)
    blind = start is None and not isinstance(operator, Downsample)
    xs, ys = checked_sets(clean, degraded, scene[0], max(patch, 2 * kernel_size - 1) if blind else patch)
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
    field = one_size(ys) if varying else None
    if varying:
        moments = FieldMoments(xs, ys, grid, **common, device=device)
    else:
        moments = Moments(xs, ys, operator, **common, device=device)
    about = common | dict(clean=fingerprint(xs), degraded=fingerprint(ys))
    about |= dict(operator=repr(operator), grid=tuple(map(int, grid)) if varying else None)
    given = None if start is None else fingerprint(start)
    if start is None:
        # Saved, as it takes minutes, and with another machine's rounding it would be another start.
        first = Run(folder, "start", about, {}, team)
        for _ in first.steps(1, "fitting moments", False):
            retrieved = Run(folder, "retrieved", about, {}, team)
            for _ in retrieved.steps(1, "phase retrieval", False):
                if varying:
                    guess = moments.retrieved()
                elif blind:
                    guess = retrieved_kernel(xs, ys, **common | {"noise_std": noise_std or 0.0})
                else:  # every second pixel mixes up frequencies, and then no spectrum tells the kernel's magnitude
                    guess = _blot(kernel_size)
                retrieved.keep(kernel=team.agreed(guess).cpu())
            fitted = moments.fit(retrieved.kept["kernel"][0], truth=truth, folder=folder, progress=progress)
            first.keep(**{k: team.agreed(v).cpu() for k, v in dict(kernel=fitted, noise_std=moments.noise_std).items()})
        if folder is not None and team.rank == 0:  # what led there; the others have come to `agreed` since they read it
            for name in ("retrieved", *HALVES):
                (Path(folder) / f"{name}.pt").unlink(missing_ok=True)
        start, moments.noise_std = first.kept["kernel"][0], first.kept["noise_std"][0].to(moments.noise_std)
    if flow is None:
        shared = dict(seed=seed, folder=folder, device=device, progress=progress)
        flow = fit_flow(ys, patch=patch, positions=varying, **shared)

    data, auxiliary = (copy.deepcopy(flow).to(device).train().requires_grad_(True) for _ in range(2))
    about |= dict(parameters=fingerprint(model.parameters()))
    model.to(device).fit(start.to(device))
    first_noise = moments.noise_std
    level = nn.ParameterDict({"log": first_noise.to(device).log()}).requires_grad_(noise_std is None)
    team.average(p.data for p in [*model.parameters(), *level.parameters()])
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.5, 0.95))
    nets = torch.nn.ModuleDict({"data": data, "auxiliary": auxiliary})
    learning = [auxiliary] if frozen else [data, auxiliary]
    follower = torch.optim.Adam([p for net in learning for p in net.parameters()], lr=float(flow_rate))
    parts = dict(kernel=model, nets=nets, optimizer=optimizer, follower=follower)
    about |= dict(flow_rate=flow_rate, batch=batch, centre=centre, compact=compact, frozen=frozen)
    about |= dict(learning_rate=learning_rate, patch=patch, start=given, flow=fingerprint(flow.parameters()))
    if noise_std is None:
        optimizer.add_param_group({"params": level.parameters()})
        parts["noise"], about["level"] = level, "learned"
    run = Run(folder, "operator", about, parts, team)
    if "first" not in run.kept:
        run.kept["first"] = [team.agreed(moments(start.cpu()).cpu())]
    (deviation,) = run.kept["first"]
    checks = run.kept.setdefault("deviation", [])

    def astray(now: Tensor) -> bool:
        return bool(now.max() > max(1.2, float(deviation.max())))

    for step in run.steps(steps, "learning the operator", progress):
        set_rate(optimizer, learning_rate, step, steps)
        for group in optimizer.param_groups[1:]:
            group["lr"] *= 10  # a logarithm, to pixels of about a tenth
        g = _generator(seed, 1, step, team.rank)
        x = random_patches(xs, batch, scene, g)[0].to(device)
        t, noise = _times_and_noise(x[..., :patch, :patch], g)
        k = simplex(model())
        if varying:
            corners = [random_corner(field, (patch, patch), g) for _ in x]
            y = operator(x, k, part=[(*corner, *field) for corner in corners])
            positions = _positions(corners, field, noise, g)
        else:
            y, positions = operator(x, k), None
        y = standard(y + level["log"].exp() * torch.randn(y.shape, generator=g).to(device))

        x_t = between(y.detach(), t, noise)
        with _seeded(g.initial_seed(), device):
            v = velocity(auxiliary, positions)(x_t, t)
        with torch.no_grad(), _seeded(g.initial_seed(), device):
            difference = v - velocity(data, positions)(x_t, t)
        loss = operator_loss(difference, y) + (centre * off_centre(k) + compact * spread(k)).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        team.average(p.grad for group in optimizer.param_groups for p in group["params"])
        optimizer.step()

        follower.zero_grad(set_to_none=True)
        flow_matching = (v - (y.detach() - noise)).square().mean()
        flow_matching.backward()
        if not frozen:
            measured, corners = random_patches(ys, batch, (patch, patch), g)
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
            seen = {} if truth is None else {"mnc": mean_mnc(now, truth)}
            if noise_std is None:
                moments.noise_std = level["log"].detach().exp()
                seen["noise_std"] = float(moments.noise_std)
            run.keep(step=step + 1, kernel=now[0], **seen)
        if check:
            checks.append(team.agreed(moments(bare(now)).cpu()))
            run.ended = len(checks) >= PATIENCE and all(astray(one) for one in checks[-PATIENCE:])
    kernel, noise = start.cpu(), first_noise
    if not astray(checks[-1]):
        kernel, noise = bare(simplex(model().detach())).cpu(), level["log"].detach().exp()
    noise_std = float(noise if noise_std is None else noise_std)
    history = run.stacked()
    deviation = torch.cat([history.pop("first"), history.pop("deviation")])
    return Learned(kernel, operator, noise_std, flow, history, deviation, run.seconds, field)


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


def _seeded_net(settings: Mapping, channels: int, patch: int, seed: int, positions: bool) -> UNet:
    with _seeded(seed):
        net = UNet(channels + 2 * positions, channels, **settings).to(memory_format=torch.channels_last)
    _check_patch(patch, net.stride)
    return net


def _check_patch(patch: int, stride: int) -> None:
    if patch % stride:
        raise ValueError(f"patch: expected a multiple of the net's stride, {stride}, got {patch}")


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


def _positions(
    corners: Sequence[Sequence[int]], field: tuple[int, int] | None, y: Tensor, g: torch.Generator
) -> Tensor | None:
    """Where pixels of patches ``y`` (B, C, H, W) lie in the field, from -1 to 1: (B, 2, H, W); one in five is wrong."""
    if field is None:
        return None
    size = y.shape[-2:]
    wrong = torch.tensor([random_corner(field, size, g) for _ in y])
    lost = torch.rand(len(y), 1, generator=g) < 0.2
    places = torch.where(lost, wrong, torch.tensor(corners))
    rows, columns = (2 * (places[:, a, None] + torch.arange(size[a]) + 0.5) / field[a] - 1 for a in (0, 1))
    return torch.stack([rows[:, :, None].expand(-1, *size), columns[:, None].expand(-1, *size)], 1).to(y)


def _times_and_noise(y: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Times (B,), uniform and stratified over the batch, and normal noise as ``y``."""
    t = (torch.randperm(len(y), generator=g) + torch.rand(len(y), generator=g)) / len(y)
    return t.to(y.device), torch.randn(y.shape, generator=g).to(y.device)
