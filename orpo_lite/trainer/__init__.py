"""ORPOTrainer and what surrounds one optimizer step."""
