"""The attributes and methods that scripts written for TRL's ORPOTrainer use, by TRL's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch.nn.functional as F
from datasets import concatenate_datasets
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from torch import Tensor, nn

from orpo_lite.common.credentials import ALLOWED, published, refuse_secrets
from orpo_lite.data.lengths import answer_tokens
from orpo_lite.objective.loss import log_odds_ratio
from orpo_lite.objective.metrics import finish_metrics

if TYPE_CHECKING:
    from orpo_lite.data.token_cache import TokenizeOptions
    from orpo_lite.trainer.checkpointing import CheckpointedTrainer as Base
    from orpo_lite.trainer.objective import Objective
else:
    Base = object

Half = Literal["train", "eval"]

NOT_CALLED = {"build_tokenized_answer", "concatenated_forward", "concatenated_inputs", "generate_from_model",
              "get_batch_logps", "get_batch_loss_metrics", "odds_ratio_loss", "tokenize_row"}  # fmt: skip
"""Methods of TRL's trainer that nothing calls here; the guide "From TRL" says what to use instead of those that are absent."""


class TrlNames(Base):
    """TRL's attributes and methods by TRL's names, where they mean anything here; a mixin of ORPOTrainer."""

    _name = "ORPO"
    tokenizer: Any
    is_encoder_decoder = False
    objective: Objective
    stored: dict[str, dict[str, list[float]]] | None = None
    """Numbers of `store_metrics` since the last log of training and of evaluation."""
    totals_of_step: Tensor | None = None
    """Counts of the optimizer step whose loss is being computed, see `count_step`."""

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

    def set_trl_attributes(self, options: TokenizeOptions) -> None:
        """Set what TRL's trainer keeps as attributes."""
        pad = self.args.padding_value
        self.max_length, self.max_completion_length = options.max_length, options.max_completion_length
        self.padding_value = self.tokenizer.pad_token_id if pad is None else pad
        self.generate_during_eval = self.args.generate_during_eval
        self.aux_loss_enabled, self.aux_loss_coef = self.objective.router_loss, self.objective.router_coefficient

    @property
    def beta(self) -> float:
        return self.args.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self.args.beta = value

    def odds_ratio_loss(
        self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Compute the odds-ratio term from mean log-probs of chosen and rejected completions, (B,) each.

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
        """Compute the loss of a batch and its metrics by TRL's names, of this process alone.

        Inside a training step it is the batch's share of the step's loss, so that your own `compute_loss` can return it.
        """
        # not a subclass's compute_loss, which may be what calls this
        loss, sums = self.orpo_loss(model, batch, self.totals_of_step)  # type: ignore[attr-defined]  # ORPOTrainer's
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {f"{prefix}{key}": value for key, value in finish_metrics(sums).items()}

    def store_metrics(self, metrics: dict[str, float], train_eval: Half = "train") -> None:
        """Keep your own numbers for the next log of training or evaluation, which shows the mean of each."""
        self.stored = self.stored or {"train": {}, "eval": {}}
        for key, value in metrics.items():
            self.stored[train_eval].setdefault(key, []).append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means of what `store_metrics` was given."""
        if self.stored:
            half = self.stored["train" if "learning_rate" in logs or "loss" in logs else "eval"]
            logs |= {key: sum(values) / len(values) for key, values in half.items()}
            half.clear()
        super().log(logs, start_time)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository: private, unless it exists or `hub_private_repo` says False."""
        asked = self.args.hub_private_repo if private is None else private
        super().init_hf_repo(token, asked is not False)

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, token: str | None = None,
        revision: str | None = None, private: bool | None = None, **card: Any,
    ) -> Any:  # fmt: skip
        """Publish adapter or model, tokenizer and a model card: the files of the allow-list of `orpo-lite push` and no others.

        Args:
            card: for `create_model_card`.

        Returns:
            huggingface_hub's CommitInfo, or a future of it where not blocking; None on all processes but the first.

        Raises:
            RequestError: a file holds what looks like a credential, or is a link that leads out of the folder.
        """
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        card.setdefault("model_name", str(self.hub_model_id).split("/")[-1])
        self.create_model_card(**card)
        folder = Path(str(self.args.output_dir))
        files = published(folder, ALLOWED["adapter"] | ALLOWED["merged"])
        refuse_secrets(folder, files, token)
        return HfApi().upload_folder(
            repo_id=str(self.hub_model_id), folder_path=folder, allow_patterns=list(files), token=token,
            commit_message=commit_message, revision=revision or self.args.hub_revision, run_as_future=not blocking,
        )  # fmt: skip

    def create_model_card(  # pyright: ignore[reportIncompatibleMethodOverride]  # TRL's arguments
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write transformers' card into args.output_dir: what was trained on what, results, and versions."""
        if self.is_world_process_zero():
            path = Path(str(self.args.output_dir)) / "README.md"
            path.unlink(missing_ok=True)  # PEFT's own names the base by its path
            adapter = ["lora"] * isinstance(self.unwrapped(), PeftModel)
            given = {*([tags] if isinstance(tags, str) else tags or ()), "orpo", "orpo-lite", *adapter}
            super().create_model_card(model_name=model_name, dataset=dataset_name, tags=sorted(given))
            card: Any = ModelCard.load(path)
            card.data.library_name, card.data.datasets = (
                "peft" if adapter else "transformers",
                dataset_name and [dataset_name],
            )
            card.save(path)


def trl_columns(pair: dict[str, Any]) -> dict[str, list[int]]:
    """Return a tokenized pair by TRL's names; labels are -100 over all that is no answer."""
    row: dict[str, list[int]] = {}
    for side in ("chosen", "rejected"):
        ids = list(pair[f"{side}_ids"])
        answers = answer_tokens(pair, side)
        row[f"{side}_labels"] = [token if place in answers else -100 for place, token in enumerate(ids)]
        row |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids)}
    prompt = list(pair["chosen_ids"])[: min(pair["chosen_start"], pair["rejected_start"])]
    return row | {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}


def trl_row(pair: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return a tokenized pair with TRL's columns, and the texts `prompt`, `chosen` and `rejected` of its tokens."""
    row = {**pair, **trl_columns(pair)}
    row["prompt"] = tokenizer.decode(row["prompt_input_ids"])
    for side in ("chosen", "rejected"):
        row[side] = tokenizer.decode(list(pair[f"{side}_ids"])[int(pair[f"{side}_start"]) :])
    return row


class TrlRows:
    """Your own collator, given each pair in TRL's form as well as in ours, other columns as they were."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], tokenizer: Any):
        self.collator, self.tokenizer = collator, tokenizer

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        return self.collator([trl_row(pair, self.tokenizer) for pair in pairs])


def with_columns(pairs: Any, rows: Any) -> Any:
    """Return tokenized pairs with the other columns of the rows that they were made of."""
    more = [name for name in rows.column_names if name not in (*pairs.column_names, "prompt", "chosen", "rejected")]
    if not more:
        return pairs
    return concatenate_datasets([pairs, rows.with_format(None).select_columns(more).select(pairs["row"])], axis=1)
