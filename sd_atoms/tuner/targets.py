"""Named sets of target modules."""

from torch import nn

TARGET_SETS = {
    "conv3x3": "every Conv2d with a 3×3 kernel (52 in SD v1-4's UNet)",
    "conv": "every Conv2d (98 in SD v1-4's UNet)",
}


def conv_targets(model: nn.Module, target_set: str) -> list[str]:
    """The names of the modules of `model` that a named set means, in module order.

    A module that already carries an adapter counts by the layer it wraps.

    Raises:
        ValueError: the set is unknown, or the model has no such layer.
    """
    if target_set not in TARGET_SETS:
        raise ValueError(f"target_modules={target_set!r}: the named sets are {', '.join(TARGET_SETS)}")
    names = []
    for name, module in model.named_modules():
        if "base_layer" in name.split("."):
            continue
        layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if type(layer) is nn.Conv2d and (target_set == "conv" or layer.kernel_size == (3, 3)):
            names.append(name)
    if not names:
        raise ValueError(f"target_modules={target_set!r} matches no layer of {type(model).__name__}")
    return names
