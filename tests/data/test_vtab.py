"""The registry of VTAB against the figures of its paper, and the readers of every layout, whole and malformed."""

import gzip
import io
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from sd_atoms.commands.vtab import table
from sd_atoms.data.labelled import task_images
from sd_atoms.data.vtab import DEMO, TASKS, image_sets, load_task, load_tasks
from sd_atoms.data.vtab_check import check_task
from sd_atoms.errors import UserError

# task -> classes, test images: Table 5 of the paper
FACTS = {
    "cifar": (100, 10_000), "caltech101": (102, 6_084), "dtd": (47, 1_880), "oxford_flowers102": (102, 6_149),
    "oxford_iiit_pet": (37, 3_669), "svhn": (10, 26_032), "sun397": (397, 21_750), "patch_camelyon": (2, 32_768),
    "eurosat": (10, 5_400), "resisc45": (45, 6_300), "diabetic_retinopathy": (5, 42_670), "clevr_count": (8, 15_000),
    "clevr_dist": (6, 15_000), "dmlab": (6, 22_735), "kitti": (4, 711), "dsprites_loc": (16, 73_728),
    "dsprites_ori": (16, 73_728), "smallnorb_azi": (18, 12_150), "smallnorb_ele": (9, 12_150),
}  # fmt: skip
PIXELS = np.arange(10 * 20 * 24, dtype=np.uint8).reshape(10, 20, 24)


def test_registry_has_the_paper_s_nineteen_tasks_over_sixteen_sets():
    tasks = load_tasks("all")
    assert {task.name: (task.classes, task.test_images) for task in tasks} == FACTS
    sets = image_sets(tasks)
    assert len(sets) == 16
    assert {name: len(own) for name, own in sets.items() if len(own) > 1} == {
        "clevr": 2,
        "dsprites": 2,
        "smallnorb": 2,
    }
    for own in sets.values():  # images of one set are generated once, by one prompt
        assert len({task.prompt for task in own}) == 1
    unnamed = {task.image_set for task in tasks if not task.names_classes}
    assert unnamed == {"clevr", "dmlab", "dsprites", "kitti", "smallnorb"}
    for task in tasks:
        assert len(set(task.class_names)) == task.classes
        assert len(set(task.prompts)) == (task.classes if task.names_classes else 1)


def test_prompts_are_those_of_the_experiment():
    assert load_task("dtd").prompts[0] == "This is a picture of banded."
    assert load_task("patch_camelyon").prompts == (
        "This is a histopathologic scans without tumor.", "This is a histopathologic scans with tumor."
    )  # fmt: skip
    assert load_task("svhn").prompts[7] == "This is a picture of street view house number 7."
    assert load_task("diabetic_retinopathy").prompts[0] == "This is a retina image with no diabetic retinopathy."


def test_tasks_go_by_their_folders_and_groups_too():
    assert [load_task(name).name for name in ("cifar100", "flowers102", "pets")] == [
        "cifar", "oxford_flowers102", "oxford_iiit_pet"
    ]  # fmt: skip
    assert [task.name for task in load_tasks("specialized,dtd,dtd")][-2:] == ["diabetic_retinopathy", "dtd"]
    assert len(load_tasks("natural")) == 7
    with pytest.raises(UserError, match="vtab:imagenet: no such task; there is caltech101"):
        load_task("imagenet")
    with pytest.raises(UserError, match="tasks: ' , '"):
        load_tasks(" , ")


def test_dsprites_classes_are_of_the_sizes_that_flooring_gives():
    sizes = [len([o for o in range(40) if int(o / 2.5) == label]) for label in range(16)]
    spans = [name.split()[1::2] for name in load_task("dsprites_ori").class_names]
    assert [int(high) - int(low) + 1 for low, high in ((own[0], own[1]) for own in spans)] == sizes == [3, 2] * 8


def test_a_task_of_one_s_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text('title: Mine\ngroup: own\ntest_images: 4\nprompt: "photo of {}."\nclass_names: [a cat, a dog]\n')
    task = load_task(str(file))
    assert (task.prompts, task.image_set, task.folders) == (("photo of a cat.", "photo of a dog."), "mine", ("mine",))
    assert load_task(task.name) == task  # it goes by its file
    file.write_text("title: 3\ngroup: own\nclass_names: [cat, cat]\nprompt: x\nclasses: 2\n")
    with pytest.raises(UserError) as error:
        load_task(str(file))
    for part in ("unknown key 'classes'", "test_images is required", "title: 3 is no text", "'cat' is there twice"):
        assert part in str(error.value)


def picture(number: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS[number % 10]).save(file, format="PNG")
    return file.getvalue()


def write_vtab_1k(root, name="patch_camelyon", train=8, val=2, test=4):
    """VTAB-1k as distributed: the two classes in turn; train800val200 holds copies."""
    folder = root / name
    counts = {"train800": range(train), "val200": range(train, train + val), "test": range(100, 100 + test)}
    counts["train800val200"] = range(train + val)
    for split, numbers in counts.items():
        (folder / "images" / split).mkdir(parents=True)
        lines = []
        for place, number in enumerate(numbers):
            (folder / "images" / split / f"{place:06d}.jpg").write_bytes(picture(number))
            lines.append(f"images/{split}/{place:06d}.jpg {number % 2}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def write_idx(folder, packed: bool, split="train", count=10):
    folder.mkdir(exist_ok=True)
    begin, end = {"train": "train", "test": "t10k"}[split], ".gz" if packed else ""
    pack = gzip.compress if packed else bytes
    images = struct.pack(">4I", 0x803, count, 20, 24) + PIXELS[:count].tobytes()
    (folder / f"{begin}-images-idx3-ubyte{end}").write_bytes(pack(images))
    labels = struct.pack(">2I", 0x801, count) + bytes(number % 2 for number in range(count))
    (folder / f"{begin}-labels-idx1-ubyte{end}").write_bytes(pack(labels))
    return folder


def write_shards(folder, shards=2, each=3, label=lambda number: number % 2):
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        (folder / split / "nshards.txt").write_text(f"{shards}\n")
        for shard in range(shards):
            with tarfile.open(folder / split / f"{shard}.tar", "w") as tar:
                for number in range(each):
                    for end, content in (("webp", picture(number)), ("cls", b"%d" % label(number))):
                        entry = tarfile.TarInfo(f"s{shard * each + number:07d}.{end}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
    (folder / "classnames.txt").write_text("no tumor\ntumor\n")
    return folder


def write_class_folders(folder, names=("without", "with"), each=2):
    for split in ("train", "test"):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for number in range(each):
                (folder / split / name / f"{number}.png").write_bytes(picture(number))
    return folder


CAMELYON = "patch_camelyon"  # two classes


@pytest.mark.parametrize("layout", ["VTAB-1k", "IDX", "IDX packed", "webdataset", "class folders", "datasets"])
def test_every_layout_gives_images_labels_and_prompts(tmp_path, layout):
    if layout == "VTAB-1k":
        write_vtab_1k(tmp_path)
    elif layout.startswith("IDX"):
        for split in ("train", "test"):
            write_idx(tmp_path / CAMELYON, layout.endswith("packed"), split)
    elif layout == "webdataset":
        write_shards(tmp_path / CAMELYON)
    elif layout == "class folders":
        write_class_folders(tmp_path / CAMELYON)
    else:
        datasets = pytest.importorskip("datasets")
        columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
        rows = {"image": [Image.fromarray(PIXELS[n]) for n in range(4)], "label": [0, 1, 0, 1]}
        table = datasets.Dataset.from_dict(rows, features=columns)
        datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / CAMELYON)
    task = load_task(CAMELYON)
    for place in (tmp_path, tmp_path / CAMELYON):
        for split in ("train", "test"):
            found = task_images(task, str(place), split)
            assert {image.label for image in found} == {0, 1}
            for image in found:
                assert image.caption == task.prompts[image.label]
                assert image.read().size == (24, 20)
    first = task_images(task, str(tmp_path))[0]
    assert np.array_equal(np.asarray(first.read())[..., 0], PIXELS[0])


def test_classes_go_by_their_names_where_a_source_has_the_task_s(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = list(load_task(CAMELYON).class_names)

    def table(folder, names):
        columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"image": [Image.fromarray(PIXELS[n]) for n in range(2)], "label": [0, 1]}
        made = datasets.Dataset.from_dict(rows, features=columns)
        datasets.DatasetDict(train=made, test=made).save_to_disk(tmp_path / folder / CAMELYON)
        return [image.label for image in task_images(load_task(CAMELYON), str(tmp_path / folder))]

    assert table("same", names) == [0, 1]
    assert table("turned", [name.upper() for name in reversed(names)]) == [1, 0]
    assert table("others", ["a", "b"]) == [0, 1]  # in their order
    with pytest.raises(UserError, match="has number 0, in patch_camelyon another"):
        table("mixed", [names[1], "b"])
    shards = write_shards(tmp_path / "shards")
    (shards / "classnames.txt").write_text("\n".join(reversed(names)))
    assert [image.label for image in task_images(load_task(CAMELYON), str(shards))][:4] == [1, 0, 1, 1]


def test_the_folder_of_another_task_is_refused(tmp_path):
    write_class_folders(tmp_path / "eurosat", ("0", "1"))
    with pytest.raises(UserError, match="is the folder of another task than patch_camelyon"):
        task_images(load_task(CAMELYON), str(tmp_path / "eurosat"))


def test_names_of_classes_may_be_of_any_script(tmp_path):
    (tmp_path / "own.yaml").write_text(
        "title: own\ngroup: own\ntest_images: 4\nprompt: a {}\nclass_names: [猫, 犬]\n", encoding="utf-8"
    )
    write_class_folders(tmp_path / "set", ("犬", "猫"))
    found = task_images(load_task(str(tmp_path / "own.yaml")), str(tmp_path / "set"))
    assert [image.caption for image in found] == ["a 猫"] * 2 + ["a 犬"] * 2


def test_vtab_1k_has_four_lists_and_training_takes_the_thousand(tmp_path):
    write_vtab_1k(tmp_path)
    counts = {split: len(task_images(load_task(CAMELYON), str(tmp_path), split))
              for split in ("train", "train800", "val200", "train800val200", "test")}  # fmt: skip
    assert counts == {"train": 10, "train800": 8, "val200": 2, "train800val200": 10, "test": 4}


def test_folders_may_have_their_other_names(tmp_path):
    write_vtab_1k(tmp_path, "cifar100")
    assert len(task_images(load_task("cifar"), str(tmp_path), "test")) == 4


def test_windows_line_ends_a_mark_at_the_start_and_spaces_in_names_are_read(tmp_path):
    folder = write_vtab_1k(tmp_path)
    (folder / "images/test/000000.jpg").rename(folder / "images/test/a b.jpg")
    (folder / "test.txt").write_bytes(b"\xef\xbb\xbfimages/test/a b.jpg 1\r\nimages/test/000001.jpg 0\r\n\r\n")
    assert [image.label for image in task_images(load_task(CAMELYON), str(tmp_path), "test")] == [1, 0]


MALFORMED = {
    "images/test/000009.jpg 0": "images/test/000009.jpg is missing",
    "images/test/000001.jpg 2": "label 2 is out of range; the 2 classes are 0 to 1",
    "images/test/000001.jpg -1": "label -1 is out of range",
    "images/test/000000.jpg 1": "images/test/000000.jpg is in line 1 already",
    "/etc/hostname 0": "/etc/hostname is absolute",
    "C:/images/1.jpg 0": "C:/images/1.jpg is absolute or of another system",
    "images\\test\\000001.jpg 0": "is absolute or of another system",
    "images/../../x.jpg 1": "images/../../x.jpg leaves the folder",
    "images/test/000001.jpg": "'images/test/000001.jpg' is not `path label`",
    "images/test/000001.jpg one": "is not `path label`",
}


@pytest.mark.parametrize("line", MALFORMED)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_malformed_line_of_a_list_is_named(tmp_path, line, end):
    folder = write_vtab_1k(tmp_path)
    (folder / "test.txt").write_bytes(f"images/test/000000.jpg 0{end}{line}{end}".encode())
    with pytest.raises(UserError) as error:
        task_images(load_task(CAMELYON), str(tmp_path), "test")
    assert "test.txt, line 2: " in str(error.value)
    assert MALFORMED[line] in str(error.value)
    assert "\n" not in str(error.value)


def test_of_many_mistakes_the_first_are_told_and_the_others_counted(tmp_path):
    folder = write_vtab_1k(tmp_path)
    (folder / "test.txt").write_text("".join(f"images/test/{n:06d}.jpg 7\n" for n in range(24)))
    with pytest.raises(UserError, match="24 mistakes:\n(.*\n){20}.*… and 4 more"):
        task_images(load_task(CAMELYON), str(tmp_path), "test")


def test_an_empty_or_missing_list_and_one_that_is_no_text(tmp_path):
    folder = write_vtab_1k(tmp_path)
    for content, why in ((b"\n", "is empty"), (b"\xff\xfe\x00", "is not UTF-8"), (None, "No such file")):
        (folder / "test.txt").unlink() if content is None else (folder / "test.txt").write_bytes(content)
        with pytest.raises(UserError, match=f"test.txt: .*{why}"):
            task_images(load_task(CAMELYON), str(tmp_path), "test")


@pytest.mark.parametrize("packed", [False, True])
def test_broken_idx_files_are_named(tmp_path, packed):
    end = ".gz" if packed else ""

    def said() -> str:
        with pytest.raises(UserError) as error:
            task_images(load_task(CAMELYON), str(tmp_path))
        return str(error.value)

    write_idx(tmp_path, packed)
    images, labels = (tmp_path / f"train-{name}-ubyte{end}" for name in ("images-idx3", "labels-idx1"))
    whole = images.read_bytes()
    images.write_bytes(whole[:-7])
    assert "cut short" in said()
    assert str(images) in said()
    images.write_bytes(gzip.compress(b"hello") if packed else b"hello")
    assert "expected an IDX file of bytes in 3 dimensions" in said()
    images.write_bytes(whole)
    few = struct.pack(">2I", 0x801, 9) + bytes(9)
    labels.write_bytes(gzip.compress(few) if packed else few)
    assert "has 9 labels for 10 images" in said()
    wrong = struct.pack(">2I", 0x801, 10) + bytes([0, 1] * 4 + [5, 1])
    labels.write_bytes(gzip.compress(wrong) if packed else wrong)
    assert "image 8: has label 5; the 2 classes of patch_camelyon are 0 to 1" in said()
    labels.unlink()
    assert "lacks the labels of split train" in said()


def test_broken_shards_are_named(tmp_path):
    def said(change, **how) -> str:
        folder = write_shards(tmp_path / str(len(list(tmp_path.iterdir()))), **how)
        change(folder)
        with pytest.raises(UserError) as error:
            task_images(load_task(CAMELYON), str(folder))
        assert "\n" not in str(error.value)
        return str(error.value)

    def cut(folder):
        content = (folder / "train/1.tar").read_bytes()
        (folder / "train/1.tar").write_bytes(content[:1000])

    def without_a_class(folder):
        with tarfile.open(folder / "train/0.tar", "w") as tar:
            entry = tarfile.TarInfo("s0.webp")
            entry.size = len(picture())
            tar.addfile(entry, io.BytesIO(picture()))

    assert "train/1.tar: cannot be read" in said(cut)
    assert "train/1.tar: is missing; nshards.txt says 2" in said(lambda folder: (folder / "train/1.tar").unlink())
    assert "nshards.txt: says 'many'" in said(lambda folder: (folder / "train/nshards.txt").write_text("many"))
    assert "has 3 classes; patch_camelyon has 2" in said(lambda f: (f / "classnames.txt").write_text("a\nb\nc\n"))
    assert "s0.webp: has no class; expected an entry s0.cls" in said(without_a_class)
    assert "has label 4" in said(lambda folder: None, label=lambda number: 4 if number == 1 else 0, shards=1)


def test_class_folders_of_other_classes_are_named(tmp_path):
    folder = write_class_folders(tmp_path / "a", ("without", "With", "else"))
    with pytest.raises(UserError, match="3 folders of classes, patch_camelyon has 2 classes; not of it: else"):
        task_images(load_task(CAMELYON), str(folder))
    folder = write_class_folders(tmp_path / "b", ("with",))
    with pytest.raises(UserError, match="1 folders .* missing: without"):
        task_images(load_task(CAMELYON), str(folder))
    folder = write_class_folders(tmp_path / "c", ("0", "1"))  # by number
    (folder / "train" / ".thumbnails").mkdir()
    (folder / "train" / ".thumbnails" / "0.png").write_bytes(picture(0))
    assert [image.label for image in task_images(load_task(CAMELYON), str(folder))] == [0, 0, 1, 1]


def test_a_table_without_classes_or_with_one_too_many_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [Image.fromarray(PIXELS[0])], "label": [2], "text": ["x"]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / CAMELYON)
    for column, why in (("label", "row 0: has label 2"), ("text", "expected classes"), ("fine", "no column 'fine'")):
        with pytest.raises(UserError, match=why):
            task_images(load_task(CAMELYON), str(tmp_path), label_column=column)
    with pytest.raises(UserError, match="no split 'test'"):
        task_images(load_task(CAMELYON), str(tmp_path), "test")


def test_no_folder_an_empty_one_and_an_unknown_split(tmp_path):
    with pytest.raises(UserError, match="dataset_dir: .*/nowhere: is no folder"):
        task_images(load_task("dtd"), str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no images of dtd, in dtd/ or itself; expected train800val200.txt"):
        task_images(load_task("dtd"), str(tmp_path))
    write_idx(tmp_path, packed=False)
    with pytest.raises(UserError, match="dataset_split: 'val200': .* has train and test"):
        task_images(load_task(CAMELYON), str(tmp_path), "val200")


def test_what_is_on_disk_is_counted_and_what_is_broken_named(tmp_path, capsys):
    write_vtab_1k(tmp_path)
    broken = write_vtab_1k(tmp_path, "kitti")
    (broken / "images/test/000003.jpg").unlink()
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("vtab-1k/dtd/test.txt", "images/test/000000.jpg 0")
    whole = (tmp_path / "some.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-20])
    (tmp_path / "._cut.zip").write_bytes(b"Mac OS X")
    (tmp_path / "bent.zip").write_bytes(whole.replace(b"000000.jpg", b"000001.jpg"))
    with tarfile.open(tmp_path / "kitti.tar.gz", "w:gz") as tar:
        tar.add(broken, "kitti")
    (tmp_path / "short.tar.gz").write_bytes((tmp_path / "kitti.tar.gz").read_bytes()[:-300])
    looks = {name: check_task(load_task(name), str(tmp_path), False) for name in (*TASKS, *DEMO)}
    assert {look.state for name, look in looks.items() if name not in (CAMELYON, "kitti")} == {"missing"}
    own = looks[CAMELYON]
    assert (own.state, own.layout, own.train_images, own.test_images) == ("odd", "VTAB-1k", 10, 4)
    assert (own.smallest, own.largest) == (5, 5)
    assert "test: 4 images, 32,768 are usual" in own.notes
    assert looks["kitti"].state == "broken"

    with pytest.raises(SystemExit) as stop:
        table.run(table.Settings(data_dir=str(tmp_path)))
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "tasks: 19, image sets: 16" in out
    assert "._cut.zip" not in out
    assert "kitti: " in out
    assert "test.txt, line 4: images/test/000003.jpg is missing" in out
    assert "kitti: train800: 2 of 4 classes have no image: " in out
    assert "some.zip: whole, holds 1 of 19 tasks, not caltech101, cifar, oxford_flowers102" in out
    assert "kitti.tar.gz: whole, holds 1 of 19 tasks" in out
    for name in ("cut.zip", "bent.zip", "short.tar.gz"):
        assert f"{name}: broken" in out


def test_the_table_without_a_folder_checks_nothing(capsys):
    table.run(table.Settings(tasks="structured"))
    out = capsys.readouterr().out
    assert "tasks: 8, image sets: 5" in out
    assert "dsprites_ori" in out
    with pytest.raises(UserError, match="data_dir: nowhere: is no folder"):
        table.run(table.Settings(data_dir="nowhere"))
