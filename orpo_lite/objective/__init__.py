"""The ORPO loss: tensors in, numbers out; knows no Trainer."""
