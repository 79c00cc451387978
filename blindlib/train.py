"""Training of what ships: ``python -m blindlib.train image``, ``kernel``, ``text``, ``tilt`` or ``kernel-denoiser``.

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
from blindlib.checks import check_counts
from blindlib.em import KernelDenoiser
from blindlib.files import save_whole
from blindlib.priors import LATENTS, DiffusionPrior, kernel_to_latent, load_prior
from blindlib.unet import UNet, moving_average


@dataclass(frozen=True)
class Recipe:
    """What a prior learns from, and how."""

    data: Callable[..., Tensor]
    """``data(seed=..., device=...)``: a block of training examples as the diffusion variable, (n, C, H, W)."""
    size: int
    """Training crops are ``size`` x ``size``."""
    net: dict
    """Settings of the network."""
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
    task: type | None = None
    """What the network is trained for; default :class:`Diffusion`."""


def kernels_of_some_window(n: int, size: int, *, seed: int, device: str | torch.device) -> Tensor:
    """Kernels that sum to one, (n, 1, S, S): of a window that the seed picks, and S its side or ``size`` if larger."""
    g = torch.Generator().manual_seed(seed)
    window = _pick((17, 21, 25, 32, 33, 48, 64), g)
    pad = max(size - window, 0)
    kernels = simulate.blur_kernels(n, window, seed=seed, device=device)
    return torch.nn.functional.pad(kernels, (pad // 2, pad - pad // 2) * 2)


class Diffusion:
    """A recipe's task: to denoise at the noise levels of a diffusion. Holds the prior of the net that is averaged."""

    Net = UNet
    levels = (20, 100, 300)
    """Times at which denoising is validated."""

    def __init__(self, net: UNet, recipe: Recipe) -> None:
        size = None if recipe.any_size else recipe.size
        self.prior = DiffusionPrior(net, LATENTS[net.in_channels], prediction="v", size=size, scale=recipe.scale)
        self.save, self.size = self.prior.save, recipe.size

    def loss(self, net: torch.nn.Module, x0: Tensor, g: torch.Generator) -> Tensor:
        """Of a batch ``x0``, (B,), with times and noise drawn from ``g``."""
        # Stratified times, denser at low noise, where the detail is.
        u = (torch.arange(len(x0)) + torch.rand(len(x0), generator=g)) / len(x0)
        t = (u**1.5 * len(self.prior.schedule)).long().to(x0.device)
        noise = torch.randn(x0.shape, generator=g).to(x0.device)
        return v_loss(net, self.prior, x0.contiguous(memory_format=torch.channels_last), t, noise)

    def denoise(self, x0: Tensor, noise: Tensor, level: int) -> Tensor:
        """``x0`` with ``noise`` of that level, denoised."""
        x_t = self.prior.schedule.diffuse(x0, torch.tensor([level], device=x0.device), noise)
        return self.prior.denoise(x_t, level)

    def pictures(self) -> Tensor:
        """Sixteen samples, physical."""
        return self.prior.physical(draw_samples(self.prior, 16, self.size))


class Denoising:
    """A recipe's task: to denoise kernels that sum to one, for the M-step of :mod:`blindlib.em`."""

    Net = KernelDenoiser
    levels = (0.001, 0.003, 0.01)
    """Standard deviations of the noise at which denoising is validated; the M-step's is sqrt(weight / beta)."""

    def __init__(self, net: KernelDenoiser, recipe: Recipe) -> None:
        self.net, self.save, self.recipe = net, net.save, recipe

    def loss(self, net: torch.nn.Module, x0: Tensor, g: torch.Generator) -> Tensor:
        """Of a batch ``x0``, (B,), with noise levels, even in log from 0.0005 to 0.05, and noise drawn from ``g``."""
        u = (torch.arange(len(x0)) + torch.rand(len(x0), generator=g)) / len(x0)
        std = (0.0005 * 100**u).to(x0.device)
        noisy = x0 + std[:, None, None, None] * torch.randn(x0.shape, generator=g).to(x0.device)
        return (net(noisy, std).float() - x0).square().mean((1, 2, 3)) / std**2

    def denoise(self, x0: Tensor, noise: Tensor, level: float) -> Tensor:
        """``x0`` with ``noise`` of that level, denoised."""
        return self.net(x0 + level * noise, level)

    def pictures(self) -> Tensor:
        """Eight noisy kernels, and the same denoised."""
        x = self.recipe.data(seed=-1, device=next(self.net.parameters()).device)[:8, :, :32, :32]
        noisy = x + self.levels[1] * torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).to(x.device)
        return torch.cat([noisy, self.net(noisy, self.levels[1])])


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
    "kernel-denoiser": Recipe(
        data=lambda **where: kernels_of_some_window(256, 32, **where),
        size=32,
        net=dict(channels=32, dilations=(1, 2, 3, 2, 1)),
        batch=32,
        learning_rate=1e-3,
        task=Denoising,
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
        self.pool = {b: self._block(b) for b in range(first, first + self.blocks)}

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

    def _block(self, b: int) -> Tensor:
        if b in self.pool:
            return self.pool[b]
        # Half precision would round kernels' zeros; bytes would band the gradients of scenes.
        return self.recipe.data(seed=1_000_003 * self.seed + b, device=self.device)

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
    name : {"image", "kernel", "text", "tilt", "kernel-denoiser"}
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
    check_counts(steps=steps)
    recipe, folder = RECIPES[name], Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=_precision(device), cpu=device == "cpu")
    rank, where = accelerator.process_index, accelerator.device

    torch.manual_seed(seed)
    task = recipe.task or Diffusion
    net = task.Net(**recipe.net).to(memory_format=torch.channels_last)
    mean = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=moving_average)
    if recipe.start is not None:
        net.load_state_dict(load_prior(recipe.start).net.state_dict())
        mean.module.load_state_dict(net.state_dict())
    task = task(mean.module.eval().requires_grad_(False), recipe)
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.learning_rate, weight_decay=1e-4)
    net.to(where), mean.to(where)

    state_file, done, seconds, history = folder / "state.pt", 0, 0.0, []
    if state_file.is_file():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
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
        history.append([step, seconds, sum(losses) / len(losses), *check(task)])
        losses.clear()
        state = dict(name=name, net=_plain(net.config), step=step, seconds=history[-1][1], history=history)
        state.update(weights=net.state_dict(), mean=mean.state_dict(), optimizer=optimizer.state_dict())
        task.save(folder / f"{name}.safetensors", card(history, task.levels))
        save_whole(state, state_file)  # the last: after it nothing is missing
        report(task, history, folder)
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
            # Noise is seeded by the step, as the batch is.
            with accelerator.autocast():
                loss = task.loss(ready, x0, torch.Generator().manual_seed(stream.seed_of(step) + 1)).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            mean.update_parameters(net)
            losses.append(loss.item())
            seconds += min(time.monotonic() - began, 60)  # a longer step was a machine asleep
            if stopped:
                accelerator.set_trigger()
            stopping = accelerator.check_trigger()  # whichever process was asked, all end after the same step
            if step + 1 == steps or stopping or time.monotonic() - saved > 60 * minutes_between_saves:
                save(step + 1)
                saved = time.monotonic()
            if stopping:
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


class Validation:
    """Denoising quality on 64 examples that training never sees: PSNR in dB at the levels of their task."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        g = torch.Generator().manual_seed(7)
        blocks = [recipe.data(seed=-1 - b, device=device) for b in range(2)]
        pool = torch.cat([b[:32, :, : recipe.size, : recipe.size] for b in blocks])
        self.x0, self.noise = pool, torch.randn(pool.shape, generator=g).to(device)

    @torch.no_grad()
    def __call__(self, task: Diffusion | Denoising) -> list[float]:
        out = []
        for level in task.levels:
            error = (task.denoise(self.x0, self.noise, level) - self.x0).square().mean((1, 2, 3))
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


def report(task: Diffusion | Denoising, history: list[list[float]], folder: Path) -> None:
    """Write ``loss.png`` and ``samples.png``."""
    from matplotlib.figure import Figure

    hours = [row[1] / 3600 for row in history]
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(hours, [row[2] for row in history])
    left.set(xlabel="hours", ylabel="training loss")
    for i, level in enumerate(task.levels):
        right.plot(hours, [row[3 + i] for row in history], label=f"{level}")
    right.set(xlabel="hours", ylabel="denoising, dB")
    right.legend()
    figure.savefig(folder / "loss.png", dpi=120)

    figure = Figure(figsize=(8, 4), layout="constrained")
    for axis, x in zip(figure.subplots(2, 8).flat, task.pictures(), strict=True):
        display.draw(axis, x)
    figure.savefig(folder / "samples.png", dpi=120)


def card(history: list[list[float]], levels: tuple) -> str:
    """One line on how the weights were made, stored inside their file."""
    step, seconds, loss, *quality = history[-1]
    shown = ", ".join(f"{v:.2f} dB at {level}" for v, level in zip(quality, levels, strict=True))
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
