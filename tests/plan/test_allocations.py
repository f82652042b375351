"""What is counted, when it is freed, and what it is called: by hand, on a few tensors."""

import torch

from orpo_lite.plan import allocations
from orpo_lite.plan.allocations import BASE, HEAD, KEPT, LAYER, WORKSPACE, Timeline
from orpo_lite.plan.gpus import Target
from orpo_lite.plan.kernels import Kernels

META = torch.device("meta")


def timeline(kind: str = "cpu") -> Timeline:
    return Timeline(Target(kind))


def test_each_allocation_counts_under_the_part_it_lived_for():
    log = timeline()
    weight = torch.empty(100, device=META)
    log.hold(weight, BASE)
    log.hold(weight[:10])  # the same storage
    with log:
        log.segment = ("forward", 0)
        kept = torch.empty(10, device=META)
        short = kept + 1
        del short
        log.segment = ("forward", "end")
        head = torch.empty(7, device=META)
        del head
        log.segment = ("backward", 0)
        back = torch.empty(5, device=META)
        del kept, back
    peaks = log.peaks()
    assert peaks["static", ""] == {BASE: 400}
    assert peaks["forward", 0] == {BASE: 400, KEPT: 40, LAYER: 40}
    assert peaks["forward", "end"] == {BASE: 400, KEPT: 40, HEAD: 28, LAYER: 0}
    assert +peaks["backward", 0] == {BASE: 400, KEPT: 40, LAYER: 20}


def test_a_segment_that_only_frees_is_as_full_as_it_began():
    log = timeline()
    with log:
        log.segment = ("forward", 0)
        held = torch.empty(100, device=META)
        log.segment = ("backward", 0)
        del held
        torch.empty(1, device=META)
    assert log.peaks()["backward", 0].total() == 400


def test_sizes_are_rounded_to_blocks_and_workspace_is_there_for_one_operation(monkeypatch):
    product = torch.ops.aten.mul.Tensor
    monkeypatch.setattr(allocations, "workspace", lambda func, args: 1000 if func is product else 0)
    log = timeline("cuda")
    with log:
        log.segment = ("forward", 0)
        a = torch.empty(1, device=META)
        b = a * a
        del b
    assert log.peaks()["forward", 0] == {KEPT: 512, LAYER: 512, WORKSPACE: 1000}


def test_gradients_that_meet_are_summed_in_place_as_they_are_when_nobody_looks():
    log = timeline()
    x = torch.ones(1000, device=META, requires_grad=True)
    with log:
        log.segment = ("forward", 0)
        y = x * 1.0
        loss = (y * 2.0 + y * 3.0).sum()
        log.segment = ("backward", 0)
        loss.backward()
    # y, and the gradients that come to it by two ways; no third for their sum
    assert 3 * 4000 <= log.peaks()["backward", 0].total() < 4 * 4000


def kind_of(function, dtype=torch.bfloat16, target="cuda"):
    kernels = Kernels(Target(target))
    x = torch.ones(4, 4, device=META)
    with kernels.emulate(), torch.autocast("cpu", dtype=dtype):
        return function(x).dtype


def test_autocast_lowers_products_and_raises_norms_as_cuda_does():
    half = lambda x: x.bfloat16()  # noqa: E731
    assert kind_of(lambda x: x @ x) == torch.bfloat16
    assert kind_of(lambda x: torch.nn.functional.linear(x, x)) == torch.bfloat16
    assert kind_of(lambda x: x + x) == torch.float32
    assert kind_of(lambda x: torch.nn.functional.layer_norm(half(x), (4,))) == torch.float32
    assert kind_of(lambda x: torch.nn.functional.layer_norm(half(x), (4,)), target="cpu") == torch.bfloat16
    with Kernels(Target("cuda")).emulate(), torch.autocast("meta", dtype=torch.float16):
        x = torch.ones(4, 4, device=META)
        assert torch.is_autocast_enabled() and (x @ x).dtype == torch.float16
        with torch.autocast("meta", enabled=False):
            assert (x @ x).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def attention_operations(target: Target, query_heads: int, key_heads: int, dtype=torch.bfloat16, mask=None):
    """Names of the operations that attention comes to."""
    seen = []

    class Watch(Timeline):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return super().__torch_dispatch__(func, types, args, kwargs)

    query = torch.empty(1, query_heads, 64, 32, dtype=dtype, device=META)
    key = torch.empty(1, key_heads, 64, 32, dtype=dtype, device=META)
    with Watch(Target("cuda")), Kernels(target).emulate():
        torch.nn.functional.scaled_dot_product_attention(
            query, key, key, mask, is_causal=mask is None, enable_gqa=query_heads != key_heads
        )
    return " ".join(seen)


def test_attention_takes_the_kernel_that_the_device_has():
    ampere, turing = Target("cuda", (8, 6)), Target("cuda", (7, 5))
    assert "_scaled_dot_product_flash_attention" in attention_operations(ampere, 8, 2)
    assert "efficient" in attention_operations(turing, 8, 8, torch.float16)
    # no kernel for grouped heads before Ampere: the formula itself, length x length
    assert "softmax" in attention_operations(turing, 8, 2, torch.float16)
    mask = torch.ones(64, 64, dtype=torch.bool, device=META)
    assert "efficient" in attention_operations(ampere, 8, 8, mask=mask)
    assert "flash_attention_for_cpu" in attention_operations(Target("cpu"), 8, 8, torch.float32)
