"""New tokens: in the tokenizer, in the rows of the model, and in what an adapter learns.

A token that the model has never seen has no row in its embedding, or one that nobody trained. LoRA
on other layers does not change that row. So the adapter trains it: the row of the embedding, and
the row of the head where that is another weight. In PEFT's terms these are trainable_token_indices,
of which a file holds the new rows alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from lorakit.adapters.targets import ends_with, is_saved_whole
from lorakit.config.adapters import LoraConfig
from lorakit.models.decoder import Decoder
from lorakit.models.resize import resize_embeddings
from lorakit.models.tokenizer import Tokenizer


def add_tokens(
    model: Decoder, tok: Tokenizer, tokens: Sequence[str], config: LoraConfig | None = None
) -> LoraConfig:
    """Add special tokens to a tokenizer and rows to its model, in place; return how to train them.

    Rows are added where the model has too few; many models have spare ones. A token that the
    tokenizer has already keeps its id, and its row is trained too. Save the tokenizer beside the
    adapter: `tok.save(path)`.

    Args:
        model: A lorakit decoder without adapters.
        tok: Its tokenizer.
        tokens: The texts of the tokens, such as "<|im_start|>".
        config: The settings of the adapter that is to be attached; None means the default ones.

    Returns:
        `config` with the rows of the tokens among its trainable_token_indices. A weight that it
        trains whole (modules_to_save) has these rows already.

    Raises:
        LorakitError: A token is no text, or `model` carries an adapter. Nothing has changed then.
    """
    config = config or LoraConfig()
    resize_embeddings(model, model.config.vocab_size)  # raises for a model that cannot grow
    ids = tok.add_special_tokens(tokens)
    if len(tok) > model.config.vocab_size:
        resize_embeddings(model, len(tok))
    return with_rows(config, ids, model.lm_head is None)


def with_rows(config: LoraConfig, ids: Sequence[int], tied: bool) -> LoraConfig:
    """Return the settings of an adapter with rows of tokens among those that it trains.

    Args:
        config: The settings.
        ids: The tokens.
        tied: Whether the head is the embedding, so that one row is enough.
    """
    places = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    rows = dict(_wanted_rows(config))
    for place in places:
        if not is_saved_whole("model.embed_tokens" if place == "embed_tokens" else place, config):
            key = next((name for name in rows if ends_with(name, place)), place)
            rows[key] = [*rows.get(key, []), *(i for i in ids if i not in rows.get(key, []))]
    return dataclasses.replace(config, trainable_token_indices=rows or None)


def _wanted_rows(config: LoraConfig) -> Mapping[str, list[int]]:
    """Return the trainable_token_indices of a config as a mapping; a list is the embedding's."""
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    return wanted if isinstance(wanted, Mapping) else {"embed_tokens": wanted}
