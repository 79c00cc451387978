import math
from functools import partial
from itertools import count, pairwise

import pytest
import torch

from blindlib import (
    L1,
    L2,
    Annealed,
    Blur,
    DiffusionPrior,
    KernelDenoiser,
    LinearLight,
    PiGDM,
    PlugAndPlay,
    Threshold,
    UNet,
    as_published,
    blur_kernels,
    dead_leaves,
    diffusion_em,
    fast_em,
    fit_kernel,
    gaussian_kernels,
    l0_pyramid,
    load_kernel_denoiser,
    load_prior,
    mnc,
    motion_kernels,
    prior_denoiser,
    psnr,
    sample,
)
from blindlib.em import centred
from blindlib.operators import otf
from blindlib.priors import GaussianPrior


@pytest.fixture(scope="module")
def small_prior():
    torch.manual_seed(0)
    net = UNet(3, base_channels=8, multipliers=(1, 1), groups=4)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return DiffusionPrior(net, "image", prediction="v")


def delta(size):
    k = torch.zeros(1, 1, size, size)
    k[..., size // 2, size // 2] = 1
    return k


def power_law(size):
    f = torch.sqrt(torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.rfftfreq(size) ** 2) * size
    return (1.5 / (1 + f**2))[None]


def gaussian_images(n, size, g):
    """Exact draws of the prior with that spectrum."""
    white = torch.fft.rfft2(torch.randn(n, 1, size, size, generator=g))
    return torch.fft.irfft2(power_law(size).sqrt() * white, s=(size, size))


# ------------------------------------------------------------------------------------- the published numbers


def test_m_step_agrees_with_the_published_code(golden):
    d = golden("fast_em.npz")
    fit = partial(fit_kernel, d["y"], noise_std=float(d["sigma"]), kernel0=d["k0"])
    for weight in (0, 1, 1000):
        for kind, regularizer in (("l1", L1(weight)), ("l2", L2(weight))):
            expected = d[f"hqs_{kind}_lambda{weight}"]
            torch.testing.assert_close(fit(d["x"], regularizer=regularizer), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(fit(d["x4"][None]), d["hqs_4samples"], atol=1e-5, rtol=0)
    smooth = PlugAndPlay(lambda k, _: k / 2 + torch.nn.functional.avg_pool2d(k, 3, 1, 1) / 2)
    torch.testing.assert_close(fit(d["x"], regularizer=smooth), d["hqs_pnp_smooth"], atol=1e-5, rtol=0)


def test_blur_and_its_spectrum_agree_with_the_published_code(golden):
    d = golden("fast_em.npz")
    torch.testing.assert_close(Blur()(d["x"], d["kernel"]), d["blur"], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.fft.irfft2(otf(d["kernel"], (64, 64))), d["otf"], atol=1e-5, rtol=0)


def test_guidance_agrees_with_the_published_code(golden):
    """A^T (r^2 A A^T + sigma^2)^-1 (y - A x), got from the proximal map."""
    d = golden("fast_em.npz")
    x, s = d["x4"][:1], float(d["sigma"])
    for r in (0.05, 0.5):
        ours = (Blur().solve(d["y"], d["kernel"], x, (s / r) ** 2) - x) / r**2
        torch.testing.assert_close(ours, d[f"guidance_r{r}"], atol=1e-2, rtol=0)


def test_centred_agrees_with_the_published_code(golden):
    d = golden("fast_em.npz")
    expected = d["shifted"].clamp(min=0)
    torch.testing.assert_close(centred(d["kernel"])[0, 0], expected / expected.sum(), atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------- exact answers


@pytest.mark.parametrize("size", [15, 16, 32])
def test_m_step_recovers_the_kernel_from_clean_pairs(size, g):
    x, k = torch.randn(2, 3, 48, 48, generator=g), motion_kernels(2, size, seed=3)
    fitted = fit_kernel(Blur()(x, k), x, 1e-4, delta(size))
    assert mnc(fitted, k).min() > 0.9999
    torch.testing.assert_close(fitted, k, atol=1e-4, rtol=0)


def test_m_step_recovers_the_kernel_from_what_the_sensor_saw(g):
    """Four tenths of the pixels are not seen: filled in at each alternation, they do not stand in the way."""
    x, k = torch.randn(2, 2, 3, 64, 64, generator=g), motion_kernels(2, 15, seed=3)
    y = Blur("valid")(x[:, 0], k)
    x[:, 1] = x[:, 0]
    fitted = fit_kernel(y, x, 1e-3, delta(15), boundary="valid", iterations=60)
    assert y.shape[-2:] == (50, 50) and mnc(fitted, k).min() > 0.999


def test_m_step_does_not_mix_measurements(g):
    x, k = torch.randn(3, 2, 3, 24, 24, generator=g), motion_kernels(3, 9, seed=1)
    y = Blur()(x[:, 0], k) + 0.05 * torch.randn(3, 3, 24, 24, generator=g)
    together = fit_kernel(y, x, 0.05, delta(9), L1(1.0))
    for i in range(3):
        alone = fit_kernel(y[i : i + 1], x[i : i + 1], 0.05, delta(9), L1(1.0))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=0)


def test_em_never_lowers_the_marginal_likelihood(g):
    """With exact posterior samples of a Gaussian prior, log p(y | k) grows from round to round.

    Only if the M-step is solved: ten alternations at the published weight stop short, and likelihood is lost again.
    """
    size, std, k = 32, 0.1, gaussian_kernels(1, 9, seed=4)
    x = gaussian_images(1, size, g)
    y = Blur()(x, k) + std * torch.randn(x.shape, generator=g)
    p = power_law(size)
    twice = torch.full((size // 2 + 1,), 2.0)  # rfft2 holds one of each pair of conjugates
    twice[0] = twice[-1] = 1

    def log_likelihood(kernel):
        s = otf(kernel, (size, size)).abs() ** 2 * p + std**2
        power = torch.fft.rfft2(y, norm="ortho").abs() ** 2
        return -0.5 * float((twice * (power / s + s.log())).sum())

    def e_step(kernel, n):
        h = otf(kernel, (size, size))
        s = h.abs() ** 2 * p + std**2
        drawn = gaussian_images(n, size, g)
        predicted = Blur()(drawn, kernel) + std * torch.randn(drawn.shape, generator=g)
        return drawn + torch.fft.irfft2(h.conj() * p / s * torch.fft.rfft2(y - predicted), s=(size, size))

    kernel = delta(9)
    grown = [log_likelihood(kernel)]
    for _ in range(8):
        kernel = fit_kernel(y, e_step(kernel, 400)[None], std, kernel, beta=1e7, iterations=100)
        grown.append(log_likelihood(kernel))
    gain = log_likelihood(k) - grown[0]
    assert all(b > a - 0.005 * gain for a, b in pairwise(grown))  # 0.005: 400 samples, not all
    assert grown[-1] > log_likelihood(k)


def test_pigdm_is_the_exact_posterior_mean_for_a_white_gaussian(g):
    prior, std, k = GaussianPrior(0.0, spectrum=0.3**2 * torch.ones(1, 16, 9)), 0.05, gaussian_kernels(1, 5, seed=0)
    y, x_t = torch.randn(2, 1, 16, 16, generator=g), torch.randn(2, 1, 16, 16, generator=g)
    t, a = 300, prior.schedule.alpha_bar(300)
    guidance = PiGDM(std, data_std=0.3)
    new, x0, _ = guidance(
        {"image": x_t}, t, -1, y, partial(Blur(), kernel=k), {"image": prior}, {"image": torch.zeros_like(x_t)}
    )
    # Two measurements of x, sqrt(a) x + noise and k * x + noise, of a white prior: diagonal in Fourier space.
    h, f = otf(k, (16, 16)), torch.fft.rfft2
    precision = 1 / 0.09 + a / (1 - a) + h.abs() ** 2 / std**2
    exact = torch.fft.irfft2((math.sqrt(a) / (1 - a) * f(x_t) + h.conj() * f(y) / std**2) / precision, s=(16, 16))
    torch.testing.assert_close(new["image"], exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x0["image"], exact, atol=1e-4, rtol=1e-4)


def test_centred_puts_the_centre_of_mass_in_the_middle():
    k = gaussian_kernels(4, 33, seed=0)
    moved = centred(torch.roll(k, (3, -2), (2, 3)))
    assert mnc(moved, k).min() > 0.99
    i = torch.arange(33.0)
    assert ((moved.sum((1, 3)) * i).sum(1) - 16).abs().max() < 0.05


# ------------------------------------------------------------------------------------------------- mechanics


@pytest.mark.parametrize("method", [fast_em, partial(diffusion_em, rounds=2)])
@pytest.mark.parametrize("backbone", ["pigdm", "dps", "diffpir"])
def test_em_gives_kernels_and_is_independent_of_the_batch(small_prior, method, backbone, g):
    y = 0.5 * torch.randn(2, 3, 16, 16, generator=g)
    run = partial(method, image_prior=small_prior, kernel_size=7, noise_std=0.05, steps=4, backbone=backbone, samples=2)
    both, one = run(y, seed=5), run(y[1:], seed=5)
    assert both.image.shape == (4, 3, 16, 16) and both.kernel.shape == (4, 1, 7, 7)
    assert both.kernel.min() >= 0
    torch.testing.assert_close(both.kernel.sum((1, 2, 3)), torch.ones(4))
    torch.testing.assert_close(both.kernel[2:], one.kernel, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(both.kernel[0], both.kernel[1])
    assert not torch.equal(both.image[0], both.image[1])


def test_fit_below_keeps_the_kernel_until_then(small_prior, g):
    y = 0.5 * torch.randn(1, 3, 16, 16, generator=g)
    settings = {**as_published(7), "fit_below": 300}
    run = fast_em(y, small_prior, kernel_size=7, noise_std=0.05, steps=5, history=5, **settings)
    kernels, times = run.history["kernel"][:, 0], run.history["t"]
    assert torch.equal(kernels[times >= 300][-1], delta(7)[0])
    assert not torch.equal(kernels[-1], delta(7)[0])


def test_the_diffusion_prior_serves_as_denoiser():
    k, std = motion_kernels(4, 32, seed=2), 0.01
    noisy = k + std * torch.randn(k.shape, generator=torch.Generator().manual_seed(0))
    clean = prior_denoiser(load_prior("kernel"))(noisy, std)
    assert (mnc(clean, k) > mnc(noisy.clamp(min=0), k) + 0.02).all()
    assert mnc(clean, k).mean() > 0.95


def test_the_denoiser_that_ships_knows_kernels_of_any_window(g):
    net, std = load_kernel_denoiser(), 0.003
    for size in (17, 32, 33, 64):
        k = motion_kernels(8, size, seed=size)
        noisy = k + std * torch.randn(k.shape, generator=g)
        assert (net(noisy, std) - k).square().mean().sqrt() < 0.4 * std
        assert mnc(net(noisy, std).clamp(min=0), k).mean() > mnc(noisy.clamp(min=0), k).mean()
    k = blur_kernels(2, 33, seed=0)
    together = net(k, torch.tensor([0.01, 0.003]))
    torch.testing.assert_close(together[1:], net(k[1:], 0.003), atol=1e-6, rtol=0)


def test_the_denoiser_is_homogeneous(g):
    """Nothing has a bias: kernel and noise ten times as large, result ten times as large."""
    torch.manual_seed(0)
    net = KernelDenoiser(channels=8)
    assert not [name for name, _ in net.named_parameters() if "bias" in name]
    k = motion_kernels(2, 17, seed=0) + 0.01 * torch.randn(2, 1, 17, 17, generator=g)
    torch.testing.assert_close(net(10 * k, 0.1), 10 * net(k, 0.01), atol=1e-5, rtol=1e-4)


def test_a_denoiser_is_saved_and_loaded(tmp_path, g):
    torch.manual_seed(0)
    net, k = KernelDenoiser(channels=4, dilations=(1, 2, 1)), torch.rand(1, 1, 9, 9, generator=g)
    net.save(tmp_path / "net.safetensors", "a note")
    torch.testing.assert_close(load_kernel_denoiser(tmp_path / "net.safetensors")(k, 0.1), net(k, 0.1).detach())
    with pytest.raises(FileNotFoundError, match="path: no file"):
        load_kernel_denoiser(tmp_path / "other.safetensors")
    DiffusionPrior(UNet(1, base_channels=8, groups=4), "kernel").save(tmp_path / "prior.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint of a kernel denoiser"):
        load_kernel_denoiser(tmp_path / "prior.safetensors")


def test_threshold_cuts_haze_and_nothing_else():
    k = torch.tensor([0.5, 0.06, 0.04, 0.0]).reshape(1, 1, 2, 2)
    assert torch.equal(Threshold(0.1)(k, 1e5), torch.tensor([0.5, 0.06, 0.0, 0.0]).reshape(1, 1, 2, 2))


def test_known_kernel_by_pigdm_sharpens():
    x, k = dead_leaves(2, 64, seed=77), motion_kernels(2, 32, seed=78)
    y = Blur()(x, k) + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    run = sample(y, partial(Blur(), kernel=k), {"image": load_prior("image")}, steps=30, guidance=PiGDM(0.02))
    assert (psnr(run.image, x) > psnr(y, x) + 3).all()


def test_em_of_light_that_was_blurred(astronaut):
    x, k = astronaut(64)
    y = LinearLight(Blur())(x, k) + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    common = dict(image_prior=load_prior("image"), kernel_size=32, noise_std=0.02)
    fast = {told: fast_em(y, steps=30, response=told, **common) for told in ("srgb", "linear")}
    assert mnc(fast["srgb"].kernel, k) > max(0.95, mnc(fast["linear"].kernel, k) + 0.03)
    options = dict(steps=6, rounds=2, start_time=150, backbone="diffpir", regularizer=Annealed(load_prior("kernel")))
    options |= dict(kernel0=fast["srgb"].kernel, image0=fast["srgb"].image)
    found = {told: diffusion_em(y, response=told, **options, **common) for told in ("srgb", "linear")}
    assert 1 - mnc(found["srgb"].kernel, k) < 0.8 * (1 - mnc(found["linear"].kernel, k))


@pytest.mark.parametrize("settings", [{}, as_published(32)], ids=["default", "as published"])
def test_fast_em_finds_the_kernel_from_edges_and_from_no_blur(settings, astronaut):
    x, k = astronaut(64)
    y = Blur()(x, k) + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    run = fast_em(y, load_prior("image"), kernel_size=32, noise_std=0.02, steps=30, **settings)
    assert mnc(run.kernel, k) > 0.8 and mnc(run.kernel, delta(32)) < 0.7
    assert psnr(run.image, x, max_shift=4) > psnr(y, x, max_shift=4) + 2


def test_the_annealed_prior_keeps_faint_strokes(g):
    """From the true images, one M-step each: what a denoiser at one level shaves off, this one keeps."""
    kernel = torch.zeros(1, 1, 32, 32)
    kernel[..., 12:15, 8:11] = 1.0
    kernel[..., 14, 11:26] = 0.08
    kernel, faint = kernel / kernel.sum(), (kernel > 0) & (kernel < 0.1)
    x = dead_leaves(2, 96, seed=4)
    y = Blur()(x, kernel)
    y = y + 0.02 * torch.randn(y.shape, generator=g)
    shaved = fit_kernel(y, x, 0.02, delta(32), PlugAndPlay())
    kept = fit_kernel(y, x, 0.02, shaved, Annealed(load_prior("kernel")))
    torch.testing.assert_close(kept.sum((1, 2, 3)), torch.ones(2))
    assert kept.min() >= 0 and mnc(kept, kernel).min() > 0.98
    share = [(k * faint).sum((1, 2, 3)) / (kernel * faint).sum() for k in (shaved, kept)]
    assert share[0].max() < 0.5 and (share[1] - 1).abs().max() < 0.2


@pytest.mark.parametrize("noise_std, share", [(0.02, 3.26), (0.5, 1.015)])
def test_only_noise_averages_out_over_pixels(noise_std, share, monkeypatch):
    """Four times the pixels outweigh the prior four times as much if all is noise, and no more if all is misfit."""
    asked = []
    monkeypatch.setattr(Annealed, "fit", lambda self, kernel, solve, wrong: (asked.append(wrong**2), kernel)[1])
    for side in (64, 128):
        x = torch.zeros(1, 3, side, side)
        fit_kernel(x, x, noise_std, gaussian_kernels(1, 32, seed=0), Annealed(load_prior("kernel")))
    assert asked[1] / asked[0] == pytest.approx(share, rel=2e-3)


def test_em_that_returns_comes_nearer(g):
    x, k = dead_leaves(2, 64, seed=11), motion_kernels(2, 32, seed=12)
    y = Blur()(x, k) + 0.02 * torch.randn(x.shape, generator=g)
    options = dict(kernel_size=32, noise_std=0.02, steps=6, backbone="diffpir", start_time=150)
    options |= dict(regularizer=Annealed(load_prior("kernel")), kernel0=l0_pyramid(y, 32, 0.02)[1])
    image = load_prior("image")
    run = diffusion_em(y, image, rounds=8, **options)
    assert (mnc(run.kernel, k) > mnc(options["kernel0"], k) + 0.01).all()
    assert run.evaluations == 48 and run.image.shape == x.shape

    first = diffusion_em(y, image, rounds=1, **options)
    second = diffusion_em(y, image, rounds=2, **options)
    on = dict(image0=first.image, seed=1000, **{**options, "kernel0": first.kernel})
    torch.testing.assert_close(diffusion_em(y, image, rounds=1, **on).kernel, second.kernel, atol=1e-5, rtol=0)


def test_a_threshold_never_leaves_no_blur():
    """Why the regulariser is a denoiser: what is cut at a tenth of the peak cannot grow."""

    x, k = dead_leaves(1, 64, seed=3), gaussian_kernels(1, 15, std=(2.0, 2.0), seed=0)
    y, kernel = Blur()(x, k), delta(15)
    for _ in range(3):
        kernel = fit_kernel(y, y, 0.02, kernel, Threshold())
    torch.testing.assert_close(kernel, delta(15))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x_samples=torch.zeros(1, 3, 8, 9)), "x_samples: expected shape"),
        (dict(kernel0=torch.zeros(1, 1, 20, 20)), "kernel0: .* larger than the image"),
        (dict(kernel0=torch.zeros(3, 3)), "kernel0: expected shape"),
        (dict(y=torch.full((1, 3, 8, 8), math.nan)), "y: has values that are NaN"),
        (dict(kernel0=torch.full((1, 1, 3, 3), math.inf)), "kernel0: has values that are NaN or infinite"),
        (dict(noise_std=0.0), "noise_std: expected a positive number"),
        (dict(iterations=0), "iterations: expected a positive integer"),
    ],
)
def test_bad_input_of_the_m_step(change, message):
    good = dict(y=torch.zeros(1, 3, 8, 8), x_samples=torch.zeros(1, 3, 8, 8), noise_std=0.1, kernel0=delta(3))
    with pytest.raises(ValueError, match=message):
        fit_kernel(**{**good, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(backbone="ddim"), "backbone: expected"),
        (dict(steps=[9, 0]), "steps: EM expects a number, got list"),
        (dict(kernel_size=17), "kernel_size: expected 1 to 16"),
        (dict(kernel0=delta(9)), "kernel0: expected shape"),
        (dict(kernel0=3 * delta(7)), "kernel0: expected a kernel, non-negative and of sum one"),
        (dict(kernel0=delta(7) * math.nan), "kernel0: expected a kernel"),
        (dict(kernel_size=7.5), "kernel_size: expected a positive integer, got 7.5"),
        (dict(kernel0=delta(7), noise_std=0.0), "noise_std: expected a positive number, got 0.0"),
        (dict(samples=0), "samples: expected a positive integer"),
        (dict(boundary="zero"), "boundary: EM knows"),
        (dict(response="raw"), "response: expected one of"),
    ],
)
def test_bad_input_of_em(small_prior, change, message):
    """Said before the first step."""
    good = dict(y=torch.zeros(1, 3, 16, 16), image_prior=small_prior, kernel_size=7, noise_std=0.1, steps=2)
    for method in (fast_em, diffusion_em):
        with pytest.raises(ValueError, match=message):
            method(**{**good, **change}, callback=lambda *_: pytest.fail("sampling has begun"))
        with pytest.raises(TypeError, match="regularizer: expected None, Annealed or a callable, got str"):
            method(**good, regularizer="l1")
    for method, other, said in (
        (fast_em, dict(fit_below=0), "fit_below: expected a positive integer"),
        (diffusion_em, dict(rounds=0), "rounds: expected a positive integer"),
        (diffusion_em, dict(image0=torch.zeros(1, 3, 16, 16)), "image0: is given, but no start_time"),
    ):
        with pytest.raises(ValueError, match=said):
            method(**good, **other)


@pytest.mark.parametrize("method", [partial(fast_em, fit_below=1000), partial(diffusion_em, rounds=2)])
def test_em_that_diverges_says_so_with_the_step(small_prior, method):
    class Broken:
        """A prior whose estimates are NaN, from the third evaluation on."""

        def __init__(self):
            self.calls = count()

        def __getattr__(self, name):
            return getattr(small_prior, name)

        def estimate(self, *arguments):
            x0, variance = small_prior.estimate(*arguments)
            return x0 * (math.nan if next(self.calls) > 1 else 1.0), variance

    y = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ArithmeticError, match="diverged at step 3 of 5 .* take a smaller step_size"):
        method(y, Broken(), kernel_size=7, noise_std=0.1, steps=5, kernel0=delta(7))


def test_the_history_of_both_has_image_and_kernel(small_prior, g):
    y = 0.5 * torch.randn(2, 3, 16, 16, generator=g)
    for method in (fast_em, partial(diffusion_em, rounds=2)):
        run = method(y, small_prior, kernel_size=7, noise_std=0.1, steps=4, history=2, samples=2)
        shapes = {name: tuple(value.shape) for name, value in run.history.items()}
        assert shapes == {"t": (2,), "residual": (2, 4), "image": (2, 4, 3, 16, 16), "kernel": (2, 4, 1, 7, 7)}


def test_the_annealed_prior_has_one_window(small_prior):
    good = dict(noise_std=0.1, regularizer=Annealed(load_prior("kernel")))
    for method in (fast_em, diffusion_em):
        with pytest.raises(ValueError, match="regularizer: its prior has windows of 32"):
            method(torch.zeros(1, 3, 16, 16), small_prior, kernel_size=7, callback=pytest.fail, **good)
    for window in ((7, 7), (32, 16)):
        with pytest.raises(ValueError, match="regularizer: its prior has windows of 32"):
            fit_kernel(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32), kernel0=torch.ones(1, 1, *window), **good)
