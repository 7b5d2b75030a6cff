"""Benchmarks against lm-eval and auto-round as their authors ship them: `make bench`.

Every measurement is a process of its own, so that memory is its own too; the peers and this project
take turns, on the same documents. What is printed are ratios of medians, with their spread over
repeats; all raw seconds are in results/bench/*.json with the machine and the versions.
"""
