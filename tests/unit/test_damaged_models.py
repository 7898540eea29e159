"""A model folder that is damaged in any way is one sentence, which names the file and the cause, and never a result."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import assert_names
from safetensors.torch import load_file, save_file

from deep_rlhf.algorithms.online.build import model_and_tokenizer, open_policy
from deep_rlhf.algorithms.ppo import PPOConfig
from deep_rlhf.cli import plan
from deep_rlhf.errors import ModelError, NotFiniteError, ResourceError
from deep_rlhf.models.adapters import add_lora
from deep_rlhf.models.load import load_language_model, load_tokenizer
from deep_rlhf.models.reward import RewardModel, init_reward_head
from deep_rlhf.models.saving import save_model, write_folder

Damage = Callable[[Path], Any]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


@pytest.fixture(scope="module")
def models(make_model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `policy` and `reward`."""
    folder = tmp_path_factory.mktemp("models")
    save_model(make_model("gpt2"), tokenizer, folder / "policy")
    from transformers import GPT2ForSequenceClassification

    classifier = GPT2ForSequenceClassification(make_model("gpt2", num_labels=1).config)
    init_reward_head(classifier)
    RewardModel(classifier, tokenizer).save(folder / "reward")
    return folder


def open_as_policy(folder: Path) -> None:
    model, _ = model_and_tokenizer(str(folder), None, PPOConfig())
    open_policy(model, torch.device("cpu"), PPOConfig())


def sentence(opened: Callable[[Path], Any], folder: Path) -> str:
    with pytest.raises((ModelError, NotFiniteError)) as error:
        opened(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def content(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def fields(name: str, **values: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({key: value for key, value in (old | values).items() if value != "remove"}))

    return damage


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        edit(weights)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def without(part: str) -> Damage:
    return tensors(lambda weights: [weights.pop(name) for name in list(weights) if part in name])


def one_number(name: str, value: float) -> Damage:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(-1)[0] = value

    return tensors(edit)


def cut(share: float) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: int(len(data) * share)])

    return damage


def flipped(position: int) -> Damage:
    def damage(folder: Path) -> None:
        data = bytearray((folder / WEIGHTS).read_bytes())
        data[position] ^= 0x40
        (folder / WEIGHTS).write_bytes(bytes(data))

    return damage


def folder_instead(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def link_to_itself(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(name)

    return damage


def sharded(damage_shards: Damage) -> Damage:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = {key: f"model-{1 + number % 2}.safetensors" for number, key in enumerate(sorted(weights))}
        for file in set(names.values()):
            save_file({key: weights[key] for key in names if names[key] == file}, folder / file, {"format": "pt"})
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
        damage_shards(folder)

    return damage


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


WEIGHT_FILES: dict[str, tuple[Damage, list[str]]] = {
    "cut": (cut(0.9), [WEIGHTS, "bytes"]),
    "cut in the header": (cut(0.01), [WEIGHTS, "cut off"]),
    "empty": (content(WEIGHTS, b""), [WEIGHTS, "empty"]),
    "pointer": (content(WEIGHTS, POINTER), [WEIGHTS, "Git LFS"]),
    "text": (content(WEIGHTS, b"<html>Not found</html>"), [WEIGHTS, "safetensors"]),
    "flipped length": (flipped(7), [WEIGHTS]),
    "flipped header": (flipped(20), [WEIGHTS, "header"]),
    "missing": (lambda folder: (folder / WEIGHTS).unlink(), [WEIGHTS, "missing"]),
    "pickle": (pickled, ["pytorch_model.bin", "pickle"]),
    "folder": (folder_instead(WEIGHTS), [WEIGHTS, "directory"]),
    "link": (link_to_itself(WEIGHTS), [WEIGHTS, "symbolic links"]),
    "nan": (
        one_number("transformer.h.1.mlp.c_fc.bias", float("nan")),
        [WEIGHTS, "nan", "transformer.h.1.mlp.c_fc.bias"],
    ),
    "inf": (one_number("transformer.ln_f.weight", float("inf")), [WEIGHTS, "inf", "transformer.ln_f.weight"]),
    "whole numbers": (
        tensors(lambda weights: weights.update({name: weight.int() for name, weight in weights.items()})),
        [WEIGHTS, "I32"],
    ),
    "shape": (
        tensors(lambda weights: weights.update({"transformer.wpe.weight": torch.zeros(3, 5)})),
        [WEIGHTS, "transformer.wpe.weight", "[3, 5]", "[64, 32]"],
    ),
    "layer missing": (without("h.1."), ["transformer.h.1.attn.c_attn.bias", "lacks"]),
    "embeddings missing": (without("wte"), ["transformer.wte.weight", "lacks"]),
    "missing shard": (sharded(lambda folder: (folder / "model-2.safetensors").unlink()), ["model-2.safetensors"]),
    "cut shard": (sharded(content("model-2.safetensors", b"123")), ["model-2.safetensors", "cut off"]),
    "index no JSON": (sharded(content(INDEX, b"{")), [INDEX, "JSON"]),
    "index empty": (sharded(fields(INDEX, weight_map={})), [INDEX, "weight_map"]),
    "index elsewhere": (sharded(fields(INDEX, weight_map={"a": "/etc/passwd"})), [INDEX, "/etc/passwd"]),
    "index too long": (sharded(fields(INDEX, weight_map={"a": "x" * 300})), ["too long"]),
    "index null": (sharded(fields(INDEX, weight_map={"a": "x\0"})), ["null"]),
    "index wrong": (sharded(fields(INDEX, weight_map={"a": "model-1.safetensors"})), ["model-1.safetensors", "'a'"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "config empty": (content("config.json", b""), ["config.json", "empty"]),
    "config no JSON": (content("config.json", b'{"a": '), ["config.json", "JSON"]),
    "config list": (content("config.json", b"[1]"), ["config.json", "list"]),
    "config bytes": (content("config.json", b"\xff\xfe"), ["config.json", "UTF-8"]),
    "config deep": (content("config.json", b"[" * 100_000), ["config.json", "nested"]),
    "no kind": (fields("config.json", model_type="remove"), ["config.json", "model_type"]),
    "unknown kind": (fields("config.json", model_type="gpt99"), ["config.json", "gpt99"]),
    "large kind": (fields("config.json", model_type="llama"), ["config.json", "weights", "different models"]),
    "text for a size": (fields("config.json", n_embd="32"), ["config.json", "n_embd", "int"]),
    "negative size": (fields("config.json", n_embd=-32), ["config.json", "n_embd", "-32"]),
    "no heads": (fields("config.json", n_head=0), ["config.json", "n_head", "0"]),
    "indivisible": (fields("config.json", n_head=3), ["divisible", "3"]),
    "huge": (fields("config.json", n_embd=10**20), ["n_embd"]),
    "fewer layers": (fields("config.json", n_layer=1), ["config.json", "transformer.h.1.attn.c_attn.weight"]),
    "more layers": (fields("config.json", n_layer=3), ["transformer.h.2.attn.c_attn.bias", "lacks"]),
    "activation": (fields("config.json", activation_function="foo"), ["activation_function", "foo"]),
    "quantised": (
        fields("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        ["quantised", "gptq"],
    ),
    "padding": (fields("config.json", pad_token_id=5000), ["config.json", "pad_token_id", "5000"]),
    "tokenizer no JSON": (content("tokenizer.json", b"{"), ["tokenizer.json", "JSON"]),
    "tokenizer empty": (content("tokenizer.json", b""), ["tokenizer.json", "empty"]),
    "tokenizer list": (content("tokenizer.json", b"[]"), ["tokenizer.json", "list"]),
    "tokenizer's model": (fields("tokenizer.json", model=5), ["tokenizer.json", "ModelUntagged"]),
    "tokenizer's settings": (content("tokenizer_config.json", b"\xff"), ["tokenizer_config.json", "UTF-8"]),
    "tokenizer's class": (fields("tokenizer_config.json", tokenizer_class=5), ["tokenizer"]),
    "tokenizer's length": (fields("tokenizer_config.json", model_max_length=-1), ["model_max_length", "-1"]),
    "special tokens": (content("special_tokens_map.json", b"5"), ["special_tokens_map.json", "int"]),
    "no vocabulary": (
        lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        ["tokenizer"],
    ),
    "larger vocabulary": (fields("tokenizer_config.json", eos_token="<new>"), ["tokenizer", "tokens"]),
    "adapters": (content("adapter_config.json", b"{}"), ["adapter_config.json", "base_model_name_or_path"]),
}
# What a plan cannot do without.
SIZES = {"no config", "config empty", "config no JSON", "config list", "config bytes", "config deep", "no kind"}
SIZES |= {"unknown kind", "text for a size", "negative size", "no heads", "indivisible", "huge", "activation"}
POLICY: dict[str, tuple[Damage, list[str]]] = {
    "generation no JSON": (content("generation_config.json", b"{"), ["generation_config.json", "JSON"]),
    "generation list": (content("generation_config.json", b"[]"), ["generation_config.json", "list"]),
    "end is text": (fields("generation_config.json", eos_token_id="1"), ["generation_config.json", "'1'"]),
    "end is beyond": (fields("generation_config.json", eos_token_id=[1, 99]), ["generation_config.json", "99"]),
    "end is negative": (fields("config.json", eos_token_id=-2), ["config.json", "eos_token_id", "-2"]),
    "not a number": (fields("config.json", layer_norm_epsilon=-1.0), ["not finite"]),
}
REWARD: dict[str, tuple[Damage, list[str]]] = {
    f"card {values}": (fields("reward_model.json", **values), ["reward_model.json", next(iter(values))])
    for values in (
        {"mean": [float("nan")]},
        {"std": [0.0]},
        {"std": [float("inf")]},
        {"mean": "x"},
        {"mean": [[0.0]]},
        {"mean": None},
        {"std": [1.0, 1.0]},
        {"max_length": -1},
        {"max_length": "x"},
        {"template": ["hh"]},
        {"template": "remove"},
        {"metrics": 5},
    )
} | {
    "card {}": (content("reward_model.json", b"{}"), ["reward_model.json", "mean"]),
    "card list": (content("reward_model.json", b"[]"), ["reward_model.json", "list"]),
    "card folder": (folder_instead("reward_model.json"), ["reward_model.json", "directory"]),
    "head missing": (without("score"), ["score.weight", "lacks"]),
    "not a number": (fields("config.json", layer_norm_epsilon=-1.0), ["not finite"]),
}


@pytest.mark.parametrize("case", [*WEIGHT_FILES, *POLICY])
def test_a_damaged_policy_is_refused(case: str, models: Path, tmp_path: Path) -> None:
    damage, facts = (WEIGHT_FILES | POLICY)[case]
    shutil.copytree(models / "policy", tmp_path / "model")
    damage(tmp_path / "model")
    assert_names(sentence(open_as_policy, tmp_path / "model"), *facts)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_pipe_in_place_of_a_file_is_named_and_not_waited_for(name: str, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "policy", tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    os.mkfifo(tmp_path / "model" / name)
    assert_names(sentence(open_as_policy, tmp_path / "model"), name, "pipe")


def test_half_a_surrogate_pair_is_refused_before_the_tokenizer_must_be_saved(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "policy", tmp_path / "model")
    fields("tokenizer_config.json", backend="\ud800")(tmp_path / "model")
    assert_names(sentence(open_as_policy, tmp_path / "model"), "tokenizer_config.json", "surrogates")


@pytest.mark.parametrize("case", [*WEIGHT_FILES, *REWARD])
def test_a_damaged_reward_model_is_refused(case: str, models: Path, tmp_path: Path) -> None:
    damage, facts = (WEIGHT_FILES | REWARD)[case]
    shutil.copytree(models / "reward", tmp_path / "model")
    damage(tmp_path / "model")
    assert_names(sentence(RewardModel.load, tmp_path / "model"), *facts)


@pytest.mark.parametrize("case", sorted({*WEIGHT_FILES, *POLICY} - {"large kind"}))  # which can be planned, slowly
def test_a_plan_for_a_damaged_model_is_a_plan_or_one_sentence(case: str, models: Path, tmp_path: Path) -> None:
    """A plan reads nothing but config.json, and of that what is about sizes."""
    damage, _ = (WEIGHT_FILES | POLICY)[case]
    shutil.copytree(models / "policy", tmp_path / "model")
    damage(tmp_path / "model")
    refused = pytest.raises(ModelError, match=r"^.*model.*$") if case in SIZES else contextlib.suppress(ModelError)
    with refused:
        plan.main(["ppo", f"--model_name={tmp_path / 'model'}", "--reward_model=python:rewards:length"])


@pytest.mark.parametrize("name", ["", " ", "/nowhere", "a\0b", "x" * 5000, "\udcff"])
def test_a_path_that_cannot_be_a_model_is_refused(name: str) -> None:
    for opened in (load_language_model, load_tokenizer, RewardModel.load):
        with pytest.raises(ModelError):
            opened(name)  # type: ignore[operator]


def test_a_file_is_not_a_model(models: Path) -> None:
    assert_names(sentence(lambda path: load_tokenizer(str(path)), models / "policy" / WEIGHTS), WEIGHTS, "file")


def test_adapters_are_merged_into_the_model_they_name(models: Path, tmp_path: Path) -> None:
    adapted = add_lora(load_language_model(str(models / "policy")), r=2, alpha=2, task_type="CAUSAL_LM")
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.ones_(weight)
    adapted.save_pretrained(tmp_path / "adapters")
    changed = load_language_model(str(tmp_path / "adapters")).state_dict()
    base = load_language_model(str(models / "policy")).state_dict()
    assert changed.keys() == base.keys()
    weight = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(changed[weight], base[weight] + 2.0)  # alpha / r · B A of ones: 1 · 2

    fields("adapter_config.json", r=3)(tmp_path / "adapters")
    assert_names(sentence(lambda path: load_language_model(str(path)), tmp_path / "adapters"), "adapters")


def full_disk(message: str, kind: type[Exception]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise kind(message)

    return write


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("No space left on device (os error 28)", Exception),  # tokenizers
        ("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0", RuntimeError),  # torch
        ("[Errno 28] No space left on device", OSError),
    ],
)
def test_a_full_disk_leaves_the_earlier_model(message: str, kind: type[Exception], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(ResourceError) as error:
        write_folder("policy", folder, full_disk(message, kind))
    assert_names(error.value, "policy", str(folder / "model.safetensors"))
    assert not folder.exists()
    write_folder("policy", folder, lambda new: (new / "model.safetensors").write_bytes(b"whole"))
    with pytest.raises(ResourceError):
        write_folder("policy", folder, full_disk(message, kind))
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == b"whole"


def test_an_error_of_ours_while_saving_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_folder("policy", tmp_path / "model", lambda _: [1 // 0].clear())
    assert not (tmp_path / "model").exists()


def test_the_weights_of_a_larger_earlier_model_are_removed(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", INDEX, "notes.txt"):
        (tmp_path / name).write_text("old")
    write_folder("policy", tmp_path, lambda new: (new / WEIGHTS).write_bytes(b"new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [WEIGHTS, "notes.txt"]
