"""Processes of a test that find each other by a port, and their ends."""

import random
import socket


def free_port():
    """A free port outside of the range that the system hands out, which another process could get before it is used."""
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def ended(processes, timeout=300):
    """The exit codes and outputs of processes, once all of them have ended."""
    try:
        told = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:  # one that hangs does not live on beside the tests that follow
            process.kill()
            process.communicate()
    return [process.returncode for process in processes], told
