"""Where a model looks, against maps made of the inputs of its last cross attention; and whose word each map is."""

import pytest
import torch
from torch import nn

from optima.coca.layers import CrossAttention
from optima.data.config import TransformConfig
from optima.data.tokenizer import word_tokenizer
from optima.runs.looking import attention_over_image
from optima.runs.student import Student
from optima.runs.words import Words
from optima.task import Task
from optima.tasks.pictograms import TEXT_LENGTH


def last_cross_attention(model: nn.Module) -> CrossAttention:
    return [module for module in model.multimodal_decoder.modules() if isinstance(module, CrossAttention)][-1]


def test_maps_are_the_mean_over_heads_of_what_the_last_layer_attends_to(make_coca, seed: int) -> None:
    torch.manual_seed(seed)
    model = make_coca(16, 2)
    images, tokens = torch.randn(3, 3, 64, 64), torch.randint(4, 50, (3, 6))
    cross, given = last_cross_attention(model), []
    hooks = [
        part.register_forward_hook(lambda module, inputs, output: given.append(output)) for part in (cross.q, cross.kv)
    ]
    maps = attention_over_image(model, images, tokens)
    for hook in hooks:
        hook.remove()
    assert maps is not None
    queries, both = sorted(given, key=lambda x: x.shape[-1])
    q = queries.double().unflatten(-1, (cross.heads, -1)).transpose(1, 2)
    k = both[..., : queries.shape[-1]].double().unflatten(-1, (cross.heads, -1)).transpose(1, 2)
    expected = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)
    torch.testing.assert_close(maps.flatten(2).double(), expected, atol=1e-6, rtol=1e-5)


def test_a_pooler_hides_where_a_model_looks(make_coca) -> None:
    model = make_coca(pooler_queries=4)
    assert attention_over_image(model, torch.randn(1, 3, 64, 64), torch.tensor([[1, 5, 6]])) is None


@pytest.mark.parametrize(("task", "before"), [("captioning", 1), ("vqa", 0)])
def test_each_word_has_the_map_of_the_position_that_told_or_read_it(
    task: Task, before: int, make_coca, seed: int
) -> None:
    torch.manual_seed(seed)
    words = Words(task, word_tokenizer(), TEXT_LENGTH, (), TransformConfig(image_size=64))
    student = Student(make_coca(16, 2), words)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    seen, found = student.looks("two dogs", image)
    assert [word for word, _ in found] == ["two", "dogs"]
    assert seen.size == (64, 64)
    tokens = words.tokenizer.encode(["two dogs"], TEXT_LENGTH)
    maps = attention_over_image(student.model, (image[None] / 127.5) - 1, tokens)
    assert maps is not None
    for place, (_, weights) in enumerate(found, 1 - before):
        torch.testing.assert_close(torch.tensor(weights), maps[0, place], atol=1e-5, rtol=1e-4)
