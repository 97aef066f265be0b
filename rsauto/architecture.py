"""Which class of transformers does a task, and what an architecture can and cannot do."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto as auto
from transformers.utils.import_utils import is_flash_attn_2_available

from rsauto.config import TaskType
from rsauto.errors import InputError

_NUMBERED_FROM_PADDING = frozenset(
    {
        "camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta",
        "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
    }
)  # fmt: skip
"""Model types whose first token has the position after that of the padding token."""


class NotADecoderError(InputError):
    """The architecture cannot write text from left to right; it may be able to classify."""


def auto_class(task: TaskType) -> Any:
    """transformers' class that builds the models of a task."""
    return AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification


def architecture_of(
    name: str, model_config: PretrainedConfig, task: TaskType
) -> type[PreTrainedModel]:
    """The class that does the task. Raises InputError where the architecture has none."""
    kind = f"model.name: {name!r} is a {model_config.model_type} model, which has no"
    if task == "SEQ_CLS":
        if type(model_config) not in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise InputError(
                f"{kind} sequence classifier in transformers. Choose another, such as a BERT, "
                "RoBERTa, ModernBERT, Llama or Qwen model, or take data.label away."
            )
        return _class_of(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, model_config)
    # An encoder with a language model's head would see the very tokens that it is to predict.
    if is_encoder(model_config) or type(model_config) not in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise NotADecoderError(
            f"{kind} causal language model. Choose a decoder such as Llama, Qwen, Mistral or "
            "GPT-2; or, to classify texts, name the column of the class: data.label."
        )
    return _class_of(auto.MODEL_FOR_CAUSAL_LM_MAPPING, model_config)


def is_encoder(model_config: PretrainedConfig) -> bool:
    """Whether attention looks both ways, as in BERT, and the model predicts masked tokens."""
    one_way = model_config.is_encoder_decoder or getattr(model_config, "is_decoder", False)
    return type(model_config) in auto.MODEL_FOR_MASKED_LM_MAPPING and not one_way


def _class_of(mapping: Any, model_config: PretrainedConfig) -> type[PreTrainedModel]:
    found = mapping[type(model_config)]
    first: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return first


def attention_of(
    architecture: type[PreTrainedModel], asked: str, *, needs_package: bool = True
) -> str:
    """'auto' resolved. Raises InputError for one that the architecture, or this machine, lacks.

    A plan needs no package: it is for another machine.
    """
    has_sdpa = architecture._supports_sdpa
    if asked == "auto":
        return "sdpa" if has_sdpa else "eager"
    if not {"sdpa": has_sdpa, "flash_attention_2": architecture._supports_flash_attn}.get(asked, 1):
        raise InputError(
            f"model.attn_implementation: {asked!r}, but {architecture.__name__} has none in "
            "transformers. Set it to auto or eager."
        )
    if needs_package and asked == "flash_attention_2" and not is_flash_attn_2_available():
        raise InputError(
            "model.attn_implementation: 'flash_attention_2' needs a CUDA device and the package "
            "flash-attn, and one of them is missing here. Set it to auto."
        )
    return asked


def num_positions(model_config: PretrainedConfig) -> int | None:
    """Tokens that a row may have; None where the configuration names no limit."""
    positions = getattr(model_config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:  # -1 stands for no limit in XLNet
        return None
    if model_config.model_type in _NUMBERED_FROM_PADDING:
        return positions - int(model_config.pad_token_id or 0) - 1
    return positions


def pad_like(model_config: PretrainedConfig, pad_token_id: int) -> None:
    """Tells a classifier how its rows are padded, in place.

    Decoders find the last token of a row, whose logits count, by the padding after it. Encoders
    number positions from their own padding token, which must stay as it is.
    """
    if model_config.pad_token_id is None or not is_encoder(model_config):
        model_config.pad_token_id = pad_token_id
