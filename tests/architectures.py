"""Models of transformers as they are shipped, small, from their configs; a batch for each; autograd one example at a time."""

import functools
import logging

import oracle
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

_SHARES = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "experts_implementation": "eager"}
_SIDES = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 24))
}
_IMAGES = {"image_size": 16, "patch_size": 4, "num_labels": 3}
_VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, **_IMAGES}
_PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 4, "qk_nope_head_dim": 4}
_NEOX = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}

MORE = {  # in their default configuration
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_DECODER)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_DECODER)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_DECODER, pad_token_id=0)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_DECODER)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**_DECODER)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**_NEOX, vocab_size=VOCABULARY, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0)
    ),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**_NEOX, vocab_size=VOCABULARY, intermediate_size=24, max_position_embeddings=32)
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=4)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_NEOX, vocab_size=VOCABULARY)),
    "deepseek v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **{**_DECODER, **_LATENT, **_SHARES, "num_key_value_heads": 4, "n_routed_experts": 4},
            **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        )
    ),
    "qwen2 moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**_DECODER, **_SHARES, num_experts=4, shared_expert_intermediate_size=16)
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2)
    ),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_BERT)),
    "electra": lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**_BERT, embedding_size=8)),
    "albert": lambda: hf.AlbertForSequenceClassification(
        hf.AlbertConfig(**_BERT, embedding_size=8, classifier_dropout_prob=0.0)
    ),
    "mpnet": lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**_BERT)),
    "modernbert": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**_NEOX, vocab_size=VOCABULARY, intermediate_size=24, num_labels=3, pad_token_id=0)
    ),
    "convnext": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=3, patch_size=2)
    ),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**_VISION)),
    "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**_VISION, **_PLAIN, intermediate_size=24)),
}
REFUSED = {  # and by which words
    "deberta v2": (
        lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(**_BERT, relative_attention=True, pos_att_type=["p2c", "c2p"])
        ),
        r"no rule for repeat of .*rel_embeddings.weight .* in bmm",
    ),
    "xlnet": (
        lambda: hf.XLNetForSequenceClassification(
            hf.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=4, d_inner=24, dropout=0.0)
        ),
        r"no rule for einsum of .*word_embedding.weight",
    ),
    "swin": (
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
        ),
        r"no rule for scaled_dot_product_attention of .*relative_position_bias_table",
    ),
    "beit": (
        lambda: hf.BeitForImageClassification(
            hf.BeitConfig(**_VISION, **_PLAIN, intermediate_size=24, use_relative_position_bias=True)
        ),
        r"no rule for cat of .*relative_position_bias_table",
    ),
    "resnet": (
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
        ),
        r"examples must not influence each other, got .*normalization \(BatchNorm2d\) in training mode",
    ),
}


def build(name, attention="sdpa", checkpointing=False, dtype=torch.float64, **options):
    """The model in training mode, with parameters that are all of some size."""
    torch.manual_seed(0)
    model = sized(ARCHITECTURES[name](attn_implementation=attention, **options))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(dtype).train()


def sized(model):
    """With parameters that start at 0 or 1 moved away from there."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter.count_nonzero() == 0:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batch_of(model):
    """Of one of `MORE` or `REFUSED`."""
    if model.main_input_name == "pixel_values":
        inputs, classes = batch("vit")
        return {"pixel_values": inputs["pixel_values"].repeat(1, 1, 2, 2)}, classes
    if "Mamba" in type(model).__name__:
        return batch("mamba2")
    return batch("bert" if "Classification" in type(model).__name__ else "llama")


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

    def loss(b):
        return loss_of(model, {name: value[b : b + 1] for name, value in inputs.items()}, labels[b : b + 1])

    return oracle.gradients_of(model, [functools.partial(loss, b) for b in range(len(labels))])


def same_gradients(model, gradients, weights):
    """Whether ``.grad`` is the weighted sum of the examples' gradients, to the rounding of float64."""
    expected = oracle.weighted(gradients, weights)
    scale = max(float(one.abs().max()) for one in expected.values())
    found = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    off = [(expected[key] - (0 if one is None else one)).abs().max() for key, one in found.items()]
    assert found.keys() == expected.keys() and float(max(off)) <= 1e3 * torch.finfo(torch.float64).eps * scale
