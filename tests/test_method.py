"The method on a base of each family: invariances of the embedding, frozen weights, saving, determinism."
import numpy as np
import pytest
import torch

from lvlm_research.config import profile_of, set_threads
from lvlm_research.benchmarks import scene_suite
from lvlm_research.datasets import joint_batches, scene_pairs
from lvlm_research.embedder import DiscriminativeLVLM
from lvlm_research.evaluation import evaluate, load_embedder
from lvlm_research.fitting import fit
from lvlm_research.losses import info_nce, next_token_loss
from lvlm_research.scenes import long_caption, sample_scenes, scene_images, short_caption
from lvlm_research.training import Discriminative


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    scenes = sample_scenes(6, rng, "validation")
    return scene_images(scenes, 60), [short_caption(s, rng) for s in scenes], [long_caption(s, rng) for s in scenes]


@pytest.fixture(params=["zero-shot", "trained"])
def embedder(request, base, trainable):
    "The base, and a model whose soft prompts and LoRA are not at their starting point."
    if request.param == "zero-shot":
        return base
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return trainable.eval()


def test_info_nce_equals_numpy():
    rng = np.random.default_rng(1)
    v, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 7, 5)))
    e = np.exp(20 * v @ t.T)
    expected = np.mean([-np.log(e[k, k] / e[k].sum()) - np.log(e[k, k] / e[:, k].sum()) for k in range(7)])
    assert info_nce(torch.tensor(v), torch.tensor(t), 20.0).item() == pytest.approx(expected, rel=1e-5)


def test_next_token_loss_equals_numpy_over_the_whole_vocabulary(base, inputs):
    images, _, long = inputs
    batch = base.templates.image(images, long)
    states = base(batch, "image").detach()
    logits = base.model.lm_head(states).detach().double().numpy()
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    labels = batch.labels.numpy()
    expected = -np.mean([logp[b, i - 1, labels[b, i]] for b, i in np.argwhere(labels != -100)])
    assert next_token_loss(states, batch.labels, base.model.lm_head).item() == pytest.approx(expected, rel=1e-5)


def test_next_token_loss_is_that_of_the_transformers_model(base, inputs):
    images, _, long = inputs
    batch = base.templates.image(images, long)
    image_tokens = (batch.input_ids == base.model.config.image_token_id).int()  # of use to Qwen2-VL alone
    theirs = base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, mm_token_type_ids=image_tokens, labels=batch.labels, **batch.vision).loss
    assert base.embed_and_predict(batch)[1].item() == pytest.approx(theirs.item(), rel=1e-5)


def test_embedding_ignores_appended_captions_batch_mates_and_padding_side(embedder, inputs):
    images, short, long = inputs
    with torch.no_grad():
        image, text = (torch.cat([embedder.embed(make([x]), m) for x in xs]) for xs, make, m in
                       ((images, embedder.templates.image, "image"), (short, embedder.templates.text, "text")))
        for side in ("left", "right"):
            assert torch.allclose(embedder.embed(embedder.templates.image(images, long, side), "image"), image, atol=1e-5)
            assert torch.allclose(embedder.embed(embedder.templates.text(short, side), "text"), text, atol=1e-5)
    assert torch.allclose(embedder.encode_text(short[::-1], batch_size=4), text.flip(0), atol=1e-5)
    assert torch.allclose(embedder.encode_image(images, batch_size=5), image, atol=1e-5)


def test_hand_prompt_and_untrained_soft_prompt_are_the_same_model(base, trainable, inputs):
    images, short, _ = inputs
    assert torch.allclose(trainable.eval().encode_image(images), base.encode_image(images), atol=1e-5)
    assert torch.allclose(trainable.encode_text(short), base.encode_text(short), atol=1e-5)


def test_training_moves_what_it_should_and_freezes_the_rest(trainable):
    before = {name: p.clone() for name, p in trainable.named_parameters()}
    trained = {name for name, p in trainable.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n or n.startswith("soft_prompts") for n in trained)
    fit(Discriminative(trainable, ar_weight=1.0, lr=1e-3), joint_batches(trainable.templates, scene_pairs(8, 60, 0)), 3)
    for name, p in trainable.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trained), name


def test_round_trip_gives_equal_embeddings_and_saves_no_base(embedder, inputs, tmp_path):
    images, short, _ = inputs
    embedder.save_pretrained(tmp_path / "a")
    assert sum(f.stat().st_size for f in (tmp_path / "a").iterdir()) < 2e6
    again = DiscriminativeLVLM.from_pretrained(tmp_path / "a")
    assert torch.equal(again.encode_image(images), embedder.encode_image(images))
    assert torch.equal(again.encode_text(short), embedder.encode_text(short))


def test_adapter_off_generates_as_the_base(base, embedder, inputs):
    question = "what is at the top left?"
    assert embedder.generate(inputs[0][:3], question, max_new_tokens=8) == base.generate(inputs[0][:3], question, max_new_tokens=8)
    assert len(embedder.generate(inputs[0][:3], question, adapter=True, max_new_tokens=8)) == 3


def test_two_evaluations_are_byte_equal(base):
    set_threads()
    suite = [scene_suite(profile_of("smoke"), 60)[i] for i in (0, 4)]
    first, second = (evaluate(load_embedder(base.base), suite, 100, model="m").to_csv() for _ in range(2))
    assert first == second
