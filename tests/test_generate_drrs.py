"""data_scripts/generate_drrs.py as a user runs it: several CTs, a broken one, a kill, a second run."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from difr3ct_core.ct import hu_to_mu, prepare_ct, read_ct, write_nifti
from difr3ct_core.drr import project
from difr3ct_core.geometry import standard_views, views_from_json
from difr3ct_core.presets import get_preset
from difr3ct_core.xrays import read_xrays

SCRIPT = Path(__file__).parents[1] / "data_scripts" / "generate_drrs.py"
TINY = get_preset("tiny")


def write_ct(path: Path, seed: int) -> Path:
    """A body of water with an off-centre hole: 26 x 22 x 24 voxels of 12 to 14 mm."""
    rng = np.random.default_rng(seed)
    hu = np.full((26, 22, 24), -1000.0)
    hu[:, 4:18, 3:20] = rng.normal(40, 20, (26, 14, 17))
    hu[8:16, 6:11, 5:12] = -800
    affine = np.diag([13.0, 14.0, 12.0, 1.0])
    write_nifti(path, hu.astype(np.int16), affine)
    return path


def run(*arguments: object, code: int) -> str:
    result = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == code, result.stderr
    return result.stdout + result.stderr


def load_script():
    """The script as a module, to call in this process: nothing starts when its arguments are bad."""
    spec = importlib.util.spec_from_file_location("generate_drrs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate_drrs"] = module
    spec.loader.exec_module(module)
    return module


def expected(path: Path, views) -> torch.Tensor:
    prepared = prepare_ct(read_ct(path), TINY.volume)
    mu = hu_to_mu(prepared.hu, TINY.xray.mu_water_per_mm)[None, None]
    return project(mu, views, TINY.volume.spacing_mm)[0, 0]


@pytest.mark.filterwarnings("ignore")
def test_a_folder_with_a_broken_ct_and_a_second_run(tmp_path: Path, capsys):
    cts, out = tmp_path / "cts", tmp_path / "out"
    first = write_ct(cts / "a.nii.gz", 0)
    second = write_ct(cts / "b" / "ct.nii", 1)
    write_ct(cts / "b" / "labels.nii", 2)  # not a CT
    (cts / "broken.nii.gz").write_bytes(first.read_bytes()[:2000])
    arguments = (cts, out, "--preset", "tiny", "--views", "2view", "--workers", 2)

    printed = run(*arguments, code=1)
    assert "broken.nii.gz" in printed and "x-rays of 2 CTs made, 0 kept from before, 1 set aside" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["made"] == ["a", "b__ct"]
    assert [item["name"] for item in report["set_aside"]] == ["broken"]
    assert "broken.nii.gz" in report["set_aside"][0]["reason"]
    assert not (out / "broken").exists()

    views = standard_views("2view", 32, 320.0)
    for name, path in (("a", first), ("b__ct", second)):
        found = read_xrays(out / name)
        assert found.views == views and found.meta["patient"] == name
        step = found.meta["intensity"]["per_count"]
        torch.testing.assert_close(found.images, expected(path, views), atol=step / 2 + 1e-5, rtol=0)

    # A second run keeps what is finished, does again what changed, and takes in the mended file.
    before = (out / "a" / "view_000.png").stat().st_mtime_ns
    write_ct(cts / "b" / "ct.nii", 7)
    write_ct(cts / "broken.nii.gz", 3)
    printed = run(*arguments[:-1], 1, code=0)
    assert "x-rays of 2 CTs made, 1 kept from before, 0 set aside" in printed
    assert (out / "a" / "view_000.png").stat().st_mtime_ns == before
    torch.testing.assert_close(read_xrays(out / "b__ct").images, expected(second, views), atol=1e-3, rtol=0)
    # With other settings the same folder would become a mixture.
    assert load_script().main([str(a) for a in (*arguments, "--i0", 1000)]) == 2
    assert "made with other settings" in capsys.readouterr().err


def test_a_killed_run_goes_on_where_it_stopped_and_leaves_no_workers(tmp_path: Path):
    cts, out = tmp_path / "cts", tmp_path / "out"
    for seed in range(12):
        write_ct(cts / f"p{seed:02d}.nii", seed)
    arguments = [cts, out, "--preset", "tiny", "--views", "1view_frontal", "--workers", "1", "--format", "npz"]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(out.glob("*/views.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "report.json").exists()
    # The workers notice within moments; nothing of the session is left.
    deadline = time.monotonic() + 20
    while any_alive(process.pid):
        assert time.monotonic() < deadline, "workers outlived the killed run"
        time.sleep(0.05)

    finished = sorted(path.parent.name for path in out.glob("*/views.json"))
    times = {name: (out / name / "xrays.npz").stat().st_mtime_ns for name in finished}
    for name in finished:
        assert read_xrays(out / name).images.shape == (1, 32, 32), "what claims to be whole is whole"
    printed = run(*arguments, code=0)
    assert f"x-rays of {12 - len(finished)} CTs made, {len(finished)} kept" in printed
    assert times == {name: (out / name / "xrays.npz").stat().st_mtime_ns for name in finished}
    assert len(list(out.glob("*/views.json"))) == 12


def any_alive(session: int) -> bool:
    """Whether a process of this session runs (fields 3 and 6 of /proc/PID/stat: state and session)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[3] == str(session) and fields[0] != "Z":
            return True
    return False


def test_cone_beam_noise_and_jitter_are_applied_and_repeatable(tmp_path: Path):
    cts = tmp_path / "cts"
    write_ct(cts / "a.nii", 0)
    write_ct(cts / "b.nii", 0)  # the same anatomy: only the noise may differ
    options = ("--preset", "tiny", "--views", "10,75", "--mode", "cone", "--dso-mm", 900, "--dsd-mm", 1400,
               "--detector-size", 24, "--i0", 5000, "--blur-mm", 2, "--scatter", 0.2, "--jitter-deg", 3,
               "--jitter-mm", 5, "--format", "npz")  # fmt: skip
    run(cts, tmp_path / "one", *options, "--workers", 1, code=0)
    run(cts, tmp_path / "two", *options, "--workers", 2, code=0)
    one, again, other = (read_xrays(tmp_path / p) for p in ("one/a", "two/a", "one/b"))
    assert torch.equal(one.images, again.images), "whatever the number of workers"
    assert not torch.equal(one.images, other.images), "every CT has its own noise and pose error"
    assert one.views == standard_views((10.0, 75.0), 24, 320.0, "cone", 900.0, 1400.0), "the views as intended"
    true = views_from_json({"format": "difr3ct-views", "version": 1, "views": one.meta["true_views"]})
    turns = [abs(t.angle_deg - v.angle_deg) for t, v in zip(true, one.views, strict=True)]
    assert 0 < max(turns) <= 3
    # Scatter makes everything look thinner; and the pose that was really taken explains the image better.
    clean, intended = expected(cts / "a.nii", true), expected(cts / "a.nii", one.views)
    assert float((one.images - clean).mean()) < -0.1
    residual = [(one.images - x - (one.images - x).mean()).square().mean() for x in (clean, intended)]
    assert residual[0] < residual[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--views", "8views"), "--views: found '8views'"),
        (("--i0", "-5"), "detector.i0: found -5"),
        (("--mode", "cone", "--dso-mm", "2000"), "dso_mm < dsd_mm"),
        (("--workers", "0"), "--workers: found 0"),
        (("--jitter-mm", "-1"), "shift_mm: found -1"),
        ((), "holds no CT"),
    ],
)
def test_arguments_that_do_not_fit_are_named_before_anything_is_done(tmp_path: Path, options, message, capsys):
    module = load_script()
    (tmp_path / "cts").mkdir()
    assert module.main([str(tmp_path / "cts"), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert module.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "none: no such folder" in capsys.readouterr().err
