from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blindlib import mnc, motion_kernels, psnr, tilt_error
from blindlib.metrics import aligned, error_over_spread, ranks, recentred


def test_psnr_of_a_known_error():
    x = torch.zeros(2, 3, 8, 8)
    y = x.clone()
    y[1] += 0.2
    assert psnr(y, x)[1].item() == pytest.approx(20.0)
    assert psnr(y, x)[0] > 100


@given(dy=st.integers(-3, 3), dx=st.integers(-3, 3))
def test_psnr_finds_the_shift(dy, dx):
    x = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert psnr(x.roll((dy, dx), (2, 3)), x, max_shift=3).item() > 100
    if (dy, dx) != (0, 0):
        assert psnr(x.roll((dy, dx), (2, 3)), x).item() < 15


@given(dy=st.integers(-5, 5), dx=st.integers(-5, 5), gain=st.floats(0.1, 10), window=st.sampled_from([24, 25, 32]))
def test_mnc_is_one_for_shifted_and_scaled_kernels(dy, dx, gain, window):
    k = motion_kernels(1, 16, seed=3)
    frame = torch.zeros(1, 1, window, window)
    top, left = (window - 16) // 2 + dy, (window - 16) // 2 + dx
    top, left = min(max(top, 0), window - 16), min(max(left, 0), window - 16)
    frame[..., top : top + 16, left : left + 16] = gain * k
    assert mnc(frame, k).item() == pytest.approx(1, abs=1e-5)


def test_mnc_against_the_definition():
    g = torch.Generator().manual_seed(1)
    a, b = torch.rand(1, 1, 5, 5, generator=g), torch.rand(1, 1, 4, 6, generator=g)
    best = 0.0
    for dy in range(-5, 6):
        for dx in range(-6, 7):
            s = sum(
                float(a[0, 0, i, j] * b[0, 0, i - dy, j - dx])
                for i in range(5)
                for j in range(5)
                if 0 <= i - dy < 4 and 0 <= j - dx < 6
            )
            best = max(best, s)
    assert mnc(a, b).item() == pytest.approx(best / float(a.norm() * b.norm()), rel=1e-5)


@pytest.mark.parametrize("down, right", [(0.25, -0.5), (-1.75, 0.5)])
def test_fractions_of_a_pixel_are_found(down, right):
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")

    def waves(down, right):
        return torch.sin(0.9 * (rows - down) + 0.2) * torch.cos(1.3 * (columns - right))[None, None]

    def dots(down, right):
        return torch.exp(-((rows - 18 - down) ** 2) / 3 - (columns - 21 - right) ** 2 / 2)[None, None]

    assert psnr(waves(down, right), waves(0, 0), max_shift=3).item() < 28
    assert psnr(waves(down, right), waves(0, 0), max_shift=3, subpixel=4).item() > 35
    assert mnc(dots(down, right), dots(0, 0)).item() < 0.95
    assert mnc(dots(down, right), dots(0, 0), subpixel=4).item() == pytest.approx(1, abs=1e-4)


def test_aligned_brings_what_psnr_scores(g):
    x = torch.rand(2, 3, 24, 24, generator=g) * 2 - 1
    y = torch.cat([x[:1].roll((2, -1), (2, 3)), x[1:].roll((0, 3), (2, 3))])
    moved, inner = aligned(y, x, max_shift=3)
    assert moved.shape == (2, 3, 18, 18)
    torch.testing.assert_close(inner, x[..., 3:21, 3:21])
    torch.testing.assert_close(moved, inner)
    assert psnr(torch.full_like(x, torch.nan), x, max_shift=1).isnan().all(), "no number is not a score"


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_honest_samples_have_even_ranks_and_ratio_one(scale, g):
    n, shape = 9, (2, 3, 64, 64)
    mean, std = torch.randn(shape, generator=g), torch.rand(shape, generator=g) + 0.1
    truth = mean + std * torch.randn(shape, generator=g)
    samples = mean[:, None] + scale * std[:, None] * torch.randn(2, n, *shape[1:], generator=g)
    frequency = ranks(samples, truth)
    assert frequency.shape == (2, n + 1)
    torch.testing.assert_close(frequency.sum(1), torch.ones(2))
    ends, middle = (frequency[:, [0, -1]].mean(), frequency[:, [4, 5]].mean())
    if scale == 1:
        torch.testing.assert_close(frequency, torch.full_like(frequency, 1 / (n + 1)), atol=0.02, rtol=0)
    else:
        assert (ends > 2 * middle) if scale < 1 else (middle > 2 * ends)
    expected = ((1 + scale**2 / n) / (scale**2 * (1 + 1 / n))) ** 0.5
    torch.testing.assert_close(error_over_spread(samples, truth), torch.full((2,), expected), atol=0.03, rtol=0)


def test_ranks_of_a_truth_that_equals_samples_are_shared():
    samples = torch.tensor([0.0, 1.0, 1.0, 2.0])[None, :, None, None, None]
    shared = ranks(samples, torch.ones(1, 1, 1, 1))
    torch.testing.assert_close(shared, torch.tensor([[0, 1, 1, 1, 0]]) / 3)
    assert ranks(samples * torch.nan, torch.ones(1, 1, 1, 1)).isnan().all()


def test_recentred_moves_the_centre_of_mass():
    k = torch.zeros(2, 1, 9, 9)
    k[0, 0, 2, 7] = 1
    k[1, 0, 4, 4] = 2
    out = recentred(k)
    assert out[0, 0, 4, 4] == 1 and out[1, 0, 4, 4] == 1 and out.sum() == 2


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(1, 1, 8, 8).byte()), TypeError, "{}: expected a floating-point tensor, got torch.uint8"),
        (dict(x=np.zeros((1, 1, 8, 8))), TypeError, "{}: expected a floating-point tensor, got ndarray"),
        (dict(ref=np.zeros((1, 1, 8, 8))), TypeError, "ref: expected a floating-point tensor, got ndarray"),
        (dict(x=torch.zeros(1, 8, 8)), ValueError, "{}: expected 4 dimensions"),
        (dict(x=torch.zeros(1, 1, 0, 8)), ValueError, "{}: expected 4 dimensions .*, none of them 0"),
        (dict(ref=torch.zeros(1, 1, 8, 8, device="meta")), ValueError, "ref: is on meta, the {} on cpu"),
        (dict(subpixel=1.5), ValueError, "subpixel: expected a positive integer, got 1.5"),
    ],
)
@pytest.mark.parametrize("measure, name", [(psnr, "x"), (mnc, "kernel")])
def test_what_cannot_be_measured(measure, name, change, error, message):
    given = dict(x=torch.zeros(1, 1, 8, 8), ref=torch.zeros(1, 1, 8, 8), subpixel=1) | change
    with pytest.raises(error, match=message.format(name)):
        measure(given["x"], given["ref"], subpixel=given["subpixel"])


@pytest.mark.parametrize("max_shift", [1.5, -1, "1", True])
def test_bad_shifts(max_shift):
    with pytest.raises(ValueError, match="max_shift: expected an integer, 0 <= max_shift < 4.0, got"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), max_shift=max_shift)


def test_bad_input():
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="x: expected the shape of ref"):
        psnr(x, x[:, :1])
    with pytest.raises(ValueError, match="max_shift"):
        psnr(x, x, max_shift=4)
    for measure in (partial(psnr, x, x), partial(mnc, x[:, :1], x[:, :1])):
        with pytest.raises(ValueError, match="subpixel: expected a positive integer, got 0"):
            measure(subpixel=0)
    for measure, samples in ((ranks, x), (ranks, x[None, :, :1]), (error_over_spread, x[:, None])):
        with pytest.raises(ValueError, match="samples: expected shape"):
            measure(samples, x)
    with pytest.raises(ValueError, match="kernel: expected shape"):
        mnc(x, x)
    with pytest.raises(ValueError, match="ref: expected one kernel or 1"):
        mnc(torch.ones(1, 1, 3, 3), torch.ones(2, 1, 3, 3))


def test_tilt_error_counts_edges_only(g):
    image = torch.zeros(1, 3, 16, 16)
    image[..., 4:6] = 1
    ref = torch.zeros(1, 2, 16, 16)
    flat, edge = ref.clone(), ref.clone()
    flat[..., 10:14] = 3.0
    edge[:, 0, :, 3:7] = 2.0
    torch.testing.assert_close(tilt_error(flat, ref, image), torch.zeros(1))
    torch.testing.assert_close(tilt_error(edge, ref, image), torch.full((1,), 2.0))
    frames = torch.stack([flat, edge], dim=1)
    torch.testing.assert_close(tilt_error(frames, 0 * frames, image), torch.tensor([[0.0, 2.0]]))
    with pytest.raises(ValueError, match="tilt: expected the shape of ref"):
        tilt_error(flat, frames, image)
