import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from skimage import data

from blindlib import Blur, SpaceVaryingBlur, dead_leaves, motion_kernels, shaken_psfs
from blindlib.deblur import read_image, resize

settings.register_profile("blindlib", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("blindlib")

# Numbers computed once with the published reference implementations; not part of the repository.
GOLDEN = Path(os.environ.get("BLINDLIB_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


@pytest.fixture
def golden():
    """Loads a golden file by name, or skips the test where there are none."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no reference numbers at {GOLDEN} (set BLINDLIB_GOLDEN to their folder)")

    def load(name):
        path = GOLDEN / name
        if path.suffix != ".npz":
            return path
        return {key: torch.from_numpy(value) for key, value in np.load(path).items()}

    return load


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def astronaut():
    """Her head, (1, 3, side, side), and a kernel to blur it with."""

    def of_side(side):
        return resize(read_image(data.astronaut()[:256, 100:356]), side), motion_kernels(1, 32, seed=2)

    return of_side


def made_sets(degraded, clean):
    k = motion_kernels(1, 7, extent=(0.7, 0.9), seed=8)
    y = Blur("valid")(dead_leaves(degraded, 46, seed=1), k)
    y = y + 0.02 * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return dead_leaves(clean, 46, seed=3), y, k


@pytest.fixture(scope="session")
def sets():
    """Clean scenes, other, degraded ones, and the kernel between them."""
    return made_sets(150, 40)


@pytest.fixture(scope="session")
def larger_sets():
    return made_sets(300, 80)


@pytest.fixture(scope="session")
def field_sets():
    """The same with a grid of PSFs, in grey."""
    psfs = shaken_psfs((2, 2), 7, extent=(0.9, 0.9), roll=1.2, seed=3)
    y = SpaceVaryingBlur("valid")(dead_leaves(400, 52, seed=1)[..., :46, :].mean(1, keepdim=True), psfs)
    y = y + 0.01 * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return dead_leaves(120, 46, seed=3).mean(1, keepdim=True), y, psfs


@pytest.fixture
def two_processes():
    """Runs what it is given by `accelerate launch` as on two GPUs; with --cpu, accelerate would start one process."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", "1"]

    def run(*command):
        done = subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run
