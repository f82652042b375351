"""EVA: an adapter that starts from the directions of the data, and what it needs for that."""

import pytest
import torch

from orpo_lite.common.errors import RequestError
from orpo_lite.model import initialize_eva, save_adapter
from tests.model.conftest import disturb, logits


def batches(count=4, width=40):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 400, (count, 2, width), generator=generator)
    return [{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in tokens]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_eva_looks_at_data(attach, base_folder, tmp_path, quantization):
    model = attach("llama", quantization, init_lora_weights="eva", use_rslora=True)
    initialize_eva(model, batches())
    base = logits(attach("llama", quantization))
    torch.testing.assert_close(logits(model), base)  # B is zero
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert not any(p.is_meta for p in model.parameters())
    rows = next(p for n, p in parameters.items() if "lora_A" in n)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-4, rtol=0)  # principal directions
    ranks = {p.shape[0] for n, p in parameters.items() if "lora_A" in n}
    assert len(ranks) > 1 and sum(p.shape[0] for n, p in parameters.items() if "lora_A" in n) == 14 * 4
    disturb(model)
    trained = logits(model)
    save_adapter(model, tmp_path)
    again = attach("llama", quantization, init_from=str(tmp_path))
    torch.testing.assert_close(logits(again), trained)


def test_eva_says_what_it_needs(attach):
    with pytest.raises(RequestError, match="at least 8 tokens per batch, found 6"):
        initialize_eva(attach("llama", init_lora_weights="eva"), batches(width=3))
