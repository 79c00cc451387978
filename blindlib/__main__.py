"""Command line: ``python -m blindlib deblur photo.jpg --out sharp.png``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blindlib.deblur import check_output, deblur, write_image


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 if it worked, 2 with a line on standard error if not."""
    parser = argparse.ArgumentParser(
        prog="python -m blindlib", description="Blind inverse problems with diffusion models."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("deblur", help="sharpen a photograph blurred by an unknown motion, shake or defocus")
    p.add_argument("photo", type=Path)
    p.add_argument("--out", type=Path, required=True, help="where to write the sharp photograph; never over the input")
    p.add_argument("--kernel-out", type=Path, help="write the kernel as a picture too")
    p.add_argument("--steps", type=int, help="of the parallel diffusion (default: as blindlib.deblur)")
    p.add_argument(
        "--noise-std", type=float, help="of the photograph's noise on the [-1, 1] scale (default: estimated)"
    )
    p.add_argument(
        "--max-size", type=int, default=1024, help="longer side to work at, 0 for full (default: %(default)s)"
    )
    p.add_argument("--crop", type=int, help="side of the part that the kernel is read from")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--quiet", action="store_true")
    a = parser.parse_args(argv)
    try:
        for out in (a.out, a.kernel_out):
            if out is not None and out.exists() and a.photo.exists() and out.samefile(a.photo):
                raise ValueError(f"out: {out} is the photograph itself; name another file")
            if out is not None:
                check_output(out)
        chosen = {name: value for name in ("steps", "crop") if (value := getattr(a, name)) is not None}
        result = deblur(
            a.photo,
            noise_std=a.noise_std,
            max_size=a.max_size or None,
            seed=a.seed,
            device=a.device,
            progress=not a.quiet,
            **chosen,
        )
        result.save(a.out)
        if a.kernel_out is not None:
            write_image(2 * result.kernel / result.kernel.max() - 1, a.kernel_out)
    except (OSError, ValueError, TypeError, ArithmeticError) as error:
        print(f"blindlib: {error}", file=sys.stderr)
        return 2
    if not a.quiet:
        print(f"{a.out}: done in {result.figures['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
