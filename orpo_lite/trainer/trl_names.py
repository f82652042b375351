"""What scripts written for TRL's ORPOTrainer pass and call, by TRL's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import concatenate_datasets
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel

from orpo_lite.common.credentials import ALLOWED, published, refuse_secrets
from orpo_lite.data.lengths import answer_tokens

if TYPE_CHECKING:
    from orpo_lite.trainer.checkpointing import CheckpointedTrainer as Base
else:
    Base = object

NOT_CALLED = {"build_tokenized_answer", "concatenated_forward", "concatenated_inputs", "generate_from_model",
              "get_batch_logps", "get_batch_loss_metrics", "odds_ratio_loss", "tokenize_row"}  # fmt: skip
"""Methods of TRL's trainer that are absent here; the guide "From TRL" says what to use instead."""


class TrlNames(Base):
    """Publishing by TRL's names, and refusals of what would be without effect here; a mixin of ORPOTrainer."""

    _name = "ORPO"

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


def collated(collator: Callable[[list[dict[str, Any]]], Any], pairs: list[dict[str, Any]]) -> Any:
    """Call your own collator with each pair in TRL's form as well as in ours, other columns as they were."""
    return collator([{**pair, **trl_columns(pair)} for pair in pairs])


def with_columns(pairs: Any, rows: Any) -> Any:
    """Return tokenized pairs with the columns of the rows that they were made of."""
    more = [name for name in rows.column_names if name not in pairs.column_names]
    return concatenate_datasets([pairs, rows.with_format(None).select_columns(more).select(pairs["row"])], axis=1)
