"Every family of LVLMs through the same adapter, on micro models of the real classes; what cannot be an embedder is refused in one line."
import inspect
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import is_torchvision_available

from conftest import CHECKPOINTS, run
from lvlm_research import backbones, embedder as embedder_module
from lvlm_research.backbones import world_tokenizer
from lvlm_research.cli import main
from lvlm_research.config import InputError
from lvlm_research.datasets import joint_batches, scene_pairs
from lvlm_research.doctor import describe
from lvlm_research.embedder import DiscriminativeLVLM
from lvlm_research.evaluation import DUAL_ENCODERS, load_embedder
from lvlm_research.families import TESTED_FAMILIES, _too_large, check_pictures, load_processor
from lvlm_research.fitting import fit
from lvlm_research.levers import PLAIN, Levers
from lvlm_research.losses import info_nce
from lvlm_research.properties import HOLDS, LONG, QUESTION, SHORT, broken, moved, noise_pictures, properties, step_trains_the_adapter_alone
from lvlm_research.training import VARIANTS, Discriminative, prepare
from lvlm_research.zoo import MICRO_FAMILIES, PIXELS, SQUARE, TEXT, VISION, micro_family


@pytest.fixture(scope="session")
def tokenizer():
    return world_tokenizer()


@pytest.fixture(scope="session")
def pictures():
    return noise_pictures()


def save_micro(name: str, tokenizer, folder):
    "A folder with a micro model of a family."
    torch.manual_seed(0)
    for part in micro_family(name, tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(MICRO_FAMILIES))
def folder(request, tokenizer, tmp_path_factory):
    return save_micro(request.param, tokenizer, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def base(folder):
    return DiscriminativeLVLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def trained(folder):
    "Soft prompts and LoRA that are not at their starting point."
    return moved(prepare(DiscriminativeLVLM.from_pretrained(folder), VARIANTS["vladva"]))


def test_embedding_ignores_captions_batch_mates_and_padding_side(trained, pictures):
    with torch.no_grad():
        image = torch.cat([trained.embed(trained.templates.image([picture]), "image") for picture in pictures])
        text = torch.cat([trained.embed(trained.templates.text([caption]), "text") for caption in SHORT])
        for side in ("left", "right"):
            for captions in (None, LONG):
                assert torch.allclose(trained.embed(trained.templates.image(pictures, captions, side), "image"), image, atol=1e-5)
            assert torch.allclose(trained.embed(trained.templates.text(SHORT, side), "text"), text, atol=1e-5)
    for found in (image, text):
        assert torch.pdist(found).min() > 0.01  # pictures and captions are told apart, so a swapped row would show


def test_states_and_loss_are_those_of_the_models_own_forward_pass(base, pictures):
    batch = base.templates.image(pictures, LONG)
    is_image = (batch.input_ids == base.model.config.image_token_id).int()
    after = (torch.arange(batch.input_ids.shape[1]) > batch.last[:, None]).int()
    types = {"mm_token_type_ids": is_image, "token_type_ids": after if base.model.config.model_type == "paligemma" else is_image}
    asked = {name: value for name, value in types.items() if name in inspect.signature(base.model.forward).parameters}
    with torch.no_grad():
        theirs = base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, **asked, **batch.vision)
        ours = backbones.language_head(base.model)(base(batch, "image"))
        loss = base.embed_and_predict(batch)[1]
    real = batch.attention_mask.bool()
    assert torch.allclose(ours[real], theirs.logits[real], atol=1e-4)
    assert loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)


def test_levers_change_neither_loss_nor_gradients(trained, pictures):
    trained.double()  # in single precision rounding alone comes close to the limit, and is another on every machine

    def step(levers: Levers) -> tuple[float, dict]:
        trained.levers = levers
        trained.zero_grad()
        image, next_token = trained.embed_and_predict(trained.templates.image(pictures, LONG))
        text = trained.embed(trained.templates.text([*SHORT, SHORT[0]]), "text")
        loss = info_nce(image, text[:3], 10.0) + next_token + text[3].sum()
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in trained.named_parameters() if p.grad is not None}

    loss, gradients = step(PLAIN)
    for levers in (Levers(pass_price=1), replace(Levers(pass_price=1), packed=False), replace(Levers(pass_price=1), packed=False, length_groups=False)):
        found, again = step(levers)
        assert found == pytest.approx(loss, rel=1e-5) and again.keys() == gradients.keys()
        assert all((again[name] - g).norm() <= 1e-5 * g.norm() for name, g in gradients.items())
    trained.float().levers = Levers()


def test_nothing_is_padded_where_attention_is_causal(trained, pictures):
    "Others go in groups by length; one group, where the price of a pass is never paid back."
    family, trained.levers = trained.model.config.model_type, Levers(pass_price=10**6, shared_prefix=False)
    counted, batches = [], {"image": trained.templates.image(pictures, LONG), "text": trained.templates.text(SHORT)}
    hook = trained.model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: counted.append(args[0].shape[:2].numel()))
    with torch.no_grad():
        for modality, batch in batches.items():
            trained.embed(batch, modality)
    hook.remove()
    trained.levers = Levers()
    real, padded = ([int(of(batch.attention_mask)) for batch in batches.values()] for of in (torch.sum, torch.numel))
    assert real[0] < padded[0] and real[1] < padded[1]
    assert counted == (padded if family in ("paligemma", "gemma3") else real)  # these see ahead, or not as far back as the micro model's rows go


def test_long_lists_are_embedded_as_short_ones(trained, pictures, monkeypatch):
    trained.levers = Levers(pass_price=8)  # so that whatever all rows begin with is computed once
    for encode, items in ((trained.encode_text, SHORT), (trained.encode_image, pictures)):
        monkeypatch.setattr(embedder_module, "KEPT_FROM", 64)
        expected = torch.stack([encode(item) for item in items])
        monkeypatch.setattr(embedder_module, "KEPT_FROM", 2)
        assert torch.allclose(encode(items), expected, atol=1e-5)
    trained.levers = Levers()


def test_untrained_soft_prompts_and_lora_change_nothing(base, folder, pictures):
    adapted = prepare(DiscriminativeLVLM.from_pretrained(folder), VARIANTS["vladva"]).eval()
    assert torch.allclose(adapted.encode_image(pictures), base.encode_image(pictures), atol=1e-5)
    assert torch.allclose(adapted.encode_text(SHORT), base.encode_text(SHORT), atol=1e-5)


def test_a_joint_step_moves_the_adapter_alone(folder):
    adapted = prepare(DiscriminativeLVLM.from_pretrained(folder), VARIANTS["vladva"])
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    module = fit(Discriminative(adapted, ar_weight=1.0, lr=1e-2), joint_batches(adapted.templates, scene_pairs(4, 60, 0)), 1)
    assert np.isfinite([module.history[-1]["contrastive"], module.history[-1]["next_token"]]).all()
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert {"soft_prompts.vectors.image", "soft_prompts.vectors.text"} <= moved
    assert moved <= {name for name, p in adapted.named_parameters() if p.requires_grad} and any("lora_B" in name for name in moved)


def test_saved_and_loaded_it_is_the_same_and_without_the_adapter_the_base(base, trained, pictures, tmp_path):
    trained.save_pretrained(tmp_path)
    again = DiscriminativeLVLM.from_pretrained(tmp_path)
    assert torch.equal(again.encode_image(pictures), trained.encode_image(pictures))
    assert torch.equal(again.encode_text(SHORT), trained.encode_text(SHORT))
    assert not torch.allclose(again.encode_image(pictures), base.encode_image(pictures), atol=1e-2)
    assert again.generate(pictures, QUESTION, max_new_tokens=8) == base.generate(pictures, QUESTION, max_new_tokens=8)
    assert len(again.generate(pictures, QUESTION, adapter=True, max_new_tokens=8)) == 3


def test_doctor_knows_it_without_its_weights(folder, base):
    report = describe(folder, batch=2)
    (weights := folder / "model.safetensors").rename(folder / "hidden")
    blind = describe(folder, batch=2)
    (folder / "hidden").rename(weights)
    assert report.fault is None and "there is no model" in blind.fault
    assert {k: v for k, v in report.lines.items() if k != "supported"} == {k: v for k, v in blind.lines.items() if k != "supported"}
    picture = Image.new("RGB", (640, 480))
    tokens = (base.templates.image([picture]).input_ids == base.model.config.image_token_id).sum().item()
    assert report.lines["image tokens"].endswith(f"{tokens} (640 x 480)")
    assert base.model.config.model_type in TESTED_FAMILIES


def test_a_template_with_the_text_before_the_picture_and_a_tokenizer_without_padding(tokenizer, pictures, tmp_path):
    save_micro("llava_next", tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token"}))
    parts = "{% for kind in ('text', 'image') %}{% for part in messages[0].content if part.type == kind %}{{ part.text or '<image>' }}{% endfor %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(f"{parts}[/INST]")
    lvlm = prepare(DiscriminativeLVLM.from_pretrained(tmp_path), VARIANTS["vladva"]).eval()
    assert lvlm.templates.tokenizer.pad_token == lvlm.templates.tokenizer.eos_token
    assert lvlm.templates.image_text.endswith("<image>[/INST]")
    alone = torch.cat([lvlm.encode_image([picture]) for picture in pictures])
    assert torch.allclose(lvlm.encode_image(pictures), alone, atol=1e-5) and torch.pdist(alone).min() > 0.01
    assert len(lvlm.generate(pictures, QUESTION, max_new_tokens=2)) == 3


def test_what_begins_a_text_stands_there_once(base, pictures):
    templates, bos = base.templates, base.templates.tokenizer.bos_token_id
    for ids in (templates.text(["a star"]).input_ids, templates.image(pictures[:1]).input_ids, templates.processed(pictures[:1], [templates.image_text])["input_ids"]):
        assert ids.flatten().tolist().count(bos) == (bos is not None)


@pytest.mark.parametrize("name", ["clip", "metaclip_2", "siglip", "siglip2"])
def test_dual_encoders(name, tokenizer, pictures, tmp_path):
    "Embeddings are those of the model's own forward pass, on texts laid out as it was trained."
    text = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads",)} | dict(
        max_position_embeddings=16, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    kind = {"clip": "CLIP", "metaclip_2": "MetaClip2", "siglip": "Siglip", "siglip2": "Siglip2"}[name]
    vision = VISION if name != "siglip2" else {k: v for k, v in VISION.items() if k != "image_size"} | {"num_patches": 16}
    if name == "siglip2":
        letters = "abcdefghijklmnopqrstuvwxyz"
        tokenizer = transformers.Siglip2Tokenizer({t: i for i, t in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *letters])}, padding_side="right")
        text |= dict(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
        images = transformers.Siglip2ImageProcessorPil(patch_size=7, max_num_patches=16, **PIXELS)
    else:
        images = getattr(transformers, f"{'Siglip' if name == 'siglip' else 'CLIP'}ImageProcessorPil")(size=SQUARE, crop_size=SQUARE, **PIXELS)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    processor = getattr(transformers, {"siglip": "SiglipProcessor", "siglip2": "Siglip2Processor"}.get(name, "CLIPProcessor"))(images, tokenizer)
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)

    dual, captions = load_embedder(tmp_path), [*SHORT, "a " * 40]  # the last is longer than the model can read
    image, text = dual.encode_image(pictures), dual.encode_text(captions)
    assert torch.allclose(image, torch.cat([dual.encode_image([picture]) for picture in pictures]), atol=1e-5)
    assert torch.allclose(text, torch.cat([dual.encode_text([caption]) for caption in captions]), atol=1e-5)
    end = [] if name.startswith("siglip") else [tokenizer.eos_token_id]
    rows = [tokenizer(caption, add_special_tokens=False).input_ids[: 16 - len(end)] + end for caption in captions]
    if name.startswith("siglip"):
        rows = [row + [tokenizer.pad_token_id] * (16 - len(row)) for row in rows]
    with torch.no_grad():
        for row, ours in zip(rows, text):
            theirs = model(input_ids=torch.tensor([row]), **images(pictures[:1], return_tensors="pt"))
            assert torch.allclose(theirs.text_embeds[0], ours, atol=1e-5) and torch.allclose(theirs.image_embeds[0], image[0], atol=1e-5)
    report = describe(tmp_path)
    assert report.fault is None and report.lines["family"] == name


def damaged(change):
    "A damage to a copy of a model folder that rewrites its tensors."
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return apply


def spoil(tensors):
    next(t for name, t in tensors.items() if "v_proj.weight" in name).view(-1)[3] = float("nan")


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def configured(**config):
    return lambda folder: (folder / "config.json").write_text(json.dumps(config))


def absurd(field, number):
    "A config, otherwise of the model, that asks for so much in its part for texts."
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config["text_config"][field] = number
        (folder / "config.json").write_text(json.dumps(config))
    return change


def cut(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])


def pickle_named_safetensors(folder):
    torch.save({"a": torch.zeros(3)}, folder / "model.safetensors")


def lacking_a_shard(folder):
    "Two shards, of which one was not fetched."
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def reshape(tensors):
    name = next(name for name in tensors if name.endswith("v_proj.weight"))
    tensors[name] = tensors[name][:3].clone()


def without_template(folder):
    (folder / "chat_template.jinja").unlink()


@pytest.mark.parametrize("source, damage, says", [
    ("llava-micro", damaged(spoil), "v_proj.weight holds NaN"),
    ("clip-micro", damaged(spoil), "v_proj.weight holds NaN"),
    ("llava-micro", pickled, "pytorch_model.bin is a pickle, which can run code"),
    ("clip-micro", pickled, "pytorch_model.bin is a pickle, which can run code"),
    *((source, *case) for source in ("llava-micro", "clip-micro") for case in (
        (pickle_named_safetensors, "model.safetensors: not a model with safetensors weights"),
        (cut, "not fully covered); fetch or save it again"),
        (lacking_a_shard, "names 'model-00002-of-00002.safetensors', which is missing"),
        (damaged(lambda tensors: tensors.pop(min(tensors))), "its weights lack"))),
    ("llava-micro", damaged(reshape), "v_proj.weight is (3, 128), and config.json asks for (128, 128)"),
    ("llava-micro", configured(model_type="my_lvlm", auto_map={"AutoModel": "modeling.My"}), "needs code from the folder (auto_map), which is never run"),
    ("llava-micro", configured(model_type="my_lvlm"), "'my_lvlm' is not known to transformers"),
    ("llava-micro", configured(model_type="llama"), "it is a text-only language model"),
    ("llava-micro", configured(model_type="vit"), "no image-text-to-text model"),
    ("llava-micro", configured(model_type="florence2"), "it is an encoder-decoder"),
    ("llava-micro", configured(model_type="mllama"), "pictures do not enter as tokens"),
    ("llava-micro", configured(model_type="llama4"), "no inner model without the head"),
    ("llava-micro", without_template, "has no chat template"),
    *((source, absurd(field, number), f"{field} is {number:,}, more than") for source in ("llava-micro", "clip-micro")
      for field, number in (("num_hidden_layers", 20_000_000), ("hidden_size", 10**9), ("intermediate_size", 10**12), ("vocab_size", 10**10), ("max_position_embeddings", 10**11))),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_folder_that_is_refused(source, damage, says, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINTS / source, folder)
    damage(folder)
    with pytest.raises(InputError, match="model") as error:
        load_embedder(folder)
    assert says in str(error.value) and "\n" not in str(error.value)
    capsys.readouterr()
    if "NaN" not in says:  # which only the weights can tell
        assert main(["doctor", str(folder)]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_no_family_is_too_large_by_its_defaults():
    configs = {name: json.loads(CONFIG_MAPPING[name]().to_json_string(use_diff=False)) for name in TESTED_FAMILIES + DUAL_ENCODERS}
    assert {name: fault for name, config in configs.items() if (fault := _too_large(config))} == {}


def test_an_adapter_of_pickles_or_with_nan_is_refused(tmp_path):
    def rename(folder):
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")

    def spoil_prompts(folder):
        save_file({k: v * float("nan") for k, v in load_file(folder / "soft_prompts.safetensors").items()}, folder / "soft_prompts.safetensors")

    for name, damage, says in (("bin", rename, "adapter_model.bin is a pickle"), ("nan", spoil_prompts, "holds NaN")):
        shutil.copytree(CHECKPOINTS / "vladva-micro", tmp_path / name)
        damage(tmp_path / name)
        with pytest.raises(InputError, match=says):
            DiscriminativeLVLM.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("source, changes, says", [
    ("llava-micro", {"config.json": {"image_token_id": 5, "image_token_index": 5}}, "its processor never writes token 5"),
    ("llava-micro", {"processor_config.json": {"patch_size": 28}}, "4 image tokens for a picture of 336 x 336, of which the model makes 36 features"),
    ("qwen2-vl-micro", {"processor_config.json": {"image_processor": {"merge_size": 1}}}, "144 image tokens for a picture of 336 x 336, of which the model makes 36 features"),
])
def test_doctor_compares_image_tokens_with_features(source, changes, says, tmp_path):
    folder = shutil.copytree(CHECKPOINTS / source, tmp_path / "model")
    for name, fields in changes.items():
        given = json.loads((folder / name).read_text())
        fields = {key: given[key] | value if isinstance(value, dict) else value for key, value in fields.items()}
        (folder / name).write_text(json.dumps(given | fields))
    assert says in describe(folder).fault


def test_doctor_does_not_compare_quantised_weights(tmp_path):
    folder = shutil.copytree(CHECKPOINTS / "llava-micro", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    damaged(reshape)(folder)
    report = describe(folder)
    assert report.fault is None and "could not be compared" in report.lines["supported"]


def test_doctor_tries_an_adapter_on_its_base(tmp_path):
    def on(base):
        config = json.loads((CHECKPOINTS / "vladva-micro/discriminative.json").read_text())
        (folder / "discriminative.json").write_text(json.dumps(config | {"base": str(CHECKPOINTS / base)}))
        return describe(folder)

    folder = shutil.copytree(CHECKPOINTS / "vladva-micro", tmp_path / "adapter")
    assert on("llava-micro").fault is None and "NaN would show at loading" in on("llava-micro").lines["supported"]
    for base, says in (("llava-mini", "its adapter does not fit the base"), ("clip-micro", "no image-text-to-text model")):
        report = on(base)
        assert says in report.fault and report.lines["supported"] == f"no: {report.fault}"
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "adapter_model.bin is a pickle" in on("llava-micro").fault


@pytest.mark.parametrize("kind, needs", [("cohere2_vision", True), ("llava", False)])
def test_a_processor_that_needs_torchvision_says_how_to_get_it(kind, needs, tokenizer, tmp_path):
    config = transformers.AutoConfig.for_model(kind)
    tokenizer.save_pretrained(tmp_path), config.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Cohere2VisionImageProcessor" if needs else "NoProcessor"}))
    with pytest.raises(InputError) as error:
        load_processor(tmp_path, config)
    assert str(error.value).endswith("; pip install torchvision") == (needs and not is_torchvision_available())


def test_an_untested_family_is_put_to_a_trial(tokenizer, tmp_path, monkeypatch):
    save_micro("paligemma", tokenizer, tmp_path)
    monkeypatch.setattr(embedder_module, "TESTED_FAMILIES", ())
    DiscriminativeLVLM.from_pretrained(tmp_path)
    monkeypatch.setattr(backbones, "PREFIX_ATTENTION", ())  # a caption after the prompt is now seen by it
    with pytest.raises(InputError, match="a caption that follows change the embedding"):
        DiscriminativeLVLM.from_pretrained(tmp_path)


def test_doctor_on_the_command_line(tmp_path, capsys):
    result = run("doctor", str(CHECKPOINTS / "vladva-micro"), "--batch", "4")
    assert result.returncode == 0, result.stderr
    assert "soft prompts and LoRA, on data/checkpoints/llava-micro" in result.stdout and "36 (640 x 480)" in result.stdout and "batch 4:" in result.stdout
    for config, batch, says in (('{"model_type": "florence2"}', "1", "encoder-decoder"), ("[", "1", "not a model config"), ("{}", "0", "at least 1")):
        (tmp_path / "config.json").write_text(config)
        assert main(["doctor", str(tmp_path), "--batch", batch]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["qwen2_vl", "ovis2"])
def test_the_six_properties_of_the_table(name, tokenizer, tmp_path):
    row = properties(save_micro(name, tokenizer, tmp_path))
    assert list(row) == list(HOLDS) == ["encode", "padding", "train step", "save and load", "adapter off", "export"]
    assert broken(row) == (["export"] if name == "ovis2" else [])  # which is refused


def test_a_property_that_does_not_hold_is_named(tokenizer, tmp_path, monkeypatch):
    save_micro("paligemma", tokenizer, tmp_path)
    monkeypatch.setattr(backbones, "PREFIX_ATTENTION", ())  # a caption after the prompt is now seen by it
    assert "padding" in broken(properties(tmp_path))


def test_a_step_that_moves_the_base_is_seen(tokenizer, tmp_path):
    lvlm = prepare(DiscriminativeLVLM.from_pretrained(save_micro("llava", tokenizer, tmp_path)), VARIANTS["vladva"])
    next(p for name, p in lvlm.named_parameters() if name.endswith("q_proj.base_layer.weight")).requires_grad_(True)
    assert not step_trains_the_adapter_alone(lvlm)


def test_a_tower_that_reads_any_size_is_not_held_to_one(tokenizer):
    model, processor = micro_family("pixtral", tokenizer)
    model.config.vision_config.image_size = 112  # the most that it reads, not what a picture has
    check_pictures(processor, model.config, "pixtral")
