import signal
import subprocess
import sys
import time

import psutil
import pytest

from orchestrator.interrupt import Interrupted, Interrupts, descendants, end_processes

PROGRAM = """
import subprocess, sys, time
from orchestrator.interrupt import Interrupted, Interrupts
with Interrupts() as interrupts:
    try:
        {body}
    except Interrupted as signal:
        print("orderly", flush=True)
        {after}
        sys.exit(signal.exit_code)
"""
READY_AND_SLEEP = "print('ready', flush=True); time.sleep(60)"


def start(body=READY_AND_SLEEP, after="pass"):
    program = PROGRAM.format(body=body, after=after)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_in_order(signum):
    process = start()
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert out == "orderly\n"
    assert "once more" in err


def test_who_asks_from_within_ends_it_in_order_and_never_at_once():
    asked = "[interrupts.ask() for _ in range(3)]; print('saved', flush=True)"
    program = PROGRAM.format(body="interrupts.ask(); time.sleep(60)", after=asked)
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, stdout=-1, text=True, timeout=30
    )
    assert done.stdout == "orderly\nsaved\n"
    assert done.returncode == 143


def test_many_who_ask_before_the_main_thread_hears_of_it_are_one(monkeypatch):
    sent = []
    monkeypatch.setattr("os.kill", lambda _, signum: sent.append(signum))  # on its way
    interrupts = Interrupts()
    for _ in range(3):
        interrupts.ask()
    assert sent == [signal.SIGTERM]


def test_a_shield_holds_the_signal_back_until_its_end():
    body = (
        "shield = interrupts.shield(); shield.__enter__(); print('ready', flush=True); "
        "time.sleep(1); print('whole', flush=True); shield.__exit__(None, None, None)"
    )
    process = start(body)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert out == "whole\norderly\n"
    assert process.returncode == 130


def test_the_second_signal_kills_children_too():
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    process = start(f"{child}; {READY_AND_SLEEP}", after="time.sleep(60)")
    (grandchild,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "orderly\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    psutil.wait_procs([grandchild], timeout=10)
    assert not grandchild.is_running()


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert signal.getsignal(signal.SIGINT) != before
        with pytest.raises(Interrupted), interrupts.shield():
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_shield_after_the_signal_does_not_raise_again():
    with Interrupts() as interrupts:
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        with interrupts.shield():
            pass


def test_ending_processes_is_patient_first():
    quick = "import time; time.sleep(0.2)"
    slow = "import time; time.sleep(60)"
    for program in (quick, slow):
        subprocess.Popen([sys.executable, "-c", program])
    ours = descendants()
    started = time.monotonic()
    end_processes(ours, patience=1)
    assert time.monotonic() - started < 20
    assert not any(process.is_running() for process in ours)
