"""What the tuners of this package refuse, and the layer below adapters."""

from collections.abc import Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sd_atoms.errors import UserError

ERRORS_SHOWN = 4


def refuse_unfit(setting: str, unfit: Sequence[str]) -> None:
    """Refuses targets that cannot be taken.

    Args:
        setting: what says that they are targets.
        unfit: the name of each and why; none is silence.

    Raises:
        ValueError: there are some; the message has the first of them.
    """
    if unfit:
        more = f" (and {len(unfit) - ERRORS_SHOWN} more)" if len(unfit) > ERRORS_SHOWN else ""
        raise ValueError(f"{setting}: {len(unfit)} layers do not fit: {'; '.join(unfit[:ERRORS_SHOWN])}{more}")


def refuse_leaf_offload(layer: nn.Module) -> None:
    """Stops where diffusers' group offloading keeps the weights of this very layer away until it is itself called.

    Raises:
        UserError: it does so.
    """
    hooks = getattr(layer, "_diffusers_hook", None)
    if hooks is not None and hooks.get_hook("group_offloading") is not None:
        raise UserError(
            "group offloading at leaf_level takes the weights from under adapters; use offload_type='block_level', "
            "or fuse the adapter (pipe.fuse_lora()) before"
        )


def base_of(module: nn.Module) -> nn.Module:
    """The layer itself, without the adapters around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
