"""Broken and hostile inputs, each a folder with one thing wrong and what must be said about it.

`python tests/broken_inputs.py FOLDER` writes them all, to look at or to try on another program."""
import io
import json
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import load_file, save_file

from lvlm_research.reproduce import RESULTS_VERSION

CHECKPOINTS = Path(__file__).parent.parent / "data" / "checkpoints"


@dataclass(frozen=True)
class Case:
    "One broken input."

    name: str
    reader: str  # a key of READERS in test_broken_inputs
    make: Callable[[Path], None]  # writes it into an empty folder
    says: str  # must be in the message
    given: str = ""  # what the reader is given: a name in the folder, or the folder itself


def put(name: str, content: object) -> Callable[[Path], None]:
    "A file with this content: bytes, text, or anything else as JSON."
    data = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode(errors="surrogateescape")
    return lambda folder: write(folder / name, data)


def write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def file_case(reader: str, name: str, content: object, says: str, what: str) -> Case:
    return Case(f"{reader}: {what}", reader, put(name, content), says, name)


def both(*makes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [make(folder) for make in makes] and None


PNG = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(PNG, "PNG")
PNG = PNG.getvalue()
GOOD = {"image": "a.png", "caption": "a star"}
LARGE = 2**24 + 1  # characters, one more than a record may have


def link_out(name: str) -> Callable[[Path], None]:
    "A link in the folder to a file beside it."
    def make(folder: Path) -> None:
        write(folder.parent / "outside" / "a.png", PNG)
        (folder / name).symlink_to(folder.parent / "outside")
    return make


# ---- text formats

DEEP = "[" * 100_000
RECORDS = [file_case("records", name, content, says, what) for name, content, says, what in (
    ("x.json", f"[{json.dumps(GOOD)}, {json.dumps(GOOD)[:9]}", "after 1 records: not valid JSON", "a list cut in the middle"),
    ("x.json", f"[{json.dumps(GOOD)}] x", "expected the end", "something after the list"),
    ("x.json", "3", "not recognised", "a number"),
    ("x.json", "", "is empty", "no bytes"),
    ("x.json", " \n" * 99, "not recognised", "white space"),
    ("x.json", b"\0" * 4096, "not recognised", "zero bytes"),
    ("x.json", [], "holds no records", "an empty list"),
    ("x.json", DEEP, "nested too deeply", "a hundred thousand lists in each other"),
    ("x.json", "[" * 70 + "1" + "]" * 70, "nested too deeply", "seventy lists in each other"),
    ("x.json", "[" + "9" * 5000 + "]", "too many digits", "a number of five thousand digits"),
    ("x.json", '[{"image": "a.png", "caption": "\\ud83d"}]', "half a character", "half a character"),
    ("x.json", '[{"image": "a.png", "caption": "gr\udcfcn"}]', "not UTF-8", "Latin-1"),
    ("x.json", json.dumps([GOOD]).encode("utf-16"), "not UTF-8", "UTF-16"),
    ("x.json", '["' + "x" * LARGE, "not valid JSON", "a text that never ends"),
    ("x.json", [GOOD | {"image": "../../a.png"}], "lies outside the folder", "a name that climbs"),
    ("x.json", [GOOD | {"image": "/etc/hostname"}], "lies outside the folder", "an absolute name"),
    ("x.json", [GOOD | {"image": "https://example.org/a.png"}], "is a link; download", "a link to the web"),
    ("x.json", [GOOD | {"image": "a\0.png"}], "cannot be a path", "a name with a zero byte"),
    ("x.json", [GOOD | {"image": "a" * 5000}], "cannot be a path", "a name of five thousand letters"),
    ("x.json", [GOOD | {"image": {"path": "a.png"}}], "must be one path, found dict", "a name that is none"),
    ("x.json", [GOOD | {"caption": 3}], "'caption' must be a text", "a number for a caption"),
    ("x.json", [{"image": "a.png", "said": "a star"}], "no captions among 'image', 'said'", "no field with captions"),
    ("x.json", [{"image": "a.png", "conversations": [{"from": "human", "value": "?"}]}], "needs a turn", "a question without an answer"),
    ("x.json", [GOOD | {"caption": "x" * 2**21}], "bytes of text", "a caption of two megabytes"),
    ("x.json", [GOOD | {str(i): "x" for i in range(2000)}], "2,000 labels", "two thousand labels"),
    ("x.jsonl", f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}", "line 2: empty", "an empty line"),
    ("x.jsonl", f"{json.dumps(GOOD)}\n[]", "line 2: expected an object", "a list for a record"),
    ("x.jsonl", f"{json.dumps(GOOD)}\n{json.dumps(GOOD)[:9]}", "line 2: not valid JSON", "a line cut in the middle"),
    ("x.jsonl", "x" * LARGE, "line 1: has more than 16,777,216 characters", "a line that never ends"),
    ("x.jsonl", json.dumps(GOOD) + "\n\udcff", "not UTF-8", "a byte that is no text"),
    ("x.csv", "url,caption\na.png,a star\n", "no image column", "a table without pictures"),
    ("x.csv", "image,said\na.png,a star\n", "no captions among", "a table without captions"),
    ("x.csv", 'image,caption\na.png,"a star\n', "not a readable table", "a quote that never ends"),
    ("x.csv", "image,caption\na.png,a star, red\n", "more cells than the header", "a cell too many"),
    ("x.csv", f"image,caption\na.png,{'x' * 200_000}\n", "not a readable table", "a cell of two hundred thousand letters"),
    ("x.csv", "image,caption\na.png,gr\udcfcn\n", "not UTF-8", "a table in Latin-1"),
    ("x.tsv", "image\tcaption\n../a.png\ta star\n", "line 2: picture '../a.png' lies outside", "a name in a table that climbs"),
    ("x.txt", "a star", "formats are: folder with captions.jsonl", "a format that nobody knows"),
)]
RECORDS += [
    Case("records: a link out of the folder", "records", both(put("x.json", [GOOD | {"image": "pictures/a.png"}]), link_out("pictures")), "record 1: picture 'pictures/a.png' lies outside", "x.json"),
    Case("records: a folder of files with a link out", "records", both(put("b.png", PNG), link_out("pictures")), "lies outside the folder"),
    Case("records: no file", "records", lambda folder: None, "no such file or folder", "none.json"),
    Case("records: an empty folder", "records", lambda folder: None, "not recognised"),
    Case("records: a pipe", "records", lambda folder: os.mkfifo(folder / "x.json"), "no such file or folder", "x.json"),
]
IMAGE, SAID = {"id": 1, "file_name": "a.png"}, {"image_id": 1, "caption": "a star"}
COCO = [file_case(reader, "captions_val2017.json", content, says, what) for reader in ("records", "coco") for content, says, what in (
    ({"images": [IMAGE]}, "without annotations", "pictures without captions"),
    ({"images": [IMAGE], "annotations": [SAID | {"image_id": 2}]}, "annotations, record 1: image_id 2 is not among", "a caption of a picture that is not there"),
    ({"images": [IMAGE] * 2, "annotations": [SAID]}, "images, record 2: two images have the same id", "two pictures with one number"),
    ({"images": [IMAGE | {"id": [1]}], "annotations": [SAID]}, "images, record 1: needs a field 'id'", "a number that is a list"),
    ({"images": [IMAGE], "annotations": [SAID | {"caption": None}]}, "annotations, record 1: needs a field 'caption'", "a caption that is none"),
    ({"images": [IMAGE | {"file_name": "../a.png"}], "annotations": [SAID]}, "images, record 1: picture '../a.png' lies outside", "a picture outside"),
)]

# ---- folders of one's own


def captions(*records: object) -> Callable[[Path], None]:
    lines = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records)
    return both(put("a.png", PNG), put("captions.jsonl", lines))


MINE = {"image": "a.png", "captions": ["a star"]}
FOLDERS = [Case(f"folder: {what}", "folder", make, says) for make, says, what in (
    (put("a.png", PNG), "captions.jsonl: no such file", "no captions.jsonl"),
    (put("captions.jsonl", ""), "no records", "an empty captions.jsonl"),
    (captions({"image": "a.png", "captions": ["a star"], **{f"field {i}": i for i in range(2000)}}), "line 1: has 2,002 fields", "a record of two thousand fields"),
    (captions(MINE, MINE | {"image": "b.png"}), "line 2: image 'b.png' does not exist", "a picture that is not there"),
    (captions(MINE, MINE | {"captions": []}), "line 2: field 'captions'", "no caption"),
    (captions(MINE, MINE | {"captions": ["\ud800"]}), "line 2: a text holds half a character", "half a character"),
    (captions(MINE, MINE | {"label": 10**30}), "line 2: field 'label' is too large a number", "a number beyond 64 bits"),
    (captions(MINE | {"image": "../a.png"}), "line 1: picture '../a.png' lies outside", "a name that climbs"),
    (both(captions(MINE | {"image": "pictures/a.png"}), link_out("pictures")), "lies outside", "a link out"),
    (both(put("a.png", PNG), link_out("captions.jsonl")), "no such file", "captions.jsonl is a link to a folder"),
)]

# ---- archives


def tar_of(*members: tuple[str, bytes], **header: object) -> bytes:
    "A tar with these members; `header` changes the last one's."
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for i, (name, data) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in header.items() if i == len(members) - 1 else ():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return file.getvalue()


def with_size(tar: bytes, field: bytes) -> bytes:
    "The first header with another size, and its checksum."
    header = bytearray(tar[:512])
    header[124:136] = field.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + tar[512:]


def pax(size: int, name: bytes = b"x") -> bytes:
    "A header that announces fields of so many bytes for the next one."
    info = tarfile.TarInfo(name.decode())
    info.type, info.size = tarfile.XHDTYPE, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def back_by(size: int) -> bytes:
    "A tar whose second member states a size below zero, in pax fields."
    fields = f"{len(str(size)) + 10} size=-{size}\n".encode()
    return tar_of(("0.txt", b"a star"))[:1024] + pax(len(fields)) + fields.ljust(512, b"\0") + tar_of(("a.txt", b""))


PLAIN = tar_of(("0.png", PNG), ("0.txt", b"a star"))
TARS = [file_case("records", "x.tar", content, says, what) for content, says, what in (
    (PLAIN[:700], "not a whole, plain tar", "a tar cut in the middle"),
    (PLAIN[:2048], "x.tar", "a tar without its end"),
    (zlib.compress(PLAIN), "not a whole, plain tar", "a compressed tar"),
    (b"a star", "not a whole, plain tar", "no tar"),
    (tar_of(("../0.png", PNG)), "climbs out of the archive", "a member that climbs"),
    (tar_of(("/0.png", PNG)), "climbs out of the archive", "a member with an absolute name"),
    (tar_of(("0.png", b""), type=tarfile.SYMTYPE, linkname="/etc/hostname"), "is a link", "a symbolic link"),
    (tar_of(("0.png", b""), type=tarfile.LNKTYPE, linkname="/etc/hostname"), "is a link", "a hard link"),
    (tar_of(("0.png", b""), type=tarfile.CHRTYPE), "is a link, a device", "a device"),
    (tar_of(("0.png", b""), type=tarfile.GNUTYPE_SPARSE), "or is sparse", "a sparse member of more zeros than a disk has"),
    (with_size(PLAIN, b"\xff" * 10 + b"\xfe\x00"), "states a size of -512", "a member that leads back to itself"),
    (with_size(PLAIN, b"77777777777"), "not a whole, plain tar", "a member larger than its archive"),
    (pax(2**21) + b"x" * 2**21 + PLAIN, "states a size of 2,097,152", "fields of two megabytes for one name"),
    (pax(0) * 3000 + PLAIN, "x.tar", "three thousand headers of a header"),
    (tar_of(("0.png", PNG), ("0.txt.gz", b"x")), "is compressed; pack it as it is", "a compressed member"),
    (tar_of(("0.png", PNG), ("0.json", b"{")), "0.json: not valid JSON", "broken JSON in a tar"),
    (tar_of(("0.png", PNG), ("0.json", b"\xff{}")), "0.json: not UTF-8", "JSON that is no text in a tar"),
    (tar_of(("0.png", PNG), ("0.txt", b"\xff")), "0.txt: not UTF-8", "a caption that is no text in a tar"),
    (tar_of(("0.png", PNG), ("0.txt", b"x" * LARGE)), "0.txt: has 16,777,217 bytes; is this a text", "a caption of 16 megabytes in a tar"),
    (tar_of(("\udcff.png", PNG)), "half a character", "a name that is no text in a tar"),
    (back_by(1536), "leads back to what came before it", "pax fields that lead back to themselves"),
    (back_by(2560), "leads back to what came before it", "pax fields that lead back to the first member"),
    (back_by(4096), "x.tar", "pax fields that lead before the start"),
    (pax(2**17) + b"1" * 2**17 + PLAIN, "states a size of 131,072", "a megabit of digits as pax fields"),
    (tar_of(), "holds no records", "an empty tar"),
)]


def parquet(table: pa.Table, **more: object) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **more)
    return file.getvalue()


WHOLE = parquet(pa.table({"caption": ["a star"] * 9, "image": [PNG] * 9}))
NOT_TEXT = pa.array([b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
REPEATED = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**6, np.int32)), pa.array(["a star"]))
PARQUETS = [file_case("records", "x.parquet", content, says, what) for content, says, what in (
    (b"PAR1", "not a readable parquet", "four letters of a parquet"),
    (WHOLE[:-20], "not a readable parquet", "a parquet cut in the middle"),
    (WHOLE[:-9] + b"\xff" + WHOLE[-8:], "x.parquet", "a damaged footer"),
    (WHOLE[:4] + b"\xff" * 40 + WHOLE[44:], "x.parquet", "a damaged page"),
    (parquet(pa.table({"image": [PNG], "label": [1]})), "no captions among 'label'", "a parquet without captions"),
    (parquet(pa.table({"url": ["u"], "caption": ["a star"]})), "no image column", "a parquet without pictures"),
    (parquet(pa.table({"image": [PNG], "caption": [3]})), "'caption' must be a text", "numbers for captions in a parquet"),
    (parquet(pa.table({"image": [PNG], "caption": NOT_TEXT})), "not a readable parquet", "captions that are no text in a parquet"),
    (parquet(pa.table({"image": ["../a.png"], "caption": ["a star"]})), "row 1: picture '../a.png' lies outside", "a name in a parquet that climbs"),
    (parquet(pa.table({"image": ["0.png"] * 1500, "caption": ["a star"] * 1500, "la.bel": pa.DictionaryArray.from_arrays(pa.array(np.zeros(1500, np.int32)), pa.array(["x" * 2**25]))})), "bytes of text", "a column with a dot in its name that repeats 32 megabytes"),
    (parquet(pa.table({"image": REPEATED, "caption": REPEATED})), "claims 1,000,000 rows, more than it has bytes", "a million rows in a few kilobytes"),
)]

# ---- pictures


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


BOMB = PNG[:8] + png_chunk(b"IHDR", (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0") + png_chunk(b"IDAT", zlib.compress(b"\0" * 9999)) + png_chunk(b"IEND", b"")
PICTURES = [file_case("image", "x.png", content, "x.png: not a readable image", what) for content, what in (
    (b"", "no bytes"), (b"a star", "a text"), (PNG[:400], "a picture cut in the middle"), (PNG[:20] + b"\xff" * 20 + PNG[40:], "a damaged header"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "a drawing with a script"), (b"GIF89a\xff\xff\xff\xff", "the beginning of a GIF"),
)] + [file_case("image", "x.png", BOMB, "x.png: too large", "sixty thousand pixels square in three kilobytes"), Case("image: no file", "image", lambda folder: None, "no such image", "x.png"), Case("image: a folder", "image", lambda folder: (folder / "x.png").mkdir(), "it is a folder", "x.png")]

# ---- benchmarks

ITEM = {"filename": "1.jpg", "caption": "a cat on a mat", "negative_caption": "a mat on a cat"}
CREPE = [f"{kind}.json" for kind in ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")]
crepe = lambda content: both(*(put(name, {"0": ITEM}) for name in CREPE), put("swap_obj.json", content))
asked = lambda content: both(*(put(f"coco_pope_{kind}.json", content) for kind in ("random", "popular", "adversarial")))
QUESTION = {"question_id": 1, "image": "1.jpg", "text": "Is there a cat?", "label": "yes"}
EXCHANGE = {"image_0": "a", "image_1": "b", "caption_0": "x", "caption_1": "y", "collapsed_tag": "Object"}
nouns = lambda **changes: both(*(put(name, content) for name, content in ({"classnames.json": ["tench"], "templates_openai80.json": ["a {}"], "wnids_sorted.txt": "n1\n"} | {
    name.replace("_json", ".json").replace("_txt", ".txt"): content for name, content in changes.items()}).items()))
BENCHMARKS = [Case(f"{task}: {what}", task, make, says) for task, make, says, what in (
    ("sugarcrepe", crepe('{"0": {'), "swap_obj.json: not valid JSON", "broken JSON"),
    ("sugarcrepe", crepe({}), "swap_obj.json: no items", "no items"),
    ("sugarcrepe", crepe({"0": ITEM | {"caption": 3}}), "key '0': needs a field 'caption'", "a number for a caption"),
    ("sugarcrepe", crepe({"0": ITEM | {"filename": "../1.jpg"}}), "key '0': picture '../1.jpg' lies outside", "a name that climbs"),
    ("sugarcrepe", crepe({"\u202e\x1b[31m\n": 3}), r"key '\u202e\x1b[31m\n': needs", "a key that turns and colours the line"),
    ("sugarcrepe", put("swap_obj.json", {"0": ITEM}), "lacks replace_obj.json", "six files of seven"),
    ("pope", asked(json.dumps(QUESTION | {"label": "perhaps"})), "line 1: field 'label' must be yes or no", "neither yes nor no"),
    ("pope", asked(json.dumps(QUESTION) + "\n{"), "line 2: not valid JSON", "a line cut in the middle"),
    ("winoground", put("examples.jsonl", json.dumps(EXCHANGE | {"image_1": "../../b"})), "line 1: picture '../../b.png' lies outside", "a name that climbs"),
    ("winoground", put("examples.jsonl", json.dumps(EXCHANGE | {"caption_0": ["x"]})), "line 1: needs a field 'caption_0'", "a list for a caption"),
    ("mmvp_vlm", put("Questions.csv", "a,b,c\n1,../../Texts,x\n2,../../Texts,y\n"), "row 2: picture '../../Texts/1.jpg' lies outside", "a type that climbs"),
    ("mmvp_vlm", put("Questions.csv", f"a,b,c\n{'1' * 5000},Texts,x\n"), "needs three columns, the number", "a number of five thousand digits"),
    ("mmvp_vlm", put("Questions.csv", "a,b,c\n\u0661,Texts,x\n"), "questions do not make pairs", "one question"),
    ("imagenet", nouns(classnames_json={"0": "tench"}), "must hold a list of texts", "an object for the names"),
    ("imagenet", nouns(wnids_sorted_txt="../n1\n"), "picture '../n1' lies outside", "an id that climbs"),
    ("imagenet", nouns(templates_openai80_json=["a {0.__class__}"]), "has no place {}", "a template that reads attributes"),
)] + [
    Case("captions: no bytes", "captions", put("x.json", ""), "x.json: empty", "x.json"),
    Case("captions: a number for a list", "captions", put("x.json", [{"image": "1.jpg", "caption": 3}]), "record 1: needs a field 'caption' with a list", "x.json"),
    Case("captions: one picture twice", "captions", put("x.json", [{"image": "1.jpg", "caption": ["x"]}] * 2), "record 2: picture '1.jpg' was in", "x.json"),
]

# ---- settings and results

PROFILES = [file_case("profile", name, content, says, what) for name, content, says, what in (
    ("quick.json", "{", "not valid JSON", "broken JSON"),
    ("quick.json", [], "expected an object", "a list"),
    ("quick.json", {"train_steps": 3}, "needs a field 'extends'", "no profile that is extended"),
    ("quick.json", {"extends": "smoke", "train_step": 3}, "unknown key 'train_step'", "an unknown key"),
    ("quick.json", {"extends": "smoke", "train_batch": 10**400}, "must be a positive whole number below 2,147,483,648", "a batch of a number with 400 digits"),
    ("quick.json", {"extends": "smoke", "train_steps": -3}, "must be a positive whole number", "a negative number of steps"),
    ("quick.json", '{"extends": "smoke", "learning_rate": NaN}', "must be a positive number", "a rate that is no number"),
    ("quick.json", {"extends": {"cpu": 1}}, "needs a field 'extends'", "an object for a name"),
    ("cpu.json", {"extends": "smoke"}, "rename the file", "the name of a built-in profile"),
)]
ZEROS = "0" * 64
STAGE = {"state": "ok", "parameters": {}, "fingerprint": ZEROS, "reads": {}, "writes": {"tables/tab2.csv": ZEROS}}
MANIFEST = {"format": RESULTS_VERSION, "profile": "cpu", "values": {"name": "cpu"}, "run": {"revision": "x"}, "stages": {"tab2": STAGE}}
manifest = lambda **changes: put("manifest.json", MANIFEST | changes)
table = put("tables/tab2.csv", "model\nVladVA\n")
MANIFESTS = [Case(f"results: {what}", "results", make, says) for make, says, what in (
    (lambda folder: None, "holds no manifest.json", "no manifest"),
    (put("manifest.json", "{"), "not valid JSON", "broken JSON"),
    (put("manifest.json", [MANIFEST]), "expected an object", "a list"),
    (manifest(format=99), "is of format 99", "the format of another version"),
    (manifest(stages=[]), "field 'stages'", "a list of stages"),
    (manifest(stages={"tab2": None}), "stage 'tab2': needs parameters", "a stage that is none"),
    (manifest(stages={"tab2": STAGE | {"writes": {"../../x": ZEROS}}}), "file '../../x' lies outside", "a name that climbs"),
    (manifest(stages={"tab2": STAGE | {"writes": {"x": "abc"}}}), "must hold a sha256", "a hash that is none"),
    (manifest(run={"revision": 3}), "names no revision", "a revision that is none"),
    (both(manifest(), table), "tables/tab2.csv: differs", "an edited table"),
    (manifest(), "tables/tab2.csv: is missing", "a table that is gone"),
)]
OTHERS = [
    file_case("mark", "profile.json", "[", "profile.json: not readable", "broken JSON"),
    file_case("mark", "profile.json", {"profile": "cpu"}, "holds results of profile 'cpu'", "results of another profile"),
    file_case("card", "card.json", {"sha256": {"../../x": ZEROS}}, "not a card", "a name that climbs"),
    file_case("card", "card.json", {"sha256": "x"}, "not a card", "a text for hashes"),
    file_case("card", "card.json", {"sha256": {"model.safetensors": ZEROS}}, "model.safetensors: is missing", "weights that are gone"),
    file_case("prompts", "p.json", {"image": "?"}, "expected a list", "an object"),
    file_case("prompts", "p.json", [{"image": "?", "text": 3}], "entry 1: expected", "a number for a prompt"),
    file_case("prompts", "p.json", "[", "not valid JSON", "broken JSON"),
]
OTHERS = [case if case.reader == "prompts" else Case(case.name, case.reader, case.make, case.says) for case in OTHERS]


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


class Pickled:
    "Makes a file when it is unpickled."

    def __reduce__(self):
        return os.system, ("touch unpickled",)


ARRAYS = [file_case(reader, "x.npz", content, says, what) for reader in ("suite", "scores") for content, says, what in (
    (b"a star", "x.npz: not a readable file of arrays", "a text"),
    (npz(a=np.arange(3))[:99], "x.npz: not a readable file of arrays", "a file cut in the middle"),
    (npz(**{"described": np.array([Pickled()], object), "a|b|c": np.array([Pickled()], object)}), "allow_pickle=False", "a pickle"),
)] + [file_case("suite", "x.npz", npz(described=np.array('[{"kind": "Nothing"}]')), "x.npz: not a readable file of arrays", "an unknown kind of benchmark")]

# ---- models


def model(name: str, *changes: Callable[[Path], None]) -> Callable[[Path], None]:
    "A committed checkpoint with changes."
    return both(lambda folder: shutil.copytree(CHECKPOINTS / name, folder, dirs_exist_ok=True) and None, *changes)


def edit(name: str, **fields: object) -> Callable[[Path], None]:
    "Fields of a JSON file set, or removed where they are Ellipsis."
    def make(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return make


def pictures(**fields: object) -> Callable[[Path], None]:
    "Settings of the processor of pictures."
    def make(folder: Path) -> None:
        file = folder / "processor_config.json"
        values = json.loads(file.read_text())
        file.write_text(json.dumps(values | {"image_processor": values["image_processor"] | fields}))
    return make


def tensors(name: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        values = load_file(folder / name)
        change(values)
        save_file(values, folder / name)
    return make


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def set_nan(values: dict) -> None:
    name = sorted(values)[0]
    values[name] = np.full_like(values[name], np.nan)


WEIGHTS, LORA = "model.safetensors", "adapter_model.safetensors"
drop_first = lambda values: values.pop(sorted(values)[0])
MODELS = [Case(f"model: {what}", "model", model(base, *changes), says) for base, changes, says, what in (
    ("llava-micro", [put("config.json", "{")], "not valid JSON", "a broken config"),
    ("llava-micro", [put("config.json", DEEP)], "nested too deeply", "a config of a hundred thousand lists"),
    ("llava-micro", [put("config.json", [])], "not a model config", "a list for a config"),
    ("llava-micro", [edit("config.json", model_type=["llava"])], "not known to transformers", "a list for a family"),
    ("llava-micro", [edit("config.json", model_type="mine", auto_map={"AutoConfig": "code.Config"}), put("code.py", "open('ran', 'w')")], "never run", "a family that brings its code"),
    ("llava-micro", [edit("config.json", attn_implementation="someone/kernel")], "may name code to be fetched", "a kernel to be fetched"),
    ("llava-micro", [edit("config.json", text_config=3)], "not a model", "a number for a config inside"),
    ("llava-micro", [edit("config.json", vision_config={"model_type": "clip_vision_model", "hidden_size": -1})], "not a model", "a tower of negative width"),
    ("llava-micro", [put(WEIGHTS, b"")], "not a model", "weights of no bytes"),
    ("llava-micro", [put(WEIGHTS, b"\xff" * 8 + b"{}")], "not a model", "a header longer than memory"),
    ("llava-micro", [put(WEIGHTS, (CHECKPOINTS / "llava-micro" / WEIGHTS).read_bytes()[:5000])], "not a model", "weights cut in the middle"),
    ("llava-micro", [put(WEIGHTS, "version https://git-lfs.github.com/spec/v1")], "not a model", "a pointer in place of weights"),
    ("llava-micro", [remove(WEIGHTS), put("pytorch_model.bin", b"x")], "is a pickle, which can run code", "a pickle in place of weights"),
    ("llava-micro", [tensors(WEIGHTS, set_nan)], "holds NaN", "a tensor of NaN"),
    ("llava-micro", [tensors(WEIGHTS, drop_first)], "its weights lack", "a tensor that is gone"),
    ("llava-micro", [remove("tokenizer.json")], "not a model", "no tokenizer"),
    ("llava-micro", [put("tokenizer.json", "{")], "not a model", "a broken tokenizer"),
    ("llava-micro", [put("tokenizer.json", DEEP)], "not a model", "a tokenizer of a hundred thousand lists"),
    ("llava-micro", [put("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": []}})], "not a model", "a tokenizer without words"),
    ("llava-micro", [edit("processor_config.json", processor_class="NoProcessor")], "has no processor NoProcessor", "an unknown processor"),
    ("llava-micro", [put("chat_template.jinja", "{% for %}")], "not a model", "a broken chat template"),
    ("clip-micro", [put("processor_config.json", "{")], "not a model", "a broken processor of a CLIP"),
    *((base, [pictures(**fields)], says, f"{what} of {base}") for base in ("clip-micro", "llava-micro") for fields, says, what in (
        ({"size": {"height": 40_000, "width": 40_000}}, "not a number up to 4,096", "pictures of forty thousand pixels square"),
        ({"size": {"height": 200, "width": 200}}, "makes pictures of 200 x 200 pixels", "pictures larger than the tower reads"),
        ({"size": {"height": "x", "width": 60}}, "not a model", "a letter for a height"),
        ({"rescale_factor": "a"}, "cannot read a picture", "a letter for a factor"),
        ({"image_mean": [float("nan")] * 3}, "NaN or infinite pixels", "a mean that is no number"),
        ({"image_std": [0, 0, 0]}, "NaN or infinite pixels", "a deviation of zero"),
    )),
    ("clip-micro", [tensors(WEIGHTS, drop_first)], "its weights lack", "a tensor of a CLIP that is gone"),
    ("vladva-micro", [put("discriminative.json", "{")], "not valid JSON", "a broken adapter"),
    ("vladva-micro", [edit("discriminative.json", prompt=["a", "b"])], "field 'prompt'", "prompts of an adapter in a list"),
    ("vladva-micro", [edit("discriminative.json", base="no/model")], "model 'no/model' does not exist", "a base that is not there"),
    ("vladva-micro", [edit("discriminative.json", base_sha256=ZEROS)], "trained on other base weights", "an adapter of another base"),
    ("vladva-micro", [remove(LORA)], "there is no adapter_model.safetensors", "an adapter without weights"),
    ("vladva-micro", [put(LORA, b"x" * 99)], "not a model", "weights of an adapter that are none"),
    ("vladva-micro", [tensors(LORA, drop_first)], "is missing or has no place", "a tensor of an adapter that is gone"),
    ("vladva-micro", [tensors(LORA, set_nan)], "holds NaN", "an adapter of NaN"),
    ("vladva-micro", [tensors("soft_prompts.safetensors", lambda v: v.update(text=v["text"][:, :3].copy()))], "each tokens x 128", "soft prompts of another width"),
    ("vladva-micro", [edit("adapter_config.json", r=10**9)], "field 'r'", "a rank of a thousand million"),
    ("vladva-micro", [edit("adapter_config.json", r=...)], "field 'r'", "no rank"),
    ("vladva-micro", [edit("adapter_config.json", target_modules="(a+)+$")], "field 'target_modules'", "an expression that never ends for the layers"),
    ("vladva-micro", [edit("adapter_config.json", megatron_config={"a": 1}, megatron_core="code")], "field 'megatron_config'", "a module to be imported"),
    ("vladva-micro", [edit("adapter_config.json", peft_type="PREFIX_TUNING")], "field 'peft_type'", "another kind of adapter"),
    ("vladva-micro", [edit("adapter_config.json", target_modules=["nothing"])], "does not fit the base", "layers that are not there"),
)]

CASES = [*RECORDS, *COCO, *FOLDERS, *TARS, *PARQUETS, *PICTURES, *BENCHMARKS, *PROFILES, *MANIFESTS, *OTHERS, *ARRAYS, *MODELS]


def make(case: Case, folder: Path) -> Path:
    "Write a case into a new folder, and say what its reader is given."
    folder.mkdir(parents=True)
    case.make(folder)
    return folder / case.given if case.given else folder


if __name__ == "__main__":
    for number, case in enumerate(CASES):
        print(make(case, Path(sys.argv[1]) / f"{number:03}" / "input"), case.name, sep="\t")
