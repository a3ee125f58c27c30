"""The web server: reads, never writes, and serves only what `Site` knows by name."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import ipaddress
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tornado import web
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from hpc_absa.errors import UsageError
from hpc_absa.report import page as report_page
from hpc_absa.serve.site import Site

COOKIE = "hpc-absa-token"
OWN_FILES = ("live.js", "page.js")
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": report_page.LIVE_POLICY + "; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Handler(web.RequestHandler):
    """Reads only; requests without the token, or under a foreign host name, are refused."""

    def initialize(self, site: Site, token: str, local: bool) -> None:
        self.site, self._token, self._local = site, token, local

    def set_default_headers(self) -> None:
        for name, value in HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        self._begin = time.process_time()
        if self._local and not _is_loopback(self.request.host_name.strip("[]")):
            # another site's name, made to lead here
            raise web.HTTPError(403, reason="unknown host name")
        if not self._token:
            return
        given = self.get_query_argument("token", "")
        if self._is_token(given):
            self.set_cookie(COOKIE, given, httponly=True, samesite="Strict")
            self.redirect(self.request.path)
        elif not self._is_token(self.get_cookie(COOKIE) or ""):
            raise web.HTTPError(403, reason="open the address that hpc-absa serve printed")

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self._token.encode())

    def on_finish(self) -> None:
        if self.get_status() == 200 and not isinstance(self, File):
            self.site.took(time.process_time() - self._begin)

    def compute_etag(self) -> str | None:
        return None  # versions take its place

    def write_error(self, status_code: int, **kwargs: object) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{status_code} {self._reason}\n")

    def unchanged(self, version: Callable[[], str]) -> bool:
        """Whether a live page that asks already shows this version."""
        known = self.request.headers.get("X-Live")
        if not known or known != version():
            return False
        self.set_status(304)
        return True


class Index(Handler):
    def get(self) -> None:
        runs = self.site.runs()
        watched = list(runs.values())
        if self.unchanged(lambda: self.site.version(watched)):
            return
        if len(runs) == 1:
            ((name, only),) = runs.items()
            self.finish(self.site.run_page(name, only))
        else:
            self.finish(self.site.index())


class Compare(Handler):
    def get(self) -> None:
        watched = self.site.compared()
        if not self.unchanged(lambda: self.site.version(watched)):
            self.finish(self.site.comparison(watched))


class RunPage(Handler):
    def get(self, name: str) -> None:
        watched = self.site.run(name)
        if watched is None:
            raise web.HTTPError(404, reason="no such run")
        if not self.unchanged(lambda: self.site.version([watched])):
            self.finish(self.site.run_page(name, watched))


class Log(Handler):
    def get(self, name: str, log: str) -> None:
        watched = self.site.run(name)
        text = self.site.log(name, watched, log) if watched else None
        if text is None:
            raise web.HTTPError(404, reason="no such log")
        self.finish(text)


class File(Handler):
    def get(self, name: str) -> None:
        if name in OWN_FILES:
            path = Path(report_page.__file__).with_name(name)
        elif name in report_page.LIBRARIES:
            path = report_page.library(name)
        else:
            raise web.HTTPError(404)
        self.set_header("Content-Type", "text/javascript; charset=utf-8")
        self.set_header("Cache-Control", "max-age=3600")
        self.finish(path.read_bytes())


def application(site: Site, token: str, local: bool) -> web.Application:
    settings = {"site": site, "token": token, "local": local}
    routes = [
        (r"/", Index),
        (r"/compare", Compare),
        (r"/run/([^/]+)", RunPage),
        (r"/run/([^/]+)/log/([^/]+)", Log),
        (r"/static/([a-z.-]+)", File),
    ]
    return web.Application(
        [(pattern, handler, settings) for pattern, handler in routes],
        compress_response=True,
        log_function=lambda handler: None,
    )


def serve(
    paths: Sequence[Path], host: str, port: int, token: bool, print_line: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        paths: run directories, or folders with some.
        host: address to listen on; any but a loopback address needs the token.
        port: 0 for any free one.
        token: ask for it on a loopback address too, where other users may have accounts.
        print_line: prints the address to open.

    Raises:
        UsageError: a path is not a run directory, or the address cannot be used.
    """
    local = _is_loopback(host)
    secret = secrets.token_urlsafe(24) if token or not local else ""
    site = Site(paths)

    async def work() -> None:
        try:
            sockets = bind_sockets(port, host)
        except OSError as error:
            remedy = "; --port 0 takes any free port" * (error.errno == errno.EADDRINUSE)
            reason = error.strerror or error
            raise UsageError(f"serve: {host}:{port} cannot be used: {reason}{remedy}") from None
        server = HTTPServer(application(site, secret, local))
        server.add_sockets(sockets)
        address = f"[{host}]" if ":" in host else host
        opened = f"http://{address}:{sockets[0].getsockname()[1]}/"
        print_line(f"serve: {opened}{f'?token={secret}' if secret else ''} (Ctrl-C ends)")
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
                loop.add_signal_handler(number, ended.set)
        await ended.wait()
        server.stop()

    asyncio.run(work())


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
