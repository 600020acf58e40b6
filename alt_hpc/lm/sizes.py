"""How large a model is: counted from the headers of its weight files, nothing is loaded."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alt_hpc.errors import InputError
from alt_hpc.lm import fetch

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BLOCK = re.compile(r"(|.*?\.)\w+\.(\d+)\.")  # what a block's weights begin with: trunk and number
_EMBEDDING = re.compile(r"\w*embed|wte\.|wpe\.")
_POSITION = re.compile(r"wpe\.|position")
_HEADS = ("lm_head.", "embed_out.")
_NO_WEIGHTS = (".attn.bias", ".attn.masked_bias", "v_head.weight")  # masks of old files; no trunk's


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights, and what caches and activations depend on."""

    blocks: tuple[int, ...]  # weights of each transformer block, the lowest first
    embeddings: int  # the input's, with a head that is tied to them
    rest: int  # the final norm, and a head of its own
    vocabulary: int
    hidden: int
    inner: int  # width of the widest layer of a block
    cached: int  # numbers that a block keeps of a token: its keys and values
    context: int | None  # tokens that the model reads, where its configuration says so
    stored: int  # bytes of the weights in their files

    @property
    def weights(self) -> int:
        return sum(self.blocks) + self.embeddings + self.rest

    def top(self, share: float) -> int:
        """How many blocks are trained (see `blocks.train_top`)."""
        return top(len(self.blocks), share)

    def trained(self, share: float, embeddings: bool) -> int:
        """How many weights `blocks.train_top` has trained."""
        top = sum(self.blocks[len(self.blocks) - self.top(share) :])
        return top + self.rest + (self.embeddings if embeddings else 0)

    def kept(self, dtype: str) -> int:
        """Bytes of keys and values that all blocks keep of a token."""
        return len(self.blocks) * self.cached * BYTES[dtype]


def top(blocks: int, share: float) -> int:
    """max(1, floor(share * blocks)): how many are trained."""
    return max(1, math.floor(share * blocks + 1e-9))  # 0.29 * 100 is 28.999...


def of(folder: Path) -> Sizes:
    """The sizes of a decoder in a folder; InputError where there is none that can be read."""
    shapes, stored = dict[str, tuple[int, ...]](), 0
    for file in fetch.weight_files(folder):
        found, size = _header(file)
        shapes |= found
        stored += size
    place = folder / "config.json"
    config = fetch.read_json(place) if place.is_file() else {}
    if config.get("tie_word_embeddings"):
        shapes = {n: shape for n, shape in shapes.items() if not n.startswith(_HEADS)}
    context = config.get("max_position_embeddings", config.get("n_positions"))
    return counted(shapes, context, stored, folder)


def counted(
    shapes: Mapping[str, tuple[int, ...]], context: int | None, stored: int, folder: Path
) -> Sizes:
    """The sizes of a decoder whose weights have these names and shapes."""
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith(_NO_WEIGHTS)}
    numbers = {name: found for name in shapes if (found := _BLOCK.match(name))}
    if not numbers:
        raise InputError(f"{folder}: no transformer blocks are among its weights")
    trunk = next(iter(numbers.values()))[1]
    blocks = dict[int, int]()
    for name, found in numbers.items():
        number = int(found[2])
        blocks[number] = blocks.get(number, 0) + math.prod(shapes[name])
    outside = {name: shape for name, shape in shapes.items() if name not in numbers}
    inputs = [n for n in outside if n.startswith(trunk) and _EMBEDDING.match(n[len(trunk) :])]
    words = [name for name in inputs if not _POSITION.search(name)]
    tables = [outside[name] for name in words if len(outside[name]) == 2]
    if not tables:
        raise InputError(f"{folder}: no input embeddings are among its weights")
    vocabulary, hidden = max(tables)
    keys = [shape[0] for name, shape in shapes.items() if name.endswith("k_proj.weight")]
    embeddings = sum(math.prod(outside[name]) for name in inputs)
    return Sizes(
        blocks=tuple(blocks[number] for number in sorted(blocks)),
        embeddings=embeddings,
        rest=sum(map(math.prod, outside.values())) - embeddings,
        vocabulary=vocabulary,
        hidden=hidden,
        inner=max(max(shapes[name]) for name in numbers),
        cached=2 * (keys[0] if keys else hidden),
        context=context,
        stored=stored,
    )


def _header(file: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Names and shapes of a file's weights, and their bytes."""
    if file.suffix != ".safetensors":
        from alt_hpc.lm import load  # imports torch

        state = load.tensors(file)  # memory-mapped: no weight is read
        return {n: tuple(t.shape) for n, t in state.items()}, file.stat().st_size
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(size, file.stat().st_size)))
        return (
            {n: tuple(about["shape"]) for n, about in header.items() if n != "__metadata__"},
            file.stat().st_size,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: its header cannot be read ({error})") from error
