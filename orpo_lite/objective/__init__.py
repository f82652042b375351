"""The ORPO objective: tensors in, numbers out, independent of any Trainer."""
