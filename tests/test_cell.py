"""What a cell is identified by, and what is refused before anything is loaded."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, cell

from mixprec import sweep
from mixprec.cell import ConfigError, check_folder, differences


def test_the_same_request_is_the_same_cell():
    assert cell("budget=5").hash == cell("budget=5.0").hash == cell("seed=3").hash
    assert cell("budget=5").path == "five-50/smollm2_135m/mxfp4_mxfp8/ours-5"
    assert cell("budget=4.5").path.endswith("/ours-4.5")
    assert cell("eval.batch_size=1").hash == cell().hash


@pytest.mark.parametrize("override", [
    "budget=4.5", "eval.limit=3", "calibration.samples=8", "eval.seed=1", "model.bos=true",
    "baseline=head8", "options=w4g64_w8g64", "eval.kl.tokens=128",
])  # fmt: skip
def test_what_decides_the_result_decides_the_hash(override):
    assert cell(override).hash != cell().hash
    assert differences(cell().settings, cell(override).settings)


def test_what_a_baseline_does_not_need_is_not_part_of_it():
    for name in ("bf16", "low", "high"):
        first = cell(f"baseline={name}", "budget=4.5", "calibration.samples=3", "seed=1")
        assert first.hash == cell(f"baseline={name}", "budget=6").hash
        assert cell(f"baseline={name}", "budget=null").budget is None
    assert cell("baseline=bf16", "options=w4g64_w8g64").hash == cell("baseline=bf16").hash
    assert cell("baseline=random", "seed=1").hash != cell("baseline=random", "seed=2").hash


def test_what_is_stored_keeps_its_hash():
    """A new key is absent from the settings of cells without it."""
    files = sorted((ROOT / "results/five-250/smollm2_135m").glob("*/*/result.json"))
    for file in files:
        stored = json.loads(file.read_text())
        name, _, budget = file.parent.name.partition("-")
        overrides = [f"baseline={name}", "eval.limit=250"]
        if stored["config"]["options"]:
            overrides += [f"options={stored['config']['options']['name']}"]
        one = cell(*overrides, f"budget={budget or 'null'}")
        assert one.settings == stored["config"] and one.hash == stored["hash"]
    assert len(files) > 5


def test_a_target_stands_in_the_budgets_place():
    one = cell("baseline=fisher", "target.kl=0.30")
    assert one.path.endswith("/mxfp4_mxfp8/fisher-kl0.3") and one.budget is None
    assert one.settings["target"] == {"kl": 0.3}
    assert one.hash == cell("baseline=fisher", "budget=null", "target.kl=0.3").hash
    assert one.hash != cell("baseline=fisher", "target.kl=0.2").hash
    bf16 = cell("baseline=bf16", "budget=null", "target.kl=0.3")
    assert bf16.hash == cell("baseline=bf16").hash


def test_fused_is_part_of_a_cell_where_it_makes_a_difference():
    one = cell("baseline=fisher", "fused=true")
    assert one.path.endswith("/fisher-5-fused") and one.settings["fused"] is True
    assert one.hash != cell("baseline=fisher").hash
    both = cell("baseline=fisher", "fused=true", "budget=null", "target.kl=1", "tuning.iters=200")
    assert both.path.endswith("/fisher-kl1-fused-tuned200")
    for name in ("bf16", "low", "high"):
        assert cell(f"baseline={name}", "fused=true").hash == cell(f"baseline={name}").hash


def test_two_folders_of_one_name_are_two_models(tmp_path):
    names = set()
    for parent in ("a", "b"):
        folder = tmp_path / parent / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        names.add(cell("model=custom", f"model.path='{folder}'").model.name)
    assert len(names) == 2


REFUSED = {
    "budgt=5": "did you mean budget? accepted: baseline, budget,",
    "eval.limits=5": "did you mean limit? accepted: batch_size,",
    "+x=1": "x: unknown key",
    "model=gpt5": "accepted: custom, llama31_8b, qwen25_7b",
    "model=../../etc": "accepted: custom, llama31_8b, qwen25_7b",
    "baseline=best": "accepted: bf16, fisher, head4, head8",
    "budget=3.9": "accepted with options mxfp4_mxfp8: 4 to 8 bits",
    "budget=8.1": "accepted with options mxfp4_mxfp8: 4 to 8 bits",
    "budget=nan": "accepted with options mxfp4_mxfp8: 4 to 8 bits",
    "budget=null": "accepted with options mxfp4_mxfp8: 4 to 8 bits",
    "baseline=ours target.kl=0.3": "target.kl=0.3: baseline=ours predicts no KL; accepted with it: fisher, measured_kl",
    "baseline=low target.kl=0.3": "baseline=low predicts no KL; accepted with it: fisher, measured_kl",
    "baseline=fisher target.kl=0": "target.kl=0: accepted: a number greater than 0",
    "baseline=fisher target.kl=nan": "target.kl=nan: accepted: a number greater than 0",
    "target=0.3": "target",
    "baseline.takes=[x]": "baseline.takes=x: accepted: target, fused",
    "baseline=ours fused=true": "baseline=ours gives each layer a scheme of its own; accepted with it: fisher, measured_kl, modelopt",
    "baseline=head8 fused=true": "fused=true: baseline=head8 gives each layer",
    "fused=maybe": "fused",
    "budget=five": "budget: Value 'five' of type 'str' could not be converted to Float",
    "options=w2g64_w4g64 budget=3 baseline=head8": "no 8-bit scheme above their lowest; accepted with them: head4, tail4",
    "baseline=head4": "no 4-bit scheme above their lowest; accepted with them: head8, tail8",
    "options=w2g128_w4g128 budget=3": "group size 128 does not divide the 576 inputs",
    "options.schemes=[mxfp8,mxfp4]": "two or more schemes, lowest bits first",
    "options.schemes=[mxfp4,w8g64]": "cannot share one model",
    "options.schemes=[mxfp4,fp5]": "unknown fp5; accepted: mxfp4, mxfp6, mxfp8",
    "options.schemes=[bf16,mxfp8]": "two or more schemes, lowest bits first",
    "options.schemes=[mxfp4,w8g64,bf16]": "cannot share one model",
    "options=mxfp4_mxfp8_bf16 budget=17": "accepted with options mxfp4_mxfp8_bf16: 4 to 16 bits",
    "options.schemes=[mxfp4,bf16] baseline=head8": "accepted with them: no head or tail",
    "model.limit=-1": "accepted: 1 or more documents per task, or null for all",
    "eval.limit=0": "accepted: 1 or more documents per task, or null for all",
    "model=custom": "model.path: no value; set model.path=",
    "model=custom model.path=/no/such/folder": "accepted: a folder made by save_pretrained, a hub id",
    "model=custom model.path=nonsense": "neither a folder nor a hub id; accepted:",
    "model.name=a/b": "accepted: up to 96 letters, digits",
    "eval.tasks=[arc_easy]": "accepted: lambada_openai, hellaswag, piqa, winogrande, mmlu",
    "eval.tasks=[]": "accepted: one or more of lambada_openai",
    "eval.engine=fast": "eval.engine=fast: accepted: shared_prefix, hf, vllm",
    "eval.source=disk": "accepted: packaged, hub",
    "tracking.mode=maybe": "accepted: offline, online, off",
    "tuning.iters=-1": "tuning.iters=-1: accepted: 0 (to nearest) to 10000 steps a block",
    "tuning.iters=1000000000": "accepted: 0 (to nearest) to 10000 steps a block",
    "tuning.iters=1e9": "tuning.iters",
    "tuning.samples=4": "tuning.batch_size=8: accepted: 1 to tuning.samples=4",
    "tuning.tokens=0": "tuning.tokens=0: accepted: a number greater than 0",
    "tuning.iter=5": "did you mean iters? accepted: batch_size, iters, samples, tokens",
    "eval.engine=vllm": "eval.engine=vllm: options mxfp4_mxfp8 are rounded in memory and not exported",
    "calibration.samples=0": "calibration.samples=0: accepted: a number greater than 0",
    "calibration.unreached=skip baseline=fisher": "unreached=skip: accepted: refuse, lowest",
    "eval.kl=null": "eval.kl",
    "eval=null": "Config group override must be a string",
    "budget=[1": "no viable alternative",
    "model.limit=${nothing}": "Interpolation key 'nothing' not found",
    "baseline.rule=os": "baseline.rule=os: accepted: autoscheme, ends,",
}  # fmt: skip


@pytest.mark.parametrize("overrides", REFUSED)
def test_the_impossible_is_refused_in_one_line(overrides):
    with pytest.raises(Exception) as raised:
        cell(*overrides.split())
    message = sweep.one_line(raised.value)
    assert REFUSED[overrides] in message
    assert "\n" not in message and len(message) < 500


@pytest.mark.parametrize("arguments", [
    ["budget=99"], ["-m", "budget=5,99"], ["-m", "baseline=bf16,nope"], ["budgt=5"],
    ["--cfg", "job", "budgt=5"], ["-m", "experiment=table1,table2"],
])  # fmt: skip
def test_a_wrong_command_line_exits_with_2_and_writes_nothing(arguments, tmp_path):
    where = [f"results='{tmp_path}/results'", f"cache='{tmp_path}/cache'"]
    done = subprocess.run(
        [sys.executable, "run.py", *arguments, *where], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_is_cut_in_the_message():
    with pytest.raises(ConfigError) as raised:
        cell("model.name=" + "x" * 10_000)
    assert len(str(raised.value)) < 300


def test_a_folder_that_cannot_be_written_is_accepted_if_it_is_there(tmp_path, monkeypatch):
    """Its stored cells can be found; a new one could not be made."""
    monkeypatch.setattr("os.access", lambda place, rights: not rights & os.W_OK)
    check_folder("results", str(tmp_path))
    with pytest.raises(ConfigError, match=r"results=.*: not one; accepted: a folder"):
        check_folder("results", str(tmp_path / "new"))
