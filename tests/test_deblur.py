import io
import re
import struct
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms
from skimage import data

from blindlib import (
    Blur,
    Deblurred,
    Downsample,
    Learned,
    LinearLight,
    SpaceVaryingBlur,
    UniformPrior,
    dead_leaves,
    deblur,
    deblur_folder,
    dpir,
    fast_em,
    gaussian_kernels,
    load_prior,
    mnc,
    motion_kernels,
    psnr,
    shaken_psfs,
    text_images,
)
from blindlib.__main__ import main
from blindlib.baselines import no_blur
from blindlib.deblur import (
    FOLLOWED,
    HANDICAP,
    KNOWN,
    LEVELS,
    _enlarged,
    _residual,
    estimate_noise,
    expected_error,
    find_kernels,
    predicted,
    prediction_error,
    read_image,
    refine_coarsely,
    refine_kernels,
    resize,
    restore,
    unexplained,
    write_image,
)
from blindlib.em import RESPONSES, blur_of
from blindlib.operators import seen, to_light


@pytest.fixture(scope="module")
def blurred():
    """A scene, its kernel, and the photograph: what the sensor sees of the blurred scene, with noise."""
    g = torch.Generator().manual_seed(0)
    scene, k = dead_leaves(1, 128, seed=77), motion_kernels(1, 32, seed=78)
    y = Blur("valid")(scene, k)
    return scene[..., 15:112, 15:112], k, y + 0.02 * torch.randn(y.shape, generator=g)


@pytest.fixture
def short_search(monkeypatch):
    """A kernel is sought from one guess and from no blur, in half the steps."""
    module = sys.modules["blindlib.deblur"]
    monkeypatch.setattr(module, "GUESSES", module.GUESSES[:1])
    monkeypatch.setattr(module, "EM_STEPS", 15)


# --------------------------------------------------------------------------------------------------- reading


def test_every_kind_of_picture_reads_alike(tmp_path):
    x = (dead_leaves(1, 40, seed=3)[0].permute(1, 2, 0).numpy() + 1) / 2
    u8 = (255 * x).round().astype(np.uint8)
    ref = torch.from_numpy(u8 / 127.5 - 1).float().permute(2, 0, 1)[None]
    Image.fromarray(u8).save(tmp_path / "a.png")
    Image.fromarray(u8).save(tmp_path / "a.bmp")
    Image.fromarray(np.dstack([u8, np.full((40, 40), 255, np.uint8)])).save(tmp_path / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(np.rot90(u8).copy()).save(tmp_path / "turned.png", exif=exif)
    for photo in (
        tmp_path / "a.png", str(tmp_path / "a.bmp"), tmp_path / "alpha.png", tmp_path / "turned.png",
        u8, u8 / 255.0, Image.fromarray(u8), ref, ref[0], u8.astype(np.uint16) * 257,
    ):  # fmt: skip
        torch.testing.assert_close(read_image(photo), ref, atol=1e-3, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("more", [b"", struct.pack("<HHI4s", 0x100, 2, 4, b"640\0")], ids=["right", "width no number"])
def test_pictures_are_turned_upright_whatever_else_exif_says(orientation, more, tmp_path):
    x = (255 * np.random.default_rng(0).random((8, 16, 3))).astype(np.uint8)
    entries = struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0) + more
    tags = struct.pack("<H", len(entries) // 12) + entries + bytes(4)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags
    Image.fromarray(x).save(tmp_path / "a.png", exif=exif)
    upright = {
        1: x, 2: x[:, ::-1], 3: x[::-1, ::-1], 4: x[::-1],
        5: x.swapaxes(0, 1), 6: x.swapaxes(0, 1)[:, ::-1], 7: x[::-1, ::-1].swapaxes(0, 1), 8: x.swapaxes(0, 1)[::-1],
    }[orientation]  # fmt: skip
    assert torch.equal(read_image(tmp_path / "a.png"), read_image(upright.copy()))
    assert torch.equal(read_image(Image.open(tmp_path / "a.png")), read_image(upright.copy()))


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_grey_tiffs_are_turned_upright_too(kind, orientation, tmp_path):
    x = (np.iinfo(kind).max * np.random.default_rng(0).random((8, 16))).astype(kind)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(x).save(tmp_path / "a.tif", exif=exif)
    assert torch.equal(read_image(tmp_path / "a.tif"), read_image(np.rot90(x, {3: 2, 6: 3}[orientation]).copy()))


def test_grey_palette_sixteen_bits_and_transparency(tmp_path):
    grey = np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5)
    ref = torch.from_numpy(grey / 127.5 - 1).float().expand(1, 3, 5, 5)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("grey.png", "palette.gif", "deep.png"):
        torch.testing.assert_close(read_image(tmp_path / name), ref, atol=1e-3, rtol=0)
    clear = Image.fromarray(np.zeros((5, 5, 4), np.uint8))
    assert read_image(clear).min() == 1, "transparency is laid on white"


def test_colours_are_read_by_the_profile_they_come_with(tmp_path):
    x = np.full((4, 4, 3), (200, 90, 40), np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other = srgb.replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ").replace(b"----", b"gXYZ")  # red is green
    for profile, expected in ((srgb, x), (b"broken", x), (other, x[..., [1, 0, 2]])):
        Image.fromarray(x).save(tmp_path / "a.png", icc_profile=profile)
        torch.testing.assert_close(read_image(tmp_path / "a.png"), read_image(expected), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "photo, error, message",
    [
        ("nowhere.jpg", FileNotFoundError, "photo: no file 'nowhere.jpg'"),
        (3, TypeError, "photo: expected a path, PIL image, array or tensor, got int"),
        (np.zeros((4, 4), np.int32), TypeError, "photo: .*int32"),
        (np.full((4, 4, 3), 200.0), ValueError, r"floats are expected in \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), ValueError, "photo: floats"),
        (np.zeros((4, 4, 7)), ValueError, "photo: expected an array"),
        (np.zeros((0, 4, 3)), ValueError, "photo: expected an array"),
        (torch.zeros(2, 3, 8, 8), ValueError, "photo: expected a tensor"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), TypeError, "photo: .*uint8"),
        (torch.full((3, 8, 8), 9.0), ValueError, "photo: .*larger"),
    ],
)
def test_bad_photos(photo, error, message):
    with pytest.raises(error, match=message):
        deblur(photo)


def test_a_file_that_is_no_picture(tmp_path):
    (tmp_path / "x.jpg").write_text("not a picture")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        deblur(tmp_path / "x.jpg")


@pytest.mark.parametrize("error", [NotImplementedError("odd"), RuntimeError("odd"), MemoryError(), KeyError("odd")])
def test_whatever_reading_raises_is_of_that_file(error, tmp_path, monkeypatch):
    write_image(torch.zeros(1, 3, 8, 8), tmp_path / "a.png")

    def fails(*_):
        raise error

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(ValueError, match=r"a.png' cannot be read as an image \((.*odd|MemoryError)"):
        read_image(tmp_path / "a.png")


def test_a_photo_too_small(tmp_path):
    with pytest.raises(ValueError, match="20x20 pixels are too few to read a kernel of up to 32 pixels from"):
        deblur(np.zeros((20, 20, 3)), progress=False)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(boundary="periodic"), "boundary"),
        (dict(noise_std=3.0), r"noise_std: expected a number in \[0, 1\)"),
        (dict(noise_std="a"), r"noise_std: expected a number in \[0, 1\), .* got 'a'"),
        (dict(seed=1.5), "seed: expected an integer, got 1.5"),
        (dict(seed="a"), "seed: expected an integer, got 'a'"),
        (dict(seed=None), "seed: expected an integer, got None"),
        (dict(samples=None), "samples: expected a positive integer, got None"),
        (dict(device="gpu"), "device: expected 'auto', 'cpu', 'cuda' or the like, got 'gpu'"),
        (dict(kernel=torch.full((1, 1, 65, 65), 65**-2)), "kernel: of 65x65 pixels, is larger than the photograph"),
    ],
)
def test_bad_options_are_told_before_anything_is_done(options, message, capsys):
    with pytest.raises(ValueError, match=message):
        deblur(np.zeros((64, 64, 3)), **options)
    assert capsys.readouterr().out == ""


def test_a_folder_is_no_file_to_write(tmp_path):
    (tmp_path / "sharp.png").mkdir()
    with pytest.raises(IsADirectoryError, match="sharp.png' is a folder"):
        write_image(torch.zeros(1, 3, 8, 8), tmp_path / "sharp.png")


# --------------------------------------------------------------------------------------------------- the work


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_noise_is_estimated(std, blurred):
    k = blurred[1]
    y = Blur()(dead_leaves(1, 128, seed=5), k)
    y = y + std * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    assert estimate_noise(y) == pytest.approx(std, rel=0.2)


def test_the_prior_of_print_is_chosen_by_name_and_knows_print(blurred):
    """With the kernel known, each prior is the better one for what it learned from."""
    k = motion_kernels(1, 32, extent=(0.3, 0.3), seed=3)
    gains = {}
    for kind, scene in {"text": text_images(1, 95, seed=77), "image": dead_leaves(1, 95, seed=77)}.items():
        y = Blur("valid")(scene, k) + 0.02 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        for name in ("text", "image"):
            out = deblur(y, kernel=k, prior=name, noise_std=0.02, progress=False, device="cpu").image
            gains[kind, name] = float(psnr(out, scene[..., 15:79, 15:79]))
    assert gains["text", "text"] > gains["text", "image"] and gains["image", "image"] > gains["image", "text"], gains
    with pytest.raises(ValueError, match="prior: expected 'image' or 'text', got 'music'"):
        deblur(blurred[2], prior="music")


def test_restore_with_the_known_kernel(blurred):
    scene, k, y = blurred
    out = restore(y, k, load_prior("image"), Blur("valid"), 0.02)
    assert out.shape == y.shape
    assert psnr(out, scene) > psnr(y, scene) + 4


def test_pieces_fit_together(blurred):
    """Restoring in overlapping pieces gives what restoring in one go gives, seams included."""
    scene, k, y = blurred
    prior = load_prior("image")
    whole, pieces = (restore(y, k, prior, Blur("valid"), 0.02, tile=t) for t in (256, 56))
    assert psnr(pieces, scene) > psnr(whole, scene) - 1.0
    # As large as can be expected of two estimates: no more on the seams, 56 - 32 and 56 pixels from each side.
    error = (pieces - whole).square().mean((0, 1, 2))
    assert error[20:77].max() < 10 * error.mean()


@pytest.mark.parametrize("operator, tile", [(Blur("valid"), 24), (Downsample(8), 256), (Downsample(4), 128)])
def test_pieces_are_larger_than_the_kernel(operator, tile):
    """Also where they are asked to be smaller than what they have in common."""
    factor, k = getattr(operator, "factor", 1), no_blur(1, 32)
    y = torch.zeros(1, 3, 90, 8)
    out = restore(y, k, load_prior("image"), operator, 0.02, tile=tile, steps=1)
    assert out.shape == (1, 3, 90 * factor, 8 * factor) and bool(torch.isfinite(out).all())


def test_the_residual_of_a_field_is_that_of_its_inner_part():
    """With the PSFs that belong there, those of the whole field."""
    psfs = shaken_psfs((2, 2), 9, extent=(0.9, 0.9), roll=1.5, seed=2)
    x = dead_leaves(1, 56, seed=4)
    y = SpaceVaryingBlur("valid")(x, psfs)
    assert _residual(y, x[..., 4:-4, 4:-4], psfs, SpaceVaryingBlur("valid")) < 1e-6


def test_restoring_what_varies_over_the_field(blurred):
    """The same PSF everywhere is the plain blur; in pieces, each place gets its own."""
    _, k, y = blurred
    prior, varying = load_prior("image"), SpaceVaryingBlur("valid")
    small, quick = y[..., :49, :49], dict(steps=4)
    plain = restore(small, k, prior, Blur("valid"), 0.02, **quick)
    psfs = k[:, None, None].expand(-1, 2, 2, -1, -1, -1)
    torch.testing.assert_close(restore(small, psfs, prior, varying, 0.02, **quick), plain, atol=1e-3, rtol=0)

    psfs = shaken_psfs((2, 2), 9, extent=(0.9, 0.9), roll=1.5, seed=2)
    x = dead_leaves(1, 104, seed=4)
    y, inner = varying(x, psfs), x[..., 4:-4, 4:-4]
    right, wrong = (
        psnr(restore(y, p, prior, varying, 0.004, tile=64), inner, max_shift=2) for p in (psfs, psfs.flip(1, 2))
    )
    assert right > psnr(y, inner, max_shift=2) + 3 and right > wrong + 3


def test_restoring_a_higher_resolution():
    x, k, coarse = dead_leaves(1, 104, seed=4), gaussian_kernels(1, 9, std=(1.2, 1.2), seed=0), Downsample(2)
    y = coarse(x, k)
    out = restore(y, k, load_prior("image"), coarse, 0.004)
    inner, cubic = x[..., 4:-4, 4:-4], F.interpolate(y, scale_factor=2, mode="bicubic")
    assert out.shape == inner.shape
    assert psnr(out, inner) > psnr(cubic, inner, max_shift=1) + 3
    pieces = restore(y, k, load_prior("image"), coarse, 0.004, tile=64)
    assert psnr(pieces, inner) > psnr(out, inner) - 1


def test_the_error_that_is_expected_is_about_the_error_there_is(blurred):
    scene, k, y = blurred
    out = deblur(y, kernel=k, noise_std=0.02, error=True, progress=False)
    assert out.error.shape == (1, 1, *y.shape[-2:]) and out.error.min() > 0
    wrong = (out.image - scene).square().mean(1).flatten().sqrt()
    assert 0.6 < wrong.square().mean().sqrt() / out.error.square().mean().sqrt() < 1.6
    order = out.error.flatten().argsort().chunk(4)
    assert wrong[order[-1]].mean() > 1.3 * wrong[order[0]].mean(), "where it is bright, more is wrong"
    assert deblur(y, kernel=k, noise_std=0.02, progress=False).error is None


def test_the_expected_error_is_told_in_pieces_too(blurred):
    _, k, y = blurred
    prior, common = load_prior("image"), dict(samples=3, steps=6)
    whole, pieces = (expected_error(y, k, prior, Blur("valid"), 0.02, tile=t, **common) for t in (256, 48))
    assert pieces.shape == whole.shape and not torch.equal(pieces, whole)
    assert 0.8 < pieces.mean() / whole.mean() < 1.25
    twice = expected_error(y, k, prior, Blur("valid"), 0.02, factor=2 * KNOWN, **common)
    torch.testing.assert_close(twice, 2 * whole)
    for change, message in ((dict(samples=1), "samples: expected at least 2"), (dict(factor=0), "factor: expected")):
        with pytest.raises(ValueError, match=message):
            expected_error(y, k, prior, Blur("valid"), 0.02, **change)


def test_the_expected_error_of_other_operators_and_batches(g):
    prior, few = load_prior("image"), dict(samples=2, steps=12)
    y, k = torch.rand(2, 3, 48, 48, generator=g) - 0.5, motion_kernels(1, 9, seed=1)
    assert expected_error(y, k, prior, Blur(), 0.02, **few).shape == (2, 1, 48, 48)
    with pytest.raises(ValueError, match="y: expected one picture"):
        expected_error(y, k, prior, Blur("valid"), 0.02, **few)
    psfs = shaken_psfs((2, 2), 9, seed=1)
    assert expected_error(y[:1], psfs, prior, SpaceVaryingBlur("valid"), 0.02, **few).shape == (1, 1, 48, 48)
    assert expected_error(y[:1], k, prior, Downsample(2), 0.02, **few).shape == (1, 1, 96, 96)


def test_of_a_photograph_the_light_was_blurred(tmp_path, astronaut):
    """Of a tensor, which comes from a simulation, the values."""
    scene, k = astronaut(95)
    write_image(LinearLight(Blur("valid"))(scene, k), tmp_path / "photo.png")
    common, truth = dict(kernel=k, progress=False), scene[..., 15:79, 15:79]
    out = {told: deblur(tmp_path / "photo.png", response=told, **common) for told in (None, "srgb", "linear")}
    assert out[None].figures["response"] == "srgb" and torch.equal(out[None].image, out["srgb"].image)
    assert psnr(out["srgb"].image, truth) > psnr(out["linear"].image, truth) + 4
    y = read_image(tmp_path / "photo.png")
    torch.testing.assert_close(deblur(y, **common).image, out["linear"].image)
    with pytest.raises(ValueError, match="response: expected one of"):
        deblur(y, response="raw")


def test_of_a_field_of_psfs_light_is_restored_too(tmp_path, astronaut):
    scene, k = astronaut(95)
    psfs = k[:, None, None].expand(1, 1, 2, 1, 32, 32)
    write_image(LinearLight(SpaceVaryingBlur("valid"))(scene, psfs), tmp_path / "photo.png")
    out = {told: deblur(tmp_path / "photo.png", kernel=psfs, response=told, progress=False) for told in RESPONSES}
    truth = scene[..., 15:79, 15:79]
    assert psnr(out["srgb"].image, truth) > psnr(out["linear"].image, truth) + 4


def test_guesses_are_of_what_was_blurred(monkeypatch):
    """The classical guess sees light where light was blurred, in `find_kernels` and where EM is on its own."""
    shown, y = [], 2 * dead_leaves(1, 64, seed=3).clamp(-0.4, 0.4)

    class Enough(Exception):
        pass

    def guess(image, *args, **options):
        shown.append(image)
        raise Enough

    for module in ("deblur", "em"):
        monkeypatch.setattr(sys.modules[f"blindlib.{module}"], "l0_pyramid", guess)
    priors = {name: load_prior(name) for name in ("image", "kernel")}
    for response, expected in (("srgb", to_light(y)), ("linear", y)):
        with pytest.raises(Enough):
            find_kernels(y, priors, blur_of("circular", response), 0.02)
        with pytest.raises(Enough):
            fast_em(y, priors["image"], kernel_size=32, noise_std=0.02, response=response)
        assert all(torch.equal(image, expected) for image in shown[-2:])


@pytest.mark.parametrize("boundary", ["circular", "zero", "reflect"])
def test_other_boundaries(boundary, blurred):
    scene, k, _ = blurred
    x = scene[..., :64, :64]
    y = Blur(boundary)(x, k)
    out = deblur(y, kernel=k, boundary=boundary, noise_std=0.004, progress=False)
    assert psnr(out.image, x) > psnr(y, x) + 3


def test_blind_from_a_file_to_a_file(tmp_path, blurred, short_search):
    scene, k, _ = blurred
    y = LinearLight(Blur("valid"))(dead_leaves(1, 128, seed=77), k)
    y = y + 0.02 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    write_image(y, tmp_path / "photo.png")
    status = main(
        ["deblur", str(tmp_path / "photo.png"), "--out", str(tmp_path / "sharp.png"), "--rounds", "2", "--crop", "65"]
        + ["--kernel-out", str(tmp_path / "kernel.png"), "--error-out", str(tmp_path / "error.png")]
        + ["--quiet"]
    )
    written = ["error.png", "kernel.png", "photo.png", "sharp.png"]
    assert status == 0 and sorted(p.name for p in tmp_path.iterdir()) == written
    sharp = read_image(tmp_path / "sharp.png")
    assert sharp.shape == scene.shape
    assert psnr(sharp, scene, max_shift=4) > psnr(y, scene, max_shift=4)
    kernel = read_image(tmp_path / "kernel.png")[:, :1] + 1
    assert mnc(kernel / kernel.sum(), k) > 0.6
    assert 0 < np.asarray(Image.open(tmp_path / "error.png")).mean() < 128


def test_the_right_kernel_explains_best(blurred):
    _, k, y = blurred
    prior, wrong = load_prior("image"), motion_kernels(3, 32, seed=5)
    rest = unexplained(y, torch.cat([wrong, k.flip(2), k]), prior, Blur("valid"), 0.02)
    assert rest.argmin() == 4 and 0.02 < rest[4] < 0.04
    assert rest[:4].min() > 1.1 * rest[4]


def test_the_gradient_through_a_data_step_is_that_of_its_solution(blurred, monkeypatch):
    """Where the boundary is circular, the solution is closed and autograd knows it."""
    _, k, y = blurred
    y, prior, blur = y[..., :64, :64], load_prior("image"), Blur("circular")
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))

    def gradient(predict):
        kernel = k.clone().requires_grad_()
        return torch.autograd.grad((weights * predict(kernel)).sum(), kernel)[0]

    def plainly(kernel):
        first = len(LEVELS) - FOLLOWED
        z = dpir(y, partial(blur, kernel=k), prior, 0.03, steps=first, last=LEVELS[first - 1] / 0.03)
        for level in LEVELS[first:]:
            t = prior.schedule.time(level)
            x = blur.solve(y, kernel, z, 0.23 * (0.03 / prior.schedule.sigma(t)) ** 2)
            z = prior.denoise(prior.schedule.alpha_bar(t) ** 0.5 * x, t)
        return blur(z, kernel)

    expected = gradient(plainly)
    found = gradient(lambda kernel: predicted(y, kernel, prior, blur, 0.03))
    torch.testing.assert_close(found, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("boundary", ["circular", "valid"])
def test_a_kernel_that_is_too_wide_is_refined(boundary, blurred):
    scene, k, y = blurred
    if boundary == "circular":
        x = scene[..., :64, :64]
        y = Blur()(x, k) + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    else:
        y = y[..., :49, :49]
    priors = {name: load_prior(name) for name in ("image", "kernel")}
    wide = Blur("zero")(k, gaussian_kernels(1, 9, std=(1.0, 1.0)))
    found = refine_kernels(y, wide, priors, Blur(boundary), 0.02, steps=8)
    assert found.min() >= 0 and found.sum() == pytest.approx(1, abs=1e-5)
    assert mnc(found, k) > mnc(wide, k) + 0.03
    assert found[found > 0].min() > 0.02 * found.max() and (found == 0).sum() > (k == 0).sum() / 2, "there is haze"
    torch.testing.assert_close(found, refine_kernels(y, wide, priors, Blur(boundary), 0.02, steps=8))


def test_the_gradient_through_a_data_step_in_light_is_that_of_the_prediction(blurred, monkeypatch):
    """Against a difference along a direction, with the levels before held: here there are none."""
    monkeypatch.setattr(sys.modules["blindlib.deblur"], "LEVELS_IN_LIGHT", [0.1, 0.05])
    monkeypatch.setattr(sys.modules["blindlib.deblur"], "FOLLOWED", 1)
    _, k, y = blurred
    y, prior, blur = y[..., :41, :41].clamp(-0.9, 0.9), load_prior("image"), LinearLight(Blur("valid"))
    z = dpir(y, partial(blur, kernel=k), prior, 0.03, steps=1, last=0.1 / 0.03)
    monkeypatch.setattr(sys.modules["blindlib.deblur"], "dpir", lambda *_, **__: z)
    other = Blur("zero")(k, gaussian_kernels(1, 9, std=(1.0, 1.0))) - k
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))

    def along(step):
        return (weights * predicted(y, k + step * other, prior, blur, 0.03)).sum()

    step = torch.zeros((), requires_grad=True)
    slope = torch.autograd.grad(along(step), step)[0]
    with torch.no_grad():
        difference = (along(0.05) - along(-0.05)) / 0.1
    assert float(slope) == pytest.approx(float(difference), rel=0.05)


def test_in_light_what_predicts_best_is_the_true_kernel(blurred):
    """Not a wider one, nor none; and of a picture that is not blurred, none."""
    scene, k, _ = blurred
    camera, g = LinearLight(Blur("valid")), torch.Generator().manual_seed(2)
    y = camera(scene, k)[..., :65, :65]
    y = y + 0.01 * torch.randn(y.shape, generator=g)
    wide, none = Blur("zero")(k, gaussian_kernels(1, 9, std=(1.0, 1.0))), no_blur(1, 32)
    kernels, prior = torch.cat([wide, none, k]), load_prior("image")
    assert prediction_error(y, kernels, prior, camera, 0.01).argmin() == 2
    sharp = scene[..., 15:80, 15:80]
    sharp = sharp + 0.01 * torch.randn(sharp.shape, generator=g)
    assert prediction_error(sharp, kernels, prior, camera, 0.01).argmin() == 1


def test_in_light_the_kernel_that_predicts_best_is_taken(blurred, monkeypatch):
    """That found, what half the size gave, refined, or none."""
    found, near, far, coarse = (gaussian_kernels(1, 32, std=(s, s)) for s in (1.5, 0.9, 2.0, 3.0))
    module, priors = sys.modules["blindlib.deblur"], {name: load_prior(name) for name in ("image", "kernel")}

    def run(y, *_, **__):
        return SimpleNamespace(kernel=found.repeat(len(y), 1, 1, 1), image=y)

    none = no_blur(1, 32)
    stand_ins = dict(l0_pyramid=lambda *_, **__: (None, none), fast_em=run, diffusion_em=run)
    stand_ins |= dict(refine_coarsely=lambda *_, **__: coarse, unexplained=lambda y, k, *_: k.amax((1, 2, 3)))
    for refined, order, best in (
        (near, (found, near, none), found),
        (near, (near, found, none), near),
        (near, (none, near, found), none),
        (far, (none, far, found), far),  # it is too unlike no blur to be one
    ):

        def error(y, kernels, *_, order=order, **__):
            return y.new_tensor([[torch.equal(known[0], k) for known in order].index(True) for k in kernels])

        def refine(y, kernels, *_, refined=refined, **__):
            assert torch.equal(kernels, coarse)
            return refined

        stand_ins |= dict(refine_kernels=refine, prediction_error=error)
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(module, name, stand_in)
        kernels, rest = find_kernels(blurred[2][..., :65, :65], priors, LinearLight(Blur("valid")), 0.02)
        torch.testing.assert_close(kernels, best)
        torch.testing.assert_close(rest, best.amax((1, 2, 3)))


def test_a_stroke_that_is_missing_is_found_at_half_the_size(blurred):
    scene, k, _ = blurred
    priors, camera = {name: load_prior(name) for name in ("image", "kernel")}, LinearLight(Blur("valid"))
    y = camera(scene, k)
    y = y + 0.01 * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    half = k * (k.sum(-2, keepdim=True).cumsum(-1) < 0.5)  # its left half
    half = half / half.sum()
    found = refine_coarsely(y, half, priors, camera, 0.01, steps=18)
    assert found.min() >= 0 and found.sum() == pytest.approx(1, abs=1e-5)
    assert mnc(found, k) > mnc(half, k) + 0.1
    # What predicts better stays as it is, and so do kernels of a picture that is too small.
    assert torch.equal(refine_coarsely(y, k, priors, camera, 0.01, steps=2), k)
    assert torch.equal(refine_coarsely(y[..., :65, :65], half, priors, camera, 0.01), half)


def test_a_kernel_is_enlarged_where_it_was():
    k = Blur("zero")(motion_kernels(1, 32, seed=3), gaussian_kernels(1, 9, std=(1.0, 1.0)))
    small = 4 * F.avg_pool2d(k, 2)
    for shift in (0, 1):
        large = _enlarged(small.roll(shift, -1), k)
        assert large.shape == k.shape and large.sum() == pytest.approx(1, abs=1e-5)
        assert F.cosine_similarity(large.flatten(), k.flatten(), dim=0) > 0.97


def test_no_noise_is_too_much_for_a_refinement():
    """However much it is, twice as much is no image's, nor a noise level's."""
    x, k = dead_leaves(1, 64, seed=3), motion_kernels(1, 32, seed=78)
    y = (x + 0.8 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))).clamp(-2.9, 2.9)
    priors = {name: load_prior(name) for name in ("image", "kernel")}
    found = refine_kernels(y, k, priors, Blur(), 0.8, steps=2)
    assert found.isfinite().all() and found.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("std", "rest", "taken"), [(2.0, 0.03, False), (2.0, 0.01, True), (0.3, 0.03, True)])
def test_a_refined_kernel_is_taken_where_it_explains_no_worse_or_is_no_blur(std, rest, taken, blurred, monkeypatch):
    before, refined = (gaussian_kernels(1, 32, std=(s, s)) for s in (1.5, std))

    def found(y, *_, **__):
        return SimpleNamespace(kernel=before.repeat(len(y), 1, 1, 1), image=y)

    stand_ins = dict(fast_em=found, diffusion_em=found, refine_kernels=lambda *_, **__: refined)
    stand_ins |= dict(unexplained=lambda y, kernels, *_: y.new_tensor([rest if (kernels == refined).all() else 0.02]))
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(sys.modules["blindlib.deblur"], name, stand_in)
    priors = {"image": load_prior("image"), "kernel": load_prior("kernel")}
    kernels, left = find_kernels(blurred[2][..., :64, :64], priors, Blur(), 0.02)
    assert torch.equal(kernels, refined if taken else before)
    assert left.item() == pytest.approx(rest if taken else 0.02)


def test_of_several_starts_those_that_explain_best_are_kept(blurred, monkeypatch):
    scene, k, _ = blurred
    x = scene[..., :64, :64]
    y = Blur()(x, k) + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(sys.modules["blindlib.deblur"], "EM_STEPS", 4)
    priors = {name: load_prior(name) for name in ("image", "kernel")}
    kernels, rest = find_kernels(y, priors, Blur(), 0.02, rounds=1, starts=5)
    assert kernels.shape == (5, 1, 32, 32) and (rest[1:] >= rest[:-1] / HANDICAP).all()
    assert (kernels[:-1] - kernels[1:]).abs().amax((1, 2, 3)).min() > 1e-4, "no two starts are the same"
    torch.testing.assert_close(unexplained(y, kernels, priors["image"], Blur(), 0.02), rest)

    def found(*_, starts, **__):
        return kernels[:starts], rest[:starts]

    monkeypatch.setattr(sys.modules["blindlib.deblur"], "find_kernels", found)
    common = dict(boundary="circular", noise_std=0.02, progress=False)
    assert torch.equal(deblur(y, starts=5, samples=2, **common).kernels, kernels[:2])
    assert torch.equal(deblur(y, starts=1, samples=3, **common).kernels, kernels[:3])


def test_each_stage_has_noise_of_its_own(blurred, monkeypatch):
    """Whatever the seed: a run that meets the noise its start was made with would get it back."""
    used = []

    def noted(y, *_, kernel0, seed, **options):
        used.extend(seed if isinstance(seed, list) else [seed])
        return SimpleNamespace(kernel=kernel0, image=y)

    def refined(y, kernels, *_, seed, **options):
        used.append(seed)
        return kernels

    def error(y, kernels, *_, seed):
        used.append(seed)
        return kernels.sum((1, 2, 3))

    stand_ins = dict(fast_em=noted, diffusion_em=noted, refine_kernels=refined, refine_coarsely=refined)
    stand_ins |= dict(unexplained=lambda y, kernels, *_: kernels.sum((1, 2, 3)), prediction_error=error)
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(sys.modules["blindlib.deblur"], name, stand_in)
    priors = {"image": load_prior("image"), "kernel": load_prior("kernel")}
    for seed in (0, 1):
        find_kernels(blurred[2][..., :64, :64], priors, LinearLight(Blur()), 0.02, starts=2, seed=seed)
    assert len(set(used)) == len(used) >= 14


def test_the_kernel_is_found_from_what_the_sensor_saw(blurred, short_search):
    _, k, y = blurred
    priors = {name: load_prior(name) for name in ("image", "kernel")}
    found, rest = find_kernels(y[..., :65, :65], priors, Blur("valid"), 0.02, rounds=2)
    assert mnc(found, k) > max(0.75, mnc(no_blur(1, 32), k) + 0.2)
    assert 0.02 < rest[0] < 0.04


@pytest.mark.parametrize("boundary", ["zero", "reflect"])
def test_the_kernel_is_found_far_from_the_edges_whatever_lies_beyond_them(boundary, blurred, short_search, monkeypatch):
    """There the blur is as the sensor sees it."""
    monkeypatch.setattr(sys.modules["blindlib.deblur"], "EM_STEPS", 2)
    scene, k, _ = blurred
    x = scene[..., :80, :80]
    y = Blur(boundary)(x, k)
    inner = y[..., *seen((80, 80), (32, 32))]
    torch.testing.assert_close(inner, Blur("valid")(x, k), atol=1e-5, rtol=0)
    priors = {name: load_prior(name) for name in ("image", "kernel")}
    options = dict(noise_std=0.02, rounds=1)
    found, _ = find_kernels(y, priors, Blur(boundary), **options)
    valid, _ = find_kernels(inner, priors, Blur("valid"), **options)
    assert torch.equal(found, valid)


@pytest.mark.parametrize("change", [dict(samples=0), dict(starts=0), dict(max_size=0), dict(max_size=-1)])
def test_numbers_that_are_too_small(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}: expected a positive integer"):
        deblur(np.zeros((64, 64, 3)), progress=False, **change)


def test_a_large_photo_is_scaled_down_and_says_so(capsys, monkeypatch):
    """Unless its kernel is known, which is that of the photograph as it is, or there is nothing to be undone."""
    photo, k = dead_leaves(1, (60, 120), seed=1), no_blur(1, 3)
    found = [gaussian_kernels(1, 32, std=(2.0, 2.0)), torch.tensor([0.02])]
    monkeypatch.setattr(sys.modules["blindlib.deblur"], "find_kernels", lambda *_, **__: found)
    out = deblur(photo, max_size=80)
    assert out.image.shape == (1, 3, 40, 80) and out.figures["scale"] == pytest.approx(2 / 3)
    assert "scaling down from 120x60 to 80x40" in capsys.readouterr().out
    found[0] = no_blur(1, 32)
    out = deblur(photo, max_size=80, error=True)
    assert torch.equal(out.image, photo) and torch.equal(out.blurred, photo) and out.figures["scale"] == 1
    assert out.error.shape == (1, 1, 60, 120)
    top, left, height, width = out.figures["crop"]
    assert height == width and 0 <= top <= 60 - height and 0 <= left <= 120 - width
    out = deblur(photo, kernel=k, max_size=80)
    assert out.image.shape == photo.shape and out.figures["scale"] == 1


@pytest.mark.parametrize(
    "kernel", [torch.zeros(1, 1, 3, 3), -no_blur(1, 3), 5 * no_blur(1, 3), no_blur(1, 3)[0], "k", no_blur(2, 3)]
)
def test_a_kernel_that_is_none(kernel):
    with pytest.raises(ValueError, match="kernel: expected"):
        deblur(np.zeros((64, 64, 3)), kernel=kernel, progress=False)


def test_a_kernel_of_doubles(blurred):
    y, k = blurred[0], blurred[1]
    run = partial(deblur, y[..., :40, :40], progress=False)
    assert torch.equal(run(kernel=k.double()).image, run(kernel=k).image)


def test_psfs_are_of_photographs_of_one_size():
    psfs = no_blur(1, 3)[:, None, None].expand(1, 2, 3, 1, 3, 3)
    field, upright = dict(kernel=psfs, field=(24, 40), progress=False), np.zeros((40, 24, 3))
    with pytest.raises(ValueError, match="photo: has 24x40 pixels, but the PSFs are of photographs of 40x24"):
        deblur(upright, **field)
    assert deblur(upright.swapaxes(0, 1), **field).image.shape == (1, 3, 24, 40)
    assert deblur(upright, **{**field, "kernel": no_blur(1, 3)}).image.shape == (1, 3, 40, 24)


def test_without_noise(blurred, monkeypatch):
    monkeypatch.setattr(sys.modules["blindlib.deblur"], "EM_STEPS", 4)
    found = deblur(blurred[0][..., :49, :49], boundary="valid", noise_std=0, rounds=1, progress=False)
    assert torch.isfinite(found.image).all()


def test_priors_that_are_missing():
    with pytest.raises(ValueError, match="priors: none for kernel"):
        deblur(np.zeros((64, 64, 3)), priors={"image": load_prior("image")}, progress=False)


@pytest.mark.parametrize(
    "priors, error, message",
    [
        ("text", TypeError, "priors: expected a mapping .* got str"),
        (
            {"image": "text", "kernel": UniformPrior("kernel", 32)},
            TypeError,
            "priors: expected a prior of the image, .*",
        ),
        (
            {"image": UniformPrior("kernel", 32), "kernel": UniformPrior("image")},
            ValueError,
            "priors: expected a prior of the image by that name, got one of the kernel",
        ),
        (
            {"image": UniformPrior("image"), "kernel": UniformPrior("kernel")},
            ValueError,
            "priors: expected a prior of the kernel with a size, that of its window, got one of any",
        ),
    ],
)
def test_priors_that_are_none(priors, error, message):
    with pytest.raises(error, match=message):
        deblur(np.zeros((64, 64, 3)), priors=priors, progress=False)


def test_restoring_what_is_sharp_does_no_harm(blurred):
    scene, _, _ = blurred
    delta = torch.zeros(1, 1, 3, 3)
    delta[..., 1, 1] = 1
    out = restore(scene, delta, load_prior("image"), Blur("valid"), 0.004)
    assert psnr(out, scene) > 35


@pytest.mark.parametrize("response", ["linear", "srgb"])
def test_a_photo_that_is_not_blurred_comes_back_as_it_is(response, short_search, capsys, tmp_path):
    photo = resize(read_image(data.coffee()[:, :400]), 65)
    write_image(photo, tmp_path / "photo.png")
    given = photo if response == "linear" else tmp_path / "photo.png"
    photo = read_image(given)
    out = deblur(given, rounds=2, error=True)
    assert out.figures["response"] == response
    assert mnc(out.kernel, no_blur(1, 33)) >= 0.9 and torch.equal(out.image, photo)
    assert out.error.unique().item() == pytest.approx(out.figures["noise_std"])
    assert "not blurred" in capsys.readouterr().out


@pytest.mark.parametrize("std", [0.3, 0.6, 0.8, "shift", "line"])
def test_what_any_lens_and_pixels_blur_is_no_blur(std, monkeypatch):
    """Nor is a shift by part of a pixel; Gaussians of .8 pixels are, and three pixels in line."""
    found = torch.zeros(1, 1, 32, 32)
    if std == "shift":
        found[..., 16, 16:18] = 0.5
    elif std == "line":
        found[..., 16, 15:18] = 1 / 3
    else:
        found = gaussian_kernels(1, 32, std=(std, std))
    monkeypatch.setattr(sys.modules["blindlib.deblur"], "find_kernels", lambda *_, **__: (found, torch.tensor([0.02])))
    photo = dead_leaves(1, 65, seed=3)
    out = deblur(photo)
    if std in (0.8, "line"):
        assert torch.equal(out.kernel, found) and not torch.equal(out.image, photo)
    else:
        assert torch.equal(out.kernel, no_blur(1, 32)) and torch.equal(out.image, photo)
        assert out.figures["residual"] < 1e-5


# ----------------------------------------------------------------------------------------------- the command line


def test_the_input_is_never_overwritten(tmp_path, capsys):
    write_image(torch.zeros(1, 3, 64, 64), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    assert main(["deblur", str(tmp_path / "a.png"), "--out", str(tmp_path / "." / "a.png")]) == 2
    assert "is the photograph itself" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == before


def test_nor_is_it_by_the_result(tmp_path, monkeypatch):
    """By whatever name it is called, and from whatever folder; a photograph that has gone is none."""
    x = dead_leaves(1, 40, seed=1)
    write_image(x, tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.chdir(tmp_path)
    out = deblur("a.png", kernel=no_blur(1, 3), progress=False)
    (tmp_path / "link.png").symlink_to("a.png")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    for name in ("../a.png", tmp_path / "a.png", tmp_path / "link.png"):
        with pytest.raises(ValueError, match="path: '.*' is the photograph itself; name another file"):
            out.save(name)
    assert (tmp_path / "a.png").read_bytes() == before
    out.save("a.png")
    (tmp_path / "a.png").unlink()
    out.save(tmp_path / "a.png")
    assert deblur(x, kernel=no_blur(1, 3), progress=False).source is None


@pytest.mark.parametrize("out", ["a.xyz", "nowhere/a.png"])
def test_an_impossible_output_is_refused_before_the_work(tmp_path, out, capsys):
    write_image(torch.zeros(1, 3, 64, 64), tmp_path / "in.png")
    assert main(["deblur", str(tmp_path / "in.png"), "--out", str(tmp_path / out)]) == 2
    assert "path: " in capsys.readouterr().err


@pytest.mark.parametrize("told, handed_on", [([], {}), (["--response", "linear"], {"response": "linear"})])
def test_what_was_blurred_is_handed_on(tmp_path, monkeypatch, told, handed_on):
    write_image(torch.zeros(1, 3, 64, 64), tmp_path / "in.png")
    given, x = {}, torch.zeros(1, 3, 64, 64)
    made = Deblurred(x, no_blur(1, 3), x, no_blur(1, 3), x, {"seconds": 0.0})
    monkeypatch.setattr(sys.modules["blindlib.__main__"], "deblur", lambda *a, **options: given.update(options) or made)
    assert main(["deblur", str(tmp_path / "in.png"), "--quiet", "--out", str(tmp_path / "out.png"), *told]) == 0
    assert {name: value for name, value in given.items() if name == "response"} == handed_on


def test_want_of_memory_is_one_line_and_a_fault_of_ours_a_traceback(tmp_path, monkeypatch, capsys):
    def fail(*a, **options):
        raise RuntimeError(said)

    monkeypatch.setattr(sys.modules["blindlib.__main__"], "deblur", fail)
    write_image(torch.zeros(1, 3, 64, 64), tmp_path / "in.png")
    command = ["deblur", str(tmp_path / "in.png"), "--out", str(tmp_path / "out.png")]
    said = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
    assert main(command) == 2 and said in capsys.readouterr().err
    said = "shapes do not match"
    with pytest.raises(RuntimeError, match=said):
        main(command)


def test_white_is_an_error_of_a_quarter_of_the_range(tmp_path, monkeypatch):
    write_image(torch.zeros(1, 3, 64, 64), tmp_path / "in.png")
    x, error = torch.zeros(1, 3, 1, 4), torch.tensor([0.0, 0.25, 0.5, 0.9])[None, None, None]
    made = Deblurred(x, no_blur(1, 3), x, no_blur(1, 3), x, {"seconds": 0.0}, error)
    monkeypatch.setattr(sys.modules["blindlib.__main__"], "deblur", lambda *a, **options: made)
    outs = [str(tmp_path / "out.png"), "--error-out", str(tmp_path / "error.png")]
    assert main(["deblur", str(tmp_path / "in.png"), "--quiet", "--out", *outs]) == 0
    assert np.asarray(Image.open(tmp_path / "error.png")).tolist() == [[0, 128, 255, 255]]


@pytest.mark.parametrize("outs, message", [
    (["--out", "a.png", "--kernel-out", "./a.png"], "kernel-out: a.png is where the photograph goes"),
    (["--out", "b.png", "--kernel-out", "a.png", "--error-out", "a.png"], "error-out: a.png is where the kernel goes"),
])  # fmt: skip
def test_no_two_outputs_go_to_one_file(tmp_path, capsys, outs, message):
    write_image(torch.zeros(1, 3, 64, 64), tmp_path / "in.png")
    assert main(["deblur", str(tmp_path / "in.png"), *outs]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_photo_is_one_line(tmp_path, capsys):
    assert main(["deblur", str(tmp_path / "no.png"), "--out", str(tmp_path / "b.png")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("blindlib: photo: no file") and err.count("\n") == 1


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    write_image(torch.zeros(1, 3, 8, 8), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def broken(self, fp, *args, **kwargs):
        Path(fp).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        write_image(torch.ones(1, 3, 8, 8), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before


def test_solve_is_reached_through_partial(blurred):
    _, k, y = blurred
    from blindlib.sampler import solve

    z = torch.zeros(1, 3, 128, 128)
    torch.testing.assert_close(
        solve(partial(Blur("valid"), kernel=k), y, z, 0.1), Blur("valid").solve(y, k, z, 0.1), atol=1e-5, rtol=1e-5
    )


@pytest.fixture
def album(tmp_path, monkeypatch):
    """A folder of photographs and other things, and a `deblur` that turns pictures upside down."""
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    x = dead_leaves(3, 40, seed=1)
    for i, name in enumerate(["a.png", "b.jpg", "c.bmp"]):
        write_image(x[i, None], folder / name)
    write_image(x[:1], folder / "sub" / "d.png")
    write_image(x[:1], folder / "e.bmp")
    (folder / "e.bmp").rename(folder / "e.psd")  # of a format that is not written
    (folder / ".hidden").write_text("")
    calls = []

    def turned(photo, **options):
        image = read_image(photo).flip(2)
        calls.append(photo.name)
        figures = {"seconds": 0.0, "scale": 0.5 if photo.name == "b.jpg" else 1.0}
        return Deblurred(image, torch.ones(1, 1, 1, 1), image, torch.ones(1, 1, 1, 1), image, figures)

    monkeypatch.setattr(sys.modules["blindlib.deblur"], "deblur", turned)
    return folder, calls


def test_a_folder_into_a_folder(album, capsys):
    folder, calls = album
    command = ["deblur", str(folder), "--out", str(folder.parent / "out")]
    assert main(command) == 0
    said = capsys.readouterr().out.splitlines()
    lines = ["1/4 a.png: 0 s", "2/4 b.jpg: 0 s, scaled down to 50%", "3/4 c.bmp: 0 s", "4/4 e.psd.png: 0 s"]
    assert said == [*lines, f"{command[-1]}: done"]
    names = sorted(p.name for p in (folder.parent / "out").iterdir())
    assert names == ["a.png", "b.jpg", "c.bmp", "e.psd.png"] and len(calls) == 4
    for name, of in zip(names, ["a.png", "b.jpg", "c.bmp", "e.psd"], strict=True):
        atol = 0.2 if name == "b.jpg" else 0.006
        expected = read_image(folder / of).flip(2)
        torch.testing.assert_close(read_image(folder.parent / "out" / name), expected, atol=atol, rtol=0)

    (folder.parent / "out" / "c.bmp").unlink()
    assert main(command) == 0
    assert calls[4:] == ["c.bmp"] and capsys.readouterr().out.startswith("3 of 4 are there already\n4/4 c.bmp: ")


def test_what_cannot_be_restored_is_told_and_the_rest_is_done(album, capsys):
    folder, calls = album
    (folder / "notes.txt").write_text("not a picture")
    whole = (folder / "a.png").read_bytes()
    (folder / "aa.png").write_bytes(whole[: len(whole) // 2])
    assert main(["deblur", str(folder), "--out", str(folder.parent / "out"), "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("blindlib: 2 of the files in ") and err.count("\n") == 3
    assert "aa.png: photo: " in err and "notes.txt: photo: " in err and err.count("cannot be read as an image") == 2
    assert len(calls) == 4 and len(list((folder.parent / "out").iterdir())) == 4


@pytest.mark.parametrize(
    "command, message",
    [
        (["album", "--out", "album"], "out: '.*' is the folder of the photographs itself"),
        (["album", "--out", "album/a.png"], "out: expected a folder, as '.*album' is one, got the file"),
        (["album", "--out", "no/where"], "out: there is no folder '.*no'"),
        (["album", "--out", "out", "--kernel-out", "k.png"], "kernel-out: is of one photograph"),
        (["album", "--out", "out", "--error-out", "e.png"], "error-out: is of one photograph"),
        (["album", "--out", "out", "--jobs", "0"], "jobs: expected a number of processes"),
        (["album/sub/d.png", "--out", "d.png", "--jobs", "2"], "jobs, cluster: expected a folder of photographs, got"),
        (["album/none", "--out", "out"], "folder: there is no photograph in"),
    ],
)
def test_folders_that_will_not_do(album, monkeypatch, command, message, capsys):
    monkeypatch.chdir(album[0].parent)
    (album[0] / "none").mkdir()
    assert main(["deblur", *command]) == 2
    err = capsys.readouterr().err
    assert re.match(f"blindlib: .*{message}", err) and err.count("\n") == 1 and album[1] == []


def test_errors_are_of_one_photograph(album):
    with pytest.raises(ValueError, match="error: of a folder only"):
        deblur_folder(album[0], album[0].parent / "out", error=True)


def test_an_option_that_there_is_not_is_no_photographs_fault(tmp_path):
    (tmp_path / "photos").mkdir()
    write_image(torch.zeros(1, 3, 8, 8), tmp_path / "photos" / "a.png")
    with pytest.raises(TypeError, match="'round'"):
        deblur_folder(tmp_path / "photos", tmp_path / "out", round=3)
    failed = deblur_folder(tmp_path / "photos", tmp_path / "out", kernel=no_blur(1, 3), progress=True, say=lambda _: 0)
    assert failed == {} and (tmp_path / "out" / "a.png").is_file()


def test_names_that_the_terminal_cannot_show(album, monkeypatch):
    folder, calls = album
    (folder / "a.png").rename(folder / "\u0416.png")
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["deblur", str(folder), "--out", str(folder.parent / "out")]) == 0
    shown.flush()
    assert b"\\u0416.png: 0 s" in shown.buffer.getvalue() and len(calls) == 4


def test_two_photographs_of_one_name_are_refused(album, capsys):
    folder, calls = album
    (folder / "a.png").rename(folder / "e.psd.png")
    assert main(["deblur", str(folder), "--out", str(folder.parent / "out")]) == 2
    assert "'e.psd' and 'e.psd.png' would both become 'e.psd.png'; rename one" in capsys.readouterr().err
    assert calls == []


def test_a_photograph_of_a_folder_is_as_if_alone(tmp_path):
    """With the blur that learn-operator found, too; the seed is the same for each."""
    (tmp_path / "photos").mkdir()
    for i, x in enumerate(dead_leaves(2, 24, seed=1)):
        write_image(x[None], tmp_path / "photos" / f"{i}.png")
    kernel = gaussian_kernels(1, 5, std=(1.0, 1.0), seed=0)
    Learned(kernel, Blur("valid"), 0.0, None, {}, torch.zeros(2, 3), 0.0).save(tmp_path / "operator.safetensors")
    options = ["--operator", str(tmp_path / "operator.safetensors"), "--seed", "3", "--device", "cpu", "--quiet"]
    assert main(["deblur", str(tmp_path / "photos"), "--out", str(tmp_path / "sharp"), *options]) == 0
    assert main(["deblur", str(tmp_path / "photos" / "1.png"), "--out", str(tmp_path / "1.png"), *options]) == 0
    assert (tmp_path / "sharp" / "1.png").read_bytes() == (tmp_path / "1.png").read_bytes()
