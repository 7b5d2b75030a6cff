"""Malformed configurations end in one line, with nothing loaded or written. A part of tests/faults/test_input.py."""

import pytest
from conftest import cell
from hypothesis import HealthCheck, Phase, given, seed, settings
from malformed import BOMB, HEAD, MALFORMED, valid
from trials import Trials, not_refused

from mixprec.cell import ConfigError
from mixprec.schemes import scheme_named


@pytest.fixture(scope="module")
def trial():
    with Trials() as trial:
        yield trial


@seed(0)  # `make test` is the same every time; the faults take other seeds
@settings(
    max_examples=60, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(request=MALFORMED)
def test_what_is_malformed_is_refused(trial, request):
    done = trial(*request.arguments, file=request.file)
    assert not not_refused(done), f"{not_refused(done)}: {done.stderr}"


# Each of these was accepted, ended in a traceback or in several lines, or took minutes.
FOUND = {
    ("results=",): "results=: accepted: a folder that can be written",
    ("results=/etc/passwd",): "results=/etc/passwd: not one; accepted: a folder",
    ("results=/proc/x",): "results=/proc/x: not one; accepted: a folder",
    ("results='~/x'",): "~ is not expanded",
    ("hydra.run.dir=/proc/x",): "hydra.run.dir=/proc/x: not one",
    ("model.limit=" + "9" * 400,): "accepted: 1 or more documents per task",
    ("seed=-1", "baseline=random"): "seed=-1: accepted: 0 to 4294967295",
    ("model.name='a\x1b[31mb'",): "model.name=a [31mb: accepted: printable characters",
    ("model.name=${oc.env:HF_TOKEN}",): "model.name: holds a token",
    ("model.revision=../../x",): "accepted: a branch, a tag or a commit",
    ("model.device_map=gpu",): "model.device_map=gpu: accepted: null, auto",
    ("calibration.dataset=x",): "accepted: hub id:configuration:split:column",
    ("tracking.project=a/b",): "tracking.project=a/b: accepted: up to 96 letters",
    ("baseline=bf16", "baseline.rule=fisher"): "baseline.rule=fisher: accepted: uniform",
    ("baseline=low", "baseline.name=lowest"): "baseline.name=lowest: accepted: bf16, low, high",
    ("baseline=head8", "baseline.name=x8"): "a name that begins with head or tail",
    ("baseline.needs=[]",): "accepted with rule autoscheme: budget, calibration",
    ("baseline.takes=[target]", "target.kl=1"): "accepted with rule autoscheme: none",
    ("model=../experiment/demo",): "the name of a file in conf/model",
    ("budget=${budget}",): "budget: Recursive interpolation detected",
    ("--nope",): "unrecognized arguments: --nope; accepted: KEY=VALUE",
    ("--experimental-rerun", "x"): "--experimental-rerun reads a pickle",
    ("-m", "seed=range(1000000000)"): "a sweep of 1e+09 jobs; accepted: 1 to 10000",
    ("-m", "seed=range(5,5)"): "a sweep of 0 jobs",
    ("-m", "hydra.launcher._target_=os.system"): "hydra.launcher._target_=os.system: accepted: hydra.",
    ("-m", "hydra.sweeper.max_batch_size=0"): "accepted: null, or 1 or more",
    ("hydra.callbacks.sweep=null",): "hydra.callbacks.sweep._target_=None: accepted: those of",
    ("+hydra.callbacks.x._target_=builtins.print",): "hydra.callbacks.x._target_=builtins.print",
    ("seed=[" + "1," * 50_000 + "1]",): "seed: 100008 characters, at most 8192 are read",
}  # fmt: skip
FOUND_IN_FILES = {
    "experiment: ../../evil": "experiment=../../evil: accepted: up to 96 letters",
    "seed: !!python/object/apply:os.system ['id']": "could not determine a constructor for the tag",
    "seed: " + "[" * 2000 + "]" * 2000: "nested too deep",
    BOMB: "aliases within aliases",
    "seed: '" + "x" * 10**7 + "'": "bytes; accepted: up to 65536 bytes",
    "seed: \x00": "special characters are not allowed",
}


@pytest.mark.parametrize("arguments", FOUND, ids=lambda a: " ".join(a)[:50])
def test_what_was_found_stays_refused(trial, arguments):
    done = trial(*arguments)
    assert not not_refused(done), f"{not_refused(done)}: {done.stderr}"
    assert FOUND[arguments] in done.stderr


@pytest.mark.parametrize("content", FOUND_IN_FILES, ids=lambda text: text[:30])
def test_what_was_found_in_files_stays_refused(trial, content):
    done = trial("experiment=bad", file=(HEAD + content).encode())
    assert not not_refused(done), f"{not_refused(done)}: {done.stderr}"
    assert FOUND_IN_FILES[content] in done.stderr


def test_an_interpolation_in_a_sweep_is_of_its_own_cell(trial):
    """It was resolved for all cells at once, before the sweep set what it points to."""
    done = trial(
        "-m", "budget=5,6", "eval.limit='${calibration.samples}'", "calibration.samples=3,0"
    )
    assert "eval.limit=0: accepted" in done.stderr and not not_refused(done)
    done = trial(
        "-m", "eval.limit='${calibration.samples}'", "calibration.samples=3,4", "budget=5,99"
    )
    assert "budget=99: accepted" in done.stderr and not not_refused(done)


@seed(0)
@settings(
    max_examples=30, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(request=valid())
def test_what_is_valid_is_accepted(request):
    try:
        one = cell(*request.arguments)
    except ConfigError as error:
        pytest.fail(f"{request}: {error}")
    if one.budget is not None:
        bits = [scheme_named(name).bits for name in one.options.schemes]
        assert min(bits) <= one.budget <= max(bits)
    assert len(one.hash) == 64 and not one.path.startswith("/") and ".." not in one.path.split("/")
