"""liger-kernel's Triton kernels on CPU tensors, by Triton's interpreter; tests/conftest.py switches it on."""

import numpy as np
import pytest


def liger() -> None:
    """Make liger-kernel usable on the CPU, or skip: its kernels run as they are, but for what the interpreter lacks."""
    pytest.importorskip(
        "liger_kernel", reason="liger-kernel is not installed (pip install -c constraints.txt '.[kernels]')"
    )
    import triton.language as tl
    from liger_kernel.ops import geglu, rms_norm
    from triton.runtime import interpreter

    if not hasattr(rms_norm._rms_norm_forward_kernel, "rewrite"):
        pytest.skip("Triton was imported without TRITON_INTERPRET=1")
    if hasattr(interpreter, "plain_conversion"):
        return
    interpreter.plain_conversion = interpreter._implicit_cvt

    def convert(value):  # compiled, numbers with a fraction are float32 scalars
        if type(value) is float:
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return interpreter.plain_conversion(value)

    interpreter._implicit_cvt = convert
    # these two come from CUDA's libdevice
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)
    geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
