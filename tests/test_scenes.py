"Properties of the world: captions are true, negatives are false, splits do not leak."
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_research.pretraining import IMAGE_QUESTIONS, TEXT_INSTRUCTIONS
from lvlm_research.scenes import (HELD_OUT, NEGATIVE_TYPES, SYNONYMS, hard_negative, holds, long_caption, pair_items, paraphrase, render, sample_scenes,
                                  say, scene_codes, scene_images, short_claim, split_of, stated_facts, true_facts, winoground_items)

seeds = st.integers(0, 2**32 - 1)
splits = st.sampled_from(["train", "validation", "test", "novel"])
relaxed = settings(max_examples=150, deadline=None)


@relaxed
@given(seeds, splits)
def test_short_claims_and_paraphrases_are_true(seed, split):
    rng = np.random.default_rng(seed)
    scene = sample_scenes(1, rng, split)
    claim = short_claim(scene, rng)
    assert holds(claim, scene)[0] and holds(paraphrase(claim), scene)[0]
    assert say(claim, rng)


@relaxed
@given(seeds, st.sampled_from(["train", "test", "novel"]))
def test_a_paraphrase_says_the_same_of_every_scene(seed, split):
    rng = np.random.default_rng(seed)
    claim, others = short_claim(sample_scenes(1, rng, split), rng), sample_scenes(60, rng, split)
    assert np.array_equal(holds(claim, others), holds(paraphrase(claim), others))


@relaxed
@given(seeds, st.sampled_from(NEGATIVE_TYPES), st.sampled_from(["train", "test"]))
def test_hard_negatives_are_false_and_differ_in_words(seed, kind, split):
    rng = np.random.default_rng(seed)
    scene = sample_scenes(1, rng, split, counts=(2, 3, 4))
    claim = short_claim(scene, rng, "relation")
    negative = hard_negative(kind, claim, scene, rng)
    if negative is not None:
        assert not holds(negative, scene)[0]
        assert not any(m.held_out for m in negative.mentions)
        assert say(claim, np.random.default_rng(seed)) != say(negative, np.random.default_rng(seed))


@relaxed
@given(seeds, splits)
def test_long_captions_state_all_facts_and_only_facts(seed, split):
    rng = np.random.default_rng(seed)
    scene = sample_scenes(1, rng, split)
    assert set(stated_facts(long_caption(scene, rng))) == true_facts(scene)


@relaxed
@given(seeds)
def test_training_text_never_names_a_held_out_combination(seed):
    rng = np.random.default_rng(seed)
    scene = sample_scenes(1, rng)
    turns = [ask(scene, rng) for ask in (*IMAGE_QUESTIONS, *TEXT_INSTRUCTIONS)]
    said = " | ".join(f"{t.question} {t.answer}" for t in turns)
    for colour, shape in HELD_OUT:
        for noun in SYNONYMS.get(shape, (shape,)):
            assert f" {colour} {noun}" not in said


def test_splits_are_disjoint_and_only_novel_holds_novel_combinations():
    drawn = {s: sample_scenes(4000, np.random.default_rng(i), s) for i, s in enumerate(("train", "validation", "test", "novel"))}
    codes = {s: set(scene_codes(x).tolist()) for s, x in drawn.items()}
    for name, scenes in drawn.items():
        assert set(split_of(scenes)) == {name}
        assert not any(codes[name] & codes[other] for other in codes if other != name)


def test_items_of_every_type_are_true_and_false_as_they_say():
    for kind in NEGATIVE_TYPES:
        items = pair_items(40, kind, np.random.default_rng(0))
        assert {split_of(i.scene)[0] for i in items} == {"test"}
        assert len({(i.caption, i.negative) for i in items}) > 30
        lengths = [len(i.negative.split()) - len(i.caption.split()) for i in items]
        if kind.startswith(("swap", "replace_obj")):  # the same number of words, so that length tells nothing
            assert set(lengths) == {0}


def test_winoground_captions_have_the_same_words():
    for item in winoground_items(40, np.random.default_rng(0)):
        first, second = (sorted(c.replace(" an ", " a ").removeprefix("an ").removeprefix("a ").split()) for c in item.captions)
        assert [w for w in first if w not in ("a", "an")] == [w for w in second if w not in ("a", "an")]


def test_rendering_is_a_pure_function_of_the_scene():
    scenes = sample_scenes(32, np.random.default_rng(0))
    assert np.array_equal(scene_images(scenes, 60)[7], scene_images(scenes[7:8], 60)[0])
    pixels = render(scenes, 64)
    assert pixels.shape == (32, 3, 64, 64) and 0 <= pixels.min() and pixels.max() <= 1
