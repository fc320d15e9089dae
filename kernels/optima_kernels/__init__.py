"""Fused distillation losses that never materialise an attention map, a projected state or a logits matrix."""
