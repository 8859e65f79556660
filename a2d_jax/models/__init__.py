"""The transformer, its adapters and the names its tensors carry in checkpoints."""
