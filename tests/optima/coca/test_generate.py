"""Captions: cached as uncached, the searches as written out by hand, draws as their distribution."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from optima.coca import CoCa
from optima.coca.config import GenerationConfig
from optima.coca.generate import beam_search, draw, generate

PAD, START, END, LENGTH = 0, 1, 2, 14

STRATEGIES = [
    GenerationConfig(),
    GenerationConfig("beam", beams=3),
    GenerationConfig("beam", beams=4, length_penalty=0.0),
    GenerationConfig("sample", temperature=0.7, top_k=8, top_p=0.9, seed=5),
]


def random_images(count: int) -> Tensor:
    return torch.rand(count, 3, 64, 64, dtype=torch.float64) * 2 - 1


def sharp(model: CoCa, factor: float = 8.0) -> CoCa:
    """The same model with a head so large that its choices differ in probability, as a trained one's do."""
    with torch.no_grad():
        model.multimodal_decoder.head.weight.mul_(factor)
    return model


def log_probabilities(model: CoCa, image: Tensor, text: list[int]) -> Tensor:
    """[V] of the token after `text`, from the whole model; padding is never said."""
    logits = model.caption_logits(model(image[None, None], torch.tensor([text])).states[0, -1])
    logits[PAD] = -math.inf
    return logits.log_softmax(dim=-1)


@torch.no_grad()
def test_captions_are_the_step_by_step_argmax_and_stop_at_the_end(make_coca, seed: int) -> None:
    model, images = make_coca(16, 1, vocab_size=12).double(), random_images(24)
    captions = generate(model, images, start_id=START, end_id=END, length=LENGTH)
    assert captions.shape == (24, LENGTH)
    ended_early = 0
    for image, caption in zip(images, captions.tolist(), strict=True):
        said = [START]
        while len(said) < LENGTH and said[-1] != END:
            said.append(int(log_probabilities(model, image, said).argmax()))
        ended_early += said[-1] == END and len(said) < LENGTH
        assert caption == said + [PAD] * (LENGTH - len(said))
    print(f"{ended_early} of 24 captions ended early")


def test_every_caption_stops_at_once_when_the_end_is_all_a_model_says(make_coca, seed: int) -> None:
    model = make_coca(16, 1)
    with torch.no_grad():
        model.multimodal_decoder.norm_output.weight.zero_()
        model.multimodal_decoder.norm_output.bias.fill_(1.0)
        model.multimodal_decoder.head.weight.fill_(-1.0)
        model.multimodal_decoder.head.weight[END] = 1.0
    for config in STRATEGIES[:2]:
        captions = generate(model, torch.rand(3, 3, 64, 64), start_id=START, end_id=END, length=LENGTH, config=config)
        assert captions.tolist() == [[START, END] + [PAD] * (LENGTH - 2)] * 3


@pytest.mark.parametrize("config", STRATEGIES, ids=["greedy", "beam3", "beam4", "sample"])
@pytest.mark.parametrize("pooler_queries", [0, 5])
def test_cached_captions_are_the_uncached_ones(make_coca, seed: int, config, pooler_queries: int) -> None:
    model = sharp(make_coca(32, 3, vocab_size=40, context_length=24, pooler_queries=pooler_queries).double())
    images, ids = random_images(5), {"start_id": START, "end_id": END, "length": 24}
    cached = generate(model, images, config=config, **ids)
    uncached = generate(model, images, config=config, cached=False, **ids)
    assert cached.tolist() == uncached.tolist()


@pytest.mark.parametrize("config", STRATEGIES, ids=["greedy", "beam3", "beam4", "sample"])
def test_asking_whether_all_have_ended_changes_no_caption(make_coca, seed: int, config: GenerationConfig) -> None:
    model = sharp(make_coca(16, 2, vocab_size=6).double(), 3.0)
    images = random_images(4)
    captions = [
        generate(
            model,
            images,
            start_id=START,
            end_id=END,
            length=LENGTH,
            config=GenerationConfig(**vars(config) | {"check_every": every}),
        ).tolist()
        for every in (0, 1, 5)
    ]
    assert captions[0] == captions[1] == captions[2]


@pytest.mark.parametrize("config", STRATEGIES, ids=["greedy", "beam3", "beam4", "sample"])
def test_generation_reads_no_value_on_the_host(make_coca, config: GenerationConfig) -> None:
    silent = GenerationConfig(**vars(config) | {"check_every": 0})
    with FakeTensorMode():
        model = make_coca(16, 2)
        images = torch.rand(3, 3, 64, 64)
        captions = generate(model, images, start_id=START, end_id=END, length=LENGTH, config=silent)
    assert captions.shape == (3, LENGTH)


@torch.no_grad()
def every_text(model: CoCa, image: Tensor, length: int, penalty: float) -> dict[tuple[int, ...], float]:
    """All texts of up to `length` tokens with their scores: those that end, and those cut."""
    words = [token for token in range(model.config.text_decoder.vocab_size) if token not in (PAD, END)]
    scores = {}
    for count in range(length):
        for said in itertools.product(words, repeat=count):
            cut = count == length - 1
            text = [START, *said] if cut else [START, *said, END]
            tokens = torch.tensor([text])
            logits = model.caption_logits(model(image[None, None], tokens[:, :-1]).states[0])
            logits[:, PAD] = -math.inf
            each = logits.log_softmax(dim=-1).gather(1, tokens[0, 1:, None])
            scores[tuple(text + [PAD] * (length - len(text)))] = float(each.sum()) / (len(text) - 1) ** penalty
    return scores


@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.7])
def test_a_beam_of_four_finds_the_best_of_all_texts_where_it_can_hold_them(make_coca, seed: int, penalty) -> None:
    """Two words, start and another, beside the end: two live texts after one token, four after two."""
    model, images = sharp(make_coca(16, 1, vocab_size=4).double(), 3.0), random_images(4)
    config = GenerationConfig("beam", beams=4, length_penalty=penalty)
    found = beam_search(model, images, start_id=START, end_id=END, length=4, config=config)
    for image, tokens, scores in zip(images, found.tokens.tolist(), found.scores, strict=True):
        best = sorted(every_text(model, image, 4, penalty).items(), key=lambda item: -item[1])[:4]
        assert [tuple(text) for text in tokens] == [text for text, _ in best]
        torch.testing.assert_close(scores, torch.tensor([score for _, score in best], dtype=torch.float64))


@torch.no_grad()
def beam_by_hand(model: CoCa, image: Tensor, length: int, beams: int, penalty: float) -> list[tuple[float, list[int]]]:
    """The search as its docstring says it, over lists."""
    live, finished = [(0.0, [START])], []
    for position in range(1, length):
        following = []
        for logp, text in live:
            each = log_probabilities(model, image, text)
            finished.append(((logp + float(each[END])) / position**penalty, [*text, END]))
            following += [(logp + float(each[t]), [*text, t]) for t in range(len(each)) if t not in (PAD, END)]
        live = sorted(following, reverse=True)[:beams]
    finished += [(logp / (length - 1) ** penalty, text) for logp, text in live]
    return sorted(finished, reverse=True)[:beams]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_pruned_beam_search_is_the_one_written_out_by_hand(make_coca, seed: int, penalty: float) -> None:
    model, images = sharp(make_coca(16, 1, vocab_size=7).double(), 4.0), random_images(3)
    config = GenerationConfig("beam", beams=4, length_penalty=penalty, check_every=2)
    found = beam_search(model, images, start_id=START, end_id=END, length=8, config=config)
    others = 0
    for image, tokens, scores in zip(images, found.tokens.tolist(), found.scores.tolist(), strict=True):
        expected = beam_by_hand(model, image, 8, 4, penalty)
        assert tokens == [text + [PAD] * (8 - len(text)) for _, text in expected]
        assert scores == pytest.approx([score for score, _ in expected])
        greedy = generate(model, image[None], start_id=START, end_id=END, length=8)
        others += tokens[0] != greedy[0].tolist()
    print(f"{others} of 3 best texts are not the greedy ones")


@torch.no_grad()
def test_one_beam_without_penalty_for_length_finds_the_greedy_text_or_a_better_one(make_coca, seed: int) -> None:
    model, images = sharp(make_coca(16, 2, vocab_size=9).double()), random_images(6)
    ids = {"start_id": START, "end_id": END, "length": 9}
    config = GenerationConfig("beam", beams=1, length_penalty=0.0)
    scores = beam_search(model, images, config=config, **ids).scores[:, 0]
    for image, caption, one in zip(images, generate(model, images, **ids).tolist(), scores, strict=True):
        text = caption[: caption.index(PAD)] if PAD in caption else caption
        greedy = sum(float(log_probabilities(model, image, text[:i])[text[i]]) for i in range(1, len(text)))
        assert float(one) >= greedy - 1e-9


def test_draws_follow_the_distribution_after_temperature_top_k_and_top_p(seed: int) -> None:
    logits = torch.randn(7) * 2
    config = GenerationConfig("sample", temperature=1.3, top_k=5, top_p=0.8)
    probability = (logits.double() / 1.3).softmax(dim=0)
    ranked = probability.argsort(descending=True)[:5].tolist()
    share = probability / probability[ranked].sum()
    kept, held = [], 0.0
    for token in ranked:
        if held < 0.8:
            kept.append(token)
            held += float(share[token])
    draws = 20000
    # Levels at the middles of equal steps invert the distribution function: counts are right to one draw.
    level = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    counts = draw(logits.expand(draws, -1), level, config).bincount(minlength=7)
    expected = torch.zeros(7, dtype=torch.float64)
    expected[kept] = draws * share[kept] / share[kept].sum()
    assert ((counts - expected).abs() <= 1).all()


def test_samples_repeat_with_their_seed_and_differ_without(make_coca, seed: int) -> None:
    model, image = make_coca(16, 1).double(), random_images(1)
    ids = {"start_id": START, "end_id": END, "length": LENGTH}
    images = image.expand(6, -1, -1, -1)
    first, again, other = (
        generate(model, images, config=GenerationConfig("sample", seed=number), **ids).tolist() for number in (3, 3, 4)
    )
    assert first == again != other
    assert len({tuple(row) for row in first}) == 6, "rows over the same image draw different numbers"
    fewer = generate(model, images[:2], config=GenerationConfig("sample", seed=3), **ids).tolist()
    assert fewer == first[:2]
    most_probable = GenerationConfig("sample", top_k=1, seed=8)
    assert generate(model, images, config=most_probable, **ids).tolist() == generate(model, images, **ids).tolist()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"beams": 0}, "beams must be at least 1"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"length_penalty": -0.5}, "length_penalty must be a finite number of at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        GenerationConfig(**options)


def test_texts_longer_than_the_model_reads_are_refused(make_coca) -> None:
    with pytest.raises(ValueError, match="length must be from 2 to the model's context_length 14, got 15"):
        generate(make_coca(), torch.rand(1, 3, 64, 64), start_id=START, end_id=END, length=15)
