"""A server for one model, which OpenAI's clients can talk to, with a page to try it.

    python -m runtime.serve --engines build/demo/cpu --port 8000
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "hello"}]}'

One answer is decoded at a time; what else is asked waits in a queue. At SIGTERM or Ctrl-C those that wait are turned
away, the answer on its way may take --grace seconds more, and the server ends with exit status 0. A second time cuts it
short.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import math
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from engines import Engine
from export.cli import Parser, run, say
from export.config import read_json
from export.errors import UserError
from runtime import template
from runtime.app import make_app
from runtime.decode import add_engine, add_mtp_k, engine_of
from runtime.grammar import Grammars
from runtime.rounds import check_request
from runtime.service import Service, Settings
from runtime.session import Session, most_drafts
from runtime.template import ChatTemplate
from runtime.tokenizer import Tokenizer

CONNECTIONS = 256  # beside those that wait in the queue
KEEP_ALIVE = 30  # seconds; clients give up idle connections earlier, so none is used as it closes


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m runtime.serve", description=__doc__.split("\n")[0])
    add_engine(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen at (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000; 0: any that is free")
    parser.add_argument("--api-key-file", type=Path, metavar="F", help="keys, one a line: /v1 needs one of them")
    parser.add_argument("--capacity", type=int, default=0, metavar="N", help="positions (default: the engines')")
    add_mtp_k(parser)
    parser.add_argument("--queue", type=int, default=64, metavar="N", help="requests that may wait (default 64)")
    parser.add_argument("--max-body", type=int, default=1 << 20, metavar="B", help="bytes of a request (default 1 MiB)")
    parser.add_argument("--grace", type=float, default=10, metavar="S", help="seconds to finish in (default 10)")
    parser.add_argument("--reuse", action="store_true", help="keep caches: a prompt that goes on is not run again")
    options = parser.parse_args()
    for flag, valid, expected in (
        ("port", 0 <= options.port < 1 << 16, "0 to 65535"),
        ("queue", options.queue >= 0, "an integer from 0 up"),
        ("max_body", options.max_body > 0, "at least 1"),
        ("grace", 0 <= options.grace <= 86400, "0 to 86400"),
    ):
        if not valid:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(options, flag)}: expected {expected}")
    return options


def read_keys(path: Path) -> tuple[bytes, ...]:
    """Raises UserError: no keys, or what cannot stand in a header; OSError."""
    lines = path.read_bytes().splitlines()
    keys = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    if not keys:
        raise UserError(f"{path}: holds no key; write one a line, or start without --api-key-file")
    for number, key in keys.items():
        if not all(0x21 <= byte < 0x7F for byte in key):
            raise UserError(f"{path}: line {number} is no key; expected visible ASCII characters without blanks")
    return tuple(keys.values())


def listen(host: str, port: int) -> socket.socket:
    """Raises UserError: the address is not one of this machine, or is in use."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family, backlog=512)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another") from None


def open_service(options: argparse.Namespace, keys: tuple[bytes, ...], names: set[str]) -> Service:
    """Raises UserError: the engines, or what is with them, cannot be used."""
    directory, engine = options.engines, engine_of(options)
    config = engine.manifest.config
    tokenizer = Tokenizer(directory)
    most = most_drafts(engine, "auto")  # whatever the default is, requests may ask for others
    if options.mtp_k != "auto":
        check_request(engine, [0], 1, options.mtp_k)
        most = max(most, options.mtp_k)
    session = Session(engine, tokenizer, open_template(directory), most, options.capacity)
    if session.template:
        session.encode([{"role": "user", "content": "hello"}])  # what is wrong with the template shows now
    grammars = Grammars(directory, config.vocab_size, config.eos_token_id)
    settings = Settings(
        name_of(directory, engine), options.mtp_k, options.queue, options.max_body, keys, options.reuse, names
    )
    return Service(session, grammars, settings)


def open_template(directory: Path) -> ChatTemplate | None:
    """None for a checkpoint that came without one: it has text completions only."""
    has_one = (directory / template.FILE).is_file()
    if not has_one and (directory / template.CONFIG).is_file():
        has_one = "chat_template" in read_json(directory / template.CONFIG)
    return ChatTemplate(directory) if has_one else None


def name_of(directory: Path, engine: Engine) -> str:
    """build/NAME/TARGET, as the Makefile has it, or any other NAME."""
    path = directory.resolve()
    return path.parent.name if path.name == engine.manifest.target else path.name


class Server(uvicorn.Server):
    """uvicorn's, ending as the service wants it: no signal is raised again, and answers get `grace` seconds."""

    def __init__(self, service: Service, grace: float = 10) -> None:
        config = uvicorn.Config(
            make_app(service),
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=service.settings.queue + CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=math.ceil(grace) + 5,
        )
        super().__init__(config)
        self.service, self.grace = service, grace

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises them again at the end, which would be the exit status.
        previous = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.service.worker.abort()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets
        self.announce(*sockets[0].getsockname()[:2])

    def announce(self, host: str, port: int) -> None:
        """Says that requests can come."""
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"Tandem serves {self.service.served.model} at http://{where}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.worker.stop()
        self.service.stopping.set()
        timer = asyncio.get_running_loop().call_later(self.grace, self.service.worker.abort)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def main() -> None:
    options = parse()
    keys = read_keys(options.api_key_file) if options.api_key_file else ()
    with listen(options.host, options.port) as listener:
        address = listener.getsockname()[0].partition("%")[0]
        is_local = ipaddress.ip_address(address).is_loopback
        if not keys and not is_local:
            say(f"{address} can be reached by others, and without --api-key-file they need no key")
        names = {"localhost", "127.0.0.1", "::1", address, options.host.lower()} if is_local and not keys else set()
        with contextlib.closing(open_service(options, keys, names)) as service:
            Server(service, options.grace).run(sockets=[listener])
    sys.stdout.flush()


if __name__ == "__main__":
    run(main)
