"""Names of the tracker's categories of storages, and of the phases of a step."""

from __future__ import annotations

from collections.abc import Mapping

BASE_WEIGHTS = "base_weights"
QUANTIZATION_CONSTANTS = "quantization_constants"
ADAPTER_WEIGHTS = "adapter_weights"
BUFFERS = "buffers"
GRADIENTS = "gradients"
OPTIMIZER_STATE = "optimizer_state"
ACTIVATIONS = "activations"
LOGITS_AND_LOSS = "logits_and_loss"
DEQUANTIZED_TEMPORARIES = "dequantized_temporaries"
OPTIMIZER_TEMPORARIES = "optimizer_temporaries"
INPUTS = "inputs"
GATHERED_WEIGHTS = "gathered_weights"  # FSDP: the whole weights of the blocks in use
UNREDUCED_GRADIENTS = "unreduced_gradients"  # FSDP: of whole weights, before they are reduced to this rank's shard
COMMUNICATION_BUFFERS = "communication_buffers"
OTHER = "other"
HOST = "host"  # in host memory in the modeled run: logged, but not counted

CATEGORIES = (
    BASE_WEIGHTS,
    QUANTIZATION_CONSTANTS,
    ADAPTER_WEIGHTS,
    BUFFERS,
    GRADIENTS,
    OPTIMIZER_STATE,
    ACTIVATIONS,
    LOGITS_AND_LOSS,
    DEQUANTIZED_TEMPORARIES,
    OPTIMIZER_TEMPORARIES,
    GATHERED_WEIGHTS,
    UNREDUCED_GRADIENTS,
    COMMUNICATION_BUFFERS,
    INPUTS,
    OTHER,
)

FORWARD = "forward"
BACKWARD = "backward"
OPTIMIZER = "optimizer"
OUTSIDE = "outside"

PHASE_CATEGORY = {FORWARD: ACTIVATIONS, BACKWARD: ACTIVATIONS, OPTIMIZER: OPTIMIZER_TEMPORARIES}

OPERATOR_CATEGORY: Mapping[str, str] = {
    "bitsandbytes::dequantize_4bit": DEQUANTIZED_TEMPORARIES,
    "bitsandbytes::dequantize_blockwise": DEQUANTIZED_TEMPORARIES,
    "bitsandbytes::int8_vectorwise_dequant": DEQUANTIZED_TEMPORARIES,
}
