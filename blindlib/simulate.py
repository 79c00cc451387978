"""Seeded procedural data: the scenes and kernels that the shipped priors learn from, and that tests degrade.

Everything is drawn in batches in torch on any device. Random numbers come from the CPU generator whatever the device,
so a seed means the same picture everywhere (to float rounding).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from blindlib.checks import check_counts, check_pair, check_positive, is_integer, is_number
from blindlib.priors import pick_device

if TYPE_CHECKING:
    from PIL import ImageDraw

Seed = int | torch.Generator


def _generator(seed: Seed) -> torch.Generator:
    if isinstance(seed, torch.Generator):
        return seed
    if not is_integer(seed):
        raise TypeError(f"seed: expected an int or a torch.Generator, got {type(seed).__name__}")
    return torch.Generator().manual_seed(int(seed) % 2**64)  # the same for those of 64 bits, and any other will do


class _Draw:
    """Uniform and normal numbers from one generator, delivered on one device."""

    def __init__(self, seed: Seed, device: str | torch.device) -> None:
        self.generator, self.device = _generator(seed), pick_device(device)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        u = torch.rand(*shape, generator=self.generator, device=self.generator.device).to(self.device)
        return low + (high - low) * u

    def log_uniform(self, *shape: int, low: float, high: float) -> Tensor:
        return self.uniform(*shape, low=math.log(low), high=math.log(high)).exp()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.generator.device).to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.generator.device).to(self.device)


# --------------------------------------------------------------------------------------------------------- scenes


def dead_leaves(
    n: int, size: int | tuple[int, int], *, seed: Seed = 0, device: str | torch.device = "cpu", layers: int = 48
) -> Tensor:
    """Colour scenes of overlapping leaves: the training images of the shipped image prior.

    The dead-leaves model (Lee, Mumford & Huang, IJCV 2001): opaque objects whose sizes follow a power law cover one
    another, which gives edges, occlusion and the scale invariance of photographs. Leaves are ellipses, rectangles,
    diamonds, irregular and cut shapes, thin strokes; edges from sharp to out of focus; fills are flat, graded or
    textured (noise of many spectra, stripes, spots, lines of text). Small leaves come in clusters. A fifth of the
    scenes is nearly grey.

    Parameters
    ----------
    n : int
        How many scenes.
    size : int or (height, width)
        In pixels. Sizes of leaves do not depend on it: a small scene is a crop of a large one.
    seed : int or torch.Generator
    device : str or torch.device
    layers : int
        Layers of leaves that are laid on one another; cost is proportional.

    Returns
    -------
    Tensor, shape (n, 3, height, width), in [-1, 1]

    Raises
    ------
    ValueError
        If a count or size is not positive.
    """
    check_counts(n=n, layers=layers)
    size = (size, size) if is_integer(size) else size
    check_pair(size=size)
    height, width = size
    draw = _Draw(seed, device)
    y, x = torch.meshgrid(
        torch.arange(height, device=draw.device) + 0.5, torch.arange(width, device=draw.device) + 0.5, indexing="ij"
    )

    palette = _palette(draw, n, 8)
    textures = _textures(draw, n, height, width, x, y)
    small = draw.log_uniform(n, low=1.0, high=24)
    large = (small * draw.log_uniform(n, low=6, high=80)).clamp(min=24, max=200)
    # Scenes differ in how often their leaves are out of focus, textured, shaded or elongated.
    blurry = draw.uniform(n) ** 3
    textured = draw.uniform(n)

    image = palette[:, 0, :, None, None].expand(n, 3, height, width).clone()
    grade = _gradient(draw, n, x / width - 0.5, y / height - 0.5)
    image += 0.3 * grade + 0.1 * textured.reshape(n, 1, 1, 1) ** 2 * textures[:, :1]
    for _ in range(layers):
        radius = torch.lerp(small.log(), large.log(), draw.uniform(n)).exp()
        alpha, fill = _layer(draw, radius, palette, textures, blurry, textured, x, y)
        image = torch.lerp(image, fill, alpha)

    light = 0.5 * draw.uniform(n, 1, 1, 1) ** 2 * _gradient(draw, n, x / width - 0.5, y / height - 0.5)
    light = light + 0.25 * draw.uniform(n, 1, 1, 1) ** 3 * textures[:, :1]
    contrast = draw.log_uniform(n, 1, 1, 1, low=0.25, high=1.2)
    middle = draw.uniform(n, 1, 1, 1, low=0.25, high=0.65)
    cast = torch.exp(0.3 * draw.normal(n, 3, 1, 1) * draw.uniform(n, 1, 1, 1))
    image = ((image - 0.45) * contrast + middle) * torch.exp(light) * cast
    return (2 * _soften(draw, image) - 1).clamp(-1, 1)


def _layer(
    draw: _Draw,
    radius: Tensor,
    palette: Tensor,
    textures: Tensor,
    blurry: Tensor,
    textured: Tensor,
    x: Tensor,
    y: Tensor,
) -> tuple[Tensor, Tensor]:
    """One layer of non-touching leaves of about ``radius`` (n,): coverage (n, 1, H, W) and fill (n, 3, H, W).

    Leaves sit in the cells of a rotated grid, one in each; a cell looks its leaf up in a random table of its scene.
    """
    n, table = len(radius), 61
    cell = 2.7 * radius

    # The table of leaves: all that is constant over a leaf is computed here, not at every pixel.
    own = radius[:, None] * draw.uniform(n, table, low=0.35, high=1.0)
    aspect = torch.where(
        draw.uniform(n, table) < draw.uniform(n, 1) ** 2,
        draw.log_uniform(n, table, low=0.03, high=0.5),
        draw.log_uniform(n, table, low=0.4, high=1.0),
    )
    short = (own * aspect).clamp(min=0.35)
    room = (cell[:, None] / 2 - 1.2 * own).clamp(min=0)
    shift_x, shift_y = (room * draw.uniform(n, table, low=-1, high=1) for _ in range(2))
    angle = draw.uniform(n, 1, high=math.pi) + draw.normal(n, table) * draw.log_uniform(n, 1, low=0.05, high=3)
    soft = torch.where(
        draw.uniform(n, table) < blurry[:, None], draw.log_uniform(n, table, low=1, high=8), torch.ones(())
    )
    present = (draw.uniform(n, table) < draw.uniform(n, 1, low=0.3, high=1)).float()
    cut = draw.uniform(n, table, low=-0.4, high=2.5)
    wobble = (0.25 * draw.normal(n, table) * (draw.uniform(n, 1) < 0.5)).clamp(-0.45, 0.45)
    phase = draw.uniform(n, table, high=2 * math.pi)
    rows = torch.arange(n, device=draw.device)[:, None]
    colour = palette[rows, draw.integers(palette.shape[1], n, table)] + 0.04 * draw.normal(n, table, 3)
    colour = colour + 0.06 * draw.normal(n, table, 1)
    slope = 0.25 * draw.normal(n, table) * draw.uniform(n, 1) ** 2
    rough = 0.35 * draw.normal(n, table) * draw.uniform(n, 1) ** 2 * textured[:, None]
    leaves = torch.stack(
        [shift_x, shift_y, angle.cos(), angle.sin(), 1 / own, 1 / short, 1 / soft, present, cut, wobble, phase, short]
        + [*colour.unbind(-1), slope, rough],
        dim=1,
    )

    def per_scene(v: Tensor) -> Tensor:
        return v.reshape(n, 1, 1)

    turn = per_scene(draw.uniform(n, high=math.pi))
    u = (turn.cos() * x + turn.sin() * y) / per_scene(cell) + per_scene(draw.uniform(n, high=50))
    v = (turn.cos() * y - turn.sin() * x) / per_scene(cell) + per_scene(draw.uniform(n, high=50))
    i, j = u.floor(), v.floor()
    which = ((i * 37 + j * 23 + (i * j) % 17).long() % table).flatten(1)
    (dx, dy, cos, sin, inv_long, inv_short, inv_soft, present, cut, wobble, phase, short, *rgb, slope, rough) = (
        leaves.gather(2, which[:, None].expand(-1, leaves.shape[1], -1)).unflatten(2, x.shape).unbind(1)
    )
    u, v = (u - i - 0.5) * per_scene(cell) - dx, (v - j - 0.5) * per_scene(cell) - dy
    u, v = (cos * u + sin * v) * inv_long, (cos * v - sin * u) * inv_short

    power = per_scene(torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0, 12.0], device=draw.device)[draw.integers(6, n)])
    rho = ((u.abs() + 1e-6) ** power + (v.abs() + 1e-6) ** power) ** (1 / power)
    petals = per_scene(draw.integers(5, n) + 1).float()
    rho = rho / (1 + wobble * torch.cos(petals * torch.atan2(v, u) + phase))
    distance = (torch.maximum(rho, u + 1 - cut) - 1) * short
    alpha = (0.5 - distance * inv_soft).clamp(0, 1) * present

    kind = draw.integers(textures.shape[1], n)
    texture = textures[torch.arange(n), kind] * per_scene(1 + 2.0 * (kind == textures.shape[1] - 1))
    shifts = draw.integers(max(x.shape), 2).tolist()
    cluster = textures[:, 0].roll(shifts, (1, 2))
    edge = per_scene(draw.uniform(n, low=-1.5, high=2) - 0.6 * (radius / 4).log())
    alpha = alpha * ((cluster - edge) * 8).clamp(0, 1)
    fill = torch.stack(rgb, 1) + (slope * u.clamp(-1, 1) + rough * texture)[:, None]
    return alpha[:, None], fill


def _palette(draw: _Draw, n: int, colours: int) -> Tensor:
    """Colours (n, colours, 3) about [0, 1]: spread in luminance, correlated and mostly muted in hue."""
    luma = draw.uniform(n, colours, 1, low=-0.05, high=0.95)
    luma = torch.lerp(luma, draw.uniform(n, 1, 1), 0.7 * draw.uniform(n, 1, 1))
    vivid = draw.log_uniform(n, 1, 1, low=0.3, high=3.0) * (draw.uniform(n, 1, 1) > 0.2)
    common, own = draw.normal(n, 1, 2), draw.normal(n, colours, 2)
    warm, green = (vivid * (0.6 * common + own) * torch.tensor([0.09, 0.045], device=draw.device)).unbind(-1)
    rgb = torch.stack([warm - green, 0.6 * green, -warm - green], dim=-1)
    return luma + rgb * (0.3 + luma.clamp(0, 1))


def _gradient(draw: _Draw, n: int, x: Tensor, y: Tensor) -> Tensor:
    """A random linear ramp over unit coordinates, (n, 1, H, W)."""
    a, b = draw.normal(2, n, 1, 1, 1)
    return a * x + b * y


def _soften(draw: _Draw, image: Tensor) -> Tensor:
    """Half of the scenes pass through a mild lens: Gaussian blur of up to 0.9 pixels."""
    n, _, h, w = image.shape
    std = draw.uniform(n, 1, high=0.9) * (draw.uniform(n, 1) < 0.5)
    taps = torch.arange(-3, 4, device=image.device)
    g = torch.exp(-(taps**2) / (2 * std.clamp(min=0.1) ** 2))
    g = (g / g.sum(1, keepdim=True)).repeat_interleave(3, 0)
    image = F.pad(image, (3, 3, 3, 3), mode="replicate").reshape(1, 3 * n, h + 6, w + 6)
    image = F.conv2d(F.conv2d(image, g[:, None, None, :], groups=3 * n), g[:, None, :, None], groups=3 * n)
    return image.reshape(n, 3, h, w)


def _textures(draw: _Draw, n: int, height: int, width: int, x: Tensor, y: Tensor) -> Tensor:
    """Textures (n, 7, H, W) of zero mean and about unit deviation; the first is smooth, the last is text."""
    pad = 32  # noise made by FFT is periodic: make more and cut
    h, w = height + pad, width + pad
    fy = torch.fft.fftfreq(h, device=draw.device)[:, None]
    fx = torch.fft.rfftfreq(w, device=draw.device)

    def noise(low: float, high: float, stretch: float, slope: tuple[float, float] = (0.8, 1.8)) -> Tensor:
        turn = draw.uniform(n, 1, 1, high=math.pi)
        s = draw.log_uniform(n, 1, 1, low=1, high=stretch)
        a, b = turn.cos() * fx + turn.sin() * fy, turn.cos() * fy - turn.sin() * fx
        f2 = (a * s) ** 2 + (b / s) ** 2
        corner, power = (
            draw.log_uniform(n, 1, 1, low=low, high=high),
            draw.uniform(n, 1, 1, low=slope[0], high=slope[1]),
        )
        spectrum = torch.fft.rfft2(draw.normal(n, h, w)) * (f2 + corner**2) ** (-power / 2)
        spectrum[:, 0, 0] = 0
        field = torch.fft.irfft2(spectrum, s=(h, w))
        return (field / field.std((1, 2), keepdim=True))[:, :height, :width]

    smooth = noise(0.01, 0.03, 2, (3, 4))
    spots = torch.tanh(draw.log_uniform(n, 1, 1, low=0.7, high=8) * noise(0.05, 0.3, 3))

    turn, frequency = draw.uniform(n, 1, 1, high=math.pi), draw.log_uniform(n, 1, 1, low=0.03, high=0.35)
    wave = 2 * math.pi * frequency * (turn.cos() * x + turn.sin() * y) + draw.uniform(n, 1, 1, high=1.5) * smooth
    sharp = draw.log_uniform(n, 1, 1, low=0.3, high=6)
    stripes = torch.tanh(sharp * (wave.sin() + draw.normal(n, 1, 1) * 0.4)) / torch.tanh(sharp)
    return torch.stack(
        [smooth, noise(0.005, 0.2, 1.5), noise(0.005, 0.2, 1.5), noise(0.005, 0.1, 6), spots, stripes]
        + [_text(draw, n, x, y)],
        dim=1,
    )


def _text(draw: _Draw, n: int, x: Tensor, y: Tensor) -> Tensor:
    """Lines of text (n, H, W) in [-1, 1], turned and scaled so that a line is 6 to 40 pixels high."""
    pages = _text_pages()
    page = pages[0].shape[0]
    scale = draw.log_uniform(n, 1, 1, low=0.16, high=1.0)
    turn = 0.5 * draw.normal(n, 1, 1) * (draw.uniform(n, 1, 1) < 0.5)
    u = (turn.cos() * x + turn.sin() * y) / scale + draw.uniform(n, 1, 1, high=page)
    v = (turn.cos() * y - turn.sin() * x) / scale + draw.uniform(n, 1, 1, high=page)
    grid = torch.stack([u, v], dim=-1) * (2 / page)
    grid = (grid % 4 - 2).abs() - 1  # reflect at the page's borders
    out = torch.empty(n, *x.shape, device=draw.device)
    for i in range(n):  # the page at half, quarter ... size keeps small print free of aliasing
        level = min(int(-math.log2(float(scale[i]))), len(pages) - 1)
        source = pages[level].to(draw.device)[None, None]
        out[i] = F.grid_sample(source, grid[i : i + 1], align_corners=False, padding_mode="border")[0, 0]
    return 2 * out - 1


@cache
def _text_pages(page: int = 1024, line: int = 42) -> list[Tensor]:
    """A page of random words in the fonts that come with matplotlib, ink 1 on paper 0, at sizes 1, 1/2 and 1/4."""
    from PIL import Image, ImageDraw, ImageFont

    fonts = _fonts()
    rng = random.Random(0)
    sheet = Image.new("L", (page, page))
    pen = ImageDraw.Draw(sheet)
    for top in range(0, page, line):
        font = ImageFont.truetype(rng.choice(fonts), rng.randint(26, 34))
        words = [_word(rng) for _ in range(40)]
        pen.text((rng.randint(-40, 0), top), " ".join(words), fill=255, font=font)
    ink = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).reshape(page, page) / 255
    return [ink, *(F.avg_pool2d(ink[None, None], k)[0, 0] for k in (2, 4))]


@cache
def _fonts() -> list[str]:
    """Paths of the text fonts that come with matplotlib."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = sorted(p for p in folder.glob("*.ttf") if p.name.startswith(("DejaVuS", "STIXGeneral")))
    return [str(p) for p in fonts if "Display" not in p.name]


def _word(rng: random.Random) -> str:
    letters = "eeeeeetttttaaaaooooiiinnnssshhhrrrddllucmwfgypbvkxjqz"
    word = "".join(rng.choice(letters) for _ in range(rng.randint(1, 9)))
    style = rng.random()
    word = word.upper() if style < 0.2 else word.title() if style < 0.35 else word
    return str(rng.randint(0, 9999)) if style > 0.9 else word + rng.choice(["", "", "", ",", ".", ":"])


def text_images(n: int, size: int, *, seed: Seed = 0, device: str | torch.device = "cpu") -> Tensor:
    """Printed pages and line drawings: the training images of the shipped text prior.

    Random words and numbers in the fonts that come with matplotlib, in lines 8 to 36 pixels apart and a little turned;
    polylines, circles, boxes, arrows and grids; some of both. One ink, now and then two, on an even ground: dark on
    light or light on dark, mostly grey. Drawn fourfold and averaged, which smooths the edges.

    Parameters
    ----------
    n : int
        How many.
    size : int
        Height and width in pixels. Sizes of letters do not depend on it.
    seed : int or torch.Generator
    device : str or torch.device

    Returns
    -------
    Tensor, shape (n, 3, size, size), in [-1, 1]

    Raises
    ------
    ValueError
        If ``n`` or ``size`` is not positive.
    """
    check_counts(n=n, size=size)
    draw = _Draw(seed, device)
    pages = [_page(random.Random(int(s)), size) for s in draw.integers(2**31, n)]
    return torch.stack(pages).to(draw.device)


def _page(rng: random.Random, size: int, fine: int = 4) -> Tensor:
    """One of :func:`text_images`: inks (3, size, size) over a ground."""
    from PIL import Image, ImageDraw

    dark, light = (_tone(rng, *range_) for range_ in ((-1, -0.3), (0.35, 1)))
    ground, ink = (light, dark) if rng.random() < 0.65 else (dark, light)
    second = ink if rng.random() < 0.7 else _tone(rng, -1, -0.3) if ground is light else _tone(rng, 0.35, 1)
    kind = rng.random()
    image = ground[:, None, None].expand(3, size, size)
    for colour, content in ((ink, _print if kind < 0.65 else _drawing), (second, _drawing if kind > 0.5 else None)):
        if content is None:
            continue
        wide = round(1.5 * size) * fine  # what turns must reach into the corners
        sheet = Image.new("L", (wide, wide))
        content(rng, ImageDraw.Draw(sheet), wide, fine)
        angle = rng.gauss(0, 6) if rng.random() < 0.7 else rng.uniform(-90, 90)
        sheet = sheet.rotate(angle, Image.Resampling.BILINEAR)
        corner = (wide - size * fine) // 2
        cover = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).reshape(1, wide, wide) / 255
        cover = cover[:, corner : corner + size * fine, corner : corner + size * fine]
        image = torch.lerp(image, colour[:, None, None].expand_as(image), F.avg_pool2d(cover, fine))
    return image


def _tone(rng: random.Random, low: float, high: float) -> Tensor:
    """A colour (3,) of a brightness in [low, high]; two in three are grey."""
    vivid = 0.25 if rng.random() < 0.35 else 0.0
    value = rng.uniform(low, high)
    return torch.tensor([value + rng.gauss(0, vivid) for _ in range(3)]).clamp(-1, 1)


def _print(rng: random.Random, pen: ImageDraw.ImageDraw, wide: int, fine: int) -> None:
    from PIL import ImageFont

    line = math.exp(rng.uniform(math.log(8), math.log(36))) * fine
    font = ImageFont.truetype(rng.choice(_fonts()), max(6, round(line * rng.uniform(0.6, 0.95))))
    top = -rng.uniform(0, line)
    while top < wide:
        pen.text((-rng.uniform(0, 3) * line, top), " ".join(_word(rng) for _ in range(24)), fill=255, font=font)
        top += line


def _drawing(rng: random.Random, pen: ImageDraw.ImageDraw, wide: int, fine: int) -> None:
    def point() -> tuple[float, float]:
        return rng.uniform(0, wide), rng.uniform(0, wide)

    width = max(1, round(math.exp(rng.uniform(math.log(0.8), math.log(3.5))) * fine))
    for _ in range(round((1 + rng.randrange(6)) * (wide / (96 * fine)) ** 2) or 1):
        kind = rng.randrange(6)
        if kind == 0:
            pen.line([point() for _ in range(rng.randint(2, 6))], fill=255, width=width, joint="curve")
        elif kind in (1, 2):
            (x, y), r, s = point(), *(math.exp(rng.uniform(math.log(4), math.log(30))) * fine for _ in range(2))
            s = r if rng.random() < 0.6 else s
            shape = pen.ellipse if kind == 1 else pen.rectangle
            solid = rng.random() < 0.25
            shape((x - r, y - s, x + r, y + s), fill=255 if solid else None, outline=255, width=width)
        elif kind == 3:
            (x, y), (u, v) = point(), point()
            pen.line([(x, y), (u, v)], fill=255, width=width)
            along, head = math.atan2(v - y, u - x), 4 * width
            tips = [(u - head * math.cos(along + a), v - head * math.sin(along + a)) for a in (-0.45, 0.45)]
            pen.polygon([(u, v), *tips], fill=255)
        elif kind == 4:
            step = math.exp(rng.uniform(math.log(6), math.log(24))) * fine
            first, last = rng.uniform(0, wide / 2), rng.uniform(wide / 2, wide)
            for i in range(int((last - first) / step) + 1):
                at = first + i * step
                pen.line([(first, at), (last, at)], fill=255, width=width)
                pen.line([(at, first), (at, last)], fill=255, width=width)
        else:
            x, y = point()
            waves, height = rng.uniform(0.02, 0.12) / fine, rng.uniform(3, 15) * fine
            curve = [(i, y + height * math.sin(waves * i + x)) for i in range(0, wide, fine)]
            pen.line(curve, fill=255, width=width, joint="curve")


# -------------------------------------------------------------------------------------------------------- kernels


def motion_kernels(
    n: int,
    size: int,
    *,
    extent: tuple[float, float] = (0.15, 0.6),
    seed: Seed = 0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Blur kernels of a shaken camera: the trace of a point light during the exposure.

    A path is the integral of a velocity that wanders (an Ornstein-Uhlenbeck process, whose memory runs from a jitter to
    a sweep), with tremor, jerks and pauses. Where the camera rests the kernel is bright, where it jumps it is faint or
    broken. Traces are thin, as in kernels measured on real cameras (Levin et al., CVPR 2009).

    Parameters
    ----------
    n : int
        How many kernels.
    size : int
        Side of the square window, in pixels.
    extent : (float, float)
        The longer side of the trace's bounding box is drawn (uniformly) between these fractions of the window.
    seed : int or torch.Generator
    device : str or torch.device

    Returns
    -------
    Tensor, shape (n, 1, size, size)
        Non-negative, each sums to one, centre of mass at pixel ``size // 2``.

    Raises
    ------
    ValueError
        If ``n`` or ``size`` is too small or ``extent`` is not an interval within (0, 1].
    """
    _check_kernel(n, size, extent, "extent", 1.0)
    draw = _Draw(seed, device)
    path, weight = _shake(draw, n)
    width = draw.uniform(n, 1, low=0.1, high=0.7)
    return _trace(path, weight, size, draw.uniform(n, 1, 1, low=extent[0], high=extent[1]), width)


def shaken_psfs(
    grid: tuple[int, int],
    size: int,
    *,
    extent: tuple[float, float] = (0.4, 0.8),
    roll: float = 0.5,
    seed: Seed = 0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """PSFs over the field of a camera that is shaken and rolls about its axis: no two places are blurred alike.

    Shake moves the whole picture along one path, as in :func:`motion_kernels`; roll moves each point across its
    distance from the middle, along with it (Whyte et al., IJCV 2012).

    Parameters
    ----------
    grid : (int, int)
        Rows and columns.
    size : int
        Side of each PSF's window, in pixels.
    extent : (float, float)
        The longer side of the largest trace is drawn between these fractions of the window.
    roll : float
        How far the roll moves the middle of the field's edges, in units of the shake's extent.
    seed : int or torch.Generator
    device : str or torch.device

    Returns
    -------
    Tensor, shape (1, rows, columns, 1, size, size)
        Non-negative, each sums to one, centre of mass at pixel ``size // 2``.

    Raises
    ------
    ValueError
        If a size is too small or ``extent`` is not an interval within (0, 1].
    """
    check_pair(grid=grid)
    _check_kernel(1, size, extent, "extent", 1.0)
    draw = _Draw(seed, device)
    path, weight = _shake(draw, 1)
    path = path / (path.amax(2) - path.amin(2)).amax().clamp(min=1e-6)
    turn = F.interpolate(draw.normal(1, 1, 6), size=path.shape[2], mode="linear", align_corners=True).cumsum(2)
    turn = turn / (turn.amax() - turn.amin())
    y, x = torch.meshgrid(*((2 * torch.arange(n, device=draw.device) + 1) / n - 1 for n in grid), indexing="ij")
    path = path + roll * turn * torch.stack([-y, x], -1).reshape(-1, 2, 1)
    many = len(path)
    length = draw.uniform(1, 1, 1, low=extent[0], high=extent[1])
    width = draw.uniform(1, 1, low=0.3, high=0.7).expand(many, -1)
    psfs = _trace(path, weight.expand(many, -1), size, length, width, alike=True)
    return psfs.reshape(1, *grid, 1, size, size)


def lens_psfs(
    grid: tuple[int, int],
    size: int,
    *,
    centre: float = 0.8,
    corner: float = 2.5,
    colour: float = 0.25,
    vignetting: float = 0.6,
    device: str | torch.device = "cpu",
) -> Tensor:
    """PSFs over the field of a lens at full aperture, for red, green and blue: defocus discs, cut off at the corners.

    The focus curves away from the sensor, so the disc grows with the square of the distance from the axis; blue and red
    are in focus at other depths than green. Towards the corners the barrel cuts the disc to a cat's eye, the meeting
    of two discs.

    Parameters
    ----------
    grid : (int, int)
        Rows and columns.
    size : int
        Side of each PSF's window, in pixels.
    centre, corner : float
        The disc's radius in pixels on the axis and in the corners of the field.
    colour : float
        How much larger blue's disc is than green's, and smaller red's, as a share.
    vignetting : float
        Distance of the two discs in the corner, in radii, from 0 to less than 2.
    device : str or torch.device

    Returns
    -------
    Tensor, shape (1, rows, columns, 3, size, size)
        Non-negative, each sums to one, centre of mass at pixel ``size // 2``.

    Raises
    ------
    ValueError
        If the window is too small for the discs, or vignetting leaves nothing of them.
    """
    check_pair(grid=grid)
    check_counts(size=size)
    device = pick_device(device)
    if min(centre, corner) <= 0 or not 0 <= colour < 1 or not 0 <= vignetting < 2:
        raise ValueError(
            f"centre, corner, colour, vignetting: expected positive radii, [0, 1) and [0, 2), got {centre}, {corner}, "
            f"{colour}, {vignetting}"
        )
    if 2 * max(centre, corner) * (1 + colour) + 2 > size:
        raise ValueError(f"size: a window of {size} pixels is too small for radii up to {max(centre, corner):.3g}")
    y, x = torch.meshgrid(*((2 * torch.arange(n, device=device) + 1) / n - 1 for n in grid), indexing="ij")
    y, x = (a[:, :, None, None, None] for a in (y, x))
    far = ((x**2 + y**2) / 2).sqrt()  # 1 in the corners
    radius = (centre + (corner - centre) * far**2) * (1 + colour * torch.tensor([-1, 0, 1])[:, None, None]).to(far)
    fine = 8  # points a pixel, along each axis
    at = (torch.arange(fine * size, device=device) + 0.5) / fine - 0.5 - size // 2
    u, v = at[None, :], at[:, None]
    dx, dy = (vignetting * radius / 2**1.5 * a for a in (x, y))  # half of what lies between the two

    def disc(dx: Tensor, dy: Tensor) -> Tensor:
        """One inside, zero outside, in between over a third of a pixel."""
        return ((radius - ((u - dx) ** 2 + (v - dy) ** 2).sqrt()) * 3 + 0.5).clamp(0, 1)

    eye = torch.minimum(disc(dx, dy), disc(-dx, -dy))
    psfs = F.avg_pool2d(eye.flatten(0, 1), fine).unflatten(0, tuple(grid))[None]
    return _unit_sum(psfs)


def _shake(draw: _Draw, n: int) -> tuple[Tensor, Tensor]:
    """Paths (n, 2, T) of a shaken camera, and how long (n, T) it dwells at each point."""
    points, fine = 128, 1024
    memory = draw.log_uniform(n, 1, low=0.02, high=1.0) * points
    decay = torch.exp(-1 / memory)
    push = draw.normal(n, points, 2)
    jerk = (draw.uniform(n, points, 1) < 0.03) * (draw.uniform(n, 1, 1) < 0.4)
    push = push + 12 * push * jerk
    velocity = torch.zeros(n, points, 2, device=draw.device)
    now = draw.normal(n, 2) * 0.7
    for i in range(points):
        now = decay * now + torch.sqrt(1 - decay**2) * push[:, i]
        velocity[:, i] = now
    path = torch.cumsum(velocity, dim=1)
    path = path + _tremor(draw, n, points) * path.std(1, keepdim=True)
    # The two axes seldom shake alike: squeeze the path across a random direction.
    turn, squeeze = draw.uniform(n, 1, high=math.pi), draw.uniform(n, 1, low=0.15, high=1)
    x, y = path.unbind(-1)
    path = torch.stack([turn.cos() * x - turn.sin() * y * squeeze, turn.sin() * x + turn.cos() * y * squeeze], -1)
    path = F.interpolate(path.transpose(1, 2), size=fine, mode="linear", align_corners=True)

    # Uneven dwell: a smooth random log-weight along the path, pauses, and now and then gaps.
    wander = F.interpolate(draw.normal(n, 1, 24), size=fine, mode="linear")[:, 0]
    weight = torch.exp(draw.uniform(n, 1, high=1.5) * wander)
    pause = torch.exp(-(((torch.linspace(0, 1, fine, device=draw.device) - draw.uniform(n, 2, 1)) / 0.02) ** 2))
    weight = weight + (pause * draw.uniform(n, 2, 1) ** 2 * 8).sum(1)
    gap = F.interpolate(draw.normal(n, 1, 12), size=fine, mode="linear")[:, 0] > 0.8
    return path, torch.where(gap & (draw.uniform(n, 1) < 0.25), 0.05 * weight, weight)


def linear_kernels(
    n: int,
    size: int,
    *,
    extent: tuple[float, float] = (0.1, 0.9),
    seed: Seed = 0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Kernels of a straight, even motion in any direction. Parameters, result and errors as :func:`motion_kernels`."""
    _check_kernel(n, size, extent, "extent", 1.0)
    draw = _Draw(seed, device)
    turn = draw.uniform(n, high=math.pi)
    along = torch.linspace(-1, 1, 512, device=draw.device)
    path = torch.stack([turn.cos(), turn.sin()], 1)[:, :, None] * along
    weight = torch.ones(n, 512, device=draw.device)
    width = draw.uniform(n, 1, low=0.1, high=0.7)
    return _trace(path, weight, size, draw.uniform(n, 1, 1, low=extent[0], high=extent[1]), width)


def gaussian_kernels(
    n: int,
    size: int,
    *,
    std: tuple[float, float] = (0.3, 4.0),
    seed: Seed = 0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Gaussian kernels, half of them anisotropic at a random angle.

    ``std`` bounds the (log-uniform) standard deviation in pixels; equal bounds give that one, isotropic. Their peak is
    at pixel ``size // 2``; the centre of mass of one that a window of even size cuts off is not. Other parameters,
    result and errors as :func:`motion_kernels`.
    """
    _check_kernel(n, size, std, "std", math.inf)
    draw = _Draw(seed, device)
    major = draw.log_uniform(n, low=std[0], high=std[1])
    minor = torch.where(draw.uniform(n) < 0.5, draw.log_uniform(n, low=std[0], high=std[1]), major)
    turn = draw.uniform(n, high=math.pi)
    x, y = _window(draw, size)
    u = (turn.cos()[:, None, None] * x + turn.sin()[:, None, None] * y) / major[:, None, None]
    v = (turn.cos()[:, None, None] * y - turn.sin()[:, None, None] * x) / minor[:, None, None]
    return _unit_sum(torch.exp(-(u**2 + v**2) / 2)[:, None])


def defocus_kernels(
    n: int,
    size: int,
    *,
    radius: tuple[float, float] = (0.5, 8.0),
    seed: Seed = 0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Discs of confusion with one-pixel soft rims; ``radius`` in pixels. Otherwise as :func:`motion_kernels`."""
    check_counts(size=size)  # before it is divided
    _check_kernel(n, size, radius, "radius", size / 2)
    draw = _Draw(seed, device)
    r = draw.log_uniform(n, low=radius[0], high=radius[1])[:, None, None]
    x, y = _window(draw, size)
    return _unit_sum((r - torch.sqrt(x**2 + y**2) + 0.5).clamp(0, 1)[:, None])


def blur_kernels(n: int, size: int, *, seed: Seed = 0, device: str | torch.device = "cpu") -> Tensor:
    """The mixture that the shipped kernel prior learns: mostly camera shake of every extent, some straight motion,
    Gaussian and defocus blur, and kernels of almost no blur. Result and errors as :func:`motion_kernels`.
    """
    _check_kernel(n, size, (0.5, 0.5), "extent", 1.0)
    draw = _Draw(seed, device)
    g = draw.generator
    kind = draw.uniform(n)
    common = dict(seed=g, device=device)
    large = motion_kernels(n, size, extent=(0.2, 0.95), **common)
    small = motion_kernels(n, size, extent=(2 / size, max(2 / size, 0.4)), **common)
    straight = linear_kernels(n, size, extent=(2 / size, 0.9), **common)
    gauss = gaussian_kernels(n, size, std=(0.3, size / 7), **common)
    disc = defocus_kernels(n, size, radius=(0.5, size / 3.5), **common)
    near = gaussian_kernels(n, size, std=(0.15, 0.5), **common)
    out = large
    for share, kernels in ((0.45, small), (0.30, straight), (0.22, gauss), (0.10, disc), (0.04, near)):
        out = torch.where((kind < share)[:, None, None, None], kernels, out)
    return out


def tilt_fields(
    n: int,
    size: int,
    *,
    max_tilt: float = 2.5,
    strength: tuple[float, float] = (0.1, 0.4),
    smoothness: float = 1.0,
    patches: int = 500,
    seed: Seed = 0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Tilt fields as BlindDPS makes them: the sum of smooth random patches (arXiv 2211.10656).

    Parameters
    ----------
    n : int
        How many.
    size : int
        Height and width.
    max_tilt : float
        Tilts are cut to [-max_tilt, max_tilt] pixels.
    strength : (float, float)
        Bounds of a patch's standard deviation in pixels, before smoothing.
    smoothness : float
        Standard deviation, in pixels, of the Gaussian that smooths a patch's white noise.
    patches : int
        How many patches of 64 x 64 pixels there are to 256 x 256 pixels. They may hang over the rim, so that a field
        is alike everywhere and at every size.
    seed : int or torch.Generator
    device : str or torch.device

    Returns
    -------
    Tensor, shape (n, 2, size, size)
        Displacements in pixels, x then y.

    Raises
    ------
    ValueError
        If a number is not positive, or the strengths are not in order.
    """
    _check_tilt(n, size, "strength", strength, smoothness=smoothness, patches=patches)
    if not max_tilt > 0:  # infinity: nothing is cut
        raise ValueError(f"max_tilt: expected a positive number, got {max_tilt}")
    draw, side = _Draw(seed, device), 64
    whole = size + 2 * (side - 1)
    reach = math.ceil(4 * smoothness)
    taps = torch.exp(-((torch.arange(-reach, reach + 1, device=draw.device) / smoothness) ** 2) / 2)
    taps = taps / taps.sum()
    pixels = torch.arange(side, device=draw.device)
    pixels = pixels[:, None] * whole + pixels
    field = torch.zeros(2 * n, whole * whole, device=draw.device)
    for _ in range(round(patches * ((size + side - 1) / 256) ** 2)):
        noise = draw.normal(2 * n, 1, side + 2 * reach, side + 2 * reach)
        noise = F.conv2d(F.conv2d(noise, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
        noise = noise * draw.uniform(2 * n, 1, 1, 1, low=strength[0], high=strength[1])
        corner = draw.integers(size + side - 1, 2 * n, 2)
        where = (corner[:, :1] * whole + corner[:, 1:])[..., None] + pixels
        field.scatter_add_(1, where.flatten(1), noise.flatten(1))
    field = field.view(n, 2, whole, whole)[..., side - 1 : side - 1 + size, side - 1 : side - 1 + size]
    return field.clamp(-max_tilt, max_tilt)


def kolmogorov_tilts(
    n: int,
    size: int,
    *,
    d_r0: tuple[float, float] = (0.5, 2.5),
    apertures: float = 8.0,
    seed: Seed = 0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Tilt fields of Kolmogorov turbulence: how the image of each point of the scene wanders.

    A tilt is the slope of the wavefront over the aperture. Its variance along each axis is 0.182 (D / r0)^(5/3) in
    units of (lambda / D)^2 (Noll, JOSA 66, 1976), and a pixel is taken to be lambda / (2 D), as small as the lens can
    use. Rays of neighbouring points pass the same air: the field has the spectrum of a slope, f^2 times
    (f^2 + 1 / L^2)^(-11/6) with an outer scale L of 16 apertures, smoothed by the aperture.

    Parameters
    ----------
    n, size, seed, device
        As of :func:`tilt_fields`.
    d_r0 : (float, float)
        Bounds of D / r0, the aperture over Fried's parameter; log-uniform.
    apertures : float
        Width of the scene at the distance of the air, in apertures: larger means rougher fields.

    Returns
    -------
    Tensor, shape (n, 2, size, size)
        Displacements in pixels, x then y.

    Raises
    ------
    ValueError
        If a number is not positive, or the bounds of ``d_r0`` are not in order.
    """
    _check_tilt(n, size, "d_r0", d_r0, apertures=apertures)
    draw, whole = _Draw(seed, device), 2 * size  # noise made by FFT is periodic: make more and cut
    step = size / apertures  # pixels in an aperture
    fy = torch.fft.fftfreq(whole, device=draw.device)[:, None] * step
    fx = torch.fft.rfftfreq(whole, device=draw.device) * step
    f = (fx**2 + fy**2).sqrt()
    x = (math.pi * f).clamp(min=1e-6)
    amplitude = (f**2 + 1 / 16**2) ** (-11 / 12) * 2 * torch.special.bessel_j1(x) / x
    slopes = amplitude * torch.stack([fx.expand_as(f), fy.expand_as(f)])
    twice = torch.full_like(fx, 2.0)
    twice[0] = twice[-1] = 1  # rfft2 holds one of each pair of conjugates
    std = (twice * slopes**2).sum((1, 2), keepdim=True).sqrt() / whole
    # The same air bends a ray along x and along y: one potential, two slopes.
    potential = torch.fft.rfft2(draw.normal(n, 1, whole, whole))
    field = torch.fft.irfft2(1j * slopes / std * potential, s=(whole, whole))[..., :size, :size]
    strength = draw.log_uniform(n, 1, 1, 1, low=d_r0[0], high=d_r0[1])
    return 2 * math.sqrt(0.182) * strength ** (5 / 6) * field


def mixed_tilts(n: int, size: int, *, seed: Seed = 0, device: str | torch.device = "cpu") -> Tensor:
    """The mixture that the shipped tilt prior learns: half :func:`kolmogorov_tilts`, half :func:`tilt_fields`.

    Strengths and smoothness vary over what a picture of 64 pixels may meet: 0.1 to 1.4 pixels root mean square along
    each axis; fields that change within a pixel or two up to fields that bend the whole scene as one. Result and errors
    as :func:`tilt_fields`; no tilt is longer than 5 pixels along an axis.
    """
    _check_tilt(n, size, "", (1, 1))
    draw = _Draw(seed, device)
    common = dict(seed=draw.generator, device=device)
    quarter = -(-n // 4)
    parts = []
    for _ in range(2):  # smoothness and apertures are one number a call
        smoothness, apertures = (float(draw.log_uniform(1, low=a, high=b)) for a, b in ((1, 6), (3, 12)))
        patchy = tilt_fields(quarter, size, max_tilt=math.inf, strength=(1, 1), smoothness=smoothness, **common)
        # White noise of deviation 1, smoothed, and 31 patches over each pixel.
        std = math.sqrt(31) / (2 * math.sqrt(math.pi) * smoothness)
        patchy = (patchy / std * draw.log_uniform(quarter, 1, 1, 1, low=0.1, high=1.3)).clamp(-2.5, 2.5)
        parts += [patchy, kolmogorov_tilts(quarter, size, d_r0=(0.2, 1.8), apertures=apertures, **common)]
    return torch.stack(parts, dim=1).flatten(0, 1)[:n].clamp(-5, 5)


def _check_tilt(n: int, size: int, name: str, interval: tuple[float, float], **positive: float) -> None:
    check_counts(n=n, size=size)
    if size < 2:
        raise ValueError(f"n, size: expected at least 1 field of at least 2 pixels, got {n} of {size}")
    _check_interval(name, interval, math.inf)
    check_positive(**positive)


def _check_kernel(n: int, size: int, interval: tuple[float, float], name: str, limit: float) -> None:
    check_counts(n=n, size=size)
    if size < 3:
        raise ValueError(f"n, size: expected n >= 1 and size >= 3, got {n} and {size}")
    _check_interval(name, interval, limit)


def _check_interval(name: str, interval: tuple[float, float], limit: float) -> None:
    two = isinstance(interval, Sequence) and len(interval) == 2 and all(is_number(end) for end in interval)
    if not two or not 0 < interval[0] <= interval[1] <= limit:
        raise ValueError(f"{name}: expected 0 < low <= high <= {limit}, got {interval}")


def _window(draw: _Draw, size: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(size, device=draw.device) - float(size // 2)
    return axis[None, :], axis[:, None]


def _unit_sum(kernels: Tensor) -> Tensor:
    return kernels / kernels.sum((-2, -1), keepdim=True)


def _tremor(draw: _Draw, n: int, points: int) -> Tensor:
    """Hand tremor (n, points, 2): two sinusoids an axis, in some of the paths."""
    t = torch.linspace(0, 1, points, device=draw.device)[None, :, None, None]
    f, phase = draw.uniform(n, 1, 2, 2, low=1, high=9), draw.uniform(n, 1, 2, 2, high=2 * math.pi)
    size = 0.5 * draw.uniform(n, 1, 1) ** 2 * (draw.uniform(n, 1, 1) < 0.5)
    return size * torch.sin(2 * math.pi * f * t + phase).sum(-1)


def _trace(path: Tensor, weight: Tensor, size: int, extent: Tensor, width: Tensor, *, alike: bool = False) -> Tensor:
    """Draw paths (n, 2, T) with weights (n, T), scaled to a share ``extent`` (n, 1, 1) of the window, or all ``alike``.

    Each is centred, its pen's ``width`` (n, 1) in pixels.
    """
    n = len(path)
    weight = weight / weight.sum(1, keepdim=True)
    low, high = path.amin(2, keepdim=True), path.amax(2, keepdim=True)
    box = (high - low).amax(1, keepdim=True).clamp(min=1e-6)
    path = path / (box.amax() if alike else box) * extent * size
    path = path - (path * weight[:, None]).sum(2, keepdim=True)
    # An off-balance path may not fit about its centre of mass: shrink it until it does.
    reach = path.abs().amax((1, 2), keepdim=True)
    room = (size - 1) // 2 - 0.5
    path = path * (room / (reach.amax() if alike else reach)).clamp(max=1) + size // 2

    corner = path.floor()
    frac = path - corner
    out = torch.zeros(n, size * size, device=path.device)
    for dx in (0, 1):
        for dy in (0, 1):
            share = (frac[:, 0] if dx else 1 - frac[:, 0]) * (frac[:, 1] if dy else 1 - frac[:, 1])
            cell = (corner[:, 1] + dy).long() * size + (corner[:, 0] + dx).long()
            out.scatter_add_(1, cell, share * weight)
    taps = torch.arange(-2, 3, device=path.device)
    g = torch.exp(-(taps**2) / (2 * width**2))
    g = g / g.sum(1, keepdim=True)
    out = F.pad(out.reshape(1, n, size, size), (2, 2, 2, 2))
    out = F.conv2d(F.conv2d(out, g[:, None, None, :], groups=n), g[:, None, :, None], groups=n)
    return _unit_sum(out.reshape(n, 1, size, size))
