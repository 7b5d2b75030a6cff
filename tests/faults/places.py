"""Odd places and clocks: each sweep works or says why, through `python run.py` itself."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import CACHE, ROOT, _tiny_model, tiny_overrides
from tests.faults.common import trials

SPACES = "a folder, ünïcödé 零"


def sweep(folder: Path, results: Path, **how) -> subprocess.CompletedProcess:
    """Two tiny cells by `python run.py -m`; how: env (None: without the variable), wrapper, then."""
    model = folder / "model"
    if not model.exists():
        _tiny_model("llama", model)
    env = {**os.environ, **how.get("env", {})}
    command = [
        *how.get("wrapper", ()), sys.executable, "run.py", "-m", *tiny_overrides(model),
        "model.name=tiny", "baseline=bf16,low", "tracking=off",
        f"results='{results}'", f"cache='{CACHE.resolve()}'",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env={key: value for key, value in env.items() if value is not None},
    )  # fmt: skip
    how.get("then", lambda _: None)(process)
    out, error = process.communicate(timeout=300)
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def works(done: subprocess.CompletedProcess, results: Path, expected: str) -> list[str]:
    found = list(results.rglob("result.json"))
    if done.returncode or expected not in done.stdout or len(found) != 2:
        return [
            f"exit code {done.returncode}, {len(found)} cells: {(done.stdout + done.stderr)[-800:]}"
        ]
    return []


def says(done: subprocess.CompletedProcess, code: int, text: str) -> list[str]:
    whole = done.stdout + done.stderr
    if done.returncode != code or text not in done.stderr or "Traceback" in whole:
        return [f"exit code {done.returncode}: {whole[-800:]}"]
    return []


def spaces_and_letters(folder: Path) -> list[str]:
    place = folder / SPACES
    place.mkdir()
    return works(sweep(place, place / "results"), place / "results", "2 cells run")


def ascii_locale(folder: Path) -> list[str]:
    place = folder / SPACES
    place.mkdir()
    done = sweep(place, place / "results", env={"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": None})
    return works(done, place / "results", "2 cells run")


def no_home(folder: Path) -> list[str]:
    done = sweep(folder, folder / "results", env={"HOME": None})
    return works(done, folder / "results", "2 cells run")


def home_that_is_not_there(folder: Path) -> list[str]:
    done = sweep(folder, folder / "results", env={"HOME": "/nonexistent"})
    wrong = works(done, folder / "results", "2 cells run")
    return wrong + (["/nonexistent was made"] if Path("/nonexistent").exists() else [])


def read_only(folder: Path) -> list[str]:
    """Stored cells are found there; others are refused in a line each."""
    results = folder / "results"
    results.mkdir()
    mount = 'mount -t tmpfs -o ro tmpfs "$0" && exec "$@"'
    wrapper = ["unshare", "--mount", "sh", "-c", mount, str(results)]
    wrong = says(sweep(folder, results, wrapper=wrapper), 1, "Read-only file system")
    sweep(folder, results)
    bind = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    wrapper = ["unshare", "--mount", "sh", "-c", bind, str(results)]
    return wrong + works(sweep(folder, results, wrapper=wrapper), results, "2 were stored")


def clock_set_back(folder: Path) -> list[str]:
    """By a day, and by 40 years, between a kill and the run that goes on, and by another's lock."""
    wrong = []
    for shift in ("-86400", "-1262304000", "+86400"):
        results = folder / f"results{shift}"
        place = results / "five-2/tiny/none/bf16"
        place.mkdir(parents=True)
        # What a process leaves that was killed by today's clock.
        (place / "lock.json").write_text(
            json.dumps({"host": "x", "machine": _machine(), "pid": 2**22 + 1, "began": 1,
                        "since": "2030-01-01T00:00:00Z", "token": "t"})
        )  # fmt: skip
        preload = {"CLOCK_SHIFT": shift, "LD_PRELOAD": str(_shift(folder))}
        wrong += works(sweep(folder, results, env=preload), results, "2 cells run")
        status = json.loads((place / "status.json").read_text())
        if shift.startswith("-12") and not status["started"].startswith("19"):
            wrong.append(f"the clock was not set back: {status}")
    return wrong


def sigterm(folder: Path) -> list[str]:
    """As a cluster sends it: 75, `preempted`, and the same command goes on inside the cell."""
    results = folder / "results"
    first = sweep(folder, results, then=lambda process: _terminate(process, results))
    wrong = says(first, 75, "preempted: ")
    states = [json.loads(file.read_text())["state"] for file in results.rglob("status.json")]
    if "preempted" not in states or list(results.rglob("lock.json")):
        wrong.append(f"states {states}")
    again = sweep(folder, results)
    if "allocate: taken from before" not in again.stdout:
        wrong.append(f"nothing was taken from before: {again.stdout}")
    return wrong + works(again, results, "")


def _terminate(process: subprocess.Popen, results: Path) -> None:
    """When the first cell's allocation is there, and its evaluation is not."""
    while process.poll() is None and not list(results.rglob("partial/allocate.json")):
        time.sleep(0.001)
    process.terminate()


def _machine() -> str:
    from mixprec import lock

    return lock._machine()


def _shift(folder: Path) -> Path:
    """A library that shows a process another time of day: CLOCK_SHIFT seconds from the real one."""
    library = folder / "shift.so"
    if not library.exists():
        source = folder / "shift.c"
        source.write_text(
            "#define _GNU_SOURCE\n#include <dlfcn.h>\n#include <stdlib.h>\n#include <time.h>\n"
            "#include <sys/time.h>\n"
            'static long s(void) { char *t = getenv("CLOCK_SHIFT"); return t ? atol(t) : 0; }\n'
            "int clock_gettime(clockid_t c, struct timespec *t) {\n"
            '  int (*f)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");\n'
            "  int r = f(c, t); if (c == CLOCK_REALTIME) t->tv_sec += s(); return r; }\n"
            "time_t time(time_t *p) {\n"
            '  time_t (*f)(time_t *) = dlsym(RTLD_NEXT, "time");\n'
            "  time_t t = f(0) + s(); if (p) *p = t; return t; }\n"
        )
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True
        )
    return library


PLACES: list[Callable[[Path], list[str]]] = [
    spaces_and_letters, ascii_locale, no_home, home_that_is_not_there, read_only, clock_set_back,
    sigterm,
]  # fmt: skip


if __name__ == "__main__":
    for number, note in trials("places", len(PLACES)):
        place = PLACES[number % len(PLACES)]
        note({place.__name__: 1, "wrong": place(Path(tempfile.mkdtemp()))})
