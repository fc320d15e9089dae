"""What a CoCa's outputs depend on, and what they must not depend on."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from optima.coca import (
    CoCa,
    CoCaConfig,
    HeadSpec,
    ImageEncoderConfig,
    MultimodalDecoderConfig,
    TextDecoderConfig,
    captioning_loss,
    contrastive_loss,
)


@pytest.fixture
def model(make_coca, seed: int) -> CoCa:
    return make_coca(16, 2).double()


def random_images(count: int, each: int = 1) -> Tensor:
    return torch.rand(count, each, 3, 64, 64, dtype=torch.float64) * 2 - 1


def words(rows: int, length: int) -> Tensor:
    return torch.randint(3, 100, (rows, length))


def padded(tokens: Tensor, length: int) -> Tensor:
    return F.pad(tokens, (0, length - tokens.shape[1]))


def test_states_do_not_depend_on_later_tokens(model: CoCa) -> None:
    images, tokens = random_images(2), words(2, 10)
    changed = tokens.clone()
    changed[:, 6:] = words(2, 4)
    ours, theirs = model(images, tokens).states, model(images, changed).states
    torch.testing.assert_close(ours[:, :6], theirs[:, :6])
    assert not torch.allclose(ours[:, 6:], theirs[:, 6:])


@pytest.mark.parametrize("with_class", [False, True])
def test_states_do_not_depend_on_padding(model: CoCa, with_class: bool) -> None:
    images, tokens = random_images(2), words(2, 6)
    short = model(images, tokens, with_class=with_class).states
    long = model(images, padded(tokens, 13), with_class=with_class).states
    torch.testing.assert_close(short, long[:, :6])


def test_states_do_not_depend_on_the_class_token(model: CoCa) -> None:
    images, tokens = random_images(2), padded(words(2, 6), 9)
    without, with_class = model(images, tokens), model(images, tokens, with_class=True)
    torch.testing.assert_close(without.states[without.valid], with_class.states[without.valid])
    assert without.text_feature is None
    assert with_class.text_feature.shape == (2, 8)


def test_the_contrastive_feature_reads_every_token_but_no_padding(model: CoCa) -> None:
    images, tokens = random_images(2), words(2, 6)
    feature = model(images, tokens, with_class=True).text_feature
    for length in (7, 10, 14):
        torch.testing.assert_close(feature, model(images, padded(tokens, length), with_class=True).text_feature)
    for place in range(6):
        changed = tokens.clone()
        changed[:, place] = 101
        other = model(images, changed, with_class=True).text_feature
        assert not torch.allclose(feature, other), f"token {place} is not read"


def test_states_depend_on_the_image_and_the_text_feature_does_not(model: CoCa) -> None:
    tokens = words(2, 6)
    first, second = (model(random_images(2), tokens, with_class=True) for _ in range(2))
    assert not torch.allclose(first.states, second.states)
    torch.testing.assert_close(first.text_feature, second.text_feature)


def test_a_classification_does_not_depend_on_padding(model: CoCa) -> None:
    images, tokens = random_images(3), words(3, 6)
    short = model.class_logits("vqa", model(images, tokens))
    long = model.class_logits("vqa", model(images, padded(tokens, 12)))
    torch.testing.assert_close(short, long)


def test_two_images_are_read_with_the_same_text_and_judged_side_by_side(model: CoCa) -> None:
    images, tokens = random_images(3, 2), words(3, 6)
    logits = model.class_logits("nlvr2", model(images, tokens))
    assert logits.shape == (3, 2)
    head = model.heads["nlvr2"]
    pooled = []
    for side in range(2):
        output = model(images[:, side : side + 1], tokens)
        pooled.append(head.norm(head.pooler(output.states)[:, 0]))
    torch.testing.assert_close(logits, head.classifier(torch.cat(pooled, dim=-1)))
    swapped = model.class_logits("nlvr2", model(images.flip(1), tokens))
    assert not torch.allclose(logits, swapped)


def test_captioning_loss_is_the_mean_over_following_words_that_are_no_padding(seed: int) -> None:
    logits, tokens = torch.randn(3, 7, 11), torch.randint(1, 11, (3, 7))
    tokens[0, 4:], tokens[1, 2:] = 0, 0
    terms = [
        -logits[row, place - 1].log_softmax(-1)[tokens[row, place]]
        for row in range(3)
        for place in range(1, 7)
        if tokens[row, place] != 0
    ]
    loss = captioning_loss(logits, tokens, 0)
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    logits[0, 3:] = torch.randn(4, 11)
    torch.testing.assert_close(captioning_loss(logits, tokens, 0), loss)


def test_contrastive_loss_by_hand(seed: int) -> None:
    image, text = torch.randn(4, 8), torch.randn(4, 8)
    cosine = torch.stack([torch.stack([F.cosine_similarity(i, t, dim=0) for t in text]) for i in image])
    scores = 5.0 * cosine
    by_image = torch.stack([-scores[i].log_softmax(0)[i] for i in range(4)]).mean()
    by_text = torch.stack([-scores[:, i].log_softmax(0)[i] for i in range(4)]).mean()
    loss = contrastive_loss(image, text, torch.tensor(math.log(5.0)))
    torch.testing.assert_close(loss, (by_image + by_text) / 2)


def test_heads_are_made_as_specified(make_coca) -> None:
    model = make_coca(heads={"mood": HeadSpec(7)})
    assert list(model.heads) == ["mood"]
    output = model(random_images(2).float(), words(2, 5))
    assert model.class_logits("mood", output).shape == (2, 7)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (lambda: CoCaConfig(image_encoder=ImageEncoderConfig(image_size=60)), "image_size 60 is no multiple"),
        (lambda: CoCaConfig(text_decoder=TextDecoderConfig(heads=3)), "text_decoder.width 128 is no multiple"),
        (lambda: CoCaConfig(multimodal_decoder=MultimodalDecoderConfig(width=64)), "must equal text_decoder.width"),
        (lambda: CoCaConfig(image_encoder=ImageEncoderConfig(pooler_queries=1)), "pooler_queries 1"),
        (
            lambda: CoCaConfig(embed_dim=100, image_encoder=ImageEncoderConfig(pooler_queries=4)),
            "embed_dim 100 is no multiple",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        config()


def test_images_are_shifted_to_the_statistics_a_model_was_trained_with(model: CoCa) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    image = dataclasses.replace(model.config.image_encoder, mean=mean, std=std)
    other = CoCa(dataclasses.replace(model.config, image_encoder=image), model.head_specs).double()
    other.load_state_dict(model.state_dict())
    images, tokens = random_images(2), words(2, 6)
    mean_C11, std_C11 = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
    shifted = ((images + 1) / 2 - mean_C11) / std_C11
    torch.testing.assert_close(other(images, tokens).states, model(shifted, tokens).states, rtol=1e-5, atol=1e-6)
    assert "pixels" not in "".join(other.state_dict())
