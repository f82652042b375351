"""token_logps against the naive reference: values, gradients, memory, and heads of every kind."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_lite.objective.head import auto_chunk, token_logps


def naive(hidden, weight, labels, bias, softcap, scale):
    z = F.linear(hidden.float(), weight.float(), None if bias is None else bias.float()) * scale
    z = torch.tanh(z / softcap) * softcap if softcap else z
    return z.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def inputs(n, h, v, dtype, bias, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=g) * 0.3).to(dtype)
    return hidden, weight, torch.randint(v, (n,), generator=g), torch.randn(v, generator=g).to(dtype) if bias else None


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (5.0, 1.0), (None, 0.0625), (30.0, 2.0)])
@pytest.mark.parametrize(
    ("n", "h", "v", "chunk"), [(1, 3, 7, 64), (37, 24, 131, 16), (64, 8, 257, None), (65, 16, 50, 64)]
)
def test_equals_naive(n, h, v, chunk, softcap, scale, bias, train_head):
    hidden, weight, labels, b = inputs(n, h, v, torch.float32, bias)
    leaves = [hidden]
    if train_head:
        leaves += [t.requires_grad_() for t in (weight, b) if t is not None]
    upstream = torch.randn(n)
    expected = naive(hidden, weight, labels, b, softcap, scale)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    got = token_logps(hidden, weight, labels, b, softcap, scale, chunk)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(got, leaves, upstream), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_float32_out(dtype):
    hidden, weight, labels, _ = inputs(20, 16, 64, dtype, False)
    got = token_logps(hidden, weight, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, naive(hidden, weight, labels, None, None, 1.0), rtol=0, atol=0.05)
    (grad,) = torch.autograd.grad(got.sum(), hidden)
    assert grad.dtype == dtype and grad.isfinite().all()


def test_autocast_outside_does_not_lower_it():
    hidden, weight, labels, _ = inputs(20, 16, 64, torch.float32, False)
    with torch.autocast("cpu", torch.bfloat16):
        got = token_logps(hidden, weight, labels)
    torch.testing.assert_close(got, naive(hidden, weight, labels, None, None, 1.0), rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("train_head", [False, True])
def test_never_more_than_a_chunk_of_logits(train_head):
    n, h, v, chunk = 512, 8, 1000, 32
    hidden, weight, labels, _ = inputs(n, h, v, torch.float32, False)
    weight.requires_grad_(train_head)
    with Largest() as largest:
        token_logps(hidden, weight, labels, chunk=chunk).sum().backward()
    assert largest.elements == chunk * v


def test_frozen_head_needs_two_matrix_products_a_chunk():
    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.products += func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
            return func(*args, **(kwargs or {}))

    hidden, weight, labels, _ = inputs(64, 8, 100, torch.float32, False)
    with Count() as count:
        token_logps(hidden, weight, labels, chunk=16).sum().backward()
    assert count.products == 2 * 4


def test_no_rows():
    hidden, weight, _, _ = inputs(0, 8, 100, torch.float32, False)
    assert token_logps(hidden, weight, torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"expected hidden \(N, H\).*got \(2, 3, 4\)"):
        token_logps(torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64))


def test_auto_chunk_is_bounded():
    assert auto_chunk(1000) == 1024 and auto_chunk(128_256) == 128 and auto_chunk(10**7) == 64
    assert auto_chunk(128_256, torch.bfloat16) == 256


@pytest.mark.parametrize(("softcap", "bytes_each"), [(None, 2), (30.0, 10)])
def test_16_bit_logits_are_never_copied(softcap, bytes_each):
    """On a device, where sums widen as they go, one buffer holds all that a chunk needs; a softcap works in float32."""
    from orpo_lite.plan.allocations import Timeline
    from orpo_lite.plan.gpus import Target
    from orpo_lite.plan.kernels import Kernels

    n, h, v, chunk = 512, 8, 8000, 64
    target = Target("cuda")
    hidden = torch.empty(n, h, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(v, h, dtype=torch.bfloat16, device="meta")
    timeline = Timeline(target)
    timeline.segment = ("forward", "start")
    for tensor in (hidden, weight):
        timeline.hold(tensor)
    before = len(timeline.events)
    with timeline, Kernels(target).emulate():
        token_logps(hidden, weight, torch.empty(n, dtype=torch.int64, device="meta"), softcap=softcap, chunk=chunk)
    held = peak = 0
    for _, size, _ in timeline.events[before:]:
        held += size
        peak = max(peak, held)
    assert peak < (bytes_each + 0.2) * chunk * v
