"""Stage "tokenizer": a byte-level BPE as CLIP's, trained on captions, that `CLIPTokenizer` loads."""

import json
import random
from pathlib import Path

from accelerate import PartialState
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from sd_atoms.files import write_text
from sd_atoms.pocket.pretrain.stages import TokenizerSettings
from sd_atoms.pocket.world import EVALUATION_PROMPTS, LANDMARKS, caption, sample

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
SPLIT_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's

# Words that users may write although no caption has them; each becomes one token or few.
FURTHER_WORDS = """
person man woman child dog cat bird horse cow fish rabbit fox bear lion dragon flower rose garden park road street car
train bus bicycle airplane ship chair table lamp clock book cup bottle backpack toy doll teddy robot statue ball hat
shoe glasses guitar piano computer phone camera candle vase teapot bowl plate can sunset sunrise sun moon star rain
storm wind summer spring winter fall morning evening wooden stone metal glass golden silver black dark bright small
large huge tiny old new ancient modern beautiful cute fantasy style art drawing portrait closeup view picture image
rendering cartoon anime comic river ocean hill valley waterfall fountain village town palace temple ruins wall gate
door window roof in on at to from with without over under near behind beside between above below
""".split()  # noqa: SIM905 (a list would be hard to read)


def run(work_dir: Path, settings: TokenizerSettings, state: PartialState) -> dict:
    """Writes `work_dir`/tokenizer: what `save_pretrained` writes, and the classic vocab.json and merges.txt."""
    if not state.is_main_process:
        return {}
    texts = training_texts(settings)
    merges = train_merges(texts, settings.largest_vocabulary)
    vocabulary = build_vocabulary(merges)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=settings.context_length)
    folder = work_dir / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{first} {second}\n" for first, second in merges))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    longest = max(len(tokenizer(text).input_ids) for text in texts[:5000])
    return {"vocabulary": len(tokenizer), "longest_caption_tokens": longest}


def training_texts(settings: TokenizerSettings) -> list[str]:
    """Captions, then the evaluation prompts with every landmark, then further words, repeated to weigh enough."""
    rng = random.Random(settings.seed)
    captions = [caption(sample(rng), rng) for _ in range(settings.caption_count)]
    prompts = [prompt.format(landmark) for prompt, *_ in EVALUATION_PROMPTS for landmark in LANDMARKS]
    return captions + prompts * 20 + FURTHER_WORDS * 40


def train_merges(texts: list[str], largest_vocabulary: int) -> list[tuple[str, str]]:
    """The BPE merges in the order in which they are learned.

    Equally frequent pairs are learned in the order of their tokens' numbers. The trainer numbers word endings in
    the order of a hash table, another one in each run, unless they are there beforehand as special tokens.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "removed", invert=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=largest_vocabulary,
        end_of_word_suffix=WORD_END,
        special_tokens=byte_tokens(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def byte_tokens() -> list[str]:
    """The 256 bytes as characters, first inside a word, then at its end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*alphabet, *(character + WORD_END for character in alphabet)]


def build_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Numbers the tokens as CLIP does: bytes, bytes that end a word, merges, the two special tokens."""
    merged = [first + second for first, second in merges]
    tokens = dict.fromkeys([*byte_tokens(), *merged])  # without repetitions, in order
    return {token: index for index, token in enumerate([*tokens, START, END])}
