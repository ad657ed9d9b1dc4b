"""A real Envoy before an HTTP server, which asks a Fusebox whether a request may pass."""

import http.client
import http.server
import json
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

from fusebox import PATIENCE_SECONDS, TOOLS, environment, wait_until

TYPES = "type.googleapis.com/envoy.extensions"

# Flags of every Envoy here: it shares no memory with others, and needs no more than one thread.
ALONE = ("--use-dynamic-base-id", "--disable-hot-restart", "--concurrency", "1")
# A request is in the log when its answer is read.
LOG = ("--log-level", "warning", "--file-flush-interval-msec", "20")


@dataclass(frozen=True)
class Response:
    """What an HTTP client got."""

    status: int
    headers: http.client.HTTPMessage
    body: str


class Upstream:
    """An HTTP server that says yes to all, and remembers the path of each."""

    def __init__(self):
        self.served: list[str] = []
        upstream = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                upstream.served.append(self.path)
                self.send_response(HTTPStatus.OK)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = "{}:{}".format(*self._server.server_address)
        # The interval at which it looks whether it shall stop.
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05])
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Envoy:
    """One `envoy` on free loopback ports; `settings` are those of its filter."""

    def __init__(self, fusebox: str, upstream: str, **settings):
        self._directory = tempfile.TemporaryDirectory(prefix="envoy-interop-")
        directory = Path(self._directory.name)
        self._log, admin = directory / "log", directory / "admin"
        config = directory / "envoy.json"
        config.write_text(json.dumps(bootstrap(fusebox, upstream, settings)))
        command = [TOOLS / "envoy", *ALONE, "--config-path", config, "--admin-address-path", admin]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *LOG],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            # Port 0: the system picks one that is free, and Envoy writes which.
            self._wait_until(lambda: admin.exists() and admin.read_text(), "the admin address")
            self._wait_until(lambda: is_live(admin.read_text()), "/ready to answer 200")
            listeners = json.loads(fetch(admin.read_text(), "/listeners?format=json").body)
            (listener,) = listeners["listener_statuses"]
            address = listener["local_address"]["socket_address"]
            self.address = f"{address['address']}:{address['port_value']}"
        except BaseException:
            self.stop()
            raise

    def get(self, source: str = "127.0.0.1", **headers: str) -> Response:
        """Asks as the client at that address; the header `x_user` is called `x-user`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            return fetch(self.address, "/", named, source)
        except (OSError, http.client.HTTPException) as error:
            raise AssertionError(f"{error!r}\n{self.log()}") from None

    def log(self) -> str:
        """What it has logged so far: every request too."""
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """Leaves nothing behind, whatever happened before."""
        self._process.kill()
        self._process.wait()
        self._directory.cleanup()

    def _wait_until(self, condition, what: str) -> None:
        def holds() -> bool:
            if self._process.poll() is not None:
                raise AssertionError(f"exit code {self._process.returncode}\n{self.log()}")
            return condition()

        try:
            wait_until(holds, what)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None


def is_live(admin: str) -> bool:
    """Whether the Envoy behind this admin address serves."""
    try:
        return fetch(admin, "/ready").status == HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False


def fetch(
    address: str, path: str, headers: Mapping[str, str] = {}, source: str = "127.0.0.1"
) -> Response:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection(
        address, timeout=PATIENCE_SECONDS, source_address=(source, 0)
    )
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return Response(response.status, response.headers, response.read().decode())
    finally:
        connection.close()


def described_by(*entries: dict) -> dict:
    """What describes requests that have all these entries, for `rate_limits` of the filter."""
    return {"actions": list(entries)}


def header(name: str, key: str) -> dict:
    """An entry whose value is that of a header."""
    return {"request_headers": {"header_name": name, "descriptor_key": key}}


def generic(key: str, value: str) -> dict:
    """An entry that all requests have."""
    return {"generic_key": {"descriptor_key": key, "descriptor_value": value}}


REMOTE_ADDRESS = {"remote_address": {}}

# Shows clients what only Envoy gets.
METADATA = {"key": "x-metadata", "value": "%DYNAMIC_METADATA(envoy.filters.http.ratelimit)%"}


def bootstrap(fusebox: str, upstream: str, settings: dict) -> dict:
    """Envoy's configuration."""
    return {
        "admin": {"address": socket_address("127.0.0.1:0")},
        "static_resources": {
            "listeners": [listener(settings)],
            "clusters": [
                cluster("upstream", upstream),
                cluster("fusebox", fusebox)
                | {
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": f"{TYPES}.upstreams.http.v3.HttpProtocolOptions",
                            "explicit_http_config": {"http2_protocol_options": {}},
                        }
                    }
                },
            ],
        },
    }


def listener(settings: dict) -> dict:
    manager = {
        "@type": f"{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "http",
        # The address of a client is where it connects from, whatever its headers say.
        "use_remote_address": True,
        "access_log": [
            {
                "name": "stderr",
                "typed_config": {"@type": f"{TYPES}.access_loggers.stream.v3.StderrAccessLog"},
            }
        ],
        "http_filters": [
            {"name": "envoy.filters.http.ratelimit", "typed_config": filter_config(settings)},
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{TYPES}.filters.http.router.v3.Router"},
            },
        ],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "upstream"}}],
                    "response_headers_to_add": [{"header": METADATA}],
                }
            ]
        },
    }
    network_filter = {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": manager,
    }
    return {
        "name": "http",
        "address": socket_address("127.0.0.1:0"),
        "filter_chains": [{"filters": [network_filter]}],
    }


def filter_config(settings: dict) -> dict:
    return {
        "@type": f"{TYPES}.filters.http.ratelimit.v3.RateLimit",
        "domain": "shop",
        # The default is 20 ms, and to let pass what nobody judged: a slow machine would look like no limit.
        "timeout": "2s",
        "failure_mode_deny": True,
        "enable_x_ratelimit_headers": "DRAFT_VERSION_03",
        "rate_limit_service": {
            "transport_api_version": "V3",
            "grpc_service": {"envoy_grpc": {"cluster_name": "fusebox"}},
        },
    } | settings


def cluster(name: str, address: str) -> dict:
    endpoint = {"endpoint": {"address": socket_address(address)}}
    return {
        "name": name,
        "type": "STATIC",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [endpoint]}],
        },
    }


def socket_address(address: str) -> dict:
    parts = urlsplit(f"//{address}")
    return {"socket_address": {"address": parts.hostname, "port_value": parts.port}}
