"""Where a CoCa looks in an image for each token of a text."""

import torch
from torch import Tensor

from optima.coca import CoCa


@torch.no_grad()
def attention_over_image(model: CoCa, images: Tensor, tokens: Tensor) -> Tensor | None:
    """images [B, 3, S, S] normalised, tokens int64 [B, L] -> float32 [B, L, rows, columns] of patches; a row sums to 1.

    The attention of each token's position to the image in the last layer of the multimodal decoder, averaged over the
    heads; position p is the one that tells token p + 1 of a caption. None if a pooler hides which patch an image token
    stands for.
    """
    image_encoder, last = model.config.image_encoder, model.config.multimodal_decoder.layers - 1
    if image_encoder.pooler_queries:
        return None
    found = model(images[:, None], tokens, {"multimodal_decoder": (last,)}).taps["multimodal_decoder"][0].attention[1]
    scores = found.q @ found.k.transpose(-1, -2) * found.q.shape[-1] ** -0.5
    side = image_encoder.image_size // image_encoder.patch_size
    maps: Tensor = scores.float().softmax(dim=-1).mean(dim=1)
    return maps.reshape(*maps.shape[:2], side, side)
