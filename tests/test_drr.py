"""The projector against mathematics: closed forms, signs, adjoints, derivatives, convergence. No shape is a cube."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from difr3ct_core.drr import backproject, clear_cache, project, project_rays
from difr3ct_core.drr.exact import Blob, Ellipsoid, exact_projection, sample_phantom
from difr3ct_core.geometry import Pose, View
from difr3ct_core.presets import VIEW_SETS

MODES = ("parallel", "cone")
# Random geometries cut the volume off on purpose; whether that warns is tested elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:views.*miss the detector", "ignore:views.*radians")

#: Three blobs, no two alike, no two coordinates alike: (x, y, z) in mm.
LANDMARKS = (
    Blob((52.0, -18.0, 30.0), 14.0, 1.0),
    Blob((-25.0, 41.0, -22.0), 16.0, 0.6),
    Blob((8.0, 30.0, 12.0), 18.0, 0.4),
)


def views_at(angles, mode="parallel", detector=(40, 56), pixel=(4.5, 5.0), **more):
    return tuple(View(angle, detector, pixel, mode, **more) for angle in angles)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def landmark_volume(shape=(32, 40, 48), spacing=(5.0, 5.5, 5.0), shapes=LANDMARKS):
    return sample_phantom(shapes, shape, spacing)[None, None], spacing


@st.composite
def geometries(draw):
    """Any views with any volume, as long as the source stays outside."""
    shape = tuple(draw(st.integers(2, 9)) for _ in range(3))
    spacing = tuple(draw(st.floats(0.5, 4.0)) for _ in range(3))
    mode = draw(st.sampled_from(MODES))
    radius = math.hypot(shape[1] * spacing[1], shape[2] * spacing[2]) / 2
    dso = radius * draw(st.floats(1.2, 8.0))
    detector = (draw(st.integers(1, 10)), draw(st.integers(1, 10)))
    angles = draw(
        st.lists(st.one_of(st.floats(-200, 400), st.sampled_from(VIEW_SETS["8view"])), min_size=1, max_size=3)
    )
    views = tuple(
        View(
            angle,
            detector,
            (draw(st.floats(0.5, 6.0)), draw(st.floats(0.5, 6.0))),
            mode,
            (draw(st.floats(-8, 8)), draw(st.floats(-8, 8))),
            dso,
            dso * draw(st.floats(1.1, 3.0)),
        )
        for angle in angles
    )
    return views, shape, spacing


@settings(max_examples=60, deadline=None)
@given(geometry=geometries(), seed=st.integers(0, 1000))
def test_backproject_is_the_exact_adjoint(geometry, seed):
    views, shape, spacing = geometry
    clear_cache()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        generator = torch.Generator().manual_seed(seed)
        volume = torch.rand(1, 2, *shape, generator=generator, dtype=dtype)
        image = torch.rand(1, 2, len(views), *views[0].detector_shape, generator=generator, dtype=dtype)
        forward = (project(volume, views, spacing).double() * image).sum()
        adjoint = (volume.double() * backproject(image, views, shape, spacing)).sum()
        assert abs(forward - adjoint) <= tolerance * abs(forward)


@settings(max_examples=12, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    angles=st.lists(st.floats(-360, 360), min_size=1, max_size=2),
    offset=st.tuples(st.floats(-20, 20), st.floats(-20, 20)),
    spacing=st.tuples(*[st.floats(3.5, 6.5)] * 3),
    dso=st.floats(300, 2000),
    zoom=st.floats(1.1, 2.0),
)
def test_the_fast_forms_equal_the_definition(mode, angles, offset, spacing, dso, zoom):
    """Both interpolate linearly, at other points: they differ by the square of voxel size over blob size."""
    clear_cache()
    views = views_at(angles, mode, (24, 28), (9.0, 10.0), offset_mm=offset, dso_mm=dso, dsd_mm=dso * zoom)
    volume = sample_phantom(LANDMARKS, (36, 42, 44), spacing)[None, None]
    fast, slow = project(volume, views, spacing), project_rays(volume, views, spacing)
    assert relative(fast, slow) < 8e-3


@pytest.mark.parametrize("projector", [project, project_rays])
@pytest.mark.parametrize("angle", VIEW_SETS["8view"])
@pytest.mark.parametrize("mode", MODES)
def test_a_landmark_fixes_every_sign(mode, angle, projector):
    """One blob far from every plane of symmetry: its image must peak where the formula, written out here, says."""
    x, y, z = 50.0, -30.0, 25.0
    volume, spacing = landmark_volume(shapes=(Blob((x, y, z), 9.0),))
    view = View(angle, (40, 50), (6.0, 6.5), mode, (4.0, -9.0), 700.0, 1000.0)
    image = projector(volume, (view,), spacing)[0, 0, 0]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    scale = 1.0 if mode == "parallel" else 1000.0 / (700.0 - (x * cos + y * sin))
    u, v = scale * (-x * sin + y * cos), scale * z
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(50.0), indexing="ij")
    centroid = torch.stack([(rows * image).sum(), (columns * image).sum()]) / image.sum()
    expected = torch.tensor([(v - 4.0) / 6.0 + 19.5, (u + 9.0) / 6.5 + 24.5], dtype=torch.float64)
    torch.testing.assert_close(centroid, expected, atol=0.05, rtol=0)


def test_quarter_turns_are_plain_sums():
    volume = torch.rand(2, 3, 6, 8, 10, generator=torch.Generator().manual_seed(0))
    lateral = project(volume, views_at([0.0], "parallel", (6, 8), (2.0, 2.0)), 2.0)
    frontal = project(volume, views_at([90.0], "parallel", (6, 10), (2.0, 2.0)), 2.0)
    assert lateral.shape == (2, 3, 1, 6, 8)
    torch.testing.assert_close(lateral[:, :, 0], 2.0 * volume.sum(4))
    torch.testing.assert_close(frontal[:, :, 0], 2.0 * volume.sum(3).flip(-1))


@pytest.mark.parametrize("angle", VIEW_SETS["8view"])
def test_parallel_equals_rotate_and_sum(angle):
    """An oracle that knows neither Joseph nor our geometry: scipy turns the volume, then sums along x."""
    volume = sample_phantom(LANDMARKS, (30, 44, 48), 4.5)
    turned = ndimage.rotate(volume.numpy(), angle, axes=(2, 1), reshape=False, order=1)
    view = View(angle, (30, 44), (4.5, 4.5))
    found = project(volume[None, None], (view,), 4.5)[0, 0, 0]
    expected = torch.from_numpy(turned.sum(2) * 4.5)
    assert relative(found, expected) < 0.015
    for wrong in (expected.flip(0), expected.flip(1)):
        assert relative(found, wrong) > 0.3


@pytest.mark.parametrize("projector", [project, project_rays])
@pytest.mark.parametrize("mode", MODES)
def test_error_against_exact_integrals_falls_with_the_square_of_the_voxel(mode, projector):
    views = views_at((10.0, 67.5, 200.0), mode, (24, 30), (10.0, 11.0), offset_mm=(6.0, -8.0))
    exact = exact_projection(LANDMARKS, views)
    errors = []
    for n in (1, 2):
        spacing = (10.0 / n, 9.0 / n, 9.5 / n)
        volume = sample_phantom(LANDMARKS, (16 * n, 21 * n, 22 * n), spacing)
        errors.append(relative(projector(volume[None, None], views, spacing)[0, 0], exact))
    assert errors[1] < 0.02
    assert 1.7 < math.log2(errors[0] / errors[1]) < 2.5


@pytest.mark.parametrize("mode", MODES)
def test_error_at_sharp_edges_falls_with_the_voxel(mode):
    """A jump is known to half a voxel at best, so the order is about one; the exact image itself has kinks there."""
    solids = (
        Ellipsoid((10.0, -20.0, 5.0), (90.0, 60.0, 50.0), 25.0, 0.02),
        Ellipsoid((30.0, 10.0, 20.0), (20.0, 25.0, 15.0), -40.0, 0.03),
    )
    views = views_at((0.0, 33.0, 112.5), mode)
    exact = exact_projection(solids, views)
    errors = []
    for n in (1, 2):
        spacing = (10.0 / n, 11.0 / n, 10.4 / n)
        volume = sample_phantom(solids, (15 * n, 22 * n, 24 * n), spacing, supersample=4)
        errors.append(relative(project(volume[None, None], views, spacing)[0, 0], exact))
    assert errors[1] < 0.045
    assert 0.8 < math.log2(errors[0] / errors[1]) < 1.7


@pytest.mark.parametrize("mode", MODES)
def test_mass_is_conserved(mode):
    """Parallel: the image's integral is the volume's mass. Cone: each voxel's mass is magnified by its own depth."""
    volume, spacing = landmark_volume()
    view = View(37.0, (90, 110), (2.5, 2.5), mode, (3.0, -4.0), 900.0, 1300.0)
    image = project(volume, (view,), spacing)[0, 0, 0]
    mass = volume[0, 0] * math.prod(spacing)
    if mode == "cone":
        # A ray bundle through a pixel widens with depth t = d/DSD, and is longer off the centre by 1/cos.
        n = torch.tensor([math.cos(math.radians(37.0)), math.sin(math.radians(37.0)), 0.0], dtype=torch.float64)
        axes = [
            (torch.arange(c, dtype=torch.float64) - (c - 1) / 2) * s for c, s in zip((32, 40, 48), spacing, strict=True)
        ]
        z, y, x = torch.meshgrid(*axes, indexing="ij")
        points = torch.stack([x, y, z], -1)
        depth = 900.0 - points @ n
        mass = mass * (1300.0 / depth) ** 2 * (points - 900.0 * n).norm(dim=-1) / depth
    assert abs(float(image.sum()) * 2.5 * 2.5 / float(mass.sum()) - 1) < 2e-3


@pytest.mark.parametrize("mode", MODES)
def test_attenuation_never_brightens(mode):
    """A voxel of positive attenuation casts no negative shadow on any pixel."""
    views = views_at((20.0, 110.0), mode, (9, 11), (4.0, 3.0))
    for index in ((0, 0, 0), (5, 4, 8), (2, 7, 3)):
        volume = torch.zeros(1, 1, 6, 8, 9)
        volume[(0, 0, *index)] = 1.0
        image = project(volume, views, (5.0, 4.0, 4.5))
        assert float(image.min()) >= 0.0
        assert float(image.max()) > 0.5


@pytest.mark.parametrize("mode", MODES)
def test_batch_and_channel_axes_are_independent(mode):
    views = views_at((20.0, 110.0), mode, (7, 9), (6.0, 5.0))
    volume = torch.randn(2, 3, 6, 8, 9, generator=torch.Generator().manual_seed(3))
    spacing = (5.0, 4.0, 4.5)
    images = project(volume, views, spacing)
    backs = backproject(images, views, (6, 8, 9), spacing)
    for b in range(2):
        for c in range(3):
            one = project(volume[b : b + 1, c : c + 1], views, spacing)
            torch.testing.assert_close(images[b, c], one[0, 0])
            torch.testing.assert_close(backs[b, c], backproject(one, views, (6, 8, 9), spacing)[0, 0])
    marched = project_rays(volume, views, spacing)
    torch.testing.assert_close(marched[1, 2], project_rays(volume[1:, 2:], views, spacing)[0, 0])


def test_views_may_differ_in_everything_but_kind_and_shape():
    """A stack is the same as its views one by one, also where pixel size, offset and distances change half-way."""
    volume, spacing = landmark_volume()
    for mode in MODES:
        views = (
            View(0.0, (20, 24), (9.0, 10.0), mode, (0.0, 5.0), 800.0, 1100.0),
            View(40.0, (20, 24), (9.0, 10.0), mode, (0.0, 5.0), 800.0, 1100.0),
            View(70.0, (20, 24), (12.0, 8.0), mode, (-9.0, 0.0), 600.0, 1000.0),
        )
        single = torch.cat([project(volume, (view,), spacing) for view in views], dim=2)
        torch.testing.assert_close(project(volume, views, spacing), single, rtol=3e-3, atol=3e-3 * float(single.max()))


@pytest.mark.parametrize("mode", MODES)
def test_derivatives_of_first_and_second_order_in_both_modes(mode):
    views = views_at((20.0, 110.0), mode, (3, 4), (6.0, 5.0), offset_mm=(1.0, -2.0))
    spacing, shape = (4.0, 3.0, 3.5), (3, 4, 5)
    generator = torch.Generator().manual_seed(4)
    volume = torch.rand(1, 1, *shape, generator=generator, dtype=torch.float64, requires_grad=True)
    image = torch.rand(1, 1, 2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)

    def loss(v):
        return project(v, views, spacing).square()

    assert torch.autograd.gradcheck(loss, (volume,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, (volume,))
    assert torch.autograd.gradcheck(lambda i: backproject(i, views, shape, spacing).sin(), (image,))


@pytest.mark.parametrize("mode", MODES)
def test_gradient_with_respect_to_the_pose(mode):
    volume, spacing = landmark_volume((16, 20, 24), (10.0, 11.0, 10.0))
    views = views_at((20.0, 110.0), mode, (8, 10), (20.0, 22.0))
    weights = torch.rand(1, 1, 2, 8, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def loss(angle, shift):
        return (weights * project_rays(volume, views, spacing, Pose(angle, shift), step_mm=2.5)).sum()

    angle = torch.tensor([1.3, -0.7], dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([[2.1, -3.2, 1.4], [0.3, 4.1, -2.2]], dtype=torch.float64, requires_grad=True)
    found = torch.cat([g.flatten() for g in torch.autograd.grad(loss(angle, shift), (angle, shift))])
    with torch.no_grad():
        expected = []
        for parameter in (angle, shift):
            for index in range(parameter.numel()):
                step = torch.zeros_like(parameter).flatten()
                step[index] = 1e-4
                moved = [
                    loss(*(p + sign * step.view_as(p) if p is parameter else p for p in (angle, shift)))
                    for sign in (1, -1)
                ]
                expected.append((moved[0] - moved[1]) / 2e-4)
    expected = torch.stack(expected)
    assert float(expected.abs().min()) > 1e-6 * float(expected.abs().max())  # every parameter matters
    # Trilinear interpolation has kinks at the voxel centres, which finite differences straddle now and then.
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("mode", MODES)
def test_a_pose_is_the_view_it_says(mode):
    volume, spacing = landmark_volume()
    views = views_at((20.0, 110.0), mode)
    turned = views_at((23.0, 108.0), mode)
    pose = Pose(torch.tensor([3.0, -2.0], dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(project_rays(volume, views, spacing, pose), project_rays(volume, turned, spacing))
    # Source and detector one voxel higher: the image of the volume one voxel lower.
    up = Pose(torch.zeros(2, dtype=torch.float64), torch.tensor([[0.0, 0.0, spacing[0]]] * 2, dtype=torch.float64))
    lower = torch.zeros_like(volume)
    lower[:, :, :-1] = volume[:, :, 1:]
    assert relative(project_rays(volume, views, spacing, up), project_rays(lower, views, spacing)) < 2e-3


@pytest.mark.parametrize("mode", MODES)
def test_precision_and_types(mode):
    views = views_at((20.0, 110.0), mode)
    volume, spacing = landmark_volume()
    exact = project(volume, views, spacing)
    assert exact.dtype == torch.float64
    single = project(volume.float(), views, spacing)
    assert single.dtype == torch.float32
    assert relative(single, exact) < 1e-6
    half = project(volume.to(torch.bfloat16), views, spacing)
    assert half.dtype == torch.float32
    assert relative(half, exact) < 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_memory_layout_and_inference_mode_do_not_matter(mode):
    clear_cache()
    views = views_at((20.0,), mode, (7, 9), (6.0, 5.0))
    volume = torch.rand(1, 1, 9, 8, 6)
    with torch.inference_mode():
        inferred = project(volume, views, 4.0)
    strided = volume.permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2)
    learned = strided.clone().requires_grad_()
    project(learned, views, 4.0).sum().backward()
    torch.testing.assert_close(project(strided, views, 4.0), inferred)
    assert learned.grad.shape == volume.shape


@pytest.mark.parametrize("mode", MODES)
def test_mixed_precision_around_the_projector_leaves_it_exact(mode):
    """Training under autocast and with reduced matrix products must not round the x-rays to three digits."""
    views = views_at((20.0, 110.0), mode)
    volume, spacing = landmark_volume()
    volume = volume.float()
    images = project(volume, views, spacing)
    backs = backproject(images, views, tuple(volume.shape[-3:]), spacing)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = project(volume, views, spacing)
            back = backproject(mixed, views, tuple(volume.shape[-3:]), spacing)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(mixed, images)
    assert torch.equal(back, backs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_gives_the_same(mode):
    volume, spacing = landmark_volume()
    views = views_at(VIEW_SETS["8view"], mode)
    images = project(volume.cuda().float(), views, spacing)
    assert relative(images.cpu(), project(volume, views, spacing)) < 1e-5
    backs = backproject(images, views, tuple(volume.shape[-3:]), spacing)
    assert relative(backs.cpu(), backproject(images.cpu(), views, tuple(volume.shape[-3:]), spacing)) < 1e-5
    assert relative(project_rays(volume.cuda(), views, spacing).cpu(), project_rays(volume, views, spacing)) < 1e-9
