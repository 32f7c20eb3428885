"""Eq. 10 against an independent formula, and the network that makes the features. Nothing is square or cubic."""

from __future__ import annotations

import math

import pytest
import torch

from difr3ct_core.drr import backproject, project
from difr3ct_core.files import InputError
from difr3ct_core.fusion import Fusion, UNet2d, coarsen, resample_along_rays
from difr3ct_core.geometry import View
from difr3ct_core.presets import FusionPreset

SHAPE, SPACING = (4, 5, 6), 9.0
CONE = {"mode": "cone", "dso_mm": 300.0, "dsd_mm": 420.0}
ANGLES = [0.0, 30.0, 90.0, 157.5, 250.0]


def world(shape=SHAPE, spacing=SPACING) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, y, z in mm of every grid point, by broadcasting and in double precision."""
    z, y, x = ((torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * spacing for n in shape)
    return x[None, None, :], y[None, :, None], z[:, None, None]


def detector_mm(view: View, x, y, z):
    """Eq. 10 by similar triangles: v and u in mm on the detector. Written without the library's geometry."""
    angle = math.radians(view.angle_deg)
    towards_source = x * math.cos(angle) + y * math.sin(angle)
    along_u = -x * math.sin(angle) + y * math.cos(angle)
    scale = view.dsd_mm / (view.dso_mm - towards_source) if view.mode == "cone" else torch.ones_like(towards_source)
    return z * scale, along_u * scale


def linear_image(view: View, a: float, b: float, c: float) -> torch.Tensor:
    """a + b·v + c·u at the pixel centres, v and u in mm."""
    (rows, columns), (dv, du), (ov, ou) = view.detector_shape, view.pixel_mm, view.offset_mm
    v = (torch.arange(rows, dtype=torch.float64) - (rows - 1) / 2) * dv + ov
    u = (torch.arange(columns, dtype=torch.float64) - (columns - 1) / 2) * du + ou
    return a + b * v[:, None] + c * u[None, :]


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("more", [{}, {"offset_mm": (5.0, -7.0)}, CONE, {**CONE, "offset_mm": (-6.0, 4.0)}])
def test_a_linear_image_becomes_its_linear_function_of_the_ray(angle, more):
    """Bilinear interpolation is exact on linear images, so the result must be too, to the rounding of float32."""
    view = View(angle, (20, 26), (6.0, 5.0), **more)
    image = linear_image(view, 2.0, 0.03, -0.05)
    v, u = detector_mm(view, *world())
    expected = (2.0 + 0.03 * v - 0.05 * u).expand(SHAPE)
    found = resample_along_rays(image[None, None, None], [view], SHAPE, SPACING)
    assert found.shape == (1, 1, *SHAPE)
    torch.testing.assert_close(found[0, 0], expected, atol=2e-5, rtol=0)


def test_views_are_averaged():
    """Three linear images of different views and channels: the mean of their functions, in any order of the views."""
    views = [View(angle, (20, 26), (6.0, 5.0), **more) for angle, more in ((0.0, {}), (67.5, {}), (110.0, CONE))]
    coefficients = [(1.0, 0.02, 0.05), (-2.0, 0.0, 0.03), (0.5, -0.04, 0.01)]
    images = torch.stack([linear_image(v, *c) for v, c in zip(views, coefficients, strict=True)])
    features = torch.stack([images, -2 * images], dim=1)[None]  # two channels
    expected = 0.0
    for view, (a, b, c) in zip(views, coefficients, strict=True):
        v, u = detector_mm(view, *world())
        expected = expected + (a + b * v + c * u) / 3
    found = resample_along_rays(features, views, SHAPE, SPACING)
    torch.testing.assert_close(found[0, 0], expected.expand(SHAPE), atol=2e-5, rtol=0)
    torch.testing.assert_close(found[0, 1], -2 * expected.expand(SHAPE), atol=5e-5, rtol=0)
    turned = resample_along_rays(features[:, [2, 0, 1]], [views[i] for i in (2, 0, 1)], SHAPE, SPACING)
    torch.testing.assert_close(turned, found)


@pytest.mark.parametrize(("angle", "axis"), [(90.0, 3), (0.0, 4)])
def test_one_view_is_smeared_along_its_rays(angle, axis):
    """Frontal: constant along y; lateral: constant along x. Across the rays it follows the image."""
    view = View(angle, (4, 6 if angle == 90 else 5), (SPACING, SPACING))
    image = torch.rand(2, 1, 3, *view.detector_shape, generator=torch.Generator().manual_seed(0))
    found = resample_along_rays(image, [view], SHAPE, SPACING)
    torch.testing.assert_close(found, found.narrow(axis, 0, 1).expand_as(found))
    # Pixels and grid points coincide; at 90° columns run against x.
    expected = image[:, 0].flip(-1) if angle == 90 else image[:, 0]
    torch.testing.assert_close(found.select(axis, 2), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("more", [{}, CONE])
def test_a_ray_that_misses_the_detector_gives_nothing(more):
    view = View(0.0, (20, 26), (6.0, 5.0), offset_mm=(0.0, 400.0), **more)
    assert (resample_along_rays(torch.ones(1, 1, 2, 20, 26), [view], SHAPE, SPACING) == 0).all()
    half = View(0.0, (20, 26), (6.0, 5.0), offset_mm=(0.0, 13 * 5.0), **more)  # sees u > 0 only, which is y > 0
    found = resample_along_rays(torch.ones(1, 1, 1, 20, 26), [half], SHAPE, SPACING)[0, 0]
    assert (found[:, :2] == 0).all()
    torch.testing.assert_close(found[:, 3:], torch.ones_like(found[:, 3:]))


def test_like_unfiltered_backprojection():
    """Averaging x-rays along their rays is, up to scale, the adjoint of the projector (interpolation differs)."""
    shape, spacing = (8, 16, 18), 10.0
    views = tuple(View(angle, (8, 28), (10.0, 10.0)) for angle in (0.0, 25.0, 60.0, 90.0, 140.0))
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 1, 2, 4, 5, generator=generator)
    volume = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")
    images = project(volume, views, spacing)
    ours = resample_along_rays(images.movedim(1, 2), views, shape, spacing)
    adjoint = backproject(images, views, shape, spacing)
    inner = (slice(None), slice(None), slice(1, -1), slice(2, -2), slice(2, -2))
    a, b = ours[inner].flatten(), adjoint[inner].flatten()
    cosine = float(a @ b / a.norm() / b.norm())
    assert cosine > 0.999
    # Each voxel gets spacing² / pixel area · spacing = `spacing` of every view in the adjoint; we take the mean.
    assert float((a @ b) / (a @ a)) == pytest.approx(len(views) * spacing, rel=0.03)


def test_gradients_reach_the_features_after_sampling_in_inference_mode():
    """The sampling grid is cached; one that was made in inference mode must not break a later training step."""
    view = View(41.0, (7, 9), (10.0, 10.0))  # used nowhere else, so not cached yet
    with torch.inference_mode():
        resample_along_rays(torch.ones(1, 1, 1, 7, 9), [view], SHAPE, SPACING)
    features = torch.ones(1, 1, 1, 7, 9, requires_grad=True)
    resample_along_rays(features, [view], SHAPE, SPACING).sum().backward()
    assert features.grad.abs().sum() > 0


def test_coarsen_keeps_the_edges_of_the_detector():
    view = View(30.0, (12, 20), (2.0, 3.0), offset_mm=(1.0, -2.0), **CONE)
    coarse = coarsen(view, 4)
    assert coarse.detector_shape == (3, 5) and coarse.pixel_mm == (8.0, 12.0)
    assert coarse.offset_mm == view.offset_mm and coarse.dso_mm == 300.0
    # A block of fine pixels and its coarse pixel have the same centre.
    fine, rough = linear_image(view, 0.0, 1.0, 1.0), linear_image(coarse, 0.0, 1.0, 1.0)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(fine[None], 4)[0], rough)


# --- the network -----------------------------------------------------------------------------------------------

PRESET = FusionPreset(widths=(8, 16), out_channels=8)


def fusion(seed: int = 0) -> Fusion:
    torch.manual_seed(seed)
    return Fusion(PRESET, SHAPE, SPACING, 2).eval()


def some_views(angles, **more) -> tuple[View, ...]:
    return tuple(View(angle, (8, 12), (6.0, 7.0), **more) for angle in angles)


def test_feature_images_follow_their_x_ray():
    torch.manual_seed(1)
    net = UNet2d(3, PRESET, 2)
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(2))
    features = net(images)
    assert features.shape == (2, 8, 4, 6)
    torch.testing.assert_close(net(images.flip(0)), features.flip(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("more", [{}, CONE])
def test_condition_does_not_depend_on_the_order_of_views(more):
    net, views = fusion(), some_views((0.0, 45.0, 120.0), **more)
    xrays = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        condition = net(xrays, views)
        other = net(xrays[:, [2, 0, 1]], [views[i] for i in (2, 0, 1)])
    assert condition.shape == (2, 8, *SHAPE)
    torch.testing.assert_close(condition, other, atol=1e-5, rtol=1e-5)


def test_condition_depends_on_angle_image_and_patient():
    net = fusion()
    xrays = torch.rand(2, 2, 8, 12, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        condition = net(xrays, some_views((0.0, 90.0)))
        assert (condition - net(xrays, some_views((0.0, 45.0)))).abs().max() > 1e-3
        assert (condition - net(xrays.flip(1), some_views((0.0, 90.0)))).abs().max() > 1e-3
        torch.testing.assert_close(net(xrays.flip(0), some_views((0.0, 90.0))), condition.flip(0), atol=1e-5, rtol=1e-5)
        one = net(xrays[:, :1], some_views((0.0,)))
    assert one.shape == condition.shape  # any number of views


def test_a_feature_knows_its_angle():
    """The origin falls on the detector's centre in every view; only sine and cosine of the angle tell views apart."""
    torch.manual_seed(6)
    net = Fusion(PRESET, (3, 5, 5), SPACING, 2).eval()
    xrays = torch.rand(1, 1, 8, 12, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        at_origin = [net(xrays, some_views((angle,)))[0, :, 1, 2, 2] for angle in (0.0, 90.0, 180.0)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (at_origin[i] - at_origin[j]).abs().max() > 1e-3


def test_every_weight_learns():
    net = fusion().train()
    net(torch.rand(1, 2, 8, 12), some_views((0.0, 60.0))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_x_rays_that_do_not_match_their_views():
    net, views = fusion(), some_views((0.0, 90.0))
    with pytest.raises(InputError, match=r"xrays: found 3 images, expected 2, one per view"):
        net(torch.rand(1, 3, 8, 12), views)
    with pytest.raises(InputError, match=r"xrays: found 0 images"):
        net(torch.rand(1, 0, 8, 12), ())
    with pytest.raises(InputError, match=r"xrays: found images of 12 x 8 pixels, expected 8 x 12.*0\.0°"):
        net(torch.rand(1, 2, 12, 8), views)
    # Features are made at 1/factor, then halved per level: 10 columns give 5, which no level can halve.
    odd = tuple(View(angle, (8, 10), (6.0, 7.0)) for angle in (0.0, 90.0))
    with pytest.raises(InputError, match=r"xrays: found images of 8 x 10 pixels, expected multiples of 4"):
        net(torch.rand(1, 2, 8, 10), odd)
