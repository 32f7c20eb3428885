# The chapters as a DAG over views x cohorts x baselines x seeds: `make study`, or
#
#     snakemake --cores all --config preset=tiny 'seeds=[0]'
#     snakemake --profile profiles/slurm
#
# What there is to do stands in book/study.yml, what depends on what in book/study.py, one job in book/batch_job.py.
# Every job leaves a record, and resumes what it had begun: training from its checkpoint, data from the next patient.
import sys
from pathlib import Path

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT / "book"))
from study import Study, StudyError

workdir: str(ROOT)
configfile: str(ROOT / "book" / "study.yml")

try:
    study = Study(config, ROOT)
except StudyError as error:
    raise WorkflowError(str(error)) from None
for remark in study.remarks:
    print(remark, file=sys.stderr)

REPORT = f"{sys.executable} book/batch_report.py {study.base}"


wildcard_constraints:
    cohort=r"[a-z]+",
    seed=r"\d+",
    model=r"vqgan|ldm-\w+",
    case=r"(?!models/)[\w-]+",
    chapter=r"\d\d_\w+",


def job(wildcards, case="models"):
    name = wildcards.get("model") or wildcards.chapter
    return study.jobs[f"{wildcards.cohort}/seed-{wildcards.seed}/{wildcards.get('case', case)}/{name}"]


rule all:
    input:
        study.targets(),


rule data:
    output:
        f"{study.done}/data/{{cohort}}.json",
    params:
        command=lambda w: study.data_command(w.cohort),
    threads: study.amount("threads", "chapter")
    resources:
        mem_mb=study.amount("mem_mb", "chapter"),
        runtime=study.amount("minutes", "chapter"),
    shell:
        "{sys.executable} book/batch_job.py --done {output} {params.command}"


rule train:
    input:
        lambda w: study.inputs(job(w)),
    output:
        f"{study.done}/{{cohort}}/seed-{{seed}}/models/{{model}}.json",
    params:
        command=lambda w: study.command(job(w)),
    threads: study.amount("threads", "train")
    resources:
        mem_mb=study.amount("mem_mb", "train"),
        runtime=study.amount("minutes", "train"),
        **study.gpu("train"),
    shell:
        "{sys.executable} book/batch_job.py --done {output} {params.command}"


rule chapter:
    input:
        lambda w: study.inputs(job(w)),
    output:
        f"{study.done}/{{cohort}}/seed-{{seed}}/{{case}}/{{chapter}}.json",
    params:
        command=lambda w: study.command(job(w)),
    threads: study.amount("threads", "chapter")
    resources:
        mem_mb=study.amount("mem_mb", "chapter"),
        runtime=study.amount("minutes", "chapter"),
        **study.gpu("chapter"),
    shell:
        "{sys.executable} book/batch_job.py --done {output} {params.command}"


onstart:
    study.write_plan()


onsuccess:
    shell(REPORT)


onerror:
    shell(REPORT)
