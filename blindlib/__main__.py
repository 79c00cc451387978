"""Command line: ``python -m blindlib deblur photo.jpg --out sharp.png``, and ``learn-operator``."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mode

import torch
from PIL import ExifTags, Image
from torch import Tensor

from blindlib.checks import check_counts, check_noise
from blindlib.deblur import (
    check_output,
    deblur,
    deblur_folder,
    estimate_noise,
    is_same_file,
    read_image,
    write_image,
)
from blindlib.em import RESPONSES
from blindlib.jobs import Team
from blindlib.matching import FLOW_STRIDE, fit_flow, learn_operator, load_operator
from blindlib.moments import mirrored
from blindlib.operators import SpaceVaryingBlur, to_light


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 if it worked, 2 with what was wrong on standard error if not, 130 if it was interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m blindlib", description="Blind inverse problems with diffusion models."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("deblur", help="sharpen a photograph blurred by an unknown motion, shake or defocus")
    p.set_defaults(run=_deblur)
    p.add_argument("photo", type=Path, help="a photograph; or a folder, all in which goes into the folder OUT")
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        help="where to write the sharp photograph; never over the input; in a folder, what is there is not done again",
    )
    p.add_argument("--kernel-out", type=Path, help="write the kernel of a photograph as a picture too")
    p.add_argument(
        "--error-out",
        type=Path,
        help="write a picture of how wrong each pixel may be too: black not at all, white by a quarter of the range",
    )
    where = p.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, help="photographs of a folder at a time; -1: one on each core (default: 1)")
    where.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="of a Dask scheduler, over whose workers a folder is spread; they need blindlib and the same files",
    )
    p.add_argument(
        "--operator", type=Path, help="undo this blur, which learn-operator found, at the photograph's full size"
    )
    p.add_argument("--rounds", type=int, help="of EM, in each run (default: as blindlib.deblur)")
    p.add_argument("--starts", type=int, help="runs, the best of which counts (default: as blindlib.deblur)")
    p.add_argument(
        "--noise-std", type=float, help="of the photograph's noise on the [-1, 1] scale (default: estimated)"
    )
    p.add_argument(
        "--response",
        choices=RESPONSES,
        help="of the camera: was light blurred, of which a file's values are a code (srgb, default), or the values "
        "themselves, as by most programs (linear)? An operator's file says it",
    )
    p.add_argument("--max-size", type=int, help="longer side to work at, 0 for full (default: 1024)")
    p.add_argument("--crop", type=int, help="side of the part that the kernel is read from")
    p.add_argument("--prior", choices=["image", "text"], help="what is in the picture: any scene, or print")

    q = commands.add_parser(
        "learn-operator",
        help="learn a blur from a folder of photographs with it and a folder of other, sharp ones",
    )
    q.set_defaults(run=_learn_operator)
    q.add_argument("--clean", type=Path, required=True, help="folder of sharp photographs, a hundred will do")
    q.add_argument("--degraded", type=Path, required=True, help="folder of photographs with the blur, many")
    q.add_argument("--out", type=Path, required=True, help="the operator, a .safetensors file for deblur --operator")
    q.add_argument("--kernel-out", type=Path, help="write the kernel as a picture too")
    q.add_argument("--kernel-size", type=int, default=17, help="side of the kernel's window (default: %(default)s)")
    q.add_argument(
        "--grid",
        type=_grid,
        metavar="ROWSxCOLUMNS",
        help="of PSFs, for a blur that changes over the field; degraded photographs are then of one size, "
        "taken with the camera held the same way, and used whole",
    )
    q.add_argument(
        "--colour",
        action="store_true",
        help="with --grid: PSFs of their own for red, green and blue, which a lens blurs differently",
    )
    q.add_argument(
        "--mirrored",
        action="store_true",
        help="with --grid: PSFs mirror one another about the middle of the field, as a centred lens's do",
    )
    q.add_argument(
        "--response",
        choices=RESPONSES,
        default="srgb",
        help="of the camera, as of deblur (default: %(default)s)",
    )
    q.add_argument(
        "--noise-std",
        type=float,
        help="of the degraded photographs on the [-1, 1] scale, in light or values as of --response, averaged to grey, "
        "or with --colour of each (default: estimated)",
    )
    q.add_argument("--flow-steps", type=int, help="of flow matching (default: as blindlib.fit_flow)")
    q.add_argument("--steps", type=int, help="of the operator (default: as blindlib.learn_operator)")
    q.add_argument("--batch", type=int, help="patches a step (default: as there)")
    q.add_argument("--crop", type=int, default=512, help="side of the part used of larger photographs (default: 512)")
    q.add_argument("--folder", type=Path, help="where the run is saved, to be resumed (default: OUT with suffix .run)")

    for command in (p, q):
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", default="auto")
        command.add_argument("--quiet", action="store_true", help="say nothing but what went wrong or was left out")
    a = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a file's name may have letters that the terminal has not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        done = a.run(a)
    except (OSError, ValueError, TypeError, ArithmeticError, ImportError, MemoryError, RuntimeError) as error:
        # A CPU's want of memory is a plain RuntimeError of torch's; any other one is a fault of ours.
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        print(f"blindlib: {str(error) or 'out of memory'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("blindlib: stopped", file=sys.stderr)
        return 130
    if not a.quiet:
        print(done)
    return 0


def _deblur(a: argparse.Namespace) -> str:
    if a.photo.is_dir():
        return _deblur_folder(a)
    if a.jobs is not None or a.cluster is not None:
        raise ValueError(f"jobs, cluster: expected a folder of photographs, got {str(a.photo)!r}")
    if not a.photo.is_file():
        raise FileNotFoundError(f"photo: no file or folder {str(a.photo)!r}")
    contents = {"out": "photograph", "kernel_out": "kernel", "error_out": "error"}
    taken: dict[Path, str] = {}
    for name, out in _given(a, *contents).items():
        option = name.replace("_", "-")
        if out.resolve() in taken:
            raise ValueError(f"{option}: {out} is where the {taken[out.resolve()]} goes; name another file")
        if is_same_file(out, a.photo):
            raise ValueError(f"{option}: {out} is the photograph itself; name another file")
        check_output(out)
        taken[out.resolve()] = contents[name]
    result = deblur(a.photo, error=a.error_out is not None, progress=not a.quiet, **_options(a))
    result.save(a.out)
    if result.error is not None:
        write_image(4 * result.error - 1, a.error_out)
    if a.kernel_out is not None:
        _write_kernel(result.kernel, a.kernel_out)
    return f"{a.out}: done in {result.figures['seconds']:.0f} s"


def _deblur_folder(a: argparse.Namespace) -> str:
    for name in _given(a, "kernel_out", "error_out"):
        raise ValueError(f"{name.replace('_', '-')}: is of one photograph; with a folder leave it out")
    where = _given(a, "jobs", "cluster")
    say = (lambda line: None) if a.quiet else partial(print, flush=True)
    failed = deblur_folder(a.photo, a.out, say=say, **where, **_options(a))
    if failed:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise ValueError(f"{len(failed)} of the files in {a.photo} could not be restored:{reasons}")
    return f"{a.out}: done"


def _options(a: argparse.Namespace) -> dict:
    """Those of :func:`deblur`."""
    search, chosen = _given(a, "rounds", "starts", "crop"), _given(a, "prior", "response")
    if a.operator is not None:
        if a.max_size:
            raise ValueError("max-size: the operator is of the photograph's full size, so is the work; leave it out")
        if search:
            raise ValueError(f"{', '.join(search)}: for the search of a kernel, the operator is known; leave it out")
        learned = load_operator(a.operator)
        if a.response not in (None, learned["response"]):
            raise ValueError(
                f"response: {a.operator} was learned with {learned['response']}, got {a.response}; leave it out"
            )
        chosen |= learned
    max_size = 1024 if a.max_size is None else a.max_size
    return dict(noise_std=a.noise_std, max_size=max_size or None, seed=a.seed, device=a.device, **search, **chosen)


def _learn_operator(a: argparse.Namespace) -> str:
    if a.out.suffix != ".safetensors" or a.out.is_dir() or not a.out.parent.is_dir():
        raise ValueError(f"out: expected a .safetensors file in a folder that exists, got {str(a.out)!r}")
    if a.kernel_out is not None:
        check_output(a.kernel_out)
    check_counts(**_given(a, "kernel_size", "flow_steps", "steps", "batch", "crop"))
    check_noise(a.noise_std, optional=True)
    for name in ("colour", "mirrored"):
        if getattr(a, name) and a.grid is None:
            raise ValueError(f"{name}: is of PSFs over the field; add --grid, 1x1 for ones that are alike everywhere")
    if a.mirrored and a.kernel_size % 2 == 0:
        raise ValueError(f"kernel-size: expected an odd number with --mirrored, got {a.kernel_size}")
    first = Team(a.device).rank == 0
    a.quiet |= not first
    say = (lambda line: None) if a.quiet else print
    warn = partial(print, file=sys.stderr) if first else (lambda line: None)
    patch = max(32, -(-a.kernel_size // FLOW_STRIDE) * FLOW_STRIDE)
    read = dict(response=a.response, grey=not a.colour, seed=a.seed, warn=warn)
    least = max(patch + a.kernel_size - 1, 0 if a.grid is None else 3 * a.kernel_size - 2)
    clean = read_folder(a.clean, "clean", least=least, crop=a.crop, **read)
    whole = dict(crop=a.crop) if a.grid is None else dict(crop=sys.maxsize, alike=True)
    degraded = read_folder(a.degraded, "degraded", least=max(patch, 2 * a.kernel_size - 1), **whole, **read)
    say(f"{len(clean)} clean and {len(degraded)} degraded photographs")
    folder = a.folder or a.out.with_suffix(".run")
    flow_steps = {} if a.flow_steps is None else {"steps": a.flow_steps}
    varying = {} if a.grid is None else dict(operator=SpaceVaryingBlur("valid"), grid=a.grid)
    colours = ("red", "green", "blue") if a.colour else ("grey",)
    learned = []
    for c, colour in enumerate(colours):
        xs, ys = ([x[c : c + 1] for x in images] for images in (clean, degraded))
        noise_std = a.noise_std
        if noise_std is None:
            noise_std = float(torch.tensor([estimate_noise(y[None]) for y in ys]).median())
        say(f"{colour}: noise {noise_std:.3f}")
        common = dict(patch=patch, seed=a.seed, device=a.device, progress=not a.quiet) | _given(a, "batch")
        common |= dict(folder=folder / colour if a.colour else folder)
        flow = fit_flow(ys, positions=a.grid is not None, **common, **flow_steps)
        common |= dict(noise_std=noise_std, kernel_size=a.kernel_size, flow=flow) | varying
        learned.append(learn_operator(xs, ys, **common, **_given(a, "steps")))
    kernel = torch.cat([one.kernel for one in learned], dim=-3)
    found = replace(learned[0], kernel=mirrored(kernel) if a.mirrored else kernel)
    if first:
        found.save(a.out, f"from {len(clean)} clean and {len(degraded)} degraded photographs", a.response)
    if first and a.kernel_out is not None:
        _write_kernel(found.kernel, a.kernel_out)
    return f"{a.out}: done; python -m blindlib deblur PHOTO --operator {a.out} --out SHARP undoes it"


def read_folder(
    folder: Path,
    name: str,
    *,
    least: int,
    crop: int,
    response: str,
    grey: bool = True,
    seed: int,
    warn: Callable[[str], None],
    alike: bool = False,
    most: int = 2**29,
) -> list[Tensor]:
    """The photographs of a folder as images (1 or 3, H, W) in [-1, 1]; what is no picture or too small is skipped.

    Of an sRGB response they are the light, which is what was blurred. Grey is the mean of the colours: a blur that is
    the same for all three commutes with it, and noise gets less. Of a photograph larger than ``crop`` a random part is
    taken, never a smaller copy, for which the blur would be another one. When they have ``most`` values (2 GB of
    memory: forty-odd whole photographs of twelve megapixels in grey, which hold all the tiles that moments are taken
    of), the rest is left out. With ``alike`` only those count that were taken as most were: of one size, by a camera
    held the same way.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {str(folder)!r}")
    if crop < least:
        raise ValueError(f"crop: expected at least {least}, got {crop}")
    g = torch.Generator().manual_seed(seed)
    images, paths = [], sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if alike:
        shapes = {path: shape for path in paths if (shape := _shape(path)) and min(shape[:2]) >= least}
        if len(set(shapes.values())) > 1:
            width, height, _ = common = mode(shapes.values())
            others = {path for path, shape in shapes.items() if shape != common}
            size = f"{width}x{height} pixels"
            warn(f"skipped: {len(others)} photographs that are not {size}, or were held another way, unlike most")
            paths = [path for path in paths if path not in others]
    held = 0
    for i, path in enumerate(paths):
        if held >= most:
            room = f"{len(images)} photographs take the memory meant for them"
            warn(f"left out: {len(paths) - i} files from {path.name!r} on; {room}")
            break
        try:
            x = read_image(path)
            x = (to_light(x) if response == "srgb" else x)[0]
            x = x.mean(0, keepdim=True) if grey else x
        except (ValueError, OSError) as error:
            warn(f"skipped: {error}")
            continue
        if min(x.shape[1:]) < least:
            warn(f"skipped: {str(path)!r} has {x.shape[2]}x{x.shape[1]} pixels, {least}x{least} are needed")
            continue
        top, left = (int(torch.randint(max(side - crop, 0) + 1, (), generator=g)) for side in x.shape[1:])
        images.append(x[:, top : top + crop, left : left + crop].clone())
        held += images[-1].numel()
    if not images:
        raise ValueError(f"{name}: no photograph of at least {least}x{least} pixels in {str(folder)!r}")
    return images


def _shape(path: Path) -> tuple[int, int, int] | None:
    """Width, height and orientation (EXIF) as the sensor saw it; none if it is no picture."""
    try:
        with Image.open(path) as photo:
            return (*photo.size, photo.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of damaged files Pillow raises a dozen kinds; reading says what is wrong
        return None


def _grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS, such as 4x6, got {text!r}")
    return int(rows), int(columns)


def _write_kernel(kernel: Tensor, path: Path) -> None:
    if kernel.ndim == 6:  # PSFs side by side, as in the field
        kernel = kernel.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    write_image(2 * kernel / kernel.max() - 1, path)


def _given(a: argparse.Namespace, *names: str) -> dict:
    """The options that were given; the rest have their defaults where they are used."""
    return {name: value for name in names if (value := getattr(a, name)) is not None}


if __name__ == "__main__":
    sys.exit(main())
