"An export is a plain checkpoint: transformers, Sentence Transformers and mteb get the embedder's own embeddings from it."
import json
import subprocess
import sys
from functools import cache

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from conftest import CHECKPOINTS
from lvlm_research.backbones import world_tokenizer
from lvlm_research.cli import main
from lvlm_research.config import InputError
from lvlm_research.doctor import describe
from lvlm_research.embedder import DiscriminativeLVLM
from lvlm_research.evaluation import load_embedder
from lvlm_research.export import plain_embeddings, without_torchvision
from lvlm_research.mteb_model import MtebEncoder
from lvlm_research.properties import moved, noise_pictures
from lvlm_research.training import VARIANTS, prepare
from lvlm_research.zoo import MICRO_FAMILIES, micro_family

CAPTIONS = ["a red star", "there is a large blue ring left of a star.", "two things ", "what\n", "{{ 'a' }} <b>"]
QUESTION = "what is at the top left?"
tokenizer = cache(world_tokenizer)


@pytest.fixture(scope="session")
def pictures():
    return noise_pictures()


def micro(name: str, folder, variant: str = "vladva") -> DiscriminativeLVLM:
    "A trained micro model of a family, on a base in `folder`."
    torch.manual_seed(0)
    for part in micro_family(name, tokenizer()):
        part.save_pretrained(folder)
    return moved(prepare(DiscriminativeLVLM.from_pretrained(folder), VARIANTS[variant]))


def opened(folder):
    "Model and processor, as a user of transformers opens them; torchvision is not installed here."
    with without_torchvision():
        return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module", params=[name for name in MICRO_FAMILIES if name != "ovis2"])
def family(request, tmp_path_factory):
    "A trained embedder of a family, and the folder of its export."
    place = tmp_path_factory.mktemp(request.param)
    embedder = micro(request.param, place / "base")
    return embedder, embedder.export(place / "export")


def test_transformers_gives_the_embeddings_of_every_family(family, pictures):
    embedder, folder = family
    model, processor = opened(folder)
    image, text = embedder.encode_image(pictures), embedder.encode_text(CAPTIONS)
    assert torch.allclose(plain_embeddings(model, processor, pictures), image, atol=1e-4)
    assert torch.allclose(plain_embeddings(model, processor, CAPTIONS), text, atol=1e-4)
    assert torch.pdist(image).min() > 0.01 and torch.pdist(text).min() > 0.01  # so that a swapped row would show
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lora_" in name or "base_layer" in name]


def test_sentence_transformers_gives_the_embeddings_of_every_family(family, pictures):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    embedder, folder = family
    with without_torchvision():
        model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    image, text = embedder.encode_image(pictures), embedder.encode_text(CAPTIONS)
    encode = lambda inputs: model.encode(inputs, convert_to_tensor=True)
    assert torch.allclose(encode(pictures), image, atol=1e-4) and torch.allclose(encode(CAPTIONS), text, atol=1e-4)
    if embedder.model.config.model_type != "paligemma":  # whose processor reads every text of a batch with pictures as one with a picture
        assert torch.allclose(encode([*CAPTIONS, *pictures]), torch.cat([text, image]), atol=1e-4)
    assert torch.allclose(encode([[{"role": "user", "content": [{"type": "image", "image": pictures[1]}]}]]), image[1:2], atol=1e-4)
    assert torch.allclose(model.similarity(encode(CAPTIONS), encode(pictures)), text @ image.T, atol=1e-4)


def test_this_package_reads_an_export_with_the_prompts_of_its_template(family, pictures):
    embedder, folder = family
    again = load_embedder(folder)
    assert torch.allclose(again.encode_image(pictures), embedder.encode_image(pictures), atol=1e-4)
    assert torch.allclose(again.encode_text(CAPTIONS), embedder.encode_text(CAPTIONS), atol=1e-4)
    assert again.generate(pictures, QUESTION, max_new_tokens=8) == embedder.generate(pictures, QUESTION, adapter=True, max_new_tokens=8)
    assert describe(folder).fault is None


@pytest.mark.parametrize("variant", ["zero-shot", "lora", "soft"])
def test_every_variant_is_exported(base_folder, variant, pictures, tmp_path):
    embedder = moved(prepare(DiscriminativeLVLM.from_pretrained(base_folder), VARIANTS[variant]))
    before = {name: value.clone() for name, value in embedder.state_dict().items()}
    model, processor = opened(embedder.export(tmp_path / "out"))
    assert torch.allclose(plain_embeddings(model, processor, pictures), embedder.encode_image(pictures), atol=1e-4)
    assert torch.allclose(plain_embeddings(model, processor, CAPTIONS), embedder.encode_text(CAPTIONS), atol=1e-4)
    after = embedder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def test_with_the_adapter_off_every_token_is_the_bases(base, trainable, pictures):
    tuned = moved(trainable)
    chats = tuned.templates.processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}], add_generation_prompt=True)
    batch = tuned.templates.processed(pictures, [chats] * len(pictures), side="left")
    answer = lambda model: model.generate(**batch, max_new_tokens=16, do_sample=False)
    tuned.enable_adapter(False)
    assert torch.equal(answer(tuned.model), answer(base.model))
    tuned.enable_adapter(True)
    with torch.no_grad():
        assert not torch.allclose(tuned.model(**batch).logits, base.model(**batch).logits, atol=1e-2)


@pytest.mark.parametrize("name", ["llava", "gemma3"])  # a head of its own, and one that is the embedding matrix
def test_prompt_tokens_are_never_generated(name, pictures, tmp_path):
    embedder = micro(name, tmp_path / "base")
    with torch.no_grad():
        for vectors in embedder.soft_prompts.vectors.values():
            vectors.mul_(30)  # tied, their logits are far above the others
        if name == "llava":
            embedder.model.get_output_embeddings().weight.mul_(0).sub_(1)  # all logits are equal, and below the zeros of the new tokens
    model, processor = opened(embedder.export(tmp_path / "out"))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (name == "gemma3")
    new = set(processor.tokenizer.get_added_vocab().values()) - set(embedder.templates.tokenizer.get_added_vocab().values())
    assert len(new) == sum(map(len, embedder.soft_prompts.vectors.values()))
    chats = [[{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]}] for picture in pictures]
    batch = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True})
    answer = lambda **options: set(model.generate(**batch, max_new_tokens=4, do_sample=False, **options)[:, batch["input_ids"].shape[1] :].flatten().tolist())
    assert not answer() & new
    model.generation_config.suppress_tokens = None
    assert answer() & new  # the test can fail


def test_a_padded_vocabulary_is_filled_before_it_grows(pictures, tmp_path):
    torch.manual_seed(0)
    model, processor = micro_family("llava", tokenizer())
    model.resize_token_embeddings(len(processor.tokenizer) + 100, mean_resizing=False)
    embedder = DiscriminativeLVLM(model, processor)
    exported, opened_processor = opened(embedder.export(tmp_path / "out"))
    assert exported.get_input_embeddings().num_embeddings == len(processor.tokenizer) + 100
    assert torch.allclose(plain_embeddings(exported, opened_processor, pictures), embedder.encode_image(pictures), atol=1e-4)


def test_half_precision_is_a_choice(pictures, tmp_path):
    embedder = DiscriminativeLVLM.from_pretrained(CHECKPOINTS / "vladva-micro")
    folder = embedder.export(tmp_path / "half", torch.bfloat16)
    model, processor = opened(folder)
    assert model.dtype == torch.bfloat16
    similarity = torch.cosine_similarity(plain_embeddings(model, processor, pictures), embedder.encode_image(pictures))
    assert 0.99 < similarity.min() and similarity.max() < 1 - 1e-7


@pytest.mark.parametrize("stored", ["video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json", None])
def test_the_section_on_videos_is_the_bases(stored, tmp_path):
    base = tmp_path / "base"
    embedder = micro("llava_onevision", base, "zero-shot")
    videos = {"video_processor_type": "LlavaOnevisionVideoProcessor", "rescale_factor": 0.5}
    if stored == "processor_config.json":
        (base / stored).write_text(json.dumps(json.loads((base / stored).read_text()) | {"video_processor": videos}))
    elif stored:
        (base / stored).write_text(json.dumps(videos))
    config = json.loads((embedder.export(tmp_path / "out") / "processor_config.json").read_text())
    assert config["video_processor"] == (videos if stored else {}) and config["processor_class"] == "LlavaOnevisionProcessor"


@pytest.mark.parametrize("stored", [lambda template: template, lambda template: {"default": template, "other": "x"}], ids=["one", "several"])
def test_the_own_template_is_left_as_it_is(stored, tmp_path):
    embedder = micro("llava", tmp_path / "base", "zero-shot")
    template = "\né🙂 \"$image\" \\n{% for message in messages %}{{ message.role }}\n{% for part in message.content %}{{ part.text or '<image>' }}{% endfor %}\n{% endfor %}\nANSWER:\n\n"
    embedder.templates.processor.chat_template = stored(template)
    embedder = DiscriminativeLVLM(embedder.model, embedder.templates.processor)
    _, processor = opened(embedder.export(tmp_path / "out"))
    part = lambda text: {"type": "text", "text": text}
    for chat in ([{"role": "user", "content": [{"type": "image"}, part("a")]}],
                 [{"role": "system", "content": [part("b")]}, {"role": "user", "content": [part("a")]}]):
        own, ours = (p.apply_chat_template(chat, add_generation_prompt=True) for p in (embedder.templates.processor, processor))
        assert own == ours and "prompt_0" not in own
    for content in ("a", [part("a")]):
        assert processor.apply_chat_template([{"role": "user", "content": content}]).startswith(embedder.templates.text_prefix + "a<|text_prompt_0|>")
    assert embedder.templates.text_prefix.startswith('\né🙂 "$image" \\n')


def test_a_folder_is_made_whole_or_not_at_all(tmp_path):
    embedder = DiscriminativeLVLM.from_pretrained(CHECKPOINTS / "vladva-micro")
    (tmp_path / "kept").mkdir()
    embedder.export(tmp_path / "kept")  # an empty folder is nobody's
    assert (tmp_path / "kept/modules.json").is_file()
    with pytest.raises(InputError, match="exists already"):
        embedder.export(tmp_path / "kept")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/out: cannot be written"):
        embedder.export(tmp_path / "file" / "out")
    with pytest.raises(InputError, match="ovis2 cannot be exported: transformers' own forward pass"):
        micro("ovis2", tmp_path / "ovis2").export(tmp_path / "refused")
    embedder.templates.processor.image_token = "<picture>"
    with pytest.raises(InputError, match="does not write the image token"):
        embedder.export(tmp_path / "refused")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "kept", "ovis2"]


def test_export_on_the_command_line(tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert main(["export", str(CHECKPOINTS / "vladva-micro"), str(out), "--dtype", "float16"]) == 0
    assert "SentenceTransformer" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16" and "soft prompts and LoRA" in (out / "README.md").read_text()
    assert main(["export", str(CHECKPOINTS / "vladva-micro"), str(out)]) == 2 and "exists already" in capsys.readouterr().err
    assert main(["export", str(CHECKPOINTS / "clip-micro"), str(tmp_path / "clip")]) == 2 and "dual encoder" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "out")]) == 2 and "does not exist" in capsys.readouterr().err


def test_mteb_runs_every_mock_task_of_texts_and_pictures():
    mteb = pytest.importorskip("mteb")
    results = mteb.mock_run(MtebEncoder(CHECKPOINTS / "vladva-micro"))
    ran = {task: status for task, status in results.items() if status is not None}
    assert [(task, status) for task, status in ran.items() if not isinstance(status, mteb.TaskResult)] == []
    assert {modality: status for status, modality, _ in results.modality_summary()}["image"] == "✓ (15/15)" and len(ran) > 40


def test_mteb_reads_a_dual_encoder_too(pictures):
    mteb = pytest.importorskip("mteb")
    encoder = MtebEncoder(CHECKPOINTS / "clip-micro")
    assert isinstance(encoder, mteb.EncoderProtocol) and encoder.mteb_model_meta.modalities == ["text", "image"]
    found = encoder.encode([{"image": pictures}, {"image": pictures[:1]}], task_metadata=None, hf_split="", hf_subset="")
    expected = encoder.embedder.encode_image([*pictures, pictures[0]])
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)
    assert torch.allclose(encoder.similarity(found, found), expected @ expected.T, atol=1e-5)


def test_an_export_opens_where_this_package_is_not(real_data, tmp_path):
    "In a process that knows Sentence Transformers alone; the photographs are larger than the models read, so that resizing shows."
    pytest.importorskip("sentence_transformers")
    photographs = [str(file) for file in sorted((real_data / "real_pairs/coco_cc").rglob("*.jpg"))[:3]]
    for name in ("llava", "qwen2_vl", "qwen2_5_vl", "smolvlm"):
        embedder = micro(name, tmp_path / name / "base")
        embedder.export(tmp_path / name / "export")
        save_file({"image": embedder.encode_image(photographs), "text": embedder.encode_text(CAPTIONS)}, tmp_path / name / "expected.safetensors")
    program = f"""
import sys
from pathlib import Path
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
for folder in map(Path, sys.argv[1:]):
    model, expected = SentenceTransformer(str(folder / "export"), device="cpu"), load_file(folder / "expected.safetensors")
    for kind, items in (("image", [Image.open(file).convert("RGB") for file in {photographs}]), ("text", {CAPTIONS})):
        change = (model.encode(items, convert_to_tensor=True) - expected[kind]).abs().max().item()
        assert change < 1e-4, (folder, kind, change)
assert "lvlm_research" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", program, *map(str, sorted(tmp_path.iterdir()))], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_an_embedder_in_bfloat16_can_be_exported(tmp_path):
    "What it is compared with is rounded too; the cosines of both agree as far as that precision can tell."
    half = DiscriminativeLVLM.from_pretrained(CHECKPOINTS / "vladva-micro", dtype=torch.bfloat16)
    exported = load_embedder(half.export(tmp_path / "plain"))
    texts = ["a red star", "two things, one of them a ring"]
    assert ((exported.encode_text(texts) * half.encode_text(texts)).sum(-1) > 0.99).all()
