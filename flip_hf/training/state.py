"""The state of a training at a step: saves it to files and restores it bit for bit."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from flip_hf.standard_json import settings_json

_MODEL, _OPTIMIZER, _RANDOM = "model.safetensors", "optimizer.safetensors", "random.safetensors"
_RATES = "rates.json"


def seed_everything(seed: int, device: torch.device) -> None:
    """Seeds Python, NumPy and torch; on a CPU, it also makes all later computations deterministic.

    Without deterministic algorithms, the backward pass of `table[ids]` adds up the gradients of a repeated row in an
    order that depends on the threads.
    """
    set_seed(seed)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        # No code here reads uninitialised memory, so filling it would only cost time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Returns the states of this process's random number generators, uint8 (bytes,) each."""
    _, words, next_gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": _to_bytes([*words, math.nan if next_gauss is None else next_gauss]),
        "numpy": _to_bytes([*numpy_state[1], *numpy_state[2:]]),
    }
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def restore_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restores the states that `random_states` returned."""
    torch.set_rng_state(states["torch"])
    *words, next_gauss = _from_bytes(states["python"])
    random.setstate((3, tuple(map(int, words)), None if math.isnan(next_gauss) else next_gauss))
    *keys, position, has_gauss, cached_gauss = _from_bytes(states["numpy"])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached_gauss))
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"])


def _to_bytes(numbers: list[Any]) -> torch.Tensor:
    # A double represents every 32-bit integer exactly.
    return torch.tensor([float(n) for n in numbers], dtype=torch.float64).view(torch.uint8)


def _from_bytes(state: torch.Tensor) -> list[float]:
    numbers: list[float] = state.view(torch.float64).tolist()
    return numbers


class TrainingState:
    """The model, the optimiser, the schedule and the random states of all processes.

    Args:
        accelerator: the accelerator that prepared the model and the optimiser.
        model: the prepared model.
        optimizer: the prepared optimiser.
        schedule: the learning-rate schedule.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        self.accelerator = accelerator
        self.model = accelerator.unwrap_model(model)
        self.optimizer = optimizer
        self.schedule = schedule

    def gather_random_states(self) -> dict[str, torch.Tensor]:
        """Returns the random states of all processes, uint8 (processes, bytes) each; every process must call this."""
        device = self.accelerator.device
        own = {name: state.unsqueeze(0).to(device) for name, state in random_states(device).items()}
        gathered: dict[str, torch.Tensor] = self.accelerator.gather(own)
        return {name: states.cpu() for name, states in gathered.items()}

    def save(self, folder: Path, random_states: dict[str, torch.Tensor]) -> None:
        """Writes the state to files; only one process must call this.

        Args:
            folder: an empty folder.
            random_states: the random states that `gather_random_states` returned.
        """
        save_model(self.model, str(folder / _MODEL))
        optimizer = self.optimizer.state_dict()
        slots = {f"{i}.{name}": value for i, slot in optimizer["state"].items() for name, value in slot.items()}
        save_file(slots, folder / _OPTIMIZER)
        save_file(random_states, folder / _RANDOM)
        groups = {"optimizer": optimizer["param_groups"], "schedule": self.schedule.state_dict()}
        (folder / _RATES).write_text(settings_json(groups), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Restores the state that `save` wrote; every process must call this."""
        load_model(self.model, folder / _MODEL)
        groups = json.loads((folder / _RATES).read_text(encoding="utf-8"))
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in load_file(folder / _OPTIMIZER).items():
            number, slot = name.split(".")
            slots.setdefault(int(number), {})[slot] = value
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups["optimizer"]})
        self.schedule.load_state_dict(groups["schedule"])
        process = self.accelerator.process_index
        # Copy the state, because torch misreads a state that is a view into a larger tensor.
        own = {name: states[process].clone() for name, states in load_file(folder / _RANDOM).items()}
        restore_random_states(own, self.accelerator.device)
