"""The hub path for real: sweeps in their own process against a hub on the loopback interface.

A tiny Qwen3 is asked for by branch, tag and commit, from public, gated, unknown and pickle-only
repositories, over a connection that breaks off, and with the hub gone.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import CACHE, ROOT, cell, run, tiny_overrides
from hub_server import SIGNATURE, Hub

from mixprec.cell import ConfigError
from mixprec.store import Store

TOKEN = "hf_TokenThatMustNotBeWrittenAnywhere"
CHUNK = 10 * 1024 * 1024  # bytes: huggingface_hub writes, and so resumes, in steps of this


def settings(path: str) -> list[str]:
    return [*tiny_overrides(path), "baseline=low", "tracking=off"]


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """The commits: a tiny Qwen3, one of other weights, one in two large shards, and a pickle."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    place = tmp_path_factory.mktemp("commits")
    found = {"tiny": tiny["qwen3"]}
    for name in ("other", "wide", "pickle"):
        found[name] = place / name
        shutil.copytree(tiny["qwen3"], found[name])
    weights = load_file(found["other"] / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    save_file(weights | {norm: weights[norm] * 2}, found["other"] / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    (found["wide"] / "model.safetensors").unlink()
    wide = AutoModelForCausalLM.from_pretrained(tiny["qwen3"], dtype=torch.bfloat16)
    wide.resize_token_embeddings(90_000)  # more than one step of a download
    wide.save_pretrained(found["wide"], max_shard_size="11600KB")
    (found["pickle"] / "model.safetensors").rename(found["pickle"] / "pytorch_model.bin")
    return found


@pytest.fixture(scope="module")
def shards(folders):
    """The two files of `wide`, the larger one first."""
    files = sorted(folders["wide"].glob("*.safetensors"), key=lambda f: -f.stat().st_size)
    assert len(files) == 2 and files[0].stat().st_size > CHUNK > files[1].stat().st_size
    return [file.name for file in files]


@pytest.fixture(scope="module")
def hub(folders):
    hub = Hub()
    for name in ("tiny", "wide", "pickle"):
        hub.repositories[f"org/{name}"].commit(folders[name], "main", "v2")
    hub.repositories["org/tiny"].commit(folders["other"], "v2")
    for name, gated in (("gated", "files"), ("closed", "all"), ("refusing", "files")):
        repository = hub.repositories[f"org/{name}"]
        repository.commit(folders["tiny"], "main", "v2")
        repository.gated = gated
        repository.members = (TOKEN,) if name != "refusing" else ()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def sweep(hub, tmp_path_factory):
    """sweep(results, *overrides, token=None): a sweep with a hub cache of its own, and what it did."""
    place = tmp_path_factory.mktemp("hub")
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING_FACE_", "TRANSFORMERS_"))
    } | {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}

    def sweep(results: str, *overrides: str, token: str | None = None):
        environment = clean | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(place / "hf")}
        if token:
            environment["HF_TOKEN"] = token
        hub.take()
        command = [sys.executable, "run.py", "-m", *settings("org/x"), *overrides]
        command = [part for part in command if part != "model.path='org/x'"]
        process = subprocess.run(
            [*command, f"results='{place / results}'", f"cache='{place / 'cache'}'"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        done = {}
        for file in (place / results).rglob("result.json"):
            result = json.loads(file.read_text())
            done[result["config"]["model"]["path"]] = SimpleNamespace(
                **result, samples=pd.read_parquet(file.parent / "samples.parquet")
            )
        lines = [x for x in process.stderr.splitlines() if x.startswith("failed: ")]
        return SimpleNamespace(
            place=place, results=place / results, done=done, failed=lines,
            exit=process.returncode, stdout=process.stdout, stderr=process.stderr,
            requests=hub.take(),
        )  # fmt: skip

    (place / "cache").mkdir()
    for name in ("documents", "datasets"):  # converted once, in the cache that all tests share
        if (CACHE / name).is_dir():
            (place / "cache" / name).symlink_to(CACHE / name)
    return sweep


@pytest.fixture(scope="module")
def first(sweep, hub, shards):
    """No token; the large shard breaks off once, the small one every time."""
    hub.cuts[shards[0]] = [CHUNK + 50_000]
    hub.cuts[shards[1]] = [1000] * 6
    return sweep(
        "first",
        "model.path=org/tiny,org/gated,org/closed,org/pickle,org/absent,org/wide",
        "model.revision=nope,main",
    )


@pytest.fixture(scope="module")
def second(first, sweep, hub):
    """With a token, by tag, over a connection that holds."""
    hub.cuts.clear()
    return sweep(
        "second",
        "model.path=org/tiny,org/gated,org/closed,org/refusing,org/wide",
        "model.revision=v2",
        token=TOKEN,
    )


@pytest.fixture(scope="module")
def local(folders, tmp_path_factory):
    """local(name): the same cell from a local folder, in this process."""

    def local(name: str):
        results = tmp_path_factory.mktemp("local")
        done = run(results, *settings(str(folders[name])))
        folder = results / done.cell.path
        return SimpleNamespace(
            **json.loads((folder / "result.json").read_text()),
            samples=pd.read_parquet(folder / "samples.parquet"),
        )

    return local


def assert_same_numbers(one, other):
    assert one.provenance["model_hash"] == other.provenance["model_hash"]
    assert (one.metrics, one.kl, one.realised_bits) == (
        other.metrics,
        other.kl,
        other.realised_bits,
    )
    pd.testing.assert_frame_equal(one.samples, other.samples)


def the_line(sweep, path: str, about: str) -> str:
    """The one line that says why a cell of the model at `path` failed, with `about` in it."""
    name = cell(*settings(path)).path
    (line,) = [x for x in sweep.failed if x.startswith(f"failed: {name}: ") and about in x]
    return line


def test_a_cell_from_the_hub_is_the_one_from_a_folder(first, local, hub):
    assert set(first.done) == {"org/tiny"}
    cell = first.done["org/tiny"]
    assert cell.config["model"]["revision"] == "main"
    assert cell.provenance["model_revision"] == hub.repositories["org/tiny"].refs["main"]
    assert_same_numbers(cell, local("tiny"))


def test_another_revision_is_another_cell_with_other_weights(first, second, local, hub):
    main, v2 = first.done["org/tiny"], second.done["org/tiny"]
    assert v2.provenance["model_revision"] == hub.repositories["org/tiny"].refs["v2"]
    assert v2.provenance["model_revision"] != main.provenance["model_revision"]
    assert v2.hash != main.hash and v2.kl != main.kl
    assert_same_numbers(v2, local("other"))
    fetched = [r.file for r in second.requests if r.path.startswith("/org/tiny/")]
    assert "config.json" in fetched  # a HEAD tells that it is the same file as in the first commit
    assert not [r for r in second.requests if r.method == "GET" and r.path.startswith("/org/tiny/")
                and r.file != "model.safetensors"]  # fmt: skip

    in_its_place = Store(first.results).settled(cell(*settings("org/tiny"), "model.revision=v2"))
    assert in_its_place.failed and "model.revision: main -> v2" in in_its_place.message


def test_what_cannot_be_had_fails_in_one_line_and_costs_no_other(first):
    assert first.exit == 1 and len(first.failed) == 11
    assert "1 cells run, 0 were stored, 11 failed" in first.stdout
    assert "Traceback" not in first.stderr + first.stdout
    assert the_line(first, "org/tiny", "").endswith(
        "ConfigError: model.revision=nope: not in org/tiny on the hub; accepted: its branches, "
        "tags and commits in full"
    )
    absent = [x for x in first.failed if "model.path=org/absent: no such repository" in x]
    assert len(absent) == 2


@pytest.mark.parametrize("path", ["org/a..b", "org/a--b", "org./a", "org/a.", "org/a.git"])
def test_what_the_hub_cannot_have_is_refused_before_it_is_asked(path):
    from huggingface_hub.utils import validate_repo_id

    with pytest.raises(ValueError):
        validate_repo_id(path)
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        cell(*settings(path))


def test_a_gated_model_says_what_to_do(first, second):
    lines = [x for x in first.failed if "gated on the hub, no token" in x]
    assert sum("org/gated" in x for x in lines) == 1  # it has no revision `nope`
    assert sum("org/closed" in x for x in lines) == 2  # it does not say what revisions it has
    assert all("accept its licence there, then set HF_TOKEN" in x for x in lines)
    line = the_line(second, "org/refusing", "gated on the hub, no access for this token")
    assert "accept its licence" in line and second.exit == 1 and len(second.failed) == 1


def test_a_gated_model_runs_with_a_token_that_is_written_nowhere(first, second, local):
    expected = local("tiny")
    for path in ("org/gated", "org/closed"):
        assert_same_numbers(second.done[path], expected)
    sent = [r.token for r in second.requests if r.path.startswith("/org/gated/")]
    assert sent and set(sent) == {TOKEN}
    elsewhere = [r.token for r in second.requests if r.path.startswith("/cdn/")]
    assert elsewhere and set(elsewhere) == {None}  # the files' own host never sees it
    assert "Trying to resume download" in first.stderr  # a message with a signed address in it
    for one in (first, second):
        assert TOKEN not in one.stdout + one.stderr
        assert SIGNATURE not in one.stdout + one.stderr
    files = [file for file in second.place.rglob("*") if file.is_file()]
    assert any(file.name == "result.json" for file in files)
    assert any(file.suffix == ".safetensors" for file in files)
    for file in files:
        content = file.read_bytes()
        assert TOKEN.encode() not in content, file
        assert SIGNATURE.encode() not in content, file


def test_a_pickle_is_refused_and_nothing_of_its_repository_fetched(first):
    line = the_line(first, "org/pickle", "safetensors")
    assert line.endswith("model.path=org/pickle: no *.safetensors there; accepted: safetensors")
    touched = [r.path for r in first.requests if "org/pickle" in r.path]
    assert touched and all(path.startswith("/api/") for path in touched)
    assert not list(first.place.rglob("pytorch_model.bin"))


def test_a_download_that_breaks_off_goes_on_where_it_was(first, shards):
    """Within a run: huggingface_hub asks again for what it has not yet written."""
    ranges = [r.range for r in first.requests if r.method == "GET" and r.file == shards[0]
              and r.path.startswith("/cdn/")]  # fmt: skip
    assert ranges == [None, f"bytes={CHUNK}-"]


def test_a_download_that_is_given_up_is_finished_by_the_next_run(first, second, shards, local):
    line = the_line(first, "org/wide", "broke off")
    assert "RemoteProtocolError" in line and "run it again" in line and "http" not in line
    tries = [r for r in first.requests if r.file == shards[1] and r.path.startswith("/cdn/")]
    assert len(tries) == 6 and {r.range for r in tries} == {None}  # no step of it was ever whole
    assert not list(first.place.rglob("*.incomplete"))

    again = [r.file for r in second.requests if r.path.startswith("/cdn/org/wide/")]
    assert again == [shards[1]]
    assert_same_numbers(second.done["org/wide"], local("wide"))
    blobs = [f for f in second.place.glob("hf/hub/models--org--*/blobs/*") if len(f.name) == 64]
    assert len(blobs) == 6
    for blob in blobs:  # huggingface_hub checks the size alone
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name


def test_a_branch_that_moved_is_not_asked_for_again(first, second, sweep, hub):
    """A stored cell is the answer to its settings; which commit that was is in its provenance."""
    refs = hub.repositories["org/tiny"].refs
    before = refs["main"]
    refs["main"] = refs["v2"]
    try:
        again = sweep("first", "model.path=org/tiny", "model.revision=main")
    finally:
        refs["main"] = before
    assert again.exit == 0 and again.stdout.rstrip().endswith("stored") and not again.requests
    assert again.done["org/tiny"].provenance["model_revision"] == before


def test_without_the_hub_a_cell_runs_from_the_cache(first, second, sweep, hub):
    """The last of this module: it closes the hub."""
    hub.close()
    down = sweep("down", "model.path=org/tiny", "model.revision=main")
    assert down.exit == 0 and set(down.done) == {"org/tiny"}
    assert_same_numbers(down.done["org/tiny"], first.done["org/tiny"])
    refused = sweep("refused", "model.path=org/new", "model.revision=main")
    assert refused.exit == 2 and not refused.results.exists()
    (line,) = refused.stderr.splitlines()
    assert "org/new is not in the hub's cache, and the hub cannot be reached (ConnectError)" in line
