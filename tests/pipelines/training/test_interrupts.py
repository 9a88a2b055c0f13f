"""Trainings on Ray that are ended from outside."""

import signal
import sys

import pytest

from pipelines.training.run import _fit


class Interrupted:
    """Ray Train's trainer, which takes both signals for itself and answers them with exits."""

    def __init__(self, code: int):
        self.code = code

    def fit(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        sys.exit(self.code)


@pytest.mark.parametrize(("code", "args"), [(0, ()), (signal.SIGTERM, (signal.SIGTERM,))])
def test_interrupts_of_a_training_on_ray_are_no_success(code, args):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            _fit(Interrupted(code))

        assert caught.value.args == args
        assert signal.getsignal(signal.SIGINT) == before[0]
        assert signal.getsignal(signal.SIGTERM) == (signal.SIG_IGN if args else before[1])
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
