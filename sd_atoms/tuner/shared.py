"""What filter atoms share with the other tuners of this package: strengths, and which layers are refused."""

from collections.abc import Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sd_atoms.errors import UserError

ERRORS_SHOWN = 4


class Strengths:
    """The strengths of a layer's adapters, `scaling`, by the calls that PEFT and diffusers make."""

    cast_input_dtype_enabled = True  # diffusers switches it, as LoRA's, for layer-wise casting; inputs are never cast

    scaling: dict[str, float]
    initial_scaling: dict[str, float]  # what the strength of an adapter is when it is set to 1

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the strength of one adapter; one that this layer lacks is passed over, as PEFT does."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale) * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undoes `scale_layer(scale)`; without a scale the active adapters go back to their strength at the start."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.initial_scaling[name] if scale is None else self.scaling[name] / scale


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
