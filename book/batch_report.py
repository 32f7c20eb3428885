"""What a batch did: what ran, what failed and why, times, memory, and what it cost.

    python book/batch_report.py runs/study/paper --price 2.50

Reads only what the jobs left on disk (their records, book/batch_job.py, and the plan that the Snakefile wrote) and
writes report.md and report.json beside them. GPU hours count every attempt, the failed and the killed too: they are
paid for as well.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from display import clock_text

from difr3ct_core.files import InputError, atomic_path, read_json, write_json

OUTCOMES = ("done", "failed", "killed", "running", "not started")


def read_jobs(base: Path) -> list[dict[str, Any]]:
    """One entry a job, those of the plan that never began too.

    Raises:
        InputError: the folder holds no record, or a damaged one.
    """
    planned = read_json(base / "plan.json")["jobs"] if (base / "plan.json").exists() else []
    paths = {str(path.relative_to(base)): path for path in base.rglob("records/*.json") if ".step." not in path.name}
    if not paths and not planned:
        raise InputError(f"{base}: holds no record of a job, expected the folder of a study; run `make study` first.")
    jobs = []
    for name in sorted({*paths, *planned}):
        words = name.removesuffix(".json").split("/")
        job: dict[str, Any] = {"job": "/".join(word for word in words if word != "records"), "outcome": "not started"}
        job |= {"attempts": 0, "seconds": 0.0, "gpu_hours": 0.0, "peak_gb": 0.0, "gpus": 0, "error": ""}
        if name in paths:
            try:
                attempts = read_json(paths[name])["attempts"]
                job["outcome"], job["error"] = attempts[-1]["outcome"], attempts[-1].get("error", "")
                job["attempts"] = len(attempts)
                job["seconds"] = sum(one["seconds"] for one in attempts)
                job["gpu_hours"] = sum(one["seconds"] * one["gpus"] for one in attempts) / 3600
                job["gpus"] = max(one["gpus"] for one in attempts)
                job["peak_gb"] = max(one.get("peak_gb", 0.0) for one in attempts)
            except (KeyError, IndexError, TypeError) as error:
                raise InputError(f"{paths[name]}: is no record of a job ({error}), remove it.") from error
        jobs.append(job)
    return jobs


def summary(jobs: list[dict[str, Any]], price: float) -> dict[str, Any]:
    """Totals of a batch; ``price`` is per GPU hour."""
    hours = sum(job["gpu_hours"] for job in jobs)
    return {
        **{outcome: sum(job["outcome"] == outcome for job in jobs) for outcome in OUTCOMES},
        "jobs": len(jobs),
        "hours": sum(job["seconds"] for job in jobs) / 3600,
        "gpu_hours": hours,
        "peak_gb": max((job["peak_gb"] for job in jobs), default=0.0),
        "price_per_gpu_hour": price,
        "cost": hours * price,
    }


def page(jobs: list[dict[str, Any]], total: dict[str, Any]) -> str:
    """The report as Markdown."""
    shown = ", ".join(f"{total[outcome]} {outcome}" for outcome in OUTCOMES if total[outcome])
    lines = [
        "# Report of a batch",
        "",
        f"{total['jobs']} jobs: {shown}. {total['hours']:.2f} hours of jobs, {total['gpu_hours']:.2f} GPU hours, "
        f"{total['cost']:.2f} at {total['price_per_gpu_hour']:.2f} per GPU hour; at most {total['peak_gb']:.1f} GB "
        "of memory in one job.",
    ]
    bad = [job for job in jobs if job["outcome"] in ("failed", "killed")]
    if bad:
        lines += ["", "## What failed, and why", ""]
        lines += [f"- **{job['job']}** ({job['outcome']}): {job['error'] or 'no reason recorded'}" for job in bad]
    lines += ["", "## Every job", "", "| job | outcome | attempts | time | memory, GB | GPUs | GPU hours | cost |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for job in jobs:
        cost = job["gpu_hours"] * total["price_per_gpu_hour"]
        lines.append(
            f"| {job['job']} | {job['outcome']} | {job['attempts']} | {clock_text(job['seconds'])} | "
            f"{job['peak_gb']:.2f} | {job['gpus']} | {job['gpu_hours']:.3f} | {cost:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the study and preset, such as runs/study/paper")
    parser.add_argument("--price", type=float, default=0.0, help="of one GPU hour, in your currency")
    options = parser.parse_args(arguments)
    try:
        if not options.price >= 0:
            raise InputError(f"price: found {options.price}, expected a number of at least 0.")
        jobs = read_jobs(options.folder)
        total = summary(jobs, options.price)
        write_json(options.folder / "report.json", {"total": total, "jobs": jobs})
        with atomic_path(options.folder / "report.md") as temporary:
            temporary.write_text(page(jobs, total), encoding="utf-8")
    except InputError as error:
        print(f"batch_report: {error}", file=sys.stderr)
        return 2
    print(page(jobs, total).split("## Every job")[0].strip())
    print(f"\nEvery job: {options.folder / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
