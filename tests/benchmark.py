"""``make benchmark``: the ways to an unknown kernel on the same images, kernels and noise; resumable.

Fresh scenes and photographs, seeded motion kernels, circular boundary, the shipped priors. Noise is given as in the
Fast Diffusion EM paper, in 255ths of the range [0, 1]: 10 is a standard deviation of 20 / 255 = 0.078 on our [-1, 1].
What is blurred are the values, as in all papers; or, with ``--response srgb``, the light that they stand for, as in a
camera. ``--pages`` takes printed pages instead, and one of the two image priors. Every result is written to the JSON
file as soon as it is there, one for each method and image; a run that was stopped goes on with what is missing, and
``--show`` only prints the table. ``--jobs`` and ``--cluster`` measure several at once, and ``--batch`` several images
in one batch, which keeps a GPU busy and gives the same images: of such a run there are no seconds, as none would be one
image's.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from skimage import data
from skimage.metrics import structural_similarity
from torch import Tensor

from blindlib import (
    DPS,
    Blur,
    DiffPIR,
    PiGDM,
    Result,
    as_published,
    dead_leaves,
    deblur,
    diffusion_em,
    fast_em,
    l0_pyramid,
    load_prior,
    mnc,
    motion_kernels,
    psnr,
    sample,
    text_images,
)
from blindlib.baselines import no_blur
from blindlib.deblur import (
    EM_STEPS,
    GUESSES,
    REFINE_STEPS,
    ROUND_STEPS,
    ROUNDS,
    read_image,
    resize,
    restore,
)
from blindlib.em import RESPONSES, blur_of
from blindlib.files import whole
from blindlib.jobs import imap_unordered
from blindlib.metrics import aligned
from blindlib.operators import linear_values
from blindlib.priors import pick_device

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket") * 2
WINDOW, SHIFT, SUBPIXEL = 32, 4, 4
RESTORE = 8  # network evaluations of `restore`
OURS = DPS()
SHORT = DPS(step_size={"image": 2.0, "kernel": 2.0})  # for much noise, of which DPS is told nothing


def photographs(seed: int, size: int) -> Tensor:
    """Eight cut-outs of the photographs that come with scikit-image, (8, 3, size, size)."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for name in PHOTOS:
        x = read_image(getattr(data, name)())
        short = min(x.shape[-2:])
        side = int(short * (0.4 + 0.5 * torch.rand((), generator=g)))
        top, left = (int((n - side) * torch.rand((), generator=g)) for n in x.shape[-2:])
        out.append(resize(x[..., top : top + side, left : left + side], size))
    return torch.cat(out)


def measured(
    size: int, noise_std: float, seed: int, response: str = "linear", pages: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Eight scenes, then eight photographs, or sixteen pages; their kernels; and what is measured of them."""
    x = (
        text_images(16, size, seed=seed)
        if pages
        else torch.cat([dead_leaves(8, size, seed=seed), photographs(seed, size)])
    )
    k = motion_kernels(16, WINDOW, seed=seed + 1)
    y = blur_of("circular", response)(x, k) + noise_std * torch.randn(
        x.shape, generator=torch.Generator().manual_seed(seed + 2)
    )
    return x, k, y


def methods(
    y: Tensor, k: Tensor, noise_std: float, priors: dict, response: str = "linear"
) -> dict[str, Callable[[], Result]]:
    """Each method by name, to be run on ``y`` (B, 3, H, W); those that tell most in least time first."""
    image, blur = priors["image"], blur_of("circular", response)
    only, known, side = {"image": image}, partial(blur, kernel=k), y.shape[-1]
    em = dict(kernel_size=WINDOW, noise_std=noise_std, response=response)
    values = linear_values(blur, y)

    def blind(steps: int, guidance: DPS = OURS) -> Callable[[], Result]:
        return partial(sample, y, blur, priors, steps=steps, guidance=guidance.respaced(steps, side))

    def with_kernel(kernel: Tensor, noise: float, told: Callable = blur) -> Result:
        """``y`` restored as ``deblur`` does."""
        pairs = zip(y.split(1), kernel.split(1), strict=True)
        restored = torch.cat([restore(one, its, image, told, noise) for one, its in pairs])
        return Result({"image": restored, "kernel": kernel}, 1, torch.zeros(len(y)), RESTORE, 0.0, {})

    def as_deblur(told: str = response) -> Result:
        settings = dict(boundary="circular", response=told, noise_std=noise_std)
        settings |= dict(priors=priors, device=y.device, progress=False)
        made = [deblur(one, **settings) for one in y.split(1)]
        # 20 for each kernel, to choose; at most, as kernels that have become one go on as one.
        evaluations = (len(GUESSES) + 1) * (EM_STEPS + 2 * (ROUNDS * ROUND_STEPS + 20)) + RESTORE
        # A step of refinement: eight, and for three of them two more, which a way back costs; then to choose.
        if told == "linear":
            evaluations += 14 * REFINE_STEPS * ROUNDS + 20
        else:  # at a quarter of the pixels, too
            evaluations += (14 * REFINE_STEPS * ROUNDS + 2 * 16) // 4 + 14 * REFINE_STEPS * ROUNDS + 3 * 16 + 20
        latents = {name: torch.cat([getattr(one, name) for one in made]).to(y) for name in ("image", "kernel")}
        return Result(latents, 1, torch.zeros(len(y)), evaluations, 0.0, {})

    # Most steps are spent on the way down from where only details are hidden, again and again.
    t = image.schedule.timesteps
    returns = partial(
        sample,
        y,
        blur,
        priors,
        steps=t(160) + 4 * t(60, first=300) + 10 * t(60, first=120),
        guidance=OURS.respaced(300, side),
    )
    fast, diff = (partial(f, y, image, **em) for f in (fast_em, diffusion_em))
    in_values = {
        "kernel known, DPIR, as if values were blurred": partial(with_kernel, k, noise_std, Blur()),
        "as deblur, as if values were blurred": partial(as_deblur, "linear"),
    }
    return (in_values if response == "srgb" else {}) | {
        "kernel known, DPIR": partial(with_kernel, k, noise_std),
        "as deblur: l0_pyramid, FastEM, DiffEM": as_deblur,
        "l0_pyramid, then DPIR": lambda: with_kernel(l0_pyramid(values, WINDOW, noise_std)[1], 2 * noise_std),
        "FastEM-PiGDM, 30 steps, then DPIR": lambda: replace(
            with_kernel(fast(steps=30).kernel, 2 * noise_std), evaluations=30 + RESTORE
        ),
        "kernel known, DiffPIR, n = 4": partial(
            sample, y, known, only, steps=20, samples=4, guidance=DiffPIR(noise_std)
        ),
        "kernel known, PiGDM": partial(sample, y, known, only, steps=100, guidance=PiGDM(noise_std)),
        "FastEM-PiGDM, n = 1, 30 steps": partial(fast, steps=30),
        "FastEM-PiGDM, n = 1": partial(fast, steps=100),
        "FastEM-PiGDM, n = 1, from a delta": partial(fast, steps=100, **as_published(WINDOW)),
        "BlindDPS, 100 steps": blind(100),
        "BlindDPS as released, 100 steps": blind(100, DPS.released()),
        "FastEM-DPS, n = 1": partial(fast, steps=100, backbone="dps"),
        "DiffEM-PiGDM, n = 1": partial(diff, steps=20, rounds=10),
        "DiffEM-PiGDM, n = 1, from a delta": partial(diff, steps=20, rounds=10, kernel0=no_blur(1, WINDOW)),
        "BlindDPS, 300 steps": blind(300),
        "kernel known, DPS": partial(sample, y, known, only, steps=100, guidance=DPS().respaced(100, side)),
        "FastEM-PiGDM, n = 4": partial(fast, steps=100, samples=4),
        "FastEM-DPS, n = 4": partial(fast, steps=100, backbone="dps", samples=4),
        "FastEM-DPS, n = 1, 1000 steps": partial(fast, steps=1000, backbone="dps"),
        "DiffEM-DPS, n = 1": partial(diff, steps=50, rounds=10, backbone="dps"),
        "DiffEM-PiGDM, n = 4": partial(diff, steps=20, rounds=10, samples=4),
        "BlindDPS, 1000 steps with returns": returns,
        "BlindDPS, 1000 steps": blind(1000),
        "BlindDPS, 1000 short steps": blind(1000, SHORT),
        "DiffEM-DPS, n = 4": partial(diff, steps=50, rounds=10, backbone="dps", samples=4),
    }


def scores(image: Tensor, kernel: Tensor | None, x: Tensor, k: Tensor) -> dict[str, float]:
    """PSNR and SSIM of one image, MNC and MSE of one kernel, after the best shift by whole pixels; and by quarters."""
    ours, ref = ((v.clamp(-1, 1) + 1) / 2 for v in aligned(image, x, SHIFT))
    planes = [v[0].permute(1, 2, 0).cpu().numpy() for v in (ours, ref)]
    found = {
        "psnr": -10 * math.log10(max(float((ours - ref).square().mean()), 1e-12)),
        "ssim": float(structural_similarity(*planes, channel_axis=2, data_range=1.0)),
    }
    if kernel is not None:
        likeness, a, b = float(mnc(kernel, k)), float(kernel.norm()), float(k.norm())
        # As for a reader who may shift by fractions of a pixel, of which no measurement tells.
        found |= {
            "mnc, subpixel": float(mnc(kernel, k, SUBPIXEL)),
            "psnr, subpixel": float(psnr(image.clamp(-1, 1), x, SHIFT, SUBPIXEL)),
        }
        # |a - b|^2 at the shift where their product is largest.
        found |= {"mnc": likeness, "mse": (a**2 + b**2 - 2 * a * b * likeness) / k.numel()}
    return found


@dataclass(frozen=True)
class Cell:
    """Some of the grid: a method and measurements ``y`` (B, 3, H, W) of the images ``x`` under the kernels ``k``."""

    setting: str
    method: str
    items: tuple[str, ...]
    noise_std: float
    response: str
    prior: str
    x: Tensor
    k: Tensor
    y: Tensor

    def among(self, table: dict) -> bool:
        return set(self.items) <= set(table["results"].get(self.setting, {}).get(self.method, {}))

    def singles(self) -> list["Cell"]:
        # Copies: with a part of a tensor, the whole of it would go to a worker.
        parts = zip(self.items, *(v.split(1) for v in (self.x, self.k, self.y)), strict=True)
        return [replace(self, items=(item,), x=x.clone(), k=k.clone(), y=y.clone()) for item, x, k, y in parts]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, nargs="+", choices=[64, 128], default=[64])
    parser.add_argument("--noise", type=float, nargs="+", default=[10.0], help="in 255ths of [0, 1]: 5 10 20")
    parser.add_argument("--images", type=int, choices=range(1, 9), metavar="N", default=4, help="of each kind, 1 to 8")
    parser.add_argument("--seed", type=int, default=3000)
    parser.add_argument("--response", choices=RESPONSES, default="linear", help="what is blurred: values, or light")
    parser.add_argument("--pages", choices=("image", "text"), help="printed pages instead, with this image prior")
    parser.add_argument("--only", nargs="+", help="methods whose name contains one of these")
    parser.add_argument("--out", type=Path, default=Path("figures/benchmark.json"))
    parser.add_argument("--show", action="store_true", help="print the table of what is there")
    parser.add_argument(
        "--batch", type=int, choices=range(1, 17), default=1, metavar="N", help="images in one, 1 to 16"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, default=1, help="processes, which share the cores and the GPU")
    where.add_argument(
        "--cluster", metavar="ADDRESS", help="of a Dask scheduler: its workers instead of processes here"
    )
    a = parser.parse_args(argv)
    a.out = a.out.resolve()  # workers look there too
    table = read(a.out)
    if not a.show:
        device = pick_device("auto").type
        on = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
        several = "" if alone(a) else ", several at once"
        this = f"{platform.machine()}, {on}, torch {torch.__version__}{several}"
        table["machines"] = [m for m in table.get("machines", []) if m != this] + [this]
        run(a, table)
    print(markdown(table))


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {"results": {}}


def alone(a: argparse.Namespace) -> bool:
    """Whether one image is measured at a time."""
    return a.jobs == a.batch == 1 and a.cluster is None


def run(a: argparse.Namespace, table: dict) -> None:
    """Everything that is missing."""
    a.out.parent.mkdir(exist_ok=True)
    missing = [cell for size in a.size for noise in a.noise for cell in grid(a, size, noise, table)]
    for cell in missing:  # rows of the table in the order of the methods, whichever ends first
        table["results"].setdefault(cell.setting, {}).setdefault(cell.method, {})
    for cell, entries in imap_unordered(partial(measure, out=a.out), missing, jobs=a.jobs, cluster=a.cluster):
        for item, entry in (entries or {}).items():
            if not alone(a):
                entry.pop("seconds", None)
            table["results"][cell.setting][cell.method][item] = entry
            print(f"{cell.setting} {cell.method}, {item}: {entry}", flush=True)
        with whole(a.out) as part:
            part.write_text(json.dumps(table, indent=1) + "\n")


def setting_of(a: argparse.Namespace, size: int, noise: str) -> str:
    return f"{size}x{size}, {noise}, seed {a.seed}" + (", light" if a.response == "srgb" else "")


def grid(a: argparse.Namespace, size: int, noise: float, table: dict) -> list[Cell]:
    """What the table lacks of one size and noise level, ``a.batch`` images of a method together."""
    noise_std, n = 2 * noise / 255, a.images
    x, k, y = measured(size, noise_std, a.seed, a.response, pages=a.pages is not None)
    names = list(methods(y[:1], k[:1], noise_std, load_priors("cpu"), a.response))
    names = ["blurred", *(name for name in names if a.only is None or any(part in name for part in a.only))]
    pages = f", pages, {a.pages} prior" if a.pages else ""
    setting, cells = setting_of(a, size, f"noise {noise:g}/255") + pages, []
    kinds = {"page": 0} if a.pages else {"scene": 0, "photograph": 8}
    items = {f"{kind} {i}": first + i for kind, first in kinds.items() for i in range(n)}
    for name in names:
        left = [item for item in items if item not in table["results"].get(setting, {}).get(name, {})]
        for start in range(0, len(left), a.batch):
            some = tuple(left[start : start + a.batch])
            at = [items[item] for item in some]
            cells.append(Cell(setting, name, some, noise_std, a.response, a.pages or "image", x[at], k[at], y[at]))
    return cells


@cache
def load_priors(device: str, image: str = "image") -> dict:
    return {name: load_prior(which, device=device) for name, which in (("image", image), ("kernel", "kernel"))}


def measure(cell: Cell, out: Path) -> tuple[Cell, dict | None]:
    """Its figures by item; none if a worker that has died since brought them home to ``out``."""
    if cell.among(read(out)):
        return cell, None
    device = pick_device("auto").type
    x, k, y = (v.to(device) for v in (cell.x, cell.k, cell.y))
    if cell.method == "blurred":
        result, extra = Result({"image": y}, 1, torch.zeros(len(y)), 0, 0.0, {}), {}
    else:
        method = methods(y, k, cell.noise_std, load_priors(device, cell.prior), cell.response)[cell.method]
        began = time.perf_counter()
        try:
            result = method()
        except ArithmeticError as error:
            if len(cell.items) == 1:
                return cell, {cell.items[0]: {"diverged": str(error), "seconds": time.perf_counter() - began}}
            each = [measure(one, out)[1] for one in cell.singles()]  # which one it was
            return cell, {item: entry for entries in each for item, entry in (entries or {}).items()}
        if device == "cuda":
            torch.cuda.synchronize()
        extra = {"evaluations": result.evaluations * result.samples, "seconds": time.perf_counter() - began}
    entries, images = {}, result.posterior("image")
    kernels = result.posterior("kernel") if "kernel" in result.latents else [None] * len(y)
    for item, image, kernel, sharp, true in zip(cell.items, images, kernels, x.split(1), k.split(1), strict=True):
        entry = scores(image[:1], None if kernel is None else kernel[:1], sharp, true)
        if len(image) > 1:
            entry["psnr of the average"] = scores(image.mean(0, keepdim=True), None, sharp, true)["psnr"]
        entries[item] = entry | extra
    return cell, entries


def markdown(table: dict) -> str:
    """Means and standard errors as a table for each setting and kind of image."""
    lines = []
    columns = [
        ("psnr", "PSNR", 2),
        ("psnr, subpixel", "by ¼ px", 2),
        ("ssim", "SSIM", 3),
        ("mnc", "MNC", 3),
        ("mnc, subpixel", "by ¼ px", 3),
        ("mse", "kernel MSE", 7),
        ("seconds", "s an image", 1),
        ("evaluations", "evaluations", 0),
    ]
    for setting, of_setting in table["results"].items():
        for kind in ("scene", "photograph", "page"):
            if not any(item.startswith(kind) for items in of_setting.values() for item in items):
                continue
            lines += ["", f"**{setting}, {kind}s**", ""]
            lines += ["| | " + " | ".join(title for _, title, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
            for name, items in of_setting.items():
                rows = [v for key, v in items.items() if key.startswith(kind) and "psnr" in v]
                if not rows:
                    continue
                n = len(rows)
                cells = [_shown([r[c] for r in rows if c in r], digits) for c, _, digits in columns]
                lines.append(f"| {name} ({n}) | " + " | ".join(cells) + " |")
    return "\n".join(lines).strip()


def _shown(values: list[float], digits: int) -> str:
    if not values:
        return ""
    v = torch.tensor(values, dtype=torch.float64)
    if digits < 2:
        return f"{v.mean():.{digits}f}"
    error = f" ± {v.std() / len(v) ** 0.5:.{digits}f}" if len(v) > 1 else ""
    return f"{v.mean():.{digits}f}{error}"


if __name__ == "__main__":
    import benchmark  # by its name, by which other processes can import it too

    benchmark.main()
