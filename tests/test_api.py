"The Python API and what is built on it: pictures and captions of every kind, embeddings on disk that survive a kill, search, fine-tuning by a file."
import importlib.metadata
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from packaging.requirements import Requirement
from PIL import Image, ImageSequence
from safetensors.torch import load_file, save_file

from conftest import CHECKPOINTS, ROOT
from lvlm_research.backbones import world_tokenizer
from lvlm_research.config import InputError, set_threads
from lvlm_research.datasets import JointBatch, joint_batches, scene_pairs
from lvlm_research.embedder import DiscriminativeLVLM, Encodes, ahead, open_image
from lvlm_research.evaluation import ClipEmbedder, load_embedder, model_signature
from lvlm_research.fitting import FitModule, fit
from lvlm_research.finetuning import FineTuning, fine_tune, read_fine_tuning
from lvlm_research.scenes import sample_scenes, scene_images, short_caption
from lvlm_research.training import VARIANTS, Discriminative, prepare
from lvlm_research.vectors import Vectors, embed_data, nearest, search
from lvlm_research.zoo import micro_family
from test_faults import kill_when
from test_formats import write_huggingface_parquet, write_llava, write_webdataset

ADAPTER, CLIP = CHECKPOINTS / "vladva-micro", CHECKPOINTS / "clip-micro"


@pytest.fixture(scope="module", autouse=True)
def threads():
    "As many as the command line takes, whose bits are compared here."
    set_threads()


@pytest.fixture(scope="module", params=[ADAPTER, CLIP], ids=lambda p: p.name)
def embedder(request):
    return load_embedder(request.param)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, str]]:
    rng = np.random.default_rng(0)
    drawn = sample_scenes(40, rng, "test")
    return [(picture, short_caption(scene, rng)) for picture, scene in zip(scene_images(drawn, 60), drawn)]


def encoded(image: Image.Image, format: str = "PNG", **how) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **how)
    return file.getvalue()


def as_folder(folder: Path, scenes) -> Path:
    "A folder with captions.jsonl."
    folder.mkdir(parents=True)
    for i, (picture, _) in enumerate(scenes):
        Image.fromarray(picture).save(folder / f"{i}.png")
    (folder / "captions.jsonl").write_text("".join(json.dumps({"image": f"{i}.png", "captions": [c, f"this is {c}"]}) + "\n" for i, (_, c) in enumerate(scenes)))
    return folder


# What is given, what comes back


def test_every_way_to_give_a_picture_gives_the_same_embedding(embedder, scenes, tmp_path):
    array = scenes[0][0]
    picture, file = Image.fromarray(array), tmp_path / "a.png"
    picture.save(file)
    ways = [str(file), file, file.read_bytes(), picture, array, np.dstack([array, np.full(array.shape[:2], 255, np.uint8)])]
    together = embedder.encode_image(ways)
    assert together.shape == (6, together.shape[1]) and torch.allclose(together, together[:1].expand_as(together), atol=1e-6)
    for way in ways:
        alone = embedder.encode_image(way)
        assert alone.shape == together.shape[1:] and torch.allclose(alone, together[0], atol=1e-5)
    grey = array.mean(-1).astype(np.uint8)
    assert torch.allclose(*embedder.encode_image([grey, np.repeat(grey[..., None], 3, 2)]), atol=1e-6)
    assert torch.allclose(embedder.encode_image(np.stack([array, array])), embedder.encode_image((array, array)), atol=1e-6)


def test_normalised_or_not_whole_or_short(embedder, scenes):
    pictures, texts = [p for p, _ in scenes[:3]], [t for _, t in scenes[:3]]
    for encode, items in ((embedder.encode_image, pictures), (embedder.encode_text, texts)):
        unit, raw = encode(items), encode(items, normalize=False)
        assert unit.dtype == torch.float32 and torch.allclose(unit.norm(dim=-1), torch.ones(3))
        assert torch.allclose(F.normalize(raw, dim=-1), unit, atol=1e-5) and not torch.allclose(raw, unit, atol=0.1)
        assert torch.allclose(encode(items, truncate_dim=16), F.normalize(raw[:, :16], dim=-1), atol=1e-5)
        assert torch.allclose(encode(items[0], normalize=False, truncate_dim=16), raw[0, :16], atol=1e-4)
        assert torch.allclose(encode(items, batch_size=1), unit, atol=1e-5)
        for wrong in (0, -1, unit.shape[1] + 1):
            with pytest.raises(InputError, match=f"truncate_dim is {wrong}: give 1 to {unit.shape[1]}"):
                encode(items, truncate_dim=wrong)
        with pytest.raises(InputError, match="list is empty"):
            encode([])


def test_similarity_is_the_cosine_of_all_pairs(embedder, scenes):
    image, text = embedder.encode_image([p for p, _ in scenes[:4]], normalize=False), embedder.encode_text([t for _, t in scenes[:3]])
    found = embedder.similarity(image, text.numpy())
    assert found.shape == (4, 3) and torch.allclose(found, F.cosine_similarity(image[:, None], text[None], dim=-1), atol=1e-6)
    assert torch.allclose(embedder.similarity(image[0], text), found[:1], atol=1e-6)


def test_what_is_given_twice_is_embedded_once(scenes, tmp_path):
    lvlm, file = load_embedder(ADAPTER), tmp_path / "a.png"
    Image.fromarray(scenes[0][0]).save(file)
    rows = []
    lvlm.model.get_decoder().register_forward_hook(lambda module, args, out: rows.append(len(out.last_hidden_state)))
    many = lvlm.encode_image([str(file)] * 50 + [file, file.read_bytes(), scenes[0][0], Image.fromarray(scenes[0][0])], batch_size=2)
    assert sum(rows) == 1 and torch.allclose(many, many[:1].expand_as(many), atol=1e-6)
    rows.clear()
    assert lvlm.encode_text(["a star"] * 50 + ["a ring"]).shape[0] == 51 and sum(rows) == 2


def test_pictures_are_opened_ahead_but_not_all_of_them():
    taken = itertools.count()
    results = ahead(lambda i: i, (next(taken) for _ in range(100)), depth=3)
    assert [next(results) for _ in range(10)] == list(range(10)) and next(taken) <= 10 + 4
    results.close()


# Pictures


def exif(orientation: int) -> bytes:
    made = Image.Exif()
    made[0x0112] = orientation
    return made.tobytes()


def two_colours(mode: str = "RGB") -> Image.Image:
    "Red on the left, blue on the right; 40 x 20."
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    return image.convert(mode)


CORNERS = {  # picture, its size, and the colours of the upper left and the lower right corner
    "rgb": (encoded(two_colours()), (40, 20), (255, 0, 0), (0, 0, 255)),
    "turned by exif": (encoded(two_colours(), exif=exif(6)), (20, 40), (255, 0, 0), (0, 0, 255)),
    "mirrored by exif": (encoded(two_colours(), exif=exif(2)), (40, 20), (0, 0, 255), (255, 0, 0)),
    "cmyk": (encoded(two_colours("CMYK"), "TIFF"), (40, 20), (255, 0, 0), (0, 0, 255)),
    "palette": (encoded(two_colours("P")), (40, 20), (255, 0, 0), (0, 0, 255)),
    "transparent": (encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0))), (9, 9), (255,) * 3, (255,) * 3),
    "half transparent": (encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 128))), (9, 9), (127,) * 3, (127,) * 3),
    "transparent grey": (encoded(Image.new("LA", (9, 9), (0, 0))), (9, 9), (255,) * 3, (255,) * 3),
    "transparent palette": (encoded(Image.new("P", (9, 9), 0), transparency=0), (9, 9), (255,) * 3, (255,) * 3),
    "one transparent colour": (encoded(two_colours(), transparency=(255, 0, 0)), (40, 20), (255,) * 3, (0, 0, 255)),
    "16-bit grey": (encoded(Image.fromarray(np.linspace(0, 65535, 256 * 8).astype(np.uint16).reshape(8, 256))), (256, 8), (0,) * 3, (255,) * 3),
    "16-bit grey, other bytes": (encoded(Image.fromarray(np.full((8, 8), 25700, ">u2")), "TIFF"), (8, 8), (100,) * 3, (100,) * 3),
    "bilevel": (encoded(Image.new("1", (9, 9), 1)), (9, 9), (255,) * 3, (255,) * 3),
    "one pixel": (encoded(Image.new("RGB", (1, 1), "red")), (4, 4), (255, 0, 0), (255, 0, 0)),
    "three rows": (encoded(two_colours().resize((40, 3))), (40, 4), (255, 0, 0), (0, 0, 255)),
    "animated": (encoded(two_colours(), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 20), "lime")] * 3), (40, 20), (255, 0, 0), (0, 0, 255)),
}


@pytest.mark.parametrize("name", CORNERS)
def test_pictures_are_as_a_person_sees_them(name):
    data, size, first, last = CORNERS[name]
    for picture in (data, io.BytesIO(data), Image.open(io.BytesIO(data))):
        seen = open_image(picture)
        corners = [seen.getpixel(at) for at in ((0, 0), (seen.width - 1, seen.height - 1))]
        assert (seen.mode, seen.size) == ("RGB", size) and np.abs(np.subtract(corners, (first, last))).max() <= 2, corners


def test_sixteen_bits_keep_their_greys():
    seen = np.asarray(open_image(CORNERS["16-bit grey"][0]))[..., 0]
    assert len(np.unique(seen)) == 256  # PIL alone makes all but one in 256 of them white


REFUSED = {
    "truncated": (encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))[:3000], "truncated"),
    "no picture": (b"no picture", "cannot identify"),
    "nothing": (b"", "cannot identify"),
    "floats": (encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "floats, so nobody knows what is white"),
    "32-bit": (encoded(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"), "32-bit numbers"),
    "a thread": (encoded(Image.new("RGB", (1, 801))), "1 x 801 pixels are too narrow"),
    "float array": (np.ones((8, 8, 3), np.float32), "an array of float32, whose range is a guess"),
    "bool array": (np.ones((8, 8), bool), "an array of bool"),
    "channels first": (np.ones((3, 8, 8), np.uint8), r"shape \(3, 8, 8\)"),
    "empty array": (np.ones((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
    "a number": (3, "not a readable image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_refused_by_its_place(name, embedder, scenes):
    bad, says = REFUSED[name]
    with pytest.raises(InputError, match=says) as error:
        embedder.encode_image([scenes[0][0], scenes[0][0], bad])
    assert "picture 2" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("limit", [399, 150])  # PIL warns of the first and refuses the second
def test_a_huge_picture_is_refused_before_it_is_decoded(limit, monkeypatch, tmp_path):
    file = tmp_path / "huge.png"
    file.write_bytes(encoded(Image.new("RGB", (20, 20))))
    open_image(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(InputError, match=r"huge.png: too large \(Image size \(400 pixels\) exceeds limit of \d+ pixels\); shrink it"):
        open_image(file)


def test_pictures_of_few_pixels_have_an_embedding_in_every_shape(embedder):
    sizes = [(1, 1), (1, 90), (90, 1), (3, 3), (3, 90), (2, 2)]
    red = embedder.encode_image([Image.new("RGB", size, "red") for size in sizes])
    blue = embedder.encode_image([Image.new("RGB", size, "blue") for size in sizes])
    assert torch.isfinite(red).all() and ((red * blue).sum(-1) < 0.999).all()


def test_a_picture_that_only_this_family_refuses_is_named(scenes, tmp_path):
    torch.manual_seed(0)
    for part in micro_family("pixtral", world_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    Image.new("RGB", (4, 800)).save(tmp_path / "thread.png")
    with pytest.raises(InputError, match=r"thread.png: this model cannot read a picture of 4 x 800 pixels \("):
        DiscriminativeLVLM.from_pretrained(tmp_path / "model").encode_image([scenes[0][0], tmp_path / "thread.png"])


def test_reading_pictures_leaves_the_warning_filters_alone(scenes):
    lvlm = load_embedder(CLIP)
    before = list(warnings.filters)
    lvlm.encode_image([p for p, _ in scenes], batch_size=3)
    assert warnings.filters == before


# Captions


@pytest.mark.parametrize("bad, says", [("", "is empty"), (" \n\t", "is empty"), (None, "is no text but NoneType"), (3, "is no text but int")])
def test_a_caption_without_words_is_refused_by_its_index(embedder, bad, says):
    with pytest.raises(InputError, match=f"caption 2 {says}"):
        embedder.encode_text(["a star", "a ring", bad])


def test_a_caption_of_ten_thousand_tokens_is_cut_and_counted_once(embedder):
    long = ["a red star " * 5000, "a blue ring " * 5000]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = embedder.encode_text(["a star", *long, long[0], "a ring"], batch_size=2)
    assert ["captions are longer" in str(w.message) for w in said] == [True] and str(said[0].message).startswith("2 of 4 captions")
    assert torch.isfinite(found).all() and torch.equal(found[1], found[3]) and torch.allclose(found[0], embedder.encode_text("a star"), atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.allclose(found[1], embedder.encode_text("a red star " * 4000), atol=1e-5)  # what was cut does not matter


def test_the_longest_caption_that_fits_is_not_cut():
    lvlm = load_embedder(ADAPTER)
    room = lvlm.model.config.text_config.max_position_embeddings
    lengths = {n: lvlm.templates.text([("a " * n).strip()]).input_ids.shape[1] for n in (10, 11)}
    words = 10 + (room - lengths[10]) // (lengths[11] - lengths[10])
    fits, over = ("a " * words).strip(), ("a " * (words + 1)).strip()
    assert (lvlm.count_cut([fits]), lvlm.count_cut([over]), lvlm.count_cut([fits, over, over])) == (0, 1, 2)
    rows = lvlm.templates.text([over])
    assert rows.input_ids.shape[1] == room and rows.input_ids[0, -len(lvlm.templates.spans["text"]) :].tolist() == lvlm.templates.spans["text"]


def test_generate_takes_paths_and_leaves_the_adapter_off(scenes, tmp_path):
    Image.fromarray(scenes[0][0]).save(tmp_path / "a.png")
    adapter, base = load_embedder(ADAPTER), load_embedder(CHECKPOINTS / "llava-micro")
    question = "what is at the top left?"
    answers = [model.generate(pictures, question, max_new_tokens=6) for model in (adapter, base) for pictures in ([tmp_path / "a.png"], [scenes[0][0]])]
    assert answers == [answers[0]] * 4 and answers[0][0]
    assert not any(p.requires_grad for p in adapter.parameters())  # what was frozen still is
    with_it, without = adapter.encode_text("a red star"), base.encode_text("a red star", normalize=True)
    adapter.enable_adapter(False)
    off = adapter.encode_text("a red star")
    adapter.generate(scenes[0][0], question, max_new_tokens=2)
    assert torch.equal(adapter.encode_text("a red star"), off) and not torch.allclose(off, with_it, atol=1e-2) and off.shape == without.shape  # it is left as it was


def test_threads_that_pad_and_threads_that_do_not_share_a_tokenizer(scenes):
    "Pictures and CLIP's captions are padded, captions of an LVLM are not; a tokenizer is told so in a step of its own."
    lvlm, texts = load_embedder(ADAPTER), [f"a star {'and a ring ' * (number % 5)}{number}" for number in range(40)]
    picture, expected = Image.fromarray(scenes[0][0]), lvlm.templates.text(texts).input_ids
    questions = [lvlm.templates.image_text, lvlm.templates.image_text + " what is there?"]
    with ThreadPoolExecutor(6) as threads:
        padded = [threads.submit(lvlm.templates.processed, [picture] * 2, questions) for _ in range(60)]
        found = [threads.submit(lvlm.templates.text, texts) for _ in range(60)]
        assert all(torch.equal(f.result().input_ids, expected) for f in found) and len({tuple(p.result()["input_ids"].shape) for p in padded}) == 1


def test_embeddings_can_be_learnt_from_and_changed(embedder, scenes):
    found, probe = embedder.encode_image([p for p, _ in scenes[:3]]), torch.nn.LazyLinear(2)
    probe(torch.cat([found, embedder.encode_text([t for _, t in scenes[:3]])])).sum().backward()
    assert probe.weight.grad.abs().sum() > 0 and not found.requires_grad
    found *= 2


def test_an_iterator_may_fill_one_picture_again_and_again(embedder, scenes):
    frames = [Image.fromarray(p) for p, _ in scenes[:3]]
    film = Image.open(io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    expected = [embedder.encode_image([frame.copy() for frame in ImageSequence.Iterator(film)])]
    again = np.empty_like(scenes[0][0])

    def filled():
        for picture, _ in scenes[:3]:
            again[:] = picture
            yield again

    expected.append(embedder.encode_image([p for p, _ in scenes[:3]]))
    for given, rows in zip((ImageSequence.Iterator(film), filled()), expected):
        assert torch.equal(embedder.encode_image(given), rows) and (rows[0] - rows[1]).abs().max() > 1e-3

    class Frames:
        def __iter__(self):
            return filled()

    assert torch.equal(embedder.encode_image(Frames()), expected[1])
    torn = encoded(frames[0])[:200]
    with pytest.raises(InputError, match="picture 1: not a readable image"):
        embedder.encode_image(Image.open(io.BytesIO(content)) for content in (encoded(frames[0]), torn))


def test_threads_may_share_a_model_or_have_one_each(scenes):
    texts = [[f"{'a star and ' * (number % 7)}a ring {number} {part}" for number in range(24)] for part in range(4)]
    models = [load_embedder(ADAPTER), load_embedder(CHECKPOINTS / "llava-micro")]
    trained = prepare(load_embedder(CHECKPOINTS / "llava-micro"), VARIANTS["vladva"])
    trained.levers = replace(trained.levers, pass_price=8)  # so that a list keeps what its rows begin with, without a graph
    parameters = [p for name, p in trained.named_parameters() if "lora_B" in name]
    for p in parameters:
        torch.nn.init.normal_(p, std=0.1)  # so that the base answers otherwise
    module = Discriminative(trained, cache_rows=2)
    module.note = lambda **values: None  # it asks the trainer for the step
    pictures, batch = [picture for picture, _ in scenes[:4]], joint_batches(trained.templates, scene_pairs(4, 60, 0))(0)

    def gradient(part: list[str]) -> torch.Tensor:
        found = trained.embed(trained.templates.text(part), "text")
        return torch.cat([g.flatten() for g in torch.autograd.grad(found.sum(), parameters)])

    def cached_gradient(batch: JointBatch) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(module.training_step(batch, 0), parameters)])

    def answers(pictures: list[np.ndarray]) -> list[str]:
        return trained.generate(pictures, "what is there?", max_new_tokens=6)

    jobs = [job for part in texts * 2 for job in ((trained.encode_text, part), (gradient, part))]
    jobs += [(models[part % 2].encode_text, part_texts) for part, part_texts in enumerate(texts * 3)] + [(model.encode_image, [p for p, _ in scenes[:4]]) for model in models]
    jobs += [(trained.encode_image, pictures), (cached_gradient, batch), (trained.encode_text, texts[0][:4]), (answers, pictures), (trained.text_log_likelihood, texts[0])] * 2
    expected = [encode(items) for encode, items in jobs]
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda job: job[0](job[1]), jobs))
    assert all(a == b if isinstance(a, list) else torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected))
    assert all(model.model.get_decoder().config._attn_implementation == "sdpa" for model in models)


# The base install


def required(name: str, extras: frozenset = frozenset()) -> set[str]:
    "A distribution and all that it needs, by canonical name."
    canonical, found, todo = lambda n: re.sub(r"[-_.]+", "-", n).lower(), set(), [(name, extras)]
    while todo:
        name, wanted = todo.pop()
        if (canonical(name), wanted) in found:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # a wheel of torch for a CPU names CUDA libraries that it does not need
        found.add((canonical(name), wanted))
        for requirement in map(Requirement, needs):
            if any(requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in (wanted or {""})):
                todo.append((requirement.name, frozenset(requirement.extras)))
    return {name for name, _ in found}


def test_the_base_install_does_all_but_what_its_extras_are_for_and_names_those(tmp_path):
    "tests/base_install.py in an environment of links to what settings.ini requires, and what that requires."
    settings = dict(line.split(" = ", 1) for line in (ROOT / "settings.ini").read_text().splitlines() if " = " in line)
    base = set().union(*(required(r.name, frozenset(r.extras)) for r in map(Requirement, settings["requirements"].split())))
    assert {"torch", "pillow", "tqdm"} <= base and not {"papermill", "nbdev", "pytest", "faiss-cpu"} & base
    site = tmp_path / "site-packages"  # by this name dill, by which datasets hashes, knows what is no code of its user
    site.mkdir()
    for name in base:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
            (site / top).symlink_to(distribution.locate_file(top))
    command = [sys.executable, "-S", str(ROOT / "tests/base_install.py"), str(tmp_path / "out")]  # without site-packages
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "the base install does what it should" and result.stdout.count("pip install") == 3


# Embeddings on disk


def read(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def vectors_of(table: pa.Table, kind: str) -> torch.Tensor:
    return torch.tensor([e for e, k in zip(table["embedding"].to_pylist(), table["kind"].to_pylist()) if k == kind])


def test_rows_and_card_say_what_was_embedded(scenes, tmp_path):
    card = embed_data(ADAPTER, as_folder(tmp_path / "data", scenes[:7]), tmp_path / "x.parquet", batch_size=3)
    table = pq.read_table(tmp_path / "x.parquet")
    assert card == json.loads((tmp_path / "x.parquet.json").read_text())
    assert (card["images"], card["texts"], card["dimensions"], card["dtype"], card["left_out"]) == (7, 14, 128, "float32", 0) and len(card["weights"]) == 64
    assert card["prompt"] == json.loads((ADAPTER / "discriminative.json").read_text())["prompt"]
    assert table["id"].to_pylist()[:4] == ["0.png"] * 3 + ["1.png"] and table["caption"].to_pylist()[:4] == [None, 0, 1, None]
    assert table["text"].to_pylist()[:3] == [None, scenes[0][1], f"this is {scenes[0][1]}"]
    lvlm = load_embedder(ADAPTER)
    assert torch.allclose(vectors_of(table, "image"), lvlm.encode_image([p for p, _ in scenes[:7]]), atol=1e-5)
    assert torch.allclose(vectors_of(table, "text")[::2], lvlm.encode_text([t for _, t in scenes[:7]]), atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "x.parquet", "x.parquet.json"]
    short = embed_data(CLIP, tmp_path / "data", tmp_path / "y.npy", kind="image", dtype="float16", truncate_dim=16)
    matrix = np.load(tmp_path / "y.npy")
    assert (short["prompt"], short["texts"], matrix.dtype, matrix.shape) == (None, 0, np.float16, (7, 16)) and np.allclose(np.linalg.norm(matrix, axis=1), 1, atol=2e-3)
    assert pq.read_table(tmp_path / "y.npy.rows.parquet")["id"].to_pylist() == [f"{i}.png" for i in range(7)]


@pytest.mark.parametrize("write", [write_webdataset, write_huggingface_parquet, write_llava])
def test_other_formats_give_the_same_vectors(write, scenes, tmp_path):
    ten = [(encoded(Image.fromarray(p)), c) for p, c in scenes[:10]]
    embed_data(CLIP, write(tmp_path / "data", ten), tmp_path / "x.parquet")
    table, clip = pq.read_table(tmp_path / "x.parquet"), load_embedder(CLIP)
    assert torch.allclose(vectors_of(table, "image"), clip.encode_image([p for p, _ in scenes[:10]]), atol=1e-5)
    assert torch.allclose(vectors_of(table, "text"), clip.encode_text([t for _, t in scenes[:10]]), atol=1e-5)
    assert len(set(table["id"].to_pylist())) == 10 and not any(i.startswith(str(tmp_path)) for i in table["id"].to_pylist())


def test_a_folder_of_pictures_however_deep(scenes, tmp_path):
    for place, (picture, _) in zip(("a.png", "2023/b.gif", "2023/05/c.bmp", "2024/d.tif"), scenes):
        (tmp_path / "data" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "data" / place)
    card = embed_data(CLIP, tmp_path / "data", tmp_path / "x.parquet")
    assert (card["images"], card["texts"]) == (4, 0)
    assert sorted(pq.read_table(tmp_path / "x.parquet")["id"].to_pylist()) == ["2023/05/c.bmp", "2023/b.gif", "2024/d.tif", "a.png"]


@pytest.mark.parametrize("out", ["shards", "x.npy"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(out, scenes, tmp_path):
    data = as_folder(tmp_path / "data", scenes * 5)
    (tmp_path / "whole").mkdir(), (tmp_path / "killed").mkdir()
    embed_data(ADAPTER, data, tmp_path / "whole" / out, shard=4)
    shards = tmp_path / "killed" / (out if out == "shards" else f".{out}.parts")
    command = [sys.executable, "-m", "lvlm_research.cli", "embed", str(ADAPTER), str(data), "--out", str(tmp_path / "killed" / out), "--shard", "4"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        kill_when(process, shards / "00002.parquet")
    (shards / ".00003.part1.parquet").write_bytes(b"torn")  # what a kill while writing leaves
    assert not (tmp_path / "killed" / out).is_file()
    if out != "shards":
        (tmp_path / "killed" / out).write_bytes(b"joined by a run that was killed before it wrote the JSON")
    kept = {p.name: p.stat().st_mtime_ns for p in shards.glob("[0-9]*.parquet")}
    with pytest.raises(InputError, match="is not finished|not written by"):
        Vectors(tmp_path / "killed" / out)
    card = embed_data(ADAPTER, data, tmp_path / "killed" / out, shard=4)
    assert 3 <= len(kept) < 50 and card["images"] == 200
    assert read(tmp_path / "killed") == read(tmp_path / "whole")
    if out == "shards":
        assert {name: (shards / name).stat().st_mtime_ns for name in kept} == kept  # not made again


def test_what_is_finished_is_not_made_again(scenes, tmp_path):
    data = as_folder(tmp_path / "data", scenes[:4])
    first = embed_data(CLIP, data, tmp_path / "x")
    written = (tmp_path / "x/00000.parquet").stat().st_mtime_ns
    assert embed_data(CLIP, data, tmp_path / "x") == first and (tmp_path / "x/00000.parquet").stat().st_mtime_ns == written
    embed_data(CLIP, data, tmp_path / "y.parquet")
    whole = read(tmp_path)
    (tmp_path / "y.parquet").unlink()  # its JSON alone is no index
    embed_data(CLIP, data, tmp_path / "y.parquet")
    assert read(tmp_path) == whole


def flip(file: Path, share: float) -> None:
    "Change one byte."
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 64
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[:900]), lambda f: shutil.copy(f.with_name("00000.parquet"), f), lambda f: flip(f, 0.5), lambda f: flip(f, 0.01), lambda f: f.write_bytes(f.read_bytes().replace(b"caption", b"baption"))],
                         ids=["gone", "torn", "another's", "a byte of a vector", "a byte of a page's header", "the name of a column"])
@pytest.mark.parametrize("complete", [True, False])
def test_a_shard_that_is_not_what_it_should_be_is_made_again_and_no_other(damage, complete, scenes, tmp_path):
    data, place = as_folder(tmp_path / "data", scenes[:8]), tmp_path / "x"
    card = embed_data(CLIP, data, place, shard=2)
    whole, times = read(place), {p.name: p.stat().st_mtime_ns for p in place.glob("0*.parquet")}
    damage(place / "00001.parquet")
    (place / "index.json").write_text(json.dumps(card | {"complete": complete}))
    embed_data(CLIP, data, place, shard=2)
    assert read(place) == whole and len(Vectors(place)) == 24
    assert [name for name in times if (place / name).stat().st_mtime_ns != times[name]] == ["00001.parquet"]


@pytest.mark.parametrize("out", ["x.parquet", "x.npy"])
def test_a_file_of_which_a_byte_was_changed_is_made_again(out, scenes, tmp_path):
    data, place = as_folder(tmp_path / "data", scenes[:8]), tmp_path / out
    embed_data(CLIP, data, place)
    whole = read(tmp_path)
    for share in (0.3, 0.6):
        flip(place, share)
        embed_data(CLIP, data, place)
        assert read(tmp_path) == whole


def test_vectors_that_are_no_numbers_are_refused(scenes, tmp_path):
    data, model = as_folder(tmp_path / "data", scenes[:4]), shutil.copytree(CLIP, tmp_path / "clip")
    weights = load_file(model / "model.safetensors")
    weights["visual_projection.weight"] = weights["visual_projection.weight"].sign() * 60_000  # a number in half precision too, but not its products
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (model / "card.json").unlink()  # which names the weights of before
    with pytest.raises(InputError, match="0.png: its embedding .image. is NaN or infinite"):
        embed_data(model, data, tmp_path / "y", precision="float16")
    embed_data(model, data, tmp_path / "x", kind="text", precision="float16")
    with pytest.raises(InputError, match="a query is NaN or infinite"):
        search(tmp_path / "x", [str(data / "0.png")])


def test_pictures_are_decoded_as_many_at_a_time_as_memory_allows(scenes, tmp_path, monkeypatch):
    "64 files of a few kilobytes may hold as many pixels as a disk has bytes."
    data, pictures = as_folder(tmp_path / "data", scenes[:9]), [picture for picture, _ in scenes[:9]]
    lvlm, together = load_embedder(ADAPTER), []
    expected = lvlm.encode_image(pictures)
    embed_data(ADAPTER, data, tmp_path / "x")
    monkeypatch.setattr("lvlm_research.embedder.PIXELS", 3 * pictures[0].shape[0] * pictures[0].shape[1])
    laid_out = Encodes.laid_out
    monkeypatch.setattr(Encodes, "laid_out", lambda self, found, names: together.append(len(found)) or laid_out(self, found, names))
    assert torch.allclose(lvlm.encode_image(pictures), expected, atol=1e-5)
    embed_data(ADAPTER, data, tmp_path / "y")
    assert together == [3, 3, 3] * 2
    assert torch.allclose(*(vectors_of(pq.read_table(tmp_path / place / "00000.parquet"), "image") for place in "xy"), atol=1e-5)


@pytest.mark.parametrize("out", ["x", "x.parquet", "x.npy"])
def test_a_picture_that_was_replaced_gets_its_own_vector(out, scenes, tmp_path):
    data, place = as_folder(tmp_path / "data", scenes[:8]), tmp_path / out
    embed_data(CLIP, data, place, shard=2)
    times = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("x/0*.parquet")}
    Image.fromarray(scenes[20][0]).save(data / "5.png")
    assert search(place, [str(data / "5.png")]).score[0] < 1
    embed_data(CLIP, data, place, shard=2)
    assert search(place, [str(data / "5.png")])[["id", "score"]].iloc[0].tolist() == ["5.png", 1]
    assert {name for name in times if (tmp_path / "x" / name).stat().st_mtime_ns != times[name]} == ({"00002.parquet"} if out == "x" else set())


@pytest.mark.parametrize("out", ["x", "x.parquet"])
def test_a_place_of_another_model_or_other_data_is_refused_by_name(out, scenes, tmp_path):
    data, place = as_folder(tmp_path / "data", scenes[:4]), tmp_path / out
    embed_data(ADAPTER, data, place)
    before = read(tmp_path)
    for change, says in ((dict(model=CLIP), "another model .*vladva-micro.*clip-micro"), (dict(kind="image"), "another kind .*both., not .image"), (dict(dtype="float16"), "another dtype .'float32', not 'float16'"),
                         (dict(truncate_dim=8), "another truncate_dim .None, not 8")):
        with pytest.raises(InputError, match=says):
            embed_data(**dict(model=ADAPTER, data=data, out=place) | change)
    assert read(tmp_path) == before
    with open(data / "captions.jsonl", "a") as f:
        f.write('{"image": "0.png", "captions": ["one more"]}\n')
    with pytest.raises(InputError, match="another data .*which has changed since"):
        embed_data(ADAPTER, data, place)


def test_another_prompt_is_another_index(scenes, tmp_path):
    from lvlm_research.prompts import Prompt

    base, data = CHECKPOINTS / "llava-micro", as_folder(tmp_path / "data", scenes[:3])
    embed_data(base, data, tmp_path / "x", prompt=Prompt("in one word:", "in one word:"))
    with pytest.raises(InputError, match="another prompt .*in one word"):
        embed_data(base, data, tmp_path / "x")
    for model, says in ((ADAPTER, "an adapter has its own prompt"), (CLIP, "a dual encoder has no prompt")):
        with pytest.raises(InputError, match=says):
            embed_data(model, data, tmp_path / "y", prompt=Prompt("in one word:", "in one word:"))


def test_a_broken_picture_stops_the_run_or_is_left_out(scenes, tmp_path):
    data = as_folder(tmp_path / "data", scenes[:6])
    whole = (data / "4.png").read_bytes()
    (data / "4.png").write_bytes(whole[:100])
    with pytest.raises(InputError, match="4.png: not a readable image"):
        embed_data(CLIP, data, tmp_path / "x", shard=2)
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["00000.parquet", "00001.parquet", "index.json"]
    with pytest.warns(UserWarning, match="left out: .*4.png: not a readable image"):
        card = embed_data(CLIP, data, tmp_path / "y", skip_broken=True)
    assert (card["images"], card["texts"], card["left_out"]) == (5, 12, 1)
    (data / "4.png").write_bytes(whole)
    assert embed_data(CLIP, data, tmp_path / "x", shard=2)["images"] == 6
    (data / "0.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="0.png"):
        embed_data(CLIP, data, tmp_path / "z")
    assert not (tmp_path / "z").exists()


def test_a_folder_may_be_named_like_a_version(scenes, tmp_path):
    data = as_folder(tmp_path / "data", scenes[:2])
    assert embed_data(CLIP, data, tmp_path / "llava-1.5")["images"] == 2 and len(Vectors(tmp_path / "llava-1.5"))


@pytest.mark.parametrize("out, says", [("none/x.parquet", "cannot be written"), ("x.csv", "give a folder, or a file .parquet or .npy"), ("data", "not written by lvlm-research embed"), ("data/0.png", "give a folder"), ("folder.npy", "give a folder")])
def test_places_that_are_no_place(out, says, scenes, tmp_path):
    data = as_folder(tmp_path / "data", scenes[:2])
    (tmp_path / "folder.npy").mkdir()
    before = read(tmp_path)
    with pytest.raises(InputError, match=says):
        embed_data(CLIP, data, tmp_path / out)
    assert read(tmp_path) == before


def test_memory_does_not_grow_with_the_data(scenes, tmp_path):
    def peak(number: int) -> int:
        data = as_folder(tmp_path / f"data{number}", [scenes[i % 40] for i in range(number)])
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        embed_data(CLIP, data, tmp_path / f"{number}.parquet", shard=16, batch_size=8)
        used = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
        tracemalloc.stop()
        return used

    peak(8)  # what is imported and cached once
    small, large = peak(24), peak(120)
    assert large < small + 2**19, (small, large)  # as pixels for the model, the pictures of 96 more records are 4 MB


# Search


@pytest.fixture(scope="module")
def index(scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    as_folder(folder / "data", scenes)
    for out in ("x", "x.parquet", "x.npy"):
        embed_data(ADAPTER, folder / "data", folder / out, shard=7)
    return folder


@pytest.mark.parametrize("out", ["x", "x.parquet", "x.npy"])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_search_is_the_order_of_all_cosines(index, scenes, out, kind):
    lvlm, queries = load_embedder(ADAPTER), ["a red star", "a large blue ring", str(index / "data/5.png")]
    asked = torch.stack([lvlm.encode_text(queries[0]), lvlm.encode_text(queries[1]), lvlm.encode_image(queries[2])])
    items = lvlm.encode_image([p for p, _ in scenes]) if kind == "image" else lvlm.encode_text([t for _, c in scenes for t in (c, f"this is {c}")])
    scores, order = (asked @ items.T).sort(descending=True, stable=True)
    found = search(index / out, queries, kind, top=6)
    assert found["rank"].tolist() == [1, 2, 3, 4, 5, 6] * 3 and found["query"].tolist() == [q for q in queries for _ in range(6)]
    assert np.allclose(found.score, scores[:, :6].flatten(), atol=2e-4)
    per = 1 if kind == "image" else 2
    assert found.id[0] == f"{order[0, 0] // per}.png" and (kind == "text" or found.id[12] == "5.png") and set(found.kind) == {kind}


def test_one_query_alone_is_one_query(index, scenes):
    one, listed = search(index / "x", scenes[3][1], top=3), search(index / "x", [scenes[3][1]], top=3)
    assert one.equals(listed) and search(index / "x", scenes[3][0], top=3)["query"].nunique() == 1
    assert search(index / "x", np.array([scenes[3][1], "a ring"]), top=3)["query"].tolist() == [scenes[3][1]] * 3 + ["a ring"] * 3
    with pytest.raises(InputError, match="nothing to search for"):
        search(index / "x", [])


def test_the_best_rows_do_not_depend_on_the_blocks():
    rng = np.random.default_rng(0)
    rows = F.normalize(torch.from_numpy(rng.normal(size=(500, 8)).astype(np.float32)), dim=-1)
    rows[250:] = rows[:250]  # every row twice
    blocks = lambda size: ((np.arange(s, min(s + size, 500)) * 3, rows[s : s + size].numpy()) for s in range(0, 500, size))
    expected = (rows[:9] @ rows.T).sort(descending=True, stable=True)
    for size in (1, 7, 250, 500, 1000):
        scores, numbers = nearest(rows[:9], blocks(size), 8)
        assert torch.equal(numbers, expected.indices[:, :8] * 3) and torch.allclose(scores, expected.values[:, :8])
    assert nearest(rows[:9], blocks(7), 10_000)[1].shape == (9, 500)


@pytest.mark.parametrize("damage, says", [
    (lambda f: (f / "x/00003.parquet").unlink(), "not whole"),
    (lambda f: (f / "x/00003.parquet").write_bytes(b"PAR1"), "not whole"),
    (lambda f: (f / "x/index.json").unlink(), "there is no index.json"),
    (lambda f: (f / "x/index.json").write_text("{}"), "not written by lvlm-research embed"),
    (lambda f: (f / "x/index.json").write_text((f / "x/index.json").read_text().replace('"complete": true', '"complete": false')), "is not finished"),
    (lambda f: shutil.rmtree(f / "x"), "no such file or folder"),
])
def test_a_damaged_index_is_refused(index, tmp_path, damage, says):
    shutil.copytree(index / "x", tmp_path / "x")
    damage(tmp_path)
    with pytest.raises(InputError, match=says):
        search(tmp_path / "x", ["a star"])


@pytest.mark.parametrize("field", ["format", "model", "weights", "prompt", "precision", "dtype", "truncate_dim", "shard", "complete", "dimensions", "images", "texts"])
def test_an_edited_index_is_one_line(index, tmp_path, field):
    shutil.copytree(index / "x", tmp_path / "x")
    card = json.loads((index / "x/index.json").read_text())
    for value in (None, [], {}, {"image": 1, "text": 2}, "x", "Tensor", -1, 0, 1, 10**30, 0.5, True, False):
        (tmp_path / "x/index.json").write_text(json.dumps(card | {field: value}))
        means_the_same = value is None and field in ("prompt", "truncate_dim") or type(value) is int and field == "shard" or value is card[field]
        if not means_the_same:  # of an adapter, whose own prompt it is
            with pytest.raises(InputError, match="not written by|not whole|not finished|does not exist|was not made|dimensions"):
                search(tmp_path / "x", ["a star"])
    for columns in (["id"], ["embedding"]):
        pq.write_table(pq.read_table(tmp_path / "x/00003.parquet").drop_columns(columns), tmp_path / "x/00003.parquet")
        (tmp_path / "x/index.json").write_text(json.dumps(card))
        with pytest.raises(InputError, match="not whole"):
            search(tmp_path / "x", ["a star"])


def test_a_search_finds_its_model_or_says_which(index, tmp_path):
    shutil.copytree(ADAPTER, tmp_path / "moved")
    card = json.loads((index / "x.parquet.json").read_text())
    shutil.copy(index / "x.parquet", tmp_path)
    (tmp_path / "x.parquet.json").write_text(json.dumps(card | {"model": "/gone"}))
    with pytest.raises(InputError, match="'/gone' does not exist"):
        search(tmp_path / "x.parquet", ["a star"])
    assert len(search(tmp_path / "x.parquet", ["a star"], model=tmp_path / "moved")) == 10
    with pytest.raises(InputError, match="was not made with .*clip-micro"):
        search(tmp_path / "x.parquet", ["a star"], model=CLIP)
    with pytest.raises(InputError, match="none.jpg: no such image"):
        search(tmp_path / "x.parquet", ["none.jpg"])


@pytest.mark.parametrize("size", [3 * 2**20, 70 * 2**20])
def test_every_byte_of_a_model_counts(tmp_path, monkeypatch, size):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "merges.txt"):
        (model / name).write_text("{}")
    with open(model / "model.safetensors", "wb") as weights:
        weights.truncate(size)
    signatures = [model_signature(model)]
    for file in sorted(model.iterdir()):
        with open(file, "r+b") as changed:
            changed.seek(file.stat().st_size // 2)
            changed.write(b"!")
        signatures.append(model_signature(model))
    assert len(set(signatures)) == 7
    assert model_signature(model) == model_signature(shutil.copytree(model, tmp_path / "moved")) == signatures[-1]
    kept = list(tmp_path.glob("cache/*/*"))
    assert len(kept) == (3 if size > 2**26 else 0)  # before and after the change, and where it was copied to
    for file in kept:
        file.write_text("kept")
    assert (model_signature(model) == signatures[-1]) == (not kept)  # a large file that has not changed is not read again


def test_an_adapter_is_of_its_base(tmp_path):
    shutil.copytree(CHECKPOINTS / "llava-micro", tmp_path / "base")
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    config = json.loads((ADAPTER / "discriminative.json").read_text())
    (tmp_path / "adapter/discriminative.json").write_text(json.dumps(config | {"base": "../base"}))
    before = model_signature(tmp_path / "adapter")
    with open(tmp_path / "base/chat_template.jinja", "a") as template:
        template.write(" ")
    assert model_signature(tmp_path / "adapter") != before


def test_faiss_finds_the_same_here(index, tmp_path):
    pytest.importorskip("faiss")
    shutil.copytree(index / "x", tmp_path / "x")
    queries = ["a red star", str(index / "data/5.png")]
    exact, graph = (search(tmp_path / "x", queries, top=5, engine=e) for e in ("torch", "faiss"))
    assert exact.equals(graph) and len(list((tmp_path / "x").glob(".image-*.faiss"))) == 1
    texts = lambda: [search(tmp_path / "x", queries, "text", top=5, engine=e) for e in ("torch", "faiss")]
    assert texts()[0].equals(texts()[1])
    shard = pq.read_table(tmp_path / "x/00001.parquet")
    vectors = np.stack(shard["embedding"].to_pylist())[::-1].astype(np.float32)
    pq.write_table(shard.set_column(4, "embedding", pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 128)), tmp_path / "x/00001.parquet")
    exact, graph = texts()  # the JSON is the same, the vectors are not
    assert exact.equals(graph) and len(list((tmp_path / "x").glob(".*.faiss"))) == 2
    graph, = (tmp_path / "x").glob(".text-*.faiss")
    graph.write_bytes(b"torn")
    with pytest.raises(InputError, match="not a graph of faiss; remove it"):
        texts()


def test_the_rows_of_hits_are_read_a_piece_once_and_come_in_their_order(index, monkeypatch):
    vectors = Vectors(index / "x")
    numbers = np.random.default_rng(0).integers(0, len(vectors), 500)
    table = pq.read_table([index / f"x/{i:05}.parquet" for i in range(6)], columns=["id", "kind", "caption", "text"]).to_pylist()
    pieces, reader = [], vectors._read
    monkeypatch.setattr(vectors, "_read", lambda piece, columns: pieces.append(piece) or reader(piece, columns))
    assert vectors.rows(iter(numbers)) == [table[n] for n in numbers] and sorted(pieces) == list(range(6)) and vectors.rows([]) == []


# Fine-tuning by a file


def test_a_config_trains_on_ones_own_data(scenes, tmp_path):
    as_folder(tmp_path / "mine/data", scenes[:8])
    file = tmp_path / "mine/config.json"
    file.write_text(json.dumps({"model": str(CHECKPOINTS / "llava-micro"), "data": "data", "output": "adapter", "steps": 2, "batch": 4, "lr": 4e-3}))
    module = fine_tune(read_fine_tuning(file))  # paths start from the folder of the file
    again, before = load_embedder(tmp_path / "mine/adapter"), load_embedder(CHECKPOINTS / "llava-micro")
    assert torch.allclose(again.encode_text("a star"), module.embedder.encode_text("a star"), atol=1e-6)
    assert not torch.allclose(again.encode_text("a star"), before.encode_text("a star"), atol=1e-3)
    card = json.loads((tmp_path / "mine/adapter/card.json").read_text())
    assert (card["steps"], card["pairs_seen"], card["learning_rate"], card["base"]) == (2, 8, 4e-3, "data/checkpoints/llava-micro")
    assert not (tmp_path / "mine/adapter/unfinished").exists()
    with pytest.raises(InputError, match="holds a finished model"):
        fine_tune(read_fine_tuning(file))


def test_a_killed_fine_tuning_ends_with_the_same_weights(scenes, tmp_path, capsys):
    as_folder(tmp_path / "data", scenes[:8])
    for name in ("whole", "killed"):
        config = {"model": str(CHECKPOINTS / "llava-micro"), "data": "data", "output": name, "variant": "soft", "steps": 25, "batch": 4, "lr": 4e-3, "keep_seconds": 0.001}
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    with subprocess.Popen([sys.executable, "-m", "lvlm_research.cli", "train", "--config", str(tmp_path / "killed.json")], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        kill_when(process, tmp_path / "killed/unfinished/state.ckpt")
    assert not (tmp_path / "killed/card.json").exists()
    for name in ("whole", "killed"):
        fine_tune(read_fine_tuning(tmp_path / f"{name}.json"))
        assert ("going on from step" in capsys.readouterr().out) == (name == "killed")
    assert (tmp_path / "whole/soft_prompts.safetensors").read_bytes() == (tmp_path / "killed/soft_prompts.safetensors").read_bytes()


@pytest.mark.parametrize("change, says", [
    ({"step": 3}, "config.json: unknown key 'step'; did you mean 'steps'"),
    ({"learning_rate": 1e-3}, "unknown key 'learning_rate'.*lr"),
    ({"variant": "vladav"}, "did you mean 'vladva'"),
    ({"strategy": "fsdp", "precision": "bf16-mixed"}, "'strategy' fsdp with bf16-mixed keeps .*; use bf16-true"),
    ({"lr": "1e-3"}, "'lr' must be a positive number below .*, not '1e-3'"),
    ({"steps": 2.5}, "'steps' must be a positive whole number"),
    ({"seed": -1}, "'seed' must be 0 or a positive whole number"),
    ({"batch": True}, "'batch' must be a positive whole number"),
    ({"batch": 10**30}, "'batch' must be a positive whole number below 2,147,483,648, not 1000"),
    ({"lr": 1e300}, "'lr' must be a positive number below"),
    ({"dropout": 1}, "'dropout' must be 0 or a positive number below 1, not 1"),
    ({"data": "none"}, "none: no such file or folder"),
    ({"model": "none"}, "'none' does not exist"),
    ({"model": str(CLIP)}, "clip is not a model that can embed pictures"),
    ({"model": str(ADAPTER)}, "is an adapter, which is not trained on; give its base 'data/checkpoints/llava-micro'"),
    ({"output": "data"}, "is there already and no unfinished training"),
    ({"split": "train"}, "no field 'split'"),
])
def test_a_wrong_config_is_refused_before_anything_is_written(change, says, scenes, tmp_path):
    as_folder(tmp_path / "data", scenes[:2])
    (tmp_path / "config.json").write_text(json.dumps({"model": str(CHECKPOINTS / "llava-micro"), "data": "data", "output": "out", "steps": 1, "batch": 2} | change))
    before = read(tmp_path)
    with pytest.raises(InputError, match=says) as error:
        fine_tune(read_fine_tuning(tmp_path / "config.json"))
    assert "\n" not in str(error.value) and read(tmp_path) == before


def test_more_pairs_than_there_are_records_is_said(scenes, tmp_path, capsys):
    as_folder(tmp_path / "data", scenes[:3])
    for number, (batch, says) in enumerate(((9, "1 steps of 3 pairs (no more records can be used, 'batch' is 9)"), (1, "one pair has nothing to be contrasted with"))):
        fine_tune(FineTuning(str(CHECKPOINTS / "llava-micro"), str(tmp_path / str(number)), str(tmp_path / "data"), variant="soft", steps=1, batch=batch))
        assert says in capsys.readouterr().out


# Real photographs


def test_real_photographs_are_embedded_and_found(real_data, tmp_path):
    data = real_data / "real_pairs/coco_cc"
    card = embed_data(ADAPTER, data, tmp_path / "x.parquet")
    assert (card["images"], card["texts"]) == (38, 190)
    first = pq.read_table(tmp_path / "x.parquet")["id"][0].as_py()
    found = search(tmp_path / "x.parquet", [str(data / first)], top=3)
    assert found.id[0] == first and found.score[0] == pytest.approx(1, abs=1e-4)


# What a user may give


def one_picture(folder: Path, picture: np.ndarray, *captions: str, **more: object) -> Path:
    "A config that trains on one picture with these captions, two steps."
    Image.fromarray(picture).save(folder / "0.png")
    (folder / "captions.jsonl").write_text(json.dumps({"image": "0.png", "captions": captions}) + "\n")
    (folder / "c.json").write_text(json.dumps({"data": str(folder), "output": str(folder / "trained"), "steps": 2, "batch": 1} | more))
    return folder / "c.json"


def test_special_tokens_in_captions_and_questions_are_words(base_folder, trainable, tmp_path):
    templates, number = trainable.templates, trainable.model.config.image_token_id
    image, picture = templates.tokenizer.convert_ids_to_tokens(number), np.zeros((60, 60, 3), np.uint8)
    hostile = f"a {image} {templates.tokenizer.eos_token}"
    placed = [(templates.image([picture], [caption]).input_ids == number).sum() for caption in (hostile, "a")]
    assert placed[0] == placed[1] > 0
    assert templates.tokenizer.eos_token_id not in templates.continuation(hostile)[:-1]
    assert torch.isfinite(trainable.encode_text(hostile)).all() and isinstance(trainable.generate(picture, hostile, max_new_tokens=2), str)
    config = one_picture(tmp_path, picture, hostile, f"{image} " + "a red star left of a ring " * 12, model=str(base_folder))
    assert len(fine_tune(read_fine_tuning(config)).history) == 2


def test_an_adapter_fits_its_base_in_every_precision(base_folder, scenes, tmp_path):
    "Trained in one precision and opened in another: the base is the same, and the embeddings are, up to rounding."
    pictures, half = [picture for picture, _ in scenes[:4]], DiscriminativeLVLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    adapter = half.add_lora().save_pretrained(tmp_path / "adapter")
    full, again = (load_embedder(adapter, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    found = again.encode_image(pictures)
    assert found.dtype == torch.float32 and torch.equal(found, half.encode_image(pictures))
    assert (found - full.encode_image(pictures)).abs().max() < 0.05 and (again.encode_text([c for _, c in scenes]) - full.encode_text([c for _, c in scenes])).abs().max() < 0.05
    for dtype in (torch.float32, torch.bfloat16):  # of a base that is stored so, float16 leaves other values to round
        stored = DiscriminativeLVLM.from_pretrained(base_folder)
        with torch.no_grad():
            for p in stored.model.parameters():
                p.add_(1e-3 * torch.randn_like(p))
        stored.model.to(dtype).save_pretrained(tmp_path / f"{dtype}")
        stored.templates.processor.save_pretrained(tmp_path / f"{dtype}")
        DiscriminativeLVLM.from_pretrained(tmp_path / f"{dtype}").add_lora().save_pretrained(tmp_path / f"adapter of {dtype}")
        assert load_embedder(tmp_path / f"adapter of {dtype}", dtype=torch.float16).model.dtype == torch.float16
        again = load_embedder(tmp_path / f"adapter of {dtype}", dtype=torch.float16).save_pretrained(tmp_path / f"again of {dtype}")
        assert load_embedder(again).model.dtype == torch.float32
    with pytest.raises(InputError, match="trained on other base weights"):
        DiscriminativeLVLM.from_pretrained(adapter, base=tmp_path / "torch.float32", dtype=torch.float16)


def test_what_is_trained_in_half_precision_is_kept_in_full(base_folder, scenes, tmp_path):
    "A step of a usual learning rate is smaller than what bfloat16 can add to a temperature of 14, or to a soft prompt."
    file = one_picture(tmp_path, scenes[0][0], "a star", model=str(base_folder), precision="bf16-true", lr=1e-4, batch=2)  # with the usual dropout
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps({"image": f"{i}.png", "captions": [scenes[i][1], "it shows " + f"{scenes[i][1]} and nothing else, " * 4]}) + "\n" for i in range(2)))
    Image.fromarray(scenes[1][0]).save(tmp_path / "1.png")
    before = DiscriminativeLVLM.from_pretrained(base_folder).add_soft_prompts().soft_prompts
    module = fine_tune(read_fine_tuning(file))
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert module.temperature.log_scale.item() != pytest.approx(math.log(1 / 0.07), abs=1e-6)
    changes = [(p - q).abs().max().item() for p, q in zip(module.embedder.soft_prompts.parameters(), before.parameters())]
    assert all(0 < change < 3e-4 for change in changes)
    assert torch.isfinite(load_embedder(tmp_path / "trained").encode_text("a red star")).all()


def test_a_base_is_trained_in_half_precision_as_lightning_does(tmp_path):
    "It has no frozen model that adapters are added to: what is frozen and what is trained have one precision."
    class Half(FitModule):
        def __init__(self):
            super().__init__()
            self.tower, self.projector = torch.nn.Linear(4, 4).requires_grad_(False), torch.nn.Linear(4, 4)

        def training_step(self, batch, index):
            return self.projector(self.tower(batch.to(self.tower.weight.dtype))).float().square().mean()

    module = fit(Half(), lambda step: torch.ones(2, 4), 2, "bf16-true")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_soft_prompts_are_of_a_chat_template(base_folder, tmp_path):
    saved = DiscriminativeLVLM.from_pretrained(base_folder).add_soft_prompts().save_pretrained(tmp_path / "adapter")
    other = shutil.copytree(base_folder, tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("{% if add_generation_prompt", "{{ ' and ' }}{% if add_generation_prompt").replace("{%- if add_generation_prompt", "{{ ' and ' }}{%- if add_generation_prompt"))
    with pytest.raises(InputError, match=r"its (text|image) prompt has \d+ tokens, the chat template of .* writes \d+"):
        DiscriminativeLVLM.from_pretrained(saved, base=other)


def test_an_index_is_made_and_searched_in_one_precision(scenes, tmp_path):
    for place, (picture, caption) in enumerate(scenes[:3]):
        Image.fromarray(picture).save(tmp_path / f"{place}.png")
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps({"image": f"{i}.png", "captions": [scenes[i][1]]}) + "\n" for i in range(3)))
    assert embed_data(ADAPTER, tmp_path, tmp_path / "index", precision="bfloat16")["precision"] == "bfloat16"
    assert search(tmp_path / "index", [str(tmp_path / "1.png")]).iloc[0].id == "1.png"
    with pytest.raises(InputError, match="another precision \\('bfloat16', not 'float32'\\)"):
        embed_data(ADAPTER, tmp_path, tmp_path / "index")


@pytest.mark.parametrize("call, says", [
    (lambda e: e.encode_text(["a"], batch_size=0), "batch_size is 0: give a positive whole number"),
    (lambda e: e.encode_image([np.zeros((9, 9, 3), np.uint8)], batch_size=-1), "batch_size is -1"),
    (lambda e: e.encode_text(["a"], truncate_dim=4.0), "truncate_dim is 4.0: give 1 to"),
    (lambda e: e.encode_text(["a", "\ud800"]), "caption 1 holds half a character"),
    (lambda e: e.encode_image(Image.new("RGB", (0, 0))), "it has no pixels"),
])
def test_arguments_that_make_no_sense_are_one_line(embedder, call, says):
    with pytest.raises(InputError, match=re.escape(says)):
        call(embedder)


def test_answers_to_one_picture_or_to_several(scenes, tmp_path):
    lvlm, picture = load_embedder(CHECKPOINTS / "llava-micro"), Image.fromarray(scenes[0][0])
    picture.save(tmp_path / "a.png")
    alone = lvlm.generate(str(tmp_path / "a.png"), "what is above?", max_new_tokens=4)
    assert isinstance(alone, str) and lvlm.generate([picture, picture], ["what is above?"] * 2, max_new_tokens=4) == [alone, alone]
    for pictures, questions in (([], "what?"), ([picture], ["a", "b"])):
        with pytest.raises(InputError, match="give at least one picture, and one question for all or one for each"):
            lvlm.generate(pictures, questions)


def test_an_adapter_is_saved_in_a_folder_of_its_own(tmp_path):
    lvlm = load_embedder(ADAPTER)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="has LoRA already"):
        lvlm.add_lora()
    for place, says in ((tmp_path / "file", "is a file"), (CHECKPOINTS / "llava-micro", "is the folder of a model")):
        with pytest.raises(InputError, match=says):
            lvlm.save_pretrained(place)


@pytest.mark.parametrize("file, damage", [("model.safetensors", lambda data: data[:-9]), ("model.safetensors", lambda data: pickle.dumps({"a": 1})), ("config.json", lambda data: b"{"),
                                          ("chat_template.jinja", lambda data: b"{% if %}")])
@pytest.mark.parametrize("of", [DiscriminativeLVLM, ClipEmbedder])
def test_the_classes_name_a_damaged_folder_in_one_line(of, file, damage, tmp_path):
    if of is ClipEmbedder and file == "chat_template.jinja":
        pytest.skip("which a CLIP does not read")
    folder = shutil.copytree(CHECKPOINTS / {DiscriminativeLVLM: "llava-micro", ClipEmbedder: "clip-micro"}[of], tmp_path / "model")
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(InputError, match="model") as error:
        of.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "soft_prompts.safetensors"])
def test_a_pickle_in_place_of_an_adapter_is_named(file, tmp_path):
    folder = shutil.copytree(ADAPTER, tmp_path / "adapter")
    (folder / file).write_bytes(pickle.dumps({"a": torch.zeros(2)}))
    with pytest.raises(InputError, match=f"{file}: not a model with safetensors weights"):
        DiscriminativeLVLM.from_pretrained(folder)
