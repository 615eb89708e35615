"""The ops of the model, one folder each: semantics and ONNX function body. `OPS` is the whole list."""

from plugins.gated_attention import GATED_ATTENTION, KV_APPEND
from plugins.gated_delta_net import GATED_DELTA_NET_PREFILL, GATED_DELTA_NET_VERIFY
from plugins.gated_delta_net.ring import GATED_DELTA_NET_RING, GATED_DELTA_NET_RING_PREFILL
from plugins.linear import FLOAT_LINEAR, FP8_LINEAR, NVFP4_LINEAR
from plugins.moe_experts import FLOAT_MOE_EXPERTS, NVFP4_MOE_EXPERTS
from plugins.moe_routing import MOE_ROUTING
from plugins.op import DOMAIN, Op
from plugins.rms_norm import RMS_NORM

OPS: tuple[Op, ...] = (
    FLOAT_LINEAR,
    FP8_LINEAR,
    NVFP4_LINEAR,
    RMS_NORM,
    MOE_ROUTING,
    FLOAT_MOE_EXPERTS,
    NVFP4_MOE_EXPERTS,
    GATED_DELTA_NET_VERIFY,
    GATED_DELTA_NET_PREFILL,
    GATED_DELTA_NET_RING,
    GATED_DELTA_NET_RING_PREFILL,
    GATED_ATTENTION,
    KV_APPEND,
)

__all__ = ["DOMAIN", "OPS", "Op"]
