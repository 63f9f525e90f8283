"""How the scripts end when something goes wrong."""

import signal
from pathlib import Path

import numpy as np
import pytest

from flip_hf import FlipConfig
from flip_hf.data.schema import InputError
from flip_hf.runs.script import run_script
from flip_hf.training.settings import TrainingSettings


@pytest.fixture(autouse=True)
def handlers():
    """Puts back the handlers of this process, which a script keeps until it ends."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def ended(capsys, main):
    with pytest.raises(SystemExit) as end:
        run_script(main)
    return end.value.code, capsys.readouterr().err


def test_an_error_that_a_user_can_fix_is_one_line(capsys):
    def bad_row():
        raise InputError("an id must be text", source="clicks.csv", row=3)

    def long_message():
        raise OSError("config.json is not there:\n\n  look\tat the folder\x1b[31m")

    assert ended(capsys, lambda: TrainingSettings(num_train_epochs=0)) == (
        1,
        "error: training.num_train_epochs=0 must be 1 or more\n",
    )
    assert ended(capsys, bad_row) == (1, "error: clicks.csv, row 3: an id must be text\n")
    shown = "error: config.json is not there: look at the folder\\x1b[31m\n"
    assert ended(capsys, long_message) == (1, shown)
    code, shown = ended(capsys, Path("/no/such/file").read_text)
    assert (code, shown) == (1, "error: [Errno 2] No such file or directory: '/no/such/file'\n")


@pytest.mark.parametrize("module", ["flip_hf.faulty", "numpy"])
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("int('x')", ValueError),
        ("np.zeros(3) + np.zeros(4)", ValueError),
        ("np.concatenate([])", ValueError),
        ("{}['x']", KeyError),
        ("None.x", AttributeError),
        ("raise TypeError", TypeError),
    ],
)
def test_a_fault_in_the_code_keeps_its_traceback(capsys, module, fault, kind):
    code = {"__name__": module, "np": np}
    exec(f"def faulty():\n    {fault}", code)
    with pytest.raises(kind):
        run_script(code["faulty"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("module", "is_ours"), [("flip_hf.data", True), ("__main__", True), ("numpy.linalg", False)])
def test_a_raise_statement_of_ours_speaks_to_the_user(capsys, module, is_ours):
    code = {"__name__": module}
    exec("def refuse():\n    raise ValueError('so many')", code)
    with pytest.raises(SystemExit if is_ours else ValueError):
        run_script(code["refuse"])
    assert capsys.readouterr().err == ("error: so many\n" if is_ours else "")


def test_a_setting_that_a_configuration_refuses_is_one_line(capsys):
    code, shown = ended(capsys, lambda: FlipConfig(text_towers="abc"))
    assert (code, shown.count("\n")) == (1, 1)
    assert shown.startswith("error: Validation error for field 'text_towers': TypeError: ")
