"Whatever bytes a reader is given, it reads them or says in one line what is wrong: no other exception, no hang, nothing written."
import csv
import io
import json
import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import CHECKPOINTS
from broken_inputs import MANIFEST, PLAIN, PNG, WHOLE, tar_of, write
from lvlm_research.config import InputError, profile_of, read_json
from lvlm_research.datasets import read_folder
from lvlm_research.embedder import FORMATS, DiscriminativeLVLM, open_image
from lvlm_research.families import read_config
from lvlm_research.finetuning import read_fine_tuning
from lvlm_research.fitting import KeepState
from lvlm_research.formats import read_records
from lvlm_research.public_benchmarks import TASKS, read_captions
from lvlm_research.reproduce import RESULTS_VERSION
from lvlm_research.vectors import KINDS, Vectors, embed_data
from lvlm_research.verify import verify

fuzzed = settings(max_examples=int(os.environ.get("LVLM_FUZZ", 25)), deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
texts = st.text(max_size=12) | st.sampled_from(["a.png", "a star", "../x", "/etc/hostname", "a\0b", "\ud800", "\u202e", "train", "https://x.org/a.png", "yes"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts


def objects(*names: str) -> st.SearchStrategy:
    "JSON objects that often have these fields, of any kind."
    values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6)
    return st.dictionaries(st.sampled_from(names) | texts, values, max_size=5)


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    "A good file with some of its bytes replaced, doubled or gone."
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 40)))
        data[start:stop] = draw(st.binary(max_size=40) | st.just(bytes(data[start:stop]) * 2))
    return bytes(data)


def as_json(values: st.SearchStrategy) -> st.SearchStrategy:
    return values.map(lambda value: json.dumps(value).encode())


def as_lines(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(values, min_size=1, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())


def as_table(rows: list[list[str]]) -> bytes:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue().encode(errors="surrogateescape" if file.getvalue().isascii() else "replace")


def good(value: object) -> bytes:
    return json.dumps(value).encode()


RECORD = {"image": "a.png", "caption": "a star", "split": "train", "conversations": [{"from": "gpt", "value": "a star"}]}
CAPTIONED = {"image": "a.png", "captions": ["a star"], "label": 3}
COCO = {"images": [{"id": 1, "file_name": "a.png", "domain": "in-domain"}], "annotations": [{"image_id": 1, "caption": "a star"}]}
KARPATHY = {"images": [{"filepath": "val2014", "filename": "a.png", "split": "test", "sentences": [{"raw": "a star"}]}]}
CREPE = {"0": {"filename": "a.png", "caption": "a star", "caption2": "one star", "negative_caption": "a ring"}}
EXCHANGE = {"image_0": "a", "image_1": "b", "caption_0": "x", "caption_1": "y", "collapsed_tag": "Object"}
QUESTION = {"image": "a.png", "text": "is there a star?", "label": "yes"}
TABLE = b"image,caption,split\na.png,\"a star, red\",train\n"
fields = ("image", "caption", "captions", "conversations", "from", "value", "label", "split", "file_name", "txt")
entries = st.dictionaries(st.sampled_from(["images", "annotations", "info"]), st.lists(objects("id", "file_name", "image_id", "caption", "split", "filename", "sentences", "raw"), max_size=3))
cells = st.lists(st.lists(texts | st.sampled_from(["image", "caption"]), max_size=4), max_size=4)

FILES = {  # name of the file -> what may be in it
    "json": ("x.json", st.binary(max_size=60) | as_json(st.lists(objects(*fields), max_size=3)) | damaged(good([RECORD] * 2))),
    "json lines": ("x.jsonl", st.binary(max_size=60) | as_lines(objects(*fields)) | damaged(good(RECORD) + b"\n" + good(RECORD))),
    "coco": ("x.json", as_json(entries) | damaged(good(COCO)) | damaged(good(KARPATHY))),
    "table": ("x.csv", st.binary(max_size=60) | cells.map(as_table) | damaged(TABLE)),
    "tar": ("x.tar", st.binary(max_size=1500) | damaged(PLAIN) | damaged(tar_of(("0.png", PNG), ("0.json", good(RECORD))))),
    "parquet": ("x.parquet", st.binary(max_size=60) | damaged(WHOLE)),
    "files": ("0/0.json", st.binary(max_size=60) | as_json(objects(*fields)) | damaged(good(RECORD))),
    "folder": ("captions.jsonl", st.binary(max_size=60) | as_lines(objects(*fields)) | damaged(good(CAPTIONED) + b"\n" + good(CAPTIONED))),
}


def survives(read, given_path: Path, folder: Path, name: str, data: bytes) -> None:
    "The reader reads, or InputError in one visible line; the folder is as it was."
    write(folder / name, data)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(given_path)
        except InputError as error:
            assert str(error) and str(error).isprintable()
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    "A folder with one picture; what is temporary lies beside it."
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    write(tmp_path / "data/a.png", PNG)
    return tmp_path / "data"


@pytest.mark.parametrize("kind", FILES)
def test_training_data_of_any_bytes(kind, place):
    name, contents = FILES[kind]
    if kind == "files":
        write(place / "0/0.png", PNG)

    @fuzzed
    @given(contents)
    def run(data):
        survives(lambda path: list(read_records(path)), place if kind in ("files", "folder") else place / name, place, name, data)

    run()


def test_a_folder_with_captions_of_any_bytes(place):
    @fuzzed
    @given(FILES["folder"][1])
    def run(data):
        survives(read_folder, place, place, "captions.jsonl", data)

    run()


CREPES = [f"{kind}.json" for kind in ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")]
items = objects("filename", "caption", "caption2", "negative_caption")
answers = objects("image", "text", "label", "image_0", "image_1", "caption_0", "caption_1", "collapsed_tag")
BENCHMARKS = {  # task -> files that are whole, the one that is not, and what may be in it
    "flickr30k": ({}, "flickr30k_test_karpathy.txt", st.binary(max_size=60) | cells.map(lambda rows: b"image,caption\n" + as_table(rows)) | damaged(b"image,caption\na.png,a star\n")),
    "coco": ({}, "coco_karpathy_test.json", as_json(entries) | as_json(st.lists(objects("image", "caption"), max_size=3)) | damaged(good(KARPATHY)) | damaged(good([{"image": "a.png", "caption": ["a star"]}]))),
    "nocaps": ({}, "nocaps_val_4500_captions.json", as_json(entries) | damaged(good(COCO))),
    "sugarcrepe": (dict.fromkeys(CREPES, good(CREPE)), "swap_obj.json", as_json(st.dictionaries(texts, items, max_size=3)) | damaged(good(CREPE))),
    "sugarcrepe_pp": (dict.fromkeys(CREPES, good([CREPE["0"]])), "swap_obj.json", as_json(st.lists(items, max_size=3)) | damaged(good([CREPE["0"]]))),
    "winoground": ({}, "examples.jsonl", as_lines(answers) | damaged(good(EXCHANGE))),
    "mmvp_vlm": ({}, "Questions.csv", st.binary(max_size=60) | cells.map(as_table) | damaged(b"a,b,c\n1,Texts,x\n2,Texts,y\n")),
    "imagenet": ({"classnames.json": good(["a", "b"]), "wnids_sorted.txt": b"n1\nn2\n"}, "templates_openai80.json", as_json(st.lists(scalars, max_size=3)) | damaged(good(["a photo of a {}."]))),
    "pope": ({f"coco_pope_{kind}.json": good(QUESTION) for kind in ("random", "popular", "adversarial")}, "coco_pope_popular.json", as_lines(answers) | damaged(good(QUESTION))),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_benchmark_of_any_bytes(task, place):
    whole, name, contents = BENCHMARKS[task]
    for file, data in whole.items():
        write(place / file, data)
    for i in (1, 2):
        write(place / f"n{i}/1.JPEG", PNG)

    @fuzzed
    @given(contents)
    def run(data):
        survives(lambda path: TASKS[task].read(path, place), place, place, name, data)

    run()


def picture_as(kind: str) -> bytes:
    "A small picture in one of PIL's formats."
    file = io.BytesIO()
    Image.linear_gradient("L").resize((9, 7)).convert("RGB").save(file, kind)
    return file.getvalue()


stage = st.fixed_dictionaries({}, optional={"state": st.sampled_from(["ok", "failed"]) | scalars, "parameters": objects("seed"), "fingerprint": texts, "reads": st.dictionaries(texts, texts, max_size=2),
                                            "writes": st.dictionaries(texts, st.sampled_from(["0" * 64]) | scalars, max_size=2), "error": scalars})
manifests = st.fixed_dictionaries({"format": st.just(RESULTS_VERSION) | scalars}, optional={"profile": texts, "values": objects("name"), "run": objects("revision"), "stages": st.dictionaries(texts, stage, max_size=3)})
SETTINGS = {  # what is read -> reader, name of the file, what may be in it
    "profile": (lambda folder: profile_of(str(folder / "quick.json")), "quick.json", as_json(objects("extends", "train_steps", "learning_rate", "size", "precision")) | damaged(good({"extends": "smoke", "train_steps": 3}))),
    "config": (read_config, "config.json", as_json(objects("model_type", "text_config", "vision_config", "auto_map", "image_token_id")) | damaged(good({"model_type": "llava", "text_config": {"model_type": "llama"}}))),
    "manifest": (verify, "manifest.json", as_json(manifests) | damaged(good(MANIFEST))),
    "status": (verify, "status/report.json", as_json(stage) | damaged(good(MANIFEST["stages"]["tab2"]))),
    "captions": (lambda folder: read_captions(folder / "x.json"), "x.json", st.binary(max_size=60) | as_json(entries)),
    "training": (lambda folder: read_fine_tuning(folder / "mine.json"), "mine.json", as_json(objects("model", "data", "output", "steps", "lr", "fields", "variant")) | damaged(good({"model": "m", "data": "d", "output": "o", "lr": 1e-3}))),
    "picture": (lambda folder: open_image(folder / "x.png"), "x.png", st.binary(max_size=60) | st.sampled_from([picture_as(kind) for kind in FORMATS if kind in Image.SAVE]).flatmap(damaged)),
    "any json": (lambda folder: read_json(folder / "x.json"), "x.json", st.binary(max_size=60) | damaged(good([RECORD, CREPE]))),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_and_results_of_any_bytes(kind, place):
    read, name, contents = SETTINGS[kind]
    if kind == "status":
        write(place / "manifest.json", good(MANIFEST))
        write(place / "profile.json", b'{"profile": "cpu"}')

    @fuzzed
    @given(contents)
    def run(data):
        survives(read, place, place, name, data)

    run()


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    "An index of three captions and a picture."
    folder = tmp_path_factory.mktemp("index")
    write(folder / "data/a.png", PNG)
    write(folder / "data/captions.jsonl", good({"image": "a.png", "captions": ["a star", "one star", "a ring"]}))
    embed_data(CHECKPOINTS / "llava-micro", folder / "data", folder / "whole")
    return folder / "whole"


def read_index(folder: Path) -> None:
    "All that a search reads."
    vectors = Vectors(folder)
    for kind in KINDS["both"]:
        vectors.rows(number for numbers, _ in vectors.blocks(kind) for number in numbers)


@pytest.mark.parametrize("name", ["index.json", "00000.parquet"])
def test_an_index_of_any_bytes(name, index, place):
    whole = {file.name: file.read_bytes() for file in index.iterdir()}
    for file, data in whole.items():
        write(place / "index" / file, data)
    card = json.loads(whole["index.json"])
    other = st.dictionaries(st.sampled_from(list(card)), scalars, min_size=1, max_size=2).map(lambda changed: good(card | changed))

    @fuzzed
    @given(damaged(whole[name]) | (other if name == "index.json" else st.binary(max_size=60)))
    def run(data):
        survives(read_index, place / "index", place, f"index/{name}", data)

    run()


@pytest.mark.parametrize("name", ["discriminative.json", "adapter_config.json", "adapter_model.safetensors", "soft_prompts.safetensors"])
def test_an_adapter_of_any_bytes(name, place):
    whole = CHECKPOINTS / "vladva-micro"
    for file in whole.iterdir():
        if file.name != "card.json":  # which tells any other byte
            write(place / "adapter" / file.name, file.read_bytes())
    data = (whole / name).read_bytes()
    contents = damaged(data[:2000]).map(lambda beginning: beginning + data[2000:])  # where the header is
    if name.endswith("json"):
        contents |= st.dictionaries(st.sampled_from(list(json.loads(data))), scalars, min_size=1, max_size=2).map(lambda changed: good(json.loads(data) | changed))

    @fuzzed
    @given(contents)
    def run(data):
        survives(lambda folder: DiscriminativeLVLM.from_pretrained(folder), place / "adapter", place, f"adapter/{name}", data)

    run()


def test_a_kept_state_of_any_bytes(place):
    content = io.BytesIO()
    torch.save({"global_step": 3, "owner": "me", "state_dict": {"w": torch.zeros(4)}}, content)

    @fuzzed
    @given(st.binary(max_size=60) | damaged(content.getvalue()))
    def run(data):
        kept = KeepState(place / "state.ckpt", "me", 1.0)
        survives(lambda _: kept.find(), place, place, "state.ckpt", data)
        assert kept.step in (0, 3)

    run()
