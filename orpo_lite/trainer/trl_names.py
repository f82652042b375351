"""What scripts written for TRL's ORPOTrainer touch on a trainer beside its constructor and `train`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from datasets import concatenate_datasets
from torch import Tensor, nn

from orpo_lite.objective.loss import log_odds_ratio
from orpo_lite.trainer.objective import ObjectiveTrainer

Half = Literal["train", "eval"]

WHOLE_LOGITS = "the logits of a batch are never formed whole; compute_loss(model, batch, return_outputs=True) gives loss and metrics"
ROWS = "rows are tokenised in batches before the trainer starts; give rows as you want them tokenised, or `chosen_ids` and `chosen_start`"
ABSENT = {
    "concatenated_forward": WHOLE_LOGITS,
    "concatenated_inputs": WHOLE_LOGITS,
    "get_batch_logps": WHOLE_LOGITS,
    "tokenize_row": ROWS,
    "build_tokenized_answer": ROWS,
    "generate_from_model": "generate_during_eval answers greedily and leaves `trainer.answers`",
}
"""Methods of TRL's trainer that have no counterpart, and what to use instead."""
NOT_CALLED = {*ABSENT, "odds_ratio_loss", "get_batch_loss_metrics"}


class TrlNames(ObjectiveTrainer):
    """TRL's attributes and methods by TRL's names, where they mean anything here."""

    _name = "ORPO"
    tokenizer: Any
    is_encoder_decoder: bool
    _stored: dict[str, dict[str, list[float]]]
    _items: Any = None
    """NLL labels and pairs of the optimizer step that is being taken."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if "tokenizer" in kwargs:
            raise TypeError("ORPOTrainer: found tokenizer=, which is called processing_class now, as in TRL")
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if ignored := sorted(NOT_CALLED & vars(cls).keys()):
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(ignored)}, which nothing calls here, so that it would be without "
                "effect: override compute_loss(model, inputs, return_outputs, num_items_in_batch) instead"
            )

    def __getattr__(self, name: str) -> Any:
        why = f" (of TRL's trainer): {ABSENT[name]}" if name in ABSENT else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{why}")

    # ---- settings, which TRL keeps on the trainer ------------------------------------------------------------------

    @property
    def beta(self) -> float:
        return self.args.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self.args.beta = value

    @property
    def max_length(self) -> int:
        return self.args.max_length if self.args.max_length is not None else 512

    @property
    def max_completion_length(self) -> int | None:
        return self.args.max_completion_length or (128 if self.is_encoder_decoder else None)

    @property
    def padding_value(self) -> int | None:
        return self.args.padding_value if self.args.padding_value is not None else self.tokenizer.pad_token_id

    @property
    def generate_during_eval(self) -> bool:
        return self.args.generate_during_eval

    @property
    def aux_loss_enabled(self) -> bool:
        return self.objective.router_loss

    @property
    def aux_loss_coef(self) -> float:
        return self.objective.router_coefficient

    # ---- loss and metrics ------------------------------------------------------------------------------------------

    def odds_ratio_loss(
        self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Beta times the log-sigmoid of the log odds ratio, rewards of both sides, and the means of the two logs.

        Args:
            policy_chosen_logps: mean log-prob of each chosen completion's tokens, (B,).
            policy_rejected_logps: the same of the rejected ones, (B,).

        Returns:
            As TRL's: losses (B,), chosen and rejected rewards (B,) without gradient, mean log-sigmoid, mean log odds.
        """
        odds = log_odds_ratio(policy_chosen_logps, policy_rejected_logps)
        ratio = F.logsigmoid(odds)
        rewards = [self.beta * logps.float().detach() for logps in (policy_chosen_logps, policy_rejected_logps)]
        return self.beta * ratio, rewards[0], rewards[1], ratio.mean(), odds.mean()

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: Half = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of a batch and its metrics by TRL's names, of this process alone.

        Inside of a training step the batch's share of the step's loss, so that a `compute_loss` of one's own can return it.
        """
        # not a subclass's compute_loss, which may be what calls this
        loss, metrics = super().compute_loss(model, batch, return_outputs=True, num_items_in_batch=self._items)
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {f"{prefix}{key}": value for key, value in metrics.items()}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._items = num_items_in_batch
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._items = None

    def store_metrics(self, metrics: dict[str, float], train_eval: Half = "train") -> None:
        """Numbers of one's own for the next log of training or evaluation, which shows the mean of each."""
        for key, value in metrics.items():
            self._stored[train_eval][key].append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the means of what `store_metrics` was given."""
        stored = self._stored.pop("train" if "loss" in logs else "eval", {})
        logs |= {key: sum(values) / len(values) for key, values in stored.items()}
        super().log(logs, start_time)

    # ---- hub ---------------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository: private, unless it is there or `hub_private_repo` says False."""
        asked = self.args.hub_private_repo if private is None else private
        super().init_hf_repo(token, asked is not False)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing is published before the end, and no checkpoint ever: they hold optimizer states."""

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, token: str | None = None,
        revision: str | None = None, private: bool | None = None, **card: Any,
    ) -> Any:  # fmt: skip
        """Publish adapter or model, tokenizer and a model card: the allow-listed files and no others.

        Args:
            card: for `create_model_card`.

        Returns:
            huggingface_hub's CommitInfo, or a future of it where not blocking; None but on the first process.

        Raises:
            RequestError: a file holds what looks like a credential.
        """
        from huggingface_hub import HfApi

        from orpo_lite.common.credentials import find_secrets
        from orpo_lite.common.published_files import ALLOWED, match, refuse, walk

        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        card.setdefault("model_name", str(self.hub_model_id).split("/")[-1])
        self.create_model_card(**card)
        folder = Path(str(self.args.output_dir))
        allowed = ALLOWED["adapter"] | ALLOWED["merged"]
        files = {name: path for name, path in walk(folder) if match(name, allowed)}
        refuse(folder, [f"{name}, {line}" for name, path in files.items() for line in find_secrets(path, token)])
        return HfApi().upload_folder(
            repo_id=str(self.hub_model_id), folder_path=folder, allow_patterns=list(files), token=token,
            commit_message=commit_message, revision=revision or self.args.hub_revision, run_as_future=not blocking,
        )  # fmt: skip

    # ---- model card ------------------------------------------------------------------------------------------------

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into args.output_dir: what was trained on what, and with which versions."""
        from orpo_lite.report.model_card import write_trainer_card

        if self.is_world_process_zero():
            write_trainer_card(self, model_name, dataset_name, tags)  # type: ignore[arg-type]  # of the whole class


def stored_metrics() -> dict[str, dict[str, list[float]]]:
    return defaultdict(lambda: defaultdict(list))


# ---- collators written for TRL's rows ---------------------------------------------------------------------------------


class TrlRows:
    """A collator of one's own, given each pair in TRL's form as well as in ours.

    `chosen_input_ids`, `chosen_attention_mask`, `chosen_labels` (-100 over the prompt), the same of `rejected`,
    `prompt_input_ids`, `prompt_attention_mask`; the texts are those that the tokens say, other columns as they were.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], tokenizer: Any):
        self.collator, self.tokenizer = collator, tokenizer

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        return self.collator([self.row(pair) for pair in pairs])

    def row(self, pair: dict[str, Any]) -> dict[str, Any]:
        row = dict(pair)
        alone = "prompt_ids" in pair  # encoder-decoder: completions apart
        prompt = list(pair["prompt_ids"] if alone else pair["chosen_ids"][: min(pair["chosen_start"], pair["rejected_start"])])  # fmt: skip
        row |= {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        row["prompt"] = self.tokenizer.decode(prompt)
        for side in ("chosen", "rejected"):
            ids, start = list(pair[f"{side}_ids"]), 0 if alone else int(pair[f"{side}_start"])
            row[f"{side}_labels"] = [-100] * start + ids[start:]
            if not alone:
                row |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids)}
            row[side] = self.tokenizer.decode(ids[start:])
        return row


def with_columns(pairs: Any, rows: Any) -> Any:
    """Tokenised pairs with the other columns of the rows that they were made of."""
    more = [name for name in rows.column_names if name not in (*pairs.column_names, "prompt", "chosen", "rejected")]
    if not more:
        return pairs
    return concatenate_datasets([pairs, rows.with_format(None).select_columns(more).select(pairs["row"])], axis=1)
