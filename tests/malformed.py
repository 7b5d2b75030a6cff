"""Requests that must be refused, and some that must not, made from the types of conf/.

Each of `malformed()` is wrong by construction: a value of another type, a key that does not exist, a value
or a combination that cannot be, an interpolation that leads nowhere, YAML that is none. How it is
said varies: on the command line, in a file of `--config-dir`, in a sweep among good values.
"""

from __future__ import annotations

import json
import math
import string
import typing
from dataclasses import dataclass, fields, is_dataclass

from hypothesis import strategies as st
from omegaconf import MISSING

from mixprec import cell
from mixprec.cell import Config


@dataclass(frozen=True)
class Request:
    """Arguments of run.py, and the content of conf/experiment/bad.yaml in a folder of its own."""

    arguments: tuple[str, ...]
    file: bytes | None = None

    def __repr__(self) -> str:
        shown = [a if len(a) < 200 else f"{a[:80]}… ({len(a)} characters)" for a in self.arguments]
        file = None if self.file is None else self.file[:300]
        return f"Request({shown}, {file})"


# --- the types --------------------------------------------------------------------------------


REQUIRED: set[str] = set()  # keys that have no default


def _walk(node: type, prefix: str = ""):
    types = typing.get_type_hints(node, vars(cell))
    REQUIRED.update(f"{prefix}{one.name}" for one in fields(node) if one.default == MISSING)
    for one in fields(node):
        kind = types[one.name]
        if is_dataclass(kind):
            yield f"{prefix}{one.name}", "group", False
            yield from _walk(kind, f"{prefix}{one.name}.")
        elif typing.get_origin(kind) is typing.Union:
            yield f"{prefix}{one.name}", typing.get_args(kind)[0].__name__, True
        else:
            yield f"{prefix}{one.name}", getattr(kind, "__name__", str(kind)), False


KEYS = [key for key in _walk(Config) if key[0] != "experiment"]  # a group on the command line
LEAVES = [key for key in KEYS if key[1] != "group"]
GROUPS = ["model", "options", "baseline", "eval", "calibration", "tracking", "experiment"]
# What is no value of a type, as YAML and Hydra write it.
NO_VALUE = {
    "int": ["five", "1.5", "[]", "[1]", "{}", "{a: 1}", "true", "1e3", "''", "0.0", "nan", "12a"],
    "float": ["five", "[]", "[5]", "{}", "{a: 1}", "true", "''", "5 bits", "4,5 bits"],
    "bool": ["maybe", "[]", "[true]", "{}", "{a: 1}", "2.5", "''", "truee"],
    "str": ["[]", "[a]", "{}", "{a: b}"],
    "list": ["five", "5", "{}", "{a: b}", "true", "[[a]]", "[{a: b}]", "[null]", "''"],
    "group": ["5", "true", "[a]", "{unknown_key: 1}", "1.5"],
}
WORDS = st.text(string.ascii_lowercase, min_size=1, max_size=12)
ODD_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=40)
LOOK_ALIKES = str.maketrans("aceopxi5", "асеорхі５")  # Cyrillic, and a wide 5


def quoted(text: str) -> str:
    """As one value of a Hydra override, whatever is in it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def in_file(key: str, raw: str) -> bytes:
    """The file that sets `key`, with dots, to a value in YAML."""
    *groups, own = key.split(".")
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(groups)]
    content = "\n".join(["# @package _global_", *lines, f"{'  ' * len(groups)}{own}: {raw}", ""])
    return content.encode(errors="surrogatepass")


def _is_name(text: str) -> bool:
    first, alphabet = string.ascii_letters + string.digits, string.ascii_letters + string.digits
    return 0 < len(text) <= 96 and text[0] in first and set(text) <= set(alphabet + "._-")


# --- one wrong value --------------------------------------------------------------------------


@st.composite
def wrong_type(draw):
    key, kind, optional = draw(st.sampled_from(KEYS))
    raw = draw(
        st.sampled_from(
            [
                *NO_VALUE[kind],
                *([] if optional else ["null"]),
                *(["???"] if key in REQUIRED else []),
            ]
        )
        if kind != "group"
        else st.sampled_from(NO_VALUE[kind])
    )
    return key, raw


@st.composite
def wrong_text(draw):
    """Text where a number or a truth value belongs."""
    key, _, _ = draw(st.sampled_from([k for k in LEAVES if k[1] in ("int", "float", "bool")]))
    text = draw(ODD_TEXT)

    def is_one(convert) -> bool:
        try:
            return convert(text.strip()) is not None
        except ValueError:
            return False

    bad = not is_one(int) and not is_one(float) and text.strip().lower() not in (
        "yes", "y", "on", "true", "no", "n", "off", "false", "null", "", "~"
    )  # fmt: skip
    return (key, json.dumps(text) if bad else '"x"')


def _outside(low: float, high: float):
    numbers = st.floats().filter(lambda x: not low <= x <= high)  # NaN and the infinities too
    return numbers.map(lambda x: str(x).replace("inf", ".inf").replace("nan", ".nan"))


def _integers(low: int, high: int):
    below, above = st.integers(max_value=low - 1), st.integers(min_value=high + 1)
    # 400 digits and more: longer than a file's name may be.
    return st.one_of(below, above, st.just(10**400), st.just(-(10**4000))).map(str)


def _names(bad_only: bool = True):
    long = st.integers(97, 4000).map(lambda n: "x" * n)
    hand = st.sampled_from(
        ["../x", "a/b", "/", "..", ".", "", " ", "a b", "-x", "_x", "a\nb", "a\x1b[31mb", "a\x7f",
         "mоdel", "ｘ", "a\u202eb", "con\u200b", "\ufeffx", "a\\b", "a:b", "a;b", "$(id)", "`id`",
         "${}", "é", "名", "😀", "a\u0000b", "a\ud800b", "a" * 97]
    )  # fmt: skip
    return st.one_of(hand, long, ODD_TEXT.filter(lambda text: not _is_name(text))).map(
        lambda text: json.dumps(text.replace("${", "$ {"))
    )


def _word_outside(*accepted: str):
    words = st.one_of(WORDS, st.sampled_from([word.upper() for word in accepted]))
    made = words.filter(lambda word: word not in accepted)
    return made.map(json.dumps)


def _schemes():
    names = [*cell.SCHEMES, "bf16"]

    def impossible(chosen: list[str]) -> bool:
        bits = [16 if name == "bf16" else cell.SCHEMES[name].bits for name in chosen]
        kinds = {name[0] for name in chosen if name != "bf16"}
        wide = any(name.endswith("g128") for name in chosen)  # 128 does not divide 576
        return wide or len(kinds) > 1 or len(bits) < 2 or sorted(set(bits)) != bits

    made = st.lists(st.sampled_from(names), max_size=4).filter(impossible)
    # Refused for budget=5 too, where they do not reach so far; that they are is all that counts.
    return made.map(json.dumps)


def _tasks():
    made = st.lists(st.sampled_from([*cell.FIVE_TASKS, "arc_easy", "a/b", ""]), max_size=7)
    return made.filter(
        lambda tasks: (
            not tasks or len(set(tasks)) != len(tasks) or not set(tasks) <= set(cell.FIVE_TASKS)
        )
    ).map(json.dumps)


FOLDERS = [
    "", " ", "~/x", "~", "/proc/x", "/proc/self/x", "/sys/x", "/dev/null", "/dev/null/x",
    "/etc/passwd", "/etc/passwd/x", "a\nb", "a\x00b", "\x1b[2J", "x" * 256, "x/" + "y" * 300,
    "a\u202eb", "x" * 5000, "run.py/\ud800",
]  # fmt: skip
PATHS = [
    "", " ", "nonsense", "a/b/c", "/", "/etc", "/etc/passwd", "/no/such/folder", "../../etc", "~",
    "~nobody-of-that-name/x", "./", "https://example.org/a/b", "https://u:p@example.org/a/b",
    "git@example.org:a/b", "a/b.git", "a--b/c", "file:///etc/passwd", "packaged/", "Packaged",
    "a/" + "b" * 97, "x" * 10_000, "Qwen/Qwen3-8B\n", "Qwеn/Qwen3-8B", "a\x00b", "hf://a/b", "s3://a/b",
]  # fmt: skip
NO_DATASETS = [
    "",
    "x",
    "a:b",
    "a/b:c:d",
    "a/b:c:d:e:f:g h",
    "../x:::y",
    ":::",
    "/etc:a:b:c",
    "a/b::train:",
]
NO_REVISIONS = [
    "",
    " ",
    "../../x",
    "a//b",
    "/etc",
    "a b",
    "-x",
    "x/",
    "a\nb",
    "x" * 256,
    "refs/../x",
]

_MOST = cell.MOST
IMPOSSIBLE = {
    "budget": st.one_of(_outside(4, 8), st.just("null")),
    "seed": _integers(0, 2**32 - 1),
    "eval.seed": _integers(0, 2**32 - 1),
    "calibration.seed": _integers(0, 2**32 - 1),
    "model.limit": _integers(1, _MOST),
    "eval.limit": _integers(1, _MOST),
    "eval.batch_size": _integers(1, _MOST),
    "eval.kl.sequences": _integers(0, _MOST),
    "eval.kl.tokens": _integers(2, _MOST),
    "calibration.samples": _integers(1, _MOST),
    "calibration.tokens": _integers(1, _MOST),
    "model.group_size": _integers(1, _MOST),
    "tuning.iters": _integers(0, cell.MOST_ITERS),
    "tuning.samples": _integers(8, _MOST),  # fewer than tuning.batch_size
    "tuning.batch_size": _integers(1, 128),
    "tuning.tokens": _integers(1, _MOST),
    "baseline.rule": _word_outside("autoscheme", "fisher", "ends"),
    "baseline.needs": st.sampled_from(["[]", "[x]", "[budget]", "[seed]", "[budget, x]"]),
    "baseline.takes": st.sampled_from(["[x]", "[target]", "[fused]", "[fused, target]"]),
    "model.source": _word_outside(*cell.SOURCES),
    "eval.source": _word_outside(*cell.SOURCES),
    "calibration.source": _word_outside(*cell.SOURCES),
    "model.dtype": _word_outside(*cell.DTYPES),
    "eval.engine": _word_outside(*cell.ENGINES[:2]),
    "calibration.unreached": _word_outside(*cell.UNREACHED),
    "tracking.mode": _word_outside(*cell.TRACKING_MODES),
    "model.device_map": _word_outside(
        "auto", "balanced", "sequential", "cpu", "cuda", "xpu", "mps"
    ),
    "model.name": _names(),
    "options.name": _names(),
    "baseline.name": _names(),
    "eval.name": _names(),
    "tracking.project": _names(),
    "tracking.entity": _names(),
    "options.schemes": _schemes(),
    "eval.tasks": _tasks(),
    "results": st.sampled_from(FOLDERS).map(json.dumps),
    "cache": st.sampled_from(FOLDERS).map(json.dumps),
    "model.path": st.sampled_from(PATHS).map(json.dumps),
    "model.revision": st.sampled_from(NO_REVISIONS).map(json.dumps),
    "calibration.dataset": st.sampled_from(NO_DATASETS).map(json.dumps),
    "eval.kl.dataset": st.sampled_from(NO_DATASETS).map(json.dumps),
    "model.trust_remote_code": st.just("true"),
}


@st.composite
def impossible(draw):
    key = draw(st.sampled_from(sorted(IMPOSSIBLE)))
    return key, draw(IMPOSSIBLE[key])


@st.composite
def huge(draw):
    """Ten megabytes where a word, a number or a list belongs; only a file can hold them."""
    key = draw(st.sampled_from([key for key, _, _ in LEAVES if key != "model.reason"]))
    of = draw(st.sampled_from(["x", "5", "a/", "é"]))
    return key, json.dumps(of * (10 * 1024 * 1024 // len(of)))


INTERPOLATIONS = [
    "${nothing}", "${model.nothing}", "${oc.env:NO_SUCH_VARIABLE}", "${hydra:no.such}", "${hydra:}",
    "${eval:1+1}", "${oc.eval:1}", "${python:1}", "${", "${}", "${a", "${..x}", "${.x.y}", "${now}",
    "${oc.decode:'['}", "${oc.create:}", "${oc.dict.keys:seed}", "${hydra:job.num}", "${hydra:job.id}",
    "${oc.env:HF_TOKEN}", "a-${oc.env:HF_TOKEN}-b", "${oc.env:WANDB_API_KEY}", "${oc.env:}", "${env:HOME}",
]  # fmt: skip


@st.composite
def interpolation(draw):
    """One that leads nowhere, to itself, to a token, or to what is not of the type."""
    key, kind, _ = draw(st.sampled_from(LEAVES))
    choices = [*INTERPOLATIONS, f"${{{key}}}", f"a-${{{key}}}"]
    if kind in ("int", "float", "bool"):
        choices += ["${oc.env:HOME}", "${hydra:runtime.cwd}", "${model.path}", "${eval.tasks}"]
    if kind == "list":
        choices += ["${oc.env:HOME}", "${seed}", "${model}"]
    return key, json.dumps(draw(st.sampled_from(choices)))


# --- how it is said ---------------------------------------------------------------------------

GOOD = [
    "seed=3",
    "model.limit=7",
    "tracking=off",
    "eval.kl.tokens=64",
    "force=true",
    "profile=true",
]
GOOD_SWEEPS = ["fused=false", "calibration.seed=1,2", "eval.batch_size=4,8"]


def as_value(raw: str) -> str:
    """A value in YAML as Hydra's command line takes it: quoted, if YAML quotes it."""
    if raw.startswith('"'):
        return quoted(json.loads(raw))
    if raw.startswith("["):
        return raw.replace('"', "'")
    return raw.replace(".inf", "inf").replace(".nan", "nan")


def _fits_the_command_line(text: str) -> bool:
    return len(text.encode(errors="surrogatepass")) < 100_000 and "\x00" not in text


@st.composite
def one_wrong_value(draw):
    source = draw(
        st.sampled_from([wrong_type, wrong_text, impossible, impossible, interpolation, huge])
    )
    if source is huge and draw(st.integers(0, 9)):  # one in ten of them: they are slow
        source = impossible
    key, raw = draw(source())
    value = as_value(raw)
    said = draw(st.sampled_from(["argument", "added", "file", "sweep", "among good"]))
    others = [o for o in draw(st.lists(st.sampled_from(GOOD), max_size=2, unique=True))
              if not key.startswith(o.split("=")[0].split(".")[0])]  # fmt: skip
    if said == "file" or not _fits_the_command_line(value):
        return Request(("experiment=bad", *others), in_file(key, raw))
    if said == "added":
        return Request((f"++{key}={value}", *others))
    if said == "sweep":
        swept = [o for o in GOOD_SWEEPS if not key.startswith(o.split(".")[0].split("=")[0])]
        return Request(("-m", f"{key}={value}", *others, *swept[:1]))
    if said == "among good" and key in ("budget", "model.limit", "seed"):
        good = {"budget": "5,6", "model.limit": "3,4", "seed": "1,2"}[key]
        return Request(("-m", f"{key}={good},{value}", *[o for o in others if key not in o]))
    return Request((f"{key}={value}", *others))


@st.composite
def unknown_key(draw):
    prefix = draw(st.sampled_from(["", *[f"{key}." for key, kind, _ in KEYS if kind == "group"]]))
    known = {key for key, _, _ in KEYS} | {"experiment", "hydra", "defaults"}
    near = [key.rpartition(".")[2] for key, _, _ in KEYS if key.rpartition(".")[0] + "." == prefix]
    near = near or [key for key, _, _ in KEYS if "." not in key]
    misspelt = st.sampled_from(near).flatmap(
        lambda key: st.sampled_from(
            [
                key[1:],
                key + "s",
                key + "_",
                key.upper(),
                key.translate(LOOK_ALIKES) + "ѕ",
                key + "." + key,
            ]
        )
    )
    own = draw(st.one_of(WORDS, misspelt).filter(lambda key: key and prefix + key not in known))
    key, value = prefix + own, draw(st.sampled_from(["1", "null", "[]", "x", "{a: 1}"]))
    sign = draw(st.sampled_from(["", "+", "++", "~", "file"]))
    if sign == "file":
        return Request(("experiment=bad",), in_file(key, value))
    return Request((f"~{key}",) if sign == "~" else (f"{sign}{key}={value}",))


@st.composite
def unknown_choice(draw):
    group = draw(st.sampled_from(GROUPS))
    choice = draw(
        st.one_of(
            WORDS.map(lambda word: f"no_{word}"),
            st.sampled_from(
                ["../../etc", "../../../../../../etc/passwd", "/etc/passwd", "a/b", "[a]", "{a: b}", "''",
                 "' '", "5", "true", "x.yaml", "../experiment/demo", "../model/smollm2_135m", "./x", "..",
                 "'\x1b[31m'", "smоllm2_135m", "'a,b'", "x" * 5000, "${oc.env:HOME}", "${nothing}",
                 "$(id)", "???", "pkg://os", "file:///etc/passwd", "'\u202e'"]
            ),
        )
    )  # fmt: skip
    sign = draw(st.sampled_from(["", "", "-m", "sweep"]))
    if sign == "sweep" and group in ("options", "baseline", "tracking"):
        good = {"options": "mxfp4_mxfp8", "baseline": "low", "tracking": "off"}[group]
        return Request(("-m", f"{group}={good},{choice}"))
    return Request((*(["-m"] if sign == "-m" else []), f"{group}={choice}"))


SYNTAX = [
    "seed=[" + "1," * 45_000 + "1]", "seed=[" + "1," * 4000 + "1]",
    "", "=", "=5", "budget", "budget=[1", "budget={a", "budget=)", "budget='", 'budget="', "budget=5]", "a b",
    "budget = = 5", "+", "++", "~", "~~budget", "+++seed=1", "budget=choice(", "budget=choice(1", "budget=f(5)",
    "budget=range(1)x", "budget=int(x)", "budget=${", "[budget]=5", "budget==5", "budget:5", "budget=5=6", "@=1",
    "model@=x", "a@b:c=d", "model=a:b:c", ",", "budget=,", "budget=5,,6", "budget=5,6", "\x1b[31m", "bud\nget=5",
    "model.path=\\", "seed=" + "[" * 3000, "seed=" + "{a:" * 500, "seed=" + "(" * 2000, "x" * 90_000,
    "x=" + "y" * 90_000, "." * 5000 + "=1", "a." * 4000 + "b=1", "budget=" + "," * 2000, "~budget", "~model",
    "~options", "~eval", "~baseline", "~nothing", "~model.path", "~tracking", "бюджет=5", "ｂudget=5", "budget=５ bits",
]  # fmt: skip
FLAGS = [
    ("--nope",), ("-x",), ("--cfg",), ("--cfg", "nope"), ("-m", "--cfg", "job"), ("--resolve",), ("-sc",),
    ("--config-dir", "/no/such"), ("--config-dir", "/etc/passwd"), ("--config-path", "/no/such"),
    ("--config-name", "no_such"), ("--config-name", "../../etc/passwd"), ("--info", "nope"),
    ("--experimental-rerun", "x.pickle"), ("--experimental-rerun", "/dev/null"), ("-m", "--run"), ("--config-dir",),
    ("hydra=null",), ("hydra=5",), ("hydra.mode=BOTH",), ("hydra.verbose={}",), ("hydra/launcher=no_such",),
    ("hydra/sweeper=no_such",), ("hydra.sweeper.params=[1]",), ("hydra.sweep=null",), ("hydra.nothing=1",),
    ("-m", "hydra.launcher._target_=os.system"), ("hydra.launcher._target_=builtins.eval",),
    ("-m", "hydra.sweeper._target_=os.system"), ("~hydra.callbacks",), ("~hydra.callbacks.sweep",),
    ("hydra.callbacks.sweep=null",), ("hydra.callbacks.sweep._target_=os.system",), ("hydra.callbacks=null",),
    ("+hydra.callbacks.x._target_=os.system", "+hydra.callbacks.x.command=id"),
    ("+hydra.callbacks.x._target_=subprocess.run", "+hydra.callbacks.x.args=[id]"),
    ("+hydra.callbacks.x._target_=builtins.print",), ("+hydra.callbacks.x._target_=antigravity.webbrowser.open",),
    ("+hydra.callbacks.x=5",), ("hydra.callbacks.sweep=5",), ("-m", "hydra.sweeper.max_batch_size=0"),
    ("-m", "hydra.sweeper.max_batch_size=-5"), ("-m", "seed=range(1000000000)"), ("-m", "seed=range(0,1,1e-9)"),
    ("-m", "seed=range(0,5,0)"), ("-m", "seed=range(5,5)"), ("-m", "seed=shuffle(range(1000000000))"),
    ("-m", "budget=interval(4,5)"), ("-m", "baseline=glob(nothing*)"), ("-m", "baseline=glob(*)"),
    ("-m", "seed=range(100)", "model.limit=range(1,100)", "eval.seed=range(100)"), ("-m", "experiment=table1,table2"),
    ("-m", "budget="), ("-m", "budget=5,nan"), ("-m", "budget=5,,6"), ("-m", "eval.tasks=[piqa],[piqa,piqa]"),
    ("-m", "baseline=low,head4"), ("-m", "options=mxfp4_mxfp8,w2g64_w4g64", "baseline=head8"),
    ("-m", "model=smollm2_135m,../../etc"), ("-m", "seed=sort(3,x)"), ("-m", "seed=1,2", "budget=inf"),
    ("baseline=low", "target.kl=0.3"), ("target.kl=0.3",), ("baseline=fisher", "target.kl=0"),
    ("baseline=fisher", "target.kl=-1"), ("baseline=fisher", "target.kl=nan"), ("baseline=fisher", "target.kl=inf"),
    ("fused=true",), ("baseline=head4",), ("options=w2g64_w4g64", "budget=5"), ("options=w2g128_w4g128", "budget=3"),
    ("options=w2g64_w4g64", "budget=3", "baseline=head8"), ("options=w2_w4", "model.group_size=48", "budget=3"),
    ("baseline=bf16", "baseline.rule=fisher"), ("baseline=bf16", "budget=-1"), ("baseline=low", "budget=nan"),
    ("baseline=low", "baseline.name=lowest"), ("baseline=head8", "baseline.name=x8"),
    ("baseline=head8", "baseline.bits=null"), ("baseline=head8", "baseline.bits=99"), ("model=custom",),
    ("model=custom", "model.path=nonsense"), ("model=custom", "model.path=/etc"), ("eval.engine=vllm",),
    ("model.trust_remote_code=true",), ("model.trust_remote_code=true", "model.reason=mine"), ("+model.reason=mine",),
    ("model.reason=mine",), ("tuning.samples=4",), ("hydra.run.dir='/proc/x'",), ("baseline=random", "seed=-1"),
    ("tuning.iters=200", "calibration.source=disk"), ("options=w4_w8", "budget=6", "eval.engine=vllm"),
]  # fmt: skip

HEAD = "# @package _global_\n"
DEEP = 2000
BOMB = "a: &a [x]\n" + "".join(  # a billion values in 300 bytes
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
FILES = [
    BOMB, BOMB + "seed: *j",
    "!!python/object/apply:os.system ['id']", "seed: !!python/object/apply:os.system ['id']",
    "seed: !!python/name:os.system", "model: !!python/object:mixprec.cell.Model {}", "seed: !!python/tuple [1]",
    "seed: !!binary aWQ=", "seed: !!set {a}", "seed: !!nothing 5", "seed: !x 5", "budget: .nan", "budget: .inf",
    "budget: -.inf", "seed: 2020-01-01", "just a sentence", "5", "[a, b]", "- seed: 1", "seed: 1\nseed: 2",
    "seed: [", "seed: {", "seed: 'x", "\tseed: 1", "seed: 1\n  x: 2", "? [a]\n: 1", "1: 2", "null: 3", "true: 4",
    "seed: &a [*a]", "a: &a\n  b: *a", "seed: *nothing", "<<: 5", "defaults: 5", "defaults: [nothing_here]",
    "defaults:\n  - override /model: no_such", "defaults:\n  - /model: smollm2_135m", "defaults:\n  - ../../etc/passwd",
    "defaults:\n  - override /model: [a, b]", "defaults:\n  - {a: b, c: d}", "defaults:\n  - override /no_such: x",
    "model: 5", "model: [a]", "eval: {kl: 5}", "eval: {kl: null}", "options: {schemes: null}",
    "experiment: ../../evil", "experiment: a/b", "experiment: ''", "experiment: [a]", "experiment: ${oc.env:HOME}",
    "_target_: os.system", "model: {_target_: os.system}", "hydra: {callbacks: {x: {_target_: os.system}}}",
    "hydra: {callbacks: {x: {_target_: subprocess.Popen, args: [id]}}}", "hydra: {launcher: {_target_: os.system}}",
    "hydra: {sweeper: {_target_: os.system}}", "hydra: {callbacks: null}", "hydra: 5", "hydra: {run: 5}",
    "seed: " + "[" * DEEP + "]" * DEEP, "seed: " + "{a: " * DEEP + "}" * DEEP, "seed: '" + "x" * 10**7 + "'",
    "x" * 10**7, "seed: [" + "1," * 10**5 + "]", "seed: 9" + "9" * 5000, "---\nseed: 1\n---\nseed: 2",
    "seed: ${seed}", "budget: ${target.kl}\ntarget: {kl: '${budget}'}", "seed: \x07", "seed: \x00",
    "model: {limit: ${eval.limit}}", "calibration: {seed: ${oc.env:HF_TOKEN}}", "model: {name: '${oc.env:HF_TOKEN}'}",
    "model: {trust_remote_code: true}", "model: {trust_remote_code: true, reason: ''}", "tracking: {mode: wandb}",
    "hydra: {sweeper: {params: {budget: '5,99'}}}\nhydra: {}", "# @package a..b\nseed: 1", "model: {path: /etc}",
]  # fmt: skip
BINARY = [
    b"\xff\xfe\x00s\x00e",
    b"\x00" * 100,
    b"seed: \xff\xfe",
    b"\x80\x04\x95\x00.",
    b"PK\x03\x04" * 50,
    b"\xef\xbb\xbf\xef\xbb\xbf: 1",
]

MALFORMED = st.one_of(
    one_wrong_value(),
    one_wrong_value(),
    one_wrong_value(),
    unknown_key(),
    unknown_choice(),
    st.sampled_from(SYNTAX).map(lambda text: Request((text,))),
    st.sampled_from(FLAGS).map(Request),
    st.sampled_from(FILES).map(lambda text: Request(("experiment=bad",), (HEAD + text).encode())),
    st.sampled_from(BINARY).map(lambda content: Request(("experiment=bad",), content)),
)


# --- what must be accepted --------------------------------------------------------------------


@st.composite
def valid(draw):
    options, low, high = draw(
        st.sampled_from(
            [("mxfp4_mxfp8", 4, 8), ("mxfp4_mxfp6_mxfp8", 4, 8), ("mxfp4_mxfp8_bf16", 4, 16), ("w2_w4", 2, 4),
             ("w4_w8", 4, 8), ("w2g64_w4g64", 2, 4), ("mxfp4_mxfp6_mxfp8_bf16", 4, 16)]
        )
    )  # fmt: skip
    above = {"w2_w4": "4", "w2g64_w4g64": "4"}.get(options, "8")
    baseline = draw(
        st.sampled_from(
            ["bf16", "low", "high", "ours", "fisher", "modelopt", "weight_error", "random", "measured_kl",
             "output_error", f"head{above}", f"tail{above}"]
        )
    )  # fmt: skip
    budget = draw(st.floats(low, high))
    chosen = [f"options={options}", f"baseline={baseline}", f"budget={budget!r}"]
    if baseline in ("fisher", "measured_kl") and draw(st.booleans()):
        kl = draw(st.floats(1e-6, 100))
        chosen += [f"target.kl={kl!r}", "budget=null"]
    if baseline in ("fisher", "modelopt", "weight_error") and draw(st.booleans()):
        chosen.append("fused=true")
    tasks = draw(st.lists(st.sampled_from(cell.FIVE_TASKS), min_size=1, unique=True))
    name = draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", fullmatch=True))
    optional = {
        "eval.tasks": f"[{','.join(tasks)}]",
        "eval.name": quoted(name),
        "eval.limit": draw(st.sampled_from(["1", "50", "null"])),
        "eval.seed": str(draw(st.integers(0, 2**32 - 1))),
        "eval.engine": draw(st.sampled_from(cell.ENGINES[:2])),
        "eval.kl.sequences": str(draw(st.integers(0, 64))),
        "eval.kl.tokens": str(draw(st.integers(2, 512))),
        "calibration.samples": str(draw(st.integers(1, 128))),
        "calibration.unreached": draw(st.sampled_from(cell.UNREACHED)),
        "seed": str(draw(st.integers(0, 2**32 - 1))),
        "tuning.iters": draw(st.sampled_from(["0", "200"])),
        "tracking": draw(st.sampled_from(["off", "offline", "online"])),
        "model.limit": draw(st.sampled_from(["1", "1000", "null", "${calibration.samples}"])),
        "results": draw(st.sampled_from(["r", "'a b/c'", "/tmp/x-${now:%Y}", "'é/名'"])),
        "model.dtype": draw(st.sampled_from(cell.DTYPES)),
        "model.device_map": draw(st.sampled_from(["null", "auto", "'cuda:0'", "cpu"])),
    }
    keys = draw(st.lists(st.sampled_from(sorted(optional)), max_size=5, unique=True))
    assert math.isfinite(budget)
    return Request((*chosen, *(f"{key}={optional[key]}" for key in keys)))
