"""Which image sizes a base takes, in pixels."""

from sd_atoms.errors import UserError


def training_unit_px(pipe) -> int:
    """What the sides of training images are multiples of: every level of the UNet halves them evenly."""
    return pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)


def training_resolution_px(pipe, resolution: int | None) -> int:
    """The side of the training images: as set, or the base's own.

    Raises:
        UserError: the base cannot be trained at that size.
    """
    side = resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    _check_multiple(side, training_unit_px(pipe))
    return side


def check_drawn_size(pipe, side_px: int | None, name: str = "resolution") -> None:
    """Refuses a side that the base cannot draw; `name` is that of the setting.

    Raises:
        UserError: it is not a whole number of latents.
    """
    if side_px is not None:
        _check_multiple(side_px, pipe.vae_scale_factor, name)


def _check_multiple(side_px: int, unit_px: int, name: str = "resolution") -> None:
    if side_px % unit_px:
        raise UserError(f"{name}: {side_px} is not a multiple of {unit_px}, which this base needs")
