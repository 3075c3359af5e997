"""Hugging Face text models: decoders, encoders, both; mixtures of experts; state-space models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.zoo.families import HEADS, LAYERS, LENGTH, VOCAB, WIDTH, Batch, Family, Step, tokens

USUAL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**USUAL, "num_key_value_heads": 2}
BOTH: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": WIDTH, "encoder_layers": 3, "decoder_layers": 3,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 2 * WIDTH, "decoder_ffn_dim": 2 * WIDTH, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1,
}  # fmt: skip


def of_transformers(
    model: str, config: str, batch: Callable[[], Batch], options: dict[str, Any]
) -> tuple[nn.Module, Batch]:
    """A model of transformers by the names of its classes, and a batch."""
    library = importlib.import_module("transformers")
    made = getattr(library, config)(**options)
    return Step(getattr(library, model)(made)), batch()


def next_tokens() -> Batch:
    """What a decoder is trained on."""
    ids = tokens()
    return {"input_ids": ids, "labels": ids}


def masked_tokens() -> Batch:
    """What an encoder is trained on, padded at the end."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, -LENGTH // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def whole_text() -> Batch:
    """Tokens and labels, without a mask."""
    ids = tokens()
    return {"input_ids": ids, "labels": ids.flip(0)}


def translated() -> Batch:
    """What an encoder with a decoder is trained on."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, -LENGTH // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": tokens(LENGTH // 2)}


def _hf(
    name: str,
    model: str,
    config: str,
    options: dict[str, Any],
    batch: Callable[[], Batch] = next_tokens,
    kind: str = "text",
    odd: str = "",
) -> Family:
    build = partial(of_transformers, model, config, batch, options)
    return Family(name, kind, "transformers", build, odd)


_GPT2 = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS,
         "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_T5 = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": 2 * WIDTH, "num_layers": 3,
       "num_heads": HEADS, "pad_token_id": 0, "eos_token_id": 1,
       "decoder_start_token_id": 0}  # fmt: skip

FAMILIES = (
    _hf("gpt2", "GPT2LMHeadModel", "GPT2Config", _GPT2),
    _hf(
        "gpt-neo",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": HEADS,
         "max_position_embeddings": 64, "attention_types": [[["global", "local"], 2]],
         "window_size": 8, "bos_token_id": 1, "eos_token_id": 2},
    ),
    _hf("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", USUAL),
    _hf("gptj", "GPTJForCausalLM", "GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    _hf(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        {**USUAL, "ffn_dim": 2 * WIDTH, "word_embed_proj_dim": WIDTH, "layerdrop": 0.2},
        odd="layers are dropped by chance",
    ),
    _hf(
        "bloom",
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS,
         "hidden_dropout": 0.1, "attention_dropout": 0.1},
    ),
    _hf("llama", "LlamaForCausalLM", "LlamaConfig", GROUPED),
    _hf("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    _hf("gemma2", "Gemma2ForCausalLM", "Gemma2Config",
        {**GROUPED, "head_dim": 8, "sliding_window": 8}),
    _hf("phi", "PhiForCausalLM", "PhiConfig", USUAL),
    _hf("falcon", "FalconForCausalLM", "FalconConfig", {**USUAL, "alibi": True}),
    _hf("bert", "BertForMaskedLM", "BertConfig", USUAL, masked_tokens),
    _hf("albert", "AlbertForMaskedLM", "AlbertConfig", {**USUAL, "embedding_size": 16},
        masked_tokens, odd="one layer runs four times"),
    _hf("electra", "ElectraForMaskedLM", "ElectraConfig", {**USUAL, "embedding_size": 16},
        masked_tokens),
    _hf(
        "distilbert",
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": VOCAB, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS,
         "hidden_dim": 2 * WIDTH, "max_position_embeddings": 64},
        masked_tokens,
    ),
    _hf("deberta-v2", "DebertaV2ForMaskedLM", "DebertaV2Config",
        {**USUAL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
         "position_buckets": 8}, masked_tokens),
    _hf("xlnet", "XLNetLMHeadModel", "XLNetConfig",
        {"vocab_size": VOCAB, "d_model": WIDTH, "n_layer": LAYERS, "n_head": HEADS,
         "d_inner": 2 * WIDTH}, whole_text),
    _hf("fnet", "FNetForMaskedLM", "FNetConfig", {**USUAL, "type_vocab_size": 2}, whole_text,
        odd="Fourier transforms, complex values"),
    _hf("longformer", "LongformerForMaskedLM", "LongformerConfig",
        {**USUAL, "attention_window": 8}, masked_tokens),
    _hf("big-bird", "BigBirdForMaskedLM", "BigBirdConfig",
        {**USUAL, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1},
        whole_text),
    _hf("funnel", "FunnelForMaskedLM", "FunnelConfig",
        {"vocab_size": VOCAB, "block_sizes": [2, 2], "num_decoder_layers": 1, "d_model": WIDTH,
         "n_head": HEADS, "d_head": 8, "d_inner": 2 * WIDTH}, masked_tokens),
    _hf("convbert", "ConvBertForMaskedLM", "ConvBertConfig", {**USUAL, "embedding_size": WIDTH},
        masked_tokens),
    _hf("mobilebert", "MobileBertForMaskedLM", "MobileBertConfig",
        {**USUAL, "embedding_size": 16, "intra_bottleneck_size": WIDTH,
         "num_feedforward_networks": 2}, masked_tokens),
    _hf("modernbert", "ModernBertForMaskedLM", "ModernBertConfig",
        {**USUAL, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}, masked_tokens),
    _hf("reformer", "ReformerModelWithLMHead", "ReformerConfig",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_attention_heads": 2,
         "attention_head_size": 16, "feed_forward_size": 2 * WIDTH, "is_decoder": True,
         "attn_layers": ["local", "lsh", "local", "lsh"], "axial_pos_shape": [4, 8],
         "axial_pos_embds_dim": [16, 16], "local_attn_chunk_length": 8,
         "lsh_attn_chunk_length": 8, "num_buckets": 4, "max_position_embeddings": 32,
         "eos_token_id": 2, "pad_token_id": 0, "hash_seed": 1, "hidden_dropout_prob": 0.0,
         "local_attention_probs_dropout_prob": 0.0}, next_tokens),
    _hf("perceiver", "PerceiverForMaskedLM", "PerceiverConfig",
        {"vocab_size": VOCAB, "d_model": WIDTH, "d_latents": WIDTH, "num_latents": 16,
         "num_self_attends_per_block": 4, "num_self_attention_heads": HEADS,
         "num_cross_attention_heads": HEADS, "qk_channels": 16, "v_channels": WIDTH,
         "max_position_embeddings": LENGTH}, whole_text),
    _hf("t5", "T5ForConditionalGeneration", "T5Config", _T5, translated),
    _hf("bart", "BartForConditionalGeneration", "BartConfig",
        {**BOTH, "encoder_layerdrop": 0.2, "decoder_layerdrop": 0.2}, translated),
    _hf("pegasus", "PegasusForConditionalGeneration", "PegasusConfig", BOTH, translated),
    _hf("led", "LEDForConditionalGeneration", "LEDConfig",
        {**BOTH, "attention_window": 8, "max_encoder_position_embeddings": 64,
         "max_decoder_position_embeddings": 64}, translated),
    _hf("mixtral", "MixtralForCausalLM", "MixtralConfig",
        {**GROUPED, "num_local_experts": 4}, kind="mixture"),
    _hf("qwen2-moe", "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH,
         "shared_expert_intermediate_size": WIDTH, "output_router_logits": True}, kind="mixture"),
    _hf("switch", "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig",
        {**_T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        translated, kind="mixture"),
    _hf("deepseek-v3", "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {**USUAL, "num_key_value_heads": HEADS, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "n_group": 2, "topk_group": 1, "moe_intermediate_size": WIDTH, "q_lora_rank": 16,
         "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
         "first_k_dense_replace": 1}, kind="mixture"),
    _hf("mamba", "MambaForCausalLM", "MambaConfig",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 8,
         "pad_token_id": 0}, kind="state-space"),
    _hf("mamba2", "Mamba2ForCausalLM", "Mamba2Config",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 8,
         "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}, kind="state-space"),
    _hf("rwkv", "RwkvForCausalLM", "RwkvConfig",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "attention_hidden_size": WIDTH,
         "num_hidden_layers": LAYERS, "context_length": 64}, kind="state-space"),
    _hf("recurrent-gemma", "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig",
        {**GROUPED, "lru_width": WIDTH, "attention_window_size": 8}, kind="state-space"),
    _hf("jamba", "JambaForCausalLM", "JambaConfig",
        {**GROUPED, "num_experts": 2, "use_mamba_kernels": False, "attn_layer_period": 2,
         "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}, kind="state-space"),
)  # fmt: skip
