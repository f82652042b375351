"""How likely answers are: mean log-prob a completion token, by the tokens, end and code of training."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch

from orpo_lite.common.errors import RequestError
from orpo_lite.data.collate import PaddedCollator
from orpo_lite.data.row_shapes import row_shape
from orpo_lite.data.token_cache import TokenizeOptions
from orpo_lite.data.tokenize import PairTokenizer
from orpo_lite.evaluate.form import Form, Turns
from orpo_lite.model import autocast
from orpo_lite.objective.head import HeadTransform, LabelRows, head_transform, score_labels, score_logits
from orpo_lite.objective.loss import pair_statistics
from orpo_lite.recipe import Recipe
from orpo_lite.trainer.model_setup import decoder_start


class Scorer:
    """Tokenises two answers as a row of training data would be, and scores them.

    Args:
        recipe: of the run; None takes a recipe's defaults.
    """

    def __init__(self, tokenizer: Any, form: Form, recipe: Recipe | None):
        self.tokenizer, self.form = tokenizer, form
        self.end: Literal["trl", "turn"] = recipe.data.completion_end if recipe else "turn"
        self.transforms: dict[int, HeadTransform | None] = {}

    def batch(self, turns: Turns, first: str, second: str, model: Any) -> dict[str, Any]:
        """Both answers as a pair on the model's device.

        Raises:
            RequestError: the template refuses it, or an answer has no token.
        """
        encoder_decoder = bool(model.config.is_encoder_decoder)
        options = TokenizeOptions(
            max_length=None,
            max_completion_length=2**20 if encoder_decoder else None,
            completion_end=self.end,
            template_kwargs=self.form.options,
            encoder_decoder=encoder_decoder,
        )
        row = self.form.row(turns, first, second)
        shape = row_shape(row)
        assert shape is not None
        chunk = PairTokenizer(self.tokenizer, options, shape)([(0, row)])
        if chunk.drops:
            _, reason, detail = chunk.drops[0]
            raise RequestError(f"training would drop this pair: {reason} ({detail})")
        pad = self.tokenizer.pad_token_id
        collate = PaddedCollator(
            0 if pad is None else pad, "chosen", decoder_start(model.config) if encoder_decoder else None
        )
        pair = {name: values[0] for name, values in chunk.columns.items()}
        return {key: value.to(model.device) for key, value in collate([pair]).items()}

    @torch.no_grad()
    def score(self, model: Any, batch: dict[str, Any]) -> tuple[float, float]:
        """Mean log-prob of the first and of the second answer's tokens under a model as it stands."""
        names = ("input_ids", "attention_mask", "decoder_input_ids")
        inputs = {name: batch[name] for name in names if name in batch}
        target = LabelRows(batch["label_rows"], batch["label_ids"])
        with autocast(model):
            if id(model) not in self.transforms:
                exact = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.2
                self.transforms[id(model)] = head_transform(model, model.device, exact)
            transform = self.transforms[id(model)]
            with contextlib.nullcontext() if transform is None else score_labels(model, target, transform, None):
                logits = model(**inputs, use_cache=False).logits
        logps, means = score_logits(logits, target) if transform is None else (logits.float(), target.means)
        assert means is not None
        stats = pair_statistics(logps, means, batch["chosen_pair"], batch["rejected_pair"], batch["nll_pair"], 1)
        return stats.chosen_logps.item(), stats.rejected_logps.item()
