import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from blindlib import (
    DPS,
    Blur,
    DiffPIR,
    DiffusionPrior,
    EmpiricalPrior,
    GaussianMixturePrior,
    GaussianPrior,
    NoiseSchedule,
    PiGDM,
    UNet,
    UniformPrior,
    blur_kernels,
    dead_leaves,
    load_prior,
    mixed_tilts,
    motion_kernels,
    sample,
    text_images,
)
from blindlib.em import load_kernel_denoiser
from blindlib.priors import WEIGHTS, Frames, kernel_to_latent, kernel_to_physical, pick_device

SHIPPED = {"image": ("image", 3), "kernel": ("kernel", 1), "text": ("image", 3), "tilt": ("tilt", 2)}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_priors_load(name):
    prior = load_prior(name)
    assert (prior.latent, prior.shape[0]) == SHIPPED[name]
    assert not any(p.requires_grad for p in prior.net.parameters())


def test_shipped_weights_are_small():
    sizes = [p.stat().st_size for p in WEIGHTS.glob("*.safetensors")]
    assert max(sizes) < 8e6 and sum(sizes) < 20e6
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
    with pytest.raises(ValueError, match="schedule: a file holds none; expected the linear one"):
        DiffusionPrior(net, "kernel", schedule=NoiseSchedule.cosine()).save(tmp_path / "cosine.safetensors")


# ------------------------------------------------------------------------------------------------ exact priors


@pytest.mark.parametrize("t", [0, 50, 400, 999])
@pytest.mark.parametrize("shape", [(), (5, 1, 1, 1), (5, 2, 3, 4), (3, 4), (2, 1, 1), (1, 1, 1, 4)])
def test_tweedie_on_a_mixture(t, shape, g):
    """denoise() against the score, by autograd, of the density as torch.distributions has it; log_density() too."""
    means = torch.randn(5, 2, 3, 4, generator=g, dtype=torch.float64)
    std = 0.2 + torch.rand(shape, generator=g, dtype=torch.float64)
    prior = GaussianMixturePrior(means, std, weights=torch.rand(5, generator=g))
    a = prior.schedule.alpha_bar(t)
    x = torch.randn(3, 2, 3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    parts = Normal(math.sqrt(a) * means, (a * std.square() + 1 - a).sqrt().expand_as(means))
    density = MixtureSameFamily(Categorical(logits=prior.log_weights), Independent(parts, 3)).log_prob(x)
    torch.testing.assert_close(prior.log_density(x, t), density)
    (score,) = torch.autograd.grad(density.sum(), x)
    tweedie = (x + (1 - a) * score) / math.sqrt(a)
    torch.testing.assert_close(prior.denoise(x, t), tweedie.detach(), rtol=1e-6, atol=1e-8)


def test_a_mixture_of_one_is_a_gaussian(g):
    mean, variance = torch.randn(1, 2, 4, generator=g).double(), torch.rand(8, generator=g).double()
    one = GaussianMixturePrior(mean[None], variance.sqrt().reshape(1, 1, 2, 4))
    gaussian = GaussianPrior(mean, covariance=variance.diag())
    x = torch.randn(3, 1, 2, 4, generator=g)
    torch.testing.assert_close(one.denoise(x, 300), gaussian.denoise(x, 300))


@pytest.mark.parametrize("t", [0, 50, 400, 999])
def test_covariance_and_spectrum_say_the_same(t, g):
    spectrum = torch.fft.rfft2(torch.randn(1, 6, 6, generator=g).double(), norm="ortho").abs().square()
    unit = torch.eye(36).double().reshape(36, 1, 6, 6)
    covariance = torch.fft.irfft2(spectrum * torch.fft.rfft2(unit), s=(6, 6)).reshape(36, 36)
    mean = torch.randn(1, 6, 6, generator=g).double()
    stationary, dense = GaussianPrior(mean, spectrum=spectrum), GaussianPrior(mean, covariance=covariance)
    x = torch.randn(2, 1, 6, 6, generator=g).double()
    torch.testing.assert_close(stationary.denoise(x, t), dense.denoise(x, t), rtol=1e-6, atol=1e-8)
    assert dense.denoise(x.float(), t).dtype == stationary.denoise(x.float(), t).dtype == torch.float32


def test_tweedies_second_moment_is_the_posterior_covariance(g):
    """(1 - a) / sqrt(a) times the Jacobian of denoise(), against the inverse of the precision matrix."""
    root = torch.randn(6, 6, generator=g, dtype=torch.float64)
    prior, t = GaussianPrior(torch.zeros(1, 2, 3), covariance=root @ root.T), 400
    a = prior.schedule.alpha_bar(t)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: prior.denoise(x.reshape(1, 1, 2, 3), t).flatten(), torch.randn(6, generator=g, dtype=torch.float64)
    )
    exact = torch.linalg.inv(torch.linalg.inv(root @ root.T) + a / (1 - a) * torch.eye(6))
    torch.testing.assert_close((1 - a) / math.sqrt(a) * jacobian, exact)


def test_an_empirical_prior_knows_its_examples_and_nothing_else(g):
    data = 2 * torch.rand(50, 3, 8, 8, generator=g) - 1
    prior = EmpiricalPrior(data)
    near = prior.schedule.diffuse(data, torch.tensor([20]), torch.randn(data.shape, generator=g))
    torch.testing.assert_close(prior.denoise(near, 20), data)  # little noise: the nearest example
    far = prior.denoise(torch.zeros(1, 3, 8, 8), 999)  # much noise: their mean
    torch.testing.assert_close(far[0], data.mean(0), atol=0.02, rtol=0)
    for t in (0, 999):
        x = (100 * torch.randn(2, 3, 8, 8, generator=g)).requires_grad_(True)
        x0 = prior.denoise(x, t)
        (gradient,) = torch.autograd.grad(x0.sum(), x)
        assert torch.isfinite(x0).all() and torch.isfinite(gradient).all()
        assert x0.abs().max() <= 1  # no average of examples leaves their range


def test_small_noise_is_exact_for_single_precision_input(g):
    """Two examples that differ in one pixel by less than the noise: distances are nearly the same large number."""
    pair = (2 * torch.rand(1, 3, 64, 64, generator=g) - 1).repeat(2, 1, 1, 1)
    pair[1, 0, 0, 0] += 0.01
    prior, a = EmpiricalPrior(pair), EmpiricalPrior(pair).schedule.alpha_bar(0)
    x = math.sqrt(a) * pair[:1] + math.sqrt(1 - a) * torch.randn(1, 3, 64, 64, generator=g)
    toward, apart = x[0, 0, 0, 0] - math.sqrt(a) * pair[0, 0, 0, 0], math.sqrt(a) * 0.01
    odds = torch.sigmoid((toward * apart - apart**2 / 2) / (1 - a))
    torch.testing.assert_close(prior.denoise(x, 0)[0, 0, 0, 0] - pair[0, 0, 0, 0], 0.01 * odds, atol=2e-6, rtol=0)


@pytest.mark.parametrize("guidance", [DPS.released(step_size=2.0), DiffPIR(noise_std=0.05), PiGDM(noise_std=0.05)])
def test_the_measured_example_is_found_among_all(guidance, g):
    """A known blur and a finite set of images: the posterior is the image that was measured."""
    scenes, k = dead_leaves(20, 16, seed=1), motion_kernels(1, 9, seed=1)
    y = Blur()(scenes[[3, 11]], k) + 0.05 * torch.randn(2, 3, 16, 16, generator=g)
    prior, blur = EmpiricalPrior(scenes, latent="image"), partial(Blur(), kernel=k)
    run = sample(y, blur, {"image": prior}, steps=50, guidance=guidance)
    torch.testing.assert_close(run.image, scenes[[3, 11]], atol=0.02, rtol=0)
    alone = sample(y[1:], blur, {"image": prior}, steps=50, guidance=guidance)
    torch.testing.assert_close(run.image[1:], alone.image, atol=1e-4, rtol=0)


def test_exact_priors_of_image_and_kernel_run_in_parallel(g):
    scenes, kernels = dead_leaves(8, 16, seed=1), blur_kernels(8, 9, seed=1)
    y = Blur()(scenes[2:3], kernels[4:5]) + 0.02 * torch.randn(1, 3, 16, 16, generator=g)
    priors = {"image": EmpiricalPrior(scenes, latent="image")}
    priors["kernel"] = EmpiricalPrior(kernel_to_latent(kernels), latent="kernel")
    run = sample(y, Blur(), priors, steps=100, guidance=DPS.released())
    torch.testing.assert_close(run.kernel, kernels[4:5], atol=1e-3, rtol=0)
    torch.testing.assert_close(run.image, scenes[2:3], atol=0.02, rtol=0)


def test_a_priors_device_is_that_of_its_tensors():
    """By whatever name it was given: a GPU's "cuda" is "cuda:0" of a tensor, and this is the CPU's like of it."""
    prior = UniformPrior("kernel", 9, device="cpu:0")
    assert prior.device == torch.zeros(1, device="cpu:0").device
    y = torch.zeros(1, 3, 16, 16)
    assert sample(y, Blur(), {"kernel": prior, "image": UniformPrior("image")}, steps=2).kernel.shape == (1, 1, 9, 9)


@pytest.mark.parametrize(
    "device, message",
    [
        ("gpu", "device: expected 'auto', 'cpu', 'cuda' or the like, got 'gpu'"),
        (None, "device: expected 'auto', 'cpu', 'cuda' or the like, got None"),
        ("cuda:99", "'cuda:99' is not there"),
    ],
)
@pytest.mark.parametrize(
    "make", [pick_device, partial(load_prior, "kernel"), partial(UniformPrior, "kernel", 8), load_kernel_denoiser]
)
def test_a_device_that_is_not_there(make, device, message):
    assert make(device="auto")
    with pytest.raises(ValueError, match=message):
        make(device=device)


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
    for t in (999, 0):  # the last step: of a run of one step, and of any other
        torch.testing.assert_close(prior.step(x, mean, t, -1, torch.ones_like(x), variance), mean)


def test_missing_file_says_where_to_get_it():
    with pytest.raises(FileNotFoundError, match=r"'ffhq_10m.pt'.*shipped prior.*image, kernel.*https://"):
        load_prior("ffhq_10m.pt")
    with pytest.raises(TypeError, match="name_or_path: expected a name or a path, got int"):
        load_prior(5)


def test_truncated_files(tmp_path):
    torch.save(UNet(3, base_channels=8, multipliers=(1,), groups=4).state_dict(), tmp_path / "a.pt")
    for name, data in (
        ("a.pt", (tmp_path / "a.pt").read_bytes()[:-1000]),
        ("b.safetensors", (WEIGHTS / "kernel.safetensors").read_bytes()[:100_000]),
        ("c.pt", b""),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: cannot be read as a checkpoint, it may be truncated") as caught:
            load_prior(tmp_path / name)
        assert "()" not in str(caught.value) and "https://github.com/BlindDPS" in str(caught.value)


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
            ValueError, match="(?s)foreign.safetensors: not a checkpoint of this package or of the published.*https://"
        ):
            load_prior(tmp_path / "foreign.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="expected a state dict of tensors, got list"):
        load_prior(tmp_path / "list.pt")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(value, tmp_path):
    net = UNet(1, base_channels=8, multipliers=(1, 1), groups=4)
    net.out[2].bias.data.fill_(value)
    DiffusionPrior(net, "kernel", size=8).save(tmp_path / "a.safetensors")
    torch.save(net.state_dict(), tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        with pytest.raises(ValueError, match=f"{name}: expected finite numbers, but out.2.bias has NaN or infinity"):
            load_prior(tmp_path / name)


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
    with pytest.raises(ValueError, match="size: expected a positive integer, got -3"):
        UniformPrior("kernel", -3)


@pytest.mark.parametrize("t", [-1, 1000, 1.5, None])
@pytest.mark.parametrize(
    "prior",
    [
        DiffusionPrior(UNet(1, base_channels=8, multipliers=(1, 1), groups=4), "kernel"),
        GaussianPrior(0.0, spectrum=torch.ones(1, 8, 5)),
        EmpiricalPrior(torch.zeros(2, 1, 8, 8)),
        Frames(GaussianPrior(0.0, spectrum=torch.ones(1, 8, 5)), 1),
    ],
    ids=lambda prior: type(prior).__name__,
)
def test_times_that_are_none(prior, t):
    x = torch.zeros(1, 1, 1, 8, 8) if isinstance(prior, Frames) else torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match=f"t: expected an integer from 0 to 999, got {t}"):
        prior.denoise(x, t)
    assert torch.equal(prior.denoise(x, np.int64(999)), prior.denoise(x, 999))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GaussianPrior(0.0), "covariance, spectrum: expected exactly one"),
        (lambda: GaussianPrior(0.0, spectrum=torch.ones(4, 3)), r"spectrum: expected shape \(C, H, W // 2 \+ 1\)"),
        (lambda: GaussianPrior(0.0, spectrum=-torch.ones(1, 4, 3)), "spectrum: has a variance of -1"),
        (lambda: GaussianPrior(torch.zeros(1, 4, 5), spectrum=torch.ones(1, 4, 3)), r"shape \(1, 4, 4\), got"),
        (lambda: GaussianPrior(0.0, covariance=torch.eye(4)), "mean, covariance: expected shapes"),
        (lambda: GaussianPrior(torch.zeros(1, 2, 2), covariance=torch.eye(3)), "mean, covariance: expected shapes"),
        (lambda: GaussianPrior(torch.zeros(1, 1, 2), covariance=torch.tensor([[1.0, 1], [0, 1]])), "symmetric"),
        (lambda: GaussianPrior(torch.zeros(1, 1, 2), covariance=-torch.eye(2)), "variance of -1"),
        (lambda: EmpiricalPrior(torch.zeros(3, 8, 8)), r"means: expected shape \(M, C, H, W\), got \(3, 8, 8\)"),
        (lambda: EmpiricalPrior(torch.full((2, 1, 2, 2), math.nan)), "means: has 8 values that are NaN"),
        (lambda: EmpiricalPrior(torch.zeros(2, 1, 2, 2), latent="image"), "image has 3 channels, got 1"),
        (lambda: EmpiricalPrior(torch.zeros(2, 1, 2, 2), latent="sound"), "latent: expected one of"),
        (lambda: GaussianMixturePrior(torch.zeros(2, 1, 2, 2), -1.0), "std: expected numbers that are finite and"),
        (lambda: GaussianMixturePrior(torch.zeros(2, 1, 2, 2), math.inf), "std: expected numbers that are finite and"),
        (lambda: GaussianMixturePrior(torch.zeros(2, 1, 2, 2), torch.ones(3)), r"std: \(3,\) does not broadcast"),
        (lambda: GaussianMixturePrior(torch.zeros(2, 1, 2, 2), weights=torch.ones(3)), "weights: expected 2 numbers"),
        (lambda: GaussianMixturePrior(torch.zeros(2, 1, 2, 2), weights=torch.zeros(2)), "not all 0"),
        (lambda: EmpiricalPrior(torch.zeros(2, 1, 2, 2)).denoise(torch.zeros(1, 1, 3, 3), 5), "x_t: expected shape"),
    ],
)
def test_exact_priors_reject(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --------------------------------------------------------------------------------------------- tilts and frames


def test_the_tilt_prior_denoises_tilts_and_knows_their_pixels(g):
    prior, fields = load_prior("tilt"), mixed_tilts(8, 64, seed=77)
    assert prior.scale == 5 and prior.shape == (2, None, None)
    torch.testing.assert_close(prior.physical(fields / 5), fields)
    x0 = fields / prior.scale
    x_t = prior.schedule.diffuse(x0, torch.tensor([100]), torch.randn(x0.shape, generator=g))
    a = prior.schedule.alpha_bar(100)
    best_gain = x0.square().mean() * a**0.5 / (x0.square().mean() * a + 1 - a)  # all that a pixel alone can tell
    assert (prior.denoise(x_t, 100) - x0).square().mean() < 0.5 * (best_gain * x_t - x0).square().mean()


def test_the_text_prior_knows_text_better_than_the_image_prior_does(g):
    x0, t = text_images(8, 64, seed=78), 200
    x_t = load_prior("text").schedule.diffuse(x0, torch.tensor([t]), torch.randn(x0.shape, generator=g))
    errors = [(load_prior(name).denoise(x_t, t) - x0).square().mean() for name in ("text", "image")]
    assert errors[0] < errors[1]


def test_scale_is_kept_in_the_file(tmp_path):
    net = UNet(2, base_channels=8, multipliers=(1, 1), groups=4)
    DiffusionPrior(net, "tilt", scale=3.0).save(tmp_path / "a.safetensors")
    assert load_prior(tmp_path / "a.safetensors").physical(torch.ones(1)) == 3
    with pytest.raises(ValueError, match="scale: expected a positive number of pixels for a tilt and 1 for others"):
        UniformPrior("image", scale=2.0)


def test_frames_are_one_prior_for_each(g):
    spectrum = torch.rand(2, 8, 5, generator=g)
    single = GaussianPrior(0.2, spectrum=spectrum, latent="tilt")
    several = Frames(single, 3)
    assert several.shape == (3, 2, 8, 8)
    x = torch.randn(4, 3, 2, 8, 8, generator=g)
    torch.testing.assert_close(several.denoise(x, 400)[:, 1], single.denoise(x[:, 1], 400))
    torch.testing.assert_close(
        several.step(x, 0 * x, 400, 300, x)[:, 2], single.step(x[:, 2], 0 * x[:, 2], 400, 300, x[:, 2])
    )
    centred = Frames(single, 3, centred=True).physical(x)
    torch.testing.assert_close(centred.mean(1), torch.zeros(4, 2, 8, 8), atol=1e-6, rtol=0)
    for frames, wish in ((0, False), (1, True)):
        with pytest.raises(ValueError, match="frames: expected a positive number"):
            Frames(single, frames, centred=wish)
