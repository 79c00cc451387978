import itertools
import re
from functools import partial

import pytest
import torch

from blindlib import (
    Blur,
    Downsample,
    FieldMoments,
    Moments,
    SpaceVaryingBlur,
    dead_leaves,
    gaussian_kernels,
    indirect_kernel,
    lens_psfs,
    load_prior,
    matching,
    mirrored,
    mnc,
    motion_kernels,
    runs,
)
from blindlib.em import bare
from blindlib.moments import (
    _component,
    _reals,
    _tiles,
    off_centre,
    retrieved_kernel,
    spectrum_kernel,
    spread,
)

FLAT = torch.full((1, 1, 7, 7), 1 / 49)


def test_a_bare_kernel_has_no_haze(g):
    lines = motion_kernels(2, 9, seed=1)
    haze = torch.rand(lines.shape, generator=g) * 0.02 * lines.amax((2, 3), keepdim=True)
    clear = lines * (lines > 0.02 * lines.amax((2, 3), keepdim=True))
    found = bare(torch.where(clear > 0, clear, haze))
    torch.testing.assert_close(found, clear / clear.sum((2, 3), keepdim=True))
    torch.testing.assert_close(bare(lines[:, None, None])[:, 0, 0], bare(lines))  # as of a field
    # The faint rims of a thin, smooth line are a part of it, and haze away from it is not.
    line = torch.zeros(1, 1, 9, 9)
    line[0, 0, 4, 2:7], line[0, 0, 3, 2:7], line[0, 0, 8, 8] = 1.0, 0.019, 0.019
    found = bare(line, rims=True)
    rest = line.clone()
    rest[0, 0, 8, 8] = 0
    torch.testing.assert_close(found, rest / rest.sum())
    assert (bare(line)[0, 0, 3] == 0).all()
    torch.testing.assert_close(bare(line[:, None, None], rims=True)[:, 0, 0], found)


def test_centre_and_spread():
    k = torch.zeros(2, 1, 5, 5)
    k[0, 0, 2, 2] = 1
    k[1, 0, 1, 3], k[1, 0, 1, 1] = 0.5, 0.5
    torch.testing.assert_close(off_centre(k), torch.tensor([[0.0], [1.0]]))
    torch.testing.assert_close(spread(k), torch.tensor([[0.0], [1.0]]))


# ------------------------------------------------------------------------------------------------ power spectra


def test_power_spectra_give_the_magnitude_and_not_the_phase(g):
    x, other = (0.4 * torch.randn(150, 1, 40, 40, generator=g) for _ in range(2))
    symmetric, motion = gaussian_kernels(1, 9, std=(1.2, 1.2), seed=0), motion_kernels(1, 9, seed=3)
    found = {}
    for name, k in {"symmetric": symmetric, "motion": motion, "flipped": motion.flip(-2, -1)}.items():
        y = Blur("valid")(x, k)
        y = y + 0.02 * torch.randn(y.shape, generator=g)
        found[name] = spectrum_kernel(other, y, noise_std=0.02, kernel_size=9)
        assert found[name].shape == (1, 1, 9, 9) and found[name].sum() == pytest.approx(1)
    assert mnc(found["symmetric"], symmetric) > 0.98
    torch.testing.assert_close(found["motion"], found["flipped"], atol=0.02, rtol=0)
    torch.testing.assert_close(found["motion"], found["motion"].flip(-2, -1), atol=1e-5, rtol=0)


def test_a_phase_that_makes_it_a_kernel_and_the_right_way_round(sets):
    """Where the zero phase of the baseline fails; the other way round would not pass."""
    clean, degraded, k = sets
    found = retrieved_kernel(clean, degraded, noise_std=0.02, kernel_size=7)
    assert found.min() >= 0 and found.sum() == pytest.approx(1, abs=1e-5)
    other = k.flip(-2, -1)
    assert mnc(found, k) > max(0.85, float(mnc(found, other)) + 0.05)
    turned = retrieved_kernel(clean, degraded.flip(-2, -1), noise_std=0.02, kernel_size=7)
    assert mnc(turned, other) > max(0.8, float(mnc(turned, k)) + 0.05)
    with pytest.raises(ValueError, match="starts: expected at least 2"):
        retrieved_kernel(clean, degraded, noise_std=0.02, kernel_size=7, starts=1)


# ------------------------------------------------------------------------------------------------------ moments


def test_moments_are_within_their_error_bars_for_the_truth_alone(larger_sets):
    """The deviation is a chi-square a degree of freedom; only the higher ones see which way round a kernel is."""
    clean, degraded, k = larger_sets
    moments = Moments(clean, degraded, noise_std=0.02, kernel_size=7)
    right, turned, flat = (moments(one) for one in (k, k.flip(-2, -1), FLAT))
    assert ((right > 0.5) & (right < 1.4)).all(), right
    assert flat.min() > 3
    assert turned[0] == pytest.approx(float(right[0]), rel=0.1) and turned[1:].min() > right[1:].max() + 0.15


def test_the_deviation_grows_with_the_number_of_images_if_and_only_if_the_kernel_is_wrong(larger_sets):
    clean, degraded, k = larger_sets
    few, all = (Moments(clean[:n], degraded[: 4 * n], noise_std=0.02, kernel_size=7) for n in (20, 75))
    assert (all(FLAT) > 1.5 * few(FLAT)).all() and (all(k) < 1.4).all() and (few(k) < 1.4).all()


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
def test_the_direction_in_which_tiles_differ_most_is_found_and_by_how_much(kind, g):
    """Deviations of a known covariance: independent ones, and one common factor with a variance of 9 times theirs."""
    n, side, half = 1000, 8, 0.5 if kind.is_complex else 1.0
    way = torch.randn(side, side // 2 + 1, generator=g, dtype=kind)
    way.view(-1)[0] = 0  # the zero frequency does not count
    way /= way.abs().square().sum().sqrt()
    factor = 3 * half**0.5 * torch.randn(n, 1, 1, generator=g, dtype=torch.float64)
    each = torch.randn(n, *way.shape, generator=g, dtype=kind) + factor * way
    variance = 1 + 9 * half * way.abs().square()
    component, excess = _component(variance / n, each)

    w = _reals(way)
    size = _reals(variance * (1 + 1j) if kind.is_complex else variance)
    correlation = (torch.eye(len(w)) + 9 * torch.outer(w, w)) / (size[:, None] * size).sqrt()
    values, vectors = torch.linalg.eigh(correlation)
    assert abs(component @ vectors[:, -1]) > 0.98 and float(component.norm()) == pytest.approx(1)
    assert float(excess) == pytest.approx(1 - 1 / float(values[-1]), abs=0.02)


def test_the_noise_is_the_same_or_new_as_one_wants(sets):
    moments = Moments(*sets[:2], noise_std=0.1, kernel_size=7)
    g = torch.Generator().manual_seed(5)
    assert torch.equal(moments(FLAT), moments(FLAT)) and not torch.equal(moments(FLAT, g), moments(FLAT, g))


def test_flat_pictures_have_moments_too():
    moments = Moments(dead_leaves(4, 46, seed=3), torch.zeros(4, 3, 46, 46), noise_std=0.02, kernel_size=7)
    assert torch.isfinite(moments(FLAT)).all()


def test_fitted_moments_are_a_better_start_than_the_spectrum_and_centred(sets):
    clean, degraded, k = sets
    start = retrieved_kernel(clean, degraded, noise_std=0.02, kernel_size=7)
    moments = Moments(clean, degraded, noise_std=0.02, kernel_size=7)
    found = moments.fit(start, steps=40)
    assert found.min() >= 0 and found.sum() == pytest.approx(1, abs=1e-5) and off_centre(found) < 0.01
    assert found[found > 0].min() > 0.01 * found.max()
    assert moments(found).max() < 1.2 and mnc(found, k) > max(0.95, float(mnc(start, k)) + 0.02)


def test_a_noise_level_that_is_not_known_is_found(sets):
    clean, degraded, k = sets
    moments = Moments(clean, degraded, noise_std=None, kernel_size=7)
    start = retrieved_kernel(clean, degraded, noise_std=0.0, kernel_size=7)
    found = moments.fit(start, steps=60)
    assert mnc(found, k) > max(0.88, float(mnc(start, k)) + 0.1) and float(moments.noise_std) == pytest.approx(
        0.02, rel=0.15
    )


def test_the_blur_before_a_lower_resolution(sets):
    """From high-resolution scenes and low-resolution ones of other scenes; the kernel is finer than the pixels."""
    k, double = sets[2], Downsample(2)
    y = double(dead_leaves(400, 70, seed=1), k)
    y = y + 0.01 * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    moments = Moments(dead_leaves(150, 70, seed=3), y, double, noise_std=0.01, kernel_size=7)
    blot = matching._blot(7)
    found = moments.fit(blot, steps=60)
    assert mnc(found, k) > max(0.87, float(mnc(blot, k)) + 0.06)
    assert moments(found).max() < 1.3 and moments(k).max() < 1.3 and moments(blot).min() > 3


# ------------------------------------------------------------------------------------- a blur that varies over a field


def likeness(a, b):
    return mnc(a.reshape(-1, 1, 7, 7), b.reshape(-1, 1, 7, 7))


@pytest.mark.parametrize("length", [60, 130])
def test_a_cells_tiles_are_simulated_as_the_field_blurs_them(length, g):
    """As many tiles as a cell holds, at least one about its middle; and as many scenes as are asked for."""
    psfs = torch.rand(1, 2, 1, 1, 5, 5, generator=g).double()
    whole = torch.randn(1, 1, length + 4, 34, generator=g).double()
    field = FieldMoments(
        dead_leaves(2, 40).mean(1, keepdim=True), torch.rand(9, 1, length, 30), (2, 1), noise_std=0.01, kernel_size=5
    )
    y = SpaceVaryingBlur("valid")(whole, psfs)
    for cell, first in (((0, 0), length // 4), ((1, 0), 3 * length // 4)):
        corners = field._corners(cell)
        assert len(corners) == (3 if length == 130 else 1) and field.side == 20
        tops = [top for top, _ in corners]
        assert abs((tops[0] + tops[-1] + 20) / 2 - first) <= 1 and all(left == 5 for _, left in corners)
        assert [b - a for a, b in itertools.pairwise(tops)] == [20] * (len(tops) - 1)
        simulated = field._moments(cell, len(corners)).operator
        scenes = torch.cat([whole[..., t : t + 24, left : left + 24] for t, left in corners])
        expected = torch.cat([y[..., t : t + 20, left : left + 20] for t, left in corners])
        torch.testing.assert_close(simulated(scenes, psfs), expected)


def test_a_cell_may_hold_more_tiles_than_there_are_scenes(g):
    clean, degraded = dead_leaves(2, 30, seed=1), dead_leaves(2, 120, seed=2)
    moments = FieldMoments(clean, degraded, (1, 1), noise_std=0.02, kernel_size=5)
    assert len(moments._corners((0, 0))) > 2 * 2
    assert torch.isfinite(moments(matching._blot(5)[:, None, None])).all()


def test_a_grid_of_psfs_is_found_better_than_one_for_all_and_than_each_alone(field_sets):
    clean, degraded, psfs = field_sets
    moments = FieldMoments(clean, degraded, (2, 2), noise_std=0.01, kernel_size=7)
    alone = moments.retrieved()
    found = moments.fit(alone, steps=40)
    one = retrieved_kernel(clean, degraded, noise_std=0.01, kernel_size=7)[:, None, None].expand_as(psfs)
    means = {name: float(likeness(f, psfs).mean()) for name, f in (("one", one), ("alone", alone), ("found", found))}
    assert means["found"] > max(0.9, means["one"] + 0.05, means["alone"] + 0.02), means
    torch.testing.assert_close(found.sum((-2, -1)), torch.ones(1, 2, 2, 1))
    assert moments(found).max() < 1.3 < moments(one).min() and moments(psfs).max() < 1.3


def test_the_noise_of_a_field_is_found_too(field_sets):
    clean, degraded, psfs = field_sets
    moments = FieldMoments(clean, degraded, (1, 2), noise_std=None, kernel_size=7)
    moments.fit(psfs.mean(1, keepdim=True), steps=60)
    assert float(moments.noise_std) == pytest.approx(0.01, rel=0.25)
    assert moments(psfs.mean(1, keepdim=True)).max() < 2


def test_a_fit_that_was_stopped_goes_on(field_sets, tmp_path, monkeypatch, capsys):
    clean, degraded, psfs = field_sets
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_SAVES", 0)
    common, start = dict(noise_std=None, kernel_size=7), psfs.mean(1, keepdim=True)
    save, saves = runs.save_whole, []

    def kill(state, path):
        save(state, path)
        saves.append(path.name)
        if len(saves) in (2, 5):
            raise KeyboardInterrupt

    whole = FieldMoments(clean, degraded, (1, 2), **common)
    found = whole.fit(start, steps=6, truth=start, progress=True)
    assert re.search(r"3/3 .*mnc=0\.\d+, loss=\d", capsys.readouterr().err)
    monkeypatch.setattr(runs, "save_whole", kill)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            FieldMoments(clean, degraded, (1, 2), **common).fit(start, steps=6, folder=tmp_path)
    again = FieldMoments(clean, degraded, (1, 2), **common)
    assert torch.equal(again.fit(start, steps=6, folder=tmp_path), found) and again.noise_std == whole.noise_std
    assert saves == 3 * ["moments-1.pt"] + 3 * ["moments-2.pt"]
    for moments, change in ((again, dict(steps=7)), (FieldMoments(clean, degraded[1:], (1, 2), **common), {})):
        with pytest.raises(ValueError, match="moments-1.pt is of another run"):
            moments.fit(start, **dict(steps=6, folder=tmp_path) | change)


def test_both_sets_are_in_colour_or_both_grey(field_sets):
    clean, degraded, _ = field_sets
    for make in (Moments, partial(FieldMoments, grid=(1, 2))):
        with pytest.raises(ValueError, match="clean: has 3 channels, degraded 1; give both in colour, or both grey"):
            make(clean[:2].expand(-1, 3, -1, -1), degraded[:2], noise_std=0.01, kernel_size=7)


def test_tiles_are_all_squares_side_by_side(g):
    images = [torch.randn(2, 9, 13, generator=g), torch.randn(2, 4, 4, generator=g), torch.randn(2, 8, 5, generator=g)]
    order = torch.Generator().manual_seed(1)
    tiles = [x.unfold(1, 4, 4).unfold(2, 4, 4).flatten(1, 2).transpose(0, 1) for x in images]
    expected = torch.cat(tiles)[torch.randperm(2 * 3 + 1 + 2, generator=order)]
    for most in (4, 100):
        assert torch.equal(_tiles(images, 4, most, torch.Generator().manual_seed(1)), expected[:most])


@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_a_lens_is_its_own_mirror_image(grid, g):
    """It is left as it is, and errors that do not mirror one another are halved in each place but the axes."""
    lens = lens_psfs(grid, 9)
    torch.testing.assert_close(mirrored(lens), lens, atol=1e-6, rtol=0)
    error = torch.randn(lens.shape, generator=g)
    left = mirrored(lens + error) - lens
    assert left[0, 0, 0].std() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(left, mirrored(left), atol=1e-6, rtol=0)
    torch.testing.assert_close(left[:, 0, -1], left[:, 0, 0].flip(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(left[:, -1, 0], left[:, 0, 0].flip(-2), atol=1e-6, rtol=0)
    for wrong in (lens[..., :8, :8], lens[0]):
        with pytest.raises(ValueError, match="psfs: expected shape .* with K odd, got"):
            mirrored(wrong)


# ------------------------------------------------------------------------------------------------ with an image prior


@pytest.fixture(scope="module")
def image_prior():
    return load_prior("image")


def test_indirect_inference_comes_nearer_and_stays_at_the_truth(image_prior):
    kernel = torch.zeros(1, 1, 9, 9)
    kernel[..., 4, 2:7], kernel[..., 2, 6], kernel[..., 6, 3] = 0.14, 0.2, 0.1  # a stroke and two spots
    scenes = dead_leaves(60, 48, seed=5).mean(1, keepdim=True)
    degraded = Blur("valid")(scenes[:30], kernel)
    degraded = degraded + 0.02 * torch.randn(degraded.shape, generator=torch.Generator().manual_seed(1))
    clean, before = scenes[30:], degraded.clone()
    options = dict(noise_std=0.02, patches=16, rounds=5)
    wrong = (kernel + kernel.flip(-1)) / 2
    near = indirect_kernel(clean, degraded, wrong, image_prior, **options)
    assert 1 - mnc(near, kernel) < (1 - mnc(wrong, kernel)) / 2, mnc(near, kernel)
    there, again = (indirect_kernel(clean, degraded, kernel, image_prior, **options | {"rounds": 2}) for _ in range(2))
    assert mnc(there, kernel) > 0.985, mnc(there, kernel)
    assert torch.equal(there, again) and torch.equal(degraded, before)
    for k in (near, there):
        assert k.shape == (1, 1, 9, 9) and k.sum() == pytest.approx(1, abs=1e-5) and k.min() >= 0


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(start=torch.ones(1, 1, 9, 7)), "start: expected shape (1, 1, K, K), got (1, 1, 9, 7)"),
        (dict(start=torch.ones(1, 1, 9, 9)), "start: expected a kernel, non-negative and of sum one"),
        (dict(clean=torch.zeros(2, 2, 40, 40)), "clean, degraded: expected 1 or 3 channels, got 2 and 1"),
        (dict(degraded=torch.zeros(2, 1, 15, 15)), "clean, degraded: too small for a kernel of 9, 24x24 pixels are"),
        (dict(noise_std=0.0), "noise_std: expected a positive number, got 0.0"),
        (dict(rounds=0), "rounds: "),
        (dict(rate=-1.0), "rate: expected a positive number, got -1.0"),
    ],
)
def test_bad_input_to_indirect_inference(changes, said, image_prior):
    good = dict(clean=torch.zeros(2, 1, 40, 40), degraded=torch.zeros(2, 1, 40, 40), start=torch.ones(1, 1, 9, 9) / 81)
    with pytest.raises(ValueError, match=re.escape(said)):
        indirect_kernel(prior=image_prior, **good | dict(noise_std=0.02) | changes)
