"""X-rays as files: round trips to half a count, orientation, DICOM conventions, and every kind of bad file."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from difr3ct_core.drr import project
from difr3ct_core.files import InputError
from difr3ct_core.geometry import View, views_to_json, world_to_detector
from difr3ct_core.xrays import read_xrays, write_xrays

SHAPE = (12, 17)
VIEWS = (View(0.0, SHAPE, (2.0, 3.0)), View(90.0, SHAPE, (2.0, 3.0), offset_mm=(1.5, -4.0)))


def images(seed: int = 0, low: float = 0.0, high: float = 6.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(len(VIEWS), *SHAPE, generator=generator)


def write_views(folder: Path, intensity: object, views=VIEWS) -> Path:
    path = folder / "views.json"
    path.write_text(json.dumps(views_to_json(views) | {"intensity": intensity}))
    return path


def write_dicom(path: Path, counts: np.ndarray, bits: int = 12, **tags) -> Path:
    """A digital radiograph; ``counts`` has the superior row first."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Modality, data.PhotometricInterpretation = "DX", "MONOCHROME2"
    data.Rows, data.Columns, data.SamplesPerPixel = *counts.shape[-2:], 1
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, bits, bits - 1
    data.PixelRepresentation = int(counts.dtype.kind == "i")
    data.PixelData = counts.astype("<i2" if counts.dtype.kind == "i" else "<u2").tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("low", [0.0, -0.2, 3.0])
def test_png_comes_back_within_half_a_count(tmp_path: Path, low: float):
    original = images(low=low)
    record = json.loads(write_xrays(tmp_path, original, VIEWS, meta={"patient": "p7"}).read_text())
    per_count = record["intensity"]["per_count"]
    assert per_count < 1.1e-4
    found = read_xrays(tmp_path)
    # The last term is the rounding of a float32 of this size.
    assert float((found.images - original).abs().max()) <= per_count / 2 + 1e-6
    assert found.views == VIEWS and found.meta["patient"] == "p7"
    with Image.open(tmp_path / "view_000.png") as image:
        assert image.mode == "I;16" and image.size == SHAPE[::-1]


def test_png_with_a_given_scale_is_exact_on_it(tmp_path: Path):
    counts = torch.randint(0, 60000, (2, *SHAPE), generator=torch.Generator().manual_seed(1))
    write_xrays(tmp_path, counts * 1e-4, VIEWS, per_count=1e-4)
    with Image.open(tmp_path / "view_001.png") as image:
        np.testing.assert_array_equal(np.array(image), counts[1].numpy()[::-1])
    with pytest.raises(InputError, match=r"per_count: found 1e-05, .* use at least"):
        write_xrays(tmp_path, counts * 1e-4, VIEWS, per_count=1e-5)


def test_npz_is_exact_and_is_not_flipped(tmp_path: Path):
    original = images(low=-0.1)
    write_xrays(tmp_path, original, VIEWS, "npz")
    assert torch.equal(read_xrays(tmp_path).images, original)
    assert torch.equal(read_xrays(tmp_path / "xrays.npz", tmp_path / "views.json").images, original)


def test_files_may_be_named_one_by_one_in_the_order_of_the_views(tmp_path: Path):
    write_xrays(tmp_path, images(), VIEWS)
    paths = [tmp_path / f"view_00{i}.png" for i in (1, 0)]
    swapped = read_xrays(paths, tmp_path / "views.json")
    torch.testing.assert_close(swapped.images.flip(0), read_xrays(tmp_path).images)


def test_a_landmark_high_on_the_left_is_where_the_geometry_puts_it(tmp_path: Path):
    """A dense voxel superior, left and posterior: in PNG and DICOM it lies near the top, in the array near the end."""
    mu = torch.full((1, 1, 12, 20, 16), 1e-4)
    mu[0, 0, 10, 15, 13] = 0.05
    point = (torch.tensor([13.0, 15.0, 10.0]) - (torch.tensor([16.0, 20.0, 12.0]) - 1) / 2) * 10
    views = tuple(View(angle, (12, 22), (10.0, 10.0)) for angle in (0.0, 90.0))
    xrays = project(mu, views, 10.0)[0, 0]
    write_xrays(tmp_path, xrays, views)
    back = read_xrays(tmp_path).images
    for index, view in enumerate(views):
        v, u = world_to_detector(point, view).round().int().tolist()
        assert v == 10, "superior is a high row"
        assert np.unravel_index(int(back[index].argmax()), back[index].shape) == (v, u)
        with Image.open(tmp_path / f"view_00{index}.png") as image:
            stored = np.array(image)
        assert np.unravel_index(stored.argmax(), stored.shape) == (11 - v, u), "and near the top of the picture"
        write_dicom(tmp_path / f"{index}.dcm", (stored // 16).astype(np.uint16))
    json_path = write_views(tmp_path, {"meaning": "line_integrals", "per_count": 0.01}, views)
    dicom = read_xrays([tmp_path / "0.dcm", tmp_path / "1.dcm"], json_path).images
    assert [int(i.argmax()) for i in dicom] == [int(i.argmax()) for i in back]


def test_transmission_is_the_logarithm_against_the_open_beam(tmp_path: Path):
    """8-bit and 16-bit counts of the same exposure; a count of 0 reads as a half."""
    path = write_views(tmp_path, {"meaning": "transmission", "i0": 250.0})
    counts = np.random.default_rng(0).integers(1, 251, (2, *SHAPE))
    counts[0, 3, 4] = 0
    for depth in (np.uint8, np.uint16):
        for index, image in enumerate(counts):
            Image.fromarray(image.astype(depth)).save(tmp_path / f"{index}.png")
        found = read_xrays([tmp_path / "0.png", tmp_path / "1.png"], path).images
        expected = -np.log(np.maximum(counts[:, ::-1], 0.5) / 250.0)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-7)
        assert float(found.max()) == pytest.approx(np.log(500))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_grey_images_saved_as_colour_are_taken(tmp_path: Path, mode: str):
    path = write_views(tmp_path, {"meaning": "line_integrals", "per_count": 0.02}, VIEWS[:1])
    counts = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)
    grey = Image.fromarray(counts)
    picture = grey.quantize(256) if mode == "P" else grey.convert(mode)
    picture.save(tmp_path / "a.png")
    found = read_xrays(tmp_path / "a.png", path).images[0].numpy()
    np.testing.assert_allclose(found, counts[::-1] * 0.02, atol=0.021 if mode == "P" else 1e-6)


def test_dicom_rescale_sign_and_photometric_interpretation(tmp_path: Path):
    counts = np.random.default_rng(0).integers(0, 4096, SHAPE).astype(np.uint16)
    line = write_views(tmp_path, {"meaning": "line_integrals", "per_count": 0.001}, VIEWS[:1])
    flipped = counts[::-1].astype(float)

    def read(**tags) -> np.ndarray:
        return read_xrays(write_dicom(tmp_path / "a.dcm", counts, **tags), line).images[0].numpy()

    np.testing.assert_allclose(read(), flipped * 0.001, rtol=1e-6)
    np.testing.assert_allclose(read(RescaleSlope=0.5, RescaleIntercept=100), (flipped * 0.5 + 100) * 0.001, rtol=1e-6)
    # White bone in MONOCHROME1 is a small number: line integrals grow the other way.
    inverted = (4095 - flipped) * 0.001
    np.testing.assert_allclose(read(PhotometricInterpretation="MONOCHROME1"), inverted, rtol=1e-6, atol=1e-9)
    # A stated sign decides, whatever the display.
    np.testing.assert_allclose(read(PixelIntensityRelationshipSign=1), inverted, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        read(PhotometricInterpretation="MONOCHROME1", PixelIntensityRelationshipSign=-1), flipped * 0.001, rtol=1e-6
    )

    counts = np.maximum(counts, 1)
    photons = write_views(tmp_path, {"meaning": "transmission", "i0": 4096.0}, VIEWS[:1])
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        path = write_dicom(tmp_path / "a.dcm", counts, PhotometricInterpretation=photometric)
        found = read_xrays(path, photons).images[0].numpy()
        np.testing.assert_allclose(found, -np.log(counts[::-1] / 4096.0), rtol=1e-5, atol=1e-6)
    write_dicom(tmp_path / "a.dcm", counts, PixelIntensityRelationshipSign=-1)
    with pytest.raises(InputError, match="numbers fall with intensity"):
        read_xrays(tmp_path / "a.dcm", photons)


def test_signed_dicom(tmp_path: Path):
    counts = np.random.default_rng(0).integers(-2000, 2000, SHAPE).astype(np.int16)
    path = write_views(tmp_path, {"meaning": "line_integrals", "per_count": 0.001, "zero_count": -2048}, VIEWS[:1])
    found = read_xrays(write_dicom(tmp_path / "a.dcm", counts), path).images[0].numpy()
    np.testing.assert_allclose(found, (counts[::-1] + 2048.0) * 0.001, rtol=1e-6)
    write_dicom(tmp_path / "a.dcm", counts, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(
        read_xrays(tmp_path / "a.dcm", path).images[0].numpy(), (2047.0 - counts[::-1]) * 0.001, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"Modality": "CT"}, "modality CT, expected a planar x-ray"),
        ({"NumberOfFrames": 3}, "holds 3 frames"),
        ({"PhotometricInterpretation": "RGB"}, "is RGB, expected MONOCHROME1"),
        ({"PixelData": b"\0" * 20}, "cannot be read as DICOM"),
    ],
)
def test_unfit_dicom_is_named(tmp_path: Path, tags: dict, message: str):
    path = write_views(tmp_path, {"meaning": "line_integrals", "per_count": 0.001}, VIEWS[:1])
    write_dicom(tmp_path / "bad.dcm", np.arange(SHAPE[0] * SHAPE[1], dtype=np.uint16).reshape(SHAPE), **tags)
    with pytest.raises(InputError, match=rf"bad\.dcm: .*{message}"):
        read_xrays(tmp_path / "bad.dcm", path)


def png_with_header(depth: int, colour: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", SHAPE[1], SHAPE[0], depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def test_unfit_files_are_named(tmp_path: Path):
    path = write_views(tmp_path, {"meaning": "line_integrals", "per_count": 0.02}, VIEWS[:1])
    bad = tmp_path / "bad.png"

    def refuses(message: str, target: Path = bad) -> None:
        with pytest.raises(InputError, match=rf"{target.name}: .*{message}"):
            read_xrays(target, path)

    refuses("no such file")
    bad.write_bytes(b"")
    refuses("is empty")
    bad.write_bytes(b"GIF89a whatever")
    refuses("neither PNG, NPZ nor DICOM")
    bad.write_bytes(png_with_header(16, 2))
    refuses("16-bit PNG in colour")
    bad.write_bytes(png_with_header(1, 0))
    refuses("1-bit PNG of 1 bits")
    bad.write_bytes(png_with_header(16, 0)[:20])
    refuses("truncated PNG")

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 60000, SHAPE).astype(np.uint16)).save(bad)
    bad.write_bytes(bad.read_bytes()[:-60])
    refuses("cannot be read as PNG .* truncated")
    Image.fromarray(rng.integers(0, 256, (*SHAPE, 3)).astype(np.uint8)).save(bad)
    refuses("channels differ")
    clear = np.full((*SHAPE, 4), 7, np.uint8)
    Image.fromarray(clear).save(bad)
    refuses("transparent pixels")
    Image.fromarray(np.full(SHAPE, 9, np.uint8)).save(bad)
    refuses("every pixel is 9")

    wrong = tmp_path / "bad.npz"
    good = np.random.default_rng(0).random((1, *SHAPE), dtype=np.float32)
    broken = good.copy()
    broken[0, 2, 3] = np.nan
    for arrays, message in (
        ({"xrays": broken}, "1 pixels are NaN"),
        ({"a": good, "b": good}, "expected an array 'xrays'"),
        ({"xrays": good[None]}, r"float32 of shape \(1, 1, 12, 17\)"),
        ({"xrays": good > 0.5}, "holds bool"),
        ({"xrays": -9000 * good}, "line integrals from -.* expected 0 to about 20"),
        ({"xrays": 60000 * good}, "line integrals from .* per_count"),
    ):
        np.savez(wrong, **arrays)
        refuses(message, wrong)
    np.savez(wrong, xrays=good)
    wrong.write_bytes(wrong.read_bytes()[:100])
    refuses("cannot be read as NPZ", wrong)


def test_negative_intensities_are_named(tmp_path: Path):
    path = write_views(tmp_path, {"meaning": "transmission", "i0": 1.0}, VIEWS[:1])
    np.savez(tmp_path / "a.npz", xrays=np.random.default_rng(0).normal(size=SHAPE))
    with pytest.raises(InputError, match=r"a\.npz: found intensities down to -.* are these line integrals"):
        read_xrays(tmp_path / "a.npz", path)


def test_count_and_size_that_do_not_match_the_views_are_named_with_advice(tmp_path: Path):
    write_xrays(tmp_path, images(), VIEWS)
    views = tmp_path / "views.json"
    with pytest.raises(InputError, match=r"found 1 images in 1 files, but .*views\.json has 2 views"):
        read_xrays(tmp_path / "view_000.png", views)
    with pytest.raises(InputError, match="found no file"):
        read_xrays([], views)
    for shape, advice in (
        ((17, 12), "12 x 17; the image seems to lie on its side"),
        ((24, 34), r"or set detector_shape \[24, 34\] and pixel_mm \[1, 1.5\]"),
        ((12, 16), "has 12 x 16 pixels .* crop or pad"),
    ):
        Image.fromarray(np.random.default_rng(0).integers(0, 999, shape).astype(np.uint16)).save(tmp_path / "odd.png")
        with pytest.raises(InputError, match=rf"odd\.png.*{advice}"):
            read_xrays([tmp_path / "view_000.png", tmp_path / "odd.png"], views)


@pytest.mark.parametrize(
    ("intensity", "message"),
    [
        (None, "found None, expected"),
        ({"meaning": "hounsfield"}, "add what the pixel values mean"),
        ({"meaning": "line_integrals"}, "expected 'meaning' and 'per_count'"),
        ({"meaning": "transmission", "per_count": 1.0}, "expected 'meaning' and 'i0'"),
        ({"meaning": "transmission", "i0": 0}, "i0: found 0, expected a positive"),
        ({"meaning": "line_integrals", "per_count": "1e-4"}, "per_count: found '1e-4'"),
        ({"meaning": "line_integrals", "per_count": 1, "gamma": 2}, "gamma"),
    ],
)
def test_unclear_intensities_are_named(tmp_path: Path, intensity: object, message: str):
    write_xrays(tmp_path, images(), VIEWS)
    write_views(tmp_path, intensity)
    with pytest.raises(InputError, match=rf"views\.json\.intensity.*{message}"):
        read_xrays([tmp_path / "view_000.png", tmp_path / "view_001.png"], tmp_path / "views.json")


def test_the_json_is_named_when_it_is_missing_or_something_else(tmp_path: Path):
    write_xrays(tmp_path, images(), VIEWS)
    record = json.loads((tmp_path / "views.json").read_text())
    (tmp_path / "views.json").write_text(json.dumps({k: v for k, v in record.items() if k != "files"}))
    with pytest.raises(InputError, match="lists no files of x-rays"):
        read_xrays(tmp_path)
    (tmp_path / "views.json").write_text("[1, 2")
    with pytest.raises(InputError, match=r"views\.json: is not valid JSON"):
        read_xrays(tmp_path)
    (tmp_path / "views.json").unlink()
    with pytest.raises(InputError, match=r"views\.json: no such file, expected the views"):
        read_xrays(tmp_path)


def test_writing_refuses_what_could_not_be_read_and_leaves_no_json_behind(tmp_path: Path, monkeypatch):
    with pytest.raises(InputError, match="images: found shape"):
        write_xrays(tmp_path, images()[:1], VIEWS)
    with pytest.raises(InputError, match="NaN or infinity"):
        write_xrays(tmp_path, images() * float("nan"), VIEWS)
    with pytest.raises(InputError, match="file_format: found 'tiff'"):
        write_xrays(tmp_path, images(), VIEWS, "tiff")
    with pytest.raises(InputError, match=r"reserved names \['views'\]"):
        write_xrays(tmp_path, images(), VIEWS, meta={"views": 3})
    assert not list(tmp_path.iterdir())
    write_xrays(tmp_path, images(), VIEWS)

    def full(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(KeyboardInterrupt):
        write_xrays(tmp_path, images(seed=4), VIEWS)
    # The old images stand, but nothing claims any more that they are a whole set.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["view_000.png", "view_001.png"]
