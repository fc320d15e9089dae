"""Tiny models of transformers on disk, and rows for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as hf

_MARKS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "user:", "assistant:")
WORDS = (*_MARKS, "what", "is", "it", "a", "the", "dog", "cat", "pig", "red", "big", "one", "two")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def make_tokenizer(template: bool = False) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    marks |= {"extra_special_tokens": {"image_token": "<image>"}}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, **marks)
    tokenizer.chat_template = TEMPLATE if template else None
    return tokenizer


def make_listener() -> Any:
    """The processor of a Whisper that hears a second of sound and spells words letter by letter."""
    marks = ["endoftext", "startoftranscript", "en", "transcribe", "translate", "startoflm", "startofprev"]
    marks = [f"<|{mark}|>" for mark in [*marks, "nocaptions", "notimestamps"]]
    letters = {letter: i for i, letter in enumerate([*"abcdefghijklmnopqrstuvwxyz", "\u0120", *marks])}
    tokenizer = hf.WhisperTokenizer(vocab=letters, merges=[])
    return hf.WhisperProcessor(hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1), tokenizer)


def make_whisper(layers: int) -> Any:
    """Of that processor's sounds and letters."""
    tokenizer = make_listener().tokenizer
    sides = {f"{side}_{part}": size for side in ("encoder", "decoder") for part, size in
             (("layers", layers), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    ids = {"pad_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    ids |= {"eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": 28}
    sizes = {"d_model": 16, "vocab_size": len(tokenizer), "num_mel_bins": 8, "max_source_positions": 50}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sides, **sizes, **ids, max_target_positions=64))


def write_llama(folder: Path, layers: int, template: bool = False, weights: bool = True) -> str:
    config = hf.LlamaConfig(
        **SIZES, num_hidden_layers=layers, num_key_value_heads=1, vocab_size=len(WORDS), pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    (hf.LlamaForCausalLM(config) if weights else config).save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, row: Callable[[int], dict[str, Any]], count: int = 40) -> Path:
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(count)), encoding="utf-8")
    return path


def question(i: int) -> dict[str, Any]:
    return {"question": f"what is the {'big' if i % 2 else 'red'} one", "answer": ("a dog", "the cat")[i % 2]}


def labelled(batch: dict[str, Any], row: int, tokenizer: Any = None) -> list[str]:
    """The words of a row that have labels; of the tokenizer, or else of `WORDS`."""
    ids = [i for i in batch["labels"][row].tolist() if i != -100]
    return [WORDS[i] for i in ids] if tokenizer is None else list(tokenizer.convert_ids_to_tokens(ids))
