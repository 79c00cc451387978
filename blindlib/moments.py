"""An operator from the moments of unpaired images: spectra and average edges of two sets that show other scenes.

What a blur does to the statistics of a set of images tells the blur, without a network: their power spectra its
magnitude, from which phase retrieval makes a kernel (:func:`retrieved_kernel`), and moments that see edges its phase
too (:class:`Moments`, and :class:`FieldMoments` where the blur changes over the field). :func:`indirect_kernel` goes on
from there with an image prior. :mod:`blindlib.matching` starts from these, and ends no worse by them.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from blindlib.baselines import differences
from blindlib.checks import check_counts, check_kernel, check_noise, check_positive
from blindlib.em import Threshold, bare, centred, fit_kernel
from blindlib.jobs import Team
from blindlib.metrics import mean_mnc, recentred
from blindlib.operators import Blur, Downsample, SpaceVaryingBlur, otf
from blindlib.priors import Prior, pick_device
from blindlib.runs import Draws, Run, fingerprint
from blindlib.sampler import bar, dpir

Operator = Blur | Downsample | SpaceVaryingBlur
Images = Tensor | Sequence[Tensor]


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
        As :func:`~blindlib.learn_operator`.
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
    images = [y[:, : 8 * k, : 8 * k] for y in checked_images("degraded", degraded, side)[:100]]
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
    :func:`~blindlib.learn_operator`.

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
        self.operator = checked_operator(operator)
        if isinstance(self.operator, SpaceVaryingBlur):
            raise TypeError("operator: a SpaceVaryingBlur has the moments of each cell, FieldMoments")
        factor, grow = getattr(self.operator, "factor", 1), kernel_size - 1
        self.clean, self.degraded = xs, ys = checked_sets(clean, degraded, factor + grow, 1)
        least = [min(y.shape[-2:]) for y in ys] + [(min(x.shape[-2:]) - grow) // factor for x in xs]
        side = min(4 * kernel_size, *least)
        g = torch.Generator().manual_seed(seed)
        device = pick_device(device)
        x = _tiles(xs, factor * side + grow, 400, g).to(device)
        self.scenes = torch.cat([x, x.flip(-1)])
        self.options = dict(noise_std=noise_std, kernel_size=kernel_size, seed=seed)
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
        generator = generator or _generator_on(y.device, self.options["seed"])
        simulated = self._moments(y + self.noise_std * torch.randn(y.shape, generator=generator, device=y.device))
        out = []
        for (a, va, _), (b, vb, component, excess) in zip(simulated, self.measured, strict=True):
            z = _reals((a - b) / (va + vb + 1e-6).sqrt())
            out.append((z.square().sum() - excess * (component @ z).square()) / (a.numel() - 1))
        return torch.stack(out)

    def fit(
        self,
        start: Tensor,
        *,
        steps: int = 400,
        learning_rate: float = 1e-2,
        truth: Tensor | None = None,
        folder: str | Path | None = None,
        progress: bool = False,
    ) -> Tensor:
        """The kernel (1, 1, K, K) of least deviation near ``start``, its centre of mass at pixel ``K // 2``.

        A noise level that is not known is fitted too. No moment depends on a shift. So for half of the steps the
        kernel may lie where it likes: held to its centre, it would have to move as a whole whenever one end of it
        became brighter, and would end in a wrong place.

        The progress bar shows the loss, the sum of the three deviations, and, where the ``truth`` is given, the MNC.
        In a ``folder`` the fit is saved about once a minute, whole or not at all, and the same call goes on from there.
        """
        # By whole pixels: a sharp kernel differs much from itself a third of a pixel away.
        return _fitted(self, start.to(self.scenes), recentred, steps, learning_rate, truth, folder, progress)

    def _loss(self, kernel: Tensor, generator: torch.Generator) -> Tensor:
        # Noise that was always the same would be fitted too.
        return self(kernel, generator).sum()

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
    differ from others. A kernel that is right to half a percent gains next to nothing in likeness. Ours; it needs an
    image prior, which the paper (arXiv 2506.14605) does without.

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
        As :func:`~blindlib.learn_operator`; or if the start is no kernel, or the prior has other channels.
    """
    check_noise(noise_std)
    check_positive(noise_std=noise_std, rate=rate)
    check_counts(patches=patches, rounds=rounds, steps=steps)
    if start.ndim != 4 or start.shape[:2] != (1, 1) or start.shape[2] != start.shape[3]:
        raise ValueError(f"start: expected shape (1, 1, K, K), got {tuple(start.shape)}")
    check_kernel(start=start)
    grow = start.shape[-1] - 1
    xs, ys = checked_images("clean", clean, 1), checked_images("degraded", degraded, 1)
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
    measured = random_patches(ys, patches, (side, side), g)[0].to(kernel)
    scenes = random_patches(xs, patches, (side + grow, side + grow), g)[0].to(kernel)

    def fitted(y: Tensor) -> Tensor:
        y, told = y.expand(-1, prior.shape[0], -1, -1), noise_std * (prior.shape[0] / channels) ** 0.5
        x = [dpir(some, partial(blur, kernel=kernel), prior, told, steps=steps) for some in y.split(8)]
        x, y = (images.flatten(0, 1)[None] for images in (torch.cat(x), y))  # the kernel is one for all of them
        return fit_kernel(y, x, told, kernel, boundary="valid")

    for _ in bar(range(rounds), "indirect inference", progress, unit="round"):
        simulated = blur(scenes, kernel)
        simulated = simulated + noise_std * torch.randn(simulated.shape, generator=g).to(kernel)
        kernel = simplex((kernel + rate * (fitted(measured) - fitted(simulated))).clamp(min=0))
    return bare(recentred(kernel), rims=True)


class FieldMoments:
    """:class:`Moments` of each cell of a field, for a blur that changes over it: a grid of PSFs.

    A cell's moments are taken from tiles about its middle, where its PSF's share is largest. Neighbouring PSFs have
    theirs in it too, so a tile is simulated with all of them, as :class:`SpaceVaryingBlur` interpolates them. (A cell
    taken as uniformly blurred has no PSF that fits: the mean of power spectra is not the spectrum of the mean.)

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
        Of the degraded images, on the [-1, 1] scale; where none was given, what :meth:`fit` found.

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
        self.clean, self.degraded = checked_sets(clean, degraded, 3 * kernel_size - 2, 2 * kernel_size - 1)
        self.operator, self.field, self.grid = SpaceVaryingBlur("valid"), one_size(self.degraded), tuple(grid)
        self.side = min(4 * kernel_size, *self.field, min(min(x.shape[1:]) for x in self.clean) - kernel_size + 1)
        self.options = dict(noise_std=noise_std, kernel_size=kernel_size, seed=seed)
        check_noise(noise_std, optional=True)
        self.noise_is_known = noise_std is not None
        self.noise_std = torch.tensor(0.02 if noise_std is None else noise_std, device=pick_device(device))
        self.at_once = min(4, grid[0] * grid[1])  # cells, in a step
        self.cells = {}  # what was measured in each

    def retrieved(self) -> Tensor:
        """Each cell's :func:`retrieved_kernel`, as if it were blurred uniformly: (1, rows, columns, 1, K, K)."""
        options = self.options | dict(noise_std=self.options["noise_std"] or 0.0, starts=32)
        cells = [retrieved_kernel(self.clean, self._tiles(cell), **options) for cell in self._cells()]
        return torch.stack(cells, 1).unflatten(1, self.grid)

    def __call__(self, psfs: Tensor) -> Tensor:
        """As of :class:`Moments`, the mean over the cells; (3,). Not differentiable: it goes over all cells."""
        with torch.no_grad():
            return torch.stack([self._moments(cell)(psfs).cpu() for cell in self._cells()]).mean(0)

    def fit(
        self,
        start: Tensor,
        *,
        steps: int | None = None,
        learning_rate: float = 1e-2,
        truth: Tensor | None = None,
        folder: str | Path | None = None,
        progress: bool = False,
    ) -> Tensor:
        """PSFs (1, rows, columns, 1, K, K) of least deviation near ``start``, after so many steps.

        By default fifteen for each cell, at least 240; a step looks at four. All PSFs together, as each is seen through
        its neighbours: fitted one by one, each makes up for the others' faults. For half of the steps they may lie
        where they like, as in :meth:`Moments.fit`, which says what ``truth`` and ``folder`` are too. A noise level that
        is not known is fitted.
        """
        steps = max(240, 15 * len(self._cells())) if steps is None else steps

        def centre(psfs: Tensor) -> Tensor:  # by parts of a pixel: neighbours are interpolated
            return centred(psfs.flatten(0, 2)).reshape(psfs.shape)

        return _fitted(self, start.to(self.noise_std.device), centre, steps, learning_rate, truth, folder, progress)

    def _loss(self, psfs: Tensor, generator: torch.Generator) -> Tensor:
        """Of a few cells, and of a few scenes in each: many small steps lead further than a few large ones."""
        cells = self._cells()
        some = torch.randperm(len(cells), generator=generator, device=generator.device)[: self.at_once]
        return sum(self._moments(cells[i], 200, generator)(psfs, generator).sum() for i in some.tolist()) / len(some)

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

    def _moments(
        self, cell: tuple[int, int], most: int | None = None, generator: torch.Generator | None = None
    ) -> Moments:
        """Moments of a cell as a function of all PSFs, of all scenes or at most so many, drawn at random."""
        if cell not in self.cells:
            self.cells[cell] = new = Moments(
                self.clean, self._tiles(cell), **self.options, device=self.noise_std.device
            )
            new.scenes = next(iter(self.cells.values())).scenes  # the same in all cells
        moments = copy.copy(self.cells[cell])
        if most is not None:
            order = torch.randperm(len(moments.scenes), generator=generator, device=moments.scenes.device)
            moments.scenes = moments.scenes[order[:most]]
        corners, n = self._corners(cell), len(moments.scenes)
        parts = [(*corners[i * len(corners) // n], *self.field) for i in range(n if len(corners) > 1 else 1)]
        moments.operator = partial(self.operator, part=parts)
        moments.noise_std = self.noise_std.to(moments.noise_std)
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


def set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    """Up over the first tenth of all steps, down to zero over the last third."""
    for group in optimizer.param_groups:
        # A plain number, as it is saved: what holds NumPy's, torch.load does not trust.
        group["lr"] = float(rate) * min(1.0, 10 * (step + 1) / steps, 3 * (1 - step / steps))


def random_patches(
    images: list[Tensor], n: int, size: tuple[int, int], g: torch.Generator
) -> tuple[Tensor, list[tuple[int, int]]]:
    """``n`` random patches (n, C, *size) of random images, and where they begin."""
    out, corners = [], []
    for i in torch.randint(len(images), (n,), generator=g).tolist():
        x = images[i]
        top, left = random_corner(x.shape[-2:], size, g)
        out.append(x[:, top : top + size[0], left : left + size[1]])
        corners.append((top, left))
    return torch.stack(out).contiguous(memory_format=torch.channels_last), corners


def random_corner(whole: Sequence[int], part: Sequence[int], g: torch.Generator) -> tuple[int, int]:
    """A random place for the first pixel of a part of this size."""
    return tuple(int(torch.randint(a - b + 1, (), generator=g)) for a, b in zip(whole, part, strict=True))


def one_size(images: list[Tensor]) -> tuple[int, int]:
    """The one size (H, W) of all images."""
    sizes = {tuple(y.shape[1:]) for y in images}
    if len(sizes) > 1:
        raise ValueError(f"degraded: a blur that varies over the field needs images of one size, got {sorted(sizes)}")
    return sizes.pop()


def checked_images(name: str, images: Images, side: int) -> list[Tensor]:
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


def checked_sets(clean: Images, degraded: Images, least: int, least_degraded: int) -> tuple[list[Tensor], list[Tensor]]:
    """Both as of :func:`checked_images`, if they have the same number of channels."""
    xs, ys = checked_images("clean", clean, least), checked_images("degraded", degraded, least_degraded)
    if len(xs[0]) != len(ys[0]):
        raise ValueError(f"clean: has {len(xs[0])} channels, degraded {len(ys[0])}; give both in colour, or both grey")
    return xs, ys


def checked_operator(operator: Operator | None) -> Operator:
    """The operator, if it is one whose kernel can be learned from patches; default: a blur."""
    operator = Blur("valid") if operator is None else operator
    if not isinstance(operator, Operator):
        raise TypeError(f"operator: expected a Blur, Downsample or SpaceVaryingBlur, got {type(operator).__name__}")
    if operator.boundary != "valid":
        raise ValueError(f"operator: expected the boundary 'valid', got {operator.boundary!r}; patches have no other")
    if getattr(operator, "weights_at", "sensor") != "sensor":
        raise ValueError(f"operator: expected weights_at='sensor', which PSFs are fitted for, got {operator!r}")
    return operator


HALVES = ("moments-1", "moments-2")
"""Names of the two runs of a fit that is saved."""


def _fitted(
    moments: Moments | FieldMoments,
    start: Tensor,
    centre: Callable[[Tensor], Tensor],
    steps: int,
    learning_rate: float,
    truth: Tensor | None,
    folder: str | Path | None,
    progress: bool,
) -> Tensor:
    """The kernel, or PSFs, near ``start``: for half of the steps where it likes to lie, then centred and held."""
    check_counts(steps=steps)
    about = dict(steps=steps, learning_rate=learning_rate, operator=repr(moments.operator), **moments.options)
    if folder is not None:
        about["shape"] = tuple(start.shape)
        sets = dict(clean=moments.clean, degraded=moments.degraded, start=[start])
        about |= {name: fingerprint(images) for name, images in sets.items()}
    g = _generator_on(start.device, moments.options["seed"])

    def descend(kernel: Tensor, half: int, steps: int, hold: float) -> Tensor:
        # Squares are never negative, and with them a step moves faint pixels less than bright ones.
        learned = torch.nn.ParameterDict({"root": (kernel + 1e-5).sqrt()})
        optimizer = torch.optim.Adam([learned["root"]], lr=float(learning_rate), betas=(0.9, 0.95))
        if not moments.noise_is_known:
            learned["level"] = torch.nn.Parameter(moments.noise_std.log())
            optimizer.add_param_group({"params": [learned["level"]]})
        parts = dict(learned=learned, optimizer=optimizer, draws=Draws(g))
        run = Run(folder, HALVES[half], about, parts, Team(start.device))
        for step in run.steps(steps, "fitting moments", progress):
            set_rate(optimizer, learning_rate, step, steps)
            if not moments.noise_is_known:
                optimizer.param_groups[1]["lr"] *= 5  # a logarithm, to the kernel's roots
                moments.noise_std = learned["level"].exp()
            k = simplex(learned["root"].square())
            # Haze far out would decide where the centre is.
            deviation = moments._loss(k, g)
            loss = deviation + hold * off_centre(bare(k)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.note(loss=deviation)
            if (step + 1) % max(1, steps // 20) == 0:
                run.keep(**({} if truth is None else {"mnc": mean_mnc(bare(k.detach()), truth)}))
        if not moments.noise_is_known:
            moments.noise_std = learned["level"].detach().exp()
        return simplex(learned["root"].detach().square())

    kernel = descend(Threshold(0.1)(start, 0), 0, steps - steps // 2, 0.0)  # without the haze of a retrieved kernel
    return bare(descend(centre(bare(kernel)), 1, steps // 2, 10.0))


def _tiles(images: list[Tensor], side: int, most: int, g: torch.Generator) -> Tensor:
    """Squares of all images, side by side, at most so many of them, drawn at random; (N, C, side, side)."""
    ends = list(itertools.accumulate((x.shape[1] // side) * (x.shape[2] // side) for x in images))
    tiles = []
    for n in torch.randperm(ends[-1], generator=g)[:most].tolist():
        i = bisect.bisect(ends, n)
        row, column = divmod(n - (ends[i - 1] if i else 0), images[i].shape[2] // side)
        tiles.append(images[i][:, row * side : (row + 1) * side, column * side : (column + 1) * side].cpu())
    return torch.stack(tiles)


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


def _magnitude(clean: Images, degraded: Images, noise_std: float, kernel_size: int) -> Tensor:
    """``|K|`` on a grid (S, S // 2 + 1) that has room for the kernel's autocorrelation."""
    check_counts(kernel_size=kernel_size)
    check_noise(noise_std)
    xs, ys = (checked_images(n, v, 2 * kernel_size - 1) for n, v in (("clean", clean), ("degraded", degraded)))
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
