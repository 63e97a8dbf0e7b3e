"""LoRA in the formats of other tools, one file a format: tensors in, tensors out, no models (docs/convert.md)."""
