"""A run, adapter or model that answers: found, loaded, prompted as it was trained, and scored."""

from orpo_lite.answering.answerer import Answerer, Reply, Sampling, open_answerer
from orpo_lite.answering.found import Found, find

__all__ = ["Answerer", "Found", "Reply", "Sampling", "find", "open_answerer"]
