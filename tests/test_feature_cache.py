"Image tokens kept on disk: the tower sees a picture once, what is trained is the same, and nothing of another model is ever taken."
import copy
import json
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlavaForConditionalGeneration

from conftest import CHECKPOINTS
from lvlm_research.backbones import world_tokenizer
from lvlm_research.config import InputError
from lvlm_research.embedder import DiscriminativeLVLM
from lvlm_research.feature_cache import ENTRY, FeatureCache, kept_features, tower_hash
from lvlm_research.finetuning import fine_tune, read_fine_tuning
from lvlm_research.properties import noise_pictures
from lvlm_research.scenes import long_caption, sample_scenes, scene_images, short_caption
from lvlm_research.training import VARIANTS, prepare
from lvlm_research.zoo import MICRO_FAMILIES, micro_family

TOWERS = ("CLIPVisionModel", "Qwen2VisionTransformerPretrainedModel")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Eight pictures with a short and a long caption each."
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    scenes = sample_scenes(8, rng)
    for i, picture in enumerate(scene_images(scenes, 60)):
        Image.fromarray(picture).save(folder / f"{i}.png")
    (folder / "captions.jsonl").write_text("".join(json.dumps({"image": f"{i}.png", "captions": [short_caption(s, rng), long_caption(s, rng)]}) + "\n" for i, s in enumerate(scenes)))
    return folder


@contextmanager
def pictures_seen():
    "How many passes the towers make, of any model."
    passes = []
    hook = register_module_forward_hook(lambda module, args, out: passes.append(1) if type(module).__name__ in TOWERS else None)
    try:
        yield passes
    finally:
        hook.remove()


def train(folder, base, data, name: str, **more):
    "A training of four epochs; what it trained, and its losses."
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"model": str(base), "data": str(data), "output": name, "steps": 8, "batch": 4, "lr": 1e-3, "dropout": 0} | more))
    module = fine_tune(read_fine_tuning(file))
    return {n: p.detach() for n, p in module.embedder.named_parameters() if "lora_" in n or "soft_prompts" in n}, pd.DataFrame(module.history)[["contrastive", "next_token"]]


@pytest.mark.parametrize("cache_rows", [0, 2])
def test_a_training_with_kept_tokens_is_the_same_training(base_folder, data, tmp_path, cache_rows):
    with pictures_seen() as passes:
        _, expected = train(tmp_path, base_folder, data, "without", cache_rows=cache_rows)
        without = len(passes)
        first, losses = train(tmp_path, base_folder, data, "first", cache_rows=cache_rows, feature_cache="kept")
        new = len(passes) - without
        again, _ = train(tmp_path, base_folder, data, "again", cache_rows=cache_rows, feature_cache="kept")
        assert without >= 8 and 2 <= new <= 8 and len(passes) == without + new  # each of eight pictures once; nothing is new the second time
    assert np.allclose(losses, expected, rtol=1e-3)
    assert first.keys() == again.keys() and all(torch.equal(first[n], again[n]) for n in first)
    assert (tmp_path / "kept/index-0.bin").stat().st_size == 8 * ENTRY.size


@pytest.fixture
def llava():
    return DiscriminativeLVLM.from_pretrained(CHECKPOINTS / "llava-micro")


def states(lvlm, *pictures: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return lvlm.embed(lvlm.templates.image(list(pictures)), "image")


def test_a_changed_byte_is_never_taken_for_tokens(llava, tmp_path):
    noise = np.random.default_rng(0)
    pictures = [noise.integers(0, 256, (60, 60, 3), np.uint8) for _ in range(2)]
    expected = states(llava, *pictures)
    with kept_features(tmp_path / "kept", llava.model, llava.templates.processor):
        states(llava, *pictures)
    index, tokens = (tmp_path / f"kept/{name}-0.bin" for name in ("index", "tokens"))
    whole, refused = {file: file.read_bytes() for file in (index, tokens)}, 0
    for file, places in ((index, range(2 * ENTRY.size)), (tokens, noise.integers(0, len(whole[tokens]), 20))):
        for place in places:
            for other, content in whole.items():
                other.write_bytes(content)
            changed = bytearray(whole[file])
            changed[place] ^= noise.integers(1, 256)
            file.write_bytes(changed)
            try:
                with kept_features(tmp_path / "kept", llava.model, llava.templates.processor):
                    assert torch.allclose(states(llava, *pictures), expected, atol=1e-6)
            except InputError as error:
                assert "was changed since it was written; remove" in str(error)
                refused += 1
    assert refused > 20  # of the others, tokens were made again


def test_what_a_kill_leaves_unfinished_is_made_again(llava, tmp_path):
    model, processor, noise = llava.model, llava.templates.processor, np.random.default_rng(0)
    pictures = [noise.integers(0, 256, (60, 60, 3), np.uint8) for _ in range(5)]
    expected = states(llava, *pictures)
    with kept_features(tmp_path / "kept", model, processor):
        states(llava, *pictures[:4])
    tokens, index = tmp_path / "kept/tokens-0.bin", tmp_path / "kept/index-0.bin"
    tokens.write_bytes(tokens.read_bytes()[:-10])  # the fourth picture
    index.write_bytes(index.read_bytes() + b"half an entry")
    for _ in range(2):
        with kept_features(tmp_path / "kept", model, processor) as cache:
            assert torch.allclose(states(llava, *pictures), expected, atol=1e-5)
            assert len(cache.places) == 5


def test_another_picture_or_size_is_another_entry(llava, tmp_path):
    model, processor = llava.model, llava.templates.processor
    red, blue = np.full((60, 60, 3), (255, 0, 0), np.uint8), np.full((60, 60, 3), (0, 0, 255), np.uint8)
    expected = states(llava, red, blue)
    with kept_features(tmp_path / "kept", model, processor) as cache:
        assert torch.allclose(states(llava, red), expected[:1], atol=1e-5) and len(cache.places) == 1
        assert torch.allclose(states(llava, blue), expected[1:], atol=1e-5) and len(cache.places) == 2
        red[0, 0] = 0
        states(llava, red)
        assert len(cache.places) == 3


def test_tokens_of_another_model_or_processor_are_refused_by_name(llava, tmp_path):
    model, processor = llava.model, llava.templates.processor
    FeatureCache(tmp_path / "kept", model, processor).lock.release()
    other = copy.deepcopy(processor)
    other.image_processor.image_mean = [0.4] * 3
    with pytest.raises(InputError, match="kept: holds image tokens of another processor; give another 'feature_cache'"):
        FeatureCache(tmp_path / "kept", model, other)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias[0] += 1
    with pytest.raises(InputError, match="kept: holds image tokens of another model"):
        FeatureCache(tmp_path / "kept", model, processor)


def test_a_tower_is_known_by_what_it_computes_and_not_by_its_folder(llava, tmp_path):
    model = llava.model
    known = tower_hash(model)
    model.save_pretrained(tmp_path / "elsewhere")
    assert tower_hash(type(model).from_pretrained(tmp_path / "elsewhere")) == known
    act = model.config.projector_hidden_act
    model.config.projector_hidden_act = "relu"
    assert tower_hash(model) != known
    model.config.projector_hidden_act = act
    assert tower_hash(model) == known
    prepare(llava, VARIANTS["vladva"])
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[0] += 1
    model.config.text_config.rope_parameters["rope_theta"] = 5e4
    assert tower_hash(model) == known  # of the language model
    model.model.vision_tower.register_buffer("statistics", torch.ones(2))
    with_statistics = tower_hash(model)
    model.model.vision_tower.statistics[1] = 2
    assert len({tower_hash(model), with_statistics, known}) == 3


def test_a_tower_is_the_same_in_whatever_precision_it_is_loaded():
    folder = CHECKPOINTS / "llava-micro"  # stored in half precision
    assert len({tower_hash(LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)) for dtype in (torch.float32, torch.float16)}) == 1


def test_a_folder_in_use_or_of_something_else_is_refused(llava, tmp_path):
    model, processor = llava.model, llava.templates.processor
    with kept_features(tmp_path / "kept", model, processor):
        with pytest.raises(InputError, match="kept: another training writes there"):
            FeatureCache(tmp_path / "kept", model, processor)
    FeatureCache(tmp_path / "kept", model, processor).lock.release()
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="is there already, and holds no image tokens"):
            FeatureCache(place, model, processor)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", MICRO_FAMILIES)
def test_every_family_embeds_from_kept_tokens_or_says_that_it_cannot(name, tmp_path):
    "New, partly known, all known, and all known in a process that has never asked the tower."
    torch.manual_seed(0)
    for part in micro_family(name, world_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    lvlm = DiscriminativeLVLM.from_pretrained(tmp_path / "base")
    model, processor, pictures = lvlm.model, lvlm.templates.processor, [picture.resize((64, 64)) for picture in noise_pictures()]
    batches = [pictures[:1], pictures[:2], pictures, pictures[::-1]]
    embed = lambda batch: lvlm.embed(lvlm.templates.image(batch), "image")
    with torch.inference_mode():
        expected = [embed(batch) for batch in batches]
        try:
            with kept_features(tmp_path / "kept", model, processor):
                found = [embed(batch) for batch in batches]
        except InputError as error:
            assert name not in ("llava", "qwen2_vl", "qwen2_5_vl", "gemma3", "internvl") and "train it without 'feature_cache'" in str(error)
            return
        with kept_features(tmp_path / "kept", model, processor):
            found.append(embed(pictures[:2]))
    for a, b in zip(found, [*expected, expected[1]]):
        assert torch.allclose(a, b, atol=1e-5)


def test_tokens_of_another_precision_are_never_taken(base, tmp_path):
    sequences = base.templates.image(noise_pictures()[:2])
    with torch.inference_mode():
        expected = base.embed(sequences, "image")
        with kept_features(tmp_path / "kept", base.model, base.templates.processor) as cache:
            with torch.autocast("cpu", torch.bfloat16):
                base.embed(sequences, "image")
            half = len(cache.places)
            assert torch.equal(base.embed(sequences, "image"), expected) and len(cache.places) == 2 * half
