"""A CoCa whose layers are graphs, as on several ranks: what it shows and how it learns stay the same."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from optima.coca import CoCa
from optima.tasks.forward import TaskForward
from optima.tasks.pictograms import PictogramTask
from optima_core.compilation import compile_layers, layers_as_graphs
from optima_core.recompute import recompute_activations

WANTED = {"image_encoder": (0, 1), "text_decoder": (1,), "multimodal_decoder": (0,)}


def shown(model: CoCa) -> list[Tensor]:
    """The task's loss, everything that is tapped, and the gradients of their squares' sum."""
    output = TaskForward(model, "vqa")(PictogramTask("vqa").training_batch(0, 3), WANTED)
    assert output.task_loss is not None
    found = [output.task_loss]
    for tap in (tap for taps in output.taps.values() for tap in taps):
        found += [tap.hidden, *(part for one in tap.attention for part in (one.q, one.k))]
    used = [parameter for name, parameter in model.named_parameters() if "scale" not in name]
    gradients = torch.autograd.grad(sum(x.square().sum() for x in found), used, allow_unused=True)
    return [*found, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_layers_show_the_same_taps_and_learn_the_same(
    make_coca, recomputed: bool, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    model = make_coca(16, 2).train()
    expected = shown(model)
    if recomputed:
        recompute_activations(model.transformer_layers())
    compile_layers(model)
    for _ in range(2):
        with layers_as_graphs():
            found = shown(model)
        for ours, theirs in zip(found, expected, strict=True):
            # Graphs add up in another order: what that changes is small beside the tensor, not beside each element.
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert 2 <= counter.frame_count <= 3, "layers of one kind share a graph"
