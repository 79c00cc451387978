from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import convolve2d

from blindlib import Blur, Downsample, LinearLight, SpaceVaryingBlur, Turbulence, dead_leaves, motion_kernels, psnr
from blindlib.baselines import no_blur
from blindlib.operators import BOUNDARIES, convolve_direct, convolve_fft, otf, to_light, to_srgb, warp

PAD = {"zero": "constant", "reflect": "reflect", "circular": "wrap"}


def scipy_blur(image, kernel, boundary):
    """The same convolution by scipy, on one channel: pad as named, convolve, centre at K // 2."""
    k, l = kernel.shape
    if boundary != "valid":
        pads = ((k - 1 - k // 2, k // 2), (l - 1 - l // 2, l // 2))
        image = np.pad(image, pads, mode=PAD[boundary])
    return convolve2d(image, kernel, mode="valid")


@pytest.mark.parametrize("boundary", BOUNDARIES)
@given(
    size=st.tuples(st.integers(9, 20), st.integers(9, 20)),
    window=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 1000),
)
def test_agrees_with_scipy(boundary, size, window, seed):
    g = torch.Generator().manual_seed(seed)
    image, kernel = torch.randn(2, 3, *size, generator=g), torch.rand(2, 1, *window, generator=g)
    out = Blur(boundary)(image, kernel)
    for b in range(2):
        for c in range(3):
            ref = scipy_blur(image[b, c].double().numpy(), kernel[b, 0].double().numpy(), boundary)
            torch.testing.assert_close(out[b, c], torch.from_numpy(ref).float(), atol=2e-4, rtol=1e-4)


def test_agrees_with_the_reference(golden):
    ref = golden("operators.npz")
    for name in ("24", "25"):  # the reference correlates: its kernel is ours flipped
        out = Blur("zero")(ref["image"], ref[f"kernel{name}"].flip(-2, -1))
        torch.testing.assert_close(out, ref[f"blur{name}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [(3, 3), (8, 5), (16, 17)])
def test_fft_agrees_with_direct(window, g):
    image, kernel = torch.randn(2, 3, 40, 33, generator=g), torch.rand(2, 3, *window, generator=g)
    torch.testing.assert_close(convolve_fft(image, kernel), convolve_direct(image, kernel), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("window", [(5, 5), (6, 4)])
def test_adjoint(boundary, window, g):
    """Against the transpose of the matrix whose columns are what scipy makes of one bright pixel each."""
    k = torch.rand(2, 1, *window, generator=g, dtype=torch.float64)
    pixels = torch.eye(9 * 8, dtype=torch.float64).reshape(-1, 9, 8).numpy()
    columns = [[scipy_blur(pixel, one[0].numpy(), boundary) for pixel in pixels] for one in k]
    matrix = torch.tensor(np.array(columns))  # (2, 72, h, w)
    y = torch.randn(2, 3, *matrix.shape[2:], generator=g, dtype=torch.float64)
    expected = torch.einsum("bnhw,bchw->bcn", matrix, y).reshape(2, 3, 9, 8)
    torch.testing.assert_close(Blur(boundary).adjoint(y, k), expected)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_solve_is_the_minimiser(boundary, g):
    blur = Blur(boundary)
    x, k = torch.randn(2, 3, 20, 18, generator=g), torch.rand(2, 1, 6, 5, generator=g)
    k = k / k.sum((2, 3), keepdim=True)
    z, weight = torch.randn(x.shape, generator=g), torch.tensor([0.05, 0.3]).reshape(2, 1, 1, 1)
    y = blur(x, k)
    best = blur.solve(y, k, z, weight, iterations=80)
    gradient = blur.adjoint(blur(best, k) - y, k) + weight * (best - z)
    assert gradient.abs().max() < 1e-4


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("size", [4, 5, 32, 33])
def test_a_delta_changes_nothing(boundary, size, g):
    x = torch.randn(1, 3, 40, 36, generator=g)
    out = Blur(boundary)(x, no_blur(1, size))
    first = size - 1 - size // 2 if boundary == "valid" else 0
    seen = x[..., first : first + out.shape[-2], first : first + out.shape[-1]]
    torch.testing.assert_close(out, seen, atol=1e-5, rtol=0)


def test_sizes_predict_the_output(g):
    for boundary in BOUNDARIES:
        blur = Blur(boundary)
        size = blur.sizes((33, 26), kernel=(8, 7))["image"]
        assert blur(torch.zeros(1, 1, *size), torch.ones(1, 1, 8, 7)).shape[-2:] == (33, 26)


def test_otf_of_a_shift_is_a_phase():
    k = torch.zeros(1, 1, 5, 5)
    k[..., 3, 2] = 1  # one below the centre
    torch.testing.assert_close(otf(k, (16, 16)).abs(), torch.ones(1, 1, 16, 9))
    x = torch.randn(1, 1, 16, 16)
    torch.testing.assert_close(Blur()(x, k), x.roll(1, 2), atol=1e-5, rtol=0)


def test_bad_input():
    blur, x, k = Blur(), torch.zeros(2, 3, 16, 16), torch.ones(1, 1, 5, 5)
    with pytest.raises(ValueError, match=r"boundary: expected one of .*'mirror'"):
        Blur("mirror")
    with pytest.raises(TypeError, match="image: expected a floating-point tensor, got ndarray"):
        blur(x.numpy(), k)
    with pytest.raises(TypeError, match="kernel: is of torch.float64, the image of torch.float32"):
        Blur()(torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 3, 3).double() / 9)
    with pytest.raises(TypeError, match=r"kernel: .*torch.uint8"):
        blur(x, k.byte())
    with pytest.raises(ValueError, match=r"image: expected 4 dimensions"):
        blur(x[0], k)
    with pytest.raises(ValueError, match=r"kernel: \(17, 17\) is larger than the image"):
        blur(x, torch.ones(1, 1, 17, 17))
    with pytest.raises(ValueError, match=r"kernel: expected one, or one an image \(2\)"):
        blur(x, torch.ones(3, 1, 5, 5))
    with pytest.raises(ValueError, match="is on meta"):
        blur(x, k.to("meta"))
    with pytest.raises(ValueError, match="kernel: expected 4 dimensions .*, none of them 0, got shape"):
        blur(x, torch.ones(1, 1, 0, 0))


@pytest.mark.parametrize("operator", [Blur(), Blur("valid"), Downsample(2, "zero"), LinearLight(Blur())], ids=repr)
def test_bad_input_of_solve(operator, g):
    image, kernel = torch.rand(2, 3, 16, 16, generator=g), torch.full((1, 1, 3, 3), 1 / 9)
    y = operator(image, kernel)
    for change, error, message in (
        (dict(kernel=torch.full((1, 1, 17, 17), 17.0**-2)), ValueError, r"kernel: \(17, 17\) is larger than the image"),
        (dict(kernel=torch.ones(1, 1, 0, 0)), ValueError, "kernel: expected 4 dimensions"),
        (dict(y=y[..., 1:]), ValueError, r"y: expected shape \(2, 3, \d+, \d+\), as the operator makes it, got"),
        (dict(y=y[:1]), ValueError, r"y: expected shape .* got \(1, 3,"),
        (dict(y=y.double()), TypeError, "y: expected a tensor of torch.float32 on cpu, .* got torch.float64 on cpu"),
        (dict(y=y.numpy()), TypeError, "y: expected a tensor of torch.float32 on cpu, .* got ndarray"),
        (dict(image=image.numpy()), TypeError, "image: expected a floating-point tensor, got ndarray"),
    ):
        with pytest.raises(error, match=message):
            operator.solve(**dict(y=y, kernel=kernel, image=image, weight=0.1) | change)


def test_gradients_flow_to_both(g):
    x = torch.randn(1, 1, 8, 8, generator=g, dtype=torch.float64, requires_grad=True)
    k = torch.rand(1, 1, 4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    for boundary in BOUNDARIES:
        assert torch.autograd.gradcheck(partial(Blur(boundary)), (x, k))


# ------------------------------------------------------------------------------------------------- turbulence


def test_turbulence_agrees_with_the_reference(golden):
    ref = golden("operators.npz")
    torch.testing.assert_close(warp(ref["image"], ref["tilt"], "zero"), ref["warp"], atol=1e-4, rtol=0)
    out = Turbulence("zero")(ref["image"], ref["kernel24"].flip(-2, -1), ref["tilt"])
    torch.testing.assert_close(out, ref["turbulence24"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_no_tilt_changes_nothing_and_a_whole_one_shifts(boundary, g):
    image = torch.randn(2, 3, 12, 9, generator=g)
    torch.testing.assert_close(warp(image, torch.zeros(1, 2, 12, 9), boundary), image, atol=1e-5, rtol=0)
    shifted = warp(image, torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(2, -1, 12, 9), boundary)
    torch.testing.assert_close(shifted[:, :, 1:, :-2], image[:, :, :-1, 2:], atol=1e-5, rtol=0)
    if boundary == "circular":
        torch.testing.assert_close(shifted, image.roll((1, -2), (2, 3)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_turbulence_is_differentiable_in_all_and_changes_no_input(boundary, g):
    image = torch.randn(1, 1, 9, 8, generator=g, dtype=torch.float64)
    kernel = torch.rand(1, 1, 3, 3, generator=g, dtype=torch.float64)
    # Away from whole pixels, where bilinear interpolation has a kink.
    tilt = torch.rand(1, 2, 9, 8, generator=g, dtype=torch.float64) * 0.8 + 0.1
    before = [x.clone() for x in (image, kernel, tilt)]
    inputs = [x.requires_grad_(True) for x in (image, kernel, tilt)]
    assert torch.autograd.gradcheck(Turbulence(boundary), inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_turbulence_makes_a_larger_scene_for_the_valid_boundary():
    assert Turbulence("valid").sizes((20, 24), (5, 5)) == {"image": (24, 28), "tilt": (24, 28)}


@pytest.mark.parametrize(
    "image, tilt, boundary, message",
    [
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 8, 9), "zero", r"tilt: expected shape \(1 or 1, 2, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(3, 2, 8, 8), "zero", "tilt: expected shape"),
        (torch.zeros(3, 8, 8), torch.zeros(1, 2, 8, 8), "zero", "image: expected 4 dimensions"),
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 8, 8), "mirror", "boundary: expected one of"),
    ],
)
def test_bad_tilts(image, tilt, boundary, message):
    with pytest.raises(ValueError, match=message):
        warp(image, tilt, boundary)


def test_a_tilt_of_integers_is_refused():
    with pytest.raises(TypeError, match="tilt: expected a floating-point tensor"):
        warp(torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 8, 8, dtype=torch.long))


# ------------------------------------------------------------------- space-varying blur and lower resolution

VARYING = [SpaceVaryingBlur(b, weights_at=w) for b in BOUNDARIES for w in ("sensor", "scene")]


def grid_of_psfs(*shape, g):
    psfs = torch.rand(*shape, generator=g, dtype=torch.float64)
    return psfs / psfs.sum((-2, -1), keepdim=True)


@pytest.mark.parametrize("operator", VARYING, ids=repr)
def test_one_psf_everywhere_is_a_plain_blur(operator, g):
    image, psf = torch.randn(2, 3, 20, 17, generator=g).double(), grid_of_psfs(1, 1, 1, 3, 5, 4, g=g)
    plain = operator.blur(image, psf[:, 0, 0])
    torch.testing.assert_close(operator(image, psf.expand(-1, 3, 2, -1, -1, -1)), plain)


@pytest.mark.parametrize("weights_at", ["sensor", "scene"])
def test_psfs_are_looked_up_where_they_should_be(weights_at, g):
    """Against one PSF for each pixel, interpolated and laid out as a dense matrix."""
    h = w = 9
    psfs = grid_of_psfs(1, 3, 3, 1, 3, 3, g=g)
    at = ((torch.arange(9) + 0.5) * 3 / 9 - 0.5).clamp(0, 2).double()
    low = at.floor().clamp(max=1).long()
    part = at - low
    matrix = torch.zeros(h * w, h * w, dtype=torch.float64)
    for row in range(h):
        for column in range(w):
            psf = sum(
                (part[row] if i else 1 - part[row]) * (part[column] if j else 1 - part[column])
                * psfs[0, low[row] + i, low[column] + j, 0]
                for i in (0, 1) for j in (0, 1)
            )  # fmt: skip
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    # The pixel sends psf[d] to its neighbour at +d; or it receives psf[d] from that at -d.
                    there = ((row + dy) % h * w + (column + dx) % w, row * w + column)
                    here = (row * w + column, (row - dy) % h * w + (column - dx) % w)
                    matrix[there if weights_at == "scene" else here] += psf[1 + dy, 1 + dx]
    image = torch.randn(1, 1, h, w, generator=g).double()
    ours = SpaceVaryingBlur("circular", weights_at=weights_at)(image, psfs)
    torch.testing.assert_close(ours.flatten(), matrix @ image.flatten())


@pytest.mark.parametrize("weights_at", ["sensor", "scene"])
def test_a_part_of_a_field_is_blurred_as_in_the_whole(weights_at, g):
    blur, psfs = SpaceVaryingBlur("valid", weights_at=weights_at), grid_of_psfs(1, 3, 4, 1, 4, 3, g=g)
    scene = torch.randn(2, 3, 33, 26, generator=g).double()
    whole = blur(scene, psfs)
    for top, left, h, w in ((0, 0, 8, 6), (22, 3, 8, 21), (11, 9, 5, 7)):
        part = blur(scene[..., top : top + h + 3, left : left + w + 2], psfs, part=(top, left, 30, 24))
        torch.testing.assert_close(part, whole[..., top : top + h, left : left + w])
    both = torch.stack([scene[0, :, :11, :8], scene[1, :, 19:30, 17:25]])
    for one in (psfs, grid_of_psfs(2, 3, 4, 1, 4, 3, g=g)):  # PSFs of all, or each its own
        parts = blur(both, one, part=[(0, 0, 30, 24), (19, 17, 30, 24)])
        whole = blur(scene, one)
        torch.testing.assert_close(parts, torch.stack([whole[0, :, :8, :6], whole[1, :, 19:27, 17:23]]))
    with pytest.raises(ValueError, match="part: expected one, or one for each of 2 images, got 3"):
        blur(both, psfs, part=3 * [(0, 0, 30, 24)])
    for wrong in (blur, SpaceVaryingBlur("zero")):
        with pytest.raises(ValueError, match="part: 30x24 pixels|part: 33x26 pixels"):
            wrong(scene, psfs, part=(1, 0, 30, 24))


@pytest.mark.parametrize("operator", [*VARYING, *[Downsample(2, b) for b in BOUNDARIES], Downsample(3)], ids=repr)
def test_proximal_map(operator, g):
    varying = isinstance(operator, SpaceVaryingBlur)
    kernel = grid_of_psfs(1, 2, 3, 1, 4, 3, g=g) if varying else grid_of_psfs(1, 1, 4, 3, g=g)
    y = torch.randn(2, 3, 8, 10, generator=g).double()
    size = operator.sizes((8, 10), (4, 3))["image"]
    x = torch.randn(2, 3, *size, generator=g).double()
    assert operator(x, kernel).shape == y.shape
    # At the minimum of |y - A z|^2 + 0.1 |z - x|^2 the gradient vanishes.
    z = operator.solve(y, kernel, x, 0.1, iterations=60)
    gradient = operator.adjoint(operator(z, kernel) - y, kernel) + 0.1 * (z - x)
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("operator", [*VARYING, *[Downsample(2, b) for b in BOUNDARIES], Downsample(3)], ids=repr)
def test_adjoints_of_the_others(operator, g):
    """<A x, y> = <x, A^T y>."""
    varying = isinstance(operator, SpaceVaryingBlur)
    kernel = grid_of_psfs(1, 2, 3, 1, 4, 3, g=g) if varying else grid_of_psfs(1, 1, 4, 3, g=g)
    y = torch.randn(2, 3, 8, 10, generator=g).double()
    x = torch.randn(2, 3, *operator.sizes((8, 10), (4, 3))["image"], generator=g).double()
    back = operator.adjoint(y, kernel)
    assert back.shape == x.shape
    torch.testing.assert_close((operator(x, kernel) * y).sum(), (x * back).sum())


def test_downsampling_takes_every_other_pixel(g):
    image, kernel = torch.randn(1, 3, 12, 10, generator=g), torch.rand(1, 1, 5, 5, generator=g)
    assert torch.equal(Downsample(2, "zero")(image, kernel), Blur("zero")(image, kernel)[..., ::2, ::2])


def test_bad_choices():
    with pytest.raises(ValueError, match="weights_at: expected"):
        SpaceVaryingBlur(weights_at="lens")
    with pytest.raises(ValueError, match="factor: expected a positive integer"):
        Downsample(0)
    with pytest.raises(TypeError, match="operator: expected a Blur, SpaceVaryingBlur or Downsample, got LinearLight"):
        LinearLight(LinearLight(Blur()))
    with pytest.raises(TypeError, match="image: expected a floating-point tensor"):
        LinearLight(Blur())(torch.zeros(1, 3, 9, 9, dtype=torch.int64), torch.ones(1, 1, 1, 1))
    with pytest.raises(ValueError, match="psfs: expected shape"):
        SpaceVaryingBlur()(torch.zeros(1, 3, 9, 9), torch.zeros(1, 1, 3, 3))


@pytest.mark.parametrize("boundary", ["circular", "valid"])
def test_frames_are_single_frames_side_by_side(boundary, g):
    image, kernel = torch.rand(2, 3, 12, 12, generator=g), torch.rand(2, 1, 3, 3, generator=g)
    tilt = torch.randn(2, 4, 2, 12, 12, generator=g)
    together = Turbulence(boundary, frames=4)(image, kernel, tilt)
    apart = torch.stack([Turbulence(boundary)(image, kernel, tilt[:, i]) for i in range(4)], dim=1)
    torch.testing.assert_close(together, apart)
    one = Turbulence(boundary, frames=1)(image, kernel, tilt[:, :1])
    torch.testing.assert_close(one[:, 0], Turbulence(boundary)(image, kernel, tilt[:, 0]))
    shared = Turbulence(boundary, frames=4)(image, kernel[:1], tilt[:1])
    torch.testing.assert_close(shared[0], Turbulence(boundary, frames=4)(image[:1], kernel[:1], tilt[:1])[0])


@pytest.mark.parametrize("frames", [None, 3])
def test_turbulence_solves_for_the_image(frames, g):
    """At the minimum of |y - A x|^2 + w |x - x0|^2 the gradient is zero; of plain tensors the result is one, too."""
    shape = (1, 2, 8, 8) if frames is None else (1, frames, 2, 8, 8)
    operator, tilt = Turbulence(frames=frames), torch.randn(*shape, generator=g)
    image, start = torch.rand(2, 1, 3, 8, 8, generator=g)
    kernel = torch.rand(1, 1, 3, 3, generator=g) / 9
    y = operator(image, kernel, tilt)
    x = operator.solve(y, kernel, tilt, start, 0.5, iterations=60)
    assert not x.requires_grad
    x.requires_grad_(True)
    loss = (y - operator(x, kernel, tilt)).square().sum() + 0.5 * (x - start).square().sum()
    assert torch.autograd.grad(loss, x)[0].abs().max() < 1e-3


@pytest.mark.parametrize("frames", [None, 2])
def test_turbulence_solves_for_a_small_tilt(frames):
    """Steps of Gauss and Newton find a smooth tilt of a textured image; a frame's step is its own."""
    axis = torch.arange(32) * 2 * torch.pi / 32
    image = (torch.sin(4 * axis)[:, None] + torch.sin(5 * axis)).expand(1, 3, 32, 32) / 2
    kernel = torch.ones(1, 1, 1, 1)
    true = torch.stack([0.4 * torch.sin(axis)[:, None].expand(32, 32), 0.3 * torch.cos(axis).expand(32, 32)])[None]
    if frames is not None:
        true = torch.stack([true, -true], dim=1)
    operator = Turbulence(frames=frames)
    y, tilt = operator(image, kernel, true), torch.zeros_like(true)
    for _ in range(4):
        tilt = operator.solve_tilt(y, image, kernel, tilt, 1e-3, smoothness=3.0, iterations=20)
    assert (tilt - true).abs().mean() < 0.15 * true.abs().mean()
    torch.testing.assert_close(operator.solve_tilt(y, 0 * image, kernel, 0 * true, 1e-3), 0 * true)


@pytest.mark.parametrize("frames", [None, 2])
def test_one_tilt_to_start_from_for_several_images(frames, g):
    image, kernel = torch.rand(3, 1, 8, 8, generator=g).double(), torch.ones(1, 1, 1, 1).double()
    tilt = 0.5 * torch.randn(1, *([] if frames is None else [frames]), 2, 8, 8, generator=g).double()
    operator = Turbulence(frames=frames)
    y = torch.rand(operator(image, kernel, tilt).shape, generator=g).double()
    together = operator.solve_tilt(y, image, kernel, tilt, 0.1)
    apart = [operator.solve_tilt(y[i : i + 1], image[i : i + 1], kernel, tilt, 0.1) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart))  # double: conjugate gradients make much of rounding


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Turbulence(frames=0), "frames: expected a positive integer, got 0"),
        (
            lambda: Turbulence(frames=2)(torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 1, 1), torch.zeros(1, 2, 8, 8)),
            r"tilt: expected shape \(B or 1, 2, 2, H, W\), one for each frame",
        ),
        (
            lambda: Turbulence(frames=2)(torch.zeros(3, 3, 8, 8), torch.ones(1, 1, 1, 1), torch.zeros(2, 2, 2, 8, 8)),
            "tilt: expected one set",
        ),
    ],
)
def test_bad_frames(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------------- light


def test_light_is_what_the_standard_says():
    values = torch.tensor([-1.0, 2 * 10 / 255 - 1, 0.0, 2 * 188 / 255 - 1, 1.0])
    light = (to_light(values) + 1) / 2
    torch.testing.assert_close(light, torch.tensor([0.0, 0.003035, 0.214041, 0.502886, 1.0]), atol=1e-6, rtol=1e-4)
    beyond = torch.linspace(-1.3, 1.3, 301, dtype=torch.float64)
    torch.testing.assert_close(to_srgb(to_light(beyond)), beyond, atol=1e-5, rtol=0)  # the standard's own gap
    assert (to_light(beyond).diff() > 0).all()


def test_light_adds_up(g):
    """Half of white and half of black is what a camera shows as 188, not as 127."""
    image = torch.full((1, 3, 8, 8), -1.0)
    image[..., ::2] = 1
    box = torch.zeros(1, 1, 3, 3)
    box[..., 1, :2] = 0.5
    assert LinearLight(Blur())(image, box).allclose(torch.tensor(2 * 187.52 / 255 - 1), atol=1e-3)


@pytest.mark.parametrize("operator", [Blur("circular"), Blur("valid"), Downsample(2, "reflect")], ids=repr)
def test_where_contrast_is_small_light_makes_no_difference(operator, g):
    k = torch.rand(1, 1, 3, 3, generator=g)
    k, camera = (k / k.sum()).double(), LinearLight(operator)
    size = operator.sizes((12, 12), (3, 3))["image"]
    assert camera.sizes((12, 12), (3, 3))["image"] == size
    x, start = (0.2 + 1e-4 * torch.randn(2, 1, 3, *size, generator=g).double()).unbind()
    y = operator(x, k)
    torch.testing.assert_close(camera(x, k), y, atol=1e-6, rtol=0)
    found, expected = (a.solve(y=y, kernel=k, image=start, weight=0.1, iterations=60) for a in (camera, operator))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (expected - start).abs().max() > 5e-5


@pytest.mark.parametrize("operator", [Blur("circular"), Blur("valid"), SpaceVaryingBlur("zero")], ids=repr)
def test_a_step_to_the_light_is_that_of_gauss_and_newton(operator, g):
    psfs = motion_kernels(4, 7, seed=1).double()
    known = {"psfs": psfs.reshape(1, 2, 2, 1, 7, 7)} if isinstance(operator, SpaceVaryingBlur) else {"kernel": psfs[:1]}
    scene, start = dead_leaves(2, 24, seed=1).double().split(1)
    camera = LinearLight(operator)
    y = camera(scene, **known)
    found = camera.solve(y=y, image=start, weight=0.1, iterations=200, **known)

    slopes = [torch.autograd.functional.jvp(to_light, v, torch.ones_like(v))[1] for v in (start, y)]
    change = ((to_light(found) - to_light(start)) / slopes[0]).requires_grad_(True)
    blurred = operator(to_light(start) + slopes[0] * change, **known)
    objective = ((to_light(y) - blurred) / slopes[1]).square().sum() + 0.1 * change.square().sum()
    assert torch.autograd.grad(objective, change)[0].abs().max() < 1e-5
    assert (camera(found, **known) - y).square().mean() < 0.2 * (camera(start, **known) - y).square().mean()


@pytest.mark.parametrize("kernel", [torch.ones(1, 1, 5, 5) / 25, motion_kernels(1, 9, seed=1)], ids=["box", "motion"])
def test_a_dozen_iterations_lead_to_the_light_where_dark_meets_bright(kernel, g):
    x = F.interpolate(torch.randint(2, (1, 3, 8, 8), generator=g).float(), scale_factor=4) * 1.9 - 0.95
    camera = LinearLight(Blur())
    y = camera(x, kernel) + 0.02 * torch.randn(x.shape, generator=g)
    start = torch.zeros_like(x)
    found = [camera.solve(y=y, kernel=kernel, image=start, weight=1e-3, iterations=n) for n in (12, 400)]
    left = [(camera(x, kernel) - y).norm() for x in found]
    assert left[0] < 2 * left[1]


def test_rounding_does_no_harm_where_no_light_arrives(g):
    y, camera = 2 * torch.rand(1, 3, 97, 97, generator=g) - 1, LinearLight(Blur("valid"))
    found = camera.solve(y=y, kernel=no_blur(1, 32), image=torch.zeros(1, 3, 128, 128), weight=1e-8)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("operator", [Blur("circular"), Blur("valid"), Downsample(2, "reflect")], ids=repr)
def test_with_noise_in_light_a_step_is_the_operators_own(operator, g):
    k, camera = motion_kernels(1, 5, seed=1), LinearLight(operator, noise_in="light")
    x, start = torch.rand(2, 1, 3, *operator.sizes((12, 12), (5, 5))["image"], generator=g).unbind()
    y = camera(x, k)
    torch.testing.assert_close(y, LinearLight(operator)(x, k))
    found = camera.solve(y=y, kernel=k, image=start, weight=0.1)
    expected = operator.solve(to_light(y), kernel=k, image=to_light(start), weight=0.1)
    torch.testing.assert_close(to_light(found), expected)
    y[..., 3:6, 3:6] = -1  # it would have to be darker than black around, and a little less light is many values
    ringing = camera.solve(y=y, kernel=k, image=start, weight=1e-3)
    assert operator.solve(to_light(y), kernel=k, image=to_light(start), weight=1e-3).min() < -1 == ringing.min()
    with pytest.raises(ValueError, match="noise_in: expected 'values' or 'light'"):
        LinearLight(operator, noise_in="srgb")


def test_samplers_restore_what_a_camera_has_blurred(astronaut):
    from blindlib import DPS, DiffPIR, PiGDM, dpir, load_prior, sample

    x, k = astronaut(64)
    prior, camera = load_prior("image"), partial(LinearLight(Blur()), kernel=k)
    y = camera(x) + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    unheeded = psnr(dpir(y, partial(Blur(), kernel=k), prior, 0.02), x)
    assert psnr(dpir(y, camera, prior, 0.02), x) > max(unheeded, psnr(y, x)) + 4
    for guidance in (DPS().respaced(60), DiffPIR(0.02), PiGDM(0.02)):
        steps = 60 if isinstance(guidance, DPS) else 20
        made = sample(y, camera, {"image": prior}, steps=steps, guidance=guidance)
        assert psnr(made.image, x) > max(unheeded, psnr(y, x)) + 1, guidance
