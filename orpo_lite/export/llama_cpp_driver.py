"""Runs inside the converter's own process, by its path: nothing of orpo_lite is imported here.

The converter brings a top-level `gguf` of its own, newer in places than the package that transformers reads GGUF with,
so it may not share a process, nor a site-packages folder, with that one.

Reads one request as JSON from stdin. Status 3 and one line on stdout: the converter does not take this model.
"""

import json
import sys
from pathlib import Path

import torch

TYPES = {"bool": "add_bool", "str": "add_string", "int": "add_uint32", "float": "add_float32"}


def model_class(hparams):
    from conversion import ModelType, get_model_architecture, get_model_class  # type: ignore[import-not-found]

    architecture = get_model_architecture(hparams, ModelType.TEXT)
    try:
        return get_model_class(architecture)
    except (NotImplementedError, AttributeError) as error:
        # AttributeError: a module of the converter that its own gguf has no constants for
        raise NotImplementedError(f"architecture {architecture}: the converter does not know it") from error


def build(request, output):
    """The converter's model object, with its tokenizer and metadata as the request says."""
    import gguf
    from conversion import ModelBase  # type: ignore[import-not-found]

    folder, vocabulary = Path(request["model"]), Path(request["vocabulary"])
    hparams = ModelBase.load_hparams(folder, False)
    # transformers 5 saves GPT-2's context length under its other name only
    hparams.setdefault("n_ctx", hparams.get("n_positions"))
    found = model_class(hparams)
    recognised = found.get_vocab_base_pre

    def splitting_rule(self, tokenizer):
        try:
            return recognised(self, tokenizer)
        except NotImplementedError:
            if request["pre"]:
                return request["pre"]
            raise NotImplementedError(
                "tokenizer: its rule for splitting text into words is none that llama.cpp has"
            ) from None

    found.get_vocab_base_pre = splitting_rule
    kind = getattr(gguf.LlamaFileType, request["type"])
    model = found(folder, kind, Path(output), model_name=request["name"], hparams=hparams)
    model.dir_model = vocabulary  # its weights are indexed by now: the rest is read where the tokenizer is complete
    converters_own = model.set_vocab

    def set_vocab():
        try:
            converters_own()
        except (FileNotFoundError, ValueError):
            # some model classes know only SentencePiece files, whatever tokenizer the model has
            if not request["byte_level"]:
                raise
            model._set_vocab_gpt2()
        for key, value in request["fields"].items():
            # of two values given for one key the writer keeps the last
            getattr(model.gguf_writer, TYPES[type(value).__name__])(key, value)

    model.set_vocab = set_vocab
    return model


def architectures():
    """Names of the architectures that can really be converted, a line each."""
    from conversion import TEXT_MODEL_MAP, get_model_class  # type: ignore[import-not-found]

    for name in sorted(TEXT_MODEL_MAP):
        try:
            get_model_class(name)
            print(name)
        except Exception:  # a converter module that cannot be imported here converts nothing: that is what is asked
            continue


def adapter(request):
    """Rename and rearrange LoRA matrices as the converter does the weights that they belong to.

    Rows that the converter permutes in a weight (rotary heads) are rows of B; whether the rest holds for this
    architecture is seen by converting B A as if it were the weight.
    """
    import gguf
    from safetensors import safe_open

    model = build(request, request["output"])
    model.gguf_writer.add_type(gguf.GGUFType.ADAPTER)
    for key, value in request["fields"].items():
        getattr(model.gguf_writer, TYPES[type(value).__name__])(key, value)
    with safe_open(request["matrices"], "pt") as file:
        for module, (transposed, factor) in request["modules"].items():
            a, b = file.get_tensor(f"{module}.A").float(), file.get_tensor(f"{module}.B").float() * factor
            weight = f"{module}.weight"
            block = next((int(part) for part in weight.split(".") if part.isdecimal()), None)

            def turned(matrix, transposed=transposed):
                return matrix.T.contiguous() if transposed else matrix

            refusal = NotImplementedError(
                f"{module}: the converter splits or regroups this weight, which no LoRA pair can follow: export it merged"
            )
            try:
                rows = list(model.modify_tensors(turned(b), weight, block))
                whole = list(model.modify_tensors(turned(b @ a), weight, block))
            except ValueError as error:
                raise NotImplementedError(f"{module}: {error}") from None
            except RuntimeError as error:
                raise refusal from error
            if len(rows) != 1 or len(whole) != 1:
                raise refusal
            name, rows = rows[0][0], rows[0][1]
            expected = whole[0][1]
            if rows.shape != (expected.shape[0], a.shape[0]) or expected.shape[1] != a.shape[1]:
                raise refusal
            if (rows @ a - expected).abs().max() > 1e-4 * expected.abs().max().clamp(min=1e-20):
                raise refusal
            model.gguf_writer.add_tensor(f"{name}.lora_a", a.numpy())
            model.gguf_writer.add_tensor(f"{name}.lora_b", rows.contiguous().numpy())
    model.gguf_writer.write_header_to_file(path=Path(request["output"]))
    model.gguf_writer.write_kv_data_to_file()
    model.gguf_writer.write_tensors_to_file()
    model.gguf_writer.close()


def main():
    request = json.load(sys.stdin)
    try:
        with torch.inference_mode():
            if request["task"] == "architectures":
                architectures()
            elif request["task"] == "adapter":
                adapter(request)
            elif request["task"] == "vocabulary":
                build(request, request["output"]).write_vocab()
            else:
                build(request, request["output"]).write()
    except NotImplementedError as error:
        print(error)
        sys.exit(3)


if __name__ == "__main__":
    main()
