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
# # Fast Diffusion EM: the kernel that is most likely
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/blindlib/blindlib/blob/main/notebooks/05_fast_diffusion_em.ipynb)
#
# **What you will see.** In notebook 02 image and kernel were two unknowns of the same kind, and both diffused. Here
# they are not: images are sampled by a diffusion, and the kernel is *fitted* to the samples, by expectation
# maximisation. We watch EM climb on a model that can be solved exactly, write both steps in plain PyTorch, find out
# which part of the method keeps it from the answer "nothing was blurred", and hold it against the parallel diffusion.
#
# **What you need.** The notebooks `01_dps` and `02_parallel_operator_diffusion`. No GPU: about six minutes on two CPU
# cores.

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
import json
import math
import time

import matplotlib.pyplot as plt
import torch
from skimage import data

from blindlib import (
    DPS,
    L1,
    Annealed,
    Blur,
    PlugAndPlay,
    Threshold,
    as_published,
    diffusion_em,
    display,
    fast_em,
    fit_kernel,
    l0_pyramid,
    load_kernel_denoiser,
    load_prior,
    mnc,
    motion_kernels,
    prior_denoiser,
    psnr,
    sample,
)
from blindlib.deblur import read_image, resize
from blindlib.em import centred
from blindlib.operators import otf
from blindlib.priors import pick_device

sizes = {
    "ci": {"side": 64, "plain": 4, "main": 6, "rounds": (2, 4), "compare": 4, "parallel": 6, "panel": 4},
    "cpu": {"side": 64, "plain": 20, "main": 50, "rounds": (4, 15), "compare": 30, "parallel": 100, "panel": 30},
    "gpu": {"side": 256, "plain": 10, "main": 100, "rounds": (10, 50), "compare": 100, "parallel": 1000, "panel": 50},
}[preset]
side, window = sizes["side"], 32
noise_std = 0.02  # on the [-1, 1] scale of our images

# %%
device = pick_device(device)
torch.backends.cudnn.allow_tf32 = False  # full precision on a GPU too: with less, two ways to one number differ
image_prior, kernel_prior = load_prior("image", device=device), load_prior("kernel", device=device)
denoiser = load_kernel_denoiser(device=device)


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
blur = Blur("circular")
noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed)).to(device)
y = blur(truth, kernels) + noise_std * noise
delta = as_published(window)["kernel0"].to(device)  # a centred bright pixel: no blur
common = dict(kernel_size=window, noise_std=noise_std, seed=seed)


def scores(image, kernel):
    """PSNR after the best small shift, in dB, and likeness of the kernels (MNC, 1 is perfect), means over the batch."""
    return psnr(image, truth, max_shift=4).mean().item(), mnc(kernel, kernels).mean().item()


def to_no_blur(kernel):
    """How much a kernel looks like a single bright pixel, mean of MNC; 1: that is what it is."""
    return mnc(kernel, delta).mean().item()


# %% [markdown]
# ## The idea: EM in one page
#
# We want the kernel under which what we measured is most likely, whatever the image:
#
# $$ \hat k = \arg\max_k \; \log p(y \mid k) - \lambda \Phi(k), \qquad
#    p(y \mid k) = \int p(y \mid x, k)\, p(x)\, dx . $$
#
# Why not the most likely *pair*? A pair is one image and one kernel, and "everything was as blurred as it looks, the
# kernel is a pixel" is a pair that explains $y$ well. The integral asks how *many* sharp images explain $y$ under a
# kernel, and is not so easily fooled ([Levin et al. 2009](https://doi.org/10.1109/CVPR.2009.5206815)). It has no
# formula. ($p(x)$ is the prior of images, $\sigma$ the noise; $\Phi$ a regulariser of kernels, $\lambda$ its weight.)
# But take any distribution $q(x)$; by Jensen's inequality
#
# $$ \log p(y \mid k) \;\ge\; \mathbb E_{q} \log p(y \mid x, k) - \mathrm{KL}(q \,\Vert\, p), $$
#
# with equality if $q(x) = p(x \mid y, k)$. So, in turn:
#
# - **E-step.** Draw images $x_1, \dots, x_n$ from $p(x \mid y, k)$. The kernel is known for the moment: that is DPS or
#   PiGDM.
# - **M-step.** Raise the right-hand side over $k$. Only the misfit depends on it, a least-squares problem:
#
# $$ k \leftarrow \arg\min_k \; \frac{1}{2\sigma^2} \sum_i \lVert y - k * x_i \rVert^2 + \lambda \Phi(k). $$
#
# (The bound has the mean over the samples. With their sum, which blindlib takes, the regulariser counts $n$ times
# less.) The bound touches $\log p(y \mid k)$ at the old kernel and lies below it elsewhere: what raises the bound
# raises the likelihood. **DiffEM** does it so, a whole diffusion run for each E-step. **FastEM** ([Laroche et
# al.](https://arxiv.org/abs/2309.00287)) makes *one* run, and an M-step after each step of it, with the current
# estimate of the image instead of samples.
#
# ## EM on a model that can be solved
#
# Let images be Gaussian with the spectrum $P(f) \propto 1/f^2$ that photographs have, and kernels be Gaussians of an
# unknown width $w$. Then everything is exact, one frequency at a time: the posterior of $x$ has mean $m$ and variance
# $C$ in each, and $\mathbb E \lvert x \rvert^2 = \lvert m \rvert^2 + C$.

# %%
n = 64
f = torch.stack(torch.meshgrid(torch.fft.fftfreq(n), torch.fft.rfftfreq(n), indexing="ij")).double().norm(dim=0)
P = 1e-3 / (f**2 + 1e-4)
pairs = torch.full_like(f, 2.0)  # rfft2 keeps one of each pair of conjugate frequencies
pairs[:, 0] = pairs[:, -1] = 1
widths = torch.linspace(0.02, 4, 400, dtype=torch.float64)
H = torch.exp(-2 * (math.pi * f * widths[:, None, None]) ** 2)  # spectra of Gaussian kernels
g = torch.Generator().manual_seed(seed)
spectrum = torch.fft.rfft2(torch.randn(2, n, n, generator=g, dtype=torch.float64), norm="ortho")
true = int((widths - 2).abs().argmin())


def exact_em(std, rounds, start=0):
    """Widths and log likelihoods of EM; all log likelihoods."""
    Y = H[true] * P.sqrt() * spectrum[0] + std * spectrum[1]
    s = H**2 * P + std**2
    log_likelihood = -0.5 * (pairs * (Y.abs() ** 2 / s + s.log())).sum((1, 2))
    i, path = start, [start]
    for _ in range(rounds):
        h = H[i]
        C = P * std**2 / (h**2 * P + std**2)
        m = C / std**2 * h * Y
        misfit = Y.abs() ** 2 - 2 * H * (Y.conj() * m).real + H**2 * (m.abs() ** 2 + C)
        i = int((pairs * misfit).sum((1, 2)).argmin())
        path.append(i)
    return path, log_likelihood


figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
needed, falls = {}, 0.0
for std, colour in zip((0.5, 0.2, 0.05), ("tab:green", "tab:blue", "tab:red"), strict=True):
    path, log_likelihood = exact_em(std, 60)
    curve = log_likelihood[path]
    falls = max(falls, float((curve[:-1] - curve[1:]).max()))
    goal = log_likelihood.max() - curve[0]
    needed[std] = next((i for i, v in enumerate(curve) if v - curve[0] > 0.9 * goal), None)
    axes[0].plot(widths, (log_likelihood - curve[0]) / goal, color=colour, label=f"noise {std}")
    axes[1].plot(widths[path], ".-", color=colour, markersize=3)
    axes[2].plot((curve - curve[0]) / goal, ".-", color=colour, markersize=3)
axes[0].set(xlabel="width", title=r"$\log p(y \mid w)$, scaled", ylim=(-0.1, 1.1))
axes[0].axvline(widths[true], color="k", linestyle=":", linewidth=0.8)
axes[0].legend(fontsize=7)
axes[1].axhline(widths[true], color="k", linestyle=":", linewidth=0.8)
axes[1].set(xlabel="round", title="width that EM has reached")
axes[2].set(xlabel="round", title="likelihood that EM has reached")
_ = display.save_figure(figure, "05_fast_diffusion_em_exact.png")

# %%
# NBVAL_CHECK_OUTPUT
print("the likelihood never falls:", falls <= 1e-9)
print("rounds to nine tenths of the way:", needed)

# %% [markdown]
# Left: the likelihood knows the right width to a tenth or two, at any of these noises (dotted: the true one). Middle
# and right: EM climbs and never falls, but at what pace! Let $h$ be the kernel's spectrum and $Y$ that of the
# measurement, and start from "no blur", $h = 1$. An E-step that believes it returns images that *are* $y$, up to the
# noise. Were $h$ free in each frequency, and not tied to a width, then where $P \gg \sigma^2$ the M-step would give
#
# $$ h = \frac{\lvert Y \rvert^2}{\lvert Y \rvert^2 + \sigma^2}. $$
#
# Where the blur left much, $\lvert Y \rvert \gg \sigma$, that is 1 again and hardly anything moves. Where it left
# nothing but noise, it is one half at once: these frequencies tell that something was blurred. With little noise there
# are many of them that have $P \gg \sigma^2$, and EM leaves soon. With much noise, $P$ is below it at these
# frequencies, and they tell nothing. **A start at no blur is nearly a fixed point of EM, not because it is likely, but
# because an E-step believes the kernel it is given.** What happens next to the small first step is up to the
# regulariser, as we shall see.
#
# ## The algorithm in plain PyTorch
#
# The M-step splits the problem in two (half-quadratic splitting): a least-squares problem that is diagonal in Fourier
# space, pulled towards the last kernel $z$ with weight $\beta$, and the regulariser, for which a *denoiser of kernels*
# stands in, at noise $\sqrt{\lambda / \beta}$. After each, negative values are cut and the sum is made one.


# %%
def simplex(k):
    return k.clamp(min=0) / k.clamp(min=0).sum((-2, -1), keepdim=True)


def m_step(y, x, kernel, beta=1e5, weight=1.0, iterations=10):
    """The kernel that takes the images `x` (B, 3, H, W) to `y`."""
    size, K = y.shape[-2:], kernel.shape[-1]
    X, Y, z = torch.fft.rfft2(x), torch.fft.rfft2(y), kernel
    for _ in range(iterations):
        pull = noise_std**2 * beta
        solved = ((X.conj() * Y + pull * otf(z, tuple(size))) / (X.abs() ** 2 + pull)).mean(1, keepdim=True)
        full = torch.fft.irfft2(solved, s=size).roll((K // 2, K // 2), (-2, -1))
        z = simplex(full[..., :K, :K])
        z = simplex(denoiser(z, math.sqrt(weight / beta)))
    return z


def e_step(y, x_t, t, kernel):
    """Mean of the image given x_t and y, the kernel being known: PiGDM."""
    a, h = image_prior.schedule.alpha_bar(t), otf(kernel, tuple(y.shape[-2:]))
    r2 = 1 - a  # variance of x_0 given x_t, for images of variance one
    x_t = x_t.detach().requires_grad_(True)
    x0 = image_prior.denoise(x_t, t)
    residual = torch.fft.rfft2(y) - h * torch.fft.rfft2(x0.detach())
    # A^T (r^2 A A^T + sigma^2)^-1 (y - A x0), through the network back to x_t
    pull = torch.fft.irfft2(h.conj() * residual / (r2 * h.abs() ** 2 + noise_std**2), s=y.shape[-2:])
    (vjp,) = torch.autograd.grad(x0, x_t, pull)
    return (x0.detach() + (1 - a) / math.sqrt(a) * vjp).clamp(-1, 1)


def plain_fast_em(y, kernel, steps, seed):
    schedule = image_prior.schedule
    times = schedule.timesteps(steps)
    generator = torch.Generator().manual_seed(seed * 1_000_003)  # blindlib's choice: the same noise, the same answer

    def gaussian():
        x = torch.randn(y.shape[1:], generator=generator)[None].to(y.device)
        torch.randn(kernel.shape[1:], generator=generator)  # blindlib draws for each latent, the fitted one too
        return x

    x = gaussian()
    for t, t_prev in zip(times, [*times[1:], -1], strict=True):
        fresh = gaussian()
        mean = e_step(y, x, t, kernel)
        x = schedule.ancestral_step(x, mean, t, t_prev, fresh)
        kernel = centred(m_step(y, mean, kernel))
    return x.clamp(-1, 1), kernel


plain_image, plain_kernel = plain_fast_em(y[:1], delta, sizes["plain"], seed)

# %% [markdown]
# ## The same from blindlib
#
# `fit_kernel` is the M-step, with any regulariser and any number of samples; `PiGDM` or `DPS` take the E-step;
# `fast_em` is `sample` with both. `as_published` starts it from a bright pixel, as above. They must agree.

# %%
fitted = fit_kernel(y, truth, noise_std, delta, PlugAndPlay(denoiser))
torch.testing.assert_close(m_step(y, truth, delta.expand(len(y), -1, -1, -1)), fitted, atol=1e-5, rtol=0)
library = fast_em(y[:1], image_prior, steps=sizes["plain"], **common, **as_published(window))
# Least squares divide by small numbers: what rounding leaves after many steps is not the last digit.
torch.testing.assert_close(plain_kernel, library.kernel, atol=2e-3, rtol=0)
assert (plain_image - library.image).square().mean().sqrt() < 0.02
agreement = (plain_kernel - library.kernel).abs().max().item()
print(f"largest difference of any pixel of the kernel: {agreement:.1e}, its peak: {library.kernel.max():.2f}")

# %% [markdown]
# ## The experiment
#
# Three photographs at once, each with its own shake, from the start that the paper takes: a single bright pixel.

# %%
if preset != "ci":
    print("half a minute on two CPU cores")
steps = sizes["main"]
run = fast_em(y, image_prior, steps=steps, history=min(steps, 40), progress=True, **common, **as_published(window))
psnr_blurred, _ = scores(y, kernels)
psnr_fast, mnc_fast = scores(run.image, run.kernel)
pictures = {}
for i, name in enumerate(photos):
    pair = psnr(run.image[i : i + 1], truth[i : i + 1], max_shift=4).item(), mnc(run.kernel, kernels)[i].item()
    given = psnr(y[i : i + 1], truth[i : i + 1], max_shift=4).item()
    pictures |= {
        f"{name}, {given:.1f} dB": y[i], f"FastEM, {pair[0]:.1f} dB": run.image[i], ("truth", i): truth[i],
        f"kernel, MNC {pair[1]:.2f}": run.kernel[i], ("true kernel", i): kernels[i],
    }  # fmt: skip
figure = display.show(pictures, columns=5, size=1.7)
_ = display.save_figure(figure, "05_fast_diffusion_em_result.png")
print(f"mean {psnr_blurred:.1f} dB given, {psnr_fast:.1f} dB restored, kernel MNC {mnc_fast:.2f}")

# %% [markdown]
# Columns: given, restored, truth; the kernel found, the true one. From no blur this is a gamble: what rounding changes
# grows, and the same cell ends elsewhere on another number of threads, where one of our runs lost the cat (15.5 dB, MNC
# 0.58). The film of the first picture (its first estimates are far outside the range of pictures, and are cut to it):

# %%
every = max(len(run.history["t"]) // 8, 1)
figure = display.film({name: values[every - 1 :: every] for name, values in run.history.items()})
_ = display.save_figure(figure, "05_fast_diffusion_em_film.png")

# %% [markdown]
# ## Stuck at no blur
#
# Now with whole diffusion runs for E-steps (DiffEM). We follow it round by round: from no blur with three
# regularisers, and from `l0_pyramid`, a classical guess (a pyramid of cartoons with few edges, as in notebook 03) that
# takes about a second. `Threshold` cuts what is fainter than a tenth of the kernel's peak.

# %%
rounds, inner = sizes["rounds"]
if preset != "ci":
    print("about two minutes on two CPU cores")
_, guess = l0_pyramid(y, window, noise_std)
cases = {
    "from no blur, denoiser": (delta, PlugAndPlay()),
    "from no blur, threshold": (delta, Threshold()),
    "from no blur, nothing": (delta, None),
    "from edges, denoiser": (guess, PlugAndPlay()),
}
paths = {}
for case, (start, regularizer) in cases.items():
    path = [start.expand(len(y), -1, -1, -1)]
    for _ in range(rounds):
        settings = dict(steps=inner, rounds=1, kernel0=path[-1], regularizer=regularizer)
        path.append(diffusion_em(y, image_prior, **common, **settings).kernel)
    paths[case] = path

figure, axes = plt.subplots(1, 2, figsize=(8, 2.7), layout="constrained")
for (case, path), colour in zip(paths.items(), ("tab:blue", "tab:red", "tab:gray", "tab:green"), strict=True):
    axes[0].plot([mnc(k, kernels).mean().item() for k in path], "o-", color=colour, label=case, markersize=3)
    axes[1].plot([to_no_blur(k) for k in path], "o-", color=colour, markersize=3)
axes[0].set(xlabel="round", title="likeness to the true kernel (MNC)")
axes[0].legend(fontsize=7)
axes[1].axhline(to_no_blur(kernels), color="k", linestyle=":", linewidth=0.8, label="the true kernels")
axes[1].legend(fontsize=7)
axes[1].set(xlabel="round", title="likeness to no blur (MNC)")
_ = display.save_figure(figure, "05_fast_diffusion_em_stuck.png")
diff_ends = {case: (mnc(path[-1], kernels).mean().item(), to_no_blur(path[-1])) for case, path in paths.items()}
for case, (likeness, stuck) in diff_ends.items():
    print(f"DiffEM {case:24} MNC {likeness:.2f}, to no blur {stuck:.2f}")

# %% [markdown]
# Four ways to go on from a guess:
#
# - **Threshold** never leaves no blur, exactly 1 in each round. The step away from it is small, as on the exact model:
#   faint pixels around one bright pixel. All of them are below a tenth of the peak, all are cut. This is the failure
#   that the paper warns of, at its purest.
# - **The denoiser** keeps a part of them, and creeps: 0.88 to no blur after four rounds. Each round is a whole
#   diffusion run whose image was sampled under the kernel of the round before, and believes it.
# - **Nothing** at all leaves at once, since any haze may stay. After two rounds it is as near as it comes, at the end
#   it has 0.80, hazier than the truth (dotted).
# - **From edges** there is nothing to escape from. The start is good, and so is the end (0.95), if a little more
#   compact than the truth: a stroke's faint ends are shaved off.
#
# FastEM, above, left no blur within a single run. Its M-steps begin when the image is an uncertain blotch that does
# *not* equal $y$, so that the first kernels are broad blots, and later ones grow finer with the image (see the film).
# Noise does for it what annealing does for EM.
#
# ## The regularisers compared
#
# First the M-step alone, with the *true* images: each regulariser cleans one least-squares kernel. Then each in a
# whole run of FastEM from no blur. `prior_denoiser` puts the *diffusion prior* of kernels at the place of the small
# net; it is seventy times as large.

# %%
if preset != "ci":
    print("about two minutes on two CPU cores")
steps = sizes["compare"]
regularizers = {
    "none": None,
    "l1": L1(1.0),
    "l1, weight 100": L1(100.0),
    "threshold": Threshold(),
    "diffusion prior": PlugAndPlay(prior_denoiser(kernel_prior)),
    "denoiser": PlugAndPlay(),
}
table, found = {}, {}
print(f"{'':16} true image     FastEM  each               PSNR")
for name, regularizer in regularizers.items():
    alone = mnc(fit_kernel(y, truth, noise_std, delta, regularizer), kernels).mean().item()
    settings = {**as_published(window), "regularizer": regularizer}
    found[name] = fast_em(y, image_prior, steps=steps, **common, **settings)
    table[name] = alone, *reversed(scores(found[name].image, found[name].kernel))
    each = " ".join(f"{v:.2f}" for v in mnc(found[name].kernel, kernels).tolist())
    print("{:16} MNC {:.3f}  MNC {:.3f}  {}  {:9.2f}".format(name, *table[name][:2], each, table[name][2]))

# %%
pictures = {}
for name, one in found.items():
    pictures |= {name: one.image[0], (name, 0): one.kernel[0], (name, 1): one.kernel[1], (name, 2): one.kernel[2]}
pictures |= {"truth": truth[0], **{("true", i): kernels[i] for i in range(3)}}
columns = [list(pictures.items())[i::4] for i in range(4)]
figure = display.show(dict(pair for column in columns for pair in column), columns=len(found) + 1, size=1.3)
_ = display.save_figure(figure, "05_fast_diffusion_em_regularizers.png")

# %% [markdown]
# Rows: the image, then the kernels of the three photographs. With true images any regulariser will do, and *none* has
# 0.98; but the threshold, started at no blur, hardly leaves it even now. With estimated images it is the regulariser
# that decides. Nothing, and $\ell_1$ with $\lambda = 1$ (the denoiser's weight in the paper; very little for a kernel
# that sums to one), are lost in haze; a hundred times as much saves two of three. The *diffusion prior*, good at
# denoising kernels when noise is white, leaves haze too, with which no picture can be restored: it has learned kernels
# scaled to peak at one, the time at which it is asked follows from the peak, and an early kernel of haze has none, so
# that it is taken for all noise and answered with the mean of all kernels. **Only the small denoiser, which is told the
# noise on the kernel's own scale, finds something of each**, in place and direction, if a little short. Earlier trials
# of ours without it had ended in the conclusion that EM does not work with these priors. (These runs too are from no
# blur, and the third digit of what they find is rounding.)
#
# ## Does the start matter?
#
# By default `fast_em` starts from `l0_pyramid` and leaves the kernel alone before $t = 300$: until then the image has
# no edges that a kernel could be fitted to. The paper starts from no blur and fits at once. Which of the two is it? Two
# seeds, all four ways:

# %%
both = {}
ways = {"edges": {}, "edges at once": {"fit_below": 1000}, "no blur late": {"kernel0": delta}}
for start, settings in {**ways, "no blur": as_published(window)}.items():
    for s in (seed, seed + 1):
        once = fast_em(y, image_prior, steps=steps, **{**common, "seed": s}, **settings)
        both[start, s] = scores(once.image, once.kernel)
        print("from {:14} seed {}: {:5.2f} dB, MNC {:.3f}".format(start, s, *both[start, s]))
edges_alone = mnc(guess, kernels).mean().item()
print(f"l0_pyramid alone: MNC {edges_alone:.3f}")

# %% [markdown]
# It is both. From edges *and* late, the two seeds end alike. The same edges with M-steps from the beginning are soon
# lost: the first images have no edges of their own, and what is fitted to them is worse than the start. And no blur
# left alone until $t = 300$ is no good either: by then the E-steps have believed it, and made an image that needs none.
# Who starts from no blur has to fit at once, as the paper does, and ends 1.6 to 3.6 decibels lower here. (Two more
# remedies: the images' posterior covariance in the M-step, so that an unsure image counts less, was tried and dropped;
# a short parallel run for a start is no better than the pyramid, 0.86 in the next section.) The pyramid alone is as
# good as the end, on these three photographs: its settings go back to notebook 03, where they were chosen on them. On
# the eight other images on which we chose the settings of `fast_em` (noise 0.02, 30 steps, two seeds), edges alone had
# MNC 0.80 for four scenes and 0.86 for four photographs; FastEM from there 0.85 to 0.88 and 0.96; FastEM from no blur
# 0.82 and 0.94 to 0.95. With four times the noise edges alone are a poor guess, and the start matters less.
#
# ## FastEM or parallel diffusion?
#
# The same three measurements for the parallel sampler of notebook 02, and the seconds of both.

# %%
if preset != "ci":
    print("about a minute on two CPU cores")
steps = sizes["parallel"]
fast = fast_em(y, image_prior, steps=sizes["compare"], **common)
priors = {"image": image_prior, "kernel": kernel_prior}
parallel = sample(y, blur, priors, steps=steps, seed=seed, guidance=DPS().respaced(steps, side))
live = {"FastEM": fast, "parallel": parallel}
for name, one in live.items():
    db, likeness = scores(one.image, one.kernel)
    each = " ".join(f"{v:.2f}" for v in mnc(one.kernel, kernels).tolist())
    seconds = one.seconds / len(y)
    print(f"{name:9} {one.evaluations:4} steps {seconds:6.1f} s an image {db:6.2f} dB  MNC {likeness:.3f}: {each}")

# %% [markdown]
# The parallel sampler's kernel of the cat is wrong, and on average its pictures are worse than what was given: a
# hundred steps are few for it (notebook 02 has more on that).
#
# And the benchmark, `make benchmark`: other scenes and photographs, half of each, noise 5, 10 and 20 of 255 as in the
# paper, which is up to *eight times* that of the above. The seconds are those of one measurement at a time on a busy
# machine with two cores; the rows without them were measured in batches on a GPU (`--batch 16`). The number of
# evaluations is what to compare. It counts those of the image's network: BlindDPS evaluates that of the kernel as well,
# and goes backward through both; DPS and PiGDM go backward through one; DPIR, DiffPIR and most of `deblur` through
# none, and the M-steps of `deblur` evaluate that of the kernel twelve times each. One thing was chosen on these very
# images, the weight of the prior in the M-step of `deblur` at much noise (next section).

# %%
path = display.figures_folder() / "benchmark.json"
if not path.is_file():  # a copy of this notebook without the repository around it
    print("no figures/benchmark.json here; `make benchmark` writes it")
results = json.loads(path.read_text())["results"] if path.is_file() else {}


def mean(rows, key, digits, unit=1.0):
    """Mean and, in brackets, its standard error."""
    v = torch.tensor([row[key] / unit for row in rows if key in row])
    return f"{v.mean():.{digits}f} ({v.std() / len(v) ** 0.5:.{digits}f})" if len(v) > 1 else ""


for size, level in ((64, 5), (64, 10), (64, 20), (128, 5), (128, 10), (128, 20)):
    setting = f"{size}x{size}, noise {level}/255, seed 3000"
    print(f"\n{setting:40} images PSNR         SSIM        MNC         MSE / 1e-5  seconds  evaluations")
    for method, items in results.get(setting, {}).items():
        rows = [row for row in items.values() if "psnr" in row]
        if not rows:
            continue
        cells = mean(rows, "psnr", 2), mean(rows, "ssim", 2), mean(rows, "mnc", 2), mean(rows, "mse", 1, 1e-5)
        last = mean(rows, "seconds", 0).split(" ")[0], int(rows[0].get("evaluations", 0)) or ""
        print("{:40} {:6} {:12} {:11} {:11} {:11} {:>7}  {:>11}".format(method, len(rows), *cells, *last))

# %% [markdown]
# Brackets hold standard errors, and are large since some images are far easier than others, whatever the method.
# Differences on the same image tell more. At noise 10 and 64x64, over the sixteen images:
#
# - **When FastEM wins.** With PiGDM for its E-step it has 3.3 (0.8) dB more than our parallel sampler of as many steps,
#   and 2.9 (0.5) dB more than that of a thousand short ones; over the thousand of default length it is 6.0 (1.2), 5.8
#   (0.9) and 6.0 (1.0) dB at noise 5, 10 and 20, and 19, 16 and 13 times as fast. Thirty steps of it do no worse than a
#   hundred, and are 3.3 (0.7) dB and 0.17 (0.03) of MNC ahead of the thousand short ones, in a fortieth of the time. A
#   least-squares fit takes from each step all that the measurement says of the kernel, where the parallel sampler takes
#   one gradient step; and the parallel one evaluates two large networks, FastEM one. The *known* kernel would give
#   another 1.9 (0.5) dB, by PiGDM too.
# - **A fairer opponent.** DPS is not told the noise, and pulls as hard whatever it is. The library's step sizes were
#   chosen at 2.55 of 255. Against those of a third, `1000 short steps`, they find better kernels at noise 5, by 0.10
#   (0.04), for 1.5 (0.9) dB; at noise 10 kernels that are no better, and lose 2.9 (0.8) dB by fitting noise. That is
#   why the short ones stand above. At noise 10 *three hundred* steps of the longer kind have better kernels than either
#   thousand (MNC 0.70 against 0.58 and 0.59), and the released code's step sizes 1.5 (0.7) dB more than ours at a
#   hundred. Against those the thirty steps of FastEM have 2.1 (0.6) dB and 0.11 (0.03) of MNC more.
# - **`deblur`**, which goes on from FastEM as in the next section, has 4.7 (0.7) dB and 0.25 (0.04) of MNC more than
#   the thousand short parallel steps in a third of their time, and 1.7 (0.5) dB more than FastEM's hundred; at noise 5
#   6.1 (0.8) dB and 0.26 (0.03) of MNC (over the longer steps 7.6 (1.2) and 0.16 (0.04)), and 1.6 (0.4) dB.
# - **More samples, a better kernel.** Four that share it raise its MNC by 0.07 (0.03), for four times the evaluations;
#   at noise 20 by 0.05 (0.01), at noise 5 by no more than chance, where a picture of four is 0.9 (0.5) dB worse. (Their
#   mean is 0.3 to 0.6 dB better than one of them, as any mean of samples is.)
# - **Whole runs** (DiffEM; ten, of 20 steps of PiGDM or 50 of DPS, for the paper's 100 and 1000) find kernels as good
#   or better, +0.05 (0.03) of MNC, pictures that are no better, -0.1 (0.5) dB, and take twice the time.
# - **The E-step matters.** With DPS for its E-step the same EM is 3.2 (0.8) dB worse, and 2.0 (0.5) and 4.1 (0.8) dB at
#   noise 5 and 20.
# - **The start** from edges beats the bright pixel by 0.7 (0.5) dB, 1.1 (0.5) at noise 5, and 0.1 (0.1) at noise 20,
#   where hardly any edge is left to start from.
# - **When the parallel sampler wins.** In the square error of its kernels (short steps) against FastEM's hundred, on
#   fourteen of sixteen, at noise 20 on all: they are smoother, and what is bright at a wrong place costs a square.
#   (Thirty steps are even with it, `deblur` is better on fifteen.) And where EM does not reach: operators for which
#   there is no M-step yet, such as turbulence, and answers that should say how sure they are.
# - **When nobody wins.** At noise 20 no way finds the kernel: MNC 0.44 to 0.64, and 0.68 for `deblur`, whose pictures
#   are 0.9 (0.4) dB better than FastEM's. And the parallel sampler's returns, which help at low noise (notebook 02),
#   lead it astray at noise 10 and 20, to 2.6 (0.7) and 4.5 (0.6) dB *below* the blurred picture.
#
# **Where the order differs from the paper's.** There, on faces with a prior of faces, at 5 to 20 of 255, FastEM-PiGDM
# has 25.7 dB, FastEM-DPS 24.7, BlindDPS 24.1 and DiffEM-PiGDM 23.4; the square error of the kernels is 1.1e-5 for
# FastEM and 3.9e-5 for BlindDPS. Three things are different here, and two of them we tried to explain:
#
# - *DiffEM is as good as FastEM.* That is due to its start: from a bright pixel, as in the paper (`from a delta`), it
#   is 1.1 (0.7) dB and 0.16 (0.03) of MNC worse than from edges, and behind FastEM from there, by 0.5 (0.2) dB and 0.07
#   (0.02), at noise 5 by 1.7 (0.5) dB and 0.15 (0.03): the paper's order.
# - *FastEM-DPS is no better than BlindDPS of a hundred steps* at noise 10, +0.1 (0.6) dB, and worse at 20, -1.6 (0.3)
#   dB; at noise 5 it is better by 2.3 (0.7). Of a thousand steps each, as in the paper, it is ahead by 2.8 (0.9), 1.4
#   (0.6) and 1.5 (0.5) dB at noise 5, 10 and 20, which is the paper's order, but both lose by so many: FastEM-DPS at
#   noise 5 1.2 (0.6) dB and 0.06 (0.02) of MNC. DPS is not told the noise and fits it, in EM as with the kernel
#   *known*, where it has 2.3 (0.5) dB less than PiGDM. The paper's prior of faces, narrower, may hold it back.
# - *The parallel sampler's kernels have the smaller square error*, 3e-5 for FastEM's 9e-5 at noise 10, as was said
#   above (`deblur` has the least, 1.5e-5).
#
# **At 128x128**, four times the pixels, all pictures are better at noise 5 and 10, and their order stays nearly the
# same; at noise 20 those of the pyramid and of the parallel sampler's default thousand are worse, and `deblur` (an
# older row, see below) is no longer ahead of FastEM. The kernels of EM with PiGDM are alike or better; those of the
# parallel sampler's hundred steps are worse, and those of its default thousand at noise 10 and 20. At noise 10 FastEM's
# thirty steps come within 3.3 (0.6) dB of the known kernel by DPIR (3.4 (0.3) at 64x64), a hundred within 3.1 (0.4),
# MNC 0.80 and 0.77, `deblur` has MNC 0.83, and 0.9 (0.5) dB more than the thirty steps; at noise 5 2.0 (0.6). Four
# samples gain 0.3 (0.1) dB and no likeness, at noise 5 0.4 (0.2) and 0.04 (0.01), at noise 20 0.2 (0.1) and 0.02
# (0.02). A thousand steps of FastEM-DPS lose 2.4 (0.5) dB against a hundred of them, at noise 5 1.5 (0.3). The parallel
# sampler's thousand short steps gain 1.3 (0.8) dB over what was measured, the longer ones lose 2.7 (0.6). At noise 20
# the kernels stay hidden, MNC 0.60 for FastEM and 0.73 for `deblur`; still FastEM comes within 2.5 (0.5) dB of the
# known kernel, and is 9.6 (1.0) dB above the parallel sampler's default thousand, which end 3.9 (0.5) dB below what was
# measured; at noise 5 6.2 (1.1) and 2.5 (1.2) dB. Whole runs with DPS and four samples find no better kernels than with
# one, and their pictures are 3.4 (0.7) and 6.5 (0.8) dB worse than those of FastEM's thirty steps, at noise 5 and 20.
# (At these two levels the thousand short steps and the returns are not measured.)
#
# The rows of `deblur` and of `l0_pyramid` at 128x128 are older than the others: they were measured when `dpir`, their
# last step, still ended at the noise of the measurement, as published. Their kernels are the same. At 64x64 the
# pictures of `deblur` gained 0.2, 0.4 and 1.1 dB at noise 5, 10 and 20 when it came to end below. All rows of `deblur`
# are older than the last thing that it does to a kernel, `refine_kernels`.
#
# ## Back up, and down again
#
# FastEM fits the kernel once at each noise level and never looks back. And its images explain the measurement down to
# the noise: fitted to such an image, the kernel comes out as the one that the image was sampled with, right or wrong.
# DiffEM does look back, but pays for a run from pure noise each time. Neither is needed. Put a *little* noise on the
# image ($t = 150$: what is fine is hidden, the rest stays), come down in six cheap steps under the present kernel
# (DiffPIR, no gradient through the network, and kept closer to the image prior than is best for the picture), fit the
# kernel, and go back up. From what FastEM found above, from no blur with the small denoiser:

# %%
if preset != "ci":
    print("half a minute on two CPU cores")
legs, rounds = {"ci": (1, 2)}.get(preset, (4, 6))
settings = dict(steps=6, start_time=150, backbone="diffpir", regularizer=Annealed(kernel_prior))
began = time.perf_counter()
returned = begun = found["denoiser"]
climb = [mnc(begun.kernel, kernels).tolist()]
for leg in range(legs):
    again = dict(kernel0=returned.kernel, image0=returned.image, seed=seed + leg)
    returned = diffusion_em(y, image_prior, rounds=rounds, **{**common, **again}, **settings)
    climb.append(mnc(returned.kernel, kernels).tolist())
seconds_returned = time.perf_counter() - began
figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for name, values in zip(photos, zip(*climb, strict=True), strict=True):
    axis.plot([rounds * leg for leg in range(legs + 1)], values, "o-", label=name)
axis.set(xlabel="rounds of EM after FastEM", ylabel="kernel: MNC")
axis.legend(fontsize=8)
_ = display.save_figure(figure, "05_fast_diffusion_em_returns.png")
psnr_returned, mnc_returned = scores(returned.image, returned.kernel)
psnr_begun, mnc_begun = scores(begun.image, begun.kernel)
print(f"FastEM from no blur: {psnr_begun:.1f} dB, MNC {mnc_begun:.3f}")
print(f"after {legs * rounds} rounds {psnr_returned:.1f} dB, MNC {mnc_returned:.3f}")
per_step = live["FastEM"].seconds / live["FastEM"].evaluations
print(f"as long as {seconds_returned / per_step:.0f} steps of FastEM")

# %% [markdown]
# The M-step is new, too: `Annealed`, the *diffusion prior* of kernels that was lost in haze above. Four things save
# it. Its noise level falls within each M-step, in units of the kernel's own peak, as in DPIR (arXiv 2008.13751). All
# colour channels speak for the one kernel in one least-squares solve. And nothing is cut before the denoiser has seen
# it: white noise without its negative half is haze, which grows from M-step to M-step. The small denoiser at its one
# low level takes the long faint strokes of a shake for noise; this prior has seen them, and keeps them. And the fourth:
# how much is the prior to weigh? Noise averages out over pixels, what a sampled image gets wrong does not. So the prior
# is weighed against $\sigma^2 + m^2\, n / 64^2$, with $n$ pixels and a misfit $m$ of 0.035. With a weight that was only
# right at noise 0.02, `deblur` found worse kernels on every one of the twenty images at noise 10: MNC 0.76 instead of
# 0.83 at 64x64, and 0.71 instead of 0.85 at 128x128.
#
# The image network is evaluated six times a round, without a gradient, which is cheap; the M-step evaluates that of the
# kernel twelve times. This is how `deblur` finds its kernel, before it refines the best (`refine_kernels`); README has
# its figures on fresh pictures.
#
# ## Play with it
#
# A panel, computed beforehand: photograph, noise, and start. The noise is on the $[-1, 1]$ scale.

# %%
levels = (0.02, 0.08, 0.2)
names = list(photos)[:2]
panel, by_noise = {}, {}
for level in levels:
    noisy = (blur(truth, kernels) + level * noise)[: len(names)]
    for start, settings in {"edges": {}, "no blur": as_published(window)}.items():
        once = fast_em(noisy, image_prior, steps=sizes["panel"], **{**common, "noise_std": level}, **settings)
        by_noise[start, level] = mnc(once.kernel, kernels[: len(names)]).mean().item()
        for i, name in enumerate(names):
            one = slice(i, i + 1)
            panel[name, level, start] = {
                "measurement": noisy[i],
                f"FastEM, {psnr(once.image[one], truth[one], max_shift=4).item():.1f} dB": once.image[i],
                "truth": truth[i],
                f"kernel, MNC {mnc(once.kernel[one], kernels[one]).item():.2f}": once.kernel[i],
                "true kernel": kernels[i],
            }
display.chooser(panel, ["photo", "noise", "start"])

# %% [markdown]
# ## Where it fails
#
# Noise. The kernel is a single answer, not a distribution: when the measurement does not tell it, EM does not say so,
# it returns a kernel with the same confidence. The three levels of the panel, from edges:

# %%
pictures, titles = {}, []
for level in levels:
    for name in names:
        (_, given), (title, x), _, (likeness, k), (_, true_k) = panel[name, level, "edges"].items()
        pictures |= dict(enumerate([given, x, k, true_k], start=len(pictures)))
        titles += [f"noise {level}", title.removeprefix("FastEM, "), likeness.removeprefix("kernel, "), "true"]
figure = display.show(pictures, columns=8, size=1.3)
for axis, title in zip(figure.axes, titles, strict=True):
    axis.set_title(title, fontsize=9)
_ = display.save_figure(figure, "05_fast_diffusion_em_failures.png")
for (start, level), likeness in by_noise.items():
    print(f"from {start:8} noise {level}: MNC {likeness:.2f}")

# %% [markdown]
# Four pictures for each measurement: given, restored, the kernel found, the true one. At 0.02 the kernels are right. At
# 0.08 they lose their faint ends. At 0.2 **both are a single bright pixel**: the answer that nothing was blurred, which
# the start from edges and a denoiser had kept away, and an image that is the given one with the noise taken off. To the
# eye it is a plausible, blurred picture; nothing in the result says that it is wrong. That much noise leaves only the
# low frequencies above it, where the blur has done little. Whether they still tell the blur is another question: in the
# exact model above they do, and EM is merely slow.
#
# Other limits: the blur is circular here, which a photograph's is not (`fast_em(..., boundary="valid")` fills in what
# the sensor did not see, and is how `deblur` finds a kernel); one kernel for all pixels; and one kernel as an answer,
# with no measure of its doubt.

# %%
_ = display.record(
    "05_fast_diffusion_em",
    preset=preset,
    seed=seed,
    agreement=agreement,
    psnr_blurred=psnr_blurred,
    psnr_fast=psnr_fast,
    mnc_fast=mnc_fast,
    **{f"mnc_diff_{case.replace(', ', '_').replace(' ', '_')}": v[0] for case, v in diff_ends.items()},
    mnc_diff_stuck=diff_ends["from no blur, threshold"][1],
    **{f"mnc_alone_{name.replace(', ', '_').replace(' ', '_')}": row[0] for name, row in table.items()},
    **{f"mnc_run_{name.replace(', ', '_').replace(' ', '_')}": row[1] for name, row in table.items()},
    mnc_edges_alone=edges_alone,
    **{f"mnc_from_{start.replace(' ', '_')}_seed_{s}": v[1] for (start, s), v in both.items()},
    **{f"psnr_live_{name}": scores(one.image, one.kernel)[0] for name, one in live.items()},
    **{f"mnc_live_{name}": scores(one.image, one.kernel)[1] for name, one in live.items()},
    mnc_returned=mnc_returned,
    **{f"seconds_live_{name}": one.seconds for name, one in live.items()},
)

# %% [markdown]
# ## Exercises
#
# **1. Longer steps.** On the exact model, noise 0.5 is slow. EM errs on the short side; go twice as far as it says, or
# four times. How many rounds are needed now? Does the likelihood still never fall?
#
# <details><summary>Solution</summary>
#
# In `exact_em`, replace the line that sets `i` by
#
# ```python
#         new = int((pairs * misfit).sum((1, 2)).argmin())
#         i = min(max(i + 4 * (new - i), 0), len(widths) - 1)
# ```
#
# and the rounds to nine tenths of the way become 24, 3 and 1 for noise 0.5, 0.2 and 0.05 (with 2 instead of 4: 51, 6,
# 2). Here the likelihood still rises in each round, but nothing guarantees it any more: beyond EM's own step the bound
# may fall below where it began.
# </details>
#
# **2. More samples.** `fast_em(..., samples=4)` fits one kernel to four runs. Is it better, by more than seeds differ?
#
# <details><summary>Solution</summary>
#
# ```python
# for s in range(3):
#     for n in (1, 4):
#         run = fast_em(y, image_prior, steps=30, samples=n, **{**common, "seed": s})
#         print(s, n, mnc(run.posterior("kernel")[:, 0], kernels))
# ```
#
# Compare the spread over seeds with the difference between rows: on three photographs it takes many seeds to tell.
# </details>
#
# **3. The weight.** Run with `PlugAndPlay(weight=0.1)` and `PlugAndPlay(weight=10.0)`. What does the kernel look like?
#
# <details><summary>Solution</summary>
#
# ```python
# for weight in (0.1, 1.0, 10.0):
#     run = fast_em(y, image_prior, steps=30, regularizer=PlugAndPlay(weight=weight), **common)
#     print(weight, scores(run.image, run.kernel))
# ```
#
# The denoiser is told a noise of $\sqrt{\lambda / \beta}$. Told too little it leaves haze; told too much it takes the
# kernel's faint strokes for noise.
# </details>
#
# ## References
#
# - C. Laroche, A. Almansa, E. Coupeté, *Fast Diffusion EM: a diffusion model for blind inverse problems with
#   application to deconvolution*, WACV 2024, [arXiv 2309.00287](https://arxiv.org/abs/2309.00287).
# - J. Song, A. Vahdat, M. Mardani, J. Kautz, *Pseudoinverse-guided diffusion models for inverse problems* (PiGDM), ICLR
#   2023, [openreview 9_gsMA8MRKQ](https://openreview.net/forum?id=9_gsMA8MRKQ).
# - H. Chung, J. Kim, S. Kim, J. C. Ye, *Parallel Diffusion Models of Operator and Image for Blind Inverse Problems*
#   (BlindDPS), CVPR 2023, [arXiv 2211.10656](https://arxiv.org/abs/2211.10656).
# - H. Chung, J. Kim, M. T. McCann, M. L. Klasky, J. C. Ye, *Diffusion posterior sampling for general noisy inverse
#   problems* (DPS), ICLR 2023, [arXiv 2209.14687](https://arxiv.org/abs/2209.14687).
# - Y. Zhu, K. Zhang, J. Liang, J. Cao, B. Wen, R. Timofte, L. Van Gool, *Denoising diffusion models for plug-and-play
#   image restoration* (DiffPIR), CVPR Workshops 2023, [arXiv 2305.08995](https://arxiv.org/abs/2305.08995).
# - K. Zhang, Y. Li, W. Zuo, L. Zhang, L. Van Gool, R. Timofte, *Plug-and-play image restoration with deep denoiser
#   prior* (DPIR), IEEE TPAMI 2022, [arXiv 2008.13751](https://arxiv.org/abs/2008.13751).
# - S. Mohan, Z. Kadkhodaie, E. P. Simoncelli, C. Fernandez-Granda, *Robust and interpretable blind image denoising via
#   bias-free convolutional neural networks*, ICLR 2020, [arXiv 1906.05478](https://arxiv.org/abs/1906.05478).
# - A. P. Dempster, N. M. Laird, D. B. Rubin, *Maximum likelihood from incomplete data via the EM algorithm*, JRSS B 39,
#   1977.
# - A. Levin, Y. Weiss, F. Durand, W. T. Freeman, *Understanding and evaluating blind deconvolution algorithms*, CVPR
#   2009.
# - N. Ueda, R. Nakano, *Deterministic annealing EM algorithm*, Neural Networks 11, 1998.
# - K. Zhang, W. Zuo, L. Zhang, *FFDNet: toward a fast and flexible solution for CNN-based image denoising*, IEEE TIP
#   2018, [arXiv 1710.04026](https://arxiv.org/abs/1710.04026).
# - L. Xu, S. Zheng, J. Jia, *Unnatural L0 sparse representation for natural image deblurring*, CVPR 2013.
