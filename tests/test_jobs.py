import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import unpaired

from blindlib import DiffusionPrior, UNet, dead_leaves, deblur, motion_kernels
from blindlib.deblur import deblur_folder, read_image, write_image
from blindlib.jobs import imap_unordered

PHOTOS = 5


class Waiting(DiffusionPrior):
    """A prior that knows nothing, and takes until a file is there for all but the smallest photograph."""

    def denoise(self, x_t, t):
        while x_t.shape[2] > 24 and not self.file.exists():
            time.sleep(0.1)
        return super().denoise(x_t, t)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, x in enumerate(dead_leaves(PHOTOS, 40, seed=1)):
        write_image(x[None, :, : 24 + 2 * i], folder / f"{i}.png")
    return folder


def test_one_job_is_done_here_and_in_order():
    assert list(imap_unordered(lambda i: (i, os.getpid()), range(3))) == [(i, os.getpid()) for i in range(3)]


def test_several_jobs_are_done_by_other_processes():
    items, processes = zip(*imap_unordered(lambda i: (i, os.getpid()), range(4), jobs=2), strict=True)
    assert sorted(items) == [0, 1, 2, 3] and os.getpid() not in processes


def test_a_task_that_fails_or_dies_ends_it():
    with pytest.raises(ZeroDivisionError):
        list(imap_unordered(lambda i: 1 / i, range(4), jobs=2))
    with pytest.raises(OSError, match="jobs: a process was killed, perhaps for want of memory"):
        list(imap_unordered(lambda i: os.kill(os.getpid(), signal.SIGKILL), range(4), jobs=2))


def test_what_cannot_be(monkeypatch):
    with pytest.raises(ValueError, match="jobs: expected a number of processes, or -1 for one on each core, got 0"):
        list(imap_unordered(abs, [1], jobs=0))
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"cluster: needs Dask; pip install 'blindlib\[cluster\]'"):
        list(imap_unordered(abs, [1], cluster="tcp://127.0.0.1:1"))


@contextmanager
def cluster_that_loses_a_worker(go_on, lines):
    """A scheduler's address, and what is told of each task's end; of the first it kills the worker, then touches."""
    from distributed import Client, LocalCluster

    where = dict(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with LocalCluster(**where) as cluster, Client(cluster, set_as_default=False) as watch:
        processes = watch.run(os.getpid)

        def say(line, **_):
            lines.append(line)
            if len(lines) > 1:
                return
            ((holder, (result,)),) = ((worker, results) for worker, results in watch.has_what().items() if results)
            os.kill(processes[holder], signal.SIGKILL)
            # Dask lost the result, which it holds as long as no other has come, and does the task again.
            again = time.monotonic() + 120
            while holder in watch.has_what() or result not in sum(watch.has_what().values(), ()):
                assert time.monotonic() < again, "the worst did not come about; this shows nothing"
                time.sleep(0.1)
            go_on.touch()

        yield cluster.scheduler_address, say


def test_of_a_cluster_a_worker_is_killed_and_nothing_is_lost_or_done_twice(photos):
    net = UNet(3, base_channels=8, multipliers=(1, 2), groups=4)
    prior = Waiting(net, "image", prediction="v")
    prior.file = photos.parent / "go on"
    options = dict(kernel=motion_kernels(1, 17, seed=0), priors={"image": prior}, boundary="circular", device="cpu")
    sharp, lines, finished = photos.parent / "sharp", [], {}
    with cluster_that_loses_a_worker(prior.file, lines) as (address, kill):

        def say(line):
            finished.update({} if lines else {path: path.stat().st_mtime_ns for path in sharp.glob("*.png")})
            kill(line)

        assert deblur_folder(photos, sharp, cluster=address, say=say, **options) == {}
    assert lines[0].startswith(f"1/{PHOTOS} 0.png: ") and len(lines) == PHOTOS and len(finished) == 1
    assert sorted(path.name for path in sharp.iterdir()) == [f"{i}.png" for i in range(PHOTOS)]
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items()), "something was done twice"
    for path in sharp.iterdir():
        expected = deblur(photos / path.name, progress=False, **options).image.clamp(-1, 1)
        torch.testing.assert_close(read_image(path), expected, atol=0.009, rtol=0)
    deblur_folder(photos, sharp, say=lines.append, **options)
    assert lines[PHOTOS:] == [f"{PHOTOS} of {PHOTOS} are there already"]


class Patient(unpaired.Experiment):
    """In a worker's process, who asks for its noise level waits until a file is there."""

    @property
    def grey_noise(self):
        while multiprocessing.parent_process() and not Path(self.name.split(" until ")[1]).exists():
            time.sleep(0.1)
        return super().grey_noise


def test_of_a_grid_of_experiments_too(tmp_path, monkeypatch):
    go_on, out, lines = tmp_path / "go on", tmp_path / "u.json", []
    e = Patient(f"motion blur, 7x7 until {go_on}", 32, 7, 0.02, None, 20, 10, 33, 2)
    arguments = ["--experiment", e.name, "--only", "zero", "--out", str(out)]
    with cluster_that_loses_a_worker(go_on, lines) as (address, kill):
        monkeypatch.setattr(unpaired, "print", kill, raising=False)
        unpaired.main([*arguments, "--cluster", address], [e])
    *done, table = lines
    names = ["measured", "power spectra, phase zero"]  # a third would be where Dask does the first again
    cells = [f"{e.name}, seed 100, {name}" for name in names]
    assert sorted(line.split(": {")[0] for line in done) == sorted(cells), "something was lost or done twice"
    assert all(f"| {name} | " in table for name in names)
    results, alone = json.loads(out.read_text())["results"], tmp_path / "alone.json"
    unpaired.main([*arguments[:-1], str(alone)], [e])
    for setting, rows in json.loads(alone.read_text())["results"].items():
        assert list(rows) == list(results[setting]) == names
        for name, item in ((name, item) for name, items in rows.items() for item in items):
            assert results[setting][name][item]["psnr"] == pytest.approx(rows[name][item]["psnr"], abs=1e-3)
