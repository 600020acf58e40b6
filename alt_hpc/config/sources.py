"""Where a run's rows of text come from, and which of them it leaves out."""

from typing import Literal

from alt_hpc.settings import Count, Natural, Settings, key

Split = Literal[
    "prompts-train",
    "prompts-valid",
    "prompts-test",
    "sft-train",
    "comparisons-train",
    "comparisons-valid",
    "comparisons-test",
]


class Learned(Settings):
    """Rows of text: a hub data set, or a folder of JSONL/Parquet files named after the splits."""

    path: str
    name: str | None = key(None, "The data set's configuration, where it has several.")
    train: str = "train"
    columns: dict[str, str] = key({}, "Our name -> the data set's.")
    longest: Count | None = key(None, "Characters of a prompt; rows with longer ones are left out.")
    half: Literal["a", "b"] | None = key(None, "Half of the train split's posts, by their hash.")
    without: list[Split] = key([], "Splits, whole, whose posts the train split does without.")
    limit: Count | None = key(None, "Rows kept of the train split.")


class Source(Learned):
    """Rows of text with held-out splits beside those that are learned from."""

    valid: str = "valid"
    test: str | None = None
    valid_limit: Count | None = key(None, "Rows kept of the valid split.")


class Data(Settings):
    """`prompts` has columns prompt and label (for SFT); `comparisons` prompt, chosen, rejected.

    Further columns of prompts are kept for rewards of kind `function`.
    """

    prompts: Source
    sft: Learned | None = key(None, "Prompts and labels for SFT; none: the train split of prompts.")
    comparisons: Source | None = None


class HeldOut(Settings):
    """A further set of prompts: evaluated at iteration 0 and at the end."""

    path: str
    name: str | None = key(None, "The data set's configuration, where it has several.")
    split: str = "test"
    columns: dict[str, str] = key({}, "Our name -> the data set's.")
    prompts: Count | None = key(None, "So many rows; none: all.")
    seed: Natural | None = key(None, "Draws them; none: the first ones.")
    template: str = key("{prompt}", "What is made of a row's prompt.")
