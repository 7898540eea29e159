"""Pure maths: tensors and scalars in, tensors out. No configuration, no model, no device."""
