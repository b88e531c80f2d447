"The public benchmarks: published numbers from the real files, made files of every form, and what is said about broken ones."
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import CHECKPOINTS, fails_in_one_line, run
from lvlm_research.benchmarks import folder_suite
from lvlm_research.cli import main
from lvlm_research.config import InputError
from lvlm_research.datasets import read_folder
from lvlm_research.evaluation import evaluate, evaluate_text_only, load_embedder, score_suite, tidy_rows
from lvlm_research.metrics import chance
from lvlm_research.public_benchmarks import TASKS, public_suite, read_captions, read_pope, text_only_scores, word_counts
from lvlm_research.scenes import NEGATIVE_TYPES, sample_scenes, scene_images, short_caption

NOWHERE = Path("nowhere")  # for texts alone: no picture is opened


def write(file: Path, content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def paint(file: Path, number: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(file)


class Words:
    "An embedder that knows pictures by their number and texts by their words alone."

    def __init__(self, pictures: dict[str, str]):
        self.says, self.index = pictures, {}

    def encode_text(self, texts, **_):
        rows = torch.zeros(len(texts), 4096, dtype=torch.float64)
        for row, text in zip(rows, texts):
            for word, n in word_counts(text).items():
                row[self.index.setdefault(word, len(self.index))] += n
        return F.normalize(rows, dim=-1)

    def encode_image(self, images, **_):
        return self.encode_text([self.says[i] for i in images])


# ---- the real files

def test_blind_rules_of_sugarcrepe_are_the_computed_ones(real_data):
    rows = evaluate_text_only("sugarcrepe", real_data / "sugarcrepe", draws=2).set_index(["model", "subset", "metric"]).value
    expected = {"fewer characters": (45.16, 44.29, 59.17, 26.12, 21.62, 98.79, 99.57, 64.72),
                "more characters": (44.13, 37.44, 30.80, 16.33, 23.27, 0.87, 0.29, 22.26),
                "same words": (0, 0, 0, 66.94, 61.26, 0, 0, 7.62)}
    for rule, values in expected.items():
        metric = "share of items" if rule == "same words" else "strict accuracy"
        assert [rows[rule, kind, metric] for kind in NEGATIVE_TYPES] + [rows[rule, "all", f"item-weighted {metric}"]] == list(values)


def test_swap_obj_has_245_items_and_both_group_scores_are_named(real_data):
    suite = TASKS["sugarcrepe"].read(real_data / "sugarcrepe", NOWHERE)
    assert [len(b.images) for b in suite] == [1652, 788, 1406, 245, 666, 2062, 692]
    rows = tidy_rows({"sugarcrepe": text_only_scores("sugarcrepe", real_data / "sugarcrepe")["fewer characters"]}, 2).set_index(["subset", "metric"]).value
    right = {b.subset: rows[b.subset, "strict accuracy"] / 100 for b in suite}
    assert rows["swap", "mean strict accuracy"] == pytest.approx(50 * (right["swap_obj"] + right["swap_att"]), abs=1e-3)
    assert rows["swap", "item-weighted strict accuracy"] == pytest.approx(100 * (245 * right["swap_obj"] + 666 * right["swap_att"]) / 911, abs=1e-3)
    assert ("add", "mean strict accuracy") in rows and ("all", "mean strict accuracy") not in rows


def test_word_counts_are_below_chance_on_tot(real_data):
    rows = evaluate_text_only("sugarcrepe_pp", real_data / "sugarcrepe_pp", draws=2).set_index(["subset", "metric"])
    kinds = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att")
    assert [rows.value[k, "TOT"] for k in kinds] == [21.97, 16.75, 27.17, 4.90, 14.71] and rows.value["all", "item-weighted TOT"] == 20.75
    assert [rows.n[k, "TOT"] for k in kinds] == [1652, 788, 1406, 245, 666]


def test_the_rule_of_word_counts_is_what_an_embedder_of_words_scores(real_data):
    bench = next(b for b in TASKS["sugarcrepe_pp"].read(real_data / "sugarcrepe_pp", NOWHERE) if b.subset == "swap_obj")
    text = Words({}).encode_text(bench.texts)
    tot = next(s for s in bench.score(text[: bench.n], text) if s.metric == "TOT")
    assert tot.values.sum() == 12


def test_sugarcrepe_pp_is_read_from_its_own_files(real_data):
    old, new = ({b.subset: b for b in TASKS[t].read(real_data / t, NOWHERE)}["swap_att"] for t in ("sugarcrepe", "sugarcrepe_pp"))
    assert sum(a == b for a, b in zip(old.texts[:666], new.texts[:666])) == 430


def test_always_yes_on_pope(real_data):
    rows = evaluate_text_only("pope", real_data / "pope", draws=2).set_index(["subset", "metric"]).value
    for kind in ("random", "popular", "adversarial"):
        assert rows[kind].to_dict() == {"accuracy": 50, "precision": 50, "recall": 100, "F1": 66.67, "yes said": 100, "yes or no said": 100}
    suite = read_pope(real_data / "pope", NOWHERE)
    assert [(len(b.texts), int(b.labels.sum()), len(set(b.images))) for b in suite] == [(3000, 1500, 500)] * 3
    never = {s.metric: s.values.mean() for s in suite[0].score_answers(["No."] * 3000)}
    assert never["F1"] == never["recall"] == never["yes said"] == 0 and "precision" not in never


def test_the_two_coco_sets_of_five_thousand(real_data, tmp_path):
    val2017, = TASKS["coco"].read(real_data / "coco_captions/captions_val2017.json", NOWHERE)
    assert (val2017.subset, len(val2017.images), len(val2017.texts)) == ("captions_val2017", 5000, 25014)  # all captions, not the first five
    assert np.bincount(np.bincount(val2017.image_of_text)).tolist() == [0, 0, 0, 0, 0, 4987, 12, 1]
    names = [line.split()[0] for line in (real_data / "coco_captions/karpathy_test_images.txt").read_text().splitlines()]
    karpathy, = TASKS["coco"].read(write(tmp_path / "coco_karpathy_test.json", [{"image": n, "caption": ["x"]} for n in names]), NOWHERE)
    number = lambda bench: {int(Path(p).stem.split("_")[-1]) for p in bench.images}
    assert len(karpathy.images) == 5000 and len(number(val2017) & number(karpathy)) == 593 and karpathy.subset != val2017.subset


def test_the_two_test_lists_of_flickr30k(real_data, tmp_path):
    lists = {"multi30k": (real_data / "flickr30k_splits/multi30k_test_2016_flickr.txt").read_text().split(),
             "entities": [f"{n}.jpg" for n in (real_data / "flickr30k_splits/entities_test.txt").read_text().split()]}
    form = lambda names: {"images": [{"filename": n, "split": "test", "sentences": [{"raw": "x"}]} for n in names], "dataset": "flickr30k"}
    first, second = (TASKS["flickr30k"].read(write(tmp_path / f"{name}.json", form(names)), NOWHERE)[0] for name, names in lists.items())
    assert len(first.images) == len(second.images) == 1000 and len(set(first.images) & set(second.images)) == 25 and first.subset != second.subset


def test_chance_counts_the_captions_of_each_picture(real_data, tmp_path):
    "A constant model scores the chance that is stated, also where pictures have five, six and seven captions."
    whole = json.loads((real_data / "coco_captions/captions_val2017.json").read_text())
    number = np.bincount([a["image_id"] for a in whole["annotations"]])
    kept = [i for i in whole["images"] if number[i["id"]] > 5] + [i for i in whole["images"] if number[i["id"]] == 5][:87]
    ids = {i["id"] for i in kept}
    cut = {"images": kept, "annotations": [a for a in whole["annotations"] if a["image_id"] in ids]}
    bench, = TASKS["coco"].read(write(tmp_path / "cut.json", cut), NOWHERE)
    constant = lambda n: F.normalize(torch.ones(n, 4), dim=-1)
    scores = {s.metric: s for s in bench.score(constant(100), constant(514))}
    assert all(s.values.mean() == pytest.approx(s.chance) for s in scores.values())
    assert scores["i2t R@1"].chance == pytest.approx(1 / 100) and scores["i2t R@1"].chance > chance(1, 514, 5)


def test_a_caption_a_line_scores_as_all_captions_in_one_line(tmp_path):
    rng = np.random.default_rng(0)
    scenes = sample_scenes(6, rng, "test")
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
        for i, picture in enumerate(scene_images(scenes, 60)):
            Image.fromarray(picture).save(tmp_path / folder / f"{i}.png")
    lines = [{"image": f"{i}.png", "captions": [short_caption(s, rng) + f" {k}" for k in range(3)], "kind": f"k{i % 2}"} for i, s in enumerate(scenes)]
    write(tmp_path / "one/captions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(tmp_path / "many/captions.jsonl", "".join(json.dumps(line | {"captions": [c]}) + "\n" for line in lines for c in line["captions"]))
    clip = load_embedder(CHECKPOINTS / "clip-micro")
    one, many = (evaluate(clip, folder_suite(read_folder(tmp_path / folder), "kind"), 10) for folder in ("one", "many"))
    assert many[["metric", "value", "n", "chance"]].equals(one[["metric", "value", "n", "chance"]])
    write(tmp_path / "many/captions.jsonl", "".join(json.dumps({"image": "0.png", "captions": [c], "kind": c}) + "\n" for c in ("a", "b")))
    with pytest.raises(InputError, match="0.png: field 'kind' is 'a' in one line and 'b' in another"):
        folder_suite(read_folder(tmp_path / "many"), "kind")


def test_photographs_as_a_task_score_as_they_do_as_a_folder(real_data, tmp_path):
    source = real_data / "real_pairs/coco_cc"
    records = [json.loads(line) for line in (source / "captions.jsonl").read_text().splitlines()]
    file = write(tmp_path / "coco_karpathy_test.json", [{"image": r["image"], "caption": r["captions"]} for r in records])
    clip, suites = load_embedder(CHECKPOINTS / "clip-micro"), (public_suite("coco", file, source), folder_suite(read_folder(source)))
    task, folder = (evaluate(clip, suite, 10).set_index("metric") for suite in suites)
    columns = ["value", "n", "chance"]
    assert len(task) == 6 and task[columns].to_numpy() == pytest.approx(folder[columns].to_numpy(), abs=1e-3)


def test_classes_of_imagenet_with_one_name_stay_two(real_data, tmp_path):
    ids = (real_data / "imagenet/wnids_sorted.txt").read_text().split()
    for i in ids:
        write(tmp_path / i / "ILSVRC2012_val_1.JPEG", "")
    suite = {b.subset: b for b in public_suite("imagenet", real_data / "imagenet", tmp_path)}
    full, bare = suite["80 templates"], suite["class name"]
    assert (len(full.texts), len(bare.texts), len(set(bare.texts))) == (80_000, 1000, 998) and bare.labels.tolist() == list(range(1000))
    assert bare.texts[657] == bare.texts[744] == "missile" and full.texts[9 * 80] == "a bad photo of a ostrich."  # the article as published
    names = {t: i for i, t in enumerate(dict.fromkeys(bare.texts))}  # a model that knows every name
    text = torch.eye(998)[[names[t] for t in bare.texts]]
    right = bare.score(text, text)[0].values
    assert right[[657, 744, 836, 837]].tolist() == [0.5] * 4 and right.sum() == 998


# ---- made files

CAPTIONS = ["A cat, asleep.", "Two cats on a mat."]
SENTENCES = [{"raw": c, "tokens": c.split()} for c in CAPTIONS]
KARPATHY = {"dataset": "coco", "images": [{"filepath": "val2014", "filename": "1.jpg", "split": "test", "cocoid": 1, "sentences": SENTENCES},
                                          {"filepath": "train2014", "filename": "2.jpg", "split": "restval", "sentences": SENTENCES}]}
ANNOTATIONS = [{"image_id": 0, "id": i, "caption": c} for i, c in enumerate(CAPTIONS)]
FORMS = {"dataset_coco.json": KARPATHY,
         "coco_karpathy_test.json": [{"image": "val2014/1.jpg", "caption": CAPTIONS}],
         "coco_test_karpathy.json": {"images": [{"id": 0, "file_name": "val2014/1.jpg"}], "annotations": ANNOTATIONS},
         "flickr30k_test_karpathy.txt": "image,caption\nval2014/1.jpg,\"A cat, asleep.\"\nval2014/1.jpg,Two cats on a mat.\n"}


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_of_captions_read_alike(tmp_path, name):
    found = read_captions(write(tmp_path / name, FORMS[name]))
    assert [(f.picture, f.captions) for f in found] == [("val2014/1.jpg", CAPTIONS)]


def test_a_caption_with_commas_in_an_unquoted_csv(tmp_path):
    found = read_captions(write(tmp_path / "a.txt", "image,caption\n1.jpg,A cat, a dog, and a mat .\n2.jpg,\"A \"\"cat\"\", asleep.\"\n"))
    assert [f.captions for f in found] == [["A cat, a dog, and a mat ."], ['A "cat", asleep.']]


def test_nocaps_per_domain_and_pooled(tmp_path):
    domains = ["in-domain", "near-domain", "out-domain", "near-domain"]
    says = [f"thing{i} here" for i in range(4)]
    content = {"images": [{"id": i, "file_name": f"{i}.jpg", "open_images_id": f"{i:016x}", "domain": d} for i, d in enumerate(domains)],
               "annotations": [{"id": 10 * i + j, "image_id": i, "caption": says[i] + " again" * j} for i in range(4) for j in range(10)]}
    suite = TASKS["nocaps"].read(write(tmp_path / "nocaps_val_4500_captions.json", content), NOWHERE)
    assert [(b.subset, len(b.images), len(b.texts)) for b in suite] == [("in-domain", 1, 10), ("near-domain", 2, 20), ("out-domain", 1, 10), ("all", 4, 40)]
    wrong = Words({str(NOWHERE / f"{i}.jpg"): says[(i + 2) % 4 if i != 1 else 3] for i in range(4)})  # picture 1 looks like 3, and 3 like 1
    rows = evaluate(wrong, suite, 10).set_index(["subset", "metric"]).value
    assert rows["near-domain", "t2i R@1"] == 0 and rows["mean of domains", "t2i R@1"] == pytest.approx(200 / 3, abs=1e-3) and rows["all", "t2i R@1"] == 0


def winoground_line(**changes) -> str:
    captions = {"caption_0": "an old person kisses a young person", "caption_1": "a young person kisses an old person"}
    tags = {"tag": "Adjective-Age", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": "Object"}
    return json.dumps({"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1"} | captions | tags | changes)


def test_a_bag_of_words_gets_nothing_on_winoground(tmp_path):
    bench, = TASKS["winoground"].read(write(tmp_path / "examples.jsonl", winoground_line() + "\n" + winoground_line(id=1, collapsed_tag="Relation")), NOWHERE)
    assert bench.images[:2] == [str(NOWHERE / f"ex_0_img_{i}.png") for i in (0, 1)]
    rows = evaluate(Words(dict(zip(bench.images, bench.texts))), [bench], 10).set_index(["subset", "metric"]).value
    assert rows["all", "text"] == rows["all", "group"] == rows["Relation", "text"] == 0


def test_mmvp_vlm_asks_the_texts_and_wants_both(tmp_path):
    rows = [(number, kind, f"word{number}") for kind, first in (("Texts", 1), ("State and Condition", 3)) for number in (first, first + 1)]
    file = write(tmp_path / "Questions.csv", "\ufeffQuestion ID,Type,Statement\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
    bench, = TASKS["mmvp_vlm"].read(file, NOWHERE)
    assert bench.images[2] == str(NOWHERE / "State and Condition/3.jpg") and bench.texts[0] == "a photo of word1"
    half = Words(dict(zip(bench.images, ["word1", "word2", "word3", "word3"])))  # both pictures of the second pair are alike
    scores = {s.subset: s.values.tolist() for s in score_suite(half, [bench])["mmvp_vlm"]}
    assert scores == {"all": [1, 0], "Texts": [1], "State and Condition": [0]}


def test_tot_needs_both_comparisons(tmp_path):
    "The first caption is nearer to the second than to the negative, but the second is not nearer to the first."
    item = {"id": 0, "filename": "1.jpg", "caption": "a b c d", "caption2": "a b c e f g", "negative_caption": "b c e f g h"}
    for kind in NEGATIVE_TYPES[:5]:
        write(tmp_path / f"{kind}.json", [item, item | {"negative_caption": "x"}])
    scores = text_only_scores("sugarcrepe_pp", tmp_path)["word counts"]
    assert [s.values.tolist() for s in scores] == [[0, 1]] * 5


@pytest.fixture
def pope(tmp_path) -> Path:
    "Two painted pictures with two questions each, in three sets."
    for i in (1, 2):
        paint(tmp_path / f"images/{i}.jpg", i)
    for kind in ("random", "popular", "adversarial"):
        lines = [{"question_id": q, "image": f"{i}.jpg", "text": f"is there a {what} in the image?", "label": label}
                 for q, (i, (what, label)) in enumerate(itertools.product((1, 2), (("star", "yes"), ("blue square or a green circle", "no"))))]
        write(tmp_path / f"coco_pope_{kind}.json", "".join(json.dumps(r) + "\n" for r in lines))
    return tmp_path


def test_pope_is_answered_by_generating_with_the_adapter_off_and_on(pope):
    suite = public_suite("pope", pope, pope / "images")
    adapter = load_embedder(CHECKPOINTS / "vladva-micro")
    rows = evaluate(adapter, suite, 10).set_index(["subset", "metric"])
    assert {f"adapter {s}: {k}" for s in ("off", "on") for k in ("random", "popular", "adversarial", "mean of sets")} == set(rows.index.get_level_values(0))
    base = evaluate(load_embedder(CHECKPOINTS / "llava-micro"), suite, 10).set_index(["subset", "metric"])
    assert not any("adapter on" in subset for subset, _ in base.index)
    assert base.value.to_dict() == rows.loc[base.index].value.to_dict()  # off is the base
    with pytest.raises(InputError, match="a CLIP cannot answer"):
        evaluate(load_embedder(CHECKPOINTS / "clip-micro"), suite, 10)


# ---- the command line

def test_evaluate_a_task(tmp_path):
    "From files to rows, on painted pictures: the micro CLIP knows nothing of them."
    for i in range(4):
        paint(tmp_path / f"val2014/{i}.jpg", i)
    captions = [{"image": f"val2014/{i}.jpg", "caption": ["a red star"] + ["a blue square"] * (i % 2)} for i in range(4)]
    write(tmp_path / "coco_karpathy_test.json", captions)
    model, folder, out = str(CHECKPOINTS / "clip-micro"), str(tmp_path), str(tmp_path / "rows.csv")
    result = run("evaluate", "--model", model, "--task", "coco", "--data", folder, "--images", folder, "--out", out)
    assert result.returncode == 0 and "all captions are kept" in result.stdout, result.stderr
    rows = pd.read_csv(tmp_path / "rows.csv").set_index("metric")
    assert set(rows.benchmark) == {"coco"} and set(rows.subset) == {"coco_karpathy_test"} and rows.n["t2i R@1"] == 6
    assert rows.value["t2i R@1"] <= 50  # equal captions of different pictures: each only finds its own


def test_text_only_needs_neither_model_nor_pictures(real_data, tmp_path):
    result = run("evaluate", "--task", "sugarcrepe", "--data", str(real_data / "sugarcrepe"), "--text-only", "--out", str(tmp_path / "rows.csv"))
    assert result.returncode == 0 and "98.79" in result.stdout and "99.57" in result.stdout and "equal ones are wrong" in result.stdout, result.stderr
    assert pd.read_csv(tmp_path / "rows.csv").value.eq(98.79).sum() == 1


def test_missing_pictures_are_counted_before_a_model_is_looked_for(real_data, tmp_path):
    write(tmp_path / "000000289393.jpg", "")  # the first one is there
    command = ("evaluate", "--task", "sugarcrepe", "--data", str(real_data / "sugarcrepe"), "--images", str(tmp_path))
    for model in ((), ("--model", "no/model")):
        fails_in_one_line(*command, *model, says=f"1,559 of 1,560 pictures are missing, first '{tmp_path / '000000443303.jpg'}'")


@pytest.mark.parametrize("argv, says", [
    (("--task", "sugarcrep", "--text-only"), "unknown task 'sugarcrep': use one of folder, " + ", ".join(TASKS)),
    (("--task", "coco", "--text-only"), "--text-only is for sugarcrepe, sugarcrepe_pp, pope"),
    (("--task", "coco", "--model", "m"), "give their folder with --images"),
    (("--task", "coco", "--model", "m", "--images", "i", "--split", "val"), "leave them out with --task coco"),
    (("--model", "m", "--text-only"), "name it with --task"),
    (("--task", "sugarcrepe", "--text-only"), "lacks replace_obj.json, replace_att.json"),
    (("--task", "coco", "--model", "m", "--images", "i"), "holds 0 of dataset_coco.json"),
])
def test_arguments_that_do_not_go_together(tmp_path, capsys, argv, says):
    assert main(["evaluate", "--data", str(tmp_path), *argv]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_help_names_all_tasks():
    assert all(name in run("evaluate", "--help").stdout for name in TASKS)


# ---- broken files

GOOD = {"filename": "1.jpg", "caption": "a", "negative_caption": "b"}
FIRST, ONE = {"id": 1, "file_name": "1.jpg"}, [{"image_id": 1, "caption": "x"}]
BROKEN = [
    ("sugarcrepe", "swap_obj.json", '{"0": {"filename": ', "swap_obj.json: not valid JSON"),
    ("sugarcrepe", "swap_obj.json", "", "swap_obj.json: empty"),
    ("sugarcrepe", "swap_obj.json", "{}", "swap_obj.json: no items"),
    ("sugarcrepe", "swap_obj.json", [GOOD], "of SugarCrepe++ a list (--task sugarcrepe_pp)"),
    ("sugarcrepe", "swap_obj.json", {"0": GOOD, "109": {"filename": "1.jpg", "caption": "a"}}, "swap_obj.json, key '109': needs a field 'negative_caption'"),
    ("sugarcrepe", "swap_obj.json", {"109": GOOD | {"caption": " "}}, "key '109': needs a field 'caption' with a text"),
    ("sugarcrepe", "swap_obj.json", {"109": GOOD | {"filename": "../../1.jpg"}}, "key '109': picture '../../1.jpg' lies outside"),
    ("sugarcrepe", "swap_obj.json", {"109": None}, "key '109': needs a field 'filename'"),
    ("sugarcrepe", "swap_obj.json", None, "lacks swap_obj.json"),
    ("sugarcrepe_pp", "swap_att.json", [GOOD], "swap_att.json, record 1: needs a field 'caption2'"),
    ("coco", "dataset_coco.json", {"images": [{"split": "train"}]}, "no picture has the split 'test'"),
    ("coco", "dataset_coco.json", {"images": [{"split": "test", "filename": "1.jpg", "sentences": [{"tokens": []}]}]}, "images, record 1: needs a field 'raw'"),
    ("coco", "dataset_coco.json", {"annotations": []}, "an object without images"),
    ("coco", "dataset_coco.json", "[" * 100_000, "dataset_coco.json, after 0 records: not valid JSON"),
    ("coco", "captions_val2017.json", {"images": [FIRST], "annotations": [{"image_id": 2, "caption": "x"}]}, "annotations, record 1: image_id 2 is not among"),
    ("coco", "captions_val2017.json", {"images": [FIRST, {"id": 2, "file_name": "2.jpg"}], "annotations": ONE}, "record 2: picture '2.jpg' has no caption"),
    ("coco", "captions_val2017.json", {"images": [FIRST] * 2, "annotations": ONE}, "two images have the same id"),
    ("coco", "coco_karpathy_test.json", [{"image": "1.jpg", "caption": "x"}], "record 1: needs a field 'caption' with a list"),
    ("coco", "coco_karpathy_test.json", [{"image": "1.jpg", "caption": ["x"]}] * 2, "record 2: picture '1.jpg' was in"),
    ("flickr30k", "flickr30k_test_karpathy.txt", "image,caption\n1.jpg,a\n2.jpg\n", "row 3: needs a field 'caption'"),
    ("flickr30k", "flickr30k_test_karpathy.txt", "image,caption\n/etc/1.jpg,a\n", "row 2: picture '/etc/1.jpg' lies outside"),
    ("flickr30k", "flickr30k_test_karpathy.txt", "image,caption\n", "no records"),
    ("nocaps", "nocaps_val_4500_captions.json", {"images": [FIRST], "annotations": ONE}, "images, record 1: needs a field 'domain'"),
    ("nocaps", "nocaps_val_4500_captions.json", {"images": [FIRST | {"domain": "in-domain"}], "annotations": ONE}, "no picture is near-domain"),
    ("winoground", "examples.jsonl", winoground_line() + "\n{", "examples.jsonl, line 2: not valid JSON"),
    ("winoground", "examples.jsonl", winoground_line(caption_1=""), "examples.jsonl, line 1: needs a field 'caption_1'"),
    ("winoground", "examples.jsonl", winoground_line(image_0="../x"), "line 1: picture '../x.png' lies outside"),
    ("mmvp_vlm", "Questions.csv", "a,b,c\n1,Texts,x\n", "1 questions do not make pairs"),
    ("mmvp_vlm", "Questions.csv", "a,b,c\n1,Texts,x\n2,Colour,y\n", "row 2: questions 1 and 2 are no pair"),
    ("mmvp_vlm", "Questions.csv", "a,b,c\n1,Texts\n", "row 2: needs three columns"),
    ("imagenet", "wnids_sorted.txt", "n2\nn1\n", "must hold 2 different ids"),
    ("imagenet", "wnids_sorted.txt", "../n1\nn2\n", "wnids_sorted.txt: picture '../n1' lies outside"),
    ("imagenet", "classnames.json", {"0": "tench"}, "classnames.json: must hold a list of texts"),
    ("imagenet", "templates_openai80.json", ["a photo"], "template 'a photo' has no place {}"),
    ("pope", "coco_pope_popular.json", '{"image": "1.jpg", "text": "Is there?", "label": "maybe"}', "popular.json, line 1: field 'label' must be yes or no"),
    ("pope", "coco_pope_popular.json", '{"image": "1.jpg", "label": "no"}', "popular.json, line 1: needs a field 'text'"),
]
WHOLE = {"sugarcrepe": {f"{k}.json": {"0": GOOD} for k in NEGATIVE_TYPES}, "sugarcrepe_pp": {f"{k}.json": [GOOD | {"caption2": "c"}] for k in NEGATIVE_TYPES},
         "imagenet": {"wnids_sorted.txt": "n1\nn2\n", "classnames.json": ["tench", "hen"], "templates_openai80.json": ["a {}"]},
         "pope": {f"coco_pope_{k}.json": '{"image": "1.jpg", "text": "Is there?", "label": "no"}' for k in ("random", "popular", "adversarial")}}


@pytest.mark.parametrize("task, file, content, says", BROKEN, ids=lambda v: v[:24] if isinstance(v, str) else "")
def test_a_broken_file_is_named_with_its_record(tmp_path, task, file, content, says):
    for name, whole in WHOLE.get(task, {}).items():
        write(tmp_path / name, whole)
    if content is None:
        (tmp_path / file).unlink()
    else:
        write(tmp_path / file, content)
    with pytest.raises(InputError) as error:
        public_suite(task, tmp_path, tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="none.json: cannot be read"):
        public_suite("coco", tmp_path / "none.json", tmp_path)
    (tmp_path / "latin.json").write_bytes('[{"image": "1.jpg", "caption": ["é"]}]'.encode("latin-1"))
    with pytest.raises(InputError, match="latin.json: not UTF-8"):
        public_suite("coco", tmp_path / "latin.json", tmp_path)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links here")
def test_a_link_is_followed_inside_the_folder_of_pictures_and_nowhere_else(tmp_path):
    paint(tmp_path / "coco/disk/1.jpg", 1)
    (tmp_path / "coco/val2014").symlink_to("disk")
    write(tmp_path / "a.json", [{"image": "val2014/1.jpg", "caption": ["x"]}])
    assert public_suite("coco", tmp_path / "a.json", tmp_path / "coco")[0].images == [str(tmp_path / "coco/val2014/1.jpg")]
    (tmp_path / "coco/disk").rename(tmp_path / "disk")
    (tmp_path / "coco/val2014").unlink()
    (tmp_path / "coco/val2014").symlink_to(tmp_path / "disk")
    with pytest.raises(InputError, match="record 1: picture 'val2014/1.jpg' lies outside the folder"):
        public_suite("coco", tmp_path / "a.json", tmp_path / "coco")
