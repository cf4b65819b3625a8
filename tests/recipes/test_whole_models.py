"""Recipes on models of transformers: layers, modules, adapters, tokens, and what the finished folder contains."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from support.adapters import make_adapter
from support.building import package, tensor, write_checkpoint
from support.commands import ok, refused
from support.models import WORDS, make_llama, make_tokenizer
from support.recipes import merged, merged_folder
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from taskvec import apply, diff
from taskvec.recipes.templates import TEMPLATES
from taskvec_formats import Checkpoint, ModelFolder

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings come from transformers


def write(folder: Path, text: str) -> Path:
    (folder / "merge.yaml").write_text(text, encoding="utf-8")
    return folder / "merge.yaml"


def weights(folder: Path) -> dict[str, str]:
    """Return the digests of all files of a folder but its model card, which names the folder."""
    return {name: digest for name, digest in package(folder).items() if name != "README.md"}


def values(checkpoint: Checkpoint, name: str) -> np.ndarray:
    info = checkpoint.tensors[name]
    return checkpoint.bits(name).view(info.dtype.real).astype(np.float32).reshape(info.shape)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three models of one architecture: base, a and b."""
    folder = tmp_path_factory.mktemp("llamas")
    for seed, name in enumerate(("base", "a", "b")):
        make_llama(folder / name, seed=seed)
    return folder


def test_layers_of_two_models_become_a_model_that_loads(llamas: Path, tmp_path: Path) -> None:
    recipe = write(
        tmp_path,
        "merge_method: passthrough\nslices:\n"
        f"- sources: [{{model: {llamas / 'a'}, layer_range: [0, 2]}}]\n"
        f"- sources: [{{model: {llamas / 'b'}, layer_range: [1, 2], parameters: {{scale: 0.5}}}}]\n",
    )
    out = merged_folder(recipe, tmp_path / "out")
    a, b = ModelFolder(llamas / "a"), ModelFolder(llamas / "b")
    assert json.loads((out.path / "config.json").read_text())["num_hidden_layers"] == 3
    for name in out.tensors:
        source = name.replace("layers.2.", "layers.1.")
        owner, scale = (b, 0.5) if "layers.2." in name or name == "model.norm.weight" else (a, 1.0)
        assert np.array_equal(values(out, name), values(owner, source) * np.float32(scale)), name
    model = AutoModelForCausalLM.from_pretrained(out.path)
    assert len(model.model.layers) == 3
    assert torch.isfinite(model(torch.tensor([[1, 5, 8]])).logits).all()
    said = refused(2, "merge", "--recipe", recipe, "-o", tmp_path / "x.lota")
    assert "the result has tensor 'model.layers.2.input_layernorm.weight' as [32], and a has it as none: write" in said


def test_lists_with_one_item_per_layer_follow_the_layers(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = Gemma3TextConfig(
            vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, layer_types=kinds,
        )  # fmt: skip
        Gemma3ForCausalLM(config).save_pretrained(tmp_path / name)
    sources = "".join(
        f"- sources: [{{model: {tmp_path / name}, layer_range: {layers}}}]\n"
        for name, layers in (("a", [1, 4]), ("b", [0, 1]), ("a", [3, 4]))
    )
    out = merged_folder(write(tmp_path, f"merge_method: passthrough\nslices:\n{sources}"), tmp_path / "out")
    config = json.loads((out.path / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == [*kinds[1:4], kinds[0], kinds[3]]
    assert len(AutoModelForCausalLM.from_pretrained(out.path).model.layers) == 5


def test_modules_of_an_encoder_and_a_decoder_are_merged_by_themselves(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path / name)
    recipe = write(
        tmp_path,
        f"""
        merge_method: linear
        modules:
          default: {{models: [{{model: {tmp_path / "b"}}}]}}
          encoder:
            slices:
            - sources:
              - {{model: {tmp_path / "a"}, layer_range: [0, 2]}}
              - {{model: {tmp_path / "b"}, layer_range: [1, 3]}}
          decoder: {{models: [{{model: {tmp_path / "a"}}}], parameters: {{weight: [1, 2]}}}}
        """,
    )
    out = merged_folder(recipe, tmp_path / "out")
    a, b = (ModelFolder(tmp_path / name) for name in "ab")
    config = json.loads((out.path / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (2, 2)
    for name in out.tensors:
        if name.startswith("encoder.block"):
            other = name.replace("block.1.", "block.2.").replace("block.0.", "block.1.")
            both = [values(a, name), values(b, other)] if other in b.tensors else [values(a, name)]
            assert np.array_equal(values(out, name), sum(both) / np.float32(len(both))), name
        elif name.startswith("decoder"):
            assert np.array_equal(values(out, name), values(a, name)), name
    assert np.array_equal(values(out, "shared.weight"), values(b, "shared.weight"))


@pytest.mark.parametrize(("part", "counts"), [("encoder", (2, 3)), ("decoder", (3, 2))])
def test_a_decoder_whose_number_of_layers_is_that_of_the_encoder_keeps_it(
    part: str, counts: tuple[int, int], tmp_path: Path
) -> None:
    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "a")
    written = json.loads((tmp_path / "a/config.json").read_text())
    del written["num_decoder_layers"]
    (tmp_path / "a/config.json").write_text(json.dumps(written))
    layers = f"{{slices: [{{sources: [{{model: {tmp_path / 'a'}, layer_range: [0, 2]}}]}}]}}"
    whole = f"{{models: [{{model: {tmp_path / 'a'}}}]}}"
    recipe = write(tmp_path, f"merge_method: passthrough\nmodules: {{default: {whole}, {part}: {layers}}}\n")
    model = AutoModelForSeq2SeqLM.from_pretrained(merged_folder(recipe, tmp_path / "out").path)
    assert (len(model.encoder.block), len(model.decoder.block)) == counts


def test_a_model_with_an_adapter_is_the_model_that_peft_merges(llamas: Path, tmp_path: Path) -> None:
    adapter = make_adapter(llamas / "a", tmp_path / "adapter", use_dora=True)
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llamas / "a"), adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "by-peft")
    shutil.copytree(llamas / "a", tmp_path / "a+b")
    for model_name in (f"{llamas / 'a'}+{adapter}", str(tmp_path / "a+b")):
        recipe = write(tmp_path, f"merge_method: passthrough\nmodels: [{{model: {model_name}}}]\n")
        out = merged_folder(recipe, tmp_path / f"out{len(model_name)}")
        wanted = ModelFolder(tmp_path / "by-peft" if str(adapter) in model_name else llamas / "a")
        assert out.digests() == wanted.digests()
    text = f"merge_method: linear\nmodels: [{{model: {llamas / 'a'}}}, {{model: {adapter}}}]\n"
    said = refused(2, "merge", "--recipe", write(tmp_path, text), "-o", tmp_path / "x")
    assert "is an adapter of peft: base_model must name its base, or it is written as model+adapter" in said
    # the folder of an adapter is one of the base
    recipe = write(
        tmp_path,
        f"merge_method: task_arithmetic\nbase_model: {llamas / 'a'}\ndtype: float32\n"
        f"models: [{{model: {adapter}, parameters: {{weight: 0.5}}}}, {{model: {llamas / 'a'}+{adapter}, "
        "parameters: {weight: 0.5}}]\n",
    )
    out = merged_folder(recipe, tmp_path / "twice")
    for name in out.tensors:
        assert np.allclose(values(out, name), values(ModelFolder(tmp_path / "by-peft"), name), atol=1e-6)


def grown(source: Path, folder: Path, words: list[str], seed: int) -> Path:
    """Write a model with further tokens, whose embeddings have further rows."""
    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([AddedToken(word) for word in words])
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_vocabularies_that_grew_are_united(method: str, llamas: Path, tmp_path: Path) -> None:
    one = grown(llamas / "a", tmp_path / "one", ["<tool>", "<end>"], 7)
    two = grown(llamas / "b", tmp_path / "two", ["<end>", "<think>"], 8)
    diff(ModelFolder(llamas / "base"), ModelFolder(two)).save(tmp_path / "two.lota")
    base = one if method == "slerp" else llamas / "base"
    more = "parameters: {t: 0.5}" if method == "slerp" else "parameters: {weight: 0.5}"
    listed = {"linear": f"[{{model: {one}}}, {{model: {tmp_path / 'two.lota'}}}]"}.get(
        method, f"[{{model: {one}}}, {{model: {two}}}]"
    )
    text = f"merge_method: {method}\nbase_model: {base}\nmodels: {listed}\n{more}\n"
    if method != "slerp":
        said = refused(1, "merge", "--recipe", write(tmp_path, text), "-o", tmp_path / "x")
        assert "tokenizer_source: base or union maps them" in said or "this change cannot be added" in said
    out = merged_folder(write(tmp_path, f"{text}tokenizer_source: union\n"), tmp_path / "out")
    tokenizer, model = AutoTokenizer.from_pretrained(out.path), AutoModelForCausalLM.from_pretrained(out.path)
    rows = len(WORDS) + 3
    assert len(tokenizer) == model.config.vocab_size == rows
    assert values(out, "model.embed_tokens.weight").shape == (rows, 32)
    added = {word: tokenizer.convert_tokens_to_ids(word) for word in ("<tool>", "<end>", "<think>")}
    assert sorted(added.values()) == list(range(len(WORDS), rows))
    assert tokenizer("one <think> two").input_ids == [WORDS.index("one"), added["<think>"], WORDS.index("two")]
    if method == "linear":
        # a token of one model has its row in all of them
        own = values(ModelFolder(one), "model.embed_tokens.weight")[len(WORDS)]
        assert np.allclose(values(out, "model.embed_tokens.weight")[added["<tool>"]], own, atol=1e-6)


def test_a_chat_template_is_written_and_used(llamas: Path, tmp_path: Path) -> None:
    for name, template in (("a", "{{ 1 }}"), ("b", "{{ 2 }}"), ("base", "{{ 2 }}")):
        shutil.copytree(llamas / name, tmp_path / name)
        make_tokenizer(template).save_pretrained(tmp_path / name)
    text = f"merge_method: linear\nmodels: [{', '.join(f'{{model: {tmp_path / n}}}' for n in ('a', 'b', 'base'))}]\n"
    message = [{"role": "user", "content": "one"}]
    for asked, wanted in (
        ("auto", "2"),
        ("'{{ messages[0].content }}'", "one"),
        ("chatml", "<|im_start|>user\none<|im_end|>\n"),
    ):
        out = tmp_path / f"out-{len(asked)}"
        merged_folder(write(tmp_path, f"{text}chat_template: {asked}\n"), out)
        assert AutoTokenizer.from_pretrained(out).apply_chat_template(message, tokenize=False) == wanted


CONVERSATION = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]
RENDERED = {
    "alpaca": "S\n\n### Instruction:\nU\n\n### Response:\nA\n\n### Instruction:\nV\n\n### Response:\n",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]S[|endofturn|]\n[|user|]U\n[|assistant|]A[|endofturn|]\n[|user|]V\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "U<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nV<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] S\n\nU [/INST] A</s> [INST] V [/INST]",
}


def test_named_templates_have_the_formats_of_their_models() -> None:
    assert RENDERED.keys() == TEMPLATES.keys()
    for name, text in RENDERED.items():
        tokenizer = make_tokenizer(TEMPLATES[name])
        assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True) == text
    for name in ("alpaca", "mistral"):
        with pytest.raises(TemplateError, match="the roles are system, user and assistant, found tool"):
            make_tokenizer(TEMPLATES[name]).apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


@pytest.mark.parametrize("method", ["slerp", "karcher", "arcee_fusion", "linear"])
def test_a_file_of_whole_models_gives_the_folder(method: str, llamas: Path, tmp_path: Path) -> None:
    more = "parameters: {t: 0.3}\n" if method == "slerp" else ""
    recipe = write(
        tmp_path,
        f"merge_method: {method}\nbase_model: {llamas / 'a'}\n{more}"
        f"models: [{{model: {llamas / 'a'}}}, {{model: {llamas / 'b'}}}]\n",
    )
    out = merged_folder(recipe, tmp_path / "out")
    ok("merge", "--recipe", recipe, "-o", tmp_path / "merged.lota")
    ok("unpack", tmp_path / "merged.lota", "--base", llamas / "a", "-o", tmp_path / "unpacked")
    for shard in out.shards:
        assert (tmp_path / "unpacked" / shard.path.name).read_bytes() == shard.path.read_bytes()
    apply(merged(recipe), ModelFolder(llamas / "a"), tmp_path / "again")
    assert ModelFolder(tmp_path / "again").digests() == out.digests()


def test_an_interrupted_merge_of_models_continues(
    llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards that were finished are kept, unless a model was changed in the meantime."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llamas, "models")
    text = "merge_method: slerp\nbase_model: models/a\nparameters: {t: 0.3}\n"
    write(tmp_path, f"{text}models: [{{model: models/a}}, {{model: models/b}}]\n")
    sharded = ["--shard-size", "20KB"]
    ok("merge", "--recipe", "merge.yaml", "-o", "whole", *sharded)
    ok("merge", "--recipe", "merge.yaml", "-o", "out", *sharded)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    part = tmp_path / "other.part"
    kill = (
        "import os, signal; import taskvec.applying.writer as w\nwrite = w.Writer._write\n"
        "def stop(self, shard, path):\n    stop.count += 1\n    write(self, shard, path)\n"
        "    if stop.count == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "stop.count = 0; w.Writer._write = stop\n"
        "from taskvec_cli.main import main; import sys\n"
        "sys.argv = ['taskvec', 'merge', '--recipe', 'merge.yaml', '-o', 'other', '--shard-size', '20KB']; main()"
    )

    def killed(program: str) -> bool:
        return subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False).returncode == -signal.SIGKILL

    assert killed(kill)
    finished = sorted(part.glob("*.safetensors"))
    assert len(finished) == 2
    times = [file.stat().st_mtime_ns for file in finished]
    assert not (tmp_path / "other").exists()
    ok("merge", "--recipe", "merge.yaml", "-o", "other", *sharded, "--resume")
    assert [(tmp_path / "other" / file.name).stat().st_mtime_ns for file in finished] == times
    assert weights(tmp_path / "other") == weights(tmp_path / "whole")
    assert killed(kill.replace("'other'", "'third'"))
    (tmp_path / "models/b/model.safetensors").touch()
    said = refused(1, "merge", "--recipe", "merge.yaml", "-o", "third", *sharded, "--resume")
    assert "belongs to another" in said


def test_an_encoder_of_a_model_with_equally_many_layers_gets_its_own_number(tmp_path: Path) -> None:
    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "a")
    source = f"{{model: {tmp_path / 'a'}, layer_range: [0, 2]}}"
    upper = source.replace("[0, 2]", "[1, 2]")
    for module, wanted in (("encoder", (3, 2)), ("decoder", (2, 3))):
        recipe = write(
            tmp_path,
            f"merge_method: passthrough\nmodules:\n  default: {{models: [{{model: {tmp_path / 'a'}}}]}}\n"
            f"  {module}: {{slices: [{{sources: [{source}]}}, {{sources: [{upper}]}}]}}\n",
        )
        found = json.loads((merged_folder(recipe, tmp_path / module).path / "config.json").read_text())
        assert (found["num_layers"], found["num_decoder_layers"]) == wanted
        T5ForConditionalGeneration.from_pretrained(tmp_path / module)


def altered(source: Path, folder: Path, state: dict[str, np.ndarray | None]) -> Path:
    """Write a model with some tensors replaced, added, or removed where they are None."""
    model = ModelFolder(source)
    tensors = {name: tensor("F32", values(model, name)) for name in model.tensors if state.get(name, ...) is not None}
    tensors |= {name: tensor("F32", each) for name, each in state.items() if each is not None}
    write_checkpoint(folder, tensors, 1, {"config.json": (source / "config.json").read_bytes()})
    return folder


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({NORM: None}, "the result has no tensor 'model.layers.3.input_layernorm.weight', and every layer of a has"),
        ({f"{NORM}_2": np.ones(32, np.float32)}, "tensor 'model.layers.3.input_layernorm.weight_2', which no layer"),
        ({NORM: np.ones(16, np.float32)}, "tensor 'model.layers.3.input_layernorm.weight' is [16] in"),
        ({"model.norm.weight": np.ones(16, np.float32)}, "tensor 'model.norm.weight' is [16] in"),
        ({"lm_head.bias": np.ones(8, np.float32)}, "has tensor 'lm_head.bias', which a does not have"),
    ],
)
def test_slices_of_a_model_with_other_tensors_are_refused(
    llamas: Path, tmp_path: Path, state: dict[str, np.ndarray | None], said: str
) -> None:
    other = altered(llamas / "b", tmp_path / "other", state)
    recipe = write(
        tmp_path,
        "merge_method: passthrough\nslices:\n"
        f"- sources: [{{model: {llamas / 'a'}, layer_range: [0, 2]}}]\n"
        f"- sources: [{{model: {other}, layer_range: [0, 2]}}]\n",
    )
    assert said in refused(1, "merge", "--recipe", recipe, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_reads_only_its_own_tensors_of_a_model(llamas: Path, tmp_path: Path) -> None:
    recipe = write(
        tmp_path,
        "merge_method: linear\nmodules:\n"
        f"  layers: {{models: [{{model: {llamas / 'a'}}}, {{model: {llamas / 'b'}}}]}}\n"
        f"  default: {{models: [{{model: {llamas / 'a'}}}]}}\n",
    )
    out, a, b = merged_folder(recipe, tmp_path / "out"), ModelFolder(llamas / "a"), ModelFolder(llamas / "b")
    assert np.array_equal(values(out, "model.norm.weight"), values(a, "model.norm.weight"))
    assert np.array_equal(values(out, NORM), (values(a, NORM) + values(b, NORM)) / 2)


def edited(source: Path, folder: Path, file: str, **changes: object) -> Path:
    """Write a copy of a model with other keys in one of its JSON files."""
    shutil.copytree(source, folder)
    document = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**document, **changes}))
    return folder


def test_the_vocabulary_of_several_is_the_one_whose_rows_exist(llamas: Path, tmp_path: Path) -> None:
    rows = len(WORDS)
    parts = {"audio_config": {"vocab_size": 7}, "text_config": {"vocab_size": rows}}
    base = edited(llamas / "base", tmp_path / "several", "config.json", **parts)
    grown(llamas / "a", tmp_path / "one", ["<tool>"], 7)
    text = f"merge_method: linear\nbase_model: {base}\nmodels: [{{model: {tmp_path / 'one'}}}]\n"
    out = merged_folder(write(tmp_path, f"{text}tokenizer_source: union\n"), tmp_path / "out")
    config = json.loads((out.path / "config.json").read_text())
    assert (config["vocab_size"], config["text_config"]["vocab_size"]) == (rows + 1, rows + 1)
    assert config["audio_config"]["vocab_size"] == 7
    wrong = edited(llamas / "base", tmp_path / "wrong", "config.json", vocab_size=rows + 8)
    recipe = write(tmp_path, text.replace(str(base), str(wrong)) + "tokenizer_source: union\n")
    said = refused(2, "merge", "--recipe", recipe, "-o", tmp_path / "x")
    assert f"config.json has vocab_size {rows + 8}, but no tensor has as many rows" in said


def test_a_model_without_a_tokenizer_is_assumed_to_have_that_of_the_base(llamas: Path, tmp_path: Path) -> None:
    shutil.copytree(llamas / "a", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "special*", "chat*"))
    texts = [
        f"merge_method: linear\nbase_model: {llamas / 'base'}\nmodels: [{{model: {each}}}]\ntokenizer_source: union\n"
        for each in (tmp_path / "bare", llamas / "a")
    ]
    said = ok("merge", "--recipe", write(tmp_path, texts[0]), "-o", tmp_path / "out")
    assert f"{tmp_path / 'bare'} has no tokenizer: it is assumed to have that of {llamas / 'base'}" in said
    whole = merged_folder(write(tmp_path, texts[1]), tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(whole.path)
    recipe = write(tmp_path, texts[0].replace("union", str(tmp_path / "bare")))
    refused(2, "merge", "--recipe", recipe, "-o", tmp_path / "x")


def test_damaged_tokens_are_refused_or_kept_as_they_are(llamas: Path, tmp_path: Path) -> None:
    document = json.loads((llamas / "a" / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    word = next(iter(vocabulary))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    half = {**flags, "id": len(vocabulary), "content": "\ud800"}
    model = {**document["model"], "vocab": {**vocabulary, word: -1}}
    for name, changes, said in (
        ("negative", {"model": model}, "should have a number, found -1"),
        ("half", {"added_tokens": [*document["added_tokens"], half]}, None),
    ):
        other = edited(llamas / "a", tmp_path / name, "tokenizer.json", **changes)
        recipe = write(
            tmp_path,
            f"merge_method: linear\nbase_model: {other}\nmodels: [{{model: {llamas / 'b'}}}]\n"
            "tokenizer: {source: union, tokens: {<new>: }}\n",
        )
        if said is not None:
            assert said in refused(1, "merge", "--recipe", recipe, "-o", tmp_path / "x")
        else:
            ok("merge", "--recipe", recipe, "-o", tmp_path / "out")
            assert "<new>" in (tmp_path / "out" / "tokenizer.json").read_text()


@pytest.mark.parametrize("method", ["slerp", "karcher", "model_stock"])
def test_weights_that_are_not_finite_are_named_as_the_reason(method: str, llamas: Path, tmp_path: Path) -> None:
    found = values(ModelFolder(llamas / "b"), NORM)
    other = altered(llamas / "b", tmp_path / "other", {NORM: np.where(np.arange(found.size) == 3, np.nan, found)})
    listed = [llamas / "base", other, *([llamas / "a"] if method == "model_stock" else [])]
    recipe = write(
        tmp_path,
        f"merge_method: {method}\nbase_model: {llamas / 'base'}\nparameters: {{t: 0.5}}\n"
        f"models: [{', '.join(f'{{model: {each}}}' for each in listed)}]\n",
    )
    said = refused(1, "merge", "--recipe", recipe, "-o", tmp_path / "out")
    assert f"tensor '{NORM}': some models have NaN or infinite weights" in said


def test_keys_that_number_layers_are_noted_if_layers_move(llamas: Path, tmp_path: Path) -> None:
    numbered = {"first_k_dense_replace": 1, "moe_layer_freq": 1, "mlp_only_layers": [], "sliding_window_pattern": 2}
    model = edited(llamas / "a", tmp_path / "a", "config.json", **numbered)
    text = "merge_method: passthrough\nslices: [{{sources: [{{model: {}, layer_range: {}}}]}}]\n"
    said = ok("merge", "--recipe", write(tmp_path, text.format(model, [1, 2])), "-o", tmp_path / "moved")
    for name in numbered:
        noted = f"note: config.json: {name} refers to layers by their numbers, and is not changed" in said
        assert noted == (name in ("first_k_dense_replace", "sliding_window_pattern"))
    said = ok("merge", "--recipe", write(tmp_path, text.format(model, [0, 2])), "-o", tmp_path / "same")
    assert "refers to layers" not in said


def test_an_adapter_is_no_base(llamas: Path, tmp_path: Path) -> None:
    adapter = make_adapter(llamas / "a", tmp_path / "adapter")
    for head, wanted in (
        ("", "base_model must name the base of"),
        (f"base_model: {adapter}\n", "must be a model, found"),
    ):
        text = f"{head}merge_method: linear\nmodels: [{{model: {adapter}}}, {{model: {llamas / 'a'}}}]\n"
        said = refused(2, "merge", "--recipe", write(tmp_path, text), "-o", tmp_path / "out")
        assert f"{wanted} the adapter {adapter}" in said
