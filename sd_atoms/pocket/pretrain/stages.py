"""The stages of pretraining in their order, what each needs, and their settings with the reason of each default."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ImagesSettings:
    picture_count: int = 48_000  # 2.4 GB of pixels, three minutes on two cores
    held_out_count: int = 1_000  # enough for ten groups of a hundred in the retrieval test
    first_seed: int = 0  # picture i is drawn from seed first_seed + i
    first_held_out_seed: int = 5_000_000  # far beyond the training seeds, so that the two never meet


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    caption_count: int = 30_000  # every caption word occurs hundreds of times and becomes a single token
    largest_vocabulary: int = 1_536  # not reached: the captions run out of pairs to merge earlier
    context_length: int = 77  # as in CLIP, so that code written for Stable Diffusion fits
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What the training stages share.

    Training ends when the seconds spent over all its resumes reach `budget_seconds`, or after exactly `max_steps`
    where that is given; the learning rate falls over the last `decay_share` of whichever applies, so that a run always
    ends annealed.
    """

    budget_seconds: float
    max_steps: int | None = None
    batch_size: int  # over all processes together
    learning_rate: float  # the peak of the cosine
    warm_up_share: float = 0.02
    decay_share: float = 1.0  # of the training: there the rate falls from its peak to zero by a cosine
    betas: tuple[float, float]
    weight_decay: float
    largest_gradient_norm: float = 1.0
    seed: int = 0
    log_every_steps: int
    checkpoint_every_seconds: float = 180  # an interruption costs at most these


@dataclass(frozen=True, kw_only=True)
class VaeSettings(TrainingSettings):
    budget_seconds: float = 6_300  # 14,700 steps; most of what is gained comes as the learning rate falls
    batch_size: int = 16
    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    log_every_steps: int = 100
    latent_channels: int = 8  # with the 4 of Stable Diffusion v1 windows and outlines are lost: 26.0, not 29.6 dB
    channels: tuple[int, ...] = (24, 48, 96, 128)  # three halvings: f=8, as in Stable Diffusion
    norm_groups: int = 8  # the narrowest level has 24 channels
    crop_share: float = 0.84  # of the training is on crops; the rest, on whole pictures, teaches the long range
    crop_px: int = 64  # a quarter of the cost of a whole picture
    whole_picture_batch_size: int = 8  # whole pictures take four times the memory of crops
    edge_weight: float = 0.5  # keeps windows and outlines from being smoothed away
    kl_weight: float = 1e-4  # only bounds the latents; the scale is measured afterwards


@dataclass(frozen=True, kw_only=True)
class ClipSettings(TrainingSettings):
    budget_seconds: float = 2_300
    batch_size: int = 72
    learning_rate: float = 1e-3
    warm_up_share: float = 0.05  # a contrastive start is touchy
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1  # as in CLIP, on matrices only
    log_every_steps: int = 25
    evaluate_every_steps: int = 400
    width: int = 128  # of both towers and of the projection
    layers: int = 4
    heads: int = 4
    patch_px: int = 16  # 64 patches a picture
    text_attribute_weight: float = 0.5  # of naming attributes from a caption, which may leave some out


@dataclass(frozen=True, kw_only=True)
class UnetSettings(TrainingSettings):
    budget_seconds: float = 36_000  # 20 epochs and more on two quiet cores
    batch_size: int = 32
    learning_rate: float = 6e-4
    warm_up_share: float = 0.01
    decay_share: float = 0.3  # a long plateau, so that a longer run can go on from any checkpoint of a shorter one
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-2
    log_every_steps: int = 50
    from_packaged: bool = False  # start at the packaged weights and their step number, not at random numbers
    channels: tuple[int, ...] = (96, 192, 192)
    layers_per_block: int = 1
    attention_heads: int = 4
    norm_groups: int = 16
    prediction_type: str = "v_prediction"  # the colour of a whole picture is settled where noise tells little of it
    empty_caption_share: float = 0.1  # for classifier-free guidance
    min_snr_gamma: float = 5.0  # bounds what nearly clean latents count: converges in fewer steps than the plain loss
    ema_decay: float = 0.9995


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(TrainingSettings):
    budget_seconds: float = 1_200
    batch_size: int = 32  # landmarks, half of them of one class and half of another
    views_per_landmark: int = 4  # in a batch: each is drawn to three others at once
    learning_rate: float = 1e-3
    warm_up_share: float = 0.05  # a contrastive start is touchy
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.05
    log_every_steps: int = 25
    landmark_count: int = 8_000
    rendered_views: int = 6  # of each: 2.4 GB of pixels; rendering each batch would take as long as learning from it
    first_seed: int = 0  # landmark i is drawn from seed first_seed + i
    first_held_out_seed: int = 5_000_000  # far beyond the training seeds, so that the two never meet
    held_out_groups: int = 4  # of each kind; 800 answers bound the error of a rate by 2 %
    held_out_landmarks: int = 100  # in a group of any class
    held_out_of_class: int = 20  # in a group of one class
    temperature: float = 0.1
    widths: tuple[int, ...] = (32, 64, 128, 256)  # the last is that of the features
    depths: tuple[int, ...] = (1, 1, 1, 1)
    smallest_soft_px: int = 64  # half of the views come back from as few: generated pictures are that soft
    noise_deviation: float = 0.02  # of pixels in [0, 1]


@dataclass(frozen=True, kw_only=True)
class AssembleSettings:
    storage_dtype: str = "float16"  # halves the files; the configs say float32, so everything computes in float32


@dataclass(frozen=True)
class Stage:
    """One stage: its settings and the stages that must be finished before it."""

    settings: ImagesSettings | TokenizerSettings | TrainingSettings | AssembleSettings
    needs: tuple[str, ...]


STAGES: dict[str, Stage] = {
    "images": Stage(ImagesSettings(), needs=()),
    "tokenizer": Stage(TokenizerSettings(), needs=()),
    "vae": Stage(VaeSettings(), needs=("images",)),
    "clip": Stage(ClipSettings(), needs=("images", "tokenizer")),
    "unet": Stage(UnetSettings(), needs=("images", "tokenizer", "vae", "clip")),
    "judge": Stage(JudgeSettings(), needs=("clip",)),
    "assemble": Stage(AssembleSettings(), needs=("images", "tokenizer", "vae", "clip", "unet")),
}
TRAINING_STAGES = tuple(name for name, stage in STAGES.items() if isinstance(stage.settings, TrainingSettings))
