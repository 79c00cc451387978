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
# # Scale space: why a blind diffusion goes from coarse to fine
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/blindlib/blindlib/blob/main/notebooks/03_scale_space.ipynb)
#
# **What you will see.** A diffusion's noise level is a *scale*. We show it on densities that can be written down, where
# every posterior mean is exact, then measure it on the shipped priors while they deblur a photograph blindly: at each
# noise level, how fine are image and kernel, and when does each settle? At the end the same problem is solved
# without a diffusion, by gradient descent and by a hand-made pyramid, to see what the scales are good for.
#
# **What you need.** The notebooks `01_dps` and `02_parallel_operator_diffusion`. No GPU: seven to eight minutes on two
# CPU cores.

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

# %%
import math
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from skimage import data

from blindlib import (
    DPS,
    Blur,
    DiffPIR,
    EmpiricalPrior,
    GaussianMixturePrior,
    GaussianPrior,
    blur_kernels,
    dead_leaves,
    display,
    l0_pyramid,
    load_prior,
    mnc,
    motion_kernels,
    psnr,
    sample,
)
from blindlib.deblur import read_image, resize
from blindlib.metrics import recentred
from blindlib.priors import kernel_to_latent, pick_device

sizes = {
    "ci": {"side": 64, "examples": 32, "steps": 10, "descent": 300, "restore": 6, "late": 6},
    "cpu": {"side": 64, "examples": 512, "steps": 200, "descent": 800, "restore": 30, "late": 60},
    "gpu": {"side": 256, "examples": 4096, "steps": 400, "descent": 2000, "restore": 50, "late": 90},
}[preset]
side, steps = sizes["side"], sizes["steps"]
noise_std = 0.02  # on the [-1, 1] scale of our images

# %%
device = pick_device(device)

priors = {name: load_prior(name, device=device) for name in ("image", "kernel")}
schedule, window = priors["image"].schedule, priors["kernel"].shape[1]


def photograph(pixels, top, left, length):
    """A square part of a photograph as a tensor (1, 3, side, side) in [-1, 1]."""
    return resize(read_image(pixels[top : top + length, left : left + length]), side)


photos = {
    "astronaut": photograph(data.astronaut(), 0, 100, 256),
    "cat": photograph(data.chelsea(), 20, 100, 256),
    "coffee": photograph(data.coffee(), 40, 150, 320),
}
truth = torch.cat(list(photos.values())).to(device)
kernels = motion_kernels(len(photos), window, seed=seed).to(device)  # a shake of its own for each

# %% [markdown]
# ## The idea
#
# Divide the diffusion's variable by $\sqrt{\bar\alpha_t}$, and what is left of it is the signal plus noise:
#
# $$ z = x_t / \sqrt{\bar\alpha_t} = x_0 + \sigma \varepsilon, \qquad
#    \sigma^2 = (1 - \bar\alpha_t) / \bar\alpha_t, \qquad \varepsilon \sim \mathcal N(0, I). $$
#
# **Noise smooths the density.** The density of a sum is the convolution of the densities, so that of $z$ is the
# density $p$ of clean signals, blurred by a Gaussian of width $\sigma$:
#
# $$ p_\sigma = p * \mathcal N(0, \sigma^2 I), \qquad
#    \frac{\partial p_\sigma}{\partial (\sigma^2 / 2)} = \Delta p_\sigma . $$
#
# The second equation is that of heat, and the family $p_\sigma$ is the Gaussian *scale space* of $p$ (Witkin, 1983).
# As $\sigma$ grows, hills melt into one another.
#
# **The posterior mean climbs it.** Tweedie's formula, written for $z$, is
#
# $$ D_\sigma(z) = \mathbb E[x_0 \mid z] = z + \sigma^2\, \nabla \log p_\sigma(z). $$
#
# A denoiser moves $z$ uphill on the density *at scale $\sigma$*, and stays where it is, $D_\sigma(z) = z$, exactly at
# the critical points of $p_\sigma$: its peaks, saddles and pits. A reverse diffusion lowers $\sigma$ slowly. So it
# first decides between the few hills that are left at a large scale, then between the smaller ones that these consist
# of. This is the sense in which a posterior mean at noise level $\sigma$ is the signal at Gaussian scale $\sigma$: it
# knows the distribution of signals through a blur of that width.
#
# **For a finite set** of signals $x_1, \dots, x_M$ everything is exact. The density is a sum of equal Gaussians, a
# kernel density estimate, and its posterior mean an average of the examples, each weighted with how near it is:
#
# $$ D_\sigma(z) = \sum_i w_i(z)\, x_i, \qquad
#    w_i(z) \propto \exp\!\big(-\lVert z - x_i \rVert^2 / 2\sigma^2\big). $$
#
# ## The algorithm in plain PyTorch
#
# The formula, and the critical points that follow from it on a line: where $D_\sigma(z) - z$ changes its sign. From
# plus to minus it is a peak of the density, from minus to plus a valley.


# %%
def posterior_mean(z, points, sigma):
    """D_sigma(z) for the empirical distribution of `points` (M, N), at `z` (B, N)."""
    weights = (-torch.cdist(z, points).square() / (2 * sigma**2)).softmax(1)
    return weights @ points


def density(z, points, sigma):
    """p_sigma(z), (B,)."""
    size = points.shape[1]
    distance = torch.cdist(z, points).square()
    return torch.exp(-distance / (2 * sigma**2)).mean(1) / (2 * math.pi * sigma**2) ** (size / 2)


def critical_points(points, sigma, grid):
    """Peaks and valleys of p_sigma on a line."""
    climb = posterior_mean(grid, points, sigma) - grid
    change = climb[:-1, 0].sign().diff()
    return grid[1:-1][change < 0, 0], grid[1:-1][change > 0, 0]


line = torch.tensor([-0.8, -0.6, -0.55, -0.1, 0.3, 0.4, 0.9], dtype=torch.float64)[:, None]
grid = torch.linspace(-1.3, 1.3, 4002, dtype=torch.float64)[:, None]  # even: 0 is not on it

figure, axes = plt.subplots(1, 3, figsize=(10, 2.9), layout="constrained")
for sigma, colour in zip((0.03, 0.1, 0.2, 0.5), plt.cm.viridis((0.0, 0.3, 0.6, 0.9)), strict=True):
    p = density(grid, line, sigma)
    axes[0].plot(grid, p / p.max(), color=colour, label=f"{sigma}")
    axes[1].plot(grid, posterior_mean(grid, line, sigma), color=colour)
axes[0].legend(title=r"$\sigma$", fontsize=7, title_fontsize=8)
axes[0].plot(line, torch.zeros_like(line), "k|", markersize=10)
axes[0].set(xlabel="$z$", title=r"$p_\sigma$, scaled to peak at 1")
axes[1].plot(grid, grid, "k:", linewidth=0.8)
axes[1].set(xlabel="$z$", title=r"posterior mean $D_\sigma(z)$")
scales = torch.logspace(math.log10(0.02), 0, 160).tolist()
peaks_at = {}
for sigma in scales:
    peaks, valleys = critical_points(line, sigma, grid)
    peaks_at[sigma] = len(peaks)
    axes[2].plot(peaks, [sigma] * len(peaks), "k.", markersize=2)
    axes[2].plot(valleys, [sigma] * len(valleys), ".", color="tab:red", markersize=1)
axes[2].set(yscale="log", xlabel="$z$", ylabel=r"$\sigma$", title="peaks (black), valleys (red)")
_ = display.save_figure(figure, "03_scale_space_line.png")
print("peaks:", ", ".join(f"{peaks_at[s]} at {s:.2f}" for s in scales[::32]), f"; {peaks_at[scales[-1]]} at 1")

# %% [markdown]
# Left: seven points, seen through wider and wider windows. Middle: at a small scale the posterior mean is a staircase
# that rounds $z$ to the nearest point; at a large one it hardly depends on $z$ and says the mean of all. It crosses
# the dotted diagonal at the critical points. Right: those points at each scale. Going up, a peak and a valley meet
# and vanish together; read from the top down, as a reverse diffusion does, the picture is a tree of decisions. On a
# line no peak is ever born on the way up ([Babaud et al. 1986](https://doi.org/10.1109/TPAMI.1986.4767749)).
#
# **When do two hills merge?** For two points at $\pm d$ the posterior mean is $D_\sigma(z) = d \tanh(z d / \sigma^2)$,
# with slope $d^2 / \sigma^2$ at $z = 0$. The middle is a valley while that slope exceeds one: they merge at
# $\sigma = d$, half their distance. And the heat equation can be checked with differences:

# %%
# NBVAL_CHECK_OUTPUT
pair = torch.tensor([[-0.3], [0.3]], dtype=torch.float64)
for sigma in (0.29, 0.31):
    print(f"two points at +-0.3, sigma = {sigma}: {len(critical_points(pair, sigma, grid)[0])} peak(s)")
h, s = 1e-3, 0.15  # the step in z (in sigma^2 / 2 it is h^2), and sigma
z = torch.tensor([[0.1]], dtype=torch.float64)
heat = (density(z, line, math.sqrt(s**2 + 2 * h**2)) - density(z, line, math.sqrt(s**2 - 2 * h**2))) / (2 * h**2)
curvature = (density(z + h, line, s) - 2 * density(z, line, s) + density(z - h, line, s)) / h**2
print(f"dp / d(sigma^2 / 2) = {heat.item():.3f}, second derivative = {curvature.item():.3f}")

# %% [markdown]
# ## The same from blindlib
#
# `EmpiricalPrior`, `GaussianMixturePrior` and `GaussianPrior` know these answers in closed form and speak to samplers
# as the learned priors do: `denoise(x_t, t)` at the schedule's times. Points may have any shape `(C, H, W)`; ours on
# the line are `(1, 1, 1)`. A point with a width of its own is a component of a mixture with `std`.

# %%
exact, t = EmpiricalPrior(line.reshape(-1, 1, 1, 1)), 100
x_t = math.sqrt(schedule.alpha_bar(t)) * grid.reshape(-1, 1, 1, 1)
ours, theirs = posterior_mean(grid, line, schedule.sigma(t)).flatten(), exact.denoise(x_t, t).flatten()
torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
agreement = (ours - theirs).abs().max().item()
print(f"t = {t}, sigma = {schedule.sigma(t):.3f}: largest difference {agreement:.1e}")

# %% [markdown]
# ## In the plane
#
# Three clusters of three blobs each. Arrows show the way from $z$ to $D_\sigma(z)$ (at 0.4 of its length), dots where
# that way ends if one walks it again and again ($z \leftarrow D_\sigma(z)$, which is known as *mean shift*): the peaks.

# %%
angles = 2 * math.pi * torch.arange(3) / 3
directions = torch.stack([angles.cos(), angles.sin()], 1)
centres = (directions[:, None] + 0.35 * directions).reshape(9, 2, 1, 1)
plane = GaussianMixturePrior(centres, std=0.05)


def walk(prior, z, t, rounds=300):
    """Mean shift from each of `z` (B, C, H, W) at the scale of time `t`."""
    scale = math.sqrt(prior.schedule.alpha_bar(t))
    for _ in range(rounds):
        z = prior.denoise(scale * z, t)
    return z


def distinct(z, tolerance=0.01):
    """Those of `z` (B, ...) that are farther than `tolerance` from all before them (root mean square)."""
    far = torch.cdist(z.flatten(1).double(), z.flatten(1).double()) / math.sqrt(z[0].numel()) > tolerance
    return z[[bool(far[i, :i].all()) for i in range(len(z))]]


axis = torch.linspace(-1.7, 1.7, 120)
yy, xx = torch.meshgrid(axis, axis, indexing="ij")
field = torch.stack([xx, yy], -1).reshape(-1, 2, 1, 1)
coarse = field.reshape(120, 120, 2)[4::10, 4::10].reshape(-1, 2, 1, 1)

figure, axes = plt.subplots(1, 5, figsize=(12, 2.7), layout="constrained")
peaks_in_the_plane = []
for panel, sigma in zip(axes, (0.1, 0.25, 0.4, 0.69, 1.0), strict=True):
    t = schedule.time(sigma)
    scale = math.sqrt(schedule.alpha_bar(t))
    p = plane.log_density(scale * field, t).exp().reshape(120, 120)
    panel.contourf(axis, axis, p, 12, cmap="Blues")
    step = (plane.denoise(scale * coarse, t) - coarse).reshape(-1, 2)
    panel.quiver(*coarse.reshape(-1, 2).T, *step.T, angles="xy", scale_units="xy", scale=2.5, width=0.004)
    peaks = distinct(walk(plane, coarse, t, rounds=3000), tolerance=0.02)
    peaks_in_the_plane.append(len(peaks))
    panel.plot(*peaks.reshape(-1, 2).T, "o", color="tab:red", markersize=4)
    panel.set(
        title=rf"$\sigma$ = {sigma}: {len(peaks)} peak{'s' * (len(peaks) > 1)}", xticks=[], yticks=[], aspect="equal"
    )
_ = display.save_figure(figure, "03_scale_space_plane.png")

# %% [markdown]
# Nine hills, then three, then one. A run that comes down from $\sigma = 1$ chooses a cluster first and a blob within it
# later. But the number need not fall. At $\sigma = 0.25$ the middle of each cluster has become a peak before its
# corners are none any more, twelve in all; at 0.69 the origin is one beside the three. So a run may also see hills
# vanish as it comes down (see [Carreira-Perpiñán & Williams 2003](https://doi.org/10.1007/3-540-44935-3_44)). All that
# the heat equation promises in any dimension is that a peak never grows higher.
#
# ## Images and kernels: many points in many dimensions
#
# An image of $32 \times 32$ pixels and a kernel as large are points too, in 3072 and 1024 dimensions. Here are exact
# posterior means over a finite set of scenes and a finite set of kernels. First row of each: a noisy member of the
# set; second row: its posterior mean; third row: the posterior mean of a stranger, as noisy, that is not in the set.
# The last column shows member, member and stranger without noise.

# %%
count = sizes["examples"]
sets = {
    "image": EmpiricalPrior(dead_leaves(count, 32, seed=seed), latent="image"),
    "kernel": EmpiricalPrior(kernel_to_latent(blur_kernels(count, 32, seed=seed)), latent="kernel"),
}
strangers = {
    "image": resize(read_image(data.astronaut()[0:256, 100:356]), 32),
    "kernel": kernel_to_latent(motion_kernels(1, 32, extent=(0.5, 0.5), seed=seed + 1)),
}
levels = (20.0, 10.0, 5.0, 3.0, 1.0, 0.5, 0.1)
generator = torch.Generator().manual_seed(seed)
for name, prior in sets.items():
    member = prior.means[1:2].reshape(1, *prior.shape).float()
    pictures = {}
    for row, x in enumerate((member, member, strangers[name])):
        for sigma in levels:
            t = schedule.time(sigma)
            z = x + sigma * torch.randn(x.shape, generator=generator)
            shown = z if row == 0 else prior.denoise(math.sqrt(schedule.alpha_bar(t)) * z, t)
            pictures[rf"$\sigma$ = {sigma}" if row == 0 else (row, sigma)] = shown
        pictures["no noise" if row == 0 else (row, 0)] = x
    if name == "kernel":  # shown as light, not as diffusion variables
        pictures = {key: (x + 1) / 2 for key, x in pictures.items()}
    figure = display.show(pictures, columns=len(levels) + 1, size=1.15)
    _ = display.save_figure(figure, f"03_scale_space_{name}s.png")

# %% [markdown]
# How many hills are left at each scale? Start a walk at each example and count where they end:

# %%
scales = torch.logspace(-1.3, 1.3, 14).tolist()
chosen = min(count, 64)
hills = {name: [] for name in sets}
for name, prior in sets.items():
    starts = prior.means[:chosen].reshape(chosen, *prior.shape)
    part = EmpiricalPrior(starts)
    for sigma in scales:
        hills[name].append(len(distinct(walk(part, starts, schedule.time(sigma), rounds=60))))
figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
for name in hills:
    axis.plot(scales, hills[name], "o-", markersize=3, label=name)
axis.set(xscale="log", xlabel=r"$\sigma$", ylabel="hills", title=f"{chosen} examples of each")
axis.legend()
for name, prior in sets.items():
    apart = torch.cdist(prior.means[:chosen], prior.means[:chosen])
    half = apart[~torch.eye(chosen, dtype=torch.bool)].median().item() / 2
    each = half / math.sqrt(prior.means.shape[1])
    last = next((s for s, n in zip(scales, hills[name], strict=True) if n == 1), math.nan)
    print(f"{name:6}: half the median distance {half:.1f} ({each:.2f} a pixel), one hill from sigma = {last:.1f} on")

# %% [markdown]
# Three things to see. **The mean of everything comes first**: at the largest scale the exact posterior mean is nearly
# the mean of the set, a flat picture or a starry blot, for member and stranger alike. **Then it decides**, within a
# narrow band of scales. In many dimensions noise is long: two signals are told apart when $\sigma$ falls below the
# order of their *whole* distance, which grows with the square root of the number of pixels. So scenes, with three times
# as many numbers and more contrast, are decided at a larger $\sigma$ than kernels, and the last of their hills merge at
# four times the scale. With equal noise the image is ahead of its kernel: keep that in mind for the kernel's *lead*
# below. **And it snaps**: below that band the mean is one example, exactly right for a member and wrong for a stranger,
# whose place its nearest neighbour takes. An exact prior of a finite set has learned it by heart. A network is useful
# because it does not: it takes apart what it sees, and finds a mean for each part.
#
# ## From hills to pictures
#
# So far scale was a matter of densities, and nothing said that $D_\sigma(z)$ must *look* blurred. That it does has a
# reason of its own: the power of natural images falls with frequency. For a stationary Gaussian prior with power $S(f)$
# the posterior mean is exact again, it is the Wiener filter
#
# $$ \hat D_\sigma(f) = \frac{S(f)}{S(f) + \sigma^2}\, \hat z(f). $$
#
# It passes what is stronger than the noise, $S(f) > \sigma^2$, and stops the rest: a low-pass whose cutoff rises as
# $\sigma$ falls. With $S \propto 1 / f^2$, roughly that of photographs, the cutoff goes like $1 / \sigma$.
#
# To see how far a network follows this, we need a number for how fine an estimate is. *Effective resolution*: in each
# ring of equal frequency, how much of the truth's transform does the estimate hold, in phase?
#
# $$ g(f) = \frac{\mathrm{Re} \sum \hat x\, \overline{\hat x_\mathrm{true}}}{\sum |\hat x_\mathrm{true}|^2}; $$
#
# the resolution is the frequency at which $g$ first falls below one half. (For the Wiener filter that is the frequency
# where $S = \sigma^2$.) The *spectral centroid*, the mean frequency of an estimate's own power, needs no truth, but
# also counts detail that is false.


# %%
def rings(n):
    """Frequency of each coefficient of an n x n transform, rounded to whole periods across the picture."""
    f = n * torch.fft.fftfreq(n)
    return (f[:, None] ** 2 + f**2).sqrt().round().long()


def ring_sums(values):
    """Sums over the rings 0 to n / 2 of `values` (B, C, n, n), over channels too: (B, n / 2 + 1)."""
    n = values.shape[-1]
    sums = torch.zeros(len(values), int(rings(n).max()) + 1)
    return sums.index_add(1, rings(n).flatten(), values.sum(1).flatten(1))[:, : n // 2 + 1]


def resolution(x, ref):
    """Cycles per pixel up to which `x` holds half of `ref`, (B,)."""
    x, ref = torch.fft.fft2(x), torch.fft.fft2(ref)
    held = (ring_sums((x * ref.conj()).real) / ring_sums(ref.abs().square()))[:, 1:] > 0.5
    return held.long().cumprod(1).sum(1) / x.shape[-1]


def centroid(x):
    """Mean frequency of the power of `x`, without its mean, in cycles per pixel, (B,)."""
    power = ring_sums(torch.fft.fft2(x).abs().square())[:, 1:]
    return (power * torch.arange(1, power.shape[1] + 1)).sum(1) / power.sum(1) / x.shape[-1]


def aligned(x, ref):
    """`x` (B, C, n, n), each rolled to where it correlates best with `ref`: a blind result is known up to a shift."""
    n = x.shape[-1]
    match = torch.fft.ifft2((torch.fft.fft2(ref).conj() * torch.fft.fft2(x)).sum(1)).real.flatten(1).argmax(1).tolist()
    return torch.stack([one.roll((-(i // n), -(i % n)), (-2, -1)) for one, i in zip(x, match, strict=True)])


centred = truth - truth.mean()  # one number, as the prior's mean is: ring 0 has the variance of the channels' means
power = ring_sums(torch.fft.fft2(centred.cpu(), norm="ortho").abs().square()).sum(0)
members = ring_sums(torch.ones(1, 1, side, side))[0] * 3 * len(truth)
spectrum = (power / members)[rings(side).clamp(max=side // 2)][:, : side // 2 + 1]  # the photographs' mean power
wiener = GaussianPrior(truth.mean().item(), spectrum=spectrum.expand(3, -1, -1).to(device).contiguous())

levels = (10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1)
generator = torch.Generator().manual_seed(seed)
fine, rows = {"network": [], "Wiener filter": []}, [{}, {}, {}]
for sigma in levels:
    t = schedule.time(sigma)
    z = truth + sigma * torch.randn(truth.shape, generator=generator).to(device)
    rows[0][rf"$\sigma$ = {sigma}"] = z[0]
    for row, (name, prior) in zip(rows[1:], (("network", priors["image"]), ("Wiener filter", wiener)), strict=True):
        with torch.no_grad():
            mean = prior.denoise(math.sqrt(schedule.alpha_bar(t)) * z, t)
        fine[name].append(resolution(mean.cpu(), truth.cpu()).mean().item())
        row[(name, sigma)] = mean[0]
figure = display.show(rows[0] | rows[1] | rows[2], columns=len(levels), size=1.3)
_ = display.save_figure(figure, "03_scale_space_denoised.png")

figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
for name, values in fine.items():
    axis.plot(levels, [v or math.nan for v in values], "o-", markersize=3, label=name)
axis.set(xscale="log", yscale="log", xlabel=r"$\sigma$", ylabel="resolution [cycles / pixel]")
axis.set_yticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
axis.minorticks_off()
axis.invert_xaxis()
axis.legend()
for name, values in fine.items():
    print(f"{name:13}", "  ".join(f"{v:.3f} at {s}" for s, v in zip(levels, values, strict=True)))

# %% [markdown]
# Rows: the noisy photograph, the network's mean, the Wiener filter's. (At $\sigma = 10$ neither holds half of anything,
# so the curves begin at 5.) Both go from blots to detail as $\sigma$ falls, the network ahead of the filter: knowing
# what edges look like, it finds them where their transform is weaker than the noise. (The filter's resolution grows by
# five and not by ten over a decade: these photographs' power falls a little faster than $1 / f^2$.) Note too how the
# two are coarse. The filter's mean is blurred, and speckled where noise passes; the network's is made of patches with
# edges, as its training scenes are. So "the image at Gaussian scale $\sigma$" is exact as a statement about the
# distribution; as one about the picture it is a rule of thumb.
#
# ## Measured during a blind run
#
# Now both priors at work, as in notebook 02: three photographs, each with a shake of its own, one run with the
# library's default, in which the kernel *leads* (at any time it has half the image's noise), and one without. What is
# recorded at each step is $\hat x_0$ and $\hat k_0$, the posterior means.

# %%
blur = Blur("circular")
noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed)).to(device)
y = blur(truth, kernels) + noise_std * noise
if preset != "ci":
    print("about two minutes on two CPU cores")
leads = {"with lead": {"kernel": 2.0}, "without": {}}
runs = {
    name: sample(
        y, blur, priors, steps=steps, seed=seed, guidance=DPS(lead=lead).respaced(steps, side),
        history=min(steps, 50), progress=True,
    )
    for name, lead in leads.items()
}  # fmt: skip

# %%
true = {"image": truth.cpu(), "kernel": kernels.cpu()}
times = runs["with lead"].history["t"].tolist()
sigmas = [schedule.sigma(t) for t in times]


def measured(history, name):
    """Centroid, resolution and relative error of each frame: (frames, photographs)."""
    ref = true[name]
    frames = [aligned(x, ref) for x in history[name]]
    size = (ref - ref.mean((-2, -1), keepdim=True)).flatten(1).norm(dim=1)
    return {
        "centroid [cycles / pixel]": torch.stack([centroid(x) for x in frames]),
        "resolution [cycles / pixel]": torch.stack([resolution(x, ref) for x in frames]),
        "relative error": torch.stack([(x - ref).flatten(1).norm(dim=1) / size for x in frames]),
    }


curves = {name: {latent: measured(run.history, latent) for latent in true} for name, run in runs.items()}
figure, axes = plt.subplots(2, 3, figsize=(10, 4.6), sharex=True, layout="constrained")
for row, latent, colour in zip(axes, true, ("tab:red", "tab:blue"), strict=True):
    for name, style in (("with lead", "-"), ("without", ":")):
        for axis, (title, values) in zip(row, curves[name][latent].items(), strict=True):
            axis.plot(sigmas, values.mean(1), style, color=colour, label=name)
            axis.set(title=f"{latent}: {title}", xscale="log")
            axis.title.set_fontsize(9)
    row[0].axhline(centroid(true[latent]).mean(), color="k", linewidth=0.6, label="truth")
axes[0, 0].invert_xaxis()
axes[0, 0].legend(fontsize=8)
for axis in axes[1]:
    axis.set_xlabel(r"$\sigma$ of the run")
_ = display.save_figure(figure, "03_scale_space_run.png")

# %% [markdown]
# At the start (left) there is nothing to measure: the image's estimates are almost flat, and their centroid is that of
# the network's small errors; the kernel's are the mean kernel. From about $\sigma = 10$ on both climb. The image does
# so evenly, from nothing to a resolution of 0.2 cycles per pixel, over two decades. The kernel goes quickly once it
# goes, and with the lead it goes earlier: it has half the noise. At the end the image's power has spread as far as the
# truth's (black line), or a little farther; the kernel's has not: the kernels found are plumper than the true ones.
# Both runs reach the kernel's last resolution near $\sigma = 0.1$.
#
# **When does each settle?** That depends on what is asked. *In shape*: from the step on at which an estimate is, and
# stays, less than half as far from the run's last estimate as the mean of its pixels is. *In detail*: from the step on
# at which its resolution is, and stays, four fifths of the last one.


# %%
def step_of(far):
    """Step, of 1000, after the last frame that is `far` (frames,)."""
    return 1000 - times[min(int(far.nonzero().max()) + 1, len(times) - 1)] if far.any() else 0


settled = {}
for name, run in runs.items():
    for latent in true:
        frames = run.history[latent]
        size = (frames[-1] - frames[-1].mean((-2, -1), keepdim=True)).flatten(1).norm(dim=1)
        away = (frames - frames[-1]).flatten(2).norm(dim=2) > 0.5 * size
        shape = [step_of(one) for one in away.T]
        detail = curves[name][latent]["resolution [cycles / pixel]"].mean(1)
        settled[name, latent] = sum(shape) / len(shape), step_of(detail < 0.8 * detail[-1])
        print(f"{name:10} {latent:7} in shape after step {settled[name, latent][0]:3.0f}", end="")
        print(f" ({', '.join(str(s) for s in shape)}), in detail after {settled[name, latent][1]:3.0f} of 1000")

shown = [i for i, s in enumerate(sigmas) if s < 40][:: max(len(times) // 8, 1)][:8]
figure = display.film({key: values[shown] for key, values in runs["with lead"].history.items()})
_ = display.save_figure(figure, "03_scale_space_film.png")

# %% [markdown]
# In shape, image and kernel settle together, about step 650 of 1000, and photographs differ more than latents do: the
# cat is late in both. In detail the kernel is ahead of the image. (How far ahead hangs on a hair: its resolution has
# few steps in so small a window, and a plateau that lies just above or just below four fifths counts as settled or
# not.) In the frames the kernel is a blob up to $t = 564$, a wedge at 409, and has direction and length at 251; the
# face sharpens to the end.
#
# The paper saw the kernel settle near step 200 and the image near 400. In detail the order is the same; ours is later,
# and one reason is known. The paper's pictures have four times our side, and sixteen times as many pixels see
# through four times as much noise ([arXiv 2301.11093](https://arxiv.org/abs/2301.11093), section 3.1). Our step 650 has
# $\sigma = 1.6$; four times that is the noise of step 400.
#
# ## Why it matters: the same problem without the scales
#
# **Gradient descent on both unknowns.** The classical way writes down how bad a pair is and makes it better:
#
# $$ J(x, k) = \tfrac{1}{N} \lVert y - k * x \rVert^2 + \lambda \, \mathrm{TV}(x), $$
#
# with the total variation, the mean length of the image's gradient, as the prior of $x$, and $k$ kept on the simplex
# by a softmax. We descend with Adam from $x = y$ and a flat kernel. And once more from the *truth*.


# %%
def total_variation(x):
    dx, dy = x - x.roll(1, 3), x - x.roll(1, 2)
    return (dx.square() + dy.square() + 1e-4).sqrt().mean((1, 2, 3))


def badness(y, x, k, strength=0.01):
    return (y - blur(x, k)).square().mean((1, 2, 3)) + strength * total_variation(x)


def descend(y, x, k, iterations):
    x, logits = x.clone().requires_grad_(True), (k + 1e-8).log().requires_grad_(True)
    optimizer = torch.optim.Adam([{"params": [x], "lr": 0.02}, {"params": [logits], "lr": 0.1}])
    for _ in range(iterations):
        optimizer.zero_grad()
        badness(y, x, logits.flatten(1).softmax(1).reshape(k.shape)).sum().backward()
        optimizer.step()
    return x.detach(), logits.detach().flatten(1).softmax(1).reshape(k.shape)


flat = torch.full_like(kernels, 1 / window**2)
pixel = torch.zeros_like(kernels)
pixel[..., window // 2, window // 2] = 1  # no blur at all
found = {
    "descent": descend(y, y, flat, sizes["descent"]),
    "descent from truth": descend(y, truth, kernels, sizes["descent"]),
}
costs = {"truth": badness(y, truth, kernels), "no blur (y, one pixel)": badness(y, y, pixel)}
for name, cost in (costs | {name: badness(y, *pair) for name, pair in found.items()}).items():
    print(f"1000 J, {name:23}", "  ".join(f"{1000 * c:.2f}" for c in cost.tolist()))

# %% [markdown]
# Three numbers, one for each photograph. The objective is lower for "nothing was blurred" than for the truth: a blurred
# picture has less total variation than a sharp one, and with a single bright pixel for a kernel it fits. The descent
# therefore ends there, *even from the truth*. It has not failed; it has found what it was asked for. (Levin et al.,
# CVPR 2009, show why a prior of gradients and a maximum over both unknowns lead here.)
#
# **A hand-made pyramid.** Shrink the measurement (its pixels averaged under a triangle, for a Gaussian) until the blur
# spans a few pixels, solve, enlarge the kernel, go on with $\sqrt 2$ times the side. First with the descent as it is.
# Then with an alternation that classical methods came to after they had met this failure (in the manner of Xu et al.,
# CVPR 2013): the image is replaced by a cartoon that has *few* edges rather than small ones (an $\ell_0$ norm of its
# gradients), so that edges are either steep or absent; the kernel is then the one that takes the cartoon's edges to
# those of $y$, a least-squares problem; and so on in turn.


# %%
def pyramid(solve, y, k):
    """Solve on smaller pictures first; each level starts from the kernel of the one before."""
    for size in [n for n in (16, 22, 32, 45, 64, 90, 128, 181, 256) if n <= side]:
        k = F.interpolate(k, (size * window // side,) * 2, mode="bicubic").clamp(min=0)
        k = recentred(k / k.sum((-2, -1), keepdim=True))
        _, k = pair = solve(F.interpolate(y, (size, size), mode="bilinear", antialias=True), k)
    return pair


found["descent, pyramid"] = pyramid(lambda y, k: descend(y, y, k, sizes["descent"] // 2), y, flat)
found["few edges"] = l0_pyramid(y, window, noise_std, levels=0)
found["few edges, pyramid"] = l0_pyramid(y, window, noise_std)

# %% [markdown]
# **Diffusion without its coarse scales.** Last, the fair control: the same priors and guidance, but the run starts
# late, with as many steps where there are as many times left, at $\sigma = 1$, 0.3 or 0.1, from $x = y$ and no blur
# with that much noise. And then the same late start, but from what the pyramid found: its image, restored anew, and its
# kernel.

# %%
if preset != "ci":
    print("two to three minutes on two CPU cores")
guidance = DPS(lead={}).respaced(steps, side)
for sigma in (0.1, 0.3, 1.0):
    late = dict(start={"image": y, "kernel": kernel_to_latent(pixel)}, start_time=schedule.time(sigma))
    run = sample(y, blur, priors, steps=min(steps, late["start_time"] + 1), seed=seed, guidance=guidance, **late)
    found[f"diffusion from {sigma}"] = run.image, run.kernel

guess = found["few edges, pyramid"][1]
known = partial(blur, kernel=guess)
anew = sample(y, known, {"image": priors["image"]}, steps=sizes["restore"], guidance=DiffPIR(2 * noise_std)).image
late = dict(start={"image": anew, "kernel": kernel_to_latent(guess)}, start_time=120)
run = sample(y, blur, priors, steps=sizes["late"], seed=seed, guidance=DPS().respaced(300, side), **late)
found["pyramid, then diffusion"] = run.image, run.kernel
found |= {f"diffusion, {name}": (run.image, run.kernel) for name, run in runs.items()}

# %% [markdown]
# The images come from priors of very different kinds, so we also ask what each *kernel* is worth, by restoring $y$ anew
# with it, always by the same method (`DiffPIR` with the image prior, as if the kernel were known). For "no blur" that
# is plain denoising, and the true kernel shows what could be had.

# %%
if preset != "ci":
    print("about a minute on two CPU cores")
rows = {"no blur": (y, pixel)} | found | {"true kernel": (truth, kernels)}
scores, restored = {}, {}
print(f"{'means over three photographs':28}  PSNR   anew    MNC  MNC to no blur")
for name, (x, k) in rows.items():
    known, image = partial(blur, kernel=k), {"image": priors["image"]}
    restored[name] = sample(y, known, image, steps=sizes["restore"], seed=seed, guidance=DiffPIR(noise_std)).image
    own = psnr(x, truth, max_shift=4).mean().item() if name != "true kernel" else math.nan
    scores[name] = own, psnr(restored[name], truth, max_shift=4).mean().item(), mnc(k, kernels).mean().item()
    line = "{:5.2f}  {:5.2f}   {:.2f}".format(*scores[name]).replace("  nan", "    -")
    print(f"{name:28}", line, f"  {mnc(k, pixel).mean():.2f}")

# %%
shown = [name for name in rows if name not in ("descent from truth", "descent, pyramid")]
pictures = {name.replace(", ", ",\n").replace(" from", "\nfrom"): rows[name][0][0] for name in shown}
pictures |= {("k", name): rows[name][1][0] for name in shown} | {("anew", name): restored[name][0] for name in shown}
figure = display.show(pictures, columns=len(shown), size=1.25)
_ = display.save_figure(figure, "03_scale_space_compared.png")

# %% [markdown]
# Rows: image as the method left it (in the last column the truth), kernel, $y$ restored anew with that kernel. Read the
# table with the pictures.
#
# - **Descent** finds no blur, at one scale or in a pyramid. Scales do not help an objective whose best answer is wrong.
# - **Few edges** escapes from no blur by itself, as its prior does not prefer blurred pictures; the **pyramid** then
#   adds more than a dB. Scales help to find the good answer where there is one.
# - **Diffusion** begun late stays near where it was put: the later, the nearer to no blur (last column: 0.77 from
#   $\sigma = 0.1$, 0.58 from 0.3, 0.37 from 1) and the farther from the true kernel. Begun at pure noise it comes
#   closest to it, MNC 0.90. Nobody told it about a pyramid; noise levels are its pyramid, and it needs the coarse ones.
# - **Without the lead** the kernels are as good, and the pictures better, by half a decibel as they are and by more
#   anew: an earlier kernel is not a better one here.
# - **The hand-made pyramid alone** is at 0.95, and over 25 dB where the diffusion has 21 to 22, little more than the
#   blurred pictures on average, because it spoils the cat. (The pyramid's settings go back to these very photographs,
#   and our priors were trained for hours only.)
# - **Both together have the best kernels**: 0.97, and with them the best pictures anew, 26.5 dB. The pyramid has
#   settled the coarse scales in a second; the diffusion starts below them and does what it is good at, the fine ones:
#   see how the stray pixels of the pyramid's kernel are gone. `deblur` begins so, too. The true kernel would give 28
#   dB.
#
# ## Play with it
#
# The run with lead, from noise to the end; move the slider and watch which of the two takes shape first.

# %%
display.scrubber(runs["with lead"].history)

# %% [markdown]
# ## Where it fails
#
# The order of scales is no promise of a right answer: what is decided at a coarse scale is hardly taken back at a finer
# one. Here are all three photographs as the default run left them, and what the pyramid's kernel would have given.

# %%
pictures = {}
for i, name in enumerate(photos):
    one = slice(i, i + 1)
    x, k = found["diffusion, with lead"]
    entries = {
        "given": y,
        "diffusion": x,
        "anew": restored["diffusion, with lead"],
        "pyramid, anew": restored["few edges, pyramid"],
    }
    for title, values in entries.items():
        pictures[f"{name}, {title}:\n{psnr(values[one], truth[one], max_shift=4).item():.1f} dB"] = values[i]
    pictures |= {(name, "truth"): truth[i], (name, "k"): k[i], (name, "true"): kernels[i]}
figure = display.show(pictures, columns=7, size=1.6)
_ = display.save_figure(figure, "03_scale_space_failures.png")

# %% [markdown]
# Columns: given; the diffusion's image; $y$ restored anew with the diffusion's kernel, and with the pyramid's; truth;
# the diffusion's kernel; the true one. The astronaut's kernel is as good as the pyramid's. The cat's is too
# long: the true one is so small that the given picture is hardly blurred, the diffusion took the coarse kernel of its
# first scales for a large one, and a kernel that is too large must be paid for with an image that is too sharp: stripes
# everywhere, and worse than doing nothing. Nothing in the later scales took that back. As in notebook 02: look at the
# picture, draw several samples, distrust a fur of stripes.

# %%
short = {
    "descent": "descent",
    "few edges": "edges",
    "few edges, pyramid": "pyramid",
    "diffusion, with lead": "diffusion",
    "pyramid, then diffusion": "both",
}
_ = display.record(
    "03_scale_space",
    preset=preset,
    seed=seed,
    agreement=agreement,
    psnr_blurred=scores["no blur"][0],
    **{f"psnr_{short[name]}": scores[name][0] for name in short},
    **{f"mnc_{short[name]}": scores[name][2] for name in short},
    mnc_descent_to_no_blur=mnc(found["descent"][1], pixel).mean().item(),
    psnr_true_kernel=scores["true kernel"][1],
    settled_kernel=settled["with lead", "kernel"],
    settled_image=settled["with lead", "image"],
)

# %% [markdown]
# ## Exercises
#
# **1. Known by heart.** With an `EmpiricalPrior` for each of image and kernel, run `sample` on a blurred member of the
# sets. How good is it, and what happens when the kernel is a stranger?
#
# <details><summary>Solution</summary>
#
# ```python
# scenes, shakes = dead_leaves(64, 32, seed=1), blur_kernels(64, 17, seed=1)
# learned = {"image": EmpiricalPrior(scenes, latent="image"),
#            "kernel": EmpiricalPrior(kernel_to_latent(shakes), latent="kernel")}
# for k in (shakes[3:4], motion_kernels(1, 17, seed=9)):
#     run = sample(blur(scenes[5:6], k), blur, learned, steps=100, guidance=DPS.released().respaced(100))
#     print(psnr(run.image, scenes[5:6]).item(), mnc(run.kernel, k).item(), run.residual.item())
# ```
#
# The members come out exactly, both of them, and the residual is zero. Even with the strange kernel the image is found;
# but only one of the 64 kernels can come out beside it, and the residual, no longer zero, says that none of them is
# right.
# </details>
#
# **2. Is the pyramid needed?** Give `l0_pyramid` a larger `strength`, 0.6, at one scale and in the pyramid.
#
# <details><summary>Solution</summary>
#
# ```python
# for levels in (0, None):
#     x, k = l0_pyramid(y, window, noise_std, strength=0.6, levels=levels)
#     print(psnr(x, truth, max_shift=4), mnc(k, kernels))
# ```
#
# A stronger prior of edges moves the image farther from $y$ in the first round. One scale stays about where it was
# (23.8 dB), the pyramid loses a decibel (24.4), and so its lead shrinks from 1.7 to 0.7 dB. Two ways out of the same
# trap: a prior that forbids it, and scales that avoid it. With both, more of the one is no help.
# </details>
#
# **3. Let the image lead.** What do the curves of the blind run look like with `DPS(lead={"image": 2.0})`, and with a
# kernel that leads by 4?
#
# <details><summary>Solution</summary>
#
# ```python
# for lead in ({"image": 2.0}, {"kernel": 4.0}):
#     run = sample(y, blur, priors, steps=steps, guidance=DPS(lead=lead).respaced(steps, side), history=50)
#     for latent in true:
#         print(lead, latent, measured(run.history, latent)["resolution [cycles / pixel]"].mean(1)[::5])
# ```
#
# A latent that leads is asked at a lower noise level, so its curve moves to the left, towards larger $\sigma$ of the
# run.
# </details>
#
# **4. Equal hills.** Two components at $\pm d$ with a width of their own, `GaussianMixturePrior(means, std=s)`: at
# which $\sigma$ do they merge now?
#
# <details><summary>Solution</summary>
#
# The density is that of two points, smoothed by $s$ already. Variances add: $\sigma^2 + s^2 = d^2$. For $s \ge d$ there
# never were two hills.
# </details>
#
# ## References
#
# - H. Chung, J. Kim, S. Kim, J. C. Ye, *Parallel Diffusion Models of Operator and Image for Blind Inverse Problems*
#   (BlindDPS), CVPR 2023, [arXiv 2211.10656](https://arxiv.org/abs/2211.10656).
# - A. P. Witkin, *Scale-space filtering*, IJCAI 1983.
# - J. Babaud, A. P. Witkin, M. Baudin, R. O. Duda, *Uniqueness of the Gaussian kernel for scale-space filtering*, IEEE
#   TPAMI 8, 1986.
# - M. Á. Carreira-Perpiñán, C. K. I. Williams, *On the number of modes of a Gaussian mixture*, Scale Space 2003.
# - A. Levin, Y. Weiss, F. Durand, W. T. Freeman, *Understanding and evaluating blind deconvolution algorithms*, CVPR
#   2009.
# - L. Xu, S. Zheng, J. Jia, *Unnatural L0 sparse representation for natural image deblurring*, CVPR 2013.
# - E. Hoogeboom, J. Heek, T. Salimans, *Simple diffusion: end-to-end diffusion for high resolution images*, ICML 2023,
#   [arXiv 2301.11093](https://arxiv.org/abs/2301.11093).
