"""A script that runs in the converter's own process, by its path: nothing of orpo_lite is imported here.

The converter brings its own top-level `gguf`, in places newer than the package with which files are read back, so it can
share neither a process nor a site-packages folder with that one.

It reads one request as JSON from stdin. Status 3 and a line on stdout mean that the converter does not support the model.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TYPES = {"bool": "add_bool", "str": "add_string", "int": "add_uint32", "float": "add_float32", "list": "add_array"}


def model_class(hparams):
    """Return the converter's class for a model; NotImplementedError where it has none."""
    from conversion import ModelType, get_model_architecture, get_model_class  # type: ignore[import-not-found]

    architecture = get_model_architecture(hparams, ModelType.TEXT)
    try:
        return get_model_class(architecture)
    except (NotImplementedError, AttributeError) as error:
        # AttributeError: the converter's own gguf lacks constants for one of its modules
        raise NotImplementedError(f"architecture {architecture}: the converter does not know it") from error


def build(request):
    """Build the converter's model object, with tokenizer and metadata as the request says."""
    import gguf
    from conversion import ModelBase  # type: ignore[import-not-found]

    folder = Path(request["model"])
    hparams = ModelBase.load_hparams(folder, False)
    # transformers 5 saves GPT-2's context length only under its other name
    hparams.setdefault("n_ctx", hparams.get("n_positions"))
    found = model_class(hparams)
    recognized = found.get_vocab_base_pre

    def splitting_rule(self, tokenizer):
        try:
            return recognized(self, tokenizer)
        except NotImplementedError:
            if request["pre"]:
                return request["pre"]
            raise NotImplementedError(
                "tokenizer: llama.cpp does not have its rule for splitting text into words"
            ) from None

    found.get_vocab_base_pre = splitting_rule
    kind = gguf.LlamaFileType["ALL_F32" if request["type"] == "f32" else f"MOSTLY_{request['type'].upper()}"]
    model = found(folder, kind, Path(request["output"]), model_name=request["name"], hparams=hparams)
    # its weights are indexed by now; the rest is read from where the tokenizer is complete
    model.dir_model = Path(request["vocabulary"])
    converters_own, converted = model.set_vocab, model.modify_tensors

    def modify_tensors(data, name, layer):
        for made, rows in converted(data, name, layer):
            # some classes cut embeddings without a token off, and count the tokens by their files' names
            cut = name.endswith("embed_tokens.weight") and len(rows) < len(data)
            yield made, data if cut else rows

    model.modify_tensors = modify_tensors

    def set_vocab():
        try:
            converters_own()
        except (FileNotFoundError, ValueError):
            # some model classes expect SentencePiece files, whatever tokenizer the model has
            if not request["byte_level"]:
                raise
            model._set_vocab_gpt2()
        add_fields(model, request)

    model.set_vocab = set_vocab
    return model


def add_fields(model, request):
    """Add the request's own fields; the writer keeps the last of two values for a key."""
    for key, value in request["fields"].items():
        getattr(model.gguf_writer, TYPES[type(value).__name__])(key, value)


def adapter(request):
    """Rename and rearrange LoRA matrices as the converter does with their weights.

    Rows that the converter permutes in a weight (rotary heads) are rows of B. Converting B A as if it were the weight
    shows whether nothing else is changed for this architecture.
    """
    import gguf
    from safetensors import safe_open

    model = build(request)
    model.gguf_writer.add_type(gguf.GGUFType.ADAPTER)
    add_fields(model, request)
    with safe_open(request["matrices"], "pt") as file:
        for module, (transposed, factor) in request["modules"].items():
            a, b = file.get_tensor(f"{module}.A").float(), file.get_tensor(f"{module}.B").float() * factor
            layer = next((int(part) for part in module.split(".") if part.isdecimal()), None)

            def converted(matrix, module=module, layer=layer, transposed=transposed):
                matrix = matrix.T.contiguous() if transposed else matrix
                [(name, made)] = model.modify_tensors(matrix, f"{module}.weight".replace("language_model.", ""), layer)
                return name, made

            try:
                name, rows = converted(b)
                _, whole = converted(b @ a)
                follows = torch.allclose(rows @ a, whole, rtol=0, atol=1e-4 * float(whole.abs().max()) + 1e-24)
            except (ValueError, RuntimeError) as error:  # of the converter, of unpacking, or of the shapes
                raise NotImplementedError(f"{module}: no LoRA pair can follow the converter: {error}") from error
            if not follows:
                raise NotImplementedError(
                    f"{module}: the converter regroups this weight, which no LoRA pair can follow"
                )
            model.gguf_writer.add_tensor(f"{name}.lora_a", a.numpy())
            model.gguf_writer.add_tensor(f"{name}.lora_b", rows.contiguous().numpy())
    model.gguf_writer.write_header_to_file(path=Path(request["output"]))
    model.gguf_writer.write_kv_data_to_file()
    model.gguf_writer.write_tensors_to_file()
    model.gguf_writer.close()


def main():
    request = json.load(sys.stdin)
    # beside the configuration of some families it would read the same files as another tokenizer
    AutoTokenizer.from_pretrained = PreTrainedTokenizerFast.from_pretrained
    try:
        with torch.inference_mode():
            if request["task"] == "adapter":
                adapter(request)
            elif request["task"] == "vocabulary":
                build(request).write_vocab()
            else:
                build(request).write()
    except NotImplementedError as error:
        print(error)
        sys.exit(3)


if __name__ == "__main__":
    main()
