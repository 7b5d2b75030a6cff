"""At least 2,000 malformed configurations and 100 valid ones, and some as processes of their own.

python -m pytest tests/faults/test_input.py          ten minutes on one core
SEED=5 python -m pytest tests/faults/test_input.py   others of them
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hypothesis import HealthCheck, Phase, given, seed, settings
from malformed import FLAGS, MALFORMED, SYNTAX, valid
from trials import ROOT, TOKENS, Trials, not_refused

SEED = int(os.environ.get("SEED", "1"))
MALFORMED_COUNT, VALID_COUNT = 2000, 100


def made(count):
    return settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def test_malformed_configurations():
    seen, wrong, slowest = set(), {}, 0.0
    with Trials() as trial:

        @seed(SEED)
        @made(2 * MALFORMED_COUNT)  # hypothesis makes some of them twice
        @given(MALFORMED)
        def judge(request):
            nonlocal slowest
            if request in seen or len(seen) == MALFORMED_COUNT:
                return
            seen.add(request)
            done = trial(*request.arguments, file=request.file)
            slowest = max(slowest, done.seconds)
            if why := not_refused(done):
                wrong[request] = f"{why}: {done.stderr[:300]}"

        judge()
        left = {path.name for path in trial.folder.iterdir()} - {"conf"}
    print(f"{len(seen)} malformed configurations, {len(wrong)} not refused as they should be, "
          f"the slowest in {slowest:.1f} s")  # fmt: skip
    assert not wrong, "\n".join(f"{request}: {why}" for request, why in list(wrong.items())[:20])
    assert len(seen) == MALFORMED_COUNT and not left


def test_valid_configurations():
    seen, wrong = set(), {}
    with Trials(warm=True) as trial:

        @seed(SEED)
        @made(4 * VALID_COUNT)
        @given(valid())
        def judge(request):
            if request in seen or len(seen) == VALID_COUNT:
                return
            seen.add(request)
            done = trial(*request.arguments, "plan=true")
            if done.exit or "1 of 1 cells to run" not in done.stdout:
                wrong[request] = done.stderr[-300:] + done.stdout[-300:]

        judge()
    print(f"{len(seen)} valid configurations, {len(wrong)} refused")
    assert not wrong, "\n".join(f"{request}: {why}" for request, why in list(wrong.items())[:20])
    assert len(seen) == VALID_COUNT


PROCESSES = [
    *[(text,) for text in SYNTAX[2:40:2]],
    *FLAGS[::4],
    ("model.name=" + "x" * 131_000,),  # as long as Linux lets one argument be
    tuple(f"seed={n}" for n in range(100_000)),  # and as many as it takes
    ("budget=\udcff\udcfe",),  # bytes that are no UTF-8
]


@pytest.mark.parametrize("arguments", PROCESSES, ids=lambda a: " ".join(a)[:40])
def test_as_processes(arguments, tmp_path):
    if "\x00" in "".join(arguments):
        pytest.skip("the operating system takes no NUL in an argument")
    (tmp_path / "home").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HYDRA_"))}
    environment |= TOKENS | {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path / "home")}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-B", str(ROOT / "run.py"), *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and len(done.stderr) < 700
    assert not any(token in done.stderr for token in TOKENS.values())
    assert seconds < 5
    assert [p.name for p in tmp_path.iterdir()] == ["home"] and not list(
        (tmp_path / "home").iterdir()
    )


def test_ten_megabytes_are_no_argument():
    """Linux refuses an argument of 128 KiB before the program starts."""
    with pytest.raises(OSError, match="Argument list too long"):
        subprocess.run([sys.executable, str(ROOT / "run.py"), "model.name=" + "x" * 10**7])
