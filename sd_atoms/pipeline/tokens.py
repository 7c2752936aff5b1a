"""Placeholder tokens such as <castle>: one new entry of the tokenizer and one new row of the text encoder."""

from collections.abc import Mapping, Sequence

import torch

from sd_atoms.errors import UserError


def initializer_row(pipe, word: str) -> torch.Tensor:
    """The embedding row (d,) of a word, to start a placeholder from.

    Raises:
        UserError: the word is not exactly one token of the base model.
    """
    ids = pipe.tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == pipe.tokenizer.unk_token_id:
        raise UserError(f"initializer_token: {word!r} is {len(ids)} tokens of the base model, one word is needed")
    return pipe.text_encoder.get_input_embeddings().weight[ids[0]].detach().clone()


def initializer_rows(pipe, tokens: Sequence[str], words: Sequence[str]) -> dict[str, torch.Tensor]:
    """token -> the embedding row (d,) of its word: one word for each, or one for all.

    Raises:
        UserError: a word is not exactly one token of the base model.
    """
    words = [*words] * len(tokens) if len(words) == 1 else words
    return {token: initializer_row(pipe, word) for token, word in zip(tokens, words, strict=True)}


def check_new_token(pipe, token: str) -> None:
    """A new placeholder must be one the base model does not know.

    Raises:
        UserError: it exists already, or it is empty or has spaces in it.
    """
    if not token or token != token.strip() or len(token.split()) != 1:
        raise UserError(f"placeholder_token: {token!r} must be one word without spaces, such as <castle>")
    vocabulary = pipe.tokenizer.get_vocab()
    if token in vocabulary or f"{token.lower()}</w>" in vocabulary:
        raise UserError(
            f"placeholder_token: {token!r} exists in the base model's vocabulary; choose another, <{token}>"
        )


def add_placeholder_tokens(pipe, rows: Mapping[str, torch.Tensor], replace: bool = False) -> None:
    """Makes `pipe` know the tokens; all other rows stay bit for bit as they are.

    A token that the pipeline has already with the same row is passed over.

    Args:
        pipe: a pipeline with `tokenizer` and `text_encoder`.
        rows: token -> embedding row (d,).
        replace: an added token that exists with another row gets the new one.

    Raises:
        UserError: a token exists with another row, or a row does not fit the text encoder.
    """
    if not rows:
        return  # a pipeline without a text encoder will do
    embeddings = pipe.text_encoder.get_input_embeddings().weight
    for token, row in rows.items():
        if row.shape != embeddings.shape[1:]:
            raise UserError(
                f"token {token}: its embedding has {row.numel()} numbers, the text encoder takes {embeddings.shape[1]}"
            )
        if token in pipe.tokenizer.get_vocab():
            known = embeddings[pipe.tokenizer.convert_tokens_to_ids(token)].detach()
            if replace and token in pipe.tokenizer.get_added_vocab():
                known.copy_(row)
            elif not torch.equal(known.cpu(), row.to(known.dtype).cpu()):
                raise UserError(f"token {token}: the pipeline has it already with another embedding")
    new = {token: row for token, row in rows.items() if token not in pipe.tokenizer.get_vocab()}
    if not new:
        return
    trainable = embeddings.requires_grad
    pipe.tokenizer.add_tokens(list(new))
    # a table may have more rows than the tokenizer has words; it never shrinks
    size = max(len(pipe.tokenizer), len(embeddings))
    pipe.text_encoder.resize_token_embeddings(size, mean_resizing=False)
    weight = pipe.text_encoder.get_input_embeddings().weight.requires_grad_(trainable)
    with torch.no_grad():
        for token, row in new.items():
            weight[pipe.tokenizer.convert_tokens_to_ids(token)] = row.to(weight)


def placeholder_rows(pipe, tokens: list[str]) -> dict[str, torch.Tensor]:
    """token -> its embedding row (d,), float32 on the CPU."""
    if not tokens:
        return {}  # a pipeline without a text encoder will do
    weight = pipe.text_encoder.get_input_embeddings().weight.detach()
    return {token: weight[pipe.tokenizer.convert_tokens_to_ids(token)].float().cpu() for token in tokens}
