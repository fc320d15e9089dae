"""What the decoders remember while a text grows token by token.

A self-attention keeps the keys and values of the tokens so far; a cross-attention those of the image, which never
change. Space for all tokens is reserved once, so a step copies one token and nothing grows.
"""

from typing import NamedTuple

from torch import Tensor


class KeysValues(NamedTuple):
    """keys [B, H, M, d] and values [B, H, M, d] of one attention."""

    keys: Tensor
    values: Tensor


class SelfAttentionCache:
    """Keys and values of one self-attention: room for `capacity` tokens, filled from the left."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._room: KeysValues | None = None

    def extend(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Keys and values [B, H, N, d] of the next N tokens -> those of all tokens so far, views of the cache."""
        if self._room is None:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self._room = KeysValues(keys.new_empty(shape), values.new_empty(shape))
        end = self.length + keys.shape[2]
        for room, new in zip(self._room, (keys, values), strict=True):
            room[:, :, self.length : end] = new
        self.length = end
        return KeysValues(*(room[:, :, :end] for room in self._room))

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from what row rows[i] remembers; rows: int64 [B]."""
        for room in self._room or ():
            room[:, :, : self.length] = room[rows, :, : self.length]


class DecoderCache:
    """The memory of both decoders over one batch of images.

    Args:
        text: One per layer of the text decoder.
        multimodal: One per layer of the multimodal decoder.
        image: Keys and values [images, H, M, d] of the image tokens, one per layer of the multimodal decoder; rows
            over the same image share them.
    """

    def __init__(
        self, text: list[SelfAttentionCache], multimodal: list[SelfAttentionCache], image: list[KeysValues]
    ) -> None:
        self.text = text
        self.multimodal = multimodal
        self.image = image

    @property
    def length(self) -> int:
        """Tokens remembered."""
        return self.multimodal[0].length

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from what row rows[i] remembers, for rows over the same image; rows: int64 [B]."""
        for cache in (*self.text, *self.multimodal):
            cache.reorder(rows)
