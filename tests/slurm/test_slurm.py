"""launch=slurm on a real SLURM: `make test-slurm`, which is no part of `make test`."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cluster
import pytest
from conftest import CACHE, ROOT, tiny_overrides

from mixprec.provenance import without_circumstances

ONE_CORE = ["launch.gpus=0", "launch.cpus=1", "launch.memory_gb=2", "launch.minutes=20"]
FEW = ["baseline=bf16,low,fisher", "budget=5,6"]  # four cells in six jobs
LONGER = ["model.limit=40", "eval.tasks=[piqa,winogrande,hellaswag]"]  # seconds a cell


@pytest.fixture(scope="module")
def slurm():
    before = {*CACHE.glob("slurm/*")}
    with cluster.running() as environment:
        yield {**environment, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for folder in {*CACHE.glob("slurm/*")} - before:
        shutil.rmtree(folder)


def ask(slurm: dict, *arguments: str) -> str:
    done = subprocess.run(arguments, env=slurm, capture_output=True, text=True, timeout=30)
    return done.stdout + done.stderr


def start(slurm: dict, results: Path, tiny: dict, *overrides: str) -> subprocess.Popen:
    where = [f"results='{results}'", f"cache='{CACHE}'", "tracking=off"]
    words = [*tiny_overrides(tiny["llama"], bos=True), *where, *overrides]
    return subprocess.Popen(
        [sys.executable, "run.py", "-m", *words],
        cwd=ROOT, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, out + err
    return out, err


def stored(results: Path) -> dict[str, dict]:
    return {
        str(file.parent.relative_to(results)): without_circumstances(json.loads(file.read_text()))
        for file in results.rglob("result.json")
    }


def state_of(results: Path, name: str) -> str:
    for file in results.rglob(f"{name}/status.json"):
        return json.loads(file.read_text())["state"]
    return "missing"


def until(condition, what, seconds: float = 60):
    """what: a text, or a function that makes it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.1)
    return found


def what_slurm_did(slurm: dict) -> str:
    jobs = ask(slurm, "squeue", "--array", "--states=all", "--format=%i|%T|%r")
    return jobs + Path(slurm["SLURM_CONF"]).with_name("slurmctld.log").read_text()[-3000:]


def job_of(slurm: dict, name: str) -> str:
    """The array's job id as printed by the newest sweep, which asks for one cell after another."""
    jobs = ask(slurm, "squeue", "--noheader", "--array", "--format=%i", "--states=all", "--sort=-i")
    arrays = sorted({int(line.split("_")[0]) for line in jobs.split()})
    return f"{arrays[-1]}_{name}"


def restarts(slurm: dict, job: str) -> int:
    fields = dict(f.split("=", 1) for f in ask(slurm, "scontrol", "show", "job", job).split() if "=" in f)  # fmt: skip
    return int(fields["Restarts"])


@pytest.fixture(scope="module")
def expected(slurm, tiny, tmp_path_factory):
    """The same cells by launch=local, with as many threads."""
    few, longer = tmp_path_factory.mktemp("few"), tmp_path_factory.mktemp("longer")
    out, _ = end(start(slurm, few, tiny, *FEW))
    assert "4 cells run, 0 were stored, 0 failed" in out
    end(start(slurm, longer, tiny, *FEW, *LONGER))
    return stored(few), stored(longer)


def test_an_array_gives_what_one_process_does(slurm, tiny, tmp_path, expected):
    out, _ = end(start(slurm, tmp_path, tiny, *FEW, "launch=slurm", *ONE_CORE))
    assert "4 cells run, 0 were stored, 0 failed" in out
    assert "SLURM jobs: 4 ended" in out and "pending" in out  # it tells how far they are
    assert len(expected[0]) == 4 and stored(tmp_path) == expected[0]


def test_a_job_that_is_queued_again_computes_its_cell(slurm, tiny, tmp_path, expected):
    """By SLURM itself, by SIGTERM to the cell alone, and by the signal that comes before the time is over."""
    sweep = start(slurm, tmp_path, tiny, *FEW, *LONGER, "launch=slurm", "launch.jobs=2", *ONE_CORE)
    for name, number, how in (
        ("bf16", 0, ["scontrol", "requeue"]),
        ("low", 1, ["scancel", "--signal=TERM"]),
        ("fisher-5", 2, ["scancel", "--signal=USR2"]),
    ):
        until(lambda: state_of(tmp_path, name) == "running", f"{name} is not begun")  # noqa: B023
        job = job_of(slurm, str(number))
        # scancel tries again for a minute if it meets the job between two states; one signal is enough.
        asking = subprocess.Popen([*how, job], env=slurm)
        until(
            lambda: restarts(slurm, job) == 1,  # noqa: B023
            lambda: f"{name} is not queued again: {what_slurm_did(slurm)}",  # noqa: B023
        )
        asking.kill()
        if how[0] == "scancel":
            assert state_of(tmp_path, name) == "preempted"
    out, _ = end(sweep)
    assert "4 cells run, 0 were stored, 0 failed" in out
    assert stored(tmp_path) == expected[1]


def test_a_drained_node_and_a_dead_parent_lose_nothing(slurm, tiny, tmp_path, expected):
    node = ask(slurm, "sinfo", "--noheader", "--format=%n").strip()
    sweep = start(slurm, tmp_path, tiny, *FEW, "launch=slurm", "launch.jobs=1", *ONE_CORE)
    until(lambda: state_of(tmp_path, "bf16") == "running", "bf16 is not begun")
    assert not ask(slurm, "scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    sweep.send_signal(signal.SIGKILL)  # the login node is restarted
    sweep.communicate()
    until(lambda: state_of(tmp_path, "bf16") == "done", "bf16 does not go on")
    until(lambda: "drained" in ask(slurm, "sinfo", "--noheader", "--format=%T"), "not drained")
    assert state_of(tmp_path, "low") == "missing"  # nothing new is begun
    assert not ask(slurm, "scontrol", "update", f"nodename={node}", "state=resume")
    until(lambda: state_of(tmp_path, "low") != "missing", "the jobs do not go on by themselves")
    # The same command, while the first one's jobs are still there: each cell is computed once.
    out, _ = end(start(slurm, tmp_path, tiny, *FEW, "launch=slurm", *ONE_CORE))
    assert "0 failed" in out
    assert stored(tmp_path) == expected[0]


def test_a_job_that_is_cancelled_costs_its_own_cell_alone(slurm, tiny, tmp_path):
    words = ["baseline=bf16,low", "launch=slurm", *LONGER, *ONE_CORE]
    sweep = start(slurm, tmp_path, tiny, *words)
    until(lambda: state_of(tmp_path, "low") == "running", "low is not begun")
    assert not ask(slurm, "scancel", job_of(slurm, "1"))
    out, err = end(sweep, code=1)
    assert "1 cells run, 0 were stored, 1 failed" in out
    (line,) = [text for text in err.splitlines() if text.startswith("failed: ")]
    assert "low: SLURM job" in line and "(cancelled)" in line
    assert state_of(tmp_path, "bf16") == "done"


def test_what_sbatch_refuses_is_said_in_one_line(slurm, tiny, tmp_path):
    words = ["launch=slurm", "launch.partition=nosuch", *ONE_CORE]
    _, err = end(start(slurm, tmp_path, tiny, *words), code=2)
    (line,) = err.splitlines()
    assert line.startswith("error: launch=slurm: ") and "invalid partition" in line
    assert not [*tmp_path.rglob("status.json")]
