"""The jobs of a study: chapters, and the models that they need, over views x cohorts x baselines x seeds.

The Snakefile asks this module what there is to do and what each job depends on; Snakemake decides when and where.
Standard library and PyYAML only: Snakemake reads the Snakefile again for every job on another machine, and must not
load torch for it. For the same reason errors are :class:`StudyError` and not the library's ``InputError``.

Folders of a study::

    OUT/PRESET/COHORT/seed-SEED/models/      vqgan, ldm-VIEWS: trained once, linked into the runs below
    OUT/PRESET/COHORT/seed-SEED/CASE/        run folder of the chapters of one case: results/, executed/
    OUT/PRESET/COHORT/seed-SEED/records/     what every job left: outcome, time, memory, GPUs (batch_report.py)

CASE is "all", or the set of views, or views and baseline ("2view-naf").
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AXES = ("views", "baseline")
MODELS = ("vqgan", "ldm-8view", "ldm-4view", "ldm-2view", "ldm-1view_frontal", "ldm-1view_lateral", "ldm-any")
_LISTS = ("cohorts", "seeds", "views")
_WORDS = ("preset", "out", "data", "done", "device")
_KINDS = ("gpus", "threads", "mem_mb", "minutes")


class StudyError(ValueError):
    """A study that cannot be run; one sentence for the user."""


@dataclass(frozen=True)
class Job:
    """One job: a model to train, or a chapter to run."""

    cohort: str
    seed: int
    name: str  # "vqgan", "ldm-2view", or the stem of a notebook
    case: str = "models"  # "models", "all", "2view", "2view-naf"
    needs: tuple[str, ...] = ()  # models
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        """Path of this job below ``done`` and of its record, without suffix."""
        return f"{self.cohort}/seed-{self.seed}/{self.case}/{self.name}"

    @property
    def trains(self) -> bool:
        """Whether it trains a model."""
        return self.case == "models"


class Study:
    """All jobs of a configuration (book/study.yml, and what was given on the command line).

    Args:
        config: the configuration.
        root: of the project.

    Raises:
        StudyError: an entry is missing, unknown or of the wrong kind, or a chapter needs what the study does not have.
    """

    def __init__(self, config: Mapping[str, Any], root: Path) -> None:
        # Snakemake hands lists and objects of its command line over with every number as a text.
        numbers = {"seeds", "gpus_here", *_KINDS}
        config = {name: _whole(value) if name in numbers else value for name, value in config.items()}
        self.root, self.config = root, dict(config)
        here = self.config.pop("gpus_here", None)
        self._check()
        if here is not None:  # a job that asked for more GPUs than this machine has would wait for ever
            self.config["gpus"] = {kind: min(count, int(here)) for kind, count in config["gpus"].items()}
        self.preset: str = config["preset"]
        path = Path(self.preset)
        self.size = (
            json.loads((root / path).read_text(encoding="utf-8"))["name"] if path.suffix == ".json" else path.name
        )
        self.base = f"{config['out']}/{self.size}"
        self.done = f"{config['done']}/{self.size}"
        self.remarks: list[str] = []
        self.jobs = {job.key: job for job in self._chapters()}
        wanted = {(job.cohort, job.seed, need) for job in self.jobs.values() for need in job.needs}
        wanted |= {(c, s, f"ldm-{v}") for c in config["cohorts"] for s in config["seeds"] for v in config["views"]}
        wanted |= {(cohort, seed, "vqgan") for cohort, seed, _ in wanted}
        for cohort, seed, model in sorted(wanted):
            job = Job(cohort, seed, model, needs=() if model == "vqgan" else ("vqgan",))
            self.jobs[job.key] = job

    # What there is ----------------------------------------------------------------------------------------------

    def targets(self) -> list[str]:
        """The mark of every job."""
        return [self.mark(job) for job in self.jobs.values()]

    def mark(self, job: Job) -> str:
        """File that stands for a finished job: a copy of its record."""
        return f"{self.done}/{job.key}.json"

    def data_mark(self, cohort: str) -> str:
        """File that stands for a finished cohort."""
        return f"{self.done}/data/{cohort}.json"

    def inputs(self, job: Job) -> list[str]:
        """Marks of what must be finished before a job."""
        needs = [self.mark(self.jobs[Job(job.cohort, job.seed, need).key]) for need in job.needs]
        return [self.data_mark(job.cohort), *needs]

    def folder(self, job: Job) -> str:
        """Run folder of a chapter, or the folder of the models."""
        return f"{self.base}/{job.cohort}/seed-{job.seed}/{job.case}"

    def record(self, job: Job) -> str:
        """Where a job leaves its record."""
        return f"{self.base}/{job.cohort}/seed-{job.seed}/records/{job.case}.{job.name}.json"

    def preset_of(self, cohort: str) -> str:
        """The preset of a cohort, as chapters take it."""
        return self.preset if self.preset.endswith(".json") or cohort == "lung" else f"{self.preset}-{cohort}"

    def gpu(self, kind: str) -> dict[str, int]:
        """The resource of a rule, absent where no GPU is asked for: a cluster would look for a node with 0 GPUs."""
        count = int(self.config["gpus"][kind])
        return {"gpu": count} if count else {}

    def amount(self, what: str, kind: str) -> int:
        """Threads, mem_mb or minutes of the jobs that "train" or of a "chapter"."""
        return int(self.config[what][kind])

    def command(self, job: Job) -> str:
        """Arguments of book/batch_job.py."""
        c, words = self.config, []
        if job.trains:
            stage, _, views = job.name.partition("-")
            words = ["train", stage, "--run", self.folder(job), "--preset", self.preset_of(job.cohort)]
            words += ["--data", c["data"], "--seed", str(job.seed), "--device", c["device"]]
            words += ["--views", views] if views else []
            words += ["--gpus", str(c["gpus"]["train"])]
            words += [word for setting in c["settings"][stage] for word in ("--set", str(setting))]
        else:
            run = self.folder(job)
            words = ["chapter", f"notebooks/{job.name}.ipynb", "--executed", f"{run}/executed/{job.name}.ipynb"]
            words += [
                "--models",
                f"{self.base}/{job.cohort}/seed-{job.seed}/models",
                "--gpus",
                str(c["gpus"]["chapter"]),
            ]
            values = {"preset": self.preset_of(job.cohort), "data": c["data"], "run": run, "seed": job.seed}
            words += [f"{name}={value}" for name, value in {**values, "device": c["device"], **job.parameters}.items()]
        return " ".join(_quoted([*words, "--record", self.record(job)]))

    def data_command(self, cohort: str) -> str:
        """Arguments of book/batch_job.py that make a cohort of phantoms."""
        record = f"{self.base}/{cohort}/records/data.json"
        words = ["script", "data_scripts/make_phantoms.py", "--record", record, "--"]
        folder = f"{self.config['data']}/{self.size}-{cohort}"
        return " ".join(_quoted([*words, "--preset", self.preset_of(cohort), "--out", folder]))

    def write_plan(self) -> None:
        """Leave the list of jobs for the report: record of each job, relative to the study's folder."""
        base = self.root / self.base
        base.mkdir(parents=True, exist_ok=True)
        jobs = sorted(self.record(job).removeprefix(f"{self.base}/") for job in self.jobs.values())
        temporary = base / ".plan.json.tmp"
        temporary.write_text(json.dumps({"jobs": jobs, "remarks": self.remarks}, indent=1), encoding="utf-8")
        temporary.replace(base / "plan.json")

    # How it is found --------------------------------------------------------------------------------------------

    def _chapters(self) -> Iterable[Job]:
        c = self.config
        for number, plan in c["chapters"].items():
            found = sorted((self.root / "notebooks").glob(f"{number}_*.ipynb"))
            if len(found) != 1:
                self.remarks.append(f"chapter {number}: there is no notebook, it is left out")
                continue
            known, over = parameters(found[0]), list(plan.get("over", []))
            for axis in [axis for axis in over if axis not in known]:
                self.remarks.append(f"chapter {number}: has no parameter {axis!r}, it does not run over it")
                over.remove(axis)
            for cohort in [one for one in c["cohorts"] if one in plan.get("cohorts", c["cohorts"])]:
                for seed in c["seeds"]:
                    for case, values in self._cases(over):
                        needs = tuple(need.format(views=values.get("views", "8view")) for need in plan["needs"])
                        yield Job(cohort, seed, found[0].stem, case, needs, values)

    def _cases(self, over: list[str]) -> Iterable[tuple[str, dict[str, str]]]:
        if not over:
            yield "all", {}
            return
        views = self.config["views"] if "views" in over else [""]
        for one in views:
            given = {"views": one} if one else {}
            if "baseline" not in over:
                yield one, given
            else:
                for baseline, takes in self.config["baselines"].items():
                    if not one or one in takes:
                        yield "-".join(filter(None, [one, baseline])), {**given, "baseline": baseline}

    def _check(self) -> None:
        c = self.config
        known = {*_LISTS, *_WORDS, *_KINDS, "baselines", "chapters", "settings"}
        if missing := sorted(known - set(c)):
            raise StudyError(f"study: lacks {missing[0]!r}, expected all of {sorted(known)}; see book/study.yml.")
        if unknown := sorted(set(c) - known):
            raise StudyError(f"study: {unknown[0]!r} is unknown, expected some of {sorted(known)}.")
        for name in _LISTS:
            if not isinstance(c[name], list) or not c[name] or len(set(c[name])) != len(c[name]):
                raise StudyError(f"study: {name} is {c[name]!r}, expected a list of different entries.")
        for name in _WORDS:
            if not isinstance(c[name], str) or not re.fullmatch(r"[\w./-]+", c[name]):
                raise StudyError(f"study: {name} is {c[name]!r}, expected a word or a path without blanks.")
        if not all(type(seed) is int and seed >= 0 for seed in c["seeds"]):
            raise StudyError(f"study: seeds is {c['seeds']!r}, expected whole numbers from 0 on.")
        for name in _KINDS:
            if not isinstance(c[name], dict) or not all(
                type(c[name].get(kind)) is int for kind in ("train", "chapter")
            ):
                raise StudyError(f"study: {name} is {c[name]!r}, expected whole numbers for train and chapter.")
        for view_set in {*c["views"], *(v for takes in c["baselines"].values() for v in takes)}:
            if f"ldm-{view_set}" not in MODELS[:-1]:
                raise StudyError(f"study: views has {view_set!r}, expected some of {[m[4:] for m in MODELS[1:-1]]}.")
        for number, plan in c["chapters"].items():
            if bad := [axis for axis in plan.get("over", []) if axis not in AXES]:
                raise StudyError(f"study: chapter {number} runs over {bad[0]!r}, expected some of {AXES}.")
            if bad := [n for n in plan["needs"] if n not in MODELS and n != "ldm-{views}"]:
                raise StudyError(f"study: chapter {number} needs {bad[0]!r}, expected some of {MODELS}.")


def parameters(notebook: Path) -> set[str]:
    """Names in a notebook's cell tagged ``parameters``."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    statements = [statement for source in sources for statement in ast.parse(source).body]
    return {t.id for s in statements if isinstance(s, ast.Assign) for t in s.targets if isinstance(t, ast.Name)}


def _whole(value: Any) -> Any:
    """``value`` with every text of digits as a whole number."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _quoted(words: Iterable[str]) -> list[str]:
    """Words for a shell; nothing but plain words is let through."""
    for word in words:
        if not re.fullmatch(r"[\w./=,:+-]+", word):
            raise StudyError(f"study: found {word!r}, expected letters, digits and ./=,:+- only.")
    return list(words)
