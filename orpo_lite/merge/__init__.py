"""Merge an adapter into its base, tensor by tensor."""
