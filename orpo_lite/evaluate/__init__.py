"""Compare base and adapter; answer prompts; chat; judge."""
