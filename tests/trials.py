"""`python run.py ARGUMENTS`, thousands of times: each in a process forked from one that has imported
what a refusal needs, which takes a tenth of the time, and watched for what it opens, starts and calls.

    with Trials() as trial:
        done = trial("budget=99")
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 30  # seconds after which a trial is killed
# Audit events of Python that change something outside the process; `open` is judged by its flags.
CHANGES = (
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "os.utime", "os.exec", "os.posix_spawn", "os.spawn", "os.system",
    "os.kill", "subprocess.Popen", "socket.connect", "socket.sendto", "pickle.find_class",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    exit: int  # negative: the signal that ended it
    stdout: str
    stderr: str
    seconds: float
    changed: list[str]  # what it wrote, started, removed, connected to or unpickled
    torch: bool  # was torch imported?


# What no message may hold; every trial has them in its environment.
TOKENS = {"HF_TOKEN": "hf_" + "PlantedToken" * 3, "WANDB_API_KEY": "9planted" * 5}


class Trials:
    """warm: also import what a plan needs, torch among it; then a trial forks with it imported."""

    def __init__(self, warm: bool = False):
        self.place = tempfile.TemporaryDirectory(prefix="trials-")
        self.folder = Path(self.place.name)  # where trials run
        self.experiment = self.folder / "conf/experiment/bad.yaml"
        self.experiment.parent.mkdir(parents=True)
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "WANDB_", "HYDRA_"))
        }
        self.server = subprocess.Popen(
            [sys.executable, "-B", __file__, *(["warm"] if warm else [])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.folder,
            env=environment | TOKENS | {
                "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HOME": str(self.folder)
            },
        )  # fmt: skip

    def __call__(self, *arguments: str, file: bytes | None = None) -> Trial:
        """file: of `experiment=bad`, in a folder that is given as --config-dir."""
        if file is not None:
            self.experiment.write_bytes(file)
            arguments = ("--config-dir", "conf", *arguments)
        self.server.stdin.write(json.dumps(arguments) + "\n")
        self.server.stdin.flush()
        return Trial(**json.loads(self.server.stdout.readline()))

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_) -> None:
        self.server.stdin.close()
        self.server.wait()
        self.place.cleanup()


def not_refused(done: Trial) -> str:
    """What a trial lacks to be a refusal as it should be; empty if it is one."""
    lines = done.stderr.splitlines()
    wrong = {
        f"exit code {done.exit}, not 2": done.exit != 2,
        "no single line that begins with `error: `": len(lines) != 1
        or not lines[0].startswith("error: "),
        "more than 700 characters": len(done.stderr) > 700,
        "control characters": not all(line.isprintable() for line in lines),
        "a token": any(token in done.stderr + done.stdout for token in TOKENS.values()),
        "something on stdout": done.stdout != "",
        f"more than 5 s: {done.seconds:.1f}": done.seconds > 5,
        "torch was imported": done.torch,
        f"something was changed: {done.changed}": bool(done.changed),
    }
    return "; ".join(text for text, is_so in wrong.items() if is_so)


# --- the process that is forked ---------------------------------------------------------------


def _serve(warm: bool) -> None:
    import mixprec.environment  # noqa: F401
    from mixprec import sweep

    sweep.configuration()  # Hydra looks for its plugins once
    if warm:
        from mixprec import plan, runner  # noqa: F401
    with tempfile.TemporaryDirectory(prefix="trial-") as aside:
        for line in sys.stdin:
            answer = _fork(json.loads(line), Path(aside))
            sys.__stdout__.write(json.dumps(answer) + "\n")
            sys.__stdout__.flush()


def _fork(arguments: list[str], aside: Path) -> dict:
    files = {name: aside / name for name in ("stdout", "stderr", "seen")}
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        _trial(arguments, files)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.perf_counter() - start > LIMIT:
            os.kill(child, 9)
        time.sleep(0.002)
    status = os.waitpid(child, 0)[1]
    seconds = time.perf_counter() - start
    changed, torch = [], False
    if files["seen"].exists():
        changed, torch = json.loads(files["seen"].read_text())
    answer = {"exit": os.waitstatus_to_exitcode(status), "seconds": seconds}
    for name in ("stdout", "stderr"):
        answer[name] = files[name].read_text(errors="replace")
    for file in files.values():
        file.unlink(missing_ok=True)
    return {**answer, "changed": changed, "torch": torch}


def _trial(arguments: list[str], files: dict[str, Path]) -> None:
    """In the fork: run.py as `python run.py` runs it, then out without a return."""
    import runpy

    code, changed = 120, []
    for number, name in ((0, os.devnull), (1, files["stdout"]), (2, files["stderr"])):
        opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(opened, number)
    sys.stdin, sys.stdout = open(0), open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    watching = True
    before = "torch" in sys.modules

    def watch(event: str, values: tuple) -> None:
        if not watching:
            return
        if event == "open":
            file, _, flags = values
            written = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if written and file != os.devnull and not isinstance(file, int):
                changed.append(f"open {file}")
        elif event in CHANGES:
            changed.append(f"{event} {values if event == 'pickle.find_class' else values[0]}")

    from mixprec import sweep

    def accepted(*_):  # what is accepted is not run
        print("accepted", flush=True)
        sys.exit(99)

    sweep.run_cell = accepted
    try:
        # As the operating system hands them over: what is not UTF-8 comes as surrogates.
        sys.argv = ["run.py", *arguments]
        sys.addaudithook(watch)
        try:
            runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        watching = False
        sys.stdout.flush(), sys.stderr.flush()
        torch = "torch" in sys.modules and not before
        files["seen"].write_text(json.dumps([changed[:20], torch]))
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve("warm" in sys.argv[1:])
