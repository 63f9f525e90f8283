"""The floating-point precision that a device computes in."""

import torch


def computes_bf16() -> bool:
    """Whether the device multiplies matrices in bfloat16 natively; emulation would be slower than single precision."""
    if torch.accelerator.is_available():
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    # Older versions of torch have no get_capabilities.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
