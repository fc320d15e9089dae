"""Writes what open_clip gives, for where it is not installed: `python tests/optima/make_open_clip_golden.py`.

Needs open-clip-torch 3.3.0. A file of coca/golden holds a small model's outputs; its metadata the configuration, and
names and shapes of the weights, which `open_clip_oracle.weights` makes again. data/golden/clip_tokens.json holds the
token ids of odd texts.
"""

import json

from open_clip_oracle import CASES, MODELS, TEXTS, TOKENS, build, inputs, load_open_clip, outputs, token_ids, weights
from safetensors.torch import save_file


def main() -> None:
    constants = load_open_clip().constants
    MODELS.mkdir(exist_ok=True)
    for name, config in CASES.items():
        model = build(config)
        shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        model.load_state_dict(weights(shapes))
        found = outputs(model, *inputs(config), constants.OPENAI_DATASET_MEAN, constants.OPENAI_DATASET_STD)
        metadata = {"config": json.dumps(config), "shapes": json.dumps(shapes)}
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, MODELS / f"{name}.safetensors", metadata)
    TOKENS.parent.mkdir(exist_ok=True)
    TOKENS.write_text(json.dumps(dict(zip(TEXTS, token_ids(TEXTS), strict=True))) + "\n")


if __name__ == "__main__":
    main()
