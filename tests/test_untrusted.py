"Texts, links, pickles and numbers of other people: what they may not do."
import json
import os
import pickle
import shutil
from collections import namedtuple

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from broken_inputs import PNG, captions, edit, tensors, write
from conftest import CHECKPOINTS
from lvlm_research.cli import main
from lvlm_research.config import InputError, visible
from lvlm_research.datasets import joint_batches, read_folder
from lvlm_research.doctor import describe
from lvlm_research.embedder import open_image
from lvlm_research.evaluation import load_embedder
from lvlm_research.fitting import FitModule, fit
from lvlm_research.formats import data_report, read_records, record_pairs
from lvlm_research.plotting import contact_sheet
from lvlm_research.reproduce import write_report
from lvlm_research.training import Discriminative

HOSTILE = "<script>alert(1)</script>\u202egpj.exe\x1b[31m\x07 \u2066star\u2028"
HARMLESS = r"<script>alert(1)</script>\u202egpj.exe\x1b[31m\x07 \u2066star\u2028"


@pytest.fixture
def folder(tmp_path):
    "Four pictures whose captions, names and labels mean harm."
    place = tmp_path / "data"
    names = ["a.png", "b<img src=x>.png", "c\u202e.png", "d\x1b[2J.png"]
    for name in names:
        write(place / name, PNG)
    lines = [json.dumps({"image": name, "captions": [f"{HOSTILE} {i}"], "label": HOSTILE if i else "star", "split": HOSTILE}) for i, name in enumerate(names)]
    (place / "captions.jsonl").write_text("\n".join(lines))
    return place


def test_captions_are_kept_as_they_are_and_shown_without_harm(folder, capsys):
    records = read_records(folder)
    assert records["captions"][0] == [f"{HOSTILE} 0".strip()] == read_folder(folder)["captions"][0]  # data are not touched
    (folder / "d\x1b[2J.png").unlink()
    report = str(data_report(records, load_embedder(CHECKPOINTS / "llava-micro").templates.tokenizer))
    assert r"d\x1b[2J.png" in report and all(line.isprintable() for line in report.split("\n"))
    with pytest.raises(InputError) as error:
        read_folder(folder)
    assert str(error.value).isprintable()


def test_the_command_line_writes_control_characters_out(folder, capsys):
    assert main(["evaluate", "--model", str(CHECKPOINTS / "clip-micro"), "--data", str(folder), "--label", "label"]) == 0
    assert main(["evaluate", "--model", str(CHECKPOINTS / "clip-micro"), "--data", str(folder), "--split", "none"]) == 2
    said = capsys.readouterr()
    assert all(line.isprintable() for line in (said.out + said.err).split("\n")) and HARMLESS in said.err


def test_the_report_escapes_texts_and_forbids_scripts(tmp_path):
    write(tmp_path / "figures/fig7.svg", f"<svg><text>{HOSTILE}</text></svg>".encode())  # edited by somebody
    write(tmp_path / "tables/tab2.csv", f"model,source,score\n{HOSTILE},ours,1.0\n".encode())
    write(tmp_path / "claims.csv", ("claim,statistic,value,ci_low,ci_high,claimed,verdict,note\n" + ",".join([HOSTILE] * 8) + "\n").encode())
    write(tmp_path / "failures/tab3.json", json.dumps({"stage": "tab3", "error": HOSTILE}).encode())
    page = write_report(tmp_path, "smoke").read_text()
    body = page.replace((tmp_path / "figures/fig7.svg").read_text(), "")
    assert "<script" not in body and "&lt;script&gt;" in body and "\u202e" not in body and "\x1b" not in body
    head = page.split("</head>")[0]
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in head and "script-src" not in head  # so that no script of a figure runs


def test_writing_of_all_languages_is_left_alone():
    for text in ("Größe", "猫と犬", "قط وكلب", "גור", "می‌خواهم", "👩‍👩‍👧", "naïve café", "a\u00a0b"):
        assert visible(text) == text


class Harm:
    "Makes a folder when it is unpickled."

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


class Line(FitModule):
    "A straight line, to be trained."

    def __init__(self, lr: float = 0.1):
        super().__init__(lr=lr)
        self.w = torch.nn.Parameter(torch.zeros(1, 1))

    def training_step(self, batch, index):
        loss = ((batch @ self.w - 3 * batch) ** 2).mean()
        self.note(loss=loss)
        return loss


def numbers(step: int) -> torch.Tensor:
    return torch.randn(8, 1, generator=torch.Generator().manual_seed(step))


def test_a_kept_state_is_never_unpickled(tmp_path, capsys):
    state = tmp_path / "state.ckpt"
    torch.save({"owner": "x", "global_step": Harm(tmp_path / "torch")}, state)
    fit(Line(), numbers, 3, keep=state)
    state.write_bytes(pickle.dumps(Harm(tmp_path / "plain")))
    fit(Line(), numbers, 3, keep=state)
    assert not (tmp_path / "torch").exists() and not (tmp_path / "plain").exists()
    assert capsys.readouterr().out.count("not a state to go on from") == 2


def test_no_folder_runs_its_code(tmp_path):
    "A processor, a tokenizer and a config that name code of their own."
    for base, name, classes in (("clip-micro", "processor_config.json", {"AutoProcessor": "harm.Harm"}), ("llava-micro", "processor_config.json", {"AutoProcessor": "harm.Harm"}),
                                ("llava-micro", "tokenizer_config.json", {"AutoTokenizer": ["harm.Harm", None]}), ("llava-micro", "config.json", {"AutoModelForImageTextToText": "harm.Harm"})):
        folder = shutil.copytree(CHECKPOINTS / base, tmp_path / name / base)
        edit(name, auto_map=classes)(folder)
        write(folder / "harm.py", f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Harm: pass\n".encode())
        try:
            load_embedder(folder)
        except InputError:
            pass
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("source", ["llava-micro", "clip-micro"])
def test_a_folder_leads_to_no_other_file(source, tmp_path):
    "An index that names a pickle or a file elsewhere, another file of weights, an adapter of pickles."
    def index(name):
        def change(folder):
            (folder / "model.safetensors").rename(folder / "model-x.safetensors")
            write(folder / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": {"a": "model-x.safetensors", "b": name}}).encode())
        return change

    def adapter(folder):
        write(folder / "adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path)}).encode())
        torch.save({"a": Harm(tmp_path / "ran")}, folder / "adapter_model.bin")

    outside = tmp_path / "outside.safetensors"
    shutil.copy(CHECKPOINTS / source / "model.safetensors", outside)
    for number, (change, says) in enumerate((
            (index("evil.bin"), "entry 'b' names 'evil.bin', which is no safetensors file"), (index("../outside.safetensors"), "names '../outside.safetensors', which is no safetensors file of this folder"),
            (index(str(outside)), "which is no safetensors file of this folder"), (index("model-y.safetensors"), "'model-y.safetensors', which is missing"),
            (edit("config.json", transformers_weights="../outside.safetensors"), "transformers_weights names another file"), (adapter, "adapter_config.json"))):
        folder = shutil.copytree(CHECKPOINTS / source, tmp_path / str(number))
        torch.save({"a": Harm(tmp_path / "ran")}, folder / "evil.bin")
        change(folder)
        with pytest.raises(InputError, match="not a model") as error:
            load_embedder(folder)
        assert says in str(error.value) and not (tmp_path / "ran").exists()


def test_shards_of_the_folder_are_loaded(tmp_path):
    folder, whole = tmp_path / "model", load_embedder(CHECKPOINTS / "llava-micro").model
    shutil.copytree(CHECKPOINTS / "llava-micro", folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="1MB")
    edit("config.json", _attn_implementation="flash_attention_2")(folder)  # which is not installed here, and not needed
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and describe(folder).fault is None
    again = load_embedder(folder).model
    assert again.config._attn_implementation == whole.config._attn_implementation
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_collapsed_model_is_reported_in_one_line(tmp_path, capsys):
    model = shutil.copytree(CHECKPOINTS / "clip-micro", tmp_path / "model")
    tensors("model.safetensors", lambda v: [v.update({name: np.zeros_like(v[name])}) for name in v if name.endswith("projection.weight")])(model)
    captions({"image": "a.png", "captions": ["a star"]}, {"image": "b.png", "captions": ["a ring", "a moon"]})(tmp_path / "data")
    write(tmp_path / "data/b.png", PNG)
    assert main(["evaluate", "--model", str(model), "--data", str(tmp_path / "data")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "collapsed: the embeddings of all 2 pictures are alike" in line] and [line for line in lines if "of all 3 texts are alike" in line]


def test_a_training_that_is_lost_names_step_records_and_state(tmp_path, trainable):
    rows = [{"image": "a.png", "captions": [f"a star {i}"]} for i in range(6)]
    captions(*rows)(tmp_path / "data")
    tokenizer = trainable.templates.tokenizer
    stream = joint_batches(trainable.templates, record_pairs(read_records(tmp_path / "data"), 3, tokenizer, 0))
    parameter = next(p for n, p in trainable.named_parameters() if p.requires_grad and "lora_B" in n)

    class Break(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.global_step == 2:
                parameter.data.fill_(float("inf"))

    with pytest.raises(InputError) as error:
        fit(Discriminative(trainable, ar_weight=0.0), stream, 5, keep=tmp_path / "state.ckpt", every=0.0, callbacks=[Break()])
    message = str(error.value)
    assert "before step 2: the loss is nan" in message and message.count("captions.jsonl, line") == 3 and f"of step 2, is {tmp_path / 'state.ckpt'}" in message
    assert all(torch.isfinite(v).all() for v in torch.load(tmp_path / "state.ckpt", weights_only=True)["state_dict"].values())


def test_a_full_disk_is_noticed_before_a_run(tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert main(["update", "--profile", "smoke", "--results", str(tmp_path / "results")]) == 2
    assert "0 MB are free, a run of profile smoke needs about 400" in capsys.readouterr().err and not (tmp_path / "results").exists()
    with pytest.raises(InputError, match="the state of this training needs"):
        fit(Big(), numbers, 3, keep=tmp_path / "state.ckpt")


class Big(Line):
    "A line with more parameters than the disk has room for."

    def __init__(self):
        super().__init__()
        self.more = torch.nn.Parameter(torch.zeros(10**4))


def test_a_picture_that_is_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match="a.png: cannot be read .it is a pipe"):
        open_image(tmp_path / "a.png")


def test_a_picture_of_a_gigabyte_is_not_read(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.write(b"RIFF\xff\xff\xff\x3fWEBPVP8 ")
        file.truncate(2**30)
    with pytest.raises(InputError, match="a.png: has 1,073,741,824 bytes; is this a picture"):
        open_image(tmp_path / "a.png")


def test_formats_that_start_programs_are_not_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="a.png: not a readable image .cannot identify"):
        open_image(tmp_path / "a.png")


def test_a_caption_over_a_picture_is_no_formula(tmp_path):
    figure = contact_sheet([("$a_$ \x1b[31m", [(Image.new("RGB", (9, 9)), "$b_$ \u202e")])])
    figure.savefig(tmp_path / "sheet.svg")
    assert "\u202e" not in (tmp_path / "sheet.svg").read_text(encoding="utf-8")
