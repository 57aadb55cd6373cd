"""Which specs a training run may have: checks of `--compress`, `--warmup-compress` and `--parameters`."""

from typing import TYPE_CHECKING

import commpress
from commpress.comm.codecs import AUTO
from commpress.comm.plan import Plan
from commpress.comm.ratio_warmup import ratio_warmup
from commpress.comm.rules import is_open
from commpress.launch.runtime import TrainingError

if TYPE_CHECKING:
    from commpress.launch.settings import Settings

PLAIN = ("AdamW", "SGD")
"""The optimizers that step on mean gradients."""


def require_specs(settings: "Settings") -> None:
    """Raise TrainingError, with the flag, for unknown specs, and for those that do not work in this way of training."""
    for name in ("compress", "warmup_compress", "parameters"):
        try:
            spec = getattr(settings, name)
            left_open = is_open(settings.gradients) if name == "compress" else name == "parameters" and spec == AUTO
            if spec is not None and not left_open:
                Plan.of_parameters(spec) if name == "parameters" else commpress.parse(spec)
        except ValueError as error:
            raise TrainingError(f"--{name.replace('_', '-')}: {error}") from None
    if settings.parameters == AUTO and settings.spec != AUTO:
        raise TrainingError(
            f"--parameters auto: one search finds both specs; expected --compress auto, got {settings.spec}"
        )
    if settings.parameters == AUTO and settings.shards_muon:
        raise TrainingError(
            "--parameters auto: under --optimizer EF21Muon auto finds the spec of the momentum alone; expected a spec, such as "
            "int8"
        )
    if settings.compress is None or not is_open(settings.gradients):
        return
    if (warmup := ratio_warmup(settings.gradients)) is not None:
        replicated = settings.parallel == "ddp" or (settings.parallel == "deepspeed" and settings.zero_stage == 0)
        if not replicated or settings.optimizer not in PLAIN:
            raise TrainingError(
                f"--compress {warmup}: a ratio warms up under --parallel ddp, or deepspeed with --zero-stage 0, and "
                f"--optimizer AdamW or SGD, got {settings.parallel} and {settings.optimizer}; expected one ratio, such as "
                f"{warmup.codec}"
            )
        return
    by_patterns = not isinstance(settings.gradients, str)
    if by_patterns and (settings.parallel != "ddp" or settings.optimizer not in PLAIN):
        raise TrainingError(
            f"--compress {settings.compress}: expected --parallel ddp and --optimizer AdamW or SGD, got "
            f"{settings.parallel} and {settings.optimizer}"
        )
    if not settings.takes_auto:
        raise TrainingError(
            f"--compress {settings.compress}: expected --parallel ddp, fsdp or deepspeed, and no --parameters beside "
            f"--optimizer OneBitAdamW, ZeroOneAdamW or DGC, got {settings.parallel}, {settings.parameters} and "
            f"{settings.optimizer}"
        )
