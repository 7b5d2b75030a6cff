"""What every benchmark shares: where it reads and writes, a process of its own, ratios."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(".cache")
OUTPUT = Path("results/bench")


def in_a_process(command: str, *arguments: object) -> dict:
    """What `python -m mixprec.bench COMMAND` measures. Raises RuntimeError with its last words."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        asked = [sys.executable, "-m", "mixprec.bench", command, "--output", file.name]
        done = subprocess.run([*asked, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, arguments))}: {done.stderr[-2000:]}")
        return json.loads(Path(file.name).read_text())


def ratio(numerator: list[float], denominator: list[float]) -> dict:
    """Ratio of medians, and the least and greatest ratio of two single runs."""
    return {
        "median": statistics.median(numerator) / statistics.median(denominator),
        "spread": [min(numerator) / max(denominator), max(numerator) / min(denominator)],
    }
