"""Pure mathematics: tensors and scalars in, tensors out. No configuration, no model, no device; imports torch alone.

Shapes: N samples, P and R prompt and response length in tokens, V vocabulary, H hidden size, K ensemble members. Masks
are True for real tokens; EOS is a real token of its response. Log-probabilities, KL and entropy are in nats.
"""
