"""Named sets of target modules."""

from torch import nn

from sd_atoms.tuner.plan import CONVOLUTIONS

TARGET_SETS = {
    "conv3x3": "every Conv2d with a 3×3 kernel",
    "conv": "every Conv1d, Conv2d and Conv3d",
    "spatial": "every convolution with a kernel larger than 1, depthwise ones too",
    "dense": "every convolution in one group and every Linear layer",
    "conv+linear": "every convolution and every Linear layer",
    "attn": "the query, key, value and output projections of attention (to_q, to_k, to_v, to_out.0)",
    "all-linear": "every Linear layer",
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def named_targets(model: nn.Module, target_set: str) -> list[str]:
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
        if _belongs(target_set, name, layer):
            names.append(name)
    if not names:
        raise ValueError(f"target_modules={target_set!r} matches no layer of {type(model).__name__}")
    return names


def _belongs(target_set: str, name: str, layer: nn.Module) -> bool:
    if target_set == "conv3x3":
        return type(layer) is nn.Conv2d and layer.kernel_size == (3, 3)
    conv, linear = type(layer) in CONVOLUTIONS, type(layer) is nn.Linear
    if target_set == "spatial":
        return conv and max(layer.kernel_size) > 1
    if target_set == "dense":
        return linear or (conv and layer.groups == 1)
    if target_set == "conv":
        return conv
    if target_set == "conv+linear":
        return conv or linear
    return linear and (target_set == "all-linear" or f".{name}".endswith(tuple(f".{end}" for end in ATTENTION)))
