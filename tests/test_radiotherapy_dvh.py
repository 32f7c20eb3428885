"""DVH metrics against cases counted by hand, and bad input."""

from __future__ import annotations

import numpy as np
import pytest

from difr3ct_core.files import InputError
from difr3ct_core.radiotherapy import (
    DoseGrid,
    Goal,
    NotPlannable,
    Structures,
    dose_at_volume,
    dvh_band,
    dvh_curve,
    goals_met,
    score,
    volume_at_dose,
)

AFFINE = np.diag([2.0, 5.0, 10.0, 1.0])


def case(doses: dict[str, list[float]]) -> tuple[DoseGrid, Structures]:
    """One row of voxels a structure."""
    longest = max(map(len, doses.values()))
    gy, masks = np.zeros((2, len(doses), longest)), {}
    for row, (name, values) in enumerate(doses.items()):
        gy[0, row, : len(values)] = values
        masks[name] = np.zeros(gy.shape, bool)
        masks[name][0, row, : len(values)] = True
    return DoseGrid(gy, AFFINE), Structures(masks, AFFINE)


def test_scores_equal_those_counted_by_hand() -> None:
    # 90 % of 40 Gy is 36, 95 % is 38, 107 % is 42.8.
    dose, structures = case(
        {
            "target": [35.9, 36.0, 38.0, 43.0],
            "lung_left": [0, 10, 20, 30],
            "lung_right": [0, 0, 0, 20.0],
            "heart": [1, 3],
        }
    )
    got = score(dose, structures, "left", 40.0)
    assert got["v90"] == 75.0 and got["v95"] == 50.0 and got["v107"] == 25.0
    assert got["v20_lung"] == 50.0 and got["v20_lungs"] == 37.5 and got["v20_heart"] == 0.0
    assert got["mean_heart"] == 2.0 and got["mean_lung"] == 15.0 and got["mean_target"] == pytest.approx(38.225)
    assert got["target_cm3"] == pytest.approx(4 * 2 * 5 * 10 / 1000)
    assert score(dose, structures, "right", 40.0)["v20_lung"] == 25.0


def test_dvh_curve_is_the_survival_function_of_a_linear_dose() -> None:
    doses = np.linspace(0, 50, 10001)
    curve = dvh_curve(doses, np.array([0.0, 10.0, 25.0, 50.0, 51.0]))
    assert np.allclose(curve, [100, 80, 50, 0, 0], atol=0.02)
    assert dose_at_volume(doses, 2.0) == pytest.approx(49.0)
    for gy in (5.0, 33.3):
        assert volume_at_dose(doses, gy) == pytest.approx(float(dvh_curve(doses, np.array([gy]))[0]))


def test_band_holds_the_curves_and_goals_are_shares() -> None:
    curves = np.stack([np.full(3, float(v)) for v in range(101)])
    low, middle, high = dvh_band(curves, 0.9)
    assert np.allclose([low[0], middle[0], high[0]], [5, 50, 95])
    metrics = [{"v90": v} for v in (80.0, 90.0, 95.0, 99.0)]
    assert goals_met(metrics, [Goal("v90", ">=", 90.0), Goal("v90", "<=", 85.0)]) == {
        "v90 >= 90": 0.75,
        "v90 <= 85": 0.25,
    }


def test_mismatched_grids_and_nan_are_errors() -> None:
    dose, structures = case({"target": [1.0, 2.0]})
    moved = AFFINE.copy()
    moved[0, 3] = 3.0
    with pytest.raises(InputError, match="expected one grid"):
        DoseGrid(dose.gy, moved).inside(structures, "target")
    with pytest.raises(InputError, match="expected one grid"):
        DoseGrid(np.zeros((3, 3, 3)), AFFINE).inside(structures, "target")
    with pytest.raises(InputError, match="NaN"):
        DoseGrid(np.where(dose.gy > 1, np.nan, dose.gy), AFFINE)
    with pytest.raises(InputError, match="below 0"):
        DoseGrid(dose.gy - 1, AFFINE)
    with pytest.raises(NotPlannable, match="empty"):
        dose.inside(Structures({"target": np.zeros(dose.gy.shape, bool)}, AFFINE), "target")


def test_few_samples_and_nan_in_one_of_100_are_errors() -> None:
    with pytest.raises(InputError, match="at least 2"):
        dvh_band(np.zeros((1, 5)))
    with pytest.raises(InputError, match="at least 2"):
        goals_met([{"v90": 1.0}], [Goal("v90", ">=", 90.0)])
    curves = np.zeros((100, 5))
    curves[41, 2] = np.nan
    with pytest.raises(InputError, match=r"\[41\] of 100"):
        dvh_band(curves)
