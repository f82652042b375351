"""`python -m orpo_lite.train`, doctor and bench."""
