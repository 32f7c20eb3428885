"""show_volume: voxels, organs and picture agree, and no widget is touched outside JupyterLab."""

from __future__ import annotations

import base64
import builtins
import gzip
import io
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from difr3ct_core import viewer
from difr3ct_core.files import InputError
from difr3ct_core.viewer import MAX_VOXELS, PALETTE, VolumeFigure, poster, show_volume


@pytest.fixture(autouse=True)
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under papermill, whatever started the tests."""
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)


def chest(shape: tuple[int, int, int] = (6, 8, 10)) -> tuple[np.ndarray, np.ndarray]:
    """Air with a bone block at the patient's left, anterior, superior; its label is 7."""
    hu, labels = np.full(shape, -1000.0), np.zeros(shape, np.int16)
    corner = np.s_[shape[0] // 2 :, : shape[1] // 2, shape[2] // 2 :]
    hu[corner], labels[corner] = 500, 7
    return hu, labels


def embedded(html: str) -> tuple[dict[str, Any], np.ndarray, np.ndarray | None]:
    """Spec, voxels and organs as the browser reads them."""
    found = re.search(r'class="volume-spec">(.*?)</script>', html, re.S)
    data = re.search(r'class="volume-data">(.*?)</script>', html, re.S)
    assert found and data
    spec, raw = json.loads(found[1]), gzip.decompress(base64.b64decode(data[1]))
    count = int(np.prod(spec["shape"]))
    voxels = np.frombuffer(raw[: 2 * count], "<i2").reshape(spec["shape"])
    rest = np.frombuffer(raw[2 * count :], np.uint8)
    return spec, voxels, rest.reshape(spec["shape"]) if rest.size else None


def test_the_page_holds_the_volume_and_its_organs() -> None:
    hu, labels = chest()
    figure = show_volume(torch.from_numpy(hu), (5, 4, 3), labels, organs={"lung": 3, "bone": (7, 8)}, title="A <b>")
    assert isinstance(figure, VolumeFigure)
    spec, voxels, organs = embedded(figure.html)
    np.testing.assert_array_equal(voxels, hu)
    np.testing.assert_array_equal(organs, labels // 7)  # the absent lung takes no number and no colour
    assert (spec["spacing"], spec["organs"], spec["window"]) == ([5, 4, 3], ["bone"], [-1000, 500])
    assert [spec["colours"][key][1] for key in "RGB"] == list(PALETTE[0])
    assert "<b>" not in figure.html and "A &lt;b&gt;" in figure.html
    alt = re.search(r'alt="([^"]*)"', figure.html)
    assert alt and "bone" in alt[1] and "lung" not in alt[1]
    assert not re.search(r"(?i)(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", re.sub(r"base64,[^\"]*", "", figure.html))


def test_two_equal_figures_do_not_share_an_id() -> None:
    ids = [re.search(r'id="([^"]+)"', show_volume(chest()[0], 1).html) for _ in range(2)]
    assert ids[0] and ids[1] and ids[0][1] != ids[1][1]


def test_a_large_volume_is_averaged_over_the_same_field_of_view() -> None:
    grid = np.linspace(-1, 1, 40, dtype=np.float32)
    hu = 300 * (grid[:, None, None] + grid[:, None] ** 2 + grid) + 20
    labels = np.zeros(hu.shape, np.uint8)
    labels[20:] = 2
    spec, voxels, organs = embedded(show_volume(hu, (4.0, 4.0, 4.0), labels, max_voxels=20**3).html)
    assert organs is not None and voxels.shape == (20, 20, 20)
    np.testing.assert_allclose(np.array(spec["spacing"]) * voxels.shape, 160)
    blocks = hu.reshape(20, 2, 20, 2, 20, 2).mean((1, 3, 5))
    np.testing.assert_allclose(voxels, blocks, atol=0.51)
    np.testing.assert_array_equal(organs[:, 0, 0], [0] * 10 + [1] * 10)


def test_thick_slices_stay_as_they_are_when_the_plane_is_reduced() -> None:
    hu = np.random.default_rng(0).normal(0, 100, (10, 64, 64))
    spec, voxels, _ = embedded(show_volume(hu, (10.0, 1.0, 1.0), max_voxels=10 * 32 * 32).html)
    assert voxels.shape == (10, 32, 32) and spec["spacing"] == [10, 2, 2]
    assert abs(float(voxels.mean()) - hu.mean()) < 0.5


def test_no_page_starts_a_worker() -> None:
    """itk-vtk-viewer starts one from 2,000,000 voxels on, which a page opened as a file may not."""
    assert MAX_VOXELS < viewer.WORKER_VOXELS == 2_000_000
    with pytest.raises(InputError, match="max_voxels: found 2000000"):
        show_volume(chest()[0], 1, max_voxels=2_000_000)


def test_the_picture_has_each_plane_the_right_way_round() -> None:
    """The block is at the left, anterior, superior: right half up (coronal), right up (axial), left up (sagittal)."""
    hu, labels = chest((40, 40, 40))
    for numbers, colour in ((None, (255, 255, 255)), ((labels > 0).astype(np.uint8), None)):
        sheet = Image.open(io.BytesIO(poster(hu.astype("<i2"), numbers, (2, 2, 2), (-1000, 500)))).convert("RGB")
        pixels = np.asarray(sheet).astype(int)
        large, small = viewer._LARGE, (viewer._LARGE - viewer._GAP) // 2
        left, below = large + viewer._GAP, small + viewer._GAP
        planes = {
            "coronal": (pixels[:large, :large], (0, 1)),
            "axial": (pixels[:small, left:], (0, 1)),
            "sagittal": (pixels[below : below + small, left:], (0, 0)),
        }
        middle = hu.shape[1] // 2  # the coronal slice through it lies just behind the block: one voxel more is needed
        assert hu[:, middle - 1].max() == 500
        for name, (plane, bright) in planes.items():
            rows, columns = (np.array_split(np.arange(n), 2) for n in plane.shape[:2])
            quarters = {
                (r, c): plane[rows[r][20:-20]][:, columns[c][20:-20]].reshape(-1, 3).mean(0)
                for r in (0, 1)
                for c in (0, 1)
            }
            if name == "coronal":  # its middle slice is behind the block: nothing is there
                assert all(value.max() < 8 for value in quarters.values())
                continue
            for place, value in quarters.items():
                if place != bright:
                    assert value.max() < 8, (name, place)
                elif colour:
                    np.testing.assert_allclose(value, colour, atol=6)
                else:
                    mixed = 0.65 * 255 + 0.35 * np.array(PALETTE[0])
                    np.testing.assert_allclose(value, mixed, atol=12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"volume": np.zeros((4, 4))}, r"volume: found float64 with shape \(4, 4\), expected numbers \(z, y, x\)"),
        ({"volume": np.full((6, 8, 10), np.nan)}, "volume: found values that are not finite"),
        ({"spacing": (1, 0, 1)}, r"spacing: found \(1, 0, 1\), expected one positive number"),
        ({"spacing": (1, 2)}, "spacing: found"),
        ({"labels": np.zeros((2, 2, 2), int)}, r"labels: found int64 with shape \(2, 2, 2\)"),
        ({"labels": np.zeros((6, 8, 10))}, "labels: found float64"),
        ({"window": (500, -1000)}, "window: found"),
        ({"labels": None, "organs": {"a": 1}}, "organs: found names but no labels"),
        ({"labels": np.arange(480).reshape(6, 8, 10) % 20}, "organs: found more than 12"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    hu, labels = chest()
    with pytest.raises(InputError, match=message):
        show_volume(**{"volume": hu, "spacing": 1.0, "labels": labels, **change})


class _Imports:
    """Notes which packages are imported."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        real = builtins.__import__

        def noting(name: str, *arguments: Any, **options: Any) -> Any:
            self.seen.append(name.split(".")[0])
            return real(name, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", noting)


def fake_itk(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand-ins for itkwidgets and itkwasm that note what they are given."""
    calls: list[dict[str, Any]] = []
    widgets, wasm = types.ModuleType("itkwidgets"), types.ModuleType("itkwasm")
    widgets.view = lambda **given: calls.append(given) or "itk widget"  # type: ignore[attr-defined]
    wasm.image_from_array = lambda array: types.SimpleNamespace(data=array)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "itkwidgets", widgets)
    monkeypatch.setitem(sys.modules, "itkwasm", wasm)
    return calls


@pytest.mark.parametrize("environment", [{}, {"BOOK_STATIC": "1"}, {"JPY_SESSION_NAME": "a.ipynb", "BOOK_STATIC": "1"}])
def test_under_papermill_no_widget_is_imported_and_no_network_asked(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    """Importing itkwidgets there loses all later outputs, without an error."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = fake_itk(monkeypatch)
    monkeypatch.setattr(viewer, "_installed", lambda package: True)
    monkeypatch.setattr(viewer.socket, "create_connection", lambda *a, **k: pytest.fail("asked the network"))
    imports = _Imports(monkeypatch)
    assert isinstance(show_volume(*chest()[:1], 1), VolumeFigure)
    assert not calls and not {"itkwidgets", "ipyniivue"} & set(imports.seen)


def test_live_with_a_network_it_is_itkwidgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    monkeypatch.delenv("BOOK_STATIC", raising=False)
    calls = fake_itk(monkeypatch)
    monkeypatch.setattr(viewer, "_installed", lambda package: True)
    monkeypatch.setattr(viewer, "_online", lambda: True)
    hu, labels = chest()
    assert show_volume(hu, (5, 4, 3), labels) == "itk widget"
    (given,) = calls
    np.testing.assert_array_equal(given["image"].data, hu)
    np.testing.assert_array_equal(given["label_image"].data, labels // 7)
    assert given["image"].spacing == given["label_image"].spacing == [3, 4, 5]


def test_live_without_a_network_itkwidgets_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline it waits for its front end for ever; ipyniivue brings its own."""
    pytest.importorskip("ipyniivue")
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    monkeypatch.delenv("BOOK_STATIC", raising=False)
    calls = fake_itk(monkeypatch)
    monkeypatch.setattr(viewer, "_installed", lambda package: True)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(viewer.socket, "create_connection", refused)
    imports = _Imports(monkeypatch)
    hu, labels = chest()
    widget = show_volume(hu, (5, 4, 3), labels, organs={"bone": 7}, window=(-500, 300))
    assert not calls and "itkwidgets" not in imports.seen
    assert type(widget).__name__ == "NiiVue"
    ct, bone = widget.volumes
    assert (ct.cal_min, ct.cal_max) == (-500, 300) and bone.colormap_label is not None
    image = nib.Nifti1Image.from_bytes(ct.data)
    np.testing.assert_array_equal(np.asarray(image.dataobj), hu.transpose(2, 1, 0))
    # +x is left and +y posterior here, right and anterior in the file's axes.
    assert "".join(nib.aff2axcodes(image.affine)) == "LPS"
    np.testing.assert_allclose(image.header.get_zooms(), (3, 4, 5))


def test_live_without_any_widget_the_picture_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    monkeypatch.delenv("BOOK_STATIC", raising=False)
    monkeypatch.setattr(viewer, "_installed", lambda package: False)
    assert isinstance(show_volume(chest()[0], 1), VolumeFigure)


def test_the_probe_says_no_when_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "_ITK_HOST", ("127.0.0.1", 1))
    assert viewer._online() is False


def test_the_lock_holds_only_what_the_pages_load(root: Path) -> None:
    """The copied files are bundles: the 700 packages that they were built from are not fetched."""
    asked = json.loads((root / "package.json").read_text())["dependencies"]
    lock = json.loads((root / "package-lock.json").read_text())["packages"]
    packages = {name.removeprefix("node_modules/"): entry for name, entry in lock.items() if name}
    assert set(packages) == set(asked) == {"/".join(n.split("/")[: 2 if n[0] == "@" else 1]) for n in _asset_files()}
    for name, entry in packages.items():
        assert entry["version"] == asked[name] and entry["integrity"].startswith("sha512-")
        assert not {"dependencies", "optionalDependencies", "hasInstallScript"} & set(entry)


def _asset_files() -> list[str]:
    from build_html import ASSETS

    return list(ASSETS)
