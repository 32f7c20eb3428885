"""The entry point: x-rays in, samples in HU on the right grid out."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from small_models import SMALL, patients, trained

from difr3ct_core import Reconstruction, reconstruct
from difr3ct_core.datasets import preset_views
from difr3ct_core.files import InputError, read_json
from difr3ct_core.presets import get_preset
from difr3ct_core.reconstruct import batch_within, centred_affine, check_xrays, posterior_samples
from difr3ct_core.weights import load_ldm

VIEWS = preset_views(SMALL, "2view")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("runs"))


def xrays(seed: int = 0) -> torch.Tensor:
    return patients(1, seed).with_views("2view").xrays[0]


def test_samples_mean_and_spread(weights):
    result = reconstruct(xrays(), VIEWS, weights, n_samples=5, seed=3)
    assert result.samples.shape == (5, 16, 16, 16)
    assert float(result.samples.min()) >= -1000 and float(result.samples.max()) <= 1500
    torch.testing.assert_close(result.mean, result.samples.mean(0))
    torch.testing.assert_close(result.std, (result.samples - result.mean).square().mean(0).sqrt(), atol=1e-2, rtol=1e-3)
    assert float(result.std.max()) > 0
    one = reconstruct(xrays(), VIEWS, weights, n_samples=1)
    assert (one.std == 0).all() and torch.equal(one.mean, one.samples[0])


def test_seeds_and_batches(weights):
    """A sample depends on the x-rays, the seed and its number; not on the batch, nor on how many are drawn."""
    result = reconstruct(xrays(), VIEWS, weights, n_samples=5, seed=3).samples
    assert torch.equal(reconstruct(xrays(), VIEWS, weights, n_samples=5, seed=3).samples, result)
    for batch in (1, 2, 3):
        torch.testing.assert_close(
            reconstruct(xrays(), VIEWS, weights, n_samples=5, seed=3, batch=batch).samples, result, atol=0.1, rtol=1e-4
        )
    fewer = reconstruct(xrays(), VIEWS, weights, n_samples=2, seed=3).samples
    torch.testing.assert_close(fewer, result[:2], atol=0.1, rtol=1e-4)
    assert not torch.allclose(reconstruct(xrays(), VIEWS, weights, n_samples=5, seed=4).samples, result)
    assert not torch.allclose(result[0], result[1])


def test_the_x_rays_matter(weights):
    ours = reconstruct(xrays(0), VIEWS, weights, n_samples=2)
    assert not torch.equal(reconstruct(xrays(1), VIEWS, weights, n_samples=2).samples, ours.samples)
    # Without the condition (Eq. 8 at s = 0) they do not.
    null = [reconstruct(xrays(i), VIEWS, weights, n_samples=2, guidance=0.0).samples for i in (0, 1)]
    assert torch.equal(*null)


def test_several_patients_at_once(weights):
    """Each patient's samples follow its own x-rays, whatever the batch."""
    ldm, vqgan, *_ = load_ldm(weights)
    images = torch.stack([xrays(0), xrays(1), xrays(2)])
    together = posterior_samples(ldm, vqgan, images, VIEWS, 2, seed=1, batch=6)
    assert together.shape == (3, 2, 16, 16, 16) and together.abs().max() <= 1
    for batch in (1, 4, 5):
        again = posterior_samples(ldm, vqgan, images, VIEWS, 2, seed=1, batch=batch)
        torch.testing.assert_close(again, together, atol=1e-4, rtol=1e-4)
    first = posterior_samples(ldm, vqgan, images[:1], VIEWS, 2, seed=1)
    torch.testing.assert_close(first[0], together[0], atol=1e-4, rtol=1e-4)
    null = posterior_samples(ldm, vqgan, images, VIEWS, 2, seed=1, guidance=0.0)
    assert not torch.allclose(null, together)


@pytest.mark.parametrize("solver", ["dpm++2m", "ddim", "ddpm"])
def test_solvers_and_steps(weights, solver):
    result = reconstruct(xrays(), VIEWS, weights, n_samples=2, solver=solver, steps=4)
    assert torch.isfinite(result.samples).all()
    assert result.provenance["solver"] == solver and result.provenance["steps"] == 4


def test_numpy_and_doubles(weights):
    ours = reconstruct(xrays(), VIEWS, weights, n_samples=1).samples
    assert torch.equal(reconstruct(xrays().numpy(), VIEWS, weights, n_samples=1).samples, ours)
    assert torch.equal(reconstruct(xrays().double(), list(VIEWS), str(weights), n_samples=1).samples, ours)


def test_provenance(weights):
    found = reconstruct(xrays(), VIEWS, weights, n_samples=2, seed=7).provenance
    assert found["seed"] == 7 and found["n_samples"] == 2 and found["steps"] == 6 and found["solver"] == "dpm++2m"
    assert found["hu_window"] == [-1000.0, 1500.0] and found["weights"] == str(weights)
    assert [view["angle_deg"] for view in found["views"]["views"]] == [0.0, 90.0]
    assert found["training"]["preset"] == "tiny"


# --- files -----------------------------------------------------------------------------------------------------


def landmark(n: int = 3, affine: np.ndarray | None = None) -> Reconstruction:
    """Air with one bright voxel at (z, y, x) = (13, 4, 2) of 16: left-right, front-back and up-down all differ."""
    samples = torch.full((n, 16, 16, 16), -1000.0)
    samples[:, 13, 4, 2] = torch.arange(n) * 100.5 + 400
    affine = centred_affine(SMALL.volume) if affine is None else affine
    return Reconstruction(samples, samples.mean(0), samples.std(0, unbiased=False), affine, {"seed": 0})


OBLIQUE = np.array([[20.0, 0, 0, -31.5], [0, 20.0, 0, 17.25], [0, 0, 20.0, -400.0], [0, 0, 0, 1]])


@pytest.mark.parametrize("affine", [None, OBLIQUE])
def test_saved_files_lie_where_they_should(tmp_path, affine):
    """In LPS the landmark is at (2, 4, 13)·20 mm plus the origin; nibabel says the same in RAS."""
    result = landmark(affine=affine)
    written = result.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in written)
    expected = (result.affine @ [2, 4, 13, 1])[:3]
    if affine is None:
        np.testing.assert_allclose(expected, [-110.0, -70.0, 110.0])  # (i - 7.5)·20 mm
    for path in written[:-1]:
        image = nib.load(path)
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        assert image.header["sform_code"] > 0 and image.header["qform_code"] > 0
        data = np.asarray(image.dataobj)
        brightest = np.unravel_index(np.argmax(data), data.shape)
        np.testing.assert_allclose((image.affine @ [*brightest, 1])[:3] * [-1, -1, 1], expected, atol=1e-3)
        other = sitk.ReadImage(str(path))
        assert other.GetSize() == (16, 16, 16)
        np.testing.assert_allclose(other.TransformIndexToPhysicalPoint((2, 4, 13)), expected, atol=1e-3)
        assert other.GetPixel(2, 4, 13) == data.max()


def test_saved_values(tmp_path):
    result = landmark()
    result.save(tmp_path)
    kinds = {}
    for path in sorted(tmp_path.glob("*.nii.gz")):
        image = nib.load(path)
        kinds[path.name] = image.get_data_dtype()
        volume = torch.from_numpy(np.asarray(image.dataobj).transpose(2, 1, 0).astype(np.float32))
        name = path.name.split(".")[0]
        truth = result.samples[int(name[-3:])] if "sample" in name else getattr(result, name)
        torch.testing.assert_close(volume, truth, atol=0.51 if "sample" in name else 1e-3, rtol=0)
    assert all(kinds[f"sample_{i:03d}.nii.gz"] == np.int16 for i in range(3))
    # Rounded to whole HU a small spread would vanish.
    assert kinds["mean.nii.gz"] == kinds["std.nii.gz"] == np.float32
    record = read_json(tmp_path / "reconstruction.json")
    assert record["unit"] == "HU" and record["affine_lps"] == result.affine.tolist()
    assert set(record["files"]) == set(kinds) and record["provenance"] == {"seed": 0}


def test_saving_again_leaves_nothing_of_the_earlier_one(tmp_path, monkeypatch):
    landmark(5).save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    landmark(2).save(tmp_path)
    assert len(list(tmp_path.glob("sample_*"))) == 2 and (tmp_path / "notes.txt").exists()
    # Stopped half way: no JSON that speaks for a mixture.
    from difr3ct_core import ct

    write, calls = ct.write_nifti, []

    def stop(path, *args):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(path, *args)

    monkeypatch.setattr(ct, "write_nifti", stop)
    with pytest.raises(KeyboardInterrupt):
        landmark(3).save(tmp_path)
    assert not (tmp_path / "reconstruction.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(InputError, match=r"locked.*cannot be written"):
        landmark().save(tmp_path / "locked" / "out")


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match=r"out.*(?:folder|removed)"):
        landmark().save(tmp_path / "out")


# --- refusal ---------------------------------------------------------------------------------------------------


def change(**fields) -> tuple:
    return tuple(dataclasses.replace(view, **fields) for view in VIEWS)


def bad_pixel(value: float) -> torch.Tensor:
    images = xrays()
    images[1, 3, 5] = value
    return images


def blank_second() -> torch.Tensor:
    images = xrays()
    images[1] = 0.25
    return images


REFUSED = {
    r"xrays: found shape \(16, 16\), expected \(view, v, u\)": lambda: (xrays()[0], VIEWS),
    r"xrays: found 1 images, expected 2, one per view": lambda: (xrays()[:1], VIEWS),
    r"xrays: found NaN or infinity": lambda: (bad_pixel(math.nan), VIEWS),
    r"xrays: found NaN or infinity, expected line integrals": lambda: (bad_pixel(math.inf), VIEWS),
    r"every pixel of image 1 is 0\.25": lambda: (blank_second(), VIEWS),
    r"every pixel of image 0 is 0": lambda: (torch.zeros(2, 16, 16), VIEWS),
    r"xrays: found images of \(12, 16\) pixels, expected \(16, 16\)": lambda: (xrays()[:, :12], VIEWS),
    r"views: found angles \[0\.0, 45\.0\]°, expected \[0\.0, 90\.0\]°": lambda: (
        xrays(),
        (VIEWS[0], dataclasses.replace(VIEWS[1], angle_deg=45.0)),
    ),
    r"views: found angles \[90\.0, 0\.0\]°, expected \[0\.0, 90\.0\]°": lambda: (xrays(), VIEWS[::-1]),
    r"views: found angles \[0\.0\]°, expected \[0\.0, 90\.0\]°": lambda: (xrays()[:1], VIEWS[:1]),
    r"views: found cone beam, expected parallel": lambda: (xrays(), change(mode="cone")),
    r"views: found a detector of \(16, 16\) pixels of \(10\.0, 20\.0\) mm, expected": lambda: (
        xrays(),
        change(pixel_mm=(10.0, 20.0)),
    ),
    r"views: found offset \(0\.0, 15\.0\)": lambda: (xrays(), change(offset_mm=(0.0, 15.0))),
}


@pytest.mark.parametrize("message", REFUSED)
def test_x_rays_that_do_not_fit(weights, message):
    images, views = REFUSED[message]()
    with pytest.raises(InputError, match=message) as caught:
        reconstruct(images, views, weights, n_samples=1)
    assert "\n" not in str(caught.value)


def test_cone_distances_are_part_of_the_geometry():
    cone = change(mode="cone")
    check_xrays(xrays(), cone, cone, "weights")
    far = change(mode="cone", dso_mm=1000.0, dsd_mm=1800.0)
    with pytest.raises(InputError, match=r"DSD 1800 mm, expected .*1500 mm, for which weights was trained"):
        check_xrays(xrays(), far, cone, "weights")
    # In parallel beam they mean nothing.
    check_xrays(xrays(), change(dsd_mm=1800.0), VIEWS, "weights")


def test_small_differences_of_pose_are_accepted(weights):
    near = tuple(dataclasses.replace(view, angle_deg=view.angle_deg + 0.3) for view in VIEWS)
    reconstruct(xrays(), near, weights, n_samples=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_samples": 0}, "n_samples: found 0, expected at least 1"),
        ({"batch": 0}, "batch: found 0"),
        ({"steps": 0}, "steps: found 0, expected 1 to 1000"),
        ({"steps": 1001}, "steps: found 1001"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": 10**30}, "seed: found 1000"),
        ({"guidance": math.nan}, "guidance: found nan"),
        ({"solver": "heun"}, r"sampling\.solver: found 'heun'"),
        ({"device": "gpu"}, "device: found 'gpu'"),
        ({"device": "cuda:77"}, "device: found 'cuda:77'"),
    ],
)
def test_arguments_out_of_range(weights, arguments, message):
    with pytest.raises(InputError, match=message):
        reconstruct(xrays(), VIEWS, weights, **{"n_samples": 1, **arguments})


def test_views_of_the_weights_are_checked(tmp_path, weights):
    """Weights for one frontal view do not take a lateral one."""
    frontal = trained(tmp_path, "1view_frontal")
    lateral = patients(1).with_views("1view_lateral")
    with pytest.raises(InputError, match=r"found angles \[0\.0\]°, expected \[90\.0\]°, for which .*1view_frontal"):
        reconstruct(lateral.xrays[0], lateral.views, frontal)


def test_x_rays_of_another_preset(weights):
    larger = SMALL.replace(volume={"size": 32}, xray={"detector_size": 32})
    other = patients(1, preset=larger).with_views("2view")
    with pytest.raises(InputError, match=r"views: found a detector of \(32, 32\) pixels of \(10\.0, 10\.0\) mm"):
        reconstruct(other.xrays[0], other.views, weights)


def test_training_after_reconstructing(weights, tmp_path):
    """What sampling caches in inference mode must not break a training in the same process."""
    reconstruct(xrays(), VIEWS, weights, n_samples=1)
    trained(tmp_path, "2view", SMALL.replace(train_ldm={"lr": 2e-3}))


# --- memory ------------------------------------------------------------------------------------------------------

PEAK = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from difr3ct_core.datasets import preset_views
from difr3ct_core.diffusion import LatentDiffusion
from difr3ct_core.presets import get_preset
from difr3ct_core.reconstruct import posterior_samples
from difr3ct_core.vqgan import VQGAN

preset = get_preset("tiny")
ldm, vqgan = LatentDiffusion(preset).eval(), VQGAN(preset.vqgan).eval()

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field + ":"))

before = status("VmRSS")
posterior_samples(ldm, vqgan, torch.rand(1, 2, 32, 32), preset_views(preset, "2view"), 64, steps=1, memory_gb=0.3)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the process account of Linux")
def test_sampling_stays_within_the_memory_it_is_given():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 20e6 < int(done.stdout) < 300e6
    assert 1 < batch_within(0.3, get_preset("tiny"), 64) < 64  # the limit was one


def test_the_batch_follows_from_the_memory():
    preset = get_preset("small")
    batches = [batch_within(gb, preset, 100) for gb in (0.5, 1.0, 2.0, 64.0, float("inf"))]
    assert batches == sorted(batches) and batches[0] >= 1 and batches[-1] == 100
    with pytest.raises(InputError, match=r"memory_gb: found 0\.1, expected at least 0\.\d+ for 100 samples of 64³"):
        batch_within(0.1, preset, 100)


def test_the_limit_does_not_change_the_samples(weights):
    free = reconstruct(xrays(), VIEWS, weights, n_samples=3, seed=4)
    tight = reconstruct(xrays(), VIEWS, weights, n_samples=3, seed=4, memory_gb=0.20045)
    assert batch_within(0.20045, SMALL, 3) == 1
    torch.testing.assert_close(tight.samples, free.samples, atol=1.0, rtol=0)  # HU
