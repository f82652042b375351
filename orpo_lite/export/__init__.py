"""Write GGUF files and publish on the hub."""
