"""Greedy captions."""

import torch

from optima.coca.generate import generate

START, END, LENGTH = 1, 2, 14


def test_captions_are_the_step_by_step_argmax_and_stop_at_the_end(make_coca, seed: int) -> None:
    model, images = make_coca(16, 1, vocab_size=12).double(), torch.rand(24, 3, 64, 64, dtype=torch.float64)
    captions = generate(model, images, start_id=START, end_id=END, length=LENGTH)
    assert captions.shape == (24, LENGTH)
    ended_early = 0
    for image, caption in zip(images, captions.tolist(), strict=True):
        said = [START]
        while len(said) < LENGTH and said[-1] != END:
            states = model(image[None, None], torch.tensor([said])).states
            said.append(int(model.caption_logits(states[0, -1]).argmax()))
        ended_early += said[-1] == END and len(said) < LENGTH
        assert caption == said + [0] * (LENGTH - len(said))
    print(f"{ended_early} of 24 captions ended early")


def test_every_caption_stops_at_once_when_the_end_is_all_a_model_says(make_coca, seed: int) -> None:
    model = make_coca(16, 1)
    with torch.no_grad():
        model.multimodal_decoder.norm_output.weight.zero_()
        model.multimodal_decoder.norm_output.bias.fill_(1.0)
        model.multimodal_decoder.head.weight.fill_(-1.0)
        model.multimodal_decoder.head.weight[END] = 1.0
    captions = generate(model, torch.rand(3, 3, 64, 64), start_id=START, end_id=END, length=LENGTH)
    assert captions.tolist() == [[START, END] + [0] * (LENGTH - 2)] * 3
