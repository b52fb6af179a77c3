import sys

import pytest
import torch

from hf_poolformer.foundation.errors import UserError
from hf_poolformer.training.emissions import EmissionsMeter, device_name


def test_measures_without_the_network():
    pytest.importorskip("codecarbon")
    meter = EmissionsMeter("fra")
    total = sum(index * index for index in range(200_000))
    found = meter.stop()
    assert total
    assert found["co2_country"] == "France"
    assert found["energy_kwh"] > 0
    # France: some 50 g of CO2 per kWh; anything from 5 to 500 is of the right unit.
    assert 5 < found["co2_eq_g"] / found["energy_kwh"] < 500


def test_unknown_country():
    pytest.importorskip("codecarbon")
    with pytest.raises(UserError, match="Atlantis"):
        EmissionsMeter("Atlantis")


def test_codecarbon_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(UserError, match=r"pip install 'hf-poolformer\[carbon\]'"):
        EmissionsMeter("DEU")


def test_device_name():
    assert "threads" in device_name(torch.device("cpu"))
