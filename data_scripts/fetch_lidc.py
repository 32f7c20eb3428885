#!/usr/bin/env python3
"""Bring LIDC-IDRI (1018 chest CTs of 1010 patients, 128 GB, CC BY 3.0) or a part of it from the Imaging Data Commons.

    python data_scripts/fetch_lidc.py --count 20              the first 20 patients: shows the size, then asks
    python data_scripts/fetch_lidc.py --patients LIDC-IDRI-0003 LIDC-IDRI-0004 --yes
    python data_scripts/fetch_lidc.py --yes                   all of it
    python data_scripts/prepare_ct.py data/lidc               then: the cohort for the chapters

What there is stands in the index that comes with the package idc-index (`pip install -e ".[lidc]"`), so selection,
size and licence need no network. A series is downloaded beside its place, compared with the index (number of files,
bytes, series), noted with the SHA-256 of every file, and only then moved to OUT/PATIENT/SERIES: what is there is whole.
A run that was killed goes on with the next series; --verify reads every file again and compares its checksum.

Exit status: 0 the scans are there, 1 something is wrong, 2 not confirmed or bad arguments, 3 no network.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom

from difr3ct_core.files import InputError, alone_in, read_json, sha256, write_json
from difr3ct_core.progress import progress

EXIT_WRONG, EXIT_REFUSED, EXIT_UNAVAILABLE = 1, 2, 3
RECORD = "checksums.json"
CITATION = (
    "Armato SG III et al. Data From LIDC-IDRI. The Cancer Imaging Archive, 2015. doi:10.7937/K9/TCIA.2015.LO9QL9SX",
    "Fedorov A et al. National Cancer Institute Imaging Data Commons: toward transparency, reproducibility, and "
    "scalability in imaging artificial intelligence. RadioGraphics 43(12), 2023. doi:10.1148/rg.230180",
)


class Unavailable(Exception):
    """The network or the archive cannot be reached."""


@dataclass(frozen=True)
class Series:
    """One CT series of the index.

    Attributes:
        patient: PatientID.
        uid: SeriesInstanceUID.
        url: where its files lie.
        files: how many.
        megabytes: 10^6 bytes of all files together.
        licence: short name.
    """

    patient: str
    uid: str
    url: str
    files: int
    megabytes: float
    licence: str

    @property
    def place(self) -> Path:
        """Its folder below that of the data set.

        Raises:
            InputError: the index names something that could lie elsewhere.
        """
        for name in (self.patient, self.uid):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise InputError(
                    f"index of idc-index: found the name {name!r}, expected letters, digits, dot and dash."
                )
        return Path(self.patient) / self.uid


#: Puts the files of a series into a folder.
Download = Callable[[Series, Path], None]


def read_index() -> list[Series]:
    """All CT series of LIDC-IDRI, by patient; from the index on disk, without a network.

    Raises:
        InputError: idc-index is not installed.
    """
    try:
        import duckdb
        import idc_index_data
    except ImportError as error:
        raise InputError(
            f"{error.name}: is not installed, expected the package idc-index; run pip install -e '.[lidc]'."
        ) from error
    # The index covers all collections; a query on the file reads the few columns and rows that are wanted.
    rows = duckdb.execute(
        "select PatientID, SeriesInstanceUID, series_aws_url, instanceCount, series_size_MB, license_short_name "
        "from read_parquet(?) where collection_id = 'lidc_idri' and Modality = 'CT' "
        "order by PatientID, SeriesInstanceUID",
        [str(idc_index_data.IDC_INDEX_PARQUET_FILEPATH)],
    ).fetchall()
    return [Series(*row) for row in rows]


def select(index: Sequence[Series], patients: Sequence[str] | None = None, count: int | None = None) -> list[Series]:
    """The series of some patients: those named, else the first ``count``, else all. All series of each.

    Raises:
        InputError: an unknown patient, a number out of range, or both given.
    """
    known = list(dict.fromkeys(one.patient for one in index))
    if patients and count is not None:
        raise InputError("--patients and --count: found both, expected one of them.")
    if count is not None and not 1 <= count <= len(known):
        raise InputError(f"--count: found {count}, expected 1 to {len(known)} patients.")
    if unknown := sorted(set(patients or ()) - set(known)):
        raise InputError(f"--patients: found {', '.join(unknown)}, expected names from {known[0]} to {known[-1]}.")
    chosen = set(patients or known[:count])
    return [one for one in index if one.patient in chosen]


def is_complete(folder: Path, series: Series, verify: bool = False) -> bool:
    """Whether a folder holds a series: number and sizes of its files, with ``verify`` also their checksums."""
    try:
        listed = read_json(folder / RECORD)["files"]
        found = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != RECORD}
        if found != {name: entry["bytes"] for name, entry in listed.items()} or len(found) != series.files:
            return False
        return not verify or all(sha256(folder / name) == entry["sha256"] for name, entry in listed.items())
    except (InputError, OSError, KeyError, TypeError, AttributeError):
        return False


def describe(chosen: Sequence[Series], missing: Sequence[Series], out: Path) -> str:
    """What would be downloaded, how large it is, and under which licence."""
    patients = len({one.patient for one in chosen})
    licences = ", ".join(f"{name} ({n} series)" for name, n in sorted(Counter(s.licence for s in chosen).items()))
    return (
        f"LIDC-IDRI: {patients} patients, {len(chosen)} CT series, {sum(s.megabytes for s in chosen) / 1e3:.2f} GB; "
        f"of these {len(missing)} series, {sum(s.megabytes for s in missing) / 1e3:.2f} GB, are not in {out} yet.\n"
        f"Licence: {licences}. Cite:\n  " + "\n  ".join(CITATION)
    )


def require_room(out: Path, missing: Sequence[Series]) -> None:
    """Refuse to begin what cannot end."""
    existing = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    need, free = sum(one.megabytes for one in missing) * 1e6 * 1.01, shutil.disk_usage(existing).free
    if need > free:
        raise InputError(
            f"{out}: has room for {free / 1e9:.2f} GB, expected {need / 1e9:.2f} GB for {len(missing)} series; free "
            "some space, choose another --out, or fewer patients with --count."
        )


def fetch(series: Series, out: Path, download: Download) -> None:
    """One series, whole or not at all.

    Raises:
        Unavailable: nothing arrived.
        InputError: something else than the index says, or the disk is full.
    """
    folder = out / series.place
    try:
        with tempfile.TemporaryDirectory(prefix=".fetch.", dir=out) as name:
            partial = Path(name) / "series"
            partial.mkdir()
            download(series, partial)
            files = sorted(p for p in partial.rglob("*") if p.is_file())
            _check(series, files)
            record = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
            write_json(partial / RECORD, {"series": series.uid, "url": series.url, "files": record})
            folder.parent.mkdir(parents=True, exist_ok=True)
            if folder.exists():
                os.replace(folder, Path(name) / "old")
            os.replace(partial, folder)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); what was there is untouched, run again when "
            "there is room and permission."
        ) from error


def _check(series: Series, files: Sequence[Path]) -> None:
    if not files:
        raise Unavailable("nothing arrived")
    size = sum(path.stat().st_size for path in files)
    # The index gives 10^-6 MB, which is a byte; one more for the rounding of its floating-point sum.
    if len(files) != series.files or abs(size - series.megabytes * 1e6) > 2:
        raise InputError(
            f"{series.patient}, series {series.uid}: {len(files)} files of {size} bytes arrived, expected "
            f"{series.files} of {series.megabytes * 1e6:.0f}; nothing of it was kept, run again."
        )
    for path in files:
        try:
            found = str(pydicom.dcmread(path, stop_before_pixels=True).SeriesInstanceUID)
        except Exception as error:  # pydicom raises many types for damaged bytes
            raise InputError(
                f"{series.patient}: {path.name} is not a DICOM image ({type(error).__name__}); run again."
            ) from error
        if found != series.uid:
            raise InputError(f"{series.patient}: {path.name} is of series {found}, expected {series.uid}; run again.")


def idc_download() -> Download:
    """The download of idc-index.

    Raises:
        InputError: idc-index is not installed.
    """
    try:
        from idc_index import IDCClient
    except ImportError as error:
        raise InputError(f"{error.name}: is not installed; run pip install -e '.[lidc]'.") from error
    client: list[IDCClient] = []

    def download(series: Series, folder: Path) -> None:
        if not client:
            bucket = series.url.removeprefix("s3://").partition("/")[0]
            try:
                urllib.request.urlopen(f"https://{bucket}.s3.amazonaws.com/?max-keys=0", timeout=20).close()
            except urllib.error.HTTPError:
                pass  # it answered
            except OSError as error:
                # idc-index would try for minutes, and only log that it failed.
                raise Unavailable(str(getattr(error, "reason", error))) from error
            client.append(IDCClient())
        client[0].download_dicom_series(series.uid, str(folder), quiet=True, show_progress_bar=False, dirTemplate=None)

    return download


def confirmed(yes: bool) -> bool:
    """``--yes``, or an answer at the terminal.

    Raises:
        InputError: neither.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise InputError("nothing was downloaded: there is no terminal to ask at; add --yes to go on.")
    return input("Download? [y/N] ").strip().lower() in ("y", "yes")


def main(
    arguments: list[str] | None = None, index: Sequence[Series] | None = None, download: Download | None = None
) -> int:
    """Command line; returns the exit code. ``index`` and ``download`` replace those of idc-index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/lidc"), help="folder (default data/lidc)")
    parser.add_argument("--patients", nargs="+", metavar="ID", help="patients, such as LIDC-IDRI-0003")
    parser.add_argument("--count", type=int, help="the first so many patients")
    parser.add_argument("--yes", action="store_true", help="download without asking")
    parser.add_argument("--verify", action="store_true", help="compare the checksums of what is there already")
    options = parser.parse_args(arguments)
    out = options.out
    try:
        chosen = select(read_index() if index is None else index, options.patients, options.count)
        done = progress(chosen, "looking at what is there")
        missing = [one for one in done if not is_complete(out / one.place, one, options.verify)]
        print(describe(chosen, missing, out), flush=True)
        if not missing:
            print(f"{out}: all of it is there.")
            return 0
        require_room(out, missing)
        if not confirmed(options.yes):
            print("Nothing was downloaded.")
            return EXIT_REFUSED
    except InputError as error:
        print(f"fetch_lidc: {error}", file=sys.stderr)
        return EXIT_REFUSED
    wrong = 0
    try:
        with alone_in(out, "the other download"):
            _remove_leftovers(out)
            download = download or idc_download()
            for one in progress(missing, "LIDC-IDRI", len(chosen), len(chosen) - len(missing)):
                try:
                    require_room(out, [one])
                    fetch(one, out, download)
                except InputError as error:
                    wrong += 1
                    print(f"fetch_lidc: {error}", file=sys.stderr)
            write_json(out / "SOURCE.json", {"collection": "LIDC-IDRI", "cite": CITATION,
                                             "licence": sorted({one.licence for one in chosen})})  # fmt: skip
    except InputError as error:
        print(f"fetch_lidc: {error}", file=sys.stderr)
        return EXIT_WRONG
    except Unavailable as error:
        print(
            f"fetch_lidc: the Imaging Data Commons cannot be reached ({error}), expected a network; what was "
            "downloaded is kept, run again with one.",
            file=sys.stderr,
        )
        return EXIT_UNAVAILABLE
    print(
        f"{out}: {len(chosen) - wrong} series are there, {wrong} failed; next: python data_scripts/prepare_ct.py {out}"
    )
    return EXIT_WRONG if wrong else 0


def _remove_leftovers(out: Path) -> None:
    """Remove what a killed run left: nobody else is at work here, the folder is locked."""
    for old in out.glob(".fetch.*"):
        shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
