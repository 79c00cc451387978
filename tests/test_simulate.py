from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blindlib import (
    blur_kernels,
    dead_leaves,
    defocus_kernels,
    gaussian_kernels,
    kolmogorov_tilts,
    lens_psfs,
    linear_kernels,
    mixed_tilts,
    mnc,
    motion_kernels,
    shaken_psfs,
    text_images,
    tilt_fields,
)

MAKERS = [motion_kernels, linear_kernels, gaussian_kernels, defocus_kernels, blur_kernels]


def test_the_smallest_mixture_of_kernels():
    k = blur_kernels(50, 3, seed=0)
    assert (k >= 0).all()
    torch.testing.assert_close(k.sum((1, 2, 3)), torch.ones(50))


@pytest.mark.parametrize("make", MAKERS)
@given(n=st.integers(1, 5), size=st.integers(17, 40), seed=st.integers(0, 10_000))
def test_kernels_are_kernels(make, n, size, seed):
    k = make(n, size, seed=seed)
    assert k.shape == (n, 1, size, size) and k.dtype == torch.float32
    assert (k >= 0).all() and torch.isfinite(k).all()
    torch.testing.assert_close(k.sum((1, 2, 3)), torch.ones(n))
    axis = torch.arange(size, dtype=torch.float32) - size // 2
    assert (k.sum(2).squeeze(1) @ axis).abs().max() < 0.2 and (k.sum(3).squeeze(1) @ axis).abs().max() < 0.2


@pytest.mark.parametrize("make", [*MAKERS, dead_leaves, text_images, tilt_fields, kolmogorov_tilts, mixed_tilts])
def test_seeds(make):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a, b, c = make(3, 32, seed=1), make(3, 32, seed=1), make(3, 32, seed=2)
    assert torch.equal(a, b) and not torch.allclose(a, c)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was touched"
    g = torch.Generator().manual_seed(1)
    assert torch.equal(make(3, 32, seed=g), a) and not torch.allclose(make(3, 32, seed=g), a)


def test_motion_kernels_have_the_stated_extent_and_are_thin_and_uneven():
    k = motion_kernels(200, 32, extent=(0.4, 0.6), seed=0)
    mask = (k > 0.02 * k.amax((2, 3), keepdim=True))[:, 0]
    spans = [torch.stack([m.any(d).sum() for d in (0, 1)]).max().item() for m in mask]
    # A faint tail can fall below the threshold; the pen itself is a few pixels wide.
    assert np.median(spans) > 10 and max(spans) <= 0.6 * 32 + 4
    cover = mask.float().mean((1, 2))
    assert cover.median() < 0.08, "traces fill the window"
    peaks = k.amax((2, 3)) / (k.square().sum((2, 3)) / k.sum((2, 3)))
    assert peaks.median() > 1.3, "the camera moves too evenly"
    pairs = mnc(k[:100], k[100:])
    assert 0.2 < pairs.mean() < 0.8, "the kernels are all alike, or nothing alike"


@pytest.mark.parametrize("make", [shaken_psfs, lens_psfs])
def test_psfs_over_a_field_are_kernels_that_differ(make):
    psfs = make((3, 4), 15)
    assert psfs.shape == (1, 3, 4, 3 if make is lens_psfs else 1, 15, 15) and (psfs >= 0).all()
    flat, axis = psfs.reshape(-1, 1, 15, 15), torch.arange(15.0) - 7
    torch.testing.assert_close(flat.sum((1, 2, 3)), torch.ones(len(flat)))
    assert (flat.sum(2)[:, 0] @ axis).abs().max() < 0.2 and (flat.sum(3)[:, 0] @ axis).abs().max() < 0.2
    assert mnc(psfs[:, 0, 0, :1], psfs[:, 1, 1, :1]) < 0.95


def test_shake_without_roll_is_the_same_everywhere():
    psfs = shaken_psfs((2, 3), 15, roll=0.0, seed=4)
    torch.testing.assert_close(psfs, psfs[:, :1, :1].expand_as(psfs))
    assert not torch.equal(psfs, shaken_psfs((2, 3), 15, roll=0.0, seed=5))


def test_a_lens_blurs_its_corners_most_and_blue_most_and_is_the_same_in_a_mirror():
    psfs = lens_psfs((5, 5), 15, centre=1.0, corner=4.0, colour=0.3, vignetting=0.8)[0]
    wide = 1 / psfs.square().sum((-2, -1))  # pixels that share the light
    assert (wide[0, 0] > wide[1, 1]).all() and (wide[1, 1] > wide[2, 2]).all()
    assert (wide[..., 2] > wide[..., 1]).all() and (wide[..., 1] > wide[..., 0]).all()
    torch.testing.assert_close(psfs, psfs.flip(0, -2))
    torch.testing.assert_close(psfs, psfs.transpose(0, 1).transpose(-2, -1))
    round_ = lens_psfs((3, 3), 15, centre=3.0, corner=3.0, colour=0.0, vignetting=0.0)[0]
    torch.testing.assert_close(round_, round_[:1, :1].expand_as(round_))
    assert 1 / round_[0, 0, 0].max() == pytest.approx(np.pi * 9, rel=0.03)
    for wrong in (dict(size=5), dict(centre=0), dict(vignetting=2.0)):
        with pytest.raises(ValueError, match="size: a window of 5|centre, corner"):
            lens_psfs((2, 2), **dict(size=15, corner=2.5) | wrong)


def test_gaussian_kernels_have_the_stated_deviation():
    k = gaussian_kernels(4, 41, std=(3.0, 3.0), seed=0)
    axis = torch.arange(41.0) - 20
    variance = (k.sum(2).squeeze(1) @ axis**2, k.sum(3).squeeze(1) @ axis**2)
    for v in variance:
        torch.testing.assert_close(v, torch.full((4,), 9.0), rtol=0.02, atol=0)


def test_linear_kernels_are_lines():
    k = linear_kernels(20, 33, extent=(0.5, 0.9), seed=0)[:, 0]
    axis = torch.arange(33.0) - 16
    for one in k:
        cov = torch.stack([(one * axis**2).sum(), (one * axis[:, None] ** 2).sum(), (one * axis * axis[:, None]).sum()])
        eig = torch.linalg.eigvalsh(torch.tensor([[cov[0], cov[2]], [cov[2], cov[1]]]))
        assert eig[0] < 0.05 * eig[1]


def test_scenes_look_like_pictures():
    """Statistics that photographs share: 1/f^2 spectra, mostly flat with strong edges, muted and varied colours."""
    x = dead_leaves(64, 64, seed=0)
    assert x.shape == (64, 3, 64, 64) and x.min() >= -1 and x.max() <= 1
    grey = x.mean(1)
    d = grey.diff(dim=2)
    kurtosis = (d**4).mean() / (d**2).mean() ** 2
    assert kurtosis > 8, "no sharp edges on flat ground"
    window = torch.hann_window(64)[:, None] * torch.hann_window(64)
    power = torch.fft.fft2((grey - grey.mean((1, 2), keepdim=True)) * window).abs().square().mean(0)
    f = torch.fft.fftfreq(64)
    radius = (f[:, None] ** 2 + f**2).sqrt() * 64
    low, high = power[(radius >= 3) & (radius < 5)].mean(), power[(radius >= 12) & (radius < 20)].mean()
    assert -3.3 < torch.log2(high / low) / 2 < -1.7
    saturation = (x.amax(1) - x.amin(1)).mean((1, 2))
    assert saturation.min() < 0.1 and saturation.max() > 0.4, "no grey scenes, or no colourful ones"
    assert 0.1 < grey.std((1, 2)).median() < 0.4


def test_a_small_scene_is_like_a_crop_of_a_large_one():
    small, large = dead_leaves(64, 48, seed=1), dead_leaves(32, 96, seed=2)[..., :48, :48]
    edges = [x.diff(dim=3).abs().mean().item() for x in (small, large)]
    assert edges[0] == pytest.approx(edges[1], rel=0.35)


def test_rectangular_scenes():
    assert dead_leaves(1, (24, 40), seed=0).shape == (1, 3, 24, 40)


def test_bad_input():
    with pytest.raises(ValueError, match="n: expected a positive integer, got 0"):
        dead_leaves(0, 32)
    with pytest.raises(ValueError, match="size: expected a positive integer, got 0"):
        dead_leaves(1, (32, 0))
    with pytest.raises(ValueError, match="extent: expected 0 < low <= high <= 1"):
        motion_kernels(1, 16, extent=(0.5, 1.5))
    for make in (partial(motion_kernels, extent=0.5), partial(gaussian_kernels, std=("a", 2))):
        with pytest.raises(ValueError, match="(extent|std): expected 0 < low <= high <= .*, got "):
            make(1, 16)
    with pytest.raises(ValueError, match="d_r0: expected 0 < low <= high <= inf, got"):
        kolmogorov_tilts(1, 16, d_r0=(1.0,))
    with pytest.raises(ValueError, match="n, size"):
        gaussian_kernels(1, 2)
    with pytest.raises(TypeError, match="seed: expected an int or a torch.Generator, got str"):
        motion_kernels(1, 16, seed="a")
    assert torch.equal(motion_kernels(1, 16, seed=np.int64(3)), motion_kernels(1, 16, seed=3))


@pytest.mark.parametrize("make", [*MAKERS, tilt_fields, kolmogorov_tilts, mixed_tilts, text_images])
def test_counts_and_sizes_that_are_none(make):
    for wrong in (2.5, "16", (16, 16), None, True, 0):
        with pytest.raises(ValueError, match="n: expected a positive integer, got "):
            make(wrong, 16)
        with pytest.raises(ValueError, match="size: expected a positive integer, got "):
            make(1, wrong)


@pytest.mark.parametrize("size", [2.5, (8,), (8, 8, 8), (8, 2.5), "16", {8, 9}])
def test_sizes_of_scenes_that_are_none(size):
    with pytest.raises(ValueError, match="size: expected (two positive integers|a positive integer), got "):
        dead_leaves(1, size)


@pytest.mark.parametrize("make", [shaken_psfs, lens_psfs])
def test_grids_that_are_none(make):
    for grid in (3, (3,), (0, 2), (2, 1.5)):
        with pytest.raises(ValueError, match="grid: expected (two positive integers|a positive integer), got "):
            make(grid, 15)


@pytest.mark.parametrize("make", [*MAKERS, dead_leaves, text_images, tilt_fields, partial(lens_psfs, (2, 2))])
def test_devices(make):
    size = {"size": 17} if isinstance(make, partial) else {"n": 1, "size": 17}
    assert make(**size, device="auto").device.type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="device: expected 'auto', 'cpu', 'cuda' or the like, got 'gpu'"):
        make(**size, device="gpu")
    with pytest.raises(ValueError, match="device: 'cuda:99' is not there"):
        make(**size, device="cuda:99")


def test_kolmogorov_tilts_have_nolls_variance_and_bend_no_ray_sideways():
    """0.182 (D / r0)^(5/3) for each axis, in units of two pixels squared; the slopes of one potential have no curl."""
    tilt = kolmogorov_tilts(300, 64, d_r0=(2.0, 2.0), apertures=16, seed=0)
    expected = 4 * 0.182 * 2 ** (5 / 3)
    for component in tilt.unbind(1):
        assert component.square().mean().item() == pytest.approx(expected, rel=0.1)
    inner = tilt.double()
    curl = torch.gradient(inner[:, 1], dim=2)[0] - torch.gradient(inner[:, 0], dim=1)[0]
    divergence = torch.gradient(inner[:, 0], dim=2)[0] + torch.gradient(inner[:, 1], dim=1)[0]
    assert curl.square().mean() < 0.01 * divergence.square().mean()


def test_stronger_turbulence_and_a_wider_scene():
    weak, strong = (kolmogorov_tilts(8, 32, d_r0=(d, d), seed=1) for d in (1.0, 2.0))
    torch.testing.assert_close(strong, weak * 2 ** (5 / 6))
    smooth, rough = (kolmogorov_tilts(50, 32, apertures=a, seed=1).diff(dim=3).square().mean() for a in (2, 16))
    assert rough > 4 * smooth


def test_tilt_fields_are_cut_and_as_strong_at_every_size():
    small, large = (tilt_fields(4, size, strength=(0.5, 1.0), seed=2) for size in (64, 160))
    assert large.shape == (4, 2, 160, 160) and large.abs().max() <= 2.5
    assert large.std() == pytest.approx(small.std().item(), rel=0.15)
    assert large[..., :20].std() == pytest.approx(large.std().item(), rel=0.15)
    assert tilt_fields(1, 64, strength=(5.0, 5.0), max_tilt=1.5, seed=0).abs().max() == 1.5


@pytest.mark.parametrize(
    "make, change, message",
    [
        (tilt_fields, dict(strength=(0.4, 0.1)), "strength: expected"),
        (tilt_fields, dict(smoothness=0), "smoothness: expected a positive"),
        (tilt_fields, dict(patches=0), "patches: expected a positive"),
        (kolmogorov_tilts, dict(d_r0=(2.0, 1.0)), "d_r0: expected"),
        (kolmogorov_tilts, dict(apertures=-1), "apertures: expected a positive"),
        (kolmogorov_tilts, dict(size=1), "n, size: expected"),
    ],
)
def test_bad_tilts(make, change, message):
    with pytest.raises(ValueError, match=message):
        make(**{"n": 1, "size": 16, **change})


def test_text_is_two_or_three_even_tones_with_sharp_edges():
    x = text_images(32, 64, seed=0)
    assert x.shape == (32, 3, 64, 64) and x.min() >= -1 and x.max() <= 1
    edges = (x.diff(dim=3).abs().amax(1) > 0.02).float().mean((1, 2))
    assert edges.median() < 0.6, "most of a page is even"
    assert x.std((2, 3)).mean(1).median() > 0.3, "ink and ground are far apart"
    dark = x.mean((1, 2, 3)) < 0
    assert 2 < dark.sum() < 30, "dark on light and light on dark"
    assert text_images(1, 40, seed=1).shape == (1, 3, 40, 40)
    with pytest.raises(ValueError, match="n: expected a positive integer, got 0"):
        text_images(0, 32)


def test_mixed_tilts_are_not_longer_than_the_priors_scale():
    tilt = mixed_tilts(10, 32, seed=0)
    assert tilt.shape == (10, 2, 32, 32) and tilt.abs().max() <= 5
    assert tilt.square().mean().sqrt() == pytest.approx(0.8, abs=0.4)
