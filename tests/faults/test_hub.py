"""A hub that hangs later: while it lists files, and while it sends one. Two minutes, most of them waited.

python -m pytest tests/faults/test_hub.py
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import _tiny_model
from test_model_faults import assert_only_one_failed, cache, hub_of, sweep_from  # noqa: F401


@pytest.mark.parametrize("answered", [2, 3, 4, 5])
def test_a_hub_that_hangs_later_costs_one_cell(tmp_path, cache, answered):  # noqa: F811
    hub = hub_of(_tiny_model("qwen3", tmp_path / "model"), "slow", "tiny")
    hub.answers["org/slow"] = answered
    done = sweep_from(hub, "org/slow,org/tiny", tmp_path, cache)
    hub.close()
    assert_only_one_failed(done, of=2, because="model.path=org/slow: the hub at 127.0.0.1:")
    assert "did not answer in 1 s" in done.failed[0] and done.seconds < 300
