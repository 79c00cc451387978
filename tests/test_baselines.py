import math

import pytest
import torch

from blindlib import Blur, dead_leaves, l0_pyramid, mnc, motion_kernels
from blindlib.baselines import cartoon, differences, faded, kernel_between, no_blur


@pytest.fixture(scope="module")
def pair():
    x, k = dead_leaves(2, 96, seed=7), motion_kernels(2, 24, seed=8)
    return x, k, Blur()(x, k)


def test_a_kernel_between_an_image_and_its_blurred_self_is_the_one_that_blurred(pair):
    x, k, y = pair
    assert mnc(kernel_between(x, y, 24, 1e-4), k).min() > 0.99


def test_no_edges_no_blur():
    flat = torch.zeros(1, 3, 32, 32)
    k = kernel_between(flat, flat, 9, 0.2)
    assert k[0, 0, 4, 4] == 1 and k.sum() == 1


def test_differences(pair):
    x = pair[0][..., :65, :]  # an odd and an even side
    d = torch.fft.irfft2(differences((65, 96), x) * torch.fft.rfft2(x), s=(65, 96))
    torch.testing.assert_close(d[0], x.roll(-1, 3) - x, atol=1e-5, rtol=0)
    torch.testing.assert_close(d[1], x.roll(-1, 2) - x, atol=1e-5, rtol=0)


def test_a_cartoon_keeps_steps_and_drops_noise():
    step = -0.5 * torch.ones(1, 1, 32, 32)
    step[..., 8:24] = 0.5
    noise = 0.05 * torch.randn(step.shape, generator=torch.Generator().manual_seed(0))
    x = cartoon(step + noise, no_blur(1, 3), 0.02)
    assert (x - step).square().mean().sqrt() < 0.02
    assert (x.diff(dim=3).abs() > 0.02).float().mean() < 0.1


@pytest.mark.parametrize("seed", [1, 2])
def test_the_pyramid_finds_kernels_up_to_their_shift(seed):
    from skimage import data

    from blindlib.deblur import read_image, resize

    x = resize(read_image(data.astronaut())[..., :256, 100:356], 128)
    k = motion_kernels(1, 32, seed=seed)
    y = Blur()(x, k) + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    image, kernel = l0_pyramid(y, 32, 0.01)
    assert image.shape == x.shape and kernel.shape == k.shape
    assert kernel.min() >= 0 and kernel.sum() == pytest.approx(1, abs=1e-5)
    assert mnc(kernel, k) > max(0.85, mnc(no_blur(1, 32), k) + 0.2)


def test_what_is_not_periodic_is_faded(pair):
    _, k, _ = pair
    x = dead_leaves(2, 128, seed=9)
    y = Blur("valid")(x, k)
    z = faded(y, 12)
    torch.testing.assert_close(z[..., 12:-12, 12:-12], y[..., 12:-12, 12:-12])
    jump = (z[..., :, 0] - z[..., :, -1]).abs().mean()
    assert jump < 0.3 * (y[..., :, 0] - y[..., :, -1]).abs().mean()
    found = l0_pyramid(y, 24, 0.01, periodic=False)[1]
    assert mnc(found, k).mean() > 0.7


def test_batch_items_are_independent(pair):
    y = pair[2]
    torch.testing.assert_close(
        l0_pyramid(y, 24, 0.01, rounds=2)[1][1:], l0_pyramid(y[1:], 24, 0.01, rounds=2)[1], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(y=torch.zeros(3, 32, 32)), r"y: expected finite values of shape \(B, C, H, W\)"),
        (dict(y=torch.full((1, 3, 32, 32), math.nan)), "y: expected finite"),
        (dict(kernel_size=40), "kernel_size: expected 3 to 32"),
        (dict(kernel_size=0), "kernel_size"),
        (dict(noise_std=0.0), "noise_std: expected a positive number"),
        (dict(strength=-1.0), "strength: expected a positive number"),
        (dict(rounds=0), "rounds: expected a positive integer"),
        (dict(levels=-1), "levels: expected at least 0, got -1"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        l0_pyramid(**{"y": torch.zeros(1, 3, 32, 32), "kernel_size": 9, "noise_std": 0.02, **change})


@pytest.mark.parametrize("size", [5, 9, 17])
def test_small_and_odd_windows(size):
    y = dead_leaves(1, (40, 48), seed=2)
    k = l0_pyramid(y, size, 0.02, rounds=2)[1]
    assert k.shape == (1, 1, size, size) and torch.isfinite(k).all()
