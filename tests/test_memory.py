"""The memory that `alt-hpc plan` estimates, against tensors that are counted and runs that were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as tf

from alt_hpc import config as configs
from alt_hpc import process
from alt_hpc.control import memory as told
from alt_hpc.control.needs import Needs
from alt_hpc.errors import InputError
from alt_hpc.lm import decode, load, memory, sizes
from alt_hpc.lm.blocks import train_top
from alt_hpc.lm.sizes import BYTES, Sizes
from alt_hpc.run.folder import RunFolder
from alt_hpc.stages.optimise import set_dropout
from alt_hpc.training import memory as of_training
from alt_hpc.training.settings import ZERO2, PolicyTraining, Training

NAMES = sorted(tiny._CONFIGS)
ZERO = ZERO2["zero_optimization"]


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_counted_as_the_model_has_them(name: str, tmp_path: Path) -> None:
    found = sizes.of(tiny.folder(tmp_path, name))
    model = tiny.model(name)
    assert found.weights == sum(p.numel() for p in model.parameters())
    assert (found.vocabulary, found.hidden) == (tiny.VOCABULARY, 32)
    for share in (0.1, 0.4, 0.7, 1.0):
        for embeddings in (True, False):
            train_top(model, share, embeddings)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert found.trained(share, embeddings) == trained, (share, embeddings)
    keys = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values.layers[0].keys
    assert found.cached == 2 * keys[0, :, 0].numel()


def test_what_has_no_header_or_no_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model weights"):
        sizes.of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x04\0\0\0\0\0\0\0nope")
    with pytest.raises(InputError, match="header cannot be read"):
        sizes.of(tmp_path)
    with pytest.raises(InputError, match="no transformer blocks"):
        sizes.counted({"weight": (3, 4)}, None, 0, tmp_path)


def test_weights_of_an_old_format_are_counted_too(tmp_path: Path) -> None:
    """CarperAI's: masks and a value head among them are no weights of the trunk."""
    trunk = tiny.model("gptj", tf.AutoModel).state_dict()
    state = {f"transformer.{name}": tensor for name, tensor in trunk.items()}
    state |= {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "v_head.weight": torch.ones(1, 32),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert sizes.of(tmp_path).weights == sum(tensor.numel() for tensor in trunk.values())


# --- what is held -------------------------------------------------------------------------------

WIDE: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 61}
SHAPES: dict[str, Any] = {
    "llama": tf.LlamaConfig(hidden_size=128, intermediate_size=384, num_key_value_heads=2, **WIDE),
    "qwen3": tf.Qwen3Config(
        hidden_size=128, intermediate_size=384, num_key_value_heads=4, head_dim=32, **WIDE
    ),
    "gptj": tf.GPTJConfig(n_embd=128, n_layer=3, n_head=4, rotary_dim=16, vocab_size=61),
    "gpt2": tf.GPT2Config(n_embd=128, n_layer=3, n_head=4, vocab_size=61),
    "neox": tf.GPTNeoXConfig(hidden_size=128, intermediate_size=512, **WIDE),
}


def _sizes(model: Any) -> Sizes:
    return sizes.counted(load.shapes(model), None, 0, Path())


@pytest.mark.parametrize("share", [1.0, 0.34])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_those_that_autograd_keeps(name: str, dtype: str, share: float) -> None:
    """Within a factor of 1.65; GPT-NeoX, whose activation is fused, keeps down to half of it."""
    model = tf.AutoModelForCausalLM.from_config(SHAPES[name], dtype=getattr(torch, dtype)).train()
    set_dropout(model, 0.0)
    train_top(model, share, embeddings=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=torch.ones(2, 96, dtype=torch.long), use_cache=False)
    seen = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    settings = Training(trained_blocks=share, precision=dtype)  # type: ignore[arg-type]
    about = {"world": 1, "on_gpu": False, "rows": 2, "width": 96, "learned": 0}
    task = of_training.Task(_sizes(model), settings, ZERO, **about)  # type: ignore[arg-type]
    least = 1 / 2 if name == "neox" else 1 / 1.65
    assert least < seen / task._activations < 1.65


@pytest.mark.parametrize("offload", [False, True])
def test_masters_and_moments_are_as_large_as_adams(offload: bool) -> None:
    """Float32 copies of what is trained, and AdamW's state; 4 ranks have a quarter each."""
    model = tiny.model("llama")
    train_top(model, 0.4, embeddings=False)
    masters = [p.detach().float().clone() for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW([torch.nn.Parameter(one) for one in masters])
    for parameter in adam.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    states = [t for state in adam.state.values() for t in state.values() if t.dim()]
    real = sum(tensor.nbytes for tensor in [*masters, *states])
    settings = Training(trained_blocks=0.4, train_embeddings=False)
    zero = ZERO | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    for world in (1, 4):
        about = {"world": world, "on_gpu": True, "rows": 1, "width": 8, "learned": 4}
        task = of_training.Task(_sizes(model), settings, zero, **about)  # type: ignore[arg-type]
        moment = task.moments()[2]
        held, other = (moment.host, moment.device) if offload else (moment.device, moment.host)
        assert held.optimiser == pytest.approx(real / world)
        assert other.optimiser == 0
        weights = sum(p.nbytes for p in model.parameters())
        assert moment.device.weights == weights / 2  # bfloat16
        frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        assert moment.host.weights == frozen  # as they were given


def test_keys_and_values_are_as_large_as_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny.model("llama"), list[decode._SideBySide]()
    begin = decode._SideBySide.__init__

    def spy(self: Any, *given: Any) -> None:
        begin(self, *given)
        made.append(self)

    monkeypatch.setattr(decode._SideBySide, "__init__", spy)
    prompts, answers, new = [[5] * 70, [6] * 70], 20, 9
    settings = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": new, "eos": [tiny.EOS]}
    decode.generate(model, prompts, answers, [1, 2], **settings)
    real = sum(states.nbytes for layer in made[0].cache.layers for states in layer.both)
    computed = 2 * 70 * _sizes(model).kept("float32")  # beside the prompts as they were computed
    found = memory.answering(_sizes(model), "float32", 2, answers, 70, new, False).device
    assert found.cache == real + computed
    assert found.weights == sum(p.nbytes for p in model.parameters())


def test_a_reference_checkpoints_and_zero_3_hold_what_they_should() -> None:
    its = _sizes(tf.AutoModelForCausalLM.from_config(SHAPES["llama"]))
    about = {"world": 4, "on_gpu": True, "rows": 4, "width": 512, "learned": 64}

    def steps(zero: dict[str, Any], **settings: Any) -> Any:
        reference = settings.pop("reference", 0)
        how = PolicyTraining(trained_blocks=1.0, train_embeddings=True, **settings)
        task = of_training.Task(its, how, zero, **about, reference=reference)
        return task.moments()[2].device

    plain = steps(ZERO)
    assert steps(ZERO, reference=1000).weights == plain.weights + 2000
    assert steps(ZERO, checkpoint_activations=True).activations < 0.6 * plain.activations
    three = steps({"stage": 3, "stage3_max_live_parameters": 100})
    assert three.weights == pytest.approx(2 * (its.weights / 4 + 100))
    assert steps({"stage": 1}).gradients > plain.gradients


# --- the table ----------------------------------------------------------------------------------


def test_too_little_memory_is_warned_of(tiny_config: Path, tmp_path: Path) -> None:
    """Slurm gives memory per node, and each of its tasks needs as much."""
    chosen = [f"run={tmp_path}/run", "cluster.train={nodes: 1, tasks_per_node: 2, mem_gb: 1.5}"]
    config = configs.load(tiny_config, chosen)
    lines = told.table(config, RunFolder.preview(config))
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert "cluster.train.mem_gb: its tasks on a node may take" in warning
    assert "1.5 are given" in warning
    assert not (tmp_path / "run").exists()


def test_a_gpus_memory_stands_apart_and_a_model_that_is_elsewhere_is_named(
    tiny_config: Path, tmp_path: Path
) -> None:
    chosen = [f"run={tmp_path}/run", "cluster.sample={gpus: 1}", "reward.model=someone/else"]
    config = configs.load(tiny_config, chosen)
    lines = told.table(config, RunFolder.preview(config))
    of = [line.split()[1] for line in lines if line.startswith("sample ")]
    assert of == ["gpu", "host"]
    (unknown,) = [line for line in lines if "not known" in line]
    assert unknown.startswith(
        "memory of score, measure: not known: someone/else is not on this machine yet"
    )


def test_no_more_prompts_are_counted_than_there_are(tiny_config: Path, tmp_path: Path) -> None:
    def of(stage: str, *chosen: str) -> float:
        config = configs.load(tiny_config, [f"run={tmp_path}/run", *chosen])
        (row,) = told.estimate(Needs(config, RunFolder.preview(config)), stage)
        return row.held.all

    few = ("sample.prompts=2", "evaluate.prompts=2", "evaluate.test_prompts=2")
    assert of("sample", *few, "sample.group=50") == of("sample", *few, "sample.group=2")
    assert of("evaluate", *few, "evaluate.group=50") == of("evaluate", *few, "evaluate.group=2")
    all_ = (*few[:1], *few[2:], "evaluate.group=50")  # of one split
    assert of("evaluate", *all_) > of("evaluate", *few, "evaluate.group=2")


def test_what_vllm_takes_is_not_known_of_a_judge_too(tiny_config: Path, tmp_path: Path) -> None:
    judge = "{kind: model, model: someone/else, engine: {kind: vllm}}"
    chosen = [f"run={tmp_path}/run", "engine={kind: vllm}", f"judge={{judge: {judge}}}"]
    config = configs.load(tiny_config, chosen)
    (line,) = [one for one in told.table(config, RunFolder.preview(config)) if "not known" in one]
    assert line.startswith("memory of sample, evaluate, judge: not known: engine.kind: vllm takes")


def test_a_process_knows_its_peak() -> None:
    before = process.peak_memory()["host"]
    held = bytearray(b"x") * (before + 2**24)
    assert process.peak_memory()["host"] > len(held)


def test_bytes_are_torchs() -> None:
    assert {n: torch.empty(1, dtype=getattr(torch, n)).element_size() for n in BYTES} == BYTES
