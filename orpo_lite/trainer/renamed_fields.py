"""Fields that scripts for older versions of TRL and transformers still give, and what became of each."""

from __future__ import annotations

from collections.abc import Iterable

RENAMED = {
    "dataset": "dataset_name",
    "dataset_test_name": "dataset_test_split",
    "dataset_train_name": "dataset_train_split",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "torch_dtype": "dtype",
    "use_nested_quant": "use_bnb_nested_quant",
    "warmup_ratio": "warmup_steps",
}
"""Old name -> the name that means the same now (warmup_steps below 1 is a share of all steps)."""
GONE = {
    "dataset_batch_size": "rows are tokenised in batches by themselves",
    "fp16_backend": "autocast is torch's",
    "group_by_length": "set tokens_per_batch, which puts pairs of like length together inside each step",
    "half_precision_backend": "autocast is torch's",
    "include_inputs_for_metrics": "predictions are one row a pair (orpo_lite.objective.metrics.COLUMNS)",
    "label_pad_token_id": "labels go by length, so no id stands for padding",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "overwrite_output_dir": "what is in output_dir already stops nothing",
    "save_safetensors": "safetensors is the only format",
    "truncation_mode": "the completion is cut at its end, or the pair dropped with overlong='drop'; with max_prompt_length a "
    "longer prompt loses its beginning",
    "use_ipex": "not there any more",
    "use_logits_to_keep": "logits are formed where there is a label, always",
    "use_mps_device": "an Apple GPU is used where there is one",
    "use_num_logits_to_keep": "logits are formed where there is a label, always",
}
"""Old name -> what happens without it."""


def gone(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """A sentence for each name that is a field no more, by the table above."""
    lines, fields = [], set(known)
    for name in names:
        if name in fields:
            continue
        if name in RENAMED:
            lines.append(f"{name} is called {RENAMED[name]} now")
        elif name in GONE:
            lines.append(f"{name} is gone: leave it out ({GONE[name]})")
    return lines
