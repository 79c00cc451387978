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
# # Diffusion posterior sampling: the known kernel
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/blindlib/blindlib/blob/main/notebooks/01_dps.ipynb)
#
# **What you will see.** A photograph was blurred, and for once we know by which kernel. A diffusion model, which only
# ever learned to take noise out of pictures, is turned into a deblurring method by one extra line in its sampling loop.
# We write that loop in plain PyTorch, check it against blindlib, and then ask what a careful user asks: how large is
# the step, how far do two answers differ, and when does it go wrong?
#
# **What you need.** Some PyTorch, Gaussian densities and Bayes' rule. No GPU: a few minutes on two CPU cores.

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
    DiffPIR,
    GaussianPrior,
    LinearLight,
    PiGDM,
    display,
    dpir,
    load_prior,
    motion_kernels,
    psnr,
    sample,
)
from blindlib.deblur import expected_error, read_image, resize, restore
from blindlib.metrics import error_over_spread, ranks
from blindlib.priors import pick_device

# Fewer steps take larger strides. The gradient of a norm has the same length at every image size, so that the same
# change of each pixel needs a step size that grows with the side.
sizes = {
    "ci": {"side": 32, "steps": 20, "step_size": 10.0, "proximal_steps": 20, "samples": 3},
    "cpu": {"side": 64, "steps": 200, "step_size": 4.0, "proximal_steps": 50, "samples": 5},
    "gpu": {"side": 256, "steps": 500, "step_size": 3.0, "proximal_steps": 100, "samples": 8},
}[preset]
side, steps, step_size = sizes["side"], sizes["steps"], sizes["step_size"]
noise_std = 0.05  # on the [-1, 1] scale of our images

# %%
device = pick_device(device)
torch.backends.cudnn.allow_tf32 = False  # full precision on a GPU too: with less, two ways to one number differ

shipped = load_prior("image", device=device)
faces = [path for path in (Path("models/ffhq_10m.pt"), Path("../models/ffhq_10m.pt")) if path.is_file()]
prior = load_prior(faces[0], device=device) if preset == "gpu" and faces else shipped


def photograph(pixels, top, left, length):
    """A square part of a photograph as a tensor (1, 3, side, side) in [-1, 1]."""
    return resize(read_image(pixels[top : top + length, left : left + length]), side)


photos = {
    "astronaut": photograph(data.astronaut(), 0, 100, 256),
    "cat": photograph(data.chelsea(), 20, 100, 256),
    "coffee": photograph(data.coffee(), 40, 150, 320),
}
truth = torch.cat(list(photos.values())).to(device)
kernel = motion_kernels(1, side // 2, seed=seed).to(device)

# %% [markdown]
# ## The measurement
#
# The camera shook while the shutter was open. Every pixel collected light along a path, the *kernel* $k$, and the
# sensor added noise:
#
# $$ y = k * x + n, \qquad n \sim \mathcal N(0, \sigma^2 I). $$
#
# We write $A x = k * x$ and let the image continue on its opposite side (a *circular* boundary), because the
# convolution is then a product of Fourier transforms. Undoing it is ill-posed: where the transform of $k$ is near zero,
# the measurement holds noise and nothing else. Something must fill in what is missing. That is the prior's task.

# %%
blur = partial(Blur("circular"), kernel=kernel)
noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed)).to(device)
y = blur(truth) + noise_std * noise

impulse = torch.zeros_like(y[:1])
impulse[..., 0, 0] = 1
naive = torch.fft.irfft2(torch.fft.rfft2(y[:1]) / torch.fft.rfft2(blur(impulse)), s=y.shape[-2:])

figure = display.show({"truth x": truth[:1], "kernel k": kernel, "measurement y": y[:1], "y divided by k": naive})

# %% [markdown]
# The picture on the right divides the two transforms, with no prior at all: the noise, blown up where the kernel's
# transform is small, covers everything.
#
# ## The idea
#
# **A diffusion model knows the score.** The variance-preserving diffusion drowns an image in noise,
#
# $$ x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \varepsilon,
#    \qquad \varepsilon \sim \mathcal N(0, I), $$
#
# where $\bar\alpha_t$ falls from almost 1 at $t = 0$ to almost 0 at the end, $t = T - 1$. A network trained to take
# the noise out again gives, at its best, the mean of all clean images that could have led to $x_t$. *Tweedie's
# formula* says that this mean is the score of the noisy images, in other clothes:
#
# $$ \hat x_0(x_t) = \mathbb E[x_0 \mid x_t]
#    = \frac{x_t + (1 - \bar\alpha_t)\, \nabla \log p(x_t)}{\sqrt{\bar\alpha_t}}. $$
#
# Here is $\hat x_0$ for one image at several $t$. Look at the lower row from right to left: with much noise the mean
# over all candidates is a blur of colours; as the noise falls, shapes come first and fine detail last.

# %%
times = [int(share * (len(prior.schedule) - 1)) for share in (0.05, 0.2, 0.4, 0.6, 0.8)]
epsilon = torch.randn(truth[:1].shape, generator=torch.Generator().manual_seed(seed + 1)).to(device)
noisy = {t: prior.schedule.diffuse(truth[:1], torch.tensor([t], device=device), epsilon) for t in times}
with torch.no_grad():
    means = {t: prior.denoise(x_t, t) for t, x_t in noisy.items()}

figure = display.show(
    {f"$x_t$, t = {t}": x_t for t, x_t in noisy.items()}
    | {rf"$\hat x_0$, {psnr(mean, truth[:1]).item():.1f} dB (t = {t})": mean for t, mean in means.items()},
    columns=len(times),
    size=1.5,
)

# %% [markdown]
# **A measurement bends the score.** Sampling starts at pure noise and walks back to $t = 0$; each step needs the
# score of the noisy images alone. To sample from the *posterior* we need the score given $y$, and Bayes' rule splits
# it:
#
# $$ \nabla_{x_t} \log p(x_t \mid y) = \underbrace{\nabla_{x_t} \log p(x_t)}_{\text{the network}}
#    + \underbrace{\nabla_{x_t} \log p(y \mid x_t)}_{\text{the guidance}}. $$
#
# The last term is the hard one. $y$ was made from the clean image, not from $x_t$, so
#
# $$ p(y \mid x_t) = \int p(y \mid x_0)\, p(x_0 \mid x_t)\, \mathrm d x_0
#    \;\approx\; p\big(y \mid \hat x_0(x_t)\big). $$
#
# The approximation is **DPS** ([Chung et al.](https://arxiv.org/abs/2209.14687)): all the clean images that $x_t$
# allows are replaced by their mean. It is exact when only one image is allowed (little noise left) and crude when
# many are (early in the run). For Gaussian noise,
#
# $$ \nabla_{x_t} \log p(y \mid x_t) \approx -\frac{1}{2\sigma^2} \nabla_{x_t} \lVert y - A \hat x_0(x_t) \rVert^2. $$
#
# With the true weight $1/2\sigma^2$ the early steps, whose residuals are large and whose approximation is poor, would
# tear the image apart. So the paper divides by the residual's norm. As
# $\nabla \lVert r \rVert^2 = 2 \lVert r \rVert \, \nabla \lVert r \rVert$, that leaves the gradient of the *norm*:
#
# $$ x_{t-1} = \underbrace{x'_{t-1}}_{\text{the usual reverse step}}
#    - \;\alpha \,\nabla_{x_t} \lVert y - A \hat x_0(x_t) \rVert. $$
#
# The gradient runs back through the network. The step size $\alpha$ has lost its link to $\sigma$: it has to be
# chosen, and we shall see how much hangs on it. The authors' code for the blind case multiplies it by
# $\sqrt{\bar\alpha_t}$, small steps while $\hat x_0$ is coarse, and so do we.
#
# ## The algorithm in plain PyTorch
#
# All of it, the blur included. The prior is asked for one thing only: `prior.denoise(x, t)`, which is $\hat x_0$.


# %%
def circular_blur(image, kernel):
    height, width = kernel.shape[-2:]
    padded = torch.zeros_like(image[:, :1])
    padded[..., :height, :width] = kernel
    # The kernel's centre belongs at the origin; without this the blur would also shift the image.
    padded = padded.roll((-(height // 2), -(width // 2)), (-2, -1))
    return torch.fft.irfft2(torch.fft.rfft2(image) * torch.fft.rfft2(padded), s=image.shape[-2:])


def dps(y, kernel, prior, steps, step_size, seed):
    times = prior.schedule.timesteps(steps)  # from T - 1 down to 0
    generator = torch.Generator().manual_seed(seed * 1_000_003)  # blindlib's choice: the same noise, the same answer

    def gaussian():
        return torch.randn(y.shape[1:], generator=generator)[None].to(y.device)

    x = gaussian()
    for t, t_prev in zip(times, [*times[1:], -1], strict=True):
        noise = gaussian()
        a, a_prev = prior.schedule.alpha_bar(t), prior.schedule.alpha_bar(t_prev)  # the latter is 1 in the last step
        alpha = a / a_prev

        x = x.detach().requires_grad_(True)
        x0 = prior.denoise(x, t)
        norm = (y - circular_blur(x0, kernel)).norm()
        (gradient,) = torch.autograd.grad(norm, x)

        # Mean and variance of x_{t_prev} given x_t and x_0: DDPM (arXiv 2006.11239), eq. 7.
        mean = math.sqrt(a_prev) * (1 - alpha) / (1 - a) * x0 + math.sqrt(alpha) * (1 - a_prev) / (1 - a) * x
        variance = (1 - a_prev) / (1 - a) * (1 - alpha)
        x = mean + math.sqrt(variance) * noise - step_size * math.sqrt(a) * gradient
    return x.detach().clamp(-1, 1)


print({"ci": "some seconds", "cpu": "about ten seconds", "gpu": "a minute or two"}[preset], "...")
# The shipped prior even on a GPU: published networks learned their variance too, which these lines leave out.
plain = dps(y[:1], kernel, shipped, steps, step_size, seed)
print(f"PSNR {psnr(y[:1], truth[:1]).item():.1f} dB blurred, {psnr(plain, truth[:1]).item():.1f} dB restored")

# %% [markdown]
# How much of the photograph is left in $x_t$ at a few of the times that the loop passes:

# %%
# NBVAL_CHECK_OUTPUT
for t in (999, 300, 100, 20, 0):
    a = prior.schedule.alpha_bar(t)
    print(f"t = {t:3d}: x_t = {math.sqrt(a):.3f} x_0 + {math.sqrt(1 - a):.3f} noise")

# %% [markdown]
# ## The same from blindlib
#
# `sample` takes the measurement, the operator, and a prior for each unknown. What is known is fixed with
# `functools.partial`: here the kernel, so that the image alone is sought. `guidance` says what happens in a step;
# `DPS.released` is the variant that we have just written. Two implementations must agree, so we insist on it.

# %%
library = sample(
    y[:1], blur, {"image": shipped}, steps=steps, seed=seed, guidance=DPS.released(step_size=step_size), history=8
)
agreement = (plain - library.image).abs().max().item()
torch.testing.assert_close(plain, library.image, atol=1e-3, rtol=0)
print(f"largest difference of any pixel: {agreement:.1e}")

# %% [markdown]
# The run, frame by frame, as its estimate $\hat x_0$: what the low frequencies of $y$ say is settled early, edges late.

# %%
figure = display.film(library.history, ["image"])

# %% [markdown]
# ## The experiment
#
# Three photographs, and a second method to compare with. **DiffPIR** ([Zhu et al.](https://arxiv.org/abs/2305.08995))
# takes no gradient through the network. It corrects the estimate $\hat x_0$ itself, by a *proximal* step
#
# $$ \hat x_0^{\,y} = \arg\min_x \; \lVert y - A x \rVert^2 + \rho_t \lVert x - \hat x_0 \rVert^2,
#    \qquad \rho_t = \lambda \sigma^2 \, \frac{\bar\alpha_t}{1 - \bar\alpha_t}, $$
#
# and puts noise back on for the next, smaller $t$. For a circular blur the minimiser is one division in Fourier
# space. Unlike DPS it knows the noise level $\sigma$, and it makes do with fewer steps; but it needs an operator that
# is known, linear, and easy to solve for. DPS wants a gradient, no more.

# %%
if preset != "ci":
    print("half a minute to a minute on two CPU cores; on a GPU a few minutes at full size")
unknown = {"image": prior}
guided = sample(
    y, blur, unknown, steps=steps, seed=seed, guidance=DPS.released(step_size=step_size), history=20, progress=True
)
proximal = sample(y, blur, unknown, steps=sizes["proximal_steps"], seed=seed, guidance=DiffPIR(noise_std=noise_std))

# %%
rows = {}
for i, name in enumerate(photos):
    scored = {"blurred": y, "DPS": guided.image, "DiffPIR": proximal.image}
    rows[name] = truth[i]
    rows |= {
        f"{label} ({name}), {psnr(x[i : i + 1], truth[i : i + 1]).item():.1f} dB": x[i] for label, x in scored.items()
    }
figure = display.show(rows, columns=4, size=1.8)
_ = display.save_figure(figure, "01_dps_results.png")

for label, result in {"DPS": guided, "DiffPIR": proximal}.items():
    left = ", ".join(f"{r / noise_std:.2f}" for r in result.residual.tolist())
    print(f"{label:8} {result.evaluations:4} evaluations, {result.seconds:5.1f} s; residual over noise: {left}")

# %% [markdown]
# The last line is worth a habit. Blur the answer again and compare it with $y$: what is left should be as large as the
# noise, a ratio of about 1. Well above 1, the measurement has not been used up; well below 1, noise has been taken for
# signal. It needs no truth, so it works on real data too.
#
# PSNR rewards caution, so do not read it alone: a sample that commits to sharp detail may score below a smoother
# picture.
#
# ## What the step size does
#
# Same measurement, same noise draws, one number changed.

# %%
ratios = [1 / 16, 1 / 4, 1 / 2, 1, 2, 4, 16] if preset != "ci" else [1 / 16, 1, 16]
if preset != "ci":
    print("a minute or so on two CPU cores, several on a GPU at full size")
sweep = {}
for ratio in tqdm(ratios, "step sizes"):
    try:
        sweep[ratio * step_size] = sample(
            y[:1], blur, unknown, steps=steps, seed=seed, guidance=DPS.released(step_size=ratio * step_size)
        )
    except ArithmeticError as error:
        print(f"step size {ratio * step_size:g}: {error}")

scores = [psnr(result.image, truth[:1]).item() for result in sweep.values()]
residuals = [result.residual.item() for result in sweep.values()]

# %%
shown = [s for s in sweep if s / step_size in (1 / 16, 1 / 4, 1, 4, 16)]
figure = plt.figure(figsize=(8, 4.2), layout="constrained")
upper, lower = figure.subfigures(2, 1, height_ratios=(1.35, 1))
left, right = upper.subplots(1, 2)
left.semilogx(list(sweep), scores, "o-")
left.axhline(psnr(y[:1], truth[:1]).item(), color="gray", linestyle=":", label="blurred")
left.set(xlabel="step size", ylabel="PSNR [dB]")
left.legend()
right.loglog(list(sweep), residuals, "o-")
right.axhline(noise_std, color="gray", linestyle="--", label="noise")
right.set(xlabel="step size", ylabel="residual (root mean square)")
right.legend()
for axis in (left, right):
    axis.set_xticks(list(sweep), [f"{s:g}" for s in sweep], minor=False)
    axis.minorticks_off()
marks = [m for m in (0.02, 0.05, 0.1, 0.2, 0.5) if min(noise_std, *residuals) / 2 < m < 2 * max(residuals)]
right.set_yticks(marks, [f"{m:g}" for m in marks])
for axis, s in zip(lower.subplots(1, len(shown)), shown, strict=True):
    axis.imshow(display.picture(sweep[s].image), interpolation="nearest")
    axis.set_title(f"step size {s:g}", fontsize=9)
    axis.axis("off")
_ = display.save_figure(figure, "01_dps_step_size.png")

# %% [markdown]
# **Too small**, and the run is hardly held by the measurement: a picture that the prior likes, but not this one.
# **Too large**, and each step overshoots: the estimate shakes about the answer, then colours saturate. In between
# the residual comes down to the noise. It is the total guidance that counts, steps times step size: with a fifth of the
# steps, look for the best size at some multiple of it.
#
# Why do the worst runs still end in a picture, not in a row of infinities? Because $\hat x_0$ is clipped to
# $[-1, 1]$, so that the residual is bounded. A result that saturates *looks* finished; the residual gives it away.
# Where $x_t$ itself runs away, `sample` stops, and says at which step:

# %%
try:
    sample(y[:1], blur, unknown, steps=5, seed=seed, guidance=DPS.released(step_size=1e30))
except ArithmeticError as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown]
# ## One measurement, many answers
#
# Noise and blur destroyed information, so many sharp images explain $y$. The sampler draws one at random; another seed
# draws another. `samples=n` draws several at once. Where they agree, the measurement has spoken; where they differ, the
# prior has guessed.
#
# Their **mean** estimates the posterior mean, the answer with the least expected squared error. If the samples were
# exact, each would be off by the posterior's variance twice over (truth and sample are two draws from the same
# posterior), the mean of $n$ by $1 + 1/n$ times the variance: averaging gains at most 3 dB. Their **standard
# deviation** says, pixel by pixel, how far to trust the answer.

# %%
n = sizes["samples"]
if preset != "ci":
    print(f"{n} samples: a minute on two CPU cores, several on a GPU at full size")
draws = sample(
    y[:1], blur, unknown, steps=steps, seed=seed, guidance=DPS.released(step_size=step_size), samples=n, progress=True
)
posterior = draws.posterior("image")[0]  # (n, 3, H, W)
mean = posterior.mean(0, keepdim=True)

of_each = psnr(posterior, truth[:1].expand_as(posterior))
of_mean = psnr(mean, truth[:1]).item()
pictures = {"truth": truth[:1], "measurement": y[:1]}
pictures |= {f"sample {i + 1}, {score:.1f} dB": x for i, (x, score) in enumerate(zip(posterior, of_each, strict=True))}
figure = display.show(pictures | {f"mean of {n}, {of_mean:.1f} dB": mean}, columns=-(-(n + 3) // 2), size=1.7)
_ = display.save_figure(figure, "01_dps_samples.png")

# %%
error = (mean - truth[:1]).abs().mean(1)
maps = {"standard deviation of the samples": display.spread(posterior), "true error of their mean": error}
_ = display.maps(maps)

# %% [markdown]
# The two maps resemble each other, both bright along edges: the samples know *where* they are unsure.
#
# ## Do they know how unsure?
#
# Error bars that are too short are worse than none. Two tests, both of which need the truth:
#
# - **Error over spread.** If the truth were one more draw from the posterior, it would miss the mean of $n$ samples by
#   $\sqrt{1 + 1/n}$ of their standard deviation. The error divided by that is 1 for honest samples, and larger for
#   samples that are too sure of themselves.
# - **Ranks.** Put the truth among the $n$ samples of a pixel, in order. As one more draw it is as likely to be first,
#   last or anywhere between (*simulation-based calibration*,
#   [arXiv 1804.06788](https://arxiv.org/abs/1804.06788)). If it is too often first or last, the samples huddle.
#
# Both are necessary, neither is enough: samples of the prior that ignore $y$ would pass. And one picture is one draw,
# whose pixels go together; `figures/README.md` has sixteen.
#
# Three samplers on our photograph, and beside it on random fields whose prior is *exactly* known, a Gaussian with the
# 1/f spectrum of images. There the network cannot be to blame: what is wrong is the sampler's own approximation. PiGDM
# is the guidance of notebook 05: like DPS, but the noise $\sigma$, the operator and the uncertainty of $\hat x_0$ say
# how far to go, instead of a step size. DiffPIR has the prior at full weight here and no more, $\lambda = 1$; the
# experiment above had 3.

# %%
if preset != "ci":
    print("a minute on two CPU cores")
samplers = {
    "DPS": (DPS.released(step_size=step_size), steps),
    "PiGDM": (PiGDM(noise_std), sizes["proximal_steps"]),
    "DiffPIR": (DiffPIR(noise_std, strength=1.0), sizes["proximal_steps"]),
}
width, draw = 32, torch.Generator().manual_seed(seed)
frequency = width * torch.hypot(torch.fft.fftfreq(width)[:, None], torch.fft.rfftfreq(width)[None])
spectrum = (20 / (frequency.square() + 4)).expand(3, -1, -1)
exact = GaussianPrior(0.0, spectrum=spectrum)
white = torch.fft.rfft2(torch.randn(8, 3, width, width, generator=draw))
fields = torch.fft.irfft2(spectrum.sqrt() * white, s=(width, width))
blur_fields = partial(Blur("circular"), kernel=motion_kernels(1, width // 2, seed=seed))
y_fields = blur_fields(fields) + noise_std * torch.randn(fields.shape, generator=draw)

posteriors, honesty = {"DPS": posterior[None]}, {}
for name, (guidance, count) in samplers.items():
    settings = {"samples": n, "guidance": guidance, "progress": True}
    if name != "DPS":  # which we have
        drawn = sample(y[:1], blur, unknown, steps=count, seed=seed, **settings)
        posteriors[name] = drawn.posterior("image")
    if name == "DPS":  # whose step size goes with the side
        settings["guidance"] = DPS.released(step_size=step_size * width / side)
    drawn = sample(y_fields, blur_fields, {"image": exact}, steps=count, seed=list(range(8)), **settings)
    of_exact = error_over_spread(drawn.posterior("image"), fields).square().mean().sqrt().item()
    honesty[name] = (error_over_spread(posteriors[name], truth[:1]).item(), of_exact)

# %%
figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.3), layout="constrained", sharey=True)
for axis, (name, drawn) in zip(axes, posteriors.items(), strict=True):
    axis.bar(range(n + 1), ranks(drawn, truth[:1])[0].cpu(), color="tab:blue")
    axis.axhline(1 / (n + 1), color="gray", linestyle="--")
    axis.set(title=name, xlabel="rank of the truth", xticks=range(n + 1))
axes[0].set_ylabel("share of pixels")
_ = display.save_figure(figure, "01_dps_ranks.png")
print("error over spread  photograph  exact prior")
for name, (photo, gaussian) in honesty.items():
    print(f"{name:17} {photo:11.2f} {gaussian:12.2f}")

# %% [markdown]
# All three are too sure on the photograph: the truth is first or last half again as often as it should be, of DiffPIR
# nearly twice as often. The second column is how much of that is the sampler's own fault at least, where all is linear
# and normal:
#
# - **DPS and PiGDM** are nearly honest there (what PiGDM lacks are steps: try `6 * count`). What is wrong on the
#   photograph comes from the network, which is no exact prior, and from formulas that hold for a Gaussian and are used
#   for a photograph. This experiment does not tell the two apart. That the photograph is no dead leaves is not it:
#   on dead leaves, on which the network was trained, the ratio of PiGDM is 1.6 as well (`figures/README.md`).
# - **DiffPIR** goes on at each step from the *mean* of $x_0$ as if that were known, and what $x_0$ might have been
#   besides is lost: it is too sure with nothing else wrong, and more steps help little.
# - **Honest is not the same as good.** How far samples of DPS differ follows the step size, set by hand. With that of
#   `DPS()`, over four scenes and four photographs, the ratio is about 1 (there too), and each sample is further from
#   the truth than one of DiffPIR's.
#
# ## Error bars that hold
#
# What is too short by a factor can be made longer by it. `blindlib.deblur` has `expected_error`: the spread of samples
# of DiffPIR, which are quick, averaged over a few pixels, times a factor that was measured on scenes and photographs
# whose truth is known (`python tests/calibration.py`; its figures are with the others). It says how wrong `restore`
# is to be expected to be, the restoration that `deblur` ends with.

# %%
restored = restore(y[:1], kernel, shipped, Blur("circular"), noise_std)
expected = expected_error(y[:1], kernel, shipped, Blur("circular"), noise_std, seed=seed)
wrong = (restored - truth[:1]).square().mean(1).sqrt()
figure = display.maps({"expected error": expected, "true error": wrong})
_ = display.save_figure(figure, "01_dps_expected_error.png")
error_over_expected = (wrong.square().mean() / expected.square().mean()).sqrt().item()
within = ((restored - truth[:1]).abs() <= 2 * expected).float().mean().item()
print(f"error over expected error: {error_over_expected:.2f}; wrong by less than twice it: {within:.0%} of the values")

# %% [markdown]
# The map does not know *which* pixel is wrong, or it would be put right. It knows how much to expect there. Over
# sixteen pictures with the kernel known, the error is 0.7 to 1.5 times what it says. With the kernel unknown,
# `deblur(photo, error=True)` has another factor, and is far less reliable, 0.5 to 5 times: where the kernel is wrong
# nothing tells it so.
#
# ## A camera adds up light
#
# So far we have blurred the *values* of our pictures, as nearly all papers do. A camera does not. Its sensor adds up
# light, and only then is light written as values, along a curve that is steep in the dark: half the value is a fifth of
# the light (sRGB). With $\ell$ for the light that values stand for, a photograph is
#
# $$ y = \ell^{-1}\big(k * \ell(x)\big) + n. $$
#
# A bright spot outshines the dark around it far more than its value tells. The operator is no longer linear, but DPS
# wants no more of it than a gradient: `LinearLight` around the blur is all that changes. (Samplers that solve the data
# term exactly do it by linearising at each step.) What if we do not care, and take the values for the light?

# %%
if preset != "ci":
    print("about a minute on two CPU cores")
camera = partial(LinearLight(Blur("circular")), kernel=kernel)
shot = camera(truth) + noise_std * noise
models = {"values": blur, "light": camera}
in_light = {
    f"DPS, {name}": sample(shot, model, unknown, steps=steps, seed=seed, guidance=DPS.released(step_size=step_size))
    for name, model in models.items()
}
in_light = {name: run.image for name, run in in_light.items()}
in_light |= {f"DPIR, {name}": dpir(shot, model, prior, noise_std) for name, model in models.items()}

# %%
decibels = {name: psnr(x, truth) for name, x in {"measured": shot, **in_light}.items()}
print(" " * 14 + "".join(f"{name:>12}" for name in photos))
for name, values in decibels.items():
    print(f"{name:14}" + "".join(f"{value:9.1f} dB" for value in values))
pictures = {"truth": truth[0]}
pictures |= {f"{name}\n{decibels[name][0]:.1f} dB": x[0] for name, x in {"measured": shot, **in_light}.items()}
figure = display.show(pictures, columns=3, size=2.3)

# %% [markdown]
# With the same kernel, exactly known, DPS gains one to five decibels and DPIR one to eight, by one line of code. Where
# contrasts are small, as in the cat's fur, the two stories hardly differ; around the suit's dark collar the wrong one
# makes white blotches. `deblur` takes a file for light, and a tensor for a simulation of values, unless `response`
# tells it otherwise. From here on we blur values again, as the papers do, so that figures can be compared.
#
# ## Play with it
#
# Computed beforehand, so that no control waits: choose a photograph, a kernel, a noise level and a number of steps
# (with fewer, each is longer, so that the total guidance stays). Which of them costs most?

# %%
few = max(steps // 4, 5)
if preset != "ci":
    print("about a minute on two CPU cores, minutes on a GPU at full size")
shakes = {"short": motion_kernels(1, side // 2, extent=(0.15, 0.2), seed=seed + 1), "long": kernel.cpu()}
keys = [(name, shake, level) for name in list(photos)[:2] for shake in shakes for level in (0.02, 0.2)]
clean = torch.cat([truth[list(photos).index(name)][None] for name, _, _ in keys])
moved = torch.cat([shakes[shake] for _, shake, _ in keys]).to(device)
level = torch.tensor([level for _, _, level in keys], device=device)[:, None, None, None]
shaken = partial(Blur("circular"), kernel=moved)
measured = shaken(clean) + level * noise[:1]
panel = {}
for count in tqdm((few // 2, few, 2 * few), "numbers of steps"):
    size = step_size * steps / count
    batch = sample(measured, shaken, unknown, steps=count, seed=seed, guidance=DPS.released(step_size=size))
    for i, key in enumerate(keys):
        score = psnr(batch.image[i : i + 1], clean[i : i + 1]).item()
        panel[(*key, count)] = {
            "measurement": measured[i],
            f"DPS, {score:.1f} dB, residual / noise {batch.residual[i].item() / key[2]:.1f}": batch.image[i],
            "truth": clean[i],
            "kernel": moved[i],
        }
display.chooser(panel, ["photo", "kernel", "noise", "steps"])

# %% [markdown]
# And the run of the first photograph as a film to scrub through: the estimate $\hat x_0$ from the first step to the
# last.

# %%
display.scrubber(guided.history, ["image"])

# %% [markdown]
# ## Where it fails
#
# Two measurements that break it, in one batch:
#
# - **The wrong kernel.** We claim that the camera moved the other way round (the kernel mirrored left to right). Every
#   step now pulls towards an image that explains $y$ under a false story.
# - **Heavy noise**, ten times as much. The DPS step does not know $\sigma$ and pulls as hard as before, towards the
#   noise. DiffPIR is told, and leans on its prior instead.

# %%
if preset != "ci":
    print("half a minute on two CPU cores, a few minutes on a GPU at full size")
heavy_std = 10 * noise_std
heavy = blur(truth[:1]) + heavy_std * noise[:1]
hard = torch.cat([y[:1], heavy])
claimed = torch.cat([kernel.flip(-1), kernel])  # one kernel for each measurement of the batch
false_blur = partial(Blur("circular"), kernel=claimed)
broken = sample(
    hard, false_blur, unknown, steps=steps, seed=seed, guidance=DPS.released(step_size=step_size), progress=True
)
told = {
    i: sample(
        hard[i : i + 1],
        partial(Blur("circular"), kernel=claimed[i : i + 1]),
        unknown,
        steps=sizes["proximal_steps"],
        seed=seed,
        guidance=DiffPIR(noise_std=std),
    )
    for i, std in enumerate((noise_std, heavy_std))
}

# %%
pictures = {}
for i, (name, std) in enumerate({"mirrored kernel": noise_std, "heavy noise": heavy_std}.items()):
    pictures |= {f"{name}:\nmeasured": hard[i], f"{name}:\nkernel given": claimed[i]}
    print(f"{name:16} measured {psnr(hard[i : i + 1], truth[:1]).item():.1f} dB")
    results = {"DPS": (broken.image[i], broken.residual[i]), "DiffPIR": (told[i].image[0], told[i].residual[0])}
    for label, (x, residual) in results.items():
        pictures[f"{name}:\n{label}, {psnr(x[None], truth[:1]).item():.1f} dB"] = x
        print(f"{name:16} {label:8} residual over noise {residual.item() / std:.2f}")
figure = display.show(pictures, columns=4, size=1.9)

# %% [markdown]
# The wrong kernel brings false contours, and costs two decibels against doing nothing. The residual of DPS does not
# notice, it is as near to 1 as in a success: a flexible image can explain almost anything. (That of DiffPIR, 1.14 where
# a success leaves 1.05, does a little.) Under heavy noise the two score alike, but DPS has taken some of the noise for
# signal, and shows it as speckle.
#
# The first failure is the ordinary case. Nobody records how a hand shook, so in practice the kernel is unknown, and a
# guess is wrong. The next notebook, `02_parallel_operator_diffusion`, gives the kernel a diffusion prior of its own and
# lets both run side by side.

# %%
blurred_psnr = psnr(y, truth).mean().item()
_ = display.record(
    "01_dps",
    preset=preset,
    seed=seed,
    psnr_blurred=blurred_psnr,
    psnr_dps=psnr(guided.image, truth).mean().item(),
    psnr_light_unheeded=decibels["DPIR, values"].mean().item(),
    psnr_light=decibels["DPIR, light"].mean().item(),
    psnr_diffpir=psnr(proximal.image, truth).mean().item(),
    psnr_one_sample=of_each.mean().item(),
    psnr_mean_of_samples=of_mean,
    **{f"error_over_spread_{name}": ratio for name, (ratio, _) in honesty.items()},
    **{f"error_over_spread_{name}_exact": ratio for name, (_, ratio) in honesty.items()},
    error_over_expected=error_over_expected,
    residual_over_noise=guided.residual.mean().item() / noise_std,
    agreement=agreement,
)

# %% [markdown]
# ## Exercises
#
# **1. Without the network's Jacobian.** The gradient through the network costs more than the network itself. In `dps`,
# treat $\hat x_0$ as if it did not depend on $x_t$ through the network, and step along
# $\nabla_{\hat x_0} \lVert y - A \hat x_0 \rVert$ instead. How much faster is it, and does the same step size serve?
#
# <details><summary>Solution</summary>
#
# ```python
# with torch.no_grad():
#     x0 = prior.denoise(x, t)
# x0.requires_grad_(True)
# norm = (y - circular_blur(x0, kernel)).norm()
# (gradient,) = torch.autograd.grad(norm, x0)
# ```
#
# One forward pass a step and no backward pass: time it. The Jacobian of $\hat x_0$ is, but for a factor, the
# covariance of $x_0$ given $x_t$, so through the network the correction was spread along what the prior deems
# plausible: edges move as edges. Without it each pixel is corrected on its own, and the step size has to be sought
# anew.
# </details>
#
# **2. The honest weight.** Put the squared norm and the weight $1/2\sigma^2$ back, as Bayes' rule has it. What
# happens in the first steps? For which $\sigma$ would it be harmless?
#
# <details><summary>Solution</summary>
#
# ```python
# objective = (y - circular_blur(x0, kernel)).square().sum() / (2 * noise_std**2)
# ```
#
# Its gradient is that of the norm, $\lVert r \rVert / \sigma^2$ times as long: print that factor in the loop. At the
# start $\lVert r \rVert$ is about as large as the image itself, a sizeable part of $\sqrt{\text{number of values}}$,
# and the factor is enormous: the run saturates as at the right end of the sweep. Later the residual shrinks, but not
# below the noise that it contains, so that the factor stays above $\sqrt{\text{number of values}} / \sigma$: harmless
# for no $\sigma$ that leaves a picture. What tames the exact rule is the small number that multiplies the score there,
# the variance that the step adds.
# </details>
#
# **3. Another operator.** DPS wants nothing from the operator but a gradient. Hide half of the pixels, at random, and
# fill them in with the same sampler. Why would DiffPIR refuse?
#
# <details><summary>Solution</summary>
#
# ```python
# seen = (torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(0)) < 0.5).float().to(device)
#
# def mask(image):
#     return seen * image
#
# y_mask = mask(truth + noise_std * noise)
# filled = sample(y_mask, mask, {"image": prior}, steps=steps, seed=seed, guidance=DPS.released(step_size=step_size))
# display.show({"seen": y_mask[0], "filled in": filled.image[0], "truth": truth[0]})
# ```
#
# Any callable that takes `image` is an operator. `DiffPIR` asks for a `solve` method, the proximal step, and a function
# has none. (For a mask it would be a weighted mean, pixel by pixel: write it as a class and try.)
# </details>
#
# **4. How many samples?** Plot the PSNR of the mean of the first 1, 2, ... of the samples above. How much of the 3 dB
# is there, and after how many samples does it pay no more?
#
# <details><summary>Solution</summary>
#
# ```python
# gains = [psnr(posterior[:m].mean(0, keepdim=True), truth[:1]).item() for m in range(1, n + 1)]
# plt.plot(range(1, n + 1), gains, "o-")
# ideal = [gains[0] + 10 * math.log10(2 / (1 + 1 / m)) for m in range(1, n + 1)]
# plt.plot(range(1, n + 1), ideal, "--")
# ```
#
# The dashed line is what exact samples would gain on average: 1.2 dB with the second already. Samples that share
# an error, because the prior has a bias or the guidance pulls all of them the same way, gain less: averaging does not
# remove what they have in common.
# </details>
#
# ## References
#
# - H. Chung, J. Kim, M. T. McCann, M. L. Klasky, J. C. Ye, *Diffusion Posterior Sampling for General Noisy Inverse
#   Problems*, ICLR 2023, [arXiv 2209.14687](https://arxiv.org/abs/2209.14687).
# - Y. Zhu, K. Zhang, J. Liang, J. Cao, B. Wen, R. Timofte, L. Van Gool, *Denoising Diffusion Models for Plug-and-Play
#   Image Restoration* (DiffPIR), CVPR Workshops 2023, [arXiv 2305.08995](https://arxiv.org/abs/2305.08995).
# - J. Ho, A. Jain, P. Abbeel, *Denoising Diffusion Probabilistic Models*, NeurIPS 2020,
#   [arXiv 2006.11239](https://arxiv.org/abs/2006.11239).
# - B. Efron, *Tweedie's Formula and Selection Bias*, Journal of the American Statistical Association 106, 2011.
# - H. Chung, J. Kim, S. Kim, J. C. Ye, *Parallel Diffusion Models of Operator and Image for Blind Inverse Problems*
#   (BlindDPS), CVPR 2023, [arXiv 2211.10656](https://arxiv.org/abs/2211.10656).
