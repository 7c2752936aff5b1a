"""Every prompt of a run, and how the base's tokenizer reads it and the new words."""

import copy
from collections.abc import Iterable, Mapping, Sequence

from sd_atoms.data.concepts import Source, concept_prompts, image_prompts
from sd_atoms.data.config import Concept
from sd_atoms.data.prompts import cut_prompt, fill, load_templates
from sd_atoms.doctor.findings import Finding, raised
from sd_atoms.errors import UserError, plural, shortlist
from sd_atoms.pipeline.tokens import check_new_token
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.dataset import class_prompts

MOST_LONG_PROMPTS = 3  # listed one by one


def run_prompts(config: TrainConfig, sources: Sequence[Source]) -> tuple[dict[str, str], list[Finding]]:
    """Every prompt of a run and the setting or picture it comes from; errors about files of prompts."""
    prompts: dict[str, str] = {}
    findings = []
    images_of = {source.concept: source for source in sources}

    def add(where: str, texts: Iterable[str]) -> None:
        for text in texts:
            prompts.setdefault(text, where)

    def gather(concept: Concept) -> None:
        where = concept.instance_prompts_file or "instance_prompt"
        if concept not in images_of:
            add(where, concept_prompts(concept))
            return
        source = images_of[concept]
        for image, own in zip(source.images, image_prompts(source), strict=True):
            add(where if image.caption is None else f"caption of {image.name}", own)
        findings.extend(captions_without(source))

    for concept in config.all_concepts:
        add("instance_prompt", [concept.instance_prompt])
        findings += raised(lambda concept=concept: gather(concept), "instance_prompts_file")
        if config.prior.prior != "none":
            where = config.prior.class_prompts_file or "class_prompt"
            findings += raised(
                lambda concept=concept, where=where: add(where, class_prompts(config.prior, concept)),
                "class_prompts_file",
            )
        add(config.images.prompts_file, [fill(template, concept.word) for template in templates(config)])
    if config.images.prompts_file:
        findings += raised(lambda: load_templates(config.images.prompts_file), "prompts_file")
    if config.validation.validation_prompt:
        add("validation_prompt", [config.validation.validation_prompt])
    return prompts, findings


def captions_without(source: Source) -> list[Finding]:
    """A warning that names the pictures whose own captions lack a placeholder that others have."""
    named = [
        [image.name for image, own in zip(source.images, image_prompts(source), strict=True)
         if image.caption is not None and token not in own[0]]
        for token in source.concept.tokens
    ]  # fmt: skip
    return [
        Finding("warning", "captions", f"{token} is not in {plural(len(names), 'caption')}: of {shortlist(names)}",
                f"write {token} or {{}} there, unless the pictures do not show it")
        for token, names in zip(source.concept.tokens, named, strict=True)
        if names
    ]  # fmt: skip


def templates(config: TrainConfig) -> list[str]:
    """The templates of prompts_file; none where they cannot be read, which `run_prompts` reports."""
    try:
        return load_templates(config.images.prompts_file) if config.images.prompts_file else []
    except UserError:
        return []


def braces(prompts: Mapping[str, str], concepts: Sequence[Concept]) -> list[Finding]:
    """An error for each prompt with a brace too many, a warning for each {} that nothing will fill."""
    findings = []
    for text, where in prompts.items():
        rest = text
        for concept in concepts:
            for token in concept.tokens:
                rest = rest.replace(token, "")
        depth = lowest = 0
        for letter in rest:
            depth += (letter == "{") - (letter == "}")
            lowest = min(lowest, depth)
        if depth or lowest < 0:
            findings.append(Finding("error", where, f"{text!r} has a brace without its other half", "remove it"))
        elif "{}" in rest:
            word = next((concept.word for concept in concepts if concept.word), "the word itself")
            text = f"{text!r} is no template: {{}} stays as it is"
            findings.append(Finding("warning", where, text, f"write {word} in its place"))
    return findings


def new_words(config: TrainConfig, pipe, prompts: Mapping[str, str]) -> list[Finding]:
    """What is wrong with placeholder tokens, initialisers and the lengths of prompts, as the base reads them."""
    words = config.tokens
    refused = {word: raised(lambda word=word: check_new_token(pipe, word), word) for word in words}
    findings = [finding for found in refused.values() for finding in found]
    words = [word for word in words if not refused[word]]
    for word in dict.fromkeys(word for concept in config.all_concepts for word in concept.initializers):
        findings += initializer(pipe.tokenizer, word)
    tokenizer = with_words(pipe.tokenizer, words)
    findings += whole_words(tokenizer, words) + long_prompts(tokenizer, prompts)
    if config.validation.validation_prompt:
        findings += unseen_words(
            tokenizer, config.validation.validation_prompt, [c.tokens for c in config.all_concepts]
        )
    return findings


def with_words(tokenizer, words: Sequence[str]):
    """A copy of the tokenizer that knows the new words, as it will in training."""
    own = copy.deepcopy(tokenizer)
    own.add_tokens([word for word in words if word not in own.get_vocab()])
    return own


def initializer(tokenizer, word: str) -> list[Finding]:
    """An error for an initialiser that is not one token: how it is split."""
    ids = _ids(tokenizer, word)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return []
    text = f"{word!r} is {len(ids)} tokens of the base model ({_pieces(tokenizer, ids)}), one word is needed"
    return [Finding("error", "initializer_token", text, "name a common word for such a thing")]


def whole_words(tokenizer, words: Sequence[str]) -> list[Finding]:
    """An error for each new word that is not read as one token."""
    findings = []
    for word in words:
        ids = _ids(tokenizer, word)
        if ids != [tokenizer.convert_tokens_to_ids(word)]:
            text = f"{word!r} is read as {len(ids)} tokens ({_pieces(tokenizer, ids)})"
            findings.append(Finding("error", "placeholder_token", text, "choose another, such as <thing>"))
    return findings


def long_prompts(tokenizer, prompts: Mapping[str, str]) -> list[Finding]:
    """A warning for each prompt that is cut, with the first words that are lost; an error where a new word is."""
    errors, warnings = [], []
    for text, where in prompts.items():
        lost, words = cut_prompt(tokenizer, text) or ("", [])
        if words:
            errors.append(Finding("error", where, f"{lost}, and {' '.join(words)} with it", "make it shorter"))
        elif lost:
            warnings.append(Finding("warning", where, lost, "make it shorter"))
    more = len(warnings) - MOST_LONG_PROMPTS
    if more > 0:
        warnings[MOST_LONG_PROMPTS:] = [Finding("warning", "prompts", f"{more} more are cut too", "make them shorter")]
    return errors + warnings


def unseen_words(tokenizer, prompt: str, words: Sequence[tuple[str, ...]]) -> list[Finding]:
    """A warning where the validation prompt shows no concept in full; `words`: the placeholders of each."""
    seen = set(_ids(tokenizer, prompt))
    missing = [[word for word in own if tokenizer.convert_tokens_to_ids(word) not in seen] for own in words if own]
    if not missing or not all(missing):
        return []
    first = missing[0]
    text = f"{prompt!r} lacks the placeholder {' '.join(first)}, so its pictures will not show what is learned"
    return [Finding("warning", "validation_prompt", text, f"write {' '.join(first)} into it")]


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _pieces(tokenizer, ids: Sequence[int]) -> str:
    return " + ".join(piece.removesuffix("</w>") for piece in tokenizer.convert_ids_to_tokens(ids))
