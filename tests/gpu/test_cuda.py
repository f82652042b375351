"""What only a CUDA device can show: kernels, half precision, the quantized base, peak memory."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import save_on_cpu
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from orpo_lite import ORPOTrainer
from orpo_lite.data.collate import call_rows
from orpo_lite.model.activation_offload import checkpointing_layers, offload
from orpo_lite.model.adapter import prepare_frozen
from orpo_lite.model.precision import Place, has_flash
from orpo_lite.objective import one_call
from orpo_lite.objective.head import token_logps
from orpo_lite.train.bench import peak_over
from tests.tiny import tiny_model
from tests.training import config, gradients, rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=512)  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_head_equals_full_logits(dtype, tolerance, softcap):
    if dtype is torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no bfloat16 on this device")
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device=CUDA, dtype=dtype, requires_grad=True)
    weight = torch.randn(1000, 64, device=CUDA, dtype=dtype) * 0.1
    labels = torch.randint(1000, (300,), device=CUDA)
    got = token_logps(hidden, weight, labels, softcap=softcap, chunk=128)
    got.mean().backward()
    gradient, hidden.grad = hidden.grad.float(), None
    z = hidden.float() @ weight.float().t()
    z = torch.tanh(z / softcap) * softcap if softcap else z
    expected = z.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    expected.mean().backward()
    assert (got - expected).abs().max() < tolerance * 10
    assert ((gradient - hidden.grad.float()).norm() / hidden.grad.float().norm()).item() < tolerance


def test_head_never_holds_more_than_a_chunk_of_logits():
    hidden = torch.randn(2048, 64, device=CUDA, requires_grad=True)
    weight, labels = torch.randn(49152, 64, device=CUDA), torch.zeros(2048, dtype=torch.int64, device=CUDA)
    peak = peak_over(lambda: token_logps(hidden, weight, labels, chunk=128).sum().backward(), CUDA)
    assert peak < 3 * 128 * 49152 * 4


@pytest.mark.parametrize("family", [LlamaConfig(**SIZES), MistralConfig(**SIZES, sliding_window=8)])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_layouts_agree(family, layout, tmp_path, tokenizer):
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(family).to(CUDA), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    outcomes = []
    for each in ("padded", layout):
        args = config(tmp_path, layout=each, bf16=False, fp16=False)
        trainer = ORPOTrainer(model, args, None, rows(4), processing_class=tokenizer)
        loss = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
        outcomes.append((loss.item(), gradients(model, loss)))
    (expected, wanted), (got, gradient) = outcomes
    assert got == pytest.approx(expected, abs=1e-4)
    assert ((gradient - wanted).norm() / wanted.norm()).item() < 1e-3


@pytest.mark.parametrize("kernel", [one_call.varlen, one_call.memory_efficient])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 4, 64), (8, 2, 128), (4, 1, 256), (2, 1, 512)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_all_pairs_in_one_call(kernel, heads, key_heads, width, dtype):
    """Output and gradients of the kernels beside the reference's, with and without a window."""
    place = Place.of(torch.device("cuda", torch.cuda.current_device()), dtype)
    if dtype is torch.bfloat16 and place.capability < (8, 0):
        pytest.skip("no bfloat16 on this device")
    if kernel is one_call.varlen and (not has_flash(place, width) or one_call.varlen_options() is None):
        pytest.skip("no varlen attention for this")
    assert one_call.kernel_failure(kernel, CUDA, dtype, heads, key_heads, width) is None
    segments = [(0, 300, 123, 70), (493, 5, 330, 1), (829, 0, 64, 65)]
    places = {name: tensor.to(CUDA) for name, tensor in call_rows(segments).items()}
    pairs = one_call.pair_calls({"segments": segments} | places, kernel)
    torch.manual_seed(0)
    sizes = [(958, heads), (len(pairs.key_rows), key_heads), (len(pairs.key_rows), key_heads)]
    given = [torch.randn(rows, count, width, device=CUDA, dtype=dtype, requires_grad=True) for rows, count in sizes]
    for window in (0, 50) if kernel is one_call.varlen else (0,):
        outs = [one(*given, pairs, 0.1, window) for one in (kernel, one_call.one_by_one)]
        got, expected = ((out, *torch.autograd.grad(out.float().square().sum(), given)) for out in outs)
        for one, other in zip(got, expected, strict=True):
            assert ((one - other).float().norm() / other.float().norm()).item() < 1e-2


@pytest.mark.parametrize("family", [LlamaConfig(**SIZES), MistralConfig(**SIZES, sliding_window=8)])
@pytest.mark.parametrize("capability", [None, (7, 5)], ids=["own", "as a T4"])
def test_one_call_trains_as_padded_does_in_16_bits(family, capability, tmp_path, tokenizer, monkeypatch):
    if capability:
        plain = Place.of
        monkeypatch.setattr(Place, "of", lambda *given: replace(plain(*given), capability=capability))
    bf16 = torch.cuda.get_device_capability() >= (8, 0)
    dtype = torch.bfloat16 if bf16 else torch.float16
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(family).to(CUDA, dtype), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    prepare_frozen(model)
    outcomes = []
    for layout in ("padded", "shared"):
        args = config(tmp_path, layout=layout, bf16=bf16, fp16=not bf16)
        trainer = ORPOTrainer(model, args, None, rows(4), processing_class=tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.autocast("cuda", dtype):
            loss = trainer.compute_loss(model, batch)
        outcomes.append((loss.item(), gradients(model, loss)))
    assert "one call for all pairs" in trainer.layout.why
    (expected, wanted), (got, gradient) = outcomes
    assert got == pytest.approx(expected, abs=2e-2)
    assert ((gradient - wanted).norm() / wanted.norm()).item() < 5e-2


def test_quickstart_learns(tmp_path):
    from orpo_lite.recipe import Recipe
    from orpo_lite.train.pipeline import run

    words = [f"training.output_dir={tmp_path / 'run'}", "evaluation.samples=0"]
    result = run(Recipe.load("quickstart", words))
    assert result.record.evaluation("after")["rewards/accuracies"] >= 0.95


def test_offloading_frees_the_card_and_changes_no_gradient():
    def held(away: bool) -> tuple[int, torch.Tensor]:
        torch.manual_seed(0)
        model = tiny_model(LlamaConfig(**SIZES | {"hidden_size": 512, "num_hidden_layers": 8})).to(CUDA).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if away:
            offload(checkpointing_layers(model), save_on_cpu(pin_memory=True))
        ids = torch.randint(512, (4, 2048), generator=torch.Generator().manual_seed(0)).to(CUDA)
        before = torch.cuda.memory_allocated()
        loss = model(input_ids=ids).logits[..., 0].sum()
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        return kept, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (plain, expected), (away, got) = held(False), held(True)
    assert plain - away > 6 * 4 * 2048 * 512 * 4, "the inputs of all layers but the last ones are on the host"
    assert ((got - expected).norm() / expected.norm()).item() < 1e-6  # attention adds up in any order


def test_a_step_that_runs_out_of_memory_is_done_again_in_parts(tmp_path, tokenizer):
    def trained(limited: bool) -> tuple[ORPOTrainer, torch.Tensor]:
        torch.manual_seed(0)
        sizes = SIZES | {"hidden_size": 256, "num_hidden_layers": 4}
        model = get_peft_model(tiny_model(LlamaConfig(**sizes)).to(CUDA), LoraConfig(r=4, target_modules="all-linear"))
        args = config(tmp_path / str(limited), bf16=False, fp16=False, per_device_train_batch_size=64, max_steps=2)
        trainer = ORPOTrainer(model, args, None, rows(64), processing_class=tokenizer)
        if limited:  # room for the model and for a part of the step's activations
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(CUDA).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + peak // 2) / total)
        try:
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
            trainer.train()
            peaks.append(torch.cuda.max_memory_allocated() - start)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return trainer, torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    peaks: list[int] = []
    _, expected = trained(False)
    peak = peaks[0]
    trainer, got = trained(True)
    assert trainer.micro_limit.ooms, "it was meant to run out"
    assert ((got - expected).norm() / expected.norm()).item() < 1e-4


CARD_MODEL: dict[str, Any] = {"vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
              "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}  # fmt: skip
"""A model whose step takes some 0.5 GB of a card, most of it where a large model's goes."""


def test_the_plan_is_what_the_card_takes(tmp_path):
    """The peak that CUDA's allocator sees in two steps, beside the plan of the same recipe."""
    from orpo_lite.model import attach_adapter, load_base, load_tokenizer
    from orpo_lite.model.precision import choose_precision
    from orpo_lite.plan.gpus import Target
    from orpo_lite.plan.step import longest_pair
    from orpo_lite.recipe import Recipe
    from orpo_lite.trainer.config_from_recipe import arguments, checkpointed
    from tests.benchmarks.plan_accuracy import TOLERANCE, UNDER, Case
    from tests.plans import plan

    device, folder = torch.device("cuda", torch.cuda.current_device()), tmp_path / "base"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**CARD_MODEL), dtype=choose_precision().dtype).save_pretrained(folder)
    recipe = Case("llama", "nf4", dtype="auto", pairs=4, length=512).recipe(folder)
    del recipe.training["use_cpu"]
    planned = plan(recipe, Target("cuda", torch.cuda.get_device_capability(device))).peak
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    base, facts = load_base(recipe.model)
    count = checkpointed(recipe, base.device)
    model: Any = attach_adapter(base, recipe.adapter, checkpointing=count != 0)
    args = arguments(recipe, tmp_path, facts, has_eval=False, checkpointing=count)
    prompt, answer = longest_pair(recipe.data)
    row: dict[str, Any] = {"chosen_ids": [1] * prompt + [2] * answer, "rejected_ids": [1] * prompt + [3] * answer}
    row |= {"chosen_start": prompt, "rejected_start": prompt}
    rows = Dataset.from_list([row] * (2 * args.per_device_train_batch_size * args.gradient_accumulation_steps))
    ORPOTrainer(model, args, None, rows, None, load_tokenizer(Recipe.load("quickstart").model)).train()
    torch.cuda.synchronize(device)
    measured = torch.cuda.max_memory_allocated(device) - before
    assert -UNDER <= planned / measured - 1 <= TOLERANCE, (planned, measured)
