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
from concurrent.futures import ThreadPoolExecutor
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

WITHIN_S = 510  # of the 9 minutes; tests/gpu.sh ends it a little later
Write = Callable[[str], None]
Part = Callable[[Write], bool]  # writes its section; whether all is as it should be
ON_CPU = (
    "Made on a CPU at tiny sizes: it shows that all parts work, and says nothing of speed. What a"
    " GPU has shown stands in tests/gpu/results.md."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", choices=["checks", "speed"])
    parser.add_argument("--within", type=int, default=WITHIN_S, help="seconds")
    parser.add_argument("--to", type=Path, default=Path("runs/gpu"))
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no GPU is seen here (--tiny runs on the CPU)")
    began, small, to = time.time(), options.tiny, options.to.absolute()
    results = to / "results.md"
    if to.exists() and any(to.iterdir()):
        parser.error(f"{to}: is not empty")
    to.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if small else "cuda")
    if small:
        torch.set_num_threads(1)
        cpu.quicken()
    names = ["llama", "gptj"] if small else [*sorted(prefix.SIDE_BY_SIDE), "135M"]
    bench = speed.Bench(device, speed.TINY if small else speed.Sizes(), began + options.within - 60)

    def measured(write: Write) -> bool:
        ranks.connect(ranks.Ranks())
        for line in bench.lines():
            write(line)
        ranks.disconnect()
        return True

    checks: dict[str, Part] = {  # side by side, as time is short
        "Fast paths beside plain ones": lambda write: fast.report(device, names, write),
        "A run": lambda write: iterations.report(to / "made", device, small, write),
    }
    with results.open("w", buffering=1) as file:  # what was measured stays if time runs out

        def write(line: str) -> None:
            file.write(line + "\n")

        write(_head(device))
        good = options.only == "speed" or _side_by_side(checks, write)
        good &= options.only == "checks" or _done("Speed", measured, write)
    return 0 if good else 1


def _side_by_side(parts: dict[str, Part], write: Write) -> bool:
    """Write the sections of parts that run at once, in their order."""
    lines: dict[str, list[str]] = {title: [] for title in parts}
    with ThreadPoolExecutor() as pool:
        ends = [pool.submit(_done, t, part, lines[t].append) for t, part in parts.items()]
        for one, end in zip(lines.values(), ends, strict=True):
            end.result()
            write("\n".join(one))
    return all(end.result() for end in ends)


def _done(title: str, part: Part, write: Write) -> bool:
    """Write a part's section; whether all in it is as it should be."""
    started = time.time()
    write(f"\n## {title}\n")
    try:
        good = part(write)
    except Exception:
        write(f"It has failed:\n\n```\n{traceback.format_exc()}```")
        good = False
    how = "As it should be" if good else "NOT AS IT SHOULD BE"
    write(f"\n{how}; {time.time() - started:.0f} s.")
    print(f"{title}: {how}; {time.time() - started:.0f} s", flush=True)
    return good


def _head(device: torch.device) -> str:
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    note = f"Made on a {where}." if device.type == "cuda" else ON_CPU
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    versions += f", transformers {transformers.__version__}"
    return f"# What a GPU shows\n\n{note}\n\n{time.strftime('%Y-%m-%d')}, {where}, {versions}"


if __name__ == "__main__":
    sys.exit(main())
