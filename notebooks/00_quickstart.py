# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A blurred photograph made sharp
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/blindlib/blindlib/blob/main/notebooks/00_quickstart.ipynb)
#
# **What you will see.** A photograph that was blurred by a motion nobody recorded goes in. The sharp photograph
# and the *blur kernel*, the path that the camera drew, come out. Both are unknown; a diffusion model for each
# fills in what the measurement does not say.
#
# **What you need.** Nothing: a few minutes on two CPU cores. For your own photograph, put its path into `photo` below.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("blindlib") is None:  # on Colab, say
    print("installing blindlib ...")
    source = "blindlib[notebooks] @ git+https://github.com/blindlib/blindlib"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)

# %% tags=["parameters"]
preset = "cpu"  # "ci": a minute; "cpu": minutes on a laptop; "gpu": the real sizes
seed = 0
device = "auto"
photo = ""  # path of your own photograph; empty: the astronaut, blurred by a motion that we know

# %%
import torch
from skimage import data

from blindlib import Blur, LinearLight, deblur, display, mnc, motion_kernels, psnr
from blindlib.deblur import read_image, resize
from blindlib.metrics import aligned

side, rounds, starts = {"ci": (64, 3, 1), "cpu": (128, 8, 1), "gpu": (256, 12, 4)}[preset]

# %% [markdown]
# ## The photograph
#
# Yours, if you named one. Otherwise we blur the astronaut ourselves, as a camera does: the sensor sees a part of the
# scene, every pixel gathers light along the path of the shake, the light is written as values (along a curve, sRGB:
# half the value is a fifth of the light), and noise is added. Then the truth is known and the result can be scored.
# `deblur` is told nothing but the blurred picture, and that light was blurred.

# %%
if photo:
    blurred, truth, true_kernel = read_image(photo), None, None
else:
    pad = 31  # the scene reaches beyond what the sensor sees, by the kernel's size less one
    scene = resize(read_image(data.astronaut()[:440, 20:460]), side + pad)
    true_kernel = motion_kernels(1, 32, seed=100 + seed)
    noise = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))
    blurred = LinearLight(Blur("valid"))(scene, true_kernel) + 0.02 * noise
    truth = scene[..., 15 : 15 + side, 15 : 15 + side]

_ = display.show({"the photograph": blurred}, size=3)

# %%
# NBVAL_CHECK_OUTPUT
print(f"{blurred.shape[1]} colours")

# %% [markdown]
# ## Sharp
#
# One call. It guesses a few kernels by a classical method, and makes each better while a picture takes shape under it
# by diffusion (*Fast Diffusion EM*). With each it goes on: a little noise on the picture, a short diffusion back under
# the kernel it has, then the kernel that fits that picture best among those the kernel prior believes, and again. Those
# that still differ go on as long once more, and the one that leaves least unexplained wins. At half the size, strokes
# that it lacks are added. Last, it descends what a restoration under it fails to predict, which makes it exact
# (`refine_coarsely` and `refine_kernels` of `blindlib.deblur`). The whole picture is restored with it and the image
# prior as a denoiser (*plug and play*).

# %%
if preset != "ci":
    print("three to four minutes on two CPU cores, seconds on a GPU")
guesses = truth is not None  # told below; on a large photograph it takes minutes
# A camera blurs light, of which a file's values are sRGB's code; and so did we.
result = deblur(blurred, rounds=rounds, starts=starts, response="srgb", error=guesses, seed=seed, device=device)

# %%
pictures = {"before": result.blurred, "after": result.image, "kernel found": result.kernel}
if truth is not None:
    pictures |= {"the truth": truth, "true kernel": true_kernel}
figure = display.show(pictures, size=2.6)
path = display.save_figure(figure, "00_quickstart.png")
result.save(path.with_name("00_quickstart_sharp.png"))  # pixel by pixel

# %%
# A kernel spreads light, it neither makes nor loses any.
print(f"the kernel sums to {result.kernel.sum():.3f}, its smallest value is {result.kernel.min():.3f}")

# %% [markdown]
# ## How good is it?
#
# With the truth at hand: the peak signal-to-noise ratio (PSNR, in dB, higher is better) and the kernel's likeness to
# the true one (MNC, 1 is perfect). A shift of image against kernel cannot be known, so the best small shift counts;
# nor can one by a fraction of a pixel, which costs decibels, so that is printed too.
# Without it, the *residual* tells: blur the result again, and what is left should be the noise, not more and not less.

# %%
about = result.figures
figures = {"seconds": about["seconds"], "residual_over_noise": about["residual"] / about["noise_std"]}
if truth is not None:
    figures["psnr_before"] = psnr(result.blurred, truth, max_shift=4).item()
    figures["psnr_after"] = psnr(result.image, truth, max_shift=4).item()
    figures["mnc"] = mnc(result.kernel, true_kernel).item()
    nearest = dict(max_shift=4, subpixel=4)
    print(f"PSNR {figures['psnr_before']:.1f} dB before, {figures['psnr_after']:.1f} dB after,", end=" ")
    print(f"{psnr(result.image, truth, **nearest).item():.1f} dB after the best shift by quarters of a pixel")
    print(f"kernel MNC {figures['mnc']:.2f}, by quarters of a pixel {mnc(result.kernel, true_kernel, 4).item():.2f}")
print(f"residual {figures['residual_over_noise']:.1f} times the noise, {figures['seconds']:.0f} s")
_ = display.record("00_quickstart", preset=preset, seed=seed, **figures)

# %% [markdown]
# ## What is a guess?
#
# Blur and noise have destroyed detail, and what stands in its place is what the prior holds likely: sharp, and not
# always true. `deblur(..., error=True)` asks how wrong each pixel may be. It draws several pictures that all explain
# the photograph under the kernel that was found, sees where they differ, and scales that by a factor which was measured
# on pictures whose truth is known (notebook `01_dps`). If the kernel is wrong, the map does not know: among sixteen
# test pictures the true error was half to five times what it said. On the $[-1, 1]$ scale of our images, an error of
# 0.1 is 13 grey levels of 255.

# %%
if guesses:
    true, found = aligned(truth, result.image, max_shift=4, subpixel=4)
    wrong, expected = (found - true).square().mean(1).sqrt(), result.error[..., 4:-4, 4:-4]
    _ = display.maps({"expected error": expected, "true error": wrong})
    whole = [error.square().mean().sqrt().item() for error in (expected, wrong)]
    print("root mean square over the picture: expected {:.3f}, true {:.3f}".format(*whole))

# %% [markdown]
# ## Your turn
#
# - **Your own photograph**: set `photo = "my.jpg"` above (on Colab, upload it first); the sharp one is written beside
#   the other pictures of this notebook, `figures/00_quickstart_sharp.png`. Or, without a notebook, `python -m blindlib
#   deblur my.jpg --out sharp.png`. The blur must be the same all over the picture: camera shake, a subject that moves
#   as a whole, defocus.
# - **Other answers**: `deblur(blurred, response="srgb", samples=4)` follows four searches and restores with the kernel
#   of each, the one that explains the photograph best first. Where they differ, the photograph does not say. (`seed`
#   above changes the shake, too.)
# - **How it works**: notebook `01_dps` restores with a known kernel; `02_parallel_operator_diffusion` and
#   `05_fast_diffusion_em` find the kernel too.
