"Lists of captions and pictures to vectors, and vectors to recall: what is done once instead of often changes neither, and leaves the model as it was."
import threading
import time
from dataclasses import replace
from math import comb

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from lvlm_research import fused
from lvlm_research.backbones import world_tokenizer
from lvlm_research.config import InputError
from lvlm_research.embedder import KEPT_FROM, DiscriminativeLVLM, in_threads
from lvlm_research.levers import PLAIN
from lvlm_research.metrics import retrieval_hits
from lvlm_research.rivals import FAMILIES, as_if_in_training, made_pairs, proportioned
from lvlm_research.zoo import MROPE, QWEN_VISION, _text, micro_family


# ---- recall


def drawn(images: int = 60, captions: int = 200) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    "Vectors of whole numbers, whose similarities are exact and often equal; captions in no order, one to many of an image."
    rng = np.random.default_rng(0)
    number = rng.permutation(np.r_[np.arange(images), rng.integers(0, images // 3, captions - images)])
    image = rng.choice([-1.0, 1.0], (images, 8))
    text = image[number] * rng.choice([-1.0, 1.0], (captions, 8), p=[0.25, 0.75])
    return torch.tensor(image, dtype=torch.float32), torch.tensor(text, dtype=torch.float32), number


def by_hand(scores: np.ndarray, relevant: np.ndarray, k: int) -> list[float]:
    "Of every query, the share of the orders of its tie in which a relevant candidate is among the first k."
    found = []
    for s, r in zip(scores, relevant):
        best = s[r].max()
        slots, tied, wrong = max(0, k - (s > best).sum()), (s == best).sum(), ((s == best) & ~r).sum()
        found.append(1.0 if slots >= tied else 1 - comb(wrong, slots) / comb(tied, slots))
    return found


def check(hits: dict, image: torch.Tensor, text: torch.Tensor, number: np.ndarray) -> None:
    scores, relevant = (text @ image.T).numpy(), number[:, None] == np.arange(len(image))
    for k in (1, 5, 10):
        assert np.allclose(hits["t2i"][k], by_hand(scores, relevant, k), atol=1e-12)
        assert np.allclose(hits["i2t"][k], by_hand(scores.T, relevant.T, k), atol=1e-12)


@pytest.mark.parametrize("entries", [1, 500, 2**20])
def test_recall_is_the_share_of_tie_breaks_in_blocks_of_any_size(entries):
    vectors = drawn()
    hits = retrieval_hits(*vectors, entries=entries)
    check(hits, *vectors)
    assert any(0 < hit < 1 for hit in hits["t2i"][1]) and any(0 < hit < 1 for hit in hits["i2t"][1])


def test_recall_of_vectors_that_are_all_alike_is_chance():
    hits = retrieval_hits(F.normalize(torch.ones(50, 7), dim=1), F.normalize(torch.ones(250, 7), dim=1), np.arange(250) % 50)
    assert hits["t2i"][10].mean() == pytest.approx(10 / 50) and hits["i2t"][1].mean() == pytest.approx(5 / 250)


class Largest(TorchDispatchMode):
    "Entries of the largest tensor that is made."

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            self.entries = max(self.entries, tensor.numel() if torch.is_tensor(tensor) else 0)
        return made


def test_no_matrix_of_all_similarities_is_made():
    image, text, number = drawn(300, 1000)
    with Largest() as largest:
        retrieval_hits(image, text, number, entries=9000)
    assert 9000 / 2 < largest.entries <= 9000 < len(image) * len(text) / 30


class RoundsByShape(TorchFunctionMode):
    "A machine whose small products differ from its large ones in the last bits."

    def __init__(self, columns: int):
        super().__init__()
        self.columns, self.small = columns, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        if getattr(function, "__name__", "") in ("matmul", "__matmul__") and made.shape[1] < self.columns:
            self.small += 1
            return made * (1 + 2**-20)
        return made


def test_recall_does_not_depend_on_how_a_machine_rounds():
    image, text, number = drawn()
    with RoundsByShape(len(image)) as machine:
        hits = retrieval_hits(image, text, number, entries=500)
    assert machine.small
    check(hits, image, text, number)


def test_an_image_without_a_caption_is_named():
    image, text, number = drawn()
    with pytest.raises(ValueError, match="image 60 has no caption"):
        retrieval_hits(torch.cat([image, image[:1]]), text, number)


# ---- encoding


@pytest.fixture(scope="module", params=FAMILIES)
def lvlm(request):
    "With LoRA, some of it on wide layers, that is not at its starting point."
    torch.manual_seed(0)
    return as_if_in_training(proportioned(request.param)).eval()


@pytest.fixture(scope="module")
def inputs():
    pairs = made_pairs(70)
    return [p.short for p in pairs], [p.image for p in pairs]


@pytest.fixture(scope="module")
def expected(lvlm, inputs):
    "A few at a time, so that nothing is kept, and with no lever."
    texts, pictures = inputs
    assert 10 < KEPT_FROM < len(texts)
    lvlm.levers = PLAIN
    found = [torch.cat([encode(items[s : s + 10]) for s in range(0, len(items), 10)]) for encode, items in ((lvlm.encode_text, texts), (lvlm.encode_image, pictures))]
    lvlm.levers = type(PLAIN)()
    return found


class Seen:
    "Shapes that reach the first decoder layer, and calls of LoRA layers in which the update is not in the weight."

    def __init__(self, lvlm):
        self.shapes, self.adapters = [], 0
        layer = lvlm.model.get_decoder().layers[0]
        hooks = [layer.register_forward_pre_hook(lambda m, args, kwargs: self.shapes.append((args[0] if args else kwargs["hidden_states"]).shape[:2]), with_kwargs=True)]
        hooks += [m.register_forward_hook(self._count) for m in lvlm.model.modules() if isinstance(m, LoraLinear)]
        self.hooks = hooks

    def _count(self, layer, *_):
        self.adapters += "forward" not in vars(layer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def test_long_lists_have_the_embeddings_of_short_ones(lvlm, inputs, expected):
    weights = {name: p.clone() for name, p in lvlm.named_parameters()}
    for encode, items, wanted in zip((lvlm.encode_text, lvlm.encode_image), inputs, expected):
        with Seen(lvlm) as seen:
            found = encode(items, batch_size=30)
        assert torch.allclose(found, wanted, atol=1e-5)
        assert seen.adapters == 0  # LoRA is in the weights
        assert max(rows * tokens for rows, tokens in seen.shapes) <= lvlm.levers.pass_tokens
        before = [shape for shape in seen.shapes if shape == (1, 14)]
        assert len(before) == (lvlm.model.config.model_type == "qwen2_vl")  # 14 tokens, once a list; LLaVA's one token is not worth it
    assert lvlm.kept is None and all(torch.equal(p, weights[name]) for name, p in lvlm.named_parameters())
    with Seen(lvlm) as seen:
        lvlm.encode_text(inputs[0][:3])
    assert seen.adapters > 0  # a short list does not pay for the sums


def test_weights_that_would_not_fit_twice_are_not_added_up(lvlm, inputs, expected, monkeypatch):
    monkeypatch.setattr(fused, "FOLDED_BYTES", 2**20)
    with Seen(lvlm) as seen:
        assert torch.allclose(lvlm.encode_text(inputs[0]), expected[0], atol=1e-5)
    assert seen.adapters > 0


def test_a_list_that_ends_in_an_error_leaves_the_model_as_it_was(lvlm, inputs, expected):
    texts, pictures = inputs
    threads = threading.active_count()
    with pytest.raises(InputError, match=f"picture {len(pictures)}: not a readable image"):
        lvlm.encode_image([*pictures, b"no picture", *pictures[::-1]], batch_size=8)
    assert threading.active_count() == threads and lvlm.kept is None and not any("forward" in vars(m) for m in lvlm.model.modules())
    assert torch.allclose(lvlm.encode_text(texts[:5]), expected[0][:5], atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_training_is_cut_into_passes_only_where_that_pads_nothing(lvlm, inputs, packed):
    batch, levers = lvlm.templates.text(inputs[0]), lvlm.levers
    with Seen(lvlm) as seen:
        lvlm.levers = replace(levers, pass_tokens=64, packed_tokens=256, packed=packed)
        lvlm.embed(batch, "text")
    lvlm.levers = levers
    assert (max(rows * tokens for rows, tokens in seen.shapes) <= 256) == packed


def test_threads_keep_the_order_and_end_with_the_first_error():
    threads, begun = threading.active_count(), []
    assert in_threads(lambda a, b: a - b, range(100), range(0, 200, 2)) == [-i for i in range(100)]

    def step(i: int) -> None:
        begun.append(i)
        time.sleep(0.002)
        if i in (5, 7):
            raise InputError(f"number {i}")

    with pytest.raises(InputError, match="number 5"):
        in_threads(step, range(2000))
    assert threading.active_count() == threads and len(begun) < 2000


def test_a_recurrent_language_model_embeds_a_list_as_its_captions_alone(tmp_path):
    "Qwen 3.5 is none of the tested families: half its layers keep a state in place of keys and values, from which other rows cannot go on."
    torch.manual_seed(0)
    model, processor = micro_family("qwen3_vl", world_tokenizer())
    text = dict(rope_parameters=MROPE | {"partial_rotary_factor": 1.0}, head_dim=8, layer_types=["linear_attention", "full_attention"],
                linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
    tokens = {name: value for name, value in model.config.to_dict().items() if name.endswith("_token_id")}
    config = Qwen3_5Config(text_config=_text(processor.tokenizer, **text), vision_config=QWEN_VISION | dict(num_position_embeddings=64), **tokens)
    for part in (Qwen3_5ForConditionalGeneration(config), processor):
        part.save_pretrained(tmp_path)
    lvlm, captions = DiscriminativeLVLM.from_pretrained(tmp_path), ["a" + " star" * length for length in range(KEPT_FROM + 4)]
    assert torch.allclose(lvlm.encode_text(captions), torch.stack([lvlm.encode_text(caption) for caption in captions]), atol=1e-5)
