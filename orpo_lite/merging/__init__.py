"""Merging an adapter into its base, tensor by tensor: neither model is ever in memory."""
