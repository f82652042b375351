"""What every layer uses; needs neither torch nor transformers."""
