"""ZeRO-3 in a whole run: where the base is loaded, what is evaluated before training, and what settings ask for it."""

import base64
import json

import pytest

from orpo_lite.common.errors import RequestError
from orpo_lite.model import load_base, load_tokenizer
from orpo_lite.recipe import ModelSection
from orpo_lite.trainer.distributed import zero_stage_asked
from tests.scale import checks
from tests.scale.group import together

THREE = {"zero_optimization": {"stage": 3}}


def test_the_launcher_or_the_recipe_asks_for_a_stage(monkeypatch, tmp_path):
    for name in ("USE_DEEPSPEED", "DEEPSPEED_ZERO_STAGE", "DEEPSPEED_CONFIG_FILE"):
        monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(THREE))
    assert zero_stage_asked() is None
    assert zero_stage_asked(THREE) == zero_stage_asked(str(file)) == 3
    assert zero_stage_asked(base64.urlsafe_b64encode(json.dumps(THREE).encode()).decode()) == 3
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert zero_stage_asked() == 2  # accelerate's own
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert zero_stage_asked() == 3
    assert zero_stage_asked({"zero_optimization": {"stage": 2}}) == 2
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert zero_stage_asked() == 3
    with pytest.raises(
        RequestError, match=r"training\.deepspeed: found 'nowhere\.json', expected DeepSpeed's settings"
    ):
        zero_stage_asked("nowhere.json")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_base_is_loaded_whole_where_transformers_knows_of_zero3(tmp_path, quantization):
    """As in a notebook, where the arguments of an earlier run are still there."""
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    checks.save_base(tmp_path / "base")
    spec = ModelSection(name_or_path=str(tmp_path / "base"), quantization=quantization, new_tokens=["<new>"])
    known = HfDeepSpeedConfig(THREE)
    model, _ = load_base(spec, load_tokenizer(spec), device="cpu", to_shard=True)
    assert is_deepspeed_zero3_enabled() and known.is_zero3()
    assert all(p.numel() and not hasattr(p, "ds_id") for p in model.parameters())
    stored = {str(p.dtype) for p in model.parameters() if getattr(p, "quant_state", None) is not None}
    assert stored == ({"torch.float32"} if quantization == "nf4" else set())
    with pytest.raises(RequestError, match="int8 weights cannot be sharded by FSDP or ZeRO-3"):
        load_base(spec.model_copy(update={"quantization": "int8"}), device="cpu", to_shard=True)


@pytest.mark.slow
def test_a_recipe_under_zero3_evaluates_first_and_never_holds_the_base_whole(tmp_path):
    pytest.importorskip("deepspeed")
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(checks.zero(3)))
    words = ["training.max_steps=2", "training.logging_steps=1", "evaluation.samples=2", "data.max_eval_rows=4",
             "evaluation.max_new_tokens=4", "training.save_strategy=no"]  # fmt: skip
    ((one, _),) = together(checks.recipe_run, 1, tmp_path / "one", [*words, f"training.output_dir={tmp_path}/run-1"])
    words += [
        "training.per_device_train_batch_size=4",
        f"training.deepspeed={file}",
        f"training.output_dir={tmp_path}/run-2",
    ]
    ((two, shares), _) = together(checks.recipe_run, 2, tmp_path / "two", words)
    assert two["world"]["strategy"] == "zero3"
    assert shares == [1, 1], "an engine to evaluate with and one to train with"
    for when in ("before", "after"):
        for name in ("loss", "logps/chosen", "rewards/margins"):
            assert two["eval"][when][name] == pytest.approx(one["eval"][when][name], rel=2e-5, abs=1e-6), (when, name)
        assert [s["answer"] for s in two["samples"][when]] == [s["answer"] for s in one["samples"][when]]
