"""What the system call alone costs: writes of an event's size to many loopback connections, by a process that does nothing else.

    python benchmarks/send_cost.py [--streams 64] [--bytes 230] [--bursts 400] [--pause 0.02] [--busy 0]

The floor under http_cost.py. Loopback does the receiver's part of TCP, and wakes it, within the sender's system call. The receiver is a
process of its own, and reads whatever comes. Each burst writes once to every connection, as a step of the engine does. --busy: so many
processes compute meanwhile, as an engine would.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import selectors
import socket
import time


def read_all(address: tuple[str, int], streams: int) -> None:
    poll = selectors.DefaultSelector()
    for _ in range(streams):
        poll.register(socket.create_connection(address), selectors.EVENT_READ)
    while poll.get_map():
        for key, _ in poll.select():
            assert isinstance(key.fileobj, socket.socket)
            if not key.fileobj.recv(1 << 16):
                poll.unregister(key.fileobj)


def compute() -> None:
    data = bytearray(1 << 22)
    while True:
        data[:] = data[::-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--bytes", type=int, default=230)
    parser.add_argument("--bursts", type=int, default=400)
    parser.add_argument("--pause", type=float, default=0.02, help="seconds between bursts")
    parser.add_argument("--busy", type=int, default=0)
    args = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0), backlog=args.streams)
    context = multiprocessing.get_context("fork")
    reader = context.Process(target=read_all, args=(listener.getsockname(), args.streams))
    busy = [context.Process(target=compute, daemon=True) for _ in range(args.busy)]
    for process in (reader, *busy):
        process.start()
    connections = [listener.accept()[0] for _ in range(args.streams)]
    for connection in connections:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    files, event = [connection.fileno() for connection in connections], bytes(args.bytes)
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(args.bursts):
        time.sleep(args.pause)
        for fd in files:
            os.write(fd, event)
    after, writes = resource.getrusage(resource.RUSAGE_SELF), args.bursts * args.streams
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    print(f"{(user + system) / writes * 1e6:.1f} µs of CPU a write: user {user / writes * 1e6:.1f}, system {system / writes * 1e6:.1f}")
    for connection in connections:
        connection.close()
    reader.join()
    for process in busy:
        process.kill()


if __name__ == "__main__":
    main()
