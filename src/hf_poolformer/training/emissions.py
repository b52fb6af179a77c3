"""Energy and CO2 of a run, as CodeCarbon estimates them, and the device it ran on; for the model card."""

from __future__ import annotations

import logging
import platform
from typing import Any

import torch

from ..foundation.errors import UserError


class EmissionsMeter:
    """Measures from its making until `stop`, on the machine of this process, without the network.

    Args:
        country: ISO 3166 code of three letters, whose electricity is reckoned with.

    Raises:
        UserError: CodeCarbon is not installed, or does not know the country.
    """

    def __init__(self, country: str):
        try:
            from codecarbon import OfflineEmissionsTracker
            from codecarbon.input import DataSource
        except ImportError as error:
            raise UserError(
                "--emissions_country needs CodeCarbon. Install it with: pip install 'hf-poolformer[carbon]'"
            ) from error
        if country.upper() not in DataSource().get_global_energy_mix_data():
            raise UserError(
                f"--emissions_country {country}: CodeCarbon knows no such country; a code is wanted like DEU or IND."
            )
        # It logs at import and at every measurement; what it finds is in the results.
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        self.tracker = OfflineEmissionsTracker(
            country_iso_code=country.upper(), save_to_file=False, log_level="critical", allow_multiple_runs=True
        )
        self.tracker.start()

    def stop(self) -> dict[str, Any]:
        """`energy_kwh`, `co2_eq_g` and `co2_country` since the beginning; nothing if it could not be measured."""
        grams = self.tracker.stop()
        found = self.tracker.final_emissions_data
        if grams is None or found is None:
            return {}
        return {
            "energy_kwh": found.energy_consumed,
            "co2_eq_g": 1000 * grams,
            "co2_country": found.country_name,
        }


def device_name(device: torch.device) -> str:
    """What the device is called: `NVIDIA H100 80GB HBM3`, or the processor's architecture and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return device.type
