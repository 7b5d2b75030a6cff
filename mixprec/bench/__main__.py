"""`python -m mixprec.bench`: which comparison, and where its numbers go."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import mixprec.environment  # noqa: F401 - first, as in run.py
from mixprec.bench import __doc__ as about
from mixprec.bench import blocks, column, evaluate, growth, signals, stability
from mixprec.bench.common import OUTPUT
from mixprec.cell import FIVE_TASKS
from mixprec.store import write_json


def report(name: str, result: dict) -> None:
    from mixprec import provenance

    write_json(OUTPUT / f"{name}.json", {**result, "provenance": provenance.collect()})
    for what, value in result["ratios"].items():
        low, high = value["spread"]
        print(f"{what}: {value['median']:.2f} ({low:.2f} to {high:.2f})")
    print(f"written: {OUTPUT}/{name}.json")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mixprec.bench", description=about.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    evaluating = commands.add_parser("evaluate", help="HFLM against the shared-prefix engine")
    evaluating.add_argument(
        "--limit", type=int, default=20, help="documents per task (default: 20)"
    )
    evaluating.add_argument("--repeats", type=int, default=3, help="default: 3")
    evaluating.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    whole = commands.add_parser("column", help="the auto_round and lm_eval command lines")
    whole.add_argument("--limit", type=int, default=50, help="documents per task (default: 50)")
    whole.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    commands.add_parser("growth", help="seconds against documents, choices, length, layers")
    by_block = commands.add_parser("blocks", help="memory of scoring a checkpoint block by block")
    by_block.add_argument("--layers", type=int, default=26, help="of 79 M weights (default: 26)")
    rules = commands.add_parser("signals", help="rules of allocation: KL, seconds, memory")
    rules.add_argument("--repeats", type=int, default=3, help="of what is timed (default: 3)")
    commands.add_parser("stability", help="fisher over draws and sizes of the calibration text")
    rule = commands.add_parser("signal", help="one rule (used by `signals`)")
    rule.add_argument("--ask", nargs="+", required=True)
    rule.add_argument("--budgets", nargs="*", type=float, default=[])
    rule.add_argument("--output", type=Path, required=True)
    one = commands.add_parser("measure", help="one measurement (used by the others)")
    one.add_argument("--engine", choices=["hf", "shared_prefix"], required=True)
    one.add_argument("--model", choices=["bf16", "low", "auto_round"], required=True)
    one.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    one.add_argument("--batch", type=int, default=16)
    one.add_argument("--limit", type=int, required=True)
    one.add_argument("--tasks", type=lambda text: text.split(","), default=list(FIVE_TASKS))
    one.add_argument("--output", type=Path, required=True)
    chosen = parser.parse_args()
    if chosen.command == "measure":
        chosen.output.write_text(json.dumps(evaluate.measure(chosen)))
    elif chosen.command == "signal":
        chosen.output.write_text(json.dumps(signals.measure(chosen)))
    elif chosen.command == "signals":
        report("signals", signals.compare(chosen.repeats))
    elif chosen.command == "stability":
        report("stability", stability.stability())
    elif chosen.command == "growth":
        report("growth", growth.growth())
    elif chosen.command == "blocks":
        report("blocks", blocks.blocks(chosen.layers))
    elif chosen.command == "column":
        report(f"column_{chosen.dtype}", column.column(chosen.limit, chosen.dtype))
    else:
        result = evaluate.evaluate(chosen.limit, chosen.repeats, chosen.dtype)
        report(f"evaluate_{chosen.dtype}", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
