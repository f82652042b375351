"""Precision follows the device's compute capability, never torch's own is_bf16_supported."""

import pytest
import torch

from orpo_lite.common.errors import RequestError
from orpo_lite.model import choose_precision


@pytest.mark.parametrize(
    ("capability", "dtype", "fp16", "bf16"),
    [
        ((7, 5), torch.float16, True, False),
        ((6, 1), torch.float16, True, False),
        ((8, 0), torch.bfloat16, False, True),
        ((8, 6), torch.bfloat16, False, True),
        ((12, 0), torch.bfloat16, False, True),
    ],
)
def test_cuda_goes_by_capability(monkeypatch, capability, dtype, fp16, bf16):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: pytest.fail("true on a T4 through emulation"))
    chosen = choose_precision("auto", "cuda:0")
    assert (chosen.dtype, chosen.fp16, chosen.bf16) == (dtype, fp16, bf16)
    assert f"{capability[0]}.{capability[1]}" in chosen.why


def test_cpu_is_float32_and_refuses_float16():
    chosen = choose_precision("auto", "cpu")
    assert (chosen.dtype, chosen.fp16, chosen.bf16) == (torch.float32, False, False)
    with pytest.raises(RequestError, match=r"model\.dtype"):
        choose_precision("float16", "cpu")


def test_what_was_asked_for_is_taken_and_judged(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    chosen = choose_precision("bfloat16", "cuda")
    assert chosen.dtype == torch.bfloat16 and chosen.bf16 and "emulated" in chosen.why
    assert choose_precision("float32", "cuda") == choose_precision("float32", "cuda:0")


@pytest.mark.parametrize(("device", "dtype"), [("xpu", torch.bfloat16), ("mps", torch.float32)])
def test_other_accelerators(device, dtype):
    assert choose_precision("auto", device).dtype == dtype
