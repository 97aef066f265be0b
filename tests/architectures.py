"""Small configurations of many architectures, and the names of their linear layers.

32 wide, 2 blocks, 64 tokens; dropout is on wherever an architecture has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers as hf
from transformers import PretrainedConfig

VOCABULARY = 64

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GQA = {**SIZES, "num_key_value_heads": 2, "attention_dropout": 0.1}
GPT = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40,
    "bos_token_id": 1, "eos_token_id": 2, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1,
}  # fmt: skip
BERT = {**SIZES, "pad_token_id": 0, "initializer_range": 0.1}
FALCON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "hidden_dropout": 0.1, "attention_dropout": 0.1,
}  # fmt: skip
OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "ffn_dim": 48, "max_position_embeddings": 40, "word_embed_proj_dim": 16, "pad_token_id": 1,
    "attention_dropout": 0.1, "layerdrop": 0.5,
}  # fmt: skip
DISTILBERT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
    "max_position_embeddings": 40,
}  # fmt: skip
MODERNBERT: dict[str, Any] = {
    **BERT, "global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1,
    "sep_token_id": 2, "attention_dropout": 0.1, "mlp_dropout": 0.1, "embedding_dropout": 0.1,
    "classifier_dropout": 0.1,
}  # fmt: skip
DEBERTA: dict[str, Any] = {
    **BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16,
    "norm_rel_ebd": "layer_norm", "share_att_key": True,
}  # fmt: skip

QKVO = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
GATED = "mlp.gate_proj mlp.up_proj mlp.down_proj"
FUSED = "query_key_value dense"
WIDENING = "mlp.dense_h_to_4h mlp.dense_4h_to_h"
BERT_SELF = (
    "attention.self.query attention.self.key attention.self.value attention.output.dense",
    "intermediate.dense output.dense",
)


@dataclass(frozen=True)
class Architecture:
    """A configuration, and its linear layers as they are read off transformers' source."""

    config: Callable[[], PretrainedConfig]
    block: str
    """Name of block {}."""
    attention: str
    """Linear layers of a block that lie inside attention."""
    others: str
    outside: str = ""
    """Linear layers outside of blocks, which are not the head."""


def prefixed(prefix: str, names: str) -> str:
    return " ".join(f"{prefix}.{name}" for name in names.split())


def llama_like(config: type[PretrainedConfig], **changes: Any) -> Architecture:
    return Architecture(lambda: config(**GQA, **changes), "model.layers.{}", QKVO, GATED)


DECODERS = {
    "gpt2": Architecture(
        lambda: hf.GPT2Config(**GPT),
        "transformer.h.{}",
        "attn.c_attn attn.c_proj",
        "mlp.c_fc mlp.c_proj",
    ),
    "gptj": Architecture(
        lambda: hf.GPTJConfig(**GPT, rotary_dim=4),
        "transformer.h.{}",
        prefixed("attn", "q_proj k_proj v_proj out_proj"),
        "mlp.fc_in mlp.fc_out",
    ),
    "gpt_neox": Architecture(
        lambda: hf.GPTNeoXConfig(**SIZES, hidden_dropout=0.1, attention_dropout=0.1),
        "gpt_neox.layers.{}",
        prefixed("attention", FUSED),
        WIDENING,
    ),
    "falcon": Architecture(
        lambda: hf.FalconConfig(**FALCON),
        "transformer.h.{}",
        prefixed("self_attention", FUSED),
        WIDENING,
    ),
    "opt": Architecture(
        lambda: hf.OPTConfig(**OPT),
        "model.decoder.layers.{}",
        prefixed("self_attn", "q_proj k_proj v_proj out_proj"),
        "fc1 fc2",
        "model.decoder.project_in model.decoder.project_out",
    ),
    "llama": llama_like(hf.LlamaConfig),
    "mistral": llama_like(hf.MistralConfig),
    "qwen2": llama_like(hf.Qwen2Config),
    "qwen3": llama_like(hf.Qwen3Config, head_dim=8),
    "gemma2": llama_like(hf.Gemma2Config, head_dim=8, pad_token_id=0),
    "gemma3": llama_like(hf.Gemma3TextConfig, head_dim=8, pad_token_id=0, sliding_window=8),
    "phi": Architecture(
        lambda: hf.PhiConfig(**GQA, resid_pdrop=0.1, embd_pdrop=0.1),
        "model.layers.{}",
        prefixed("self_attn", "q_proj k_proj v_proj dense"),
        "mlp.fc1 mlp.fc2",
    ),
    "phi3": Architecture(
        lambda: hf.Phi3Config(**GQA, resid_pdrop=0.1, pad_token_id=None),
        "model.layers.{}",
        "self_attn.qkv_proj self_attn.o_proj",
        "mlp.gate_up_proj mlp.down_proj",
    ),
}

ENCODERS = {
    "bert": Architecture(lambda: hf.BertConfig(**BERT), "bert.encoder.layer.{}", *BERT_SELF),
    "roberta": Architecture(
        lambda: hf.RobertaConfig(**BERT), "roberta.encoder.layer.{}", *BERT_SELF
    ),
    "electra": Architecture(
        lambda: hf.ElectraConfig(**BERT, embedding_size=16),
        "electra.encoder.layer.{}",
        *BERT_SELF,
        "electra.embeddings_project",
    ),
    "distilbert": Architecture(
        lambda: hf.DistilBertConfig(**DISTILBERT),
        "distilbert.transformer.layer.{}",
        prefixed("attention", "q_lin k_lin v_lin out_lin"),
        "ffn.lin1 ffn.lin2",
    ),
    "modernbert": Architecture(
        lambda: hf.ModernBertConfig(**MODERNBERT),
        "model.layers.{}",
        "attn.Wqkv attn.Wo",
        "mlp.Wi mlp.Wo",
    ),
    "deberta_v2": Architecture(
        lambda: hf.DebertaV2Config(**DEBERTA),
        "deberta.encoder.layer.{}",
        prefixed("attention.self", "query_proj key_proj value_proj") + " attention.output.dense",
        "intermediate.dense output.dense",
    ),
}
