"""Keywords of transformers' models: what they mean here, and those that mean nothing here.

Code that was written for transformers passes more than a model here has a use for. What leaves a
feature off is taken; what asks for one that this package does not have is refused by its name, and
so is a word that nobody knows.
"""

from typing import Any

import torch

from bertfast.errors import shown

# What ``forward`` takes in transformers, with the values that change nothing.
FORWARD: dict[str, tuple[Any, ...]] = {
    "head_mask": (None,),
    "past_key_values": (None,),
    "past_key_value": (None,),
    "use_cache": (None, False),
    "cache_position": (None,),
    "encoder_hidden_states": (None,),
    "encoder_attention_mask": (None,),
    "encoder_attention_bias": (None,),
    "cross_attn_head_mask": (None,),
    "position_bias": (None,),
    "is_causal": (None, False),
    "num_items_in_batch": (None,),
}

# What ``from_pretrained`` takes there besides what has a meaning here.
FROM_PRETRAINED: dict[str, tuple[Any, ...]] = {
    "attn_implementation": (None, "bertfast"),
    "experts_implementation": (None,),
    "low_cpu_mem_usage": (None, True, False),
    "trust_remote_code": (None, False),
    "subfolder": (None, ""),
    "variant": (None,),
    # How files are fetched changes no model.
    "force_download": (None, True, False),
    "resume_download": (None, True, False),
    "_from_auto": (None, True, False),
    "_fast_init": (None, True, False),
    # Fields of transformers' configs.
    "use_cache": (None, False),
    "gradient_checkpointing": (None, False),
    "chunk_size_feed_forward": (None, 0),
    "tie_encoder_decoder": (None, False),
    "cross_attention_hidden_size": (None,),
    "return_unused_kwargs": (None, False),
    "proxies": (None,),
    "mirror": (None,),
    "use_auth_token": (None, False),
    "weights_only": (None, True),
    "from_tf": (None, False),
    "from_flax": (None, False),
    "state_dict": (None,),
    "key_mapping": (None,),
    "gguf_file": (None,),
    "quantization_config": (None,),
    "load_in_8bit": (None, False),
    "load_in_4bit": (None, False),
    "output_loading_info": (None, False),
    "max_memory": (None,),
    "offload_folder": (None,),
    "offload_state_dict": (None, False),
    "offload_buffers": (None, False),
    "tp_plan": (None,),
    "tp_size": (None,),
    "device_mesh": (None,),
    "distributed_config": (None,),
    "adapter_name": (None,),
    "adapter_kwargs": (None, {}),
    "generation_config": (None,),
    "use_kernels": (None, False),
    "use_flash_attention_2": (None, False),
}

# Fields of transformers' configs that change nothing, whatever they are; ``config.extra`` has them.
NOTES = frozenset(
    ("architectures", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix",
     "name_or_path", "_name_or_path", "transformers_version", "bos_token_id", "eos_token_id",
     "sep_token_id", "cls_token_id", "mask_token_id", "decoder_start_token_id", "directionality",
     "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
     "pooler_size_per_head", "pooler_type")
)  # fmt: skip

# And ``save_pretrained``.
SAVE_PRETRAINED: dict[str, tuple[Any, ...]] = {
    "safe_serialization": (None, True),
    "is_main_process": (None, True),
    "push_to_hub": (None, False),
    "state_dict": (None,),
    "save_function": (None,),
    "variant": (None,),
    "token": (None,),
    "save_original_format": (None, False),
}


def same_thing(name: str, value: Any, older: str, old: Any) -> Any:
    """One value by its two names.

    Raises:
        ValueError: both are given and they differ.
    """
    if value is not None and old is not None and value != old:
        raise ValueError(f"{older}: expected {name}, {shown(value)}, or nothing, got {shown(old)}")
    return old if value is None else value


def one_device(device_map: Any) -> Any:
    """The device that a ``device_map`` puts the whole model on; None for None.

    Raises:
        ValueError: it wants the model in parts, or that somebody else finds out where.
    """
    if isinstance(device_map, dict) and list(device_map) == [""]:
        device_map = device_map[""]
    known = device_map is None or isinstance(device_map, (str, int, torch.device))
    if not known or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise ValueError(
            f"device_map: expected one device for all of the model, got {shown(device_map)}"
        )
    return device_map


def switch(name: str, value: Any, default: bool) -> bool:
    """A flag of a call, or where it is None what the config says.

    Raises:
        TypeError: it is no flag.
    """
    if value is None:
        return default
    if value is not True and value is not False:
        raise TypeError(f"{name}: expected True, False or None, got {shown(value)}")
    return value


def check_off(
    where: str, given: dict[str, Any], known: dict[str, tuple[Any, ...]], others: str = ""
) -> None:
    """Refuse what asks for something, and what nobody knows.

    Args:
        where: whose keywords they are, for messages.
        given: the keywords.
        known: names, each with the values that change nothing.
        others: what else a name could have been, for messages.

    Raises:
        TypeError: a name that is not known.
        ValueError: another value than those.
    """
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{name}: expected a keyword of {where}{others}, got {shown(value)}")
        # Tensors compare element by element, and True equals 1.
        if not any(type(value) is type(off) and value == off for off in known[name]):
            expected = " or ".join(repr(off) for off in known[name])
            raise ValueError(
                f"{name}: expected {expected}, got {shown(value)}; bertfast does not have this"
            )
