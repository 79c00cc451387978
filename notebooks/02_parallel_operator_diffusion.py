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
# # Parallel diffusion of image and operator: two priors, one residual
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/blindlib/blindlib/blob/main/notebooks/02_parallel_operator_diffusion.ipynb)
#
# **What you will see.** A photograph was blurred and nobody knows how. Two diffusion models, one of photographs and one
# of blur kernels, start from noise and walk side by side towards a sharp picture *and* the motion that blurred it. We
# write the loop in plain PyTorch, check it against blindlib, repeat the ablations of the paper on a small scale, draw
# several answers to the same question, go back to make them better, and end with measurements on which it goes wrong.
#
# **What you need.** The notebook `01_dps`, where the kernel was known. No GPU: about eight minutes on two CPU cores.

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
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from skimage import data
from tqdm import tqdm

from blindlib import (
    DPS,
    Blur,
    UniformPrior,
    blur_kernels,
    display,
    load_prior,
    mnc,
    motion_kernels,
    psnr,
    sample,
)
from blindlib.deblur import read_image, resize
from blindlib.priors import kernel_to_latent, pick_device

sizes = {
    "ci": {"side": 64, "plain": 12, "main": 20, "ablation": 5, "posterior": (3, 10), "hard": 10, "panel": (3, 5),
           "returns": (1, 5)},
    "cpu": {"side": 64, "plain": 50, "main": 500, "ablation": 100, "posterior": (4, 150), "hard": 150,
            "panel": (50, 100), "returns": (4, 40)},
    "gpu": {"side": 256, "plain": 50, "main": 1000, "ablation": 200, "posterior": (6, 300), "hard": 300,
            "panel": (50, 200), "returns": (6, 60)},
}[preset]  # fmt: skip
side = sizes["side"]
noise_std = 0.02  # on the [-1, 1] scale of our images

# %%
device = pick_device(device)
torch.backends.cudnn.allow_tf32 = False  # full precision on a GPU too: with less, two ways to one number differ


def published(name):
    """A published checkpoint in the folder `models`, if it is there and the preset is of its size."""
    found = [path for path in (Path("models") / name, Path("../models") / name) if path.is_file()]
    return found[0] if found and preset == "gpu" else None


shipped = {name: load_prior(name, device=device) for name in ("image", "kernel")}
priors = dict(shipped)
if published("ffhq_10m.pt") and published("kernel.pt"):
    names = {"image": "ffhq_10m.pt", "kernel": "kernel.pt"}
    priors = {latent: load_prior(published(file), device=device) for latent, file in names.items()}
window = priors["kernel"].shape[1]


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


def scores(image, kernel, true_image, true_kernel):
    """PSNR after the best small shift, in dB, and likeness of the kernels (MNC, 1 is perfect), means over the batch."""
    return psnr(image, true_image, max_shift=4).mean().item(), mnc(kernel, true_kernel).mean().item()


# %% [markdown]
# ## The measurement
#
# $$ y = k * x + n, \qquad n \sim \mathcal N(0, \sigma^2 I), $$
#
# as before, but now $y$ is all we are given. Counting is discouraging: any sharp $x$ with the right $k$ fits, and so
# does $x = y$ with $k$ a single bright pixel, the answer *nothing was blurred*. The measurement cannot choose between
# them. Only knowledge of what photographs and kernels look like can.

# %%
blur = Blur("circular")
noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed)).to(device)
y = blur(truth, kernels) + noise_std * noise

figure = display.show(
    {f"{name}, given": y[i] for i, name in enumerate(photos)}
    | {f"{name}, unknown kernel": kernels[i] for i, name in enumerate(photos)},
    columns=len(photos),
    size=1.8,
)

# %% [markdown]
# ## The idea
#
# **Independent priors.** How a hand shakes has nothing to do with what it photographs, so the prior of the pair is a
# product and the posterior is
#
# $$ p(x, k \mid y) \;\propto\; p(y \mid x, k)\; p(x)\; p(k). $$
#
# **Two reverse diffusions in step.** Each factor gets a diffusion of its own, on the same schedule $\bar\alpha_t$. The
# score of a product is a sum, so each network sees its own noisy variable only and gives its own mean, by Tweedie's
# formula:
#
# $$ \hat x_0 = \mathbb E[x_0 \mid x_t], \qquad \hat k_0 = \mathbb E[k_0 \mid k_t]. $$
#
# **One residual.** They meet in one place, the misfit. Its gradient goes into both
# ([BlindDPS](https://arxiv.org/abs/2211.10656), algorithm 1):
#
# $$ r = y - \hat k_0 * \hat x_0, \qquad
#    x_{t-1} = x'_{t-1} - \alpha\, \nabla_{x_t} \lVert r \rVert, \qquad
#    k_{t-1} = k'_{t-1} - \alpha\, \nabla_{k_t} \lVert r \rVert, $$
#
# where the primes mark the usual reverse steps. With the kernel known the third formula goes away, and DPS is left.
#
# **A kernel as a picture.** Kernels are non-negative and sum to one, so that the pixels of a large one are tiny. For
# its diffusion a kernel is scaled to peak at 1, then to $[-1, 1]$ as images are: $\kappa = 2k / \max(k) - 1$. To blur,
# we go back: $k = (\kappa + 1) / \sum (\kappa + 1)$.
#
# ## What the kernel prior knows
#
# Nobody has a hundred thousand measured kernels, so this prior learned from simulated ones. Run its reverse diffusion
# with no measurement at all, and it should invent kernels that could pass for simulated: strokes, blots, now and then a
# single pixel (nothing was blurred). In a few steps a grey haze stays behind some.


# %%
def invent(prior, n, steps, seed):
    """Samples of a prior, without any measurement."""
    generator = torch.Generator().manual_seed(seed)
    times = prior.schedule.timesteps(steps)
    x = torch.randn(n, *prior.shape, generator=generator).to(prior.device)
    for t, t_prev in zip(times, [*times[1:], -1], strict=True):
        fresh = torch.randn(x.shape, generator=generator).to(x.device)
        with torch.no_grad():
            mean, extra = prior.estimate(x, t)
            x = prior.step(x, mean, t, t_prev, fresh, extra)
    return prior.physical(x)


n = 7
invented = invent(priors["kernel"], n, sizes["plain"], seed)
simulated = blur_kernels(n, window, seed=seed)
figure = display.show(
    {"simulated": simulated[0]}
    | {(0, i): k for i, k in enumerate(simulated[1:])}
    | {"from the prior": invented[0]}
    | {(1, i): k for i, k in enumerate(invented[1:])},
    columns=n,
    size=1.3,
)

# %% [markdown]
# ## The algorithm in plain PyTorch
#
# All of it. Compare with the loop in `01_dps`: what is new is a second variable in every line.
#
# **Fewer steps, longer steps.** The step size in the literature is meant for 1000 steps. With fewer of them we
# multiply it by 1000 / steps, so that the total guidance stays the same; not by more than five, or the first steps
# would overshoot.


# %%
def gain(steps):
    return min(1000 / steps, 5)


def circular_blur(image, kernel):
    height, width = kernel.shape[-2:]
    padded = torch.zeros_like(image[:, :1])
    padded[..., :height, :width] = kernel
    # The kernel's centre belongs at the origin; without this the blur would also shift the image.
    padded = padded.roll((-(height // 2), -(width // 2)), (-2, -1))
    return torch.fft.irfft2(torch.fft.rfft2(image) * torch.fft.rfft2(padded), s=image.shape[-2:])


def to_simplex(kappa):
    positive = (kappa + 1) / 2
    return positive / positive.sum()


def parallel_dps(y, image_prior, kernel_prior, steps, step_size, seed, sparsity=0.0):
    schedule = image_prior.schedule
    times = schedule.timesteps(steps)  # from T - 1 down to 0
    generator = torch.Generator().manual_seed(seed * 1_000_003)  # blindlib's choice: the same noise, the same answer

    def gaussian(shape):
        return torch.randn(shape, generator=generator)[None].to(y.device)

    x, kappa = gaussian(y.shape[1:]), gaussian(kernel_prior.shape)
    for t, t_prev in zip(times, [*times[1:], -1], strict=True):
        noise_x, noise_kappa = gaussian(y.shape[1:]), gaussian(kernel_prior.shape)
        x, kappa = x.detach().requires_grad_(True), kappa.detach().requires_grad_(True)

        # Two priors ...
        x0, kappa0 = image_prior.denoise(x, t), kernel_prior.denoise(kappa, t)
        # ... one residual, whose gradient goes into both.
        k0 = to_simplex(kappa0)
        loss = (y - circular_blur(x0, k0)).norm() + sparsity * k0.abs().sum()  # as released; see the ablations
        gradient_x, gradient_kappa = torch.autograd.grad(loss, (x, kappa))

        # Mean and variance of x_{t_prev} given x_t and x_0: DDPM (arXiv 2006.11239), eq. 7.
        a, a_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)  # the latter is 1 in the last step
        on_x0 = math.sqrt(a_prev) * (1 - a / a_prev) / (1 - a)
        on_xt = math.sqrt(a / a_prev) * (1 - a_prev) / (1 - a)
        std = math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        size = step_size * math.sqrt(a)  # the released code's choice; the paper's is constant
        x = on_x0 * x0 + on_xt * x + std * noise_x - size * gradient_x
        kappa = on_x0 * kappa0 + on_xt * kappa + std * noise_kappa - size * gradient_kappa
    return x.detach().clamp(-1, 1), to_simplex(kappa.detach().clamp(min=-1))


steps = sizes["plain"]
# The shipped priors even on a GPU: published networks learned their variance too, which these lines leave out.
plain_image, plain_kernel = parallel_dps(y[:1], shipped["image"], shipped["kernel"], steps, gain(steps), seed)

# %% [markdown]
# ## The same from blindlib
#
# In `01_dps` the kernel was fixed with `functools.partial`. Take that away and give a prior for it instead: blind is
# non-blind with one more entry in the dictionary. Two implementations must agree, so we insist on it.

# %%
as_released = DPS.released().respaced(steps, side)
library = sample(y[:1], Blur("circular"), shipped, steps=steps, seed=seed, guidance=as_released)
torch.testing.assert_close(plain_image, library.image, atol=1e-3, rtol=0)
torch.testing.assert_close(plain_kernel, library.kernel, atol=1e-3, rtol=0)
agreement = max((plain_image - library.image).abs().max().item(), (plain_kernel - library.kernel).abs().max().item())
print(f"largest difference of any pixel, of image or kernel: {agreement:.1e}")

# %% [markdown]
# ## The experiment
#
# One photograph, a long run. From here on we use the library's default guidance, `DPS()`. It differs in four ways
# from the loop above. Both steps are longer. The kernel *leads*: at any time it carries half the image's noise,
# and is meant to take shape first. Its few bright pixels drown in noise that still leaves a whole image's shapes to be
# seen. The kernel follows the *finite differences* of the residual: photographs
# are strongest at low frequencies, where all kernels look alike, and differences give the fine ones a voice. And the
# kernel's step settles towards the end, since the gradient of a norm keeps its length however small the misfit has
# become.


# %%
if preset != "ci":
    print("about a minute on two CPU cores, or on a GPU at full size")
steps = sizes["main"]
blind = sample(
    y[:1],
    blur,
    priors,
    steps=steps,
    seed=seed,
    guidance=DPS().respaced(steps, side),
    history=min(steps, 40),
    progress=True,
)

# %%
psnr_blurred = psnr(y[:1], truth[:1], max_shift=4).item()
psnr_blind, mnc_blind = scores(blind.image, blind.kernel, truth[:1], kernels[:1])
residual_over_noise = blind.residual.item() / noise_std
figure = display.show(
    {
        f"blurred, {psnr_blurred:.1f} dB": y[0],
        f"restored, {psnr_blind:.1f} dB": blind.image[0],
        "truth": truth[0],
        f"kernel found, MNC {mnc_blind:.2f}": blind.kernel[0],
        "true kernel": kernels[0],
    }
)
_ = display.save_figure(figure, "02_parallel_result.png")
print(f"residual over noise: {residual_over_noise:.2f}")

# %% [markdown]
# **How to score a blind result.** Move the image two pixels left and the kernel two pixels right: the measurement is
# the same. So the PSNR is taken after the best small shift, and the kernels are compared by the *maximum of normalised
# convolution* (MNC), the largest cosine between them over all shifts. A plump blob in the middle already has a
# respectable MNC: look at the picture as well as the number.
#
# ## Coarse to fine, unasked
#
# Classical blind deconvolution climbs a pyramid: estimate the kernel on a tiny image, double the size, refine, again.
# Nobody built a pyramid here, yet there is one. With much noise in $x_t$ the mean $\hat x_0$ over all that is still
# possible is smooth, and it sharpens as the noise falls; so does $\hat k_0$. Watch both estimates:

# %%
every = max(len(blind.history["t"]) // 8, 1)
frames = {name: values[every - 1 :: every] for name, values in blind.history.items()}
figure = display.film(frames)
_ = display.save_figure(figure, "02_parallel_film.png")

# %%
done = [(i + 1) / len(blind.history["t"]) for i in range(len(blind.history["t"]))]
figure, axis = plt.subplots(figsize=(5.5, 2.6), layout="constrained")
of_kernel = mnc(blind.history["kernel"][:, 0], kernels[:1].cpu())
of_image = psnr(blind.history["image"][:, 0], truth[:1].cpu().expand(len(done), -1, -1, -1), max_shift=4)
axis.plot(done, of_kernel, color="tab:blue")
axis.set(xlabel="share of the run", ylabel="kernel: MNC")
axis.yaxis.label.set_color("tab:blue")
other = axis.twinx()
other.plot(done, of_image, color="tab:red")
other.set_ylabel("image: PSNR [dB]", color="tab:red")
settled = []
for curve in (of_kernel, of_image):
    away = (curve - curve[-1]).abs() > 0.1 * (curve.max() - curve.min())
    settled.append(max((d for d, far in zip(done, away.tolist(), strict=True) if far), default=0))
print(
    f"within a tenth of its range of the final value: kernel after {settled[0]:.0%} of the run, image {settled[1]:.0%}"
)

# %% [markdown]
# The paper saw its kernel settle near step 200 of 1000 and its image near 400. Compare with the lines above: which
# of the two is settled first here?
#
# ## The ablations
#
# What is each part good for? The paper asked, and we ask again on a small scale: three photographs in one batch, fewer
# steps with longer strides. Items of a batch do not influence one another.
#
# **(a) Is a prior of the kernel needed?** `UniformPrior` has no opinion: any kernel is as good as any other, and only
# the residual moves it. The paper reports 11.72 dB with a uniform prior against 23.65 dB with its diffusion prior.
#
# **(b) Sparsity.** The paper adds $\lambda \lVert k \rVert_1$ to the residual, because kernels of motion are mostly
# black. On which $k$ matters more than it seems. After division by its sum, every kernel has
# $\lVert k \rVert_1 = \sum k = 1$. What is constant has no gradient:

# %%
# NBVAL_CHECK_OUTPUT
# A little grey everywhere: at zero the absolute value has a corner and autograd picks a slope of its own.
kappa = (0.9 * kernel_to_latent(motion_kernels(1, 32, seed=0))).requires_grad_(True)
peak_one = (kappa + 1) / 2
for name, k in {"peak one": peak_one, "sum one": peak_one / peak_one.sum()}.items():
    l1 = k.abs().sum()
    (gradient,) = torch.autograd.grad(l1, kappa, retain_graph=True)
    print(f"{name:9} l1 norm {l1.item():3.0f}, largest gradient {gradient.abs().max().item():.4f}")

# %% [markdown]
# The released code takes the norm after the division. There $\lambda$ does nothing, whatever its value: the run is the
# one with $\lambda = 0$. Our loop above has it so; try it:

# %%
few = min(sizes["plain"], 20)
fewer = partial(parallel_dps, y[:1], shipped["image"], shipped["kernel"], few, gain(few), seed)
_, k_without = fewer()
for weight in (0.1, 1.0, 5.0):
    _, k_released = fewer(sparsity=weight)
    torch.testing.assert_close(k_released, k_without, atol=1e-3, rtol=0)
    print(f"sparsity as released, weight {weight}: kernel changed by {(k_released - k_without).abs().max().item():.0e}")

# %% [markdown]
# blindlib takes it before, on the kernel of peak one, which is what the paper means, and we try
# $\lambda = 0, 0.1, 1, 5$.
#
# **(c) The step**: constant or growing with $\sqrt{\bar\alpha_t}$, of one size (`DPS.released`, which is growing, and
# the same held constant). Then what goes with it in each: in the paper it is constant and smaller (`DPS.paper()`), and
# the library's default (`DPS()`), which is the case $\lambda = 0$ of (b), has sizes of its own.
#
# **(d) Who goes first?** The default with and without the kernel's lead.

# %%
diffusion, uniform = priors, priors | {"kernel": UniformPrior("kernel", window, device=device)}
cases = {
    "default": (diffusion, DPS()),
    "no_lead": (diffusion, DPS(lead={})),
    "sparsity_0.1": (diffusion, DPS(sparsity={"kernel": 0.1})),
    "sparsity_1": (diffusion, DPS(sparsity={"kernel": 1.0})),
    "sparsity_5": (diffusion, DPS(sparsity={"kernel": 5.0})),
    "released": (diffusion, DPS.released()),
    "constant": (diffusion, DPS.released(growing=False)),
    "paper": (diffusion, DPS.paper()),
    "uniform": (uniform, DPS.released()),
}
if preset != "ci":
    print("two to three minutes on two CPU cores, or on a GPU at full size")
steps = sizes["ablation"]
ablation = {}
for name, (chosen, guidance) in tqdm(cases.items(), "ablations"):
    try:
        ablation[name] = sample(y, blur, chosen, steps=steps, seed=seed, guidance=guidance.respaced(steps, side))
    except ArithmeticError as error:  # a step that is too long is a result too
        print(f"{name}: {error}")

# %%
table = {name: scores(result.image, result.kernel, truth, kernels) for name, result in ablation.items()}
comparisons = {
    "(a) prior of the kernel": {"diffusion": "released", "uniform": "uniform"},
    "(b) sparsity": {"0": "default", "0.1": "sparsity_0.1", "1": "sparsity_1", "5": "sparsity_5"},
    "(c) step": {"growing": "released", "constant": "constant", "paper's": "paper", "default": "default"},
    "(d) the kernel leads": {"no": "no_lead", "yes": "default"},
}
print(f"{'means over three photographs':34}  PSNR    MNC  residual / noise")
print(f"{'blurred':34} {psnr(y, truth, max_shift=4).mean().item():5.2f}")
for title, rows in comparisons.items():
    for label, name in rows.items():
        if name in table:
            left = ablation[name].residual.mean().item() / noise_std
            print(f"{title:24} {label:9} {table[name][0]:5.2f}  {table[name][1]:.3f}  {left:8.2f}")
    here = [name for name in rows.values() if name in table]
    labels = {name: label for label, name in rows.items()}
    best = [labels[max(here, key=lambda name, which=which: table[name][which])] for which in (0, 1)]
    print(f"{'':24} best PSNR: {best[0]}; best MNC: {best[1]}")

# %%
grid = {"truth": kernels[0]} | {name: result.kernel[0] for name, result in ablation.items()}
for i in range(1, len(photos)):
    grid |= {(i, "truth"): kernels[i]} | {(i, name): result.kernel[i] for name, result in ablation.items()}
figure = display.show(grid, columns=1 + len(ablation), size=1.25)
_ = display.save_figure(figure, "02_parallel_ablations.png")

figure = display.show(
    {"truth": truth[0]} | {name: result.image[0] for name, result in ablation.items()},
    columns=1 + len(ablation),
    size=1.25,
)

# %% [markdown]
# Three photographs decide nothing by a tenth of a dB, and at a hundred steps hardly any run is above the blurred
# pictures' 20.3 dB; every residual is about twice the noise or more. Compare the rows, do not admire them.
#
# - **(a)** With a uniform prior the kernel is grey all over (last column) and the residual stays at nine times the
#   noise: the kernel is not overfitted, it is never found. Here the paper's answer is ours.
# - **(b)** Sparsity hurts our kernels at every $\lambda$. At 0.1 they break into points (MNC 0.86 to 0.65), though the
#   pictures, nearer to $y$, score higher; at 1 the astronaut's is a single pixel. The paper found the opposite, MNC
#   0.929 without and 0.957 from $\lambda = 0.1$ on. Our prior has seen thin and broken strokes, and the step that
#   multiplies $\lambda$ is up to ten here, 0.3 in the paper.
# - **(c)** Of one size, the growing step beats the constant one by two decibels and 0.10 of MNC: while the estimates
#   are coarse, a step as long as the later ones leads astray. The paper's is constant and smaller, and a hundred of
#   them leave as much of the measurement unexplained. The library's finds the best kernels, the released one as good
#   pictures.
# - **(d)** On these three the lead gains nothing: 0.8 dB less, and kernels that are alike.
#
# ## Several answers to one question
#
# Each run with fresh noise is another sample from the posterior, or as near to one as the guidance gets. With
# `samples=n` they run as one batch.

# %%
count, steps = sizes["posterior"]
if preset != "ci":
    print("about a minute on two CPU cores, less on a GPU at full size")
several = sample(
    y[:1], blur, priors, steps=steps, seed=seed, guidance=DPS().respaced(steps, side), samples=count, progress=True
)

# %% [markdown]
# Before asking where they disagree, take out what is no disagreement: samples whose images are shifted, and whose
# kernels are shifted back, say the same. As the boundary is circular, a shift is a `roll`, and we align them all with
# the one of the smallest residual.


# %%
def aligned(image, kernel, ref, reach=4):
    """Image and kernel, both (C, H, W), shifted against each other so that the image fits `ref` best."""
    shifts = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
    dy, dx = min(shifts, key=lambda s: (image.roll(s, (-2, -1)) - ref).square().mean().item())
    return image.roll((dy, dx), (-2, -1)), kernel.roll((-dy, -dx), (-2, -1))


best = several.residual.argmin().item()
pairs = [aligned(x, k, several.image[best]) for x, k in zip(several.image, several.kernel, strict=True)]
images, found = (torch.stack(part) for part in zip(*pairs, strict=True))
each_psnr = psnr(images, truth[:1].expand_as(images), max_shift=4)
each_mnc = mnc(found, kernels[:1])

figure = plt.figure(figsize=(9.5, 4), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(count, 2.1))
axes = left.subplots(2, count, squeeze=False)
for i in range(count):
    axes[0, i].imshow(display.picture(images[i]), interpolation="nearest")
    axes[1, i].imshow(display.picture(found[i]), cmap="gray", interpolation="nearest")
    mark = "\nlowest" if i == best else "\n"
    axes[0, i].set_title(f"residual / noise\n{several.residual[i].item() / noise_std:.2f}{mark}", fontsize=8)
    axes[1, i].set_title(f"{each_psnr[i].item():.1f} dB, {each_mnc[i].item():.2f}", fontsize=8)
for axis in axes.flat:
    axis.axis("off")
below = right.subplots(2, 1)
spread = below[0].imshow(display.spread(images)[0], cmap="magma", vmin=0)
below[0].set_title("std of the images", fontsize=8)
right.colorbar(spread, ax=below[0], shrink=0.8)
spread = below[1].imshow(display.spread(found)[0], cmap="magma", vmin=0)
below[1].set_title("std of the kernels", fontsize=8)
right.colorbar(spread, ax=below[1], shrink=0.8, format="%.3f")
for axis in below:
    axis.axis("off")
_ = display.save_figure(figure, "02_parallel_samples.png")

print(f"PSNR of the sample with the lowest residual {each_psnr[best].item():.1f} dB; of all of them")
print(f"mean {each_psnr.mean().item():.1f}, best {each_psnr.max().item():.1f}, worst {each_psnr.min().item():.1f} dB")

# %% [markdown]
# Where the kernels agree, the images agree, and what remains is doubt about edges and texture. Here all four have
# climbed the same hill. Where kernels differ, images differ as wholes: the posterior has several hills.
#
# **The residual as a way to choose.** It needs no truth. A run that ended on a wrong hill often cannot explain the
# measurement: throw it away, draw another. But the residual can reject, it cannot rank. Our four all leave 2.2 times
# the noise, a mark of 150 steps and not of their kernels (the long run above leaves 1.48), they differ by 0.03, and the
# smallest belongs to the worst picture. `deblur` asks a harder question of each kernel: restore the photograph with it
# anew, strictly by the image's prior, and see what is left then (`blindlib.deblur.unexplained`).
#
# ## Back up, and down again
#
# A run from noise decides what is coarse on its first rough estimates, and cannot take it back. Unless one lets it: add
# the noise of an earlier time to where it ended, for image and kernel alike, and come down again ("time travel", from
# RePaint, arXiv 2201.09865). What is coarser than that noise stays; what is finer is drawn anew, each latent now beside
# a better partner. `sample` takes the times of its steps instead of their number, and where these rise, it goes back
# up. Here from the samples above, each with a few such trips:

# %%
trips, length = sizes["returns"]
if preset != "ci":
    print("about a minute on two CPU cores, less on a GPU at full size")
down = priors["image"].schedule.timesteps(length, first=300)
returned = sample(
    y[:1].expand(count, -1, -1, -1), blur, priors, steps=trips * down, seed=list(range(seed + 1, seed + 1 + count)),
    start={"image": several.image, "kernel": kernel_to_latent(several.kernel)}, start_time=300,
    guidance=DPS().respaced(300, side), history=trips, progress=True,
)  # fmt: skip

figure, axis = plt.subplots(figsize=(5.5, 2.6), layout="constrained")
for i in range(count):
    later = mnc(returned.history["kernel"][:, i], kernels[:1].cpu())
    axis.plot(range(trips + 1), [each_mnc[i].item(), *later.tolist()], "o-", label=f"sample {i}")
axis.set(xlabel=f"returns to t = 300, {length} steps each", ylabel="kernel: MNC", xticks=range(trips + 1))
axis.legend(fontsize=8, ncols=2)
_ = display.save_figure(figure, "02_parallel_returns.png")
psnr_returned, mnc_returned = scores(returned.image, returned.kernel, truth[:1].expand_as(returned.image), kernels[:1])
print(f"mean of the {count} samples: {each_psnr.mean().item():.1f} dB, MNC {each_mnc.mean().item():.2f};")
print(f"after {trips} returns {psnr_returned:.1f} dB, MNC {mnc_returned:.2f}")

# %% [markdown]
# The kernels come closer to one another and, on the whole, to the truth. The pictures gain more, but part of that is
# the trips' own: their steps are dense where details settle. A sample that had been lucky is not kept. Whatever the
# noise of $t = 300$ hides is drawn anew each time, from where the run happens to be: a Markov chain, which forgets its
# beginning if it is long enough. That is its use, but it is no way out of every wrong valley: README compares what a
# thousand steps find with `deblur`, which goes back two dozen times, to $t = 150$, with the image alone: it fits the
# kernel to each picture that comes out (notebook 05).
#
# ## Play with it
#
# The run of the experiment, frame by frame:

# %%
display.scrubber(blind.history)

# %% [markdown]
# And a panel, computed beforehand so that no control waits: choose photograph, shake, noise and number of steps. Does
# a larger kernel need more steps? Which of the two suffers more from noise, image or kernel?

# %%
if preset != "ci":
    print("about a minute on two CPU cores, less on a GPU at full size")
names, shakes, levels = list(photos)[1:], ["small", "large"], [0.02, 0.1]
small = motion_kernels(1, window, extent=(0.15, 0.2), seed=seed + 1)
large = motion_kernels(1, window, extent=(0.55, 0.6), seed=seed + 1)
keys = [(name, shake, level) for name in names for shake in shakes for level in levels]
clean = torch.cat([photos[name] for name, _, _ in keys]).to(device)
moved = torch.cat([small if shake == "small" else large for _, shake, _ in keys]).to(device)
level = torch.tensor([level for _, _, level in keys], device=device)[:, None, None, None]
fresh = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed + 1)).to(device)
measured = blur(clean, moved) + level * fresh
panel = {}
for steps in tqdm(sizes["panel"], "numbers of steps"):
    batch = sample(measured, blur, priors, steps=steps, seed=seed, guidance=DPS().respaced(steps, side))
    for i, key in enumerate(keys):
        one = slice(i, i + 1)
        db, likeness = scores(batch.image[one], batch.kernel[one], clean[one], moved[one])
        panel[(*key, steps)] = {
            "measurement": measured[i],
            f"restored, {db:.1f} dB": batch.image[i],
            "truth": clean[i],
            f"kernel found, MNC {likeness:.2f}": batch.kernel[i],
            "true kernel": moved[i],
        }
display.chooser(panel, ["photo", "shake", "noise", "steps"])

# %% [markdown]
# ## Where it fails
#
# Three measurements that break an assumption each, in one batch:
#
# - **Nothing to see the blur by**: a piece of sky. A flat picture looks the same under every kernel.
# - **Overexposure**: the sensor clips. Highlights in $y$ are no longer $k * x$, whatever $k$ and $x$ are.
# - **A kernel larger than the prior's window**: the truth is not among the candidates.

# %%
if preset != "ci":
    print("half a minute on two CPU cores, or on a GPU at full size")
sky = photograph(data.rocket(), 0, 288, 128).to(device)
bright = 1.6 * (truth[:1] + 1) - 1  # light, as it falls in: some of it above what the sensor can tell
wide = motion_kernels(1, min(2 * window, side), extent=(0.85, 0.95), seed=seed).to(device)

clean = torch.cat([sky, bright.clamp(-1, 1), truth[1:2]])
true_kernels = [kernels[:1], kernels[:1], wide]
hard = torch.cat([blur(x, k) for x, k in zip((sky, bright, truth[1:2]), true_kernels, strict=True)])
hard = (hard + noise_std * noise).clamp(-1, 1)
steps = sizes["hard"]
broken = sample(hard, blur, priors, steps=steps, seed=seed, guidance=DPS().respaced(steps, side), progress=True)

# %%
pictures = {}
for i, name in enumerate(("sky", "overexposed", "large kernel")):
    one, gap = slice(i, i + 1), " " * i  # titles are keys: gaps keep them apart
    margin = (true_kernels[i].shape[-1] - window) // 2  # so that both kernels are drawn in one scale
    before = psnr(hard[one], clean[one], max_shift=4).item()
    db, likeness = scores(broken.image[one], broken.kernel[one], clean[one], true_kernels[i])
    pictures |= {
        f"{name}: {before:.1f} dB": hard[i],
        f"restored: {db:.1f} dB{gap}": broken.image[i],
        f"truth{gap}": clean[i],
        f"found: MNC {likeness:.2f}{gap}": torch.nn.functional.pad(broken.kernel[i], 4 * (margin,)),
        f"true kernel{gap}": true_kernels[i],
    }
    print(f"{name:13} residual over noise {broken.residual[i].item() / noise_std:.2f}")
figure = display.show(pictures, columns=5, size=1.7)

# %% [markdown]
# A smooth picture hardly changes under any blur, so almost any kernel explains the sky: the one shown owes more to the
# prior than to the measurement, and the picture has lost seven decibels to texture that nobody saw. In the other two
# the forward model itself is false: no image under a kernel of that window explains $y$, and the image has to take up
# as ringing and ghosts what the kernel cannot. Does the residual raise the alarm? Not here: at 150 steps every run
# leaves about 2.2 times the noise, good or bad, and these three fail in silence. The cures: read the kernel from a
# textured part of the photograph, leave clipped pixels out of the residual (exercise 2), and take a window that is
# large enough, or a smaller photograph.

# %%
_ = display.record(
    "02_parallel_operator_diffusion",
    preset=preset,
    seed=seed,
    psnr_blurred=psnr_blurred,
    psnr_blind=psnr_blind,
    mnc_blind=mnc_blind,
    residual_over_noise=residual_over_noise,
    agreement=agreement,
    psnr_lowest_residual=each_psnr[best].item(),
    psnr_mean_of_samples=each_psnr.mean().item(),
    psnr_returned=psnr_returned,
    mnc_returned=mnc_returned,
    **{f"psnr_{name}": db for name, (db, _) in table.items()},
    **{f"mnc_{name}": likeness for name, (_, likeness) in table.items()},
)

# %% [markdown]
# ## Exercises
#
# **1. A head start for the kernel.** Sampling starts both latents from noise and moves them in step. Suppose that you
# have a rough guess of the kernel. How would you start its diffusion from there, and what does the schedule say about
# how rough the guess may be?
#
# <details><summary>Solution</summary>
#
# Put noise on the guess: with $\kappa$ its diffusion variable, start at a time $s < T - 1$ with
# $\kappa_s = \sqrt{\bar\alpha_s}\, \kappa + \sqrt{1 - \bar\alpha_s}\, \varepsilon$, and do the same with $y$ in place
# of the image.
#
# ```python
# s = 600
# kappa = kernel_to_latent(guess)
# kappa_s = shipped["kernel"].schedule.diffuse(kappa, torch.tensor([s], device=device), torch.randn_like(kappa))
# ```
#
# In `parallel_dps`, keep only the times up to `s` and start from it (`sample` does so when it is given `start` and
# `start_time`). Errors of the guess whose norm over all its pixels is below
# $\sqrt{(1 - \bar\alpha_s) / \bar\alpha_s}$ are drowned and forgotten; larger ones can still be seen, and may be
# believed (notebook 03).
# </details>
#
# **2. Leave out what was clipped.** Write an operator that ignores saturated pixels, and run it on the overexposed
# measurement.
#
# <details><summary>Solution</summary>
#
# Any callable that takes `image` and `kernel` is an operator. Where the sensor clipped, let it repeat the measurement,
# so that the residual is zero and has no gradient:
#
# ```python
# clipped = hard[1:2] >= 0.99
#
# def unclipped(image, kernel):
#     return torch.where(clipped, hard[1:2], blur(image, kernel))
#
# again = sample(hard[1:2], unclipped, priors, steps=150, seed=seed, guidance=DPS().respaced(150, side))
# display.show({"with all pixels": broken.image[1], "without clipped ones": again.image[0], "truth": bright[0]})
# ```
#
# The image prior still ends at 1, so the highlights cannot be as bright as they were; near their rims the model stays
# wrong. How much is gained?
# </details>
#
# **3. No blur.** The pair $x = y$, $k$ = one bright pixel, fits exactly: its residual is zero, less even than the
# noise. Classical methods that maximise $p(x, k \mid y)$ often end there. Why should a *sampler* do so less often?
#
# <details><summary>Solution</summary>
#
# The pair is a good fit, and priors that merely like smooth images prefer the blurred one. Two things have changed. The
# image prior learned from sharp photographs, so a blurred one is improbable under it. And a sampler goes where the
# *mass* of the posterior is: a narrow peak attracts a maximiser however little mass lies beneath it. Try it: sample
# from `kernels` replaced by a single bright pixel, and see whether the answer is no blur when there was none.
#
# ```python
# pixel = torch.zeros_like(kernels[:1])
# pixel[..., window // 2, window // 2] = 1
# unblurred = truth[:1] + noise_std * noise[:1]
# result = sample(unblurred, blur, priors, steps=250, seed=seed, guidance=DPS().respaced(250, side))
# print(mnc(result.kernel, pixel))
# ```
# </details>
#
# **4. Differences or pixels?** The library's default guides the kernel by the residual's finite differences and lets
# its step settle. Which of the two matters? And is a lead of 4 better than one of 2?
#
# <details><summary>Solution</summary>
#
# ```python
# variants = {
#     "both": DPS(),
#     "differences only": DPS(settling=()),
#     "settling only": DPS(edges=()),
#     "neither": DPS(settling=(), edges=()),
#     "larger lead": DPS(lead={"kernel": 4.0}),
# }
# for name, guidance in variants.items():
#     result = sample(y, blur, priors, steps=200, seed=seed, guidance=guidance.respaced(200, side))
#     print(name, scores(result.image, result.kernel, truth, kernels))
# ```
#
# The gradient of the differences' norm has another length than that of the pixels', so for a fair answer the kernel's
# step size has to be sought anew in each case: `step_size={"image": 20 / 3, "kernel": ...}`.
# </details>
#
# ## References
#
# - H. Chung, J. Kim, S. Kim, J. C. Ye, *Parallel Diffusion Models of Operator and Image for Blind Inverse Problems*
#   (BlindDPS), CVPR 2023, [arXiv 2211.10656](https://arxiv.org/abs/2211.10656).
# - H. Chung, J. Kim, M. T. McCann, M. L. Klasky, J. C. Ye, *Diffusion Posterior Sampling for General Noisy Inverse
#   Problems*, ICLR 2023, [arXiv 2209.14687](https://arxiv.org/abs/2209.14687).
# - J. Ho, A. Jain, P. Abbeel, *Denoising Diffusion Probabilistic Models*, NeurIPS 2020,
#   [arXiv 2006.11239](https://arxiv.org/abs/2006.11239).
# - A. Levin, Y. Weiss, F. Durand, W. T. Freeman, *Understanding and evaluating blind deconvolution algorithms*, CVPR
#   2009.
# - Z. Hu, M.-H. Yang, *Good Regions to Deblur*, ECCV 2012 (the MNC).
