"""Models of transformers as they are shipped, small, from their configs; a batch for each; autograd one example at a time."""

import logging

import torch
import torch.nn.functional as F
import transformers as hf

logging.getLogger("transformers").setLevel(logging.ERROR)

VOCABULARY, EXAMPLES, LENGTH = 29, 4, 6
TASKS = torch.tensor([0, 1, 1, 0])

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 2}


def _gpt2(**options):
    return hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **options))


def _llama(**options):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER, **options))


def _qwen3(**options):
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER, head_dim=8, **options))


def _qwen3_moe(**options):
    config = hf.Qwen3MoeConfig(
        **_DECODER, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **options
    )
    return hf.Qwen3MoeForCausalLM(config)


def _mixtral(**options):
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2, **options))


def _gpt_oss(**options):
    config = hf.GptOssConfig(
        **_DECODER, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, **options
    )
    return hf.GptOssForCausalLM(config)


def _gemma(**options):
    return hf.GemmaForCausalLM(hf.GemmaConfig(**_DECODER, head_dim=8, **options))


def _gemma3(**options):
    config = hf.Gemma3TextConfig(**_DECODER, head_dim=8, query_pre_attn_scalar=8, sliding_window=4, **options)
    return hf.Gemma3ForCausalLM(config)


def _bert(**options):
    return hf.BertForSequenceClassification(hf.BertConfig(**_BERT, **options))


def _distilbert(**options):
    config = hf.DistilBertConfig(
        **{"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "num_labels": 3},
        **{"max_position_embeddings": 32, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
        **options,
    )
    return hf.DistilBertForSequenceClassification(config)


def _t5(**options):
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, **sizes, **options))


def _vit(**options):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = hf.ViTConfig(
        **{**sizes, "image_size": 8, "patch_size": 4, "num_labels": 3},
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        **options,
    )
    return hf.ViTForImageClassification(config)


def _whisper(**options):
    sides = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 24))
    }
    config = hf.WhisperConfig(
        **{"vocab_size": VOCABULARY, "num_mel_bins": 4, "d_model": 16, "max_source_positions": 5, **sides},
        **{"max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        **{"decoder_start_token_id": 1, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
        **options,
    )
    return hf.WhisperForConditionalGeneration(config)


def _mamba2(attn_implementation=None):
    config = hf.Mamba2Config(
        **{"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 8, "num_hidden_layers": 2, "head_dim": 8},
        **{"num_heads": 4, "expand": 2, "n_groups": 2, "chunk_size": 4, "conv_kernel": 3},
    )
    return hf.Mamba2ForCausalLM(config)


ARCHITECTURES = {
    "gpt2": _gpt2,
    "llama": _llama,
    "llama, tied": lambda **options: _llama(tie_word_embeddings=True, **options),
    "qwen3": _qwen3,
    "qwen3 moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gpt-oss": _gpt_oss,
    "gemma": _gemma,
    "gemma3": _gemma3,
    "bert": _bert,
    "distilbert": _distilbert,
    "t5": _t5,
    "vit": _vit,
    "whisper": _whisper,
    "mamba2": _mamba2,
}
MIXTURES = ("qwen3 moe", "mixtral", "gpt-oss")


def build(name, attention="sdpa", checkpointing=False, dtype=torch.float64, **options):
    """The model in training mode, with parameters that are all of some size."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name](attn_implementation=attention, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter.count_nonzero() == 0:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(dtype).train()


def batch(name, length=LENGTH, dtype=torch.float64):
    """The model's inputs and the labels; sequences of several lengths, padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (EXAMPLES, length), generator=generator)
    ids[:, 2] = ids[:, 0]
    mask = torch.arange(length) < torch.tensor([length, length - 2, length, length - 1])[:, None]
    classes = torch.randint(0, 3, (EXAMPLES,), generator=generator)
    if name == "vit":
        return {"pixel_values": torch.randn(EXAMPLES, 3, 8, 8, generator=generator, dtype=dtype)}, classes
    if name == "whisper":
        sound = torch.randn(EXAMPLES, 4, 10, generator=generator, dtype=dtype)
        return {"input_features": sound, "decoder_input_ids": ids}, ids.roll(1, 0)
    if name == "mamba2":
        return {"input_ids": ids}, ids.masked_fill(~mask, -100)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if name in ("bert", "distilbert"):
        return inputs, classes
    if name == "t5":
        return {**inputs, "decoder_input_ids": ids[:, : length - 1].flip(1)}, ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    return inputs, ids.masked_fill(~mask, -100)


def loss_of(model, inputs, labels):
    """Cross-entropy, summed over examples, of the tokens' means."""
    cached = () if "pixel_values" in inputs or labels.dim() == 1 else ("use_cache",)
    logits = model(**inputs, **dict.fromkeys(cached, False)).logits
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="sum")
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return (losses.sum(1) / (labels != -100).sum(1)).sum()


def gradients_of(model, inputs, labels):
    """Each example's gradients, from a forward and a backward of its own."""
    found = []
    for b in range(len(labels)):
        model.zero_grad()
        one = {name: value[b : b + 1] for name, value in inputs.items()}
        loss_of(model, one, labels[b : b + 1]).backward()
        found.append(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in model.named_parameters()
                if p.requires_grad
            }
        )
    model.zero_grad()
    return found
