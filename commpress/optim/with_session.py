"""States of an optimizer that a session has restored from torch's distributed checkpoint: which later ones say no more.

torch.distributed.checkpoint loads objects in the order of their names, and reads for an optimizer only the keys that its state
has at that moment. What it reads into one that has not stepped has no tensors, and what it reads into one that has stepped less
may lack some (the coordinates of EF21Muon). The session's part of the checkpoint has all of them.
"""

from typing import Any

import torch


def steps_of(state_dict: dict[str, Any]) -> int:
    """Return how many steps an optimizer had taken that counts them in its groups, as those of this package do; else 0."""
    return int(state_dict["param_groups"][0].get("steps", 0))


def came(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], brought: int | None) -> bool:
    """Whether the session has restored this state. `brought`: the steps of what it has restored since the last backward.

    Raises ValueError for a state without tensors that the session has not restored.
    """
    steps = steps_of(state_dict)
    if steps and steps == brought:
        return True
    if not steps or state_dict["state"]:
        return False
    if optimizer.state and optimizer.param_groups[0]["steps"] == steps:
        return True
    raise ValueError(
        f"{type(optimizer).__name__}: a state of {steps} steps without tensors; expected the session to be loaded, too: "
        'torch.distributed.checkpoint.load({"optimizer": optimizer, "commpress": session}, ...)'
    )
