"""`distill_hf`: models and rows on disk become a student on disk; a resumed run is an uninterrupted one."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

hf = pytest.importorskip("transformers", reason="pip install 'optima-distill[hf]'")
pytest.importorskip("datasets", reason="pip install 'optima-distill[hf]'")

from tiny_hf import (  # noqa: E402
    SIZES,
    WORDS,
    labelled,
    make_listener,
    make_tokenizer,
    make_whisper,
    question,
    write_llama,
    write_rows,
)

from optima.commands.distill_hf.batches import Batches  # noqa: E402
from optima.commands.distill_hf.config import DistillHfConfig  # noqa: E402
from optima.commands.distill_hf.models import load_model, load_processor, write_student  # noqa: E402
from optima.commands.distill_hf.source import Rows, Stream  # noqa: E402
from optima.commands.distill_hf.work import distill_hf  # noqa: E402
from optima.report import write_side_by_side  # noqa: E402
from optima.runs.reading import read_run  # noqa: E402
from optima.runs.rows import Summary  # noqa: E402
from optima_core import CheckpointStore, DistillerConfig, OptimaError, OptimiserConfig  # noqa: E402
from optima_core.parallel import Ranks  # noqa: E402


def config(tmp_path: Path, **given: Any) -> DistillHfConfig:
    engine = DistillerConfig(rounds=3, steps_per_round=2, optimiser=OptimiserConfig(learning_rate=1e-2))
    defaults = {"run": tmp_path / "run", "batch_size": 4, "probe_size": 3, "engine": engine, "quiet": True}
    return DistillHfConfig(**{**defaults, **given})


def run(given: DistillHfConfig) -> Summary:
    summary = distill_hf(given)
    assert summary is not None
    return summary


@pytest.fixture
def llamas(tmp_path: Path) -> dict[str, str]:
    torch.manual_seed(0)
    return {
        "teacher": write_llama(tmp_path / "teacher", 3),
        "student": write_llama(tmp_path / "student", 2, weights=False),
    }


def test_a_student_is_written_that_transformers_loads(tmp_path: Path, llamas: dict[str, str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", question)
    summary = run(config(tmp_path, data=data, **llamas))
    scores = summary.scores
    assert scores["after"]["task"] < scores["before"]["task"]
    assert {"logits", "hidden/language", "attention/language"} <= set(scores["after"])
    read = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").eval()
    assert len(read.model.layers) == 2
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "run" / "student").vocab_size == len(WORDS)
    saved = CheckpointStore(tmp_path / "run" / "checkpoints").load()
    assert saved is not None
    trained = hf.LlamaForCausalLM(read.config).eval()
    trained.load_state_dict(saved["distiller"]["student"])
    ids = torch.randint(len(WORDS), (2, 7))
    with torch.no_grad():
        assert torch.equal(read(ids).logits, trained(ids).logits)
    card = (tmp_path / "run" / "student" / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card
    shown = " | ".join(f"{scores[model]['task']:.4f}" for model in ("teacher", "before", "after"))
    assert f"| task | {shown} |" in card
    rows = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["round"] for row in rows] == [1, 2, 3]


def test_a_student_is_written_whole_or_not_at_all(tmp_path: Path, llamas: dict[str, str]) -> None:
    student, processor = load_model(llamas["teacher"], "student"), load_processor(llamas["teacher"])
    folder = tmp_path / "written"

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    write_student(student, processor, folder, "first", None)
    first, places = content(), set(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(first["model.safetensors"]) - 1, limits[1]))
    try:
        with pytest.raises(OptimaError, match=r"cannot write .*written: .*; what was saved before is intact"):
            write_student(student, processor, folder, "second", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content() == first
    assert set(tmp_path.iterdir()) == places
    (folder / "of another model.bin").touch()
    write_student(student, processor, folder, "third", None)
    assert content() == first | {"README.md": b"third"}


def test_the_teachers_own_loss_is_what_transformers_says(tmp_path: Path, llamas: dict[str, str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", question)
    given = config(tmp_path, data=data, **llamas)
    scores = run(given).scores
    teacher = load_model(llamas["teacher"], "teacher").eval()
    rows = Rows(data, held_every=given.held_every, seed=0)
    batches = Batches(rows, load_processor(llamas["teacher"]), teacher, size=4, max_length=512)
    (batch, size), *more = batches.held_batches(0)
    assert size == 4
    assert not more
    with torch.no_grad():
        assert scores["teacher"]["task"] == pytest.approx(float(teacher(**batch).loss), rel=1e-5)
    assert scores["teacher"]["logits"] == scores["teacher"]["hidden/language"] == 0


def test_scoring_runs_each_model_once_a_batch(
    tmp_path: Path, llamas: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", question)
    passes = dict.fromkeys((2, 3), 0)
    forward = hf.LlamaForCausalLM.forward

    def counting(self: Any, *given: Any, **named: Any) -> Any:
        passes[len(self.model.layers)] += 1
        return forward(self, *given, **named)

    monkeypatch.setattr(hf.LlamaForCausalLM, "forward", counting)
    run(config(tmp_path, data=data, batch_size=2, **llamas))
    steps, rounds, held = 6, 3, 2
    assert passes == {
        2: 1 + 1 + steps + rounds + 2 * held,  # paired, probed at first, in each step, after each round, scored twice
        3: 1 + 1 + steps + 2 * held,
    }


def test_recomputed_layers_run_again_and_learn_the_same(
    tmp_path: Path, llamas: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    data = write_rows(tmp_path / "rows.jsonl", question)
    ran = 0
    forward = LlamaMLP.forward

    def counting(self: Any, *given: Any, **named: Any) -> Any:
        nonlocal ran
        ran += 1
        return forward(self, *given, **named)

    monkeypatch.setattr(LlamaMLP, "forward", counting)
    kept = run(config(tmp_path, data=data, run=tmp_path / "kept", **llamas)).scores
    once, ran = ran, 0
    again = run(config(tmp_path, data=data, recompute=True, **llamas)).scores
    # Of 2 layers, in each of 6 steps, at least once more.
    assert ran >= once + 2 * 6
    for model, losses in again.items():
        assert losses == pytest.approx(kept[model], rel=1e-5, abs=1e-7)


def test_a_report_is_drawn_and_runs_are_set_side_by_side(tmp_path: Path, llamas: dict[str, str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", question)
    runs = [tmp_path / name for name in ("one", "two")]
    for place in runs:
        summary = run(config(tmp_path, data=data, run=place, **llamas))
        assert read_run(place).summary == summary
    page = (runs[0] / "report.html").read_text(encoding="utf-8")
    before, after = (read_run(runs[0]).summary.scores[model]["task"] for model in ("before", "after"))
    assert after < before
    assert "Distillation closed" in page or "has caught up with its teacher" in page
    assert "Task loss on the held-out rows" in page
    assert "test split" not in page.lower()
    assert write_side_by_side(runs, tmp_path / "both.html").exists()
    quiet = run(config(tmp_path, data=data, run=tmp_path / "none", report=False, **llamas))
    assert quiet.losses
    assert not (tmp_path / "none" / "report.html").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(
    streaming: bool, tmp_path: Path, llamas: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", question)
    whole = config(tmp_path, data=data, streaming=streaming, checkpoint_every=1, **llamas)
    scores = run(whole).scores
    parts = replace(whole, run=tmp_path / "parts")
    import optima.commands.distill_hf.work as command

    class Stop(command.StopRequest):
        @property
        def made(self) -> bool:
            return True

        @made.setter
        def made(self, value: bool) -> None:
            pass

    with monkeypatch.context() as patch:
        patch.setattr(command, "StopRequest", Stop)
        with pytest.raises(KeyboardInterrupt):
            distill_hf(parts)
    assert not (tmp_path / "parts" / "student").exists()
    assert run(replace(parts, resume=True, track=["tensorboard"])).scores == scores
    ours, theirs = (
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / run / "student").state_dict() for run in ("run", "parts")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(OptimaError, match=r"cannot resume .*batch_size was 4 there and is 2 now"):
        distill_hf(replace(parts, resume=True, batch_size=2))


def test_adapters_are_merged_into_what_is_written(tmp_path: Path, llamas: dict[str, str]) -> None:
    pytest.importorskip("peft", reason="pip install peft")
    llamas["student"] = write_llama(tmp_path / "trained", 2)
    data = write_rows(tmp_path / "rows.jsonl", question)
    distill_hf(config(tmp_path, data=data, lora=2, **llamas))
    before, after = (
        hf.AutoModelForCausalLM.from_pretrained(place).state_dict()
        for place in (llamas["student"], tmp_path / "run" / "student")
    )
    assert before.keys() == after.keys()
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])


def test_images_and_captions_of_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(20):
        Image.new("RGB", (20, 24), (12 * i, 0, 99)).save(folder / f"{i}.png")
    write_rows(folder / "metadata.jsonl", lambda i: {"file_name": f"{i}.png", "caption": f"a {WORDS[12 + i % 3]}"}, 20)
    for name, layers in (("teacher", 2), ("student", 1)):
        sizes = SIZES | {"num_hidden_layers": layers}
        text = sizes | {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        vision = sizes | {"image_size": 16, "patch_size": 8}
        options = {"text_config": text, "vision_config": vision, "projection_dim": 8}
        hf.CLIPModel(hf.CLIPConfig(**options)).save_pretrained(tmp_path / name)
    pil = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    hf.CLIPProcessor(pil, make_tokenizer()).save_pretrained(tmp_path / "teacher")
    models = {name: str(tmp_path / name) for name in ("teacher", "student")}
    scores = run(config(tmp_path, data=folder, **models)).scores
    assert {"task", "logits", "hidden/text", "attention/vision"} <= set(scores["after"])
    assert hf.AutoProcessor.from_pretrained(tmp_path / "run" / "student").tokenizer.vocab_size == len(WORDS)
    rows, processor = Stream(folder, held_every=10, held=2, seed=0), load_processor(models["teacher"])
    model = load_model(models["student"], "student")
    streamed = Batches(rows, processor, model, size=4, max_length=64)
    numbered = Batches(Rows(folder, held_every=10, seed=0), processor, model, size=4, max_length=64)
    assert streamed.load(1)["pixel_values"].shape == (4, 3, 16, 16)
    assert torch.equal(streamed.probe(2)["pixel_values"], numbered.probe(2)["pixel_values"])
    with pytest.raises(OptimaError, match="CLIPModel compares the rows of a batch with each other, which 2 ranks"):
        Batches(rows, processor, model, size=4, max_length=64, ranks=Ranks(0, 2))


def test_questions_about_images_go_through_a_vision_language_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for i in range(20):
        Image.new("RGB", (16, 16), (12 * i, 0, 99)).save(tmp_path / f"{i}.png")
    for name, layers in (("teacher", 2), ("student", 1)):
        sizes = SIZES | {"num_hidden_layers": layers}
        vision = sizes | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
        text = sizes | {"model_type": "llama", "vocab_size": len(WORDS), "pad_token_id": 0}
        hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=WORDS.index("<image>"))
        ).save_pretrained(tmp_path / name)
    pil = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    hf.LlavaProcessor(pil, make_tokenizer(), **options).save_pretrained(tmp_path / "teacher")
    data = write_rows(tmp_path / "rows.jsonl", lambda i: question(i) | {"image": f"{i}.png"}, 20)
    models = {name: str(tmp_path / name) for name in ("teacher", "student")}
    scores = run(config(tmp_path, data=data, modules=["vision", "language"], **models)).scores
    assert scores["after"]["task"] < scores["before"]["task"]
    assert {"hidden/vision", "attention/vision", "hidden/language"} <= set(scores["after"])
    rows, processor = Rows(data, held_every=10, seed=0), load_processor(models["teacher"])
    model = load_model(models["student"], "student")
    batch = Batches(rows, processor, model, size=4, max_length=64).probe(1)
    assert labelled(batch, 0) == ["a", "dog", "</s>"]
    assert int((batch["input_ids"] == WORDS.index("<image>")).sum()) == 4


def test_an_encoder_with_a_decoder_learns_answers_to_questions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name, layers in (("teacher", 2), ("student", 1)):
        sides = {f"{side}_{part}": size for side in ("encoder", "decoder") for part, size in
                 (("layers", layers), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
        sizes = {"d_model": 16, "vocab_size": len(WORDS), "decoder_start_token_id": 2, "forced_eos_token_id": None}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        hf.BartForConditionalGeneration(hf.BartConfig(**sides, **sizes, **special)).save_pretrained(tmp_path / name)
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    data = write_rows(tmp_path / "rows.jsonl", question)
    models = {name: str(tmp_path / name) for name in ("teacher", "student")}
    scores = run(config(tmp_path, data=data, **models)).scores
    assert scores["after"]["task"] < scores["before"]["task"]
    assert {"logits", "hidden/encoder", "attention/encoder", "hidden/decoder", "attention/decoder"} <= set(
        scores["after"]
    )


def test_a_model_that_hears_learns_what_was_said(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="pip install soundfile")
    torch.manual_seed(0)
    for i in range(20):
        tone = torch.sin(torch.arange(4000 + 500 * i) * (0.1 + 0.3 * (i % 2)))
        soundfile.write(tmp_path / f"{i}.wav", tone.numpy(), 16000)
    data = write_rows(
        tmp_path / "rows.jsonl", lambda i: {"audio": f"{i}.wav", "text": ("a low tone", "high")[i % 2]}, 20
    )
    for name, layers in (("teacher", 2), ("student", 1)):
        make_whisper(layers).save_pretrained(tmp_path / name)
    make_listener().save_pretrained(tmp_path / "teacher")
    models = {name: str(tmp_path / name) for name in ("teacher", "student")}
    scores = run(config(tmp_path, data=data, **models)).scores
    assert scores["after"]["task"] < scores["before"]["task"]
    assert {"logits", "hidden/encoder", "attention/encoder", "hidden/decoder", "attention/decoder"} <= set(
        scores["after"]
    )
    read = hf.WhisperForConditionalGeneration.from_pretrained(tmp_path / "run" / "student")
    assert len(read.model.encoder.layers) == 1
    assert hf.AutoProcessor.from_pretrained(tmp_path / "run" / "student").feature_extractor.chunk_length == 1


def test_mistakes_are_told_in_a_line(tmp_path: Path, llamas: dict[str, str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", question)
    for given, message in (
        ({"data": tmp_path / "none.jsonl"}, "none.jsonl does not exist"),
        ({"data": write_rows(tmp_path / "odd.jsonl", lambda i: {"odd": 1})}, "has the columns odd; one of these"),
        ({"data": write_rows(tmp_path / "few.jsonl", question, 3)}, "has 3 rows; 4 are needed"),
        ({"teacher": str(tmp_path / "nothing")}, "teacher .*nothing"),
        ({"data": write_rows(tmp_path / "odd.jsonl", lambda i: {"odd": 1}), "streaming": True}, "has the columns odd"),
        ({"modules": ["vision"]}, "no module 'vision' in both models: the student has language"),
    ):
        with pytest.raises(OptimaError, match=message):
            distill_hf(config(tmp_path, **{"data": data, **llamas, **given}))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_trackers_are_told_and_missing_ones_said(
    name: str, tmp_path: Path, llamas: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    data = write_rows(tmp_path / "rows.jsonl", question)
    tracked = config(tmp_path, data=data, track=[name], **llamas)
    if find_spec(name) is None:
        with pytest.raises(OptimaError, match=f"{name} is on and the package {name} is not installed"):
            distill_hf(tracked)
        return
    rewards = [record.reward for record in read_run(_ran(tracked)).rounds]
    if name == "tensorboard":
        assert list((tmp_path / "run" / "tensorboard").iterdir())
    elif name == "wandb":
        assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    else:
        import mlflow

        told = mlflow.MlflowClient().get_metric_history((tmp_path / "run" / "mlflow_run").read_text(), "reward")
        assert [metric.value for metric in sorted(told, key=lambda metric: metric.step)] == rewards


def _ran(given: DistillHfConfig) -> Path:
    run(given)
    return given.run


def test_a_student_is_pushed_to_the_hub_if_asked(
    tmp_path: Path, llamas: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[str, bool]] = []

    class Hub:
        def create_repo(self, name: str, exist_ok: bool) -> None:
            assert exist_ok

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            pushed.append((repo_id, (folder_path / "model.safetensors").exists()))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    data = write_rows(tmp_path / "rows.jsonl", question)
    distill_hf(config(tmp_path, data=data, run=tmp_path / "kept", **llamas))
    assert not pushed
    distill_hf(config(tmp_path, data=data, push_to_hub="someone/student", **llamas))
    assert pushed == [("someone/student", True)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_do_what_one_process_does(strategy: str, tmp_path: Path, llamas: dict[str, str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", question)
    alone = run(config(tmp_path, data=data, run=tmp_path / "alone", **llamas))
    words = [f"--{name}={value}" for name, value in {**llamas, "data": data, "run": tmp_path / "run"}.items()]
    words += ["--batch_size=4", "--probe_size=3", "--engine.rounds=3", "--engine.steps_per_round=2", "--quiet=true"]
    words += ["--engine.optimiser.learning_rate=1e-2", f"--parallel={strategy}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "--", "optima.run", "distill_hf", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss on held-out rows") == 1
    together = read_run(tmp_path / "run")
    for model, losses in alone.scores.items():
        # The order of sums differs, by some 1e-7, which six steps multiply.
        assert together.summary.scores[model] == pytest.approx(losses, rel=1e-4, abs=1e-7)
    theirs = read_run(tmp_path / "alone").rounds
    assert [record.arm for record in together.rounds] == [record.arm for record in theirs]
    assert len(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").model.layers) == 2


def test_the_command_line(tmp_path: Path, llamas: dict[str, str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", question)
    words = [f"--{name}={value}" for name, value in {**llamas, "data": data, "run": tmp_path / "run"}.items()]
    engine = ["--engine.rounds=2", "--engine.steps_per_round=1", "--batch_size=2", "--threads=1"]
    done = subprocess.run(
        [sys.executable, "-m", "optima.run", "distill_hf", *words, *engine], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "language: 2 x LlamaDecoderLayer, model.layers.0 to 1" in done.stdout
    assert "loss on held-out rows" in done.stdout
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
