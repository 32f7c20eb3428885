"""Reading and writing files so that nothing is ever half there.

Every write of the project goes through :func:`atomic_path`: the bytes go to a temporary name
in the same folder and are renamed when complete. A killed process or a full disk therefore
leaves either the old file or the new one. Every error about a user's input is an
:class:`InputError`, one sentence that names the file or argument, what was found, what was
expected, and what to do; the command line prints it without a traceback.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class InputError(ValueError):
    """Bad input from a user: the message is one clear sentence, fit to print without a traceback."""


#: Name of the checksum among the metadata of a safetensors file.
_CHECKSUM = "content_sha256"
_FULL = "{}: no space left on the device; nothing was changed. Free some space and run again."


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it to ``path`` if the block ends without an error.

    Args:
        path: where the finished file shall be. Its folder is made if missing.

    Yields:
        a path in the same folder (same suffix, so that writers which look at it work).

    Raises:
        InputError: the folder cannot be written, or the device is full. The temporary file is removed
            and an earlier ``path`` is left as it was.
    """
    path = Path(path)
    temporary, descriptor = None, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix, suffix = f".{path.name[:40]}.", ".tmp" + "".join(path.suffixes[-2:])
        _remove_leftovers(path.parent, prefix, suffix)
        descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
        temporary = Path(name)
        _lock(descriptor)  # held until the end, and released by the system if this process is killed
        # mkstemp makes 0600 files; a result should be as readable as any other file of the user.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # also a quota, or a limit on the size of files
            raise InputError(_FULL.format(path)) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); choose a folder that you may write to."
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise InputError(
                f"{path}: a file stands where a folder is needed; remove it or choose another folder."
            ) from error
        raise
    except SafetensorError as error:  # its writer wraps the system's error in a text
        if not any(words in str(error) for words in ("No space left", "quota exceeded", "File too large")):
            raise
        raise InputError(_FULL.format(path)) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if descriptor is not None:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file without waiting; False if another writer holds it or the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_leftovers(folder: Path, prefix: str, suffix: str) -> None:
    """Remove temporary files of writers that were killed: those that nobody holds a lock on."""
    for leftover in folder.iterdir():
        if leftover.name.startswith(prefix) and leftover.name.endswith(suffix):
            with contextlib.suppress(OSError), open(leftover, "rb") as handle:
                if _lock(handle.fileno()):
                    leftover.unlink()


@contextlib.contextmanager
def alone_in(folder: str | Path, work: str) -> Iterator[None]:
    """Hold a folder for one writer: two runs into one folder would each replace what the other has written.

    The lock is on the folder itself, so no file is left behind, and the system releases it when the process ends,
    however it ends. File systems without such locks (some network ones) give no protection, and no error.

    Args:
        folder: made if missing.
        work: what the writer does, for the message, such as "a training".

    Raises:
        InputError: another process holds the folder, or it cannot be made.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be used ({error.strerror}), expected a folder for {work}; choose another one."
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another process is at work there, expected this to be the only one; wait until {work} "
                "has ended, or choose another folder."
            ) from None
        except OSError:
            pass  # no locks there
        yield
    finally:
        os.close(handle)


def require_file(path: str | Path, what: str) -> Path:
    """Return ``path`` if it is a non-empty file, or raise an :class:`InputError` that says what was expected there."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected {what}.")
    if not path.exists():
        raise InputError(f"{path}: no such file, expected {what}; check the path.")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: is empty (0 bytes), expected {what}; make or copy it again.")
    return path


def sha256(path: str | Path) -> str:
    """SHA-256 of a file as a hexadecimal string."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON (UTF-8). NaN and infinity are refused: they are not JSON."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path, what: str = "a JSON file") -> Any:
    """Read JSON; ``what`` names the expected content in the error."""
    path = require_file(path, what)
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON ({error}), expected {what}; make it again.") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"holds {name}, which is not JSON")


def write_npz(path: str | Path, **arrays: np.ndarray) -> None:
    """Write named arrays as a compressed NPZ. Object arrays, which would need pickle, are refused."""
    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise TypeError(f"array {name!r} holds Python objects, which only pickle could store")
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, **arrays)


def read_npz(path: str | Path, required: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Read all arrays of an NPZ, without pickle.

    Raises:
        InputError: missing, truncated, not an NPZ, holds pickled objects, or lacks a ``required`` name.
    """
    path = require_file(path, "an NPZ file")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no archive of named arrays but a single array, another format, or cut off")
        # Each member is read to its end: only there does the archive's checksum tell whether its bytes are right, and
        # NumPy alone would stop before it where a damaged header promises a smaller array.
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        arrays = {name.removesuffix(".npy"): _read_array(data) for name, data in members.items()}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(
            f"{path}: cannot be read as NPZ ({error}); it may be truncated, make or copy it again."
        ) from error
    except Exception as error:  # zlib.error and struct.error have no common base class
        raise InputError(f"{path}: is damaged ({type(error).__name__}: {error}); make or copy it again.") from error
    missing = [name for name in required if name not in arrays]
    if missing:
        raise InputError(f"{path}: holds {sorted(arrays)}, expected {list(required)}; missing {missing}.")
    return arrays


def _read_array(data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)
    array = np.lib.format.read_array(stream, allow_pickle=False)
    if stream.tell() != len(data):
        raise ValueError("an array is followed by other bytes")
    return array


def _content_digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, types, shapes and bytes of all tensors, and of the metadata."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_safetensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors with JSON-encoded metadata values, atomically, and a checksum of it all: the format has none."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={**texts, _CHECKSUM: _content_digest(plain, texts)})


def read_safetensors(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read tensors and metadata written by :func:`write_safetensors`, and compare them with their checksum.

    Files of other programs, and older ones, have no checksum and are read without it.

    Raises:
        InputError: missing, truncated, changed since it was written, or another format (pickled ``.pt`` files are
            refused unread).
    """
    path = require_file(path, "weights in safetensors format")
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
            texts = handle.metadata() or {}
        checksum = texts.pop(_CHECKSUM, None)
        if checksum is not None and checksum != _content_digest(tensors, texts):
            raise ValueError("its content does not have the checksum that was stored with it")
        metadata = {key: json.loads(value) for key, value in texts.items()}
    except Exception as error:  # its reader raises errors of many libraries for damaged headers
        raise InputError(
            f"{path}: is not a complete safetensors file ({error}); it may be truncated or of another format, "
            "train again or copy it again (pickled .pt files are never loaded)."
        ) from error
    return {name: tensor.to(device) for name, tensor in tensors.items()}, metadata
