"""All pairs in one call of a kernel equal padded batches, and where no flash kernel is, sdpa never sees grouped heads."""

import copy
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers as tf
from datasets import Dataset

from orpo_lite import ORPOTrainer
from orpo_lite.model.precision import Place
from orpo_lite.objective import one_call
from orpo_lite.objective.layout import choose_layout
from orpo_lite.objective.one_call import choose_attention
from orpo_lite.objective.packed_attention import PairMask, inner_attention
from tests.objective.test_layouts import SHARED, S, adapted
from tests.tiny import tiny_model
from tests.training import config, gradients, rows

AMPERE, T4 = Place("cuda", (8, 6), torch.bfloat16), Place("cuda", (7, 5), torch.float16)


def by_hand(query, key, value, starts, key_starts, scale, window):
    """Causal attention from the bottom right of every sequence, from its formula; (T, heads, width)."""
    key, value = (one.repeat_interleave(query.shape[1] // key.shape[1], 1) for one in (key, value))
    parts = []
    for (q, q_end), (k, k_end) in zip(pairwise(starts.tolist()), pairwise(key_starts.tolist()), strict=True):
        scores = torch.einsum("qhd,khd->hqk", query[q:q_end], key[k:k_end]) * (scale or query.shape[-1] ** -0.5)
        at = torch.arange(q_end - q)[:, None] + (k_end - k) - (q_end - q)
        place = torch.arange(k_end - k)
        hidden = (place > at) | (place < at - window[0] if window[0] >= 0 else torch.tensor(False))
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value[k:k_end]))
    return torch.cat(parts)


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins with the kernels' signatures, on the CPU and in float32; the windows of their calls by name."""
    called = {"torch varlen": [], "torch memory-efficient": []}

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                    window_size=(-1, -1), enable_gqa=False):  # fmt: skip
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size[1] == 0
        assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
        assert enable_gqa or query.shape[1] == key.shape[1]
        called["torch varlen"].append(window_size[0] + 1)
        return by_hand(query, key, value, cu_seq_q, cu_seq_k, scale, window_size)

    def efficient(query, key, value, bias, cu_q, cu_k, max_q, max_k, dropout_p, custom_mask_type, kept, *, scale=None):
        assert (bias, dropout_p, custom_mask_type, len(query)) == (None, 0.0, 2, 1) and key.shape[2] == query.shape[2]
        assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
        called["torch memory-efficient"].append(0)
        return by_hand(query[0], key[0], value[0], cu_q, cu_k, scale, (-1, 0))[None], None

    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(one_call, "efficient_attention", efficient)
    monkeypatch.setattr(one_call, "FLASH_DTYPES", (torch.float32, torch.bfloat16, torch.float16))
    one_call.varlen_options.cache_clear()
    one_call.kernel_failure.cache_clear()
    yield called
    one_call.varlen_options.cache_clear()
    one_call.kernel_failure.cache_clear()


@pytest.fixture(scope="module")
def pairs():
    """Uneven pairs, one with answers that open alike."""
    made = rows(4, seed=5).to_list()
    for side in ("chosen", "rejected"):
        made[1][side][0]["content"] = "river stone cloud bread " + made[1][side][0]["content"]
    return Dataset.from_list(made)


# family: layers that take one call on sm86 and on a T4 (windows are shorter than the pairs), of 2
FAMILIES = {
    "llama": (2, 2), "qwen2": (2, 2), "qwen3": (2, 2), "mistral-window": (2, 0), "gemma3": (2, 1), "phi3": (2, 0),
    "granite-scales": (2, 2), "gpt_neox": (2, 2), "mixtral": (2, 2), "gemma2": (0, 0), "gpt_oss-sinks": (0, 0),
    "deepseek_v3-latent": (0, 0), "llama-eager": (0, 0),
}  # fmt: skip


@pytest.mark.parametrize("place", [AMPERE, T4], ids=["sm86", "t4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_call_equals_padded(name, place, kernels, monkeypatch, tmp_path, tokenizer, pairs):
    monkeypatch.setattr(Place, "of", lambda device, dtype: replace(place, device=device))
    model = adapted(SHARED[name])
    outcomes, layers = [], FAMILIES[name][place is T4]
    kernel = "torch varlen" if place is AMPERE else "torch memory-efficient"
    for layout, checkpointing in (("padded", False), ("packed", False), ("shared", False), ("shared", True)):
        twin = copy.deepcopy(model)
        trainer = ORPOTrainer(twin, config(tmp_path, layout=layout, beta=0.5), None, pairs, processing_class=tokenizer)
        if checkpointing:
            twin.enable_input_require_grads()
            twin.gradient_checkpointing_enable({"use_reentrant": False})
        twin.train()
        batch = next(iter(trainer.get_train_dataloader()))
        for calls in kernels.values():
            calls.clear()
        loss = trainer.compute_loss(twin, batch)
        outcomes.append((loss.item(), gradients(twin, loss)))
        taken = kernels[kernel]
        assert len(taken) == (0 if layout == "padded" else layers * (1 + checkpointing)), trainer.layout.why
        assert sum(map(len, kernels.values())) == len(taken)
    (loss, gradient), *others = outcomes
    for got, got_gradient in others:
        assert got == pytest.approx(loss, abs=1e-5)
        assert ((got_gradient - gradient).norm() / gradient.norm()).item() < 1e-4
    assert ("one call for all pairs" in trainer.layout.why) == (name in SHARED and inner_attention(model) == "sdpa")


def attention_calls(monkeypatch, run):
    """What reaches sdpa while `run` works: heads of queries and keys, and whether they may be grouped."""
    reached, plain = [], torch.nn.functional.scaled_dot_product_attention

    def seen(query, key, value, *args, **kwargs):
        reached.append((query.shape[1], key.shape[1], kwargs.get("enable_gqa", False)))
        return plain(query, key, value, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
        run()
    return reached


WIDE = tf.LlamaConfig(**S | {"num_hidden_layers": 1}, head_dim=264)
NO_FLASH = {
    "t4": ("mistral-window", T4, {}),
    "t4-padded": ("qwen2", T4, {"layout": "padded"}),
    "float32": ("mistral-window", Place("cuda", (8, 6), torch.float32), {}),
    "float32-padded": ("llama", Place("cuda", (8, 6), torch.float32), {"layout": "padded"}),
    "wide-padded": (WIDE, AMPERE, {"layout": "padded"}),
    "t4-eval": ("mistral-window", T4, {"evaluate": True}),
}


@pytest.mark.parametrize("case", NO_FLASH)
def test_no_grouped_heads_reach_sdpa_without_a_flash_kernel(case, monkeypatch, tmp_path, tokenizer, kernels):
    family, place, options = NO_FLASH[case]
    options = dict(options)
    evaluate = options.pop("evaluate", False)
    monkeypatch.setattr(Place, "of", lambda device, dtype: replace(place, device=device))
    model = tiny_model(SHARED[family] if isinstance(family, str) else family)
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    same = Dataset.from_list([rows(1).to_list()[0] | {"rejected": rows(1).to_list()[0]["chosen"]}] * 2)  # no padding
    trainer = ORPOTrainer(model, config(tmp_path, **options), None, same, same, tokenizer)
    assert "repeated for each query head" in trainer.layout.why
    assert trainer.layout.attention.repeats
    batch = next(iter(trainer.get_train_dataloader()))
    step = trainer.evaluate if evaluate else lambda: trainer.compute_loss(model.train(), batch).backward()
    reached = attention_calls(monkeypatch, step)
    heads = model.config.num_attention_heads
    assert reached and set(reached) == {(heads, heads, False)}


def test_with_a_flash_kernel_heads_stay_grouped(monkeypatch, tmp_path, tokenizer, kernels):
    monkeypatch.setattr(Place, "of", lambda device, dtype: replace(AMPERE, device=device))
    model = tiny_model(SHARED["llama"])
    trainer = ORPOTrainer(model, config(tmp_path, layout="padded"), None, rows(1), processing_class=tokenizer)
    assert "repeated" not in trainer.layout.why and not trainer.layout.attention.repeats


def test_dropout_goes_pair_by_pair(monkeypatch, tmp_path, tokenizer, kernels):
    monkeypatch.setattr(Place, "of", lambda device, dtype: replace(AMPERE, device=device))
    model = tiny_model(tf.LlamaConfig(**S, attention_dropout=0.1))
    trainer = ORPOTrainer(model, config(tmp_path, disable_dropout=False), None, rows(2), processing_class=tokenizer)
    assert "two for attention with dropout" in trainer.layout.why
    batch = next(iter(trainer.get_train_dataloader()))
    kernels["torch varlen"].clear()  # of the trial
    trainer.compute_loss(model.train(), batch)
    assert kernels["torch varlen"] == []
    trainer.compute_loss(model.eval(), batch)
    assert kernels["torch varlen"] == [0, 0]


def test_a_kernel_that_fails_or_differs_here_is_not_taken(kernels, monkeypatch):
    llama, place = SHARED["llama"], replace(T4, device=torch.device("cpu"))
    assert choose_attention(llama, "sdpa", place).name == "torch memory-efficient"

    def fails(*args, **kwargs):
        raise RuntimeError("no kernel image")

    for broken, words in ((fails, "fails here \\(no kernel image\\)"),
                          (lambda q, k, v, *args, **kwargs: (q + 0 * (k.sum() + v.sum()), None), "differs here")):  # fmt: skip
        one_call.kernel_failure.cache_clear()
        monkeypatch.setattr(one_call, "efficient_attention", broken)
        attention = choose_attention(llama, "sdpa", place)
        assert attention.run is None and attention.repeats
        assert re.search(words, attention.why), attention.why


@pytest.mark.parametrize(
    ("model_config", "place", "name", "words"),
    [
        (SHARED["llama"], AMPERE, "torch varlen", "one call for all pairs on sm86 in bfloat16, head size 8"),
        (SHARED["llama"], T4, "torch memory-efficient", "one call for all pairs on sm75 in float16"),
        (SHARED["mistral-window"], T4, "torch memory-efficient", "two for its windows"),
        (SHARED["mistral-window"], AMPERE, "torch varlen", "one call for all pairs on sm86"),
        (WIDE, AMPERE, "torch memory-efficient", "head size 264; elsewhere keys and values are repeated"),
        (SHARED["llama"], Place("cpu", (0, 0), torch.float32), "sdpa", "no kernel for cpu"),
        (SHARED["gemma2"], AMPERE, "eager", "the model's own function"),
    ],
)
def test_the_choice_says_what_and_why(model_config, place, name, words, kernels):
    layout = choose_layout(tiny_model(model_config), place=place)
    assert layout.attention.name == name and words in layout.why and name in layout.why


def test_an_old_torch_takes_the_memory_efficient_kernel(kernels, monkeypatch):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda query, key, value, cu_seq_q: None)
    assert choose_attention(SHARED["llama"], "sdpa", AMPERE).name == "torch memory-efficient"


def test_windows_are_told_from_chunks():
    from transformers import masking_utils as masks

    cpu = torch.device("cpu")

    def window(rule, local, longest=100):
        return PairMask(rule, local, cpu, torch.float32).window(longest)

    assert window(masks.causal_mask_function, None) == 0
    for size in (1, 2, 7, 64):
        slides = masks.sliding_window_causal_mask_function(size)
        assert window(slides, size) == size and window(slides, size, longest=size) == 0
        chunks = masks.chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64))
        assert window(chunks, size) in ((None, 1) if size == 1 else (None,))
        assert window(slides, None) is None
