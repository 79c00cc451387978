"""Training of the priors that ship: ``python -m blindlib.train image``, ``kernel``, ``text`` or ``tilt``.

One loop for every prior and every machine: a CPU, a GPU, or several under ``accelerate launch -m blindlib.train
image``. The data are procedural (:mod:`blindlib.simulate`) and made while training runs. A run lives in one folder;
start it again, with the same command, and it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from blindlib import display, simulate
from blindlib.priors import CHANNELS, DiffusionPrior, kernel_to_latent, load_prior
from blindlib.unet import UNet


@dataclass(frozen=True)
class Recipe:
    """What a prior learns from, and how."""

    data: Callable[..., Tensor]
    """``data(seed=..., device=...)``: a block of training examples as the diffusion variable, (n, C, H, W)."""
    size: int
    """Training crops are ``size`` x ``size``."""
    net: dict
    """Settings of the :class:`UNet`."""
    batch: int
    learning_rate: float = 5e-4
    any_size: bool = True
    """Whether the prior works at any size."""
    turned: bool = True
    """Whether an example turned or mirrored is one too: not a kernel (which has a centre pixel), a tilt or a letter."""
    scale: float = 1.0
    """Of a tilt: pixels, as of :class:`DiffusionPrior`."""
    start: str | None = None
    """The shipped prior, of the same net, whose weights training begins with; default: random ones."""


LARGEST_TILT = 5.0  # pixels; see simulate.mixed_tilts

RECIPES = {
    "image": Recipe(
        data=lambda **where: simulate.dead_leaves(32, 128, **where),
        size=64,
        net=dict(in_channels=3, base_channels=32, multipliers=(1, 1, 2, 4), groups=8),
        batch=16,
    ),
    "kernel": Recipe(
        data=lambda **where: kernel_to_latent(simulate.blur_kernels(512, 32, **where)),
        size=32,
        net=dict(in_channels=1, base_channels=32, multipliers=(1, 2, 3), attention=(4,), head_channels=32, groups=8),
        batch=64,
        any_size=False,
        turned=False,
    ),
    "text": Recipe(
        data=lambda **where: simulate.text_images(32, 96, **where),
        size=64,
        net=dict(in_channels=3, base_channels=32, multipliers=(1, 1, 2, 4), groups=8),
        batch=16,
        turned=False,
        start="image",
    ),
    "tilt": Recipe(
        data=lambda **where: simulate.mixed_tilts(32, 64, **where) / LARGEST_TILT,
        size=48,
        net=dict(in_channels=2, base_channels=16, multipliers=(1, 2, 2, 4), groups=8),
        batch=16,
        learning_rate=1e-3,
        turned=False,
        scale=LARGEST_TILT,
    ),
}


class Stream:
    """An endless, seeded stream of training batches that can be entered at any step.

    To make a scene costs more than to cut a crop, so a pool of ``blocks`` blocks is kept, the oldest of which is
    replaced every ``renew`` steps. A batch is a function of seed and step alone: a resumed run sees what it would
    have seen.
    """

    def __init__(self, recipe: Recipe, seed: int, device: torch.device, *, blocks: int = 16, renew: int = 32) -> None:
        self.recipe, self.seed, self.device = recipe, seed, device
        self.blocks, self.renew = blocks, renew
        self.pool: dict[int, Tensor] = {}

    def batch(self, step: int) -> Tensor:
        """The training examples of ``step``, (batch, C, size, size)."""
        first = step // self.renew
        for b in range(first, first + self.blocks):
            if b not in self.pool:
                # Half precision would round kernels' zeros; bytes would band the gradients of scenes.
                self.pool[b] = self.recipe.data(seed=1_000_003 * self.seed + b, device=self.device)
        self.pool.pop(first - 1, None)

        g = torch.Generator().manual_seed(self.seed_of(step))
        blocks, size = list(self.pool.values()), self.recipe.size
        examples = []
        for _ in range(self.recipe.batch):
            x = _pick(_pick(blocks, g), g)
            top, left = _pick(range(x.shape[1] - size + 1), g), _pick(range(x.shape[2] - size + 1), g)
            x = x[:, top : top + size, left : left + size]
            if self.recipe.turned:
                x = x.rot90(_pick(range(4), g), (1, 2))
                x = x.flip(2) if _pick(range(2), g) else x
            examples.append(x)
        return torch.stack(examples)

    def seed_of(self, step: int) -> int:
        """An even seed of its own for each step."""
        return 2 * (100_000_007 * (self.seed + 1) + step)


def _pick(items, g: torch.Generator):  # noqa: ANN001, ANN202 - any sequence, one of its items
    return items[int(torch.randint(len(items), (), generator=g))]


def v_loss(net: torch.nn.Module, prior: DiffusionPrior, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Squared error of the predicted v (arXiv 2202.00512, section 4) of each example, (B,)."""
    x_t = prior.schedule.diffuse(x0, t, noise)
    a = prior.schedule.alpha_bars.to(t.device)[t].reshape(-1, 1, 1, 1)
    v = a.sqrt().to(x0) * noise - (1 - a).sqrt().to(x0) * x0
    return (net(x_t, t).float() - v).square().mean((1, 2, 3))


def train(
    name: str,
    folder: str | Path,
    *,
    steps: int,
    seed: int = 0,
    minutes_between_saves: float = 5.0,
    device: str | None = None,
    progress: Callable[[str], None] = print,
) -> Path:
    """Train the prior ``name`` up to ``steps`` steps, and return the path of its weights.

    The learning rate is constant and falls to zero over the last fifth of the steps; the weights that count are their
    moving average. Everything that is needed to go on is written to ``folder`` every few minutes and at a polite
    signal, whole or not at all: a kill loses no more than what came after. A finished run goes on when more steps are
    asked for.

    Parameters
    ----------
    name : {"image", "kernel", "text", "tilt"}
    folder : str or Path
        Holds ``state.pt`` (to resume), ``<name>.safetensors`` (the prior), ``loss.png`` and ``samples.png``.
    steps : int
        Steps of the optimiser, those of earlier sessions included.
    seed : int
    minutes_between_saves : float
    device : str, optional
        ``"cpu"`` keeps it off a GPU that is there.
    progress : callable
        Is told, in a line, how it goes.

    Raises
    ------
    ValueError
        If there is no such recipe, ``steps`` is not positive, or the folder holds another prior's run.
    """
    from accelerate import Accelerator

    if name not in RECIPES:
        raise ValueError(f"name: expected one of {sorted(RECIPES)}, got {name!r}")
    if steps < 1:
        raise ValueError(f"steps: expected a positive number, got {steps}")
    recipe, folder = RECIPES[name], Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=_precision(device), cpu=device == "cpu")
    rank, where = accelerator.process_index, accelerator.device

    torch.manual_seed(seed)
    net = UNet(**recipe.net).to(memory_format=torch.channels_last)
    mean = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=moving_average)
    if recipe.start is not None:
        net.load_state_dict(load_prior(recipe.start).net.state_dict())
        mean.module.load_state_dict(net.state_dict())
    latent = next(latent for latent, channels in CHANNELS.items() if channels == net.in_channels)
    size = None if recipe.any_size else recipe.size
    prior = DiffusionPrior(mean.module, latent, prediction="v", size=size, scale=recipe.scale)
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.learning_rate, weight_decay=1e-4)
    net.to(where), mean.to(where)

    state_file, done, seconds, history = folder / "state.pt", 0, 0.0, []
    if state_file.is_file():
        state = torch.load(state_file, map_location=where, weights_only=True)
        if state["name"] != name or state["net"] != _plain(net.config):
            raise ValueError(f"folder: {folder} holds a run of another prior ({state['name']}, {state['net']})")
        net.load_state_dict(state["weights"])
        mean.load_state_dict(state["mean"])
        optimizer.load_state_dict(state["optimizer"])
        done, seconds, history = state["step"], state["seconds"], state["history"]
        progress(f"resuming at step {done}")
    ready, optimizer = accelerator.prepare(net, optimizer)

    # Every process draws its own batches; the validation set is the same for all time.
    stream = Stream(recipe, 1000 * seed + rank, where)
    check = Validation(recipe, where)

    def save(step: int) -> None:
        if not accelerator.is_main_process:
            return
        history.append([step, seconds, sum(losses) / len(losses), *check(prior)])
        losses.clear()
        state = dict(name=name, net=_plain(net.config), step=step, seconds=history[-1][1], history=history)
        state.update(weights=net.state_dict(), mean=mean.state_dict(), optimizer=optimizer.state_dict())
        save_whole(state, state_file)
        prior.save(folder / f"{name}.safetensors", card(history))
        report(prior, recipe, history, folder)
        shown = " ".join(f"{v:.2f}" for v in history[-1][3:])
        progress(f"step {step}/{steps} {history[-1][1] / 3600:.2f} h loss {history[-1][2]:.5f} dB {shown}")

    saved = time.monotonic()
    losses: list[float] = []
    with _signals_noted() as stopped:
        for step in range(done, steps):
            began = time.monotonic()
            for group in optimizer.param_groups:
                warm, cool = min(1, (step + 1) / 500), min(1, 5 * (1 - step / steps))
                group["lr"] = recipe.learning_rate * warm * cool
            x0 = stream.batch(step).to(where)
            # Stratified times, denser at low noise, where the detail is. Seeded by the step, as the batch is.
            g = torch.Generator().manual_seed(stream.seed_of(step) + 1)
            u = (torch.arange(len(x0)) + torch.rand(len(x0), generator=g)) / len(x0)
            t = (u**1.5 * len(prior.schedule)).long().to(where)
            noise = torch.randn(x0.shape, generator=g).to(where)
            with accelerator.autocast():
                loss = v_loss(ready, prior, x0.contiguous(memory_format=torch.channels_last), t, noise).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            mean.update_parameters(net)
            losses.append(loss.item())
            seconds += min(time.monotonic() - began, 60)  # a longer step was a machine asleep
            if step + 1 == steps or stopped or time.monotonic() - saved > 60 * minutes_between_saves:
                save(step + 1)
                saved = time.monotonic()
            if stopped:
                progress(f"stopped at step {step + 1}; the same command goes on from here")
                break
    return folder / f"{name}.safetensors"


@contextlib.contextmanager
def _signals_noted() -> Iterator[list]:
    """Polite requests to end are put in a list, to be met between two steps."""
    stopped: list[int] = []
    before = {s: signal.signal(s, lambda number, _: stopped.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def save_whole(state: dict, path: Path) -> None:
    """``torch.save``, whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


@torch.no_grad()
def moving_average(mean: list[Tensor], new: list[Tensor], updates: Tensor | int) -> None:
    """Exponential moving average of the weights, over all steps at first and over the last 2000 or so later on."""
    torch._foreach_lerp_(mean, new, 1 - min(0.9995, (1 + int(updates)) / (10 + int(updates))))


class Validation:
    """Denoising quality on 64 examples that training never sees: PSNR in dB at three noise levels."""

    times = (20, 100, 300)

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        g = torch.Generator().manual_seed(7)
        blocks = [recipe.data(seed=-1 - b, device=device) for b in range(2)]
        pool = torch.cat([b[:32, :, : recipe.size, : recipe.size] for b in blocks])
        self.x0, self.noise = pool, torch.randn(pool.shape, generator=g).to(device)

    @torch.no_grad()
    def __call__(self, prior: DiffusionPrior) -> list[float]:
        out = []
        for t in self.times:
            x_t = prior.schedule.diffuse(self.x0, torch.tensor([t], device=self.x0.device), self.noise)
            error = (prior.denoise(x_t, t) - self.x0).square().mean((1, 2, 3))
            out.append(float((10 * torch.log10(4 / error)).mean()))
        return out


@torch.no_grad()
def draw_samples(prior: DiffusionPrior, n: int, size: int, *, steps: int = 40, seed: int = 0) -> Tensor:
    """``n`` samples of a prior, without any measurement, by DDIM: (n, C, size, size) in [-1, 1]."""
    x = torch.randn(n, prior.shape[0], size, size, generator=torch.Generator().manual_seed(seed)).to(prior.device)
    times = prior.schedule.timesteps(steps)
    for t, t_prev in zip(times, [*times[1:], -1], strict=True):
        x = prior.schedule.ddim_step(x, prior.denoise(x, t), t, t_prev, torch.zeros_like(x))
    return x


def report(prior: DiffusionPrior, recipe: Recipe, history: list[list[float]], folder: Path) -> None:
    """Write ``loss.png`` and ``samples.png``."""
    from matplotlib.figure import Figure

    hours = [row[1] / 3600 for row in history]
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(hours, [row[2] for row in history])
    left.set(xlabel="hours", ylabel="training loss")
    for i, t in enumerate(Validation.times):
        right.plot(hours, [row[3 + i] for row in history], label=f"t = {t}")
    right.set(xlabel="hours", ylabel="denoising, dB")
    right.legend()
    figure.savefig(folder / "loss.png", dpi=120)

    figure = Figure(figsize=(8, 4), layout="constrained")
    samples = (draw_samples(prior, 16, recipe.size).cpu() + 1) / 2
    for axis, x in zip(figure.subplots(2, 8).flat, samples, strict=True):
        if len(x) == 2:
            display.arrows(axis, 2 * recipe.scale * (x - 0.5))
        else:
            axis.imshow(x.permute(1, 2, 0) if len(x) == 3 else x[0], cmap="gray", vmin=0, vmax=1)
        axis.axis("off")
    figure.savefig(folder / "samples.png", dpi=120)


def card(history: list[list[float]]) -> str:
    """One line on how the weights were made, stored inside their file."""
    step, seconds, loss, *quality = history[-1]
    shown = ", ".join(f"{v:.2f} dB at t = {t}" for v, t in zip(quality, Validation.times, strict=True))
    return f"{step} steps, {seconds / 3600:.1f} h on {platform.machine()}, loss {loss:.5f}, denoising {shown}"


def _precision(device: str | None) -> str:
    """bfloat16 where the processor has it; a CPU that does not emulates it, three times slower than float32."""
    if device != "cpu" and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "no"


def _plain(config: dict) -> dict:
    """Settings as they come back from a file: lists for tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def main(argv: list[str] | None = None) -> None:
    """Command line of ``python -m blindlib.train``."""
    parser = argparse.ArgumentParser(
        prog="python -m blindlib.train", description="Train a prior, or go on training it."
    )
    parser.add_argument("prior", choices=sorted(RECIPES))
    parser.add_argument("--folder", type=Path, help="of the run (default: runs/<prior>)")
    parser.add_argument(
        "--steps", type=int, default=40_000, help="in all, earlier sessions included (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=5.0, help="between saves (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu"], help="keep off the GPU")
    a = parser.parse_args(argv)
    folder = a.folder or Path("runs") / a.prior
    train(a.prior, folder, steps=a.steps, seed=a.seed, minutes_between_saves=a.minutes, device=a.device)


if __name__ == "__main__":
    main()
