"""A tiny model, its tokenizer and the arguments that tests of trainers share. Nothing is downloaded."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no look-ups and no telemetry

import torch
import transformers
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

CHARACTERS = "abcdefgh=+ "
VOCABULARY = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}


def tokenizer():
    """One character a token."""
    plain = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


def llama(tied=False, dtype=torch.float64, layers=2, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        attention_dropout=0.0,
    )
    return LlamaForCausalLM(config).to(dtype)


def arguments(kind=transformers.TrainingArguments, folder=None, **options):
    """Arguments of a short run on the CPU; SGD, whose steps show the gradient as it is."""
    common = dict(
        output_dir=folder or tempfile.mkdtemp(),
        max_steps=3,
        per_device_train_batch_size=4,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        log_level="error",
        seed=1,
    )
    return kind(**{**common, **options})


def texts(count=16):
    """Words of two tasks, of different lengths."""
    rows = [{"text": "abcdefgh"[i % 7 :] + "=+", "source": "math" if i % 3 else "code"} for i in range(count)]
    return Dataset.from_list(rows)


def pairs(count=12):
    words = [("abc="[i % 3 :], "cbaed"[i % 2 : 2 + i % 4], "hgfeb"[i % 5 :]) for i in range(count)]
    names = ("prompt", "chosen", "rejected")
    return Dataset.from_list(
        [dict(zip(names, row, strict=True)) | {"source": "math" if i % 3 else "code"} for i, row in enumerate(words)]
    )


def prompts(count=12):
    rows = [
        {"prompt": f"{'abcdefgh'[i % 8]}{'hgf'[i % 3]}=", "source": "math" if i % 2 else "code"} for i in range(count)
    ]
    return Dataset.from_list(rows)
