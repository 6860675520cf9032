"""More than one process: torchrun with two processes on this machine (gloo) against one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import lines, read, stage2_lines
from test_r2d import FILES, ROOT

OPTIONS = "--limit 64 --stage1-steps 8 --stage2-steps 12 --warmup 0 --ramp 0.2 --eval-every 4 --batch-size 8 --lr 0.05"
OPTIONS = [*OPTIONS.split(), *"--width 32 --heads 2 --layers 1 --vocab-size 400 --max-target 24 --device cpu".split()]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Notes so easy that labels are valid after a few steps, so that coins decide what stands in the prompts."""
    path = tmp_path_factory.mktemp("notes") / "notes.jsonl"
    rows = [
        {"question": f"{'bad' if i % 3 else 'mild'} arm {i}", "label": "go" if i % 3 else "stay"} for i in range(90)
    ]
    path.write_text("\n".join(json.dumps(row | {"rationale": f"it is {row['question']}"}) for row in rows), "utf-8")
    return path


# Every file comes late, so that nobody can read it before it is written, and from the first process alone.
LATE = """
import os, sys, time
import r2d

def late(move):
    def moved(*paths):
        assert os.environ.get("RANK", "0") == "0", f"a second writer of {paths}"
        time.sleep(0.1)
        move(*paths)
    return moved

os.rename, os.replace = late(os.rename), late(os.replace)
sys.exit(r2d.main())
"""


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("late") / "late.py"
    path.write_text(LATE, encoding="utf-8")
    return path


def start(out: Path, notes: Path, processes: int, *more: str, script: Path = ROOT / "r2d.py") -> subprocess.Popen:
    program = [sys.executable]
    if processes > 1:
        program += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
        program += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    command = [*program, str(script), "--data", str(notes), "--out", str(out), *OPTIONS, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def one(notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    process = start(out, notes, 1)
    assert process.communicate(timeout=120) and process.returncode == 0
    return out


def test_two_processes_are_one_run(one: Path, notes: Path, late: Path, tmp_path: Path) -> None:
    """Catches a batch seen twice, gradients of the wrong size, the same coins on every rank, rows gathered in disorder,
    and two writers: 20 steps with the losses of one process, its labels in the prompts, its predictions."""
    out = tmp_path / "run"
    process = start(out, notes, 2, script=late)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    logs = [lines(folder / "log.jsonl") for folder in (one, out)]
    assert [line["step"] for line in logs[1]] == [*range(8), *range(12)]
    for a, b in zip(*logs, strict=True):
        for key in ("loss", "loss_predict", "loss_explain", "grad_norm", "val_loss", "val_nll_predicted"):
            assert b.get(key) == pytest.approx(a.get(key), abs=1e-4)
        assert repr(a["used_predicted"]) == repr(b["used_predicted"])  # a whole number
    assert any(0 < line["used_predicted"] < 8 for line in logs[0])
    assert (out / "predictions.jsonl").read_bytes() == (one / "predictions.jsonl").read_bytes()
    assert {path.name for path in out.iterdir()} == FILES
    scores = [read(folder / "metrics.json") for folder in (one, out)]
    assert scores[1]["rationale"].keys() == scores[0]["rationale"].keys()
    assert scores[1]["label"] == scores[0]["label"] and said.count("evaluation of") == 1


@pytest.mark.parametrize("method", ["r2d", "sft"])
def test_two_processes_can_start_over(method: str, one: Path, notes: Path, late: Path, tmp_path: Path) -> None:
    """Catches processes that wait for each other forever, and one that reads what the first has not written yet."""
    out = Path(shutil.copytree(one, tmp_path / "run"))
    process = start(out, notes, 2, "--fresh", "--method", method, "--seed", "1", script=late)
    try:
        said, _ = process.communicate(timeout=60)
    finally:
        process.terminate()
    assert process.returncode == 0, said
    assert (tmp_path / "run.old1" / "metrics.json").read_bytes() == (one / "metrics.json").read_bytes()
    assert read(out / "metrics.json")["seed"] == 1


def strike(out: Path, notes: Path, number: int) -> tuple[int, str]:
    """Send a signal to one of two processes once stage 2 has been saved twice, so that one save is whole."""
    process = start(out, notes, 2, "--stage2-steps", "5000")
    deadline = time.time() + 100
    while not (out / "stage1.pt").exists() or len(stage2_lines(out)) < 8:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), number)
    said, _ = process.communicate(timeout=100)
    return process.returncode, said


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_signal_to_one_process_stops_all_at_the_same_step(notes: Path, tmp_path: Path) -> None:
    """Catches one process that stops and leaves the other waiting for its gradients, and a step that is lost."""
    out = tmp_path / "run"
    _, said = strike(out, notes, signal.SIGTERM)
    assert "stopped; the same command again" in said and "lost the others" not in said
    assert torch.load(out / "last.pt", weights_only=True)["step"] == len(stage2_lines(out))


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_lost_process_ends_the_run_and_one_process_goes_on(notes: Path, tmp_path: Path) -> None:
    """Catches a run that hangs when a machine dies, a traceback in place of a message, and a save nobody can use."""
    out = tmp_path / "run"
    status, said = strike(out, notes, signal.SIGKILL)
    assert status != 0 and "lost the others" in said
    again = start(out, notes, 1, "--stage2-steps", "5000")
    while "goes on at step" not in (line := again.stdout.readline()):
        assert again.poll() is None
    assert "stage 2: goes on" in line
    again.send_signal(signal.SIGTERM)
    assert "the same command again" in again.communicate(timeout=60)[0] and again.returncode == 130


@pytest.mark.skipif(os.name == "nt", reason="the resource module is POSIX")
def test_the_benchmark_runs(tmp_path: Path) -> None:
    """Catches a benchmark that no longer fits the core."""
    program = [sys.executable, str(ROOT / "tests" / "bench.py"), "--out", str(tmp_path / "run"), "--tries", "1"]
    said = subprocess.run(
        [*program, "--steps", "1", "--notes", "4"], capture_output=True, text=True, timeout=300
    ).stdout
    rows = json.loads(said.splitlines()[-1])["rows"]
    assert len(rows) == 10 and all(row["ratio"] > 0 for name, row in rows.items() if name != "utilisation")
    point = subprocess.run([*program, "--point", "32", "1", "8", "4", "2"], capture_output=True, text=True, timeout=300)
    assert point.stdout.startswith("| 32 | 1 | 8 + 4 | 2 |")
