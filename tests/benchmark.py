"""``make benchmark``: the ways to an unknown kernel on the same images, kernels and noise; resumable.

Fresh scenes and photographs, seeded motion kernels, circular boundary, the shipped priors. Noise is given as in the
Fast Diffusion EM paper, in 255ths of the range [0, 1]: 10 is a standard deviation of 20 / 255 = 0.078 on our [-1, 1].
Every result is written to the JSON file as soon as it is there, one for each method and image; a run that was stopped
goes on with what is missing, and ``--show`` only prints the table.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from skimage import data
from skimage.metrics import structural_similarity
from torch import Tensor

from blindlib import (
    DPS,
    Blur,
    PiGDM,
    Result,
    as_published,
    dead_leaves,
    deblur,
    diffusion_em,
    dpir,
    fast_em,
    l0_pyramid,
    load_prior,
    mnc,
    motion_kernels,
    sample,
)
from blindlib.deblur import EM_STEPS, GUESSES, read_image, resize, restore

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket") * 2
WINDOW, SHIFT = 32, 4
RESTORE = 80  # network evaluations of `restore`: 20 steps of four samples
OURS = DPS()


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


def methods(y: Tensor, k: Tensor, noise_std: float, priors: dict) -> dict[str, Callable[[], Result]]:
    """Each method by name, to be run on one measurement; those that tell most in least time first."""
    image = priors["image"]
    only, known, side = {"image": image}, partial(Blur(), kernel=k), y.shape[-1]
    em = dict(kernel_size=WINDOW, noise_std=noise_std)

    def blind(steps: int, guidance: DPS = OURS) -> Callable[[], Result]:
        return partial(sample, y, Blur(), priors, steps=steps, guidance=guidance.respaced(steps, side))

    def with_kernel(kernel: Tensor, noise: float) -> Result:
        """``y`` restored as ``deblur`` does; what a kernel that was found cannot explain is noise to it."""
        latents = {"image": restore(y, kernel, image, Blur(), noise), "kernel": kernel}
        return Result(latents, 1, torch.zeros(1), RESTORE, 0.0, {})

    def as_deblur() -> Result:
        made = deblur(y, boundary="circular", noise_std=noise_std, priors=priors, device=y.device, progress=False)
        # 20 for each kernel of EM or the diffusion, to choose.
        evaluations = (len(GUESSES) + 1) * (EM_STEPS + 20) + 60 + 20 + RESTORE
        latents = {"image": made.image.to(y), "kernel": made.kernel.to(y)}
        return Result(latents, 1, torch.zeros(1), evaluations, 0.0, {})

    fast, diff = (partial(f, y, image, **em) for f in (fast_em, diffusion_em))
    return {
        "kernel known, DiffPIR": partial(with_kernel, k, noise_std),
        "kernel known, DPIR": lambda: Result(
            {"image": dpir(y, known, image, noise_std)}, 1, torch.zeros(1), 8, 0.0, {}
        ),
        "as deblur: l0_pyramid, FastEM, parallel": as_deblur,
        "l0_pyramid, then DiffPIR": lambda: with_kernel(l0_pyramid(y, WINDOW, noise_std)[1], 2 * noise_std),
        "kernel known, PiGDM": partial(sample, y, known, only, steps=100, guidance=PiGDM(noise_std)),
        "FastEM-PiGDM, n = 1, 30 steps": partial(fast, steps=30),
        "FastEM-PiGDM, n = 1": partial(fast, steps=100),
        "FastEM-PiGDM, n = 1, from a delta": partial(fast, steps=100, **as_published(WINDOW)),
        "BlindDPS, 100 steps": blind(100),
        "BlindDPS as released, 100 steps": blind(100, DPS.released()),
        "FastEM-DPS, n = 1": partial(fast, steps=100, backbone="dps"),
        "DiffEM-PiGDM, n = 1": partial(diff, steps=20, rounds=10),
        "BlindDPS, 300 steps": blind(300),
        "kernel known, DPS": partial(sample, y, known, only, steps=100, guidance=DPS().respaced(100, side)),
        "FastEM-PiGDM, n = 4": partial(fast, steps=100, samples=4),
        "FastEM-DPS, n = 4": partial(fast, steps=100, backbone="dps", samples=4),
        "DiffEM-DPS, n = 1": partial(diff, steps=50, rounds=10, backbone="dps"),
        "DiffEM-PiGDM, n = 4": partial(diff, steps=20, rounds=10, samples=4),
        "BlindDPS, 1000 steps": blind(1000),
        "DiffEM-DPS, n = 4": partial(diff, steps=50, rounds=10, backbone="dps", samples=4),
    }


def aligned(x: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` (1, 3, H, W) at its best integer shift, and ``ref``, without a border; both in [0, 1]."""
    h, w = x.shape[-2:]
    inner = ref[..., SHIFT : h - SHIFT, SHIFT : w - SHIFT]
    shifts = [(i, j) for i in range(2 * SHIFT + 1) for j in range(2 * SHIFT + 1)]
    crops = [x[..., i : h - 2 * SHIFT + i, j : w - 2 * SHIFT + j] for i, j in shifts]
    best = min(crops, key=lambda c: float((c - inner).square().mean()))
    return (best.clamp(-1, 1) + 1) / 2, (inner + 1) / 2


def scores(image: Tensor, kernel: Tensor | None, x: Tensor, k: Tensor) -> dict[str, float]:
    """PSNR and SSIM of one image, MNC and MSE of one kernel, all after the best shift."""
    ours, ref = aligned(image, x)
    planes = [v[0].permute(1, 2, 0).cpu().numpy() for v in (ours, ref)]
    found = {
        "psnr": -10 * math.log10(max(float((ours - ref).square().mean()), 1e-12)),
        "ssim": float(structural_similarity(*planes, channel_axis=2, data_range=1.0)),
    }
    if kernel is not None:
        likeness, a, b = float(mnc(kernel, k)), float(kernel.norm()), float(k.norm())
        # |a - b|^2 at the shift where their product is largest.
        found |= {"mnc": likeness, "mse": (a**2 + b**2 - 2 * a * b * likeness) / k.numel()}
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, choices=[64, 128], default=64)
    parser.add_argument("--noise", type=float, nargs="+", default=[10.0], help="in 255ths of [0, 1]: 5 10 20")
    parser.add_argument("--images", type=int, default=4, help="of each kind, at most 8")
    parser.add_argument("--seed", type=int, default=3000)
    parser.add_argument("--only", nargs="+", help="methods whose name contains one of these")
    parser.add_argument("--out", type=Path, default=Path("figures/benchmark.json"))
    parser.add_argument("--show", action="store_true", help="print the table of what is there")
    a = parser.parse_args(argv)
    table = json.loads(a.out.read_text()) if a.out.is_file() else {"results": {}}
    if not a.show:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        priors = {name: load_prior(name, device=device) for name in ("image", "kernel")}
        on = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
        table["machine"] = f"{platform.machine()}, {on}, torch {torch.__version__}"
        for noise in a.noise:
            run(a, noise, priors, device, table)
    print(markdown(table))


def run(a: argparse.Namespace, noise: float, priors: dict, device: str, table: dict) -> None:
    """Everything that is missing at one noise level."""
    noise_std, n = 2 * noise / 255, a.images
    x = torch.cat([dead_leaves(8, a.size, seed=a.seed), photographs(a.seed, a.size)])
    k = motion_kernels(16, WINDOW, seed=a.seed + 1)
    y = Blur()(x, k) + noise_std * torch.randn(x.shape, generator=torch.Generator().manual_seed(a.seed + 2))
    x, k, y = (v.to(device) for v in (x, k, y))
    items = [*range(n), *range(8, 8 + n)]
    names = list(methods(y[:1], k[:1], noise_std, priors))
    todo = ["blurred", *(name for name in names if a.only is None or any(part in name for part in a.only))]
    for name in todo:
        cell = table["results"].setdefault(f"{a.size}x{a.size}, noise {noise:g}/255, seed {a.seed}", {})
        of_method = cell.setdefault(name, {})
        for i in items:
            kind = "scene" if i < 8 else "photograph"
            if f"{kind} {i % 8}" in of_method:
                continue
            one = slice(i, i + 1)
            began = time.perf_counter()
            if name == "blurred":
                entry = scores(y[one], None, x[one], k[one])
            else:
                try:
                    result = methods(y[one], k[one], noise_std, priors)[name]()
                except ArithmeticError as error:
                    entry = {"diverged": str(error)}
                else:
                    kernel = result.latents.get("kernel")
                    entry = scores(result.image[:1], None if kernel is None else kernel[:1], x[one], k[one])
                    if result.samples > 1:
                        average = result.image.mean(0, keepdim=True)
                        entry["psnr of the average"] = scores(average, None, x[one], k[one])["psnr"]
                    entry |= {"evaluations": result.evaluations * result.samples}
                entry["seconds"] = time.perf_counter() - began
            of_method[f"{kind} {i % 8}"] = entry
            a.out.parent.mkdir(exist_ok=True)
            part = a.out.with_name(a.out.name + ".part")
            part.write_text(json.dumps(table, indent=1) + "\n")
            os.replace(part, a.out)
            print(f"{noise:g}/255 {name}, {kind} {i % 8}: {entry}", flush=True)


def markdown(table: dict) -> str:
    """Means and standard errors as a table for each setting and kind of image."""
    lines = []
    columns = {"psnr": 2, "ssim": 3, "mnc": 3, "mse": 7, "seconds": 1, "evaluations": 0}
    for setting, of_setting in table["results"].items():
        for kind in ("scene", "photograph"):
            lines += [
                "",
                f"**{setting}, {kind}s**",
                "",
                "| | PSNR | SSIM | MNC | kernel MSE | s an image | evaluations |",
            ]
            lines += ["|---|---|---|---|---|---|---|"]
            for name, items in of_setting.items():
                rows = [v for key, v in items.items() if key.startswith(kind) and "psnr" in v]
                if not rows:
                    continue
                n = len(rows)
                cells = [_shown([r[c] for r in rows if c in r], digits) for c, digits in columns.items()]
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
    main()
