"""The memory that a task of each stage takes: estimated, given by the config, seen in manifests.

An estimate is of the largest moment of a task, on its GPU and of its host.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from alt_hpc.config import Config
from alt_hpc.control.needs import Needs
from alt_hpc.errors import InputError
from alt_hpc.graph import STAGES, TRAININGS, Graph
from alt_hpc.lm.memory import Held
from alt_hpc.run.folder import RunFolder

GIB = 2**30
# Bytes of a process without a model. On its host: it has imported torch, transformers and
# DeepSpeed; CUDA's libraries too; what a training loads beside these (NCCL). On its GPU: the
# context, which no figure of torch has. (Host: seen on two CPUs, and with torch 2.11 on an H100.)
IMPORTS, WITH_CUDA, TO_TRAIN, CONTEXT = 0.8 * GIB, 1.5 * GIB, 0.9 * GIB, 0.6 * GIB
COLUMNS = ("weights", "optimiser", "gradients", "activations", "cache")


class Row(NamedTuple):
    """The estimate for a task of a stage, in bytes; `of` is its `gpu` or its `host`."""

    stage: str
    of: str
    held: Held
    seen: int | None  # the most that a task has taken
    process: float  # without a model

    @property
    def all(self) -> float:
        return self.process + self.held.all


def table(config: Config, run: RunFolder) -> list[str]:
    """Lines: a row a stage, then what exceeds what the config gives, and what is not known."""
    needs = Needs(config, run)
    found, unknown = list[Row](), dict[str, list[str]]()
    for name in _stages(config):
        try:
            found += estimate(needs, name)
        except InputError as error:
            unknown.setdefault(str(error), []).append(name)
    lines = list[str]()
    if found:
        told = f"estimated for texts of up to {needs.longest_told} tokens"
        heads = ["stage", "of", "process", *COLUMNS, "all", "seen", "given"]
        lines += [f"memory of a task, GiB ({told})", _line(heads)]
    for row in found:
        values = [row.process, *(getattr(row.held, name) for name in COLUMNS), row.all]
        cells = [f"{value / GIB:.2f}" if value else "-" for value in values]
        seen = f"{row.seen / GIB:.2f}" if row.seen else "-"
        given = _given(config, row.stage) if row.of == "host" else None
        lines.append(_line([row.stage, row.of, *cells, seen, f"{given:.2f}" if given else "-"]))
    lines += [f"memory of {', '.join(names)}: not known: {why}" for why, names in unknown.items()]
    return lines + list(_warnings(config, found))


def estimate(needs: Needs, stage: str) -> list[Row]:
    """The rows of a stage; none for one that has no model. InputError where it is not known."""
    moments = needs.of(stage)
    if not moments:
        return []
    host, gpu = seen(needs.run, stage)
    if not needs.on_gpu(stage):
        return [Row(stage, "host", _largest(m.device + m.host for m in moments), host, IMPORTS)]
    device, beside = _largest(m.device for m in moments), _largest(m.host for m in moments)
    process = WITH_CUDA + (TO_TRAIN if STAGES[stage].key in TRAININGS else 0)
    return [Row(stage, "gpu", device, gpu, CONTEXT), Row(stage, "host", beside, host, process)]


def seen(run: RunFolder, stage: str) -> tuple[int | None, int | None]:
    """The most bytes that a task of a stage has had, of its host and its GPU, as manifests say."""
    if not run.exists():
        return None, None
    found = [m for p in run.graph().pieces() if p.stage == stage and (m := run.manifests.get(p))]
    taken = [manifest.facts.get("memory", {}) for manifest in found]
    host, gpu = (max((one.get(key, 0) for one in taken), default=0) for key in ("host", "gpu"))
    return host or None, gpu or None


def _largest(held: Iterable[Held]) -> Held:
    return max(held, key=lambda one: one.all)


def _stages(config: Config) -> list[str]:
    """The stages that a run has, in an order of making."""
    graph, last = Graph(config, {}), max(1, config.iterations)
    return [name for name, row in STAGES.items() if any(row.made(graph, k) for k in (0, 1, last))]


def _line(cells: list[str]) -> str:
    first, second, *rest = cells
    return f"{first:14}{second:5}" + "".join(f"{cell:>12}" for cell in rest)


def _given(config: Config, stage: str) -> float | None:
    """GiB of the host that the config gives each task of a stage, on Slurm."""
    its = config.cluster.stage(stage)
    on_slurm = config.cluster.backend == "slurm" and its.mem_gb
    return its.mem_gb / its.tasks_per_node if on_slurm and its.mem_gb else None


def _warnings(config: Config, found: list[Row]) -> Iterator[str]:
    for row in found:
        given = _given(config, row.stage) if row.of == "host" else None
        if given and row.all > given * GIB:
            key, count = STAGES[row.stage].key, config.cluster.stage(row.stage).tasks_per_node
            may = f"its tasks on a node may take {count * row.all / GIB:.1f} GiB"
            yield f"warning: cluster.{key}.mem_gb: {may}, and {count * given:g} are given"
