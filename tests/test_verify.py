"""Whatever is changed in a stored result, a line says so."""

import json
import shutil

import pytest
from conftest import ROOT, cell

from mixprec import store, verify
from mixprec.cell import path_of
from mixprec.sweep import configuration

PLACE = "five-250/smollm2_135m/mxfp4_mxfp8/ours-5"


@pytest.fixture
def copied(tmp_path):
    """A committed cell, in results of its own."""
    folder = tmp_path / "results" / PLACE
    shutil.copytree(ROOT / "results" / PLACE, folder)
    return folder


def faults(folder):
    return verify.faults(folder, PLACE)


def change(folder, keys, value, *, sealed):
    """Put `value` in place in result.json; sealed: with a content hash that fits, as a wrong program would."""
    file = folder / "result.json"
    result = place = json.loads(file.read_text())
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    if sealed:
        result = store.sealed(result, store.hashes(folder))
    store.write_json(file, result)


def test_a_committed_cell_is_as_it_was_stored(copied):
    assert faults(copied) == []


@pytest.mark.parametrize(
    "keys, value, said",
    [
        (["mean", "acc"], 0.5, "mean.acc: stored 0.5, computed 0."),
        (["mean", "stderr"], 0.001, "mean.stderr: stored 0.001, computed 0.0"),
        (["metrics", "piqa", "acc"], 0.99, "metrics.piqa.acc: stored 0.99, computed 0."),
        (["metrics", "piqa", "stderr"], 0.001, "metrics.piqa.stderr: stored 0.001, computed 0.0"),
        (["metrics", "mmlu", "n"], 336, "metrics.mmlu.n: stored 336, computed 337"),
        (["kl", "mean"], 0.1, "kl.mean: stored 0.1, computed 0."),
        (["kl", "stderr"], 0.1, "kl.stderr: stored 0.1, computed 0.0"),
        (["realised_bits"], 4.9, "realised_bits: stored 4.9, computed "),
        (["realised_bits_with_scales"], 5, "realised_bits_with_scales: stored 5, computed 5.2"),
        (["quantized", "weights"], 7, "quantized.weights: stored 7, computed 106168320"),
        (["quantized", "layers_by_scheme"], {"mxfp4": 210}, "quantized.layers_by_scheme: stored"),
        (["recovery", "reference"], "x", "recovery.reference: stored x, computed five-250/"),
        (["config", "eval", "seed"], 7, "hash: stored "),
        (["config", "eval", "limit"], 50, f"its folder: stored {PLACE}, computed five-50/"),
        (["kl"], {"mean": 0.1}, "kl cannot be checked: KeyError: 'per_sequence'"),
    ],
)
def test_every_number_is_computed_again(copied, keys, value, said):
    change(copied, keys, value, sealed=False)
    assert faults(copied) == ["result.json is not what was stored: its content hash differs"]
    change(copied, keys, value, sealed=True)
    assert any(line.startswith(said) for line in faults(copied)), faults(copied)


def edited_allocation(folder, edit):
    file = folder / "allocation.json"
    allocation = json.loads(file.read_text())
    edit(allocation["layers"])
    store.write_json(file, allocation)
    result = store.read(folder)
    store.write_json(folder / "result.json", store.sealed(result, store.hashes(folder)))


def test_an_allocation_above_its_budget_is_caught(copied):
    def raise_one(layers):
        layers[next(name for name, scheme in layers.items() if scheme == "mxfp4")] = "mxfp8"

    edited_allocation(copied, raise_one)
    found = faults(copied)
    assert any("above its budget of 5" in line for line in found)
    assert any(line.startswith("realised_bits: stored") for line in found)


def test_a_layer_that_is_missing_or_of_another_scheme_is_caught(copied):
    edited_allocation(copied, lambda layers: layers.pop("model.layers.0.mlp.up_proj"))
    assert any(
        line.startswith("quantized.layers: stored 210, computed 209") for line in faults(copied)
    )
    edited_allocation(copied, lambda layers: layers.update({"model.layers.0.mlp.up_proj": "w4g64"}))
    assert "allocation.json: w4g64 is not one of the options mxfp4, mxfp8" in faults(copied)


@pytest.mark.parametrize("name", ["correct.json", "allocation.json"])
def test_a_file_beside_it_that_changed_is_named(copied, name):
    text = (copied / name).read_text()
    (copied / name).write_text(text.replace("0", "1", 1))
    assert f"{name} is not what was stored: its hash in result.json differs" in faults(copied)
    (copied / name).unlink()
    assert f"{name} is missing" in faults(copied)


def test_older_results_are_given_their_hashes_once(copied, capsys):
    root = copied.parents[3]
    result = store.read(copied)
    older = {k: v for k, v in result.items() if k not in ("files", "content_hash")}
    store.write_json(copied / "result.json", older)
    assert "--migrate" in faults(copied)[0] and len(faults(copied)) == 1
    assert verify.migrate(root) == [f"{PLACE}: hashes added"]
    assert faults(copied) == [] and store.read(copied) == result
    assert verify.migrate(root) == []
    # Not to those with which something else is wrong.
    older["mean"]["acc"] = 0.5
    store.write_json(copied / "result.json", older)
    (line,) = verify.migrate(root)
    assert line.startswith(f"{PLACE}: not migrated: mean.acc: stored 0.5")
    assert "content_hash" not in json.loads((copied / "result.json").read_text())


def test_a_readme_that_shows_other_numbers_is_named(tmp_path):
    experiments = tmp_path / "experiments"
    shutil.copytree(ROOT / "experiments", experiments)
    (tmp_path / "README.md").write_text(
        "<!-- reproduced: all five-250 -->\nNot run here.\n<!-- /reproduced -->\n"
    )
    results = tmp_path / "results"
    assert [line.split(":")[0] for line in verify.stale_readmes(results, experiments)][1:]
    assert not any(
        "README.md: " in x for x in verify.stale_readmes(ROOT / "results", experiments)[1:]
    )
    assert verify.stale_readmes(ROOT / "results", experiments)[0].startswith("README.md: ")


def test_everything_committed_verifies(capsys):
    assert verify.main(["--results", str(ROOT / "results")]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.endswith("all as stored\n")


def test_a_difference_is_exit_code_1(copied, capsys):
    change(copied, ["mean", "acc"], 0.5, sealed=True)
    assert verify.main(["--results", str(copied.parents[3])]) == 1
    assert f"{PLACE}: mean.acc: stored 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides",
    [
        ["baseline=low"], ["baseline=bf16"], ["baseline=ours", "budget=4.5"], ["budget=5.0"],
        ["baseline=fisher", "target.kl=0.3"], ["baseline=fisher", "fused=true"],
        ["baseline=low", "tuning.iters=20"], ["model.limit=null", "eval.limit=null"],
    ],
)  # fmt: skip
def test_a_place_follows_from_the_settings_alone(overrides):
    one = cell(*overrides)
    assert path_of(json.loads(json.dumps(one.settings))) == one.path
    assert one.path.split("/")[1] == configuration(*overrides).model.name
