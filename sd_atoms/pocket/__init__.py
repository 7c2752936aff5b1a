"""The pocket base: a Stable-Diffusion-shaped pipeline of nine million parameters that comes with the package.

`pocket` loads by the same calls as any base model; only `packaged_path` knows where its files are.
`world` renders the pictures it was pretrained on, `pretrain` makes it again from nothing.
"""

from pathlib import Path

from sd_atoms.errors import UserError

_FOLDER = Path(__file__).parent
WEIGHTS_FOLDER = _FOLDER / "weights"

_PACKAGED = {
    "pocket": WEIGHTS_FOLDER / "pocket-sd",  # a StableDiffusionPipeline
    "pocket:clip": WEIGHTS_FOLDER / "pocket-clip",  # the CLIPModel that scores its pictures
    "pocket:castle": _FOLDER / "concepts" / "castle",  # five photos of a personal concept
    "pocket:canal": _FOLDER / "concepts" / "canal",
}


def packaged_path(name: str) -> Path | None:
    """The folder behind a packaged name; None for any name that is not one, such as a path or a hub id.

    Raises:
        UserError: `name` begins with "pocket:" but nothing of that name is packaged.
    """
    if name in _PACKAGED:
        return _PACKAGED[name]
    if name.startswith("pocket:"):
        raise UserError(f"{name!r} is not packaged; there is {', '.join(_PACKAGED)}")
    return None
