import pickle

import pytest
import torch
from safetensors.torch import save_file

from blindlib import DiffusionPrior, UNet, UniformPrior, blur_kernels, dead_leaves, load_prior, motion_kernels
from blindlib.priors import WEIGHTS, kernel_to_latent, kernel_to_physical


@pytest.mark.parametrize("name, channels", [("image", 3), ("kernel", 1)])
def test_shipped_priors_load(name, channels):
    prior = load_prior(name)
    assert prior.latent == name and prior.shape[0] == channels
    assert not any(p.requires_grad for p in prior.net.parameters())


def test_shipped_weights_are_small():
    assert sum(p.stat().st_size for p in WEIGHTS.glob("*.safetensors")) < 16e6
    assert (WEIGHTS / "README.md").is_file(), "the card is missing"


@pytest.mark.parametrize("size", [(64, 64), (40, 72), (8, 8)])
def test_image_prior_works_at_any_multiple_of_8(size):
    assert load_prior("image").denoise(torch.zeros(1, 3, *size), 500).shape == (1, 3, *size)


@pytest.mark.parametrize("t, gain", [(20, 0.5), (100, 4.0), (300, 8.0)])
def test_shipped_image_prior_denoises(t, gain):
    """At sigma 0.08, 0.34 and 1.25: by how many dB the posterior mean beats the noisy input, on fresh scenes."""
    x0, prior = dead_leaves(8, 64, seed=424242), load_prior("image")
    x_t = prior.schedule.diffuse(
        x0, torch.tensor([t]), torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    )
    with torch.no_grad():
        error = (prior.denoise(x_t, t) - x0).square().mean()
    noisy = (x_t / prior.schedule.alpha_bar(t) ** 0.5 - x0).square().mean()
    assert 10 * torch.log10(noisy / error) > gain


@pytest.mark.parametrize("t, gain", [(100, 6.0), (300, 10.0)])
def test_shipped_kernel_prior_denoises(t, gain):
    x0, prior = kernel_to_latent(blur_kernels(32, 32, seed=424242)), load_prior("kernel")
    x_t = prior.schedule.diffuse(
        x0, torch.tensor([t]), torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    )
    with torch.no_grad():
        error = (prior.denoise(x_t, t) - x0).square().mean()
    noisy = (x_t / prior.schedule.alpha_bar(t) ** 0.5 - x0).square().mean()
    assert 10 * torch.log10(noisy / error) > gain


def test_kernels_go_to_the_latent_and_back():
    k = motion_kernels(4, 24, seed=0)
    x = kernel_to_latent(k)
    assert x.amax((1, 2, 3)).tolist() == [1] * 4 and x.min() >= -1
    torch.testing.assert_close(kernel_to_physical(x), k)
    empty = kernel_to_physical(-torch.ones(1, 1, 8, 8))
    assert torch.isfinite(empty).all()


@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_a_perfect_prediction_gives_back_x0(prediction):
    """Whatever the net predicts, x0_hat is exact when the prediction is."""
    x0, noise = 0.5 * torch.randn(2, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    class Oracle(UNet):
        def forward(self, x, t):
            a = schedule.alpha_bar(int(t))
            return noise if prediction == "noise" else a**0.5 * noise - (1 - a) ** 0.5 * x0

    prior = DiffusionPrior(Oracle(1, base_channels=8, groups=4), "kernel", prediction=prediction)
    schedule = prior.schedule
    for t in (10, 400):
        x_t = schedule.diffuse(x0, torch.tensor([t]), noise)
        torch.testing.assert_close(prior.denoise(x_t, t), x0.clamp(-1, 1), atol=1e-3, rtol=1e-3)


def test_save_and_load(tmp_path):
    net = UNet(1, base_channels=8, multipliers=(1, 2), groups=4)
    DiffusionPrior(net, "kernel", prediction="v", size=16).save(tmp_path / "k.safetensors", "a note")
    again = load_prior(tmp_path / "k.safetensors")
    assert (again.latent, again.prediction, again.shape) == ("kernel", "v", (1, 16, 16))
    assert again.net.config == net.config
    assert not list(tmp_path.glob("*.part"))


# ---------------------------------------------------------------------------------- published and foreign files


@pytest.mark.parametrize("channels, latent", [(3, "image"), (1, "kernel"), (2, "tilt")])
@pytest.mark.parametrize("wrapped", [False, True])
def test_published_checkpoints_are_told_apart(tmp_path, channels, latent, wrapped):
    net = UNet(channels, 2 * channels, base_channels=64, multipliers=(1, 2), attention=(2,))
    torch.save({"state_dict": net.state_dict()} if wrapped else net.state_dict(), tmp_path / "model.pt")
    prior = load_prior(tmp_path / "model.pt")
    assert prior.latent == latent and prior.prediction == "noise"
    x = torch.zeros(1, channels, 16, 16)
    mean, variance = prior.estimate(x, 10)
    assert mean.shape == variance.shape == x.shape


def test_missing_file_says_where_to_get_it():
    with pytest.raises(FileNotFoundError, match=r"'ffhq_10m.pt'.*shipped prior.*image, kernel.*https://"):
        load_prior("ffhq_10m.pt")


def test_truncated_files(tmp_path):
    torch.save(UNet(3, base_channels=8, multipliers=(1,), groups=4).state_dict(), tmp_path / "a.pt")
    for name, data in (
        ("a.pt", (tmp_path / "a.pt").read_bytes()[:-1000]),
        ("b.safetensors", (WEIGHTS / "kernel.safetensors").read_bytes()[:100_000]),
        ("c.pt", b""),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: cannot be read as a checkpoint, it may be truncated"):
            load_prior(tmp_path / name)


def test_nothing_in_a_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    with open(tmp_path / "evil.pt", "wb") as f:
        pickle.dump({"x": Trap()}, f)
    with pytest.raises(ValueError, match="hold more than tensors"):
        load_prior(tmp_path / "evil.pt")
    assert not (tmp_path / "sprung").exists()


def test_foreign_checkpoints(tmp_path):
    good = UNet(3, 6, base_channels=32, multipliers=(1, 2)).state_dict()
    wide = {**good, "out.2.weight": torch.zeros(6, 33, 3, 3)}
    part = {key: value for key, value in good.items() if "middle" not in key}
    for state in ({"weight": torch.zeros(3)}, wide, part, UNet(5, base_channels=32).state_dict()):
        save_file(state, tmp_path / "foreign.safetensors")
        with pytest.raises(
            ValueError, match="foreign.safetensors: not a checkpoint of this package or of the published"
        ):
            load_prior(tmp_path / "foreign.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="expected a state dict of tensors, got list"):
        load_prior(tmp_path / "list.pt")


def test_bad_arguments():
    net = UNet(1, base_channels=8, groups=4)
    with pytest.raises(ValueError, match="latent: expected one of"):
        DiffusionPrior(net, "sound")
    with pytest.raises(ValueError, match="prediction"):
        DiffusionPrior(net, "kernel", prediction="x0")
    with pytest.raises(ValueError, match="the net 1"):
        DiffusionPrior(net, "image")
    with pytest.raises(ValueError, match="latent"):
        UniformPrior("sound")
