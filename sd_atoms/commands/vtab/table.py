"""Prints the data sets of VTAB, as the paper's Table 5, and checks what is on disk of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd_atoms.data.vtab import TASKS, Task, image_sets, load_tasks
from sd_atoms.data.vtab_check import OnDisk, check_archives, check_task
from sd_atoms.errors import UserError
from sd_atoms.progress import followed
from sd_atoms.report.table import text_table
from sd_atoms.settings import setting

WHAT = "what is listed"
TRAIN, VAL = 800, 200  # images of VTAB-1k, of every task


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms vtab table`."""

    tasks: str = setting("all", WHAT, "all, natural, specialized, structured, demo, or names with commas between")
    data_dir: str | None = setting(None, WHAT, "folder of the data sets: also check what is there; none = do not")


def run(settings: Settings) -> None:
    """Prints the table, and with a folder a second one.

    Raises:
        UserError: a task or the folder is none.
        SystemExit: 1, if something on disk is broken; what is not there is not.
    """
    tasks = load_tasks(settings.tasks)
    if settings.data_dir is not None and not Path(settings.data_dir).is_dir():
        raise UserError(f"data_dir: {settings.data_dir}: is no folder; expected one that holds caltech101/, cifar/, …")
    print(tasks_text(tasks))
    if settings.data_dir is None:
        return
    alone = len(tasks) == 1
    looks = [check_task(task, settings.data_dir, alone) for task in followed(tasks, len(tasks), "Data sets", "task")]
    archives = check_archives(tasks, Path(settings.data_dir))
    print("\n" + disk_text(looks, archives))
    if any(look.problems for look in looks) or any(broken for _, broken in archives):
        raise SystemExit(1)


def tasks_text(tasks: Sequence[Task]) -> str:
    """Table 5, with the prompts."""
    rows = []
    for task in tasks:
        own = ["", ""] if task.name not in TASKS else [f"{TRAIN}", f"{VAL}"]
        counts = [f"{task.classes}", *own, f"{task.test_images:,}"]
        rows.append([task.group, task.title, task.name, *counts, task.prompt])
    header = ["group", "data set", "task", "classes", "train", "val", "test", "prompt"]
    table = text_table(header, rows, left=(0, 1, 2, 7))
    return f"{table}\ntasks: {len(tasks)}, image sets: {len(image_sets(tasks))}"


def disk_text(looks: Sequence[OnDisk], archives: Sequence[tuple[str, bool]]) -> str:
    """What is on disk of each task, then what is wrong or odd, line by line."""
    rows = []
    for look in looks:
        counts = [f"{count:,}" if count else "" for count in (look.train_images, look.test_images)]
        per_class = "" if look.smallest is None else f"{look.smallest} to {look.largest}"
        rows.append([look.task.name, look.layout or "", *counts, per_class, look.state])
    lines = [text_table(["task", "layout", "train", "test", "train per class", "state"], rows, left=(0, 1, 5))]
    lines += [f"{look.task.name}: {text}" for look in looks for text in (*look.problems, *look.notes)]
    lines += [text for text, _ in archives]
    return "\n".join(lines)
