"""Where the cells of a sweep run: in several processes of this machine, or as jobs of a cluster.

The launchers are Hydra's own; hydra_plugins/mixprec_launchers.py says what is added to them. Whatever
becomes of a cell is written to its folder in results/, and the one that waits reads it there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from filelock import FileLock, Timeout
from hydra.core.utils import configure_log
from omegaconf import OmegaConf

import mixprec.environment  # noqa: F401 - first: a worker's child begins here
from mixprec.cell import Cell, Config, ConfigError, Launch
from mixprec.store import Preempted, Store

if TYPE_CHECKING:
    from mixprec.estimate import Machine

log = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parent.parent
_LEAST = {
    "workers": 1,
    "gpus": 0,
    "cpus": 1,
    "memory_gb": 1,
    "minutes": 1,
    "jobs": 1,
    "requeues": 0,
}


def check(launch: Launch, group: str) -> None:
    """ConfigError unless the launcher has every key that is set. group: the file that was chosen."""
    if launch.name != group:
        raise ConfigError(f"launch.name={launch.name}: accepted: launch={group} as it is")
    file = _ROOT / f"conf/launch/{group}.yaml"
    defaults = yaml.safe_load(file.read_text(encoding="utf-8"))["launch"]
    for key, value in asdict(launch).items():
        if value is not None and key not in defaults:
            accepted = ", ".join(f"launch.{k}" for k in defaults if k != "name") or "none of them"
            raise ConfigError(
                f"launch.{key}={value}: launch={group} has no such key; accepted: {accepted}"
            )
        least, given = _LEAST.get(key, 0), "null" if value is None else value
        if (value is None and defaults.get(key) is not None) or (
            isinstance(value, int) and value < least
        ):
            raise ConfigError(f"launch.{key}={given}: accepted: {least} or more")
    if group == "joblib" and (visible := visible_gpus()):
        groups = len(_groups(visible, launch.gpus))
        if launch.gpus > len(visible):
            raise ConfigError(f"launch.gpus={launch.gpus}: accepted here: 0 to {len(visible)}")
        if launch.gpus and (launch.workers or 1) > groups:
            raise ConfigError(
                f"launch.workers={launch.workers}: accepted: 1 to {groups}: {len(visible)} GPUs are "
                f"seen here, and each has {launch.gpus}"
            )


def check_program(launch: Launch) -> None:
    """ConfigError if jobs cannot be handed over from here."""
    if launch.name == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError(
            "launch=slurm: there is no sbatch here; accepted: launch=slurm on a login node of a SLURM "
            "cluster, launch=local, launch=joblib"
        )


def is_here(launch: Launch) -> bool:
    """False if other machines run the cells, of which this one knows nothing."""
    return launch.name != "slurm"


def share(machine: Machine, launch: Launch) -> Machine:
    """What one cell has of `machine` while others run beside it."""
    if launch.name != "joblib":
        return machine
    return replace(
        machine, memory=machine.memory // workers(launch), gpus=machine.gpus[: launch.gpus]
    )


# --- launch=joblib: several processes of this machine -----------------------------------------
#
# Hydra's process (the parent) has joblib's loky start workers, and each worker starts one child that
# has the model. The worker is what makes the death of a child cost its own cell alone: were loky's
# own processes to die, loky would end all of them and the sweep.


def workers(launch: Launch) -> int:
    """Cells that run at once."""
    if launch.workers is not None:
        return launch.workers
    return len(_groups(visible_gpus(), launch.gpus)) or 2


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES would name them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1")]
    import torch  # late: only a launcher asks

    return [str(index) for index in range(torch.cuda.device_count())]


def _groups(visible: list[str], gpus: int) -> list[str]:
    """The GPUs in groups of `gpus`, each as CUDA_VISIBLE_DEVICES has it; those left over idle."""
    if not gpus:
        return []
    return [",".join(visible[at : at + gpus]) for at in range(0, len(visible) - gpus + 1, gpus)]


def worker_environment(launch: Launch, cache: Path) -> dict[str, str]:
    """What a worker's child has in its environment. Waits for GPUs that no other worker has.

    A worker holds a lock for each of its GPUs as long as it lives, so two sweeps on one machine do
    not share one either: the second waits. The lock is named after the machine, because the cache may be
    that of a whole cluster.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = str(max(1, cores // workers(launch)))
    environment = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TQDM_DISABLE": "1",  # bars of several processes in one terminal are no bars
    }
    groups = _groups(visible_gpus(), launch.gpus)
    while groups:
        for group in groups:
            if _lock_all(group.split(","), cache / "locks"):
                return {**environment, "CUDA_VISIBLE_DEVICES": group}
        time.sleep(1)
    return environment


_locks: list[FileLock] = []  # of this process's GPUs, until it ends


def _lock_all(gpus: list[str], folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    taken = []
    for gpu in gpus:
        name = "".join(c if c.isalnum() else "-" for c in f"{socket.gethostname()}-gpu-{gpu}")
        lock = FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            for other in taken:
                other.release()
            return False
        taken.append(lock)
    _locks.extend(taken)
    return True


_child: tuple[subprocess.Popen, Connection] | None = None  # this worker's


def in_child(cell: Cell, cfg: Config, job_logging: dict, verbose: bool) -> None:
    """Run `cell` in this worker's child. If the child dies, that is noted as the cell's failure."""
    global _child
    if _child is None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child has it too and notes it
        os.environ.update(worker_environment(cfg.launch, Path(cfg.cache)))
        _end_with_parent()
        _child = _start_child(job_logging, verbose)
    process, connection = _child
    try:
        connection.send((cell, cfg))
        connection.recv()
    except (EOFError, OSError):
        message = f"its process {_ended(process.wait())}"
        log.error("%s failed: %s", cell, message)
        Store(Path(cfg.results)).fail(cell, message)
        _child = _start_child(job_logging, verbose)


def _start_child(job_logging: dict, verbose: bool) -> tuple[subprocess.Popen, Connection]:
    # Not with multiprocessing, which cannot start a process in one that loky started.
    here, there = Pipe()
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "mixprec.launch", str(there.fileno())],
        pass_fds=[there.fileno()],
        env={**os.environ, "PYTHONPATH": path},
    )
    there.close()
    here.send((job_logging, verbose))
    return process, here


def _serve(connection: Connection) -> None:
    """The child: runs the cells that come, one after another, and keeps the model between them."""
    from mixprec import sweep

    _end_with_parent()
    job_logging, verbose = connection.recv()
    configure_log(OmegaConf.create(job_logging), verbose)
    while True:
        cell, cfg = connection.recv()
        # Lines of several cells are mixed in one terminal.
        line = f"%(asctime)s {cell.model.name} {cell.path.rpartition('/')[2]}: %(message)s"
        for handler in logging.getLogger().handlers:
            handler.setFormatter(logging.Formatter(line, "%H:%M:%S"))
        sweep.run_far(cell, cfg)
        connection.send(None)


def _ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL), as it is when memory runs out"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _end_with_parent() -> None:
    """End this process, as SIGTERM does, soon after the one that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


# --- launch=slurm: jobs of a cluster ----------------------------------------------------------

_OVER = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT",
)  # fmt: skip
_PATIENCE = 20  # seconds that a shared file system may take to show what a job wrote


def job_setup(cpus: int) -> list[str]:
    """Lines of a job's script before its command."""
    return [
        f"export PYTHONPATH='{_ROOT}'${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export OMP_NUM_THREADS={cpus} MKL_NUM_THREADS={cpus} TQDM_DISABLE=1",
    ]


def wait(jobs: list, cells: list[Cell], store: Store, every: float = 5) -> None:
    """Until every job of SLURM has ended; print their number by state whenever it changes.

    jobs: submitit's. A job that ended without its result, because it was killed, cancelled or ran out of
    time or memory, is noted as its cell's failure. Asks squeue, which needs no accounting.
    """
    waiting = dict(zip((job.job_id for job in jobs), zip(jobs, cells, strict=True), strict=True))
    shown, over_since = "", {}
    while waiting:
        states = _states(next(iter(waiting)).partition("_")[0])
        for name, (job, cell) in list(waiting.items()):
            if job.paths.result_pickle.exists():
                del waiting[name]
            elif states is not None and states.get(name, "GONE") in (*_OVER, "GONE"):
                if time.monotonic() - over_since.setdefault(name, time.monotonic()) > _PATIENCE:
                    state = states.get(name, "GONE").lower().replace("_", " ")
                    file = job.paths.stdout
                    store.fail(cell, f"SLURM job {name} ended without a result ({state}); {file}")
                    del waiting[name]
            else:
                over_since.pop(name, None)
        count = {"ended": len(jobs) - len(waiting)}
        for name in waiting:
            state = "unknown" if states is None else states.get(name, "GONE").lower()
            count[state] = count.get(state, 0) + 1
        line = ", ".join(f"{n} {state}" for state, n in sorted(count.items()) if n)
        if line != shown:
            print(time.strftime("%H:%M:%S"), "SLURM jobs:", line, flush=True)
            shown = line
        if waiting:
            time.sleep(every)


def _states(array: str) -> dict[str, str] | None:
    """Job id -> state, of all jobs of an array that SLURM still knows; None if it does not answer."""
    asked = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={array}", "--format=%i|%T"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode:
        # It has forgotten an array that ended some minutes ago.
        return {} if "Invalid job id" in answer.stderr else None
    return dict(line.split("|") for line in answer.stdout.split() if "|" in line)


@contextlib.contextmanager
def requeued_if_preempted():
    """In a job: SIGUSR2 and SIGTERM raise Preempted, so that the cell keeps what is finished of it.

    SLURM sends SIGUSR2 before the time is over, as submitit has asked it to, and submitit's answer is to
    queue the job again. SIGTERM comes when SLURM ends a job, and then it knows what comes next
    (scancel: nothing; scontrol requeue, preemption: the queue); or from someone who leaves the job to
    itself (scancel --signal=TERM), and then it is to be queued again too.
    """
    from submitit.core.job_environment import JobEnvironment

    requeue, received = signal.getsignal(signal.SIGUSR2), []

    def preempt(number, frame):
        received.append(number)
        raise Preempted

    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, preempt)
    try:
        yield
    except Preempted:
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        job = JobEnvironment().job_id
        if signal.SIGUSR2 in received or (_states(job) or {}).get(job) == "RUNNING":
            requeue(signal.SIGUSR2, None)  # counts it if the time was over, and exits
        raise


if __name__ == "__main__":
    # Ended where Ctrl-C was typed, or by the worker's end.
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        _serve(Connection(int(sys.argv[1])))
