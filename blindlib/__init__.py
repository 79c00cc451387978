"""Blind inverse problems with diffusion models: recover an image *and* the operator that degraded it."""

from blindlib.baselines import l0_pyramid
from blindlib.deblur import Deblurred, deblur
from blindlib.em import (
    L1,
    L2,
    KernelDenoiser,
    PlugAndPlay,
    Threshold,
    as_published,
    diffusion_em,
    fast_em,
    fit_kernel,
    load_kernel_denoiser,
    prior_denoiser,
)
from blindlib.matching import (
    Learned,
    Moments,
    fit_flow,
    learn_operator,
    load_operator,
    retrieved_kernel,
    spectrum_kernel,
)
from blindlib.metrics import mnc, psnr, tilt_error
from blindlib.operators import Blur, Downsample, SpaceVaryingBlur, Turbulence
from blindlib.priors import (
    DiffusionPrior,
    EmpiricalPrior,
    Frames,
    GaussianMixturePrior,
    GaussianPrior,
    UniformPrior,
    load_prior,
)
from blindlib.sampler import DPS, DiffPIR, PiGDM, Result, sample
from blindlib.schedule import NoiseSchedule
from blindlib.simulate import (
    blur_kernels,
    dead_leaves,
    defocus_kernels,
    gaussian_kernels,
    kolmogorov_tilts,
    linear_kernels,
    mixed_tilts,
    motion_kernels,
    text_images,
    tilt_fields,
)
from blindlib.turbulence import mitigate, register
from blindlib.unet import UNet

__all__ = [
    "DPS",
    "L1",
    "L2",
    "Blur",
    "Deblurred",
    "DiffPIR",
    "DiffusionPrior",
    "Downsample",
    "EmpiricalPrior",
    "Frames",
    "GaussianMixturePrior",
    "GaussianPrior",
    "KernelDenoiser",
    "Learned",
    "Moments",
    "NoiseSchedule",
    "PiGDM",
    "PlugAndPlay",
    "Result",
    "SpaceVaryingBlur",
    "Threshold",
    "Turbulence",
    "UNet",
    "UniformPrior",
    "as_published",
    "blur_kernels",
    "dead_leaves",
    "deblur",
    "defocus_kernels",
    "diffusion_em",
    "fast_em",
    "fit_flow",
    "fit_kernel",
    "gaussian_kernels",
    "kolmogorov_tilts",
    "l0_pyramid",
    "learn_operator",
    "linear_kernels",
    "load_kernel_denoiser",
    "load_operator",
    "load_prior",
    "mitigate",
    "mixed_tilts",
    "mnc",
    "motion_kernels",
    "prior_denoiser",
    "psnr",
    "register",
    "retrieved_kernel",
    "sample",
    "spectrum_kernel",
    "text_images",
    "tilt_error",
    "tilt_fields",
]
__version__ = "0.1.0"
