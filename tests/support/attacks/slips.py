"""Mistyped commands, which must not destroy any file and must be answered by one sentence."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from support.building import write_checkpoint
from support.inputs import FILES, MOVED, TENSORS, existing, into, make_inputs
from taskvec import diff, open_checkpoint

from . import Attack

INPUT = "is an input"
HOLDS = "contains the input"
# name -> command line, and a part of the error message
ONTO_INPUTS: dict[str, tuple[str, str]] = {
    "pack, shard of base": ("pack base tuned -o base/model-00001-of-00002.safetensors --force", INPUT),
    "pack, shard of tuned": ("pack base tuned -o tuned/model-00002-of-00002.safetensors --force", INPUT),
    "pack, side file": ("pack base tuned -o tuned/tokenizer.json --force", INPUT),
    "pack, index": ("pack base tuned -o base/model.safetensors.index.json --force", INPUT),
    "pack, through a link to the folder": ("pack base tuned -o way/config.json --force", INPUT),
    "pack, by another way": ("pack base tuned -o base/../base/config.json --force", INPUT),
    "pack, weights behind a link": ("pack linked tuned -o blobs/x.safetensors --force", INPUT),
    "pack, the link to weights": ("pack linked tuned -o linked/model.safetensors --force", INPUT),
    "pack, a file as base": ("pack blobs/x.safetensors tuned -o blobs/x.safetensors --force", INPUT),
    "unpack, the base": ("unpack a.lota --base base -o base --force", INPUT),
    "unpack, a link to the base": ("unpack a.lota --base base -o way --force", INPUT),
    "unpack, the base by a link": ("unpack a.lota --base way -o base --force", INPUT),
    "unpack, weights behind a link": ("unpack a.lota --base linked -o blobs --force", HOLDS),
    "unpack, all above": ("unpack a.lota --base base -o . --force", HOLDS),
    "unpack, the vector's folder": ("unpack dir/v.lota --base base -o dir --force", HOLDS),
    "merge, a vector": ("merge a.lota b.lota -o b.lota --force", INPUT),
    "merge, a link to a vector": ("merge a.lota b.lota -o linked.lota --force", INPUT),
    "merge, a vector by a link": ("merge linked.lota b.lota -o a.lota --force", INPUT),
    "merge, the base": ("merge a.lota b.lota --base base -o base --force", INPUT),
    "merge, a vector's folder": ("merge a.lota dir/v.lota --base base -o dir --force", HOLDS),
    "recipe, the recipe": ("merge --recipe recipe.yml -o recipe.yml/ --force", "is a file"),
    "recipe, a model": ("merge --recipe recipe.yml -o tuned --force", INPUT),
    "recipe, the base": ("merge --recipe recipe.yml -o base --force", INPUT),
    "recipe, to a file": ("merge --recipe recipe.lota -o recipe.lota --force", INPUT),
    "arith": ("arith 2*a.lota -o a.lota --force", INPUT),
    "arith, one of two": ("arith 'a.lota + b.lota' -o b.lota --force", INPUT),
    "arith, the base": ("arith 'a.lota >> a.lota' --base base -o base/config.json --force", INPUT),
    "inspect": ("inspect picture.png --plot picture.png --force", INPUT),
    "inspect, of two": ("inspect a.lota picture.png --plot picture.png --force", INPUT),
    "train, the data": ("train base rows.jsonl -o rows.jsonl --force", INPUT),
    "train, the base": ("train base rows.jsonl -o base/config.json --force", INPUT),
    "train, evaluation": ("train base rows.jsonl --eval-data eval.jsonl -o eval.jsonl --force", INPUT),
    "train, mixed in": ("train base rows.jsonl --mix eval.jsonl:0.1 -o eval.jsonl --force", INPUT),
    "train, the mask": ("train base rows.jsonl --mask-from a.lota -o a.lota --force", INPUT),
    "train, an earlier task": ("train base rows.jsonl --disjoint-from a.lota -o a.lota --force", INPUT),
    "train, the start": ("train base rows.jsonl --start-from a.lota -o a.lota --force", INPUT),
    "train, plot on data": ("train base data.png -o x.lota --plot data.png --force", INPUT),
    "train, plot on the output": ("train base rows.jsonl -o x.png --plot ./x.png --force", "given for two outputs"),
    "eval, the data": ("eval base --data rows.jsonl --metric exact_match --answers rows.jsonl --force", INPUT),
    "eval, the model": ("eval base --data rows.jsonl --metric exact_match --answers base/config.json --force", INPUT),
    "eval, a vector": (
        "eval base --data rows.jsonl --with a.lota --metric exact_match --answers a.lota --force",
        INPUT,
    ),
}
NO_OUTPUTS = {
    "a device": ("unpack a.lota --base base -o /dev/null --force", "/dev/null is a device"),
    "a full device": ("arith 2*a.lota -o /dev/full --force", "/dev/full is a device"),
    "standard output": ("pack base tuned -o /dev/stdout --force", "/dev/stdout is a device"),
    "a device for answers": (
        "eval base --data rows.jsonl --metric exact_match --answers /dev/null --force",
        "/dev/null is a device",
    ),
    "a FIFO": ("merge a.lota b.lota -o pipe --force", "pipe is a FIFO"),
    "a FIFO, training": ("train base rows.jsonl -o pipe --force", "pipe is a FIFO"),
    "a FIFO as folder": ("unpack a.lota --base base -o pipe --force", "pipe is a FIFO"),
    "a folder": ("pack base tuned -o dir --force", "dir is a folder; the output is a file"),
    "a folder, by a link": ("arith 2*a.lota -o way --force", "way is a folder; the output is a file"),
    "a folder for a picture": ("inspect a.lota --plot dir --force", "dir"),
    "a link to nothing": ("pack base tuned -o dangling --force", "dangling is a link to gone, which does not exist"),
    "a link to nothing, for a folder": ("merge a.lota --base base -o dangling --force", "is a link to gone"),
    "a slash": ("merge a.lota b.lota -o zdir/ --force", "zdir/ is a folder; the output is a file"),
    "a slash, arith": ("arith 2*a.lota -o zdir/", "the output is a file"),
    "a slash, pack": ("pack base tuned -o zdir/", "the output is a file"),
    "a folder that is no model": ("unpack a.lota --base base -o letters --force", "contains no model"),
    "a model with more in it": ("merge a.lota --base base -o trained --force", "contains the folder 'checkpoint-5'"),
    "below a file": ("pack base tuned -o a.lota/x", "is not a folder"),
    "a name that is too long": (f"pack base tuned -o {'x' * 300}", "is too long"),
    "one file for two outputs": ("train base rows.jsonl -o x.png --plot x.png", "given for two outputs"),
    "what is there": ("merge a.lota -o b.lota", "b.lota exists already; --force replaces it"),
    "a folder that is there": ("unpack a.lota --base base -o tuned", "tuned exists already; --force replaces it"),
    "a picture of no kind": ("inspect a.lota --plot x.txt", "a picture must be one of .png, .svg, .pdf"),
}
ABSENT = {
    "base": ("pack gone tuned -o x.lota", "gone: no such file or folder"),
    "tuned": ("pack base gone -o x.lota", "gone: no such file or folder"),
    "base of unpack": ("unpack a.lota --base gone -o x", "gone: no such file or folder"),
    "base of merge": ("merge a.lota --base gone -o x", "gone: no such file or folder"),
    "base of arith": ("arith 'a.lota >> b.lota' --base gone -o x.lota", "gone: no such file or folder"),
    "base of verify": ("verify a.lota --base gone", "gone: no such file or folder"),
    "base of train": ("train gone rows.jsonl -o x.lota", "gone: no such file or folder"),
    "model of eval": ("eval gone --data rows.jsonl", "gone: no such file or folder"),
    "a name that is too long as base": (f"pack {'x' * 999} tuned -o x.lota", "xx: no such file or folder"),
    "name in arith": ("arith 2*gone.lota -o x.lota", "there is no file 'gone.lota'"),
    "data of train": ("train base gone.jsonl -o x.lota", "gone.jsonl: no such file"),
    "data of train to mix in": ("train base rows.jsonl --mix gone.jsonl:0.1 -o x.lota", "gone.jsonl: no such file"),
    "data of train to evaluate on": ("train base rows.jsonl --eval-data gone -o x.lota", "gone: no such file"),
    "data of eval": ("eval base --data gone.jsonl", "gone.jsonl: no such file"),
    "recipe": ("merge --recipe gone.yml -o x", "gone.yml: no such file"),
    "folder of the output": ("pack base tuned -o /proc/gone/x.lota", "cannot be written"),
}
ABSENT_VECTORS = {
    "vector of inspect": ("inspect gone.lota", "gone.lota"),
    "vector of inspect, one of two": ("inspect a.lota gone.lota", "gone.lota"),
    "vector of verify": ("verify gone.lota", "gone.lota"),
    "vector of unpack": ("unpack gone.lota --base base -o x", "gone.lota"),
    "vector of merge": ("merge a.lota gone.lota -o x.lota", "gone.lota"),
    "vector of eval": ("eval base --data rows.jsonl --with gone.lota", "gone.lota"),
    "mask of train": ("train base rows.jsonl --mask-from gone.lota -o x.lota", "gone.lota"),
    "start of train": ("train base rows.jsonl --start-from gone.lota -o x.lota", "gone.lota"),
}
TOO_LONG = {"a name that is too long as vector": (f"inspect {'x' * 999}", "xx")}
MISTAKEN = {
    "folders to merge": (
        "merge base tuned -o x.lota",
        "base is a model folder, not a .lota file: compute its difference from the base",
    ),
    "a folder to inspect": (
        "inspect base",
        "base is a model folder, not a .lota file: compute its difference from the base first",
    ),
    "a folder to verify": ("verify base", "base is a model folder, not a .lota file"),
    "a folder to unpack": ("unpack tuned --base base -o x", "tuned is a model folder, not a .lota file"),
    "a folder to wear": ("eval base --data rows.jsonl --with tuned", "tuned is a model folder, not a .lota file"),
    "a folder without a model": ("inspect letters", "letters is a folder, not a .lota file, and contains no model"),
    "a recipe as vector": ("merge recipe.yml -o x.lota", "is merged by taskvec merge --recipe recipe.yml"),
    "a folder as recipe": ("merge --recipe base -o x", "it is a folder; expected a YAML file"),
    "a model folder as data": ("eval base --data dir", "dir is a model folder; expected JSON lines"),
    "a FIFO as data": ("eval base --data pipe", "pipe is not a regular file; expected JSON lines"),
    "a device as data": ("train base /dev/zero -o x.lota", "/dev/zero is not a regular file; expected JSON lines"),
    "a FIFO to mix in": ("train base rows.jsonl --mix pipe:0.1 -o x.lota", "pipe is not a regular file"),
    "a mix without a share": ("train base rows.jsonl --mix rows.jsonl -o x.lota", "takes DATA:SHARE"),
    "a vector beside a recipe": ("merge a.lota --recipe recipe.yml -o x", "VECTORS cannot be used with --recipe"),
    "weights beside a recipe": ("merge --recipe recipe.yml --weights 1 -o x", "--weights cannot be used with --recipe"),
    "nothing to merge": ("merge -o x.lota", "nothing to merge: give .lota files, or --recipe"),
    "unpack on a vector": ("unpack a.lota --base b.lota -o x", "b.lota is a .lota file, which holds changes"),
    "pack of two vectors": ("pack a.lota b.lota -o x.lota", "a.lota is a .lota file, which holds changes"),
    "pack of a vector that is called weights": ("pack base v.safetensors -o x.lota", "v.safetensors is a .lota file"),
    "a vector as model": ("eval a.lota --data rows.jsonl", "a.lota is a .lota file, which holds changes"),
    "a FIFO as model": ("pack base pipe -o x.lota", "pipe is not a regular file"),
    "a device as model": ("pack base /dev/zero -o x.lota", "/dev/zero is not a regular file"),
    "a codec": ("pack base tuned --codec zip -o x.lota", "codec is one of auto, fast, paper64, plain, found 'zip'"),
    "a codec of a merge": ("merge a.lota --codec zip -o x.lota", "codec is one of auto, fast, paper64, plain"),
    "a codec of a folder": ("merge a.lota --base base --codec fast -o x", "--codec is for a .lota file"),
    "a kind": ("pack base tuned --kind delta -o x.lota", "kind is one of vector, patch, found 'delta'"),
    "a method": ("merge a.lota --method slerp -o x.lota", "no merge method 'slerp'"),
    "a dialect": ("merge a.lota --method ties --dialect theirs -o x.lota", "dialect is one of"),
    "an option of another method": ("merge a.lota --method linear --gamma 0.1 -o x.lota", "gamma"),
    "a dtype": ("merge a.lota --base base --dtype int4 -o x", "dtype is one of float32, bfloat16, float16"),
    "a metric": ("eval base --data rows.jsonl --metric bleu", "bleu"),
    "a device": ("eval base --data rows.jsonl --device tpu9", "tpu9"),
}
NUMBERS = {
    "two bytes a shard": (
        "merge a.lota --base base --shard-size 2 -o x",
        "--shard-size must be a size with a unit, such as 500MB or 2GB",
    ),
    "two bytes a model": (
        "unpack a.lota --base base --max-size 2 -o x",
        "--max-size must be a size with a unit, such as 500MB or 2GB",
    ),
    "abc for weights": ("merge a.lota b.lota --weights abc -o x.lota", "--weights takes numbers .* found 'abc'"),
    "nothing for weights": ("merge a.lota b.lota --weights '' -o x.lota", "--weights takes numbers .* found ''"),
    "nan for a weight": ("merge a.lota b.lota --weights 1,nan -o x.lota", "weight of b.lota: .* found nan"),
    "a huge weight": (f"merge a.lota b.lota --weights 1{'0' * 400},1 -o x.lota", "weight of a.lota: .* found inf"),
    "one weight for two": ("merge a.lota b.lota --weights 1 -o x.lota", "1 weights for 2 vectors"),
    "three weights for two": ("merge a.lota b.lota --weights 1,1,1 -o x.lota", "3 weights for 2 vectors"),
    "nan for lambda": ("merge a.lota --lambda nan -o x.lota", "lambda: expected a finite number, found nan"),
    "density 2": ("merge a.lota --method ties --density 2 -o x.lota", "density of a.lota: .* between 0 and 1, found 2"),
    "density nan": ("merge a.lota --method ties --density nan -o x.lota", "density of a.lota: .* found nan"),
    "density abc": ("merge a.lota --method ties --density abc -o x.lota", "--density takes numbers"),
    "gamma 7": ("merge a.lota --method breadcrumbs --density 0.5 --gamma 7 -o x.lota", "gamma"),
    "sparsity 1": ("pack base tuned --sparsity 1 -o x.lota", "must be between 0 and 1, both excluded; found 1"),
    "sparsity nan": ("pack base tuned --sparsity nan -o x.lota", "must be between 0 and 1, both excluded; found nan"),
    "sparsity 1 of train": ("train base rows.jsonl --sparsity 1 -o x.lota", "sparsity"),
    "a share of nan": ("train base rows.jsonl --mix rows.jsonl:nan -o x.lota", "found .nan"),
    "no steps": ("train base rows.jsonl --steps=-1 -o x.lota", "steps"),
    "a learning rate of nan": ("train base rows.jsonl --lr nan -o x.lota", "lr"),
    "a batch of none": ("eval base --data rows.jsonl --batch-size 0", "batch-size"),
}
EXPRESSIONS = {
    "two numbers in a row": ("0.5 >> 0.5", ">> takes two vectors, found two numbers"),
    "a number": ("0.5", "the expression is a number, 0.5: expected a vector"),
    "infinity": ("1e999*a.lota", "the factor of a.lota must be a finite number, found inf"),
    "minus infinity": ("a.lota / 1e999", "can only be divided by a finite non-zero number, found inf"),
    "400 zeros": (f"1{'0' * 400}*a.lota", "the factor of a.lota must be a finite number, found inf"),
    "zero": ("a.lota / 0", "cannot divide by zero"),
    "a product of vectors": ("a.lota*b.lota", "takes numbers and at most one vector, found two vectors"),
    "a sum with a number": ("a.lota + 3", "takes two vectors or two numbers, found a vector and a number"),
    "no name": ("a.lota - x.lota", "there is no file 'x.lota'"),
    "no white space": ("a.lota-b.lota", "there is no file 'a.lota-b.lota': put white space around"),
    "nothing": ("", "the expression is empty"),
    "201 words": (" + ".join(["a.lota"] * 101), "at most 200 names, numbers and signs, found 201"),
    "a parenthesis": ("(a.lota", "this parenthesis is never closed"),
    "many parentheses": ("(" * 5000, "at most 200 names, numbers and signs|the expression ends with"),
    "a quotation mark": ("'a.lota", "this quotation mark is never closed"),
    "escapes": ("\x1b[2J", r"there is no file '\\x1b\[2J'"),
    "Python": ("__import__('os')", "expected an operator"),
}
OTHER_BASES = {
    "unpack on a wrong base": ("unpack a.lota --base other -o x", "other is not the base of a.lota"),
    "unpack on the result": ("unpack a.lota --base tuned -o x", "a.lota is applied to tuned already"),
    "a patch on the result": ("unpack p.lota --base tuned -o x", "p.lota is applied to tuned already"),
    "verify on a wrong base": ("verify a.lota --base other", "other is not the base of a.lota"),
    "verify on the result": ("verify a.lota --base tuned", "a.lota is applied to tuned already"),
    "merge onto a wrong base": ("merge a.lota b.lota --base other -o x", "other is not the base of a.lota"),
    "merge onto the result": ("merge a.lota --base tuned -o x", "tuned is not the base of a.lota"),
    "merge of two bases": ("merge a.lota c.lota -o x.lota", "the vectors have different bases: base .* and other"),
    "a sum of two bases": ("arith 'a.lota + c.lota' -o x.lota", "the vectors have different bases: base .* and other"),
    "eval on the result": ("eval tuned --data rows.jsonl --with a.lota", "."),
    "pack of two models": ("pack base other -o x.lota", "base and other have no tensor in common"),
    "a chain that does not fit": ("arith 'a.lota >> a.lota >> a.lota' -o x.lota", "a.lota starts from base"),
    "a chain on a wrong base": ("arith 'a.lota >> b.lota' --base other -o x.lota", "other is not the base of a.lota"),
    "merge of a patch": ("merge p.lota a.lota -o x.lota", "p.lota is a patch: it contains new bits, not deltas"),
    "merge of a patch onto its base": ("merge p.lota --base base -o x", "p.lota is a patch"),
    "twice a patch": ("arith 2*p.lota -o x.lota", "p.lota is a patch"),
    "a patch in a sum": ("arith 'a.lota - p.lota' -o x.lota", "p.lota is a patch"),
    "a patch to compare": ("inspect p.lota a.lota", "p.lota is a patch"),
}
NOTED = {
    "one vector twice": ("merge a.lota b.lota a.lota -o x.lota", "note: a.lota is given twice and counts each time"),
    "one vector by two names": ("merge a.lota linked.lota -o x.lota", "are the same vector|is given twice"),
    "a chain there and back": ("arith 'a.lota >> back.lota >> a.lota' -o x.lota", "x.lota: "),
    "a slash behind a folder": ("unpack a.lota --base base/ -o new/", "byte for byte"),
}
COMMANDS_ON_DAMAGE = {
    "inspect": ("inspect x.lota", "x.lota"),
    "verify": ("verify x.lota", "x.lota"),
    "unpack": ("unpack x.lota --base base -o out", "x.lota"),
    "merge": ("merge a.lota x.lota -o y.lota", "x.lota"),
    "arith": ("arith x.lota -o y.lota", "x.lota"),
}


def prepared(typed: str, folder: Path) -> Sequence[object]:
    """Create all kinds of inputs and unrelated files; return the arguments of the command line."""
    make_inputs(folder)
    base, tuned = open_checkpoint(folder / "base"), open_checkpoint(folder / "tuned")
    other = write_checkpoint(folder / "other", {f"another.{name}": each for name, each in TENSORS.items()}, 1, FILES)
    moved = dict(zip(other.tensors, MOVED.values(), strict=True))
    diff(other, write_checkpoint(folder / "another", moved, 1, FILES)).save(folder / "c.lota")
    diff(base, tuned, kind="patch").save(folder / "p.lota")
    diff(tuned, base).save(folder / "back.lota")
    copies = {"picture.png": "a.lota", "recipe.lota": "recipe.yml", "v.safetensors": "a.lota"}
    copies |= dict.fromkeys(("eval.jsonl", "data.png"), "rows.jsonl")
    for name, source in copies.items():
        (folder / name).write_bytes((folder / source).read_bytes())
    os.mkfifo(folder / "pipe")
    (folder / "dangling").symlink_to("gone")
    into("letters/letter.txt")(folder)
    into("trained/checkpoint-5/model.safetensors")(folder)
    into("trained/model.safetensors")(folder)
    return shlex.split(typed)


def tabled(what: str, table: dict[str, tuple[str, str]], code: int = 2) -> list[Attack]:
    return [Attack(f"{what}{name}", partial(prepared, typed), says, code) for name, (typed, says) in table.items()]


def beside(name: str, put: Callable[[Path], object], typed: str, folder: Path) -> Sequence[object]:
    """Create a folder where the command keeps its unfinished work, then prepare the command as usual."""
    put(folder / name)
    return prepared(typed, folder)


MERGE = "merge a.lota b.lota -o m --force --base"
TRAIN = "train base rows.jsonl -o x.lota --force"
UNFINISHED = (
    [
        Attack(f"{what}, {name}", partial(beside, part, put, typed), says, code)
        for name, put in {"somebody's": into("letter.txt"), "ours": into("run.json", b'{"kind": "merge"}')}.items()
        for what, part, typed, says, code in (
            ("unfinished merge, base mistyped", "m.part", f"{MERGE} bse", "bse: no such file or folder", 2),
            ("unfinished merge, wrong base", "m.part", f"{MERGE} other", ".", 1),
            ("unfinished training, base mistyped", "x.lota.run", TRAIN.replace("base", "bse"), "bse: no such file", 2),
            ("unfinished training, mask mistyped", "x.lota.run", f"{TRAIN} --mask-from c.lta", "c.lta", 2),
        )
    ]
    + [
        # the folder is looked at before the vectors
        Attack(
            f"unfinished merge, vector mistyped, {name}",
            partial(beside, "m.part", put, f"{MERGE} base c.lta"),
            says,
            code,
        )
        for name, put, says, code in (
            ("somebody's", into("letter.txt"), "m.part contains files", 1),
            ("ours", into("run.json", b'{"kind": "merge"}'), "c.lta: no such file", 2),
        )
    ]
    + [
        Attack(
            "a file of somebody's as unfinished merge",
            partial(beside, "m.part", existing, f"{MERGE} base"),
            "m.part",
            1,
        ),
        Attack(
            "a folder of somebody's as unfinished merge",
            partial(beside, "m.part", into("letter.txt"), f"{MERGE} base"),
            "m.part contains files, but no record",
        ),
        Attack(
            "a folder of somebody's as unfinished training",
            partial(beside, "x.lota.run", into("letter.txt"), TRAIN),
            "x.lota.run contains files, but no record",
        ),
    ]
)


def damaged(damage: Callable[[bytes], bytes], typed: str, folder: Path) -> Sequence[object]:
    make_inputs(folder)
    (folder / "x.lota").write_bytes(damage((folder / "a.lota").read_bytes()))
    return shlex.split(typed)


def flipped(place: int) -> Callable[[bytes], bytes]:
    """Return a function that flips one bit of a byte counted from the end."""
    return lambda content: content[:-place] + bytes([content[-place] ^ 1]) + content[len(content) - place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a bit of the last block": flipped(1),
    "a bit of the description": lambda content: content.replace(b"0", b"1", 1),
    "the end missing": lambda content: content[:-1],
    "half of it missing": lambda content: content[: len(content) // 2],
    "the beginning missing": lambda content: content[8:],
    "more behind it": lambda content: content + b"\0",
    "one twice": lambda content: content * 2,
}


def with_code(verb: str, folder: Path) -> Sequence[object]:
    """Write a model with its own Python code, which creates a file if it runs."""
    from support.models import make_llama, write_rows

    model = make_llama(folder / "own")
    (model / "own.py").write_text(f"import pathlib\npathlib.Path({str(folder / 'marker')!r}).touch()\n")
    config = json.loads((model / "config.json").read_text())
    asked = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (model / "config.json").write_text(json.dumps(config | asked))
    write_rows(folder / "rows.jsonl")
    return {"eval": ("eval", "own", "--data", "rows.jsonl"), "train": ("train", "own", "rows.jsonl", "-o", "x")}[verb]


LINES = {
    "an endless list": (b"[" * 100_000, "x.jsonl:1: not valid JSON"),
    "half a character": (b'{"text": "one \\ud800"}', r"x.jsonl:1: '\\ud800' is half of a surrogate pair"),
    "half a character in a prompt": (
        b'{"prompt": "\\udc00", "completion": "one"}',
        "x.jsonl:1: .* half of a surrogate",
    ),
    "escapes as keys": (b'{"\\u001b[2J": 1}', r"x.jsonl:1: expected .*, found the keys \['\\x1b\[2J'\]"),
    "a million keys": (
        b"{%s}" % b",".join(b'"%d":0' % n for n in range(100_000)),
        "x.jsonl:1: expected .*, found the keys",
    ),
    "NaN": (b'{"text": NaN}', 'x.jsonl:1: "text" must be text, found nan'),
    "a text of lists": (b'{"text": %s}' % (b"[" * 900 + b"]" * 900), 'x.jsonl:1: "text" must be text, found '),
    "a number of many digits": (b'{"text": 1%s}' % (b"0" * 9000), "x.jsonl:1: not valid JSON"),
    "no text": (b"\x80\x04.", "x.jsonl cannot be read as UTF-8 text"),
    "nothing": (b"", "x.jsonl: the file is empty"),
}


def line(content: bytes, folder: Path) -> Sequence[object]:
    make_inputs(folder)
    (folder / "x.jsonl").write_bytes(content)
    return ("eval", "base", "--data", "x.jsonl")


ATTACKS = [
    *tabled("onto an input: ", ONTO_INPUTS),
    *tabled("onto ", NO_OUTPUTS),
    *tabled("not there: ", ABSENT),
    *tabled("not there: ", ABSENT_VECTORS),
    *tabled("not there: ", TOO_LONG, 1),
    *tabled("mistaken: ", MISTAKEN),
    *tabled("number: ", NUMBERS),
    *(
        Attack(f"expression: {name}", partial(prepared, shlex.join(["arith", text, "-o", "x.lota"])), says, 2)
        for name, (text, says) in EXPRESSIONS.items()
    ),
    *tabled("", OTHER_BASES, 1),
    *tabled("noted: ", NOTED, 0),
    *UNFINISHED,
    *(
        Attack(f"{name}: {command}", partial(damaged, damage, typed), says)
        for name, damage in DAMAGE.items()
        for command, (typed, says) in COMMANDS_ON_DAMAGE.items()
        if (name, command) != ("a bit of the last block", "inspect")  # inspect reads no block
    ),
    *(Attack(f"data: {name}", partial(line, content), says) for name, (content, says) in LINES.items()),
    *(
        Attack(f"code of a model's own: {verb}", partial(with_code, verb), "run only with", 2, "y\n" * 9, is_heavy=True)
        for verb in ("eval", "train")
    ),
]
