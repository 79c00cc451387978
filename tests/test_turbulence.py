import sys

import pytest
import torch

from blindlib import Turbulence, dead_leaves, gaussian_kernels, load_prior, mitigate, psnr, register, tilt_error
from blindlib.operators import warp
from blindlib.simulate import tilt_fields
from blindlib.turbulence import flow


@pytest.fixture(scope="module")
def video():
    """A scene, its kernel, the tilts of eight frames, and these."""
    scene, kernel = dead_leaves(1, 64, seed=77), gaussian_kernels(1, 17, std=(1.2, 1.2))
    tilt = tilt_fields(8, 64, strength=(1.0, 3.9), smoothness=4.0, seed=5)[None]
    y = Turbulence(frames=8)(scene, kernel, tilt)
    return scene, kernel, tilt, y + 0.02 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))


def test_registered_frames_agree(video):
    scene, kernel, tilt, y = video
    operator = Turbulence(frames=8)
    still, found = register(y, operator)
    assert still.shape == scene.shape and found.shape == tilt.shape
    torch.testing.assert_close(found.mean(1), torch.zeros_like(found[:, 0]), atol=1e-5, rtol=0)
    # The mean of the true tilts cannot be known: it bends the scene.
    own, bent = tilt - tilt.mean(1, keepdim=True), warp(scene, tilt.mean(1))
    assert tilt_error(found, own, scene).mean() < 0.6 * tilt_error(0 * own, own, scene).mean()
    blurred = operator.blur(bent, kernel)
    assert psnr(still, blurred, max_shift=1) > psnr(y.mean(1), blurred, max_shift=1) + 3


def test_flow_with_the_scene_known(video):
    scene, kernel, tilt, _ = video
    own = tilt - tilt.mean(1, keepdim=True)
    seen = Turbulence(frames=8)(scene, kernel, own)
    found = flow(seen, scene, kernel, 0 * own, Turbulence(frames=8), steps=6)
    assert tilt_error(found, own, scene).mean() < 0.5 * tilt_error(0 * own, own, scene).mean()


def test_scenes_of_a_batch_are_registered_each_for_itself(video):
    y = video[3][..., :32, :32]
    both = torch.cat([y, y.flip(-1)])
    still, tilt = register(both, Turbulence(frames=8), smoothness=(4.0,))
    alone, own = register(both[1:], Turbulence(frames=8), smoothness=(4.0,))
    torch.testing.assert_close(still[1:], alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(tilt[1:], own, atol=1e-3, rtol=0)


def test_mitigate_returns_image_kernel_and_tilts(video, monkeypatch):
    monkeypatch.setattr(sys.modules["blindlib.deblur"], "EM_STEPS", 4)
    y, priors = video[3][:, :2, :, :32, :32], {name: load_prior(name) for name in ("image", "kernel")}
    run = mitigate(y, priors, samples=1, rounds=1)
    assert run.image.shape == (1, 3, 32, 32) and run.posterior("tilt").shape == (1, 1, 2, 2, 32, 32)
    torch.testing.assert_close(run.kernel.sum(), torch.tensor(1.0))
    torch.testing.assert_close(run.tilt.mean(1), torch.zeros(1, 2, 32, 32), atol=1e-5, rtol=0)
    assert run.residual < 0.1


def test_noise_that_mitigate_does_not_take_is_refused_before_the_work():
    with pytest.raises(ValueError, match="noise_std: expected"):
        mitigate(torch.zeros(1, 4, 3, 32, 32), {}, noise_std=5)


@pytest.mark.parametrize(
    "shape, boundary, message",
    [
        ((1, 3, 32, 32), "reflect", r"y: expected shape \(1, M, C, H, W\)"),
        ((2, 4, 3, 32, 32), "reflect", "y: expected shape"),
        ((1, 1, 3, 32, 32), "reflect", "two frames or more"),
        ((1, 4, 3, 32, 32), "valid", "boundary: expected"),
    ],
)
def test_what_mitigate_does_not_take(shape, boundary, message):
    with pytest.raises(ValueError, match=message):
        mitigate(torch.zeros(shape), {}, boundary=boundary)
