"""A real SLURM of one node, on the loopback interface, for as long as a `with` lasts."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel")
CORES, MEMORY_MB = 2, 6000


def missing() -> list[str]:
    """Programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"))


@contextlib.contextmanager
def running():
    """Start munged, slurmctld and slurmd; yields the environment in which SLURM's commands find them.

    Everything they write is in a temporary folder. They are ended however the `with` is left.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munged wants every folder above its socket to be open to read
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    daemons: list[subprocess.Popen] = []

    def start(name: str, *arguments: str) -> None:
        out = (folder / f"{name}.out").open("w")
        daemons.append(
            subprocess.Popen([name, *arguments], env=environment, stdout=out, stderr=out)
        )

    try:
        (folder / "slurm.conf").write_text(_configuration(folder))
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o400)
        (folder / "munge").mkdir()
        start(
            "munged", "--foreground", "--force", f"--key-file={folder}/key",
            f"--socket={folder}/munge/socket", f"--pid-file={folder}/munge/pid",
            f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed",
        )  # fmt: skip
        _until(lambda: (folder / "munge/socket").exists(), "munged", folder)
        start("slurmctld", "-D", "-i")
        start("slurmd", "-D", "-N", socket.gethostname().split(".")[0])
        asked = ["sinfo", "--noheader", "--format=%T"]

        def idle() -> bool:
            answer = subprocess.run(asked, env=environment, capture_output=True, text=True)
            return answer.stdout.strip() == "idle"

        _until(idle, "slurmctld", folder)
        yield environment
    finally:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["scancel", "--me"], env=environment, timeout=10, capture_output=True)
            time.sleep(1)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _until(ready, name: str, folder: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            log = (folder / f"{name}.out").read_text()[-2000:]
            sys.exit(f"{name} did not come up in {seconds:.0f} s:\n{log}")
        time.sleep(0.2)


def _configuration(folder: Path) -> str:
    name = socket.gethostname().split(".")[0]
    controller, node = _free_port(), _free_port()
    return f"""
ClusterName=test
SlurmctldHost={name}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=0
KillWait=5
MinJobAge=300
JobRequeue=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={name} NodeAddr=127.0.0.1 CPUs={CORES} RealMemory={MEMORY_MB} State=UNKNOWN
PartitionName=test Nodes={name} Default=YES MaxTime=INFINITE State=UP
"""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
