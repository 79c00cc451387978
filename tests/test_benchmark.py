import json
import subprocess
import sys

import benchmark
import pytest
import torch

from blindlib import Result, gaussian_kernels


def test_scores_do_not_mind_a_shift(g):
    x, k = torch.rand(1, 3, 32, 32, generator=g) * 2 - 1, gaussian_kernels(1, 15, std=(1.0, 1.5), seed=0)
    same = benchmark.scores(x.roll((2, -3), (2, 3)), k.roll((1, 1), (2, 3)), x, k)
    assert same["psnr"] > 100 and same["ssim"] == pytest.approx(1) and same["mnc"] == pytest.approx(1, abs=1e-4)
    assert same["psnr, subpixel"] >= same["psnr"] and same["mnc, subpixel"] == pytest.approx(1, abs=1e-4)
    assert same["mse"] < 1e-7
    other = benchmark.scores(x + 0.2, gaussian_kernels(1, 15, std=(3.0, 3.5), seed=1), x, k)
    assert other["psnr"] < same["psnr"] and other["ssim"] < 1 and other["mse"] > 1e-6


def test_a_stopped_benchmark_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    done, limit = [], [3]

    def cheap(y, k, noise_std, priors, response):
        def run():
            if len(done) == limit[0]:
                raise KeyboardInterrupt
            done.append(noise_std)
            return Result({"image": y, "kernel": k}, 1, torch.zeros(1), 7, 0.0, {})

        return {"as given": run}

    monkeypatch.setattr(benchmark, "methods", cheap)
    arguments = ["--images", "2", "--noise", "5", "--out", str(tmp_path / "b.json")]
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(arguments)
    limit[0] = None
    benchmark.main(arguments)
    assert done == [pytest.approx(10 / 255)] * 4  # three before, one after
    (setting,) = json.loads((tmp_path / "b.json").read_text())["results"].values()
    assert list(setting["as given"]) == ["scene 0", "scene 1", "photograph 0", "photograph 1"]
    assert setting["as given"]["scene 1"]["evaluations"] == 7
    benchmark.main([*arguments, "--show"])
    assert len(done) == 4


def test_several_jobs_measure_the_same(tmp_path):
    common = ["--images", "1", "--only", "none of them"]
    tables = []
    for jobs in ("1", "2"):
        out = tmp_path / f"{jobs}.json"
        command = [sys.executable, benchmark.__file__, *common, "--jobs", jobs, "--out", out]
        subprocess.run(command, check=True, timeout=300)
        tables.append(json.loads(out.read_text()))
    assert tables[0]["results"] == tables[1]["results"]
    ((setting, rows),) = tables[0]["results"].items()
    assert {kind: set(row) for kind, row in rows.items()} == {"blurred": {"scene 0", "photograph 0"}}
    one, two = (table["machines"][-1] for table in tables)
    assert two.endswith("several at once") and not one.endswith("at once")

    # What a worker is asked a second time, since another died after its result was home, it does not do.
    empty = torch.zeros(0)
    cell = benchmark.Cell(setting, "blurred", ("scene 0",), 0.1, "linear", "image", empty, empty, empty)
    assert benchmark.measure(cell, tmp_path / "1.json") == (cell, None)


def test_the_table_has_means_and_standard_errors():
    entry = dict(ssim=0.5, mnc=0.9, mse=1e-5, seconds=2.0, evaluations=100)
    items = {"scene 0": entry | {"psnr": 20.0}, "scene 1": entry | {"psnr": 22.0}, "scene 2": {"diverged": "so"}}
    shown = benchmark.markdown({"results": {"64x64": {"some": items}}})
    assert "| some (2) | 21.00 ± 1.00 |  | 0.500 ± 0.000 | 0.900 ± 0.000 |  |" in shown


def test_light_is_blurred_on_demand(tmp_path):
    arguments = ["--images", "1", "--noise", "2", "--only", "known, DPIR", "--response", "srgb"]
    benchmark.main([*arguments, "--out", str(tmp_path / "b.json")])
    ((setting, rows),) = json.loads((tmp_path / "b.json").read_text())["results"].items()
    assert setting.endswith(", light")
    right, wrong = (rows[f"kernel known, DPIR{told}"]["photograph 0"] for told in ("", ", as if values were blurred"))
    assert right["psnr"] > wrong["psnr"] + 2


def test_a_batch_measures_the_same_as_single_images(tmp_path):
    some = "kernel known, DiffPIR", "kernel known, DPIR", "FastEM-PiGDM, n = 1, 30"
    tables = []
    for batch in ("1", "2"):
        out = tmp_path / f"{batch}.json"
        benchmark.main(["--images", "1", "--only", *some, "--batch", batch, "--out", str(out)])
        tables.append(next(iter(json.loads(out.read_text())["results"].values())))
    single, several = tables
    assert list(single) == list(several) and len(single) == 4
    for method, items in single.items():
        assert list(items) == ["scene 0", "photograph 0"] == list(several[method])
        for item, entry in items.items():
            assert {key for key in entry if key != "seconds"} == set(several[method][item])  # no seconds of its own
            for key in set(entry) - {"seconds"}:
                assert several[method][item][key] == pytest.approx(entry[key], rel=0.02, abs=2e-6), (method, item, key)


def test_of_a_batch_that_diverges_the_others_are_measured(tmp_path, monkeypatch):
    def picky(y, k, noise_std, priors, response):
        def run():
            if (y == last).flatten(1).all(1).any():
                raise ArithmeticError("no number")
            return Result({"image": y, "kernel": k}, 1, torch.zeros(len(y)), 7, 0.0, {})

        return {"as given": run}

    last = benchmark.measured(64, 20 / 255, 3000)[2][9]
    monkeypatch.setattr(benchmark, "methods", picky)
    benchmark.main(["--images", "2", "--batch", "4", "--out", str(tmp_path / "b.json")])
    (setting,) = json.loads((tmp_path / "b.json").read_text())["results"].values()
    rows = setting["as given"]
    assert rows.pop("photograph 1") == {"diverged": "no number"}
    assert set(rows) == {"scene 0", "scene 1", "photograph 0"} and all(row["evaluations"] == 7 for row in rows.values())
