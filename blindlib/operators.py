"""Forward models ``A``: what the camera does to the scene. They are called with the physical latents by name.

A blur is true convolution with the kernel's centre at pixel ``K // 2``, written ``(k * x)[n] = sum_j k[j] x[n - j + K
// 2]``.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blindlib.checks import check_counts, check_images

BOUNDARIES = ("circular", "zero", "reflect", "valid")
Part = tuple[int, int, int, int]  # of a field: top, left, and the whole field's height and width


class Blur:
    """Convolution of an image with a kernel, the same for all pixels.

    Parameters
    ----------
    boundary : {"circular", "zero", "reflect", "valid"}
        What lies beyond the image's edges: its opposite side; black (mid grey on the [-1, 1] scale); its mirror
        image; or, with ``"valid"``, nothing: only pixels whose whole neighbourhood is known come out, K - 1 fewer
        along each axis. That last one is how a real photograph comes about: the scene is larger than what the sensor
        sees.

    Raises
    ------
    ValueError
        If the boundary is not one of these.

    Examples
    --------
    >>> blur = Blur(boundary="valid")
    >>> blur(torch.zeros(1, 3, 95, 95), torch.ones(1, 1, 32, 32) / 1024).shape
    torch.Size([1, 3, 64, 64])
    """

    def __init__(self, boundary: str = "circular") -> None:
        if boundary not in BOUNDARIES:
            raise ValueError(f"boundary: expected one of {BOUNDARIES}, got {boundary!r}")
        self.boundary = boundary

    def __repr__(self) -> str:
        return f"Blur(boundary={self.boundary!r})"

    def __call__(self, image: Tensor, kernel: Tensor) -> Tensor:
        """Blur ``image`` (B, C, H, W) with ``kernel`` (B or 1, 1 or C, K, L); (B, C, H, W), or smaller if "valid".

        Differentiable in both.

        Raises
        ------
        TypeError
            If either is not a floating-point tensor.
        ValueError
            If ranks, batch sizes, channels or devices do not fit, or the kernel is larger than the image.
        """
        _check_pair(image, kernel)
        if self.boundary == "circular":
            return _circular(image, kernel)
        return _valid(_padded(image, tuple(kernel.shape[-2:]), self.boundary), kernel)

    def sizes(self, measured: tuple[int, int], kernel: tuple[int, int], **_: object) -> dict[str, tuple[int, int]]:
        """The sizes of latents that follow from those of the measurement and of the other latents."""
        grow = 1 if self.boundary == "valid" else 0
        return {"image": tuple(m + grow * (k - 1) for m, k in zip(measured, kernel, strict=True))}

    def adjoint(self, y: Tensor, kernel: Tensor) -> Tensor:
        """A^T y for the blur with ``kernel``: ``y`` (B, C, h, w) as it comes out, result as the image goes in."""
        return _adjoint(self, y, kernel)

    def solve(
        self, y: Tensor, kernel: Tensor, image: Tensor, weight: Tensor | float, *, iterations: int = 12
    ) -> Tensor:
        """The proximal map of the data term: ``argmin_x |y - k * x|^2 + weight |x - image|^2``.

        In closed form with FFTs where the boundary is circular; by conjugate gradients, started at ``image``, where
        it is not.

        Parameters
        ----------
        y : Tensor (B, C, h, w)
        kernel : Tensor (B or 1, 1 or C, K, L)
        image : Tensor (B, C, H, W)
        weight : float or Tensor (B, 1, 1, 1)
            Positive.
        iterations : int
            Of conjugate gradients.

        Returns
        -------
        Tensor (B, C, H, W)

        Raises
        ------
        TypeError, ValueError
            As of :meth:`__call__`, and if ``y`` is not of the shape of the blurred image.
        """
        if self.boundary == "circular":
            _check_pair(image, kernel)
            _check_measured(y, image)
            h = otf(kernel, tuple(y.shape[-2:]))
            top = h.conj() * torch.fft.rfft2(y) + weight * torch.fft.rfft2(image)
            return torch.fft.irfft2(top / (h.abs() ** 2 + weight), s=y.shape[-2:])

        return _proximal(lambda x: self(x, kernel), y, image, weight, iterations)


class SpaceVaryingBlur:
    """Blur by a kernel that changes over the field: a grid of PSFs, bilinearly interpolated between their centres.

    Parameters
    ----------
    boundary : {"circular", "zero", "reflect", "valid"}
        As of :class:`Blur`.
    weights_at : {"sensor", "scene"}
        Where a PSF's share is looked up. ``"sensor"``: at the pixel that receives, ``sum_i w_i (h_i * x)``;
        ``"scene"``: at the point that sends, ``sum_i h_i * (w_i x)``, as light does it. They differ where PSFs change
        over a PSF's width, and libraries differ in their choice.

    Raises
    ------
    ValueError
        If a choice is none of these.
    """

    def __init__(self, boundary: str = "valid", *, weights_at: str = "sensor") -> None:
        if weights_at not in ("sensor", "scene"):
            raise ValueError(f"weights_at: expected 'sensor' or 'scene', got {weights_at!r}")
        self.blur, self.boundary, self.weights_at = Blur(boundary), boundary, weights_at

    def __repr__(self) -> str:
        return f"SpaceVaryingBlur(boundary={self.boundary!r}, weights_at={self.weights_at!r})"

    def __call__(self, image: Tensor, psfs: Tensor, *, part: Part | Sequence[Part] | None = None) -> Tensor:
        """Blur ``image`` (B, C, H, W) with ``psfs`` (B or 1, rows, columns, C or 1, K, L).

        The PSFs are those in the middle of equal cells of the field; beyond the outermost they stay as they are there.
        With ``part`` = (top, left, height, width), for the boundary "valid", the image is the scene behind a part of
        the field: the one that begins at pixel (top, left) of height x width; or, with B of them, each image behind its
        own. The result's shape and the errors are those of :class:`Blur`. Differentiable in both.
        """
        if not isinstance(psfs, Tensor) or psfs.ndim != 6:
            shape = tuple(psfs.shape) if isinstance(psfs, Tensor) else type(psfs).__name__
            raise ValueError(f"psfs: expected shape (B or 1, rows, columns, C or 1, K, L), got {shape}")
        cells, (k, l) = tuple(psfs.shape[1:3]), psfs.shape[-2:]
        _check_pair(image, psfs[:, 0, 0])
        padded = _padded(image, (k, l), self.boundary)
        h, w = padded.shape[-2] - k + 1, padded.shape[-1] - l + 1
        parts = [(0, 0, h, w)] if part is None else list(part) if isinstance(part[0], Sequence) else [part]
        if len(parts) not in (1, len(image)):
            raise ValueError(f"part: expected one, or one for each of {len(image)} images, got {len(parts)}")
        for one in parts if part else []:
            top, left, height, width = one
            if self.boundary != "valid" or min(top, left) < 0 or top + h > height or left + w > width:
                raise ValueError(f"part: {h}x{w} pixels of a 'valid' blur have to lie in the field, got {one}")
        more = (k - 1, l - 1) if self.boundary == "valid" and self.weights_at == "scene" else (0, 0)
        parts = [(top, left, height + more[0], width + more[1]) for top, left, height, width in parts]
        out = image.new_zeros(*image.shape[:2], h, w)
        for cell in itertools.product(*map(range, cells)):
            weight = share(cell, cells, parts, out if self.weights_at == "sensor" else image)
            # A cell's PSF is in few of the images and in a part of each: none else has to be blurred.
            own = weight.flatten(1).any(1).nonzero()[:, 0] if len(parts) > 1 else slice(None)
            if len(weight[own]) == 0:
                continue
            psf, weight = psfs[own if len(psfs) > 1 else slice(None), *cell], weight[own]
            if self.weights_at == "sensor":
                rows, columns = _extent(weight, 1, 0), _extent(weight, 0, 0)
                seen = padded[own, :, rows.start : rows.stop + k - 1, columns.start : columns.stop + l - 1]
                weight = weight[..., rows, columns]
            else:
                weight = _padded(weight, (k, l), self.boundary)
                rows, columns = _extent(weight, 1, k - 1), _extent(weight, 0, l - 1)
                seen, weight = (weight * padded[own])[..., rows, columns], 1.0
                rows, columns = slice(rows.start, rows.stop - k + 1), slice(columns.start, columns.stop - l + 1)
            if rows.start < rows.stop and columns.start < columns.stop:
                out[own, :, rows, columns] += weight * _valid(seen, psf)
        return out

    def sizes(self, measured: tuple[int, int], psfs: tuple[int, int], **_: object) -> dict[str, tuple[int, int]]:
        """The sizes of latents that follow from those of the measurement and of the other latents."""
        return self.blur.sizes(measured, psfs)

    def adjoint(self, y: Tensor, psfs: Tensor) -> Tensor:
        """A^T y; shapes as of :meth:`Blur.adjoint`."""
        return _adjoint(self, y, psfs)

    def solve(
        self,
        y: Tensor,
        psfs: Tensor,
        image: Tensor,
        weight: Tensor | float,
        *,
        part: Part | Sequence[Part] | None = None,
        iterations: int = 12,
    ) -> Tensor:
        """The proximal map of the data term by conjugate gradients, (B, C, H, W); see :meth:`Blur.solve`.

        ``psfs``, ``part`` and the errors are as of :meth:`__call__`.
        """
        return _proximal(lambda x: self(x, psfs, part=part), y, image, weight, iterations)


class Downsample:
    """Blur, then every ``factor``-th pixel: what a sensor of lower resolution sees.

    Parameters
    ----------
    factor : int
    boundary : {"circular", "zero", "reflect", "valid"}
        As of :class:`Blur`.

    Raises
    ------
    ValueError
        If the factor is no positive integer, or the boundary unknown.
    """

    def __init__(self, factor: int, boundary: str = "valid") -> None:
        check_counts(factor=factor)
        self.factor, self.blur, self.boundary = factor, Blur(boundary), boundary

    def __repr__(self) -> str:
        return f"Downsample({self.factor}, boundary={self.boundary!r})"

    def __call__(self, image: Tensor, kernel: Tensor) -> Tensor:
        """Blur ``image`` (B, C, H, W) with ``kernel`` (B or 1, 1 or C, K, L), and thin; errors as of :class:`Blur`."""
        return self.blur(image, kernel)[..., :: self.factor, :: self.factor]

    def sizes(self, measured: tuple[int, int], kernel: tuple[int, int], **_: object) -> dict[str, tuple[int, int]]:
        """The sizes of latents that follow from those of the measurement and of the other latents."""
        return self.blur.sizes((self.factor * measured[0], self.factor * measured[1]), kernel)

    def adjoint(self, y: Tensor, kernel: Tensor) -> Tensor:
        """A^T y; shapes as of :meth:`Blur.adjoint`."""
        return _adjoint(self, y, kernel)

    def solve(
        self, y: Tensor, kernel: Tensor, image: Tensor, weight: Tensor | float, *, iterations: int = 12
    ) -> Tensor:
        """The proximal map of the data term by conjugate gradients; see :meth:`Blur.solve`."""
        return _proximal(lambda x: self(x, kernel), y, image, weight, iterations)


class LinearLight:
    """An operator that acts on light, as cameras do, of images whose values are those of a file (sRGB).

    A sensor adds up light, but a file's values are no amounts of light: half the value is a fifth of the light. So
    ``y = srgb(A(light(x)))``, which is not linear in ``x``: under blur a bright spot outshines its dark surroundings,
    more than its value tells. Where contrasts are small it makes no difference. What a camera does beyond sRGB's curve
    is not known here, nor what it has cut off at white. Under the boundary ``"zero"`` there is half the light of white
    around the picture.

    Parameters
    ----------
    operator : Blur, SpaceVaryingBlur or Downsample
        Linear in the image; what it does to light.
    noise_in : {"values", "light"}
        Where noise, and what a kernel gets wrong, is alike everywhere, for :meth:`solve`. In a file it is in the
        values; an error of the kernel is one of light.

    Raises
    ------
    TypeError, ValueError
        If ``operator`` or ``noise_in`` is something else.

    Examples
    --------
    >>> camera = LinearLight(Blur("valid"))
    >>> camera(torch.zeros(1, 3, 95, 95), torch.ones(1, 1, 32, 32) / 1024).shape
    torch.Size([1, 3, 64, 64])
    """

    def __init__(self, operator: Blur | SpaceVaryingBlur | Downsample, noise_in: str = "values") -> None:
        if not isinstance(operator, Blur | SpaceVaryingBlur | Downsample):
            raise TypeError(f"operator: expected a Blur, SpaceVaryingBlur or Downsample, got {operator!r}")
        if noise_in not in ("values", "light"):
            raise ValueError(f"noise_in: expected 'values' or 'light', got {noise_in!r}")
        self.noise_in = noise_in
        self.operator, self.boundary, self.factor = operator, operator.boundary, getattr(operator, "factor", 1)
        self.__signature__ = inspect.signature(operator)

    def __repr__(self) -> str:
        return f"LinearLight({self.operator!r}, noise_in={self.noise_in!r})"

    def __call__(self, image: Tensor, *args: object, **known: object) -> Tensor:
        """Arguments, result's shape and errors are those of the operator. Differentiable in all."""
        _check_floats(image=image)
        return to_srgb(self.operator(to_light(image), *args, **known))

    @property
    def sizes(self) -> Callable[..., dict[str, tuple[int, int]]]:
        """That of the operator."""
        return self.operator.sizes

    def solve(
        self, y: Tensor, *, image: Tensor, weight: Tensor | float, iterations: int = 12, **known: object
    ) -> Tensor:
        """A step of Gauss and Newton to ``argmin_x |y - A(x)|^2 + weight |x - image|^2``.

        The scene's curve is linearised at ``image``, that of the light that arrives at ``y``, so that light which is
        missing counts by the values it makes there. Parameters, by name, as of :meth:`Blur.solve`, ``known`` being the
        operator's own. By conjugate gradients: noise that is alike at all values is not alike in light, so that no FFT
        inverts it, whatever the boundary. With ``noise_in="light"`` both distances are those of light, and it is the
        operator's own solve, without what that has below black.
        """
        _check_floats(image=image)
        light = to_light(image)
        if self.noise_in == "light":
            solved = self.operator.solve(to_light(y), image=light, weight=weight, iterations=iterations, **known)
            return to_srgb(solved.clamp(min=-1))  # a linear solve rings below black, where a little is many values

        def blurred(x: Tensor) -> Tensor:
            return self.operator(x, **known)

        arrives = blurred(light)
        _check_measured(y, arrives)
        of_image, of_y = _light_per_value(image), _light_per_value(y)
        # Where it is dark a little light is many values: without this scale a dozen iterations get nowhere. Kernels are
        # not negative and have the sum 1, so that A^T w is no less than the diagonal of A^T w A.
        back = _transpose(blurred, image)
        seen_with = back(of_y**-2).clamp(min=0)  # an FFT's rounding
        scale = (of_image**2 * seen_with + weight) ** -0.5

        def forward(change: Tensor) -> Tensor:
            return blurred(of_image * scale * change) / of_y

        def transposed(r: Tensor) -> Tensor:
            return of_image * scale * back(r / of_y)

        missing, nothing = (to_light(y) - arrives) / of_y, torch.zeros_like(image)
        change = _conjugate_gradients(forward, transposed, missing, nothing, weight * scale**2, iterations)
        return to_srgb(light + of_image * scale * change)


def linear_values(operator: Callable, image: Tensor) -> Tensor:
    """``image`` on the scale on which ``operator`` is linear: the light of a :class:`LinearLight`, else its values."""
    return to_light(image) if isinstance(operator, LinearLight) else image


def to_light(image: Tensor) -> Tensor:
    """The light that sRGB values in [-1, 1] stand for, from -1 (none) to 1 (white), by IEC 61966-2-1.

    Values beyond, such as noise makes, go on along the curve, and below black along its straight part.
    """
    s = (image + 1) / 2
    return 2 * torch.where(s <= 0.04045, s / 12.92, ((s.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4) - 1


def to_srgb(light: Tensor) -> Tensor:
    """The sRGB values in [-1, 1] of ``light``: the inverse of :func:`to_light`."""
    s = (light + 1) / 2
    return 2 * torch.where(s <= 0.0031308, 12.92 * s, 1.055 * s.clamp(min=0.0031308) ** (1 / 2.4) - 0.055) - 1


def _light_per_value(image: Tensor) -> Tensor:
    """Derivative of :func:`to_light`."""
    s = (image + 1) / 2
    return torch.where(s <= 0.04045, 1 / 12.92, 2.4 / 1.055 * ((s.clamp(min=0.04045) + 0.055) / 1.055) ** 1.4)


class Turbulence:
    """Imaging through turbulent air: the scene is warped by a tilt field, then blurred (arXiv 2211.10656).

    Parameters
    ----------
    boundary : {"circular", "zero", "reflect", "valid"}
        As of :class:`Blur`, for the warp too; with ``"valid"`` it sees the edge pixels repeated.
    frames : int, optional
        M frames of the same scene, each with a tilt of its own: measurements are then (B, M, C, h, w) and tilts (B, M,
        2, H, W), with one image and one kernel to all of them. Default: a single frame, without that dimension.

    Raises
    ------
    ValueError
        If the boundary is not one of these, or frames no positive integer.

    Examples
    --------
    >>> several = Turbulence(frames=8)
    >>> several(torch.zeros(1, 3, 64, 64), torch.ones(1, 1, 5, 5) / 25, torch.zeros(1, 8, 2, 64, 64)).shape
    torch.Size([1, 8, 3, 64, 64])
    """

    def __init__(self, boundary: str = "circular", *, frames: int | None = None) -> None:
        check_counts(frames=frames, optional=True)
        self.blur, self.frames = Blur(boundary), frames

    def __repr__(self) -> str:
        return f"Turbulence(boundary={self.blur.boundary!r}, frames={self.frames})"

    def __call__(self, image: Tensor, kernel: Tensor, tilt: Tensor) -> Tensor:
        """Degrade ``image`` (B, C, H, W) with ``kernel`` (B or 1, 1, K, L) and ``tilt`` (B or 1, [M,] 2, H, W), pixels.

        The result's shape and the errors are those of :class:`Blur`, and of :func:`warp`. Differentiable in all three.
        """
        image, kernel, tilt = self._spread(image, kernel, tilt)
        return self._gather(self.blur(warp(image, tilt, self.blur.boundary), kernel))

    def sizes(self, measured: tuple[int, int], kernel: tuple[int, int], **_: object) -> dict[str, tuple[int, int]]:
        """The sizes of latents that follow from those of the measurement and of the other latents."""
        size = self.blur.sizes(measured, kernel)["image"]
        return {"image": size, "tilt": size}

    def solve(
        self,
        y: Tensor,
        kernel: Tensor,
        tilt: Tensor,
        image: Tensor,
        weight: Tensor | float,
        *,
        iterations: int = 12,
    ) -> Tensor:
        """The proximal map of the data term in the image, by conjugate gradients, (B, C, H, W); see :meth:`Blur.solve`.

        ``y`` is (B, [M,] C, h, w); ``kernel``, ``tilt`` and the errors are as of :meth:`__call__`.
        """
        return _proximal(lambda x: self(x, kernel, tilt), y, image, weight, iterations)

    def solve_tilt(
        self,
        y: Tensor,
        image: Tensor,
        kernel: Tensor,
        tilt: Tensor,
        weight: Tensor | float,
        *,
        smoothness: float = 2.0,
        iterations: int = 8,
    ) -> Tensor:
        """A step of the tilt towards the measurement: ``argmin_u |y - A(u)|^2 + weight |u - tilt|^2_C``.

        One step of Gauss and Newton: the warped image is linearised at ``tilt``, with its slopes, as for optical flow
        (Lucas & Kanade, IJCAI 1981), and the quadratic problem that is left is solved by conjugate gradients. An edge
        tells only the tilt across it, and a flat place nothing: neighbours have to help, so the change is taken to be a
        smooth field. ``|.|_C`` is the Mahalanobis norm of one, white noise under a Gaussian filter, with unit variance
        at each pixel.

        Parameters
        ----------
        y : Tensor (B, [M,] C, h, w)
        image, kernel, tilt : Tensor
            As of :meth:`__call__`. One tilt for several images is a start from which each image's goes its own way.
        weight : float or Tensor (B, [M,] 1, 1, 1)
            Positive, for tilts in pixels.
        smoothness : float
            Standard deviation of that filter, in pixels.
        iterations : int
            Of conjugate gradients.

        Returns
        -------
        Tensor, shape (B, [M,] 2, H, W)
        """
        made = self(image, kernel, tilt)
        _check_measured(y, made)
        rest = y - made
        tilt = tilt.expand(len(y), *tilt.shape[1:])
        image, kernel, flat = self._spread(image, kernel, tilt)
        slopes = []
        for along in ((0.5, 0.0), (0.0, 0.5)):
            half = torch.tensor(along, dtype=flat.dtype, device=flat.device)[:, None, None]
            slopes.append(warp(image, flat + half, self.blur.boundary) - warp(image, flat - half, self.blur.boundary))
        slope = torch.stack(slopes, dim=1)  # (B M, 2, C, H, W)

        size = tuple(flat.shape[-2:])
        fy, fx = (torch.fft.fftfreq(side, dtype=flat.dtype, device=flat.device) for side in size)
        f2 = fy[:, None] ** 2 + fx**2
        root = torch.exp(-2 * (math.pi * smoothness) ** 2 * f2)
        root = (root / root.square().mean().sqrt())[:, : size[1] // 2 + 1]

        def smooth(u: Tensor) -> Tensor:
            return torch.fft.irfft2(root * torch.fft.rfft2(u), s=size)

        def forward(white: Tensor) -> Tensor:
            return self.blur((slope * smooth(white)[:, :, None]).sum(1), kernel)

        back = _transpose(lambda x: self.blur(x, kernel), image)

        def transposed(r: Tensor) -> Tensor:
            return smooth((slope * back(r)[:, None]).sum(2))

        if isinstance(weight, Tensor):
            weight = weight.flatten(0, -4)
        zero = torch.zeros_like(flat)
        move = _conjugate_gradients(forward, transposed, rest.flatten(0, -4), zero, weight, iterations)
        return tilt + smooth(move).view_as(tilt)

    def _spread(self, image: Tensor, kernel: Tensor, tilt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One image and one kernel for each frame, and the frames among the batch."""
        if self.frames is None:
            return image, kernel, tilt
        if not isinstance(tilt, Tensor) or tilt.ndim != 5 or tilt.shape[1] != self.frames:
            shape = tuple(tilt.shape) if isinstance(tilt, Tensor) else type(tilt).__name__
            raise ValueError(f"tilt: expected shape (B or 1, {self.frames}, 2, H, W), one for each frame, got {shape}")
        _check_pair(image, kernel)
        if tilt.shape[0] not in (1, len(image)):
            raise ValueError(f"tilt: expected one set, or one for each of {len(image)} images; got {len(tilt)}")
        tilt = tilt.expand(len(image), -1, -1, -1, -1).flatten(0, 1)
        kernel = kernel.repeat_interleave(self.frames, 0) if len(kernel) > 1 else kernel
        return image.repeat_interleave(self.frames, 0), kernel, tilt

    def _gather(self, y: Tensor) -> Tensor:
        return y if self.frames is None else y.unflatten(0, (-1, self.frames))


def warp(image: Tensor, tilt: Tensor, boundary: str = "circular") -> Tensor:
    """``image`` (B, C, H, W) seen through ``tilt`` (B or 1, 2, H, W): pixel (x, y) shows what is at (x, y) + tilt.

    Tilts are in pixels, x (to the right) first; between pixels the image is bilinear, beyond its edges as ``boundary``
    says (``"valid"``: the edge pixels repeated). Differentiable in both.

    Raises
    ------
    TypeError
        If either is not a floating-point tensor.
    ValueError
        If shapes, devices or the boundary do not fit.
    """
    _check_floats(image=image, tilt=tilt)
    b, _, h, w = image.shape
    if tilt.shape[0] not in (1, b) or tilt.shape[1:] != (2, h, w):
        raise ValueError(f"tilt: expected shape ({b} or 1, 2, {h}, {w}), got {tuple(tilt.shape)}")
    if boundary not in BOUNDARIES:
        raise ValueError(f"boundary: expected one of {BOUNDARIES}, got {boundary!r}")

    x = torch.arange(w, device=tilt.device, dtype=tilt.dtype) + tilt[:, 0]
    y = torch.arange(h, device=tilt.device, dtype=tilt.dtype)[:, None] + tilt[:, 1]
    if boundary == "circular":  # between the last pixel and the first lies one more interval
        image, x, y = F.pad(image, (0, 1, 0, 1), mode="circular"), x.remainder(w), y.remainder(h)
    grid = torch.stack([2 * x / (image.shape[-1] - 1) - 1, 2 * y / (image.shape[-2] - 1) - 1], dim=-1)
    beyond = {"zero": "zeros", "reflect": "reflection", "valid": "border", "circular": "border"}[boundary]
    return F.grid_sample(image, grid.expand(b, -1, -1, -1), padding_mode=beyond, align_corners=True)


def otf(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Transfer function (B, C, H, W // 2 + 1) of ``kernel``, centred at the origin, on periodic images of ``size``."""
    k, l = kernel.shape[-2:]
    padded = F.pad(kernel, (0, size[1] - l, 0, size[0] - k))
    return torch.fft.rfft2(padded.roll((-(k // 2), -(l // 2)), (-2, -1)))


def windowed(kernel: Tensor, window: tuple[int, int]) -> Tensor:
    """The part of kernels on a periodic grid, centred at the origin as :func:`otf` has them, in ``window``, centred."""
    k, l = window
    return kernel.roll((k // 2, l // 2), (-2, -1))[..., :k, :l]


def seen(size: tuple[int, int], window: tuple[int, int]) -> tuple[slice, slice]:
    """Where in a scene of ``size`` the pixels lie that come out of a "valid" blur with a kernel of size ``window``."""
    return tuple(slice(k - 1 - k // 2, n - k // 2) for n, k in zip(size, window, strict=True))


def convolve_fft(image: Tensor, kernel: Tensor) -> Tensor:
    """Valid convolution by FFT; shapes as for :class:`Blur`."""
    h, w = image.shape[-2:]
    k, l = kernel.shape[-2:]
    size = (_fast_length(h), _fast_length(w))
    out = torch.fft.irfft2(torch.fft.rfft2(image, s=size) * torch.fft.rfft2(kernel, s=size), s=size)
    return out[..., k - 1 : h, l - 1 : w]


def convolve_direct(image: Tensor, kernel: Tensor) -> Tensor:
    """Valid convolution term by term; shapes as for :class:`Blur`."""
    b, c, h, w = image.shape
    k, l = kernel.shape[-2:]
    weight = kernel.flip(-2, -1).expand(b, c, k, l).reshape(b * c, 1, k, l)
    return F.conv2d(image.reshape(1, b * c, h, w), weight, groups=b * c).reshape(b, c, h - k + 1, w - l + 1)


def _valid(image: Tensor, kernel: Tensor) -> Tensor:
    # Direct convolution costs K L operations a pixel, the FFT a few dozen.
    return (convolve_direct if kernel[0, 0].numel() <= 36 else convolve_fft)(image, kernel)


def _padded(image: Tensor, window: tuple[int, int], boundary: str) -> Tensor:
    """``image`` (B, C, H, W) with what lies beyond its edges, so that its "valid" blur is as large as it was."""
    if boundary == "valid":
        return image
    k, l = window
    mode = "constant" if boundary == "zero" else boundary
    return F.pad(image, (l - 1 - l // 2, l // 2, k - 1 - k // 2, k // 2), mode=mode)


def _circular(image: Tensor, kernel: Tensor) -> Tensor:
    size = tuple(image.shape[-2:])
    return torch.fft.irfft2(torch.fft.rfft2(image) * otf(kernel, size), s=size)


def _fast_length(n: int) -> int:
    """The least length >= n whose only prime factors are 2, 3 and 5."""
    while True:
        m = n
        for p in (2, 3, 5):
            while m % p == 0:
                m //= p
        if m == 1:
            return n
        n += 1


def _adjoint(operator: Blur | SpaceVaryingBlur | Downsample, y: Tensor, kernel: Tensor) -> Tensor:
    size = operator.sizes(tuple(y.shape[-2:]), tuple(kernel.shape[-2:]))["image"]
    return _transpose(lambda x: operator(x, kernel.detach()), y.new_empty(*y.shape[:2], *size))(y)


def _transpose(forward: Callable[[Tensor], Tensor], like: Tensor) -> Callable[[Tensor], Tensor]:
    """A^T of the linear map ``forward`` from images ``like`` this: the transpose of its (constant) Jacobian.

    Differentiable in its argument, and in what the map depends on.
    """
    image = torch.zeros_like(like)
    depends = torch.is_grad_enabled() and forward(image).requires_grad
    with torch.enable_grad():
        made = forward(image.requires_grad_(True))

    def transposed(y: Tensor) -> Tensor:
        # Not always: transposes of some maps would remember the zeros.
        differentiable = torch.is_grad_enabled() and (depends or y.requires_grad)
        return torch.autograd.grad(made, image, y, retain_graph=True, create_graph=differentiable)[0]

    return transposed


def _proximal(
    forward: Callable[[Tensor], Tensor], y: Tensor, image: Tensor, weight: Tensor | float, iterations: int
) -> Tensor:
    """``argmin_x |y - A x|^2 + weight |x - image|^2`` by conjugate gradients, started at ``image``."""
    _check_floats(image=image)
    return _conjugate_gradients(forward, _transpose(forward, image), y, image, weight, iterations)


def _conjugate_gradients(
    forward: Callable[[Tensor], Tensor],
    transposed: Callable[[Tensor], Tensor],
    y: Tensor,
    x: Tensor,
    weight: Tensor | float,
    iterations: int,
) -> Tensor:
    """``argmin_z |y - A z|^2 + weight |z - x|^2`` for a linear map and its transpose, started at ``x``."""
    made = forward(x)
    _check_measured(y, made)
    r = transposed(y - made)
    p, rr = r, _dot(r, r)
    for _ in range(iterations):
        q = transposed(forward(p)) + weight * p
        step = rr / _dot(p, q).clamp(min=1e-20)
        x, r = x + step * p, r - step * q
        rr, previous = _dot(r, r), rr
        p = r + rr / previous.clamp(min=1e-20) * p
    return x


def share(cell: tuple[int, int], cells: tuple[int, int], parts: Sequence[Part], like: Tensor) -> Tensor:
    """Bilinear weight of one of a field's ``cells``: 1 at its middle, 0 at the middle of its neighbours.

    In parts of fields, at pixels as many as those of ``like``; (n, 1, H, W).
    """
    weights, at = [], torch.tensor(parts, dtype=like.dtype).T  # (4, n)
    for i, n, begin, whole, length in zip(cell, cells, at[:2], at[2:], like.shape[-2:], strict=True):
        x = (torch.arange(length, dtype=like.dtype) + begin[:, None] + 0.5) * n / whole[:, None] - 0.5
        weights.append((1 - (x.clamp(0, n - 1) - i).abs()).clamp(min=0).to(like.device))
    return weights[0][:, None, :, None] * weights[1][:, None, None]


def _extent(weight: Tensor, along: int, margin: int) -> slice:
    """Where ``weight`` (n, 1, H, W) is not zero, and so much about it."""
    shown = weight.any(0)[0]
    at = shown.any(along).nonzero()
    length = shown.shape[1 - along]
    return slice(max(0, int(at[0]) - margin), min(length, int(at[-1]) + 1 + margin)) if len(at) else slice(0, 0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2, 3), keepdim=True)


def _check_floats(image: Tensor, **other: Tensor) -> None:
    check_images(image=image, **other)
    for name, x in other.items():
        if x.dtype != image.dtype:
            raise TypeError(f"{name}: is of {x.dtype}, the image of {image.dtype}; convert one with .to(dtype)")


def _check_measured(y: Tensor, made: Tensor) -> None:
    """That ``y`` is like what the operator has ``made``: another shape could still broadcast, and items mix."""
    if not isinstance(y, Tensor) or (y.dtype, y.device) != (made.dtype, made.device):
        what = f"{y.dtype} on {y.device}" if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y: expected a tensor of {made.dtype} on {made.device}, as the image is, got {what}")
    if y.shape != made.shape:
        raise ValueError(f"y: expected shape {tuple(made.shape)}, as the operator makes it, got {tuple(y.shape)}")


def _check_pair(image: Tensor, kernel: Tensor) -> None:
    _check_floats(image=image, kernel=kernel)
    if kernel.shape[0] not in (1, image.shape[0]) or kernel.shape[1] not in (1, image.shape[1]):
        raise ValueError(
            f"kernel: expected one, or one an image ({image.shape[0]}) and channel ({image.shape[1]}); "
            f"got shape {tuple(kernel.shape)}"
        )
    if kernel.shape[-2] > image.shape[-2] or kernel.shape[-1] > image.shape[-1]:
        raise ValueError(
            f"kernel: {tuple(kernel.shape[-2:])} is larger than the image, {tuple(image.shape[-2:])} pixels"
        )
