import json
from functools import partial

import pytest
import torch
import unpaired

from blindlib import Result

TINY = [
    unpaired.Experiment("motion blur, 7x7", 32, 7, 0.02, None, 20, 10, 33, 2),
    unpaired.Experiment("field of 1x2 PSFs, 7x7", 40, 7, 0.01, (1, 2), 20, 10, 40, 1),
    unpaired.Experiment("lens of 1x2 PSFs in colour, 7x7", 40, 7, 0.01, (1, 2), 20, 10, 40, 1),
    unpaired.Experiment("twice the resolution, 7x7", 24, 7, 0.01, steps=2),
]


@pytest.mark.parametrize("experiment", TINY, ids=lambda e: e.name)
def test_each_experiment_undoes_its_blur_and_is_measured_once(experiment, tmp_path, monkeypatch, capsys):
    few = partial(unpaired.indirect_kernel, patches=24, rounds=1)
    monkeypatch.setattr(unpaired, "indirect_kernel", few)
    out = tmp_path / "u.json"
    arguments = ["--experiment", experiment.name, "--only", "true", "moments", "--out", str(out)]
    unpaired.main(arguments, TINY)
    ((setting, rows),) = json.loads(out.read_text())["results"].items()
    assert setting == f"{experiment.name}, seed 100"
    assert list(rows)[:2] == ["measured", "true kernel"] and all(len(row) == 4 for row in rows.values())
    true, learned = rows["true kernel"], rows["moments" if "moments" in rows else "moments, from other photographs"]
    flat = unpaired.likeness(torch.ones(1, 1, 7, 7) / 49, unpaired.truth(experiment, 100)[1])
    for item, one in true.items():
        assert one["mnc"] == pytest.approx(1, abs=1e-5) and one["psnr"] > rows["measured"][item]["psnr"]
        assert flat < learned[item]["mnc"] < 1 and learned[item]["seconds"] > 0
    monkeypatch.setattr(unpaired, "scores", None)  # not needed again
    unpaired.main(arguments, TINY)
    assert "| true kernel | 1.000 |" in capsys.readouterr().out.split("dB |")[-1]


def test_one_kernel_is_held_against_all():
    _, psfs = unpaired.truth(unpaired.EXPERIMENTS[2], 0)
    first = psfs[0, :1, 0, :1]
    assert unpaired.likeness(first, psfs[:, :1, :1, :1]) == pytest.approx(1, abs=1e-6)
    assert unpaired.likeness(first, psfs) < 0.95
    one, wide = psfs[:, :1, :1, :1], torch.nn.functional.pad(first, (3, 3, 3, 3))
    assert unpaired.likeness(wide, one) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("experiment", [unpaired.EXPERIMENTS[0], *unpaired.EXPERIMENTS[3:5]], ids=lambda e: e.name)
def test_a_single_picture_is_seen_in_its_middle(experiment, monkeypatch):
    """What the methods that see one picture are given fits the priors, and the true noise of a lens is not among it."""
    seen, none = [], Result({"kernel": torch.ones(1, 1, 32, 32) / 1024}, 1, torch.zeros(1), 1, 0.0, {})

    def see(found, y, *more, noise_std=None, **_):
        seen.append((y, more[0] if noise_std is None else noise_std))
        return found

    for name, found in (("sample", none), ("fast_em", none), ("find_kernels", [none.kernel])):
        monkeypatch.setattr(unpaired, name, partial(see, found))
    methods = unpaired.methods(experiment, 100)
    for name in (name for name in methods if name.startswith("one picture")):
        assert len(methods[name]()) == 4
    side = 48 if experiment.name.startswith("twice") else 97
    assert {tuple(y.shape) for y, _ in seen} == {(1, 3, side, side), (1, 3, 97, 97)}
    for y, other in seen:
        if not isinstance(other, float):
            assert other.sizes(y.shape[-2:], (32, 32))["image"] == (128, 128)
        else:
            assert (other == experiment.noise_std) == ("lens" not in experiment.name)
    (_, y) = list(unpaired.held_out(experiment, 100).values())[2]
    top = (y.shape[-1] - side) // 2
    assert any(torch.equal(one, y[..., top : top + side, top : top + side]) for one, _ in seen)
    if side == 48:
        coarse = y[..., 7:56, 7:56]  # every second pixel of an enlargement is one of these
        assert any(one.shape[-1] == 97 and torch.allclose(one[..., ::2, ::2], coarse, atol=1e-5) for one, _ in seen)
