"""Several adapters in one merge: W + the weighted sum of their products, as PEFT runs them together."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_lite.common.errors import RequestError
from orpo_lite.merge import plan
from orpo_lite.merge.__main__ import weighted
from orpo_lite.merge.run import merge
from tests import commands
from tests.model.conftest import disturb, logits


@pytest.fixture
def adapter(base_folder, tmp_path):
    """adapter(family, name, **LoraConfig) -> folder of an adapter that is not zero."""

    def make(family: str, name: str, **lora) -> Path:
        torch.manual_seed(len(name))
        config = LoraConfig(**{"r": 2, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | lora)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder(family)), config)
        disturb(model)
        for number, (key, value) in enumerate(model.named_parameters()):
            if "lora_" in key:
                value.data.add_(
                    0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number + len(name)))
                )
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def together(base: Path, parts: list[tuple[Path, float]]) -> torch.Tensor:
    """PEFT's logits with all adapters active, each scaled by its weight."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), parts[0][0], "part0")
    for number, (folder, _) in enumerate(parts[1:], 1):
        model.load_adapter(folder, f"part{number}")
    model.base_model.set_adapter([f"part{number}" for number in range(len(parts))])
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for number, (_, weight) in enumerate(parts):
                if f"part{number}" in module.scaling:
                    module.scaling[f"part{number}"] *= weight
    return logits(model)


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
PAIRS = {
    "same modules": ("llama", {"target_modules": ["q_proj", "up_proj"]}, {"target_modules": ["q_proj", "up_proj"]}),
    "others": ("llama", {"target_modules": ["q_proj"]}, {"target_modules": "all-linear", "r": 4, "lora_alpha": 4, "use_rslora": True}),
    "patterns": ("qwen2", {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}}, {"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 3}}),
    "transposed, biases": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}, {"target_modules": ["c_attn", "c_fc"], "lora_bias": True}),
    "experts": ("mixtral", EXPERTS, EXPERTS),
    "experts in one": ("mixtral", {"target_modules": ["q_proj"]}, EXPERTS),
}  # fmt: skip


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)])
@pytest.mark.parametrize("pair", PAIRS)
def test_sum_is_what_peft_runs(adapter, base_folder, tmp_path, pair, weights, capsys):
    family, *configs = PAIRS[pair]
    parts = [
        (adapter(family, f"part-{'x' * i}", **lora), w)
        for i, (lora, w) in enumerate(zip(configs, weights, strict=True))
    ]
    expected = together(base_folder(family), parts)
    merged = AutoModelForCausalLM.from_pretrained(merge(parts, tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    printed = capsys.readouterr().out
    assert f"{weights[0]:g} x part- + {weights[1]:g} x part-x" in printed and "top-1 agreement 100.0%" in printed
    assert f"{weights[1]:g} x" in (tmp_path / "merged" / "README.md").read_text()


def test_three_and_one_with_a_weight(adapter, base_folder, tmp_path):
    parts = [
        (adapter("llama", f"p{'x' * i}", target_modules=["q_proj", "o_proj"][: 1 + i % 2]), 0.25 + i) for i in range(3)
    ]
    for i, some in enumerate((parts, parts[1:2], [parts[0], (parts[0][0], 0.5), (parts[0][0], -0.1)])):
        merged = AutoModelForCausalLM.from_pretrained(merge(some, tmp_path / f"merged-{i}"))
        torch.testing.assert_close(logits(merged), together(base_folder("llama"), some), atol=1e-5, rtol=1e-5)


def test_a_wrong_sum_is_found(adapter, tmp_path, monkeypatch):
    parts = [(adapter("llama", name, target_modules=["q_proj"]), 0.5) for name in ("a", "bb")]
    monkeypatch.setattr(plan.LowRank, "delta", lambda self, start, shape: torch.zeros(*shape))
    with pytest.raises(RuntimeError, match="not the adapter model"):
        merge(parts, tmp_path / "merged")


def test_what_has_no_sum_is_refused_by_name(adapter, base_folder, tmp_path):
    plain, out = adapter("llama", "plain", target_modules=["q_proj"]), tmp_path / "merged"
    for name, lora, words in [
        ("dora", {"target_modules": ["q_proj"], "use_dora": True}, "dora changes model.layers.0.self_attn.q_proj.weight by DoRA"),
        ("whole", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "whole changes lm_head.weight by weights saved"),
        ("ends", {"target_modules": ["embed_tokens"]}, "ends changes .*embed_tokens.weight by weights saved"),  # PEFT saves them whole
        ("rows", {"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "rows changes .*embed_tokens.weight by trained rows"),
    ]:  # fmt: skip
        other = adapter("llama", name, **lora)
        for parts in ([(plain, 1.0), (other, 1.0)], [(other, 0.5)]):
            with pytest.raises(RequestError, match=words):
                merge(parts, out)
        merge([(other, 1.0)], tmp_path / f"alone-{name}")
    elsewhere = adapter("gpt2", "elsewhere", target_modules=["c_attn"])
    with pytest.raises(RequestError, match=r"plain belongs to .*, but .*elsewhere to .*--base"):
        merge([(plain, 1.0), (elsewhere, 1.0)], out)
    other = adapter("llama", "other", target_modules=["q_proj"])
    config = json.loads((other / "adapter_config.json").read_text()) | {"base_model_name_or_path": "someone/renamed"}
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="but .*other to someone/renamed"):
        merge([(plain, 1.0), (other, 1.0)], out)
    merge([(plain, 1.0), (other, 1.0)], tmp_path / "named", base=str(base_folder("llama")))
    tokenizer = AutoTokenizer.from_pretrained(base_folder("llama"))
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(RequestError, match="different vocabularies"):
        merge([(plain, 1.0), (other, 1.0)], out, base=str(base_folder("llama")))
    assert not out.exists()


def test_command_and_its_weights(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run:2").mkdir()
    for given, meant in {
        "a": ("a", 1), "a:0.7": ("a", 0.7), "a:-1e-1": ("a", -0.1), r"C:\models\a": (r"C:\models\a", 1), r"C:\a:0.5": (r"C:\a", 0.5),
        "run:2": ("run:2", 1), "run:2:0.5": ("run:2", 0.5), "user/name:2": ("user/name", 2), "a:b": ("a:b", 1),
    }.items():  # fmt: skip
        assert weighted(given) == meant
    one, two = adapter("llama", "one", target_modules=["q_proj"]), adapter("llama", "two!", target_modules=["v_proj"])
    done = commands.command("merge", "--adapter", f"{one}:0.7", "--adapter", f"{two}", "--output", "merged")
    assert "0.7 x one + 1 x two!" in " ".join(done.stdout.split()), done.stderr
    done = commands.command("merge", str(one), "--adapter", f"{two}:0.3", "--output", "other")
    assert done.returncode == 2 and "expected RUN_OR_ADAPTER, or --adapter" in " ".join(done.stderr.split())
