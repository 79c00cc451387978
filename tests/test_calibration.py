import json

import calibration
import pytest

from blindlib import Blur, DiffPIR


def test_what_the_maps_say_is_measured_once(tmp_path, monkeypatch, capsys):
    arguments = ["--images", "1", "--seed", "6000", "--only", "kernel known", "--out", str(tmp_path / "c.json")]
    calibration.main(arguments)
    (rows,) = json.loads((tmp_path / "c.json").read_text())["results"].values()
    found = rows["map, kernel known"]
    assert list(found) == ["scene 0", "photograph 0"]
    for one in found.values():
        assert one["ratio"] == pytest.approx(one["error"] / one["expected"], rel=1e-3) and 0.5 < one["ratio"] < 2
        assert 0.5 < one["inside"] < one["inside two"] <= 1 and len(one["by fifths"]) == 5
    monkeypatch.setattr(calibration, "of_map", None)  # not needed again
    calibration.main(arguments)
    assert capsys.readouterr().out.count("| map, kernel known, scenes | 1 |") == 2


def test_honest_samples_are_told_from_others(monkeypatch):
    monkeypatch.setattr(calibration, "SAMPLES", 3)
    x, k, y = calibration.measured(size=64, noise_std=0.02, seed=6000)
    row = calibration.of_samples(x[:1], k[:1], y[:1], Blur(), DiffPIR(0.02, strength=1.0), 10, seed=0)
    assert row["ratio"] > 1.2 and row["inside"] < 0.5 and sum(row["ranks"]) == pytest.approx(1, abs=1e-3)
