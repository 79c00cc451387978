import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from blindlib import (
    Blur,
    DeepLinear,
    Downsample,
    Moments,
    SpaceVaryingBlur,
    dead_leaves,
    deblur,
    fit_flow,
    gaussian_kernels,
    learn_operator,
    load_operator,
    mirrored,
    mnc,
    motion_kernels,
    runs,
)
from blindlib import __main__ as command
from blindlib.__main__ import main, read_folder
from blindlib.deblur import read_image, write_image
from blindlib.em import bare
from blindlib.jobs import Team
from blindlib.matching import Learned, _positions, between, flow_loss, operator_loss, velocity
from blindlib.moments import off_centre, simplex, standard
from blindlib.operators import otf, to_light
from blindlib.priors import WEIGHTS
from blindlib.runs import Run

TINY = dict(base_channels=8, multipliers=(1,), groups=4)
FLAT = torch.full((1, 1, 7, 7), 1 / 49)


def gaussian_velocity(mean, variance, x_t, t):
    """E[y - noise | x_t] of independent normal values, in closed form."""
    t = t.reshape(-1, *[1] * (x_t.ndim - 1))
    gain = (t * variance - (1 - t)) / (t**2 * variance + (1 - t) ** 2)
    return mean + gain * (x_t - t * mean)


def field_velocity(spectrum, x_t, t):
    """The same of a stationary Gaussian field on a periodic grid, whose Fourier modes are independent."""
    v = gaussian_velocity(0.0, spectrum, torch.fft.rfft2(x_t), t)
    return torch.fft.irfft2(v, s=x_t.shape[-2:])


# -------------------------------------------------------------------------------------------------- exact answers


def test_the_exact_velocity_minimises_the_flow_loss(g):
    """And the loss is then the variance that no net can explain, also known in closed form."""
    y, noise = 0.3 + 0.5 * torch.randn(4000, 1, 4, 4, generator=g), torch.randn(4000, 1, 4, 4, generator=g)
    t = torch.full((4000,), 0.6)
    exact = partial(gaussian_velocity, 0.3, 0.25)
    loss = flow_loss(exact, y, t, noise).mean()
    unexplained = 0.25 * 1.0 / (0.36 * 0.25 + 0.16)  # s^2 / (t^2 s^2 + (1 - t)^2)
    assert loss == pytest.approx(unexplained, rel=0.03)
    for other in (0.2, 0.3):
        assert flow_loss(partial(gaussian_velocity, 0.3, other), y, t, noise).mean() > loss


def test_a_net_learns_the_velocity_of_a_gaussian(g):
    images = 0.3 + 0.5 * torch.randn(64, 1, 32, 32, generator=g)
    net = fit_flow(images, patch=12, steps=200, batch=16, learning_rate=5e-3, net=TINY, seed=0)
    t = torch.linspace(0.05, 0.95, 256)
    y, noise = standard(0.3 + 0.5 * torch.randn(256, 1, 12, 12, generator=g)), torch.randn(256, 1, 12, 12, generator=g)
    x_t = between(y, t, noise)
    exact = gaussian_velocity(0.0, 0.25 / (0.25 + 0.05**2), x_t, t)  # but for the two numbers that standard() fixes
    error = (velocity(net)(x_t, t) - exact).square().mean() / exact.var()
    assert error < 0.06, f"{error:.3f} of the velocity's variance is wrong"
    assert not any(p.requires_grad for p in net.parameters())


def test_standard_patches_have_no_brightness_and_one_contrast(g):
    y = torch.randn(3, 2, 8, 8, generator=g)
    out = standard(torch.cat([y, 0.5 * y + 0.2, torch.zeros_like(y)]))
    torch.testing.assert_close(out.mean((1, 2, 3)), torch.zeros(9), atol=1e-6, rtol=0)
    torch.testing.assert_close(out[:3], out[3:6], atol=0.03, rtol=0)
    torch.testing.assert_close(out[:3].square().mean((1, 2, 3)), torch.ones(3), atol=0.01, rtol=0)
    assert not out[6:].any()


@pytest.mark.parametrize("t", [0.3, 0.7])
@pytest.mark.parametrize("std, true_std", [(0.5, 0.8), (0.8, 0.5)])
def test_the_operator_gradient_is_that_of_the_divergence(t, std, true_std, g):
    """y = s z with the unknown s: the gradient of KL(simulated || measured) at x_t, times (1 - t) / t^2."""
    s = torch.tensor(std, dtype=torch.float64, requires_grad=True)
    ours, true = (t**2 * v + (1 - t) ** 2 for v in (s**2, true_std**2))
    kl = 0.5 * (ours / true - 1 - torch.log(ours / true))
    (expected,) = torch.autograd.grad(kl, s)

    s = torch.tensor(std, requires_grad=True)
    y, noise = s * torch.randn(20_000, 1, 4, 4, generator=g), torch.randn(20_000, 1, 4, 4, generator=g)
    times = torch.full((len(y),), t)
    x_t = between(y, times, noise)
    difference = gaussian_velocity(0.0, std**2, x_t, times) - gaussian_velocity(0.0, true_std**2, x_t, times)
    (found,) = torch.autograd.grad(operator_loss(difference, y), s)
    assert found == pytest.approx(float(expected) * (1 - t) / t**2, rel=0.03)


def test_matching_a_gaussian_field_finds_the_kernels_spectrum(g):
    """With both velocities exact; the true kernel's transfer function is positive, so its spectrum is all of it."""
    n, noise_std = 16, 0.05
    truth = gaussian_kernels(1, 7, std=(0.9, 0.9), seed=0)
    truth = (truth + truth.flip(-2, -1)) / 2
    rows, columns = torch.fft.fftfreq(n)[:, None], torch.fft.rfftfreq(n)
    scene = 1 / (0.02 + rows**2 + columns**2)
    scene = scene / scene.mean()

    def spectrum(k):
        return scene * otf(k, (n, n)).abs() ** 2 + noise_std**2

    blur, target = Blur("circular"), spectrum(truth)
    theta = torch.nn.Parameter(torch.full((1, 1, 7, 7), 1 / 49))
    optimizer = torch.optim.Adam([theta], lr=5e-3, betas=(0.5, 0.95))
    before = mnc(simplex(theta.detach()), truth)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 600)
        k = simplex(theta)
        white = torch.randn(64, 1, n, n, generator=g)
        x = torch.fft.irfft2(scene.sqrt() * torch.fft.rfft2(white), s=(n, n))
        y = blur(x, k) + noise_std * torch.randn(x.shape, generator=g)
        t = torch.rand(64, generator=g)
        x_t = between(y, t, torch.randn(y.shape, generator=g)).detach()
        difference = field_velocity(spectrum(k.detach()), x_t, t) - field_velocity(target, x_t, t)
        optimizer.zero_grad()
        (operator_loss(difference, y) + 0.01 * off_centre(k).sum()).backward()
        optimizer.step()
    found = simplex(theta.detach())
    wrong = [(spectrum(k) / target).log().abs().max() for k in (torch.full((1, 1, 7, 7), 1 / 49), found)]
    assert wrong[0] > 2 and wrong[1] < 0.25, f"log of the ratio of spectra, before and after: {wrong}"
    assert before < 0.8 and mnc(found, truth) > 0.97


def test_networks_know_where_in_the_field_a_patch_lies(g):
    y = torch.zeros(400, 1, 4, 6)
    at = _positions([(0, 0)] * 400, (8, 12), y, g)
    right = (at[:, :, 0, 0] == at[:, :, 0, 0].mode(0).values).all(1)
    assert at.shape == (400, 2, 4, 6) and 0.72 < right.float().mean() < 0.88, "one in five is told a wrong place"
    torch.testing.assert_close(at[right][0, 0, :, 0], torch.tensor([-7, -5, -3, -1]) / 8)
    torch.testing.assert_close(at[right][0, 1, 0], torch.tensor([-11, -9, -7, -5, -3, -1]) / 12)
    assert at.abs().max() < 1


def test_learning_a_grid_of_psfs(field_sets, tmp_path):
    clean, degraded, psfs = field_sets
    quick = dict(patch=8, batch=4, seed=0)
    flow = fit_flow(degraded, steps=4, positions=True, net=TINY, **quick)
    assert (flow.in_channels, flow.config["out_channels"]) == (3, 1)
    blur, common = (
        SpaceVaryingBlur("valid"),
        dict(noise_std=0.01, kernel_size=7, grid=(2, 2), steps=2, flow=flow, **quick),
    )
    found = learn_operator(clean, degraded, blur, start=psfs, truth=psfs, **common)
    assert found.kernel.shape == psfs.shape and found.history["mnc"][-1] > 0.95 and found.deviation.shape == (2, 3)
    found.save(tmp_path / "field.safetensors")
    saved = load_operator(tmp_path / "field.safetensors")
    assert torch.equal(saved["kernel"], found.psfs) and saved["field"] == tuple(degraded.shape[2:])
    with pytest.raises(ValueError, match="start: expected shape \\(1, 2, 2, 1, 7, 7\\)"):
        learn_operator(clean, degraded, blur, start=FLAT, **common)
    with pytest.raises(ValueError, match="degraded: a blur that varies over the field needs images of one size"):
        learn_operator(clean, [degraded[0], degraded[1, :, :-1]], blur, **common)
    with pytest.raises(ValueError, match="flow: a net of 3 channels, the images .and positions. have 1"):
        learn_operator(clean, degraded, start=FLAT, **common)
    with pytest.raises(TypeError, match="operator: a SpaceVaryingBlur has the moments of each cell"):
        Moments(clean, degraded, blur, noise_std=0.01, kernel_size=7)


# -------------------------------------------------------------------------------------------- a deep linear kernel


def test_a_deep_kernel_is_its_layers_one_after_the_other(g):
    """With the stride at the last of them, as super-resolution has it; and every layer learns."""
    net = DeepLinear((5, 3, 3, 1, 1), channels=6, seed=1)
    x = torch.randn(2, 1, 24, 20, generator=g)
    h = x
    for i, layer in enumerate(net.layers):
        h = torch.nn.functional.conv2d(h, layer.weight, stride=2 if i == 4 else 1)
    kernel = net()
    assert kernel.shape == (1, 1, 9, 9) and kernel.min() < 0
    torch.testing.assert_close(Downsample(2)(x, kernel), h, atol=1e-5, rtol=1e-4)
    h.square().sum().backward()
    there = [layer.weight.grad.clone() for layer in net.layers]
    net.zero_grad()
    Downsample(2)(x, net()).square().sum().backward()
    for layer, expected in zip(net.layers, there, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(layer.weight.grad, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(DeepLinear((5, 3, 3, 1, 1), channels=6, seed=1)(), kernel)
    assert not torch.equal(DeepLinear((5, 3, 3, 1, 1), channels=6, seed=2)(), kernel)


def test_a_deep_kernel_starts_from_one_that_is_given_and_is_found_by_regression(g):
    truth, coarse = motion_kernels(1, 9, extent=(0.7, 0.9), seed=8), Downsample(2)
    net = DeepLinear((5, 3, 3, 1), channels=16)
    net.fit(gaussian_kernels(1, 9, std=(1.2, 1.2), seed=0))
    torch.testing.assert_close(net(), gaussian_kernels(1, 9, std=(1.2, 1.2), seed=0), atol=3e-3, rtol=0)
    x = torch.randn(4, 1, 40, 40, generator=g)
    y = coarse(x, truth)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        (coarse(x, net()) - y).square().mean().backward()
        optimizer.step()
    assert mnc(net().detach(), truth) > 0.995


def test_learning_a_deep_kernel_and_going_on(sets, tmp_path, monkeypatch):
    clean, k = sets[0], sets[2]
    degraded = Downsample(2)(dead_leaves(60, 46, seed=1), k)
    degraded = degraded + 0.02 * torch.randn(degraded.shape, generator=torch.Generator().manual_seed(2))
    flow = fit_flow(degraded, patch=8, steps=2, batch=4, net=TINY)
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_SAVES", 0)
    net = DeepLinear((3, 3, 3, 1), channels=8, seed=5)
    before = net()

    def run(folder, **change):
        options = dict(flow=flow, start=k, learning_rate=1e-3, folder=folder, parameters=net)
        return tiny(clean, degraded, Downsample(2), **options | change)

    whole = run(None)
    assert torch.equal(net(), before), "the net that was given has been changed"
    assert mnc(whole.kernel, k) > 0.97 and whole.kernel.min() >= 0 and whole.kernel.sum() == pytest.approx(1, abs=1e-5)
    assert not torch.equal(whole.kernel, k) and not torch.equal(whole.kernel, run(None, parameters=None).kernel)
    real = runs.save_whole

    def kill(state, path):
        real(state, path)
        if state["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(runs, "save_whole", kill)
        run(tmp_path)
    assert torch.equal(run(tmp_path).kernel, whole.kernel)
    with pytest.raises(ValueError, match="is of another run, whose parameters differed"):
        run(tmp_path, parameters=DeepLinear((3, 3, 3, 1), channels=8, seed=6))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sizes=(3, 0)), r"sizes\[1\]: expected a positive integer, got 0"),
        (dict(sizes=()), "sizes: expected at least one layer, got none"),
        (dict(channels=0), "channels: expected a positive integer, got 0"),
    ],
)
def test_bad_layers(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeepLinear(**arguments)


def test_a_deep_kernel_has_its_size():
    with pytest.raises(ValueError, match=r"kernel: expected shape \(1, 1, 5, 5\), got \(1, 1, 7, 7\)"):
        DeepLinear((3, 3)).fit(FLAT)


# ------------------------------------------------------------------------------------------------ the whole thing


def test_it_learns_a_kernel_from_unpaired_images(sets):
    clean, degraded, k = sets
    flow = fit_flow(degraded, patch=16, steps=120, batch=16, net=dict(base_channels=8, multipliers=(1, 2), groups=4))
    found = learn_operator(
        clean, degraded, noise_std=0.02, kernel_size=7, patch=16, steps=120, batch=16, flow=flow, start=FLAT,
        learning_rate=1e-2, truth=k,
    )  # fmt: skip
    assert found.kernel.shape == (1, 1, 7, 7) and found.kernel.min() >= 0
    assert found.kernel.sum() == pytest.approx(1, abs=1e-5)
    assert mnc(found.kernel, k) > mnc(FLAT, k) + 0.15
    last = found.history["kernel"][-1][None]
    assert found.history["mnc"][-1] == pytest.approx(float(mnc(last, k)), abs=1e-5)
    assert torch.equal(found.kernel, bare(last)) and not torch.equal(found.kernel, last)
    assert found.history["step"][-1] == 120 and found.history["kernel"].shape[1:] == (1, 7, 7)


def test_networks_that_lead_astray_are_not_followed(sets, tmp_path):
    """Untrained ones at a wild rate; moments notice it without the truth, and end the run, for good."""
    clean, degraded, k = sets
    flow = fit_flow(degraded, patch=8, steps=1, batch=4, net=TINY)
    for _ in range(2):
        found = tiny(clean, degraded, flow=flow, start=k, steps=30, learning_rate=0.05, flow_rate=0.05, folder=tmp_path)
        assert found.deviation.shape == (3, 3) and found.history["step"][-1] == 20, "two of three looks"
        assert found.deviation[1:].amax(1).min() > 2 > found.deviation[0].max()
        assert torch.equal(found.kernel, k) and not torch.equal(found.history["kernel"][-1], k[0])


tiny = partial(learn_operator, noise_std=0.02, kernel_size=7, patch=8, steps=6, batch=4, start=FLAT)


def test_a_frozen_net_sees_no_more_of_the_degraded_images(sets):
    clean, degraded, _ = sets
    flow = fit_flow(degraded, patch=8, steps=4, batch=4, net=TINY)
    last = {
        (frozen, first): tiny(clean, images, flow=flow, frozen=frozen).history["kernel"][-1]
        for frozen in (True, False)
        for first, images in enumerate((degraded, degraded.flip(0)))
    }
    assert torch.equal(last[True, 0], last[True, 1]) and not torch.equal(last[False, 0], last[False, 1])
    assert not torch.equal(last[True, 0], last[False, 0])


def test_it_learns_below_the_resolution_and_the_noise_too(sets):
    clean, k = sets[0], sets[2]
    degraded = Downsample(2)(dead_leaves(60, 46, seed=1), k)
    flow = fit_flow(degraded, patch=8, steps=2, batch=4, net=TINY)
    found = tiny(clean, degraded, Downsample(2), flow=flow, start=None, noise_std=None)
    assert found.kernel.shape == (1, 1, 7, 7) and repr(found.operator) == repr(Downsample(2))
    assert 0 < found.noise_std < 0.02, "of measurements without noise, from a start at 0.02"


@pytest.mark.parametrize("noise_std, flow_steps", [(0.005, 400), (0.08, 100)])
def test_matching_learns_the_noise_along_with_the_kernel(sets, noise_std, flow_steps):
    """From 0.02, where a start is given: down or up, a good part of the way."""
    clean, _, k = sets
    degraded = Blur("valid")(dead_leaves(150, 46, seed=1), k)
    degraded = degraded + noise_std * torch.randn(degraded.shape, generator=torch.Generator().manual_seed(2))
    net = dict(base_channels=8, multipliers=(1, 2), groups=4)
    flow = fit_flow(degraded, patch=8, steps=flow_steps, batch=32, net=net)
    options = dict(patch=8, steps=60, batch=32, flow=flow, start=k, learning_rate=1e-3)
    found = tiny(clean, degraded, noise_std=None, **options)
    assert abs(math.log(found.noise_std / noise_std)) < 0.85 * abs(math.log(0.02 / noise_std))
    assert found.noise_std == pytest.approx(float(found.history["noise_std"][-1]))
    assert tiny(clean, degraded, **options | dict(steps=2)).noise_std == 0.02, "where it is given"


def test_the_seed_decides(sets, monkeypatch):
    clean, degraded, _ = sets
    flows = [fit_flow(degraded, patch=8, steps=4, batch=4, net=TINY, seed=s) for s in (0, 0, 1)]
    weights = [torch.cat([p.flatten() for p in f.parameters()]) for f in flows]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    state = torch.random.get_rng_state()
    kernels = [tiny(clean, degraded, flow=flows[0], seed=s).kernel for s in (0, 0, 1)]
    assert torch.equal(kernels[0], kernels[1]) and not torch.equal(kernels[0], kernels[2])
    assert torch.equal(torch.random.get_rng_state(), state), "the global random state was touched"
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    fit_flow(degraded, patch=8, steps=1, batch=4, net=TINY)
    DeepLinear((3, 3))
    assert not seeded, "that of GPUs was touched"


def test_a_resumed_run_is_the_run_that_was_not_stopped(sets, tmp_path, monkeypatch):
    clean, degraded, k = sets
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_SAVES", 0)

    def run(folder):
        flow = fit_flow(degraded, patch=8, steps=6, batch=4, net=TINY, folder=folder)
        return tiny(clean, degraded, flow=flow, folder=folder, truth=k, noise_std=None)

    whole = run(tmp_path / "a")
    real, saves = runs.save_whole, []

    def kill(state, path):
        real(state, path)
        saves.append(path.name)
        if len(saves) in (2, 7):  # in the flow's run, then in the operator's
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "save_whole", kill)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "b")
    again = run(tmp_path / "b")
    assert saves == ["flow.pt"] * 6 + ["operator.pt"] * 6, "steps were lost or done twice"
    torch.testing.assert_close(again.kernel, whole.kernel, atol=1e-6, rtol=0)
    assert again.history.keys() == whole.history.keys() == {"step", "gap", "loss", "kernel", "mnc", "noise_std"}
    assert again.noise_std == pytest.approx(whole.noise_std, abs=1e-7) and whole.noise_std != 0.02
    for key, values in whole.history.items():
        torch.testing.assert_close(again.history[key], values, atol=1e-5, rtol=0)
    assert math.isclose(run(tmp_path / "b").kernel.sub(whole.kernel).abs().max(), 0, abs_tol=1e-6)
    with pytest.raises(ValueError, match=r"folder: .*operator.pt is of another run, whose seed differed"):
        tiny(clean, degraded, flow=again.flow, folder=tmp_path / "b", noise_std=None, seed=1)
    with pytest.raises(ValueError, match=r"steps: .*flow.pt has 6 steps already, got 5; ask for as many or more"):
        fit_flow(degraded, patch=8, steps=5, batch=4, net=TINY, folder=tmp_path / "b")


def test_a_run_saves_the_start_that_it_has_fitted(sets, tmp_path, monkeypatch):
    """Killed after it, or moved to another machine, the run goes on from the same one; of other sets it does not."""
    clean, degraded, _ = sets
    flow = fit_flow(degraded, patch=8, steps=1, batch=4, net=TINY)
    fits, real = [], Moments.fit

    def fit(*args, **options):
        found = real(*args, **options | dict(steps=4))
        fits.append(found + 1e-3 * len(fits))  # no two machines alike
        return found if len(fits) == 1 else fits[-1] / fits[-1].sum()

    monkeypatch.setattr(Moments, "fit", fit)
    run = dict(noise_std=None, kernel_size=7, patch=8, batch=4, flow=flow, folder=tmp_path)
    first = learn_operator(clean, degraded, **run, steps=1)
    (tmp_path / "operator.pt").unlink()
    again = learn_operator(clean, degraded, **run, steps=1)
    assert len(fits) == 1 and torch.equal(again.kernel, first.kernel) and again.noise_std == first.noise_std
    assert learn_operator(clean, degraded, **run, steps=2).kernel.shape == (1, 1, 7, 7) and len(fits) == 1
    with pytest.raises(ValueError, match=r"start.pt is of another run, whose degraded differed"):
        learn_operator(clean, degraded[1:], **run, steps=2)


def test_a_run_that_is_killed_while_it_fits_its_start_goes_on(sets, tmp_path, monkeypatch):
    clean, degraded, _ = sets
    flow = fit_flow(degraded, patch=8, steps=1, batch=4, net=TINY)
    real, save = Moments.fit, runs.save_whole
    monkeypatch.setattr(Moments, "fit", lambda *args, **options: real(*args, **options | dict(steps=6)))
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_SAVES", 0)
    run = dict(noise_std=None, kernel_size=7, patch=8, batch=4, flow=flow, steps=1)
    whole = learn_operator(clean, degraded, **run)

    saves = []

    def kill(state, path):
        save(state, path)
        saves.append(path.stem)
        if len(saves) in (1, 3, 6):
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "save_whole", kill)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            learn_operator(clean, degraded, **run, folder=tmp_path)
    again = learn_operator(clean, degraded, **run, folder=tmp_path)
    assert saves == ["retrieved", *3 * ["moments-1"], *3 * ["moments-2"], "start", "operator"], "done twice, or lost"
    assert torch.equal(again.kernel, whole.kernel) and again.noise_std == whole.noise_std
    assert torch.equal(again.deviation, whole.deviation)


def test_a_file_that_is_no_run(sets, tmp_path):
    run = dict(patch=8, steps=1, batch=4, net=TINY, folder=tmp_path)
    fit_flow(sets[1], **run)
    good = (tmp_path / "flow.pt").read_bytes()
    for bad in (good[: len(good) // 2], b"", b"not a run"):
        (tmp_path / "flow.pt").write_bytes(bad)
        with pytest.raises(ValueError, match=r"folder: .*flow.pt is damaged, or no run of blindlib; delete that file"):
            fit_flow(sets[1], **run)
    torch.save({"weights": torch.ones(2)}, tmp_path / "flow.pt")
    with pytest.raises(ValueError, match="delete that file"):
        fit_flow(sets[1], **run)


def test_both_velocities_have_the_same_dropout_which_follows_from_the_seed(sets):
    clean, degraded, k = sets
    runs = []
    for elsewhere in (1, 2):
        torch.manual_seed(elsewhere)
        flow = fit_flow(degraded, patch=8, steps=2, batch=4, net=TINY | dict(dropout=0.3), seed=3)
        options = dict(noise_std=0.02, kernel_size=7, patch=8, batch=4, flow=flow, start=k, frozen=True)
        runs.append(learn_operator(clean, degraded, steps=4, seed=3, **options))
        assert torch.initial_seed() == elsewhere
    first, again = runs
    assert first.history["gap"][0] == 0 and first.history["gap"][-1] > 0
    assert torch.equal(first.history["gap"], again.history["gap"]) and torch.equal(first.kernel, again.kernel)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_settings_that_are_numpys_are_resumed_too(kind, sets, tmp_path):
    run = dict(patch=8, steps=1, batch=np.int64(4), net=TINY, learning_rate=kind(1e-3), folder=tmp_path)
    first, again = (fit_flow(sets[1], **run) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    run = dict(patch=8, batch=4, folder=tmp_path, flow=first, start=sets[2], flow_rate=kind(3e-4), noise_std=0.02)
    run |= dict(learning_rate=kind(1e-3), kernel_size=7)
    one, two = (learn_operator(*sets[:2], **run, steps=steps) for steps in (1, 2))
    assert torch.equal(one.deviation[0], two.deviation[0])


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_a_run_that_goes_on_elsewhere_keeps_its_records_on_the_cpu(tmp_path, monkeypatch):
    """And the state of its parts where their parameters are; "meta" stands in for a GPU."""
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_SAVES", 0)

    def run(device):
        net, team = torch.nn.Linear(2, 2, device=device), Team("cpu")
        team.device = torch.device(device)
        optimizer = torch.optim.Adam(net.parameters())
        return net, optimizer, Run(tmp_path, "run", {}, dict(net=net, optimizer=optimizer), team)

    net, optimizer, first = run("cpu")
    for _ in first.steps(1, "", False):
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        first.keep(kernel=FLAT)
    net, optimizer, again = run("meta")
    for _ in again.steps(2, "", False):
        again.keep(kernel=FLAT)
    torch.testing.assert_close(again.stacked()["kernel"], torch.stack([FLAT, FLAT]))
    assert all(optimizer.state[p]["exp_avg"].device == p.device for p in net.parameters())


# -------------------------------------------------------------------------------------------------------- bad input


def test_images_of_any_size(sets):
    clean, degraded, _ = sets
    flow = fit_flow([degraded[0], degraded[1, :, :13, :30]], patch=8, steps=1, batch=4, net=TINY)
    out = tiny([clean[0], clean[1, :, :20, :14]], [degraded[0], degraded[1, :, :13, :30]], flow=flow)
    assert torch.isfinite(out.kernel).all()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(clean=torch.zeros(2, 3, 13, 40)), ValueError, "clean: image 0 has 40x13 pixels, 14x14 are needed"),
        (dict(clean=torch.zeros(2, 1, 40, 40)), ValueError, "clean: has 1 channels, degraded 3"),
        (dict(clean=[]), ValueError, "clean: expected at least one image"),
        (dict(clean=torch.full((2, 3, 40, 40), math.nan)), ValueError, "clean: expected finite values"),
        (dict(clean=torch.full((2, 3, 40, 40), 255.0)), ValueError, "clean: .*larger ones"),
        (dict(clean=torch.zeros(2, 3, 40, 40, dtype=torch.uint8)), TypeError, "clean: expected floating-point .*uint8"),
        (dict(clean=["a.png"]), TypeError, "clean: expected floating-point tensors, got str"),
        (dict(degraded=torch.zeros(3, 40, 40)), ValueError, r"degraded: expected a tensor \(N, C, H, W\)"),
        (dict(degraded=torch.zeros(2, 3, 7, 40)), ValueError, "degraded: image 0 has 40x7 pixels, 8x8 are needed"),
        (
            dict(degraded=torch.zeros(2, 3, 12, 40), start=None),
            ValueError,
            "degraded: image 0 has .*, 13x13 are needed",
        ),
        (dict(kernel_size=9), ValueError, "kernel_size: a kernel of 9 pixels is larger than the patch, 8"),
        (dict(kernel_size=0), ValueError, "kernel_size: expected a positive integer, got 0"),
        (dict(steps=0), ValueError, "steps: expected a positive integer"),
        (dict(batch=2.5), ValueError, "batch: expected a positive integer, got 2.5"),
        (dict(noise_std=5), ValueError, r"noise_std: expected a number in \[0, 1\)"),
        (dict(noise_std=math.nan), ValueError, "noise_std"),
        (dict(centre=0), ValueError, "centre, compact"),
        (dict(operator=Blur("circular")), ValueError, "operator: expected the boundary 'valid', got 'circular'"),
        (dict(operator=Downsample(2, "zero")), ValueError, "operator: expected the boundary 'valid', got 'zero'"),
        (
            dict(operator=Downsample(2), clean=torch.zeros(2, 3, 20, 40)),
            ValueError,
            "clean: image 0 has 40x20 pixels, 22x22",
        ),
        (dict(operator=print), TypeError, "operator: expected a Blur, Downsample or SpaceVaryingBlur, got built"),
        (dict(start=torch.ones(1, 1, 5, 5)), ValueError, r"start: expected shape \(1, 1, 7, 7\)"),
        (dict(start=torch.ones(1, 1, 7, 7)), ValueError, "start: expected a kernel, non-negative and of sum one"),
        (dict(truth=torch.ones(7, 7)), ValueError, r"truth: expected shape \(1, 1, 7, 7\), got \(7, 7\)"),
        (dict(patch=30, start=None), ValueError, "patch: expected a multiple of the net's stride, 4, got 30"),
        (dict(operator=SpaceVaryingBlur(weights_at="scene")), ValueError, "operator: expected weights_at='sensor'"),
        (
            dict(parameters=DeepLinear((3, 3))),
            ValueError,
            r"parameters: .* a kernel of shape \(1, 1, 7, 7\), got \(1, 1, 5, 5\)",
        ),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(clean=torch.zeros(2, 3, 40, 40), degraded=torch.zeros(2, 3, 40, 40)) | change
    with pytest.raises(error, match=message):
        tiny(**arguments)


def test_a_flow_that_does_not_fit(sets):
    clean, degraded, _ = sets
    flow = fit_flow(degraded[:, :1], patch=8, steps=1, batch=4, net=TINY)
    with pytest.raises(ValueError, match="flow: a net of 1 channels, the images .and positions. have 3"):
        tiny(clean, degraded, flow=flow)
    with pytest.raises(ValueError, match="patch: expected a multiple of the net's stride, 4, got 10"):
        fit_flow(degraded, patch=10, steps=1)


def test_a_run_that_diverges_says_so_and_leaves_no_state(sets, tmp_path):
    with pytest.raises(ArithmeticError, match="flow: diverged at step 2, .* take smaller learning rates"):
        fit_flow(sets[1], patch=8, steps=9, batch=4, net=TINY, learning_rate=1e30, folder=tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def folders(sets, tmp_path):
    """Photographs of several sizes, kinds and formats, and things that are none."""
    clean, degraded, _ = sets
    for name, images in (("clean", clean[:4]), ("degraded", degraded[:4])):
        folder = tmp_path / name
        folder.mkdir()
        write_image(images[:1], folder / "a.png")
        write_image(images[1:2, :, :40, :38], folder / "b.jpg")
        grey = (127.5 * (images[2].mean(0) + 1)).byte().numpy()
        Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "c.tif")
        write_image(images[3:, :, :12], folder / "small.png")
        (folder / "notes.txt").write_text("not a picture")
    return tmp_path


def arguments(folder, *more):
    options = ["--clean", folder / "clean", "--degraded", folder / "degraded", "--out", folder / "operator.safetensors"]
    quick = ["--kernel-size", 7, "--flow-steps", 2, "--steps", 2, "--batch", 2, "--device", "cpu"]
    return ["learn-operator", *map(str, options + quick + list(more))]


def test_from_two_folders_to_a_sharp_photograph(folders, capsys):
    assert main(arguments(folders, "--kernel-out", folders / "kernel.png")) == 0
    said, left_out = capsys.readouterr()
    assert left_out.count("skipped: ") == 4 and "small.png' has 46x12 pixels, 38x38 are needed" in left_out
    assert "notes.txt' cannot be read as an image" in left_out
    assert "3 clean and 3 degraded photographs\ngrey: noise 0.0" in said
    saved = load_operator(folders / "operator.safetensors")
    kernel = saved["kernel"]
    assert (
        saved["response"] == "srgb"
        and saved["field"] is None
        and kernel.shape == (1, 1, 7, 7)
        and kernel.sum() == pytest.approx(1, abs=1e-5)
    )
    assert (folders / "kernel.png").is_file()

    photo, sharp = folders / "degraded" / "a.png", folders / "sharp.png"
    assert main(["deblur", str(photo), "--operator", str(folders / "operator.safetensors"), "--out", str(sharp)]) == 0
    expected = deblur(photo, kernel=kernel, progress=False).image
    torch.testing.assert_close(read_image(sharp), expected.clamp(-1, 1), atol=0.006, rtol=0)


def test_quiet_is_not_about_what_was_left_out(folders, capsys):
    assert main(arguments(folders, "--quiet")) == 0
    said, left_out = capsys.readouterr()
    assert said == "" and left_out.count("skipped: ") == 4


def test_of_photographs_the_light_is_compared(folders):
    whole = dict(name="clean", least=30, crop=100, seed=0, warn=lambda line: None)
    light, values = (read_folder(folders / "clean", response=told, **whole)[0] for told in ("srgb", "linear"))
    x = read_image(folders / "clean" / "a.png")
    torch.testing.assert_close(values, x[0].mean(0, keepdim=True))
    torch.testing.assert_close(light, to_light(x)[0].mean(0, keepdim=True))
    assert light.mean() < values.mean() - 0.05


def test_no_more_photographs_are_held_than_there_is_room_for(folders):
    said = []
    options = dict(name="clean", least=30, crop=100, seed=0, response="srgb")
    every = read_folder(folders / "clean", **options, warn=lambda line: None)
    some = read_folder(folders / "clean", **options, warn=said.append, most=every[0].numel() + 1)
    assert len(every) == 3 and len(some) == 2
    for x, y in zip(some, every[:2], strict=True):
        torch.testing.assert_close(x, y)
    assert said == ["left out: 3 files from 'c.tif' on; 2 photographs take the memory meant for them"]


@pytest.mark.parametrize("response", ["srgb", "linear"])
def test_an_operators_file_says_what_it_blurs(folders, response, monkeypatch, capsys):
    """The command passes its photographs on so, and deblur undoes it so."""
    shown, real = [], command.fit_flow
    monkeypatch.setattr(command, "fit_flow", lambda images, **more: (shown.append(images[0]), real(images, **more))[1])
    assert main(arguments(folders, "--response", response)) == 0
    x = read_image(folders / "degraded" / "a.png")
    x = (to_light(x) if response == "srgb" else x)[0].mean(0, keepdim=True)
    torch.testing.assert_close(shown[0], x)
    found = folders / "operator.safetensors"
    saved = load_operator(found)
    kernel = saved["kernel"]
    assert saved["response"] == response
    photo, sharp = folders / "degraded" / "a.png", folders / "sharp.png"
    assert main(["deblur", str(photo), "--operator", str(found), "--out", str(sharp)]) == 0
    expected = deblur(photo, kernel=kernel, response=response, progress=False).image
    torch.testing.assert_close(read_image(sharp), expected.clamp(-1, 1), atol=0.006, rtol=0)
    other = "linear" if response == "srgb" else "srgb"
    options = ["--operator", str(found), "--out", str(sharp), "--response", other]
    assert main(["deblur", str(photo), *options]) == 2
    assert f"was learned with {response}, got {other}; leave it out" in capsys.readouterr().err


def test_a_grid_from_two_folders(folders, capsys):
    write_image(read_image(folders / "degraded" / "a.png").flip(-1), folders / "degraded" / "e.png")
    assert main(arguments(folders, "--grid", "1x2", "--kernel-out", folders / "psfs.png")) == 0
    said, left_out = capsys.readouterr()
    assert "skipped: 1 photographs that are not 40x40 pixels" in left_out and "4 clean and 3 degraded" not in said
    psfs = load_operator(folders / "operator.safetensors")["kernel"]
    assert psfs.shape == (1, 1, 2, 1, 7, 7) and read_image(folders / "psfs.png").shape == (1, 3, 7, 14)
    photo, sharp = folders / "degraded" / "a.png", folders / "sharp.png"
    assert main(["deblur", str(photo), "--operator", str(folders / "operator.safetensors"), "--out", str(sharp)]) == 0
    expected = deblur(photo, kernel=psfs, progress=False).image
    torch.testing.assert_close(read_image(sharp), expected.clamp(-1, 1), atol=0.006, rtol=0)
    other = ["deblur", str(folders / "degraded" / "b.jpg"), "--operator", str(folders / "operator.safetensors")]
    assert main([*other, "--out", str(sharp)]) == 2
    assert "photo: has 38x40 pixels, but the PSFs are of photographs of 40x40" in capsys.readouterr().err


def test_of_a_field_only_photographs_count_that_were_taken_as_most(tmp_path):
    """PSFs are the sensor's: of one size, and neither turned with the camera; what others there are takes no room."""
    x = dead_leaves(1, 40, seed=3)[..., :30]
    picture = Image.fromarray(((x[0].permute(1, 2, 0) + 1) * 127.5).byte().numpy())
    turned, half = picture.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    half[0x0112] = 3  # as a camera held upside down has it
    for name in ("a.png", "b.png"):
        turned.save(tmp_path / name)
    picture.save(tmp_path / "c.png", exif=half)
    for name in ("d.png", "e.png", "f.png"):
        picture.save(tmp_path / name)
    said = []
    options = dict(least=20, crop=1000, response="linear", grey=False, seed=0, warn=said.append, alike=True)
    found = read_folder(tmp_path, "degraded", **options, most=3 * x.numel())
    assert len(found) == 3 and all(torch.equal(y, read_image(tmp_path / "d.png")[0]) for y in found)
    assert said == ["skipped: 3 photographs that are not 30x40 pixels, or were held another way, unlike most"]


def test_each_colour_of_a_lens_by_itself(folders, monkeypatch):
    """What the command writes is what learn_operator finds of each colour, mirrored; and deblur undoes it."""
    write_image(read_image(folders / "degraded" / "a.png").flip(-1), folders / "degraded" / "e.png")
    runs, real = [], command.learn_operator
    monkeypatch.setattr(command, "learn_operator", lambda *a, **k: (runs.append((a, real(*a, **k))), runs[-1][1])[1])
    assert main(arguments(folders, "--grid", "1x2", "--colour", "--mirrored", "--kernel-out", folders / "k.png")) == 0
    light = to_light(read_image(folders / "degraded" / "a.png"))[0]
    for c, ((_, ys), _) in enumerate(runs):
        torch.testing.assert_close(ys[0], light[c : c + 1])
    psfs = load_operator(folders / "operator.safetensors")["kernel"]
    torch.testing.assert_close(psfs, mirrored(torch.cat([run.psfs for _, run in runs], 3)))
    assert psfs.shape == (1, 1, 2, 3, 7, 7) and read_image(folders / "k.png").shape == (1, 3, 7, 14)
    photo, sharp = folders / "degraded" / "a.png", folders / "sharp.png"
    assert main(["deblur", str(photo), "--operator", str(folders / "operator.safetensors"), "--out", str(sharp)]) == 0
    expected = deblur(photo, kernel=psfs, progress=False).image
    torch.testing.assert_close(read_image(sharp), expected.clamp(-1, 1), atol=0.006, rtol=0)


def test_the_same_command_goes_on(folders, monkeypatch):
    saves, real = [], runs.save_whole
    monkeypatch.setattr(runs, "save_whole", lambda state, path: (real(state, path), saves.append(path.name)))
    assert main(arguments(folders, "--quiet")) == 0
    first = (folders / "operator.safetensors").read_bytes()
    assert main(arguments(folders, "--quiet")) == 0
    fitted = ["retrieved.pt", "moments-1.pt", "moments-2.pt", "start.pt"]
    assert saves == ["flow.pt", *fitted, "operator.pt"], "what was done was done again"
    assert {p.name for p in (folders / "operator.run").iterdir()} == {"flow.pt", "start.pt", "operator.pt"}
    assert (folders / "operator.safetensors").read_bytes() == first


def test_several_processes_learn_one_operator_together(folders, two_processes):
    """As under `accelerate launch` on several GPUs, here on the CPU; then the same command again."""
    script = folders / "two.py"
    script.write_text(
        "import os, sys, torch\n"
        "import blindlib.__main__ as command\n"
        "from blindlib import runs\n"
        "learn, save = command.learn_operator, runs.save_whole\n"
        "def learned(*args, **options):\n"
        "    found = learn(*args, **options)\n"
        "    weights = torch.cat([p.flatten() for p in options['flow'].parameters()])\n"
        f"    torch.save((found.kernel, weights, found.history), {str(folders)!r} + '/' + os.environ['RANK'] + '.pt')\n"
        "    return found\n"
        "def saved(state, path):\n"
        "    print('saved', path.name, os.environ['RANK'])\n"
        "    save(state, path)\n"
        "command.learn_operator, runs.save_whole = learned, saved\n"
        "sys.exit(command.main(sys.argv[1:]))\n"
    )
    said = two_processes(script, *arguments(folders)).splitlines()
    saves = [line.split()[1:] for line in said if "saved" in line]
    names = ("flow", "retrieved", "moments-1", "moments-2", "start", "operator")
    assert saves == [[f"{name}.pt", "0"] for name in names]
    for once in ("3 clean and 3 degraded", "safetensors: done"):
        assert sum(once in line for line in said) == 1
    (kernel, flow, history), others = (torch.load(folders / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(kernel, others[0]) and torch.equal(flow, others[1])
    assert all(torch.equal(history[key], others[2][key]) for key in ("gap", "kernel"))
    assert torch.equal(load_operator(folders / "operator.safetensors")["kernel"], kernel)

    alone = ["--folder", folders / "alone", "--out", folders / "alone.safetensors"]
    assert main(arguments(folders, "--quiet", *alone)) == 0
    weights = torch.load(folders / "alone" / "flow.pt", weights_only=True)["mean"]
    weights = torch.cat([value.flatten() for key, value in weights.items() if key != "n_averaged"])
    assert weights.shape == flow.shape and not torch.allclose(weights, flow, atol=1e-4), "both had the same patches"

    said = two_processes("-m", "blindlib", *arguments(folders))
    assert said.count("safetensors: done") == 1 and "loss" not in said


@pytest.mark.parametrize(
    "more, message",
    [
        (["--clean", "nowhere"], "clean: there is no folder 'nowhere'"),
        (["--out", "operator.png"], "out: expected a .safetensors file"),
        (["--kernel-out", "kernel.xyz"], "path: no image format"),
        (["--crop", "10"], "crop: expected at least 38, got 10"),
        (["--kernel-size", "40"], "clean: no photograph of at least 79x79 pixels in"),
        (["--noise-std", "-1"], "noise_std: expected a number in"),
        (["--colour"], "colour: is of PSFs over the field; add --grid"),
        (["--grid", "1x2", "--mirrored", "--kernel-size", "8"], "kernel-size: expected an odd number with --mirrored"),
        (["--device", "gpu"], "device: expected 'auto', 'cpu', 'cuda' or the like, got 'gpu'"),
    ],
)
def test_errors_are_one_line(folders, more, message, capsys):
    assert main(arguments(folders, "--quiet", *more)) == 2
    *left_out, error = capsys.readouterr().err.splitlines()
    assert error.startswith("blindlib: " + message) and all(line.startswith("skipped: ") for line in left_out)
    assert bool(left_out) == message.startswith("clean: no photograph")  # why there is none
    assert not (folders / "operator.safetensors").exists()


def test_what_is_no_operator(tmp_path, capsys):
    write_image(torch.zeros(1, 3, 64, 64), tmp_path / "a.png")
    common = ["deblur", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png"), "--operator"]
    (tmp_path / "half.safetensors").write_bytes(b"half")
    prior = str(WEIGHTS / "kernel.safetensors")
    coarse = Learned(FLAT, Downsample(2), 0.0, None, {}, torch.zeros(2, 3), 0.0)
    coarse.save(tmp_path / "coarse.safetensors")
    for path, message in (
        (str(tmp_path / "coarse.safetensors"), "holds no blur"),
        (str(tmp_path / "no.safetensors"), "operator: no file"),
        (str(tmp_path / "half.safetensors"), "cannot be read as a checkpoint"),
        (str(tmp_path / "a.png"), "operator: expected a .safetensors file"),
        (prior, "holds no blur"),
    ):
        assert main([*common, path]) == 2
        assert message in capsys.readouterr().err
    assert main([*common, prior, "--max-size", "100"]) == 2
    assert "max-size: the operator is of the photograph's full size" in capsys.readouterr().err
    assert main([*common, prior, "--rounds", "3", "--crop", "64"]) == 2
    assert "rounds, crop: for the search of a kernel, the operator is known" in capsys.readouterr().err
