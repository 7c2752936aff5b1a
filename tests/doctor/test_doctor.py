"""The pre-flight check: every check by itself, and the command."""

import dataclasses
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import yaml
from helpers import CASTLE, train_config
from PIL import Image

from sd_atoms.cli import main
from sd_atoms.data.concepts import Source, find_images
from sd_atoms.data.config import Concept
from sd_atoms.data.masks import Mask
from sd_atoms.data.records import ImageRecord, ImageStats, image_record, image_stats
from sd_atoms.doctor import Finding, examine, preflight, report
from sd_atoms.doctor.disk import disk, disk_needs, writable
from sd_atoms.doctor.images import (
    alike,
    counted,
    cut,
    enlarged,
    held_out,
    masks,
    passes,
    training_size,
    turned,
)
from sd_atoms.doctor.memory import activation_bytes, cpu_flags, memory, memory_needed, precision
from sd_atoms.doctor.plan import class_images, intervals, rates, trainable_params
from sd_atoms.doctor.prompts import (
    braces,
    initializer,
    long_prompts,
    run_prompts,
    unseen_words,
    whole_words,
    with_words,
)
from sd_atoms.errors import UserError
from sd_atoms.settings import flat, replaced
from sd_atoms.sources import packaged_path
from sd_atoms.training.optimiser import with_defaults

Usage = namedtuple("Usage", "total used free")


def config_of(**settings):
    return with_defaults(train_config(**{**CASTLE, "train_batch_size": 1, **settings}))


def castle(config):
    """The packaged pictures as a concept."""
    paths = sorted(packaged_path("pocket:castle").glob("*.png"))
    return Source(config.all_concepts[0], [image_record(path) for path in paths])


def looks_of(*sizes):
    return [ImageStats(f"{number}.png", size, str(number)) for number, size in enumerate(sizes)]


def texts(findings, level):
    return [f"{finding.about}: {finding.text}" for finding in findings if finding.level == level]


def one(findings, level, *parts):
    """The one finding there is, of that level, with all of these in it."""
    (finding,) = findings
    assert finding.level == level
    assert finding.fix or level == "fact"
    for part in parts:
        assert part in finding.line
    return finding


# Pictures


def test_pictures_are_counted_and_few_are_a_warning():
    fact = one(counted("photos", 3, looks_of((9, 9), (8, 6), (7, 9))), "fact", "photos: 3 pictures of 8 x 6 to 9 x 9")
    assert "looked at" not in fact.text
    assert "the first 1 were looked at" in counted("photos", 2000, looks_of((9, 9)))[0].text
    one(counted("photos", 2, looks_of((9, 9), (9, 9)))[1:], "warning", "2 pictures can be learned by heart")


def test_small_pictures_are_a_warning_with_the_percentage():
    looks = looks_of((512, 512), (256, 400), (500, 512))
    found = enlarged("photos", looks, [(512, 512)] * 3)
    one(found, "warning", "2 of 3 pictures are too small", "up to 100% (1.png, 256 x 400 px)")
    assert enlarged("photos", looks[:1], [(512, 512)]) == []


def test_the_cropped_share_of_shapes_far_from_square():
    looks = looks_of((400, 300), (1600, 400), (512, 512))
    found = cut("photos", looks, [(512, 512)] * 3)
    one(found, "warning", "1 of 3 pictures is cropped by up to 75% (1.png", "aspect_ratio_buckets")
    targets = [training_size(look.size, 512, 64, buckets=True) for look in looks]
    assert targets[2] == (512, 512)
    one(
        cut("photos", looks, targets),
        "warning",
        "1 of 3 pictures is cropped by up to 58%",
        "no bucket is so long",
    )
    assert training_size((4, 3), 512, 64, buckets=False) == (512, 512)


def test_pictures_without_a_mask_and_masks_that_are_nearly_empty_or_full_are_named():
    shares = {"1.png": 0.3, "2.png": None, "3.png": 0.001, "4.png": 1.0, "5.png": 0.5}
    records = [
        ImageRecord(name, None, bytes, mask=None if share is None else Mask(name, bytes, share=share))
        for name, share in shares.items()
    ]
    fact, *warnings = masks("photos", records)
    one([fact], "fact", "photos: 4 masks; the subject is 0% to 100% of a picture")
    for warning, text in zip(
        warnings,
        ("without a mask: 2.png", "a mask that is nearly empty: 3.png", "a mask that is nearly full: 4.png"),
        strict=True,
    ):
        one([warning], "warning", text)
    assert len(masks("photos", [record for record in records if record.name in ("1.png", "5.png")])) == 1


def test_pictures_that_are_there_twice_or_nearly(tmp_path):
    original = Image.open(packaged_path("pocket:castle") / "1.png").convert("RGB")
    original.save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    original.save(tmp_path / "c.jpg", quality=80)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "d.png")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "e.png")
    shutil.copy(packaged_path("pocket:castle") / "2.png", tmp_path / "f.png")
    looks = [image_stats(image_record(path)) for path in sorted(tmp_path.iterdir())]
    same, near = alike("photos", looks)
    one([same], "warning", "the same picture several times: a.png = b.png")
    one([near], "warning", "nearly the same: a.png and c.jpg")
    assert alike("photos", [looks[0], looks[-1]]) == []


def test_turned_pictures_are_a_fact(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGB", (64, 32)).save(tmp_path / "b.jpg")
    looks = [image_stats(image_record(path)) for path in sorted(tmp_path.iterdir())]
    assert [look.size for look in looks] == [(32, 64), (64, 32)]
    assert one(turned("photos", looks), "fact").text.endswith(": a.jpg")


def test_an_epoch_that_is_not_finished():
    one(passes(100, 30, 2), "warning", "40 of 100 are never seen", "50 steps see each once")
    one(passes(5, 300, 1), "fact", "each is seen 60 times")


def test_nothing_left_to_learn_from():
    one(held_out(5, 5), "error", "holdout_images: 5 of 5 pictures leave none", "at most 4")
    assert held_out(1, 5) == []


# Prompts


def test_every_prompt_of_a_run_and_where_it_comes_from(tmp_path):
    (tmp_path / "t.txt").write_text("a {} at night\n")
    (tmp_path / "c.txt").write_text("a tower\na house\n")
    config = config_of(
        prompts_file=str(tmp_path / "t.txt"),
        validation_prompt="the <castle>",
        prior="teacher",
        class_prompts_file=str(tmp_path / "c.txt"),
    )
    source = castle(config)
    first = dataclasses.replace(source.images[0], caption="{} in the fog")
    prompts, findings = run_prompts(config, [Source(source.concept, [first, *source.images[1:]])])
    assert findings == []
    assert prompts == {
        "photo of a <castle>.": "instance_prompt",
        "<castle> in the fog": f"caption of {first.name}",
        "a tower": str(tmp_path / "c.txt"),
        "a house": str(tmp_path / "c.txt"),
        "a <castle> at night": str(tmp_path / "t.txt"),
        "the <castle>": "validation_prompt",
    }


def test_files_of_prompts_that_cannot_be_used_are_errors(tmp_path):
    (tmp_path / "t.txt").write_text("no braces\n")
    config = config_of(prompts_file=str(tmp_path / "t.txt"), instance_prompts_file=str(tmp_path / "none.txt"))
    _, findings = run_prompts(config, [])
    assert [finding.level for finding in findings] == ["error", "error"]
    assert "none.txt: cannot be read" in findings[0].line
    assert "t.txt, line 1: 'no braces'" in findings[1].line


def test_braces():
    def found(text):
        return braces({text: "validation_prompt"}, [Concept(placeholder_token="<c>")])

    one(found("a { castle"), "error", "validation_prompt: 'a { castle' has a brace")
    one(found("a }{"), "error")
    one(found("a {} at night"), "warning", "{} stays as it is", "write <c> in its place")
    assert found("a {very old} <c>") == []
    assert braces({"a {c": "instance_prompt"}, [Concept(placeholder_token="{c")]) == []


def test_a_long_prompt_and_the_first_words_that_are_lost(pocket):
    text = "a " * 75 + "castle in the snow"
    tokenizer = with_words(pocket.tokenizer, ["<castle>"])
    found = long_prompts(tokenizer, {text: "instance_prompt", "a castle": "validation_prompt"})
    one(found, "warning", "instance_prompt: ", "has 81 tokens, of 77 that are read: lost from 'castle in the snow' on")
    (found,) = long_prompts(tokenizer, {"a " * 72 + "qqqqqq by a lake": "instance_prompt"})
    assert found.text.endswith("lost from 'qqqqqq by a lake' on")
    found = long_prompts(pocket.tokenizer, {f"{number} {text}": "captions" for number in range(9)})
    assert [finding.about for finding in found] == ["captions"] * 3 + ["prompts"]
    assert found[-1].text == "6 more are cut too"
    assert long_prompts(pocket.tokenizer, {"a " * 74 + "castle": "instance_prompt"}) == []


def test_a_new_word_that_is_cut_off_is_an_error_and_one_that_stays_is_not(pocket):
    tokenizer = with_words(pocket.tokenizer, ["<castle>", "<canal>"])
    found = long_prompts(tokenizer, {"a " * 75 + "<castle> by a <canal>": "caption of 1.png"})
    one(found, "error", "caption of 1.png: ", "lost from '<castle> by a <canal>' on, and <castle> <canal> with it")
    one(long_prompts(tokenizer, {"<castle> " + "a " * 76 + "<castle>": "caption of 1.png"}), "warning")


def test_captions_that_lack_the_placeholder_are_named(tmp_path):
    for name, caption in (("1", "a <castle>"), ("2", "a house"), ("3", "a {} at night")):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    config = config_of(instance_data_dir=str(tmp_path), captions=True)
    sources, _ = find_images(config.data, config.all_concepts)
    _, findings = run_prompts(config, sources)
    one(
        findings, "warning", f"captions: <castle> is not in 1 caption: of {tmp_path / '2.png'}; write <castle> or {{}}"
    )


def test_how_an_initializer_is_split(pocket):
    assert initializer(pocket.tokenizer, "castle") == []
    one(initializer(pocket.tokenizer, "qqzz"), "error", "'qqzz' is 4 tokens", "(q + q + z + z)")


def test_a_new_word_is_one_token_in_a_copy_of_the_tokenizer(pocket):
    before = len(pocket.tokenizer)
    tokenizer = with_words(pocket.tokenizer, ["<castle>"])
    assert (len(tokenizer), len(pocket.tokenizer)) == (before + 1, before)
    assert whole_words(tokenizer, ["<castle>"]) == []
    one(whole_words(pocket.tokenizer, ["<castle>"]), "error", "'<castle>' is read as 3 tokens (< + castle + >)")


def test_a_validation_prompt_without_the_concept(pocket):
    tokenizer = with_words(pocket.tokenizer, ["<castle>", "<tower>", "<canal>"])
    words = [("<castle>", "<tower>"), ("<canal>",)]
    one(unseen_words(tokenizer, "a castle", words), "warning", "lacks the placeholder <castle> <tower>")
    one(unseen_words(tokenizer, "a <castle>", words), "warning", "lacks the placeholder <tower>")
    assert unseen_words(tokenizer, "a <canal>", words) == []
    assert unseen_words(tokenizer, "a castle", [()]) == []


# Trained numbers and the disk


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(m=6, m1=3),
        dict(target="conv+linear", kc=4, train_token_embedding=True),
        dict(kc=2, m=0, block_layers="all"),
        dict(target=r".*conv1", train_text_encoder=True),
        dict(train_text_encoder=True, text_adapter="lora"),
    ],
)
def test_trainable_params_are_those_of_the_run(pipe, settings):
    from sd_atoms.training.diffusion import add_adapters

    config = config_of(**settings)
    count, findings = trainable_params(config, pipe)
    one(findings, "fact", "of atoms")
    add_adapters(pipe, config)
    parameters = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    assert count == trained + (128 if config.text.train_token_embedding else 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(target="nothing"), "target='nothing': FILTER_ATOMS: Target modules nothing not found"),
        (dict(m=10), "28 layers do not fit: conv_in has filters of 9 taps, fewer than m=10"),
        (dict(target="["), "target='[': FILTER_ATOMS: unterminated character set"),
        (dict(kc=4), "kc=4: no layer of target='conv3x3' takes block atoms"),
    ],
)
def test_a_target_that_does_not_fit_is_an_error(pocket, settings, message):
    count, findings = trainable_params(config_of(**settings), pocket)
    assert count == 0
    one(findings, "error", message)


def test_what_a_run_writes():
    config = config_of(max_train_steps=100, checkpointing_steps=10, num_instance_images=1)
    drawn = 4 * 2 * 64 * 64
    sizes = dict(trained=1000, steps=100, resolution=64, pictures=5, prompts=2, width=8)
    assert disk_needs(config, **sizes) == {"output_dir": (10 * 3 + 4) * 4000 + drawn}
    config = replaced(config, checkpoints_total_limit=2, ema_decay=0.9, cache_dir="c")
    assert disk_needs(config, **sizes) == {
        "output_dir": (3 * 4 + 4) * 4000 + drawn,
        "cache_dir": 5 * 2 * 4 * 8 * 8 * 4 + 2 * 77 * 8 * 4,
    }


def test_a_disk_without_room_is_an_error_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 2_500_000))
    config = config_of(output_dir=str(tmp_path / "runs" / "a"), cache_dir=str(tmp_path / "cache"))
    one(disk(config, {"output_dir": 1e6, "cache_dir": 1e6}), "fact", "output_dir and cache_dir: about 2.0 MB")
    one(disk(config, {"output_dir": 2e6, "cache_dir": 1e6}), "error", "about 3.0 MB", "2.5 MB are free")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    config = config_of(output_dir=str(tmp_path / "file" / "run"))
    one(disk(config, {"output_dir": 1}), "error", f"output_dir: {tmp_path / 'file'} is a file")
    monkeypatch.setattr(os, "access", lambda *_: False)
    one(writable("output_dir", tmp_path), "error", f"{tmp_path} cannot be written to")


# Device and memory


def test_precisions_and_devices():
    one(precision("cpu", "bf16", False), "warning", "emulated and slow", "set no")
    one(precision("cuda", "bf16", False), "warning", "this card", "set fp16 or no")
    one(precision("cpu", "fp16", None), "warning", "fp16 is emulated on a CPU")
    one(precision("mps", "fp16", None), "warning", "fp32")
    for device, wanted, native in (("cpu", "no", False), ("cpu", "bf16", None), ("cuda", "fp16", False)):
        assert precision(device, wanted, native) == []


def test_cpu_flags(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx512_bf16\n\nflags\t\t: fpu\n")
    assert cpu_flags(tmp_path / "cpuinfo") == {"fpu", "avx512_bf16"}
    assert cpu_flags(tmp_path / "none") is None


def test_the_memory_estimate_agrees_with_the_measurements():
    def step(px, batch=1, checkpointing=False):
        return activation_bytes(320, (px // 8) ** 2, batch, "no", checkpointing) / 1e9

    assert (step(256), step(256, 2), step(512)) == pytest.approx((0.69, 1.16, 2.05), abs=0.02)
    assert (step(256, checkpointing=True), step(512, checkpointing=True)) == pytest.approx((0.40, 1.06), abs=0.05)
    assert memory_needed(1000, 0, 10.0, "no") == 4010
    assert memory_needed(1000, 100, 10.0, "bf16") == 4000  # opening takes more than a step
    one([memory(2e9, 1e9)], "warning", "memory: about 2.0 GB are needed, 1.0 GB are free")
    one([memory(1e9, 2e9)], "fact")


# Settings


def test_learning_rates_far_from_usual():
    one(rates(config_of(learning_rate=1.0)), "warning", "learning_rate: 1 is 100 times the usual 0.01")
    one(rates(config_of(learning_rate=1e-4)), "warning", "1/100 of the usual 0.01")
    one(rates(config_of(train_text_encoder=True, text_learning_rate=1.0)), "warning", "text_learning_rate: ")
    for settings in (dict(), dict(learning_rate=0.0), dict(optimizer="prodigy")):
        assert rates(config_of(**settings)) == []


def test_what_a_run_is_too_short_for():
    assert intervals(config_of(), 300) == []
    config = config_of(validation_prompt="a <castle>", validation_loss_steps=50)
    levels = {finding.about: finding.level for finding in intervals(config, 10)}
    assert levels == {
        "checkpointing_steps": "fact",
        "validation_steps": "warning",
        "validation_loss_steps": "warning",
        "lr_warmup_steps": "warning",
    }


def test_class_pictures_that_have_to_be_drawn(tmp_path):
    config = config_of(prior="images", class_prompt="a castle", class_data_dir=str(tmp_path), num_class_images=8)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    one(class_images(config), "fact", "7 pictures will be drawn")
    assert class_images(config_of()) == []


# All together


def test_a_clean_run_has_no_warning_and_nothing_changes(pocket, tmp_path):
    config = config_of(output_dir=str(tmp_path / "run"), validation_prompt="a <castle>")
    before = len(pocket.tokenizer)
    findings = examine(config, [castle(config)], pocket, 1)
    assert {finding.level for finding in findings} == {"fact"}
    assert preflight(config, [castle(config)], pocket, 1) == []
    assert len(pocket.tokenizer) == before
    assert list(tmp_path.iterdir()) == []


def test_preflight_gives_warnings_and_raises_all_errors_in_one_line(pocket):
    config = config_of(learning_rate=9.0, validation_prompt="a castle")
    warnings = preflight(config, [castle(config)], pocket, 1)
    assert len(warnings) == 2
    assert all(line.startswith("warning: ") and "\n" not in line for line in warnings)
    config = config_of(initializer_token="qqqqzzzz", target="nothing", resolution=100)
    with pytest.raises(UserError) as stop:
        preflight(config, [castle(config)], pocket, 1)
    message = str(stop.value)
    assert "\n" not in message
    for part in ("initializer_token: 'qqqqzzzz' is 8 tokens", "target='nothing'", "100 is not a multiple of 32"):
        assert part in message


def test_a_report_lists_errors_first_and_each_fix_after_an_arrow():
    findings = [
        Finding("fact", "photos", "5 pictures"),
        Finding("warning", "learning_rate", "9 is odd", "leave it out"),
        Finding("error", "photos", "2 of 5 cannot be used:\n  a.png: empty\n  b.png: empty", "remove them"),
    ]
    assert report(findings) == (
        "error    photos: 2 of 5 cannot be used:\n"
        "           a.png: empty\n"
        "           b.png: empty\n"
        "         → remove them\n"
        "warning  learning_rate: 9 is odd\n"
        "         → leave it out\n"
        "fact     photos: 5 pictures\n"
        "\n"
        "1 error, 1 warning."
    )


def written(tmp_path, **settings):
    config = config_of(**{"output_dir": str(tmp_path / "run"), **settings})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({k: v for k, v in flat(config).items() if v is not None}))
    return str(tmp_path / "c.yaml")


def test_the_command_lists_all_that_is_wrong_at_once(tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(packaged_path("pocket:castle"), photos)
    for name in ("6.png", "7.jpg"):
        (photos / name).write_bytes((photos / "1.png").read_bytes()[:300])
    (photos / "notes.md").write_text("x")
    (tmp_path / "plain.txt").write_text("no braces\n")
    (tmp_path / "file").write_text("x")
    settings = dict(
        instance_data_dir=str(photos),  # two broken pictures
        prompts_file=str(tmp_path / "plain.txt"),  # no template
        initializer_token="qqqqzzzz",  # no word
        resolution=100,  # no multiple
        output_dir=str(tmp_path / "file"),  # a file
        clip_model_name_or_path="./nowhere",  # no model
        learning_rate=9.0,  # a warning
    )
    path = written(tmp_path, **settings)
    before = sorted(tmp_path.rglob("*"))
    assert main(["doctor", "--config", path]) == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line for line in lines if line.startswith("error ")] == [
        f"error    {photos}: 2 of 7 images cannot be used:",
        "error    resolution: 100 is not a multiple of 32, which this base needs",
        f"error    prompts_file: {tmp_path / 'plain.txt'}, line 1: 'no braces': expected {{}} exactly once and no "
        "other braces",
        "error    initializer_token: 'qqqqzzzz' is 8 tokens of the base model (q + q + q + q + z + z + z + z), one "
        "word is needed",
        f"error    output_dir: {tmp_path / 'file'} is a file",
        "error    clip_model_name_or_path: './nowhere' is neither an existing path nor a hub id of the form "
        "owner/name",
    ]
    assert f"{photos / '6.png'}: cannot be read" in printed.out
    assert f"{photos / '7.jpg'}: cannot be read" in printed.out
    assert "warning  learning_rate: 9 is 900 times the usual 0.01" in lines
    assert f"fact     {photos}: 5 pictures of 128 x 128 px" in lines
    assert f"fact     Ignored in {photos}: 1 .md file: notes.md" in lines
    assert f"fact     Not used in {photos}: masks (5); set masks to learn the subject alone" in lines
    assert lines[-1] == "6 errors, 1 warning."
    assert printed.err == "error: 6 problems would stop this run; see above\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_goes_on_without_base_or_pictures(tmp_path, capsys):
    path = written(tmp_path, pretrained_model_name_or_path="./nowhere", instance_data_dir=str(tmp_path / "none"))
    assert main(["doctor", "--config", path, "--learning_rate", "9"]) == 2
    printed = capsys.readouterr().out
    assert "error    pretrained_model_name_or_path: './nowhere'" in printed
    assert "none: no such folder; expected a folder of images" in printed
    assert "warning  learning_rate" in printed


def test_the_command_has_nothing_against_a_clean_run(tmp_path, capsys):
    assert main(["doctor", "--config", written(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("\n0 errors, 0 warnings.\n")
    assert printed.err == ""
    assert [path.name for path in Path(tmp_path).iterdir()] == ["c.yaml"]


def test_several_concepts_are_looked_at_one_by_one(tmp_path, capsys):
    usual = dict(initializer_token="castle", instance_prompt="a <{}>", placeholder_token="<{}>")
    concepts = [
        dict(instance_data_dir=place, **{key: value.format(name) for key, value in usual.items()})
        for name, place in (("one", "pocket:castle"), ("two", str(tmp_path / "none")), ("three", "pocket:tower"))
    ]
    settings = dict(pretrained_model_name_or_path="pocket", concepts=concepts, output_dir=str(tmp_path / "run"))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    assert main(["doctor", "--config", str(tmp_path / "c.yaml")]) == 2
    printed = capsys.readouterr().out
    assert "fact     pocket:castle: 5 pictures" in printed
    assert "none: no such folder" in printed
    assert "error    pocket:tower: 'pocket:tower' is not packaged" in printed
    assert "2 errors" in printed
