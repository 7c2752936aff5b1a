"""The tasks of VTAB (arXiv 1910.04867), 19 over 16 image sets, and two sets to try everything with.

A task is a file configs/vtab/NAME.yaml: title, group, test_images, prompt, class_names in the order of their labels,
and, where they differ from the task's name, image_set and folders. A file of your own describes another data set.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sd_atoms.data.prompts import fill
from sd_atoms.errors import UserError
from sd_atoms.settings import read_config, read_yaml
from sd_atoms.values import shown

PREFIX = "vtab:"  # of --dataset_name
NATURAL = ("caltech101", "cifar", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397")
SPECIALIZED = ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy")
STRUCTURED = (
    "clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc", "dsprites_ori", "smallnorb_azi", "smallnorb_ele",
)  # fmt: skip
TASKS = (*NATURAL, *SPECIALIZED, *STRUCTURED)
DEMO = ("fashion_mnist", "pocket_world")  # none of VTAB's


@dataclass(frozen=True)
class Task:
    """A labelling of an image set.

    name: of its packaged file, or the path of one's own. title: as people write it. group: natural, specialized,
    structured, demo, or another word. test_images: how many its test split has. prompt: with {} for the class, or
    without where no class is named. class_names: by label. image_set: what tasks on the same images share. folders:
    its names on disk, the usual one first.
    """

    name: str
    title: str
    group: str
    test_images: int
    prompt: str
    class_names: tuple[str, ...]
    image_set: str
    folders: tuple[str, ...]

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.class_names)

    @property
    def names_classes(self) -> bool:
        """Whether the prompt does."""
        return "{}" in self.prompt

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt of each label."""
        return tuple(fill(self.prompt, name) for name in self.class_names)


def load_task(name: str) -> Task:
    """A task by its name, one of its folders' names, or a file of one's own, NAME.yaml.

    Raises:
        UserError: there is none, or the file says something else than a task.
    """
    if name.endswith((".yaml", ".yml")):
        return _task(name, name, read_yaml(name))
    if name in (*TASKS, *DEMO):
        return _packaged(name)
    for known in TASKS:
        if name in _packaged(known).folders:
            return _packaged(known)
    raise UserError(f"{PREFIX}{name}: no such task; there is {', '.join((*TASKS, *DEMO))}, or a file NAME.yaml")


def is_folder_of_a_task(name: str) -> bool:
    """Whether a folder of that name holds a packaged task's images."""
    return any(name in _packaged(known).folders for known in (*TASKS, *DEMO))


def load_tasks(names: str) -> list[Task]:
    """ "all" of VTAB, or those named, with commas between; a group stands for its tasks. Raises as `load_task`."""
    groups = {"all": TASKS, "natural": NATURAL, "specialized": SPECIALIZED, "structured": STRUCTURED, "demo": DEMO}
    words = [word.strip() for word in names.split(",") if word.strip()]
    found = [load_task(name) for word in words for name in groups.get(word, (word,))]
    if not found:
        raise UserError(f"tasks: {names!r}: all, natural, specialized, structured, demo or names of tasks are allowed")
    return list({task.name: task for task in found}.values())


def image_sets(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    """Image set -> its tasks, in the order of the tasks."""
    found: dict[str, list[Task]] = {}
    for task in tasks:
        found.setdefault(task.image_set, []).append(task)
    return found


@functools.cache
def _packaged(name: str) -> Task:
    return _task(name, f"vtab/{name}", read_config(f"vtab/{name}"))


def _task(name: str, path: str, entries: dict[str, Any]) -> Task:
    entries = {"image_set": Path(name).stem, "folders": [Path(name).stem]} | entries
    kinds = [field.name for field in fields(Task) if field.name != "name"]
    problems = [f"unknown key {shown(key)}" for key in entries if key not in kinds]
    problems += [f"{key} is required" for key in kinds if key not in entries]
    for key in ("title", "group", "prompt", "image_set"):
        if key in entries and not isinstance(entries[key], str):
            problems.append(f"{key}: {shown(entries[key])} is no text")
    for key in ("class_names", "folders"):
        value = entries.get(key, ["-"])
        if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
            problems.append(f"{key}: {shown(value)} is no list of texts")
        elif len(set(value)) < len(value):
            problems.append(f"{key}: {next(text for text in value if value.count(text) > 1)!r} is there twice")
    count = entries.get("test_images", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        problems.append(f"test_images: {shown(count)} is not a whole number from 1 on")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    lists = {key: tuple(entries[key]) for key in ("class_names", "folders")}
    return Task(**{**entries, **lists, "name": name})
