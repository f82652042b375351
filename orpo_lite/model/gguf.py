"""GGUF bases: dequantized once, weight by weight, into a plain safetensors folder that everything else loads.

transformers can read a GGUF file, but then it neither quantizes nor saves the model.
"""

import json
import logging
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from orpo_lite.common.console import progress
from orpo_lite.common.errors import RequestError
from orpo_lite.model.inspection import check_decoder_only

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the cached folder: raise it when the code below writes something else."""


def cached_folder(path: Path) -> Path:
    """Return the model folder of a GGUF file: dequantized weights, configuration and tokenizer, made at first use.

    The folder is in the Hugging Face cache (HF_HOME/orpo_lite/gguf), under the file's name, size and time of change, and
    appears there whole or not at all.

    Raises:
        RequestError: one part of a split file, or an architecture that transformers cannot read in full.
        OSError, ValueError: whatever transformers raises while it reads the file.
    """
    file = path.stat()
    name = f"{path.stem}-{file.st_size}-{file.st_mtime_ns}-{FORMAT}"
    folder = Path(constants.HF_HOME) / "orpo_lite" / "gguf" / name
    if folder.is_dir():
        return folder
    if find_spec("gguf") is None:
        raise RequestError('model.gguf_file: it needs the gguf package: pip install -c constraints.txt ".[export]"')
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            logger.info(f"GGUF: dequantizing {path.name} once, into {folder}")
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as aside:
                made = Path(aside) / "model"
                made.mkdir()
                convert(path, made)
                made.rename(folder)
    return folder


@progress("dequantizing the GGUF file")
def convert(path: Path, folder: Path) -> None:
    """Write configuration, tokenizer and weights of a GGUF file; one weight is in memory at a time."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    check_decoder_only(config, f"model.gguf_file: {path.name}")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    dtypes = write_weights(path, model, folder)
    config.dtype = dtypes.most_common(1)[0][0]
    vars(config).pop("quantization_config", None)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_weights(path: Path, model: PreTrainedModel, folder: Path) -> Counter[torch.dtype]:
    """Dequantize and write each weight, a file of its own; returns how many numbers came out in which dtype.

    Blocks are dequantized in float32 as scale times small integer (plus offset), with a float16 scale: float16 keeps
    three more bits of that than bfloat16 does. Floats of the file keep their own type.
    """
    from gguf import GGMLQuantizationType, GGUFReader, dequantize
    from transformers import modeling_gguf_pytorch_utils as reading

    reader = GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    processor = reading.TENSOR_PROCESSORS.get(architecture, reading.TensorProcessor)(config=model.config.to_dict())
    names = reading.get_gguf_hf_weights_map(model, processor)
    kept = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.BF16: torch.bfloat16}
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    # several tensors of the file may make one weight (an expert's gate and up projections)
    parts = Counter(names[tensor.name] for tensor in reader.tensors if tensor.name in names)
    files: dict[str, str] = {}
    done: Counter[torch.dtype] = Counter()
    pending: dict[str, Any] = {"tensors": {}}
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        result = processor.process(
            weights=weights, name=tensor.name, tensor_key_mapping=names, parsed_parameters=pending
        )
        if result.name in names:
            pending["tensors"][names[result.name]] = torch.from_numpy(result.weights.copy())
        key = names.get(tensor.name)
        parts[key] -= 1
        ready = list(pending["tensors"]) if key is None else [key] if parts[key] == 0 else []
        for key in ready:
            value = pending["tensors"].pop(key)
            dtype = kept.get(tensor.tensor_type, torch.float16)
            if dtype == torch.float16 and value.abs().max() > torch.finfo(dtype).max:
                dtype = torch.float32
            if key not in expected or value.shape != expected[key]:
                found = tuple(value.shape)
                raise RequestError(f"model.gguf_file: {path.name}: {key} is {found}, expected {expected.get(key)}")
            files[key] = f"model-{len(files) + 1:05}.safetensors"
            save_file({key: value.to(dtype).contiguous()}, folder / files[key], metadata={"format": "pt"})
            done[dtype] += value.numel()
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")
    tied = set(model.all_tied_weights_keys)
    buffers = {name for name, _ in model.named_buffers()}
    lacking = sorted(set(expected) - set(files) - tied - buffers)
    if lacking:
        raise RequestError(
            f"model.gguf_file: {path.name} ({architecture}) lacks {len(lacking)} weight(s) of {type(model).__name__}, "
            f"first {lacking[0]}: join a split file with llama.cpp's llama-gguf-split --merge, or use the safetensors repository"
        )
    return done
