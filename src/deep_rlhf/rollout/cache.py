"""Key/value cache in preallocated buffers; transformers' own cache is copied as a whole at every token."""

from functools import partial
from typing import Any

from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from deep_rlhf.models.policy import Policy


def empty_cache(policy: Policy, capacity: int) -> DynamicCache | EncoderDecoderCache:
    """A cache for at most `capacity` tokens of the policy's decoder.

    Layers that do not hold every token (sliding window, recurrent state) are transformers' own.
    """
    if policy.is_seq2seq:
        responses = DynamicCache()
        responses.layer_class_to_replicate = partial(BufferedLayer, capacity)
        return EncoderDecoderCache(responses, DynamicCache())
    cache = DynamicCache(config=policy.language_model.config)
    cache.layers = [BufferedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class BufferedLayer(DynamicLayer):
    """A cache layer whose keys and values are views into buffers [n, heads, capacity, d]."""

    is_initialized: bool

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values [n, heads, new, d]; returns those of all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._key_buffer, self._value_buffer = self._buffer(key_states), self._buffer(value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self._key_buffer[:, :, start:end] = key_states
        self._value_buffer[:, :, start:end] = value_states
        self.keys, self.values = self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, which may repeat; only the filled part of the buffers is copied."""
        if self.is_initialized:
            keys, values = self.keys[indices], self.values[indices]
            self.is_initialized = False
            self.update(keys, values)

    def _buffer(self, states: Tensor) -> Tensor:
        return states.new_empty(*states.shape[:2], self.capacity, states.shape[-1])


def cached_bytes(cache: DynamicCache | EncoderDecoderCache) -> int:
    """Bytes of the keys and values in the cache."""
    if isinstance(cache, EncoderDecoderCache):
        return cached_bytes(cache.self_attention_cache) + cached_bytes(cache.cross_attention_cache)
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in held if tensor is not None)
