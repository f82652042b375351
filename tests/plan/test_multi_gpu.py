"""Plans for several GPUs: shards and gathered units, against counts by hand and shards that torch makes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from orpo_lite.common.errors import RequestError
from orpo_lite.plan.__main__ import command
from orpo_lite.plan.allocations import (
    ADAPTER,
    BASE,
    BUFFERS,
    CONSTANTS,
    ENDS,
    GATHERED,
    GRADIENTS,
    KEPT,
    LOADING,
    OPTIMIZER,
)
from orpo_lite.plan.gpus import Parallelism, Target
from orpo_lite.plan.multi_gpu import find_units
from orpo_lite.plan.predict import Plan, Study
from orpo_lite.plan.search import Planner
from orpo_lite.recipe import Recipe

ROOT = Path(__file__).parents[2]
H, F, V, KV, LAYERS, RANK = 128, 320, 3000, 64, 9, 16
CONFIG = LlamaConfig(vocab_size=V, hidden_size=H, intermediate_size=F, num_attention_heads=4, num_key_value_heads=2,
                     head_dim=32, num_hidden_layers=LAYERS, tie_word_embeddings=False, dtype="bfloat16")  # fmt: skip
LINEAR = [(H, H), (KV, H), (KV, H), (H, H), (F, H), (F, H), (H, F)]
"""Rows and columns of a layer's matrices."""
TRAINED = LAYERS * sum(RANK * (rows + columns) for rows, columns in LINEAR)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    CONFIG.architectures = ["LlamaForCausalLM"]
    CONFIG.save_pretrained(folder)
    return folder


def recipe(base: Path, **sections) -> Recipe:
    content = {
        "name": "spread",
        "model": {"name_or_path": str(base)},
        "data": {"train": "x.jsonl", "max_length": 128},
        "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "optim": "adamw_torch"},
    }
    for section, fields in sections.items():
        content[section] = content.get(section, {}) | fields
    return Recipe.parse(content)


planner = Planner()


def planned(base: Path, gpus: int, strategy: str, offload: bool = False, **sections) -> Plan:
    parallelism = Parallelism(gpus, strategy, offload)
    return Planner(parallelism=parallelism)(recipe(base, **sections), Target("cuda"))


def weights() -> dict[str, int]:
    """Bytes of the weights, by hand: bf16 base, float32 norms and adapters."""
    linear = sum(rows * columns * 2 for rows, columns in LINEAR)
    lora = sum((rows + columns) * RANK * 4 for rows, columns in LINEAR)
    return {"base": LAYERS * (linear + 2 * H * 4) + H * 4, "ends": 2 * V * H * 2, "adapter": LAYERS * lora}


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_shards_and_gathered_layers_by_hand(gpus, base):
    sixteen = {"model": {"quantization": "none"}}
    made, one = planned(base, gpus, "fsdp2", **sixteen), planner(recipe(base, **sixteen), Target("cuda"))
    parts, alone, by_hand = made.phases["backward"], one.phases["backward"], weights()
    layer = sum(rows * columns * 2 for rows, columns in LINEAR) + 2 * H * 2
    layer += sum((rows + columns) * RANK * 2 for rows, columns in LINEAR)
    embeddings = V * H * 2
    end = embeddings + H * 2
    rounding = 512 * LAYERS * 24  # the allocator's blocks
    assert parts[BASE] == pytest.approx(by_hand["base"] / gpus, abs=rounding)
    assert parts[ENDS] == pytest.approx(by_hand["ends"] / gpus, abs=rounding)
    assert parts[ADAPTER] == pytest.approx(by_hand["adapter"] / gpus, abs=rounding)
    assert parts[GRADIENTS] == math.ceil(alone[GRADIENTS] / gpus)
    assert parts[OPTIMIZER] == math.ceil(alone[OPTIMIZER] / gpus)
    assert parts[GATHERED] in {2 * layer, max(2 * end, end + layer), max(2 * embeddings, embeddings + layer)}
    assert made.phases["step"][GATHERED] == 0 and made.phases["forward"][KEPT] > 0


def test_ddp_sums_gradients_in_buckets(base):
    made, one = planned(base, 4, "ddp"), planner(recipe(base), Target("cuda"))
    for phase in ("forward", "backward", "step"):
        assert made.phases[phase][BUFFERS] == 4 * TRAINED
        assert made.phases[phase].total() == one.phases[phase].total() + 4 * TRAINED
    assert made.needed > one.needed


def test_quantized_weights_are_spread_and_their_constants_are_not(base):
    one = planner(recipe(base), Target("cuda"))
    two, four = planned(base, 2, "fsdp2"), planned(base, 4, "fsdp2")
    assert two.phases["step"][CONSTANTS] == four.phases["step"][CONSTANTS] == one.phases["step"][CONSTANTS] > 0
    assert two.phases["step"][BASE] == pytest.approx(one.phases["step"][BASE] / 2, rel=0.02)
    assert four.phases["step"][BASE] == pytest.approx(one.phases["step"][BASE] / 4, rel=0.03)


def test_shards_are_loaded_unit_by_unit_from_the_host(base):
    made, one = planned(base, 4, "fsdp2"), planner(recipe(base), Target("cuda"))
    head = V * H * 2
    assert made.phases["load"][BASE] < one.phases["load"][BASE] / 3.9
    assert made.phases["load"][LOADING] == head + H * 2  # with the final norm
    assert made.load_host > planned(base, 4, "ddp").load_host + 3 * head
    # as it lies in the file, all processes have the same pages of a base; a quantized one is each one's own
    as_it_is = {"model": {"quantization": "none"}}
    more = [
        planned(base, n, "fsdp2", **as_it_is).load_host - planned(base, n, "ddp", **as_it_is).load_host for n in (2, 4)
    ]
    assert more[0] == pytest.approx(more[1], rel=1e-3)


def test_offloaded_shards_leave_the_card_for_the_host(base):
    kept, moved = planned(base, 2, "fsdp2"), planned(base, 2, "fsdp2", True)
    assert not any(moved.phases["step"][part] > 5000 for part in (BASE, ENDS, ADAPTER, GRADIENTS, OPTIMIZER))
    assert moved.peak < kept.peak and moved.host_training > 12 * TRAINED and kept.host_training == 0


def test_what_cannot_be_is_refused(base):
    with pytest.raises(RequestError, match="expected one of ddp, fsdp2"):
        Parallelism(2, "fsdp1")
    with pytest.raises(RequestError, match="--gpus: found 1"):
        Parallelism(1)
    with pytest.raises(RequestError, match="--offload: ddp keeps every weight on every card"):
        Parallelism(2, "ddp", True)
    with pytest.raises(RequestError, match="int8 weights cannot be sharded"):
        planned(base, 2, "fsdp2", model={"quantization": "int8"})


# ---- the command -----------------------------------------------------------------------------------------------------


def printed(capsys, *words: str, **options) -> dict:
    command(*words, as_json=True, **options)
    return json.loads(capsys.readouterr().out)


def test_the_command_prints_the_memory_of_one_of_the_gpus(base, tmp_path, capsys):
    path = tmp_path / "spread.yaml"
    recipe(base).save(path)
    made = printed(capsys, str(path), gpus=2, strategy="fsdp2", gpu="24GB")
    assert (made["gpus"], made["strategy"], made["offload"]) == (2, "fsdp2", False)
    assert made["cards"][0]["verdict"] == "fits" and made["phases"]["forward"][GATHERED] > 0


@pytest.mark.slow
def test_two_cards_hold_what_one_does_not(capsys):
    made = printed(capsys, "llama-3-70b-qlora", gpus=2, strategy="fsdp2", offload=True, gpu="rtx-4090")
    assert made["cards"][0]["verdict"] == "fits" and made["needed_bytes"] < 24e9
    assert 38e9 < made["host"]["training"] < 50e9


# ---- torch's own shards ----------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from orpo_lite.model import attach_adapter
from orpo_lite.recipe import AdapterSection

dist.init_process_group("gloo")
settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, quantization_config=settings,
                                             device_map={"": "cpu"})
model = attach_adapter(model, AdapterSection(), checkpointing=True)
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
base = model.base_model.model
whole = {}
for unit in [*base.model.layers, base.model.embed_tokens, [base.model.norm, base.lm_head]]:
    fully_shard(unit, mesh=mesh)
    for module in unit if isinstance(unit, list) else [unit]:
        module.unshard()
        whole[id(module)] = sum(p.nbytes for p in module.parameters())
        module.reshard()
fully_shard(model, mesh=mesh)
shards = {"frozen": 0, "trained": 0}
for parameter in model.parameters():
    shards["trained" if parameter.requires_grad else "frozen"] += parameter.to_local().nbytes
if dist.get_rank() == 0:
    print(json.dumps(shards | {"layer": whole[id(base.model.layers[0])]}))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_shards_are_those_of_fsdp2(base, tmp_path):
    """Two gloo processes and torch's fully_shard over a 4-bit Llama: bytes at rest, and of a layer when it is whole."""
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    (tmp_path / "shards.py").write_text(SCRIPT, "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path / "shards.py"), str(tmp_path / "model")], capture_output=True, text=True, env=settings)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    real = json.loads(done.stdout.splitlines()[-1])
    study = Study(recipe(base), Target("cuda"))
    static = study.traced(None).peaks["static", ""]
    rounding = 512 * LAYERS * 24
    assert real["frozen"] == pytest.approx((static[BASE] + static[ENDS]) / 2, abs=rounding)
    assert real["trained"] == pytest.approx(static[ADAPTER] / 2, abs=rounding)
    # at rest in float32, the adapters and norms travel in 16 bits
    travels = 2 * H * 2 + TRAINED // LAYERS * 2
    assert real["layer"] - find_units(study).layer == travels
