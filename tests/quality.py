"""``make bench``: quality on eight scenes and eight photographs that nothing was tuned on.

64x64 pixels, seeded motion kernels, noise_std 0.02, circular boundary: the same measurements for all methods, but the
seconds of "the first" start are those of all.
Another ``--seed`` gives another set: other scenes, kernels and noise, and other cut-outs of the photographs.
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from skimage import data
from torch import Tensor

from blindlib import DPS, Blur, DiffPIR, dead_leaves, l0_pyramid, load_prior, mnc, motion_kernels, psnr, sample
from blindlib.deblur import find_kernels, read_image, resize, unexplained

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket") * 2
NOISE_STD = 0.02


def photographs(seed: int, size: int = 64) -> Tensor:
    """Eight cut-outs of the photographs that come with scikit-image, (8, 3, size, size)."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for name in PHOTOS:
        x = read_image(getattr(data, name)())
        short = min(x.shape[-2:])
        side = int(short * (0.4 + 0.5 * torch.rand((), generator=g)))
        top, left = (int((n - side) * torch.rand((), generator=g)) for n in x.shape[-2:])
        x = x[..., top : top + side, left : left + side]
        out.append(resize(x, size))
    return torch.cat(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--starts", type=int, default=3, help="runs, of which the one that explains y best counts")
    parser.add_argument("--images", type=int, default=8, help="of each kind, at most 8")
    parser.add_argument("--out", type=Path, help="write the table as JSON too")
    a = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    priors = {name: load_prior(name, device=device) for name in ("image", "kernel")}
    image_only = {"image": priors["image"]}

    x = torch.cat([dead_leaves(8, 64, seed=a.seed), photographs(a.seed)])
    k = motion_kernels(16, 32, seed=a.seed + 1)
    y = Blur()(x, k) + NOISE_STD * torch.randn(x.shape, generator=torch.Generator().manual_seed(a.seed + 2))
    n = a.images
    x, k, y = (torch.cat([v[:n], v[8 : 8 + n]]).to(device) for v in (x, k, y))
    known = partial(Blur(), kernel=k)
    proximal = DiffPIR(noise_std=NOISE_STD)
    ours, released = DPS().respaced(a.steps), DPS.released().respaced(a.steps)

    def restored(kernel: Tensor, rest: Tensor) -> Tensor:
        """What a kernel that is not quite right cannot explain is noise to the restoration."""
        careful = DiffPIR(noise_std=max(NOISE_STD, float(rest.mean())))
        return sample(y, partial(Blur(), kernel=kernel), image_only, steps=100, guidance=careful).image

    def methods() -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Each method's name, images and kernels, computed when they are asked for."""
        yield "blurred", y, None
        yield "kernel known, DiffPIR", sample(y, known, image_only, steps=100, guidance=proximal).image, None
        yield "kernel known, DPS", sample(y, known, image_only, steps=a.steps, guidance=ours).image, None
        run = sample(y, Blur(), priors, steps=a.steps, guidance=released, progress=True)
        yield "BlindDPS as released", run.image, run.kernel
        run = sample(y, Blur(), priors, steps=a.steps, samples=a.starts, guidance=ours, progress=True)
        yield f"BlindDPS, {a.starts} starts: the first", *(run.posterior(name)[:, 0] for name in priors)
        pairs = zip(y[:, None], run.posterior("kernel"), strict=True)
        rest = torch.stack([unexplained(one, ks, priors["image"], Blur(), NOISE_STD)[0] for one, ks in pairs])
        image, kernel = (run.posterior(name)[range(len(x)), rest.argmin(1)] for name in priors)
        yield "the one that explains y best", image, kernel
        yield "and then DiffPIR", restored(kernel, rest.amin(1)), kernel
        kernel = torch.cat([l0_pyramid(one, 32, NOISE_STD)[1] for one in y[:, None]])
        yield "no diffusion: l0_pyramid, then DiffPIR", restored(kernel, torch.full((len(y),), 2 * NOISE_STD)), kernel
        found = [find_kernels(one, priors, Blur(), NOISE_STD) for one in y[:, None]]
        kernel, rest = (torch.cat([pair[i][:1] for pair in found]) for i in (0, 1))
        yield "as deblur: started there, then DiffPIR", restored(kernel, rest), kernel

    table, began = {}, time.perf_counter()
    print(f"{'PSNR in dB and kernel MNC, mean (standard error)':40s}   scenes                     photographs")
    for name, image, kernel in methods():
        quality, likeness = psnr(image, x, max_shift=4), None if kernel is None else mnc(kernel, k)
        halves = (slice(0, n), slice(n, 2 * n))
        row = [_shown(quality[part], None if likeness is None else likeness[part]) for part in halves]
        seconds = (time.perf_counter() - began) / len(x)
        print(f"{name:40s}   {row[0]:24s}   {row[1]:24s} {seconds:6.1f} s an image", flush=True)
        table[name] = {"psnr": quality.tolist(), "mnc": likeness.tolist() if likeness is not None else None}
        began = time.perf_counter()
    if a.out is not None:
        a.out.write_text(json.dumps({"seed": a.seed, "steps": a.steps, "starts": a.starts, **table}, indent=1) + "\n")


def _shown(quality: Tensor, likeness: Tensor | None) -> str:
    text = f"{quality.mean():5.2f} ({quality.std() / len(quality) ** 0.5:.2f})"
    return text if likeness is None else f"{text} {likeness.mean():.3f} ({likeness.std() / len(likeness) ** 0.5:.3f})"


if __name__ == "__main__":
    main()
