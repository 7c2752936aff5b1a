"""Scores against values made by hand: CLIP features, the scores of known features, and the metrics of a whole run."""

import json

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from helpers import CASTLE
from PIL import Image
from tiny import SIDE, one_core, train, write_tiny_base
from transformers import CLIPModel, CLIPTokenizer

from sd_atoms import load_atoms
from sd_atoms.evaluation.clip import ClipFeatures
from sd_atoms.evaluation.concept import mean_scores, score_concept
from sd_atoms.evaluation.metrics import diversity, mean_cosine, paired_cosine
from sd_atoms.sources import packaged_path

CLIP = packaged_path("pocket:clip")


class ByHand:
    """The packaged CLIP by transformers alone, its pictures made ready by numpy and PIL."""

    def __init__(self):
        self.model = CLIPModel.from_pretrained(CLIP).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(CLIP)
        self.ready = json.loads((CLIP / "preprocessor_config.json").read_text())

    def pixels(self, image):
        """(3, s, s): the shorter side resized to s, the middle cut out, and whitened by channel."""
        side = self.ready["size"]["shortest_edge"]
        width, height = image.size
        longer = int(side * max(width, height) / min(width, height))
        size = (side, longer) if width <= height else (longer, side)
        resized = np.asarray(image.convert("RGB").resize(size, Image.Resampling(self.ready["resample"])))
        top, left = (size[1] - side) // 2, (size[0] - side) // 2
        cut = resized[top : top + side, left : left + side] / 255
        return ((cut - self.ready["image_mean"]) / self.ready["image_std"]).transpose(2, 0, 1)

    @torch.no_grad()
    def of_images(self, images):
        """(N, d), one picture at a time."""
        found = []
        for image in images:
            features = self.model.get_image_features(torch.tensor(self.pixels(image)[None], dtype=torch.float32))
            found.append(getattr(features, "pooler_output", features)[0].double().numpy())  # transformers 4 and 5
        return np.stack([vector / np.linalg.norm(vector) for vector in found])

    @torch.no_grad()
    def of_texts(self, texts):
        """(N, d), one text at a time, unpadded: what the last token, the end of text, holds, projected."""
        found = []
        for text in texts:
            ids = self.tokenizer(text).input_ids
            ids = [*ids[:76], ids[-1]] if len(ids) > 77 else ids
            states = self.model.text_model(input_ids=torch.tensor([ids])).last_hidden_state
            found.append((states[0, -1] @ self.model.text_projection.weight.T).double().numpy())
        return np.stack([vector / np.linalg.norm(vector) for vector in found])


@pytest.fixture(scope="module", autouse=True)
def _one_core():
    with one_core():
        yield


@pytest.fixture(scope="module")
def by_hand():
    return ByHand()


@pytest.fixture(scope="module")
def ours():
    return ClipFeatures("pocket:clip")


def waves(width, height, number):
    """A picture with something else at every border and in every channel."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * (2 + number), y * 3 + x * number, (x * y) // (5 + number)], axis=2)
    return Image.fromarray(np.abs(pixels % 510 - 255).astype(np.uint8))


def test_clip_features_of_pictures(by_hand, ours):
    # wide, tall, square, small and of odd sides; more than one batch of them
    images = [
        waves(*size, number) for number, size in enumerate([(200, 150), (131, 257), (128, 128), (64, 80), (33, 33)])
    ]
    features = ours.of_images(images, batch=2)
    np.testing.assert_allclose(features.numpy(), by_hand.of_images(images), atol=2e-5)
    # and these would not pass for one another
    assert (features @ features.T - torch.eye(5)).max() < 0.99


def test_clip_features_of_texts(by_hand, ours):
    texts = ["a castle", "photo of a castle by a lake at night, in snow.", "a barn", "", "canal " * 90 + "castle"]
    features = ours.of_texts(texts)
    np.testing.assert_allclose(features.numpy(), by_hand.of_texts(texts), atol=2e-5)
    assert (features @ features.T - torch.eye(5)).max() < 0.999


class Known:
    """A judge whose features are known: a picture's by the number that is its colour, a text's by its words."""

    def __init__(self, pictures, texts):
        self.pictures, self.texts = pictures, texts

    def of_images(self, images):
        return torch.tensor([self.pictures[image.getpixel((0, 0))[0]] for image in images])

    def of_texts(self, texts):
        return torch.tensor([self.texts[text] for text in texts])


PHOTOS = [(1.0, 0.0), (0.0, 1.0)]
PICTURES = {
    "instance": [(0.6, 0.8), (0.8, 0.6)],
    "base-instance": [(1.0, 0.0), (-0.6, 0.8), (0.0, 1.0)],
    "prompt": [(0.8, 0.6), (1.0, 0.0), (0.0, -1.0)],
    "base-prompt": [(0.0, 1.0), (0.6, 0.8), (1.0, 0.0)],
}
TEXTS = {"one": (1.0, 0.0), "two": (0.0, 1.0), "three": (0.6, -0.8)}
SCORES = {
    "adapted": {
        "image": 0.7,  # (0.6 + 0.8 + 0.8 + 0.6) / 4
        "diversity": 0.04,  # 1 − 0.96
        "text": 0.5333,  # (0.8 + 0 + 0.8) / 3
        "match": 0.6667,  # the second picture is nearest to "one"; of "one" it is the nearest, too
    },
    "base": {
        "image": 0.3667,  # (1 + 0 − 0.6 + 0.8 + 0 + 1) / 6
        "diversity": 0.9333,  # (1.6 + 1 + 0.2) / 3
        "text": 0.4667,  # (0 + 0.8 + 0.6) / 3
        "match": 0.3333,  # the first is nearer to "two", the last to "one"
    },
}


def scored(kinds, texts):
    features, drawn = list(PHOTOS), {}
    photos = [Image.new("RGB", (1, 1), (number, 0, 0)) for number in range(len(PHOTOS))]
    for kind in kinds:
        numbers = range(len(features), len(features) + len(PICTURES[kind]))
        drawn[kind] = [Image.new("RGB", (1, 1), (number, 0, 0)) for number in numbers]
        features += PICTURES[kind]
    return score_concept(Known(features, TEXTS), photos, drawn, texts)


def test_scores_of_known_features():
    assert scored(PICTURES, list(TEXTS)) == SCORES


def test_scores_without_templates_are_of_the_instance_pictures_alone():
    expected = {who: {key: own[key] for key in ("image", "diversity")} for who, own in SCORES.items()}
    assert scored(["instance", "base-instance"], []) == expected


def test_a_single_prompt_has_no_share_of_right_ones(monkeypatch):
    for kind in ("prompt", "base-prompt"):
        monkeypatch.setitem(PICTURES, kind, PICTURES[kind][:1])
    scores = scored(PICTURES, ["one"])
    assert [set(own) for own in scores.values()] == [{"image", "diversity", "text"}] * 2


def test_several_concepts_are_averaged_each_score_by_itself():
    other = {
        "adapted": {"image": 0.1, "diversity": 0.2, "text": 0.3, "match": 0.0},
        "base": {"image": -0.2, "diversity": 0.9, "text": 0.5, "match": 1.0},
    }
    assert mean_scores([SCORES]) == SCORES
    assert mean_scores([SCORES, other, other]) == {
        "adapted": {"image": 0.3, "diversity": 0.1467, "text": 0.3778, "match": 0.2222},
        "base": {"image": -0.0111, "diversity": 0.9111, "text": 0.4889, "match": 0.7778},
    }


TEMPLATES = ["a {} in snow", "photo of a {} at night", "a lake and a {}"]
CONCEPTS = {"castle": "castle", "canal": "street"}  # name -> the word that its token starts from


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run with two concepts on the tiny base, whose square photos need no cropping."""
    folder = tmp_path_factory.mktemp("scores")
    write_tiny_base(folder / "tiny")
    (folder / "prompts.txt").write_text("\n".join(TEMPLATES))
    concepts = []
    for number, (name, word) in enumerate(CONCEPTS.items()):
        (folder / name).mkdir()
        for photo in range(2):
            waves(SIDE, SIDE, 3 * number + photo).save(folder / name / f"{photo}.png")
        concepts.append(
            dict(
                instance_data_dir=str(folder / name),
                instance_prompt=f"photo of a <{name}>.",
                placeholder_token=f"<{name}>",
                initializer_token=word,
            )
        )
    settings = dict.fromkeys(CASTLE) | dict(
        pretrained_model_name_or_path=str(folder / "tiny"), concepts=concepts, train_token_embedding=True,
        max_train_steps=6, learning_rate=0.1, lr_warmup_steps=0, token_learning_rate=0.1, train_batch_size=1,
        num_instance_images=3, num_inference_steps=3, guidance_scale=3.0, prompts_file=str(folder / "prompts.txt"),
        clip_model_name_or_path="pocket:clip", report_to="none", output_dir=str(folder / "run"),
    )  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    train(["--config", str(folder / "run.yaml")])
    return folder


def read(paths):
    return [Image.open(path).convert("RGB") for path in sorted(paths)]


def test_the_metrics_of_a_run_are_those_of_the_pictures_in_its_folder(finished, by_hand):
    metrics = json.loads((finished / "run" / "metrics.json").read_text())
    assert set(metrics["clip_by_concept"]) == set(CONCEPTS)
    expected = {}
    for name, word in CONCEPTS.items():
        photos = by_hand.of_images(read((finished / name).iterdir()))
        texts = by_hand.of_texts([template.replace("{}", word) for template in TEMPLATES])
        for who, kind in (("adapted", ""), ("base", "base-")):
            images = (finished / "run" / "images").glob
            instance = by_hand.of_images(read(images(f"{name}-{kind}instance-*.png")))
            prompt = by_hand.of_images(read(images(f"{name}-{kind}prompt-*.png")))
            assert (len(instance), len(prompt)) == (3, 3)
            pairs = [1 - instance[i] @ instance[j] for i in range(3) for j in range(3) if i != j]
            best = [max(range(3), key=lambda n, own=own: own @ texts[n]) for own in prompt]
            expected.setdefault(name, {})[who] = {
                "image": np.mean([own @ photo for own in instance for photo in photos]),
                "diversity": np.mean(pairs),
                "text": np.mean([own @ text for own, text in zip(prompt, texts, strict=True)]),
                "match": np.mean([own == number for number, own in enumerate(best)]),
            }
    for who in ("adapted", "base"):
        for name in CONCEPTS:
            assert metrics["clip_by_concept"][name][who] == pytest.approx(expected[name][who], abs=1e-4)
        mean = {key: np.mean([expected[name][who][key] for name in CONCEPTS]) for key in expected["castle"][who]}
        assert metrics["clip"][who] == pytest.approx(mean, abs=1e-4)
    # neither adapter and base nor the two concepts would pass for one another
    found = [expected[name][who]["image"] for name in CONCEPTS for who in ("adapted", "base")]
    assert np.diff(sorted(found)).min() > 1e-3, found


def test_the_pictures_in_the_folder_of_a_run_are_the_adapters_and_the_bases(finished):
    pipe = StableDiffusionPipeline.from_pretrained(finished / "tiny")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    def drawn(prompt, seed):
        generator = torch.Generator().manual_seed(seed)
        image = pipe(prompt, num_inference_steps=3, guidance_scale=3.0, generator=generator).images[0]
        return np.asarray(image, dtype=int)

    def apart(name, prompt, seed):
        return np.abs(drawn(prompt, seed) - np.asarray(read([finished / "run" / "images" / name])[0])).max()

    assert apart("castle-base-instance-02.png", "photo of a castle.", 2) <= 1
    assert apart("canal-base-prompt-01.png", "photo of a street at night", 1) <= 1
    load_atoms(pipe, finished / "run" / "castle_canal.safetensors")
    assert apart("castle-instance-02.png", "photo of a <castle>.", 2) <= 1
    assert apart("canal-prompt-01.png", "photo of a <canal> at night", 1) <= 1
    assert apart("castle-base-instance-02.png", "photo of a <castle>.", 2) > 10


def test_features_and_scores_of_the_same_pictures_agree_on_one_and_two_threads():
    draws, found, before = np.random.default_rng(0), [], torch.get_num_threads()
    images = [Image.fromarray(draws.integers(0, 256, (96, 96, 3), dtype=np.uint8)) for _ in range(5)]
    texts, scorer = ["a castle by a lake", "photo of a tower", "a house"], ClipFeatures("pocket:clip")
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            features = scorer.of_images(images)
            scores = [
                mean_cosine(features, features),
                diversity(features),
                paired_cosine(features[:3], scorer.of_texts(texts)),
            ]
            found.append((features, scorer.of_texts(texts), torch.tensor(scores)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert (one - two).norm() <= 1e-6 * two.norm()
