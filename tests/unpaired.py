"""``python tests/unpaired.py``: operators learned from unpaired pictures, beside what a single picture tells.

The experiments of DDM4IP (arXiv 2506.14605) on our scenes: one motion blur, a blur that varies over the field, a lens
in three colours whose noise is not known, and twice the resolution from one small photograph. Each operator that a
method finds is held against the true one (MNC, the mean over PSFs) and undoes the blur of pictures that were in neither
set, two scenes and two photographs, always by the same `restore`. Methods that see one picture alone (BlindDPS, FastEM,
`deblur`) find a kernel of up to 32x32 in the middle of each; those that learn from sets are told the window. Seeds
change scenes, noise, kernels and PSFs, but not the lens, nor which four photographs are made small.
Every method's figures are written to the JSON file as soon as they are there; a run that was stopped goes on with what
is missing. ``--jobs`` and ``--cluster`` as of ``tests/benchmark.py``.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark import load_priors, photographs, read
from skimage import data
from torch import Tensor

from blindlib import (
    DPS,
    Blur,
    Downsample,
    FieldMoments,
    Moments,
    SpaceVaryingBlur,
    Threshold,
    dead_leaves,
    fast_em,
    fit_flow,
    gaussian_kernels,
    indirect_kernel,
    learn_operator,
    lens_psfs,
    load_kernel_denoiser,
    mirrored,
    mnc,
    motion_kernels,
    psnr,
    retrieved_kernel,
    sample,
    shaken_psfs,
    spectrum_kernel,
)
from blindlib.deblur import estimate_noise, find_kernels, read_image, restore
from blindlib.files import whole
from blindlib.jobs import imap_unordered
from blindlib.matching import FLOW_STRIDE
from blindlib.operators import seen
from blindlib.priors import pick_device

PART = 97  # of a picture, in which methods that see no other look for a kernel: with 32 - 1 more, the priors take it


@dataclass(frozen=True)
class Experiment:
    """Sides in pixels; ``grid`` of PSFs, none for one kernel; noise on the [-1, 1] scale; ``paper``: of its sizes."""

    name: str
    side: int
    kernel: int
    noise_std: float
    grid: tuple[int, int] | None = None
    degraded: int = 1000
    clean: int = 100
    held_out: int = PART
    steps: int = 400
    paper: bool = False

    @property
    def grey_noise(self) -> float:
        """That of a mean of three colours."""
        return self.noise_std / 3**0.5


EXPERIMENTS = [
    Experiment("motion blur, 17x17", 64, 17, 0.02),
    Experiment("motion blur, 13x13", 64, 13, 0.02),
    Experiment("field of 4x4 PSFs, 9x9", 128, 9, 0.01, (4, 4), 600, held_out=128),
    Experiment("lens of 3x3 PSFs in colour, 9x9", 128, 9, 0.01, (3, 3), 600, held_out=128),
    Experiment("twice the resolution, 13x13", 64, 13, 0.01, steps=60),
    # 28 of 256 as the paper; a thousand pictures take too long to make, and 300 have more tiles than `Moments` takes.
    Experiment("motion blur, 28x28 of 256x256", 256, 28, 0.02, degraded=300, held_out=225, paper=True),
    Experiment("field of 8x8 PSFs, 13x13 of 256x256", 256, 13, 0.01, (8, 8), held_out=256, paper=True),
]


class Padded(Downsample):
    """With a border of zeros on the kernel, without which a scene's side would be odd under an even kernel."""

    def __call__(self, image: Tensor, kernel: Tensor) -> Tensor:
        return super().__call__(image, F.pad(kernel, (0, 1, 0, 1)))

    def sizes(self, measured: tuple[int, int], kernel: tuple[int, int], **_: object) -> dict:
        return super().sizes(measured, (kernel[0] + 1, kernel[1] + 1))


def noisy(y: Tensor, noise_std: float, seed: int) -> Tensor:
    return y + noise_std * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))


def scenes(n: int, size: int, seed: int) -> Tensor:
    """Made in pieces, to spare memory."""
    return torch.cat([dead_leaves(min(20, n - i), size, seed=seed + i) for i in range(0, n, 20)])


def truth(e: Experiment, seed: int) -> tuple[Blur | SpaceVaryingBlur | Downsample, Tensor]:
    """The operator, and the kernel or PSFs that nobody knows."""
    if e.name.startswith("motion"):
        return Blur("valid"), motion_kernels(1, e.kernel, extent=(0.4, 0.8), seed=seed + 2)
    if e.name.startswith("field"):
        return SpaceVaryingBlur("valid"), shaken_psfs(e.grid, e.kernel, extent=(0.8, 0.8), roll=0.6, seed=seed + 1)
    if e.name.startswith("lens"):
        return SpaceVaryingBlur("valid"), lens_psfs(e.grid, e.kernel, corner=0.28 * e.kernel, colour=0.2)
    return Downsample(2), gaussian_kernels(1, e.kernel, std=(0.8, 2.0), seed=seed + 10)


@cache
def sets(e: Experiment, seed: int) -> tuple[Tensor, Tensor]:
    """Clean and degraded pictures, no two of one scene. A field's are made of half as many, taken upside down too."""
    (operator, kernel), base, size = truth(e, seed), 1_000_000 * (seed + 1), e.side + e.kernel - 1
    sharp = scenes(e.degraded // (1 if e.grid is None else 2), size, base)
    sharp = sharp if e.grid is None else torch.cat([sharp, sharp.flip(-2, -1)])
    degraded = noisy(torch.cat([operator(x, kernel) for x in sharp.split(50)]), e.noise_std, seed)
    clean = scenes(e.clean, size, base + 500_000)
    if e.name.startswith("lens"):
        return clean, degraded
    return clean.mean(1, keepdim=True), degraded.mean(1, keepdim=True)


@cache
def held_out(e: Experiment, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pictures by name, each with what is measured of it; of small photographs, a part."""
    operator, kernel = truth(e, seed)
    if e.name.startswith("twice"):
        out = {}
        for name, small in small_photographs(e, seed).items():
            top, left = ((side - e.side) // 2 for side in small.shape[-2:])
            x = bundled(name)
            x = x[..., *seen(x.shape[-2:], kernel.shape[-2:])]
            x = x[..., 2 * top : 2 * (top + e.side), 2 * left : 2 * (left + e.side)]
            out[f"photograph, {name}"] = x, small[..., top : top + e.side, left : left + e.side]
        return out
    size = e.held_out + e.kernel - 1
    x = torch.cat([scenes(2, size, 1_000_000 * (seed + 1) + 900_000), photographs(seed, size)[[0, 2]]])
    y = noisy(operator(x, kernel), e.noise_std, seed + 1)
    x = x[..., *seen(x.shape[-2:], kernel.shape[-2:])]
    names = ("scene 0", "scene 1", "photograph 0", "photograph 1")
    return {name: (x[i : i + 1], y[i : i + 1]) for i, name in enumerate(names)}


@cache
def small_photographs(e: Experiment, seed: int) -> dict[str, Tensor]:
    operator, kernel = truth(e, seed)
    names = ("astronaut", "coffee", "chelsea", "rocket")
    return {name: noisy(operator(bundled(name), kernel), e.noise_std, seed + 4) for name in names}


def bundled(name: str) -> Tensor:
    return read_image(getattr(data, name)())


def methods(e: Experiment, seed: int) -> dict[str, Callable[[], Tensor | list[Tensor]]]:
    """By name, what finds an operator: one for all held-out pictures, or one for each."""
    known = {"true kernel": lambda: truth(e, seed)[1]}
    one = {
        "one picture: BlindDPS": partial(parallel, e, seed),
        "one picture: FastEM": partial(em, e, seed),
        "one picture: deblur": partial(as_deblur, e, seed),
    }
    if e.name.startswith("twice"):
        moments = {
            "moments, from itself": partial(from_itself, e, seed),
            "moments, from other photographs": partial(from_others, e, seed),
        }
        return known | moments | one
    if e.name.startswith("lens"):
        return known | {"moments": partial(lens, e, seed), "moments, mirrored": lambda: mirrored(lens(e, seed))} | one
    if e.name.startswith("field"):
        return (
            known
            | {
                "one kernel for all": partial(retrieved, e, seed),
                "moments, each cell alone": partial(cells, e, seed),
                "moments": partial(field, e, seed),
            }
            | one
        )
    common = dict(noise_std=e.grey_noise, kernel_size=e.kernel)
    learned = {
        "power spectra, phase zero": lambda: spectrum_kernel(*sets(e, seed), **common),
        "power spectra, phase retrieved": partial(retrieved, e, seed),
        "moments": partial(fitted, e, seed),
        "moments, then indirect inference": partial(indirect, e, seed),
        "networks, from a blot": partial(networks, e, seed, common),
    }
    return known | learned | one


def retrieved(e: Experiment, seed: int) -> Tensor:
    return retrieved_kernel(*sets(e, seed), noise_std=e.grey_noise, kernel_size=e.kernel, seed=seed)


@cache
def fitted(e: Experiment, seed: int) -> Tensor:
    moments = Moments(*sets(e, seed), noise_std=e.grey_noise, kernel_size=e.kernel, seed=seed)
    return moments.fit(retrieved(e, seed), steps=e.steps).cpu()


def indirect(e: Experiment, seed: int) -> Tensor:
    """From the moments' kernel, with the image prior."""
    prior = load_priors(pick_device("auto").type)["image"]
    return indirect_kernel(*sets(e, seed), fitted(e, seed), prior, noise_std=e.grey_noise, seed=seed).cpu()


def networks(e: Experiment, seed: int, common: dict) -> Tensor:
    """Matching alone, from a Gaussian, as in the paper: an hour on one core, most of it flow matching."""
    patch = max(32, -(-e.kernel // FLOW_STRIDE) * FLOW_STRIDE)
    net = dict(base_channels=24, multipliers=(1, 2, 2), groups=8)
    shared = dict(patch=patch, seed=seed, progress=True)
    flow = fit_flow(sets(e, seed)[1], steps=1400, batch=64, net=net, **shared)
    blot = gaussian_kernels(1, e.kernel, std=(e.kernel / 5, e.kernel / 5), seed=0)
    options = dict(steps=600, batch=48, learning_rate=2e-3, flow_rate=1e-4, frozen=True, flow=flow, start=blot)
    return learn_operator(*sets(e, seed), **common, **shared, **options).kernel


def field_moments(e: Experiment, seed: int) -> FieldMoments:
    return FieldMoments(*sets(e, seed), e.grid, noise_std=e.grey_noise, kernel_size=e.kernel, seed=seed)


def cells(e: Experiment, seed: int) -> Tensor:
    return field_moments(e, seed).retrieved()


def field(e: Experiment, seed: int) -> Tensor:
    moments = field_moments(e, seed)
    return moments.fit(moments.retrieved()).cpu()


@cache
def lens(e: Experiment, seed: int) -> Tensor:
    """Each colour by itself, its noise fitted too."""
    clean, degraded = sets(e, seed)
    colours, common = [], dict(noise_std=None, kernel_size=e.kernel, seed=seed)
    for c in range(3):
        one = FieldMoments(clean[:, c : c + 1], degraded[:, c : c + 1], e.grid, **common)
        colours.append(one.fit(one.retrieved()).cpu())
    return torch.cat(colours, dim=3)


def middles(e: Experiment, seed: int, part: int = PART) -> list[Tensor]:
    """The middle of each held-out picture."""
    out = []
    for _, y in held_out(e, seed).values():
        top, left = ((side - part) // 2 for side in y.shape[-2:])
        out.append(y[..., top : top + part, left : left + part])
    return out


def parallel(e: Experiment, seed: int) -> list[Tensor]:
    """BlindDPS with 300 steps."""
    operator, part = (Padded(2), 48) if e.name.startswith("twice") else (Blur("valid"), PART)
    ys = middles(e, seed, part)
    guidance = DPS().respaced(300, 128)
    return [sample(y, operator, load_priors("cpu"), steps=300, guidance=guidance, seed=seed).kernel for y in ys]


def em(e: Experiment, seed: int) -> list[Tensor]:
    options = dict(kernel_size=32, steps=30, boundary="valid", seed=seed)
    image = load_priors("cpu")["image"]
    return [fast_em(y, image, noise_std=noise_of(e, y), **options).kernel for y in enlarged(e, seed)]


def as_deblur(e: Experiment, seed: int) -> list[Tensor]:
    find = partial(find_kernels, priors=load_priors("cpu"), blur=Blur("valid"), seed=seed)
    return [find(y, noise_std=noise_of(e, y))[0] for y in enlarged(e, seed)]


def enlarged(e: Experiment, seed: int) -> list[Tensor]:
    """For EM, whose M-step knows no coarse pixels: of a low resolution, the middles' bicubic enlargements."""
    if not e.name.startswith("twice"):
        return middles(e, seed)
    return [bicubic(y)[..., :PART, :PART] for y in middles(e, seed, PART // 2 + 1)]


def noise_of(e: Experiment, y: Tensor) -> float:
    """The noise level, estimated where it is not known."""
    return estimate_noise(y) if e.name.startswith("lens") else e.noise_std


def from_itself(e: Experiment, seed: int) -> list[Tensor]:
    grey = [small.mean(1, keepdim=True) for small in small_photographs(e, seed).values()]
    return [coarse_kernel(e, seed, y, y) for y in grey]


def from_others(e: Experiment, seed: int) -> list[Tensor]:
    small = small_photographs(e, seed)
    sharp = {name: bundled(name)[0].mean(0, keepdim=True) for name in small}
    return [
        coarse_kernel(e, seed, [x for other, x in sharp.items() if other != name], y.mean(1, keepdim=True))
        for name, y in small.items()
    ]


def coarse_kernel(e: Experiment, seed: int, clean: Tensor | list[Tensor], degraded: Tensor) -> Tensor:
    """As notebook 07 does it: moments from a blot, by short steps as one picture tells little; then the denoiser."""
    blot = gaussian_kernels(1, e.kernel, std=(e.kernel / 8, e.kernel / 8), seed=0)
    common = dict(noise_std=e.grey_noise, kernel_size=e.kernel, seed=seed)
    fitted = Moments(clean, degraded, Downsample(2), **common).fit(blot, steps=e.steps, learning_rate=2e-3).cpu()
    fitted = Threshold(0.02)(load_kernel_denoiser()(fitted, 0.02), 0)
    return fitted / fitted.sum()


def bicubic(y: Tensor) -> Tensor:
    """Cubic interpolation at the fine pixels, of which every second one is where a coarse one is."""
    at = [2 * (torch.arange(2 * n) / 2 + 0.5) / n - 1 for n in y.shape[-2:]]
    grid = torch.stack(torch.meshgrid(at[1], at[0], indexing="xy"), -1)[None]
    return F.grid_sample(y, grid, mode="bicubic", padding_mode="border", align_corners=False)


@torch.no_grad()
def scores(e: Experiment, seed: int, found: list[Tensor] | None) -> dict[str, dict[str, float]]:
    """By held-out picture: the operator's MNC, the PSNR of the restoration (after the best shift: nothing tells it)."""
    (operator, true), out = truth(e, seed), {}
    for i, (name, (x, y)) in enumerate(held_out(e, seed).items()):
        if found is None:
            picture, entry = bicubic(y) if isinstance(operator, Downsample) else y, {}
        else:
            kernel, of = found[i], operator
            if true.ndim == 6 and kernel.ndim == 4:  # one kernel for all places
                of = Blur("valid")
            picture = restore(y, kernel, load_priors("cpu")["image"], of, e.noise_std)
            entry = {"mnc": likeness(kernel, true)}
        entry["psnr"] = float(psnr(picture.clamp(-1, 1), x, max_shift=4, subpixel=4))
        out[name] = entry
    return out


def likeness(kernel: Tensor, true: Tensor) -> float:
    """Mean MNC over PSFs and colours; a single kernel is held against all."""
    if true.ndim == 6 and kernel.ndim == 4:
        kernel = kernel[:, None, None]
    one, other = kernel.shape[-2:], true.shape[-2:]
    kernel = kernel.expand(*true.shape[:-2], *one)
    return float(mnc(kernel.reshape(-1, 1, *one), true.reshape(-1, 1, *other)).mean())


@dataclass(frozen=True)
class Cell:
    """One of the grid."""

    experiment: Experiment
    seed: int
    method: str

    @property
    def setting(self) -> str:
        return f"{self.experiment.name}, seed {self.seed}"

    def among(self, table: dict) -> bool:
        return self.method in table["results"].get(self.setting, {})


def measure(cell: Cell, out: Path) -> tuple[Cell, dict | None]:
    """The cell's figures; none if a worker that has died since brought them home to ``out``."""
    if cell.among(read(out)):
        return cell, None
    e, seed = cell.experiment, cell.seed
    if cell.method == "measured":
        return cell, scores(e, seed, None)
    if not e.name.startswith("twice") and not cell.method.startswith(("true", "one picture")):
        sets(e, seed)  # made before the clock runs
    began = time.perf_counter()
    try:
        found = methods(e, seed)[cell.method]()
    except ArithmeticError as error:
        return cell, {"diverged": str(error)}
    seconds = time.perf_counter() - began
    found = found if isinstance(found, list) else len(held_out(e, seed)) * [found]
    return cell, {name: entry | {"seconds": seconds} for name, entry in scores(e, seed, found).items()}


def main(argv: list[str] | None = None, experiments: list[Experiment] = EXPERIMENTS) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experiment", nargs="+", help="those whose name contains one of these; default: all but two")
    parser.add_argument("--seed", type=int, nargs="+", default=[100])
    parser.add_argument("--only", nargs="+", help="methods whose name contains one of these")
    parser.add_argument("--out", type=Path, default=Path("figures/unpaired.json"))
    parser.add_argument("--show", action="store_true", help="print the table of what is there")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, default=1, help="processes, which share the cores")
    where.add_argument("--cluster", metavar="ADDRESS", help="of a Dask scheduler: its workers instead")
    a = parser.parse_args(argv)
    a.out = a.out.resolve()  # workers look there too
    table = read(a.out)
    if not a.show:
        a.out.parent.mkdir(exist_ok=True)
        table["machine"] = f"{platform.machine()}, torch {torch.__version__}"
        run(a, table, experiments)
    print(markdown(table))


def run(a: argparse.Namespace, table: dict, experiments: list[Experiment]) -> None:
    """Everything that is missing."""
    wanted = (lambda e: not e.paper) if a.experiment is None else lambda e: any(part in e.name for part in a.experiment)
    missing = [
        cell
        for e in filter(wanted, experiments)
        for seed in a.seed
        for cell in (Cell(e, seed, method) for method in ("measured", *methods(e, seed)))
        if cell.method == "measured" or a.only is None or any(part in cell.method for part in a.only)
        if not cell.among(table)
    ]
    for cell, entry in imap_unordered(partial(measure, out=a.out), missing, jobs=a.jobs, cluster=a.cluster):
        if entry is None:
            continue
        rows = table["results"].setdefault(cell.setting, {}) | {cell.method: entry}
        order = ("measured", *methods(cell.experiment, cell.seed))
        table["results"][cell.setting] = {method: rows[method] for method in order if method in rows}
        with whole(a.out) as part:
            part.write_text(json.dumps(table, indent=1) + "\n")
        print(f"{cell.setting}, {cell.method}: {entry}", flush=True)


def markdown(table: dict) -> str:
    """For each experiment and method the mean MNC, and the mean PSNR of scenes and of photographs.

    Seconds are those of finding what all pictures were restored with, less what the method before it had found.
    """
    lines = []
    for setting, of_setting in table["results"].items():
        lines += ["", f"**{setting}**", "", "| | MNC | scenes, dB | photographs, dB | seconds |", "|---" * 5 + "|"]
        for method, items in of_setting.items():
            cells_of = [_mean([v["mnc"] for v in items.values() if "mnc" in v], 3)]
            for kind in ("scene", "photograph"):
                cells_of.append(_mean([v["psnr"] for key, v in items.items() if key.startswith(kind)], 1))
            cells_of.append(_mean([v["seconds"] for v in items.values() if "seconds" in v], 0))
            lines.append(f"| {method} | " + " | ".join(cells_of) + " |")
    return "\n".join(lines).strip()


def _mean(values: list[float], digits: int) -> str:
    return f"{sum(values) / len(values):.{digits}f}" if values else ""


if __name__ == "__main__":
    import unpaired  # by its name, by which other processes can import it too

    unpaired.main()
