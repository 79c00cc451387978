"""Blind inverse problems with diffusion models: recover an image *and* the operator that degraded it."""

from blindlib.deblur import Deblurred, deblur
from blindlib.metrics import mnc, psnr
from blindlib.operators import Blur
from blindlib.priors import DiffusionPrior, UniformPrior, load_prior
from blindlib.sampler import DPS, DiffPIR, Result, sample
from blindlib.schedule import NoiseSchedule
from blindlib.simulate import (
    blur_kernels,
    dead_leaves,
    defocus_kernels,
    gaussian_kernels,
    linear_kernels,
    motion_kernels,
)
from blindlib.unet import UNet

__all__ = [
    "DPS",
    "Blur",
    "Deblurred",
    "DiffPIR",
    "DiffusionPrior",
    "NoiseSchedule",
    "Result",
    "UNet",
    "UniformPrior",
    "blur_kernels",
    "dead_leaves",
    "deblur",
    "defocus_kernels",
    "gaussian_kernels",
    "linear_kernels",
    "load_prior",
    "mnc",
    "motion_kernels",
    "psnr",
    "sample",
]
__version__ = "0.1.0"
