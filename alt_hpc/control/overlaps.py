"""Posts that stand in two splits: counted and told when a run is submitted."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from alt_hpc.config import HeldOut
from alt_hpc.data import texts
from alt_hpc.report import tables
from alt_hpc.run import rows
from alt_hpc.run.folder import RunFolder

HEAD = ("split", "shares with", "posts", "in rows", "and rows")
Posts = Counter[bytes]  # in how many rows a post stands


def told(runs: Iterable[RunFolder]) -> list[str]:
    """What each run's splits share, as a table; the same one once."""
    known: dict[tuple[str, str], Posts] = {}
    found: dict[str, None] = {}
    for run in runs:
        domain, splits = run.config().domain, dict[str, Posts]()
        for one in texts.wanted(run.config()):
            key = domain.kind, rows.checksum(run, one.name)
            if key not in known:
                read = rows.frozen(run, one.name)
                known[key] = Counter(texts.post(domain, row["prompt"]) for row in read)
            a_set = isinstance(one.source, HeldOut)
            splits[one.field.split(".")[-1] if a_set else one.name] = known[key]
        found[table(splits)] = None
    return [*found]


def table(splits: Mapping[str, Posts]) -> str:
    """A line for each two splits that share posts: how many, and in how many rows of both."""
    cells: list[Sequence[str]] = [HEAD]
    for (a, one), (b, other) in itertools.combinations(splits.items(), 2):
        if shared := one.keys() & other.keys():
            counts = len(shared), *(sum(its[post] for post in shared) for its in (one, other))
            cells.append((a, b, *(f"{count:,}" for count in counts)))
    sizes = ", ".join(f"{name} {its.total():,} rows" for name, its in splits.items())
    if len(cells) == 1:
        return f"no post is in two of the splits: {sizes}"
    return f"posts in two splits ({sizes}):\n{tables.aligned(cells, left=2)}"
