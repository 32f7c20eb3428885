"""The synthetic thorax: anatomy, HU, variability, and the geometry of its drawing board."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from scipy import ndimage

from difr3ct_core.files import InputError
from difr3ct_core.phantoms import COHORTS, DISTRIBUTION, LABELS, Phantom, make_phantom
from difr3ct_core.phantoms.canvas import Canvas, ellipsoid, lattice_matrix, resample_lattice, superellipse
from difr3ct_core.phantoms.cohort import draw_patient

SEEDS = (0, 1, 2)


@cache
def patient(seed: int, size: int = 64, cohort: str = "intact", nodules: int | None = 3) -> Phantom:
    return make_phantom(seed, size, cohort, nodules=nodules)


def mask(phantom: Phantom, *names: str) -> np.ndarray:
    return np.isin(phantom.labels.numpy(), [LABELS[name] for name in names])


def points_mm(phantom: Phantom, *names: str) -> np.ndarray:
    """World (x, y, z) of all voxels of some organs."""
    zyx = np.argwhere(mask(phantom, *names))
    return zyx[:, ::-1] @ phantom.affine[:3, :3].T + phantom.affine[:3, 3]


def centre(phantom: Phantom, *names: str) -> np.ndarray:
    return points_mm(phantom, *names).mean(0)


def largest_share(region: np.ndarray) -> float:
    """Share of the voxels that belong to the largest connected component (26 neighbours)."""
    labelled, n = ndimage.label(region, np.ones((3, 3, 3)))
    return np.bincount(labelled.ravel())[1:].max() / region.sum() if n else 0.0


# --- randomness ---------------------------------------------------------------------------------------------------


def test_same_seed_same_numbers_whatever_the_global_generators_do():
    first = make_phantom(11, 32)
    np.random.seed(1)  # noqa: NPY002 - the point is that it does not matter
    torch.manual_seed(1)
    again = make_phantom(11, 32)
    assert torch.equal(first.hu, again.hu) and torch.equal(first.labels, again.labels)
    assert first.parameters == again.parameters
    other = make_phantom(12, 32)
    assert (first.hu - other.hu).abs().mean() > 30


def test_same_patient_at_every_resolution():
    for seed in SEEDS:
        coarse, fine = make_phantom(seed, 32), make_phantom(seed, 64)
        pooled = torch.nn.functional.avg_pool3d(fine.hu[None, None], 2)[0, 0]
        error = (pooled - coarse.hu).square().mean().sqrt()
        stranger = make_phantom(seed + 50, 32).hu
        assert error < 70 and error < 0.3 * (stranger - coarse.hu).square().mean().sqrt()
        # What an x-ray sees: the total attenuation, as well as voxels of 10 mm can hold it.
        mu, mu_coarse = (fine.hu + 1000) / 8, coarse.hu + 1000
        assert abs(mu.sum() / mu_coarse.sum() - 1) < 0.015
        assert coarse.parameters == fine.parameters


@pytest.mark.slow
def test_128_agrees_with_64():
    coarse, fine = make_phantom(3, 64), make_phantom(3, 128)
    pooled = torch.nn.functional.avg_pool3d(fine.hu[None, None], 2)[0, 0]
    assert (pooled - coarse.hu).square().mean().sqrt() < 60


def test_a_wider_field_shows_the_same_patient():
    narrow, wide = make_phantom(4, 64, fov_mm=320.0), make_phantom(4, 80, fov_mm=400.0)
    inner = wide.hu[8:72, 8:72, 8:72]
    assert (inner - narrow.hu).square().mean().sqrt() < 1.0
    assert np.allclose(wide.affine @ [8, 8, 8, 1], narrow.affine @ [0, 0, 0, 1])


def test_draws_follow_the_documented_distribution():
    draws = [draw_patient(seed, "lung") for seed in range(400)]
    for name, spread in DISTRIBUTION.items():
        of = [d for d in draws if name.startswith("breast") is False or not d["male"]]
        women = 0.94 if name.startswith("scale") else 1.0
        values = np.array([d[name] / (1 if d["male"] else women) for d in of])
        if name == "fat_mm":
            values = np.log(values / np.array([1.0 if d["male"] else 1.25 for d in of]))
            assert abs(values.mean() - np.log(spread.mean)) < 0.1 and 0.25 < values.std() < 0.4
            continue
        assert values.min() >= spread.low - 1e-9 and values.max() <= spread.high + 1e-9, name
        assert abs(values.mean() - spread.mean) < 0.3 * spread.sd, name
        assert 0.75 < values.std() / spread.sd < 1.2, name
    assert 0.47 < np.mean([d["male"] for d in draws]) < 0.63


def test_patients_differ_as_much_as_people_do():
    volumes = torch.stack([make_phantom(seed, 32).hu.clamp(-1000, 1500) for seed in range(20, 36)])
    mean, held_out = volumes[:12].mean(0), volumes[12:]
    psnr = 10 * torch.log10(2500**2 / (held_out - mean).square().mean((1, 2, 3)))
    assert 17 < psnr.mean() < 24


# --- anatomy ------------------------------------------------------------------------------------------------------


def test_labels_are_numbered_without_gaps_and_all_appear():
    assert sorted(LABELS.values()) == list(range(len(LABELS)))
    for seed in SEEDS:
        phantom = patient(seed)
        found = set(phantom.labels.unique().tolist())
        assert [name for name, number in LABELS.items() if number not in found] == []
        assert phantom.hu.shape == phantom.labels.shape == (64, 64, 64)
        assert phantom.hu.dtype == torch.float32 and phantom.labels.dtype == torch.uint8


@pytest.mark.parametrize("seed", SEEDS)
def test_left_is_left_and_back_is_back(seed):
    p = patient(seed)
    spine, heart = centre(p, "vertebrae"), centre(p, "heart")
    assert centre(p, "lung_left")[0] > spine[0] + 40 and centre(p, "lung_right")[0] < spine[0] - 40
    # The apex of the heart points to the left: two thirds of it lie left of the midline.
    hx = points_mm(p, "heart")[:, 0] - spine[0]
    assert hx.mean() > 5 and np.percentile(hx, 99) > 1.25 * -np.percentile(hx, 1)
    assert mask(p, "lung_right").sum() > mask(p, "lung_left").sum()
    assert centre(p, "liver")[0] < spine[0] - 25
    assert centre(p, "stomach_gas")[0] > spine[0] and centre(p, "spleen")[0] > spine[0] + 50
    assert centre(p, "spleen")[1] > centre(p, "stomach")[1]
    # Front to back: sternum, heart, vertebral bodies; gas lies in front of the rest of the stomach.
    assert centre(p, "sternum")[1] < heart[1] - 20 and heart[1] < spine[1] - 30
    assert centre(p, "stomach_gas")[1] < centre(p, "stomach")[1]
    # Head to foot: collar bones, aortic arch, heart, liver, kidneys.
    order = ["clavicles", "aorta", "heart", "liver", "kidneys"]
    heights = [points_mm(p, "aorta")[:, 2].max() if n == "aorta" else centre(p, n)[2] for n in order]
    assert heights == sorted(heights, reverse=True)
    # The descending aorta runs left of the spine.
    aorta, discs = points_mm(p, "aorta"), points_mm(p, "spinal_canal")
    low, high = heart[2] - 15, heart[2] + 15
    descending = aorta[(aorta[:, 2] > low) & (aorta[:, 2] < high) & (aorta[:, 1] > heart[1] + 35)]
    assert len(descending) > 10
    assert descending[:, 0].mean() > discs[(discs[:, 2] > low) & (discs[:, 2] < high)][:, 0].mean() + 10


@pytest.mark.parametrize("seed", SEEDS)
def test_organs_hang_together(seed):
    p = patient(seed)
    for name in ("lung_left", "lung_right", "heart", "aorta", "liver", "spleen"):
        assert largest_share(mask(p, name)) > 0.9, name
    assert largest_share(mask(p, "vertebrae", "discs", "spinal_canal")) > 0.97
    # Branches belong to a tree once lumen, vessels and hearts are taken together.
    assert largest_share(mask(p, "airways")) > 0.5
    body = p.labels.numpy() > 0
    assert largest_share(body) > 0.99
    # The body is in air and closed: no air in it that is not lung, airway, bowel or stomach.
    assert not ndimage.binary_fill_holes(body)[~body].any()
    assert not body[:, 0].any() and not body[:, -1].any()


def test_trachea_divides():
    p = patient(1, 96)
    z = p.affine[2, 3] + p.affine[2, 2] * np.arange(96)
    airway = mask(p, "airways")
    shift, scale = p.parameters["shift_z_mm"], p.parameters["scale_z"]
    above, below = (int(np.abs(z - (shift + scale * h)).argmin()) for h in (85, 12))
    assert ndimage.label(airway[above], np.ones((3, 3)))[1] == 1
    assert ndimage.label(airway[below], np.ones((3, 3)))[1] >= 2


def test_ribs_can_be_counted_on_a_parasagittal_plane():
    p = patient(1, 96)
    ribs, x = mask(p, "ribs"), p.affine[0, 3] + p.affine[0, 0] * np.arange(96)
    y_spine, spine_x = centre(p, "vertebrae")[1], centre(p, "vertebrae")[0]
    behind = p.affine[1, 3] + p.affine[1, 1] * np.arange(96) > y_spine
    for side in (1, -1):
        plane = ribs[:, :, np.abs(x - spine_x - side * 62).argmin()] & behind[None]
        sizes = np.bincount(ndimage.label(plane, np.ones((3, 3)))[0].ravel())[1:]
        assert 8 <= (sizes > 2).sum() <= 12
        # They slope down: in the armpit line a rib lies lower than at the back.
    points = points_mm(p, "ribs")
    first_back = points[points[:, 1] > y_spine][:, 2].max()
    assert points[(np.abs(points[:, 0] - spine_x) > 95)][:, 2].max() < first_back - 10


@pytest.mark.parametrize("seed", SEEDS)
def test_hounsfield_units_by_organ(seed):
    p = patient(seed)
    hu = p.hu.numpy()
    median = {name: float(np.median(hu[mask(p, name)])) for name in LABELS}
    ranges = {
        "air": (-1002, -998), "fat": (-120, -75), "muscle": (25, 75), "breast_left": (-120, 60),
        "lung_left": (-880, -700), "lung_right": (-880, -700), "airways": (-1000, -600), "heart": (30, 60),
        "aorta": (25, 60), "liver": (35, 80), "spleen": (30, 65), "vertebrae": (130, 500), "ribs": (130, 600),
        "sternum": (100, 600), "scapulae": (150, 600), "clavicles": (150, 600), "stomach_gas": (-1000, -800),
        "spinal_canal": (0, 80), "kidneys": (10, 50), "nodule": (-300, 90), "costal_cartilage": (30, 250),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        assert low < median[name] < high, (name, median[name])
    bone = hu[mask(p, "vertebrae", "ribs", "sternum", "scapulae")]
    assert 350 < np.percentile(bone, 98) < 950  # cortical bone
    # Gravity: the back of the lungs is denser than the front.
    z, y, x = np.nonzero(ndimage.binary_erosion(mask(p, "lung_left", "lung_right"), iterations=2))
    values, mid = hu[z, y, x], np.median(y)
    assert 10 < values[y > mid].mean() - values[y < mid].mean() < 120
    # Texture: lung is not of one value.
    assert 10 < np.median(np.abs(values - np.median(values))) < 60


@pytest.mark.parametrize("seed", range(20, 28))
def test_sizes_are_those_of_adults(seed):
    p = patient(seed, 64, "lung", None)
    litres = mask(p, "lung_left", "lung_right", "lung_vessels", "airways").sum() * 5.0**3 / 1e6
    assert 2 < litres < 7
    chest = mask(p, *[n for n in LABELS if n not in ("air", "humeri")])[20:40]
    assert 250 <= chest.any((0, 1)).sum() * 5 <= 320
    assert 165 <= chest[:, :, 30:34].any((0, 2)).sum() * 5 <= 275
    heart, lungs = mask(p, "heart").any((0, 1)).sum(), mask(p, "lung_left", "lung_right").any((0, 1)).sum()
    assert 0.36 < heart / lungs < 0.56  # cardio-thoracic ratio


def test_cohorts_differ_in_their_breasts():
    sides = set()
    for seed in (0, 1, 2, 3):
        p = patient(seed, 32, "thoracic", None)
        left, right = mask(p, "breast_left").sum(), mask(p, "breast_right").sum()
        removed = "left" if p.parameters["mastectomy_side"] > 0 else "right"
        sides.add(removed)
        gone, stays = (left, right) if removed == "left" else (right, left)
        assert gone == 0 and stays > 50  # 50 ml
        whole = patient(seed, 32)
        assert min(mask(whole, "breast_left").sum(), mask(whole, "breast_right").sum()) > 50
    assert sides == {"left", "right"}
    man = next(s for s in range(50) if draw_patient(s, "lung")["male"])
    assert not mask(make_phantom(man, 32), "breast_left", "breast_right").any()


def test_nodules_appear_on_request():
    bare, spotted = make_phantom(6, 64, nodules=0), make_phantom(6, 64, nodules=5)
    changed = mask(spotted, "nodule")
    assert not mask(bare, "nodule").any() and changed.sum() >= 5
    inside = mask(bare, "lung_left", "lung_right", "lung_vessels", "airways")
    assert inside[changed].mean() > 0.95
    same = (bare.hu == spotted.hu).numpy()
    assert same[~ndimage.binary_dilation(changed, iterations=3)].mean() > 0.999


# --- input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"cohort": "abdomen"}, ("cohort", "abdomen", *COHORTS)),
        ({"size": 8}, ("size", "8", "16")),
        ({"size": 64.0}, ("size", "64.0")),
        ({"size": True}, ("size", "True")),
        ({"seed": -1}, ("seed", "-1")),
        ({"seed": "a"}, ("seed", "'a'")),
        ({"fov_mm": 0}, ("fov_mm", "0", "100")),
        ({"fov_mm": float("nan")}, ("fov_mm", "nan")),
        ({"nodules": -2}, ("nodules", "-2")),
    ],
)
def test_bad_input_is_named(arguments, words):
    with pytest.raises(InputError) as caught:
        make_phantom(**{"seed": 1, "size": 32, **arguments})
    for word in words:
        assert word in str(caught.value)


# --- the drawing board ----------------------------------------------------------------------------------------------


def board(size: int, fov: float = 64.0) -> Canvas:
    return Canvas(size, fov, (1.0, 1.0, 1.0), np.eye(3), (0.0, 0.0, 0.0), None)


@pytest.mark.parametrize("radius", [0.6, 1.5, 4.0])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_tubes_keep_their_mass_however_coarse_the_grid(radius, size):
    canvas = board(size)
    start, end = np.array([[-18.0, 3.3, -7.1]]), np.array([[21.0, -6.2, 12.4]])
    r = np.array([radius])
    share = canvas.tubes(start, end, r, r, canvas.empty())
    # Away from the ends: mass between two planes across the axis equals area times length.
    axis = ((end - start) / np.linalg.norm(end - start))[0]
    along = canvas.x * axis[0] + canvas.y * axis[1] + canvas.z * axis[2]
    middle = float((start + end)[0] @ axis / 2)
    window = np.clip(1.5 - np.abs(along - middle) / 8, 0, 1)  # integral 8 + 2 * 4 = 16 mm
    volume = float((share * window).sum()) * canvas.voxel**3
    assert volume == pytest.approx(np.pi * radius**2 * 16, rel=0.05)


def test_soft_ellipsoid_has_the_volume_of_the_ellipsoid():
    canvas = board(48)
    d = ellipsoid(canvas.x, canvas.y, canvas.z, (2.0, -3.0, 1.0), (22.0, 15.0, 11.0))
    volume = canvas.soft(d).sum() * canvas.voxel**3
    assert volume == pytest.approx(4 / 3 * np.pi * 22 * 15 * 11, rel=0.01)
    # On the axes the first-order distance is exact at the surface and has unit slope.
    probe = np.array([21.0, 22.0, 23.0])
    zero = np.zeros(3)
    assert np.allclose(ellipsoid(probe, zero, zero, (0, 0, 0), (22, 15, 11)), [-1, 0, 1], atol=0.05)
    assert np.allclose(superellipse(probe, zero, 22.0, 15.0, 2.4), [-1, 0, 1], atol=0.05)


def test_boxes_hold_what_they_promise_under_scale_rotation_and_warp():
    rng = np.random.default_rng(5)
    warp = rng.normal(0, 2, (3, 6, 6, 6))
    angle = np.radians(12)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    canvas = Canvas(40, 320.0, (1.1, 0.9, 1.05), turn, (7.0, -4.0, 3.0), warp)
    low, high = np.array([-50.0, -20.0, 10.0]), np.array([30.0, 25.0, 70.0])
    inside = ((canvas.x > low[0]) & (canvas.x < high[0]) & (canvas.y > low[1]) & (canvas.y < high[1])
              & (canvas.z > low[2]) & (canvas.z < high[2]))  # fmt: skip
    outside = inside.copy()
    outside[canvas.box(low, high)] = False
    assert inside.sum() > 200 and not outside.any()


def test_lattice_noise_is_the_same_at_two_resolutions():
    values = np.random.default_rng(0).standard_normal((32, 32, 32)).astype(np.float32)
    assert np.allclose(resample_lattice(values, 32), values, atol=1e-6)
    pooled = values.reshape(16, 2, 16, 2, 16, 2).mean((1, 3, 5))
    assert np.allclose(resample_lattice(values, 16), pooled, atol=1e-5)
    for size, nodes, ratio in ((20, 32, 1.0), (80, 32, 1.25), (24, 64, 1.25)):
        m = lattice_matrix(size, nodes, ratio)
        assert np.allclose(m.sum(1), 1, atol=1e-5) and (m >= 0).all()
        ramp = m @ (np.arange(nodes) + 0.5)  # a straight line stays one, away from the ends
        expected = (((np.arange(size) + 0.5) / size - 0.5) * ratio + 0.5) * nodes
        keep = (expected > 2) & (expected < nodes - 2)
        assert np.allclose(ramp[keep], expected[keep], atol=1e-3 if size > nodes else 0.15)
