"""Label assignment: plain functions of tensors to indices."""
