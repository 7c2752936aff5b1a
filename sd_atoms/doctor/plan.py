"""The plan of a run beside what the base allows and what is usual: targets, rates, intervals, class images."""

from sd_atoms.data.images import scan_folder
from sd_atoms.doctor.findings import Finding
from sd_atoms.errors import UserError, plural
from sd_atoms.methods.method import adapter_shapes
from sd_atoms.settings import replaced
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.diffusion import adapter_config, sized, text_adapter_config
from sd_atoms.training.optimiser import RATE_NAMES, with_defaults

FAR_RATE = 30  # factor; the rates of all modes lie within one of 100


def trainable_params(config: TrainConfig, pipe) -> tuple[int, list[Finding]]:
    """How many parameters a run trains; an error where the settings fit no layer, or not all of them."""
    text, method, parts = config.text, config.method.chosen(), {}
    try:
        config = sized(config, pipe.unet)
        adapter = adapter_config(pipe.unet, config)
        if adapter is not None:
            parts[method.name] = method.count(pipe.unet, adapter)
        if text.train_text_encoder:
            parts["the text encoder"] = method.count(pipe.text_encoder, text_adapter_config(text, config.loop.seed))
    except UserError as error:
        fix = "conv3x3 takes m up to 9, 1x1 and Linear layers take kc" if method.name == "atoms" else ""
        return 0, [Finding("error", f"target={config.method.target!r}", str(error), fix)]
    blocks = config.method.kc and method.name == "atoms"
    if blocks and not any("_block_" in key for key in adapter_shapes(pipe.unet, adapter)):
        message = f"no layer of target={config.method.target or method.default_target!r} takes block atoms"
        return 0, [Finding("error", f"kc={config.method.kc}", message, "--target conv+linear, or --block_layers all")]
    if text.train_token_embedding:
        width = pipe.text_encoder.get_input_embeddings().weight.shape[1]
        parts["embedding rows"] = width * len(config.tokens)
    listed = " and ".join(f"{count:,} of {part}" for part, count in parts.items())
    return sum(parts.values()), [Finding("fact", "trained numbers", listed)]


def rates(config: TrainConfig) -> list[Finding]:
    """A warning for each learning rate in use that is far from what is usual in its mode; 0 is somebody's choice."""
    method, text = config.method.chosen(), config.text
    if not method.rates:
        return []  # of no usual rate
    usual = with_defaults(replaced(config, **dict.fromkeys(RATE_NAMES))).optimiser
    overcomplete = config.method.m1 and config.method.train_beta
    in_use = (True, overcomplete, text.train_token_embedding, text.train_text_encoder)
    findings = []
    for name, used in zip(RATE_NAMES, in_use, strict=True):
        rate, expected = getattr(config.optimiser, name), getattr(usual, name)
        if used and rate and not expected / FAR_RATE <= rate <= expected * FAR_RATE:
            times = f"{rate / expected:,.0f} times" if rate > expected else f"1/{expected / rate:,.0f} of"
            text = f"{rate:g} is {times} the usual {expected:g}"
            findings.append(Finding("warning", name, text, f"leave it out, which means {expected:g}"))
    return findings


def intervals(config: TrainConfig, steps: int) -> list[Finding]:
    """What will not happen because the run is over before."""
    findings = []
    if config.output.checkpointing_steps > steps:
        every = config.output.checkpointing_steps
        text = f"{every} is more than the {steps} steps of the run: one checkpoint, at its end"
        findings.append(Finding("fact", "checkpointing_steps", text))
    validation = config.validation
    for name, asked, what in (
        ("validation_steps", validation.validation_prompt, "no validation picture will be drawn"),
        ("validation_loss_steps", validation.validation_loss_steps, "no validation loss will be measured"),
    ):
        if asked and getattr(validation, name) > steps:
            text = f"{getattr(validation, name)} is more than the {steps} steps of the run: {what}"
            findings.append(Finding("warning", name, text, f"at most {steps} makes sense"))
    if config.optimiser.lr_warmup_steps >= steps and config.optimiser.lr_scheduler != "constant":
        text = f"{config.optimiser.lr_warmup_steps} of {steps} steps: the learning rate never reaches its value"
        findings.append(Finding("warning", "lr_warmup_steps", text, f"{steps // 15} would be as usual"))
    return findings


def class_images(config: TrainConfig) -> list[Finding]:
    """Facts about pictures of the class that the base has to draw first."""
    return [
        Finding("fact", f"class_data_dir {folder}", f"{plural(missing, 'picture')} will be drawn by the base first")
        for folder, missing in missing_class_images(config).items()
        if missing
    ]


def missing_class_images(config: TrainConfig) -> dict[str, int]:
    """Folder of class pictures -> how many the base has to draw first."""
    missing = {}
    for concept in config.all_concepts if config.prior.prior == "images" else ():
        try:
            own = len(scan_folder(concept.class_data_dir).paths)
        except UserError:  # no folder, or none in it: all are drawn
            own = 0
        missing[concept.class_data_dir] = max(0, config.prior.num_class_images - own)
    return missing
