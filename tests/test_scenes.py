"Properties of the world: captions are true, negatives are false, splits do not leak."
import itertools
import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_research.pretraining import IMAGE_QUESTIONS, TEXT_INSTRUCTIONS
from lvlm_research.scenes import (HELD_OUT, NEGATIVE_TYPES, SYNONYMS, claim_with_negative, hard_negative, holds, long_caption, pair_items, paraphrase, render,
                                  sample_albums, sample_scenes, say, scene_codes, scene_images, short_claim, split_of, stated_facts, true_facts, winoground_items)

seeds = st.integers(0, 2**32 - 1)
splits = st.sampled_from(["train", "validation", "test", "novel"])
relaxed = settings(max_examples=150, deadline=None)

# A reader of short captions that shares nothing with the package but the meaning of the arrays.
WORDS = {"shape": "circle square triangle diamond cross star ring moon".split(), "colour": "red green blue yellow orange purple cyan pink".split(),
         "size": "small large".split(), "texture": "solid striped dotted".split()}
OTHER_WORDS = {"disc": "circle", "plus": "cross", "hoop": "ring", "crescent": "moon", "little": "small", "big": "large", "plain": "solid",
               "stripy": "striped", "spotted": "dotted", "crosses": "cross", "things": "thing"}
NUMBER_WORDS = ["zero", "one", "two", "three", "four"]


def objects_in(scene) -> list[dict]:
    found = []
    for cell in range(4):
        if scene.shape[0, cell] >= 0:
            found.append({name: words[getattr(scene, name)[0, cell]] for name, words in WORDS.items()} | {"row": cell // 2, "column": cell % 2})
    return found


def read_phrase(text: str) -> dict:
    "Attributes that a noun phrase states."
    stated = {}
    for word in text.replace("pluses", "plus").split():
        word = OTHER_WORDS.get(word, word)
        word = word if word in ("cross",) or not word.endswith("s") else OTHER_WORDS.get(word[:-1], word[:-1])
        stated |= {name: word for name, words in WORDS.items() if word in words}
    if place := re.search(r"at the (top|bottom) (left|right)", text):
        stated |= {"row": ("top", "bottom").index(place[1]), "column": ("left", "right").index(place[2])}
    return stated


def caption_is_true(caption: str, scene) -> bool:
    fits = lambda stated, thing: all(thing[k] == v for k, v in stated.items())
    objects = objects_in(scene)
    background = re.search(r" (?:on|in front of) a (white|grey|black) background", caption)
    if background:
        if scene.background[0] != ("white", "grey", "black").index(background[1]):
            return False
        caption = caption[: background.start()]
    counted = re.fullmatch(r"(?:a picture of |there (?:is|are) )?(\w+) (.+?)(?:, one of them| and one is) (an? .+)", caption)
    if counted and counted[1] in NUMBER_WORDS:
        group, one = read_phrase(counted[2]), read_phrase(counted[3])
        return sum(fits(group, o) for o in objects) == NUMBER_WORDS.index(counted[1]) and any(fits(one, o) for o in objects)
    related = re.split(r" (?:to the |on the )?(left of|right of|above|over|below|under) ", caption)
    first, relation, rest = related if len(related) == 3 else (None, None, caption)
    phrases = [read_phrase(p) for p in ([first] if first else []) + re.split(r", | and ", rest)]
    before = {"left of": lambda a, b: a["column"] < b["column"], "right of": lambda a, b: a["column"] > b["column"], "above": lambda a, b: a["row"] < b["row"],
              "over": lambda a, b: a["row"] < b["row"], "below": lambda a, b: a["row"] > b["row"], "under": lambda a, b: a["row"] > b["row"]}.get(relation)
    return any(all(map(fits, phrases, chosen)) and (before is None or before(*chosen[:2])) for chosen in itertools.permutations(objects, len(phrases)))


@relaxed
@given(seeds, splits)
def test_captions_are_true_by_an_independent_reading(seed, split):
    rng = np.random.default_rng(seed)
    scene, others = sample_scenes(1, rng, split), sample_scenes(20, rng, split)
    claim = short_claim(scene, rng)
    for said in (claim, paraphrase(claim)):
        caption = say(said, rng)
        assert caption_is_true(caption, scene), caption
        assert [caption_is_true(caption, o) for o in others] == holds(said, others).tolist(), caption


def test_benchmark_negatives_are_false_by_an_independent_reading():
    for kind in NEGATIVE_TYPES:
        for item in pair_items(60, kind, np.random.default_rng(3)):
            assert caption_is_true(item.caption, item.scene) and caption_is_true(item.paraphrase, item.scene), item.caption
            assert not caption_is_true(item.negative, item.scene), item.negative


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
    assert negative is not None or kind.startswith(("swap", "add", "replace_rel"))  # two like objects, or a full mention, allow none
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
    textures = "|".join(w for t in ("solid", "striped", "dotted") for w in SYNONYMS[t])
    for colour, shape in HELD_OUT:
        nouns = "|".join(SYNONYMS.get(shape, (shape,)))
        assert not re.search(rf"\b{colour} (?:(?:{textures}) )?(?:{nouns})", said), said


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


@relaxed
@given(seeds, splits, st.integers(1, 40))
def test_albums_share_shapes_and_colours_and_stay_in_their_split(seed, split, n):
    albums = sample_albums(n, np.random.default_rng(seed), split)
    assert len(albums) == n and set(split_of(albums)) == {split}
    for start in range(0, n, 8):
        scenes = [objects_in(scene) for scene in albums[slice(start, start + 8)]]
        for name in ("shape", "colour"):
            assert len({o[name] for objects in scenes for o in objects}) <= 3
            assert all(len({o[name] for o in objects}) == len(objects) for objects in scenes)  # none twice in a scene


@relaxed
@given(seeds, splits)
def test_triplets_for_training_on_texts(seed, split):
    rng = np.random.default_rng(seed)
    for scene in sample_albums(3, rng, split):
        claim, negative = claim_with_negative(scene, rng)
        assert [caption_is_true(say(c, rng), scene) for c in (claim, paraphrase(claim), negative)] == [True, True, False]
        assert split == "novel" or not any(m.held_out for m in negative.mentions)
