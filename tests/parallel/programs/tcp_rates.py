"""TCP between hosts: how fast it is, and how long a small message takes meanwhile.

python tcp_rates.py node1:node2,node2:node1    # on any host of a cluster

Prints JSON: for each pair, a list of measurements.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time

SECONDS, TIMES = 1.0, 2


def receive() -> None:
    """Print a port; then take a stream on the first connection, and answer on the second one."""
    with socket.create_server(("", 0)) as server:
        print(server.getsockname()[1], flush=True)
        stream, echo = server.accept()[0], server.accept()[0]
    echo.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    answering = threading.Thread(target=_answer, args=[echo])
    answering.start()
    count, begin, buffer = len(stream.recv(1)), time.monotonic(), bytearray(1 << 20)
    while size := stream.recv_into(buffer):
        count += size
    print(8 * count / (time.monotonic() - begin), flush=True)
    answering.join()


def send(host: str, port: str) -> None:
    """Stream for `SECONDS`; prints round trips before and meanwhile, medians in seconds."""
    stream = socket.create_connection((host, int(port)))
    echo = socket.create_connection((host, int(port)))
    echo.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    idle = _round_trip(echo, 0.2)
    busy: list[float] = []
    asking = threading.Thread(target=lambda: busy.append(_round_trip(echo, SECONDS)))
    asking.start()
    block, end = bytes(1 << 16), time.monotonic() + SECONDS
    while time.monotonic() < end:
        stream.sendall(block)
    stream.close()
    asking.join()
    echo.close()
    print(idle, busy[0])


def _answer(connection: socket.socket) -> None:
    while word := connection.recv(1):
        connection.sendall(word)


def _round_trip(connection: socket.socket, seconds: float) -> float:
    times, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.monotonic()
        connection.sendall(b"x")
        connection.recv(1)
        times.append(time.monotonic() - begin)
        time.sleep(0.01)
    return sorted(times)[len(times) // 2]


def measure(source: str, target: str) -> dict[str, float]:
    """One pair: bits per second of the data alone, and the round trips."""
    program = f"{sys.executable} {__file__}"
    receiver = subprocess.Popen(
        ["ssh", target, f"{program} receive"], stdout=subprocess.PIPE, text=True
    )
    port = receiver.stdout.readline().strip()
    words = ["ssh", source, f"{program} send {target} {port}"]
    idle, busy = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    rate = receiver.communicate()[0]
    return {"rate": float(rate), "idle": float(idle), "busy": float(busy)}


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive()
    elif sys.argv[1] == "send":
        send(*sys.argv[2:])
    else:
        pairs = sys.argv[1].split(",")
        found = {pair: [measure(*pair.split(":")) for _ in range(TIMES)] for pair in pairs}
        print(json.dumps(found))
