"""Contours against labels: of phantoms, and of the real scan where it was fetched; and what cannot be contoured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from difr3ct_core.ct import prepare_ct, prepare_labels, sample_ct, sample_labels
from difr3ct_core.ct_io import CTVolume, LabelVolume, write_nifti
from difr3ct_core.files import InputError
from difr3ct_core.phantoms import make_phantom
from difr3ct_core.presets import VolumePreset
from difr3ct_core.radiotherapy import (
    PHANTOM,
    TOTALSEGMENTATOR,
    NotPlannable,
    Structures,
    contour_ct,
    contour_from_file,
    contour_with_totalsegmentator,
    dice,
    resample_ct,
    resample_structures,
    structures_from_labels,
)
from difr3ct_core.radiotherapy.contours import complete

DATA = Path(__file__).parents[1] / "data"


def phantom(cohort: str, size: int = 64, seed: int = 1) -> tuple[CTVolume, Structures]:
    drawn = make_phantom(seed, size, cohort)
    return CTVolume(drawn.hu, drawn.affine, cohort), structures_from_labels(
        LabelVolume(drawn.labels, drawn.affine), PHANTOM
    )


def overlaps(a: Structures, b: Structures) -> dict[str, float]:
    return {name: dice(a[name], b[name]) for name in a.masks if name in b}


def test_phantom_with_both_breasts() -> None:
    ct, labels = phantom("intact")
    drawn = contour_ct(ct)
    got = overlaps(drawn, labels)
    floors = {"body": 0.98, "lung_left": 0.94, "lung_right": 0.94, "heart": 0.8, "spine": 0.65, "breast_left": 0.68,
              "breast_right": 0.68}  # fmt: skip
    assert {name: value for name, value in got.items() if value < floors[name]} == {}
    assert set(got) == set(floors) and not drawn.missing


def test_after_mastectomy_the_lost_breast_is_reported() -> None:
    ct, labels = phantom("thoracic")
    drawn = contour_ct(ct)
    lost = "breast_right" if "breast_left" in labels else "breast_left"
    kept = "breast_left" if lost == "breast_right" else "breast_right"
    assert lost not in drawn and "stand out" in drawn.missing[lost]
    assert dice(drawn[kept], labels[kept]) > 0.65 and dice(drawn["heart"], labels["heart"]) > 0.8
    with pytest.raises(NotPlannable, match=f"no contour of {lost}: found"):
        drawn[lost]


@pytest.mark.skipif(
    not (DATA / "sample_ct" / "lidc_idri_0001").exists(), reason="data_scripts/fetch_sample_ct.py not run"
)
@pytest.mark.filterwarnings("ignore::difr3ct_core.ct_io.CTWarning")
@pytest.mark.slow
def test_real_scan_agrees_with_totalsegmentator() -> None:
    prepared = prepare_ct(sample_ct(DATA), VolumePreset(64))
    labels = LabelVolume(prepare_labels(sample_labels(DATA), prepared).to(torch.uint8), prepared.affine)
    truth = structures_from_labels(labels, TOTALSEGMENTATOR)
    drawn = contour_ct(CTVolume(prepared.hu, prepared.affine, "LIDC-IDRI-0001"))
    lungs = dice(drawn["lung_left"] | drawn["lung_right"], truth["lung_left"] | truth["lung_right"])
    assert lungs >= 0.96 and dice(drawn["heart"], truth["heart"]) >= 0.70


def test_air_nan_and_a_chest_without_lungs() -> None:
    affine = np.diag([10.0, 10.0, 10.0, 1.0])
    with pytest.raises(NotPlannable, match="the CT is air"):
        contour_ct(CTVolume(torch.full((24, 24, 24), -1000.0), affine, "air"))
    hu = torch.full((24, 24, 24), -1000.0)
    hu[:, 4:20, 3:21] = 0.0
    with pytest.raises(NotPlannable, match="lung has 0 cm³"):
        contour_ct(CTVolume(hu, affine, "block"))
    hu[3, 3, 3] = torch.nan
    with pytest.raises(InputError, match="1 voxels are NaN"):
        contour_ct(CTVolume(hu, affine, "block"))


def test_other_orientations_are_refused_by_the_volume_and_turned_by_the_file_reader(tmp_path: Path) -> None:
    ct, labels = phantom("intact", 32)
    turned = np.diag([-10.0, 10.0, 10.0, 1.0])
    with pytest.raises(InputError, match="not on LPS axes"):
        CTVolume(ct.hu, turned)
    # Heart and lungs in a file whose x runs the other way come back where they were.
    numbers = {"lung_left": 10, "lung_right": 12, "heart": 51, "spine": 26}
    array = sum(number * labels[name].astype(np.uint8) for name, number in numbers.items())
    turned[0, 3] = ct.affine[0, 3] + 31 * 10.0
    turned[1:3, 3] = ct.affine[1:3, 3]
    write_nifti(tmp_path / "labels.nii.gz", array[:, :, ::-1].copy(), turned, "uint8")
    read = contour_from_file(tmp_path / "labels.nii.gz", ct)
    assert "body" in read and complete(labels, ct) is labels
    for name in numbers:
        assert np.array_equal(read[name], labels[name])
    with pytest.raises(InputError, match="does not overlap"):
        far = ct.affine.copy()
        far[0, 3] += 5000
        contour_from_file(tmp_path / "labels.nii.gz", CTVolume(ct.hu, far, "far"))


def test_resampling_keeps_volume_and_place() -> None:
    ct, labels = phantom("intact", 32)
    fine = resample_ct(ct, 5.0)
    assert tuple(fine.hu.shape) == (64, 64, 64) and np.allclose(fine.low_mm, ct.low_mm)
    moved = resample_structures(labels, fine)
    assert moved.volume_cm3("lung_left") == pytest.approx(labels.volume_cm3("lung_left"), rel=0.1)
    assert dice(resample_structures(moved, ct)["heart"], labels["heart"]) > 0.95
    with pytest.raises(InputError, match="resample one onto the other"):
        moved.require_grid(ct)


def test_totalsegmentator_is_optional() -> None:
    try:
        import totalsegmentator  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="not installed"):
            contour_with_totalsegmentator(phantom("intact", 32)[0])
    else:
        pytest.skip("TotalSegmentator is installed")
