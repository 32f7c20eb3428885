"""Several processes are one training: two on the CPU, over gloo, their curve is that of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import SMALL, patients

from difr3ct_core.checkpoints import read_log
from difr3ct_core.files import read_safetensors
from difr3ct_core.stages import train_ldm, train_vqgan
from difr3ct_core.weights import load_ldm, load_vqgan, state_digest

pytest.importorskip("accelerate")

#: Both stages; the codebook restarts codes at random, which must be the same codes everywhere.
PRESET = SMALL.replace(
    vqgan={"restart_below": 0.5},
    initial={"solver": "cgls", "iterations": 3},  # solved in parts, too
    train_vqgan={"steps": 8, "batch_size": 4, "log_every": 1},
    train_ldm={"steps": 8, "batch_size": 4, "log_every": 1},
)

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from difr3ct_core import processes
processes.connect()
assert processes.count() == 2
import test_training_distributed as t
print("weights", *t.both(Path(sys.argv[2])))
"""


def both(folder: Path) -> tuple[str, str]:
    """Train the autoencoder and the 2-view model; returns the digests of their weights in this process."""
    train = patients(9)  # does not divide among two
    vqgan = train_vqgan(train, PRESET, folder / "vqgan")
    ldm = train_ldm(train.with_views("2view"), vqgan, PRESET, folder / "2view")
    return state_digest(vqgan), state_digest(ldm)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "two.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    launch += [str(script), str(Path(__file__).parent), str(folder / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("weights")]
    assert len(lines) == 2 and lines[0] == lines[1], done.stdout  # bit for bit the same in both processes
    both(folder / "one")
    return folder / "one", folder / "two"


@pytest.mark.parametrize("stage", ["vqgan", "2view"])
def test_two_processes_give_the_curve_of_one(runs, stage):
    one, two = (read_log(run / stage, "loss")[1] for run in runs)
    assert len(one) == 8
    # The halves of a batch are summed in another order, and a few steps of training magnify that. Gradients that are
    # not averaged, or noise that belongs to the process, are off by ten times more.
    assert two == pytest.approx(one, rel=2e-3)


def test_the_codes_are_the_same(runs):
    one, two = (load_vqgan(run / "vqgan")[0].codebook for run in runs)
    for a, b in ((two.codes, one.codes), (two.usage, one.usage)):
        assert float((a - b).abs().median()) < 1e-4
        assert float(((a - b).abs() < 0.02).float().mean()) > 0.9  # a vector between two codes may choose the other


def test_one_writer(runs):
    """Every file once, whole, and with the same numbers inside, so that one process can go on where two stopped."""
    for stage in ("vqgan", "2view"):
        metadata = [read_safetensors(run / stage / "checkpoint.safetensors")[1] for run in runs]
        for one in metadata:
            one["fingerprint"].pop("autoencoder", None)  # its digest knows how sums are rounded
            assert one.pop("seconds") > 0
        assert metadata[0] == metadata[1]
    assert load_ldm(runs[1] / "2view")[2] == PRESET
    assert not [p for p in runs[1].rglob("*") if ".tmp" in p.name or ".old" in str(p)]
