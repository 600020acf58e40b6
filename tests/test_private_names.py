"""What we use of libraries beside their public interfaces: still there, and in one module each.

Such names change without notice. When a release takes one away, the test that fails says which
release, which name, and where it is used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

PACKAGE = Path(__file__).resolve().parent.parent / "alt_hpc"
# (library, module, where we use it, what tells a user of it apart, names within the module)
USES = [
    (
        *("transformers", "transformers.cache_utils", "lm/prefix.py", r"DynamicLayer\b"),
        "Cache.batch_select_indices Cache.batch_repeat_interleave DynamicLayer.update"
        " DynamicLayer.get_seq_length DynamicSlidingWindowLayer",
    ),
    (
        *("transformers", "transformers.conversion_mapping", "lm/check.py", "conversion_mapping"),
        "get_model_conversion_mapping",
    ),
    (
        *("transformers", "transformers", "lm/prefix.py", "_attn_implementation"),
        "PreTrainedConfig._attn_implementation",
    ),
    *(
        (
            *("transformers", f"transformers.models.{kind}.modeling_{kind}", "lm/gpu.py"),
            "apply_rotary_pos_emb",
            f"apply_rotary_pos_emb {name}RMSNorm",
        )
        for kind, name in (
            *(("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3")),
        )
    ),
    (
        *("submitit", "submitit.slurm.slurm", "clusters/script.py", "SlurmExecutor"),
        "SlurmExecutor._make_submission_file_text SlurmExecutor._submitit_command_str"
        " SlurmExecutor.affinity",
    ),
    (
        *("submitit", "submitit.core.utils", "clusters/script.py", "move_temporary_file"),
        "JobPaths.move_temporary_file DelayedSubmission.set_timeout DelayedSubmission.dump",
    ),
    (
        *(
            "deepspeed",
            "deepspeed.runtime.zero.stage_1_and_2",
            "training/moments.py",
            "_lazy_init_",
        ),
        "DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state",
    ),
    (
        *("deepspeed", "deepspeed.runtime.bf16_optimizer", "training/moments.py", "_groups_flat"),
        "BF16_Optimizer._lazy_init_hp_params_optimizer_state",
    ),
    (
        *("datasets", "datasets.config", "lm/fetch.py", r"datasets\.config"),
        "HF_HUB_OFFLINE",
    ),
    (
        *("huggingface_hub", "huggingface_hub.constants", "lm/fetch.py", r"constants\."),
        "HF_HUB_OFFLINE ENDPOINT",
    ),
]
NAMES = [(*use[:3], name) for use in USES for name in use[4].split()]


def blame(library: str, name: str, where: str) -> str:
    version = importlib.metadata.version(library)
    return f"{library} {version} has no {name} any more: it is used in alt_hpc/{where}"


@pytest.mark.parametrize(("library", "module", "where", "name"), NAMES, ids=map(str, NAMES))
def test_it_is_there(library: str, module: str, where: str, name: str) -> None:
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        pytest.fail(blame(library, f"{module}.{name}", where))


@pytest.mark.parametrize(("where", "pattern"), [use[2:4] for use in USES])
def test_one_module_knows_it(where: str, pattern: str) -> None:
    files = [file for file in PACKAGE.rglob("*.py") if re.search(pattern, file.read_text())]
    assert [str(file.relative_to(PACKAGE)) for file in files] == [where]


def test_a_cache_is_passed_and_found_by_its_names() -> None:
    """transformers 5.24 renamed `past_key_values` to `cache`; both serve us, without a warning."""
    from alt_hpc.lm import prefix

    model, ids = tiny.model("llama"), torch.tensor([[3, 4, 5]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = prefix.cache_of(model(input_ids=ids, use_cache=True))
        assert prefix.is_plain(kept), blame("transformers", "cache of an output", "lm/prefix.py")
        assert kept is not None
        model(input_ids=ids, **prefix.passing(model, kept))
    assert kept.get_seq_length() == 6, blame("transformers", "keyword of a cache", "lm/prefix.py")


def test_a_layer_holds_keys_and_values() -> None:
    from alt_hpc.lm import prefix

    with torch.no_grad():
        kept = prefix.cache_of(
            tiny.model("llama")(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True)
        )
    assert kept is not None
    for name in ("keys", "values"):
        state = getattr(kept.layers[0], name, None)
        assert state is not None, blame("transformers", f"DynamicLayer.{name}", "lm/prefix.py")
        assert state.shape[2] == 3


def test_tied_weights_are_named() -> None:
    names = getattr(tiny.model("tied"), "all_tied_weights_keys", None)
    assert names, blame("transformers", "PreTrainedModel.all_tied_weights_keys", "lm/load.py")


def test_deepspeed_has_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.runtime.zero import stage3

    assert hasattr(deepspeed.ops, "__compatible_ops__"), blame(
        "deepspeed", "ops.__compatible_ops__", "training/ranks.py"
    )
    name = "fp32_partitioned_groups_flat"
    assert f"self.{name} = " in inspect.getsource(stage3), blame(
        "deepspeed", name, "training/moments.py"
    )
