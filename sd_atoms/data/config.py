"""Settings of the training images, and the concepts that they show."""

from dataclasses import dataclass, fields

from sd_atoms.data.images import RESAMPLING
from sd_atoms.data.vtab import PREFIX, Task, load_task
from sd_atoms.settings import setting

DATA, TOKEN, PRIOR = "data", "token and text encoder", "prior preservation"


@dataclass(frozen=True)
class Concept:
    """One thing to learn: an entry of `concepts`, or what the flags of the same names say."""

    instance_data_dir: str | None = setting(
        None, DATA, "folder with its pictures, or with .tar shards of webdataset, or pocket:castle, pocket:canal"
    )
    instance_prompt: str | None = setting(None, DATA, 'what they show, such as "photo of a <castle>"')
    instance_prompts_file: str | None = setting(None, DATA, "templates with {}, one drawn for each picture", file=True)
    placeholder_token: str | None = setting(None, TOKEN, "new word, or several with spaces between")
    initializer_token: str | None = setting(None, TOKEN, "word the new one starts from, or one for each")
    class_prompt: str | None = setting(None, PRIOR, "what the prior is kept of")
    class_data_dir: str | None = setting(None, PRIOR, "folder of class pictures")
    repeats: int = setting(1, DATA, "how often its pictures come per epoch", low=1, high=10_000)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The placeholder tokens."""
        return tuple((self.placeholder_token or "").split())

    @property
    def initializers(self) -> tuple[str, ...]:
        """The words they start from, one for each."""
        words = tuple((self.initializer_token or "").split()) if self.tokens else ()
        return words * len(self.tokens) if len(words) == 1 else words

    @property
    def word(self) -> str:
        """What takes the place of {} in templates."""
        return self.placeholder_token or self.initializer_token or ""

    @property
    def plain_word(self) -> str:
        """The same for the base, which does not know the new word."""
        return self.initializer_token or self.word

    @property
    def plain_prompt(self) -> str:
        """The instance prompt for the base."""
        plain = self.instance_prompt.replace(self.word, self.plain_word) if self.word else self.instance_prompt
        for token, word in zip(self.tokens, self.initializers, strict=True):
            plain = plain.replace(token, word)
        return plain

    def problems(self, where: str) -> list[str]:
        """What is wrong with it, each problem beginning with `where`."""
        found = []
        if not self.instance_prompt:
            found.append('instance_prompt is required: what the pictures show, such as "photo of a <castle>"')
        missing = [token for token in self.tokens if token not in (self.instance_prompt or "")]
        if self.instance_prompt and missing:
            found.append(f"instance_prompt: {self.instance_prompt!r} lacks the placeholder {' '.join(missing)}")
        if self.tokens and not self.initializer_token:
            found.append("initializer_token is required with placeholder_token: a word such as castle")
        elif self.tokens and len(self.initializers) != len(self.tokens):
            found.append(
                f"initializer_token: {self.initializer_token!r} has {len(self.initializers)} words for "
                f"{len(self.tokens)} placeholder tokens; one for all or one for each is allowed"
            )
        if self.instance_prompts_file and not self.word:
            found.append(
                "instance_prompts_file needs a placeholder_token (or an initializer_token) to put in the place of {}"
            )
        return [where + problem for problem in found]


OF_CONCEPT = tuple(field.name for field in fields(Concept) if field.name != "repeats")


@dataclass(frozen=True)
class DataSettings:
    """Where training images come from and how they are cropped."""

    instance_data_dir: str | None = setting(
        None,
        DATA,
        "folder with the pictures of the concept, or with .tar shards of webdataset, or pocket:castle, pocket:canal",
        required=True,
        unless=("concepts", "dataset_name"),
    )
    instance_prompt: str | None = setting(
        None,
        DATA,
        'prompt of these pictures, such as "photo of a <castle>"',
        required=True,
        unless=("concepts", "dataset_dir"),
    )
    instance_prompts_file: str | None = setting(
        None,
        DATA,
        "templates with {} for the concept, one drawn for each picture; none = always instance_prompt",
        file=True,
    )
    concepts: tuple[Concept, ...] | None = setting(
        None, DATA, "several concepts in one run, in place of the flags about one", item=Concept
    )
    captions: bool = setting(
        False,
        DATA,
        "prompts from NAME.txt or NAME.caption beside each picture or metadata.jsonl; {} in them is the concept",
    )
    masks: bool = setting(
        False,
        DATA,
        "learn the subject, not what is around it: NAME.mask.png or NAME-masklabel.png beside each picture, or "
        "masks/NAME.png, white where the subject is; or the pictures' transparency (see mask_weight)",
    )
    dataset_name: str | None = setting(
        None,
        DATA,
        "data set for `datasets` in place of instance_data_dir: a folder or a hub id; or vtab:dtd, a task of VTAB "
        "with the prompts of its classes (sd-atoms vtab table)",
    )
    dataset_dir: str | None = setting(
        None, DATA, "folder of the VTAB task, or one that contains it, or a hub id", needs=["dataset_name"]
    )
    dataset_config_name: str | None = setting(
        None, DATA, "configuration of the data set; none = its only one", needs=["dataset_name"]
    )
    dataset_split: str = setting("train", DATA, "split of the data set", needs=["dataset_name"])
    image_column: str = setting("image", DATA, "column of pictures", needs=["dataset_name"])
    label_column: str = setting("label", DATA, "column of classes of a VTAB task", needs=["dataset_dir"])
    caption_column: str | None = setting(
        None, DATA, "column of captions; none = instance_prompt for all", needs=["dataset_name"]
    )
    max_train_samples: int | None = setting(
        None, DATA, "use only so many rows of the data set; none = all", low=1, needs=["dataset_name"]
    )
    class_balanced: bool = setting(
        False,
        DATA,
        "equally many samples of each class of a VTAB task: images of rare ones are repeated",
        needs=["dataset_dir"],
    )
    caption_dropout: float = setting(0.0, DATA, "share of samples with an empty prompt", low=0.0, high=1.0)
    resolution: int | None = setting(
        None, DATA, "side of the training pictures in pixels; none = the base's", low=32, high=4096
    )
    aspect_ratio_buckets: bool = setting(
        False, DATA, "keep aspect ratios: each picture goes to the nearest of some sizes of the same area"
    )
    center_crop: bool = setting(False, DATA, "crop in the middle; otherwise at a place drawn once per picture")
    # many subjects are not symmetric
    random_flip: bool = setting(False, DATA, "mirror half of the samples")
    image_interpolation_mode: str = setting("lanczos", DATA, "filter for resizing", choices=RESAMPLING)
    on_bad_image: str = setting(
        "error", DATA, "what to do with a picture that cannot be read", choices=("error", "skip")
    )
    latents_in_memory: int = setting(
        2**30, DATA, "bytes of latents that each process may hold; beyond, they are read from disk as needed", low=0
    )
    cache_dir: str | None = setting(
        None, DATA, "folder that keeps latents and text states for later runs; none = do not"
    )

    @property
    def task(self) -> Task | None:
        """The task of VTAB; None for any other data.

        Raises:
            UserError: there is none of that name.
        """
        name = self.dataset_name or ""
        return load_task(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
