"""The methods that come with this package."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from sd_atoms.methods.difffit import DiffFitConfig
from sd_atoms.methods.lora_conv import LoraConvConfig
from sd_atoms.methods.lycoris import LycorisConfig
from sd_atoms.methods.method import Method, Target, resolved_target
from sd_atoms.methods.selective import SelectiveConfig
from sd_atoms.tuner import TARGET_SETS, AtomsConfig
from sd_atoms.tuner.config import is_count
from sd_atoms.tuner.plan import CONVOLUTIONS
from sd_atoms.tuner.shared import base_of, refuse_unfit

DEFAULT_RANK = 4
DEFAULT_OFT_BLOCK = 32  # PEFT's own
ATOMS_SETTINGS = ("m", "m1", "train_beta", "kc", "m_c", "block_layers", "solver", "l1", "form")
# By `sd-atoms sweep` for atoms and rows; 1e-4 is usual for LoRA, 1e-3 is DiffFit's, 5e-6 is DreamBooth's.
RATES = {"atoms": 1e-2, "beta": 1e-3, "block": 1e-2, "lora": 1e-4, "bias": 1e-3, "norm": 1e-3, "scale": 1e-3}
RATES |= {"full": 5e-6, "row": 1e-3}


def refuse_wrong_layers(model: nn.Module, config: PeftConfig) -> PeftConfig:
    """The config, if PEFT's own tuner computes every layer it targets as the layer itself would.

    Raises:
        ValueError: it would not; the message names the layers.
    """
    reason = WRONG_LAYERS.get(config.peft_type.value, lambda layer: None)
    found = {
        name: base_of(module)
        for name, module in model.named_modules()
        if "base_layer" not in name.split(".") and bool(check_target_module_exists(config, name))
    }
    if not found and config.target_modules:
        raise ValueError(f"target {config.target_modules!r} matches no layer; named sets are {', '.join(TARGET_SETS)}")
    refuse_unfit("target", [f"{name} {reason(layer)}" for name, layer in found.items() if reason(layer)])
    return config


def _wrong_for_lora(layer: nn.Module) -> str | None:
    if not isinstance(layer, CONVOLUTIONS):
        return None
    if any(step != 1 for step in layer.dilation):
        return f"has dilation={layer.dilation}, which PEFT's LoRA ignores"
    if layer.groups > 1:
        return f"has groups={layer.groups}, which PEFT's LoRA cannot merge"
    return _wrong_padding(layer)


def _wrong_padding(layer: nn.Module) -> str | None:
    if isinstance(layer, CONVOLUTIONS) and layer.padding_mode != "zeros":
        return f"has padding_mode={layer.padding_mode!r}, which PEFT's tuners ignore"
    return None


def _wrong_for_oft(layer: nn.Module) -> str | None:
    # PEFT folds the rotated patches back without dividing by their overlap: at the identity, inner pixels are
    # multiplied by the number of taps
    return f"is a {type(layer).__name__}, OFT is right for Linear" if isinstance(layer, CONVOLUTIONS) else None


WRONG_LAYERS: dict[str, Callable[[nn.Module], str | None]] = {
    "LORA": _wrong_for_lora,
    "LOHA": _wrong_padding,
    "LOKR": _wrong_padding,
    "OFT": _wrong_for_oft,
}


def _rank_alpha_factor(settings: Mapping[str, Any]) -> tuple[int, float, int]:
    rank, alpha, factor = settings.get("rank", DEFAULT_RANK), settings.get("alpha"), settings.get("factor", -1)
    if not is_count(rank, 1):
        raise ValueError(f"rank={rank!r}: an integer from 1 on is allowed")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or alpha <= 0):
        raise ValueError(f"alpha={alpha!r}: a number above 0 is allowed, or None for alpha = rank")
    if factor != -1 and not is_count(factor, 1):
        raise ValueError(f"factor={factor!r}: -1 or an integer from 1 on is allowed")
    return rank, rank if alpha is None else alpha, factor


def _atoms(model: nn.Module, settings: Mapping[str, Any], target: Target) -> PeftConfig:
    return AtomsConfig(**settings, target_modules=target if isinstance(target, str) else list(target))


def _atoms_size(number: int) -> dict[str, Any] | None:
    """m = 1 … 9, then block atoms on the same layers: kc = 2, 4, 8, each with m_c = 1 … 9."""
    rung, step = divmod(number - 1, 9)
    if rung == 0:
        return {"m": step + 1}
    return {"m": 0, "kc": 2**rung, "m_c": step + 1, "block_layers": "all"} if rung <= 3 else None


def _oft_size(number: int) -> dict[str, Any] | None:
    """Powers of two up to 64, which divide the widths of most networks."""
    return {"block_size": 2**number} if number <= 6 else None


def _oft(model: nn.Module, settings: Mapping[str, Any], target: Target) -> PeftConfig:
    block = settings.get("block_size", DEFAULT_OFT_BLOCK)
    if not is_count(block, 2):
        raise ValueError(f"block_size={block!r}: an integer from 2 on is allowed")
    config = OFTConfig(oft_block_size=block, target_modules=resolved_target(model, target))
    return refuse_wrong_layers(model, config)


def _selective(kind: str) -> Callable[[nn.Module, Mapping[str, Any], Target], PeftConfig]:
    def build(model, settings, target):
        return SelectiveConfig(kind=kind, target_modules=target if isinstance(target, str) else list(target))

    return build


def _atoms_kind(name: str) -> str:
    if "atoms_block_delta" in name:
        return "block"
    return "beta" if "atoms_beta" in name else "atoms"


def _difffit_kind(name: str) -> str:
    part = name.partition("difffit_")[2]
    if part.startswith(("scale", "block_scale")):
        return "scale"
    return "bias" if "bias" in part.partition(".")[0] else "norm"


def _always(kind: str) -> dict[str, Any]:
    """The fields of a method all of whose parameters are of one kind."""
    return dict(kind=lambda name: kind, main_kinds=(kind,), rates={kind: RATES[kind]})


WEIGHTS = ("lora", "diff", "checkpoint")  # of convolutions and Linear layers alone
OWN_PARAMETERS = dict(default_target="all", exports=("diff", "checkpoint"), portable=False)


def _low_rank(
    name: str,
    help_: str,
    make: Callable[..., PeftConfig],
    default_target: str = "conv3x3",
    alpha_name: str = "alpha",
    factor_name: str | None = None,
) -> Method:
    """A method of low rank; `make` makes its settings, in which alpha, and the factor if it has one, are so called."""

    def build(model: nn.Module, settings: Mapping[str, Any], target: Target) -> PeftConfig:
        rank, alpha, factor = _rank_alpha_factor(settings)
        named = {alpha_name: alpha} | ({factor_name: factor} if factor_name else {})
        config = make(r=rank, **named, target_modules=resolved_target(model, target))
        return refuse_wrong_layers(model, config) if config.peft_type.value in WRONG_LAYERS else config

    return Method(
        name=name,
        help=help_,
        build=build,
        settings=("rank", "alpha", "factor") if factor_name else ("rank", "alpha"),
        default_target=default_target,
        size=lambda number: {"rank": number},
        exports=WEIGHTS,
        **_always("lora"),
    )


METHODS = {
    method.name: method
    for method in (
        Method(
            name="atoms",
            help="filter atoms (arXiv 2403.00269), by default on the 3×3 convolutions",
            build=_atoms,
            kind=_atoms_kind,
            main_kinds=("atoms", "block"),
            rates={kind: RATES[kind] for kind in ("atoms", "beta", "block")},
            settings=ATOMS_SETTINGS,
            default_target="conv3x3",
            size=_atoms_size,
            exports=("comfy", *WEIGHTS),
        ),
        _low_rank(
            "lora",
            "LoRA of PEFT, by default on the projections of the attention",
            LoraConfig,
            default_target="attn",
            alpha_name="lora_alpha",
        ),
        _low_rank(
            "locon",
            "LoRA of PEFT on the 3×3 convolutions: r filters, mixed by a 1×1 convolution",
            LoraConfig,
            alpha_name="lora_alpha",
        ),
        # as LoRA it has rank r·k²
        _low_rank(
            "lora-conv", "LoRA as microsoft/LoRA has it for convolutions: B·A viewed as the filters", LoraConvConfig
        ),
        _low_rank("loha", "LoHa of PEFT: the product, entry by entry, of two low-rank matrices", LoHaConfig),
        _low_rank(
            "lokr",
            "LoKr of PEFT: a Kronecker product, one side of low rank",
            LoKrConfig,
            factor_name="decompose_factor",
        ),
        Method(
            name="oft",
            help="OFT of PEFT: the inputs of the attention's projections are rotated in blocks; no strength but 1",
            build=_oft,
            settings=("block_size",),
            default_target="attn",
            size=_oft_size,
            exports=WEIGHTS,
            linear=False,
            **_always("lora"),
        ),
        _low_rank("lycoris-locon", "LoCon by LyCORIS' own maths", partial(LycorisConfig, algo="locon")),
        _low_rank("lycoris-loha", "LoHa by LyCORIS' own maths", partial(LycorisConfig, algo="loha")),
        _low_rank(
            "lycoris-lokr", "LoKr by LyCORIS' own maths", partial(LycorisConfig, algo="lokr"), factor_name="factor"
        ),
        Method(
            name="difffit",
            help="DiffFit: scale vectors in the transformer blocks, biases and norm layers",
            build=lambda model, settings, target: DiffFitConfig(),
            kind=_difffit_kind,
            main_kinds=("scale", "bias", "norm"),
            rates={kind: RATES[kind] for kind in ("scale", "bias", "norm")},
            exports=("diff", "checkpoint"),
            portable=False,
            linear=False,
        ),
        Method(
            name="bitfit", help="BitFit: every bias", build=_selective("bias"), **OWN_PARAMETERS, **_always("bias")
        ),
        Method(name="norm", help="every norm layer", build=_selective("norm"), **OWN_PARAMETERS, **_always("norm")),
        Method(name="full", help="every parameter", build=_selective("full"), **OWN_PARAMETERS, **_always("full")),
        Method(
            name="token",
            help="textual inversion: only the embedding rows of the new tokens; the network carries no adapter",
            build=lambda model, settings, target: None,
            exports=("words",),
            **_always("row"),
        ),
    )
}
