"""Which chip a tensor's kernels are compiled for."""

import torch

from optima_kernels.shared.dispatch import INTERPRETED


def target_of(device: torch.device) -> str:
    """The name of the device's architecture: "sm_90", "gfx942" or alike, or "interpreter"."""
    return "interpreter" if INTERPRETED else architecture(device)


def architecture(device: torch.device) -> str:
    """What the driver says that the device is."""
    properties = torch.cuda.get_device_properties(device)
    return (
        str(properties.gcnArchName).split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    )
