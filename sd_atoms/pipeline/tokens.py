"""Placeholder tokens such as <castle>: one new entry of the tokenizer and one new row of the text encoder."""

from collections.abc import Collection, Mapping, Sequence

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


def check_new_token(pipe, token: str, among: Sequence[str] = ()) -> None:
    """A new placeholder must be one the base model does not know, and stand apart from those it comes with.

    Args:
        pipe: a pipeline with `tokenizer`.
        token: the placeholder.
        among: all new placeholders, this one included. Upper and lower case are one to a tokenizer.

    Raises:
        UserError: it exists already, it is empty or has spaces in it, or it comes twice or within another of `among`.
    """
    if not token or token != token.strip() or len(token.split()) != 1:
        raise UserError(f"placeholder_token: {token!r} must be one word without spaces, such as <castle>")
    lower = token.lower()
    known = pipe.tokenizer.get_vocab()
    added = {other.lower() for other in pipe.tokenizer.get_added_vocab()}
    if token in known or f"{lower}</w>" in known or lower in added:
        raise UserError(
            f"placeholder_token: {token!r} exists in the base model's vocabulary; choose another, <{token}>"
        )
    if [other.lower() for other in among].count(lower) > 1:
        raise UserError(f"placeholder_token: {token!r} comes twice; every token once is allowed")
    for other in among:
        if lower in other.lower() and lower != other.lower():
            raise UserError(
                f"placeholder_token: {token!r} is a part of {other!r}, which would be read as two words; choose "
                "tokens that do not contain each other"
            )


def check_placeholder_rows(pipe, rows: Mapping[str, torch.Tensor], replace: Collection[str] = ()) -> None:
    """Whether `add_placeholder_tokens` can take the same.

    Raises:
        UserError: a token exists with another row, or a row does not fit the text encoder.
    """
    if not rows:
        return  # a pipeline without a text encoder will do
    if getattr(pipe, "text_encoder", None) is None or getattr(pipe, "tokenizer", None) is None:
        raise UserError(f"token {next(iter(rows))}: this pipeline has no text encoder and tokenizer to add it to")
    embeddings = pipe.text_encoder.get_input_embeddings().weight
    for token, row in rows.items():
        if row.shape != embeddings.shape[1:]:
            raise UserError(
                f"token {token}: its embedding has {row.numel()} numbers, the text encoder takes {embeddings.shape[1]}"
            )
        if token in pipe.tokenizer.get_vocab() and not (
            token in replace and token in pipe.tokenizer.get_added_vocab()
        ):
            known = embeddings[pipe.tokenizer.convert_tokens_to_ids(token)].detach()
            if not torch.equal(known.cpu(), row.to(known.dtype).cpu()):
                raise UserError(f"token {token}: the pipeline has it already with another embedding")


def add_placeholder_tokens(pipe, rows: Mapping[str, torch.Tensor], replace: Collection[str] = ()) -> None:
    """Makes `pipe` know the tokens; all other rows stay bit for bit as they are.

    A token that the pipeline has already with the same row is passed over.

    Args:
        pipe: a pipeline with `tokenizer` and `text_encoder`.
        rows: token -> embedding row (d,).
        replace: added tokens that may exist with another row; they get the new one.

    Raises:
        UserError: a token exists with another row, or a row does not fit the text encoder; nothing is changed then.
    """
    check_placeholder_rows(pipe, rows, replace)
    if not rows:
        return
    new = [token for token in rows if token not in pipe.tokenizer.get_vocab()]
    if new:
        trainable = pipe.text_encoder.get_input_embeddings().weight.requires_grad
        pipe.tokenizer.add_tokens(new)
        # a table may have more rows than the tokenizer has words; it never shrinks
        size = max(len(pipe.tokenizer), len(pipe.text_encoder.get_input_embeddings().weight))
        pipe.text_encoder.resize_token_embeddings(size, mean_resizing=False)
        pipe.text_encoder.get_input_embeddings().weight.requires_grad_(trainable)
    weight = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        for token in (token for token in rows if token in new or token in replace):
            weight[pipe.tokenizer.convert_tokens_to_ids(token)] = rows[token].to(weight)


def placeholder_rows(pipe, tokens: list[str]) -> dict[str, torch.Tensor]:
    """token -> its embedding row (d,), float32 on the CPU.

    Raises:
        UserError: the pipeline has no such token.
    """
    if not tokens:
        return {}  # a pipeline without a text encoder will do
    known = pipe.tokenizer.get_vocab()
    missing = [token for token in tokens if token not in known]
    if missing:
        raise UserError(f"token {missing[0]}: the pipeline has no such word")
    weight = pipe.text_encoder.get_input_embeddings().weight.detach()
    return {token: weight[pipe.tokenizer.convert_tokens_to_ids(token)].float().cpu() for token in tokens}
