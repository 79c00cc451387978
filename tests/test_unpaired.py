import json

import pytest
import torch
import unpaired

TINY = [
    unpaired.Experiment("motion blur, 7x7", 32, 7, 0.02, None, 20, 10, 33, 2),
    unpaired.Experiment("field of 1x2 PSFs, 7x7", 40, 7, 0.01, (1, 2), 20, 10, 40, 1),
    unpaired.Experiment("lens of 1x2 PSFs in colour, 7x7", 40, 7, 0.01, (1, 2), 20, 10, 40, 1),
    unpaired.Experiment("twice the resolution, 7x7", 24, 7, 0.01, steps=2),
]


@pytest.mark.parametrize("experiment", TINY, ids=lambda e: e.name)
def test_each_experiment_undoes_its_blur_and_is_measured_once(experiment, tmp_path, monkeypatch, capsys):
    out = tmp_path / "u.json"
    arguments = ["--experiment", experiment.name, "--only", "true", "moments", "--out", str(out)]
    unpaired.main(arguments, TINY)
    ((setting, rows),) = json.loads(out.read_text())["results"].items()
    assert setting == f"{experiment.name}, seed 100"
    truth, measured = rows["true kernel"], rows["measured"]
    assert len(rows) >= 3 and all(len(row) == 4 for row in rows.values())
    for item, one in truth.items():
        assert one["mnc"] == pytest.approx(1, abs=1e-5) and one["psnr"] > measured[item]["psnr"]
        assert 0 < rows["moments" if "moments" in rows else "moments, from itself"][item]["mnc"] < 1
    monkeypatch.setattr(unpaired, "scores", None)  # not needed again
    unpaired.main(arguments, TINY)
    assert "| true kernel | 1.000 |" in capsys.readouterr().out.split("seconds |")[-1]


def test_one_kernel_is_held_against_all():
    _, psfs = unpaired.truth(unpaired.EXPERIMENTS[3], 0)
    first = psfs[0, :1, 0, :1]
    assert unpaired.likeness(first, psfs[:, :1, :1, :1]) == pytest.approx(1, abs=1e-6)
    assert unpaired.likeness(first, psfs) < 0.95
    one, wide = psfs[:, :1, :1, :1], torch.nn.functional.pad(first, (3, 3, 3, 3))
    assert unpaired.likeness(wide, one) == pytest.approx(1, abs=1e-6)
