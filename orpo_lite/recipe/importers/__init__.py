"""Turn axolotl's and LLaMA-Factory's configurations into recipes."""
