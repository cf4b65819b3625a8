"""Attacks by untrusted recipes, through `taskvec merge --recipe`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from support.inputs import existing, make_inputs
from taskvec.documents import DEEPEST, LARGEST

from . import Attack

LAUGHS = "\n".join(["a: &a0 [x, x, x, x, x, x, x, x, x]", *(f"b{i}: &a{i + 1} [{f'*a{i}, ' * 9}]" for i in range(9))])
# document -> a part of the error message
ODD = {
    LAUGHS: "anchors and aliases are not supported",
    "a: &a [*a]": "line 1: anchors and aliases are not supported",
    "&a x: 1": "anchors and aliases",
    "merge_method: *x": "anchors and aliases",
    "models: " + "[" * 5000: f"more than {DEEPEST} levels of nested lists and mappings",
    "{" * 5000: "more than 16 levels",
    "- " * 5000: "more than 16 levels",
    "a: !!bool x": "tags such as !!bool are not supported, found 'tag:yaml.org,2002:bool'",
    "a: !!python/object/apply:os.system [ls]": "tags such as !!bool are not supported",
    "a: !x y": "tags such as !!bool are not supported",
    "!!map {a: 1}": "tags such as !!bool",
    "? [a]\n: 1": "a key must be text, found a list or a mapping",
    "? {a: 1}\n: 1": "a key must be text, found a list or a mapping",
    "1: x": "a key must be text, found '1'",
    "null: x": "a key must be text, found 'null'",
    "true: x": "a key must be text, found 'true'",
    "<<: {merge_method: ties}": "a key must be text, found '<<'",
    "a: 1\na: 2": "line 2, column 1: the key 'a' is given twice",
    "a: " + "9" * 5000: "number with too many digits",
    "a: [": "is not YAML",
    "a: b: c": "is not YAML",
    "\tx": "is not YAML",
    "--- a\n--- b": "is not YAML",
    "%TAG ! x\n": "is not YAML",
    "a: '\x1b[31m'": "is not YAML",
    "a: x\0y": "is not YAML",
    "": "expected keys such as merge_method and models, found NoneType",
    "[]": "expected keys such as merge_method and models, found list",
    "2024-01-01": "expected keys such as merge_method and models, found str",
    "merge_method: 2024-01-01": "no merge method '2024-01-01'",
}

COMMAND = ("merge", "--recipe", "r.yml", "-o", "out")
MODELS = "models: [{model: a.lota}]\n"
TIES = f"merge_method: ties\nbase_model: base\n{MODELS}"
HUGE = "1" + "0" * 400
# value of a parameter -> the error message, after the file, the model and the name of the parameter
VALUES = {
    HUGE: "expected a finite number, found a number of about 400 digits",
    f"-{HUGE}": "expected a finite number, found a number of about 400 digits",
    ".nan": "expected a finite number, found nan",
    "-.inf": "expected a finite number, found -inf",
    "1e999": "expected a finite number, found inf",
    "true": "expected a number, found True",
    "null": "expected a number, found None",
    "abc": "expected a number, found 'abc'",
    "2024-01-01": "expected a number, found '2024-01-01'",
    "2024-01-01T00:00:00Z": "expected a number, found '2024-01-01T00:00:00Z'",
    "0x1p3": "expected a number, found '0x1p3'",
    "[]": r"a setting must be a number, a list of numbers or a list of rules, found \[\]",
    "[[1]]": "expected a number, found \\[1\\]",
    "[1, {value: 1}]": "a rule must be {filter: NAME, value: NUMBER}, found 1",
    "{}": "a rule must be {filter: NAME, value: NUMBER}, found {}",
    "{filter: 3, value: 1}": "the filter of a rule must be text, found 3",
    "{filter: a}": "a rule must be {filter: NAME, value: NUMBER}, found {'filter': 'a'}",
    "{value: {value: 1}}": "expected a number, found {'value': 1}",
    "'" + "x" * 60_000 + "'": "expected a number, found 'x{20,100}",
    '"\\e[31m\\n"': r"expected a number, found '\\x1b\[31m\\n'",
}
SETTINGS = {
    TIES.replace("a.lota", f"a.lota, parameters: {{weight: {value}}}"): f"r.yml: model a.lota: weight: {says}"
    for value, says in VALUES.items()
} | {
    f"{TIES}parameters: {{{name}: {value}}}\n": f"r.yml: {name}: {VALUES[value]}"
    for name in ("density", "lambda")
    for value in (HUGE, ".nan", "{filter: 3, value: 1}")
}
OTHERS = {
    # methods and keys
    f"merge_method: slerp\n{MODELS}": "names no base_model",
    f"merge_method: sleep\n{MODELS}": "no merge method 'sleep'; known are arcee_fusion, auto",
    f"merge_method: [ties]\n{MODELS}": r"merge_method must be the name of a method, found \['ties'\]",
    f"merge_method: {'x' * 9000}\n{MODELS}": "no merge method 'x{20,100}",
    f'merge_method: "\\e[2J"\n{MODELS}': r"no merge method '\\x1b\[2J'",
    MODELS: "merge_method must be the name of a method, found None",
    f"{TIES}slices: []": "'models' and 'slices' exclude each other",
    "merge_method: passthrough\nslices: [{sources: [{model: base, layer_range: [0, 99999999999]}]}]": "layer_range",
    "merge_method: passthrough\nslices: [{sources: [{model: base, layer_range: [-1, 2]}]}]": "layer_range must be",
    f"{TIES}chat_template: loud": "chat_template must be auto, alpaca, .* or the text of a template, found 'loud'",
    TIES.replace("a.lota", "a.lota, weight: 2"): "unknown key of model a.lota 'weight': settings belong under",
    f"{TIES}density: 0.5": "unknown key 'density': settings belong under the 'parameters'",
    f"{TIES}parameters: 3": "parameters must be names and values, found 3",
    f"{TIES}parameters: {{normalize: maybe}}": "normalize: expected true or false for all tensors, found 'maybe'",
    f"{TIES}parameters: {{dialect: theirs}}": "dialect",
    f"{TIES}parameters: {{dialect: [1]}}": "dialect",
    f"{TIES}parameters: {{elect: {{a: 1}}}}": "elect",
    f"{TIES}parameters: {{density: 2}}": "density",
    f"{TIES}parameters: {{density: -0.5}}": "density",
    f"{TIES}parameters: {{density: [0.1, 3]}}": "density",
    f"{TIES}dtype: float64": "dtype is one of float32, bfloat16, float16, found 'float64'",
    f"{TIES}dtype: [float32]": r"dtype is one of float32, bfloat16, float16, found \['float32'\]",
    f"{TIES}tokenizer: {{source: [a]}}": "tokenizer: source must be base, union or a model",
    f"{TIES}tokenizer: 3": "tokenizer must be {source: …, tokens: …}, found 3",
    TIES.replace("ties", "dare_ties") + "parameters: {density: 0.5, seed: abc}": "seed",
    TIES.replace("ties", "dare_ties") + f"parameters: {{density: 0.5, seed: {HUGE}}}": "seed",
    TIES.replace("ties", "breadcrumbs") + "parameters: {density: 0.5, gamma: [0, 1]}": "gamma must be one number",
    TIES.replace("ties", "breadcrumbs") + "parameters: {density: 0.5, gamma: 2}": "gamma",
    TIES.replace("ties", "disjoint")
    + "parameters: {on_overlap: 3}": "on.overlap is one of error, sum, mean, larger, first, found 3",
    # models
    "merge_method: ties\nmodels: {model: a.lota}": "'models' must be a list of models",
    "merge_method: ties\nmodels: []": "'models' must be a list of models",
    "merge_method: ties\nmodels: [a.lota]": "a model must be {model: PATH, parameters: …}, found 'a.lota'",
    "merge_method: ties\nmodels: [{model: [a.lota]}]": "a model must be {model: PATH, parameters: …}, found",
    "merge_method: ties\nmodels: [{model: ''}]": "a model must be {model: PATH, parameters: …}, found",
    'merge_method: ties\nmodels: [{model: "a\\0.lota"}]': "a model must be {model: PATH, parameters: …}, found",
    'merge_method: ties\nmodels: [{model: "\\e[2J.lota"}]': "a model must be {model: PATH, parameters: …}, found",
    f"merge_method: ties\nbase_model: base\nmodels: [{{model: {'x' * 1000}}}]": "x: ",
    f"merge_method: ties\nbase_model: base\nmodels: [{{model: {'x/' * 500}}}]": "x/: ",
    f"merge_method: ties\nmodels: [{{model: {'x' * 1000}.lota}}]": "names no base_model",
    "merge_method: ties\nmodels: [{model: nowhere.lota}]": "names no base_model",
    "merge_method: ties\nbase_model: base\nmodels: [{model: nowhere}]": "nowhere: no such file or folder",
    "merge_method: ties\nbase_model: base\nmodels: [{model: ../nowhere}]": "../nowhere: no such file or folder",
    "merge_method: ties\nbase_model: base\nmodels: [{model: pipe.lota}]": "pipe.lota is not a regular file",
    "merge_method: ties\nbase_model: base\nmodels: [{model: folder.lota}]": "folder.lota is a folder, not a .lota file",
    "merge_method: ties\nbase_model: base\nmodels: [{model: base}]": "nothing to merge",
    f"merge_method: ties\nbase_model: nowhere\n{MODELS}": "nowhere: no such file or folder",
    "merge_method: ties\nbase_model: base\nmodels: [{model: nowhere.lota}]": "nowhere.lota: no such file",
    f"merge_method: ties\nbase_model: [base]\n{MODELS}": "base_model must be a path or a Hub id, found",
    f'merge_method: ties\nbase_model: "base\\0"\n{MODELS}': "base_model must be a path or a Hub id, found",
    f"merge_method: ties\n{MODELS}": "names no base_model, so only a .lota file can be written",
    "merge_method: ties\nbase_model: base\nmodels: [{model: /dev/zero}]": "/dev/zero is not a regular file",
    "merge_method: ties\nbase_model: base\nmodels: [{model: pipe}]": "pipe is not a regular file",
    "merge_method: ties\nbase_model: base\nmodels: [{model: empty}]": "empty holds no .safetensors file",
    f"merge_method: ties\nbase_model: pipe\n{MODELS}": "pipe is not a regular file",
    f"merge_method: ties\nbase_model: /dev/zero\n{MODELS}": "/dev/zero is not a regular file",
    f"merge_method: ties\nbase_model: b.lota\n{MODELS}": "base_model must be a model, found the task vector b.lota",
}
UNREADABLE = {
    f"{TIES}tokenizer_source: union": "base: tokenizer.json: expected an object with a model, found {}",
    "merge_method: ties\nbase_model: base\nmodels: [{model: /proc/self/mem}]": "/proc/self/mem",
    "merge_method: ties\nbase_model: base\nmodels: [{model: text.lota}]": "text.lota is not a safetensors file",
}
NOTED = {
    f"{TIES}what: 1\nparameters: {{temperature: 3}}": "note: the key what has .*\nnote: temperature has no",
    f'{TIES}"\\e[2J": 1': r"note: the key '?\\x1b\[2J'? has no effect",
    f"{TIES}{'x' * 900}: 1": "note: the key x{20,40}…x{20,40} has no effect",
    TIES.replace("[{model: a.lota}]", "[{model: a.lota}, {model: a.lota}]"): "is given twice",
    TIES.replace("[{model: a.lota}]", "[{model: a.lota}, {model: tuned}]"): "",
}
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (lambda path: path.mkdir(), "it is a folder; expected a YAML file"),
    "a FIFO": (os.mkfifo, "it is not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"),
    "a link to nothing": (lambda path: path.symlink_to("gone"), "no such file"),
    "a link in a circle": (lambda path: path.symlink_to("r.yml"), "it cannot be read|no such file"),
    "nothing": (lambda path: None, "no such file"),
    "a vector": (lambda path: path.symlink_to("a.lota"), "UTF-8|not YAML|larger"),
    "random bytes": (lambda path: path.write_bytes(bytes(range(256))), "it cannot be read as UTF-8 text"),
    "zero bytes": (lambda path: path.write_bytes(bytes(100)), "it is not YAML"),
    "UTF-16": (lambda path: path.write_bytes(TIES.encode("utf-16")), "it cannot be read as UTF-8 text"),
    "too large": (lambda path: path.write_text(TIES + "#" * LARGEST), "larger than 65,536 bytes"),
}


def written(document: str, folder: Path) -> Sequence[object]:
    """Write a recipe into a folder with valid inputs and with files that are no inputs."""
    make_inputs(folder)
    (folder / "r.yml").write_text(document, encoding="utf-8")
    for name in ("empty", "folder.lota"):
        (folder / name).mkdir()
    for name in ("pipe", "pipe.lota"):
        os.mkfifo(folder / name)
    existing(folder / "text.lota")
    return COMMAND


def placed(make: Callable[[Path], object], folder: Path) -> Sequence[object]:
    """Create something else in place of the recipe."""
    make_inputs(folder)
    make(folder / "r.yml")
    return COMMAND


def tabled(what: str, table: dict[str, str], code: int) -> list[Attack]:
    """Return attacks from documents and a regular expression for the message of each."""
    return [
        Attack(f"{what} {number}, {document[-40:]!a}", partial(written, document), says, code)
        for number, (document, says) in enumerate(table.items(), 1)
    ]


ATTACKS = [
    *tabled("document", {document: re.escape(says) for document, says in ODD.items()}, 2),
    *tabled("setting", SETTINGS, 2),
    *tabled("recipe", OTHERS, 2),
    *tabled("recipe of a file that cannot be read", UNREADABLE, 1),
    *tabled("noted recipe", NOTED, 0),
    *(Attack(f"{name} as recipe", partial(placed, make), says, 2) for name, (make, says) in FILES.items()),
]
