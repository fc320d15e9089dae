"""Taps of transformers' models: softmax of what is lent is eager attention's own map, whatever the architecture."""

import sys
from collections import defaultdict
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optima_core import (
    Adaptor,
    AttentionTap,
    Distiller,
    DistillerConfig,
    Forward,
    LayerPaths,
    LinearQK,
    LinearQKV,
    ObjectiveConfig,
    OptimaError,
    Taps,
)

hf = pytest.importorskip("transformers", reason="pip install 'optima-distill[hf]'")

import tiny_transformers  # noqa: E402
from tiny_transformers import CASES, LAYERS, WORDS, words  # noqa: E402

from optima_core.integrations.huggingface import (  # noqa: E402
    TransformersAdaptor,
    TransformersForward,
    find_modules,
    pair_modules,
)
from optima_kernels import reference  # noqa: E402

hf.logging.set_verbosity_error()
COMPARED = [name for name, case in CASES.items() if not case.refused]
REFUSED = [name for name, case in CASES.items() if case.refused]


def map_of(tap: AttentionTap) -> Tensor:
    """softmax(scale * q k^T + mask), as the tap's definition says: [B, H, N, M]; 0 in rows that are not compared."""
    k = tap.k.repeat_interleave(tap.q.shape[1] // tap.k.shape[1], dim=1)
    scores = tap.q @ k.transpose(2, 3) * (tap.q.shape[-1] ** -0.5 if tap.scale is None else tap.scale)
    allowed = torch.ones(scores.shape, dtype=torch.bool) if tap.mask is None else tap.mask.expand(scores.shape)
    if tap.causal:
        allowed = allowed.tril()
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)


def tap_all(model: nn.Module, batch: dict[str, Tensor], **named: Any) -> tuple[Any, Taps]:
    adaptor = TransformersAdaptor(model)
    return adaptor.run({name: tuple(range(adaptor.depth(name))) for name in adaptor.modules}, **batch, **named)


def eager_maps(
    model: nn.Module, batch: dict[str, Tensor], patch: pytest.MonkeyPatch
) -> tuple[Any, dict[nn.Module, list[Tensor]]]:
    """The output with all attentions, and what each attention's own eager function gave, in order."""
    maps: dict[nn.Module, list[Tensor]] = defaultdict(list)

    def keeping(own: Any) -> Any:
        def eager(module: nn.Module, *arguments: Any, **named: Any) -> Any:
            output, weights = own(module, *arguments, **named)
            maps[module].append(weights)
            return output, weights

        return eager

    for home in {type(part).__module__ for part in model.modules()}:
        if hasattr(sys.modules[home], "eager_attention_forward"):
            patch.setattr(
                sys.modules[home], "eager_attention_forward", keeping(sys.modules[home].eager_attention_forward)
            )
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        return model(**batch, output_attentions=True), maps


@pytest.mark.parametrize("name", COMPARED)
def test_the_map_of_what_is_lent_is_eager_attentions_own(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case, model, eager = CASES[name], tiny_transformers.make(name), tiny_transformers.make(name)
    eager.load_state_dict(model.state_dict())
    batch = case.batch()
    with torch.no_grad():
        plain = model(**batch)
        output, taps = tap_all(model, batch)
    shown = next(key for key, value in plain.items() if isinstance(value, Tensor))
    assert torch.equal(output[shown], plain[shown])
    own, maps = eager_maps(eager, batch, monkeypatch)
    assert set(taps) == set(case.modules)
    for module, paths in find_modules(eager).items():
        assert len(taps[module]) == len(paths.layers)
        for path, tap in zip(paths.layers, taps[module], strict=True):
            parts = set(eager.get_submodule(path).modules())
            expected = [found for part, found in maps.items() if part in parts]
            assert len(tap.attention) == len(expected)
            assert bool(expected) == (module != "projector")
            for one, theirs in zip(tap.attention, expected, strict=True):
                assert not one.unlike
                compare_maps(one, theirs)
    for module, field in case.maps.items():
        for tap, theirs in zip(taps[module], attrgetter(field)(own), strict=True):
            compare_maps(tap.attention[0], [theirs])


def compare_maps(tap: AttentionTap, expected: list[Tensor]) -> None:
    found = map_of(tap)
    assert sum(len(theirs) for theirs in expected) == len(found)
    samples = [sample for theirs in expected for sample in theirs]
    for ours, theirs in zip(found, samples, strict=True):
        queries, keys = theirs.shape[1:]
        rows = ours[:, :queries].sum(-1, keepdim=True) > 0
        assert rows.any()
        torch.testing.assert_close(ours[:, :queries, :keys], theirs * rows, rtol=0, atol=1e-5)
        assert not ours[:, queries:].any()


@pytest.mark.parametrize("name", REFUSED)
def test_maps_of_more_than_q_and_k_are_refused_and_hidden_states_distilled(name: str, seed: int) -> None:
    case = CASES[name]
    student, teacher = tiny_transformers.make(name), tiny_transformers.make(name, LAYERS + 1)
    batch = case.batch()
    with torch.no_grad():
        _, taps = tap_all(student, batch)
    assert all(case.refused in one.unlike for layers in taps.values() for tap in layers for one in tap.attention)
    with pytest.raises(OptimaError, match=f"is not softmax.*{case.refused}"):
        distiller(student, teacher, batch, DistillerConfig(rounds=1, steps_per_round=1))
    hidden = DistillerConfig(rounds=1, steps_per_round=1, objective=ObjectiveConfig(attention=0))
    assert distiller(student, teacher, batch, hidden).run_round().losses


def distiller(
    student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], config: DistillerConfig
) -> Distiller[dict[str, Tensor]]:
    ours, theirs = TransformersAdaptor(student), TransformersAdaptor(teacher)
    pairs = pair_modules(ours, theirs, batch)
    return Distiller(
        student, TransformersForward(ours), TransformersForward(theirs), pairs, lambda _: batch, batch, config
    )


@pytest.mark.parametrize("name", COMPARED)
def test_every_architecture_is_distilled_without_labels(name: str, seed: int) -> None:
    student, teacher = tiny_transformers.make(name), tiny_transformers.make(name, LAYERS + 1)
    batch = CASES[name].batch()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    config = DistillerConfig(rounds=2, steps_per_round=1)
    engine = distiller(student.train(), teacher, batch, config)
    records = [engine.run_round() for _ in range(2)]
    assert "task" not in records[0].losses
    layers = [name for name in records[0].losses if "/" in name]
    assert layers
    modules = set(CASES[name].modules)
    assert {loss.split("/")[1] for loss in engine.initial_probe.named() if "/" in loss} == modules
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_predictions_are_those_of_the_tokens_before_the_labels(seed: int) -> None:
    student, teacher = tiny_transformers.make("Llama"), tiny_transformers.make("Llama", 3)
    batch = words()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    config = DistillerConfig(objective=ObjectiveConfig(temperature=1.5))
    engine = distiller(student, teacher, batch, config)
    with torch.no_grad():
        ours, theirs = (model(**batch) for model in (student, teacher))
    counts = (batch["labels"][:, 1:] != -100).flatten()
    logits = [output.logits[:, :-1].flatten(0, 1)[counts] for output in (ours, theirs)]
    found = engine.initial_probe.named()
    assert found["logits"] == pytest.approx(float(reference.prediction_kl(*logits, temperature=1.5)), rel=1e-4)
    assert found["task"] == pytest.approx(float(ours.loss), rel=1e-5)


def test_soft_capped_logits_are_compared_as_they_are(seed: int) -> None:
    student, batch = tiny_transformers.make("Gemma 2"), words()
    shown: Forward = TransformersForward(TransformersAdaptor(student))(batch, {})
    with torch.no_grad():
        torch.testing.assert_close(shown.prediction.logits, student(**batch).logits.flatten(0, 1))  # type: ignore[union-attr]


def test_taps_of_checkpointed_layers_have_the_same_gradients(seed: int) -> None:
    model, batch = tiny_transformers.make("Qwen3").train(), words()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        _, taps = tap_all(model, batch, use_cache=False)
        tap = taps["language"][0]
        (tap.hidden.square().mean() + map_of(tap.attention[0]).square().sum()).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients()
    # Its name before transformers 5.21, which later ones deprecate.
    recompute = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    recompute({"use_reentrant": False})
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    recompute({"use_reentrant": True})
    with pytest.raises(OptimaError, match="use_reentrant"):
        tap_all(model, batch, use_cache=False)


def test_autocast_lends_what_autocast_compares(seed: int) -> None:
    student, teacher = tiny_transformers.make("Llama"), tiny_transformers.make("Llama", 3)
    engine = distiller(student, teacher, words(), DistillerConfig(rounds=1, steps_per_round=1, precision="bf16"))
    exact = distiller(student, teacher, words(), DistillerConfig(rounds=1, steps_per_round=1))
    assert engine.run_round().losses.keys() == exact.initial_probe.named().keys()


def test_compiling_is_refused_in_a_line(seed: int) -> None:
    student, teacher = tiny_transformers.make("Llama"), tiny_transformers.make("Llama", 3)
    # The first step looks at gradients, which no graph does.
    engine = distiller(student, teacher, words(), DistillerConfig(rounds=1, steps_per_round=2, compile=True))
    with pytest.raises(OptimaError, match="compile: false"):
        engine.run_round()


def test_models_that_are_compiled_already_are_refused_in_a_line(seed: int) -> None:
    whole, layer = tiny_transformers.make("Llama"), tiny_transformers.make("Llama")
    with pytest.raises(OptimaError, match=r"the model is compiled, .* give the model as it was"):
        TransformersAdaptor(torch.compile(whole))  # type: ignore[arg-type]
    adaptor = TransformersAdaptor(layer)
    layer.get_submodule("model.layers.1").compile()
    with pytest.raises(OptimaError, match=r"model\.layers\.1 is compiled"):
        adaptor.run({"language": (0,)}, **words())
    swapped = tiny_transformers.make("Llama")
    adaptor = TransformersAdaptor(swapped)
    layers = swapped.get_submodule("model.layers")
    layers[1] = torch.compile(layers[1])  # type: ignore[operator, index]
    with pytest.raises(OptimaError, match=r"model\.layers\.1 is compiled"):
        adaptor.run({"language": (0, 1)}, **words())


def test_a_model_is_walked_through_once_and_not_in_every_pass(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_transformers.make("SmolVLM").train(), CASES["SmolVLM"].batch()
    adaptor = TransformersAdaptor(model)
    wanted = {name: tuple(range(adaptor.depth(name))) for name in adaptor.modules}
    adaptor.run(wanted, **batch)
    walked = 0
    walk = nn.Module.named_modules

    def counting(self: nn.Module, *given: Any, **named: Any) -> Any:
        nonlocal walked
        walked += 1
        return walk(self, *given, **named)

    monkeypatch.setattr(nn.Module, "named_modules", counting)
    model(**batch)
    own = walked
    adaptor.run(wanted, **batch)
    assert walked == 2 * own


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_projections_that_a_model_rotates_are_refused(name: str, seed: int) -> None:
    paths = LayerPaths("model.layers.*", (LinearQK("self_attn.q_proj", "self_attn.k_proj", 4, 2),), causal=True)
    adaptor = Adaptor(tiny_transformers.make(name), {"language": paths})
    with pytest.raises(OptimaError, match=r"self_attn.q_proj.*off \(rotary positions.*TransformersAdaptor"):
        adaptor.run({"language": (0,)}, **words())


def test_projections_that_are_compared_as_they_are_are_not(seed: int) -> None:
    paths = LayerPaths("transformer.h.*", (LinearQKV("attn.c_attn", 4),), causal=True)
    Adaptor(tiny_transformers.make("GPT-2"), {"language": paths}).run({"language": (0, 1)}, **words())


def test_windows_that_differ_are_refused(seed: int) -> None:
    student, teacher = tiny_transformers.make("Mistral"), tiny_transformers.make("Mistral", 3)
    student.config.sliding_window = 3
    engine = distiller(student, teacher, words(), DistillerConfig(rounds=1, steps_per_round=1))
    with pytest.raises(OptimaError, match="module language, student layer 0: student and teacher attend to different"):
        engine.run_round()


def test_other_heads_widths_and_vocabularies_are_distilled_by_a_rule_or_refused(seed: int) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    teacher, batch = tiny_transformers.make("Llama", 3), words()

    def measure(vocabulary: int = WORDS, **objective: Any) -> set[str]:
        config = hf.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=vocabulary, pad_token_id=0)
        options = DistillerConfig(rounds=1, steps_per_round=1, objective=ObjectiveConfig(**objective))
        return set(distiller(hf.LlamaForCausalLM(config).eval(), teacher, batch, options).initial_probe.named())

    with pytest.raises(ValueError, match='heads="match" needs as many teacher heads as student heads, not 4 and 2'):
        measure()
    for how in ({"attention_heads": "mean"}, {"attention_heads": "relation", "relation_heads": 2}):
        assert {"logits", "hidden/language/1", "attention/language/1"} <= measure(**how)
    with pytest.raises(ValueError, match="distributions over the same vocabulary"):
        measure(WORDS + 1, attention_heads="mean")
    assert "logits" not in measure(WORDS + 1, attention_heads="mean", logits=0)


def test_modules_are_shown_and_may_be_named_by_hand(seed: int) -> None:
    model = tiny_transformers.make("LLaVA")
    inner = ".vision_model" if hasattr(model.get_submodule("model.vision_tower"), "vision_model") else ""
    assert str(TransformersAdaptor(model)).splitlines() == [
        f"vision: 2 x CLIPEncoderLayer, model.vision_tower{inner}.encoder.layers.0 to 1",
        "language: 2 x LlamaDecoderLayer, model.language_model.layers.0 to 1",
        "projector: 1 x LlavaMultiModalProjector, model.multi_modal_projector",
    ]
    adaptor = TransformersAdaptor(model, {"last": ["model.language_model.layers.1"]})
    assert adaptor.depth("last") == 1
    with torch.no_grad():
        _, taps = adaptor.run({"last": (0,)}, **CASES["LLaVA"].batch())
    assert taps["last"][0].hidden.shape == (2, 24, 32)
    with pytest.raises(OptimaError, match=r"did you mean 'model\.language_model\.layers'"):
        TransformersAdaptor(model, {"last": "model.language_model.layer.*"})
    with pytest.raises(OptimaError, match="no module 'audio'"):
        adaptor.run({"audio": (0,)})


def test_models_whose_attention_cannot_be_read_are_refused(seed: int) -> None:
    mpt = hf.MptForCausalLM(hf.MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=WORDS))
    with pytest.raises(OptimaError, match="attention interface; name its layers"):
        TransformersAdaptor(mpt)
    llama = tiny_transformers.make("Llama")
    llama.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(OptimaError, match="'flash_attention_2', whose masks cannot be read; load it with"):
        TransformersAdaptor(llama)
    with pytest.raises(OptimaError, match="holds no model of transformers"):
        TransformersAdaptor(nn.Linear(2, 2))


def test_a_distilled_student_is_written_and_read_as_ever(seed: int, tmp_path: Any) -> None:
    student, teacher = tiny_transformers.make("SmolVLM"), tiny_transformers.make("SmolVLM", 3)
    batch = CASES["SmolVLM"].batch()
    distiller(student, teacher, batch, DistillerConfig(rounds=1, steps_per_round=2)).run_round()
    student.eval().save_pretrained(tmp_path)  # type: ignore[operator]
    read = hf.SmolVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert read.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(read.eval()(**batch).logits, student(**batch).logits)


def test_adapters_of_peft_learn_alone(seed: int) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft")
    student, teacher = tiny_transformers.make("Llama"), tiny_transformers.make("Llama", 3)
    frozen = {name: value.clone() for name, value in student.state_dict().items()}
    adapted = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    engine = distiller(adapted, teacher, words(), DistillerConfig(rounds=2, steps_per_round=2))
    before = engine.initial_probe.named()["attention/language/0"]
    after = [engine.run_round() for _ in range(2)][-1].probe["attention/language/0"]
    assert after != before
    base = adapted.unload().state_dict()
    assert all(torch.equal(base[name], value) for name, value in frozen.items())


def test_nothing_of_transformers_is_imported_before_it_is_asked_for() -> None:
    import subprocess

    code = "import sys, optima_core.integrations.huggingface, optima_core.engine; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
