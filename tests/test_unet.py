import json

import pytest
import torch
from safetensors.torch import load_file

from blindlib import UNet, load_prior
from blindlib.unet import _read_layout


@pytest.mark.parametrize("name", ["image", "kernel", "tilt"])
def test_agrees_with_the_reference(golden, name):
    net = UNet.from_state_dict(load_file(golden(f"unet_{name}.safetensors")), head_channels=32)
    io = golden(f"unet_{name}_io.npz")
    with torch.no_grad():
        torch.testing.assert_close(net(io["x"], io["t"]), io["y"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name, keys", [("ffhq_10m", 362), ("kernel", 256), ("tilt", 362)])
def test_has_the_published_state_dicts(golden, name, keys):
    shapes = json.loads(golden("checkpoint_shapes.json").read_text())[name]
    assert len(shapes) == keys
    with torch.device("meta"):
        net = UNet(**_read_layout({key: torch.empty(shape) for key, shape in shapes.items()}))
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == shapes


@pytest.mark.parametrize("attention", [(), (2,), (2, 4)])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2)])
def test_layout_is_read_back_from_the_state_dict(multipliers, blocks, attention):
    attention = tuple(a for a in attention if a < 2 ** len(multipliers))
    net = UNet(
        2, 4, base_channels=8, multipliers=multipliers, blocks=blocks, attention=attention, groups=4, head_channels=8
    )
    again = UNet.from_state_dict(net.state_dict(), groups=4, head_channels=8)
    assert again.config == net.config


def test_items_of_a_batch_do_not_mix():
    net = load_prior("image").net
    x = torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = net(x, torch.tensor([7, 300, 999]))
        alone = net(x[1:2], torch.tensor([300]))
    torch.testing.assert_close(whole[1:2], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "shape, message",
    [((3, 16, 16), "expected shape"), ((1, 1, 16, 16), r"\(B, 3, H, W\)"), ((1, 3, 20, 16), "multiples of 8")],
)
def test_bad_input(shape, message):
    with pytest.raises(ValueError, match=message):
        UNet(3, base_channels=8, multipliers=(1, 1, 1, 1), groups=4)(torch.zeros(shape), torch.tensor([0]))


@pytest.mark.parametrize(
    "x, t, error, message",
    [
        ([[0.0]], torch.tensor([0]), TypeError, "x: expected a tensor of torch.float32, as the weights are, got list"),
        (torch.zeros(2, 3, 8, 8).double(), torch.tensor([0]), TypeError, "x: .* got torch.float64"),
        (torch.zeros(2, 3, 8, 8), 0, ValueError, r"t: expected a tensor of shape \(1,\) or \(2,\), got int"),
        (torch.zeros(2, 3, 8, 8), torch.tensor(0), ValueError, r"t: expected a tensor .* got shape \(\)"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(3), ValueError, r"t: expected a tensor .* got shape \(3,\)"),
    ],
)
def test_bad_types_and_times(x, t, error, message):
    with pytest.raises(error, match=message):
        UNet(3, base_channels=8, multipliers=(1, 1), groups=4)(x, t)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(multipliers=()), "multipliers: expected one for each level, at least one, got none"),
        (dict(multipliers=(1, 0)), r"multipliers\[1\]: expected a positive integer, got 0"),
        (dict(base_channels=0), "base_channels: expected a positive integer, got 0"),
        (dict(in_channels=2.0), "in_channels: expected a positive integer, got 2.0"),
        (dict(blocks=0), "blocks: expected a positive integer, got 0"),
        (dict(groups=0), "groups: expected a positive integer, got 0"),
    ],
)
def test_numbers_that_are_too_small(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(**dict(in_channels=3) | change)


def test_bad_widths():
    with pytest.raises(ValueError, match="groups"):
        UNet(3, base_channels=30)
    with pytest.raises(ValueError, match="head_channels"):
        UNet(3, base_channels=32, attention=(1,), head_channels=24)
