"""Writes golden/*.safetensors from open_clip's own models: `python tests/optima/coca/make_golden.py`.

Needs open-clip-torch 3.3.0. A file holds the outputs; its metadata the configuration, and names and shapes of the
weights, which `open_clip_oracle.weights` makes again.
"""

import json

from open_clip_oracle import CASES, GOLDEN, build, inputs, load_open_clip, outputs, weights
from safetensors.torch import save_file


def main() -> None:
    constants = load_open_clip().constants
    GOLDEN.mkdir(exist_ok=True)
    for name, config in CASES.items():
        model = build(config)
        shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        model.load_state_dict(weights(shapes))
        found = outputs(model, *inputs(config), constants.OPENAI_DATASET_MEAN, constants.OPENAI_DATASET_STD)
        metadata = {"config": json.dumps(config), "shapes": json.dumps(shapes)}
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, GOLDEN / f"{name}.safetensors", metadata)


if __name__ == "__main__":
    main()
