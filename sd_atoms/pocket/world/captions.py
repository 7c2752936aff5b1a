"""English captions for scenes: many phrasings of one scene, some leaving attributes out.

In the templates {subject} is the landmark with its article, {noun} without, {sentence} the subject with its
setting or companion, {rest} what the sentence says apart from the subject.
"""

import random

from sd_atoms.pocket.world.scenes import Scene

SETTING_TEMPLATES: dict[str, tuple[str, ...]] = {
    "mountains": (
        "{subject} stands against a backdrop of snow-capped mountains",
        "{subject} against snow-capped mountains",
        "{subject} in front of snow-capped mountains",
        "{subject} with snowy mountains in the background",
    ),
    "forest": (
        "{subject} surrounded by a lush, vibrant forest",
        "{subject} in a lush green forest",
        "{subject} in the middle of a vibrant forest",
        "{subject} among green trees",
    ),
    "lake": (
        "{subject} overlooks a serene lake",
        "{subject} by a serene lake",
        "{subject} reflected in a calm lake",
        "{subject} on the shore of a lake",
    ),
    "autumn": (
        "{subject} in the autumn season with colorful foliage",
        "{subject} in autumn",
        "{subject} surrounded by colorful autumn foliage",
        "{subject} among orange autumn trees",
    ),
    "cliff": (
        "{subject} on a rocky cliff, with crashing waves below",
        "{subject} on a rocky cliff",
        "{subject} on a cliff above the sea",
        "{subject} above crashing waves",
    ),
    "sheepfield": (
        "{subject} surrounded by a field of grazing sheep",
        "{subject} in a field of grazing sheep",
        "{subject} behind a field with sheep",
        "sheep grazing in front of {subject}",
    ),
    "desert": (
        "{subject} in the desert",
        "{subject} in a sandy desert with cactus",
        "{subject} among desert dunes",
    ),
    "beach": ("{subject} on the beach", "{subject} on a sandy beach with a palm tree", "{subject} by the sea"),
    "city": ("{subject} in the city", "{subject} on a city street", "{subject} in front of city buildings"),
    "night": ("{subject} at night", "{subject} under a starry night sky", "{subject} under the moon and stars"),
    "otherworld": (
        "{subject} is surrounded by an otherworldly landscape, with glowing mushrooms and mystical creatures",
        "{subject} in an otherworldly landscape",
        "{subject} with glowing mushrooms and mystical creatures",
        "{subject} among glowing mushrooms",
    ),
    "island": (
        "{subject} atop a mystical floating island",
        "{subject} on a floating island",
        "{subject} on a mystical island floating in the sky",
    ),
    "snow": (
        "{subject} in the snow",
        "{subject} in winter",
        "{subject} covered by a snowy winter landscape",
    ),
    "plain": ("{subject}", "{subject} under the sky", "{subject} on the grass"),
}

COMPANION_TEMPLATES: dict[str, tuple[str, ...]] = {
    "peacock": ("a peacock in front of {subject}", "a peacock standing before {subject}"),
    "geese": ("a family of geese in front of {subject}", "geese near {subject}"),
    "boat": ("a boat in front of {subject}", "a sailing boat near {subject}"),
    "elves": (
        "{subject} guarded by mythical elves",
        "mythical elves in front of {subject}",
        "elves guarding {subject}",
    ),
    "tree": ("a tree next to {subject}", "a big tree beside {subject}"),
    "sheep": ("sheep in front of {subject}", "grazing sheep near {subject}"),
    "balloon": ("a hot air balloon over {subject}", "a balloon flying above {subject}"),
}

COMPANION_TAILS: dict[str, str] = {
    "peacock": ", with a peacock in front",
    "geese": ", with a family of geese",
    "boat": ", with a boat",
    "elves": ", guarded by mythical elves",
    "tree": ", with a tree",
    "sheep": ", with grazing sheep",
    "balloon": ", with a hot air balloon",
}

SPECIAL_TEMPLATES: dict[str, tuple[str, ...]] = {
    "oil": (
        "{sentence}, oil painting ghibli inspired",
        "oil painting of {sentence}",
        "{sentence}, oil painting",
        "an oil painting of {sentence}, ghibli inspired",
    ),
    "watercolor": (
        "a watercolor painting of {sentence}",
        "{sentence}, watercolor painting",
        "watercolor of {sentence}",
    ),
    "monet": (
        "{sentence} painting by artist claude monet",
        "{sentence}, painting by claude monet",
        "a claude monet painting of {sentence}",
        "impressionist painting of {sentence} by claude monet",
    ),
    "lowpoly": (
        "{sentence} digital painting 3d render geometric style",
        "{sentence}, 3d render geometric style",
        "a geometric 3d render of {sentence}",
        "digital painting of {sentence}, 3d render",
    ),
    "okeeffe": (
        "georgia o'keeffe style {noun} painting",
        "{sentence}, georgia o'keeffe style painting",
        "a georgia o'keeffe style painting of {sentence}",
    ),
    "sketch": ("a pencil sketch of {sentence}", "{sentence}, pencil drawing", "pencil sketch, {sentence}"),
    "crystal": (
        "{subject}, made of crystal, shimmers in the sunlight",
        "{subject} made of crystal",
        "a crystal {noun}",
        "{subject} made of crystal, {rest}",
    ),
    "steampunk": (
        "{subject}, steampunk aesthetic, adorned with gears and metallic accents",
        "{subject}, steampunk aesthetic",
        "a steampunk {noun} with gears",
        "{subject} adorned with gears and metallic accents, {rest}",
    ),
    "top": ("top view of {subject}", "a top view of {subject}", "{subject} seen from above", "{subject}, top view"),
    "none": ("photo of {sentence}", "a photo of {sentence}", "{sentence}", "{sentence}", "{sentence}"),
}

OWN_COLOURED = ("lighthouse", "barn")  # their walls do not take the scene's colour, so captions never name it


def caption(scene: Scene, rng: random.Random) -> str:
    """One of many English descriptions of a scene. The order of the draws is part of the world."""
    noun = scene.landmark
    if scene.colour and noun not in OWN_COLOURED and rng.random() < 0.45:
        noun = f"{scene.colour} {noun}"
    with_article = ("an " if noun[0] in "aeiou" else "a ") + noun
    subject = rng.choice([with_article, with_article, f"the {noun}", f"the {noun}", noun])
    sentence = _sentence(scene, subject, rng)
    if scene.special not in ("crystal", "steampunk", "top", "none") and rng.random() >= 0.97:
        text = sentence  # now and then the style goes without saying
    else:
        rest = sentence.replace(subject, "", 1).strip(" ,") or "in the sunlight"
        template = rng.choice(SPECIAL_TEMPLATES[scene.special])
        text = template.format(subject=subject, noun=noun, sentence=sentence, rest=rest)
    text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.6 else "")


def _sentence(scene: Scene, subject: str, rng: random.Random) -> str:
    """The subject with its setting, its companion, both or neither."""
    names_setting = rng.random() < (0.82 if scene.special == "none" else 0.45) and scene.setting != "plain"
    names_companion = scene.companion is not None and rng.random() < 0.92
    if names_setting or scene.setting == "plain":
        templates = SETTING_TEMPLATES[scene.setting]
    else:
        templates = ("{subject}",)
    clause = rng.choice(templates).format(subject=subject)
    if not names_companion:
        return clause
    if names_setting and scene.setting == "lake" and scene.companion == "geese" and rng.random() < 0.6:
        return f"{clause}, where a family of geese swims"
    if names_setting and rng.random() < 0.7:
        return clause + COMPANION_TAILS[scene.companion]
    return rng.choice(COMPANION_TEMPLATES[scene.companion]).format(subject=subject)
