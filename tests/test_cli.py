"""The command line, end to end: files in, files out; and one line that names the culprit for every bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from small_models import SMALL, patients, trained

from difr3ct_core import reconstruct
from difr3ct_core.cli import main
from difr3ct_core.files import read_json, write_npz
from difr3ct_core.xrays import read_xrays, write_xrays

PATIENT = patients(1, 3).with_views("2view")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Weights and x-rays as a user has them."""
    folder = tmp_path_factory.mktemp("cli")
    trained(folder / "runs")
    write_xrays(folder / "png", PATIENT.xrays[0], PATIENT.views)
    write_xrays(folder / "npz", PATIENT.xrays[0], PATIENT.views, "npz")
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "input"))


def arguments(folder: Path, out: Path, images=None, views: str = "png/views.json", **options) -> list[str]:
    images = images or ["png/view_000.png", "png/view_001.png"]
    given = {"weights": folder / "runs" / "2view", "samples": 2, "out": out, "views": folder / views, **options}
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    return ["reconstruct", *(str(folder / image) for image in images), *flags]


@pytest.mark.parametrize(
    ("images", "views"), [(None, "png/views.json"), (["npz/xrays.npz"], "npz/views.json"), (["png"], "png/views.json")]
)
def test_end_to_end(made, tmp_path, capsys, images, views):
    out = tmp_path / "out"
    assert main(arguments(made, out, images, views, seed=5)) == 0
    said = capsys.readouterr()
    assert str(out) in said.out and "Traceback" not in said.err
    assert {p.name for p in out.iterdir()} == {
        "sample_000.nii.gz", "sample_001.nii.gz", "mean.nii.gz", "std.nii.gz", "reconstruction.json",
    }  # fmt: skip
    # The files hold what the library gives, and lie where the views looked.
    truth = reconstruct(PATIENT.xrays[0], PATIENT.views, made / "runs" / "2view", n_samples=2, seed=5)
    image = nib.load(out / "mean.nii.gz")
    found = torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32).transpose(2, 1, 0).copy())
    torch.testing.assert_close(found, truth.mean, atol=20.0 if "npz" not in views else 0.1, rtol=0)
    centre = image.affine @ [7.5, 7.5, 7.5, 1]
    np.testing.assert_allclose(centre[:3], 0, atol=1e-4)
    record = read_json(out / "reconstruction.json")
    assert record["provenance"]["seed"] == 5 and record["provenance"]["n_samples"] == 2


def test_png_and_npz_are_the_same_x_rays(made):
    png, npz = (read_xrays(made / kind, None) for kind in ("png", "npz"))
    torch.testing.assert_close(png.images, npz.images, atol=2e-4, rtol=0)
    torch.testing.assert_close(npz.images, PATIENT.xrays[0])


def test_same_seed_same_files(made, tmp_path):
    for name in ("a", "b"):
        assert main(arguments(made, tmp_path / name, seed=1, steps=3, guidance=1.5, batch=1)) == 0
    a, b = (nib.load(tmp_path / name / "sample_001.nii.gz").get_fdata() for name in ("a", "b"))
    assert np.array_equal(a, b)
    provenance = read_json(tmp_path / "a" / "reconstruction.json")["provenance"]
    assert provenance["steps"] == 3 and provenance["guidance"] == 1.5


def test_the_installed_command(made, tmp_path):
    command = Path(sys.executable).with_name("difr3ct")
    if not command.exists():
        pytest.skip("the package is not installed")
    good = subprocess.run([command, *arguments(made, tmp_path / "out")], capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "out" / "mean.nii.gz").exists()


# --- bad input: exit status 2 and one line ---------------------------------------------------------------------


def edit(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def resize(path: Path) -> None:
    Image.open(path).crop((0, 0, 16, 12)).save(path)


def with_nan(folder: Path) -> None:
    images = PATIENT.xrays[0].numpy().copy()
    images[1, 2, 3] = np.nan
    write_npz(folder / "npz" / "xrays.npz", xrays=images)


def other_weights(folder: Path) -> None:
    preset = SMALL.replace(volume={"size": 32}, xray={"detector_size": 32})
    shutil.rmtree(folder / "runs" / "2view")
    trained(folder / "runs" / "larger", preset=preset).rename(folder / "runs" / "2view")


def set_angle(values: dict) -> None:
    values["views"][1]["angle_deg"] = 45.0


PNG, NPZ = {}, {"images": ["npz/xrays.npz"], "views": "npz/views.json"}
#: what is wrong: (change to the folder, more arguments, what the line must name and say)
BAD = {
    "missing x-ray": (lambda f: (f / "png/view_001.png").unlink(), PNG, r"view_001\.png: no such file"),
    "truncated png": (lambda f: cut(f / "png/view_001.png"), PNG, r"view_001\.png"),
    "truncated npz": (lambda f: cut(f / "npz/xrays.npz"), NPZ, r"xrays\.npz"),
    "empty file": (lambda f: (f / "png/view_000.png").write_bytes(b""), PNG, r"view_000\.png: is empty"),
    "text as x-ray": (lambda f: (f / "png/view_000.png").write_text("hello"), PNG, r"view_000\.png"),
    "one x-ray of two": (lambda f: None, {"images": ["png/view_000.png"]}, r"found 1 image.* 2 views"),
    "three of two": (lambda f: None, {"images": ["png/view_000.png"] * 3}, r"found 3 images.* 2 views"),
    "wrong size": (lambda f: resize(f / "png/view_001.png"), PNG, r"view_001\.png: has 12 x 16 pixels.*16 x 16"),
    "nan": (with_nan, NPZ, r"xrays\.npz: 1 pixels are NaN"),
    "blank": (
        lambda f: Image.new("I;16", (16, 16)).save(f / "png/view_000.png"),
        PNG,
        r"view_000\.png: every pixel is 0",
    ),
    "no views file": (lambda f: (f / "png/views.json").unlink(), PNG, r"views\.json: no such file"),
    "views not JSON": (lambda f: cut(f / "png/views.json"), PNG, r"views\.json: is not valid JSON"),
    "views without meaning": (
        lambda f: edit(f / "png/views.json", lambda v: v.pop("intensity")),
        PNG,
        r"views\.json\.intensity",
    ),
    "untrained angle": (
        lambda f: edit(f / "png/views.json", set_angle),
        PNG,
        r"views: found angles \[0\.0, 45\.0\]°, expected \[0\.0, 90\.0\]°, for which .*2view was trained",
    ),
    "missing weights": (lambda f: shutil.rmtree(f / "runs/2view"), PNG, r"runs/2view.*: no such file"),
    "truncated weights": (lambda f: cut(f / "runs/2view/weights.safetensors"), PNG, r"2view/weights\.safetensors"),
    "pickled weights": (
        lambda f: torch.save({"a": 1}, f / "runs/2view/weights.safetensors"),
        PNG,
        r"2view/weights\.safetensors.*pickled",
    ),
    "weights of another kind": (lambda f: None, {"weights": "runs/vqgan"}, r"vqgan/weights.*'vqgan', expected 'ldm'"),
    "weights of another preset": (other_weights, PNG, r"a detector of \(16, 16\).*expected \(32, 32\)"),
    "no samples": (lambda f: None, {"samples": 0}, r"n_samples: found 0"),
    "no steps": (lambda f: None, {"steps": 0}, r"steps: found 0, expected 1 to 1000"),
    "too many steps": (lambda f: None, {"steps": 5000}, r"steps: found 5000"),
    "huge seed": (lambda f: None, {"seed": 10**40}, r"seed: found 1000"),
    "unknown device": (lambda f: None, {"device": "gpu0"}, r"device: found 'gpu0'"),
    "out is a file": (lambda f: (f / "out").write_text("x"), PNG, r"input/out"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(copy, capsys, name):
    change, options, message = BAD[name]
    change(copy)
    options = dict(options)
    if "weights" in options:
        options["weights"] = copy / options["weights"]
    before = sorted(copy.rglob("*"))
    assert main(arguments(copy, copy / "out", **options)) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.replace("\r", "\n").splitlines() if line.startswith("difr3ct: ")]
    assert len(lines) == 1 and "Traceback" not in said.err
    assert re.search(message, lines[0]), lines[0]
    assert said.out == ""
    assert sorted(copy.rglob("*")) == before  # nothing half-written


def test_a_full_device(made, tmp_path, capsys):
    out = tmp_path / "full"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(out)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        assert main(arguments(made, out)) == 2
        assert "no space left on the device" in capsys.readouterr().err
        assert not (out / "reconstruction.json").exists()
        assert not list(out.glob(".*"))
    finally:
        subprocess.run(["umount", "--lazy", str(out)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(made, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert main(arguments(made, tmp_path / "locked" / "out")) == 2
    assert "locked" in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["reconstruct"], ["reconstruct", "a.png"], ["improve"]])
def test_usage(capsys, given):
    with pytest.raises(SystemExit) as caught:
        main(given)
    assert caught.value.code == 2
    assert "usage: difr3ct" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["reconstruct", "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for option in ("views", "weights", "samples", "out", "seed", "steps", "guidance", "device", "batch"):
        assert f"--{option}" in said
