"""Where cells run decides nothing about them, and a process that dies costs its own cell alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CACHE, ROOT, cell, configuration, tiny_overrides
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from mixprec import launch, sweep
from mixprec.cell import ConfigError, Launch, cell_of, typed
from mixprec.estimate import Machine
from mixprec.provenance import without_circumstances

# --- what can be asked for ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["joblib", "slurm"])
def test_where_a_cell_runs_is_no_part_of_it(name):
    assert cell(f"launch={name}").settings == cell().settings
    assert "launch" not in json.dumps(cell().settings)


def judged(*overrides: str) -> None:
    """What happens before the first cell of a sweep runs, without a look at the machine."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", list(overrides), run_mode=RunMode.MULTIRUN)
        for job in sweep._composed(config):
            cfg = typed(sweep.without_hydra(job))
            launch.check(cfg.launch, job.hydra.runtime.choices.launch)
            cell_of(cfg, here=launch.is_here(cfg.launch))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["launch=slurm", "launch.partion=x"], "launch.partion: unknown key; did you mean partition?"),
        (["launch=joblib", "launch.partition=x"], "launch.partition=x: launch=joblib has no such key; "
         "accepted: launch.workers, launch.gpus"),
        (["launch.workers=2"], "launch.workers=2: launch=local has no such key; accepted: none"),
        (["launch=slurm", "launch.minutes=0"], "launch.minutes=0: accepted: 1 or more"),
        (["launch=slurm", "launch.cpus=null"], "launch.cpus=null: accepted: 1 or more"),
        (["launch=slurm", "launch.cpus=many"], "launch.cpus: Value 'many'"),
        (["launch=slurm,local"], "launch: a sweep has one launcher"),
        (["launch=cloud"], "launch=cloud: accepted: joblib, local, slurm"),
        (["launch.name=slurm"], "launch.name=slurm: accepted: launch=local as it is"),
    ],
)  # fmt: skip
def test_what_a_launcher_does_not_have_is_refused_in_one_line(overrides, line):
    with pytest.raises(Exception) as refused:
        judged(*overrides)
    text = sweep.one_line(refused.value)
    assert text.startswith(line) and "\n" not in text


def test_every_command_of_the_documentation_can_be_run(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    text = (ROOT / "docs/clusters.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^ {4}.*?python run\.py (.*?)(?: +#.*)?$", text, flags=re.M)
    assert len(commands) > 5
    split = BasicSweeper.split_arguments  # the first and the last job of each are enough
    ends = staticmethod(lambda *a, **k: [[jobs[0], jobs[-1]] for jobs in split(*a, **k)])
    monkeypatch.setattr(BasicSweeper, "split_arguments", ends)
    for command in commands:
        judged(*(word for word in command.split() if word not in ("-m", "plan=true")))


def test_without_sbatch_slurm_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"launch=slurm: there is no sbatch here; accepted: "):
        launch.check_program(Launch(name="slurm"))
    launch.check_program(Launch(name="joblib"))


def test_another_machines_memory_is_not_judged_by_this_ones():
    assert launch.is_here(configuration("launch=joblib").launch)
    assert not launch.is_here(configuration("launch=slurm").launch)
    here = Machine(memory=80, gpus=(8, 8, 8, 8), hardware={})
    one = launch.share(here, Launch(name="joblib", workers=2, gpus=2))
    assert (one.memory, one.gpus) == (40, (8, 8))  # what one of two processes has
    assert launch.share(here, Launch(name="slurm", gpus=1)) == here


# --- GPUs and cores -------------------------------------------------------------------------------


def test_there_is_a_worker_for_every_group_of_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert launch.workers(Launch(name="joblib", gpus=1)) == 5
    assert launch.workers(Launch(name="joblib", gpus=2)) == 2  # and one GPU idles
    assert launch.workers(Launch(name="joblib", gpus=2, workers=1)) == 1
    with pytest.raises(ConfigError, match=r"launch\.workers=3: accepted: 1 to 2: 5 GPUs are seen"):
        launch.check(Launch(name="joblib", gpus=2, workers=3), "joblib")
    with pytest.raises(ConfigError, match=r"launch\.gpus=6: accepted here: 0 to 5"):
        launch.check(Launch(name="joblib", gpus=6), "joblib")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert launch.workers(Launch(name="joblib", gpus=1)) == 2


WORKER = """
import os, subprocess, sys
from pathlib import Path
from mixprec import launch
from mixprec.cell import Launch
environment = launch.worker_environment(Launch(name="joblib", gpus=2), Path(sys.argv[1]))
shown = 'import os, torch; print(os.environ["CUDA_VISIBLE_DEVICES"], torch.get_num_threads())'
subprocess.run([sys.executable, "-c", shown], env={**os.environ, **environment}, check=True)
print("shown", flush=True)
sys.stdin.read()
"""


def test_workers_share_no_gpu_and_divide_the_cores(tmp_path):
    """Four GPUs that are not there, two for each worker; a third waits until one of them ends."""
    faked = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1,2,7", "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, tmp_path],
            env=faked, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        lines = [worker.stdout.readline().split() for worker in workers]
        assert {gpus for gpus, _ in lines} == {"0,1", "2,7"}
        half = max(1, len(os.sched_getaffinity(0)) // 2)
        assert {int(threads) for _, threads in lines} == {half}
        assert not launch._lock_all(["2", "7"], tmp_path / "locks")
        workers[1].communicate("", timeout=30)
        assert launch._lock_all(lines[1][0].split(","), tmp_path / "locks")
    finally:
        for worker in workers:
            worker.kill()
        for lock in launch._locks:
            lock.release()
        launch._locks.clear()


# --- whole sweeps ---------------------------------------------------------------------------------


def command(results: Path, folder: Path, *overrides: str) -> list[str]:
    where = [f"results='{results}'", f"cache='{CACHE}'", "tracking=off"]
    return [sys.executable, "run.py", "-m", *tiny_overrides(folder, bos=True), *where, *overrides]


def run(*arguments, threads: int) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment
    )


def stored(results: Path) -> dict[str, dict]:
    return {
        str(file.parent.relative_to(results)): without_circumstances(json.loads(file.read_text()))
        for file in results.rglob("result.json")
    }


def status_of(results: Path, name: str) -> dict:
    for file in results.rglob(f"{name}/status.json"):
        return json.loads(file.read_text())
    return {}


def test_processes_give_what_one_does_and_one_that_dies_costs_its_own_cell_alone(tiny, tmp_path):
    sweep_of = ["baseline=bf16,low,fisher", "budget=5,6"]
    here, there = tmp_path / "local", tmp_path / "joblib"
    half = max(1, len(os.sched_getaffinity(0)) // 2)  # the threads of one process of two
    done = run(here, tiny["llama"], *sweep_of, threads=half)
    assert done.returncode == 0, done.stderr
    assert "4 cells run, 0 were stored, 0 failed" in done.stdout

    before = {*ROOT.iterdir(), *CACHE.glob("hydra/*")}
    joblib = ["launch=joblib", "launch.workers=2"]
    sweeping = subprocess.Popen(
        command(there, tiny["llama"], *sweep_of, *joblib),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while (status := status_of(there, "low")).get("state") != "running":
        assert sweeping.poll() is None and status.get("state") != "done"
        time.sleep(0.02)
    os.kill(status["pid"], signal.SIGKILL)  # as the system does when memory runs out
    stdout, stderr = sweeping.communicate(timeout=300)
    assert sweeping.returncode == 1
    assert "3 cells run, 0 were stored, 1 failed" in stdout
    (line,) = [text for text in stderr.splitlines() if text.startswith("failed: ")]
    assert "low: its process was killed (SIGKILL), as it is when memory runs out" in line

    done = run(there, tiny["llama"], *sweep_of, *joblib, threads=half)
    assert done.returncode == 0, done.stderr
    assert "1 cells run, 3 were stored, 0 failed" in done.stdout
    assert len(stored(here)) == 4 and stored(there) == stored(here)
    assert {*ROOT.iterdir(), *CACHE.glob("hydra/*")} - before <= {CACHE / "hydra/multirun.yaml"}
    processes = {status_of(there, name)["pid"] for name in ("bf16", "low", "fisher-5", "fisher-6")}
    assert 2 <= len(processes) <= 3  # the two of the first sweep that lived, and that of the second


COUNTED = """
import mixprec.environment
import os, sys
from pathlib import Path
import auto_round, datasets, lm_eval, torch, transformers  # once, and not in every child
torch.set_num_threads(1)
sys.path.insert(0, "tests")
from conftest import configuration, tiny_overrides
from mixprec import data, models, runner
from mixprec.allocate import autoscheme, fisher
from mixprec.cell import cell_of
from mixprec.evaluate import kl

folder, cache, count = sys.argv[1:]

def counted(module, name):
    real = getattr(module, name)
    def call(*arguments, **keywords):
        with open(count, "a") as file:
            file.write(name + "\\n")
        return real(*arguments, **keywords)
    setattr(module, name, call)

counted(fisher, "score")
counted(autoscheme, "_autoscheme")
counted(data, "_convert")
counted(models, "_sha256")
counted(kl, "save_file")

def work():
    for rule in ("fisher", "ours"):
        cfg = configuration(*tiny_overrides(folder), f"baseline={rule}", "budget=5", f"cache={cache}",
                            f"results={cache}/results-{os.getpid()}", "tracking=off")
        assert runner.run(cell_of(cfg), cfg).state == "done"

children = []
for _ in range(6):
    if (pid := os.fork()) == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    children.append(pid)
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 6
"""


def test_whatever_is_made_once_is_made_once_by_many_that_start_together(tiny, tmp_path):
    """Scores, AutoScheme's own, the reference, the documents and the checkpoint's hashes."""
    count, cache = tmp_path / "count", tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, tiny["llama"], cache, count],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    calls = count.read_text().split()
    for made in ("score", "_autoscheme", "_convert", "save_file"):
        assert calls.count(made) == 1, (made, calls)
    assert calls.count("_sha256") == len([*tiny["llama"].glob("*.json"), *tiny["llama"].glob("*.safetensors")])  # fmt: skip
