"""Lays out small real data sets as VTAB-1k is, without a download, to try everything with."""

from dataclasses import dataclass
from pathlib import Path

from sd_atoms.data.vtab_demo import DEBIAN, is_there, make_dsprites, make_fashion_mnist, make_pocket_world
from sd_atoms.errors import UserError
from sd_atoms.settings import setting

WHAT = "what is made"
SETS = {  # -> the tasks of each
    "dsprites": ("dsprites_loc", "dsprites_ori"),
    "fashion_mnist": ("fashion_mnist",),
    "pocket_world": ("pocket_world",),
}


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms vtab make-demo`."""

    folder: str = setting(None, WHAT, "where they go", required=True, positional=True)
    sets: str = setting(",".join(SETS), WHAT, "comma-separated")
    train_images: int = setting(1000, WHAT, "of each set; a fifth of them is val200", low=5, high=10**6)
    test_images: int = setting(1000, WHAT, "of each set", low=1, high=10**6)
    seed: int = setting(0, WHAT, "of what is drawn and chosen", low=0)
    fashion_mnist_dir: str = setting(DEBIAN, WHAT, "folder with the four IDX files of Fashion-MNIST")


def run(settings: Settings) -> None:
    """Makes the sets that are not there yet.

    Raises:
        UserError: a set is unknown, was made with other numbers of images, or the source of one is not there.
    """
    chosen = [name.strip() for name in settings.sets.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in SETS]
    if unknown or not chosen:
        raise UserError(
            f"sets: {', '.join(unknown) or repr(settings.sets)}: of {', '.join(SETS)}, with commas between"
        )
    folder, counts = Path(settings.folder), (settings.train_images, settings.test_images)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"folder: {folder} is a file")
    source = Path(settings.fashion_mnist_dir)
    if "fashion_mnist" in chosen and not source.is_dir():
        raise UserError(
            f"fashion_mnist_dir: {source} is no folder; `apt-get install dataset-fashion-mnist` brings it, or give "
            "--sets dsprites,pocket_world"
        )
    for name in chosen:
        if all(is_there(folder, task, *counts) for task in SETS[name]):
            print(f"{name}: is there")
            continue
        if name == "dsprites":
            make_dsprites(folder, *counts, settings.seed)
        elif name == "fashion_mnist":
            make_fashion_mnist(folder, *counts, settings.seed, source)
        else:
            make_pocket_world(folder, *counts, settings.seed)
        print(f"{name}: {counts[0]:,} + {counts[1]:,} images")
    print(f"To see them: sd-atoms vtab table --tasks dsprites_loc,dsprites_ori,demo --data_dir {folder}")
