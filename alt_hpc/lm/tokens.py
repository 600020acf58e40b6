"""Text and token ids: how a text begins or goes on, what ends it, how many fit."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from alt_hpc.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"  # for those that must not import transformers


class Generation(NamedTuple):
    """Sampled token ids, the EOS included where it was sampled, and how the generation ended."""

    ids: list[int]
    ended: Literal["eos", "limit"]


def all_ends(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every token that ends a generation of a folder's model (of a chat model several), ascending.

    Ids beyond the vocabulary are left out: small models inherit those of their big relatives.
    """
    from alt_hpc.lm import fetch, load

    shape = load.config(folder)
    text = shape.get_text_config()
    given = [tokenizer.eos_token_id, *(getattr(c, "eos_token_id", None) for c in (shape, text))]
    if (folder / "generation_config.json").is_file():
        given.append(fetch.read_json(folder / "generation_config.json").get("eos_token_id"))
    ids = {i for ends in given for i in (ends if isinstance(ends, list) else [ends])}
    return tuple(sorted(i for i in ids if isinstance(i, int) and i < text.vocab_size))


def context_length(shape: "PretrainedConfig", unknown: int | None = None) -> int:
    """The most tokens that a model sees at once; else `unknown`; InputError where nothing says."""
    text = shape.get_text_config()
    given = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    for length in (*given, unknown):
        if isinstance(length, int):
            return length
    raise InputError(
        f"{shape.name_or_path or shape.model_type}: config.json names no context length"
        " (max_position_embeddings): set policy.max_length"
    )


def text_ids(tokenizer: Tokenizer, text: str, *, bos: bool = False) -> list[int]:
    """Token ids of a text that begins a sequence: no EOS, but a BOS where the tokenizer adds one.

    With `bos` in any case; InputError where there is none.
    """
    ids, first = list(tokenizer.encode(text, add_special_tokens=False)), tokenizer.bos_token_id
    if bos and first is None:
        problem = f"{{bos}}: the tokenizer of {tokenizer.name_or_path} has no BOS token"
        raise InputError(problem, "domain.template")
    adds = first is not None and tokenizer.encode("")[:1] == [first]
    return [first, *ids] if bos or adds else ids


def common(texts: Sequence[list[int]]) -> int:
    """Length of the beginning that all texts share; each keeps at least one token behind it."""
    first, last = min(texts), max(texts)  # in the order of lists, all others lie between
    shared = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return min([next(shared, len(first)), *(len(ids) - 1 for ids in texts)])


def continuation_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text that goes on after another."""
    # Behind a colon, as prompts end in one: some tokenizers put a space in front of a text.
    colon, ids = (tokenizer.encode(t, add_special_tokens=False) for t in (":", ":" + text))
    if ids[: len(colon)] != colon:  # the two were merged
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(ids[len(colon) :])


def text_of(tokenizer: Tokenizer, ids: Sequence[int], ends: Collection[int]) -> str:
    """The text of generated token ids, EOS and special tokens left out, stripped."""
    kept = [i for i in ids if i not in ends]
    return str(tokenizer.decode(kept, skip_special_tokens=True)).strip()
