"""``python tests/calibration.py``: do posterior samples and error maps say the truth about their own errors?

Images, kernels and noise are those of the benchmark. For the kernel known: samples of each guidance, by the ratio of
their mean's error to what their spread predicts (1 if they are honest) and by how many true values lie within the
samples' range. For the error maps of `deblur`, the kernel known and found: the restoration's error over the map, and
how many values are wrong by less than the map says, and by less than twice as much (of a normal error: .68, .95). All
images together (squares add up, so that one bad picture counts most), their median, and from the least to the largest.
The maps' factors, KNOWN and FOUND in `blindlib.deblur`, come from seed 2030: a ratio printed here, times the factor, is
the factor that would have been right.
Every result is written to the JSON file as soon as it is there; a run that was stopped goes on with what is missing.
"""

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark import SHIFT, SUBPIXEL, load_priors, measured, read, setting_of
from torch import Tensor

from blindlib import DPS, DiffPIR, PiGDM, deblur, mnc, sample
from blindlib.em import RESPONSES, blur_of
from blindlib.files import whole
from blindlib.metrics import aligned, error_over_spread, ranks

SAMPLES = 9  # a true value lies within the range of nine with probability .8
MAPS = {"map, kernel known": True, "map, kernel found": False}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--noise-std", type=float, default=0.02, help="on the [-1, 1] scale")
    parser.add_argument("--images", type=int, default=8, help="of each kind, at most 8")
    parser.add_argument("--seed", type=int, default=2034)
    parser.add_argument("--response", choices=RESPONSES, default="linear", help="what is blurred: values, or light")
    parser.add_argument("--only", nargs="+", help="rows whose name contains one of these")
    parser.add_argument("--out", type=Path, default=Path("figures/calibration.json"))
    a = parser.parse_args(argv)
    a.out.parent.mkdir(exist_ok=True)
    table = read(a.out)
    table["machine"] = f"{platform.machine()}, torch {torch.__version__}"
    x, k, y = measured(a.size, a.noise_std, a.seed, a.response)
    blur = blur_of("circular", a.response)
    samplers = {
        "DiffPIR, 50 steps": (DiffPIR(a.noise_std, strength=1.0), 50),
        "PiGDM, 50 steps": (PiGDM(a.noise_std), 50),
        "DPS, 100 steps": (DPS().respaced(100, a.size), 100),
    }
    of_setting = table["results"].setdefault(setting_of(a, a.size, f"noise_std {a.noise_std:g}"), {})
    for name in [*MAPS, *samplers]:
        if a.only is not None and not any(part in name for part in a.only):
            continue
        row = of_setting.setdefault(name, {})
        for i in [*range(a.images), *range(8, 8 + a.images)]:
            item = f"{'scene' if i < 8 else 'photograph'} {i % 8}"
            if item in row:
                continue
            one = x[i : i + 1], k[i : i + 1], y[i : i + 1]
            if name in MAPS:
                row[item] = of_map(*one, a.noise_std, a.response, known=MAPS[name])
            else:
                row[item] = of_samples(*one, blur, *samplers[name], seed=i)
            with whole(a.out) as part:
                part.write_text(json.dumps(table, indent=1) + "\n")
    print(markdown(table))


def of_samples(
    x: Tensor, k: Tensor, y: Tensor, blur: Callable, guidance: object, steps: int, seed: int
) -> dict[str, float]:
    only = {"image": load_priors("cpu")["image"]}
    run = sample(y, partial(blur, kernel=k), only, steps=steps, samples=SAMPLES, guidance=guidance, seed=seed)
    drawn = run.posterior("image")
    frequency = ranks(drawn, x)[0]
    return {
        "ratio": float(error_over_spread(drawn, x)),
        "error": float((drawn.mean(1) - x).square().mean().sqrt()),
        "inside": 1 - float(frequency[0] + frequency[-1]),
        "ranks": [round(float(v), 4) for v in frequency],
    }


def of_map(x: Tensor, k: Tensor, y: Tensor, noise_std: float, response: str, known: bool) -> dict[str, float]:
    kernel = {"kernel": k} if known else {}
    made = deblur(
        y, boundary="circular", response=response, noise_std=noise_std, error=True, priors=load_priors("cpu"),
        device="cpu", progress=False, **kernel,
    )  # fmt: skip
    shift = (0, 1) if known else (SHIFT, SUBPIXEL)  # of which no measurement tells
    ref, found = aligned(x, made.image.clamp(-1, 1), *shift)  # the truth moves: the map belongs to the picture
    wrong = (found - ref).abs()
    expected = F.pad(made.error, 4 * [-shift[0]])  # what `aligned` leaves
    # Where the map is darkest to where it is brightest, in five parts: is it right in each?
    order = expected.flatten().argsort().chunk(5)
    squares = wrong.square().mean(1).flatten(), expected.square().flatten()
    return {
        "ratio": float((wrong.square().mean() / expected.square().mean()).sqrt()),
        "error": float(wrong.square().mean().sqrt()),
        "expected": float(expected.square().mean().sqrt()),
        "inside": float((wrong <= expected).float().mean()),
        "inside two": float((wrong <= 2 * expected).float().mean()),
        "by fifths": [round(float((squares[0][o].mean() / squares[1][o].mean()).sqrt()), 3) for o in order],
        "mnc": float(mnc(made.kernel, k, SUBPIXEL)),
    }


def markdown(table: dict) -> str:
    """One line for each row and kind: the ratio of all images together, its range, and what lies inside."""
    lines = []
    for setting, rows in table["results"].items():
        lines += ["", f"**{setting}**", ""]
        lines += ["| | images | error / expected | median | of single images | inside | twice |", "|---" * 7 + "|"]
        for name, items in rows.items():
            for kind in ("scene", "photograph"):
                found = [v for key, v in items.items() if key.startswith(kind)]
                if not found:
                    continue
                error, ratio = (torch.tensor([v[key] for v in found]) for key in ("error", "ratio"))
                pooled = float((error.square().sum() / (error / ratio).square().sum()).sqrt())
                inside, twice = (sum(v.get(key, 0) for v in found) / len(found) for key in ("inside", "inside two"))
                lines.append(
                    f"| {name}, {kind}s | {len(found)} | {pooled:.2f} | {ratio.quantile(0.5):.2f} | "
                    f"{min(ratio):.2f} to {max(ratio):.2f} | "
                    f"{inside:.2f} | {f'{twice:.2f}' if name in MAPS else ''} |"
                )
    return "\n".join(lines).strip()


if __name__ == "__main__":
    main()
