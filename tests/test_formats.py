"Seven formats of training data: the same records give the same batches, what is wrong is said in one line, and memory does not grow with the data."
import csv
import io
import itertools
import json
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from conftest import CHECKPOINTS, ROOT
from lvlm_research.backbones import world_tokenizer
from lvlm_research.config import InputError
from lvlm_research.datasets import joint_batches, only_split
from lvlm_research.embedder import DiscriminativeLVLM
from lvlm_research.formats import _row_group, data_report, picture_bytes, read_records, record_pairs, shuffled, sort_captions
from lvlm_research.scenes import long_caption, sample_scenes, scene_images, short_caption
from lvlm_research.training import VARIANTS, Discriminative, prepare

TOKENIZER = world_tokenizer()


def _picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60, 60), "red").save(file, "PNG")
    return file.getvalue()


PICTURE = _picture()


def png(array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def ten() -> list[tuple[bytes, str]]:
    "Ten scenes, with a short or a long caption in turn."
    rng = np.random.default_rng(0)
    scenes = sample_scenes(10, rng, "train")
    return [(png(picture), (short_caption, long_caption)[i % 2](scene, rng)) for i, (picture, scene) in enumerate(zip(scene_images(scenes, 30), scenes))]


def write_pictures(folder: Path, ten) -> None:
    folder.mkdir(parents=True)
    for i, (picture, _) in enumerate(ten):
        (folder / f"{i:09}.png").write_bytes(picture)


def write_folder(folder, ten):
    write_pictures(folder / "pictures", ten)
    (folder / "captions.jsonl").write_text("".join(json.dumps({"image": f"pictures/{i:09}.png", "captions": [c]}) + "\n" for i, (_, c) in enumerate(ten)))
    return folder


def llava(i, caption) -> dict:
    return {"id": str(i), "image": f"coco/{i:09}.png", "conversations": [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": caption}]}


def write_llava(folder, ten):
    write_pictures(folder / "coco", ten)
    (folder / "chat.json").write_text(json.dumps([llava(i, c) for i, (_, c) in enumerate(ten)], indent=1))
    return folder / "chat.json"


def write_json_lines(folder, ten):
    write_pictures(folder / "p", ten)
    (folder / "blip.jsonl").write_text("".join(json.dumps({"image": f"p/{i:09}.png", "caption": c}) + "\n" for i, (_, c) in enumerate(ten)))
    return folder / "blip.jsonl"


def write_coco(folder, ten):
    write_pictures(folder, ten)
    images = [{"id": 100 - i, "file_name": f"{i:09}.png", "width": 30} for i in range(10)]
    annotations = [{"id": i, "image_id": 100 - i, "caption": c} for i, (_, c) in enumerate(ten)]
    (folder / "captions.json").write_text(json.dumps({"info": {"year": 2017}, "annotations": annotations[::-1], "images": images, "licenses": []}))
    return folder / "captions.json"


def write_tar(file, members) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def meta(i, caption) -> dict:
    return {"key": f"{i:09}", "caption": caption, "url": f"https://example.org/{i}.png", "status": "success", "error_message": None, "width": 30}


FAILED = {"key": "000000010", "caption": "a lost star", "url": "https://example.org/10.png", "status": "failed_to_download", "error_message": "404", "width": None}


def samples(ten):
    for i, (picture, caption) in enumerate(ten):
        yield from ((f"{i:09}.png", picture), (f"{i:09}.txt", caption.encode()), (f"{i:09}.json", json.dumps(meta(i, caption), indent=4).encode()))


def write_sidecar(folder, ten) -> None:
    pq.write_table(pa.Table.from_pylist([meta(i, c) for i, (_, c) in enumerate(ten)] + [FAILED]), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")


def write_webdataset(folder, ten):
    return write_tar(folder / "shard.tar", samples(ten))


def write_img2dataset_tar(folder, ten):
    write_tar(folder / "00000.tar", samples(ten))
    write_sidecar(folder, ten)
    return folder


def write_img2dataset_files(folder, ten):
    (folder / "00000").mkdir(parents=True)
    for name, data in samples(ten):
        (folder / "00000" / name).write_bytes(data)
    write_sidecar(folder, ten)
    return folder


def write_img2dataset_parquet(folder, ten):
    folder.mkdir(parents=True)
    rows = [meta(i, c) | {"png": p, "txt": c} for i, (p, c) in enumerate(ten)] + [FAILED | {"png": None, "txt": None}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet", row_group_size=4)
    return folder


def write_huggingface_parquet(folder, ten):
    folder.mkdir(parents=True)
    rows = [{"image": {"bytes": p, "path": f"{i}.png"}, "conversations": llava(i, c)["conversations"]} for i, (p, c) in enumerate(ten)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=3)
    return folder / "train.parquet"


def write_dreamlip(folder, ten):
    write_pictures(folder / "p", ten)
    with open(folder / "cc3m.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Image Path", "raw_caption", "longSV_captions"])
        table.writerows([f"p/{i:09}.png", *(("", c) if i % 2 else (c, ""))] for i, (_, c) in enumerate(ten))
    return folder / "cc3m.csv"


WRITERS = {f.__name__.removeprefix("write_"): f for f in (write_folder, write_llava, write_json_lines, write_coco, write_webdataset, write_img2dataset_tar,
                                                          write_img2dataset_files, write_img2dataset_parquet, write_huggingface_parquet, write_dreamlip)}


def pairs(records, batches=5, batch_size=4, seed=3, **more) -> list[list[tuple]]:
    draw = record_pairs(records, batch_size, TOKENIZER, seed, **more)
    return [[(p.image.tobytes(), p.short, p.long) for p in draw(step)] for step in range(batches)]


@pytest.fixture(scope="module")
def reference(ten, tmp_path_factory):
    return pairs(read_records(write_folder(tmp_path_factory.mktemp("reference") / "x", ten)))


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_format_gives_the_same_batches(write, ten, reference, tmp_path):
    records = read_records(write(tmp_path / "data", ten))
    assert pairs(records) == reference
    assert {p[0] for p in itertools.chain(*reference)} == {np.asarray(Image.open(io.BytesIO(p)).convert("RGB")).tobytes() for p, _ in ten}
    report = data_report(records, TOKENIZER)
    assert (report.short, report.long, report.missing, report.with_short, report.with_long, report.same_caption) == (5, 5, 0, 5, 5, 0)


def test_the_stream_follows_its_seed_and_an_epoch_holds_every_record_once(ten, reference, tmp_path):
    records = read_records(write_coco(tmp_path / "data", ten))
    assert pairs(records, seed=4) != reference == pairs(records)
    epoch = [set(map(tuple, itertools.chain(*pairs(records, batches=5, batch_size=2))))]
    assert len(epoch[0]) == 10
    assert [len(b) for b in pairs(records, batches=3, batch_size=64)] == [10, 10, 10]  # never the same picture twice in a batch
    assert pairs(records, buffer=3) != reference and len(set(itertools.chain(*pairs(records, batch_size=2, buffer=3)))) == 10


def test_pictures_below_another_root(ten, reference, tmp_path):
    file = write_llava(tmp_path / "there", ten)
    moved = tmp_path / "here/chat.json"
    moved.parent.mkdir()
    file.rename(moved)
    assert pairs(read_records(moved, tmp_path / "there")) == reference
    with pytest.raises(InputError, match="none of the pictures of 10 records exists .*000000000.png.*'images'"):
        record_pairs(read_records(moved), 4, TOKENIZER, 0)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        read_records(moved, tmp_path / "nowhere")


def test_the_notebook_trains_on_a_tar_and_prints_the_report(ten, tmp_path):
    tar, out = write_webdataset(tmp_path / "data", ten), tmp_path / "out.ipynb"
    parameters = itertools.chain(*(("-p", name, str(value)) for name, value in {"data": tar, "steps": 2, "batch": 4, "results": tmp_path / "results"}.items()))
    result = subprocess.run([sys.executable, "-m", "papermill", ROOT / "nbs/paper/20_train_discriminative.ipynb", out, *parameters], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "10 records: 5 with a short caption, 5 with a long one, 0 with both" in out.read_text()
    assert json.loads((tmp_path / "results/models/vladva-folder/card.json").read_text())["data"] == str(tar)


def test_failed_downloads_are_counted_and_named(ten, tmp_path):
    for write, named in ((write_img2dataset_tar, "000000010 (failed_to_download)"), (write_img2dataset_files, "000000010 (failed_to_download)"), (write_img2dataset_parquet, "row 11 (failed_to_download)")):
        report = data_report(read_records(write(tmp_path / write.__name__, ten)), TOKENIZER)
        assert (report.records, report.without_picture) == (11, 1) and named in str(report)


def test_captions_are_sorted_by_the_tokenizer_and_none_is_cut(ten, tmp_path):
    word = "square "
    assert [len(ids) for ids in TOKENIZER([word * 29, word * 500], add_special_tokens=False).input_ids] == [30, 501]  # the last blank is a token
    lengths = {n: (word * n).strip() for n in (1, 29, 30, 500, 501, 10_000)}
    short, long = sort_captions(list(lengths.values()), TOKENIZER)
    assert (short, long) == ([lengths[1], lengths[29]], [lengths[30], lengths[500]])
    write_pictures(tmp_path / "p", ten[:3])
    rows = [{"image": "p/000000000.png", "captions": list(lengths.values())}, {"image": "p/000000001.png", "caption": lengths[10_000]}, {"image": "p/000000002.png", "caption": "  "}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    records = read_records(tmp_path / "x.json")
    report = data_report(records, TOKENIZER)
    assert (report.short, report.long, report.too_long, report.longest, report.without_caption, report.same_caption) == (2, 2, 3, 10_000, 1, 1)
    assert (report.with_short, report.with_long, report.with_both) == (1, 1, 1)
    assert {pair[1:] for batch in pairs(records, batches=12) for pair in batch} == {(lengths[s], lengths[l]) for s in (1, 29) for l in (30, 500)}  # one record of three


@pytest.mark.parametrize("kind", ["tar", "csv", "parquet"])
def test_a_record_with_both_kinds_of_caption_gives_both(ten, tmp_path, kind):
    short, long = ten[0][1], ten[1][1]
    values = {"raw_caption": short, "shortIB_captions": short, "longLLA_captions": long}
    if kind == "tar":  # what img2dataset makes of DreamLIP's table
        file = write_tar(tmp_path / "x.tar", [("0.jpg", ten[0][0]), ("0.json", json.dumps(values).encode())])
    elif kind == "csv":
        write_pictures(tmp_path / "p", ten[:1])
        file = tmp_path / "x.csv"
        with open(file, "w", newline="") as table:
            csv.writer(table).writerows([["Image Path", *values], ["p/000000000.png", *values.values()]])
    else:
        file = tmp_path / "x.parquet"
        pq.write_table(pa.Table.from_pylist([values | {"image": ten[0][0]}]), file)
    records = read_records(file)
    assert records[0]["captions"] == [short, long]  # what two fields repeat counts once
    assert pairs(records, 1)[0][0][1:] == (short, long) and data_report(records, TOKENIZER).with_both == 1


def test_labels_select_records(ten, tmp_path):
    write_pictures(tmp_path / "p", ten)
    (tmp_path / "x.tsv").write_text("filepath\ttitle\tsplit\n" + "".join(f"p/{i:09}.png\tstar {i}\t{('train', 'test')[i % 2]}\n" for i in range(10)))
    kept = only_split(read_records(tmp_path / "x.tsv"), "test")
    assert [c for c, in kept["captions"]] == [f"star {i}" for i in (1, 3, 5, 7, 9)]
    assert {p[1] for p in pairs(kept, 1)[0]} < {c for c, in kept["captions"]} and "x.tsv" in data_report(kept, TOKENIZER).source


@pytest.mark.parametrize("write", [write_webdataset, write_img2dataset_files, write_huggingface_parquet, write_llava])
def test_a_broken_picture_is_named_and_left_out(write, ten, reference, tmp_path):
    broken = [(picture[:200] if i == 3 else picture, caption) for i, (picture, caption) in enumerate(ten)]
    records = read_records(write(tmp_path / "data", broken))
    with pytest.warns(UserWarning, match=r"left out: .*(000000003(\.png)?|row 4): not a readable image"):
        found = set(itertools.chain(*pairs(records, batches=10, batch_size=1)))
    assert found == {p for p in set(itertools.chain(*reference)) if ten[3][1] not in p}
    all_broken = read_records(write(tmp_path / "none", [(picture[:200], caption) for picture, caption in ten]))
    with warnings.catch_warnings(), pytest.raises(InputError, match="no picture of the training data can be read"):
        warnings.simplefilter("ignore")
        pairs(all_broken)


@pytest.mark.parametrize("write", [write_llava, write_huggingface_parquet])
def test_a_broken_picture_changes_no_other_batch_and_no_picture_is_opened_to_reach_a_later_step(write, ten, tmp_path):
    good = read_records(write(tmp_path / "whole", ten))
    at_once = lambda records, **more: [(p.image.tobytes(), p.short, p.long) for p in record_pairs(records, 3, TOKENIZER, 3, **more)(2)]
    whole = pairs(good, batch_size=3)
    number = {caption: i for i, (_, caption) in enumerate(ten)}
    first = [number[short or long] for _, short, long in whole[0]]
    damaged = lambda which: read_records(write(tmp_path / f"without{len(which)}", [(picture[:200] if i in which else picture, caption) for i, (picture, caption) in enumerate(ten)]))
    records = damaged(first[:2])
    with pytest.warns(UserWarning, match="left out") as said:
        found = pairs(records, batch_size=3, batches=3)
    assert found[1:] == whole[1:3] and found[0][2] == whole[0][2] and len(said) == 2
    assert len(set(found[0])) == 3 and not set(found[0][:2]) & set(whole[0])  # others take their places
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a broken picture that is opened
        assert at_once(records) == whole[2]
    assert at_once(good, buffer=3) == pairs(good, batch_size=3, buffer=3)[2] != whole[2]
    alone = damaged([i for i in range(10) if i != first[0]])
    with pytest.warns(UserWarning, match="left out"):
        assert pairs(alone, batch_size=3, batches=1) == [whole[0][:1]]  # there is no other


def refused(path, says, **more) -> None:
    "Reading ends in one line that names the file."
    with pytest.raises(InputError) as error:
        read_records(path, **more)
    message = str(error.value)
    assert says in message and str(path) in message and "\n" not in message, message


GOOD = '{"image": "a.png", "caption": "a star"}'


@pytest.mark.parametrize("name, text, says", [
    ("x.json", f"[{GOOD}, {{]", "after 1 records: not valid JSON"),
    ("x.json", f"[{GOOD}, {GOOD[:20]}", "after 1 records: not valid JSON"),
    ("x.json", f"[{GOOD}] {GOOD}", "expected the end"),
    ("x.json", f"[{GOOD}, 3]", "record 2: expected an object"),
    ("x.json", f'[{GOOD}, {{"image": "b.png"}}]', "record 2: no captions among 'image'; known are conversations, txt, caption"),
    ("x.json", '[{"image": "b.png", "caption": {"en": "a star"}}]', "record 1: field 'caption' must be a text"),
    ("x.json", '[{"image": "b.png", "conversations": [{"from": "human", "value": "Describe."}]}]', "record 1: field 'conversations' needs a turn"),
    ("x.json", '[{"image": "../b.png", "caption": "a star"}]', "record 1: picture '../b.png' lies outside"),
    ("x.json", '[{"image": "c/../../b.png", "caption": "a star"}]', "lies outside"),
    ("x.json", '[{"image": "/etc/b.png", "caption": "a star"}]', "lies outside"),
    ("x.json", '[{"image": "https://example.org/b.png", "caption": "a star"}]', "is a link; download"),
    ("x.json", '[{"image": "b.png", "caption": "\\ud800"}]', "half a character"),
    ("x.json", "[]", "holds no records"),
    ("x.json", "", "is empty; formats are: folder with captions.jsonl; JSON records"),
    ("x.json", "a star", "not recognised; formats are"),
    ("x.json", '{"images": [{"id": 1}], "annotations": []}', "needs a field 'file_name'"),
    ("x.json", '{"images": [{"id": 1, "file_name": "b.png"}], "annotations": [{"image_id": 1, "bbox": []}]}', "annotations, record 1: needs a field 'caption'"),
    ("x.json", '{"images": [{"id": 1, "file_name": "b.png"}]}', "without annotations, so not COCO captions"),
    ("x.json", '{"images": [{"id": 1, "file_name": "b.png"}], "annotations": [{"image_id": 2, "caption": "a star"}]}', "annotations, record 1: image_id 2 is not among the images"),
    ("x.json", '{"images": [{"id": 1, "file_name": "../b.png"}], "annotations": [{"image_id": 1, "caption": "a star"}]}', "images, record 1: picture '../b.png' lies outside"),
    ("x.json", "[" * 100_000, "nested too deeply"),
    ("x.json", f"[{'1' * 5000}]", "too many digits"),
    ("x.jsonl", '{"id": ' + "1" * 5000 + "}", "too many digits"),
    ("x.jsonl", f"{GOOD}\n{{\n", "line 2: not valid JSON"),
    ("x.jsonl", f"{GOOD}\n\n", "line 2: empty"),
    ("x.csv", "Image Path,text_en\nb.png,a star\n", "no captions among 'Image Path', 'text_en'; known are"),
    ("x.csv", "url,caption\nb.png,a star\n", "no image column among 'url', 'caption'"),
    ("x.csv", "image,caption\nb.png,a star, red\n", "line 2: more cells than the header"),
    ("x.csv", 'image,caption\nb.png,"a star\n', "not a readable table"),
    ("x.csv", "image,caption\n../b.png,a star\n", "line 2: picture '../b.png' lies outside"),
    ("x.csv", "image,caption\n", "holds no records"),
    ("x.tsv", "", "is empty"),
    ("x.csv", "image,caption\nb.png,\udcff\n", "not UTF-8"),
    ("x.parquet", "PAR1", "not a readable parquet"),
    ("x.tar", "a star", "not a whole, plain tar"),
    ("x.txt", "a star", "not recognised; formats are"),
])
def test_bad_files(tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    refused(tmp_path / name, says)


def test_bad_places(tmp_path):
    refused(tmp_path / "none", "no such file or folder")
    refused(tmp_path, "not recognised; formats are")


def test_a_parquet_without_pictures_or_captions_or_its_end(ten, tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"url": ["u"], "caption": ["a star"]}), file)
    refused(file, "no image column among 'url', 'caption'")
    pq.write_table(pa.table({"image": [ten[0][0]], "label": [3]}), file)
    refused(file, "no captions among 'label'")
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}), file)
    refused(file, "holds no records")
    whole = write_huggingface_parquet(tmp_path / "cut", ten)
    whole.write_bytes(whole.read_bytes()[:-50])
    refused(whole, "not a readable parquet")


def test_a_tar_that_ends_in_the_middle(ten, tmp_path):
    tar = write_webdataset(tmp_path / "data", ten)
    whole = tar.read_bytes()
    with tarfile.open(tar) as opened:
        end = max(m.offset_data + m.size for m in opened)
    assert len(read_records(tar)) == 10
    for length in [*range(1, end, 487), *range(512, end, 512 * 7), end]:
        tar.write_bytes(whole[:length])
        refused(tar, str(tar))
    damaged = bytearray(whole)
    damaged[512 * (1 + -(-len(ten[0][0]) // 512)) + 100] ^= 255  # in the second header
    tar.write_bytes(damaged)
    refused(tar, "ends in the middle, or is damaged")


def test_what_a_tar_must_not_hold(ten, tmp_path):
    for name in ("../x.png", "/x.png", "a/../../x.png"):
        refused(write_tar(tmp_path / "x.tar", [(name, ten[0][0])]), f"member '{name}' climbs out")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("x.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    refused(tmp_path / "x.tar", "member 'x.png' is a link")
    for members, says in ((("x.json", b"{"), "x.json: not valid JSON"), (("x.txt", b"\xff"), "x.txt: not UTF-8")):
        refused(write_tar(tmp_path / "x.tar", [("x.png", ten[0][0]), members]), says)
    refused(write_tar(tmp_path / "x.tar", []), "holds no records")
    refused(write_tar(tmp_path / "x.tar", [("\udcff.png", ten[0][0])]), "half a character")
    write_webdataset(tmp_path / "shards", ten)
    (tmp_path / "shards/z.tar").touch()
    refused(tmp_path / "shards", "z.tar: not a whole, plain tar")
    with tarfile.open(tmp_path / "y.tar", "w:gz") as tar:
        tar.add(tmp_path / "x.tar", "x.png")
    refused(tmp_path / "y.tar", "unpack a compressed one")


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv"])
def test_memory_does_not_grow_with_the_data(tmp_path, name):
    def peak(number: int) -> int:
        caption, file = "a large red square " * 50, tmp_path / name
        rows = [json.dumps({"image": f"{i}.png", "caption": caption + str(i)}) for i in range(number)]
        file.write_text({"x.json": f"[{','.join(rows)}]", "x.jsonl": "\n".join(rows), "x.csv": "image,caption\n" + "".join(f"{i}.png,{caption}{i}\n" for i in range(number))}[name])
        del rows
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        records = read_records(file)
        used = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
        tracemalloc.stop()
        assert len(records) == number and records[number - 1]["captions"][0].endswith(str(number - 1))
        return used

    small, large = peak(2000), peak(6000)
    assert large < small + 2**21, (small, large)  # the file grows by 4 MB; where a window of 1 MB ends is chance


def test_a_shuffle_buffer_holds_no_more_than_it_may():
    taken = itertools.count()
    order = shuffled(((next(taken), i)[1] for i in range(5000)), np.random.default_rng(0), 100)
    first = list(itertools.islice(order, 3000))
    assert next(taken) <= 3000 + 101 and sorted([*first, *order]) == list(range(5000))


@pytest.mark.parametrize("nested", [False, True])
def test_a_picture_that_is_repeated_two_thousand_times_is_held_once(tmp_path, nested):
    _row_group.cache_clear()
    picture = _picture() + bytes(2**20)  # what follows a picture is not read
    column = pa.array([{"bytes": picture, "path": None}] * 2000, pa.struct([("bytes", pa.binary()), ("path", pa.string())])) if nested else pa.array([picture] * 2000)
    pq.write_table(pa.table({"image": column, "caption": np.random.default_rng(0).bytes(8000).hex(" ", 4).split()}), tmp_path / "x.parquet", compression="zstd", dictionary_pagesize_limit=2**22)
    del column
    before = pa.total_allocated_bytes()
    records = read_records(tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 50_000 and len(records) == 2000
    assert picture_bytes(str(tmp_path / "x.parquet"), (0, 1999)) == picture and pa.total_allocated_bytes() - before < 2**25


@pytest.mark.parametrize("column", ["image", "caption"])
def test_a_parquet_bomb_is_refused_before_it_is_unpacked(tmp_path, column):
    values = {"image": [b"x"], "caption": ["a star"]} | {column: [bytes(2**28) if column == "image" else "a" * 2**28]}
    pq.write_table(pa.table(values), tmp_path / "x.parquet", compression="zstd", write_statistics=False)
    del values
    peak = pa.default_memory_pool().max_memory()
    with pytest.raises(InputError, match=r"x.parquet: not a readable parquet file \(row group 0 unpacks [0-9,]{1,7} bytes to 268"):
        read_records(tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 50_000 and pa.default_memory_pool().max_memory() == peak


def test_a_parquet_is_read_by_row_group(ten, tmp_path):
    pq.write_table(pa.table({"image": [ten[i % 10][0] for i in range(1000)], "text": [f"star {i}" for i in range(1000)]}), tmp_path / "x.parquet", row_group_size=50)
    records = read_records(tmp_path / "x.parquet")
    _row_group.cache_clear()
    assert len({p[1] for batch in pairs(records, batches=10, batch_size=100) for p in batch}) == 1000
    assert _row_group.cache_info().misses == 20


def test_coco_val2017(real_data):
    records = read_records(real_data / "coco_captions/captions_val2017.json")
    report = data_report(records, TOKENIZER)
    assert (report.records, report.captions, report.missing, report.with_short) == (5000, 25_014, 5000, 0)
    assert "5,000 missing" in str(report) and "000000397133.jpg" in str(report)
    with pytest.raises(InputError, match="none of the pictures of 5,000 records exists"):
        record_pairs(records, 4, TOKENIZER, 0)


def test_long_descriptions_of_image_in_words(real_data, tmp_path):
    file = real_data / "iiw_long_captions/DCI_Test.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        Image.new("RGB", (30, 30)).save(tmp_path / row["image"])
    alone = read_records(file, tmp_path, ["IIW"])
    report = data_report(alone, TOKENIZER)
    assert report.records == report.captions == report.long + report.too_long == 112 and report.long > 20 and report.with_long == report.long
    with pytest.raises(InputError, match="no caption has fewer than 30 tokens"):
        record_pairs(alone, 4, TOKENIZER, 0)
    (tmp_path / "both.jsonl").write_text("".join(json.dumps({"image": r["image"], "IIW": r["IIW"], "caption": "a picture"}) + "\n" for r in rows))
    templates = DiscriminativeLVLM.from_pretrained(CHECKPOINTS / "llava-micro").templates
    both = read_records(tmp_path / "both.jsonl", fields=["caption", "IIW"])
    batch = joint_batches(templates, record_pairs(both, 32, templates.tokenizer, 0))(0)
    predicted = (batch.image.labels != -100).sum(1)
    assert batch.has_short.all() and 30 <= predicted[predicted > 0].min() and predicted.max() <= 503 and (predicted > 0).sum() > 4


def test_the_kind_of_captions_that_a_variant_contrasts_must_be_there(tmp_path):
    long = " ".join(["a red star left of a ring"] * 12)
    (tmp_path / "a.png").write_bytes(PICTURE)
    for name, caption, contrast_long, says in (("short", "a star", True, "train a short variant"), ("long", long, False, "train variant long")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"image": "a.png", "captions": [caption]}) + "\n")
        records = read_records(tmp_path / f"{name}.jsonl")
        with pytest.raises(InputError, match=says):
            record_pairs(records, 1, TOKENIZER, 0, contrast_long)
        assert record_pairs(records, 1, TOKENIZER, 0, not contrast_long)(0)[0].where.endswith("line 1")


def test_a_cell_may_hold_a_list_of_captions(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "t.csv").write_text('image,captions\na.png,"[""a cat"", ""a dog""]"\na.png,"[\'a cat\', \'it\'\'s\']"\na.png,[a cat]\na.png,[1]\n')
    assert [r["captions"] for r in read_records(tmp_path / "t.csv")] == [["a cat", "a dog"], ["a cat", "its"], ["[a cat]"], ["[1]"]]


@pytest.mark.parametrize("kind", [pa.binary(), pa.null()], ids=str)
def test_a_picture_without_bytes_is_found_by_its_path_or_not_there(kind, tmp_path):
    "As Hugging Face's data sets keep pictures that are not embedded."
    (tmp_path / "a.png").write_bytes(PICTURE)
    pictures = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}, None] + ([{"bytes": PICTURE, "path": "b.png"}] if kind == pa.binary() else [])
    column = pa.array(pictures, pa.struct({"bytes": kind, "path": pa.string()}))
    pq.write_table(pa.table({"image": column, "caption": ["a star"] * len(pictures)}), tmp_path / "t.parquet")
    records = read_records(tmp_path / "t.parquet")
    assert [r["image"] and Path(r["image"]).name for r in records] == ["a.png", None, None, "t.parquet"][: len(pictures)]
    report = data_report(records, TOKENIZER)
    assert (report.without_picture, report.with_short) == (2, len(pictures) - 2)
    assert record_pairs(records, len(pictures) - 2, TOKENIZER, 0)(0)[0].image.size == (60, 60)


def test_pictures_of_one_name_are_each_a_record(tmp_path):
    for name in ("a.jpg", "a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"a star {name[0]}")
    records = read_records(tmp_path)
    assert [(Path(r["image"]).name, r["captions"]) for r in records] == [("a.jpg", ["a star a"]), ("a.png", ["a star a"]), ("b.png", ["a star b"])]
    assert [Path(where).name for where in records["where"]] == ["a.jpg", "a.png", "b"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_captions_of_one_picture_are_no_negatives_of_each_other(kind, tmp_path):
    "A table with a caption a row brings them into one batch, with paths of pictures or with the pictures themselves."
    for i in range(2):
        Image.new("RGB", (8, 8), ("red", "blue")[i]).save(tmp_path / f"{i}.png")
    rows = [(i, f"a star {i} {k}") for i in range(2) for k in range(3)]
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(f"{i}.png,{caption}\n" for i, caption in rows))
    pq.write_table(pa.table({"image": [(tmp_path / f"{i}.png").read_bytes() for i, _ in rows], "caption": [caption for _, caption in rows]}), tmp_path / "captions.parquet")
    embedder = DiscriminativeLVLM.from_pretrained(CHECKPOINTS / "llava-micro")
    batch = joint_batches(embedder.templates, record_pairs(read_records(tmp_path / f"captions.{kind}"), 6, embedder.templates.tokenizer, 0))(0)
    caption, picture = batch.same.T
    assert len(caption.unique()) == 6 and picture.unique(return_counts=True)[1].tolist() == [3, 3]
    module, noted = Discriminative(prepare(embedder, VARIANTS["soft"])), {}
    module.note = lambda **values: noted.update(values)  # it asks the trainer for the step
    loss = module.training_step(batch, 0)
    assert noted["negatives"] == 3
    image, text = embedder.embed(batch.image, "image"), embedder.embed(batch.text, "text")
    logits = module.temperature() * image @ text.T
    allowed = (picture[:, None] != picture) | torch.eye(6, dtype=torch.bool)
    terms = [(l.masked_fill(~allowed, -torch.inf).logsumexp(1) - l.diagonal()).mean() for l in (logits, logits.T)]
    assert loss.item() == pytest.approx(sum(terms).item(), rel=1e-5)
