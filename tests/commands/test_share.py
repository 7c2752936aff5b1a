"""A finished run as something to give away: the folder, its card, and the way to the hub (which is never called)."""

import dataclasses
import getpass
import json
import re
import shutil
import socket
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import yaml
from helpers import CASTLE
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd_atoms import load_atoms
from sd_atoms.cli import main, train_main
from sd_atoms.commands.share import write_share_folder
from sd_atoms.commands.train import check_hub
from sd_atoms.errors import AtomsWarning, UserError
from sd_atoms.generation import image_notes
from sd_atoms.pipeline import artefact_files, open_base, read_artefact
from sd_atoms.pipeline import hub as hub_module
from sd_atoms.pipeline.hub import check_repo_id, own_repo_id, push
from sd_atoms.report.card import SCORES, AdapterFile, CardImage, model_card
from sd_atoms.sources import packaged_path, public_name
from sd_atoms.training.adapter import open_adapter
from sd_atoms.training.sections import HubSettings

TEMPLATES = ["photo of a {}."] + [f"The {{}} number {number}." for number in range(9)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small finished run whose settings name folders of this machine."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "templates.txt").write_text("\n".join(TEMPLATES))
    settings = dict(
        **CASTLE
        | dict(
            pretrained_model_name_or_path=str(packaged_path("pocket").resolve()),
            instance_data_dir=str(packaged_path("pocket:castle").resolve()),
        ),
        train_token_embedding=True,
        train_batch_size=1,
        max_train_steps=2,
        num_instance_images=2,
        num_inference_steps=1,
        guidance_scale=3.0,
        prompts_file=str(folder / "templates.txt"),
        clip_model_name_or_path="pocket:clip",
        report_to="none",
        output_dir=str(folder / "castle"),
    )
    (folder / "c.yaml").write_text(yaml.safe_dump(settings))
    assert train_main(["--config", str(folder / "c.yaml")]) == 0
    return folder / "castle"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it to do things to."""
    return Path(shutil.copytree(trained, tmp_path / "castle"))


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: what was called, and what it is to answer with."""

    class Hub:
        calls, error = (), None

        def whoami(self):
            self._note("whoami")
            return {"name": "someone"}

        def create_repo(self, repo_id, **options):
            self._note("create_repo", repo_id, options)
            return f"https://hub/{repo_id}"

        def upload_folder(self, **options):
            self._note("upload_folder", options)

        def _note(self, *call):
            Hub.calls += (call,)
            if Hub.error is not None:
                raise Hub.error

    monkeypatch.setattr(hub_module, "HfApi", Hub)
    return Hub


def card_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_folder_holds_the_adapter_the_card_and_pictures(run):
    folder = write_share_folder(run, None)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    shown = {f"pictures/prompt-{number:02d}.png" for number in (0, 1, 3, 4, 5, 6, 8, 9)}
    assert folder == run / "share"
    assert names == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "learned_embeds.safetensors",
        "castle.safetensors", "pictures/grid.png", *shown,
    }  # fmt: skip
    for name in ("adapter_model.safetensors", "learned_embeds.safetensors"):
        ours, theirs = load_file(folder / name), load_file(run / "adapter" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for name in shown:
        assert Image.open(folder / name).tobytes() == Image.open(run / "images" / Path(name).name).tobytes()
    assert not list(run.glob(".share*"))


def test_the_card_says_what_a_reader_needs(run):
    folder = write_share_folder(run, "someone/castle")
    text = card_of(folder)
    card = ModelCard(text)
    assert card.data["library_name"] == "diffusers"
    assert card.data.base_model is None  # a folder is no hub id
    assert {"text-to-image", "stable-diffusion", "filter-atoms", "dreambooth"} == set(card.data.tags)
    assert card.data.instance_prompt == "photo of a <castle>."
    assert [entry["text"] for entry in card.data.widget][:2] == ["photo of a <castle>.", "The <castle> number 0."]
    links = [unquote(link) for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert set(links) == {f"pictures/{path.name}" for path in (folder / "pictures").iterdir()}
    assert {entry["output"]["url"] for entry in card.data.widget} == set(links) - {"pictures/grid.png"}
    clip = json.loads((run / "metrics.json").read_text())["clip"]
    for key, value in clip["adapted"].items():
        base = clip["base"][key]
        difference = f"{value - base:+.3f}".replace("-", "−")
        assert f"| {SCORES[key]} | {value:.3f} | {base:.3f} | {difference} |" in text
    assert "2,268 numbers of filter atoms and 128 of the new word's embedding" in text
    assert f"{(folder / 'castle.safetensors').stat().st_size / 1000:.1f} KB" in text
    assert 'load_atoms(pipe, "someone/castle")' in text
    assert "--adapter someone/castle" in text
    assert "--token '<castle>'" in text
    assert "| Seed | 0 |" in text
    assert "torch 2" in text


def test_nothing_in_it_names_the_machine(run):
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/home/alice/models/sd"
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    folder = write_share_folder(run, None)
    places = [str(run.parent), str(packaged_path("pocket").resolve().parent), str(Path.cwd()), "alice"]
    places += [f"/{getpass.getuser()}/", f"/home/{getpass.getuser()}"]
    places += [socket.gethostname()] if len(socket.gethostname()) > 5 else []  # shorter ones occur in any numbers
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert [place for place in places if place.encode() in content] == [], path
    assert read_artefact(folder).about["base"] == "pocket-sd"
    assert image_notes(folder / "pictures" / "prompt-00.png")["base"] == "pocket-sd"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert "`pocket-sd`" in card_of(folder)


@pytest.mark.parametrize("kept", ["CompVis/stable-diffusion-v1-4", "pocket", "pocket:clip"])
def test_public_names_keep_ids_and_packaged_names(kept):
    assert public_name(kept) == kept


def test_public_names_of_paths_are_their_last_part(tmp_path, monkeypatch):
    for path in ("/home/alice/sd/", "~/sd", "./sd", "C:\\models\\sd", "alice/models/sd", "\\\\server\\sd"):
        assert public_name(path) == "sd"
    (tmp_path / "models" / "sd").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("models/sd") == "sd"  # has the form of an id, but is there


def test_it_loads_as_a_folder_as_a_file_and_by_its_id(run, monkeypatch, tmp_path):
    folder = write_share_folder(run, "someone/castle")

    def download(name, revision=None, allow_patterns=None, **_):
        files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr(artefact_files, "snapshot_download", download)
    pipe = open_base("pocket")
    digests = {
        load_atoms(pipe, source, adapter_name=name).digest()
        for name, source in (("a", folder), ("b", folder / "castle.safetensors"), ("c", "someone/castle"))
    }
    assert digests == {read_artefact(run / "adapter").digest()}
    assert "<castle>" in pipe.tokenizer.get_vocab()


def test_the_code_of_the_card_draws(run, monkeypatch):
    folder = write_share_folder(run, None)
    code = re.search(r"```python\n(.*?)\n```", card_of(folder), re.DOTALL)[1]
    monkeypatch.chdir(folder)
    # the one thing a reader must fill in
    exec(code.replace('"pocket-sd"', repr(str(packaged_path("pocket"))) + ", safety_checker=None"), {})
    assert Image.open("picture.png").size == (128, 128)


def test_a_text_encoder_goes_along_and_a_second_writing_replaces_the_first(run):
    plain = read_artefact(run / "adapter")
    layer = "encoder.layers.0.self_attn.q_proj"
    lora = {f"{layer}.lora_A.weight": torch.ones(8, 128), f"{layer}.lora_B.weight": torch.ones(128, 8)}
    both = dataclasses.replace(plain, text_config=LoraConfig(r=8, lora_alpha=8), text_state=lora)
    for place in (run / "adapter", run / "castle.safetensors"):
        artefact_files.write_artefact(both, place)
    config = run / "adapter" / "text_encoder" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "/home/alice/sd"}))
    folder = write_share_folder(run, None)
    shared = read_artefact(folder)
    assert {key: value.shape for key, value in shared.text_state.items()} == {k: v.shape for k, v in lora.items()}
    assert json.loads((folder / "text_encoder" / "adapter_config.json").read_text())["base_model_name_or_path"] is None

    for place in (run / "adapter", run / "castle.safetensors"):
        artefact_files.write_artefact(plain, place)
    (run / "metrics.json").unlink()  # a run that was stopped while drawing
    (run / "images" / "grid.png").unlink()
    for path in (run / "images").glob("*prompt-*.png"):
        path.unlink()
    assert write_share_folder(run, None) == folder
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {name for name in names if "/" in name} == {"pictures/instance-00.png", "pictures/instance-01.png"}
    assert "## Scores" not in card_of(folder)


ODD = [
    "a 'quoted' \"one\": with colons: - and #hash",
    "two\nlines\n---\nand\ttabs",
    "<script>alert(1)</script> ![x](http://evil/a.png) [y](javascript:z) |cell| `code` **bold** $$x$$",
    "größe 城堡 🏰 \u2028 end\\",
    "{}: &anchor *alias !!python/object:os.system 'x",
    "```\nfenced",
    "",
]


@pytest.mark.parametrize("prompt", ODD)
def test_odd_prompts_break_neither_the_front_matter_nor_the_page(prompt):
    config = dict(
        pretrained_model_name_or_path="CompVis/stable-diffusion-v1-4",
        concepts=[
            dict(instance_prompt=prompt, placeholder_token="<a|b`c> <d>", initializer_token="castle"),
            dict(instance_prompt="photo of a house", placeholder_token=None, initializer_token=None),
        ],
        clip_model_name_or_path="openai/clip",
    )
    scores = {"adapted": {"image": 0.5, "new": 0.25}, "base": {"image": 0.75}}
    metrics = {"clip": scores, "clip_by_concept": {"<b>": scores}}
    pictures = [CardImage("pictures/a (1).png", prompt)] * 5
    text = model_card(config, {}, metrics, pictures, AdapterFile("castle.safetensors", 17000))
    card = ModelCard(text)
    assert card.data.base_model == "CompVis/stable-diffusion-v1-4"
    assert card.data.widget == [{"text": prompt, "output": {"url": "pictures/a (1).png"}}] * 5
    body = re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", card.text, flags=re.DOTALL)  # code shows as it is
    assert not re.search(r"<\w|(?<!\\)\]\((http:|javascript)|(?<!\\)\*\*|(?<!\\)\$", body)
    tables = re.findall(r"(?:^\|.*\|$\n?)+", card.text, re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "| 0.500 | 0.750 | −0.250 |" in text
    assert "| new | 0.250 |  |  |" in text
    assert "Below the base: picture and training pictures; &lt;b&gt;: picture and training pictures." in text


def test_a_card_of_the_pocket_base_opens_it_as_the_package_does():
    text = model_card({"pretrained_model_name_or_path": "pocket"}, {}, {}, [], AdapterFile("castle.safetensors", 2e6))
    assert 'open_base("pocket")' in text
    assert "2.0 MB" in text
    assert "## Pictures" not in text
    assert 'revision="v1"' in model_card(
        {"pretrained_model_name_or_path": "a/b", "revision": "v1"}, {}, {}, [], AdapterFile("c.safetensors", 1)
    )


def test_pushing_makes_the_repository_and_uploads_the_folder(run, hub, capsys):
    assert main(["share", str(run), "--hub_model_id", "someone/castle", "--push_to_hub", "--hub_private_repo"]) == 0
    (_, repo_id, options), (_, upload) = hub.calls
    assert (repo_id, options) == ("someone/castle", {"private": True, "exist_ok": True})
    assert (upload["repo_id"], upload["folder_path"]) == ("someone/castle", run / "share")
    printed = capsys.readouterr().out
    assert "https://hub/someone/castle" in printed
    assert "load_atoms(pipe, 'someone/castle')" in printed
    assert "grid.png with the training pictures" in printed

    hub.calls = ()
    assert main(["share", str(run), "--push_to_hub"]) == 0
    assert [call[0] for call in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    assert hub.calls[1][1:] == ("someone/castle", {"private": None, "exist_ok": True})
    assert 'load_atoms(pipe, "someone/castle")' in card_of(run / "share")


def test_without_pushing_the_hub_is_not_asked(run, hub, capsys):
    assert main(["share", str(run)]) == 0
    assert hub.calls == ()
    assert f"sd-atoms share {run} --hub_model_id owner/name --push_to_hub" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        OfflineModeIsEnabled("offline\nmode"),
        LocalTokenNotFoundError("log in"),
        ConnectionError(),
        ValueError("Illegal header value b'Bearer hf_secret' hf_secret"),
    ],
)
def test_a_hub_that_fails_is_one_line_and_leaves_the_folder(run, hub, capsys, error):
    hub.error = error
    words = ["share", str(run), "--hub_model_id", "someone/castle", "--push_to_hub"]
    assert main([*words, "--private"]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    assert type(error).__name__ in message
    assert "secret" not in message
    assert f"{run / 'share'} is complete" in message
    assert message.endswith(" ".join(["sd-atoms", *words, "--hub_private_repo"]))
    assert read_artefact(run / "share").layers
    with pytest.raises(UserError, match="pass --hub_model_id owner/name"):
        own_repo_id(run)


HUB = HubSettings(push_to_hub=True)


def test_login_and_name_are_checked_before_a_training(tmp_path, hub, monkeypatch):
    check_hub(HUB, tmp_path)
    check_hub(dataclasses.replace(HUB, hub_model_id="someone/castle"), tmp_path)
    with pytest.raises(UserError, match="hub_model_id: 'other/castle' is not of those that are logged in: someone"):
        check_hub(dataclasses.replace(HUB, hub_model_id="other/castle"), tmp_path)
    with pytest.raises(UserError, match="is not of the form owner/name"):
        check_hub(dataclasses.replace(HUB, hub_model_id="castle"), tmp_path)
    with monkeypatch.context() as patch:
        token = {"accessToken": {"role": "read"}}
        patch.setattr(hub, "whoami", lambda self: {"name": "someone", "auth": token})
        with pytest.raises(UserError, match="may only read"):
            check_hub(HUB, tmp_path)
    hub.error = LocalTokenNotFoundError("no token")
    with pytest.raises(UserError, match="push_to_hub: log in with `hf auth login` first"):
        check_hub(HUB, tmp_path)


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline"), ConnectionError("no route")])
def test_a_training_starts_without_network_after_a_warning(tmp_path, hub, error):
    hub.error = error
    with pytest.warns(AtomsWarning, match="push_to_hub: the hub cannot be reached now .*tried at the end"):
        check_hub(HUB, tmp_path)


def broken(run, what):
    if what == "no run":
        shutil.rmtree(run)
    if what == "no config":
        (run / "config.yaml").unlink()
    if what == "no adapter":
        shutil.rmtree(run / "adapter")
    if what == "no weights":
        (run / "adapter" / "adapter_model.safetensors").unlink()
    if what == "no file":
        (run / "castle.safetensors").unlink()
    if what == "corrupt":
        (run / "adapter" / "learned_embeds.safetensors").write_bytes(b"x")
    if what == "corrupt text encoder":
        (run / "adapter" / "text_encoder").mkdir()
        (run / "adapter" / "text_encoder" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (run / "adapter" / "text_encoder" / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    if what == "picture":
        (run / "images" / "grid.png").write_bytes(b"x")
    if what == "metrics":
        (run / "metrics.json").write_text("[]")
    if what == "share is a file":
        (run / "share").write_text("mine")


@pytest.mark.parametrize(
    ("what", "words", "message"),
    [
        ("no run", [], "castle: no such run folder"),
        ("no config", [], "config.yaml is missing"),
        ("no adapter", [], "holds no finished adapter"),
        ("no weights", [], "adapter_model.safetensors is missing"),
        ("no file", [], "no .safetensors file in it holds what adapter/ holds"),
        ("corrupt", [], "learned_embeds.safetensors: corrupt"),
        ("corrupt text encoder", [], "text_encoder/adapter_model.safetensors: corrupt"),
        ("picture", [], "grid.png: not a whole PNG"),
        ("metrics", [], "metrics.json: must hold a JSON object, got a list"),
        ("share is a file", [], "share: is a file"),
        ("", ["--private"], "--hub_private_repo: only for --push_to_hub"),
        ("", ["--hub_model_id", "castle"], "hub_model_id: 'castle' is not of the form owner/name"),
        ("", ["--token", "hf_secret"], "unknown flag --token"),
    ],
)
def test_every_failure_is_one_line_and_writes_nothing(run, hub, capsys, what, words, message):
    broken(run, what)
    before = sorted(run.parent.rglob("*"))
    assert main(["share", str(run), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(run.parent.rglob("*")) == before
    assert hub.calls == ()


def test_ids_are_checked_before_the_hub_is_asked(run, hub, monkeypatch):
    for name in ("a/b", "some-one/my.castle_2", "A/0"):
        assert check_repo_id(name) == name
    for name in ("a", "a/b/c", "/b", "a/", "a/..", "a--b/c", "a/b.git", "-a/b", "a/b c", "a/bü", "a/" + "b" * 97, ""):
        with pytest.raises(UserError, match="owner/name"):
            push(run / "share", name, False)
    assert hub.calls == ()
    odd = run.rename(run.parent / "my (2nd) --castle.")
    assert own_repo_id(odd) == "someone/my-2nd-castle"


def test_a_checkpoint_is_shared_as_the_adapter_of_its_step(run, capsys):
    assert main(["share", str(run / "checkpoints")]) == 0  # the last one is what the run ended with
    assert read_artefact(run / "share").digest() == read_artefact(run / "adapter").digest()
    assert "## Scores" in (run / "share" / "README.md").read_text()
    last, earlier = (run / "checkpoints" / f"checkpoint-{step}.safetensors" for step in (2, 1))
    with safe_open(last, "pt") as file:
        about = file.metadata() | {"step": "1"}
    save_file({key: value / 2 for key, value in load_file(last).items()}, earlier, about)
    capsys.readouterr()
    assert main(["share", str(earlier)]) == 0
    assert "castle-1.safetensors" in capsys.readouterr().out
    expected = open_adapter(str(earlier)).digest()
    assert expected != read_artefact(run / "adapter").digest()
    for place in (run / "share", run / "share" / "castle-1.safetensors"):
        assert read_artefact(place).digest() == expected
    card = (run / "share" / "README.md").read_text()
    assert "castle-1.safetensors" in card
    assert "## Scores" not in card  # those of the run are of another step
    assert "## Pictures" not in card
