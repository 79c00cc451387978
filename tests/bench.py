"""``make bench``: what a step of the sampler costs, as a multiple of the bare networks.

The floor of a BlindDPS step is the forward and backward pass of both networks to their inputs. Both are timed in turns,
each first in every other round, in one run, so that a noisy machine disturbs them alike; the ratio's median and
quartiles are printed.
"""

import argparse
import functools
import statistics
import time

import torch

from blindlib import Blur, dead_leaves, load_prior, motion_kernels, sample
from blindlib.priors import pick_device


def bare(priors: dict, inputs: dict, steps: int) -> float:
    """Seconds of ``steps`` forward and backward passes of all networks."""
    began = time.perf_counter()
    for _ in range(steps):
        x = {name: value.detach().requires_grad_(True) for name, value in inputs.items()}
        total = sum(priors[name].net(x[name], torch.tensor([500], device=x[name].device)).sum() for name in x)
        torch.autograd.grad(total, list(x.values()))
    _wait()
    return time.perf_counter() - began


def sampled(priors: dict, y: torch.Tensor, steps: int) -> float:
    """Seconds of ``steps`` steps of BlindDPS."""
    began = time.perf_counter()
    sample(y, Blur(), priors, steps=steps)
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=40)
    a = parser.parse_args()
    device = pick_device("auto").type
    priors = {name: load_prior(name, device=device) for name in ("image", "kernel")}
    print(f"device {device}, {torch.get_num_threads()} threads, batch {a.batch}, {a.rounds} rounds of {a.steps} steps")
    for size in a.sizes:
        y = Blur()(dead_leaves(a.batch, size, seed=0), motion_kernels(a.batch, 32, seed=0)).to(device)
        inputs = {"image": torch.randn_like(y), "kernel": torch.randn(a.batch, 1, 32, 32, device=device)}
        timed = {
            "networks": functools.partial(bare, priors, inputs, a.steps),
            "sampler": functools.partial(sampled, priors, y, a.steps),
        }
        floors, ratios = [], []
        for r in range(a.rounds + 1):
            seconds = {name: timed[name]() for name in sorted(timed, reverse=r % 2 == 0)}
            if r:  # the first round warms up
                floors.append(seconds["networks"] / a.steps)
                ratios.append(seconds["sampler"] / seconds["networks"])
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{size}x{size}: networks {1000 * statistics.median(floors):.1f} ms a step; "
            f"sampler / networks {middle:.3f} ({low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    main()
