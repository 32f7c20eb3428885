"""The projector against other people's: ITK-RTK, ASTRA and DiffDRR's Siddon, each skipped where it is not installed.

pip install itk-rtk astra-toolbox && pip install --no-deps diffdrr
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from difr3ct_core.drr import backproject, project
from difr3ct_core.drr.exact import Blob, sample_phantom
from difr3ct_core.geometry import View, pixel_rays
from difr3ct_core.presets import VIEW_SETS

SHAPE, SPACING = (32, 42, 48), 5.0
#: All well inside the volume: at its border each program fades out in its own way.
BLOBS = (
    Blob((52.0, -18.0, 30.0), 10.0, 1.0),
    Blob((-25.0, 41.0, -22.0), 12.0, 0.6),
    Blob((8.0, 30.0, 12.0), 13.0, 0.4),
)


@pytest.fixture(scope="module")
def volume():
    return sample_phantom(BLOBS, SHAPE, SPACING)[None, None].float()


def views_of(mode):
    pixel = 5.0 if mode == "parallel" else 7.5
    return tuple(View(angle, (32, 52), (pixel, pixel), mode) for angle in VIEW_SETS["8view"])


def relative(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("peer", "module", "mode", "tolerance", "correlation"),
    [
        # Both are Joseph's method in parallel mode: equal to rounding. In cone mode RTK interpolates in another order.
        # RTK's back-projector weighs a little differently from the transpose of its projector.
        ("RTK", "itk", "parallel", 1e-5, 0.99),
        ("RTK", "itk", "cone", 1e-3, 0.99),
        ("Astra", "astra", "parallel", 1e-5, 0.999999),
    ],
)
def test_peers_agree_on_image_and_adjoint(volume, monkeypatch, peer, module, mode, tolerance, correlation):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    pytest.importorskip(module, reason=f"{peer} is an optional oracle")
    sys.modules.pop("_peers", None)
    import _peers

    views = views_of(mode)
    try:
        other = getattr(_peers, peer)(views, SHAPE, SPACING, threads=1)
    except ImportError as error:
        pytest.skip(f"{peer} is an optional oracle: {error}")
    stack = other.forward(other.volume(volume[0, 0].numpy()))
    ours = project(volume, views, SPACING)
    assert relative(other.array(stack), ours[0, 0].numpy()) < tolerance
    theirs = other.volume_array(other.adjoint(stack))
    back = backproject(ours, views, SHAPE, SPACING)[0, 0].numpy()
    assert np.corrcoef(theirs.ravel(), back.ravel())[0, 1] > correlation


@pytest.mark.slow
def test_siddons_exact_path_lengths_in_a_cone(volume):
    """Siddon takes voxels for solid boxes, so it gets a grid four times as fine; any wrong sign is far off."""
    renderers = pytest.importorskip("diffdrr.renderers", reason="DiffDRR (wheel without dependencies) is optional")
    views = views_of("cone")
    fine = sample_phantom(BLOBS, tuple(4 * n for n in SHAPE), SPACING / 4).float().permute(2, 1, 0)
    images = []
    for view in views:
        origin, direction = (ray.float() for ray in pixel_rays(view))
        length = 1.2 * view.dsd_mm
        ends = torch.stack([origin, origin + length * direction])
        # Its rays count in voxels (x, y, z), with 0 at the centre of the first.
        source, target = (ends / (SPACING / 4) + (torch.tensor(fine.shape) - 1) / 2).flatten(1, 2)[:, None]
        image = renderers.Siddon()(fine, source, target, torch.full((1, 1, source.shape[1]), length))
        images.append(image.reshape(view.detector_shape))
    found, expected = project(volume, views, SPACING)[0, 0].numpy(), torch.stack(images).numpy()
    assert relative(found, expected) < 0.03
    assert min(relative(np.flip(found, axis), expected) for axis in (1, 2)) > 0.3
