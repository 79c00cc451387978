import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from blindlib import load_kernel_denoiser, load_prior, motion_kernels, train
from blindlib.em import KernelDenoiser
from blindlib.priors import DiffusionPrior, kernel_to_latent
from blindlib.train import RECIPES, Denoising, Diffusion, Recipe, Stream, Validation, kernels_of_some_window, v_loss
from blindlib.unet import UNet

# A recipe that trains in milliseconds; also imported by the processes that the tests start and kill.
TINY = Recipe(
    data=lambda **where: kernel_to_latent(motion_kernels(64, 16, **where)),
    size=8,
    net=dict(in_channels=1, base_channels=8, multipliers=(1, 1), groups=4),
    batch=8,
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(RECIPES, "kernel", TINY)


def test_training_learns_to_denoise_and_writes_everything(tmp_path):
    lines = []
    path = train.train("kernel", tmp_path, steps=150, device="cpu", progress=lines.append)
    assert path == tmp_path / "kernel.safetensors"
    assert {p.name for p in tmp_path.iterdir()} == {"state.pt", "kernel.safetensors", "loss.png", "samples.png"}
    history = torch.load(tmp_path / "state.pt", weights_only=True)["history"]
    untrained = Diffusion(UNet(**TINY.net), TINY)
    before, after = Validation(TINY, torch.device("cpu"))(untrained)[-1], history[-1][-1]
    assert history[-1][0] == 150 and after > before + 1, f"denoising {before} dB, then {after} dB"
    assert load_prior(path).denoise(torch.zeros(1, 1, 8, 8), 10).shape == (1, 1, 8, 8)
    assert "150/150" in lines[-1]


def test_the_same_loop_trains_the_denoiser_of_kernels(tmp_path, monkeypatch):
    tiny = Recipe(lambda **where: motion_kernels(64, 16, **where), 8, dict(channels=8), 8, 0.02, task=Denoising)
    monkeypatch.setitem(RECIPES, "kernel-denoiser", tiny)
    path = train.train("kernel-denoiser", tmp_path, steps=150, device="cpu", progress=str)
    history = torch.load(tmp_path / "state.pt", weights_only=True)["history"]
    before = Validation(tiny, torch.device("cpu"))(Denoising(KernelDenoiser(channels=8), tiny))
    assert history[-1][-1] > before[-1] + 1
    assert load_kernel_denoiser(path)(torch.zeros(1, 1, 8, 8), 0.01).shape == (1, 1, 8, 8)
    lines = []
    train.train("kernel-denoiser", tmp_path, steps=151, device="cpu", progress=lines.append)
    assert lines[0] == "resuming at step 150"


def test_kernels_of_every_window_fill_a_crop():
    blocks = [kernels_of_some_window(2, 32, seed=seed, device="cpu") for seed in range(12)]
    assert len({b.shape[-1] for b in blocks}) > 1 and min(b.shape[-1] for b in blocks) == 32
    assert all(torch.allclose(b.sum((1, 2, 3)), torch.ones(2)) for b in blocks)


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path):
    """To float tolerance: data, noise, optimiser, averages and learning rate all go on where they were."""
    train.train("kernel", tmp_path / "a", steps=10, device="cpu", progress=str)

    class Stop(Exception):
        pass

    def stop(line):
        if line.startswith("step 5/"):
            raise Stop

    # Saves after every step; the report after the fifth breaks the run off there.
    with pytest.raises(Stop):
        train.train("kernel", tmp_path / "b", steps=10, minutes_between_saves=0, device="cpu", progress=stop)
    lines = []
    train.train("kernel", tmp_path / "b", steps=10, device="cpu", progress=lines.append)
    assert lines[0] == "resuming at step 5"
    a, b = (torch.load(tmp_path / folder / "state.pt", weights_only=True) for folder in "ab")
    for part in ("weights", "mean"):
        for key in a[part]:
            # Ten steps move weights little; to lose any of the state changes some of them by 2e-5 at least.
            torch.testing.assert_close(a[part][key], b[part][key], atol=1e-6, rtol=0)


def test_it_survives_being_killed_at_any_moment(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_train import TINY; from blindlib import train;"
        "train.RECIPES['kernel'] = TINY;"
        f"train.main(['kernel', '--folder', {str(tmp_path)!r}] + "
        "['--steps', '100000', '--minutes', '0', '--device', 'cpu'])"
    )
    rng, reached = random.Random(0), [0]
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        deadline = time.monotonic() + 120
        while _step(tmp_path) <= reached[-1] and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        load_prior(tmp_path / "kernel.safetensors")  # whole, whenever the kill came
        reached.append(_step(tmp_path))
    assert reached == sorted(set(reached)), f"steps were lost: {reached}"


def _step(folder):
    path = folder / "state.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def test_a_polite_signal_saves_and_stops(tmp_path):
    lines = []

    def interrupt(line):
        lines.append(line)
        if len(lines) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    train.train("kernel", tmp_path, steps=10_000, minutes_between_saves=0.01, device="cpu", progress=interrupt)
    assert "stopped at step" in lines[-1]
    assert _step(tmp_path) == int(lines[-1].split()[3].rstrip(";"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_stream_can_be_entered_anywhere():
    a, b = (Stream(TINY, 3, torch.device("cpu"), blocks=3, renew=4) for _ in range(2))
    batches = [a.batch(step) for step in range(11)]
    assert torch.equal(b.batch(10), batches[10])
    assert not torch.equal(batches[9], batches[10])
    assert len(a.pool) == 3
    assert all(torch.equal(b.batch(step), batches[step]) for step in (0, 9, 3)), "it was entered before, elsewhere"
    other = Stream(TINY, 4, torch.device("cpu"), blocks=3, renew=4)
    assert not torch.equal(other.batch(10), batches[10])


def test_the_loss_is_zero_for_a_perfect_net(g):
    prior = DiffusionPrior(UNet(1, base_channels=8, groups=4), "kernel", prediction="v")
    x0, noise, t = (
        torch.rand(3, 1, 8, 8, generator=g),
        torch.randn(3, 1, 8, 8, generator=g),
        torch.tensor([0, 300, 999]),
    )
    a = prior.schedule.alpha_bars[t].float().reshape(-1, 1, 1, 1)
    loss = v_loss(lambda x, t: a.sqrt() * noise - (1 - a).sqrt() * x0, prior, x0, t, noise)
    torch.testing.assert_close(loss, torch.zeros(3), atol=1e-6, rtol=0)


def test_a_recipe_can_start_from_a_shipped_prior(tmp_path, monkeypatch):
    """After one step, whose learning rate is next to nothing, the weights are those of the start."""
    start = load_prior("kernel")
    net = {**start.net.config}
    monkeypatch.setitem(RECIPES, "kernel", Recipe(lambda **_: torch.zeros(4, 1, 32, 32), 32, net, 2, start="kernel"))
    path = train.train("kernel", tmp_path, steps=1, device="cpu", progress=str)
    weights, expected = load_prior(path).net.state_dict(), start.net.state_dict()
    for key in weights:
        torch.testing.assert_close(weights[key], expected[key], atol=5e-3, rtol=0)


def test_several_processes_train_together(tmp_path, two_processes):
    """What `accelerate launch` does on several GPUs, here on the CPU."""
    script = tmp_path / "two.py"
    script.write_text(
        "import os, sys; sys.path.insert(0, 'tests'); from test_train import TINY; from blindlib import train\n"
        "train.RECIPES['kernel'] = TINY\n"
        "print('one of', os.environ['WORLD_SIZE'])\n"
        f"train.main(['kernel', '--folder', {str(tmp_path / 'run')!r}, '--steps', '8', '--device', 'cpu'])\n"
    )
    said = two_processes(script)
    assert said.count("one of 2") == 2
    assert said.count("step 8/8") == 1, "one process reports and saves"
    assert _step(tmp_path / "run") == 8
    script.write_text(script.read_text().replace("'8'", "'9'"))
    assert "resuming at step 8" in two_processes(script) and _step(tmp_path / "run") == 9


def test_the_command_is_loaded_once():
    """Run as a program, it would be another module than one that the package has imported, and Python warns of that."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "blindlib.train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "kernel-denoiser" in done.stdout, done.stderr


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="name: expected one of"):
        train.train("sound", tmp_path, steps=1)
    with pytest.raises(ValueError, match="steps"):
        train.train("kernel", tmp_path, steps=0)
    train.train("kernel", tmp_path, steps=1, device="cpu", progress=str)
    RECIPES["kernel"] = Recipe(TINY.data, 8, dict(TINY.net, base_channels=16), 8)
    with pytest.raises(ValueError, match="holds a run of another prior"):
        train.train("kernel", tmp_path, steps=2, device="cpu", progress=str)
