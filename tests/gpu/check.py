"""Everything on one GPU, into one file of results; tests/gpu.sh calls it.

With --tiny all parts run on the CPU at tiny sizes: that says nothing of speed, but the parts work.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = "" if "--tiny" in sys.argv else os.environ.get(
    "CUDA_VISIBLE_DEVICES", "0"
)  # fmt: skip

import fast
import iterations
import speed
import torch
import transformers

from alt_hpc.lm import cpu, prefix
from alt_hpc.training import ranks

WITHIN_S = 9 * 60
ON_CPU = (
    "**No GPU has run this yet.** This was made on a CPU at tiny sizes: it shows that all parts"
    " work, and says nothing of speed."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--to", type=Path, default=Path("runs/gpu"))
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no GPU is seen here (--tiny runs on the CPU)")
    began, small, to = time.time(), options.tiny, options.to.absolute()
    to.mkdir(parents=True)
    device = torch.device("cpu" if small else "cuda")
    if small:
        torch.set_num_threads(1)
        cpu.quicken()
    names = ["llama", "gptj"] if small else sorted(prefix.SIDE_BY_SIDE)
    bench = speed.Bench(device, speed.TINY if small else speed.Sizes(), began + WITHIN_S - 60)

    def measured() -> tuple[str, bool]:
        ranks.connect(ranks.Ranks())
        text = bench.report()
        ranks.disconnect()
        return "\n".join([text, "", "Aims:", "", *(f"- {one}" for one in bench.aims)]), True

    parts: dict[str, Callable[[], tuple[str, bool]]] = {
        "Fast paths beside plain ones": lambda: fast.report(device, names),
        "A run": lambda: iterations.report(
            to / "made", device, small, 200.0 if not small else 500.0
        ),
        "Speed": measured,
    }
    results, good = to / "results.md", True
    results.write_text(_head(device))
    for title, part in parts.items():
        started = time.time()
        try:
            text, well = part()
        except Exception:
            text, well = f"It has failed:\n\n```\n{traceback.format_exc()}```", False
        good &= well
        how = "As it should be" if well else "NOT AS IT SHOULD BE"
        took = f"{how}; {time.time() - started:.0f} s."
        with results.open("a") as file:
            file.write(f"\n## {title}\n\n{took}\n\n{text}\n")
        print(f"{title}: {took}", flush=True)
    print(results)
    return 0 if good else 1


def _head(device: torch.device) -> str:
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    note = f"Made on a {where}." if device.type == "cuda" else ON_CPU
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    versions += f", transformers {transformers.__version__}"
    return f"# What a GPU shows\n\n{note}\n\n{time.strftime('%Y-%m-%d')}, {where}, {versions}\n"


if __name__ == "__main__":
    sys.exit(main())
