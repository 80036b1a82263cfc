"""The model's sizes, read from a checkpoint's ``config.json`` and checked against what this code computes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from phi4rv.errors import UserError

TRAINED_CONTEXT = 16384  # the report's stage 3; the config's 32768 positions were never trained
MAX_SIZE = 2**24  # no size or position is near it; the product of two still fits 64 bits
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What the published code can express and this code does not compute: a checkpoint that asks for it is refused.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "hidden_act": ("silu", None),
    "mm_projector_type": ("mlp2x_gelu", None),
    "partial_rotary_factor": (1.0, None),
    "rope_parameters": (None,),  # rope_theta's place in transformers 5, not in the Hugging Face layout
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "tie_word_embeddings": (False, None),
    "use_s2": (False, None),
}


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP2 NaFlex tower. Defaults are so400m-patch16, the published model's."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_patches: int = 256  # rows of the learned position table, a square grid
    layer_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Config:
    """Phi-3 decoder, SigLIP2 tower and the image bounds. Defaults are the published 15 B model's.

    ``raw`` is the whole ``config.json``, kept so that a saved folder says what the loaded one said.
    """

    vocab_size: int = 100352
    hidden_size: int = 5120
    intermediate_size: int = 17920
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    num_key_value_heads: int = 10
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    max_position_embeddings: int = 32768
    min_num_patches: int = 256
    max_num_patches: int = 3600
    bos_token_id: int = 100257
    eos_token_id: int = 100265
    pad_token_id: int = 100349
    dtype: str = "bfloat16"
    vision: VisionConfig = field(default_factory=VisionConfig)
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together: the trained context length, or less where the positions end sooner."""
        return min(self.max_position_embeddings, TRAINED_CONTEXT)

    @staticmethod
    def from_folder(folder: Path) -> Config:
        """Reads ``config.json``. UserError if it is missing, not JSON, or asks for what is not computed here."""
        return Config.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))

    @staticmethod
    def from_dict(raw: dict[str, Any], name: str = "config.json") -> Config:
        """``raw`` as in ``config.json``; ``name`` is what errors call it."""
        for key, allowed in _SUPPORTED.items():
            if raw.get(key) not in allowed:
                raise UserError(f"{name}: {key} is {raw[key]!r}, only {allowed[0]!r} is supported")
        vision_raw = raw.get("vision_config", {})
        if not isinstance(vision_raw, dict):
            raise UserError(f"{name}: vision_config is {vision_raw!r}, must be an object")
        if vision_raw.get("patch_size", 16) != 16:
            raise UserError(f"{name}: vision_config.patch_size is {vision_raw['patch_size']}, must be 16")
        if vision_raw.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            raise UserError(f"{name}: vision_config.hidden_act must be 'gelu_pytorch_tanh'")
        vision = VisionConfig(**_validated(VisionConfig, vision_raw, f"{name}: vision_config."))
        config = Config(**_validated(Config, raw, f"{name}: "), vision=vision, raw=raw)
        _check(config, name)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The ``config.json`` of this model: what was read, with this object's own fields written over it."""
        own = {key: getattr(self, key) for key in _fields(Config)}
        vision = {key: getattr(self.vision, key) for key in _fields(VisionConfig)}
        defaults = VisionConfig()
        raw_vision = self.raw.get("vision_config", {})
        # The published config.json leaves out what it does not change; so does ours.
        vision = {k: v for k, v in vision.items() if k in raw_vision or v != getattr(defaults, k)}
        return {**_HF_DEFAULTS, **self.raw, **own, "vision_config": {**raw_vision, **vision}}


_HF_DEFAULTS = {
    "architectures": ["Phi4ForCausalLMV"],
    "model_type": "phi4-siglip",
    "hidden_act": "silu",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "google/siglip2-so400m-patch16-naflex",
    "original_max_position_embeddings": 32768,
    "partial_rotary_factor": 1.0,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "vision_config": {"model_type": "siglip2_vision_model"},
}


def _fields(cls: type) -> dict[str, Any]:
    return {f: v for f, v in cls.__dataclass_fields__.items() if f not in ("vision", "raw")}  # type: ignore[attr-defined]


def _validated(cls: type, raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The entries of ``raw`` that ``cls`` has, each a positive number where the default is one."""
    values = {key: raw[key] for key in _fields(cls) if raw.get(key) is not None}
    for key, value in values.items():
        default = _fields(cls)[key].default
        number = int if isinstance(default, int) else int | float
        if isinstance(default, str):
            fits, what = isinstance(value, str), "a string"
        elif isinstance(value, bool) or not isinstance(value, number):
            fits, what = False, "a number" if isinstance(default, float) else "an integer"
        elif key.endswith("_token_id"):
            fits, what = value >= 0, "0 or more"
        else:
            limit = MAX_SIZE if isinstance(default, int) else math.inf
            fits, what = 0 < value < limit, f"above 0 and below {limit}"
        if not fits:
            raise UserError(f"{where}{key} is {value!r}, must be {what}")
    return values


def _check(config: Config, name: str) -> None:
    for part, hidden, heads in (
        ("", config.hidden_size, config.num_attention_heads),
        ("vision_config.", config.vision.hidden_size, config.vision.num_attention_heads),
    ):
        if hidden % heads:
            raise UserError(f"{name}: {part}hidden_size {hidden} is not a multiple of {heads} heads")
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"{name}: {config.num_attention_heads} query heads cannot share {config.num_key_value_heads} key heads"
        )
    if config.head_dim % 2:
        raise UserError(f"{name}: head dim {config.head_dim} is odd, rotary embedding needs pairs")
    if math.isqrt(config.vision.num_patches) ** 2 != config.vision.num_patches:
        raise UserError(f"{name}: vision_config.num_patches is {config.vision.num_patches}, must be a square")
    if config.vision.num_hidden_layers < 2:
        raise UserError(f"{name}: vision_config.num_hidden_layers must be 2 or more")
    if config.min_num_patches > config.max_num_patches:
        raise UserError(f"{name}: min_num_patches is over max_num_patches {config.max_num_patches}")
    if config.dtype not in DTYPES:
        raise UserError(f"{name}: dtype is {config.dtype!r}, must be one of {', '.join(DTYPES)}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``; UserError naming the file, and the line where it breaks."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; a checkpoint folder in the Hugging Face layout has one") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: broken JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # thousands of digits or of brackets
        raise UserError(f"{path}: broken JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value
