import errno
import http.client

import aiohttp
import pytest
import requests

from hf_poolformer.foundation import faults
from hf_poolformer.foundation.faults import Patience, is_transient


def response(status):
    answer = requests.Response()
    answer.status_code = status
    return answer


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset"),
        TimeoutError("stalled"),
        http.client.IncompleteRead(b"half"),
        OSError(errno.EHOSTUNREACH, "no route to host"),
        requests.exceptions.ChunkedEncodingError("broken off"),
        requests.exceptions.HTTPError(response=response(429)),
        requests.exceptions.HTTPError(response=response(503)),
        aiohttp.ClientPayloadError("not enough data"),
    ],
)
def test_what_passes_by_itself(error):
    assert is_transient(error)
    # As datasets and fsspec hand it on.
    wrapped = RuntimeError("something went wrong")
    wrapped.__cause__ = error
    assert is_transient(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("damaged"),
        OSError("Corrupt snappy compressed data."),
        OSError(errno.ENOSPC, "no space left on device"),
        FileNotFoundError("gone"),
        requests.exceptions.HTTPError(response=response(404)),
        requests.exceptions.HTTPError(response=response(403)),
    ],
)
def test_what_does_not(error):
    assert not is_transient(error)


def test_patience_grows_ends_and_is_renewed(monkeypatch, caplog):
    slept = []
    monkeypatch.setattr(faults.time, "sleep", slept.append)
    patience = Patience((1, 2))
    assert patience.wait("reading x") and patience.wait("reading x") and not patience.wait("reading x")
    patience.renew()
    assert patience.wait("reading x")
    assert slept == [1, 2, 1] and "reading x; trying again in 2 s (2 of 2)" in caplog.text
