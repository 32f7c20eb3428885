"""The TIGRE backend with stand-ins for its package: wrong, broken, without a GPU, and one that records what it is told.

The real one is compared in the last test, where it is installed and a GPU is at hand.
"""

from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest
import torch

from difr3ct_core.drr import project
from difr3ct_core.drr.tigre import find_tigre
from difr3ct_core.files import InputError
from difr3ct_core.geometry import View, standard_views

SHAPE, SPACING = (6, 8, 10), (5.0, 4.0, 3.0)


def install(monkeypatch, tigre, gpu=None):
    """Put a stand-in where ``import tigre`` finds it; None makes the import fail."""
    for name in [name for name in sys.modules if name.split(".")[0] == "tigre"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tigre", tigre)
    monkeypatch.setitem(sys.modules, "tigre.utilities", gpu and types.ModuleType("tigre.utilities"))
    monkeypatch.setitem(sys.modules, "tigre.utilities.gpu", gpu)


def stand_in(names=("NVIDIA H100",)):
    """A package that looks like TIGRE 3 and writes down every call of Ax."""
    tigre, gpu = types.ModuleType("tigre"), types.ModuleType("tigre.utilities.gpu")
    tigre.calls = []

    def ax(volume, geometry, angles, **options):
        tigre.calls.append((volume, geometry, angles, options))
        return np.full((len(angles), *geometry.nDetector), float(len(tigre.calls)), np.float32)

    tigre.Ax, tigre.geometry = ax, types.SimpleNamespace
    gpu.getGpuNames = lambda: list(names)
    return tigre, gpu


pytestmark = pytest.mark.filterwarnings("ignore:views.*miss the detector")
VIEWS = tuple(View(a, (7, 9), (6.0, 5.0), "cone", (1.5, -2.5), 700.0, 1100.0) for a in (0.0, 22.5, 90.0))


@pytest.mark.parametrize(
    ("packages", "words"),
    [
        ((None, None), "no package `tigre` can be imported"),
        (
            (types.ModuleType("tigre"), None),
            "another program of that name.*uninstall it.*CERN/TIGRE.*conda install -c ccpi",
        ),
        ((stand_in()[0], None), "cannot list the GPUs"),
        (stand_in(names=()), "finds no CUDA GPU"),
    ],
)
def test_without_the_real_package_or_a_gpu_torch_goes_on(monkeypatch, packages, words):
    install(monkeypatch, *packages)
    mu = torch.rand(1, 1, *SHAPE)
    with pytest.warns(UserWarning, match=words) as caught:
        images = project(mu, VIEWS, SPACING, drr_backend="tigre")
    assert any("torch backend instead" in str(warning.message) for warning in caught)
    torch.testing.assert_close(images, project(mu, VIEWS, SPACING))
    assert not getattr(packages[0], "calls", [])


def test_a_package_that_breaks_on_import_is_named(monkeypatch):
    def broken(name, *_):
        raise OSError("libcudart.so.11: cannot open shared object file")

    monkeypatch.setattr("difr3ct_core.drr.tigre.importlib.import_module", broken)
    module, reason = find_tigre()
    assert module is None
    assert "libcudart.so.11" in reason


def test_cone_geometry_is_handed_over_in_tigres_own_order(monkeypatch):
    tigre, gpu = stand_in()
    install(monkeypatch, tigre, gpu)
    mu = torch.rand(2, 1, *SHAPE, dtype=torch.float64)
    images = project(mu, VIEWS, SPACING, drr_backend="tigre")
    assert len(tigre.calls) == 2  # one a volume, all views at once
    assert images.shape == (2, 1, 3, 7, 9)
    assert images.dtype == torch.float64
    assert images[1].unique().tolist() == [2.0]
    volume, geometry, angles, options = tigre.calls[1]
    assert volume.dtype == np.float32
    assert volume.flags.c_contiguous
    np.testing.assert_array_equal(volume, mu[1, 0].float().numpy())
    assert angles.dtype == np.float32
    np.testing.assert_allclose(angles, [0.0, math.pi / 8, math.pi / 2], rtol=1e-6)
    assert options["projection_type"] == "interpolated"
    expected = {
        "nVoxel": (6, 8, 10), "dVoxel": (5.0, 4.0, 3.0), "sVoxel": (30.0, 32.0, 30.0), "offOrigin": (0, 0, 0),
        "nDetector": (7, 9), "dDetector": (6.0, 5.0), "sDetector": (42.0, 45.0), "offDetector": (1.5, -2.5),
    }  # fmt: skip
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(geometry, name), values, err_msg=name)
    assert (geometry.DSO, geometry.DSD, geometry.mode) == (700.0, 1100.0, "cone")


def test_a_parallel_offset_moves_the_volume_because_it_would_tilt_tigres_rays(monkeypatch):
    tigre, gpu = stand_in()
    install(monkeypatch, tigre, gpu)
    views = tuple(View(a, (7, 9), (6.0, 5.0), "parallel", (1.5, -2.5)) for a in (0.0, 90.0))
    project(torch.rand(1, 1, *SHAPE), views, SPACING, drr_backend="tigre")
    assert len(tigre.calls) == 2
    # e_u is +y at 0 degrees and -x at 90: the volume moves by -(u·e_u + v·e_v), written (z, y, x).
    for call, expected in zip(tigre.calls, ([-1.5, 2.5, 0.0], [-1.5, 0.0, -2.5]), strict=True):
        geometry = call[1]
        np.testing.assert_allclose(geometry.offOrigin, expected, atol=1e-12)
        np.testing.assert_array_equal(geometry.offDetector, [0, 0])
        half = np.linalg.norm(geometry.sVoxel) / 2
        assert min(geometry.DSO, geometry.DSD - geometry.DSO) > half


def test_unlike_views_keep_their_order(monkeypatch):
    tigre, gpu = stand_in()
    install(monkeypatch, tigre, gpu)
    views = (VIEWS[0], View(40.0, (7, 9), (7.0, 5.0), "cone", (1.5, -2.5), 700.0, 1100.0), VIEWS[2])
    images = project(torch.rand(1, 1, *SHAPE), views, SPACING, drr_backend="tigre")
    assert images[0, 0, :, 0, 0].tolist() == [1.0, 2.0, 3.0]
    assert [call[1].dDetector[0] for call in tigre.calls] == [6.0, 7.0, 6.0]


def test_a_gradient_is_refused_instead_of_lost(monkeypatch):
    install(monkeypatch, *stand_in())
    mu = torch.rand(1, 1, *SHAPE, requires_grad=True)
    with pytest.raises(InputError, match="no gradient"):
        project(mu, VIEWS, SPACING, drr_backend="tigre")
    with torch.no_grad():
        project(mu, VIEWS, SPACING, drr_backend="tigre")


@pytest.mark.skipif(find_tigre()[0] is None, reason="needs TIGRE and a CUDA GPU: " + find_tigre()[1])
@pytest.mark.parametrize("mode", ["parallel", "cone"])
def test_the_real_tigre_agrees(mode):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 1, 6, 7, 8, generator=generator)
    mu = torch.nn.functional.interpolate(coarse, size=(48, 56, 64), mode="trilinear")
    views = standard_views("8view", (60, 70), 320.0, mode)
    ours, theirs = project(mu, views, 4.5), project(mu, views, 4.5, drr_backend="tigre")
    assert float((ours - theirs).norm() / ours.norm()) < 5e-3
