"""The results of `sd-atoms inspect` as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from sd_atoms.report.table import text_table

MOVED_SHOWN = 3
PART_NAMES = {"unet": "UNet", "text_encoder": "text encoder"}


def architecture_text(result: Mapping[str, Any]) -> str:
    """What `inspect_architecture` found, as two tables."""
    kinds = list(dict.fromkeys(kind for entry in result["target_sets"] for kind in entry["kinds"]))
    sets = [
        [
            entry["target_set"],
            str(entry["layers"]),
            *(str(entry["kinds"].get(kind, "-")) for kind in kinds),
            f"{entry['weights'] / 1e6:.1f} M",
            f"{entry['trained_numbers']:,}",
        ]
        for entry in result["target_sets"]
    ]
    settings = [
        [
            entry["setting"],
            f"{entry['trained_numbers']:,}",
            f"{entry['trained_numbers'] / result['parameters']:.4%}",
            "-" if entry["beta_frozen"] is None else f"{entry['beta_frozen']:,}",
        ]
        for entry in result["settings"]
    ]
    return "\n".join(
        [
            f"{result['arch']}: a UNet of {result['parameters'] / 1e6:.1f} M parameters",
            "",
            "Target sets. Trained: 9 atoms where filters have several taps (81 numbers for 3×3), block atoms of 4×4",
            "channels where they have one (256).",
            text_table(["target_modules", "layers", *kinds, "weights", "trained"], sets),
            "",
            "Settings of the paper (arXiv 2403.00269), on conv3x3.",
            text_table(["setting", "trained", "of the UNet", "with β frozen"], settings),
        ]
    )


def adapter_text(result: Mapping[str, Any], top: int = 0) -> str:
    """What `inspect_adapter` found, as text, with the `top` layers that changed most; 0 shows all."""
    shown = _strongest(result["layers"], top or len(result["layers"]))
    rows = [
        [
            layer["layer"],
            layer["kind"],
            f"{layer['relative_change']:.2%}",
            f"{layer['share']:.1%}",
            *(_decimal(layer[key]) for key in ("gain_zero", "gain_pi", "condition")),
            _moved_text(layer),
        ]
        for layer in shown
    ]
    blocks = [
        [block["block"], str(block["layers"]), f"{block['relative_change']:.2%}", f"{block['share']:.1%}"]
        for block in result["blocks"]
    ]
    share = sum(layer["share"] for layer in shown)
    if len(shown) == len(result["layers"]):
        title = f"All {len(shown)} layers, from input to output"
    else:
        title = (
            f"The {len(shown)} of {len(result['layers'])} layers that changed most ({share:.0%} of the energy), from "
            "input to output; --top 0 shows all"
        )
    any_blocks = any(layer["block_atom_changes"] for layer in shown)
    header = ["layer", "kind", "|ΔF|/|F|", "energy", "gain at 0", "at π", "cond", "atoms moved most: |ΔD|"]
    return "\n".join(
        [
            *_facts(result),
            "",
            title,
            text_table(header, rows, left=(0, 1, 7)),
            "",
            f"Blocks of the {PART_NAMES[result['part']]}",
            text_table(["block", "layers", "|ΔF|/|F|", "energy"], blocks),
            "",
            "energy: share of |ΔF|² over all layers. gain: response of the adapted filters over the base's, to a",
            "flat input (0) and to a checkerboard (π). cond: condition number of A in F·A, the matrix that mixes the",
            "taps; a large one: detail of the filters is lost." + (" b12: block atom 12." if any_blocks else ""),
        ]
    )


def _facts(result: Mapping[str, Any]) -> list[str]:
    about, training = result["about"], result["about"].get("training", {})
    apart = result["distance_to_base"]
    base = result["base"]
    if about.get("base") not in (None, base):
        base += f" (trained on {about['base']})"
    if apart is not None:
        base += (
            f", weights {apart:.1%} from those it was trained on"
            if apart > 5e-4
            else ", the weights it was trained on"
        )
    tokens = ", ".join(token + (f" (from {word!r})" if word else "") for token, word in result["tokens"].items())
    trained = f"{result['trained_numbers']:,} numbers"
    if result["token_numbers"]:
        trained += f" and {result['token_numbers']:,} of tokens"
    text = result["text_encoder"]
    if result["part"] == "unet":
        trained = f"{len(result['layers'])} layers, {trained}"
    else:
        trained = "no layer of the UNet"
    if text:
        text = f"{text['kind']}: {text['layers']} layers of the text encoder, {text['trained_numbers']:,} numbers"
    size = "" if result["bytes"] is None else f", {result['bytes'] / 1000:.1f} kB"
    words = [
        f"{training['steps']} steps" if "steps" in training else "",
        f"{training['pictures_per_step']} pictures per step" if "pictures_per_step" in training else "",
        f"learning rate {training['learning_rate']:g}" if "learning_rate" in training else "",
        f"seed {training['seed']}" if "seed" in training else "",
        f"{about['resolution']} px" if about.get("resolution") else "",
    ]
    change = f"|ΔF|/|F| = {result['relative_change']:.2%} over all adapted layers"
    if result["bias_change"] is not None:
        change += f", |Δb|/|b| = {result['bias_change']:.2%} over the trained biases"
    facts = {
        "adapter": f"{result['adapter']}: {trained}{size}",
        "base": base,
        "tokens": tokens or "none",
        "prompt": about.get("instance_prompt") or "not recorded",
        "training": ", ".join(filter(None, words)) or "not recorded",
        "atoms" if result["method"] == "atoms" else "method": result["mode"],
        "text": text,
        "change": change,
    }
    return [f"{name:<9} {value}" for name, value in facts.items() if value]


def _strongest(layers: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Those with most energy, in their order."""
    chosen = sorted(range(len(layers)), key=lambda index: -layers[index]["energy"])[:count]
    return [layers[index] for index in sorted(chosen)]


def _moved_text(layer: Mapping[str, Any]) -> str:
    moves = [(value, str(index)) for index, value in enumerate(layer["atom_changes"])]
    moves += [(value, f"b{index}") for index, value in enumerate(layer["block_atom_changes"])]
    strongest = sorted(moves, key=lambda move: -move[0])[:MOVED_SHOWN]
    return ", ".join(f"{label}: {value:.3f}" for value, label in strongest)


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.1e}"
