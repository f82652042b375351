"""Load a GGUF file with transformers' reader and compare weights and logits with its source."""

from __future__ import annotations

import copy
from pathlib import Path

import psutil
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from orpo_lite.export.gguf_file import Mismatch
from orpo_lite.merge.verify import drift

PROBE_TOKENS = 64


def compare_logits(path: Path, source: Path, limit: float, exact: bool) -> str:
    """Compare every weight by name, and logits on random tokens; return a sentence, also where neither is possible.

    Args:
        path: the GGUF file.
        source: the model folder.
        limit: largest relative error of a weight, see `Kind.limit`.
        exact: the type is a float type, so the logits must agree as well.

    Raises:
        Mismatch: a weight or the logits are not the source's.
    """
    # both models in float32, and the reader's temporary copy of one
    needed = 12 * sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    if needed > psutil.virtual_memory().available:
        return f"logits not compared: that needs {needed / 1e9:.0f} GB of memory"
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the comparison shows whether its warnings mattered
    try:
        original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True).eval()
        copied = load(path, original)
    finally:
        logging.set_verbosity(level)
    if copied is None:
        return f"logits not compared: transformers cannot read {type(original).__name__} from GGUF"
    found = copied.state_dict()
    for name, weight in original.state_dict().items():
        error = (found[name].float() - weight.float()).norm() / weight.float().norm().clamp(min=1e-20)
        if not error <= limit:
            raise Mismatch(f"{name} is off by {error:.2g} of its norm, at most {limit:g} expected of this type")
    rows = original.config.get_text_config().vocab_size
    tokens = torch.randint(rows, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = original(tokens).logits, copied(tokens).logits
    if not after.isfinite().all():
        raise Mismatch("the file's logits are not finite: a weight may be too large for float16, try bf16 or f32")
    distance = ((after - before).abs().mean() / before.std()).item()
    if exact and distance > 0.1:
        raise Mismatch(f"logits differ by {distance:.1e} of their spread")
    return f"read by transformers: {drift(before, after, tokens)}"


def load(path: Path, original: PreTrainedModel) -> PreTrainedModel | None:
    """Load the file with transformers; None where its reader does not know the model."""
    place = {"gguf_file": path.name, "dtype": torch.float32}
    try:
        # with the source's configuration: from the file, the reader would take defaults for some fields
        model, report = type(original).from_pretrained(  # type: ignore[misc]
            path.parent, config=copy.deepcopy(original.config), output_loading_info=True, **place
        )
        return model.eval() if not report["missing_keys"] and not report["mismatched_keys"] else None
    except NotImplementedError:
        pass  # GGUF has no name for some models, such as Mistral: they are read as the model that they are written as
    except (ValueError, KeyError, RuntimeError):
        return None
    try:
        model = copy.deepcopy(original)
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(path.parent, **place).state_dict())
        return model
    except (ValueError, KeyError, NotImplementedError, RuntimeError):
        return None
