"""Answers per second of `orpo-lite pairs`' sampling against transformers' generate in a plain loop, one answer at a time.

    python -m tests.benchmarks.sampling [--model MODEL] [--prompts N] [--tokens N]

Both sample 8 answers to each prompt from the same loaded model, by turns, and the best of three is kept. The same tokens are not drawn
on both sides, so that tokens per second are printed too.
"""

import argparse
import time

import torch

from orpo_lite.evaluate.answer_file import answer_questions, read_questions
from orpo_lite.evaluate.answering import find_sides
from orpo_lite.trainer.generate import Sampling

SAMPLES = 8


def plain_loop(side, questions, sampling) -> int:
    model, tokens = side.loaded[0], 0
    for question in questions:
        [ids] = side.prompts([question.prompt])
        prompt = torch.tensor([ids])
        for _ in range(SAMPLES):
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0,
                                 max_new_tokens=sampling.max_new_tokens, eos_token_id=side.stops)  # fmt: skip
            tokens += out.shape[1] - prompt.shape[1]
    return tokens


def ours(side, questions, sampling) -> int:
    rows = answer_questions([side], [one for one in questions for _ in range(SAMPLES)], sampling, 0, 32, None)
    return sum(count for row in rows for each in row["tokens"].values() for count in each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="quickstart")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    given = parser.parse_args()
    torch.set_num_threads(2)
    sampling = Sampling(given.tokens, temperature=1.0)
    side = find_sides(given.model)[-1]
    questions = read_questions("builtin:quickstart/heldout.jsonl")[: given.prompts]
    best: dict[str, tuple[float, float]] = {}
    for _ in range(3):
        for way in (plain_loop, ours):
            start = time.perf_counter()
            tokens = way(side, questions, sampling)
            seconds = time.perf_counter() - start
            speed = (len(questions) * SAMPLES / seconds, tokens / seconds)
            best[way.__name__] = max(best.get(way.__name__, speed), speed)
    for name, (answers, tokens) in best.items():
        print(f"{name:>10}: {answers:6.2f} answers/s, {tokens:7.1f} tokens/s")
    print(
        f"ratio: {best['ours'][0] / best['plain_loop'][0]:.1f} in answers, {best['ours'][1] / best['plain_loop'][1]:.1f} in tokens"
    )


if __name__ == "__main__":
    main()
