"""Offloaded activations: the same gradients, what goes, and which layers."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from orpo_lite.common.errors import RequestError
from orpo_lite.model.activation_offload import CheckpointedLayers, checkpointing_layers, offload

LLAMA = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)


class Watched(save_on_cpu):
    """Counts, and remembers what it was given without holding it."""

    def __init__(self) -> None:
        super().__init__(pin_memory=True)
        self.given: list[StorageWeakRef] = []
        self.back = 0
        pack, unpack = self.pack_hook, self.unpack_hook

        def pack_and_count(tensor):
            self.given.append(StorageWeakRef(tensor.untyped_storage()))
            return pack(tensor)

        def unpack_and_count(kept):
            self.back += 1
            return unpack(kept)

        self.pack_hook, self.unpack_hook = pack_and_count, unpack_and_count


def model(config=LLAMA):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config).train()
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return made


def gradients(made):
    ids = torch.arange(60).reshape(2, 30)
    made.zero_grad()
    loss = made(input_ids=ids, labels=ids).loss
    held = loss.detach().clone()
    loss.backward()
    return held, [p.grad.clone() for p in made.parameters()]


@pytest.mark.parametrize("config", [LLAMA, GPT2Config(vocab_size=100, n_embd=32, n_layer=4, n_head=4, resid_pdrop=0.1)])
def test_gradients_are_the_same_bit_for_bit(config):
    made = model(config)
    torch.manual_seed(1)  # dropout is drawn again in the recomputation
    plain = gradients(made)
    place = Watched()
    offload(checkpointing_layers(made), place)
    torch.manual_seed(1)
    away = gradients(made)
    assert torch.equal(plain[0], away[0]) and all(map(torch.equal, plain[1], away[1]))
    assert len(place.given) == 4, "one tensor per layer"
    assert place.back in (4, 8), "and back, which torch asks for twice where a layer keeps its input twice"


def test_what_is_away_is_gone_from_where_it_was():
    made, place = model(), Watched()
    offload(checkpointing_layers(made), place)
    ids = torch.arange(60).reshape(2, 30)
    loss = made(input_ids=ids, labels=ids).loss
    assert [ref.expired() for ref in place.given] == [True] * 4
    assert loss.requires_grad


def test_switching_checkpointing_on_again_leaves_one_way_there():
    made, place = model(), Watched()
    for _ in range(3):
        offload(checkpointing_layers(made), place)
    gradients(made)
    assert len(place.given) == 4


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_so_many_layers_checkpoint(count):
    made = model()
    CheckpointedLayers(count).on_train_begin(SimpleNamespace(device=torch.device("cpu")), None, None, model=made)
    assert [layer.gradient_checkpointing for layer in made.model.layers] == [i < count for i in range(4)]
    runs = []
    for layer in made.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    gradients(made)
    assert len(runs) == 4 + count, "each checkpointing layer runs twice"


def test_models_without_such_layers_are_refused_by_name():
    class Own(torch.nn.Module):
        pass

    with pytest.raises(RequestError, match="Own cannot checkpoint its layers one by one"):
        checkpointing_layers(Own())


def test_the_cpu_says_that_there_is_nothing_to_offload(caplog):
    made = model()
    CheckpointedLayers(None, True).on_train_begin(SimpleNamespace(device=torch.device("cpu")), None, None, model=made)
    assert "nothing to offload" in caplog.text
    assert all(layer.gradient_checkpointing for layer in made.model.layers)
